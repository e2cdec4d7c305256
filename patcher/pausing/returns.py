"""Waiting between two stops: until the threads that were in the way have returned, or blindly.

A thread in a patched function is in the way until the outermost of its activations returns. So it is watched at the
address to which that one will return; the event counts if rsp is then where that activation found it, since recursion
returns to the same address more often, deeper in the stack. Meanwhile the target runs untraced. Where the kernel gives
no such breakpoints, or a thread's stack is not known, the target is looked at again after growing intervals.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from .. import seam
from ..stacks.quiescence import LiveFrame
from ..threads.quiet import Undisturbed
from .breakpoints_x86_64 import Breakpoint

_FIRST_INTERVAL = 0.01
_LONGEST_INTERVAL = 0.5
_LONGEST_WAIT = 0.5  # then there may be other activations than those that are waited for
_SHORTEST_WAIT = 0.005
_SHARE_STOPPED = 10  # a wait is at least this many times as long as the stop before it
_MOST_WATCHED = 64  # threads; all of more would hardly ever be out at the same time
_REST = 0.0005  # between looks at events that were not the awaited ones


@dataclass(frozen=True, slots=True)
class Waits:
    """How often was waited for returns, and how often blindly; ``why`` the latter, empty if never."""

    returns: int = 0
    polls: int = 0
    why: str = ""

    def words(self) -> str:
        """For people: how was waited."""
        said = [f"{self.returns} times for threads to return"] if self.returns else []
        said += [f"{self.polls} times blindly ({self.why})"] if self.polls else []
        return "waited " + " and ".join(said) if said else ""


@dataclass(frozen=True, slots=True)
class Return:
    """What a thread will do when it leaves the patched functions: execute ``address`` with rsp at ``cfa``."""

    tid: int
    address: int
    cfa: int


def awaited(live: Iterable[LiveFrame]) -> tuple[tuple[Return, ...], str]:
    """The return of the outermost live activation of every thread, or why there is one that cannot be awaited."""
    outermost: dict[int, LiveFrame] = {}
    for frame in live:
        if frame.depth is None or not frame.certain or frame.cfa is None:
            return (), f"the stack of thread {frame.tid} cannot be unwound" if frame.tid else "no thread runs there"
        known = outermost.get(frame.tid)
        if known is None or known.depth is None or known.depth < frame.depth:
            outermost[frame.tid] = frame
    found = []
    for tid, frame in outermost.items():
        assert frame.depth is not None and frame.cfa is not None
        if frame.depth + 1 >= len(frame.stack):
            return (), f"{frame.name} is where thread {tid} began, and returns to nobody"
        found.append(Return(tid, frame.stack[frame.depth + 1], frame.cfa))
    if len(found) > _MOST_WATCHED:
        return (), f"{len(found)} threads are in the way"
    return tuple(found), "" if found else "no thread is known to be in the way"


def unwatchable(pid: int, live: Sequence[LiveFrame]) -> str:
    """Return why the returns of what is ``live`` in a process cannot be waited for, empty where they can."""
    returns, why = awaited(live) if live else ((Return(pid, 0, 0),), "")
    try:
        with Watch(returns):
            return why
    except OSError as error:
        return _not_to_be_had(error)


def _not_to_be_had(error: OSError) -> str:
    return f"breakpoints are not to be had: {error.strerror}"


class Watch:
    """Watches returns; a context manager."""

    def __init__(self, returns: Sequence[Return]) -> None:
        """Raises OSError as ``Breakpoint``; a thread that is gone has returned."""
        self._open = ExitStack()
        self._poll = select.poll()
        self._watched: dict[int, tuple[Breakpoint, int]] = {}
        self._out: set[int] = set()
        try:
            for item in returns:
                self._add(item)
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Watch:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take all breakpoints away."""
        self._open.close()

    def _add(self, item: Return) -> None:
        try:
            breakpoint_ = self._open.enter_context(Breakpoint(item.tid, item.address))
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise
            return
        self._watched[breakpoint_.fileno()] = breakpoint_, item.cfa
        self._poll.register(breakpoint_, select.POLLIN)

    @property
    def returned(self) -> bool:
        """Whether every thread has returned (or exited) since ``forget``."""
        return len(self._out) == len(self._watched)

    def forget(self) -> None:
        """Wait for further returns of all threads that still run."""
        self._out.clear()

    def until(self, deadline: float, *, all_returned: bool) -> None:
        """Take events until ``deadline`` (of time.monotonic), or until every thread has returned."""
        while not (all_returned and self.returned):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            failure = seam.announce("WAIT", next(iter(self._watched.values()))[0].tid if self._watched else 0)
            if failure:
                raise OSError(failure, os.strerror(failure))
            if not any([self._take(*event) for event in self._poll.poll(left * 1000)]):
                time.sleep(min(_REST, max(0.0, left)))

    def _take(self, descriptor: int, event: int) -> bool:
        """Whether one more thread has returned."""
        breakpoint_, cfa = self._watched[descriptor]
        returned = any(pointer >= cfa for pointer in breakpoint_.hits())
        if event & (select.POLLHUP | select.POLLERR):  # it has exited
            self._poll.unregister(descriptor)
            del self._watched[descriptor]
            self._out.discard(descriptor)
            return True
        if returned:
            self._out.add(descriptor)
        return returned


class Waiting:
    """Spends the time between the stops of one command; a context manager.

    After a wait for returns this process is ``Undisturbed`` and keeps its breakpoints until ``done``, so that the stop
    which follows comes as soon as it can: a thread may be elsewhere for a moment only.
    """

    def __init__(self, deadline: float) -> None:
        """``deadline`` of time.monotonic: no wait ends later."""
        self.waits = Waits()
        self._deadline = deadline
        self._interval = _FIRST_INTERVAL
        self._prepared = ExitStack()

    def __enter__(self) -> Waiting:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """As ``done``."""
        self.done()

    def done(self) -> None:
        """The stop that a wait was for is over."""
        self._prepared.close()

    def wait(self, live: Sequence[LiveFrame], stopped: float) -> bool:
        """Wait until it is worth stopping again; False where there is no time for that.

        ``live`` is what the last stop found, ``stopped`` how long it took, in seconds. Stops are kept apart, so that
        the target runs most of the time however often its threads come and go.
        """
        self.done()
        returns, why = awaited(live)
        if not why:
            try:
                watch = self._prepared.enter_context(Watch(returns))
                self._prepared.enter_context(Undisturbed())
                return self._wait_for(watch, max(_SHORTEST_WAIT, _SHARE_STOPPED * stopped))
            except OSError as error:
                self.done()
                why = _not_to_be_had(error)
        return self._poll(why)

    def _wait_for(self, watch: Watch, least: float) -> bool:
        now = time.monotonic()
        earliest, latest = now + least, min(now + _LONGEST_WAIT, self._deadline)
        if earliest >= self._deadline:
            return False
        self.waits = Waits(self.waits.returns + 1, self.waits.polls, self.waits.why)
        watch.until(earliest, all_returned=False)
        if watch.returned:
            # They may be inside again; their next return is a better moment, if it comes soon.
            watch.forget()
            latest = min(latest, earliest + least)
            watch.until(latest, all_returned=True)
            return True
        watch.until(latest, all_returned=True)
        return watch.returned or latest < self._deadline

    def _poll(self, why: str) -> bool:
        if time.monotonic() + self._interval >= self._deadline:
            return False
        self.waits = Waits(self.waits.returns, self.waits.polls + 1, why)
        time.sleep(self._interval)
        self._interval = min(2 * self._interval, _LONGEST_INTERVAL)
        return True
