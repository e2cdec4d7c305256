"""What references of a pair of builds name, in words: functions, imports, strings and numbers, variables.

The new build's references get the old build's names wherever they lead to the same thing, so that two listings side by
side differ only where the code does. What only the new build has is marked ``new:`` unless a symbol names it.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from elfdiff.building.resolution import Place, Resolver
from elfdiff.decoding.code import LEA, TRANSFERS, Code, FieldKind
from elfdiff.differences.comparison import Comparison
from elfdiff.images.image import Image, Kind
from elfdiff.patches.evidence import MAX_LABEL, Names
from elfdiff.patches.quoting import is_text, number, printable, quote
from elfdiff.patchobject import OLD_IMAGE

Named = tuple[Names, str]

STRING_LIMIT = 4096
_SCALAR_FLOATS = frozenset((0x110, 0x12E, 0x12F, 0x151, *range(0x158, 0x15B), *range(0x15C, 0x160)))
"""movss/movsd, ucomis, comis, sqrt, add, mul, cvt, sub, min, div, max (Intel SDM, volume 2, table A-3)."""
_WIDE_MOVES = frozenset((0x128, 0x16F, 0x154, 0x155, 0x156, 0x157, 0x1EF, 0x1FE, 0x1D4))
"""movaps, movdqa, and the logical and packed ones that read 16 bytes."""


class Naming:
    """Names for the references of one comparison, by row of each build's reference table."""

    def __init__(self, comparison: Comparison, resolver: Resolver) -> None:
        """``resolver`` has resolved the patch's references."""
        self.comparison, self.resolver = comparison, resolver
        self.first, self.second = comparison.old, comparison.new
        self._old: dict[tuple[int, int], Named] = {}
        self._new: dict[tuple[int, int], Named] = {}

    def old(self, row: int) -> Named:
        """What a reference of the old build names."""
        key = int(self.first.references.target[row]), _reading(self.first, row)
        if key not in self._old:
            self._old[key] = _cut(self._of_old(*key))
        return self._old[key]

    def new(self, row: int) -> Named:
        """What a reference of the new build names, by its name in the old one where it has one."""
        key = int(self.second.references.target[row]), _reading(self.second, row)
        if key not in self._new:
            self._new[key] = _cut(self._of_new(*key, self.resolver.resolved.get(row)))
        return self._new[key]

    def old_address(self, address: int) -> str:
        """The name of an old address that is used as a pointer."""
        return _cut(self._of_old(address, _POINTER))[1]

    def new_address(self, address: int) -> str:
        """The name of a new address that is used as a pointer."""
        return _cut(self._of_new(address, _POINTER, None))[1]

    def function(self, function: int) -> str:
        """A new function, by its name in the old build where it has a counterpart."""
        i = int(self.comparison.matching.old_of[function])
        return self.first.names[i] if i >= 0 else self._only_new(self.second.names[function])

    # -- one build ----------------------------------------------------------------------------------------------

    def _of_old(self, address: int, reading: int) -> Named:
        kind = self.first.image.kind_at(address)
        if kind is Kind.TEXT:
            i = self.first.function_of(address)
            if i >= 0:
                return _inside(self.first.names[i], address - int(self.first.starts[i]))
        if kind in (Kind.PLT, Kind.GOT):
            return self._linkage(self.first.image, address) or (Names.OTHER, self._place(self.first.image, address))
        if kind in (Kind.CONSTANT, Kind.RELRO):
            named = self._content(self.first, address, reading)
            if named is not None:
                return (Names.CONSTANT if named[0] is Names.OWN_CONSTANT else named[0]), named[1]
            return Names.CONSTANT, self._place(self.first.image, address)
        if kind in (Kind.DATA, Kind.BSS):
            return Names.VARIABLE, self._place(self.first.image, address)
        return Names.OTHER, self._place(self.first.image, address)

    def _of_new(self, address: int, reading: int, place: Place | None) -> Named:
        kind = self.second.image.kind_at(address)
        if kind in (Kind.PLT, Kind.GOT):
            return self._linkage(self.second.image, address) or (Names.OTHER, self._own(address))
        if kind is Kind.TEXT:
            j = self.second.function_of(address)
            if j >= 0:
                return _inside(self.function(j), address - int(self.second.starts[j]))
        if place is not None and place.symbol == OLD_IMAGE:
            return self._of_old(place.address, reading)
        known = self.comparison.addresses.old_of.get(address)
        if known is not None and place is None and kind in (Kind.DATA, Kind.BSS):
            return self._of_old(known[0], reading)
        if kind in (Kind.CONSTANT, Kind.RELRO):
            if known is not None and (known[0], address) not in self.comparison.constants.differing:
                names, label = self._of_old(known[0], reading)
                return (Names.OWN_CONSTANT if names is Names.CONSTANT else names), label
            return self._content(self.second, address, reading) or (Names.OWN_CONSTANT, self._own(address))
        if kind in (Kind.DATA, Kind.BSS):
            return (Names.NEW_VARIABLE if place is not None else Names.OTHER), self._own(address)
        return Names.OTHER, self._own(address)

    def _own(self, address: int) -> str:
        place = self._place(self.second.image, address)
        return self._only_new(place) if self.second.image.contains(address) else place

    def _only_new(self, name: str) -> str:
        """A name of the new build that could be taken for one of the old build."""
        return f"new:{name}" if name.startswith(("0x", ".")) else name

    # -- what it is ---------------------------------------------------------------------------------------------

    def _linkage(self, image: Image, address: int) -> Named | None:
        """An import by its symbol; a slot of something of the image itself by what it holds."""
        stub = address in image.plt
        slot = image.slots.get(image.plt.get(address, address))
        suffix = "plt" if stub else "got"
        if slot is not None and slot.symbol:
            version = f"@{slot.version}" if slot.symbol in self._several_versions else ""
            return Names.IMPORT, f"{slot.symbol}{version}@{suffix}"
        pointed = slot.addend if slot is not None else image.pointer_at(address)
        if pointed is None:
            return None
        named = self._of_old(pointed, _POINTER) if image is self.first.image else self._of_new(pointed, _POINTER, None)
        return Names.IMPORT, f"{named[1]}@{suffix}"

    @cached_property
    def _several_versions(self) -> frozenset[str]:
        """Symbols that the two builds import in more than one version: there the version is part of the name."""
        versions: dict[str, set[str]] = {}
        for image in (self.first.image, self.second.image):
            for slot in image.slots.values():
                versions.setdefault(slot.symbol, set()).add(slot.version)
        return frozenset(name for name, found in versions.items() if len(found) > 1)

    def _content(self, code: Code, address: int, reading: int) -> Named | None:
        """A constant that is shown by what it holds: a switch table, a string, a number; None for any other."""
        table = self.comparison.tables[code is self.second].get(address)
        if table is not None:
            return Names.TABLE, f"switch table ({len(table.targets)} cases)"
        if reading == _POINTER:
            text = string_at(code.image, address)
            return (Names.OWN_CONSTANT, quote(text)) if text else None
        section = code.image.section_at(address)
        size = abs(reading)
        if section is None or section.kind is not Kind.CONSTANT or address + size > section.end:
            return None
        return Names.OWN_CONSTANT, number(code.image.read(address, size), floating=reading < 0)

    def _place(self, image: Image, address: int) -> str:
        """An address as symbol or section and offset."""
        symbols = image.symbols
        index = int(np.searchsorted(symbols.values, address, "right")) - 1
        while index >= 0 and symbols.values[index] == address and not symbols.sizes[index]:
            index -= 1
        if index >= 0 and symbols.values[index] <= address < symbols.values[index] + symbols.sizes[index]:
            return _offset(symbols.names[index], address - int(symbols.values[index]))
        section = image.section_at(address)
        return _offset(section.name, address - section.start) if section else hex(address)


_POINTER = 0
"""Reading: the address itself is used. Else the bytes that are read there, negative for a floating-point number."""


def string_at(image: Image, address: int) -> bytes | None:
    """The text at an address, or None where there is none: a pointer, numbers, nothing."""
    if image.pointer_at(address) is not None:
        return None
    text = image.string_at(address, STRING_LIMIT)
    return text if text and is_text(text) else None


def as_address(code: Code, row: int) -> bool:
    """Whether an instruction uses the address that it names, and not a number of known width there."""
    return _reading(code, row) == _POINTER


def _reading(code: Code, row: int) -> int:
    """How an instruction uses what it names: ``_POINTER``, or as so many bytes."""
    references = code.references
    kind, opcode = int(references.kind[row]), int(references.opcode[row])
    by_address = kind in TRANSFERS or kind in (FieldKind.ABSOLUTE_IMMEDIATE, FieldKind.ABSOLUTE_IMMEDIATE64)
    if by_address or opcode == LEA or opcode in (0xFF, 0x8C, 0x8E):
        return _POINTER
    start = int(references.instruction[row]) - code.base
    modrm = int(code.decoded.modrm[start])
    if kind == FieldKind.ABSOLUTE_DISPLACEMENT and (modrm & 7 == 4 or modrm >> 6):  # with an index: a table
        return _POINTER
    if opcode in _WIDE_MOVES:
        return 16
    prefixes = code.raw[start : int(references.field[row]) - code.base].tobytes()
    if opcode in _SCALAR_FLOATS:
        if b"\xf2" in prefixes[:2] or (b"\x66" in prefixes[:2] and opcode in (0x12E, 0x12F)):
            return -8
        return -4 if b"\xf3" in prefixes[:2] or opcode in (0x12E, 0x12F) else 16
    if opcode >= 0x100:
        return _SMALL.get(opcode, _POINTER)
    wide = any(byte & 0xF8 == 0x48 for byte in prefixes[:2])
    return 1 if opcode in _BYTE_WIDE else 8 if wide else 2 if b"\x66" in prefixes[:1] else 4


_SMALL = {0x1B6: 1, 0x1BE: 1, 0x1B7: 2, 0x1BF: 2, 0x16E: 4, 0x17E: 8, 0x1AF: 4, 0x1D6: 8}
_BYTE_WIDE = frozenset((*range(0x00, 0x40, 8), *range(0x02, 0x40, 8), 0x80, 0x84, 0x86, 0x88, 0x8A, 0xC6, 0xF6, 0xFE))


def _inside(name: str, offset: int) -> Named:
    return (Names.INSIDE if offset else Names.FUNCTION), _offset(name, offset)


def _offset(name: str, offset: int) -> str:
    return f"{name}+{offset:#x}" if offset else name


def _cut(named: Named) -> Named:
    names, label = named
    label = printable(label)
    return names, label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"
