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

from fixtures.hearing import PATIENCE
from tests.live.answering import Answering, versions
from tests.live.faults import COMMANDS, EXTENT, Command, Patcher, Said, Scene, assert_at_liberty, at, sample

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def scene(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene.write(versions(cache_folder / "answer"), tmp_path_factory.mktemp("patches"))


def happening(program: Answering, way: str, news: int) -> Callable[[str, int], int]:
    """What happens at the operation, after a byte to ``news``.

    What it is told to do by itself, the program does as soon as its main thread runs.
    """
    stdin = program.stdin

    def leave(name: str, subject: int) -> int:
        os.write(news, b"!")
        if way == "kill":
            os.kill(program.pid, signal.SIGKILL)
        else:
            os.write(stdin, f"{way}\n".encode())
        return 0

    return leave


def came(news: int) -> bool:
    """Wait for the operation; false where the command has ended without it, or is stuck."""
    ready, _, _ = select.select([news], [], [], PATIENCE)
    byte = os.read(news, 1) if ready else b""
    os.close(news)
    return bool(byte)


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
    elif way.startswith("exec"):
        assert said.status == 0 or (said.status == 1 and "has executed another program" in said.error["what"]), said
        assert program.line() == "ready"
        assert_at_liberty(program.pid)
        program.answers(1)
        scene.assert_usable(program)
    elif way == "release":
        assert program.line() == "released"
        scene.assert_sound(program, command.after if said.status == 0 else command.before)
        scene.assert_usable(program)


def go_away(scene: Scene, command: Command, way: str, number: int) -> str:
    """The target goes away at one operation; return what livegraft said, or nothing where it made fewer operations."""
    with scene.start() as program:
        scene.succeed(program, *command.prepare)
        if way == "release":
            program.ask("hold")
        reading, writing = os.pipe()
        news, write_news = os.pipe()
        patcher = Patcher(
            scene.words(command.words, program.pid),
            at(number, happening(program, way, write_news)),
            after=lambda: (os.close(write_news), os.close(writing), os.read(reading, 1)),
        )
        os.close(reading)
        os.close(write_news)
        happened = came(news)
        if happened and way in ("kill", "exit"):
            said = end_of(program, patcher, writing)
        else:
            os.close(writing)
            said = patcher.wait()
        assert "bug in livegraft" not in str(said.error) and (said.status == 0 or said.error["why"]), said
        if not happened:
            scene.assert_sound(program, command.after if said.status == 0 else command.before)
            return ""
        judge(scene, program, command, way, said)
    return said.summary.replace(str(program.pid), "N")


def go_away_in_time(scene: Scene, command: Command, way: str, number: int) -> str:
    """As ``go_away``, at an earlier operation where there are fewer than those that were counted in another run.

    How many there are depends on how often livegraft has to look until nobody is in the way.
    """
    while not (said := go_away(scene, command, way, number)):
        assert number, "the command makes no operation"
        number //= 2
    return said


def test_an_operation_that_does_not_come_is_not_waited_for(scene: Scene) -> None:
    for way in ("exec", "kill"):
        assert go_away(scene, COMMANDS["apply"], way, 10**9) == ""


@pytest.mark.parametrize("way", ["kill", "exit", "exec", "exec by a thread", "release"])
@EXTENT
@pytest.mark.parametrize("name", ["apply", "revert"])
def test_the_target_goes_away_at_an_operation(scene: Scene, name: str, way: str, whole: bool) -> None:
    command = COMMANDS[name]
    count = len(scene.operations(command))
    ended = Counter(go_away_in_time(scene, command, way, number) for number in sample(range(count), 1, whole))
    print(f"{name}, {way}: {count} operations; {dict(ended)}")
