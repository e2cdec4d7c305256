"""The signature of a changed structure layout, where no types are known (D6).

When a structure grows in the middle, functions that were not edited change all the same: the displacements of the
fields behind the new one shift by its size. So in the instructions that survived in changed functions we collect
memory operands that differ in nothing but their displacement, through a base that is neither the stack nor
``rip``. capstone gives the operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from elfdiff.code import Code
from elfdiff.pairing import surviving_instructions

PROLOGUE_SIZE = 32
"""Bytes in which a frame pointer is set up, also behind the re-alignment of the stack."""


@dataclass(frozen=True)
class Shift:
    """In ``function`` (new) a field moved from displacement ``old`` to ``new``."""

    function: int
    old: int
    new: int


def field_shifts(old: Code, new: Code, pairs: list[tuple[int, int]]) -> Iterator[Shift]:
    """All displacement shifts of function pairs (old, new)."""
    import capstone  # noqa: PLC0415  (87 ms, and most comparisons never come here)
    from capstone import x86_const  # noqa: PLC0415

    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    stack = {x86_const.X86_REG_RSP, x86_const.X86_REG_RIP, 0}

    def operands(code: Code, at: int) -> list[tuple[int, int, int, int]]:
        """(base, index, scale, displacement) of the memory operands of one instruction."""
        raw = code.raw[at : at + int(code.decoded.length[at])].tobytes()
        return [
            (o.mem.base, o.mem.index, o.mem.scale, o.mem.disp)
            for instruction in decoder.disasm(raw, at)
            for o in instruction.operands
            if o.type == x86_const.X86_OP_MEM
        ]

    for i, j in pairs:
        framed = _keeps_frame_pointer(old, i)
        for a, b in surviving_instructions(old, new, i, j, shape=True):
            if old.raw[a : a + 15].tobytes() == new.raw[b : b + 15].tobytes():
                continue
            for first, second in zip(operands(old, a), operands(new, b), strict=False):
                # Fields have displacements of at least 0; below rbp lie the locals of a frame set up elsewhere.
                frame = first[0] == x86_const.X86_REG_RBP and (framed or min(first[3], second[3]) < 0)
                on_stack = frame or first[0] in stack
                if first[:3] == second[:3] and first[3] != second[3] and not on_stack:
                    yield Shift(j, first[3], second[3])


def _keeps_frame_pointer(code: Code, function: int) -> bool:
    """The function sets up rbp as its frame pointer, so that displacements from it are its own locals."""
    start = int(code.starts[function]) - code.base
    prologue = code.raw[start : start + PROLOGUE_SIZE].tobytes()
    return b"\x48\x89\xe5" in prologue or b"\x48\x8b\xec" in prologue  # mov rbp, rsp, in both encodings
