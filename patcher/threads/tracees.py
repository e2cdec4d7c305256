"""Single threads under this tracer: seizing one, waiting for several, letting go of what did not stop.

A seized thread that is running cannot be detached; it has to stop first (ptrace(2)). A thread that does not
stop in time, because it sleeps uninterruptibly, is therefore handed to ``abandon``, and the kernel lets go
of it at the latest when this tracer exits.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum

from ptrace.ctypes_libc import libc

from elfdiff.errors import BadInput, LivegraftError

from .. import seam
from ..process import fitness, obstacles
from ..process.proc import ProcessStatus, is_leaving, is_socket, status
from . import batch, ptrace
from .quiet import ticking
from .registers_x86_64 import RESTART_RESULT, Registers, made_anew, without_spurious_eintr

_WALL = 0x40000000  # __WALL, wait(2): also children that are threads
_EVENT_STOP = 128  # PTRACE_EVENT_STOP, include/uapi/linux/ptrace.h
EVENT_CLONE = 3
EVENT_EXEC = 4
_SIGTRAP = 5
_SYSCALL_STOP = _SIGTRAP | 0x80  # with PTRACE_O_TRACESYSGOOD
_PLAIN_STOP = _EVENT_STOP << 16 | _SIGTRAP << 8 | 0x7F  # what nearly every tracee reports
_NO_TRACEE = -1

_NAP = 50e-6
_PATIENCE = 5e-3  # seconds until it is asked whether something is in the way
_LEAVING = 1.0  # seconds for a killed thread to notice
_GOODBYE = 5.0  # seconds for a thread that only lacks a processor to stop
_REST = 1e-3
_UNINTERRUPTIBLE = "D"  # state of proc(5)

# A stop is only looked at (WNOWAIT) and never taken: what has been taken is gone, and a tracer that died between
# waitpid(2) and PTRACE_DETACH would leave a thread whose signal is lost (wait_task_stopped, kernel/exit.c, zeroes the
# number that ptrace_signal, kernel/signal.c, goes on with). An exit is taken, or nobody would hear of it.
_LOOK = os.WSTOPPED | os.WEXITED | os.WNOWAIT | _WALL
_STOPPED = 0x7F  # low byte of a wait status, wait(2)

_waitid = libc["waitid"]
_waitid.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_waitid.restype = ctypes.c_int


class _ChildInfo(ctypes.Structure):
    # siginfo_t as waitid(2) fills it in, include/uapi/asm-generic/siginfo.h
    _fields_ = (
        ("signo", ctypes.c_int),
        ("errno", ctypes.c_int),
        ("code", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("pid", ctypes.c_int),
        ("uid", ctypes.c_uint),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 100),
    )


class StopKind(Enum):
    """Why a tracee stopped, in the terms of ptrace(2)."""

    INTERRUPTED = "interrupted"  # PTRACE_EVENT_STOP: because we asked, or because it is new
    GROUP = "group-stop"  # SIGSTOP and its like stopped the whole process
    SIGNAL = "signal-delivery-stop"  # it is about to receive a signal
    SYSCALL = "syscall-stop"  # it enters or leaves a system call
    EVENT = "event"  # another PTRACE_EVENT
    GONE = "gone"  # it has exited


@dataclass(frozen=True, slots=True)
class Stop:
    """What a wait status says. ``signal`` is the one to deliver (SIGNAL) or that stopped it (GROUP)."""

    kind: StopKind
    signal: int = 0
    event: int = 0


GONE = Stop(StopKind.GONE)
INTERRUPTED = Stop(StopKind.INTERRUPTED)


def decode(wait_status: int) -> Stop:
    """Return what a status of waitpid(2) says about a seized thread (ptrace(2), "Stopped states")."""
    if wait_status == _PLAIN_STOP:
        return INTERRUPTED
    if wait_status == _NO_TRACEE or not os.WIFSTOPPED(wait_status):
        return GONE
    number = os.WSTOPSIG(wait_status)
    event = wait_status >> 16
    if event == _EVENT_STOP:
        return INTERRUPTED if number == _SIGTRAP else Stop(StopKind.GROUP, number)
    if event:
        return Stop(StopKind.EVENT, event=event)
    if number == _SYSCALL_STOP:
        return Stop(StopKind.SYSCALL)
    return Stop(StopKind.SIGNAL, number)


def poll(tid: int) -> Stop | None:
    """Return the stop of a tracee, or None while it runs. Never blocks."""
    if seam.announce("WAIT", tid):
        return GONE
    return _look(tid, os.WNOHANG)


def _look(tid: int, options: int) -> Stop | None:
    """Return the next stop of a tracee; None if it has none yet (WNOHANG) or a signal came first."""
    # Not os.waitid: that goes on waiting after a signal.
    info = _ChildInfo()
    if _waitid(os.P_PID, tid, ctypes.byref(info), _LOOK | options) != 0:
        # Else not ours any more: an execve of another thread took it away, or somebody reaped it.
        return None if ctypes.get_errno() == errno.EINTR else GONE
    if not info.pid:
        return None
    if info.code in (os.CLD_TRAPPED, os.CLD_STOPPED):
        return decode(info.status << 8 | _STOPPED)
    _take_exit(tid)
    return GONE


def _take_exit(tid: int) -> None:
    """Reap a thread that has exited, so that whoever waits for its end hears of it: an execve, or its parent.

    But for a process that is our own child: taken by its tracer, its status is gone for the parent, which is the same
    process (wait_task_zombie, kernel/exit.c), and whoever started it here would never know how it ended.
    """
    try:
        found = status(tid)
    except BadInput:
        return  # another thread of ours was first (``reaping``)
    if found.parent != os.getpid() or found.tgid != tid:
        with suppress(ChildProcessError):  # the same
            os.waitpid(tid, _WALL)


def waits_end() -> AbstractContextManager[bool]:
    """Let blocking waits be interrupted again and again; false where that is not possible (``ticking``)."""
    return ticking(_PATIENCE)


def wait_for(tids: Iterable[int], deadline: float) -> dict[int, Stop]:
    """Wait until every one of ``tids`` has stopped or is gone; ``deadline`` is a time.monotonic() value.

    Returns what was reported, without the threads that had not stopped by the deadline.
    """
    stops: dict[int, Stop] = {}
    pending = list(tids)
    patience = time.monotonic() + _PATIENCE
    with waits_end() as interruptible:
        if interruptible:
            pending = _wait_in_order(pending, stops)
        while True:
            now = time.monotonic()
            pending = _collect(pending, stops, thorough=now >= min(patience, deadline))
            if not pending or now >= deadline:
                return stops
            if interruptible:
                stop = _look(pending[0], 0)  # or a tick
                if stop is not None:
                    stops[pending.pop(0)] = stop
            else:
                time.sleep(_NAP)


def _wait_in_order(pending: list[int], stops: dict[int, Stop]) -> list[int]:
    """Take the reports of threads by a call of C, up to the first tick; return the others."""
    library = batch.active()
    if library is None:
        return pending
    statuses = library.wait(pending)
    for tid, number in zip(pending, statuses, strict=False):
        stops[tid] = decode(number)
        if stops[tid] is GONE and number != _NO_TRACEE:
            _take_exit(tid)
    return pending[len(statuses) :]


def _collect(pending: list[int], stops: dict[int, Stop], thorough: bool) -> list[int]:
    """Take the reports of those that have stopped; return the others.

    In haste they are asked in order and only up to the first that still runs, so that n threads cost n calls.
    That may go on for ever: a thread in execve(2) stops only after the death of each other thread has been
    taken notice of, and a main thread that ends before the others is a zombie that is never reported.
    """
    still = []
    for index, tid in enumerate(pending):
        stop = poll(tid)
        if stop is None and thorough and _is_dead(tid):
            _abandoned.add(tid)
            stop = GONE
        if stop is not None:
            stops[tid] = stop
        elif thorough:
            still.append(tid)
        else:
            return pending[index:]
    return still


def _is_dead(tid: int) -> bool:
    try:
        return status(tid).zombie
    except BadInput:
        return True


_abandoned: set[int] = set()


def require_gone(tid: int, why: str) -> None:
    """Return once a thread that is said to be gone will execute nothing more of its program.

    The kernel answers ESRCH also where a thread is not stopped for us, and ECHILD where it is not ours. To take such
    a thread for dead would mean not to look at its stack, or to erase the stub under it. One that was killed in its
    stop needs a moment to notice. ``why`` is what has said so. Raises LivegraftError where it lives on.
    """
    end = time.monotonic() + _LEAVING
    while not is_leaving(tid):
        if time.monotonic() >= end:
            raise LivegraftError(
                f"thread {tid} is said to be gone and lives on",
                why=f"{why}; it will be let go when livegraft ends",
                next_step="try again",
            )
        time.sleep(_REST)


def abandon(tid: int) -> None:
    """Give up a seized thread that does not stop; ``release_abandoned`` lets go of it once it has."""
    _abandoned.add(tid)


def any_abandoned() -> bool:
    """Whether there are threads that were given up, and not let go yet."""
    return bool(_abandoned)


def release_abandoned() -> int:
    """Detach every abandoned thread that has stopped meanwhile; return how many are left.

    A tracer that lives on (a loop over many processes) must call this until it returns 0; a tracer that exits
    need not, since the kernel then detaches them itself.
    """
    for tid in tuple(_abandoned):
        stop = poll(tid)
        if stop is None:
            continue
        _abandoned.discard(tid)
        if stop.kind is not StopKind.GONE:
            _put_right(tid, stop)
            detach(tid, stop)
    return len(_abandoned)


def _put_right(tid: int, stop: Stop) -> None:
    """``repair`` a thread that has stopped late: what it waits in ends with EINTR then, too."""
    try:
        repair(tid, ptrace.read_registers(tid), stop)
    except ptrace.PtraceFailed as error:
        if not error.gone:
            raise  # else killed in its stop, which detaching it notices


def reap() -> None:
    """Let go of abandoned threads that are about to stop, and take notice of the deaths of those about to die.

    For the end of a command: what stops later stands still until this process comes back to it, or ends.
    """
    end = time.monotonic() + _GOODBYE
    while release_abandoned() and any(map(is_about_to_stop, _abandoned)) and time.monotonic() < end:
        time.sleep(_REST)


def is_about_to_stop(tid: int) -> bool:
    """Whether a thread that was interrupted will stop as soon as it runs, or has ended."""
    try:
        return is_leaving(tid) or status(tid).state != _UNINTERRUPTIBLE
    except BadInput:
        return True  # it has ended, and is to be reaped


@contextmanager
def reaping(held: Callable[[], Collection[int]] = tuple) -> Iterator[None]:
    """Reap those of the ``held`` and of the abandoned threads that die while the body seizes others of their process.

    PTRACE_SEIZE waits for an execve(2) of the process (cred_guard_mutex; ptrace_attach, kernel/ptrace.c), and that
    waits until each thread that it has killed is reaped by its tracer (de_thread, fs/exec.c): by us. Nothing ends that
    wait: after a signal the kernel makes the call again (ERESTARTNOINTR). But any thread of this process may reap, so
    another does. ``held`` is called in it. Raises LivegraftError where no thread can be started.
    """
    over = threading.Event()

    def reap_until_over() -> None:
        while not over.wait(_PATIENCE):
            for tid in (*held(), *_abandoned):
                _look(tid, os.WNOHANG)  # which takes deaths alone: WEXITED by itself takes stops of tracees, too

    helper = threading.Thread(target=reap_until_over, daemon=True)
    try:
        helper.start()
    except RuntimeError as error:
        raise LivegraftError("livegraft could not start a thread of its own", why=str(error)) from error
    try:
        yield
    finally:
        over.set()
        helper.join()


def repair(tid: int, registers: Registers, stop: Stop, filtered: bool = True) -> None:
    """Keep a stop from being seen as EINTR, and from being punished: write the registers that do, in the thread and in
    ``registers``. ``filtered``: whether the thread may be under a filter (``made_anew``).

    At once and not on detach: if this process is killed from then on, the program sees no EINTR.
    Raises PtraceFailed.
    """
    if stop.kind not in (StopKind.INTERRUPTED, StopKind.SIGNAL):
        return
    fixed = without_spurious_eintr(registers, functools.partial(is_socket, tid))
    if filtered and registers.rax == RESTART_RESULT and status(tid).seccomp:
        fixed = made_anew(registers)
    if fixed is not None:
        ptrace.write_registers(tid, fixed)
        registers.rax = fixed.rax


def detach(tid: int, stop: Stop) -> bool:
    """Let go of a stopped thread, delivering the signal that it stopped for; False if it is gone."""
    try:
        ptrace.detach(tid, stop.signal if stop.kind is StopKind.SIGNAL else 0)
    except ptrace.PtraceFailed as error:
        if not error.gone:
            raise
        # Killed in its stop. It must be reaped, or its parent would never hear of its death.
        if poll(tid) is None:
            _abandoned.add(tid)
        return False
    return True


def detach_all(stops: Mapping[int, Stop]) -> list[LivegraftError]:
    """``detach`` every one of these threads; return the errors, after all have been tried."""
    library = batch.active()
    if library is None:
        return _detach_each(stops)
    signals = [stop.signal if stop.kind is StopKind.SIGNAL else 0 for stop in stops.values()]
    failed = [tid for tid, _ in library.detach(list(stops), signals)]
    # Once more, one by one: a thread that is gone has to be reaped, and nothing else is expected.
    return _detach_each({tid: stops[tid] for tid in failed})


def _detach_each(stops: Mapping[int, Stop]) -> list[LivegraftError]:
    failures: list[LivegraftError] = []
    for tid, stop in stops.items():
        try:
            detach(tid, stop)
        except LivegraftError as error:
            failures.append(error)
    return failures


def try_seize(pid: int, tid: int, options: ptrace.Option) -> bool:
    """Seize one thread of a process; False if it is dead or dying, True also if it was ours already.

    Raises NotPermitted, saying who or what is in the way.
    """
    try:
        ptrace.seize(tid, options)
    except ptrace.PtraceFailed as error:
        if error.gone:
            return False
        try:
            found = status(tid)
        except BadInput:
            return False
        if found.zombie:
            return False  # ours or not: it never stops, and is never reported while other threads live
        if found.tracer_pid == threading.get_native_id():
            return True
        raise fitness.tracing_refused(replace(found, pid=pid), error.why).as_error() from error
    return True


def require_traceable(pid: int) -> ProcessStatus:
    """Return the status of a process that may in principle be traced.

    Raises BadInput for no such process, a thread id, a kernel thread, a zombie and this process itself, and where
    ``/proc`` speaks of other processes than ptrace(2).
    """
    fitness.require_proc()
    found = status(pid)
    obstacle = obstacles.not_a_target(pid, found.name, why_not_a_target(pid, found))
    if obstacle is not None:
        raise obstacle.as_error()
    return found


def why_not_a_target(pid: int, found: ProcessStatus) -> str:
    """Return why a process can never be patched, or an empty string."""
    if found.tgid == os.getpid():
        return "it is this very process"
    if found.tgid != pid:
        return f"{pid} is a thread of process {found.tgid}, not a process"
    if found.kernel_thread:
        return f"it is a kernel thread ({found.name})"
    if found.zombie and not _has_living_thread(pid):
        return f"it has exited and only waits for its parent to reap it ({found.name})"
    return ""


def _has_living_thread(pid: int) -> bool:
    # A main thread may end before the others; it then stays a zombie, and the process lives on.
    return any(not _is_dead(int(name)) for name in os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208
