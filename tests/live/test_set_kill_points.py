"""kill -9 of the patcher before each single operation of an apply and a revert of a set of two.

Whatever the moment: the target lives and has noticed nothing, no answer comes from two versions, ``status`` tells the
truth, and what the next command leaves is both patches in force or neither. As in ``test_kill_points``, ``make test``
goes to a sample that changes from run to run, ``make soak`` to every operation.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from fixtures.intact import altered_code
from patcher.records.record import State
from patcher.remote.descriptors import leaked_memory_files
from patcher.threads import batch
from patcher.transactions.inspection import inspect_process
from patcher.transactions.transaction import apply, revert
from tests.live.killpoints import (
    IN_C,
    MOST_IN_C,
    PATIENT,
    SAMPLE,
    SEED,
    Point,
    killed_before,
    operations,
    strike_every_operation,
)
from tests.live.pairing import Pairs, pairs, version_in_force
from tests.live.vigilant import SOURCE, Vigilant, code_is_accounted_for, unharmed

pytestmark = pytest.mark.root

LAST_WRITES = 24
"""Writes of an apply of the set from its first state word on, about: a sample is taken of the last ones."""


@dataclass(frozen=True)
class Work:
    """What is killed: from one version of both to another; ``order`` are the versions that were put in force before."""

    name: str
    versions: tuple[int, int]
    order: tuple[int, ...] = ()


WORK = [
    Work("first apply", (1, 2)),
    Work("replace", (2, 3), (2,)),
    Work("apply again", (1, 2), (2, 1)),
    Work("revert", (2, 1), (2,)),
]


def put(pid: int, built: Pairs, *order: int) -> None:
    for version in order:
        if version == 1:
            revert(pid, conditions=PATIENT)
        else:
            apply(pid, built.to[version], PATIENT)


@pytest.fixture(scope="module")
def built(cache_folder: Path) -> Pairs:
    return pairs(cache_folder / "answer", SOURCE)


def both(program: Vigilant, built: Pairs, *versions: int) -> int:
    """Assert that program and library run one of these versions, and that the records say which; returns it."""
    version = version_in_force(program, built)
    assert version in versions
    program.answers(version)
    program.never_mixed()
    return version


def carry_on(program: Vigilant, built: Pairs, work: Work, chosen: random.Random) -> None:
    """The next commands, whatever was left: both patches or neither, and at last all is as in the files."""
    pid = program.pid
    if version_in_force(program, built) != 1 and chosen.random() < 0.5:
        revert(pid, conditions=PATIENT)
        both(program, built, 1, work.versions[0])  # of a replacement that is undone, what it was to replace
    version = chosen.choice((2, 3))
    outcome = apply(pid, built.to[version], PATIENT)
    both(program, built, version)
    assert outcome.already or not leaked_memory_files(pid)
    revert(pid, conditions=PATIENT)
    both(program, built, 1)
    assert altered_code(pid) == []


def strike(
    work: Work, point: Point, built: Pairs, folder: Path, chosen: random.Random, part: int | None = None
) -> tuple[str, str] | None:
    """Kill at one point; return the operation's name and what was left, None where the work ended before."""
    with Vigilant(built.program, folder, part, built.environment) as program:
        put(program.pid, built, *work.order)
        death = killed_before(point, lambda: put(program.pid, built, work.versions[1]))
        if death is None:
            both(program, built, work.versions[1])
            return None
        interrupted = death.interrupted_of(program)
        unharmed(program, interrupted)
        said = version_in_force(program, built)
        running = int(program.ask()) // 1001
        program.never_mixed()
        code_is_accounted_for(program)
        assert running in work.versions and said in (None, running)
        states = {item.record.state for item in inspect_process(program.pid).patches}
        assert (said is None) == bool(states & {State.APPLYING, State.REVERTING})
        carry_on(program, built, work, chosen)
        unharmed(program, interrupted)
        word = "before" if running == work.versions[0] else "after"
        return death.name, f"interrupted, {word}" if said is None else word


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.name)
def test_killed_before_a_write_or_elsewhere(work: Work, built: Pairs, tmp_path: Path) -> None:
    chosen = random.Random(f"{SEED} {work.name}")
    with Vigilant(built.program, tmp_path, environment=built.environment) as program:
        put(program.pid, built, *work.order)
        names = operations(lambda: put(program.pid, built, work.versions[1]))
    writes = names.count("WRITE")
    points = [Point(number, "WRITE") for number in last(chosen, range(writes), SAMPLE)]
    points.append(Point(chosen.randrange(len(names))))
    if batch.active() is not None:
        points.append(Point(chosen.randrange(MOST_IN_C), IN_C))
    left = Counter(strike(work, point, built, tmp_path, chosen) or ("", "not killed") for point in points)
    print(f"{work.name}, seed {SEED}, about {len(names)} operations, {writes} writes: {dict(left)}")


def last(chosen: random.Random, numbers: Sequence[int], count: int) -> list[int]:
    """Some of the last numbers: what is written in the pause comes last."""
    end = numbers[-LAST_WRITES:]
    return chosen.sample(end, min(count, len(end)))


@pytest.mark.soak
@pytest.mark.parametrize("name", ["", IN_C], ids=["Python", "C"])
@pytest.mark.parametrize("work", WORK, ids=lambda work: work.name)
def test_killed_before_every_operation(work: Work, name: str, built: Pairs, tmp_path: Path) -> None:
    def struck(point: Point, chosen: random.Random) -> tuple[str, str] | None:
        return strike(work, point, built, tmp_path, chosen, point.number % 8)

    strike_every_operation(work.name, name, struck)
