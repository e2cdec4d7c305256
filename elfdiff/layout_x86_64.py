"""The signature of a changed structure layout, where no types are known (D6).

When a structure grows in the middle, functions that were not edited change all the same: the displacements of the
fields behind the new one shift by its size. So in the instructions that survived in changed functions we collect
memory operands that differ in nothing but their displacement, through a base that is neither the stack nor
``rip``. capstone gives the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from elfdiff.code import LEA, Code, FieldKind
from elfdiff.pairing import Alignments

ARGUMENT_WINDOW = 8
"""Instructions behind an argument within which its call is looked for."""
CONTEXT = 2
"""Surviving instructions on either side that must be the same for a moved field to count as one."""
PROLOGUE_SIZE = 32
"""Bytes in which a frame pointer is set up, also behind the re-alignment of the stack."""


@dataclass(frozen=True)
class LayoutTraces:
    """What a changed function (new index) shows of changed layouts.

    ``fields``: (old, new) displacement of each field access that moved; ``only``: the function differs in nothing
    else. ``thread_local``: the same for accesses relative to the thread pointer. ``sizes``: (old, new) constant sizes
    given to an allocator.
    """

    function: int
    fields: tuple[tuple[int, int], ...]
    only: bool
    thread_local: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[int, int], ...]


def layout_traces(alignments: Alignments, pairs: list[tuple[int, int]]) -> Iterator[LayoutTraces]:
    """Look at all changed function pairs (old, new)."""
    operands = _operand_reader()
    for i, j in pairs:
        moved = _moved_operands(alignments, i, j, operands)
        thread_local = tuple(shift for one in moved if one is not None for shift in one.thread_local)
        fields = tuple(shift for k, one in enumerate(moved) if one is not None for shift in _in_context(moved, k))
        explained = sum(one is not None for one in moved)
        only = explained == len(alignments.old.instructions(i)) == len(alignments.new.instructions(j))
        yield LayoutTraces(j, fields, only, thread_local, tuple(_allocation_sizes(alignments, i, j)))


@dataclass(frozen=True)
class _Moved:
    """An instruction that is the same in both builds but for these displacements."""

    old: int
    new: int
    fields: tuple[tuple[int, int], ...]
    thread_local: tuple[tuple[int, int], ...]


def _moved_operands(
    alignments: Alignments, i: int, j: int, operands: Callable[[bytes], list[_Operand]]
) -> list[_Moved | None]:
    """For each surviving instruction what moved in it, or None where it differs in something else."""
    old, new = alignments.old, alignments.new
    framed = _keeps_frame_pointer(old, i)
    survivors = alignments.survivors(np.array([[i, j]], np.int64), shape=True)
    found: list[_Moved | None] = []
    for a, b in zip(survivors.old.tolist(), survivors.new.tolist(), strict=True):
        first, second = _instruction(old, a), _instruction(new, b)
        fields: list[tuple[int, int]] = []
        thread_local: list[tuple[int, int]] = []
        if first != second and old.decoded.opcode[a] != LEA:
            for one, other in zip(operands(first), operands(second), strict=False):
                _note_shift(one, other, framed, fields, thread_local)
        explained = first == second or fields or thread_local
        found.append(_Moved(a, b, tuple(fields), tuple(thread_local)) if explained else None)
    return found


def _in_context(moved: list[_Moved | None], k: int) -> tuple[tuple[int, int], ...]:
    """The fields that moved in an instruction, if the instructions around it are the same or moved alike.

    In a stretch that was edited, instructions are aligned that have only their shape in common.
    """
    one = moved[k]
    assert one is not None
    distances = {b - a for a, b in one.fields}
    for other in moved[max(0, k - CONTEXT) : k + CONTEXT + 1]:
        if other is None or {b - a for a, b in other.fields} - distances:
            return ()
    return one.fields


_Operand = tuple[int, int, int, int, int]
"""Segment, base, index, scale, displacement of a memory operand; capstone's register numbers."""


def _operand_reader() -> Callable[[bytes], list[_Operand]]:
    import capstone  # noqa: PLC0415  (87 ms, and most comparisons never come here)
    from capstone import x86_const  # noqa: PLC0415

    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True

    def operands(raw: bytes) -> list[_Operand]:
        return [
            (o.mem.segment, o.mem.base, o.mem.index, o.mem.scale, o.mem.disp)
            for instruction in decoder.disasm(raw, 0)
            for o in instruction.operands
            if o.type == x86_const.X86_OP_MEM
        ]

    return operands


def _note_shift(
    one: _Operand,
    other: _Operand,
    framed: bool,
    fields: list[tuple[int, int]],
    thread_local: list[tuple[int, int]],
) -> None:
    """Note an operand that differs in its displacement alone."""
    from capstone import x86_const  # noqa: PLC0415

    if one[:4] != other[:4] or one[4] == other[4]:
        return
    shift = one[4], other[4]
    if one[0] == x86_const.X86_REG_FS:
        thread_local.append(shift)
        return
    # Fields have displacements of at least 0; below rbp lie the locals of a frame set up elsewhere.
    frame = one[1] == x86_const.X86_REG_RBP and (framed or min(shift) < 0)
    if not frame and one[1] not in (x86_const.X86_REG_RSP, x86_const.X86_REG_RIP, 0):
        fields.append(shift)


def _instruction(code: Code, at: int) -> bytes:
    """The bytes of an instruction, fields that lead outside zeroed."""
    return code.masked[at : at + int(code.decoded.length[at])].tobytes()


def _allocation_sizes(alignments: Alignments, i: int, j: int) -> Iterator[tuple[int, int]]:
    """Constants that differ in ``mov $imm32, edi or esi`` in front of a call of something named ...alloc."""
    old, new = alignments.old, alignments.new
    calls = _allocator_calls(old, i)
    if not calls:
        return
    at = old.instructions(i)
    survivors = alignments.survivors(np.array([[i, j]], np.int64))
    for a, b in zip(survivors.old.tolist(), survivors.new.tolist(), strict=True):
        if int(old.decoded.opcode[a]) not in (0xBE, 0xBF) or int(new.decoded.opcode[b]) != int(old.decoded.opcode[a]):
            continue
        index = int(np.searchsorted(at, a))
        following = next((int(x) for x in at[index + 1 : index + ARGUMENT_WINDOW] if old.decoded.ref_kind[x] == 2), -1)
        values = tuple(int.from_bytes(code.raw[x + 1 : x + 5].tobytes(), "little") for code, x in ((old, a), (new, b)))
        if following in calls and values[0] != values[1] and old.decoded.imm_field[a] == 1:
            yield values[0], values[1]


def _allocator_calls(code: Code, function: int) -> set[int]:
    """Offsets of the calls of functions whose name ends like an allocator's."""
    references, image = code.references, code.image
    found = set()
    for row in range(int(references.first[function]), int(references.last[function])):
        if references.kind[row] == FieldKind.CALL:
            target = int(references.target[row])
            slot = image.slots.get(image.plt.get(target, 0))
            names = {slot.symbol} if slot else image.names_at.get(target, frozenset())
            if any(name.endswith(("alloc", "memalign")) for name in names):
                found.add(int(references.instruction[row]) - code.base)
    return found


def _keeps_frame_pointer(code: Code, function: int) -> bool:
    """The function sets up rbp as its frame pointer, so that displacements from it are its own locals."""
    start = int(code.starts[function]) - code.base
    prologue = code.raw[start : start + PROLOGUE_SIZE].tobytes()
    return b"\x48\x89\xe5" in prologue or b"\x48\x8b\xec" in prologue  # mov rbp, rsp, in both encodings
