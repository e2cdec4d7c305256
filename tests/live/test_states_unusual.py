"""Threads in unusual states, through whole transactions."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from elfdiff.errors import Busy
from fixtures.tracees import state_of, wait_until
from patcher import seam
from patcher.pausing.conditions import Conditions
from patcher.process.memory import Memory
from patcher.process.proc import status, thread_ids
from patcher.records.record import State
from patcher.remote.borrowed import among
from patcher.remote.calls import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, RemoteCaller
from patcher.remote.descriptors import leaked_memory_files
from patcher.threads.tracees import release_abandoned
from patcher.transactions.inspection import inspect_process
from patcher.transactions.transaction import apply, check
from tests.live.answering import killed_at
from tests.live.reporting import Pair, Reporting, pair, reporting

pytestmark = pytest.mark.root

Start = Callable[[str], AbstractContextManager[Reporting]]


@pytest.fixture(scope="session")
def built(cache_folder: Path) -> Pair:
    return pair("unusual", cache_folder / "unusual")


@pytest.fixture
def start(built: Pair, tmp_path: Path) -> Start:
    return lambda state: reporting(built, tmp_path, state)


def states(pid: int) -> list[State]:
    return [item.record.state for item in inspect_process(pid).patches]


@pytest.mark.parametrize("state", ["lone", "headless"])
def test_a_process_whose_main_thread_has_ended_is_patched_like_any_other(start: Start, state: str) -> None:
    with start(state) as program:
        assert state_of(program.pid) == "Z"
        for _ in range(5):
            assert check(program.pid, program.patch).state is State.PREPARED
            program.there()
            assert states(program.pid) == [State.APPLIED]
            program.back()
            assert states(program.pid) == [State.REVERTED]


def files_of(program: Reporting) -> dict[str, str]:
    """The descriptors of the main thread. Asserts that the program's own files are as it wrote them."""
    found = {path.name: str(path.readlink()) for path in Path(f"/proc/{program.pid}/fd").iterdir()}
    files = [Path(path) for path in found.values() if Path(path).suffix[1:].isdecimal()]
    assert len(files) == 16
    assert all(path.read_text() == str(path) for path in files)
    return found


def test_descriptor_tables_of_other_threads_are_left_alone(start: Start) -> None:
    """The memory file of a patch is in one table only; the same number means the program's own files elsewhere."""
    with start("tables") as program:
        before = files_of(program)
        program.there()
        program.back()
        assert files_of(program) == before


def test_what_a_killed_patcher_left_open_is_closed_where_it_is(start: Start) -> None:
    with start("tables") as program:
        before = files_of(program)
        assert killed_at(0, lambda on_step: apply(program.pid, program.patch, on_step=on_step))
        (left,) = leaked_memory_files(program.pid)
        assert program.pid not in left.threads  # in the table of the other, who was asleep
        assert files_of(program) == before
        program.there()
        assert leaked_memory_files(program.pid) == ()
        assert files_of(program) == before


def test_threads_of_several_users_and_names(start: Start) -> None:
    with start("users") as program:
        others = [tid for tid in thread_ids(program.pid) if status(tid).uid >= 1000]
        assert len(others) == 4
        for chosen in others:
            # Whichever makes the system calls.
            with Memory(program.pid) as memory, RemoteCaller(program.pid, memory, candidates=among([chosen])) as caller:
                caller.munmap(caller.mmap(0, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS), 4096)
                assert caller.tid == chosen
        program.there()
        program.back()


@pytest.mark.parametrize("state", ["vfork", "fault"])
def test_a_thread_that_cannot_stop_is_named_and_delays_nobody(start: Start, state: str) -> None:
    with start(state) as program:
        with pytest.raises(Busy) as caught:
            apply(program.pid, program.patch, Conditions(timeout=0.2))
        assert "did not stop" in caught.value.what
        assert "waits in" in caught.value.details[0]
        stuck = int(caught.value.details[0].split()[1].rstrip(":"))
        assert all(status(tid).tracer_pid == 0 for tid in thread_ids(program.pid) if tid != stuck)
        assert states(program.pid) == []
        program.answers(1)
        stdin = program.torture.process.stdin
        assert stdin is not None
        stdin.write("x")
        stdin.flush()
        wait_until(lambda: release_abandoned() == 0, "the thread to come back")
        program.there()
        program.back()


def leaves_at(when: int, program: Reporting) -> seam.Observer:
    """Let the main thread end before operation ``when``; where it is stopped just then, it ends when it goes on."""
    operations = itertools.count()

    def observer(name: str, subject: int) -> int:
        del name, subject
        if next(operations) == when:
            stdin = program.torture.process.stdin
            assert stdin is not None
            stdin.write("x")
            stdin.flush()
            wait_until(lambda: state_of(program.pid) in "Zt", "the main thread to end")
        return 0

    return observer


def main_thread_leaves(start: Start, when: int) -> None:
    with start("leaving") as program:
        with seam.observe(leaves_at(when, program)):
            program.there()
        program.back()


@pytest.mark.parametrize("when", [0, 40, 120, 300, 380])
def test_the_main_thread_ends_during_a_transaction(start: Start, when: int) -> None:
    main_thread_leaves(start, when)


@pytest.mark.soak
def test_the_main_thread_ends_at_any_operation(start: Start) -> None:
    for when in random.Random(5).sample(range(450), int(os.environ.get("LIVEGRAFT_ROUNDS", "200"))):
        main_thread_leaves(start, when)
