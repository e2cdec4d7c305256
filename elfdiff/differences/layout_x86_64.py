"""The signature of a changed structure layout, where no types are known (D6).

When a structure grows in the middle, functions that were not edited change all the same: the displacements of the
fields behind the new one shift by its size. So in the instructions that survived in changed functions we collect
memory operands that differ in nothing but their displacement, through a base that is neither the stack nor
``rip``. capstone gives the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from elfdiff.correspondence.pairing import Alignments, Survivors
from elfdiff.decoding.code import LEA, Code, FieldKind, word_at

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
    wanted = np.array(pairs, np.int64).reshape(-1, 2)
    counts = alignments.old.instruction_counts, alignments.new.instruction_counts
    sizes = _allocation_sizes(alignments, wanted)
    for k, ((i, j), moved) in enumerate(zip(pairs, _moved_operands(alignments, wanted), strict=True)):
        thread_local = tuple(shift for one in moved if one is not None for shift in one.thread_local)
        fields = tuple(shift for n, one in enumerate(moved) if one and one.fields for shift in _in_context(moved, n))
        explained = sum(one is not None for one in moved)
        only = bool(explained == counts[0][i] == counts[1][j])
        yield LayoutTraces(j, fields, only, thread_local, tuple(sizes.get(k, ())))


@dataclass(frozen=True)
class _Moved:
    """An instruction that is the same in both builds but for these displacements."""

    fields: tuple[tuple[int, int], ...] = ()
    thread_local: tuple[tuple[int, int], ...] = ()


def _moved_operands(alignments: Alignments, pairs: NDArray[np.int64]) -> Iterator[list[_Moved | None]]:
    """Per function pair: for each surviving instruction what moved in it, or None where it differs in more."""
    old, new = alignments.old, alignments.new
    survivors = alignments.survivors(pairs, shape=True)
    equal = _same_bytes(old, new, survivors)
    suspect = _may_move(old, survivors.old) | _may_move(new, survivors.new)
    suspect &= ~_same_bytes(old, new, survivors, immediates=False)
    operands = _operand_reader() if suspect.any() else None
    bounds = np.searchsorted(survivors.pair, np.arange(len(pairs) + 1)).tolist()
    same = _Moved()
    for (i, _), (first, last) in zip(pairs.tolist(), pairwise(bounds), strict=True):
        found: list[_Moved | None] = [same if known else None for known in equal[first:last].tolist()]
        framed = _keeps_frame_pointer(old, i)
        for row in (first + np.nonzero(suspect[first:last])[0]).tolist():
            assert operands is not None
            fields: list[tuple[int, int]] = []
            thread_local: list[tuple[int, int]] = []
            raw = _instruction(old, int(survivors.old[row])), _instruction(new, int(survivors.new[row]))
            for one, other in zip(operands(raw[0]), operands(raw[1]), strict=False):
                _note_shift(one, other, framed, fields, thread_local)
            if fields or thread_local:
                found[row - first] = _Moved(tuple(fields), tuple(thread_local))
        yield found


def _same_bytes(old: Code, new: Code, survivors: Survivors, *, immediates: bool = True) -> NDArray[np.bool_]:
    """Which surviving instructions are equal, fields that lead outside zeroed; or all but 32- and 64-bit immediates."""
    first, second = old.decoded, new.decoded
    length, field = first.length[survivors.old], first.imm_field[survivors.old]
    size = first.imm_size[survivors.old]
    same: NDArray[np.bool_] = length == second.length[survivors.new]
    passed = (field == second.imm_field[survivors.new]) & (size == second.imm_size[survivors.new]) & (field > 0)
    for k in range(int(length.max(initial=0))):
        compared = same & (k < length)
        if not immediates:
            compared &= ~(passed & (field <= k) & (k < field + size))
        rows = np.nonzero(compared)[0]
        same[rows] = old.masked[survivors.old[rows] + k] == new.masked[survivors.new[rows] + k]
    return same


def _may_move(code: Code, at: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Instructions that access memory at a displacement: by their ModRM byte (8 or 32 bits), or mov at an address."""
    decoded = code.decoded
    mode, opcode = decoded.modrm[at] >> 6, decoded.opcode[at]
    direct = (opcode >= 0xA0) & (opcode <= 0xA3)
    moves: NDArray[np.bool_] = (mode == 1) | (mode == 2) | (decoded.disp_field[at] > 0) | direct
    moves &= opcode != LEA
    return moves


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

    @cache
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


def _allocation_sizes(alignments: Alignments, pairs: NDArray[np.int64]) -> dict[int, list[tuple[int, int]]]:
    """Constants that differ in ``mov $imm32, edi or esi`` in front of a call of something named ...alloc, by pair."""
    old, new = alignments.old, alignments.new
    survivors = alignments.survivors(pairs)
    opcode = old.decoded.opcode[survivors.old]
    moves = ((opcode == 0xBE) | (opcode == 0xBF)) & (opcode == new.decoded.opcode[survivors.new])
    rows = np.nonzero(moves & (old.decoded.imm_field[survivors.old] == 1))[0]
    values = [word_at(code.raw, at[rows] + 1) for code, at in ((old, survivors.old), (new, survivors.new))]
    calls = frozenset(_allocator_calls(old).tolist()) if len(rows) else frozenset()
    found: dict[int, list[tuple[int, int]]] = {}
    for row, one, other in zip(rows.tolist(), values[0].tolist(), values[1].tolist(), strict=True):
        if one == other:
            continue
        k = int(survivors.pair[row])
        at = old.instructions(int(pairs[k, 0]))
        index = int(np.searchsorted(at, survivors.old[row]))
        following = next((int(x) for x in at[index + 1 : index + ARGUMENT_WINDOW] if old.decoded.ref_kind[x] == 2), -1)
        if following in calls:
            found.setdefault(k, []).append((one & 0xFFFFFFFF, other & 0xFFFFFFFF))
    return found


def _allocator_calls(code: Code) -> NDArray[np.int64]:
    """Offsets of the calls of functions whose name ends like an allocator's, sorted."""
    references, image = code.references, code.image
    calls = references.kind == FieldKind.CALL
    targets = np.unique(references.target[calls]).tolist()
    allocators = []
    for target in targets:
        slot = image.slots.get(image.plt.get(target, 0))
        names = {slot.symbol} if slot else image.names_at.get(target, frozenset())
        if any(name.endswith(("alloc", "memalign")) for name in names):
            allocators.append(target)
    rows = calls & np.isin(references.target, np.array(allocators, np.int64))
    places: NDArray[np.int64] = references.instruction[rows] - code.base
    return places


def _keeps_frame_pointer(code: Code, function: int) -> bool:
    """The function sets up rbp as its frame pointer, so that displacements from it are its own locals."""
    start = int(code.starts[function]) - code.base
    prologue = code.raw[start : start + PROLOGUE_SIZE].tobytes()
    return b"\x48\x89\xe5" in prologue or b"\x48\x8b\xec" in prologue  # mov rbp, rsp, in both encodings
