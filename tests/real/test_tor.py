"""Tor, patched while streams go through a private network of it: Debian's, and two builds from Debian's source."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fixtures import recipes
from fixtures.debian import Unpacked
from fixtures.hearing import next_line
from fixtures.intact import altered_code
from fixtures.source import Built, Recipe
from patcher.records.record import State
from patcher.rehearsal.children import Child, wait_until
from patcher.rehearsal.file import Ready
from patcher.rehearsal.readiness import wait_until_ready
from patcher.transactions.inspection import inspect_process
from tests.conftest import Livegraft
from tests.real.examples import client, copied, passed

pytestmark = [pytest.mark.apt, pytest.mark.root, pytest.mark.long]

OLD, NEW = "VERBOSE_NAMES", "VERBOSE_NAMES EXTENDED_EVENTS"
NAMES = ("authority1", "authority2", "authority3", "relay", "relay2", "client")
START_SECONDS = 240.0


@pytest.fixture
def package(package_version: Callable[[str, str], Unpacked]) -> Unpacked:
    return package_version("tor", recipes.TOR.version)


@pytest.fixture
def folder(package: Unpacked) -> Iterator[Path]:
    """The example, without builds."""
    with copied("tor") as example:
        shutil.copy(package.file("usr/bin/tor-gencert"), example / "tor-gencert")
        for label in ("old", "new"):
            (example / label).mkdir()
        yield example


@pytest.fixture
def example(folder: Path, package: Unpacked) -> Path:
    """The new build is Debian's own, the old one a copy that has one name less in a string."""
    shutil.copy(package.file("usr/bin/tor"), folder / "new" / "tor")
    edit = [sys.executable, folder / "older.py", folder / "new" / "tor", folder / "old" / "tor"]
    subprocess.run(edit, check=True, timeout=START_SECONDS)
    return folder


@pytest.fixture
def from_source(folder: Path, source_pair: Callable[[Recipe], tuple[Built, Built]]) -> Path:
    """The old build is without the fix of TROVE-2026-022, in what unpacks all directory documents."""
    for label, build in zip(("old", "new"), source_pair(recipes.TOR), strict=True):
        shutil.copy(build.stripped("tor"), folder / label / "tor")
    return folder


@pytest.mark.parametrize("role", ["client", "relay"])
def test_rehearsal(example: Path, livegraft: Livegraft, role: str) -> None:
    said = passed(example / f"{role}.toml", livegraft)
    assert said["patch"]["summary"]["functions"] == 1


def test_the_whole_network_at_once(example: Path, livegraft: Livegraft, tmp_path: Path) -> None:
    """All six processes run the same file; each is patched in its turn, and no stream notices."""
    with network(example, livegraft, tmp_path) as (change, _):
        require_everywhere(tmp_path, OLD)
        for verb, expected in (("apply", NEW), ("revert", OLD), ("apply", NEW), ("revert", OLD)):
            change(verb)
            require_everywhere(tmp_path, expected)


def test_the_whole_network_gets_a_security_fix(from_source: Path, livegraft: Livegraft, tmp_path: Path) -> None:
    """New code unpacks a consensus that is made after the patch: the authorities vote every twenty seconds."""
    with network(from_source, livegraft, tmp_path) as (change, daemon):
        for verb, state in (("apply", State.APPLIED), ("revert", State.REVERTED)):
            pids = change(verb)
            for pid in pids:
                (patch,) = inspect_process(pid).patches
                assert patch.record.state is state
            before = consensus(tmp_path)
            deadline = time.monotonic() + START_SECONDS
            assert wait_until(lambda then=before: consensus(tmp_path) > then, deadline, daemon)  # type: ignore[misc]


@contextmanager
def network(example: Path, livegraft: Livegraft, folder: Path) -> Iterator[tuple[Callable[[str], list[int]], Child]]:
    """A network of the old build under load, all of whose streams must be served: what patches it, and its client."""
    livegraft("diff", example / "old" / "tor", example / "new" / "tor", "-o", folder / "patch")
    start = ["unshare", "--net", sys.executable, "start.py", "client"]
    command = [*start, str(example / "old" / "tor"), str(folder), str(example / "tor-gencert")]

    def change(verb: str) -> list[int]:
        patch = [folder / "patch"] if verb == "apply" else []
        words = [*patch, "--exe", example / "old" / "tor", "--all", "--atomic", "--json"]
        said = json.loads(livegraft(verb, *words).stdout)
        assert [item["result"] for item in said["processes"]] == ["done"] * len(NAMES)
        return [item["pid"] for item in said["processes"]]

    daemon = Child("tor", command, example, {}, folder / "output")
    try:
        ready = Ready(file=str(folder / "client" / "socks"))
        wait_until_ready(daemon, ready, START_SECONDS, time.monotonic() + START_SECONDS)
        with load(daemon.pid, example, folder) as streams:
            assert next_line(streams, patience=START_SECONDS) == "all streams were served"
            yield change, daemon
            streams.send_signal(signal.SIGTERM)
            assert " requests, 0 failed, " in next_line(streams)
            assert streams.wait(START_SECONDS) == 0
        assert not altered_code(daemon.pid)
    finally:
        daemon.end()


def consensus(folder: Path) -> str:
    """Since when the consensus is valid that the client has, in a form that can be compared."""
    control = client("tor").Control(folder / "client")
    since: str = control.info("consensus/valid-after")
    control.close()
    return since


def load(pid: int, example: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Streams through the network whose client is ``pid``."""
    command = ["nsenter", "--target", str(pid), "--net", "python3", str(example / "client.py"), "load", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})


def require_everywhere(folder: Path, expected: str) -> None:
    for name in NAMES:
        control = client("tor").Control(folder / name)
        assert control.info("features/names") == expected, name
        control.close()
