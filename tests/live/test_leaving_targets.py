"""The target goes away at every operation: it is killed, exits, executes another program, or loses a thread.

Then livegraft says so and ends, nobody else is touched, and the parent of the target hears of its death even while
livegraft lives on. ``make soak`` goes through all operations; an ordinary run takes some of them, others each day.
"""

from __future__ import annotations

import os
import select
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.live.answering import Answering, versions
from tests.live.faults import COMMANDS, EXTENT, PATIENCE, Command, Patcher, Said, Scene, assert_at_liberty, at, sample

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def scene(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene.write(versions(cache_folder / "answer"), tmp_path_factory.mktemp("patches"))


def happening(program: Answering, way: str) -> Callable[[str, int], int]:
    """What happens at the operation; by itself the program obeys as soon as its main thread runs."""
    stdin = program.stdin

    def leave(name: str, subject: int) -> int:
        if way == "kill":
            os.kill(program.pid, signal.SIGKILL)
        else:
            os.write(stdin, f"{way}\n".encode())
        return 0

    return leave


def end_of(program: Answering, patcher: Patcher, linger: int) -> Said:
    """The death of the target is seen by its parent before livegraft, which waits for that, has ended."""
    handle = os.pidfd_open(program.pid)
    ended, _, _ = select.select([handle], [], [], PATIENCE)
    os.close(handle)
    os.close(linger)
    said = patcher.wait()
    assert ended, f"its death is held back: {said}"
    return said


def judge(scene: Scene, program: Answering, command: Command, way: str, said: Said) -> None:
    if said.status and way in ("kill", "exit"):
        assert said.status == 2 and str(program.pid) in said.error["what"], said
    elif way == "exec":
        assert program.line() == "ready"
        assert_at_liberty(program.pid)
        program.answers(1)
        scene.assert_usable(program)
    elif way == "release":
        assert program.line() == "released"
        scene.assert_sound(program, command.after if said.status == 0 else command.before)
        scene.assert_usable(program)


def go_away(scene: Scene, command: Command, way: str, number: int) -> str:
    """The target goes away at one operation; return what livegraft said."""
    with scene.start() as program:
        scene.succeed(program, *command.prepare)
        if way == "release":
            program.ask("hold")
        reading, writing = os.pipe()
        patcher = Patcher(
            scene.words(command.words, program.pid),
            at(number, happening(program, way)),
            after=lambda: (os.close(writing), os.read(reading, 1)),
        )
        os.close(reading)
        if way in ("kill", "exit"):
            said = end_of(program, patcher, writing)
        else:
            os.close(writing)
            said = patcher.wait()
        assert "bug in livegraft" not in str(said.error) and (said.status == 0 or said.error["why"]), said
        judge(scene, program, command, way, said)
    return said.summary.replace(str(program.pid), "N")


@pytest.mark.parametrize("way", ["kill", "exit", "exec", "release"])
@EXTENT
@pytest.mark.parametrize("name", ["apply", "revert"])
def test_the_target_goes_away_at_an_operation(scene: Scene, name: str, way: str, whole: bool) -> None:
    command = COMMANDS[name]
    count = len(scene.operations(command))
    ended = Counter(go_away(scene, command, way, number) for number in sample(range(count), 1, whole))
    print(f"{name}, {way}: {count} operations; {dict(ended)}")
