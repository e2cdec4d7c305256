"""What is in the way of a patch: a process is looked at for a while, and nothing is changed.

Each look is a short stop, at irregular intervals, so that no rhythm of the program hides from them. Two looks see the
same activation of a function if thread, function and frame address are the same. A function that is called again and
again from one place has such activations in turn, so what is seen in two looks may have returned in between.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..interruption import heed
from ..planning.plan import Plan
from ..process.memory import Memory
from ..records.record import Contents
from ..stacks.quiescence import LiveFrame, StackCheck
from ..targets.target import Snapshot
from ..threads.stopping import seize
from .conditions import Conditions
from .pause import deep_check, describe, stack_check
from .returns import unwatchable

_INTERVAL = 0.04
_MOST_LOOKS = 250


@dataclass(frozen=True, slots=True)
class Activation:
    """A function that was live in a thread; ``thread`` is the thread's name, empty where it was gone.

    ``tid`` is 0 for a stack that no thread runs on.

    ``certain``: unwinding found the frame; else ``why`` says what was found. ``stack`` names its program counters,
    innermost first. ``first`` and ``last`` are the looks (from 1) that saw it first and last, ``looks`` how many did;
    ``age`` the seconds between the first of them and the end. Seen by the first look, it may be older than that.
    """

    tid: int
    thread: str
    function: str
    certain: bool
    why: str
    stack: tuple[str, ...]
    first: int
    last: int
    looks: int
    age: float


@dataclass(frozen=True, slots=True)
class Watched:
    """What was seen of a process within ``seconds``.

    ``quiescent`` of the ``looks`` found nothing in the way. ``activations``: all that was seen, the most often seen
    first. ``never_live``: functions of the patch that no look found live. ``waiting`` says why apply would have to wait
    blindly for a moment, empty where it can wait for threads to return. ``unchanged``: code that does not change and
    must be idle all the same.
    """

    pid: int
    process: str
    contents: tuple[Contents, ...]
    seconds: float
    looks: int
    quiescent: int
    activations: tuple[Activation, ...]
    never_live: tuple[str, ...]
    waiting: str
    unchanged: tuple[str, ...] = ()

    @property
    def now(self) -> tuple[Activation, ...]:
        """What was in the way at the last look."""
        return tuple(item for item in self.activations if item.last == self.looks)


@dataclass(slots=True)
class _Tally:
    seen: dict[tuple[int, str, int | None], Activation] = field(default_factory=dict)
    began: dict[tuple[int, str, int | None], float] = field(default_factory=dict)
    looks: int = 0
    quiescent: int = 0


def watch(
    seen: Snapshot, contents: tuple[Contents, ...], plan: Plan, memory: Memory, conditions: Conditions, seconds: float
) -> Watched:
    """Look at the process for ``seconds``, once at least, for what ``plan`` must not find live.

    ``conditions`` say whether memory is searched for coroutines. Raises BadInput (it has ended), Busy (a thread cannot
    be stopped), Refused (there is more memory than may be searched), Interrupted.
    """
    tally = _Tally()
    interval = max(_INTERVAL, seconds / _MOST_LOOKS)
    deep = deep_check(plan, seen, memory, conditions)
    with deep or nullcontext(), stack_check(plan, seen, memory, deep) as check:
        began = time.monotonic()
        while True:
            heed()
            live = _look(check, memory.pid)
            _count(tally, live, seen, plan)
            pause = interval * random.uniform(0.5, 1.5)
            if time.monotonic() + pause - began > seconds:
                break
            check.refresh()
            time.sleep(pause)
    memory.require_same_program()  # else what was seen is of another program
    return _watched(tally, seen, contents, plan, live, time.monotonic() - began)


def _look(check: StackCheck, pid: int) -> tuple[LiveFrame, ...]:
    with seize(pid) as process:
        process.stop()
        return check.check(process.threads).live


def _count(tally: _Tally, live: Sequence[LiveFrame], seen: Snapshot, plan: Plan) -> None:
    tally.looks += 1
    tally.quiescent += not live
    now = time.monotonic()
    for frame in live:
        key = frame.tid, frame.name, frame.cfa
        known = tally.seen.get(key)
        if known is None:
            tally.began[key] = now
            known = _activation(frame, seen, plan, tally.looks)
        if known.last < tally.looks or not known.looks:
            known = replace(known, last=tally.looks, looks=known.looks + 1)
        tally.seen[key] = known


def _activation(frame: LiveFrame, seen: Snapshot, plan: Plan, number: int) -> Activation:
    stack = tuple(describe(pc, depth, seen.modules, plan.forbidden) for depth, pc in enumerate(frame.stack))
    name = thread_name(seen.pid, frame.tid)
    return Activation(frame.tid, name, frame.name, frame.certain, frame.why, stack, number, number, 0, 0.0)


def thread_name(pid: int, tid: int) -> str:
    """Return the name of a thread (proc(5), comm), empty where it is gone, or where ``tid`` is 0 for none."""
    if not tid:
        return ""
    try:
        text = Path(f"/proc/{pid}/task/{tid}/comm").read_text(encoding="utf-8", errors="backslashreplace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return text.rstrip("\n")


def _watched(
    tally: _Tally,
    seen: Snapshot,
    contents: tuple[Contents, ...],
    plan: Plan,
    last: Sequence[LiveFrame],
    seconds: float,
) -> Watched:
    now = time.monotonic()
    found = [replace(item, age=now - tally.began[key]) for key, item in tally.seen.items()]
    found.sort(key=lambda item: (-item.last, -item.looks, item.tid, item.function))
    return Watched(
        seen.pid,
        seen.name,
        contents,
        seconds,
        tally.looks,
        tally.quiescent,
        tuple(found),
        _never_live(contents, (item.function for item in found)),
        unwatchable(seen.pid, last),
        tuple(sorted(plan.unchanged)),
    )


def _never_live(contents: tuple[Contents, ...], live: Iterable[str]) -> tuple[str, ...]:
    """Names of functions, as ``plan`` gives them to old and new code of a patch."""
    names: Sequence[str] = tuple(live)
    return tuple(
        item.name
        for one in contents
        for item in one.functions
        if item.name not in names and not any(name.startswith(f"{item.name} (patch ") for name in names)
    )
