"""Patch objects on disk: what is written is read back, other tools understand it, and any damage is noticed."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elfdiff.diff import Options, diff
from elfdiff.errors import BadInput, LivegraftError
from elfdiff.patches.patchfile import read_patch, write_patch
from elfdiff.patches.secondopinion import confirm, confirm_with_lief
from elfdiff.patchobject import PatchObject
from tests.compile import Compiler
from tests.verdict import program

STRIDE = 37

RICH = program(
    "static int a; static long b; NEW static int c; static const char *const t[] = {\"x\", \"y TEXT\"};\n"
    "SEPARATE int edited(int x) { puts(t[x & 1]); a += x; EDIT; return c; }\n"
    "SEPARATE int uses(int x) { b -= x; c ^= 3; a *= b; return a; }\n",
    "edited(n) + uses(n)", NEW=("", "static long added;"), EDIT=("", "if (added++ > 3) puts(\"more\")"),
    TEXT=("cat", "dog"),
)  # fmt: skip
"""Code, constants with pointers, a variable of the patch's own."""


@pytest.fixture(scope="module", params=["pie", "no-pie"])
def made(request: pytest.FixtureRequest, compiled: Compiler) -> PatchObject:
    sources = RICH.sources(0), RICH.sources(1)
    return diff(*(compiled(s, link=request.param) for s in sources), Options())


@pytest.fixture
def path(made: PatchObject, tmp_path: Path) -> Path:
    path = tmp_path / "fix.patch"
    write_patch(made, path)
    return path


def test_what_is_written_is_read_back(made: PatchObject, tmp_path: Path) -> None:
    written = write_patch(made, tmp_path / "fix")
    read = read_patch(tmp_path / "fix")
    assert written.id == read.id != ""
    assert (read.relocations == made.relocations).all()
    for name in made.__dataclass_fields__.keys() - {"id", "relocations"}:
        assert getattr(read, name) == getattr(made, name), name


def test_the_same_patch_has_the_same_id_and_bytes(made: PatchObject, tmp_path: Path) -> None:
    first, second = write_patch(made, tmp_path / "a"), write_patch(made, tmp_path / "b")
    assert first.id == second.id
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_binutils_read_it_without_a_warning(path: Path) -> None:
    for command in (["readelf", "-aW"], ["objdump", "-dr"], ["nm"], ["size"]):
        done = subprocess.run([*command, path], capture_output=True, text=True, check=True)
        assert "arning" not in done.stdout + done.stderr, command
        assert done.stderr == "", command


def test_objdump_disassembles_its_functions_at_the_new_build_s_addresses(made: PatchObject, path: Path) -> None:
    listing = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout
    for function in made.functions:
        assert f"{function.new_start:016x} <" in listing


def test_pyelftools_sees_what_was_meant(made: PatchObject, path: Path) -> None:
    with path.open("rb") as stream:
        elf = ELFFile(stream)
        loads = [s for s in elf.iter_segments() if s["p_type"] == "PT_LOAD"]
        assert [(s["p_vaddr"], s["p_memsz"], s["p_flags"]) for s in loads] == [
            (s.vaddr, s.size, s.flags) for s in made.segments
        ]
        assert [s.data().rstrip(b"\0") for s in loads] == [s.data.rstrip(b"\0") for s in made.segments]
        rows = list(elf.get_section_by_name(".rela.livegraft").iter_relocations())
        assert [r["r_offset"] for r in rows] == made.relocations["place"].tolist()
        assert [r["r_info_type"] for r in rows] == made.relocations["type"].tolist()
        assert [r["r_addend"] for r in rows] == made.relocations["addend"].tolist()
        symbols = {s.name for s in elf.get_section_by_name(".symtab").iter_symbols()}
        assert {f.name for f in made.functions} <= symbols
        (note,) = [n for s in elf.iter_sections() if s.name == ".note.gnu.build-id" for n in s.iter_notes()]
        assert note["n_desc"] == made.new.build_id


@pytest.mark.parametrize("reader", [confirm, confirm_with_lief])
def test_other_readers_confirm_what_was_meant_and_nothing_else(reader, made: PatchObject, path: Path) -> None:
    reader(made, path)
    first, *others = made.segments
    changed = bytes([first.data[0] ^ 1]) + first.data[1:]
    for other in (
        replace(made, segments=(replace(first, data=changed), *others)),
        replace(made, segments=(replace(first, flags=first.flags ^ 2), *others)),
        replace(made, segments=tuple(others)),
        replace(made, functions=made.functions[1:]),
    ):
        with pytest.raises(LivegraftError, match="not as it was meant"):
            reader(other, path)


@pytest.mark.parametrize("reader", [confirm, confirm_with_lief])
def test_other_readers_refuse_what_is_no_elf_file(reader, made: PatchObject, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not an ELF file, but longer than an ELF header is" * 8)
    with pytest.raises(LivegraftError, match="not as it was meant"):
        reader(made, tmp_path / "text")


def test_relocations_are_sorted_and_lie_in_segments_apart_from_each_other(made: PatchObject) -> None:
    places = made.relocations["place"].astype(np.int64)
    sizes = np.where(made.relocations["type"] == 1, 8, 4)
    assert (places[1:] >= places[:-1] + sizes[:-1]).all()
    for place, size in zip(places.tolist(), sizes.tolist(), strict=True):
        assert any(s.vaddr <= place and place + size <= s.vaddr + s.size for s in made.segments)


def test_no_segment_is_writable_and_executable_or_shares_a_page(made: PatchObject) -> None:
    ends = 0
    for segment in made.segments:
        assert segment.flags & 3 != 3
        assert segment.vaddr % 4096 == segment.size % 4096 == 0
        assert segment.vaddr >= ends
        ends = segment.vaddr + segment.size


def test_code_that_is_not_the_patch_s_is_int3(made: PatchObject) -> None:
    (code,) = [s for s in made.segments if s.flags & 1]
    kept = np.zeros(code.size, np.bool_)
    for f in made.functions:
        kept[f.new_start - code.vaddr : f.new_start - code.vaddr + f.new_size] = True
    raw = np.frombuffer(code.data.ljust(code.size, b"\0"), np.uint8)
    assert set(raw[~kept].tolist()) <= {0xCC, 0}


def test_the_checked_ranges_are_digests_of_the_old_file(made: PatchObject, compiled: Compiler) -> None:
    from tests.truth import Truth

    link = "no-pie" if made.old.fixed_address else "pie"
    old = Truth(compiled(RICH.sources(0), link=link, stripped=False))
    assert {f.old_start for f in made.functions if f.old_start is not None} <= {c.start for c in made.checked}
    for item in made.checked:
        assert hashlib.blake2b(old.read(item.start, item.size), digest_size=16).hexdigest() == item.digest


def test_every_flipped_byte_is_noticed(path: Path) -> None:
    raw = path.read_bytes()
    damaged = path.with_name("damaged")
    for at in range(0, len(raw), STRIDE):
        changed = bytearray(raw)
        changed[at] ^= 0x41
        damaged.write_bytes(changed)
        with pytest.raises(BadInput):
            read_patch(damaged)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_noticed(path: Path, data: st.DataObject) -> None:
    raw = path.read_bytes()
    at = data.draw(
        st.one_of(st.integers(0, len(raw) - 1), st.integers(0, 64), st.integers(len(raw) - 900, len(raw) - 1))
    )
    damage = data.draw(st.binary(min_size=1, max_size=9))
    changed = (raw[:at] + damage + raw[at + len(damage) :])[
        : data.draw(st.sampled_from([len(raw), len(raw), len(raw) - 1]))
    ]
    damaged = path.with_name("damaged")
    damaged.write_bytes(changed)
    if changed != raw:
        with pytest.raises(BadInput):
            read_patch(damaged)


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_a_cut_file_is_noticed(share: float, path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(BadInput) as caught:
        read_patch(path)
    assert caught.value.exit_code == 2
    assert caught.value.next_step


def test_what_is_appended_is_noticed(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(BadInput):
        read_patch(path)


def redigested(path: Path, old: bytes, new: bytes) -> None:
    """Replaces bytes of the metadata by as many others, and makes the digest fit."""
    raw = bytearray(path.read_bytes())
    assert len(old) == len(new) and raw.count(old) == 1
    raw[:] = raw.replace(old, new)
    with path.open("rb") as stream:
        section = ELFFile(stream).get_section_by_name(".livegraft.digest")
        at, size = section["sh_offset"], section["sh_size"]
    raw[at : at + size] = bytes(size)
    raw[at : at + size] = hashlib.sha256(bytes(raw)).digest()
    path.write_bytes(raw)


def test_another_format_is_named(path: Path) -> None:
    metadata = json.loads(section_bytes(path, ".livegraft"))
    redigested(path, f'"format":{metadata["format"]}'.encode(), b'"format":9')
    with pytest.raises(BadInput) as caught:
        read_patch(path)
    assert "format 9" in caught.value.why


@pytest.mark.parametrize(("old", "new"), [(b'"segments"', b'"segmentz"'), (b'"reason":"code"', b'"reason":"c0de"'),
                                          (b'"magic"', b'"magi"c')])  # fmt: skip
def test_metadata_of_another_shape_is_bad_input(old: bytes, new: bytes, path: Path) -> None:
    if path.read_bytes().count(old) != 1:
        old, new = b'"removed"', b'"rem0ved"'
    redigested(path, old, new)
    with pytest.raises(BadInput):
        read_patch(path)


def section_bytes(path: Path, name: str) -> bytes:
    with path.open("rb") as stream:
        data = ELFFile(stream).get_section_by_name(name).data()
        assert isinstance(data, bytes)
        return data


@pytest.mark.parametrize(
    "content", [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF" + bytes(60), b"\x7fELF" + b"\xff" * 200]
)
def test_what_is_no_patch_is_bad_input(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(BadInput):
        read_patch(path)


def test_a_program_is_no_patch(compiled: Compiler) -> None:
    with pytest.raises(BadInput):
        read_patch(compiled(RICH.sources(0)))


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_path_that_is_no_file_is_bad_input(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        read_patch(tmp_path / name)


def test_a_folder_that_does_not_exist_is_bad_input(made: PatchObject, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        write_patch(made, tmp_path / "missing" / "fix")


def test_nothing_is_left_behind_but_the_patch(path: Path) -> None:
    assert list(path.parent.iterdir()) == [path]
