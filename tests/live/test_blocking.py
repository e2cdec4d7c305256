"""What is in the way of a patch: said of threads that are known to be in a function, and of a process that is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elfdiff.errors import Busy
from elfdiff.patches.patchfile import read_patch, write_patch
from fixtures.intact import altered_code
from patcher.cli import main
from patcher.pausing import liveness
from patcher.pausing.conditions import Conditions
from patcher.process.proc import thread_ids
from patcher.transactions.transaction import apply, check, watch_apply, watch_revert
from tests.live.answering import Answering, Versions, versions

pytestmark = pytest.mark.root

LOOKS = 4


@pytest.fixture(scope="module")
def built(cache_folder: Path) -> Versions:
    return versions(cache_folder / "answer")


@pytest.fixture
def running(built: Versions) -> Iterator[Answering]:
    with Answering(built.programs[1]) as program:
        yield program


def held(program: Answering) -> int:
    """Let a thread enter the function and stay there; the thread."""
    before = set(thread_ids(program.pid))
    program.ask("hold")
    (tid,) = set(thread_ids(program.pid)) - before
    return tid


def test_a_thread_that_stays_is_seen_in_every_look_and_nothing_is_changed(running: Answering, built: Versions) -> None:
    tid = held(running)
    before = running.code(), running.maps, running.descriptors
    watched = watch_apply(running.pid, built.to[2], 0.3)
    assert watched is not None
    (found,) = [item for item in watched.now if item.tid == tid]
    assert (found.function, found.certain, found.first, found.looks) == ("held", True, 1, watched.looks)
    assert found.thread == "answer" and any("held" in frame for frame in found.stack)
    assert "held" not in watched.never_live and watched.quiescent == 0 and watched.waiting == ""
    assert (running.code(), running.maps, running.descriptors) == before
    running.ask("release")
    running.answers(1)


def test_one_that_came_later_is_told_from_one_that_was_there(
    running: Answering, built: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def before_a_look() -> None:
        nonlocal looks
        looks += 1
        if looks == 2:
            running.ask("hold")
        if looks == LOOKS:
            monkeypatch.setattr(liveness.random, "uniform", lambda *_: 1e9)  # there is no time for another one

    monkeypatch.setattr(liveness, "heed", before_a_look)
    watched = watch_apply(running.pid, built.to[2], 100.0)
    assert watched is not None and watched.looks == looks == LOOKS
    (found,) = [item for item in watched.now if item.function == "held"]
    assert (found.first, found.last, found.looks) == (2, looks, looks - 1)
    assert 0 < found.age < watched.seconds


def test_what_has_gone_is_not_in_the_way_now(
    running: Answering, built: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.ask("hold")
    looks = 0

    def before_a_look() -> None:
        nonlocal looks
        looks += 1
        if looks == 2:
            running.ask("release")
        if looks == LOOKS:
            monkeypatch.setattr(liveness.random, "uniform", lambda *_: 1e9)

    monkeypatch.setattr(liveness, "heed", before_a_look)
    watched = watch_apply(running.pid, built.to[2], 100.0)
    assert watched is not None
    (found,) = [item for item in watched.activations if item.function == "held"]
    assert (found.first, found.last, found.looks) == (1, 1, 1)
    assert found not in watched.now


def test_a_revert_is_asked_about_as_well(running: Answering, built: Versions) -> None:
    apply(running.pid, built.to[2])
    tid = held(running)
    watched = watch_revert(running.pid, "", 0.0)
    assert watched is not None and watched.looks == 1
    (found,) = [item for item in watched.now if item.tid == tid]
    assert found.function.startswith("held (patch ")
    assert "held" not in watched.never_live
    running.ask("release")
    running.answers(2)


def test_what_is_done_already_has_nothing_in_the_way(running: Answering, built: Versions) -> None:
    apply(running.pid, built.to[2])
    assert watch_apply(running.pid, built.to[2], 0.0) is None


def test_busy_points_to_it(running: Answering, built: Versions) -> None:
    running.ask("hold")
    with pytest.raises(Busy) as caught:
        check(running.pid, built.to[2], Conditions(timeout=0.05))
    assert f"livegraft blocking PATCH --pid {running.pid}" in caught.value.next_step


def test_the_command_says_it_and_its_exit_status_does(
    built: Versions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "fix.patch"
    write_patch(built.to[3], file)
    with Answering(built.programs[1]) as program:
        tid = held(program)
        words = ["blocking", str(file), "--pid", str(program.pid), "--for", "0.1"]
        said: dict[str, Any] = {"error": "none yet"}
        while "error" in said:
            assert main([*words, "--json"]) == 5
            said = json.loads(capsys.readouterr().out)
        assert said["exit"] == {"code": 5, "name": "busy"} and said["waits_for_returns"]
        (found,) = [item for item in said["live"] if item["tid"] == tid]
        assert found["function"] == "held" and found["from_the_start"] and found["looks"] == said["looks"]
        text = ""
        while not text:  # on a busy machine a thread may not stop in time, which is Busy as well
            assert main(words) == 5
            text = capsys.readouterr().out
        assert f"thread {tid} (answer) is in held, since before the first look" in text
        assert "in every look" in text
        program.ask("release")
        assert not altered_code(program.pid)


def test_the_exit_status_is_0_where_nothing_is_in_the_way(
    running: Answering, built: Versions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "fix.patch"
    write_patch(built.to[2], file)
    apply(running.pid, read_patch(file))
    assert main(["blocking", str(file), "--pid", str(running.pid)]) == 0
    assert main(["blocking", "--pid", str(running.pid)]) == 2
    assert main(["blocking", str(file), "--revert", "--pid", str(running.pid)]) == 2
    assert "--revert" in capsys.readouterr().err
