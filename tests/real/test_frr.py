"""FRR's zebra and ospfd, built twice: two routers in network namespaces keep their routes while they are patched."""

from __future__ import annotations

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
from fixtures.source import Built, Recipe
from patcher.rehearsal.children import Child, tail, wait_until
from patcher.rehearsal.file import Ready
from patcher.rehearsal.readiness import wait_until_ready
from tests.conftest import ROOT, Livegraft
from tests.real.examples import copied, passed

pytestmark = [pytest.mark.apt, pytest.mark.root, pytest.mark.long]

SECONDS = 120.0
DEBUG = "debug ospf packet ls-update recv detail"
SHOWN = "Extended Link TLV: Length 12"
"""What the fixed ospfd writes to its log of the packet by which the other one dies."""
Pair = Callable[[Recipe], tuple[Built, Built]]


@pytest.fixture
def example(package_version: Callable[[str, str], Unpacked], source_pair: Pair) -> Iterator[Path]:
    """With Debian's vtysh, which is not built: its list of commands comes from all of FRR."""
    builds = source_pair(recipes.FRR)
    vtysh = package_version("frr", recipes.FRR.version).file("usr/bin/vtysh")
    with copied("frr") as example:
        shutil.copy(vtysh, example / "vtysh")
        for label, build in zip(("old", "new"), builds, strict=True):
            (example / label).mkdir()
            for name in ("zebra", "ospfd", "libfrr.so.0"):
                shutil.copy(build.stripped(name), example / label / name)
        yield example


def test_zebra(example: Path, livegraft: Livegraft) -> None:
    said = passed(example / "zebra.toml", livegraft)
    assert said["patch"]["summary"]["functions"] == 1


def test_ospfd(example: Path, livegraft: Livegraft) -> None:
    shutil.copytree(example / "new", example / "older")
    edit = [sys.executable, example / "older.py", example / "new" / "ospfd", example / "older" / "ospfd"]
    subprocess.run(edit, check=True, timeout=SECONDS)
    said = passed(example / "ospfd.toml", livegraft)
    assert said["patch"]["summary"]["functions"] == 1


class Routers:
    """Two routers of one build; ospfd of the first one is ``pid``."""

    def __init__(self, example: Path, label: str, folder: Path) -> None:
        self._example = example
        self._libraries = example / label
        self.folder = folder
        command = ["sh", "start.sh", "ospfd", str(example / label / "ospfd"), str(folder)]
        self.daemon = Child("ospfd", command, example, {}, folder / "output")
        self.pid = self.daemon.pid

    def wait_until_ready(self) -> None:
        ready = Ready(file=str(self.folder / "first" / "ospfd.vty"))
        wait_until_ready(self.daemon, ready, SECONDS, time.monotonic() + SECONDS)

    def client(self, *words: object) -> list[str]:
        """The command that is the example's client, in the namespaces of the first router."""
        inside = ["nsenter", "--target", str(self.pid), "--net", "--mount", "env", f"LD_LIBRARY_PATH={self._libraries}"]
        return [*inside, sys.executable, str(self._example / "client.py"), *map(str, words)]

    def ask(self, command: str) -> str:
        words = self.client("ask", self._example / "vtysh", self.folder, command)
        return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, timeout=SECONDS).stdout

    def load(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.client("load", self._example / "vtysh", self.folder), stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip

    def attack(self) -> None:
        """The other router sends the packet of CVE-2025-61099 and its like."""
        second = (self.folder / "second" / "zebra.pid").read_text().strip()
        sender = [sys.executable, "-m", "fixtures.lsupdate", "10.9.0.2"]
        subprocess.run(["nsenter", "--target", second, "--net", *sender], check=True, timeout=SECONDS, cwd=ROOT)

    def log(self) -> str:
        return tail(self.daemon.output)

    def died(self) -> bool:
        return self.daemon.wait(time.monotonic() + SECONDS) and self.daemon.status in (-signal.SIGABRT, -signal.SIGSEGV)


@contextmanager
def routers(example: Path, label: str) -> Iterator[Routers]:
    """With the old or the new build."""
    folder = example / "run"
    folder.mkdir()
    pair = Routers(example, label, folder)
    try:
        pair.wait_until_ready()
        yield pair
    finally:
        pair.daemon.end()


def test_ospfd_dies_of_a_packet_without_the_fix(example: Path) -> None:
    """CVE-2025-61099 and its like."""
    with routers(example, "old") as pair:
        pair.ask(DEBUG)
        pair.attack()
        assert pair.died(), pair.log()


def test_ospfd_lives_on_with_the_fix(example: Path) -> None:
    with routers(example, "new") as pair, pair.load() as load:
        assert next_line(load) == "a whole round was served"
        pair.ask(DEBUG)
        pair.attack()
        wait_until(lambda: SHOWN in pair.log(), time.monotonic() + SECONDS, pair.daemon)
        assert SHOWN in pair.log()
        assert "Full/" in pair.ask("show ip ospf neighbor")
        load.send_signal(signal.SIGTERM)
        assert " requests, 0 failed, " in next_line(load)
        assert load.wait(SECONDS) == 0


def test_the_fix_of_ospfd_is_refused(example: Path, livegraft: Livegraft, tmp_path: Path) -> None:
    """It writes to the log in places where nothing was written before. Each such place has an object of its own in one
    array, from which the program has made others when it started; those of the patch would be missing there.
    """
    said = livegraft("diff", example / "old" / "ospfd", example / "new" / "ospfd", "-o", tmp_path / "patch", status=4)
    assert "unpinned-address: " in said.stderr and "initial-value: " in said.stderr
    assert not (tmp_path / "patch").exists()
