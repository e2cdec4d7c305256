"""The classes of a C++ program as its files show them: virtual functions and bases (Itanium C++ ABI, 2.5 and 2.9.5).

A vtable is a number (offset to top), a pointer to the type, then one pointer for each virtual function. Objects that
live hold the address of their vtable, so a class whose vtable has another form cannot be patched: the new code would
call through the old one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from elfdiff.correspondence.matching import Matching
from elfdiff.decoding.code import Code
from elfdiff.differences.handlers import TYPE_SYMBOL
from elfdiff.images.image import Kind
from elfdiff.images.typeinfo import ABI_VTABLE, TypeInfos

MAX_BASES = 256
"""Direct bases that are believed."""
_SINGLE, _MULTIPLE = "si_class", "vmi_class"

Entry = tuple[str, str | int]
"""A virtual function: ("code", function) of the image, or ("name", symbol) of another one."""


@dataclass(frozen=True)
class ClassDifference:
    """A class of both builds that differs; ``what`` says in what."""

    name: str
    what: str


class Classes:
    """The classes of one build, by the mangled name of their type without its leading star."""

    def __init__(self, code: Code, types: TypeInfos) -> None:
        """Nothing is read until it is asked for."""
        self.code, self.image, self.types = code, code.image, types

    @cached_property
    def vtables(self) -> dict[bytes, list[list[Entry]]]:
        """The virtual functions of each vtable of a class, those of secondary and construction vtables too."""
        image = self.image
        known = np.array(sorted(self.types.addresses), np.int64)
        # Pointers to types in writable data are the slots of exception tables (DW.ref...).
        constant = np.isin(image.kinds(image.relative_places), (Kind.RELRO, Kind.CONSTANT))
        mine = np.isin(image.relative_targets, known) & constant
        places = dict(zip(image.relative_places[mine].tolist(), image.relative_targets[mine].tolist(), strict=True))
        named: dict[int, bytes] = {place: self.types.addresses[target] for place, target in places.items()}
        for place, slot in image.slots.items():
            if slot.symbol.startswith(TYPE_SYMBOL) and image.kind_at(place) is Kind.RELRO:
                named[place] = slot.symbol[len(TYPE_SYMBOL) :].encode("utf-8", "surrogateescape")
        found: dict[bytes, list[list[Entry]]] = {}
        for place, name in sorted(named.items()):
            functions = self._functions(place + 8) if self._is_offset(place - 8) else []
            if functions:  # else it is the pointer to a base, or a slot for exception tables
                found.setdefault(name.lstrip(b"*"), []).append(functions)
        return found

    def _is_offset(self, place: int) -> bool:
        """Whether a place holds an offset to top. Exception tables have slots for types and personality in a row."""
        if place < self.image.base or place in self.image.slots or self.image.pointer_at(place) is not None:
            return False
        return int.from_bytes(self.image.read(place, 8), "little", signed=True) <= 0

    def _functions(self, place: int) -> list[Entry]:
        """The entries from a place on, up to what is none or is named itself: the object behind."""
        found: list[Entry] = []
        following = self.code.next_named(place)
        end = following if following is not None else self.image.high
        while place < end and (entry := self._function(place)) is not None:
            found.append(entry)
            place += 8
        return found

    def _function(self, place: int) -> Entry | None:
        slot = self.image.slots.get(place)
        if slot is not None:
            return None if slot.symbol.startswith(("_ZTV", "_ZTI", "_ZTS")) or slot.addend else ("name", slot.symbol)
        target = self.image.pointer_at(place)
        if target is None:
            return None
        linked = self.image.slots.get(self.image.plt.get(target, 0))
        if linked is not None:
            return "name", linked.symbol
        function = self.code.function_of(target)
        is_start = function >= 0 and int(self.code.starts[function]) == target
        return ("code", function) if is_start else None

    def bases(self, address: int) -> tuple[str, tuple[tuple[str, int], ...]]:
        """(kind of the type object, its direct bases with offset and flags)."""
        kind = self._kind(address)
        if _SINGLE in kind:
            return kind, ((self._type_name(address + 16), 0),)
        if _MULTIPLE not in kind:
            return kind, ()
        count = int.from_bytes(self.image.read(address + 20, 4), "little")
        places = range(address + 24, address + 24 + 16 * min(count, MAX_BASES), 16)
        return kind, tuple((self._type_name(p), int.from_bytes(self.image.read(p + 8, 8), "little")) for p in places)

    def _kind(self, address: int) -> str:
        slot = self.image.slots.get(address)
        if slot is not None:
            return slot.symbol.removeprefix(ABI_VTABLE)
        vtable = self.image.pointer_at(address)
        copied = self.image.copied(vtable) if vtable is not None else None
        if copied is not None:
            return copied[0].removeprefix(ABI_VTABLE)
        own = self.image.pointer_at(vtable - 8) if vtable is not None else None
        return (self.types.name(own) or b"").decode("latin-1") if own is not None else ""

    def _type_name(self, place: int) -> str:
        slot = self.image.slots.get(place)
        if slot is not None:
            return slot.symbol.removeprefix(TYPE_SYMBOL)
        target = self.image.pointer_at(place)
        copied = self.image.copied(target) if target is not None else None
        if copied is not None:
            return copied[0].removeprefix(TYPE_SYMBOL)
        return (self.types.name(target) or b"").decode("latin-1").lstrip("*") if target is not None else ""


def differing_classes(
    old: Code, new: Code, types: tuple[TypeInfos, TypeInfos], matching: Matching
) -> list[ClassDifference]:
    """The classes of both builds whose virtual functions or bases differ, by name."""
    first, second = Classes(old, types[0]), Classes(new, types[1])
    found = []
    for name in sorted(first.vtables.keys() & second.vtables.keys()):
        what = _compare_vtables(first, second, name, matching)
        if what:
            found.append(ClassDifference(name.decode("latin-1"), what))
    for name in sorted(types[0].by_name.keys() & types[1].by_name.keys()):
        places = types[0].by_name[name], types[1].by_name[name]
        if len(places[0]) == len(places[1]) == 1 and first.bases(places[0][0]) != second.bases(places[1][0]):
            found.append(ClassDifference(name.decode("latin-1"), "it has other bases"))
    return found


def _compare_vtables(first: Classes, second: Classes, name: bytes, matching: Matching) -> str:
    tables = first.vtables[name], second.vtables[name]
    sizes = [[len(table) for table in side] for side in tables]
    if sizes[0] != sizes[1]:
        return f"it has {sum(sizes[1])} entries for virtual functions, {sum(sizes[0])} in the running program"
    for one, other in zip(*tables, strict=True):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            if not _same_function(first.code, second.code, a, b, matching):
                return f"entry {number} of its virtual functions is another function"
    return ""


def _same_function(old: Code, new: Code, a: Entry, b: Entry, matching: Matching) -> bool:
    if "name" in (a[0], b[0]):
        return a == b
    i, j = int(a[1]), int(b[1])
    return int(matching.new_of[i]) == j or old.masked_bytes(i) == new.masked_bytes(j)
