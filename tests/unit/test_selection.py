"""Which processes are meant, as a function of what /proc said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from patcher.targets.selection import By, Listed, Selection, choose

OWN = 99
MASTER = Listed(10, 1, 1000, "daemon", exe="/usr/sbin/daemon", unit="daemon.service")
WORKER = replace(MASTER, pid=12, parent=10, start_time=1200)
EARLY = replace(MASTER, pid=7, parent=10, start_time=1300)  # numbers begin anew when they are used up
GRANDCHILD = Listed(5, 7, 1400, "helper", exe="/usr/bin/helper", unit="daemon.service")
INIT = Listed(1, 0, 1, "init", exe="/sbin/init")
KERNEL = Listed(2, 0, 1, "daemon", kernel_thread=True)
SELF = replace(MASTER, pid=OWN, start_time=2000, unit="user.slice")
HIDDEN = replace(MASTER, pid=20, parent=1, exe=None, name="other", unit="")
ALL = (INIT, KERNEL, GRANDCHILD, EARLY, MASTER, WORKER, HIDDEN, SELF)


def pids(by: By, value: str, known: set[tuple[int, int]] | None = None, among: tuple[Listed, ...] = ALL) -> list[int]:
    return [item.pid for item in choose(Selection(by, value, True), among, OWN, known)]


@pytest.mark.parametrize(
    ("by", "value"),
    [(By.EXE, "/usr/sbin/daemon"), (By.EXE, "/usr/sbin/../sbin/daemon"), (By.NAME, "daemon")],
)
def test_parents_come_first_and_never_ourselves_nor_the_kernel(by: By, value: str) -> None:
    assert pids(by, value) == [10, 12, 7]


def test_the_executable_may_be_given_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/usr/sbin/daemon-that-is-gone")
    moved = replace(MASTER, exe=str(Path("/usr/sbin").resolve() / "daemon-that-is-gone"))
    assert pids(By.EXE, str(tmp_path / "link"), among=(moved,)) == [10]


def test_names_are_compared_as_far_as_the_kernel_keeps_them() -> None:
    long = replace(MASTER, name="systemd-journal")
    assert pids(By.NAME, "systemd-journald", among=(long,)) == [10]
    assert pids(By.NAME, "systemd", among=(long,)) == []


def test_units_with_and_without_their_kind() -> None:
    assert pids(By.UNIT, "daemon.service") == pids(By.UNIT, "daemon") == [10, 12, 7, 5]
    assert pids(By.UNIT, "daemo") == pids(By.UNIT, "") == []


def test_a_tree_is_what_descends_from_its_root() -> None:
    assert pids(By.TREE, "10") == [10, 12, 7, 5]
    assert pids(By.TREE, "7") == [7, 5]
    assert pids(By.TREE, "11") == []


def test_a_root_that_is_another_process_by_now_is_none() -> None:
    reused = replace(MASTER, start_time=5000)
    assert pids(By.TREE, "10", {MASTER.key}, (INIT, reused, WORKER)) == []


def test_children_that_lost_their_parent_still_belong_to_the_tree() -> None:
    orphan = replace(EARLY, parent=1)
    assert pids(By.TREE, "10", {MASTER.key, EARLY.key}, (INIT, orphan, GRANDCHILD)) == [7, 5]


def test_a_circle_in_a_list_that_is_not_of_one_moment() -> None:
    assert sorted(pids(By.TREE, "10", among=(replace(MASTER, parent=12), WORKER))) == [10, 12]
