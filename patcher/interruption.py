"""Signals to this process while it works on a target: noted when they come, heeded where everything is consistent.

Python runs a signal handler between any two instructions of the main thread. A Ctrl-C that raises there may do so in
the middle of a context manager's exit, or between an operation on the target and the note that it was done. Blocking
signals does not help: numpy brings OpenBLAS, which starts threads of its own, and the kernel gives a signal that one
thread blocks to another that does not (signal(7)); the handler then runs in the main thread all the same, and the
default action of Ctrl-Z stops all threads, with the target standing still. So while signals are ``deferred`` each has
a handler that only takes a note.

Whoever works on a target calls ``heed`` where nothing of it is held and everything can still be undone. A signal that
comes later than the last such point finds the work done.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from elfdiff.errors import Interrupted

ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
"""Signals that ask this process to end."""
STOPPING = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
"""Signals by which a terminal stops this process."""


class Deferral:
    """The signals noted since ``deferred`` was entered, in the order in which they came."""

    def __init__(self) -> None:
        """Note nothing yet."""
        self._handlers: dict[signal.Signals, Any] = {}
        self._noted: list[int] = []
        self._taken = False

    def take(self) -> tuple[str, ...]:
        """Return the names of the noted signals that ask this process to end.

        For a caller that ends now in any case: neither these nor any that come later act when the deferral ends.
        """
        self._taken = True
        return tuple(signal.Signals(number).name for number in dict.fromkeys(self._noted) if number in ENDING)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._noted.append(number)

    def _next(self, among: tuple[signal.Signals, ...]) -> signal.Signals | None:
        return next((signal.Signals(number) for number in self._noted if number in among), None)


_now: Deferral | None = None


@contextmanager
def deferred() -> Iterator[Deferral]:
    """Take note of signals that would end or stop this process, instead of letting them act; may be nested.

    Signals that are ignored stay so. On leaving the outermost, what was noted acts as it would have. Works in the
    main thread only; in another no handler of Python runs, so nothing can be interrupted there, only stopped.
    """
    global _now  # noqa: PLW0603  # handlers are the process's own, too
    if _now is not None or threading.current_thread() is not threading.main_thread():
        yield _now or Deferral()
        return
    deferral = Deferral()
    before = {number: signal.getsignal(number) for number in (*ENDING, *STOPPING)}
    # None: it was not set by Python, and could not be put back.
    handlers = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    deferral._handlers = handlers
    try:
        for number in handlers:
            signal.signal(number, deferral._note)
        _now = deferral
        yield deferral
    finally:
        _now = None
        _restore(handlers)
        for noted in deferral._noted:
            if noted not in ENDING or not deferral._taken:
                signal.raise_signal(noted)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    except BaseException:
        # A handler that is back has raised already. The others must be back before anybody else learns of it.
        _restore({number: handler for number, handler in handlers.items() if signal.getsignal(number) != handler})
        raise


def heed() -> None:
    """Let noted signals act: stop where a terminal has asked for that, raise Interrupted where one asks us to end.

    To be called only where no thread of a target is held and everything that was done can be undone, or nothing was.
    A signal that was heeded by Interrupted is still noted: it acts when the deferral ends, after all was undone.
    """
    if _now is None:
        return
    while (stop := _now._next(STOPPING)) is not None:
        _now._noted.remove(stop)  # in place: another may be noted at this moment
        _stop_by(stop, _now)
    number = _now._next(ENDING)
    if number is not None:
        raise Interrupted(
            "interrupted",
            why=f"{number.name} came before anything was written; what had been prepared was taken away again",
            next_step="run the command again",
        )


def acknowledge() -> None:
    """Forget the noted signals that ask us to end: a caller of ``heed`` ends because of them, and says so itself.

    What it does on its way out, such as to take back what it did, is not refused because of them any more. Another
    signal is noted as before.
    """
    if _now is not None:
        for number in [number for number in _now._noted if number in ENDING]:
            _now._noted.remove(number)


def _stop_by(number: signal.Signals, deferral: Deferral) -> None:
    """Let this process be stopped, or do what else its owner has it do; returns when it goes on."""
    signal.signal(number, deferral._handlers[number])
    try:
        signal.raise_signal(number)
    finally:
        signal.signal(number, deferral._note)
