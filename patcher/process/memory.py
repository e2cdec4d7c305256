"""Reading and writing the memory of another process.

Single ranges go through ``/proc/PID/mem`` (proc(5)): the descriptor names the address space, not the pid, so
that after an exit or an execve it reads and writes nothing instead of somebody else's memory. Many ranges at
once go through process_vm_readv(2).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable, Iterator, Sequence

from elfdiff.errors import LivegraftError, NotPermitted

from .. import seam
from ..closing import Closing
from .proc import by_living_thread, executed_another_program, has_exited, living_thread, no_such_process

Poke = Callable[[int, int], None]
"""Write one 8-byte word (unsigned, little-endian) at an aligned address: PTRACE_POKETEXT, ptrace(2)."""

_WORD = 8
_IOV_MAX = 1024  # UIO_MAXIOV, include/uapi/linux/uio.h
_BATCH_BYTES = 1 << 30  # below MAX_RW_COUNT, above which the kernel reads less than asked for
_ADDRESS_LIMIT = 1 << 63  # file offsets are signed


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@functools.cache
def _process_vm_readv() -> Callable[..., int]:
    function = ctypes.CDLL(None, use_errno=True).process_vm_readv
    iovecs = ctypes.POINTER(_Iovec)
    function.argtypes = [ctypes.c_int, iovecs, ctypes.c_ulong, iovecs, ctypes.c_ulong, ctypes.c_ulong]
    function.restype = ctypes.c_ssize_t
    return function


class Memory(Closing):
    """The memory of one process, open for reading and writing; a context manager.

    ``poke`` is used for writes into mappings that are not writable where the kernel keeps ``/proc/PID/mem``
    from writing there (``proc_mem.force_override``, kernel commit 41e8149c8892, v6.12); it may be set while a
    thread of the process is stopped under this tracer and must be None otherwise.
    """

    def __init__(self, pid: int, poke: Poke | None = None) -> None:
        """Open ``/proc/PID/mem``. Raises BadInput (no such process), NotPermitted."""
        self.pid = pid
        self.poke = poke
        self._descriptor = by_living_thread(pid, lambda tid: _open_mem(pid, tid))

    def close(self) -> None:
        """Close the descriptor; further reads and writes raise ValueError. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def fileno(self) -> int:
        """Return the descriptor of ``/proc/PID/mem``; it belongs to this object."""
        self._require_open()
        return self._descriptor

    @property
    def ended(self) -> bool:
        """Whether this address space has certainly ended: the process has exited or executed another program.

        From then on it reads as nothing at every address (mem_rw, fs/proc/base.c, where mmget_not_zero fails); before,
        what is not mapped is an error. It outlives an execve while another process has it as well (vfork(2)).
        """
        self._require_open()
        try:
            return not self._pread(1, 0)
        except OSError:
            return False

    def require_same_program(self) -> None:
        """Raise LivegraftError where the process has executed another program, BadInput where it has exited."""
        if self.ended:
            raise no_such_process(self.pid) if has_exited(self.pid) else executed_another_program(self.pid)

    def read(self, address: int, size: int) -> bytes:
        """Return exactly ``size`` bytes from ``address``.

        Raises LivegraftError where any of them is not mapped, or the process is gone.
        """
        parts = []
        done = 0
        while done < size:
            part = self._read_some(address + done, size - done)
            parts.append(part)
            done += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_some(self, address: int, size: int) -> bytes:
        self._require_open()
        _require_address(address, size)
        try:
            part = self._pread(size, address)
        except OSError as error:
            raise _unreadable(self.pid, address, size, error.strerror or str(error)) from error
        if not part:
            raise _unreadable(self.pid, address, size, "the process has exited or executed another program")
        return part

    def _pread(self, size: int, address: int) -> bytes:
        failure = seam.announce("READ", self.pid)
        if failure:
            raise OSError(failure, os.strerror(failure))
        return os.pread(self._descriptor, size, address)

    def write(self, address: int, data: bytes) -> None:
        """Write ``data`` at ``address``, protections notwithstanding (ptrace's right, FOLL_FORCE).

        One call for all bytes, so that inside one page a death of this process leaves none or all of them.
        Raises LivegraftError where not every byte could be written; some may have been.
        """
        if not data:
            return
        self._require_open()
        _require_address(address, len(data))
        try:
            written = self._pwrite(address, data)
        except OSError as error:
            if error.errno != errno.EIO or self.poke is None:
                raise _unwritable(self.pid, address, len(data), error.strerror or str(error)) from error
            self._poke_words(address, data, self.poke)
            return
        if written != len(data):
            raise _unwritable(self.pid, address, len(data), f"only {written} bytes were written")

    def _pwrite(self, address: int, data: bytes) -> int:
        failure = seam.announce("WRITE", self.pid)
        if failure:
            raise OSError(failure, os.strerror(failure))
        return os.pwrite(self._descriptor, data, address)

    def _poke_words(self, address: int, data: bytes, poke: Poke) -> None:
        # Aligned words never reach over a page boundary into memory that may not exist.
        low = address - address % _WORD
        high = -(-(address + len(data)) // _WORD) * _WORD
        whole = bytearray(self.read(low, high - low))
        before = bytes(whole)
        whole[address - low : address - low + len(data)] = data
        for offset in range(0, high - low, _WORD):
            word = bytes(whole[offset : offset + _WORD])
            if word != before[offset : offset + _WORD]:
                poke(low + offset, int.from_bytes(word, "little"))

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of every (address, size), in order, by as few system calls as possible.

        Not atomic unless the process is stopped. Raises LivegraftError naming the first range that cannot be
        read whole; NotPermitted.
        """
        return [data for batch in _batches(ranges) for data in self._read_batch(batch)]

    def _read_batch(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self._require_open()
        total = sum(size for _, size in ranges)
        buffer = ctypes.create_string_buffer(max(total, 1))
        local = _Iovec(ctypes.addressof(buffer), total)
        remote = (_Iovec * len(ranges))(*(_Iovec(*item) for item in ranges))
        failure = seam.announce("READV", self.pid)
        if failure:
            raise self._batch_error(ranges, -1, failure)
        got = _process_vm_readv()(self.pid, ctypes.byref(local), 1, remote, len(ranges), 0)
        number = ctypes.get_errno()
        if got < 0 and number == errno.ESRCH:
            living_thread(self.pid)  # raises where all have ended
            # The main thread has. The others' memory is the same, and the descriptor still leads there.
            return [self.read(address, size) for address, size in ranges]
        if got != total:
            raise self._batch_error(ranges, got, number)
        view = memoryview(buffer)
        out = []
        position = 0
        for _, size in ranges:
            out.append(bytes(view[position : position + size]))
            position += size
        return out

    def _batch_error(self, ranges: Sequence[tuple[int, int]], got: int, number: int) -> LivegraftError:
        if got < 0 and number == errno.EPERM:
            return _not_permitted(self.pid, os.strerror(number))
        if got < 0 and number == errno.ESRCH:
            return no_such_process(self.pid)
        position = 0
        for address, size in ranges:
            position += size
            if position > max(got, 0):
                return _unreadable(self.pid, address, size, os.strerror(number) if got < 0 else "not mapped")
        raise AssertionError("a short read without a short range")

    def _require_open(self) -> None:
        if self._descriptor < 0:
            raise ValueError("this Memory is closed")


class Comparison:
    """Bytes that a process is expected to hold, prepared to be compared by one system call in the pause."""

    def __init__(self, memory: Memory, expected: Sequence[tuple[int, bytes]]) -> None:
        """(address, bytes) of each range."""
        self._pid = memory.pid
        self._expected = b"".join(data for _, data in expected)
        self._held = bytearray(len(self._expected))
        self._count = len(expected)
        self._remote = (_Iovec * len(expected))(*(_Iovec(address, len(data)) for address, data in expected))
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._held)) if self._held else 0
        self._local = _Iovec(address, len(self._held))
        self._read = _process_vm_readv()

    def holds(self) -> bool:
        """Whether the process holds all of these bytes; false also where one call cannot tell.

        So false is no answer, and the ranges have to be read one by one. Not atomic unless the process is
        stopped.
        """
        if seam.observed():  # a read that can be made to fail is made by ``Memory``
            return False
        got = self._read(self._pid, ctypes.byref(self._local), 1, self._remote, self._count, 0)
        return got == len(self._expected) and self._held == self._expected


def _open_mem(pid: int, tid: int) -> int:
    try:
        return os.open(f"/proc/{pid}/task/{tid}/mem", os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise no_such_process(pid) from error
    except PermissionError as error:
        raise _not_permitted(pid, error.strerror or str(error)) from error


def _batches(ranges: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    batch: list[tuple[int, int]] = []
    total = 0
    for address, size in ranges:
        if batch and (len(batch) == _IOV_MAX or total + size > _BATCH_BYTES):
            yield batch
            batch, total = [], 0
        batch.append((address, size))
        total += size
    if batch:
        yield batch


def _require_address(address: int, size: int) -> None:
    if address < 0 or size < 0 or address + size > _ADDRESS_LIMIT:
        raise LivegraftError(
            f"{size} bytes at {address:#x} are not in any process", why="the address is outside of user space"
        )


def _unreadable(pid: int, address: int, size: int, why: str) -> LivegraftError:
    return LivegraftError(f"{size} bytes at {address:#x} of process {pid} could not be read", why=why)


def _unwritable(pid: int, address: int, size: int, why: str) -> LivegraftError:
    return LivegraftError(f"{size} bytes at {address:#x} of process {pid} could not be written", why=why)


def _not_permitted(pid: int, why: str) -> NotPermitted:
    return NotPermitted(
        f"the memory of process {pid} may not be opened",
        why=f"the kernel answered: {why}; this is user {os.geteuid()}",
        next_step="run as root, or as the owner of the process where kernel.yama.ptrace_scope allows it",
    )
