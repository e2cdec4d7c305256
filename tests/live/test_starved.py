"""A target that gets next to no processor: stops are given up again and again, and none of its threads notices.

A thread that must run before it can stop gets to it after more than the second that is waited for it. Then all others,
which have stopped in time, are let go with nothing done.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from elfdiff.errors import Busy
from patcher.pausing.conditions import Conditions
from patcher.process import proc
from patcher.transactions.transaction import apply, revert
from tests.live.answering import SPREAD
from tests.live.vigilant import Vigilant, unharmed, vigilant_versions

pytestmark = [pytest.mark.root, pytest.mark.soak]

ROUNDS = 12
PATIENT = Conditions(timeout=5)
LOWEST, HIGHEST = 19, -10


@pytest.fixture
def crowd() -> Iterator[None]:
    """Two busy processes on each processor, which are asked first."""
    busy = [
        subprocess.Popen(["nice", "-n", str(HIGHEST), "sh", "-c", f"while [ -d /proc/{os.getpid()} ]; do :; done"])
        for _ in range(2 * len(os.sched_getaffinity(0)))
    ]
    yield
    for process in busy:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.usefixtures("either", "crowd")
def test_nobody_notices_stops_that_are_given_up(cache_folder: Path, tmp_path: Path) -> None:
    built = vigilant_versions(cache_folder / "answer", SPREAD)
    ended: Counter[str] = Counter()
    with Vigilant(built.programs[1], tmp_path) as program:
        for tid in proc.thread_ids(program.pid):
            os.setpriority(os.PRIO_PROCESS, tid, LOWEST)
        applied = False
        for _ in range(ROUNDS):
            try:
                if applied:
                    revert(program.pid, conditions=PATIENT)
                else:
                    apply(program.pid, built.to[2], PATIENT)
            except Busy:
                ended["given up"] += 1
            else:
                applied = not applied
                ended["done"] += 1
            assert program.complaints == []
        unharmed(program, (), 0)
    print(dict(ended))
