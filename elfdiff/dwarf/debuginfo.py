"""What debug information says of a build: units, functions and source lines, read only as far as it is asked for.

DWARF 2 to 5; pyelftools decodes it. A big program has millions of entries, so nothing walks them all: a unit is found
by its address ranges, and only the units of functions that matter are read. Addresses are virtual.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from elfdiff.dwarf.debugfile import DebugFile
from elfdiff.dwarf.linetable import LineHeader, rows
from elfdiff.errors import BadInput

if TYPE_CHECKING:
    from elftools.construct.lib.container import Container
    from elftools.dwarf.compileunit import CompileUnit
    from elftools.dwarf.die import DIE
    from elftools.dwarf.dwarfinfo import DWARFInfo
    from elftools.dwarf.lineprogram import LineProgram

AGGREGATES = {
    "DW_TAG_structure_type": "struct",
    "DW_TAG_class_type": "struct",
    "DW_TAG_union_type": "union",
    "DW_TAG_enumeration_type": "enum",
}
"""What has a layout or values of its own, as it is called in messages (DWARF 5, sections 5.7 and 5.8)."""
C_PLUS_PLUS = frozenset((0x04, 0x1A, 0x21, 0x2B, 0x3A))
"""DW_LANG_C_plus_plus, _11, _14, _17, _20 (DWARF 5, section 7.12)."""
_SPLIT = ("DW_AT_dwo_name", "DW_AT_GNU_dwo_name")
_OTHER_FILE = ("DW_FORM_GNU_ref_alt", "DW_FORM_ref_sup4", "DW_FORM_ref_sup8")

UNNAMED = "(unnamed)"
"""The name that all enumerations without one share."""
TypeKey = tuple[str, str]
"""What is it (struct, union, enum), and its name with its scopes."""


@dataclass
class Contents:
    """What a unit defines, by name; an entry is described when it is asked for.

    ``typed``: it describes types at all, which gcc -g1 and clang -gline-tables-only do not.
    """

    types: dict[TypeKey, list[DIE]] = field(default_factory=dict)
    declared: set[TypeKey] = field(default_factory=set)  # named only: described elsewhere or nowhere
    variables: dict[str, DIE] = field(default_factory=dict)
    functions: dict[int, DIE] = field(default_factory=dict)  # by each address at which one of its ranges starts
    typed: bool = False


@dataclass(frozen=True)
class Function:
    """A function's entry; ``units`` are those whose code it holds (its own, and those that were inlined)."""

    name: str
    die: DIE
    units: tuple[Unit, ...]
    local: Contents = field(repr=False)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong in the reader for DWARF of this file is damaged input. Raises BadInput."""
    from elftools.common.exceptions import DWARFError, ELFError  # noqa: PLC0415
    from elftools.construct import ConstructError  # noqa: PLC0415

    damage = (ELFError, DWARFError, ConstructError, struct.error, zlib.error, AssertionError, LookupError)
    wrong = (TypeError, ValueError, AttributeError, RecursionError, NotImplementedError, OverflowError)
    try:
        yield
    except (*damage, *wrong) as error:
        raise BadInput(
            f"{path}: its debug information cannot be read",
            why=str(error) or type(error).__name__,
            next_step="take the file again, or compare without it: strip -g",
        ) from error


class Unit:
    """A compilation unit, or one that type or partial units stand for."""

    def __init__(self, info: DebugInfo, cu: CompileUnit) -> None:
        """``cu`` is pyelftools' own."""
        self.info, self.cu = info, cu
        top = cu.get_top_DIE()
        self.name = text_of(top, "DW_AT_name")
        self.producer = text_of(top, "DW_AT_producer")
        self.plus_plus = value_of(top, "DW_AT_language") in C_PLUS_PLUS
        self.split = any(name in top.attributes for name in _SPLIT)

    @cached_property
    def contents(self) -> Contents:
        """The types, variables and functions of the unit's own scopes; not what lies in functions."""
        found = Contents()
        with reading(self.info.path):
            self.info.collect(self.cu.get_top_DIE(), "", found, self.plus_plus)
        return found

    @cached_property
    def _lines(self) -> tuple[list[int], list[str | None]]:
        """Addresses in ascending order and the source line from there on."""
        with reading(self.info.path):
            program = self.info.line_program(self.cu)
            found = [] if program is None else list(_rows(program))
        found.sort(key=_by_address)
        return [address for address, _ in found], [line for _, line in found]

    def line(self, address: int) -> str | None:
        """``file:line`` of an address (DWARF 5, section 6.2)."""
        addresses, lines = self._lines
        index = bisect.bisect_right(addresses, address) - 1
        return lines[index] if index >= 0 else None

    def opening(self, address: int) -> str | None:
        """The same for a function's start: the first row there is its own, later ones may be of inlined code."""
        addresses, lines = self._lines
        index = bisect.bisect_left(addresses, address)
        here = itertools.takewhile(lambda k: addresses[k] == address, range(index, len(addresses)))
        return next((lines[k] for k in here if lines[k] is not None), None)


class DebugInfo:
    """The DWARF of one build."""

    def __init__(self, file: DebugFile) -> None:
        """Raises BadInput for a damaged file."""
        self.file = file
        self.path = file.path
        self._units: dict[int, Unit] = {}
        with reading(self.path):
            self.dwarf: DWARFInfo = self._open(file.path)
            if file.alternate is not None:
                self.dwarf.supplementary_dwarfinfo = self._open(file.alternate)

    def _open(self, path: Path) -> DWARFInfo:
        from elftools.elf.elffile import ELFFile  # noqa: PLC0415

        with open(path, "rb") as stream:
            raw = io.BytesIO(stream.read())
        # pyelftools would apply relocations that linked files do not have, and look for links by itself.
        return ELFFile(raw).get_dwarf_info(relocate_dwarf_sections=False, follow_links=False)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All compilation units; reading what each says of itself takes a while, so ask for single ones instead."""
        with reading(self.path):
            return tuple(self.unit(cu) for cu in self._headers if _unit_type(cu) not in ("DW_UT_type", 2))

    def unit(self, cu: CompileUnit) -> Unit:
        """The unit that pyelftools' own stands for."""
        if cu.cu_offset not in self._units:
            self._units[cu.cu_offset] = Unit(self, cu)
        return self._units[cu.cu_offset]

    @cached_property
    def _headers(self) -> list[CompileUnit]:
        return list(self.dwarf.iter_CUs())

    @cached_property
    def _type_units(self) -> dict[int, DIE]:
        """Signature -> entry: type units of DWARF 5 (in .debug_info); those of DWARF 4 the library knows."""
        return {
            cu["type_signature"]: cu.get_DIE_from_refaddr(cu.cu_offset + cu["type_offset"])
            for cu in self._headers
            if _unit_type(cu) in ("DW_UT_type", 2)
        }

    def line_program(self, cu: CompileUnit) -> LineProgram | None:
        """The line table of a unit. Its format (DWARF 5, section 7.4) is its own: gas writes 32-bit ones beside
        64-bit units."""
        from elftools.dwarf.structs import DWARFStructs  # noqa: PLC0415

        offset = value_of(cu.get_top_DIE(), "DW_AT_stmt_list")
        if offset is None or self.dwarf.debug_line_sec is None:
            return None
        stream = self.dwarf.debug_line_sec.stream
        stream.seek(offset)
        wanted = 64 if stream.read(4) == b"\xff\xff\xff\xff" else 32
        if cu.structs.dwarf_format == wanted:
            return self.dwarf.line_program_for_CU(cu)
        structs = DWARFStructs(
            little_endian=True, dwarf_format=wanted, address_size=8, dwarf_version=cu.structs.dwarf_version
        )
        return self.dwarf._parse_line_program_at_offset(offset, structs)

    def mentions(self, name: str) -> bool:
        """Whether a name occurs in the debug information at all; linkers let names share their endings."""
        wanted = name.encode("utf-8", "surrogateescape") + b"\0"
        with reading(self.path):
            infos = [info for info in (self.dwarf, self.dwarf.supplementary_dwarfinfo) if info is not None]
            sections = [section for info in infos for section in (info.debug_str_sec, info.debug_info_sec)]
            return any(wanted in section.stream.getvalue() for section in sections if section is not None)

    @cached_property
    def type_units(self) -> Contents:
        """What type units define (DWARF 5, section 3.1.4): gcc's other units refer to these without naming them."""
        found = Contents()
        with reading(self.path):
            units = [cu for cu in self._headers if _unit_type(cu) in ("DW_UT_type", 2)]
            for unit in (*units, *self.dwarf.iter_TUs()):
                top = unit.get_top_DIE()
                self.collect(top, "", found, value_of(top, "DW_AT_language") in C_PLUS_PLUS)
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """What is there and cannot be used, of the units that were looked at so far."""
        split = [unit.name for unit in self._units.values() if unit.split]
        said = f"{self.path.name}: {len(split)} unit(s) have their types in .dwo files, which are not read"
        return (*self.file.notes, *([said] if split else ()))

    @cached_property
    def _ranges(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Starts in ascending order, with the end and the unit's offset: .debug_aranges, which clang does not write."""
        section = self.dwarf.debug_aranges_sec
        found = sorted(_address_ranges(section.stream.getvalue())) if section is not None else []
        return [low for low, _, _ in found], [(high, offset) for _, high, offset in found]

    @cached_property
    def _spans(self) -> tuple[list[int], list[tuple[int, Unit]]]:
        """Starts in ascending order, with the end and the unit of each range."""
        with reading(self.path):
            rows = [
                (low, high, unit)
                for unit in self.units
                for low, high in self.ranges(unit.cu.get_top_DIE())
                if high > low > 0
            ]
        rows.sort(key=lambda row: row[:2])
        return [low for low, _, _ in rows], [(high, unit) for _, high, unit in rows]

    def unit_at(self, address: int) -> Unit | None:
        """The unit whose code lies at an address: by .debug_aranges, and where that does not say, by all units."""
        with reading(self.path):
            starts, spans = self._ranges
            index = bisect.bisect_right(starts, address) - 1
            if index >= 0 and address < spans[index][0]:
                return self.unit(self.dwarf.get_CU_at(spans[index][1]))
        starts, rest = self._spans
        index = bisect.bisect_right(starts, address) - 1
        if index < 0 or address >= rest[index][0]:
            return None
        return rest[index][1]

    def units_named(self, name: str) -> tuple[Unit, ...]:
        """The units made from a source file of that name."""
        return tuple(unit for unit in self.units if unit.name == name)

    def line(self, address: int) -> str | None:
        """``file:line`` of code at an address, where it is known."""
        unit = self.unit_at(address)
        return unit.line(address) if unit else None

    def opening(self, address: int) -> str | None:
        """``file:line`` of a function that starts at an address, where it is known."""
        unit = self.unit_at(address)
        return unit.opening(address) if unit else None

    def function(self, address: int) -> Function | None:
        """The function one of whose ranges starts at an address."""
        unit = self.unit_at(address)
        die = unit.contents.functions.get(address) if unit else None
        if unit is None or die is None:
            return None
        with reading(self.path):
            units = {unit.cu.cu_offset: unit}
            local = Contents()
            self._walk(die, units, local, text_of(self.origin(die), "DW_AT_name"), unit.plus_plus)
            return Function(text_of(self.origin(die), "DW_AT_name"), die, tuple(units.values()), local)

    def _walk(self, die: DIE, units: dict[int, Unit], local: Contents, scope: str, plus_plus: bool) -> None:
        """The units of what a function holds, inlined code included, and the types that it defines for itself."""
        todo, seen = [die], {die.offset}
        while todo:
            entry = todo.pop()
            origin = self.follow(entry, "DW_AT_abstract_origin")
            if origin is not None:
                if origin.dwarfinfo is self.dwarf and "DW_AT_signature" not in origin.attributes:
                    units.setdefault(origin.cu.cu_offset, self.unit(origin.cu))
                if origin.tag == "DW_TAG_subprogram" and origin.offset not in seen:
                    seen.add(origin.offset)
                    todo.append(origin)
            for child in entry.iter_children():
                if child.tag in AGGREGATES or child.tag == "DW_TAG_typedef":
                    self._collect_type(child, f"{scope}()::", local, plus_plus)
                elif child.tag == "DW_TAG_variable" and _is_static(child):
                    local.variables[f"{scope}()::{text_of(self.origin(child), 'DW_AT_name')}"] = child
                elif child.tag != "DW_TAG_call_site" and (
                    child.has_children or "DW_AT_abstract_origin" in child.attributes
                ):
                    todo.append(child)

    # -- entries ---------------------------------------------------------------------------------------------

    def collect(self, parent: DIE, scope: str, found: Contents, plus_plus: bool) -> None:
        """Note what a unit or a namespace defines."""
        for die in parent.iter_children():
            found.typed = found.typed or str(die.tag).endswith("_type")
            if die.tag in AGGREGATES or die.tag == "DW_TAG_typedef":
                self._collect_type(die, scope, found, plus_plus)
            elif die.tag == "DW_TAG_subprogram":
                for low, high in self.ranges(die):
                    if high > low > 0:
                        found.functions[low] = die
            elif die.tag == "DW_TAG_variable" and "DW_AT_location" in die.attributes:
                found.variables[scope + text_of(self.origin(die), "DW_AT_name")] = die
            elif die.tag == "DW_TAG_namespace":
                self.collect(die, f"{scope}{text_of(die, 'DW_AT_name')}::", found, plus_plus)
            elif die.tag == "DW_TAG_imported_unit":
                imported = self.follow(die, "DW_AT_import")
                if imported is not None:
                    self.collect(imported, scope, found, plus_plus)

    def _collect_type(self, die: DIE, scope: str, found: Contents, plus_plus: bool) -> None:
        name = text_of(die, "DW_AT_name")
        if die.tag == "DW_TAG_typedef":
            target = self.follow(die, "DW_AT_type")
            if target is None or target.tag not in AGGREGATES or "DW_AT_name" in target.attributes:
                return
            die = target
        definition = self.follow(die, "DW_AT_signature") or die
        key = (AGGREGATES[str(die.tag)], scope + (name or text_of(definition, "DW_AT_name")))
        if "DW_AT_declaration" in definition.attributes:
            found.declared.add(key)
        elif name or definition is not die:
            found.types.setdefault(key, []).append(definition)
        elif die.tag == "DW_TAG_enumeration_type":
            found.types.setdefault(("enum", scope + UNNAMED), []).append(definition)
        if plus_plus and definition.has_children and die.tag != "DW_TAG_enumeration_type":
            for child in definition.iter_children():
                if child.tag in AGGREGATES or child.tag == "DW_TAG_typedef":
                    self._collect_type(child, f"{key[1]}::", found, plus_plus)

    def follow(self, die: DIE, name: str) -> DIE | None:
        """The entry that an attribute refers to; None where there is no such attribute, or its file is missing."""
        attribute = die.attributes.get(name)
        if attribute is None:
            return None
        if attribute.form == "DW_FORM_ref_sig8":
            known = self._type_units.get(attribute.raw_value)
            return known if known is not None else die.dwarfinfo.get_DIE_by_sig8(attribute.raw_value)
        if attribute.form in _OTHER_FILE and die.dwarfinfo.supplementary_dwarfinfo is None:
            return None
        return die.get_DIE_from_attribute(name)

    def origin(self, die: DIE) -> DIE:
        """The entry that names this one: its specification or abstract instance (DWARF 5, section 3.3.8)."""
        for _ in range(8):
            following = self.follow(die, "DW_AT_abstract_origin") or self.follow(die, "DW_AT_specification")
            if following is None or "DW_AT_name" in die.attributes:
                return die
            die = following
        return die

    def ranges(self, die: DIE) -> list[tuple[int, int]]:
        """[low, high) of the code of an entry (DWARF 5, section 2.17)."""
        attributes = die.attributes
        low = attributes.get("DW_AT_low_pc")
        if "DW_AT_ranges" in attributes:
            lists = die.dwarfinfo.range_lists()
            if lists is None:
                return []
            base = value_of(die.cu.get_top_DIE(), "DW_AT_low_pc") or 0
            return _absolute(lists.get_range_list_at_offset(attributes["DW_AT_ranges"].value, die.cu), base)
        high = attributes.get("DW_AT_high_pc")
        if low is None or high is None:
            return []
        end = high.value if high.form == "DW_FORM_addr" else low.value + high.value
        return [(int(low.value), int(end))]


def _by_address(row: tuple[int, str | None]) -> tuple[int, bool]:
    return row[0], row[1] is not None


def _is_static(die: DIE) -> bool:
    """Its location is an address (DW_OP_addr, DW_OP_addrx), not a place in a frame (DWARF 5, section 2.5.1.1)."""
    location = die.attributes.get("DW_AT_location")
    return location is not None and isinstance(location.value, list) and location.value[:1] in ([0x03], [0xA1])


def _unit_type(cu: CompileUnit) -> object:
    return cu.header.get("unit_type")


def _absolute(entries: list[object], base: int) -> list[tuple[int, int]]:
    found = []
    for entry in entries:
        if hasattr(entry, "base_address"):
            base = entry.base_address
        elif hasattr(entry, "begin_offset") and hasattr(entry, "end_offset"):
            start = 0 if getattr(entry, "is_absolute", False) else base
            found.append((int(start + entry.begin_offset), int(start + entry.end_offset)))
    return found


def _address_ranges(raw: bytes) -> Iterator[tuple[int, int, int]]:
    """(low, high, offset of the unit) of .debug_aranges (DWARF 5, section 6.1.2); addresses have eight bytes."""
    at = 0
    while at < len(raw):
        start, size, width = at, int.from_bytes(raw[at : at + 4], "little"), 4
        at += 4
        if size == 0xFFFFFFFF:
            size, width = int.from_bytes(raw[at : at + 8], "little"), 8
            at += 8
        end = at + size
        offset = int.from_bytes(raw[at + 2 : at + 2 + width], "little")
        if raw[at + 2 + width : at + 4 + width] != b"\x08\x00" or end > len(raw):
            raise ValueError("a table of address ranges is cut or of an unknown kind")
        at = start + -(-(at + 4 + width - start) // 16) * 16
        for low, length in struct.iter_unpack("<QQ", raw[at : end - (end - at) % 16]):
            if length:
                yield low, low + length, offset
        at = end


def _rows(program: LineProgram) -> Iterator[tuple[int, str | None]]:
    """(address, ``file:line``) of a line table; None where a sequence ends."""
    header = program.header
    first = 0 if header["version"] >= 5 else 1
    names = [_file_name(header, entry) for entry in header["file_entry"]]
    program.stream.seek(program.program_start_offset)
    code = program.stream.read(program.program_end_offset - program.program_start_offset)
    parameters = LineHeader(
        header["minimum_instruction_length"],
        header["line_base"],
        header["line_range"],
        header["opcode_base"],
        tuple(header["standard_opcode_lengths"]),
    )
    for address, file, line in rows(code, parameters):
        known = 0 <= file - first < len(names) and line > 0
        yield address, f"{names[file - first]}:{line}" if known else None


def _file_name(header: Container, entry: Container) -> str:
    name = entry.name.decode("utf-8", "surrogateescape")
    directories, index = header["include_directory"], entry.dir_index
    if header["version"] < 5:
        index -= 1
    elif index == 0:
        return str(name)
    if name.startswith("/") or not 0 <= index < len(directories):
        return str(name)
    return f"{directories[index].decode('utf-8', 'surrogateescape')}/{name}"


def value_of(die: DIE, name: str) -> int | None:
    """A number, or None where the attribute is missing or none."""
    attribute = die.attributes.get(name)
    return int(attribute.value) if attribute is not None and isinstance(attribute.value, int) else None


def text_of(die: DIE, name: str) -> str:
    """A string, empty where the attribute is missing."""
    attribute = die.attributes.get(name)
    if attribute is None or not isinstance(attribute.value, bytes):
        return ""
    return attribute.value.decode("utf-8", "surrogateescape")
