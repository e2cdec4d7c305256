"""System calls made by a thread of the target, so that the target survives our death at any instant.

    with Memory(pid) as memory, RemoteCaller(pid, memory) as caller:
        address = caller.mmap(near, 1 << 20, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS)

The stub (``trampolines.stub_x86_64``) is written with its context before the thread is pointed at it; from
then on the thread finds its own way back. While this process lives, the thread is put back by hand instead,
with the very registers that it was stopped with, so that the kernel itself settles what becomes of the
interrupted call: a restart, or EINTR where a signal handler runs (``registers_x86_64``).

A signal is never delivered while the thread's registers are ours. A thread that is about to receive one is
given back its registers and let go with the signal, and another thread, or the same one again, makes the
call.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import ExitStack
from types import TracebackType

from elfdiff.errors import LivegraftError
from trampolines.stub_x86_64 import NAME_OFFSET, STUB_SIZE, stub

from ..process.memory import Memory
from ..process.modules import modules
from ..process.proc import mappings, thread_ids
from ..threads.exclusive import exclusive
from ..threads.ptrace import PtraceFailed
from ..threads.quiet import Undisturbed
from ..threads.tracees import INTERRUPTED, release_abandoned, require_traceable
from .borrowed import Borrowed, Candidates, borrow, borrow_thread, by_preference, no_thread_is_fit
from .caves import OldStub, find_caves, free_slot, no_room, old_stubs

MMAP, MPROTECT, MUNMAP, CLOSE, MEMFD_CREATE = 9, 10, 11, 3, 319  # syscall_64.tbl

PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4  # asm-generic/mman-common.h
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
MAP_NORESERVE, MAP_FIXED_NOREPLACE = 0x4000, 0x100000
MFD_CLOEXEC, MFD_ALLOW_SEALING, MFD_NOEXEC_SEAL, MFD_EXEC = 1, 2, 8, 16  # linux/memfd.h

DEFAULT_TIMEOUT = 5.0
"""Seconds to find a thread that can make a call."""

_MAX_ERRNO = 4095  # include/linux/err.h
_MOST_ARGUMENTS = 6
# The kernel's own restart numbers (registers_x86_64): a signal came before the call did anything.
_INTERRUPTED = frozenset({512, 513, 514, 516})


class RemoteCallError(LivegraftError):
    """A system call in the target failed: ``errno`` is the kernel's answer, ``number`` the call's number."""

    def __init__(self, pid: int, number: int, args: tuple[int, ...], error: int) -> None:
        """Say what was called with what, and what the kernel answered."""
        shown = ", ".join(f"{value:#x}" if value > 9 else str(value) for value in args)
        super().__init__(
            f"{_name_of(number)}({shown}) in process {pid} failed",
            why=f"the kernel answered {errno.errorcode.get(error, str(error))} ({os.strerror(error)})",
        )
        self.number = number
        self.errno = error


def _name_of(number: int) -> str:
    from ptrace.syscall.linux.x86_64 import SYSCALL_NAMES  # noqa: PLC0415  # for errors only

    return str(SYSCALL_NAMES.get(number, f"system call {number}"))


class RemoteCaller:
    """Makes system calls in one process; a context manager.

    From the first call until leaving, one thread of the target is held, so leave soon. On leaving, the thread
    goes on where it was and the stub is erased. Signals to this process act on leaving.
    """

    def __init__(
        self,
        pid: int,
        memory: Memory,
        timeout: float = DEFAULT_TIMEOUT,
        candidates: Candidates = by_preference,
    ) -> None:
        """Touch nothing yet. ``memory`` must be that of ``pid``; ``timeout`` is in seconds for each call."""
        self.pid = pid
        self._memory = memory
        self._timeout = timeout
        self._candidates = candidates
        self._slot = 0
        self._written = False
        self._thread: Borrowed | None = None
        self._quiet: Undisturbed | None = None
        self._stack = ExitStack()

    def __enter__(self) -> RemoteCaller:
        """Find room for the stub; no thread is stopped yet.

        Raises Busy (another livegraft is at work), LivegraftError (no room), BadInput, NotPermitted.
        """
        release_abandoned()
        require_traceable(self.pid)
        stub()  # assembled now: nothing may take long or fail while a thread is held
        with ExitStack() as stack:
            stack.enter_context(exclusive(self.pid))
            self._slot = slot_for_stub(self.pid, self._memory)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Erase the stub and let the thread go. Raises LivegraftError if that fails."""
        with self._stack:
            try:
                self._erase()
            finally:
                self._let_go()

    def call(self, number: int, *args: int) -> int:
        """Make one system call and return its result, as a signed value.

        ``number`` is that of syscall_64.tbl, ``args`` up to six signed or unsigned 64-bit values. The call
        must not be one that sleeps on a restart block (nanosleep, poll): the thread's own would be lost.
        Raises RemoteCallError (the kernel refused the call), Busy (no thread could make it in time),
        BadInput (the process has exited), NotPermitted.
        """
        if len(args) > _MOST_ARGUMENTS:
            raise ValueError(f"a system call has at most {_MOST_ARGUMENTS} arguments")
        if self._thread is not None and self._thread.lost:
            raise LivegraftError(
                f"{_name_of(number)} in process {self.pid} was not tried",
                why=f"thread {self._thread.tid} did not come back from an earlier call",
                next_step="try again",
            )
        deadline = time.monotonic() + self._timeout
        while True:
            thread = self._thread or self._borrow(deadline)
            result = thread.call(number, args)
            if result is None:
                self._thread = self._memory.poke = None  # it has been let go
            elif -result not in _INTERRUPTED:
                break
            if time.monotonic() >= deadline:
                raise no_thread_is_fit(self.pid)
        if -_MAX_ERRNO <= result < 0:
            raise RemoteCallError(self.pid, number, args, -result)
        return result

    @property
    def tid(self) -> int:
        """The thread that made the last call. Raises AssertionError where none is held."""
        assert self._thread is not None, "no call was made"
        return self._thread.tid

    def _borrow(self, deadline: float) -> Borrowed:
        if self._quiet is None:
            self._quiet = self._stack.enter_context(Undisturbed())
        thread = borrow(self.pid, self._memory, deadline, self._candidates)
        self._thread = thread
        self._memory.poke = thread.poke
        self._written = True
        thread.aim(self._memory, self._slot)
        return thread

    def _erase(self) -> None:
        if not self._written or not self._process_lives():
            return
        if not self._put_back():
            return
        # While the thread is stopped: nobody can be in the stub, and a word can be poked.
        self._memory.write(self._slot, bytes(STUB_SIZE))
        if any(self._memory.read(self._slot, STUB_SIZE)):
            raise LivegraftError(
                f"the stub at {self._slot:#x} of process {self.pid} could not be erased",
                why="the bytes read back are not zero",
                next_step="nothing: what is left is never executed again",
            )
        self._written = False

    def _put_back(self) -> bool:
        """Hold a thread that has its own registers; False where the stub must stay, or has gone with the process."""
        deadline = time.monotonic() + self._timeout
        while True:
            thread = self._thread or self._borrow(deadline)
            if thread.lost:
                return False  # it will still return through the stub
            try:
                thread.put_back()
            except PtraceFailed as error:
                if not error.gone:
                    raise
                self._thread = self._memory.poke = None  # killed in its stop
                if not self._process_lives():
                    return False
            else:
                return True

    def _process_lives(self) -> bool:
        try:
            self._memory.read(self._slot, 1)
        except LivegraftError:
            return False  # it has exited or executed another program, and the stub is gone with it
        return True

    def _let_go(self) -> None:
        thread, self._thread, self._memory.poke = self._thread, None, None
        if thread is not None and not thread.lost:
            thread.give_back(INTERRUPTED)

    def mmap(
        self, address: int, length: int, protection: int, flags: int, descriptor: int = -1, offset: int = 0
    ) -> int:
        """mmap(2) in the target; return the address. Raises as ``call``."""
        return self.call(MMAP, address, length, protection, flags, descriptor, offset)

    def munmap(self, address: int, length: int) -> None:
        """munmap(2) in the target. Raises as ``call``."""
        self.call(MUNMAP, address, length)

    def mprotect(self, address: int, length: int, protection: int) -> None:
        """mprotect(2) in the target. Raises as ``call``."""
        self.call(MPROTECT, address, length, protection)

    def memfd_create(self, flags: int) -> int:
        """memfd_create(2) in the target, with the name ``livegraft``; return the descriptor there.

        Its content is best written through ``/proc/PID/fd/N``. Raises as ``call``.
        """
        return self.call(MEMFD_CREATE, self._slot + NAME_OFFSET, flags)

    def close(self, descriptor: int) -> None:
        """close(2) in the target. Raises as ``call``."""
        try:
            self.call(CLOSE, descriptor)
        except RemoteCallError as error:
            if error.errno != errno.EINTR:  # the descriptor is closed all the same, close(2)
                raise


def slot_for_stub(pid: int, memory: Memory) -> int:
    """Return the address of room for a stub: zero bytes, or a stub left behind that nobody will enter again.

    Raises LivegraftError where there is neither.
    """
    caves = find_caves(modules(mappings(pid), memory))
    found = free_slot(caves, memory)
    if found is not None:
        return found
    for old in old_stubs(caves, memory):
        if _reclaim(pid, memory, old):
            return old.address
    raise no_room(pid, caves)


def erase_old_stubs(pid: int, memory: Memory) -> None:
    """Erase the stubs that killed patchers have left, but for those that a thread may still return to.

    The caller must hold the process (``exclusive``). Raises LivegraftError, BadInput, NotPermitted.
    """
    for old in old_stubs(find_caves(modules(mappings(pid), memory)), memory):
        _reclaim(pid, memory, old)


def _reclaim(pid: int, memory: Memory, old: OldStub) -> bool:
    """Erase an old stub if the thread for which it was made is through with it."""
    gone = old.tid not in thread_ids(pid)
    thread: Borrowed | None
    with Undisturbed():
        # Where that thread has ended, any other will do: text may be writable to the tracer of a stopped one only.
        if gone:
            thread = borrow(pid, memory, time.monotonic() + DEFAULT_TIMEOUT, by_preference)
        else:
            thread = borrow_thread(pid, old.tid, memory)
        if thread is None:
            return False
        try:
            if not gone and _may_return_to(pid, memory, thread, old.address):
                return False
            memory.poke = thread.poke
            memory.write(old.address, bytes(STUB_SIZE))
        finally:
            memory.poke = None
            thread.give_back(INTERRUPTED)
    return True


def _may_return_to(pid: int, memory: Memory, thread: Borrowed, address: int) -> bool:
    """Whether a stopped thread is in the stub at ``address``, or a signal frame may lead it back there."""
    import numpy as np  # noqa: PLC0415  # rarely needed

    registers = thread.registers
    if address <= registers.rip < address + STUB_SIZE:
        return True
    # The stack that it runs on, and its own (the thread pointer lies at its end) if it runs on another
    # for a signal.
    own = registers.fs_base
    for item in mappings(pid):
        if registers.rsp in item:
            low = registers.rsp // 8 * 8
        elif own in item or (item.path == "[stack]" and thread.tid == pid):
            low = item.start
        else:
            continue
        words = np.frombuffer(memory.read(low, item.end - low), dtype="<u8")
        if ((words >= address) & (words < address + STUB_SIZE)).any():
            return True
    return False
