"""Signals to livegraft at every operation on a target: it finishes or rolls back, says which, and that is true.

``make soak`` goes through all operations; an ordinary run takes some of them, others each day.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elfdiff.errors import Interrupted
from fixtures.tracees import wait_until
from patcher import interruption, seam
from patcher.transactions import transaction
from tests.live.answering import versions
from tests.live.faults import BUSY, COMMANDS, EXTENT, Command, Patcher, Said, Scene, assert_at_liberty, at, run, sample

pytestmark = pytest.mark.root

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(scope="module")
def scene(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene.write(versions(cache_folder / "answer"), tmp_path_factory.mktemp("patches"))


def another_thread() -> None:
    """A thread that blocks no signal, as those of numpy's OpenBLAS: it takes what the main thread blocks."""
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()


def told_truth(command: Command, said: Said) -> int:
    """The version that must run after a command that was sent a signal, by what the command has said."""
    if said.status == 0:
        assert not said.error and said.json["state"] in ("applied", "reverted", "applicable"), said
        assert ("came too late" in said.stderr) == ("came_too_late" in said.json), said
        return command.after
    if said.status == BUSY:
        return command.before  # it had given up when the signal came, or had too few operations
    assert said.status == 1 and said.error["what"] == "interrupted", said
    assert "before anything was written" in said.error["why"] and not said.error["details"], said
    return command.before


def interrupt(scene: Scene, command: Command, number: int) -> str:
    """Send a signal to livegraft at one operation of a command; return how it ended."""
    which = ENDING[number % len(ENDING)]

    def send(name: str, subject: int) -> int:
        os.kill(os.getpid(), which)
        return 0

    with scene.start() as program:
        scene.succeed(program, *command.prepare)
        mapped = program.patch_mappings
        said = run(scene.words(command.words, program.pid), at(number, send), another_thread)
        after = told_truth(command, said)
        scene.assert_sound(program, after)
        if said.status:
            assert program.patch_mappings == mapped  # rolled back, whole
        scene.assert_usable(program)
    return "finished" if said.status == 0 else "rolled back"


@EXTENT
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_at_an_operation(scene: Scene, name: str, whole: bool) -> None:
    command = COMMANDS[name]
    count = len(scene.operations(command))
    ended = Counter(interrupt(scene, command, number) for number in sample(range(count), 2, whole))
    print(f"{name}: {count} operations; {dict(ended)}")


def own_group() -> None:
    """The kernel ignores Ctrl-Z in a process group that no shell could wake (setpgid(2), orphaned)."""
    os.setpgid(0, 0)
    another_thread()


def suspend(scene: Scene, command: Command, number: int) -> str:
    """Ctrl-Z at one operation: livegraft stops only where no thread of the target is held; then it goes on."""

    def send(name: str, subject: int) -> int:
        os.kill(os.getpid(), signal.SIGTSTP)
        return 0

    with scene.start() as program:
        scene.succeed(program, *command.prepare)
        patcher = Patcher(scene.words(command.words, program.pid), at(number, send), own_group)
        stopped = patcher.stopped_or_ended()
        if stopped:
            assert_at_liberty(program.pid)
            version = scene.version_in_force(program)  # the new one where Ctrl-Z came when all was written
            assert version in (command.before, command.after)
            program.answers(version)
            os.kill(patcher.pid, signal.SIGCONT)
        said = patcher.wait()
        assert said.status in (0, BUSY), said
        scene.assert_sound(program, command.before if said.status else command.after)
        scene.assert_usable(program)
    return "stopped" if stopped else "finished first"


@EXTENT
@pytest.mark.parametrize("name", ["apply", "revert"])
def test_ctrl_z_at_an_operation(scene: Scene, name: str, whole: bool) -> None:
    command = COMMANDS[name]
    count = len(scene.operations(command))
    ended = Counter(suspend(scene, command, number) for number in sample(range(count), 2, whole))
    print(f"{name}: {count} operations; {dict(ended)}")


def hold_up(scene: Scene, command: Command, number: int, kind: str) -> None:
    """livegraft is stopped, or slow, at one operation, wherever that is; it goes on as if nothing had been."""

    def be_late(name: str, subject: int) -> int:
        if kind == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            time.sleep(0.2 if kind == "slow" else 1.5)  # the second is longer than a stop may take
        return 0

    with scene.start() as program:
        scene.succeed(program, *command.prepare)
        patcher = Patcher(scene.words(command.words, program.pid), at(number, be_late))
        if kind == "stopped" and patcher.stopped_or_ended():  # a run may have fewer operations
            os.kill(patcher.pid, signal.SIGCONT)
        said = patcher.wait()
        assert said.status in (0, BUSY) and not said.stderr, said
        scene.assert_sound(program, command.before if said.status else command.after)
        scene.assert_usable(program)


@EXTENT
@pytest.mark.parametrize("kind", ["stopped", "slow", "very slow"])
def test_livegraft_is_held_up_at_an_operation(scene: Scene, kind: str, whole: bool) -> None:
    names = scene.operations(COMMANDS["apply"])
    for number in sample(range(len(names)), 1, whole):
        hold_up(scene, COMMANDS["apply"], number, kind)


def in_the_pause(happening: Callable[[], None]) -> seam.Observer:
    """Let it happen once, when all threads of the target are being stopped."""
    last = ""

    def observer(name: str, subject: int) -> int:
        nonlocal last
        if name == last == "INTERRUPT":
            happening()
            name = "done"
        last = name if last != "done" else last
        return 0

    return observer


def test_a_signal_in_the_pause_that_another_thread_takes(scene: Scene) -> None:
    """What numpy's threads did: the main thread blocks the signal, and its handler ran in it all the same."""

    def terminate() -> None:
        other = threading.enumerate()[1]
        assert other.ident is not None
        signal.pthread_kill(other.ident, signal.SIGTERM)
        # It takes it when it gets a processor, and by then the command could be over.
        taken = Path(f"/proc/self/task/{other.native_id}/status")
        wait_until(lambda: "SigPnd:\t0000000000000000" in taken.read_text(), "the signal to be taken")

    with scene.start() as program:
        said = run(scene.words(("apply", "2"), program.pid), in_the_pause(terminate), another_thread)
        scene.assert_sound(program, told_truth(COMMANDS["apply"], said))
        assert said.json["came_too_late"] == ["SIGTERM"]


def test_waiting_for_a_live_function_is_interrupted(scene: Scene) -> None:
    with scene.start() as program:
        program.ask("hold")
        count = 0

        def observer(name: str, subject: int) -> int:
            nonlocal count
            count += name == "SEIZE"
            if count == 50:  # some tries later
                os.kill(os.getpid(), signal.SIGTERM)
            return 0

        said = run(scene.words(("apply", "2"), program.pid), observer, another_thread)
        assert told_truth(COMMANDS["apply"], said) == 1
        scene.assert_sound(program, 1)
        assert program.patch_mappings == 0


def test_a_signal_that_is_ignored_changes_nothing(scene: Scene) -> None:
    def hang_up(name: str, subject: int) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    with scene.start() as program:
        words = scene.words(("apply", "2"), program.pid)
        said = run(words, hang_up, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN) and None)
        assert said.status == 0 and not said.stderr, said
        scene.assert_sound(program, 2)


@EXTENT
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_at_random_moments(scene: Scene, number: signal.Signals, whole: bool) -> None:
    """The command as people start it, with everything that it imports."""
    rounds = 150 if whole else 2
    chosen = random.Random(number)
    ended: Counter[str] = Counter()
    with scene.start() as program:
        version = 1
        for _ in range(rounds):
            words = ("apply", "2") if version == 1 else ("revert",)
            command = [sys.executable, "-m", "patcher.cli", *map(str, scene.words(words, program.pid)), "--json"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                time.sleep(chosen.uniform(0.05, 0.6))
                process.send_signal(number)
                out, _ = process.communicate(timeout=60)
            if process.returncode == 0:
                version = 3 - version
            ended[{0: "finished", 1: "rolled back"}.get(process.returncode, "not yet started")] += 1
            assert process.returncode in (0, 1, BUSY) or b'"exit"' not in out
            scene.assert_sound(program, version)
        scene.assert_usable(program)
    print(f"{number.name}: {dict(ended)}")


def test_a_library_user_gets_the_signal_after_all_is_undone(scene: Scene) -> None:
    handled: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: handled.append(number))
    try:
        with scene.start() as program:

            def terminate(name: str, subject: int) -> int:
                if name == "FILL":
                    os.kill(os.getpid(), signal.SIGTERM)
                return 0

            with seam.observe(terminate), pytest.raises(Interrupted, match="interrupted"):
                transaction.apply(program.pid, scene.built.to[2])
            assert set(handled) == {signal.SIGTERM}
            assert program.patch_mappings == 0
            scene.assert_sound(program, 1)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where the tests run in the background of a script, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_deferral_puts_every_handler_back() -> None:
    def handlers() -> list[object]:
        return [signal.getsignal(number) for number in (*interruption.ENDING, *interruption.STOPPING)]

    before = handlers()
    with pytest.raises(KeyboardInterrupt), interruption.deferred():
        with interruption.deferred():
            signal.raise_signal(signal.SIGINT)
        assert handlers() != before
        with pytest.raises(Interrupted, match="interrupted"):
            interruption.heed()
    assert handlers() == before
    interruption.heed()  # nothing is noted any more
