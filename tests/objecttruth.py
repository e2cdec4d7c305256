"""What a comparison of object files says of two builds: the truth by which the differ is judged on real programs.

Object files know more than the linked file: names, and what every reference is to. So the comparison is exact:
instruction by instruction (capstone), relocation by relocation (pyelftools), nothing of elfdiff. A function has
changed when its instructions differ, when a reference leads to another name, or when a constant that it reads
has another content. One that differs in numbers alone, each a line of its source (DWARF 5, section 6.2), has
changed in line numbers only.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import capstone
from elftools.elf.elffile import ELFFile

from tests.truth import Instruction, read_instruction

SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR, SHF_MERGE, SHF_STRINGS = 1, 2, 4, 16, 32
COUNTS_FROM_FIELD = {2, 4, 9, 19, 20, 22, 26, 41, 42}
"""Relocation types whose value is relative to the field (psABI 1.0, table 4.9): PC32, PLT32, GOTPCREL and kin."""
DIRECT = {1, 2, 4, 10, 11, 24}
"""Relocation types for the address itself: 64, PC32, PLT32, 32, 32S, PC64. Which of them says only how it is named."""
NUMBER = re.compile(r"(?<![\w%])-?(?:0x[0-9a-f]+|\d+)(?![\w])")

MAX_SPAN = 8
"""Lines of one call in the sources."""

Content = tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Nameless:
    """A constant without a name, up to whatever is named next: how long it is, nothing tells (a switch table).

    So two are compared as far as both go; one that grows has a function that goes farther, and differs itself.
    """

    data: bytes
    leads: tuple[tuple[int, Content], ...]

    def __eq__(self, other: object) -> bool:
        """Whether they agree as far as both go."""
        if not isinstance(other, Nameless):
            return NotImplemented
        size = min(len(self.data), len(other.data))
        mine, theirs = ([lead for lead in one.leads if lead[0] < size] for one in (self, other))
        return self.data[:size] == other.data[:size] and mine == theirs

    __hash__ = None  # type: ignore[assignment]  # what is equal depends on the other


@dataclass(frozen=True)
class Code:
    """One function of an object file. ``references``: offset of the instruction, and which of it -> what it names."""

    name: str
    start: int
    section: int
    instructions: tuple[tuple[int, str], ...]  # offset, text without what a reference fills in
    references: Mapping[tuple[int, int], Content]
    lines: frozenset[int]  # of the sources it was made of


@dataclass(frozen=True)
class Difference:
    """Names of functions; a local one is named with its source file, as ``ls.c:match``."""

    changed: Mapping[str, str]  # name -> what is the first difference
    line_only: frozenset[str]
    added: frozenset[str]
    removed: frozenset[str]
    initial: frozenset[str]  # writable variables that start with another value


def compare_objects(old: Mapping[str, Path], new: Mapping[str, Path]) -> Difference:
    """Compare the object files of two builds, by their paths in the build."""
    sides: tuple[dict[str, Code], dict[str, Code]] = ({}, {})
    values: tuple[dict[str, Content], dict[str, Content]] = ({}, {})
    for path in sorted(old.keys() | new.keys()):
        if path in old and path in new and old[path].read_bytes() == new[path].read_bytes():
            continue
        for side, files in enumerate((old, new)):
            if path in files:
                read = ObjectFile(files[path])
                sides[side].update(read.functions())
                values[side].update(read.writable())
    first, second = sides[0], _as_before(sides[0], sides[1])
    both = first.keys() & second.keys()
    changed = {name: what for name in sorted(both) if (what := _difference(first[name], second[name]))}
    lines = frozenset(name for name in changed if _lines_only(first[name], second[name]))
    return Difference(
        {name: what for name, what in changed.items() if name not in lines},
        lines,
        frozenset(second.keys() - first.keys()),
        frozenset(first.keys() - second.keys()),
        frozenset(name for name in values[0].keys() & values[1].keys() if values[0][name] != values[1][name]),
    )


def _as_before(old: Mapping[str, Code], new: dict[str, Code]) -> dict[str, Code]:
    """New functions by their old names, where one became local or ceased to be."""
    gone = {_plain(name): name for name in old.keys() - new.keys()}
    return {gone.get(_plain(name), name) if name not in old else name: code for name, code in new.items()}


def _plain(name: str) -> str:
    return name.rsplit(":", 1)[-1]


def _difference(old: Code, new: Code) -> str:
    if len(old.instructions) != len(new.instructions):
        return f"{len(old.instructions)} -> {len(new.instructions)} instructions"
    for one, other in zip(old.instructions, new.instructions, strict=True):
        if one != other:
            return f"+{one[0]:#x} {one[1]} -> +{other[0]:#x} {other[1]}"
    for offset in sorted(old.references.keys() | new.references.keys()):
        if old.references.get(offset) != new.references.get(offset):
            return f"+{offset[0]:#x} {old.references.get(offset)} -> {new.references.get(offset)}"
    return ""


def _lines_only(old: Code, new: Code) -> bool:
    """Only numbers differ, and each is a line of its own side's sources."""
    if old.references.values() and list(old.references.values()) != list(new.references.values()):
        return False
    if len(old.instructions) != len(new.instructions):
        return False
    for (_, one), (_, other) in zip(old.instructions, new.instructions, strict=True):
        if NUMBER.sub("#", one) != NUMBER.sub("#", other):
            return False
        for a, b in zip(NUMBER.findall(one), NUMBER.findall(other), strict=True):
            if a != b and not (_near(int(a, 0), old.lines) and _near(int(b, 0), new.lines)):
                return False
    return True


def _near(number: int, lines: frozenset[int]) -> bool:
    """A call that spans several lines takes its number from the last, its row in the table from the first."""
    return any(number - k in lines for k in range(-MAX_SPAN, MAX_SPAN + 1))


class ObjectFile:
    """One relocatable ELF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            elf = ELFFile(stream)
            self.headers = [section.header for section in elf.iter_sections()]
            self.names = [section.name for section in elf.iter_sections()]
            allocated = [bool(header["sh_flags"] & SHF_ALLOC) for header in self.headers]
            self.data = [
                section.data() if allocated[k] and section["sh_type"] != "SHT_NOBITS" else b""
                for k, section in enumerate(elf.iter_sections())
            ]
            table = elf.get_section_by_name(".symtab")
            self.symbols = list(table.iter_symbols()) if table is not None else []
            self.relocations: dict[int, dict[int, Any]] = {}
            for section in elf.iter_sections():
                if section["sh_type"] == "SHT_RELA" and allocated[section["sh_info"]]:
                    rows = {entry["r_offset"]: entry for entry in section.iter_relocations()}
                    self.relocations.setdefault(section["sh_info"], {}).update(rows)
            self._lines = _line_rows(elf)
        self._source = ""
        self.idents = [self._ident(symbol) for symbol in self.symbols]
        self._by_section: dict[int, list[tuple[int, int, str]]] = {}
        for symbol, ident in zip(self.symbols, self.idents, strict=True):
            if symbol["st_info"]["type"] in ("STT_FUNC", "STT_OBJECT") and isinstance(symbol["st_shndx"], int):
                row = (symbol["st_value"], symbol["st_size"], ident)
                self._by_section.setdefault(symbol["st_shndx"], []).append(row)
        for listed in self._by_section.values():
            listed.sort()
        self._disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
        self._disassembler.detail = True

    def _ident(self, symbol: Any) -> str:
        """A local symbol with its file; the number that gcc gives to a static variable of a function is no name."""
        kind, name = symbol["st_info"]["type"], str(symbol.name)
        if kind == "STT_FILE":
            self._source = _source_file(name)
        if kind == "STT_OBJECT":
            name = re.sub(r"\.\d+$", "", name)
        return f"{self._source}{name}" if symbol["st_info"]["bind"] == "STB_LOCAL" else name

    def functions(self) -> dict[str, Code]:
        """Every function with a size."""
        found = {}
        for symbol, ident in zip(self.symbols, self.idents, strict=True):
            section = symbol["st_shndx"]
            if symbol["st_info"]["type"] == "STT_FUNC" and isinstance(section, int) and symbol["st_size"]:
                found[ident] = self._function(ident, section, symbol["st_value"], symbol["st_size"])
        return found

    def writable(self) -> dict[str, Content]:
        """Initial values of the writable variables that have a name (.data.rel.ro is not writable when it runs)."""
        found: dict[str, Content] = {}
        for section, listed in self._by_section.items():
            if self.headers[section]["sh_flags"] & SHF_WRITE and not self.names[section].startswith(".data.rel.ro"):
                for start, size, ident in listed:
                    found[ident] = self._bytes(section, start, start + size, frozenset())
        return found

    def _function(self, ident: str, section: int, start: int, size: int) -> Code:
        fields = self.relocations.get(section, {})
        instructions: list[tuple[int, str]] = []
        references: dict[tuple[int, int], Content] = {}
        for raw in self._disassembler.disasm(self.data[section][start : start + size], start):
            instruction = read_instruction(raw)
            at = instruction.address - start
            inside = [k for k in range(instruction.address, instruction.address + instruction.size) if k in fields]
            instructions.append((at, instruction.text))
            for index, field in enumerate(inside):
                references[at, index] = self._led_to(fields[field], instruction.address + instruction.size)
            if not inside and instruction.target is not None:
                references[at, 0] = self._resolved(section, start, size, instruction)
        lines = frozenset(line for address, line in self._lines if start <= address < start + size)
        return Code(ident, start, section, tuple(instructions), references, lines)

    def _resolved(self, section: int, start: int, size: int, instruction: Instruction) -> Content:
        """A branch that the assembler has resolved: inside the function, or to another one of the section."""
        target = instruction.target
        assert target is not None
        if start <= target < start + size:
            return ("itself", target - start)
        return self._place(section, target, frozenset())

    def _led_to(self, entry: Any, end: int, seen: frozenset[tuple[int, int]] = frozenset()) -> Content:
        symbol = self.symbols[entry["r_info_sym"]]
        addend = entry["r_addend"]
        if entry["r_info_type"] in COUNTS_FROM_FIELD:
            addend += end - entry["r_offset"]
        how = () if entry["r_info_type"] in DIRECT else (entry["r_info_type"],)
        if not isinstance(symbol["st_shndx"], int):  # undefined, common or absolute
            return (*how, symbol.name, addend)
        return (*how, *self._place(symbol["st_shndx"], symbol["st_value"] + addend, seen))

    def _place(self, section: int, offset: int, seen: frozenset[tuple[int, int]]) -> Content:
        """What stands there: a name and a distance; with its content where that cannot change when it runs."""
        flags, name = self.headers[section]["sh_flags"], self.names[section]
        listed = self._by_section.get(section, [])
        index = bisect_right(listed, (offset, 1 << 62, "")) - 1
        named = next(
            (row for row in reversed(listed[max(0, index - 3) : index + 1]) if row[0] <= offset < row[0] + row[1]), None
        )
        constant = not flags & SHF_WRITE or name.startswith(".data.rel.ro")
        if flags & SHF_EXECINSTR or not constant:
            return (_plain(named[2]), offset - named[0]) if named else (name, offset)
        if (section, offset) in seen:
            return ("again",)
        seen |= {(section, offset)}
        if named:
            return (_plain(named[2]), offset - named[0], self._bytes(section, named[0], named[0] + named[1], seen))
        return self._nameless(section, offset, seen)

    def _nameless(self, section: int, offset: int, seen: frozenset[tuple[int, int]]) -> Content:
        header, data = self.headers[section], self.data[section]
        width = header["sh_entsize"] or 1
        if header["sh_flags"] & SHF_STRINGS:
            end = offset
            while end < len(data) and any(data[end : end + width]):
                end += width
            return ("text", data[offset:end])
        if header["sh_flags"] & SHF_MERGE:
            return ("constant", data[offset : offset + width])
        marks = self._marks.get(section, [])
        index = bisect_right(marks, offset)
        raw, *leads = self._bytes(section, offset, marks[index] if index < len(marks) else len(data), seen)
        return ("constant", Nameless(raw, tuple(leads)))

    @cached_property
    def _marks(self) -> dict[int, list[int]]:
        """Per section: every offset that a symbol or a relocation names; what has no name ends at the next."""
        found: dict[int, set[int]] = {}
        for section, listed in self._by_section.items():
            found.setdefault(section, set()).update(start for start, _, _ in listed)
        for fields in self.relocations.values():
            for entry in fields.values():
                symbol = self.symbols[entry["r_info_sym"]]
                if isinstance(symbol["st_shndx"], int):
                    shift = 4 if entry["r_info_type"] in COUNTS_FROM_FIELD else 0
                    place = symbol["st_value"] + entry["r_addend"] + shift
                    found.setdefault(symbol["st_shndx"], set()).add(place)
        return {section: sorted(marks) for section, marks in found.items()}

    def _bytes(self, section: int, start: int, end: int, seen: frozenset[tuple[int, int]]) -> tuple[Any, ...]:
        """Bytes and, in place of the fields that a relocation fills, what they lead to."""
        data, fields = bytearray(self.data[section][start:end]), self.relocations.get(section, {})
        leads: list[object] = []
        for field in (k for k in range(start, end) if k in fields):
            entry = fields[field]
            # An entry of a switch table counts from the table, not from itself: its addend says how far it is in.
            base = start if entry["r_info_type"] in COUNTS_FROM_FIELD else field
            shifted = {"r_info_type": entry["r_info_type"], "r_info_sym": entry["r_info_sym"], "r_offset": field}
            leads.append((field - start, self._led_to({**shifted, "r_addend": entry["r_addend"]}, base, seen)))
        return (bytes(data), *leads)


def _line_rows(elf: Any) -> list[tuple[int, int]]:
    """(offset in its section, line) of every row of the line tables."""
    if not elf.has_dwarf_info():
        return []
    dwarf = elf.get_dwarf_info()
    rows = []
    for unit in dwarf.iter_CUs():
        program = dwarf.line_program_for_CU(unit)
        entries = program.get_entries() if program is not None else ()
        rows += [(e.state.address, e.state.line) for e in entries if e.state is not None]
    return rows


def _source_file(name: str) -> str:
    """What a local symbol's name begins with.

    Nothing where the linker made a hidden symbol local (its file symbol has no name), or named the object file of
    an assembler source, which has no file symbol itself.
    """
    name = name.rsplit("/", 1)[-1]
    return f"{name}:" if name and not name.endswith(".o") else ""


def linked_names(path: Path) -> dict[int, str]:
    """Start of every function of a linked file -> its name, as ``Difference`` names it."""
    found: dict[int, str] = {}
    source = ""
    with path.open("rb") as stream:
        table = ELFFile(stream).get_section_by_name(".symtab")
        assert table is not None, f"{path} is stripped"
        for symbol in table.iter_symbols():
            kind = symbol["st_info"]["type"]
            if kind == "STT_FILE":
                source = _source_file(symbol.name)
            elif kind == "STT_FUNC" and symbol["st_size"]:
                local = symbol["st_info"]["bind"] == "STB_LOCAL"
                found.setdefault(symbol["st_value"], f"{source}{symbol.name}" if local else symbol.name)
    return found
