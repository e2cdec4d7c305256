"""Which threads of a stopped process deserve a closer look: one call of C passes over all the others.

For nearly every thread the answer is that no word of its registers and of its stack matters: none is in forbidden code,
and none leads out of a signal handler. Only what is left is examined in Python (``quiescence``); without the library
that is every thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence

import numpy as np

from elfdiff.errors import LivegraftError

from ..threads import batch
from ..threads.stopped import StoppedThread, StoppedThreads
from .forbidden import ForbiddenRanges
from .frames_x86_64 import RESTORER_SIZE

_BUFFER = 1 << 18
"""Bytes of stacks that are read at a time: what was read is then still in the processor's cache."""
# Where the whole is left to Python, which does without (a kernel before 6.11), or finds out whose fault it is.
_LEFT_TO_PYTHON = frozenset({errno.ENOTTY, errno.EFBIG, errno.EPERM, errno.ESRCH, errno.EINVAL})


class StackSift:
    """For one process and one set of forbidden ranges. Build it before the pause, ``sift`` in the pause."""

    def __init__(
        self, pid: int, ranges: ForbiddenRanges, max_stack: int, max_stacks: int, start_stack: int = 0
    ) -> None:
        """``max_stack``, ``max_stacks``: bytes of one stack, and of all, above which Python must decide.

        ``start_stack``: the stack pointer that the kernel gave to the main thread.
        """
        self._pid = pid
        self._buffer = np.ones(_BUFFER // 8, dtype=np.uint64)  # ones, so that its pages exist
        self._restorers = np.zeros(0, dtype=np.uint64)
        starts, ends, harmless = ranges.arrays
        lows, spans = ranges.clusters
        self._arrays = (starts, ends, harmless, lows, spans)  # kept, since the filter holds addresses only
        filtered = batch.Filter(
            starts.ctypes.data, ends.ctypes.data, harmless.ctypes.data, len(starts),
            lows.ctypes.data, spans.ctypes.data, len(lows), 0, 0, RESTORER_SIZE,
        )  # fmt: skip
        self.stacks = batch.Stacks(
            pid, -1, filtered, max_stack, max_stacks, start_stack, self._buffer.ctypes.data, self._buffer.nbytes
        )
        """What the library is told; ``maps`` has to be set to a descriptor of ``/proc/PID/maps``."""

    def set_restorers(self, addresses: Sequence[int]) -> None:
        """Say where the code is that signal handlers return to."""
        self._restorers = np.array(addresses, dtype=np.uint64)
        self.stacks.filter.restorers = self._restorers.ctypes.data
        self.stacks.filter.restorer_count = len(self._restorers)

    def sift(self, threads: Sequence[StoppedThread]) -> tuple[Sequence[StoppedThread], int]:
        """Return the threads that are to be examined, and the bytes of stacks that were looked at.

        Raises LivegraftError for an answer of the kernel that nothing is known of.
        """
        library = batch.active()
        if library is None or not isinstance(threads, StoppedThreads):
            return threads, 0
        odd = np.empty(len(threads), dtype=np.uint8)
        failure = library.sift(self.stacks, threads.tids, ctypes.addressof(threads.registers), odd.ctypes.data)
        if failure in _LEFT_TO_PYTHON:
            return threads, 0
        if failure:
            raise LivegraftError(
                f"the stacks of process {self._pid} could not be looked at", why=os.strerror(failure)
            )
        if not odd.any():
            return (), self.stacks.scanned
        return tuple(threads[index] for index in odd.nonzero()[0].tolist()), self.stacks.scanned

    def matters(self, words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> bool:
        """Whether any of these words does, by the library, which must be there. For tests."""
        library = batch.active()
        assert library is not None
        return bool(library.scan(ctypes.byref(self.stacks.filter), words.ctypes.data, len(words)))
