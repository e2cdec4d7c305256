"""Linkage: the stubs through which a program reaches what it imports (psABI, section 5.2), and what names a slot.

Every linker has its own form; all end in ``jmp *slot(%rip)`` with one of these in front: nothing, ``endbr64``, a
``bnd`` prefix (x86-64 psABI 0.99, MPX), ``mov $index, %r11d`` for a lazy binder (mold).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elfdiff.images.image import SYMBOL_VALUES, Image, Kind, Section

STUB_ALIGNMENT = 8
"""Stubs are 16 bytes long, in .plt.got and in static programs 8."""
R_X86_64_DTPMOD64 = 16
_ENDBR64, _BND, _INDEX, _JUMP = b"\xf3\x0f\x1e\xfa", b"\xf2", b"\x41\xbb", b"\xff\x25"


class SlotName(NamedTuple):
    """What the dynamic linker is asked to write into a slot: equal names, equal values.

    ``type`` is 0 for the value of a symbol, however it is asked for, else the relocation's. ``behind`` is the word
    behind the slot where that belongs to it (psABI, "Thread-Local Storage": the module and the offset in it make a
    pair, and the offset of a variable that is no symbol is written by the linker).
    """

    type: int
    symbol: str
    version: str
    addend: int
    behind: int


def slot_name(image: Image, address: int) -> SlotName | None:
    """Name the slot at a virtual address; None where there is none."""
    slot = image.slots.get(address)
    if slot is None:
        return None
    behind = 0
    if slot.type == R_X86_64_DTPMOD64 and address + 8 not in image.slots and image.contains(address + 15):
        behind = int.from_bytes(image.read(address + 8, 8), "little", signed=True)
    kind = 0 if slot.type in SYMBOL_VALUES else slot.type
    return SlotName(kind, slot.symbol, slot.version, slot.addend, behind)


def linkage_stubs(
    sections: Sequence[Section], base: int, memory: NDArray[np.uint8], slots: Container[int]
) -> dict[int, int]:
    """Linkage stub -> the slot that it jumps through; addresses are virtual, ``memory`` begins at ``base``.

    That the slot is one of ``slots`` tells a stub from other bytes.
    """
    stubs: dict[int, int] = {}
    for section in sections:
        if section.kind is not Kind.PLT:
            continue
        code = memory[section.start - base : section.end - base].tobytes()
        for offset in range(0, len(code), STUB_ALIGNMENT):
            target = _jump_through(code[offset : offset + 2 * STUB_ALIGNMENT])
            if target is not None and section.start + offset + target in slots:
                stubs[section.start + offset] = section.start + offset + target
    return stubs


def _jump_through(stub: bytes) -> int | None:
    """Where the slot of a stub is, counted from its start; None where it is no stub."""
    at = 0
    for prefix, size in ((_ENDBR64, 4), (_INDEX, 6), (_BND, 1)):
        if stub.startswith(prefix, at):
            at += size
    if not stub.startswith(_JUMP, at) or at + 6 > len(stub):
        return None
    return at + 6 + int.from_bytes(stub[at + 2 : at + 6], "little", signed=True)
