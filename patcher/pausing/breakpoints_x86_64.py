"""Breakpoints that stop nobody: the kernel tells this process that a thread has executed an address.

A debug register of the thread, asked for through perf_event_open(2) (PERF_TYPE_BREAKPOINT). The thread takes one #DB
of about a microsecond each time and goes on by itself; it is not traced and gets no signal. The register belongs to the
descriptor, so that it is free again however this process ends. An int3 would kill the target when we die, and so would
a debug register that was set by PTRACE_POKEUSER: it outlives its tracer, and then raises SIGTRAP.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from types import TracebackType

from .. import seam

MAX_BREAKPOINTS = 4
"""Debug registers of one thread (AMD64 Architecture Programmer's Manual, volume 2, section 13.1)."""

# perf_event_open(2); numbers and layout from linux/perf_event.h, size PERF_ATTR_SIZE_VER5.
_SYS_PERF_EVENT_OPEN = 298
_FLAG_CLOEXEC = 8
_TYPE_BREAKPOINT = 5
_BREAKPOINT_EXECUTE = 4  # HW_BREAKPOINT_X; its length must be that of a long
_SAMPLE_REGS_USER = 1 << 12
_EXCLUDE_KERNEL_AND_HYPERVISOR = 1 << 5 | 1 << 6
_REGISTER_SP = 1 << 7  # PERF_REG_X86_SP
_ATTRIBUTES = struct.Struct("<IIQQQQQIIQQQQIiQIHH")
_RECORD_SAMPLE = 9
_RECORD_HEADER = struct.Struct("<IHH")
_ABI_64 = 2
_HEAD, _TAIL = 1024, 1032  # of struct perf_event_mmap_page
_RING_PAGES = 1

_libc = ctypes.CDLL(None, use_errno=True)


class Breakpoint:
    """One address that one thread is watched at; a context manager. ``fileno`` is readable when it was executed."""

    def __init__(self, tid: int, address: int) -> None:
        """Raises OSError: EACCES, EPERM (perf_event_paranoid, seccomp), ENOSPC (no debug register is free), ESRCH
        (no such thread), ENOENT, EOPNOTSUPP, ENOSYS (no such events here), EMFILE.
        """
        self.tid = tid
        self._descriptor = _open(tid, address)
        try:
            self._ring = mmap.mmap(self._descriptor, (1 + _RING_PAGES) * mmap.PAGESIZE)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Breakpoint:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the breakpoint away."""
        self._ring.close()
        os.close(self._descriptor)

    def fileno(self) -> int:
        """The descriptor, for poll(2): POLLIN after an event, POLLHUP once the thread has exited."""
        return self._descriptor

    def hits(self) -> list[int]:
        """The stack pointers with which the address was executed since the last call, oldest first.

        Where events came faster than they were taken, the kernel dropped the last of them.
        """
        page = mmap.PAGESIZE
        head, tail = (int.from_bytes(self._ring[at : at + 8], "little") for at in (_HEAD, _TAIL))
        size = _RING_PAGES * page
        ring = self._ring[page:]
        data = (ring + ring)[tail % size : tail % size + (head - tail)]
        found, at = [], 0
        while at < len(data):
            kind, _, length = _RECORD_HEADER.unpack_from(data, at)
            if kind == _RECORD_SAMPLE:
                abi, pointer = struct.unpack_from("<QQ", data, at + _RECORD_HEADER.size)
                found += [pointer] if abi == _ABI_64 else []
            at += length
        # The kernel may reuse what is before the tail; x86-64 keeps the order of these stores (perf_event_open(2)).
        self._ring[_TAIL : _TAIL + 8] = head.to_bytes(8, "little")
        return found


def _open(tid: int, address: int) -> int:
    failure = seam.announce("BREAKPOINT", tid)
    if failure:
        raise OSError(failure, os.strerror(failure))
    attributes = _ATTRIBUTES.pack(
        _TYPE_BREAKPOINT, _ATTRIBUTES.size, 0, 1, _SAMPLE_REGS_USER, 0, _EXCLUDE_KERNEL_AND_HYPERVISOR,
        1, _BREAKPOINT_EXECUTE, address, ctypes.sizeof(ctypes.c_long), 0, _REGISTER_SP, 0, 0, 0, 0, 0, 0,
    )  # fmt: skip
    any_cpu, no_group = -1, -1
    descriptor = _libc.syscall(
        ctypes.c_long(_SYS_PERF_EVENT_OPEN), attributes, ctypes.c_long(tid), ctypes.c_long(any_cpu),
        ctypes.c_long(no_group), ctypes.c_ulong(_FLAG_CLOEXEC),
    )  # fmt: skip
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(descriptor)
