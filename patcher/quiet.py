"""What the tracer does to itself while threads of the target are stopped under it.

The pause must be short and must end. So the tracer runs SCHED_FIFO (without it the threads that are let go
first preempt the rest of the detaching), does not collect garbage, and answers no signal until it is over: a
Ctrl-C or a Ctrl-Z in the middle would leave the target standing.
"""

from __future__ import annotations

import gc
import os
import signal
from types import TracebackType

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
    """A context in which this thread is real-time, takes no signals and collects no garbage.

    ``realtime`` says whether the kernel granted SCHED_FIFO (it needs CAP_SYS_NICE or RLIMIT_RTPRIO);
    without it everything works, only the pause may be longer. Signals that arrive meanwhile act on leaving.
    The tracer must be the only thread of its process that takes signals: others would still answer them.
    """

    def __init__(self) -> None:
        """Change nothing yet."""
        self.realtime = False
        self._scheduling: tuple[int, os.sched_param] | None = None
        self._mask: set[signal.Signals] | set[int] | None = None
        self._collected = False

    def __enter__(self) -> Undisturbed:
        """Block the signals first, so that nothing can come between the other steps."""
        # Includes SIGTSTP, SIGTTIN and SIGTTOU: stopped by the terminal we would leave the target standing.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS)
        self._collected = gc.isenabled()
        gc.disable()
        self._become_realtime()
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
        if self._scheduling is not None:
            os.sched_setscheduler(0, *self._scheduling)
            self._scheduling = None
        if self._collected:
            gc.enable()
        if self._mask is not None:
            mask, self._mask = self._mask, None
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
