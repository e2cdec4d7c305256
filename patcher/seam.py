"""The seam: every operation by which this process touches a target, or waits for it, is announced here.

Tests set an observer, and so kill, delay or fail the patcher at its n-th operation. Nothing else may: without an
observer an operation costs one comparison more. Operations are named by what they ask of the kernel: a ptrace request
(``SEIZE``), ``WAIT``, ``READ``, ``READV`` and ``WRITE`` of memory, ``OPEN``, ``FILL`` and ``SEAL`` of a memory file,
``LOCK``, and ``CALL n`` for system call n made by a thread of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Observer = Callable[[str, int], int]
"""Called before an operation with its name and the thread or process that it concerns.

Returns 0 to let it happen, or the errno with which it is to fail without having been tried. May as well take its time,
end this process, or do something to the target.
"""

_observer: Observer | None = None


def observed() -> bool:
    """Whether somebody observes: then no two operations may be done in one step."""
    return _observer is not None


def announce(name: str, subject: int) -> int:
    """Announce an operation on thread or process ``subject``; return the errno to fail with, or 0."""
    return 0 if _observer is None else _observer(name, subject)


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Let ``observer`` be told of every operation of this process. For tests."""
    global _observer  # noqa: PLW0603  # one tracer to a process, and its hot paths take no further argument
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before
