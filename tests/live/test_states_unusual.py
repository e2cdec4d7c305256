"""Threads in unusual states, through whole transactions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from fixtures.tracees import state_of
from patcher.inspection import inspect_process
from patcher.record import State
from patcher.transaction import check
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


def test_descriptor_tables_of_other_threads_are_left_alone(start: Start) -> None:
    """The memory file of a patch is in one table only; the same number means the program's own files elsewhere."""
    with start("tables") as program:
        folder = Path(f"/proc/{program.pid}/fd")
        before = {path.name: str(path.readlink()) for path in folder.iterdir()}
        program.there()
        program.back()
        assert {path.name: str(path.readlink()) for path in folder.iterdir()} == before
        files = [Path(path) for path in before.values() if Path(path).suffix[1:].isdecimal()]
        assert len(files) == 16
        assert all(path.read_text() == str(path) for path in files)
