"""What a command starts is ended with all that it has started in its turn, wherever that went."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from elfdiff.errors import BadInput
from fixtures.tracees import state_of, wait_until
from patcher.rehearsal.children import Child

Start = Callable[..., Child]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def start(script: str) -> Child:
            """A shell that has reached the end of the script's first line."""
            output = tmp_path / "output"
            child = Child("the shell", ["sh", "-c", script], tmp_path, {"NAME": "value"}, output)
            stack.callback(child.end, 0.0)
            return child

        yield start


def pids(child: Child, count: int) -> list[int]:
    """The numbers that the script prints, once it has printed all of them."""
    wait_until(lambda: len(child.output.read_text().splitlines()) == count, "the script says its processes")
    return [int(line) for line in child.output.read_text().split()]


def gone(pid: int) -> bool:
    return state_of(pid) in ("", "Z")


ESCAPES = {
    "child": "sleep 1000 & echo $!; wait",
    "orphan": "(sleep 1000 & echo $!); exec sleep 1000",
    "session": "setsid sh -c 'echo $$; exec sleep 1000' & exec sleep 1000",
    "orphan of a session": "setsid sh -c 'setsid sleep 1000 & echo $!' & exec sleep 1000",
    "without the mark": "env -i sh -c 'echo $$; exec sleep 1000' & exec sleep 1000",
    "orphan without the mark": "env -i sh -c 'sleep 1000 & echo $!'; exec sleep 1000",
    "a session without the mark": "env -i setsid sh -c 'echo $$; exec sleep 1000' & exec sleep 1000",
    "deaf": "sh -c 'trap \"\" TERM; echo $$; while :; do sleep 1000; done' & exec sleep 1000",
    "stopped": "sh -c 'echo $$; kill -STOP $$' & exec sleep 1000",
}


@pytest.mark.parametrize("kind", ESCAPES)
def test_nothing_is_left(kind: str, start: Start) -> None:
    child = start(ESCAPES[kind])
    (below,) = pids(child, 1)
    assert not gone(below)
    child.end(0.5)
    wait_until(lambda: gone(below), "the process has ended")
    assert child.status is not None and gone(child.pid)
    child.end()


def test_what_was_left_behind_is_ended_too(start: Start) -> None:
    """The one that was started has ended long ago."""
    child = start("setsid sleep 1000 & echo $!")
    (below,) = pids(child, 1)
    assert child.wait(time.monotonic() + 30) and child.status == 0
    assert not gone(below)
    child.end(0.5)
    wait_until(lambda: gone(below), "the process has ended")


def test_others_are_left_alone(start: Start, tmp_path: Path) -> None:
    """The leader is not collected, so its number and session mean nobody else."""
    first = start("exec sleep 1000")
    with ExitStack() as stack:
        other = Child("another", ["sleep", "1000"], tmp_path, {}, tmp_path / "other")
        stack.callback(other.end, 0.0)
        first.end()
        assert other.status is None


def test_how_it_ended(start: Start) -> None:
    child = start("echo $$; exec sleep 1000")
    pids(child, 1)
    assert child.status is None and child.how_it_ended == "it runs"
    assert child.terminate() and child.status == -signal.SIGTERM and child.how_it_ended == "it was ended by SIGTERM"
    child.end()
    assert child.status == -signal.SIGTERM
    child = start("exit 3")
    assert child.wait(time.monotonic() + 30) and child.how_it_ended == "it ended with exit status 3"


def test_its_output_and_its_environment(start: Start) -> None:
    child = start("echo one; echo $NAME >&2; printf '\\377'")
    assert child.wait(time.monotonic() + 30)
    assert child.said() == ("the shell said: one", "the shell said: value", "the shell said: \\xff")
    assert child.said(1) == ("the shell said: \\xff",)


def test_what_cannot_be_started(tmp_path: Path) -> None:
    for command in ("./gone", str(tmp_path)):
        with pytest.raises(BadInput, match="cannot be started"):
            Child("it", [command], tmp_path, {}, tmp_path / "output")
