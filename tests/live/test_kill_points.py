"""kill -9 of the patcher before each single operation on its target (``patcher/seam.py``), and at random moments.

Whatever the moment: the target lives, answers, and has noticed nothing; ``status`` tells the truth; the next commands
work and leave the code as it is in the file (D9, D10). ``make test`` goes to a sample of the writes and of the other
operations that changes from run to run (the seed is printed; LIVEGRAFT_SEED=n repeats it); ``make soak`` to every one.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from elfdiff.errors import BadInput
from fixtures.intact import altered_code
from fixtures.killing import forked, was_killed
from fixtures.tracees import compile_program, handled_signals, running, wait_until
from patcher.records.record import State
from patcher.remote.descriptors import leaked_memory_files
from patcher.threads import batch, ptrace, tracees
from patcher.threads.quiet import Undisturbed
from patcher.transactions.inspection import inspect_process
from patcher.transactions.transaction import apply, revert
from tests.live.answering import SPREAD, Versions
from tests.live.killpoints import (
    IN_C,
    MOST_IN_C,
    PATIENCE,
    PATIENT,
    SAMPLE,
    SEED,
    Point,
    killed_before,
    operations,
    strike_every_operation,
)
from tests.live.vigilant import Vigilant, code_is_accounted_for, unharmed, version_of, vigilant_versions

pytestmark = pytest.mark.root

FEWEST_WRITES = 10
ROUNDS = int(os.environ.get("LIVEGRAFT_ROUNDS", "2000"))
ROUNDS_PER_TARGET = 20
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
        interrupted = death.interrupted_of(program)
        unharmed(program, interrupted)
        left = truth(program, built, work)
        carry_on(program, built, chosen)
        unharmed(program, interrupted)
        return death.name, left


@pytest.fixture(scope="module")
def built(cache_folder: Path) -> Versions:
    return vigilant_versions(cache_folder / "answer", SPREAD)


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
    with Vigilant(built.programs[1], tmp_path) as program:
        work.prepare(program, built)
        count = len(operations(lambda: work.do(program.pid, built)))
    found = strike(work, Point(chosen.randrange(count)), built, tmp_path, chosen)
    left[found or ("", "not killed")] += 1
    print(f"{work.name}, seed {SEED}, about {count} operations: {dict(left)}")


@pytest.mark.soak
@pytest.mark.parametrize("name", ["", IN_C], ids=["Python", "C"])
@pytest.mark.parametrize("work", WORK, ids=lambda work: work.name)
def test_killed_before_every_operation(work: Work, name: str, built: Versions, tmp_path: Path) -> None:
    def struck(point: Point, chosen: random.Random) -> tuple[str, str] | None:
        return strike(work, point, built, tmp_path, chosen, point.number % 8)

    strike_every_operation(work.name, name, struck)


def killed_within(seconds: float, work: Callable[[], object]) -> bool:
    """Do the work in a forked process and kill it after a time; False where it was done before."""
    child = forked(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return was_killed(child)


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
