"""Old and new code of one function side by side, instruction by instruction, aligned as the differ aligned it.

An instruction that corresponds to one of the other build is the same when its bytes are the same but for its
references, and each of these has the same name. A branch inside the function is the same when the instructions that it
leads to correspond, stand at the same place of the same difference, or begin alike.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import numpy as np

from elfdiff.decoding.code import FieldKind
from elfdiff.decoding.decode_x86_64 import RefKind, decode, instruction_starts
from elfdiff.errors import BadInput
from elfdiff.patches.evidence import Names, Reference, Run

BLOCK = 4
"""Instructions in which two pieces of code must begin alike to be taken for the same."""


class Change(StrEnum):
    """What an instruction is to its counterpart."""

    SAME = "same"
    OPERAND = "operand"  # corresponds, but a number in it differs
    REFERENCE = "reference"  # corresponds, but what it names differs
    REMOVED = "removed"
    ADDED = "added"


@dataclass(frozen=True)
class Instruction:
    """``at`` is its offset in the function, in bytes; ``masked`` its bytes with what leads elsewhere zeroed.

    ``inner``: the offset that it branches to inside the function, or None.
    """

    at: int
    size: int
    opcode: int
    masked: bytes
    references: tuple[Reference, ...]
    inner: int | None


@dataclass(frozen=True)
class Body:
    """One build's code of a function; ``start`` is its virtual address."""

    start: int
    code: bytes
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class Row:
    """Indices of the instructions side by side; None where one side has none."""

    old: int | None
    new: int | None
    change: Change


def read_bodies(parts: Sequence[tuple[int, bytes, tuple[Reference, ...]]]) -> list[Body]:
    """Decode functions given as (start address, code, references sorted by field), all in one go."""
    raw = np.frombuffer(b"".join(code for _, code, _ in parts), np.uint8)
    ends = np.cumsum([len(code) for _, code, _ in parts], dtype=np.int64)
    starts = ends - np.array([len(code) for _, code, _ in parts], np.int64)
    decoded = decode(raw)
    marks, _ = instruction_starts(decoded.length, starts, ends)
    masked = raw.copy()
    for (_, code, references), start in zip(parts, starts.tolist(), strict=True):
        for item in references:
            width = {FieldKind.SHORT: 1, FieldKind.ABSOLUTE_IMMEDIATE64: 8}.get(FieldKind(item.form), 4)
            if item.field + width > len(code):
                raise _inconsistent("a reference lies behind the end of its function")
            masked[start + item.field : start + item.field + width] = 0
    bodies = []
    for (address, code, references), low, high in zip(parts, starts.tolist(), ends.tolist(), strict=True):
        at = np.nonzero(marks[low:high])[0] + low
        fields = zip(
            (at - low).tolist(),
            decoded.length[at].tolist(),
            decoded.opcode[at].tolist(),
            decoded.ref_kind[at].tolist(),
            decoded.ref_field[at].tolist(),
            strict=True,
        )
        instructions = tuple(_instructions(code, masked[low:high].tobytes(), references, list(fields)))
        bodies.append(Body(address, code, instructions))
    return bodies


def _instructions(
    code: bytes, masked: bytes, references: tuple[Reference, ...], fields: list[tuple[int, int, int, int, int]]
) -> Iterator[Instruction]:
    k = 0
    for at, length, opcode, kind, field in fields:
        size = min(length, len(code) - at)
        first = k
        while k < len(references) and references[k].field < at + size:
            k += 1
        mine = references[first:k]
        inner = None
        bytes_ = masked[at : at + size]
        if kind > RefKind.MEMORY and not mine:
            width = 1 if kind == RefKind.SHORT else 4
            field_at = at + field
            inner = at + size + int.from_bytes(code[field_at : field_at + width], "little", signed=True)
            bytes_ = opcode.to_bytes(2, "little")  # a branch may have another width when code between grows
        yield Instruction(at, size, opcode, bytes_, mine, inner)


def compare_code(old: Body, new: Body, runs: tuple[Run, ...]) -> tuple[Row, ...]:
    """Old and new side by side. Raises BadInput where the alignment does not fit the code."""
    edges = [*runs, (len(old.instructions), len(new.instructions), 0)]
    places = _anchors(old, edges, 0), _anchors(new, edges, 1)
    rows: list[Row] = []
    i = j = 0
    for first, second, length in edges:
        if first < i or second < j or first > len(old.instructions) or second > len(new.instructions):
            raise _inconsistent("its alignment is not in ascending order")
        if first + length > len(old.instructions) or second + length > len(new.instructions):
            raise _inconsistent("its alignment goes beyond the code")
        rows += [Row(k, None, Change.REMOVED) for k in range(i, first)]
        rows += [Row(None, k, Change.ADDED) for k in range(j, second)]
        i, j = first + length, second + length
        for k in range(length):
            one, other = old.instructions[first + k], new.instructions[second + k]
            meets = places[0].place(one.inner) == places[1].place(other.inner) or _alike(old, new, one, other, places)
            rows.append(Row(first + k, second + k, _change(one, other, meets)))
    return tuple(rows)


def _alike(old: Body, new: Body, one: Instruction, other: Instruction, places: tuple[_Anchors, _Anchors]) -> bool:
    """Two branches to code that begins alike, unless both ends correspond to something else: short blocks move."""
    ends = places[0].index(one.inner), places[1].index(other.inner)
    if ends[0] is None or ends[1] is None or not (places[0].loose(ends[0]) or places[1].loose(ends[1])):
        return False
    for first, second in zip(old.instructions[ends[0] :][:BLOCK], new.instructions[ends[1] :][:BLOCK], strict=False):
        if first.masked != second.masked or _names(first) != _names(second):
            return False
        if first.opcode in _LEAVES:
            return True
    return True


_LEAVES = frozenset((0xE9, 0xEB, 0xC3))
"""jmp and ret: a block ends there (Intel SDM, volume 2, table A-2)."""


def _change(one: Instruction, other: Instruction, meets: bool) -> Change:
    if one.masked != other.masked:
        return Change.OPERAND
    return Change.SAME if _names(one) == _names(other) and meets else Change.REFERENCE


def _names(instruction: Instruction) -> list[str]:
    return [_identity(item) for item in instruction.references]


def _identity(reference: Reference) -> str:
    """The name by which two references are compared: how far inside another part does not matter."""
    return reference.label.rsplit("+", 1)[0] if reference.names is Names.INSIDE else reference.label


_Place = tuple[int, int] | None


@dataclass(frozen=True)
class _Anchors:
    """One side's runs, to say where a branch leads in terms that both sides share."""

    at: list[int]  # offset of each instruction
    first: list[int]  # first instruction of each run
    length: list[int]

    def index(self, inner: int | None) -> int | None:
        """The instruction at an offset."""
        index = bisect.bisect_left(self.at, inner) if inner is not None else len(self.at)
        return index if index < len(self.at) and self.at[index] == inner else None

    def place(self, inner: int | None) -> _Place:
        """(2 x run + 1, instruction in it), or (2 x run, instruction in the gap in front of it)."""
        if inner is None:
            return None
        index = self.index(inner)
        if index is None:
            return -1, inner
        run = self._run(index)
        if run >= 0 and index < self.first[run] + self.length[run]:
            return 2 * run + 1, index - self.first[run]
        return 2 * run + 2, index - (self.first[run] + self.length[run] if run >= 0 else 0)

    def loose(self, index: int) -> bool:
        """Whether an instruction corresponds to nothing."""
        run = self._run(index)
        return run < 0 or index >= self.first[run] + self.length[run]

    def _run(self, index: int) -> int:
        """The last run that begins at or in front of an instruction, -1 where there is none."""
        return bisect.bisect_right(self.first, index) - 1


def _anchors(body: Body, edges: list[Run], side: int) -> _Anchors:
    first, length = [edge[side] for edge in edges], [edge[2] for edge in edges]
    return _Anchors([item.at for item in body.instructions], first, length)


def _inconsistent(why: str) -> BadInput:
    return BadInput(
        "the patch object's explanation does not fit its code",
        why=why,
        next_step="make it again: livegraft diff OLD NEW -o PATCH",
    )


# -- text ---------------------------------------------------------------------------------------------------------


def texts(body: Body) -> list[str]:
    """Each instruction in Intel's syntax, its references by name; what does not decode as bytes."""
    decoder = _decoder()
    found = []
    for item in body.instructions:
        raw = body.code[item.at : item.at + item.size]
        text = next(decoder.disasm_lite(raw, body.start + item.at, 1), None)
        if text is None or text[1] != item.size:
            found.append(".byte " + raw.hex(" "))
            continue
        found.append(_named(body, item, text[2], text[3]))
    return found


def immediate_differs(old: Body, new: Body, row: Row) -> bool:
    """Whether two instructions that correspond differ in an immediate: not only in registers or displacements."""
    assert row.old is not None and row.new is not None
    first, second = (_immediates(body, index) for body, index in ((old, row.old), (new, row.new)))
    return first != second


def _immediates(body: Body, index: int) -> list[str]:
    item = body.instructions[index]
    text = next(_decoder().disasm_lite(body.code[item.at : item.at + item.size], 0, 1), None)
    return [] if text is None else re.findall(r"\b(?:0x)?[0-9][0-9a-f]*\b", re.sub(r"\[.*?\]", "", text[3]))


@cache
def _decoder() -> Any:
    import capstone  # noqa: PLC0415  (87 ms, and only a listing needs it)

    return capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)


def _named(body: Body, item: Instruction, mnemonic: str, operands: str) -> str:
    if item.inner is not None:
        return f"{mnemonic} +{item.inner:#x}"
    for reference in item.references:
        operands = _substituted(body, reference, operands)
        if mnemonic == "lea":  # the address itself, not what lies there
            operands = operands.replace(f"[{reference.label}]", reference.label)
    return f"{mnemonic} {operands}".rstrip()


def _substituted(body: Body, reference: Reference, operands: str) -> str:
    """The operands with one reference by its name; behind them where its place in the text is not found."""
    field = body.code[reference.field : reference.field + 8]
    if reference.form in (FieldKind.CALL, FieldKind.JUMP, FieldKind.BRANCH, FieldKind.SHORT):
        return reference.label
    if reference.form == FieldKind.MEMORY:
        pattern = r"rip(?: [+-] (?:0x)?[0-9a-f]+)?"
    else:
        width = 8 if reference.form == FieldKind.ABSOLUTE_IMMEDIATE64 else 4
        value = int.from_bytes(field[:width], "little", signed=width == 4)
        pattern = rf"(?<![0-9a-fx]){re.escape(hex(value))}(?![0-9a-f])" if value > 9 else rf"\b{value}\b"
    found = re.search(pattern, operands)
    if found is None:
        return f"{operands}  ; {reference.label}"
    return operands[: found.start()] + reference.label + operands[found.end() :]
