"""How far a stack reaches: to the end of the mapping that it is in, and of those that continue it."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from bisect import bisect_right
from types import TracebackType

from elfdiff.errors import LivegraftError

from .proc import Mapping, mappings, no_such_process

# ioctl PROCMAP_QUERY on /proc/PID/maps (include/uapi/linux/fs.h; kernel commit ed5d583a88a9, v6.11): one mapping
# for a few microseconds, where reading the file costs as much for every mapping that there is.
_QUERY_SIZE = 104
_PROCMAP_QUERY = 3 << 30 | _QUERY_SIZE << 16 | ord("f") << 8 | 17
_QUESTION = struct.Struct("<QQQ")  # size, query_flags (0: the mapping that holds the address), query_addr
_ANSWER = struct.Struct("<QQQ")  # vma_start, vma_end, vma_flags
_READABLE, _WRITABLE = 1, 2


class StackMemory:
    """Finds the ends of stacks in one process; a context manager. Meant for the pause: it looks each time."""

    def __init__(self, pid: int, *, may_query: bool = True) -> None:
        """``may_query`` false does as on kernels before 6.11. Raises ``BadInput`` for no such process."""
        self._pid = pid
        self._may_query = may_query
        self._mappings: tuple[Mapping, ...] | None = None
        try:
            self._descriptor = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise no_such_process(pid) from error

    def __enter__(self) -> StackMemory:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the descriptor."""
        self.close()

    def close(self) -> None:
        """Close the descriptor. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def forget(self) -> None:
        """Call it at the start of each pause: what was read of an earlier one is void."""
        self._mappings = None

    def end(self, address: int, limit: int) -> int | None:
        """One past the last byte that the stack at ``address`` may have; None where nothing is mapped there.

        A stack goes on into the next mapping where that is adjacent, readable and writable: mlock(2),
        madvise(2) or mprotect(2) on a part of a stack splits its mapping. Looking stops at ``limit``.
        """
        found = self._mapping(address)
        if found is None or not found[1] & _READABLE:
            return None
        end, _ = found
        while end < limit:
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
