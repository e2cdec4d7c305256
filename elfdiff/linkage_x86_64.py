"""Linkage stubs: the code through which a program reaches what it imports (psABI, section 5.2).

Every linker has its own form; all end in ``jmp *slot(%rip)`` with one of these in front: nothing, ``endbr64``, a
``bnd`` prefix (x86-64 psABI 0.99, MPX), ``mov $index, %r11d`` for a lazy binder (mold).
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
from numpy.typing import NDArray

from elfdiff.image import Kind, Section

STUB_ALIGNMENT = 8
"""Stubs are 16 bytes long, in .plt.got and in static programs 8."""
_ENDBR64, _BND, _INDEX, _JUMP = b"\xf3\x0f\x1e\xfa", b"\xf2", b"\x41\xbb", b"\xff\x25"


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
