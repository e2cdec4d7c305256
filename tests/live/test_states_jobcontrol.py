"""Job control during transactions: a stopped process stays stopped, and its parent hears of nothing that was not so."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fixtures.tracees import state_of, wait_until
from patcher import seam
from patcher.pausing.pause import OnStep
from patcher.transactions.transaction import apply, revert
from tests.live.reporting import PATIENT, Pair, Reporting, pair, reporting

pytestmark = pytest.mark.root

MOST_OPERATIONS = 450  # of an apply; a revert has fewer
STOPPED, CONTINUED = (os.CLD_STOPPED, signal.SIGSTOP), (os.CLD_CONTINUED, signal.SIGCONT)


@pytest.fixture(scope="session")
def built(cache_folder: Path) -> Pair:
    return pair("multiplying", cache_folder / "multiplying")


@pytest.fixture
def program(built: Pair, tmp_path: Path) -> Iterator[Reporting]:
    with reporting(built, tmp_path, "child") as running:
        yield running


def by_another(work: Callable[[], object]) -> None:
    """Do the work in a process of its own: a parent that traces the target is told other things than a shell."""
    pid = os.fork()
    if pid == 0:
        done = False
        try:
            work()
            done = True
        finally:
            os._exit(not done)
    assert os.waitpid(pid, 0)[1] == 0


def applied(program: Reporting, on_step: OnStep = lambda _: None) -> None:
    by_another(lambda: apply(program.pid, program.patch, PATIENT, on_step=on_step))


def reverted(program: Reporting, on_step: OnStep = lambda _: None) -> None:
    by_another(lambda: revert(program.pid, conditions=PATIENT, on_step=on_step))


def heard(pid: int) -> list[tuple[int, int]]:
    """What a shell would be told of its job now: (si_code, signal), in order; waitpid(2), WUNTRACED and WCONTINUED."""
    found = []
    while (info := os.waitid(os.P_PID, pid, os.WSTOPPED | os.WCONTINUED | os.WEXITED | os.WNOHANG)) is not None:
        found.append((info.si_code, info.si_status))
    return found


def hears(pid: int, expected: tuple[int, int]) -> None:
    """Wait until the parent is told something, which must be that and no more."""
    told: list[tuple[int, int]] = []
    wait_until(lambda: told.extend(heard(pid)) or told, "news of the program")  # type: ignore[func-returns-value]
    assert told == [expected]


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    hears(pid, STOPPED)


def test_the_parent_hears_nothing_of_a_transaction(program: Reporting) -> None:
    for _ in range(5):
        applied(program)
        reverted(program)
    assert heard(program.pid) == []
    program.answers(1)


def test_a_stopped_process_is_patched_and_stays_stopped(program: Reporting) -> None:
    stop(program.pid)
    rounds = program.tally("answer").rounds
    for work in (applied, reverted, applied):
        work(program)
        wait_until(lambda: state_of(program.pid) == "T", "the program to be stopped again")
        assert heard(program.pid) == []
    assert program.tally("answer").rounds == rounds
    os.kill(program.pid, signal.SIGCONT)
    hears(program.pid, CONTINUED)
    program.answers(2)
    assert heard(program.pid) == []


@pytest.mark.parametrize("moment", ["memory file", "mapped", "begun", "state"])
def test_a_stop_during_a_transaction_is_one_stop(program: Reporting, moment: str) -> None:
    sent = []

    def on_step(name: str) -> None:
        if name == moment and not sent:
            sent.append(name)
            os.kill(program.pid, signal.SIGSTOP)

    applied(program, on_step)
    hears(program.pid, STOPPED)
    assert state_of(program.pid) == "T"
    os.kill(program.pid, signal.SIGCONT)
    hears(program.pid, CONTINUED)
    program.answers(2)
    assert heard(program.pid) == []


@pytest.mark.parametrize("moment", ["memory file", "mapped", "begun", "state"])
def test_a_stopped_process_that_is_continued_meanwhile_goes_on(program: Reporting, moment: str) -> None:
    stop(program.pid)
    sent = []

    def on_step(name: str) -> None:
        if name == moment and not sent:
            sent.append(name)
            os.kill(program.pid, signal.SIGCONT)

    applied(program, on_step)
    hears(program.pid, CONTINUED)
    program.answers(2)
    assert heard(program.pid) == []


@pytest.mark.soak
def test_a_stop_at_any_operation_is_one_stop(program: Reporting) -> None:
    version, chosen = 1, random.Random(4)
    for _ in range(int(os.environ.get("LIVEGRAFT_ROUNDS", "300"))):
        when = chosen.randrange(MOST_OPERATIONS)
        by_another(lambda when=when, version=version: stopping_at(when, program, version))  # type: ignore[misc]
        hears(program.pid, STOPPED)
        os.kill(program.pid, signal.SIGCONT)
        hears(program.pid, CONTINUED)
        version = 3 - version
        program.answers(version)
        assert heard(program.pid) == []


def stopping_at(when: int, program: Reporting, version: int) -> None:
    """Apply or revert, with a SIGSTOP to the target before operation ``when``, or at the end."""
    operations = itertools.count()

    def observer(name: str, subject: int) -> int:
        del name, subject
        if next(operations) == when:
            os.kill(program.pid, signal.SIGSTOP)
        return 0

    with seam.observe(observer):
        if version == 1:
            apply(program.pid, program.patch, PATIENT)
        else:
            revert(program.pid, conditions=PATIENT)
    if next(operations) <= when:
        os.kill(program.pid, signal.SIGSTOP)
