"""What a test waits for from a program does not hold it up for ever, and it says what the program does instead."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fixtures.hearing import doings, next_line
from patcher.process.proc import thread_ids
from tests.live.answering import Answering, versions


@pytest.fixture(scope="module")
def program(cache_folder: Path) -> Path:
    return versions(cache_folder / "answer").programs[1]


def test_a_program_that_says_nothing_is_described(program: Path) -> None:
    with Answering(program) as running:
        with pytest.raises(AssertionError, match=r"no answer in 0\.2 s") as caught:
            running.line(patience=0.2)
        for tid in thread_ids(running.pid):
            assert f"thread {tid}: State: " in str(caught.value)
        assert running.ask("mixed") == "0"  # and what it says later is heard


def test_one_that_has_died_is_told_from_it() -> None:
    with subprocess.Popen(["true"], stdout=subprocess.PIPE, text=True) as process:
        with pytest.raises(AssertionError, match="the program has died: 0"):
            next_line(process)
        assert "No such" in doings(process.pid)[0]
