"""The command line: one message for each kind of bad input, the right exit status, one object of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elfdiff.errors import NotPermitted
from elfdiff.patches.patchfile import write_patch
from patcher.cli import VERBS
from patcher.commands import apply as apply_verb
from patcher.transactions.transaction import apply
from tests.live.answering import Answering, Versions, versions

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def built(cache_folder: Path) -> Versions:
    return versions(cache_folder / "answer")


@pytest.fixture(scope="module")
def patch(built: Versions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("patch") / "fix.patch"
    write_patch(built.to[2], path)
    return path


@pytest.fixture
def running(built: Versions) -> Iterator[Answering]:
    with Answering(built.programs[1]) as program:
        yield program


def livegraft(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "patcher.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def in_json(*words: object) -> dict[str, Any]:
    """The one object that a command prints; asserts that the exit status is the one that it says."""
    done = livegraft(*words, "--json")
    value = json.loads(done.stdout)
    assert value["schema"] == 1 and value["exit"]["code"] == done.returncode
    assert not done.stderr
    return dict(value)


def fails(code: int, name: str, *words: object) -> dict[str, Any]:
    """A command fails in this way in both dialects; returns what its error says."""
    value = in_json(*words)
    assert value["exit"] == {"code": code, "name": name}, value
    error = value["error"]
    assert error["what"] and not error["what"].endswith("\n")
    done = livegraft(*words)
    assert done.returncode == code and not done.stdout
    assert done.stderr.startswith(f"livegraft: {error['what']}\n")
    assert "Traceback" not in done.stderr
    if error["next"]:
        assert f"  next: {error['next']}\n" in done.stderr
    return dict(error)


def test_the_way_there_and_back(running: Answering, patch: Path) -> None:
    pid = ("--pid", running.pid)
    assert in_json("status", *pid)["patches"] == []
    checked = in_json("check", patch, *pid)
    assert checked["state"] == "applicable" and checked["pause_us"] > 0
    running.answers(1)

    applied = in_json("apply", patch, *pid)
    assert applied["state"] == "applied" and not applied["already"]
    assert applied["pause_us"] > 0 and applied["tries"] >= 1 and applied["mapped_bytes"] % 4096 == 0
    assert {item["name"] for item in applied["functions"]} == {"left", "right", "answer", "held"}
    running.answers(2)
    assert in_json("apply", patch, *pid)["already"]

    (carried,) = in_json("status", *pid)["patches"]
    assert carried["id"] == applied["id"] and carried["state"] == "applied"
    assert carried["redirected"] == carried["entries"] == 4
    assert carried["functions"] == applied["functions"]

    reverted = in_json("revert", *pid, applied["id"][:12])
    assert reverted["state"] == "reverted"
    running.answers(1)
    assert in_json("revert", *pid)["already"]


def test_text_for_people_is_on_stdout(running: Answering, patch: Path) -> None:
    for words in (["check", patch], ["apply", patch], ["status"], ["revert"]):
        done = livegraft(*words, "--pid", running.pid)
        assert done.returncode == 0 and not done.stderr
        assert done.stdout.startswith("answer (pid ")


def test_a_live_function_is_busy_and_named(running: Answering, patch: Path) -> None:
    running.ask("hold")
    value = in_json("apply", patch, "--pid", running.pid, "--timeout", "0.1")
    assert value["exit"] == {"code": 5, "name": "busy"}
    assert "held" in value["error"]["what"] and any("#1" in line for line in value["error"]["details"])
    running.answers(1)


def test_another_build_is_refused(built: Versions, patch: Path) -> None:
    with Answering(built.programs[3]) as program:
        error = fails(4, "refused", "apply", patch, "--pid", program.pid)
        assert built.to[2].old.build_id in error["why"]
        program.answers(3)


def test_processes_that_cannot_be_patched(running: Answering, patch: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert str(gone.pid) in fails(2, "bad-input", "apply", patch, "--pid", gone.pid)["what"]

    zombie = os.fork()
    if zombie == 0:
        os._exit(0)
    os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
    assert "reap" in fails(2, "bad-input", "apply", patch, "--pid", zombie)["why"]
    os.waitpid(zombie, 0)

    thread = max(int(name.name) for name in Path(f"/proc/{running.pid}/task").iterdir())
    assert f"thread of process {running.pid}" in fails(2, "bad-input", "revert", "--pid", thread)["why"]


def test_a_kernel_thread_is_no_target(patch: Path) -> None:
    if Path("/proc/2/comm").exists() and Path("/proc/2/comm").read_text() == "kthreadd\n":
        assert "kernel thread" in fails(2, "bad-input", "apply", patch, "--pid", 2)["why"]
    else:
        pytest.skip("no kernel thread is visible in this pid namespace")


def test_a_process_of_somebody_else_is_not_permitted(running: Answering, built: Versions) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setresuid(65534, 65534, 65534)
            apply(running.pid, built.to[2])
        except NotPermitted as error:
            status = 0 if error.next_step and "65534" in f"{error.what}{error.why}" else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    running.answers(1)


def test_our_own_process_is_no_target(patch: Path) -> None:
    # Only the command itself knows its pid, so it is run by an interpreter that gives it.
    code = "import os, sys; from patcher.cli import main; sys.exit(main([*sys.argv[1:], '--pid', str(os.getpid())]))"
    done = subprocess.run([sys.executable, "-c", code, "apply", patch], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "this very process" in done.stderr


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other", "missing", "folder"])
def test_a_file_that_is_no_patch(running: Answering, patch: Path, tmp_path: Path, damage: str) -> None:
    before = running.code(), running.maps
    good = patch.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    contents = {"empty": b"", "cut": good[: len(good) // 2], "flipped": bytes(flipped), "other": b"#!/bin/sh\n" * 99}
    path = tmp_path / "some.patch"
    if damage in contents:
        path.write_bytes(contents[damage])
    elif damage == "folder":
        path.mkdir()
    fails(2, "bad-input", "apply", path, "--pid", running.pid)
    assert (running.code(), running.maps) == before


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["bogus"],
        ["apply"],
        ["apply", "x"],
        ["apply", "x", "--pid", "-1"],
        ["apply", "x", "--pid", "0"],
        ["apply", "x", "--pid", "1e9"],
        ["apply", "x", "--pid", "99999999999"],
        ["apply", "x", "--pid", "1", "--timeout", "nan"],
        ["apply", "x", "--pid", "1", "--timeout", "-1"],
        ["revert", "xyz", "--pid", "1"],
        ["revert", "ab", "--pid", "1"],
        ["status"],
        ["status", "--p", "1"],
    ],
)
def test_wrong_usage(words: list[str]) -> None:
    error = fails(2, "bad-input", *words)
    assert error["next"]


def test_reverting_what_is_not_there(running: Answering, patch: Path) -> None:
    assert "carries no patch" in fails(2, "bad-input", "revert", "--pid", running.pid)["what"]
    livegraft("apply", patch, "--pid", running.pid)
    assert "carries no patch ffff0000" in fails(2, "bad-input", "revert", "ffff0000", "--pid", running.pid)["what"]
    running.answers(2)


def test_ctrl_c_while_waiting_undoes_the_preparation(running: Answering, patch: Path) -> None:
    running.ask("hold")
    before = running.maps, running.descriptors
    command = [sys.executable, "-m", "patcher.cli", "apply", patch, "--pid", str(running.pid), "--json"]
    with subprocess.Popen([*command, "--timeout", "60"], stdout=subprocess.PIPE, text=True) as process:
        waited = threading.Event()
        while running.patch_mappings < 3:  # until it has mapped the patch and waits for the function
            assert process.poll() is None
            waited.wait(0.01)
        process.terminate()
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert json.loads(out)["error"]["what"] == "interrupted"
    assert (running.maps, running.descriptors) == before
    running.answers(1)


def test_every_verb_has_help_and_the_table_says_what_its_module_says() -> None:
    assert apply_verb.__doc__ is not None
    whole = livegraft("--help").stdout
    for verb, line in VERBS.items():
        assert line in whole
        done = livegraft(verb, "--help")
        assert done.returncode == 0 and "--json" in done.stdout
        module = __import__(f"patcher.commands.{verb}", fromlist=[""])
        assert module.__doc__.splitlines()[0] == line


def test_help_loads_none_of_the_heavy_packages() -> None:
    code = (
        "import sys; from patcher.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'lief', 'elftools', 'capstone', 'keystone', 'ptrace'} & set(sys.modules)\n"
        "sys.exit(','.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_bug_is_one_line_and_the_traceback_comes_on_demand(patch: Path) -> None:
    code = (
        "import sys; import patcher.transactions.transaction as t; from patcher.cli import main\n"
        "def broken(*a, **k): raise KeyError('oops')\n"
        "t.apply = broken\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "apply", str(patch), "--pid", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "bug in livegraft" in done.stderr and "Traceback" not in done.stderr
    loud = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "LIVEGRAFT_DEBUG": "1"}
    )
    assert loud.returncode == 1 and "Traceback" in loud.stderr
