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
                on_stack = first[0] in stack or (framed and first[0] == x86_const.X86_REG_RBP)
                if first[:3] == second[:3] and first[3] != second[3] and not on_stack:
                    yield Shift(j, first[3], second[3])


def _keeps_frame_pointer(code: Code, function: int) -> bool:
    """The function begins ``[endbr64] push rbp; mov rbp, rsp``: displacements from rbp are its own locals."""
    start = int(code.starts[function]) - code.base
    raw = code.raw[start : start + 8].tobytes().removeprefix(b"\xf3\x0f\x1e\xfa")
    return raw.startswith((b"\x55\x48\x89\xe5", b"\x55\x48\x8b\xec"))
