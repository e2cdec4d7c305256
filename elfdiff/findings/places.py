"""How a place is named in a finding."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from elfdiff.building.patchbuild import Draft
from elfdiff.images.image import Image
from elfdiff.patchobject import PatchFunction

AT_START, AT_END = (".preinit_array", ".init_array"), (".fini_array",)
"""Arrays of the functions that the start and the end of a program call."""
MANY = 12
"""Places that one finding names."""


def functions(draft: Draft, indices: Iterable[int], *, old: bool = False) -> tuple[str, ...]:
    """Functions by name, each with its source line where that is known; the first ``MANY``, and how many more."""
    code = draft.comparison.old if old else draft.comparison.new
    debug = draft.debug[0 if old else 1]
    chosen = sorted(set(indices))
    named = []
    for index in chosen[:MANY]:
        line = debug.opening(int(code.starts[index])) if debug is not None else None
        named.append(f"{code.names[index]} ({line})" if line else code.names[index])
    if len(chosen) > MANY:
        named.append(f"and {len(chosen) - MANY} more")
    return tuple(named)


def members(draft: Draft, chosen: Iterable[PatchFunction]) -> tuple[str, ...]:
    """The same for functions of the patch."""
    return functions(draft, (draft.comparison.new.function_of(function.new_start) for function in chosen))


def called_by(image: Image, arrays: Iterable[str]) -> set[int]:
    """The functions that arrays of functions of these section names hold (gABI, "Initialization and Termination")."""
    sections = [s for name in arrays if (s := image.section(name))]
    places = [place for s in sections for place in range(s.start, s.end, 8)]
    return {pointer for place in places if (pointer := image.pointer_at(place)) is not None}


def where(image: Image, address: int) -> str:
    """An address with its symbol, where there is one."""
    found = _symbol_at(image, address)
    if found is not None:
        name, offset = found
        return f"{name}{f'+{offset:#x}' if offset else ''}"
    section = image.section_at(address)
    return f"{address:#x} in {section.name}" if section else f"{address:#x}"


def name_at(image: Image, address: int) -> str:
    """The symbol that covers an address, or the address."""
    found = _symbol_at(image, address)
    return found[0] if found is not None else f"{address:#x}"


def _symbol_at(image: Image, address: int) -> tuple[str, int] | None:
    """Name of the symbol that covers an address, and the distance from its start."""
    symbols = image.symbols
    index = int(np.searchsorted(symbols.values, address, "right")) - 1
    while index >= 0 and symbols.values[index] == address and not symbols.sizes[index]:
        index -= 1
    if index >= 0 and symbols.values[index] <= address < symbols.values[index] + symbols.sizes[index]:
        return symbols.names[index], address - int(symbols.values[index])
    return None
