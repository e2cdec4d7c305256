"""What the tracer does to itself while threads of the target are stopped under it.

The pause must be short and must end. So the tracer runs SCHED_FIFO (without it the threads that are let go
first preempt the rest of the detaching), does not collect garbage, and answers no signal until it is over: a
Ctrl-C or a Ctrl-Z in the middle would leave the target standing.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from ..interruption import deferred

_PRIORITY = 10

# These report a fault of this process itself; blocking them would make it hang instead of die.
_FAULTS = frozenset(
    {
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGTRAP,
        signal.SIGABRT,
        signal.SIGSYS,
    }
)


class Undisturbed:
    """A context in which this thread is real-time, is not disturbed by signals and collects no garbage.

    ``realtime`` says whether the kernel granted SCHED_FIFO (it needs CAP_SYS_NICE or RLIMIT_RTPRIO);
    without it everything works, only the pause may be longer. Signals that arrive meanwhile act on leaving: those
    that would end or stop this process are ``deferred``, since another thread may take them; the rest is blocked.
    SIGALRM belongs to ``ticking`` meanwhile, and a timer that somebody has set is put back. One
    inside of another does nothing of its own.
    """

    def __init__(self) -> None:
        """Change nothing yet."""
        self.realtime = False
        self._scheduling: tuple[int, os.sched_param] | None = None
        self._mask: set[signal.Signals] | set[int] = set()
        self._collected = False
        self._alarm: _Alarm | None = None
        self._deferral = ExitStack()
        self._nested = False

    def __enter__(self) -> Undisturbed:
        """Defer and block the signals first, so that nothing can come between the other steps."""
        outer: Undisturbed | None = getattr(_here, "undisturbed", None)
        if outer is not None:
            self._nested, self.realtime = True, outer.realtime
            return self
        self._deferral.enter_context(deferred())
        # Includes SIGTSTP, SIGTTIN and SIGTTOU: stopped by the terminal we would leave the target standing.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS)
        self._collected = gc.isenabled()
        gc.disable()
        self._alarm = _take_alarm()
        self._become_realtime()
        _here.undisturbed = self
        return self

    def _become_realtime(self) -> None:
        before = (os.sched_getscheduler(0), os.sched_getparam(0))
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
        except PermissionError:
            # Not a failure: the pause gets longer, nothing else; ``realtime`` tells.
            return
        self._scheduling = before
        self.realtime = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undo it all, the signals last: they act here."""
        if self._nested:
            return
        _here.undisturbed = None
        if self._scheduling is not None:
            os.sched_setscheduler(0, *self._scheduling)
            self._scheduling = None
        if self._alarm is not None:
            _give_alarm_back(self._alarm)
        if self._collected:
            gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        self._deferral.close()


@dataclass(frozen=True, slots=True)
class _Alarm:
    """What SIGALRM and its timer were before: ``delay`` and ``interval`` in seconds, at ``taken``."""

    handler: Any
    delay: float
    interval: float
    taken: float


_here = threading.local()  # .undisturbed: the outermost that this thread is in

_ticks: list[bool] = [False]  # whether SIGALRM is ours now


def _take_alarm() -> _Alarm | None:
    if threading.current_thread() is not threading.main_thread():
        return None  # Python sets handlers in the main thread only
    delay, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    handler = signal.signal(signal.SIGALRM, _tick)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM,))
    _ticks[0] = True
    return _Alarm(handler, delay, interval, time.monotonic())


def _give_alarm_back(alarm: _Alarm) -> None:
    _ticks[0] = False
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGALRM,))
    signal.signal(signal.SIGALRM, alarm.handler)
    if alarm.delay:
        left = alarm.delay - (time.monotonic() - alarm.taken)
        signal.setitimer(signal.ITIMER_REAL, max(left, 1e-6), alarm.interval)


def _tick(number: int, frame: FrameType | None) -> None:
    """Do nothing: that the signal has a handler is what interrupts the call."""


@contextmanager
def ticking(seconds: float) -> Iterator[bool]:
    """Interrupt blocking system calls of this thread every ``seconds``; false where that is not possible.

    waitpid(2) knows no timeout, and asking it again and again makes the pause longer: a tracee that was woken
    on this CPU runs only while we sleep, best for exactly as long as it needs. So the wait is a blocking one,
    and SIGALRM ends it. Possible in the main thread inside of ``Undisturbed``.
    """
    if not _ticks[0]:
        yield False
        return
    # An interval, since a single tick could come just before the call that it is to interrupt.
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
