"""Stacks: the frames of a stopped thread, by the call frame information of what is mapped.

A walk is complete only if it ended where the call frame information says that there is no caller (the return
address is undefined: the first function of a process or thread), or at a return address of 0. Everything else
(code without a table, unreadable memory, an expression that fails) ends it incomplete, with the reason, and
nothing may be concluded from the frames that it did not reach.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from elfdiff.errors import BadInput, LivegraftError
from elfdiff.unwinding.cfi import CallFrames, Rule, RuleKind, UnwindRow
from elfdiff.unwinding.cursor import ReadBytes
from elfdiff.unwinding.dwarfexpression import evaluate

from ..threads.registers_x86_64 import USER_CODE_64, Registers
from .frames_x86_64 import CALL_CLOBBERED, RED_ZONE, RETURN_ADDRESS, RSP, dwarf_registers
from .unwindtables import UnwindTable

MAX_FRAMES = 1024
"""Frames after which a walk is given up."""
_MASK = (1 << 64) - 1
_WORD = 8


class StackEnd(Enum):
    """How a walk ended."""

    OUTERMOST = "the return address is undefined"
    ZERO = "the return address is 0"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Frame:
    """One activation. ``cfa`` is the value of rsp in the caller.

    ``after_call``: ``pc`` is a return address, so the instruction being executed is the call before it, and
    where a function ends with a call, ``pc`` is already outside of it. Otherwise ``pc`` is the next
    instruction itself: of the innermost frame, and of one that a signal interrupted.
    """

    pc: int
    cfa: int
    is_signal_frame: bool
    after_call: bool

    @property
    def executing(self) -> int:
        """An address inside the instruction that the frame is executing; for looking up its function."""
        return self.pc - 1 if self.after_call else self.pc


@dataclass(frozen=True, slots=True)
class Stack:
    """The frames of one thread, innermost first; ``why`` says how the walk ended."""

    frames: tuple[Frame, ...]
    end: StackEnd
    why: str

    @property
    def complete(self) -> bool:
        """Whether there is no frame beyond the last."""
        return self.end is not StackEnd.UNKNOWN


class _Incomplete(Exception):
    """The walk cannot go on; never leaves this module."""


class Unwinder:
    """Unwinds threads of one process. Keeps what it has read of its images, so build it before the pause."""

    def __init__(self, tables: Iterable[UnwindTable], read: ReadBytes) -> None:
        """``tables`` must not overlap; ``read`` reaches the ``.eh_frame`` of all of them."""
        self._tables = sorted(tables, key=lambda table: table.low)
        self._lows = [table.low for table in self._tables]
        self._read = read
        self._frames: dict[UnwindTable, CallFrames | str] = {}

    def prepare(self) -> None:
        """Read the search table of every image now rather than when it is first met.

        One that is damaged raises nothing here: a stack that leads through it is incomplete.
        """
        for table in self._tables:
            self._load(table)

    def renewed(self, tables: Iterable[UnwindTable], is_unchanged: Callable[[UnwindTable], bool]) -> Unwinder:
        """An unwinder for other ``tables`` that keeps what was read of those of which ``is_unchanged`` says so."""
        other = Unwinder(tables, self._read)
        other._frames = {t: self._frames[t] for t in other._tables if t in self._frames and is_unchanged(t)}
        return other

    def foresee(self, words: NDArray[np.uint64], limit: int) -> int:
        """Interpret the call frame information of the code that any of ``words`` (shape (n,)) leads into.

        For before the pause: it takes ten times as long as unwinding by it. At most ``limit`` functions; returns how
        many. What is damaged raises nothing here, as in ``prepare``.
        """
        done = 0
        for table in self._tables:
            frames = self._load(table)
            if isinstance(frames, str):
                continue
            inside = words[(words > table.low) & (words <= table.high)].astype(np.int64) - 1  # return addresses
            indices = np.unique(np.searchsorted(frames.table.starts, inside, side="right") - 1).tolist()
            for index in indices[: limit - done]:
                if index >= 0:
                    with contextlib.suppress(BadInput):
                        frames.rows(index)
            done += min(len(indices), limit - done)
        return done

    def function_at(self, address: int) -> int | None:
        """Where the FDE that covers ``address`` begins; None where there is none."""
        index = bisect_right(self._lows, address) - 1
        if index < 0 or address >= self._tables[index].high:
            return None
        frames = self._load(self._tables[index])
        if isinstance(frames, str):
            return None
        found = frames.table.find(address)
        return int(frames.table.starts[found]) if found >= 0 else None

    def unwind(self, registers: Registers, read: ReadBytes, *, max_frames: int = MAX_FRAMES) -> Stack:
        """The frames of a thread that is stopped with ``registers``; ``read`` reads its stack.

        Raises nothing about the target: what cannot be unwound is an incomplete ``Stack``.
        """
        if registers.cs != USER_CODE_64:
            return Stack((), StackEnd.UNKNOWN, f"the thread is not in 64-bit mode (cs {registers.cs:#x})")
        frames: list[Frame] = []
        try:
            end = self._walk(dwarf_registers(registers), read, frames, max_frames)
        except _Incomplete as error:
            return Stack(tuple(frames), StackEnd.UNKNOWN, str(error))
        except (LivegraftError, OSError) as error:
            why = getattr(error, "why", "")
            return Stack(tuple(frames), StackEnd.UNKNOWN, f"{error}: {why}" if why else str(error))
        return Stack(tuple(frames), end, end.value)

    def _walk(
        self, registers: dict[int, int], read: ReadBytes, frames: list[Frame], max_frames: int
    ) -> StackEnd:
        after_call = False
        while len(frames) < max_frames:
            pc = registers[RETURN_ADDRESS]
            row = self._row(pc - 1 if after_call else pc)
            cfa = _cfa(row, registers, read)
            frame = Frame(pc, cfa, row.is_signal_frame, after_call)
            _require_progress(frames, frame)
            frames.append(frame)
            rule = row.rules.get(row.return_address_register)
            if rule is None:
                raise _Incomplete(f"no rule for the return address at {pc:#x}")
            if rule.kind is RuleKind.UNDEFINED:
                return StackEnd.OUTERMOST
            registers = _caller(row, cfa, registers, read)
            if registers[RETURN_ADDRESS] == 0:
                if row.is_signal_frame:  # the program has jumped there; who called it is not known
                    raise _Incomplete("a signal interrupted it at address 0")
                return StackEnd.ZERO
            after_call = not row.is_signal_frame
        raise _Incomplete(f"more than {max_frames} frames")

    def _row(self, address: int) -> UnwindRow:
        index = bisect_right(self._lows, address) - 1
        if index < 0 or address >= self._tables[index].high:
            raise _Incomplete(f"{address:#x} is in no image with unwind information")
        table = self._tables[index]
        frames = self._load(table)
        if isinstance(frames, str):
            raise _Incomplete(f"{table.name}: {frames}")
        row = frames.row(address)
        if row is None:
            raise _Incomplete(f"no unwind information for {address:#x} in {table.name}")
        if row.return_address_register != RETURN_ADDRESS:
            raise _Incomplete(f"return address in register {row.return_address_register} at {address:#x}")
        return row

    def _load(self, table: UnwindTable) -> CallFrames | str:
        """The frames of an image, or why there are none."""
        frames = self._frames.get(table)
        if frames is None:
            try:
                frames = CallFrames(table.read_fdes(self._read), self._read)
            except BadInput as error:
                frames = f"{error}: {error.why}"
            self._frames[table] = frames
        return frames


def _cfa(row: UnwindRow, registers: dict[int, int], read: ReadBytes) -> int:
    if row.cfa.expression:
        return evaluate(row.cfa.expression, registers, read)
    return (_value(registers, row.cfa.register) + row.cfa.offset) & _MASK


def _caller(row: UnwindRow, cfa: int, registers: dict[int, int], read: ReadBytes) -> dict[int, int]:
    """The registers as the caller will find them; those that are lost are missing (DWARF 5, 6.4.4)."""
    if row.is_signal_frame:
        caller = dict(registers)
    else:
        caller = {n: value for n, value in registers.items() if n not in CALL_CLOBBERED}
    caller[RSP] = cfa  # its definition (psABI x86-64 1.0, 3.7), unless a rule says otherwise
    for number, rule in row.rules.items():
        if number > RETURN_ADDRESS:
            continue  # vector registers: nothing is found by them
        if rule.kind is RuleKind.UNDEFINED:
            caller.pop(number, None)
        else:
            caller[number] = _rule_value(row, rule, cfa, registers, read, number)
    return caller


def _rule_value(row: UnwindRow, rule: Rule, cfa: int, registers: dict[int, int], read: ReadBytes, number: int) -> int:
    kind = rule.kind
    if kind is RuleKind.OFFSET:
        return _saved(row, (cfa + rule.value) & _MASK, cfa, registers, read)
    if kind is RuleKind.SAME_VALUE:
        return _value(registers, number)
    if kind is RuleKind.REGISTER:
        return _value(registers, rule.value)
    if kind is RuleKind.VAL_OFFSET:
        return (cfa + rule.value) & _MASK
    value = evaluate(rule.expression, registers, read, (cfa,))
    return value if kind is RuleKind.VAL_EXPRESSION else _saved(row, value, cfa, registers, read)


def _saved(row: UnwindRow, place: int, cfa: int, registers: dict[int, int], read: ReadBytes) -> int:
    """The word that a function has saved at ``place``, which must be in its own frame.

    Functions of gcc with a realigned stack say until they return that rbp is saved where rbp points. Behind the
    ``pop %rbp`` of their epilogue that is the caller's frame, and who believes it does not see the caller's caller.
    """
    if not row.is_signal_frame and not _value(registers, RSP) - RED_ZONE <= place <= cfa - _WORD:
        raise _Incomplete(f"a register is said to be saved outside of the frame at {registers[RETURN_ADDRESS]:#x}")
    return _word(place, read)


def _value(registers: dict[int, int], number: int) -> int:
    value = registers.get(number)
    if value is None:
        raise _Incomplete(f"the value of register {number} is not known at {registers[RETURN_ADDRESS]:#x}")
    return value


def _word(address: int, read: ReadBytes) -> int:
    return int.from_bytes(read(address, _WORD), "little")


def _require_progress(frames: list[Frame], frame: Frame) -> None:
    # A signal may have switched stacks, so only frames between which there was a call are comparable.
    if frames and frame.after_call and not frame.is_signal_frame and frame.cfa <= frames[-1].cfa:
        raise _Incomplete(f"the stack does not go up at {frame.pc:#x}: {frame.cfa:#x}")
