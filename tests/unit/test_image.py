"""Files that are no program, no pair, cut or damaged: an error with its exit code, never anything else."""

from __future__ import annotations

import contextlib
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elfdiff.decoding.code import load_code
from elfdiff.diff import Options, diff
from elfdiff.errors import BadInput, LivegraftError, NothingToPatch, Refused
from elfdiff.images.image import Kind
from elfdiff.images.imagefile import load_image
from tests.compile import Compiler, altered
from tests.verdict import program

PAIR = program("static int a;\nSEPARATE int edited(int x) { a += STEP; return a * x; }\n", "edited(n)", STEP=("3", "5"))
E_TYPE, E_MACHINE, E_CLASS = 16, 18, 4
MEMORY = 11 << 29
"""Bytes that may come to those that the tests before have left in this process."""


@pytest.fixture
def old(compiled: Compiler) -> Path:
    return compiled(PAIR.sources(0))


@pytest.fixture
def new(compiled: Compiler) -> Path:
    return compiled(PAIR.sources(1))


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """A damaged header must not make us allocate what it says."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refusal(old: Path, new: Path) -> LivegraftError:
    with pytest.raises(LivegraftError) as caught:
        diff(old, new, Options())
    assert caught.value.what and caught.value.next_step
    return caught.value


@pytest.mark.parametrize(
    "content", [b"", b"\x7f", b"\x7fELF", b"#!/bin/sh\necho\n", bytes(5000), b"\x7fELF\x02\x01\x01" + bytes(57)]
)
def test_what_is_no_program_is_bad_input(content: bytes, new: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(content)
    assert isinstance(refusal(other, new), BadInput)
    assert isinstance(refusal(new, other), BadInput)


def test_what_is_no_file_is_bad_input(new: Path, tmp_path: Path) -> None:
    assert isinstance(refusal(tmp_path / "missing", new), BadInput)
    assert isinstance(refusal(tmp_path, new), BadInput)


def test_the_same_file_twice_is_nothing_to_patch(old: Path) -> None:
    assert isinstance(refusal(old, old), NothingToPatch)


def test_position_independent_and_fixed_are_no_pair(compiled: Compiler) -> None:
    fixed = compiled(PAIR.sources(1), link="no-pie")
    assert isinstance(refusal(compiled(PAIR.sources(0)), fixed), Refused)


def test_a_build_without_id_is_refused(compiled: Compiler, old: Path) -> None:
    assert isinstance(refusal(old, compiled(PAIR.sources(1), "-Wl,--build-id=none")), Refused)


def test_an_object_file_is_bad_input(old: Path, tmp_path: Path) -> None:
    subprocess.run(["gcc", "-x", "c", "-c", "-o", tmp_path / "x.o", "-"], input=b"int f(void){return 3;}", check=True)
    assert "object file" in refusal(old, tmp_path / "x.o").what


@pytest.mark.parametrize(("kind", "word"), [(4, "core"), (0, "no type"), (0xFE00, "")])
def test_another_kind_of_file_is_bad_input(kind: int, word: str, old: Path, new: Path, tmp_path: Path) -> None:
    error = refusal(old, altered(new, tmp_path, {E_TYPE: struct.pack("<H", kind)}))
    assert isinstance(error, BadInput) and word in error.what


@pytest.mark.parametrize("machine", [3, 183, 243, 0xFFFF])
def test_another_machine_is_bad_input(machine: int, old: Path, new: Path, tmp_path: Path) -> None:
    error = refusal(old, altered(new, tmp_path, {E_MACHINE: struct.pack("<H", machine)}))
    assert isinstance(error, BadInput) and str(machine) in error.why


def test_a_32_bit_program_is_bad_input(old: Path, new: Path, tmp_path: Path) -> None:
    error = refusal(old, altered(new, tmp_path, {E_CLASS: b"\x01"}))
    assert isinstance(error, BadInput) and "32-bit" in error.why


def test_a_program_without_section_headers_is_refused(old: Path, new: Path, tmp_path: Path) -> None:
    cut = altered(new, tmp_path, {0x28: bytes(8), 0x3A: bytes(6)})  # e_shoff, e_shentsize, e_shnum, e_shstrndx
    assert isinstance(refusal(old, cut), Refused)


def test_a_program_without_unwind_tables_is_refused(compiled: Compiler, old: Path, new: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run(["objcopy", "--remove-section=.eh_frame", "--remove-section=.eh_frame_hdr", new, bare], check=True)
    assert isinstance(refusal(old, bare), Refused)


@pytest.mark.parametrize("share", [0.001, 0.004, 0.01, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999])
def test_a_cut_program_is_bad_input(share: float, old: Path, new: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes(new.read_bytes()[: int(new.stat().st_size * share)])
    assert refusal(old, cut).exit_code in (2, 4)


class TooManyCalls(Exception):
    pass


@contextlib.contextmanager
def bounded_calls(limit: int) -> Iterator[None]:
    """A bound on work that does not depend on the clock; a comparison of such programs makes some 200,000 calls."""
    left = limit

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            sys.setprofile(None)
            raise TooManyCalls

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)


def run(old: Path, new: Path) -> None:
    """Lets through only what is not of our tree of errors."""
    try:
        with bounded_calls(3_000_000):
            diff(old, new, Options())
    except LivegraftError as error:
        assert error.exit_code in (2, 3, 4)


HEADERS = [(0, 64), (64, 64 + 56 * 13)]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_are_survived(
    data: st.DataObject, old: Path, new: Path, tmp_path: Path, bounded_memory: None
) -> None:
    size = new.stat().st_size
    sections = struct.unpack_from("<Q", new.read_bytes(), 0x28)[0]
    low, high = data.draw(st.sampled_from([*HEADERS, (sections, size - 1)]))
    changes = {
        data.draw(st.integers(low, high - 8)): data.draw(st.binary(min_size=1, max_size=8))
        for _ in range(data.draw(st.integers(1, 3)))
    }
    broken = altered(new, tmp_path, changes)
    run(old, broken)
    broken.unlink()


SH_TYPE, SH_OFFSET, SH_INFO = 4, 24, 44
E_PHOFF = 32


def section_header(path: Path, name: str) -> int:
    """File offset of a section's header (gABI, Elf64_Shdr)."""
    from elftools.elf.elffile import ELFFile

    with path.open("rb") as stream:
        elf = ELFFile(stream)
        return int(elf["e_shoff"]) + elf.get_section_index(name) * 64


HUGE = b"\xff" * 8
DAMAGED = {
    "program headers far away": (None, E_PHOFF, HUGE),
    "notes far away": (".note.gnu.build-id", SH_OFFSET, HUGE),
    "dynamic section far away": (".dynamic", SH_OFFSET, HUGE),
    "version needs of another type": (".gnu.version_r", SH_TYPE, b"\1\0\0\0"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_field_is_bad_input(name: str, old: Path, new: Path, tmp_path: Path) -> None:
    section, field, value = DAMAGED[name]
    at = field if section is None else section_header(new, section) + field
    run(old, altered(new, tmp_path, {at: value}))


def test_a_count_is_not_believed_beyond_its_section(old: Path, new: Path, tmp_path: Path) -> None:
    broken = altered(new, tmp_path, {section_header(new, ".gnu.version_r") + SH_INFO: b"\xff\xff\xff\x7f"})
    run(old, broken)


SH_ADDR, SH_SIZE, SH_ENTSIZE, SH_NAME = 16, 32, 56, 0
CONTRADICTING = {
    "an address of a section": (".rodata", SH_ADDR, 0x10, "elsewhere"),
    "a place of a section": (".rodata", SH_OFFSET, 0x10, "elsewhere"),
    "a size of a section": (".init", SH_SIZE, 0x100, "overlap"),
    "a row of a table": (".dynsym", SH_ENTSIZE, 1, "in rows of"),
    "a size of a table": (".dynsym", SH_SIZE, -4, "in rows of"),
    "a type of a table": (".dynstr", SH_TYPE, 4, "is of type"),
}


@pytest.mark.parametrize("name", CONTRADICTING)
def test_headers_that_contradict_each_other_are_damage(name: str, old: Path, new: Path, tmp_path: Path) -> None:
    section, field, step, words = CONTRADICTING[name]
    at = section_header(new, section) + field
    value = int.from_bytes(new.read_bytes()[at : at + 4], "little") + step
    error = refusal(old, altered(new, tmp_path, {at: value.to_bytes(4, "little")}))
    assert isinstance(error, BadInput) and words in error.why


def test_two_sections_of_one_name_are_damage(old: Path, new: Path, tmp_path: Path) -> None:
    at = section_header(new, ".dynsym") + SH_NAME
    name = new.read_bytes()[at : at + 4]
    error = refusal(old, altered(new, tmp_path, {section_header(new, ".comment") + SH_NAME: name}))
    assert isinstance(error, BadInput) and "more than one section" in error.why


def test_relocations_that_no_section_covers_are_refused(old: Path, new: Path, tmp_path: Path) -> None:
    """The dynamic linker goes by the dynamic section, and would apply what is not seen."""
    from elftools.elf.elffile import ELFFile

    with new.open("rb") as stream:
        dynamic = ELFFile(stream).get_section_by_name(".dynamic")
        row = next(k for k, tag in enumerate(dynamic.iter_tags()) if tag["d_tag"] == "DT_RELASZ")
        at, size = dynamic["sh_offset"] + 16 * row + 8, dynamic.get_tag(row)["d_val"]
    error = refusal(old, altered(new, tmp_path, {at: struct.pack("<Q", size + 24 * 100)}))
    assert isinstance(error, Refused) and "are in no section" in error.what


def test_relocations_are_found_in_every_section_that_has_some(compiled: Compiler) -> None:
    """``-z nocombreloc`` keeps a section for each section that is relocated."""
    text = "int a[4]; int *p = a; int *const q[] = {a, a + 1}; int main(int n, char **v) { return *p + *q[n]; }"
    apart = compiled(text, "-Wl,-z,nocombreloc")
    names = subprocess.run(["readelf", "-SW", apart], capture_output=True, text=True, check=True).stdout
    assert ".rela.data " in names and ".rela.dyn " not in names
    one, other = load_image(compiled(text)), load_image(apart)
    assert len(one.relative_places) == len(other.relative_places) > 3
    assert {s.symbol for s in one.slots.values()} == {s.symbol for s in other.slots.values()}


TABLES = (".eh_frame_hdr", ".eh_frame", ".rela.dyn", ".rela.plt", ".dynsym", ".dynstr", ".gnu.version",
          ".gnu.version_r", ".dynamic", ".note.gnu.build-id", ".got", ".plt", ".init_array")  # fmt: skip


def survives_damage(section: str, old: Path, new: Path, folder: Path) -> Callable[[int, bytes], None]:
    from elftools.elf.elffile import ELFFile

    with new.open("rb") as stream:
        found = ELFFile(stream).get_section_by_name(section)
        assert found is not None, section
        start, size = found["sh_offset"], found["sh_size"]

    def damage(at: int, value: bytes) -> None:
        broken = altered(new, folder, {start + at % size: value[: size - at % size]})
        run(old, broken)
        broken.unlink()

    return damage


@pytest.mark.parametrize("section", TABLES)
def test_damaged_tables_are_survived(section: str, old: Path, new: Path, tmp_path: Path, bounded_memory: None) -> None:
    damage = survives_damage(section, old, new, tmp_path)

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 1 << 16), st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 8)))
    def attempt(at: int, value: bytes) -> None:
        damage(at, value)

    attempt()


def test_sections_imports_and_pointers_are_read(compiled: Compiler) -> None:
    path = compiled('#include <stdio.h>\nint a = 4, *p = &a; int main() { return printf("%d", *p); }', stripped=False)
    image = load_image(path)
    values = dict(zip(image.symbols.names, image.symbols.values.tolist(), strict=True))
    assert image.pointer_at(values["p"]) == values["a"]
    assert image.read(values["a"], 4) == b"\4\0\0\0"
    assert {slot.symbol for slot in image.slots.values()} >= {"printf", "__libc_start_main"}
    assert [image.slots[slot].version for slot in image.plt.values() if image.slots[slot].symbol == "printf"] == [
        "GLIBC_2.2.5"
    ]
    kinds = {section.name: section.kind for section in image.sections}
    assert (kinds[".text"], kinds[".rodata"], kinds[".data"]) == (Kind.TEXT, Kind.CONSTANT, Kind.DATA)
    assert image.needed == ("libc.so.6",)
    notes = subprocess.run(["readelf", "-n", path], capture_output=True, text=True, check=True).stdout
    assert f"Build ID: {image.build_id}" in notes


def test_packed_relative_relocations_are_unpacked(compiled: Compiler) -> None:
    """DT_RELR, where the linker can make it."""
    text = "int a[200]; int *const p[100] = {" + ", ".join(f"&a[{k}]" for k in range(100)) + "};\n" \
           "int main(int n, char **v) { return *p[n]; }"  # fmt: skip
    plain = load_image(compiled(text, stripped=False))
    try:
        path = compiled(text, "-Wl,-z,pack-relative-relocs", stripped=False)
    except AssertionError:
        pytest.skip("this linker knows no -z pack-relative-relocs")
    packed = load_image(path)
    if packed.section(".relr.dyn") is None:
        pytest.skip("this linker ignores -z pack-relative-relocs")
    assert len(packed.relative_places) == len(plain.relative_places) >= 100


def test_an_unreadable_address_is_bad_input(old: Path) -> None:
    image = load_image(old)
    for address, size in ((image.high, 1), (-1, 1), (image.base, -1), (image.high - 4, 8)):
        with pytest.raises(BadInput):
            image.read(address, size)


def test_every_function_lies_in_text(old: Path) -> None:
    code = load_code(load_image(old))
    assert (code.image.kinds(code.starts) == Kind.TEXT).all()
    assert (code.ends[:-1] <= code.starts[1:]).all()
