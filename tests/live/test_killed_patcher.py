"""kill -9 of the patcher at any moment: the target lives and answers, the next command finds its way (D9, D10).

``make soak`` runs 300 rounds; the round count of an ordinary run is smaller. A round forks a patcher, kills it after
a random part of the time that the operation takes, looks at the target, and carries on from whatever is there.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from elfdiff.diff import Options, diff
from elfdiff.patches.patchfile import write_patch
from elfdiff.patchobject import PatchObject
from fixtures.daemon import PROBES, Daemon, probe, run_kv
from fixtures.intact import altered_code, writable_and_executable
from fixtures.killing import forked, was_killed
from fixtures.load import Load
from patcher.pausing.conditions import Conditions
from patcher.process import proc
from patcher.records.record import State
from patcher.transactions import transaction
from patcher.transactions.inspection import inspect_process

pytestmark = pytest.mark.root

ROUNDS_PER_DAEMON = 4
ROUNDS = int(os.environ.get("LIVEGRAFT_ROUNDS", "60"))
PATIENT = Conditions(timeout=60)

Kv = Callable[..., Path]
Operation = Callable[[int, PatchObject], None]


def do_apply(pid: int, patch: PatchObject) -> None:
    transaction.apply(pid, patch, PATIENT)


def do_revert(pid: int, patch: PatchObject) -> None:
    transaction.revert(pid, conditions=PATIENT)


def seconds_of(work: Callable[[], None]) -> float:
    begin = time.monotonic()
    assert not was_killed(forked(work))
    return time.monotonic() - begin


def kill_within(work: Callable[[], None], seconds: float) -> float | None:
    """Run the work in a child and kill it after a random part of ``seconds``; if it was done before, that part."""
    child = forked(work)
    part = random.uniform(0, seconds)
    time.sleep(part)
    os.kill(child, signal.SIGKILL)
    return None if was_killed(child) else part


def state_of(pid: int) -> State | None:
    found = inspect_process(pid).patches
    active = [one.record.state for one in found if one.record.state not in (State.REVERTED, State.REPLACED)]
    assert len(active) <= 1, "one patch object, one record"
    return active[0] if active else None


def assert_at_liberty(pid: int) -> None:
    """No thread of the target is traced or stopped."""
    for tid in proc.thread_ids(pid):
        fields = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{pid}/task/{tid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert fields["TracerPid"] == "0"
        assert fields["State"][0] not in "tT", fields["State"]


def find_the_way(daemon: Daemon, patch: PatchObject, seen: State | None) -> None:
    """Whatever the dead patcher left: the next command works, and does what it says."""
    before = State.APPLIED if seen is State.APPLIED else None
    if random.random() < 0.5:
        do_apply(daemon.pid, patch)
        assert state_of(daemon.pid) is State.APPLIED
        assert probe(daemon.port) == PROBES[2]
        return
    if before or seen in (State.APPLYING, State.REVERTING):
        do_revert(daemon.pid, patch)
    assert state_of(daemon.pid) in (None, State.PREPARED)
    assert probe(daemon.port) == PROBES[1]


def measure(program: Path, patch: PatchObject) -> dict[str, float]:
    """Seconds of each operation on a process of its own: the first apply maps the patch, later ones need not."""
    with run_kv(program) as daemon, Load(daemon.port):
        pid = daemon.pid
        return {
            name: seconds_of(lambda work=work: work(pid, patch))  # type: ignore[misc]
            for name, work in (("first apply", do_apply), ("revert", do_revert), ("apply", do_apply))
        }


def strike(daemon: Daemon, patch: PatchObject, spans: dict[str, float], *, first: bool) -> str:
    """One round; returns what was done and what it left behind.

    Where it was done in time, less time is given from then on: the machine may have been slower when it was measured.
    """
    pid = daemon.pid
    name = "revert" if state_of(pid) is State.APPLIED else "first apply" if first else "apply"
    work = do_revert if name == "revert" else do_apply
    enough = kill_within(lambda: work(pid, patch), spans[name])
    if enough is not None:
        spans[name] = (spans[name] + enough) / 2
    assert_at_liberty(pid)
    seen = state_of(pid)
    find_the_way(daemon, patch, seen)
    return f"{name} {'killed' if enough is None else 'done'}: {seen.name.lower() if seen else 'nothing'}"


def test_a_killed_patcher_costs_nothing(kv: Kv, tmp_path: Path) -> None:
    patch = write_patch(diff(kv(1), kv(2), Options()), tmp_path / "fix")
    spans = measure(kv(1), patch)
    left: Counter[str] = Counter()
    served = 0
    for _ in range(max(1, ROUNDS // ROUNDS_PER_DAEMON)):
        with run_kv(kv(1)) as daemon, Load(daemon.port) as load:
            pid = daemon.pid
            for number in range(ROUNDS_PER_DAEMON):
                left[strike(daemon, patch, spans, first=number == 0)] += 1
            if state_of(pid) is State.APPLIED:
                do_revert(pid, patch)
            load.more(1000)
            assert probe(daemon.port) == PROBES[1]
            assert altered_code(pid) == [], dict(left)
            assert writable_and_executable(pid) == []
            assert_at_liberty(pid)
            report = load.stop()
        assert report.failed == 0
        assert report.reconnects == 0
        served += report.served
    kills = sum(count for what, count in left.items() if " killed" in what)
    print(f"{left.total()} rounds, {kills} killed, no death; {served} requests served, 0 failed; {dict(left)}")
    assert kills > left.total() // 4
