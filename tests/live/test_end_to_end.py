"""The whole way on kv under load: diff, apply, status, revert, by the command line, for every kind of build."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fixtures.build import DEFAULT, Variant, matrix
from fixtures.daemon import PROBES, Daemon, KvClient, probe, run_kv
from fixtures.intact import altered_code, writable_and_executable
from fixtures.load import Load
from tests.conftest import Livegraft

pytestmark = pytest.mark.root

Kv = Callable[..., Path]
TIMEOUT = ("--timeout", 60)
RATE = 3000.0
"""Batches a second: every worker is busy now and then, and a processor is left for the tool."""


def states(livegraft: Livegraft, pid: int) -> list[str]:
    """The states of all patches that the process knows of, those that were taken back left out."""
    patches: list[dict[str, Any]] = livegraft("status", "--pid", pid, "--json").json["patches"]
    return [one["state"] for one in patches if one["state"] not in ("reverted", "replaced")]


def make(livegraft: Livegraft, kv: Kv, versions: tuple[int, int], folder: Path, variant: Variant = DEFAULT) -> Path:
    patch = folder / f"{versions[0]}-{versions[1]}.patch"
    livegraft("diff", kv(versions[0], variant), kv(versions[1], variant), "-o", patch)
    return patch


def interrupted(daemon: Daemon) -> str:
    """What STATS says of system calls that ended with EINTR."""
    with KvClient(daemon.port) as client:
        return client.ask("STATS").split()[2]


EVERY_BUILD = [
    pytest.param(
        replace(variant, stripped=stripped), marks=() if number % 2 == stripped else pytest.mark.matrix,
    )
    for number, variant in enumerate(matrix())
    for stripped in (True, False)
]
"""Of each two that differ in their symbols alone, one in turn is left to ``make matrix``."""


@pytest.mark.parametrize("variant", EVERY_BUILD, ids=lambda variant: variant.name)
def test_a_fix_comes_and_goes_under_load(
    variant: Variant, kv: Kv, livegraft: Livegraft, tmp_path: Path
) -> None:
    patch = make(livegraft, kv, (1, 2), tmp_path, variant)
    with run_kv(kv(1, variant)) as daemon, Load(daemon.port, rate=RATE) as load:
        assert probe(daemon.port) == PROBES[1]
        assert livegraft("apply", patch, "--pid", daemon.pid, "--json", *TIMEOUT).json["state"] == "applied"
        load.more(2000)
        assert probe(daemon.port) == PROBES[2]
        assert altered_code(daemon.pid) != []
        livegraft("revert", "--pid", daemon.pid)
        load.more(2000)
        assert probe(daemon.port) == PROBES[1]
        assert altered_code(daemon.pid) == []
        assert writable_and_executable(daemon.pid) == []
        report = load.stop()
        assert interrupted(daemon) == "interrupted=0"
    assert (report.failed, report.reconnects, report.failures) == (0, 0, ())


def test_a_check_says_what_apply_would_do_and_does_nothing(kv: Kv, livegraft: Livegraft, tmp_path: Path) -> None:
    patch = make(livegraft, kv, (1, 2), tmp_path)
    with run_kv(kv(1)) as daemon:
        livegraft("check", patch, "--pid", daemon.pid)
        assert probe(daemon.port) == PROBES[1]
        assert altered_code(daemon.pid) == []
        assert states(livegraft, daemon.pid) == []


def test_status_follows(kv: Kv, livegraft: Livegraft, tmp_path: Path) -> None:
    patch = make(livegraft, kv, (1, 2), tmp_path)
    with run_kv(kv(1)) as daemon:
        assert states(livegraft, daemon.pid) == []
        livegraft("apply", patch, "--pid", daemon.pid, *TIMEOUT)
        assert states(livegraft, daemon.pid) == ["applied"]
        livegraft("revert", "--pid", daemon.pid)
        assert states(livegraft, daemon.pid) == []


def test_a_later_patch_replaces_an_earlier_one(kv: Kv, livegraft: Livegraft, tmp_path: Path) -> None:
    first, second = (make(livegraft, kv, versions, tmp_path) for versions in ((1, 2), (1, 3)))
    with run_kv(kv(1)) as daemon, Load(daemon.port, rate=RATE) as load:
        livegraft("apply", first, "--pid", daemon.pid, *TIMEOUT)
        assert probe(daemon.port) == PROBES[2]
        livegraft("apply", second, "--pid", daemon.pid, *TIMEOUT)
        load.more(1000)
        assert probe(daemon.port) == PROBES[3]
        assert states(livegraft, daemon.pid) == ["applied"]
        livegraft("revert", "--pid", daemon.pid)
        load.more(1000)
        assert probe(daemon.port) == PROBES[1]
        assert altered_code(daemon.pid) == []
        assert load.stop().failed == 0


def test_a_patch_that_is_in_stays_in(kv: Kv, livegraft: Livegraft, tmp_path: Path) -> None:
    patch = make(livegraft, kv, (1, 2), tmp_path)
    with run_kv(kv(1)) as daemon:
        assert not livegraft("apply", patch, "--pid", daemon.pid, "--json", *TIMEOUT).json["already"]
        assert livegraft("apply", patch, "--pid", daemon.pid, "--json", *TIMEOUT).json["already"]
        assert probe(daemon.port) == PROBES[2]


def test_a_patch_for_another_build_is_refused(kv: Kv, livegraft: Livegraft, tmp_path: Path) -> None:
    patch = make(livegraft, kv, (1, 2), tmp_path)
    with run_kv(kv(3)) as daemon:
        livegraft("apply", patch, "--pid", daemon.pid, status=4)
        assert probe(daemon.port) == PROBES[3]
        assert altered_code(daemon.pid) == []


@pytest.mark.parametrize("variant", [DEFAULT, Variant(debug=True, stripped=False)], ids=lambda one: one.name)
def test_a_changed_layout_is_refused(variant: Variant, kv: Kv, livegraft: Livegraft, tmp_path: Path) -> None:
    patch = tmp_path / "layout.patch"
    livegraft("diff", kv(3, variant), kv(4, variant), "-o", patch, status=4)
    assert not patch.exists()


def test_the_same_build_has_nothing_to_patch(kv: Kv, livegraft: Livegraft, tmp_path: Path) -> None:
    livegraft("diff", kv(1), kv(1), "-o", tmp_path / "none.patch", status=3)
    assert list(tmp_path.iterdir()) == []


def test_a_function_that_stays_live_is_busy(kv: Kv, livegraft: Livegraft, tmp_path: Path) -> None:
    """HOLD keeps a changed function on a worker's stack; the same patch goes in when it has returned."""
    patch = make(livegraft, kv, (1, 2), tmp_path)
    with run_kv(kv(1), threads=8) as daemon, KvClient(daemon.port) as held, KvClient(daemon.port) as client:
        held.send("HOLD")
        wait_until_held(daemon)
        livegraft("apply", patch, "--pid", daemon.pid, "--timeout", 1, status=5)
        assert altered_code(daemon.pid) == []
        assert probe(daemon.port) == PROBES[1]
        assert client.ask("RELEASE") == "+OK"
        assert held.receive() == "+OK"
        livegraft("apply", patch, "--pid", daemon.pid, *TIMEOUT)
        assert probe(daemon.port) == PROBES[2]


def wait_until_held(daemon: Daemon) -> None:
    """Until a thread is in futex (system call 202), as proc_pid_syscall(5) tells: idle workers are not."""
    tasks = Path(f"/proc/{daemon.pid}/task")
    while not any((task / "syscall").read_text().startswith("202 ") for task in tasks.iterdir()):
        assert daemon.process.poll() is None
