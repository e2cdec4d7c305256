"""A patcher that is killed before one operation on its target (``patcher/seam.py``), for the tests named after it.

The seed of what is drawn is printed; LIVEGRAFT_SEED=n repeats it.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from fixtures.killing import forked, was_killed
from patcher import seam
from patcher.pausing.conditions import Conditions
from patcher.threads import batch
from tests.live.vigilant import Vigilant

PATIENCE = 120.0
"""Seconds for the functions to be idle: on a busy machine a thread may be put aside inside one of them."""
PATIENT = Conditions(timeout=PATIENCE)
SEED = int(os.environ.get("LIVEGRAFT_SEED", time.time_ns() % 1_000_000))
SAMPLE = int(os.environ.get("LIVEGRAFT_SAMPLE", "1"))
"""Writes of each kind of work in an ordinary run, and one operation more."""
MOST_IN_C = 600
"""Operations of the library in one kind of work, about: each of a hundred threads has five in a pause."""
EVERY = int(os.environ.get("LIVEGRAFT_EVERY", "1"))
IN_C = "C"


@dataclass(frozen=True)
class Point:
    """An operation: the ``number``-th of its name, or of all where no name is given; counted from 0.

    ``IN_C`` names those that the library makes where nobody observes the seam.
    """

    number: int
    name: str = ""


@dataclass(frozen=True)
class Death:
    """The operation that was to come, and the threads that had been interrupted and not been put right since."""

    name: str
    interrupted: frozenset[int] = frozenset()

    def interrupted_of(self, program: Vigilant) -> frozenset[int]:
        """The threads that may have been: which of them C had interrupted by then is not known."""
        return frozenset(tally.tid for tally in program.torture.tallies) if self.name == IN_C else self.interrupted


class Killer:
    """Kills this very process before one operation. A thread asked again whether it has stopped is one wait."""

    def __init__(self, point: Point, told: int) -> None:
        self._point, self._told = point, told
        self._seen = 0
        self._before = ("", 0)
        self._interrupted: set[int] = set()

    def __call__(self, name: str, subject: int) -> int:
        before, self._before = self._before, (name, subject)
        if before[0] == "INTERRUPT":
            self._interrupted.add(before[1])
        elif before[0] in ("SETREGS", "DETACH"):
            self._interrupted.discard(before[1])
        again = name == "WAIT" and before == self._before
        if not again and self._point.name in ("", name.split(maxsplit=1)[0]):
            if self._seen == self._point.number:
                os.write(self._told, ",".join([name, *map(str, self._interrupted)]).encode())
                os.kill(os.getpid(), signal.SIGKILL)
            self._seen += 1
        return 0


def killed_before(point: Point, work: Callable[[], object]) -> Death | None:
    """Do the work in a forked process that is killed before an operation; None where it ended first."""
    reading, writing = os.pipe()

    def dying() -> None:
        if point.name == IN_C:
            die_in_c(point.number, writing)
            work()
        else:
            with seam.observe(Killer(point, writing)):
                work()

    child = forked(dying)
    os.close(writing)
    killed = was_killed(child)
    name, *tids = os.read(reading, 4096).decode().split(",")
    os.close(reading)
    return Death(name, frozenset(map(int, tids))) if killed else None


def die_in_c(number: int, told: int) -> None:
    library = batch.active()
    assert library is not None
    os.write(told, IN_C.encode())
    library.disturb(number + 1, 0)


def operations(work: Callable[[], object]) -> list[str]:
    """The names of the operations that the work has, this time; that a thread is asked again is none."""
    seen: list[str] = []

    def observer(name: str, subject: int) -> int:
        if name != "WAIT" or seen[-1:] != ["WAIT"]:
            seen.append(name)
        return 0

    with seam.observe(observer):
        work()
    return seen


def every(name: str = "") -> Iterator[Point]:
    """All operations; with LIVEGRAFT_EVERY=n every n-th, from one on that changes."""
    for number in itertools.count(random.randrange(EVERY), EVERY):
        yield Point(number, name)


Strike = Callable[[Point, random.Random], tuple[str, str] | None]
"""Kills at one point; gives the operation's name and what was left, None where the work ended before."""


def strike_every_operation(work: str, name: str, strike: Strike) -> None:
    """Kill before each operation of a work, one death after the other, until the work comes to its end."""
    if name == IN_C and batch.active() is None:
        pytest.skip(f"the pause is made in {batch.description()}")
    chosen = random.Random(f"{SEED} {work}")
    left: Counter[tuple[str, str]] = Counter()
    for point in every(name):
        found = strike(point, chosen)
        if found is None:
            break
        left[found] += 1
    outcomes = Counter(what for _, what in left.elements())
    print(f"{work}, seed {SEED}: {left.total()} kills, 0 deaths; left: {dict(outcomes)}; in detail: {dict(left)}")
    assert left.total() > 100 // EVERY
