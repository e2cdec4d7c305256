"""The run-time type information of C++ classes, found by its structure (Itanium C++ ABI, section 2.9).

A ``std::type_info`` object is two words and more: a pointer into the vtable of its own class (one of those of
``__cxxabiv1``), and a pointer to its name. The name is what identifies a type across two builds, and across two images
of a program; so it does here, and no symbol is needed.
"""

from __future__ import annotations

import re
from functools import cached_property

import numpy as np

from elfdiff.images.image import R_X86_64_64, R_X86_64_COPY, Addresses, Image, Kind

ABI_VTABLE = "_ZTVN10__cxxabiv1"
_ABI_NAME = b"N10__cxxabiv1"
_NAME_SYMBOL = "_ZTS"
_ADDRESS_POINT = 16
"""A vtable is named at its beginning, and pointed to behind its offset to top and its type (Itanium, 2.5.2)."""
_NAME = re.compile(rb"\*?[A-Za-z0-9_.$]+")


class TypeInfos:
    """The type information objects of one image."""

    def __init__(self, image: Image) -> None:
        """Nothing is read until it is asked for."""
        self.image = image

    def name(self, address: int) -> bytes | None:
        """The mangled name that the object at an address holds, or None where that is no name."""
        slot = self.image.slots.get(address + 8)
        if slot is not None and slot.symbol.startswith(_NAME_SYMBOL):  # a library's names can be another's
            return slot.symbol[len(_NAME_SYMBOL) :].encode("utf-8", "surrogateescape")
        pointer = self.image.pointer_at(address + 8)
        text = self.image.string_at(pointer) if pointer is not None else None
        return text if text and _NAME.fullmatch(text) else None

    @cached_property
    def by_name(self) -> dict[bytes, tuple[int, ...]]:
        """Every object of the image by its name; local types of two translation units may share one."""
        found: dict[bytes, list[int]] = {}
        for address in self._places():
            name = self.name(address)
            if name is not None:
                found.setdefault(name, []).append(address)
        return {name: tuple(sorted(places)) for name, places in found.items()}

    @cached_property
    def addresses(self) -> dict[int, bytes]:
        """Address -> name, of every object."""
        return {address: name for name, places in self.by_name.items() for address in places}

    def _places(self) -> set[int]:
        """Where a pointer into a vtable of ``__cxxabiv1`` stands."""
        image = self.image
        named = {a for a, s in image.slots.items() if s.type == R_X86_64_64 and s.symbol.startswith(ABI_VTABLE)}
        copied = [a for a, s in image.slots.items() if s.type == R_X86_64_COPY and s.symbol.startswith(ABI_VTABLE)]
        vtables = [address + _ADDRESS_POINT for address in copied] + self._own_abi_vtables()
        places = image.relative_places[np.isin(image.relative_targets, np.array(vtables, np.int64))]
        return named | set(places.tolist())

    def _own_abi_vtables(self) -> list[int]:
        """Address points of the vtables of ``__cxxabiv1`` that are linked into the image."""
        image = self.image
        targets: Addresses = np.unique(image.relative_targets)
        found = []
        for vtable in targets[np.isin(targets - 8, image.relative_places)].tolist():
            own_type = image.pointer_at(vtable - 8)
            if own_type is None or image.kind_at(own_type) not in (Kind.CONSTANT, Kind.RELRO, Kind.DATA):
                continue
            name = self.name(own_type)
            if name is not None and name.startswith(_ABI_NAME):
                found.append(vtable)
        return found


class TypePairs:
    """The types of two builds side by side."""

    def __init__(self, old: Image, new: Image) -> None:
        """Types are paired by their names."""
        self.old, self.new = TypeInfos(old), TypeInfos(new)

    def old_of(self, address: int) -> int | None:
        """The old object for a new one; None where it is none, is new, or its name does not decide."""
        name = self.new.addresses.get(address)
        if name is None or len(self.new.by_name[name]) != 1:
            return None
        places = self.old.by_name.get(name, ())
        return places[0] if len(places) == 1 else None
