"""Reads whole stacks of stopped threads, in the pause: few system calls, no fresh memory.

A stack reaches to the end of the mapping that it is in, and of those that continue it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from elfdiff.errors import LivegraftError, NotPermitted

from .. import seam
from ..closing import Closing
from ..process.proc import Mapping, by_living_thread, living_thread, mappings, open_proc_file

# ioctl PROCMAP_QUERY on /proc/PID/maps (include/uapi/linux/fs.h; kernel commit ed5d583a88a9, v6.11): one mapping
# for a few microseconds, where reading the file costs as much for every mapping that there is.
_QUERY_SIZE = 104
_PROCMAP_QUERY = 3 << 30 | _QUERY_SIZE << 16 | ord("f") << 8 | 17
_QUESTION = struct.Struct("<QQQ")  # size, query_flags (0: the mapping that holds the address), query_addr
_ANSWER = struct.Struct("<QQQ")  # vma_start, vma_end, vma_flags
_READABLE, _WRITABLE = 1, 2

_IOV_MAX = 1024  # UIO_MAXIOV, include/uapi/linux/uio.h
_FIRST_BUFFER = 1 << 20


@functools.cache
def process_vm_readv() -> Callable[..., int]:
    """The call of the C library, for arguments that are addresses and numbers (process_vm_readv(2))."""
    function = ctypes.CDLL(None, use_errno=True).process_vm_readv
    pointer, number = ctypes.c_void_p, ctypes.c_ulong
    function.argtypes = [ctypes.c_int, pointer, number, pointer, number, number]
    function.restype = ctypes.c_ssize_t
    return function


@dataclass(frozen=True, slots=True)
class StackWords:
    """Several runs of stack memory, one after the other; ``words`` has shape (sum of sizes / 8,)."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]  # index behind the last word of each run
    words: NDArray[np.uint64]

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the run, address) of a word."""
        number = bisect_right(self.ends, index)
        return number, self.starts[number] + 8 * (index - (self.ends[number - 1] if number else 0))

    def read(self, number: int, address: int, size: int) -> bytes | None:
        """Bytes of one run, or None where they are not in it."""
        first = self.ends[number - 1] if number else 0
        offset = address - self.starts[number]
        if not 0 <= offset <= 8 * (self.ends[number] - first) - size:
            return None
        view = self.words[first : self.ends[number]].view(np.uint8)
        return view[offset : offset + size].tobytes()


class StackMemory(Closing):
    """The stacks of one process; a context manager.

    Meant for the pause: the buffer is kept, since memory that was never touched costs a page fault for each
    page. What ``read`` returns is valid until ``forget``.
    """

    def __init__(self, pid: int, *, may_query: bool = True) -> None:
        """``may_query`` false does as on kernels before 6.11. Raises ``BadInput`` for no such process."""
        self._pid = pid
        self._may_query = may_query
        self._buffer = np.ones(_FIRST_BUFFER // 8, dtype=np.uint64)  # ones, so that its pages exist
        self._used = 0
        self._mappings: tuple[Mapping, ...] | None = None
        self._tid = pid
        self._descriptor = by_living_thread(pid, lambda tid: open_proc_file(pid, f"task/{tid}/maps"))

    def close(self) -> None:
        """Close the descriptor. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def fileno(self) -> int:
        """Return the descriptor of ``/proc/PID/maps``; it belongs to this object."""
        return self._descriptor

    def forget(self) -> None:
        """Call it at the start of each pause: all that was read in an earlier one is void."""
        self._mappings = None
        self._used = 0
        self._tid = self._pid

    def read(self, runs: Sequence[tuple[int, int]]) -> StackWords:
        """The memory of every (address, size), both multiples of 8.

        Raises ``LivegraftError`` where not all of it can be read, ``NotPermitted``.
        """
        sizes = [size // 8 for _, size in runs]
        words = self._room(sum(sizes))
        remote = np.array(runs, dtype=np.uint64).reshape(-1, 2)
        position = 0
        for first in range(0, len(runs), _IOV_MAX):
            batch = remote[first : first + _IOV_MAX]
            count = sum(sizes[first : first + _IOV_MAX])
            self._read_batch(batch, words[position : position + count])
            position += count
        self._used += position
        return StackWords(tuple(start for start, _ in runs), tuple(accumulate(sizes)), words)

    def _room(self, count: int) -> NDArray[np.uint64]:
        if self._used + count > len(self._buffer):
            # Earlier answers of this pause stay in the old buffer.
            self._buffer = np.empty(2 * count, dtype=np.uint64)
            self._used = 0
        return self._buffer[self._used : self._used + count]

    def _read_batch(self, remote: NDArray[np.uint64], words: NDArray[np.uint64]) -> None:
        local = np.array([words.ctypes.data, words.nbytes], dtype=np.uint64)
        number = seam.announce("READV", self._pid)
        if not number:
            got = process_vm_readv()(self._tid, local.ctypes.data, 1, remote.ctypes.data, len(remote), 0)
            if got == words.nbytes:
                return
            number = ctypes.get_errno() if got < 0 else errno.EFAULT
            if got < 0 and number == errno.ESRCH and self._tid == self._pid:
                # The main thread has ended. Another is as good, and lives on: it is stopped.
                self._tid = living_thread(self._pid)
                self._read_batch(remote, words)
                return
        kind = NotPermitted if number == errno.EPERM else LivegraftError
        raise kind(f"stacks of process {self._pid} could not be read", why=os.strerror(number))

    def end(self, pointer: int, thread_pointer: int, limit: int) -> int | None:
        """One past the last byte that the stack at ``pointer`` may have; None where nothing is mapped there.

        A stack goes on into the next mapping where that is adjacent, readable and writable: mlock(2),
        madvise(2) or mprotect(2) on a part of a stack splits its mapping. Not so where the mapping holds
        the ``thread_pointer`` (fs_base), too: C libraries keep the thread's control block at the very top of
        its stack. Looking stops at ``limit``.
        """
        found = self._mapping(pointer)
        if found is None or not found[1] & _READABLE:
            return None
        end, _ = found
        while end < limit and not pointer < thread_pointer < end:
            found = self._mapping(end)
            if found is None or ~found[1] & (_READABLE | _WRITABLE):
                break
            end = found[0]
        return end

    def _mapping(self, address: int) -> tuple[int, int] | None:
        """(end, flags) of the mapping that holds an address."""
        if self._may_query:
            buffer = bytearray(_QUERY_SIZE)
            _QUESTION.pack_into(buffer, 0, _QUERY_SIZE, 0, address)
            try:
                fcntl.ioctl(self._descriptor, _PROCMAP_QUERY, buffer, True)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return None
                if error.errno != errno.ENOTTY:
                    raise LivegraftError(
                        f"a mapping of process {self._pid} could not be looked up", why=str(error)
                    ) from error
                self._may_query = False  # an older kernel
            else:
                _, end, flags = _ANSWER.unpack_from(buffer, _QUESTION.size)
                return end, flags
        return self._mapping_in_list(address)

    def _mapping_in_list(self, address: int) -> tuple[int, int] | None:
        if self._mappings is None:
            self._mappings = mappings(self._pid)
        index = bisect_right(self._mappings, address, key=lambda mapping: mapping.start) - 1
        if index < 0 or address not in self._mappings[index]:
            return None
        mapping = self._mappings[index]
        return mapping.end, _READABLE * mapping.readable | _WRITABLE * mapping.writable
