"""The threads of a stopped process: their registers as one table, and each thread for who asks for it.

Most are never looked at one by one, and making a value of each would cost a third of the pause.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from .registers_x86_64 import REGISTER_COUNT, Registers
from .tracees import Stop, StopKind


@dataclass(frozen=True, slots=True)
class StoppedThread:
    """One stopped thread. ``registers`` are valid until the process is resumed.

    ``signal`` is the signal that it was about to receive, delivered on detach, or 0. A thread
    ``in_group_stop`` was stopped by SIGSTOP or its like and stays stopped afterwards.
    """

    tid: int
    registers: Registers
    signal: int
    in_group_stop: bool


class StoppedThreads(Sequence[StoppedThread]):
    """The threads of a stopped process, by rising id; valid until it is resumed.

    ``words`` has shape (threads, 27): the general registers of each, in the order of ``Registers``; it and
    ``registers`` are one memory.
    """

    def __init__(
        self, tids: Sequence[int], registers: ctypes.Array[Registers], stops: Mapping[int, Stop]
    ) -> None:
        """``registers`` of each thread, at the start of an array that may be longer; ``stops`` of each."""
        self.tids = tids
        self.registers = registers
        self.words: NDArray[np.uint64] = _words(registers, len(tids))
        self._stops = dict(stops)

    def __len__(self) -> int:
        """Number of threads."""
        return len(self.tids)

    @overload
    def __getitem__(self, index: int) -> StoppedThread: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[StoppedThread, ...]: ...
    def __getitem__(self, index: int | slice) -> StoppedThread | tuple[StoppedThread, ...]:
        """Return one thread, or those of a slice."""
        if isinstance(index, slice):
            return tuple(self[number] for number in range(len(self))[index])
        tid = self.tids[index]
        stop = self._stops[tid]
        signal = stop.signal if stop.kind is StopKind.SIGNAL else 0
        number = range(len(self))[index]  # not the array's own -1: it may be longer
        return StoppedThread(tid, self.registers[number], signal, stop.kind is StopKind.GROUP)


def _words(registers: ctypes.Array[Registers], count: int) -> NDArray[np.uint64]:
    if not count:  # numpy makes no array of an empty buffer
        return np.zeros((0, REGISTER_COUNT), dtype=np.uint64)
    flat = np.frombuffer(memoryview(registers), dtype=np.uint64, count=count * REGISTER_COUNT)
    return flat.reshape(-1, REGISTER_COUNT)
