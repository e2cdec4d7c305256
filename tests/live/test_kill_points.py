"""kill -9 of the patcher before each single operation on its target (``patcher/seam.py``), and at random moments.

Whatever the moment: the target lives, answers, and has noticed nothing; ``status`` tells the truth; the next commands
work and leave the code as it is in the file (D9, D10). ``make test`` goes to a sample of the writes and of the other
operations that changes from run to run (the seed is printed; LIVEGRAFT_SEED=n repeats it); ``make soak`` to every one.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from elfdiff.errors import BadInput
from fixtures.intact import altered_code
from fixtures.tracees import compile_program, handled_signals, running, wait_until
from patcher import seam
from patcher.pausing.conditions import Conditions
from patcher.records.record import State
from patcher.remote.descriptors import leaked_memory_files
from patcher.threads import batch, ptrace, tracees
from patcher.threads.quiet import Undisturbed
from patcher.transactions.inspection import inspect_process
from patcher.transactions.transaction import apply, revert
from tests.live.answering import SPREAD, Versions
from tests.live.vigilant import Vigilant, code_is_accounted_for, unharmed, version_of, vigilant_versions

pytestmark = pytest.mark.root

PATIENCE = 120.0
"""Seconds for the functions to be idle: on a busy machine a thread may be put aside inside one of them."""
PATIENT = Conditions(timeout=PATIENCE)
SEED = int(os.environ.get("LIVEGRAFT_SEED", time.time_ns() % 1_000_000))
SAMPLE = int(os.environ.get("LIVEGRAFT_SAMPLE", "2"))
"""Writes of each kind of work in an ordinary run, and one operation more."""
FEWEST_WRITES = 10
MOST_IN_C = 600
"""Operations of the library in one kind of work, about: each of a hundred threads has five in a pause."""
ROUNDS = int(os.environ.get("LIVEGRAFT_ROUNDS", "2000"))
ROUNDS_PER_TARGET = 20
EVERY = int(os.environ.get("LIVEGRAFT_EVERY", "1"))


@dataclass(frozen=True)
class Point:
    """An operation: the ``number``-th of its name, or of all where no name is given; counted from 0.

    ``IN_C`` names those that the library makes where nobody observes the seam.
    """

    number: int
    name: str = ""


IN_C = "C"


@dataclass(frozen=True)
class Work:
    """What is killed. ``prepare`` brings a new process to where it starts; ``versions`` are before and after."""

    name: str
    versions: tuple[int, int]
    prepare: Callable[[Vigilant, Versions], None]
    do: Callable[[int, Versions], object]


def put(program: Vigilant, built: Versions, *order: int) -> None:
    for version in order:
        if version == 1:
            revert(program.pid, conditions=PATIENT)
        else:
            apply(program.pid, built.to[version], PATIENT)


def applying(version: int) -> Callable[[int, Versions], object]:
    return lambda pid, built: apply(pid, built.to[version], PATIENT)


def reverting(pid: int, built: Versions) -> object:
    return revert(pid, conditions=PATIENT)


WORK = [
    Work("first apply", (1, 2), lambda program, built: None, applying(2)),
    Work("replace", (2, 3), lambda program, built: put(program, built, 2), applying(3)),
    Work("replace with one of before", (3, 2), lambda program, built: put(program, built, 2, 3), applying(2)),
    Work("apply again", (1, 2), lambda program, built: put(program, built, 2, 1), applying(2)),
    Work("revert", (2, 1), lambda program, built: put(program, built, 2), reverting),
]


@dataclass(frozen=True)
class Death:
    """The operation that was to come, and the threads that had been interrupted and not been put right since."""

    name: str
    interrupted: frozenset[int] = frozenset()


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
    child = os.fork()
    if child == 0:
        status = 99
        try:
            if point.name == IN_C:
                die_in_c(point.number, writing)
                work()
            else:
                with seam.observe(Killer(point, writing)):
                    work()
            status = 0
        except BaseException:  # noqa: BLE001  # it must never return into the tests
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    name, *tids = os.read(reading, 4096).decode().split(",")
    os.close(reading)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return Death(name, frozenset(map(int, tids)))
    assert os.WEXITSTATUS(status) == 0, "the work failed instead of being killed"
    return None


def die_in_c(number: int, told: int) -> None:
    library = batch.active()
    assert library is not None
    os.write(told, IN_C.encode())
    library.disturb(number + 1, 0)


def truth(program: Vigilant, built: Versions, work: Work) -> str:
    """Check what was left against what ``status`` says; return what that is, in a word."""
    version = version_of(program, built)
    code_is_accounted_for(program)
    word = ""
    if version is None:
        (found,) = (item for item in inspect_process(program.pid).patches if item.record.interrupted)
        assert found.redirected in (0, found.entries)
        into = work.versions[found.redirected > 0]  # of an apply
        version = into if found.record.state is State.APPLYING else work.versions[found.redirected == 0]
        word = "interrupted, "
    assert version in work.versions
    program.answers(version)
    program.never_mixed()
    return word + ("before" if version == work.versions[0] else "after")


def carry_on(program: Vigilant, built: Versions, chosen: random.Random) -> None:
    """The next commands, whatever was left: they do what they say, and at last all is as in the file."""
    pid = program.pid
    states = {one.record.state for one in inspect_process(pid).patches}
    if chosen.random() < 0.5:
        if states & {State.APPLYING, State.REVERTING, State.APPLIED}:
            revert(pid, conditions=PATIENT)
        else:
            with pytest.raises(BadInput):
                if revert(pid, conditions=PATIENT).already:
                    raise BadInput("it is reverted")  # as good: there was one, and it is out of force
    version = chosen.choice((2, 3))
    outcome = apply(pid, built.to[version], PATIENT)
    assert version_of(program, built) == version
    program.answers(version)
    assert outcome.already or not leaked_memory_files(pid)  # where nothing is to be done, nothing is swept
    put(program, built, 1)
    assert version_of(program, built) == 1
    program.answers(1)
    assert altered_code(pid) == []


def strike(
    work: Work, point: Point, built: Versions, folder: Path, chosen: random.Random, part: int | None = None
) -> tuple[str, str] | None:
    """Kill at one point; return the operation's name and what was left, None where the work ended before."""
    with Vigilant(built.programs[1], folder, part) as program:
        work.prepare(program, built)
        death = killed_before(point, lambda: work.do(program.pid, built))
        if death is None:
            assert version_of(program, built) == work.versions[1]
            return None
        # Which of its threads C had interrupted by then is not known.
        everyone = {tally.tid for tally in program.torture.tallies}
        interrupted = everyone if death.name == IN_C else death.interrupted
        unharmed(program, interrupted)
        left = truth(program, built, work)
        carry_on(program, built, chosen)
        unharmed(program, interrupted)
        return death.name, left


@pytest.fixture(scope="module")
def built(cache_folder: Path) -> Versions:
    return vigilant_versions(cache_folder / "answer", SPREAD)


def counted(work: Work, built: Versions, folder: Path) -> int:
    """How many operations the work has, this time."""
    seen: list[str] = []
    with Vigilant(built.programs[1], folder) as program, ExitStack() as stack:
        work.prepare(program, built)
        stack.enter_context(seam.observe(lambda name, subject: seen.append(name) or 0))  # type: ignore[func-returns-value]
        work.do(program.pid, built)
    return sum(1 for before, name in zip(["", *seen], seen, strict=False) if name != "WAIT" or before != "WAIT")


def every(name: str = "") -> Iterator[Point]:
    """All operations; with LIVEGRAFT_EVERY=n every n-th, from one on that changes."""
    for number in itertools.count(random.randrange(EVERY), EVERY):
        yield Point(number, name)


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.name)
def test_killed_before_a_write_or_elsewhere(work: Work, built: Versions, tmp_path: Path) -> None:
    chosen = random.Random(f"{SEED} {work.name}")
    left: Counter[tuple[str, str]] = Counter()
    for number in chosen.sample(range(FEWEST_WRITES), SAMPLE):
        found = strike(work, Point(number, "WRITE"), built, tmp_path, chosen)
        assert found is not None, f"write {number} was not reached"
        left[found] += 1
    if batch.active() is not None:
        number = chosen.randrange(MOST_IN_C)
        found = strike(work, Point(number, IN_C), built, tmp_path, chosen)
        left[found or (IN_C, "not killed")] += 1
    count = counted(work, built, tmp_path)
    found = strike(work, Point(chosen.randrange(count)), built, tmp_path, chosen)
    left[found or ("", "not killed")] += 1
    print(f"{work.name}, seed {SEED}, about {count} operations: {dict(left)}")


@pytest.mark.soak
@pytest.mark.parametrize("name", ["", IN_C], ids=["Python", "C"])
@pytest.mark.parametrize("work", WORK, ids=lambda work: work.name)
def test_killed_before_every_operation(work: Work, name: str, built: Versions, tmp_path: Path) -> None:
    if name == IN_C and batch.active() is None:
        pytest.skip(f"the pause is made in {batch.description()}")
    chosen = random.Random(f"{SEED} {work.name}")
    left: Counter[tuple[str, str]] = Counter()
    for point in every(name):
        found = strike(work, point, built, tmp_path, chosen, point.number % 8)
        if found is None:
            break
        left[found] += 1
    outcomes = Counter(what for _, what in left.elements())
    print(f"{work.name}, seed {SEED}: {left.total()} kills, 0 deaths; left: {dict(outcomes)}; in detail: {dict(left)}")
    assert left.total() > 100 // EVERY


def killed_within(seconds: float, work: Callable[[], object]) -> bool:
    """Do the work in a forked process and kill it after a time; False where it was done before."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001  # it must never return into the tests
            traceback.print_exc()
        finally:
            os._exit(status)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work failed instead of being killed"
    return os.WIFSIGNALED(status)


def random_round(
    program: Vigilant, built: Versions, chosen: random.Random, deaths: int, span: float
) -> tuple[str, str]:
    """Kill an apply or a revert within ``span`` seconds, and look at what is left; returns both in a word."""
    before = version_of(program, built) or 1
    after = chosen.choice([version for version in (1, 2, 3) if version != before])
    killed = killed_within(chosen.uniform(0, span), lambda: put(program, built, after))
    tids = [tally.tid for tally in program.torture.tallies]
    unharmed(program, tids if killed or deaths else (), deaths + killed)
    work = Work("", (before, after), lambda program, built: None, reverting if after == 1 else applying(after))
    return f"{before} to {after} {'killed' if killed else 'done'}", truth(program, built, work)


@pytest.mark.soak
def test_killed_at_random_moments(built: Versions, tmp_path: Path) -> None:
    chosen = random.Random(SEED)
    left: Counter[tuple[str, str]] = Counter()
    interrupted = 0
    while left.total() < ROUNDS:
        with Vigilant(built.programs[1], tmp_path) as program:
            deaths = 0
            begin = time.monotonic()
            put(program, built, 2, 3, 1)
            span = (time.monotonic() - begin) / 2  # of three; a fork adds to it
            for _ in range(ROUNDS_PER_TARGET):
                found = random_round(program, built, chosen, deaths, span)
                left[found] += 1
                deaths += found[0].endswith("killed")
                if found[1].startswith("interrupted") or chosen.random() < 0.2:
                    carry_on(program, built, chosen)
            interrupted += sum(tally.interrupted for tally in program.complaints)
    kills = sum(count for (what, _), count in left.items() if what.endswith("killed"))
    print(f"seed {SEED}: {left.total()} rounds, {kills} killed, 0 deaths; left: {dict(left)}")
    print(f"{interrupted} calls that a stop ends with EINTR did so in a kill")
    assert kills > left.total() // 4


@pytest.mark.parametrize("library", ["C", "Python"])
def test_a_signal_outlives_the_tracer_that_has_seen_it(library: str, tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    with running([compile_program("signals", tmp_path), counts]) as target:
        child = os.fork()
        if child == 0:
            see_a_signal_and_die(target.pid, library)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        wait_until(lambda: handled_signals(counts) == 1, "the signal")


def see_a_signal_and_die(pid: int, library: str) -> NoReturn:
    try:
        os.environ[batch._PURE] = "" if library == "C" else "1"
        ptrace.seize(pid, ptrace.Option.NONE)
        os.kill(pid, signal.SIGRTMIN)
        with Undisturbed():
            stops = tracees.wait_for([pid], time.monotonic() + PATIENCE)
        assert stops[pid].kind is tracees.StopKind.SIGNAL
        os.kill(os.getpid(), signal.SIGKILL)
    finally:
        os._exit(99)
