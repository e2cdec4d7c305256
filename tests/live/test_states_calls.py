"""Threads in blocking system calls of every kind: through whole transactions, and what cannot be kept from them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.tracees import Torture, state_of, wait_until
from patcher.process.proc import thread_ids
from patcher.threads.stopping import seize
from tests.live.reporting import Pair, Reporting, pair, reporting

pytestmark = pytest.mark.root

CUT_SHORT = {"write much", "recv MSG_WAITALL", "io_uring submitting"}


@pytest.fixture(scope="session")
def built(cache_folder: Path) -> Pair:
    return pair("torture", cache_folder / "torture")


def to_and_fro(program: Reporting, transactions: int) -> None:
    for _ in range(transactions // 2):
        program.there()
        program.back()
    program.torture.wait_for_progress()
    assert program.torture.complaints == []


def test_no_blocking_call_notices_a_transaction(built: Pair, tmp_path: Path) -> None:
    with reporting(built, tmp_path) as program:
        to_and_fro(program, 10)


@pytest.mark.soak
def test_no_blocking_call_notices_many_transactions(built: Pair, tmp_path: Path) -> None:
    with reporting(built, tmp_path) as program:
        to_and_fro(program, int(os.environ.get("LIVEGRAFT_ROUNDS", "400")))


def pause(target: Torture) -> None:
    with seize(target.pid) as process:
        process.stop()


def suspend(target: Torture) -> None:
    """SIGSTOP and SIGCONT: nothing of ours."""
    os.kill(target.pid, signal.SIGSTOP)
    wait_until(lambda: {state_of(tid) for tid in thread_ids(target.pid)} <= {"T", "Z", ""}, "the program to stop")
    os.kill(target.pid, signal.SIGCONT)


def noticed(program: Reporting, disturb: Callable[[Torture], None], times: int) -> set[str]:
    """The names of the calls that noticed being disturbed so many times, or once at least where it is 0."""
    names: set[str] = set()
    done = 0
    while done < times or (not times and not names >= CUT_SHORT):
        program.torture.require_alive()
        disturb(program.torture)
        done += 1
        names = {tally.name for tally in program.torture.complaints}
    program.torture.wait_for_progress()
    return {tally.name for tally in program.torture.complaints}


def test_the_kernel_cuts_calls_short_for_any_stop(built: Pair, tmp_path: Path) -> None:
    with reporting(built, tmp_path, "partial") as program:
        assert noticed(program, suspend, 0) >= CUT_SHORT


@pytest.mark.xfail(
    strict=True,
    reason="A call that has done a part when it is disturbed says how much (write to a pipe or socket, MSG_WAITALL), "
    "and io_uring_enter that it has submitted: nothing in its result tells this from the same answer without us, and "
    "to go on with the rest would take code that stays in the program until the call ends. SIGSTOP does the same.",
)
def test_no_call_is_cut_short(built: Pair, tmp_path: Path) -> None:
    with reporting(built, tmp_path, "partial") as program:
        assert noticed(program, pause, 40) == set()
