"""What a person can get wrong when naming files: one clear message, the right exit status, nothing left behind."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.compile import Compiler, altered
from tests.forkserver import Outcome, livegraft, run
from tests.fuzz import C_PAIR

E_CLASS, E_DATA, E_MACHINE = 4, 5, 18


@pytest.fixture(scope="module")
def compiled(cache_folder: Path) -> Compiler:
    return Compiler(cache_folder / "compiled")


@dataclass(frozen=True)
class Good:
    """A pair that gives a patch, and a folder for files that are not good."""

    old: Path
    new: Path
    folder: Path


@pytest.fixture
def good(compiled: Compiler, tmp_path: Path) -> Good:
    return Good(*compiled.pair(C_PAIR.sources(0), C_PAIR.sources(1)), tmp_path)


def directory(good: Good) -> Path:
    return good.folder


def missing(good: Good) -> Path:
    return good.folder / "missing"


def below_a_file(good: Good) -> Path:
    return good.new / "program"


def written(name: str, content: bytes) -> Callable[[Good], Path]:
    def make(good: Good) -> Path:
        path = good.folder / name
        path.write_bytes(content)
        return path

    return make


def with_bytes(*changes: tuple[int, bytes]) -> Callable[[Good], Path]:
    return lambda good: altered(good.new, good.folder, dict(changes))


def object_file(good: Good) -> Path:
    path = good.folder / "x.o"
    subprocess.run(["gcc", "-x", "c", "-c", "-o", path, "-"], input=b"int f(void){return 3;}", check=True)
    return path


def archive(good: Good) -> Path:
    path = good.folder / "x.a"
    subprocess.run(["ar", "rc", path, object_file(good)], check=True)
    return path


def core_file(good: Good) -> Path:
    """As gdb writes it of a process of ours."""
    path = good.folder / "core"
    subprocess.run(
        ["gdb", "-nx", "-batch", "-ex", "starti", "-ex", f"generate-core-file {path}", "--args", good.new],
        stdin=subprocess.DEVNULL, capture_output=True, check=True,
    )  # fmt: skip
    return path


def debug_file(good: Good) -> Path:
    path = good.folder / "x.debug"
    subprocess.run(["objcopy", "--only-keep-debug", good.new, path], check=True)
    return path


def fifo(good: Good) -> Path:
    path = good.folder / "fifo"
    os.mkfifo(path)
    return path


def device(good: Good) -> Path:
    return Path("/dev/zero")


def sparse(good: Good) -> Path:
    """A terabyte of nothing."""
    path = good.folder / "sparse"
    path.touch()
    os.truncate(path, 1 << 40)
    return path


def loop(good: Good) -> Path:
    path = good.folder / "loop"
    path.symlink_to(path)
    return path


def patch_object(good: Good) -> Path:
    path = good.folder / "fix.patch"
    assert run(lambda _: livegraft("diff", good.old, good.new, "-o", path)).status == 0
    return path


NO_BUILDS: dict[str, tuple[Callable[[Good], Path], str]] = {
    "a directory": (directory, "this is a directory"),
    "no such file": (missing, "No such file"),
    "a path through a file": (below_a_file, "Not a directory"),
    "a link to itself": (loop, "symbolic links"),
    "an empty file": (written("empty", b""), "the file is empty"),
    "a text": (written("text", b"int main;\n" * 20), "not an ELF file"),
    "a script": (written("script", b"#!/bin/sh\necho\n"), "a script"),
    "three bytes": (written("short", b"\x7fEL"), "not an ELF file"),
    "a header alone": (written("header", b"\x7fELF\x02\x01\x01"), "only 7 bytes"),
    "an object file": (object_file, "an object file"),
    "an archive": (archive, "an archive"),
    "a core file": (core_file, "a core file"),
    "a debug file": (debug_file, "a separate debug file"),
    "a patch object": (patch_object, "this is a patch object"),
    "a 32-bit program": (with_bytes((E_CLASS, b"\1")), "32-bit"),
    "a big-endian program": (with_bytes((E_DATA, b"\2"), (E_MACHINE, b"\0\x16")), "big-endian"),
    "an AArch64 program": (with_bytes((E_MACHINE, b"\xb7\0")), "machine 183"),
    "a FIFO": (fifo, "this is a FIFO"),
    "a device": (device, "this is a device"),
    "a sparse file": (sparse, "not an ELF file"),
}


def clear(outcome: Outcome, status: int, words: str) -> None:
    assert not outcome.fault
    assert outcome.status == status, outcome.stderr
    assert words in outcome.stderr
    assert outcome.stderr.count("livegraft: ") == 1, outcome.stderr
    assert "  next: " in outcome.stderr
    assert outcome.left == ()


@pytest.mark.parametrize("name", NO_BUILDS)
def test_what_is_no_build_is_named(name: str, good: Good) -> None:
    make, words = NO_BUILDS[name]
    other = make(good)
    clear(run(lambda work: livegraft("diff", other, good.new, "-o", work / "patch")), 2, words)
    clear(run(lambda work: livegraft("diff", good.old, other, "-o", work / "patch")), 2, words)


@pytest.mark.parametrize("name", [name for name in NO_BUILDS if name != "a patch object"])
def test_what_is_no_patch_is_named(name: str, good: Good) -> None:
    other = NO_BUILDS[name][0](good)
    clear(run(lambda work: livegraft("inspect", other)), 2, str(other))
    clear(run(lambda work: livegraft("check", other, "--pid", os.getppid())), 2, str(other))


def test_a_build_is_no_patch(good: Good) -> None:
    clear(run(lambda work: livegraft("inspect", good.new)), 2, "not a livegraft patch object")


CAPGET, CAPSET = 125, 126  # system calls on x86-64
CAPABILITY_VERSION_3 = 0x20080522
OVERRIDE = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: capabilities(7)


def without_override(task: Callable[[Path], int]) -> Callable[[Path], int]:
    """Root is asked for permission like anybody else (capset(2))."""

    def drop(work: Path) -> int:
        syscall = ctypes.CDLL(None, use_errno=True).syscall
        header, sets = struct.pack("<Ii", CAPABILITY_VERSION_3, 0), ctypes.create_string_buffer(24)
        assert syscall(CAPGET, header, sets) == 0, os.strerror(ctypes.get_errno())
        effective, *others = struct.unpack("<6I", sets.raw)
        assert syscall(CAPSET, header, struct.pack("<6I", effective & ~OVERRIDE, *others)) == 0
        return task(work)

    return drop


def test_a_file_without_permission_is_named(good: Good) -> None:
    closed = written("closed", good.old.read_bytes())(good)
    closed.chmod(0)
    compare = without_override(lambda work: livegraft("diff", closed, good.new, "-o", work / "patch"))
    clear(run(compare), 2, "Permission denied")
    clear(run(without_override(lambda _: livegraft("inspect", closed))), 2, "Permission denied")


def test_a_folder_without_permission_is_named(good: Good) -> None:
    for mode in (0o500, 0o000):
        folder = good.folder / str(mode)
        folder.mkdir()
        folder.chmod(mode)
        output = folder / "patch"
        compare = without_override(lambda _, output=output: livegraft("diff", good.old, good.new, "-o", output))
        clear(run(compare), 2, "ermission denied")
        folder.chmod(0o700)
        assert list(folder.iterdir()) == []


def test_builds_of_two_programs_are_named(good: Good, kv: Callable[..., Path]) -> None:
    """Either way round."""
    other = kv(1)
    for pair in ((good.old, other), (other, good.new)):
        clear(run(lambda work, pair=pair: livegraft("diff", *pair, "-o", work / "patch")), 2, "two different programs")


def test_a_build_without_id_is_refused(good: Good, compiled: Compiler) -> None:
    nameless = compiled(C_PAIR.sources(1), "-Wl,--build-id=none")
    clear(run(lambda work: livegraft("diff", good.old, nameless, "-o", work / "patch")), 4, "no build-id")


def test_a_hole_behind_a_build_is_not_read(good: Good) -> None:
    """A terabyte of it."""
    large = written("large", good.new.read_bytes())(good)
    os.truncate(large, 1 << 40)
    clear(run(lambda work: livegraft("diff", good.old, large, "-o", work / "patch")), 2, "1099511627776 bytes")


def test_a_hole_behind_a_patch_is_not_read(good: Good) -> None:
    path = patch_object(good)
    os.truncate(path, 1 << 40)
    clear(run(lambda _: livegraft("inspect", path)), 2, "is believed")


# -- the output ---------------------------------------------------------------------------------------------------


def no_folder(good: Good) -> Path:
    return good.folder / "missing" / "patch"


NO_OUTPUTS: dict[str, tuple[Callable[[Good], Path], str]] = {
    "a directory": (directory, "no regular file"),
    "no folder": (no_folder, "is no folder"),
    "a file for a folder": (below_a_file, "is no folder"),
    "a FIFO": (fifo, "no regular file"),
    "a device": (lambda good: Path("/dev/null"), "no regular file"),
    "a name that is too long": (lambda good: good.folder / ("x" * 300), "too long"),
    "the old build": (lambda good: good.old, "would replace"),
    "the new build": (lambda good: good.new, "would replace"),
}


@pytest.mark.parametrize("name", NO_OUTPUTS)
def test_an_output_that_cannot_be_is_named(name: str, good: Good) -> None:
    make, words = NO_OUTPUTS[name]
    output, before = make(good), (good.old.read_bytes(), good.new.read_bytes())
    clear(run(lambda _: livegraft("diff", good.old, good.new, "-o", output)), 2, words)
    assert before == (good.old.read_bytes(), good.new.read_bytes())
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert [p for p in good.folder.rglob("*") if p.name != "fifo"] == []


def test_a_build_under_another_name_is_not_replaced(good: Good) -> None:
    link = good.folder / "link"
    os.link(good.old, link) if good.old.stat().st_dev == good.folder.stat().st_dev else link.symlink_to(good.old)
    clear(run(lambda _: livegraft("diff", good.old, good.new, "-o", link)), 2, "would replace")


def test_an_old_patch_is_replaced_whole(good: Good) -> None:
    path = patch_object(good)
    before = path.read_bytes()
    path.write_bytes(b"old")
    assert patch_object(good) == path
    assert path.read_bytes() == before
    assert list(good.folder.iterdir()) == [path]


# -- a file that changes while it is read -------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["written to", "shorter"])
def test_a_file_that_changes_while_it_is_read_is_named(change: str, good: Good) -> None:
    path = written("changing", good.new.read_bytes())(good)

    def compare(work: Path) -> int:
        import elfdiff.images.imagefile

        load = elfdiff.images.imagefile._Reader._load

        def slowly(reader: object) -> object:
            with path.open("r+b") as stream:
                stream.truncate(5000) if change == "shorter" else stream.write(b"\x7f")
            os.utime(path, ns=(0, 1))
            return load(reader)  # type: ignore[arg-type]

        elfdiff.images.imagefile._Reader._load = slowly  # type: ignore[assignment,method-assign]
        return livegraft("diff", path, good.old, "-o", work / "patch")

    clear(run(compare), 2, "changed while it was read")
