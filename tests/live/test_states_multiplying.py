"""Threads and processes that come and go during transactions: patched all alike, never traced, never in part."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from fixtures.intact import altered_code
from fixtures.tracees import wait_until
from patcher.process.proc import status
from patcher.records.record import State
from patcher.transactions.inspection import inspect_process
from patcher.transactions.transaction import apply, revert
from tests.live.reporting import PATIENT, Pair, Reporting, pair, reporting

pytestmark = pytest.mark.root

Start = Callable[[str], AbstractContextManager[Reporting]]


@pytest.fixture(scope="session")
def built(cache_folder: Path) -> Pair:
    return pair("multiplying", cache_folder / "multiplying")


@pytest.fixture
def start(built: Pair, tmp_path: Path) -> Start:
    return lambda state: reporting(built, tmp_path, state)


def states(pid: int) -> list[State]:
    return [item.record.state for item in inspect_process(pid).patches]


def to_and_fro(program: Reporting, transactions: int) -> None:
    for _ in range(transactions // 2):
        program.there()
        program.back()
    program.torture.wait_for_progress()
    assert program.torture.complaints == []


@pytest.mark.parametrize("state", ["threads", "processes"])
def test_what_multiplies_is_patched_as_one(start: Start, state: str) -> None:
    with start(state) as program:
        to_and_fro(program, 10)


@pytest.mark.soak
@pytest.mark.parametrize("state", ["threads", "processes"])
def test_what_multiplies_for_long_is_patched_as_one(start: Start, state: str) -> None:
    with start(state) as program:
        to_and_fro(program, int(os.environ.get("LIVEGRAFT_ROUNDS", "200")))


def have_child(program: Reporting) -> int:
    """Make the program fork the child that goes on answering; return its pid."""
    stdin = program.torture.process.stdin
    assert stdin is not None
    stdin.write("x")
    stdin.flush()
    wait_until(lambda: program.tally("child").rounds, "the child")
    return program.tally("child").tid


@pytest.mark.parametrize(("moment", "carries"), [("memory file", []), ("mapped", [State.PREPARED])])
def test_a_child_forked_before_the_commit_is_unpatched_and_can_be_patched(
    start: Start, moment: str, carries: list[State]
) -> None:
    with start("child") as program:
        children = []

        def on_step(name: str) -> None:
            if name == moment:
                children.append(have_child(program))

        apply(program.pid, program.patch, PATIENT, on_step=on_step)
        program.answers(2)
        (child,) = children
        assert states(child) == carries
        assert program.answer_of("child") == 1001
        assert not altered_code(child)
        assert status(child).tracer_pid == 0
        apply(child, program.patch, PATIENT)
        assert states(child) == [State.APPLIED]
        assert program.answer_of("child") == 2002
        assert not [path for path in Path(f"/proc/{child}/fd").iterdir() if "memfd" in str(path.readlink())]
        program.back()
        assert program.answer_of("child") == 2002
        revert(child, conditions=PATIENT)
        assert program.answer_of("child") == 1001


def test_a_child_forked_while_patched_is_patched_and_has_a_record_of_its_own(start: Start) -> None:
    with start("child") as program:
        program.there()
        child = have_child(program)
        assert states(child) == [State.APPLIED]
        assert program.answer_of("child") == 2002
        revert(child, conditions=PATIENT)
        assert program.answer_of("child") == 1001
        assert not altered_code(child)
        program.answers(2)
        assert states(program.pid) == [State.APPLIED]
