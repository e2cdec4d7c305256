"""Debian's tor, patched while streams go through a private network of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fixtures import recipes
from fixtures.debian import Unpacked
from fixtures.hearing import next_line
from fixtures.intact import altered_code
from patcher.children import Child
from patcher.readiness import wait_until_ready
from patcher.rehearsalfile import Ready
from tests.conftest import Livegraft
from tests.real.examples import client, copied, passed

pytestmark = [pytest.mark.apt, pytest.mark.root, pytest.mark.long]

OLD, NEW = "VERBOSE_NAMES", "VERBOSE_NAMES EXTENDED_EVENTS"
NAMES = ("authority1", "authority2", "authority3", "relay", "relay2", "client")
START_SECONDS = 240.0


@pytest.fixture
def example(package_version: Callable[[str, str], Unpacked]) -> Iterator[Path]:
    """The new build is Debian's own, the old one a copy that has one name less in a string."""
    package = package_version("tor", recipes.TOR.version)
    with copied("tor") as example:
        shutil.copy(package.file("usr/bin/tor-gencert"), example / "tor-gencert")
        for label in ("old", "new"):
            (example / label).mkdir()
        shutil.copy(package.file("usr/bin/tor"), example / "new" / "tor")
        edit = [sys.executable, example / "older.py", example / "new" / "tor", example / "old" / "tor"]
        subprocess.run(edit, check=True, timeout=START_SECONDS)
        yield example


@pytest.mark.parametrize("role", ["client", "relay"])
def test_rehearsal(example: Path, livegraft: Livegraft, role: str) -> None:
    said = passed(example / f"{role}.toml", livegraft)
    assert said["patch"]["summary"]["functions"] == 1


def test_the_whole_network_at_once(example: Path, livegraft: Livegraft, tmp_path: Path) -> None:
    """All six processes run the same file; each is patched in its turn, and no stream notices."""
    livegraft("diff", example / "old" / "tor", example / "new" / "tor", "-o", tmp_path / "patch")
    start = ["unshare", "--net", sys.executable, "start.py", "client"]
    command = [*start, str(example / "old" / "tor"), str(tmp_path), str(example / "tor-gencert")]
    daemon = Child("tor", command, example, {}, tmp_path / "output")
    try:
        ready = Ready(file=str(tmp_path / "client" / "socks"))
        wait_until_ready(daemon, ready, START_SECONDS, time.monotonic() + START_SECONDS)
        with load(daemon.pid, example, tmp_path) as streams:
            assert next_line(streams, patience=START_SECONDS) == "all streams were served"
            require_everywhere(tmp_path, OLD)
            for verb, expected in (("apply", NEW), ("revert", OLD), ("apply", NEW), ("revert", OLD)):
                patch = [tmp_path / "patch"] if verb == "apply" else []
                words = [*patch, "--exe", example / "old" / "tor", "--all", "--atomic", "--json"]
                said = json.loads(livegraft(verb, *words).stdout)
                assert [item["result"] for item in said["processes"]] == ["done"] * len(NAMES)
                require_everywhere(tmp_path, expected)
            streams.send_signal(signal.SIGTERM)
            assert " requests, 0 failed, " in next_line(streams)
            assert streams.wait(START_SECONDS) == 0
        assert not altered_code(daemon.pid)
    finally:
        daemon.end()


def load(pid: int, example: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Streams through the network whose client is ``pid``."""
    command = ["nsenter", "--target", str(pid), "--net", "python3", str(example / "client.py"), "load", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})


def require_everywhere(folder: Path, expected: str) -> None:
    for name in NAMES:
        control = client("tor").Control(folder / name)
        assert control.info("features/names") == expected, name
        control.close()
