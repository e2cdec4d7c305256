"""What the kernel lets us do, tried on a process of our own: the honest answer where settings only hint at it."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from elfdiff.errors import LivegraftError

from ..process.memory import Memory
from ..process.proc import mappings
from ..threads import ptrace, tracees
from ..threads.ptrace import Option, PtraceFailed

_SECONDS = 10.0
_PROCMAP_QUERY = 0xC0686611  # _IOWR('f', 17, struct procmap_query) of 104 bytes, linux/fs.h (v6.11)
_PROCMAP_QUERY_SIZE = 104


@dataclass(frozen=True, slots=True)
class Probes:
    """What was tried; each is 0 where it worked, or the errno.

    ``trace``: PTRACE_SEIZE and a stop. ``write``: to program text of a tracee through ``/proc/PID/mem``; ``poke``: by
    PTRACE_POKETEXT. ``read_many``: process_vm_readv(2). ``sequences``: PTRACE_GET_RSEQ_CONFIGURATION. ``suspend``:
    PTRACE_O_SUSPEND_SECCOMP. ``realtime``: SCHED_FIFO. ``query``: PROCMAP_QUERY.
    """

    trace: int
    write: int
    poke: int
    read_many: int
    sequences: int
    suspend: int
    realtime: int
    query: int


def probe() -> Probes:
    """Try it all on a child of ours."""
    with _child() as pid:
        read_many = _try_read_many(pid)
        realtime = _try_realtime(pid)
        trace = _errno_of(lambda: ptrace.seize(pid)) or _stop(pid)
        if trace:
            return Probes(trace, trace, trace, read_many, trace, trace, realtime, _try_query())
        try:
            write = _try_write(pid)
            address = _text(pid)
            with Memory(pid) as memory:
                word = int.from_bytes(memory.read(address, 8), "little")
            poke = _errno_of(lambda: ptrace.poke_word(pid, address, word))
            sequences = _errno_of(lambda: _ask_sequences(pid))
            suspend = _errno_of(lambda: ptrace.set_options(pid, Option.SUSPEND_SECCOMP))
        finally:
            tracees.detach(pid, tracees.INTERRUPTED)
        return Probes(0, write, poke, read_many, sequences, suspend, realtime, _try_query())


@contextmanager
def _child() -> Iterator[int]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        # Nothing but system calls: other threads may have held locks. It ends with us, by the end of the pipe.
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    try:
        yield pid
    finally:
        os.close(writing)
        os.waitpid(pid, 0)


def _errno_of(request: Callable[[], None]) -> int:
    try:
        request()
    except PtraceFailed as error:
        return error.errno
    return 0


def _ask_sequences(pid: int) -> None:
    ptrace.rseq_configuration(pid)


def _stop(pid: int) -> int:
    ptrace.interrupt(pid)
    stop = tracees.wait_for([pid], time.monotonic() + _SECONDS).get(pid)
    if stop is None:
        tracees.abandon(pid)
        return errno.ETIMEDOUT
    return errno.ESRCH if stop is tracees.GONE else 0


def _text(pid: int) -> int:
    """The address of an aligned word of program text that cannot be written by the program itself."""
    return next(item.start for item in mappings(pid) if item.executable and not item.writable and item.inode)


def _try_write(pid: int) -> int:
    # The bytes that are there already, so that nothing changes but that the page becomes the child's own.
    try:
        descriptor = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            address = _text(pid)
            os.pwrite(descriptor, os.pread(descriptor, 8, address), address)
        finally:
            os.close(descriptor)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _try_read_many(pid: int) -> int:
    try:
        with Memory(pid) as memory:
            memory.read_many([(_text(pid), 8)])
    except LivegraftError:
        return errno.EPERM  # whatever it was, the error of a real try will say
    return 0


def _try_realtime(pid: int) -> int:
    try:
        os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1))
    except OSError as error:
        return error.errno or errno.EPERM
    return 0


def _try_query() -> int:
    query = bytearray(_PROCMAP_QUERY_SIZE)
    query[0] = _PROCMAP_QUERY_SIZE
    query[8] = 0x10  # PROCMAP_QUERY_COVERING_OR_NEXT_VMA, from address 0
    with open("/proc/self/maps", "rb", buffering=0) as file:
        try:
            fcntl.ioctl(file.fileno(), _PROCMAP_QUERY, query)
        except OSError as error:
            return error.errno or errno.ENOTTY
    return 0
