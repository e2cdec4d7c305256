"""One thread of the target, borrowed to make system calls and given back as it was.

Which threads may be borrowed: one that stopped because we asked (PTRACE_EVENT_STOP) and not for a signal; in
64-bit mode; not inside a restartable sequence, which the kernel would forget to abort (rseq(2)). A thread
that sleeps uninterruptibly (state D: also the parent in a vfork) is not asked, since it could not stop.
"""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from elfdiff.errors import BadInput, Busy, LivegraftError, NotPermitted
from trampolines.stub_x86_64 import RESTORED, RETURN_OFFSET, stub_bytes

from .. import seam
from ..process.memory import Memory
from ..process.obstacles import filter_stays
from ..process.proc import SECCOMP_STRICT, has_children, no_such_process, status, thread_ids
from ..threads import ptrace, tracees
from ..threads.ptrace import Option, PtraceFailed
from ..threads.registers_x86_64 import (
    NO_SYSCALL,
    PLAIN_EINTR,
    USER_CODE_64,
    Registers,
    restart,
)
from ..threads.tracees import Stop, StopKind

_READ, _GETPID = 0, 39  # syscall_64.tbl
# Calls that wait, and that fail at once, changing nothing, where every argument is -1: a bad descriptor, pointer,
# size, count or option. (pause has no argument, and restart_syscall would go on with what was interrupted.)
_FAILING = PLAIN_EINTR | {
    7,  # poll
    23,  # select
    35,  # nanosleep
    61,  # wait4
    69,  # msgsnd
    70,  # msgrcv
    72,  # fcntl
    73,  # flock
    130,  # rt_sigsuspend
    202,  # futex
    230,  # clock_nanosleep
    247,  # waitid
    270,  # pselect6
    271,  # ppoll
}
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")  # psABI appendix A.2.1
_WORD_MASK = (1 << 64) - 1
_PARENT = 3
_FILTERED = 6  # above every other rank

_STOP_TIMEOUT = 0.25  # seconds for one thread to stop before the next is asked
_CALL_TIMEOUT = 10.0  # seconds for a call; mmap may wait for the lock of the whole address space
_RETRY_PAUSE = 1e-3
_NO_CHILD = "waitpid(2) reports no such thread of ours"
_MOST_STOPS = 100  # group-stops on the way to a system call; each takes a SIGSTOP from outside

_RSEQ_CS = struct.Struct("<IIQQQ")  # struct rseq_cs, linux/rseq.h: version, flags, start, length, abort


@dataclass(slots=True)
class Borrowed:
    """A stopped thread. ``registers`` are what it gets back; ``seccomp`` is the mode that is suspended, 0 for none.

    ``lost`` becomes true where it could not be stopped again, or is said to be gone: it may still be in the stub,
    which must stay.
    """

    tid: int
    registers: Registers
    seccomp: int
    slot: int = 0
    lost: bool = False

    def aim(self, memory: Memory, slot: int) -> None:
        """Write the stub with this thread's context at ``slot``, and see that this thread has it there.

        After an execve it has not, even if the address space that ``memory`` writes to lives on in a child of vfork(2).
        Raises LivegraftError.
        """
        resumed = restart(self.registers)
        context = {name: getattr(resumed, name) for name in (*RESTORED, "rip")}
        wanted = stub_bytes(context, self.tid)
        memory.write(slot, wanted)
        # By way of the process, and not of the address space that was opened.
        if memory.read_many([(slot, len(wanted))]) != [wanted]:
            raise LivegraftError(
                f"the stub at {slot:#x} of process {memory.pid} does not read back as written",
                why="something else writes there",
                next_step="restart the process",
            )
        self.slot = slot

    def poke(self, address: int, word: int) -> None:
        """Write one word of the target's memory through this thread (see ``Memory.poke``)."""
        ptrace.poke_word(self.tid, address, word)

    def call(self, number: int, args: tuple[int, ...]) -> int | None:
        """Make one system call by the stub, and return rax, signed; may be called again.

        None: the call was not made, since a signal came first or the thread died; the thread has been let go.
        Raises Busy (the call does not end), LivegraftError (the thread does not do as told).
        """
        failure = seam.announce(f"CALL {number}", self.tid)
        if failure:
            return -failure
        launch = self.registers.copy()
        launch.rip = self.slot
        launch.rax = number
        launch.orig_rax = NO_SYSCALL
        if self.seccomp:
            # A filter that is suspended by us is in force again the moment we die. So the call that it might
            # punish stands in the registers only from the entry stop on.
            launch.rax = self._passing_call()
            _set_arguments(launch, (_WORD_MASK,) * len(_ARGUMENTS))
        else:
            _set_arguments(launch, args)
        try:
            ptrace.write_registers(self.tid, launch)
            return self._run(number, args)
        except PtraceFailed as error:
            if not error.gone:
                raise
            self._require_gone(error.why)
            return None

    def _require_gone(self, why: str) -> None:
        tracees.abandon(self.tid)  # killed in its stop: it is still to be reaped
        self.lost = True
        tracees.require_gone(self.tid, why)

    def _passing_call(self) -> int:
        """Return a call that the thread's filter lets pass and that does nothing where its arguments are all -1.

        Not even getpid is allowed under many filters. What the thread waits in has passed.
        """
        if self.seccomp == SECCOMP_STRICT:
            return _READ  # one of the four that it allows
        return self.registers.orig_rax if self.registers.orig_rax in _FAILING else _GETPID

    def _run(self, number: int, args: tuple[int, ...]) -> int | None:
        stop = self._step()
        if stop.kind is StopKind.GONE:
            self._require_gone(_NO_CHILD)
            return None
        if stop.kind is StopKind.SIGNAL:
            self.give_back(stop)
            return None
        entered = ptrace.read_registers(self.tid)
        if stop.kind is not StopKind.SYSCALL or entered.rip != self.slot + RETURN_OFFSET:
            raise _unexpected(self.tid, f"it stopped ({stop.kind.value}) at {entered.rip:#x}")
        if self.seccomp:
            entered.orig_rax = number
            _set_arguments(entered, args)
            ptrace.write_registers(self.tid, entered)
        stop = self._step()
        if stop.kind is StopKind.GONE:
            self._require_gone(_NO_CHILD)
            return None
        if stop.kind is not StopKind.SYSCALL:
            raise _unexpected(self.tid, f"it stopped ({stop.kind.value}) instead of leaving the call")
        return ptrace.read_registers(self.tid).result

    def _step(self) -> Stop:
        """Resume until the next system-call or signal stop, through group-stops."""
        for _ in range(_MOST_STOPS):
            ptrace.resume_to_syscall(self.tid)
            stop = tracees.wait_for([self.tid], time.monotonic() + _CALL_TIMEOUT).get(self.tid)
            if stop is None:
                self.lost = True
                tracees.abandon(self.tid)
                raise Busy(
                    f"thread {self.tid} does not finish a system call made for us",
                    why=f"after {_CALL_TIMEOUT:g} s it is still inside; it goes on by itself when it is done",
                    next_step="see what the process waits for, and try again",
                )
            if stop.kind not in (StopKind.GROUP, StopKind.INTERRUPTED):
                return stop
        raise _unexpected(self.tid, "it is stopped by SIGSTOP again and again")

    def put_back(self) -> None:
        """Give the thread its registers back, still stopped; it no longer needs the stub.

        Raises PtraceFailed: then it may still need the stub, unless it is gone.
        """
        try:
            ptrace.write_registers(self.tid, self.registers)
        except PtraceFailed as error:
            if error.gone:
                self._require_gone(error.why)
            self.lost = True
            raise

    def give_back(self, stop: Stop) -> None:
        """Give the thread its registers back and let it go, with the signal of ``stop`` if it has one."""
        try:
            self.put_back()
        except PtraceFailed as error:
            if not error.gone:
                raise
        else:
            tracees.detach(self.tid, stop)


def _set_arguments(registers: Registers, args: tuple[int, ...]) -> None:
    for name, value in zip(_ARGUMENTS, args, strict=False):
        setattr(registers, name, value & _WORD_MASK)


def _unexpected(tid: int, why: str) -> LivegraftError:
    return LivegraftError(f"thread {tid} did not make a system call as told", why=why)


Candidates = Callable[[int], Sequence[int]]
"""From a pid, the thread ids to ask, best first."""


def borrow(pid: int, memory: Memory, deadline: float, candidates: Candidates) -> Borrowed:
    """Stop one thread of a process that may make system calls; ``deadline`` is a time.monotonic() value.

    Raises Busy (no thread was fit until then), BadInput (the process has exited), NotPermitted (none may be used).
    """
    while True:
        # An execve waits until those that it has killed are reaped.
        tracees.release_abandoned()
        refusals: list[NotPermitted] = []
        tids = candidates(pid)
        for tid in tids:
            try:
                thread = borrow_thread(pid, tid, memory)
            except NotPermitted as error:
                refusals.append(error)  # a filter and a tracer are one thread's; another may have neither
                continue
            if thread is not None:
                return thread
        if refusals and (len(refusals) == len(tids) or time.monotonic() >= deadline):
            raise refusals[0]
        if time.monotonic() >= deadline:
            raise no_thread_is_fit(pid)
        time.sleep(_RETRY_PAUSE)


def no_thread_is_fit(pid: int) -> Busy:
    """Return the error for a process of which no thread could be made to make a system call in time."""
    return Busy(
        f"no thread of process {pid} could make a system call",
        why="each was about to receive a signal, in a restartable sequence, or did not stop",
        next_step="try again",
    )


def by_preference(pid: int) -> list[int]:
    """Return the threads of a process that may be asked to make a system call, the best first.

    Best is one that sleeps in a call that the kernel restarts by itself: nobody waits for it, and if this
    process is killed just when the thread stops, not even EINTR is seen. Those that have children come later: if a
    child dies while one is stopped, another thread may be told EINTR (head of ``stopping``). Those under a
    system-call filter come last: if this process is killed just when one enters a call, the filter judges it.
    Raises BadInput (it has exited).
    """
    ranks: dict[int, int] = {}
    alive = False
    for tid in thread_ids(pid):
        try:
            found = status(tid)
        except BadInput:
            continue  # ended meanwhile
        alive |= found.state not in "ZX"
        if found.state in "SRT":
            ranks[tid] = 1 if found.state == "R" else 2 if _sleeps_in_plain_eintr(tid) else 0
            ranks[tid] += _PARENT if has_children(pid, tid) else 0
            ranks[tid] += _FILTERED if found.seccomp else 0
    if not alive:
        raise no_such_process(pid)
    return sorted(ranks, key=lambda tid: ranks[tid])


def among(tids: Collection[int]) -> Candidates:
    """Return only these threads, by preference: for calls that mean another thing where others make them."""
    return lambda pid: [tid for tid in by_preference(pid) if tid in tids]


def _sleeps_in_plain_eintr(tid: int) -> bool:
    try:
        call = Path(f"/proc/{tid}/syscall").read_text(encoding="ascii").split()[0]
    except OSError:
        return True  # not known: the kernel lacks the file, or the thread has ended
    return call.isdecimal() and int(call) in PLAIN_EINTR


def borrow_thread(pid: int, tid: int, memory: Memory) -> Borrowed | None:
    """Stop one certain thread if it may make system calls, else None. Raises NotPermitted."""
    # A filter belongs to a thread, not to the process (seccomp(2)).
    try:
        seccomp = status(tid).seccomp
    except BadInput:
        return None
    with tracees.reaping() if tracees.any_abandoned() else nullcontext():
        seized = tracees.try_seize(pid, tid, Option.TRACESYSGOOD)
    if not seized:
        return None
    try:
        ptrace.interrupt(tid)
    except PtraceFailed as error:
        if not error.gone:
            raise
    stop = tracees.wait_for([tid], time.monotonic() + _STOP_TIMEOUT).get(tid, None)
    if stop is None:
        tracees.abandon(tid)
        return None
    if stop.kind is StopKind.GONE:
        return None
    try:
        thread = _borrow_stopped(tid, stop, seccomp, memory)
    except BaseException:
        tracees.detach(tid, stop)
        raise
    if thread is None:
        tracees.detach(tid, stop)
    return thread


def _borrow_stopped(tid: int, stop: Stop, seccomp: int, memory: Memory) -> Borrowed | None:
    try:
        registers = ptrace.read_registers(tid)
        tracees.repair(tid, registers, stop)
        if stop.kind not in (StopKind.INTERRUPTED, StopKind.GROUP) or registers.cs != USER_CODE_64:
            return None
        if _in_restartable_sequence(tid, registers, memory):
            return None
        if seccomp:
            _suspend_seccomp(tid)
    except PtraceFailed as error:
        if not error.gone:
            raise
        return None
    return Borrowed(tid, registers, seccomp)


def _in_restartable_sequence(tid: int, registers: Registers, memory: Memory) -> bool:
    if registers.in_syscall:
        return False  # no system call may be made inside of one
    try:
        area = ptrace.rseq_configuration(tid).address
    except PtraceFailed as error:
        if error.errno != errno.EIO:
            raise
        return True  # the kernel cannot say: treat it as if it were
    if not area:
        return False
    descriptor = int.from_bytes(memory.read(area + 8, 8), "little")  # struct rseq, rseq_cs
    if not descriptor:
        return False
    _, _, start, length, _ = _RSEQ_CS.unpack(memory.read(descriptor, _RSEQ_CS.size))
    return bool(start <= registers.rip < start + length)


def _suspend_seccomp(tid: int) -> None:
    try:
        ptrace.set_options(tid, Option.TRACESYSGOOD | Option.SUSPEND_SECCOMP)
    except PtraceFailed as error:
        if error.gone:
            raise
        raise filter_stays(status(tid).name, tid, error.why).as_error() from error
