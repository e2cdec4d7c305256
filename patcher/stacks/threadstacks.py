"""Which memory is the stack of a thread that runs: what lies there is found by unwinding, or is left over.

A thread that was unwound to its very beginning has told all its return addresses; other words between its frames mean
nothing, and below its stack pointer there is nothing but what calls have left that have returned. Both hold only
where nobody else can have a stack: so not in a frame that is large enough to hold one as a local array, and below
the stack pointer only where the thread runs on the stack that it was started with, and not on one of its own making.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..process.memory import Memory
from ..process.proc import Mapping, mapping_over
from .frames_x86_64 import RED_ZONE
from .unwind import Stack, StackEnd

if TYPE_CHECKING:
    from ..threads.stopped import StoppedThread

SMALLEST_STACK = 2048
"""MINSIGSTKSZ, the least that Linux takes for a stack of signal handlers (asm-generic/signal.h): in less than that
nobody parks one."""
_START_FRAME = 64  # bytes that _start may have put below the stack pointer that the kernel gave to it
_DESCRIPTOR_SIZE = 4096  # bytes of the C library's struct pthread that are looked at; it has about 2,300
_WORD = struct.Struct("<Q")
_EXITS = b"\xb8\x3c\x00\x00\x00\x0f\x05"  # mov $60, %eax; syscall: exit(2), which a thread's first frame returns to
_EXIT_WITHIN = 16

Run = tuple[int, int]
"""Start and end of memory."""


def own_memory(
    thread: StoppedThread, stack: Stack, maps: Sequence[Mapping], memory: Memory, *, start_stack: int | None
) -> tuple[Run, ...]:
    """Return memory that holds no return address of anybody but those that unwinding ``thread`` has found.

    ``start_stack`` is where the kernel put the stack of the main thread (``/proc/PID/stat``), None for other threads.
    Nothing where the stack was not unwound to its beginning. Raises LivegraftError where memory cannot be read.
    """
    if stack.end is not StackEnd.OUTERMOST:
        return ()
    pointers = list(_pointers(thread.registers.rsp, stack))
    own = [
        (low - RED_ZONE * (number == 0), high)
        for number, (low, high, signal) in enumerate(pointers)
        if 0 < high - low < SMALLEST_STACK and not signal
    ]
    bounds = _home(thread, stack, pointers[-1][0], maps, memory, start_stack)
    if bounds is not None:
        # It runs there or has come from there: below the lowest of its stack pointers nobody is.
        lowest = min(low for low, _, _ in pointers if bounds[0] <= low < bounds[1])
        own.append((bounds[0], lowest - RED_ZONE))
    return tuple((low, high) for low, high in own if low < high)


def _pointers(rsp: int, stack: Stack) -> Iterator[tuple[int, int, bool]]:
    """(stack pointer, that of the caller, whether it is a signal frame) of every frame."""
    pointer = rsp
    for frame in stack.frames:
        yield pointer, frame.cfa, frame.is_signal_frame
        pointer = frame.cfa


def _home(
    thread: StoppedThread,
    stack: Stack,
    first_pointer: int,
    maps: Sequence[Mapping],
    memory: Memory,
    start_stack: int | None,
) -> Run | None:
    """The stack that the thread was started with, from its lowest byte; None where it is on another one, or unknown.

    ``first_pointer`` is the stack pointer of its outermost frame.
    """
    top = stack.frames[-1].cfa
    if start_stack is not None:
        mapping = mapping_over(maps, first_pointer, 8)
        if mapping is None or mapping.path != "[stack]" or not start_stack - _START_FRAME <= top < mapping.end:
            return None
        return mapping.start, top
    if not _is_last_frame(stack.frames[-1].pc, memory):
        return None
    block = _stack_block(thread.registers.fs_base, maps, memory)
    if block is None or not block[0] <= first_pointer < top <= thread.registers.fs_base:
        return None
    return block[0], top


def _is_last_frame(pc: int, memory: Memory) -> bool:
    """Whether what is at ``pc`` ends the thread: then its frame is that of clone(2), on the stack that it was given."""
    return _EXITS in memory.read(pc, _EXIT_WITHIN)


def _stack_block(pointer: int, maps: Sequence[Mapping], memory: Memory) -> Run | None:
    """The memory that the C library has taken for the stack of the thread whose thread pointer is given.

    glibc's struct pthread, at the thread pointer, has ``stackblock`` and ``stackblock_size`` one after the other
    (nptl/descr.h); where in it differs from release to release. The block holds the struct itself.
    """
    mapping = mapping_over(maps, pointer, 8)
    if mapping is None:
        return None
    data = memory.read(pointer, min(_DESCRIPTOR_SIZE, mapping.end - pointer) & ~7)
    words = [word for (word,) in _WORD.iter_unpack(data)]
    found = [
        (start, start + size)
        for start, size in itertools.pairwise(words)
        if start < pointer < start + size <= mapping.end and pointer - start < size
    ]
    return max(found) if found else None


class OwnMemory:
    """The stacks of several threads, for many addresses at once."""

    def __init__(self, runs: Iterable[Run]) -> None:
        """``runs`` as ``own_memory`` gives them."""
        ordered = sorted(runs)
        self._starts = np.array([start for start, _ in ordered], dtype=np.uint64)
        self._ends = np.array([end for _, end in ordered], dtype=np.uint64)

    def holds(self, addresses: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of the addresses are in it."""
        if not len(self._starts):
            return np.zeros(len(addresses), dtype=np.bool_)
        at = np.searchsorted(self._starts, addresses, side="right") - 1
        return np.asarray((at >= 0) & (addresses < self._ends[np.maximum(at, 0)]), dtype=np.bool_)
