"""The target executes another program just before a stop: the command says so at once, and does not wait for calm.

What was opened of the process belongs to the address space that it had. By that every stack of the new program is in no
mapping, and so looks live; to try again and again until the time is over would stop a program that is none of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elfdiff.errors import BadInput, LivegraftError
from patcher import liveness, pause
from patcher.memory import Memory
from patcher.stopping import SeizedProcess, seize
from patcher.transaction import apply, check, revert, watch_apply, watch_revert
from tests.live.answering import Answering, Versions, versions
from tests.live.faults import assert_at_liberty

pytestmark = pytest.mark.root

TIMEOUT = 5.0  # seconds; all of them pass where the execve goes unnoticed
MESSAGE = "has executed another program"

Act = Callable[[int, Versions], object]
ACTS: dict[str, Act] = {
    "apply": lambda pid, built: apply(pid, built.to[2], timeout=TIMEOUT),
    "check": lambda pid, built: check(pid, built.to[2], timeout=TIMEOUT),
    "blocking": lambda pid, built: watch_apply(pid, built.to[2], TIMEOUT),
    "revert": lambda pid, _: revert(pid, timeout=TIMEOUT),
    "blocking revert": lambda pid, _: watch_revert(pid, "", TIMEOUT),
}


@pytest.fixture(scope="module")
def built(cache_folder: Path) -> Versions:
    return versions(cache_folder / "answer")


@pytest.fixture
def program(built: Versions) -> Iterator[Answering]:
    with Answering(built.programs[1]) as running:
        yield running


def execute_before(program: Answering, monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Let the program execute itself before stop ``number``, counted from 0; return the list of all stops to come."""
    stops: list[int] = []

    def seize_later(pid: int) -> SeizedProcess:
        if len(stops) == number:
            assert program.ask("exec") == "ready"
        stops.append(pid)
        return seize(pid)

    for module in (pause, liveness):
        monkeypatch.setattr(module, "seize", seize_later)
    return stops


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("earlier_stops", [0, 1])
@pytest.mark.parametrize("name", ACTS)
def test_an_execve_before_a_stop_is_noticed_by_that_stop(
    program: Answering, built: Versions, monkeypatch: pytest.MonkeyPatch, name: str, earlier_stops: int
) -> None:
    if "revert" in name:
        apply(program.pid, built.to[2])
    if earlier_stops:
        program.ask("hold")  # so that there is a second stop
    stops = execute_before(program, monkeypatch, earlier_stops)
    with pytest.raises(LivegraftError, match=MESSAGE) as caught:
        ACTS[name](program.pid, built)
    assert caught.value.exit_code == 1 and str(program.pid) in caught.value.what and caught.value.next_step
    assert len(stops) == earlier_stops + 1
    assert_at_liberty(program.pid)
    program.answers(1)
    monkeypatch.undo()
    apply(program.pid, built.to[2])
    program.answers(2)


def test_an_address_space_that_has_ended_is_told_from_one_that_has_not(program: Answering) -> None:
    with Memory(program.pid) as memory:
        assert not memory.ended
        with pytest.raises(LivegraftError):
            memory.read(0, 1)  # what is not mapped is no sign of it
        program.ask("exec")
        assert memory.ended
        with pytest.raises(LivegraftError, match=MESSAGE):
            memory.require_same_program()


def test_a_process_that_has_exited_has_executed_nothing(built: Versions) -> None:
    with Answering(built.programs[1]) as program:
        memory = Memory(program.pid)
    with memory, pytest.raises(BadInput):
        memory.require_same_program()
