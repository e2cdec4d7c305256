"""A pause in which nothing is unusual, made by one call of C (``livegraft_pause`` of batch.c).

All that ``pause`` does between the first PTRACE_INTERRUPT and the last PTRACE_DETACH, for a process in which every
thread stops at once, none is live, and nothing has changed: nearly every pause is like that. C decides nothing: at the
first thing that is unusual it returns, with the threads held, and Python does it all once more. Of what was done by
then only the writes matter, which may be made again: they are the same bytes in the same order.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import numpy as np

from ..closing import Closing
from ..process.memory import Memory
from ..process.proc import by_living_thread, open_proc_file
from ..stacks.quiescence import StackCheck
from ..threads import batch
from ..threads.batch import Call, Step
from ..threads.registers_x86_64 import REGISTER_COUNT, WHEN_NOTHING_WAS_DONE, WHEN_ONLY_THE_DESCRIPTOR_TELLS

_PATIENCE_NS = 100_000_000  # longer waits are Python's, which finds out what is in the way

_REPAIRS = {number: Call.REPAIR for number in WHEN_NOTHING_WAS_DONE} | {
    number: Call.ASK for number in WHEN_ONLY_THE_DESCRIPTOR_TELLS
}
_CALLS = (ctypes.c_uint8 * (max(_REPAIRS) + 1))()
for _number, _what in _REPAIRS.items():
    _CALLS[_number] = _what


class QuickPause(Closing):
    """For the writes of one plan; a context manager. Build it before the pause.

    After ``make``: ``began_ns`` and ``ended_ns`` (CLOCK_MONOTONIC), ``wrote`` if it has begun to write and did not
    end, and ``left``, the threads that could not be let go.
    """

    def __init__(
        self,
        memory: Memory,
        check: StackCheck,
        expected: Sequence[tuple[int, bytes]],
        writes: Sequence[tuple[int, bytes]],
    ) -> None:
        """``expected`` and ``writes``: (address, bytes) of what the process must hold, and will.

        Raises BadInput (no such process).
        """
        self.wrote = False
        self.left: tuple[int, ...] = ()
        self._check = check
        self._expected = _Ranges(expected)
        self._writes = _Ranges(writes)
        self._pause = batch.WholePause(
            task=-1, status=-1, statm=-1, memory=memory.fileno(), patience=_PATIENCE_NS,
            calls=ctypes.addressof(_CALLS), call_count=len(_CALLS),
            expected=self._expected.address, expected_count=self._expected.count,
            writes=self._writes.address, write_count=self._writes.count,
        )  # fmt: skip
        try:
            self._pause.task = open_proc_file(memory.pid, "task")
            self._pause.status = by_living_thread(
                memory.pid, lambda tid: open_proc_file(memory.pid, f"task/{tid}/status")
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptors. May be called twice."""
        for name in ("task", "status"):
            descriptor = getattr(self._pause, name)
            setattr(self._pause, name, -1)
            if descriptor >= 0:
                os.close(descriptor)

    @property
    def began_ns(self) -> int:
        """When the last one began, before the first PTRACE_INTERRUPT."""
        return int(self._pause.began)

    @property
    def ended_ns(self) -> int:
        """When it had let go of the last thread, if it did."""
        return int(self._pause.ended)

    def make(self, tids: Sequence[int], last: Sequence[int]) -> Step | None:
        """Make the pause for a process with these seized threads and those to be seized ``last``.

        None where C may not try, and nothing was done.

        DONE: they have been let go, but for those ``left``. Otherwise they are held, as far as they have stopped.
        """
        self.wrote = False
        library = batch.active()
        question = self._check.question()
        if library is None or question is None or not (tids or last):
            return None
        count = len(tids) + len(last)
        # Ones, so that the pages exist.
        numbers, registers = np.array([*tids, *last], dtype=np.int32), np.ones((count, REGISTER_COUNT), dtype=np.uint64)
        statuses, failures = np.ones(count, dtype=np.int32), np.ones(count, dtype=np.int32)
        signals, odd = np.full(count, 0, dtype=np.int32), np.ones(count, dtype=np.uint8)
        pause = self._pause
        pause.stacks = ctypes.addressof(question.stacks)
        pause.code_size, pause.mapped[:], pause.own_stacks = question.code_size, question.mapped, question.own_stacks
        pause.statm = question.statm
        pause.tids, pause.count, pause.last = numbers.ctypes.data, count, len(last)
        pause.registers, pause.odd = registers.ctypes.data, odd.ctypes.data
        pause.statuses, pause.failures, pause.signals = statuses.ctypes.data, failures.ctypes.data, signals.ctypes.data
        step = library.pause(pause)
        self.wrote = step is Step.WRITE
        self.left = tuple(numbers[failures != 0].tolist()) if step is Step.DONE else ()
        return step


class _Ranges:
    """Ranges of bytes in another process, as an array of ``struct range`` of batch.c."""

    def __init__(self, ranges: Sequence[tuple[int, bytes]]) -> None:
        data = b"".join(held for _, held in ranges)
        self._data = ctypes.create_string_buffer(data, len(data) + 1)
        place = ctypes.addressof(self._data)
        self._array = (batch.Range * len(ranges))()
        for item, (address, held) in zip(self._array, ranges, strict=True):
            item.address, item.size, item.bytes = address, len(held), place
            place += len(held)
        self.address, self.count = ctypes.addressof(self._array), len(ranges)
