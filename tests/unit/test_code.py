"""Function bounds against the symbol table, references against the linker's own relocations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from elfdiff.decoding.code import Code, FieldKind, load_code
from elfdiff.images.imagefile import load_image
from fixtures.build import KV_SOURCES
from tests.compile import LINKS, Compiler

START_UP = {"_start", "_init", "_fini", "deregister_tm_clones", "register_tm_clones", "__do_global_dtors_aux",
            "frame_dummy", "_dl_relocate_static_pie"}  # fmt: skip
"""Code that comes with the linker, partly without FDE."""


def kv(compiled: Compiler, *flags: str, link: str, cc: str) -> Path:
    sources = {path.name: path.read_text() for path in [*KV_SOURCES.glob("*.c"), *KV_SOURCES.glob("*.h")]}
    units = {name: text for name, text in sources.items() if name.endswith(".c")}
    header = sources["kv.h"]
    units = {name: text.replace('#include "kv.h"', header) for name, text in units.items()}
    return compiled(units, "-DKV_VERSION=1", "-pthread", "-Wl,--emit-relocs", *flags, link=link, cc=cc, stripped=False)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("cc", ["gcc", "clang"])
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_bounds_are_those_of_the_symbols(level: str, cc: str, link: str, compiled: Compiler) -> None:
    path = kv(compiled, level, link=link, cc=cc)
    code = load_code(load_image(path))
    found = dict(zip(code.starts[code.has_unwind].tolist(), code.ends[code.has_unwind].tolist(), strict=True))
    named = [row for row in functions(path) if row[0] not in START_UP]
    otherwise = [name for name, start, size in named if found.get(start, 0) - start != size]
    assert len(named) > 15
    if link in ("static", "static-pie"):  # the C library has hand-written code, partly without FDE
        assert len(otherwise) * 50 < len(named)
    else:
        assert not otherwise
        assert code.sound[code.has_unwind].all()


def functions(path: Path) -> list[tuple[str, int, int]]:
    with path.open("rb") as stream:
        elf = ELFFile(stream)
        text = elf.get_section_by_name(".text")
        low, high = text["sh_addr"], text["sh_addr"] + text["sh_size"]
        return [
            (s.name, s["st_value"], s["st_size"])
            for s in elf.get_section_by_name(".symtab").iter_symbols()
            if s["st_info"]["type"] == "STT_FUNC" and s["st_size"] and low <= s["st_value"] < high
        ]


@pytest.mark.parametrize("link", ["pie", "no-pie", "library"])
@pytest.mark.parametrize("cc", ["gcc", "clang"])
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_every_relocation_of_the_linker_is_a_reference(level: str, cc: str, link: str, compiled: Compiler) -> None:
    path = kv(compiled, level, link=link, cc=cc)
    code = load_code(load_image(path))
    by_field = {int(f): k for k, f in enumerate(code.references.field)}
    relocations = text_relocations(path)
    assert len(relocations) > 100
    for place, kind, value in relocations:
        if kind in RELATIVE:
            row = by_field[place]
            if int(code.references.target[row]) in code.image.plt:
                continue  # a library's call of its own function, by way of a stub
            assert code.references.target[row] == value + int(code.references.end[row]) - place, hex(place)
        elif kind in ABSOLUTE:
            assert code.references.target[by_field[place]] == value, hex(place)


RELATIVE, ABSOLUTE = (2, 4), (1, 10, 11)  # R_X86_64_PC32, PLT32; 64, 32, 32S


def text_relocations(path: Path) -> list[tuple[int, int, int]]:
    """(place, type, S + A) of what the linker relocated in .text, imports apart (their value is a stub's)."""
    with path.open("rb") as stream:
        elf = ELFFile(stream)
        symbols = elf.get_section_by_name(".symtab")
        rows = elf.get_section_by_name(".rela.text").iter_relocations()
        named = [(r, symbols.get_symbol(r["r_info_sym"])) for r in rows]
        return [
            (r["r_offset"], r["r_info_type"], s["st_value"] + r["r_addend"])
            for r, s in named
            if s["st_shndx"] != "SHN_UNDEF" and (s["st_value"] or s["st_info"]["type"] == "STT_SECTION")
        ]


@pytest.mark.parametrize("link", ["pie", "no-pie", "library"])
@pytest.mark.parametrize("cc", ["gcc", "clang"])
@pytest.mark.parametrize("level", ["-O0", "-O2", "-O3", "-Os"])
def test_every_reference_is_a_relocation_or_stays_in_its_section(
    level: str, cc: str, link: str, compiled: Compiler
) -> None:
    """What the assembler resolves itself has no relocation: references within one section of one object file."""
    path = kv(compiled, level, link=link, cc=cc)
    code = load_code(load_image(path))
    relocated = {place for place in linker_places(path) if code.has_unwind[code.function_of(place)]}
    text, references = code.image.section(".text"), code.references
    assert text is not None
    mine = code.has_unwind[references.function] & (references.instruction >= text.start)
    mine &= (references.instruction < text.end) & ~np.isin(references.function, start_up(code))
    beyond = mine & ~np.isin(references.field, sorted(relocated))
    inside = (references.target >= text.start) & (references.target < text.end)
    assert not [hex(k) for k in references.field[beyond & ~inside].tolist()]
    assert not (beyond & (references.kind > FieldKind.SHORT)).any(), "a number was taken for an address"
    assert relocated <= set(references.field.tolist())
    assert int((mine & ~beyond).sum()) > 100


def start_up(code: Code) -> list[int]:
    """Functions of the start-up files, which are linked without their relocations in some distributions."""
    return [k for k, name in enumerate(code.names) if name in START_UP]


def linker_places(path: Path) -> set[int]:
    """Fields of .text that the linker filled with an address or a distance."""
    with path.open("rb") as stream:
        rows = ELFFile(stream).get_section_by_name(".rela.text").iter_relocations()
        kinds = (*RELATIVE, *ABSOLUTE, R_X86_64_GOTPCREL, R_X86_64_GOTPCRELX, R_X86_64_REX_GOTPCRELX)
        return {r["r_offset"] for r in rows if r["r_info_type"] in kinds}


R_X86_64_GOTPCREL, R_X86_64_GOTPCRELX, R_X86_64_REX_GOTPCRELX = 9, 41, 42


def test_stubs_lead_to_their_imports(compiled: Compiler) -> None:
    code = load_code(load_image(kv(compiled, "-O2", link="pie", cc="gcc")))
    image, references = code.image, code.references
    calls = references.target[(references.kind == FieldKind.CALL) & np.isin(references.target, list(image.plt))]
    names = {image.slots[image.plt[int(stub)]].symbol for stub in calls}
    assert {"malloc", "free", "pthread_create"} <= names


def test_masked_bytes_of_a_function_do_not_depend_on_where_it_lies(compiled: Compiler) -> None:
    near = code_of(compiled, "")
    far = code_of(compiled, "int pad(int x) { for (int i = 0; i < x; i++) x *= i + 3; return x; } char space[4096];")
    wanted = "int f(int x) { g[x]++; return h(x) + g[2]; }"
    assert masked(near, "f") == masked(far, "f"), wanted
    assert raw(near, "f") != raw(far, "f")


def code_of(compiled: Compiler, before: str) -> Code:
    text = before + (
        "\nint g[9] = {1};\n__attribute__((noipa)) int h(int x) { return x * g[3]; }\n"
        "__attribute__((noipa)) int f(int x) { g[x]++; return h(x) + g[2]; }\n"
        "int main(int n, char **v) { return f(n); }"
    )
    return load_code(load_image(compiled(text, stripped=False)))


def masked(code: Code, name: str) -> bytes:
    return code.masked_bytes(code.names.index(name))


def raw(code: Code, name: str) -> bytes:
    return code.raw_bytes(code.names.index(name))
