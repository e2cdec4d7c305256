"""A program that is patched and reverted again and again: nothing grows, neither in it nor in the patcher.

Ten thousand cycles, or five times LIVEGRAFT_ROUNDS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from patcher.pausing.conditions import Conditions
from patcher.transactions.transaction import apply, revert
from tests.live.answering import Answering, Versions, versions

pytestmark = [pytest.mark.root, pytest.mark.soak]

CYCLES = 5 * int(os.environ.get("LIVEGRAFT_ROUNDS", "2000"))
FIRST = CYCLES // 4
"""Cycles before the first look: caches fill, and memory that was freed is kept by both C libraries. The patcher's grows
by 3 MB in the first 2,000 of 10,000, in steps of the arenas of Python's allocator, and by 32 KB in the next 4,000."""
PATIENT = Conditions(timeout=120)
"""Seconds for the functions to be idle: the threads of the program do nothing but call them."""
SLACK = 1 << 20
"""Bytes by which resident memory may differ: noise of the allocators. A leak of 100 bytes a cycle would show."""


@dataclass(frozen=True)
class Size:
    """What may grow: mappings and descriptors by number, resident memory in bytes."""

    mappings: int
    descriptors: int
    resident: int

    @classmethod
    def of(cls, pid: int) -> Size:
        folder = Path(f"/proc/{pid}")
        pages = int((folder / "statm").read_text().split()[1])
        lines = (folder / "maps").read_text().count("\n")
        return cls(lines, len(list((folder / "fd").iterdir())), pages * os.sysconf("SC_PAGE_SIZE"))


@pytest.fixture(scope="module")
def built(cache_folder: Path) -> Versions:
    return versions(cache_folder / "answer")


@pytest.fixture
def running(built: Versions) -> Iterator[Answering]:
    with Answering(built.programs[1]) as program:
        yield program


def test_cycles_of_apply_and_revert_grow_nothing(running: Answering, built: Versions) -> None:
    pids = {"target": running.pid, "patcher": os.getpid()}
    before: dict[str, Size] = {}
    for cycle in range(CYCLES + 1):
        apply(running.pid, built.to[2], PATIENT)
        if cycle % 100 == 0:
            running.answers(2)
        revert(running.pid, conditions=PATIENT)
        if cycle % 100 == 0:
            running.answers(1)
        if cycle == FIRST:
            before = {name: Size.of(pid) for name, pid in pids.items()}
        if cycle % (CYCLES // 10) == 0:
            print(f"{cycle}:", *(f"{name} {Size.of(pid)}" for name, pid in pids.items()), flush=True)
    for name, pid in pids.items():
        after = Size.of(pid)
        assert (after.descriptors, after.resident < before[name].resident + SLACK) == (before[name].descriptors, True)
    assert Size.of(running.pid).mappings == before["target"].mappings
    running.never_mixed()
