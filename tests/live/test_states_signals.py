"""Signals in the midst of transactions: none is lost, doubled or changed, and each finds the program's own state."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from elfdiff.errors import Busy
from fixtures.hearing import next_line
from patcher.pausing.conditions import Conditions
from patcher.transactions.transaction import apply
from tests.live.reporting import Pair, Reporting, pair, reporting

pytestmark = pytest.mark.root

Start = Callable[..., AbstractContextManager[Reporting]]


@pytest.fixture(scope="session")
def built(cache_folder: Path) -> Pair:
    return pair("storm", cache_folder / "storm")


@pytest.fixture
def start(built: Pair, tmp_path: Path) -> Start:
    return lambda *arguments: reporting(built, tmp_path, *arguments)


def weather(program: Reporting, transactions: int) -> None:
    """Apply and revert under the storm; then nothing may be wrong or missing."""
    for _ in range(transactions // 2):
        program.there()
        program.back()
    program.torture.wait_for_progress(100)  # what is late is not missing
    process = program.torture.process
    assert process.stdin is not None
    process.stdin.write("x")
    process.stdin.flush()
    sent = int(next_line(process).removeprefix("sent "))
    assert program.tally("numbered").rounds == sent > 0
    assert program.torture.complaints == []
    assert all(tally.rounds for tally in program.torture.tallies)


@pytest.mark.parametrize("hertz", [100, 1000, 3000])
def test_a_storm_of_signals_loses_none(start: Start, hertz: int) -> None:
    with start(str(hertz)) as program:
        weather(program, 10)


@pytest.mark.soak
@pytest.mark.parametrize("hertz", [100, 1000, 3000])
def test_a_long_storm_of_signals_loses_none(start: Start, hertz: int) -> None:
    with start(str(hertz)) as program:
        weather(program, int(os.environ.get("LIVEGRAFT_ROUNDS", "400")))


@pytest.fixture(scope="session")
def handlers(cache_folder: Path) -> Pair:
    return pair("handlers", cache_folder / "handlers", "hooked_answer")


def told(program: Reporting, expected: str) -> None:
    """Give the program a byte; it answers with a line."""
    process = program.torture.process
    assert process.stdin is not None
    process.stdin.write("x")
    process.stdin.flush()
    assert next_line(process).strip() == expected


def test_threads_inside_of_handlers_on_whatever_stack(handlers: Pair, tmp_path: Path) -> None:
    with reporting(handlers, tmp_path) as program:
        for _ in range(5):
            program.there()
            program.back()
        program.torture.wait_for_progress()
        assert program.torture.complaints == []
        told(program, "inside")
        with pytest.raises(Busy, match="hooked_answer"):
            apply(program.pid, program.patch, Conditions(timeout=0.2))
        program.answers(1)
        told(program, "outside")
        program.there()
        program.back()
        assert program.torture.complaints == []
