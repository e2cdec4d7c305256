"""Where the unwind tables of a patch lead: to the running program's personality routine and types.

The patch holds the new build's unwind and exception tables at their own addresses, so that all in them that names code
of the patch is right as it is. What names anything else are the pointers of ``handlers``: they are rewritten like the
references of instructions, and where they go through a slot, the slot is.
"""

from __future__ import annotations

from elfdiff.building.resolution import Place, Resolver, Unbound
from elfdiff.decoding.exceptiontables import Handlers
from elfdiff.differences.comparison import Comparison
from elfdiff.patchobject import PATCH_IMAGE, RelocationType
from elfdiff.unwinding.lsda import EncodedPointer

Relocation = tuple[int, int, int, int]
"""(place, type, symbol, addend), as ``RELOCATION_DTYPE`` has them."""


def relocate_handlers(comparison: Comparison, functions: list[int], resolver: Resolver) -> list[Relocation]:
    """The relocations of all handlers of the patch's functions (new ones); what leads nowhere known is noted.

    Slots that the patch must have are added to what the resolver owns. Raises BadInput for damaged tables.
    """
    found: dict[int, Relocation] = {}
    for function in functions:
        handlers = comparison.handlers.new.of(function)
        links = [(pointer, _resolve(pointer, resolver)) for pointer in _pointers(handlers)]
        links += [(pointer, _own(pointer)) for pointer in handlers.own]
        for pointer, place in links:
            if isinstance(place, str):
                assert pointer.address is not None
                resolver.unbound.append(Unbound(function, pointer.address, f"its exception table: {place}"))
            elif place is not None:
                found[pointer.place] = place
    return list(found.values())


def _pointers(handlers: Handlers) -> list[EncodedPointer]:
    own = [handlers.personality] if handlers.personality is not None else []
    return own + (list(handlers.table.types.values()) if handlers.table is not None else [])


def _own(pointer: EncodedPointer) -> Relocation | str | None:
    """A field that names something of the patch: code at a fixed address has absolute ones."""
    if pointer.address is None:
        return None
    if pointer.indirect:
        return "an indirect field of a frame description"
    return _field(pointer, Place(PATCH_IMAGE, pointer.address))


def _resolve(pointer: EncodedPointer, resolver: Resolver) -> Relocation | str | None:
    """The relocation of a pointer's field; None where the field is right as it is."""
    if pointer.address is None:
        return None
    if pointer.indirect:
        held = resolver.content(pointer.address)
        if isinstance(held, str):
            return held
        resolver.owned.slots[pointer.address] = held
        if pointer.relative:
            return None
        return _field(pointer, Place(PATCH_IMAGE, pointer.address))
    place = resolver.address(pointer.address, taken=True)
    return place if isinstance(place, str) else _field(pointer, place)


def _field(pointer: EncodedPointer, place: Place) -> Relocation | str | None:
    if pointer.relative:
        if place.symbol == PATCH_IMAGE:
            return None
        if pointer.width != 4 or not pointer.signed:
            return f"a relative field of {pointer.width} bytes"
        return pointer.place, RelocationType.PC32, place.symbol, place.address
    if pointer.width == 8:
        return pointer.place, RelocationType.ABS64, place.symbol, place.address
    if pointer.width == 4:
        kind = RelocationType.ABS32S if pointer.signed else RelocationType.ABS32
        return pointer.place, kind, place.symbol, place.address
    return f"an absolute field of {pointer.width} bytes"
