"""The target executes another program just before a stop: the command says so at once, and does not wait for calm.

What was opened of the process belongs to the address space that it had. By that every stack of the new program is in no
mapping, and so looks live; to try again and again until the time is over would stop a program that is none of ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elfdiff.errors import BadInput, LivegraftError
from fixtures.tracees import state_of, wait_until
from patcher.pausing import liveness, pause
from patcher.pausing.conditions import Conditions
from patcher.process.memory import Memory
from patcher.threads.stopping import SeizedProcess, seize
from patcher.transactions.transaction import apply, check, revert, watch_apply, watch_revert
from tests.live.answering import Answering, Versions, versions
from tests.live.faults import COMMANDS, Patcher, Scene, assert_at_liberty

pytestmark = pytest.mark.root

TIMEOUT = 5.0  # seconds; all of them pass where the execve goes unnoticed
PATIENT = Conditions(timeout=TIMEOUT)
MESSAGE = "has executed another program"

Act = Callable[[int, Versions], object]
ACTS: dict[str, Act] = {
    "apply": lambda pid, built: apply(pid, built.to[2], PATIENT),
    "check": lambda pid, built: check(pid, built.to[2], PATIENT),
    "blocking": lambda pid, built: watch_apply(pid, built.to[2], TIMEOUT),
    "revert": lambda pid, _: revert(pid, conditions=PATIENT),
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


@pytest.fixture(scope="module")
def scene(built: Versions, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene.write(built, tmp_path_factory.mktemp("patches"))


@pytest.mark.parametrize(
    ("command", "operation", "who"),
    [
        ("check", "SEIZE", "exec by a thread"),  # one of several that are seized is dead, and the next one executes
        ("revert", "SEIZE", "exec by a thread"),
        ("apply", "SETREGS", "exec"),  # the one that was to make a system call is dead
        ("apply", "SETREGS", "exec by a thread"),
    ],
)
def test_an_execve_that_waits_for_its_tracer_is_not_waited_for(
    scene: Scene, command: str, operation: str, who: str
) -> None:
    """It waits until a thread that it has killed is reaped by livegraft, and who seizes another one waits for it."""
    with scene.start() as program:
        scene.succeed(program, *COMMANDS[command].prepare)
        stdin = program.stdin
        held: list[int] = []  # but for the main thread
        told = False

        def observer(name: str, subject: int) -> int:
            nonlocal told
            if name == operation and subject != program.pid and held and not told:
                told = True
                os.write(stdin, f"{who}\n".encode())
                wait_until(lambda: state_of(held[0]) in ("Z", ""), "the execve to kill a thread")  # "": reaped already
            if name == "SEIZE" and subject != program.pid:
                held.append(subject)
            elif name == "DETACH" and subject in held:
                held.remove(subject)
            return 0

        said = Patcher(scene.words(COMMANDS[command].words, program.pid), observer).wait()
        assert said.status == 1 and MESSAGE in said.error["what"], said
        assert program.line() == "ready"
        assert_at_liberty(program.pid)
        scene.assert_usable(program)
