"""The cache of analyses: it changes no result, survives damage and company, and believes nobody else."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from elfdiff import cache as cache_module
from elfdiff.cache import Cache
from elfdiff.decoding.code import Code, load_code
from elfdiff.diff import Options, diff
from elfdiff.errors import LivegraftError, NotPermitted
from elfdiff.images.image import Image
from elfdiff.images.imagefile import load_image
from elfdiff.patches.patchfile import write_patch
from fixtures.hearing import next_line
from patcher.commands import diff as command
from tests.compile import Compiler

SOURCE = """#include <stdio.h>
int main(int n, char **v) { switch (n) { case 1: puts(v[0]); break; case 7: return 4; } return %d; }
"""


@pytest.fixture(scope="module", params=["pie", "no-pie"])
def path(request: pytest.FixtureRequest, compiled: Compiler) -> Path:
    return compiled(SOURCE % 3, link=request.param)


@pytest.fixture
def image(path: Path) -> Image:
    return load_image(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def assert_same(first: Code, second: Code) -> None:
    for mine, theirs in ((first, second), (first.decoded, second.decoded), (first.references, second.references)):
        for field in fields(mine):
            a, b = getattr(mine, field.name), getattr(theirs, field.name)
            if isinstance(a, np.ndarray):
                assert a.dtype == b.dtype and np.array_equal(a, b), field.name
    assert first.base == second.base


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def kept(folder: Path, image: Image) -> Path:
    with Cache(folder) as cache:
        cache.code(image)
    (entry,) = entries(folder)
    return entry


def never(image: Image) -> Code:
    raise AssertionError(f"{image.path} was analysed again")


def test_what_comes_out_of_the_cache_is_what_the_analysis_says(
    image: Image, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = load_code(image)
    with Cache(folder) as cache:
        assert_same(cache.code(image), made)
        monkeypatch.setattr(cache_module, "load_code", never)
        assert_same(cache.code(image), made)


def test_patches_have_the_same_bytes_with_and_without_cache_and_hash_seeds(compiled: Compiler, tmp_path: Path) -> None:
    old, new = compiled(SOURCE % 3), compiled(SOURCE % 5)
    results = []
    for number, options in enumerate([Options(), *[Options(cache=tmp_path / "kept")] * 2]):
        write_patch(diff(old, new, options), tmp_path / f"{number}.patch")
        results.append((tmp_path / f"{number}.patch").read_bytes())
    for seed in ("1",):  # this process has another
        out = tmp_path / f"seed{seed}.patch"
        command = [sys.executable, "-m", "patcher.cli", "diff", old, new, "-o", out, "--no-cache"]
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True)
        results.append(out.read_bytes())
    assert len(set(results)) == 1


def test_another_build_or_another_analysis_has_another_entry(
    compiled: Compiler, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = load_image(compiled(SOURCE % 3)), load_image(compiled(SOURCE % 5))
    with Cache(folder) as cache:
        cache.code(first)
        assert_same(cache.code(second), load_code(second))
        assert len(entries(folder)) == 2
        monkeypatch.setattr(cache_module, "sources", lambda: "edited")
        cache.code(first)
    assert len(entries(folder)) == 3


def test_every_source_of_the_differ_counts_wherever_it_stands(tmp_path: Path) -> None:
    package = Path(cache_module.__file__).parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))

    def digest() -> str:
        script = "from elfdiff.cache import sources; print(sources())"
        command = [sys.executable, "-c", script]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert digest() == f"{cache_module.sources()}\n"
    seen = {digest()}
    for name in ("errors.py", "findings/startup.py", "findings/__init__.py"):
        with (tmp_path / package.name / name).open("a") as source:
            source.write("# edited\n")
        seen.add(digest())
    (tmp_path / package.name / "findings").joinpath("more.py").touch()
    assert len(seen | {digest()}) == 5


def test_a_build_with_the_id_of_another_is_not_taken_for_it(image: Image, folder: Path) -> None:
    kept(folder, image)
    forged = image.memory.copy()
    section = image.section(".text")
    assert section is not None
    forged[section.start - image.base] ^= 1
    with Cache(folder) as cache:
        other = Image(**{**{f.name: getattr(image, f.name) for f in fields(image)}, "memory": forged})
        assert_same(cache.code(other), load_code(other))
    assert len(entries(folder)) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "head", "body", "end", "longer", "table"])
def test_a_damaged_entry_is_discarded_and_said_so(
    damage: str, image: Image, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = kept(folder, image)
    whole = entry.read_bytes()
    places = {"head": 3, "body": len(whole) // 2, "end": len(whole) - ALIGNED_END}
    if damage in places:
        at = places[damage]
        raw = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    else:
        raw = {
            "cut": whole[:-100],
            "empty": b"",
            "longer": whole + b"more",
            "table": whole.replace(b'"decoded.modrm"', b'"decoded.m0drm"'),
        }[damage]
    entry.write_bytes(raw)
    with caplog.at_level(logging.DEBUG, "elfdiff.cache"), Cache(folder) as cache:
        assert_same(cache.code(image), load_code(image))
    assert "damaged" in caplog.text
    assert entry.read_bytes() == whole


ALIGNED_END = 65
"""Bytes from the end at which content lies, not padding."""


def test_an_entry_that_disappears_is_made_again(image: Image, folder: Path) -> None:
    entry = kept(folder, image)
    with Cache(folder) as cache:
        found = cache.code(image)
        entry.unlink()
        assert_same(found, load_code(image))  # what was read stays
        assert_same(cache.code(image), found)
        entry.unlink()
        folder.rmdir()  # the folder itself goes while it is open: nothing can be kept, nothing fails
        assert_same(cache.code(image), found)


def test_two_processes_at_once(path: Path, folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from elfdiff.cache import Cache; from elfdiff.images.imagefile import load_image\n"
        "image = load_image(Path(sys.argv[1])); print('ready', flush=True); sys.stdin.readline()\n"
        "with Cache(Path(sys.argv[2])) as cache:\n"
        "    for _ in range(20):\n"
        "        print(len(cache.code(image)), flush=True)\n"
        "        [entry.unlink(missing_ok=True) for entry in Path(sys.argv[2]).glob('[!.]*')]\n"
    )
    command = [sys.executable, "-c", script, str(path), str(folder)]
    both = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        assert next_line(process) == "ready"
    results = [process.communicate("go\n", timeout=60) for process in both]
    expected = f"{len(load_code(load_image(path)))}\n" * 20
    assert results == [(expected, "")] * 2


def test_the_least_recently_used_goes_first(compiled: Compiler, folder: Path) -> None:
    images = [load_image(compiled(SOURCE % number)) for number in (3, 5, 11)]
    entry = kept(folder, images[0])
    limit = 5 * entry.stat().st_size // 2  # room for two
    with Cache(folder, limit) as cache:
        cache.code(images[1])
        (second,) = set(entries(folder)) - {entry}
        os.utime(entry, (1, 1))
        os.utime(second, (2, 2))
        cache.code(images[0])  # used: now the younger one
        cache.code(images[2])
    assert entry in entries(folder) and second not in entries(folder) and len(entries(folder)) == 2


def test_what_a_dead_process_left_is_cleared_away(image: Image, folder: Path) -> None:
    folder.mkdir(0o700)
    old, fresh = folder / ".old.1.x", folder / ".fresh.2.x"
    old.touch()
    fresh.touch()
    os.utime(old, (1, 1))
    with Cache(folder) as cache:
        cache.code(image)
    assert not old.exists() and fresh.exists()


@pytest.mark.parametrize("mode", [0o777, 0o722, 0o770])
def test_a_folder_that_others_may_write_is_refused(mode: int, folder: Path) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(NotPermitted, match="not a folder of this user alone"):
        Cache(folder)


def test_a_link_or_a_file_in_its_place_is_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "real").mkdir(0o700)
    folder.symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for place in (folder, tmp_path / "file"):
        with pytest.raises(NotPermitted):
            Cache(place)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of another user's")
def test_a_folder_or_an_entry_of_another_user_is_not_believed(
    image: Image, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = kept(folder, image)
    os.chown(entry, 65534, 65534)
    with caplog.at_level(logging.DEBUG, "elfdiff.cache"), Cache(folder) as cache:
        assert_same(cache.code(image), load_code(image))
    assert "not this user's alone" in caplog.text
    assert entry.stat().st_uid == 0  # replaced
    os.chown(folder, 65534, 65534)
    with pytest.raises(NotPermitted) as refused:
        Cache(folder)
    assert "65534" in refused.value.why


def test_what_is_kept_is_closed_to_others(image: Image, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        entry = kept(tmp_path / "a" / "b", image)
    finally:
        os.umask(before)
    assert entry.stat().st_mode & 0o077 == 0 == entry.parent.stat().st_mode & 0o077


def test_the_command_line_and_the_environment_say_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(*words: str, **environment: Path | str) -> Path | None:
        for name in ("LIVEGRAFT_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        parser = argparse.ArgumentParser()
        command.add_comparison(parser)
        return command.cache_folder(parser.parse_args(words))

    variable, xdg, home = tmp_path / "variable", tmp_path / "xdg", tmp_path / "home"
    assert place("--cache-dir", "/named", LIVEGRAFT_CACHE=variable) == Path("/named")
    assert place(LIVEGRAFT_CACHE=variable, XDG_CACHE_HOME=xdg) == variable
    assert place(XDG_CACHE_HOME=xdg, HOME=home) is None  # a cache is made only where somebody asks for one
    assert place("--no-cache", LIVEGRAFT_CACHE=variable) is None
    with pytest.raises(SystemExit):
        place("--no-cache", "--cache-dir", "/named")


def test_a_cache_that_was_asked_for_and_is_refused_ends_the_comparison(compiled: Compiler, folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(NotPermitted) as refused:
        diff(compiled(SOURCE % 3), compiled(SOURCE % 5), Options(cache=folder))
    assert "--no-cache" in refused.value.next_step


def test_errors_of_the_analysis_are_not_kept(image: Image, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(image: Image) -> Code:
        raise LivegraftError("no code")

    with Cache(folder) as cache:
        monkeypatch.setattr(cache_module, "load_code", fails)
        with pytest.raises(LivegraftError, match="no code"):
            cache.code(image)
    assert entries(folder) == []
