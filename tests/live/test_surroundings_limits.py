"""Targets at their limits, in a crowded address space, frozen or throttled: patched or refused by name."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from elfdiff.errors import Busy, Refused
from fixtures.tracees import wait_until
from patcher import seam
from patcher.pausing.conditions import Conditions
from patcher.process.surroundings import frozen_by, limits
from patcher.remote import borrowed
from patcher.transactions.transaction import apply, revert
from tests.live.answering import Answering, Versions
from tests.live.surroundings import at_liberty, enter, in_child, refused, surrounded, there_and_back

pytestmark = pytest.mark.root


@pytest.fixture(scope="session")
def built(cache_folder: Path) -> Versions:
    return surrounded(cache_folder)


@pytest.fixture
def program(built: Versions) -> Iterator[Answering]:
    with Answering(built.programs[1]) as running:
        yield running


def limit(program: Answering, which: int, value: int) -> None:
    resource.prlimit(program.pid, which, (value, value))


@pytest.mark.parametrize(("which", "name"), [(resource.RLIMIT_AS, "RLIMIT_AS"), (resource.RLIMIT_DATA, "RLIMIT_DATA")])
def test_a_program_that_may_map_no_more_is_refused_by_the_limit(
    program: Answering, built: Versions, which: int, name: str
) -> None:
    now = limits(program.pid)
    before = resource.prlimit(program.pid, which)
    used = now.size if which == resource.RLIMIT_AS else now.data
    resource.prlimit(program.pid, which, (used, before[1]))
    error = refused(program, built, Refused, "may not map")
    assert name in error.why and str(used) in error.why
    assert error.next_step.startswith(f"prlimit --pid {program.pid} --")
    # What the refusal says is done, and then it works.
    resource.prlimit(program.pid, which, (int(error.next_step.rpartition("=")[2]), before[1]))
    there_and_back(program, built)


def test_a_limit_that_is_reached_only_by_the_last_mapping_leaves_nothing(program: Answering, built: Versions) -> None:
    now = limits(program.pid)
    limit(program, resource.RLIMIT_AS, now.size + 0x5000)  # room for the record
    refused(program, built, Refused, "may not map")


def test_locked_memory_without_room_for_more_is_refused(program: Answering, built: Versions) -> None:
    limit(program, resource.RLIMIT_MEMLOCK, 0)  # which its CAP_IPC_LOCK does not mind, until it drops it
    enter(program, "locked", "nobody")
    error = refused(program, built, Refused, "may not map")
    assert "RLIMIT_MEMLOCK" in error.why and "--memlock=" in error.next_step


@pytest.mark.parametrize("which", ["NOFILE", "FSIZE", "STACK", "NPROC", "CORE"])
def test_limits_that_a_patch_does_not_need(program: Answering, built: Versions, which: str) -> None:
    limit(program, getattr(resource, f"RLIMIT_{which}"), 0)
    there_and_back(program, built)


def test_a_program_with_as_many_mappings_as_there_may_be_is_refused(program: Answering, built: Versions) -> None:
    enter(program, "map-count 0")
    with pytest.raises(Refused, match="may not map") as caught:
        apply(program.pid, built.to[2])
    assert "vm.max_map_count" in caught.value.why and "vm.max_map_count" in caught.value.next_step
    program.answers(1)
    at_liberty(program)


@pytest.mark.soak
@pytest.mark.parametrize("left", [1, 2, 6, 12])
def test_a_program_with_hardly_any_mappings_left(program: Answering, built: Versions, left: int) -> None:
    enter(program, f"map-count {left}")
    try:
        apply(program.pid, built.to[2])
    except Refused as error:
        assert "vm.max_map_count" in error.why
        assert left < 6
        program.answers(1)
        return
    program.answers(2)
    revert(program.pid)
    program.answers(1)


def test_a_program_without_room_near_its_image_is_refused(program: Answering, built: Versions) -> None:
    enter(program, "crowded")
    refused(program, built, Refused, "no room for .* within 2 GiB")


# --- control groups --------------------------------------------------------------------------------------------

V1, V2, CPU = Path("/sys/fs/cgroup/freezer"), Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup/cpu")
V2_ALONE = Path("/sys/fs/cgroup")


@contextmanager
def control_group(root: Path, pid: int) -> Iterator[Path]:
    """A group of our own with the process in it; skips where there is no such hierarchy, or we may not."""
    folder = root / f"livegraft-test-{os.getpid()}-{pid}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made in {root}: {error}")
    try:
        (folder / "cgroup.procs").write_text(str(pid))
        yield folder
    finally:
        (root / "cgroup.procs").write_text(str(pid))
        folder.rmdir()


def write_freezer(folder: Path, frozen: bool) -> None:
    if (folder / "freezer.state").exists():
        (folder / "freezer.state").write_text("FROZEN" if frozen else "THAWED")
    else:
        (folder / "cgroup.freeze").write_text("1" if frozen else "0")


def is_frozen(folder: Path) -> bool:
    if (folder / "freezer.state").exists():
        return (folder / "freezer.state").read_text() == "FROZEN\n"
    return "frozen 1" in (folder / "cgroup.events").read_text()


def freezer(version: int) -> Path:
    root = V1 if version == 1 else V2 if V2.exists() else V2_ALONE
    if not (root / "cgroup.procs").exists() or (version == 2 and not (root / "cgroup.controllers").exists()):
        pytest.skip(f"no freezer of version {version} is mounted")
    return root


Freezing = Callable[[bool], None]


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def freeze(request: pytest.FixtureRequest, program: Answering) -> Iterator[Freezing]:
    """``freeze(True)`` freezes the program and waits until it is; it is thawed in the end."""
    with control_group(freezer(request.param), program.pid) as folder:

        def change(frozen: bool) -> None:
            write_freezer(folder, frozen)
            if frozen:
                wait_until(lambda: is_frozen(folder), "the group to be frozen")

        try:
            yield change
        finally:
            change(False)


def test_a_frozen_program_is_busy_and_patched_when_thawed(
    program: Answering, built: Versions, freeze: Freezing
) -> None:
    freeze(True)
    found = frozen_by(program.pid)
    assert found is not None
    with pytest.raises(Busy, match="is frozen") as caught:
        apply(program.pid, built.to[2])
    assert found.file in caught.value.why
    # The command that it says is the one that thaws it.
    _, text, _, file = caught.value.next_step.split()
    Path(file).write_text(text)
    there_and_back(program, built)


SLOW = {(1, "INTERRUPT"), (1, "READV"), (1, "DETACH")}
# The frozen threads of version 1 do not stop, so that there the end comes by timeouts: seconds.
MOMENTS = [
    pytest.param(version, moment, marks=[pytest.mark.soak] if (version, moment) in SLOW else [])
    for version in (1, 2)
    for moment in ("CALL 9", "INTERRUPT", "READV", "WRITE", "DETACH")
]


@pytest.mark.parametrize(("freeze", "moment"), MOMENTS, indirect=["freeze"])
def test_freezing_in_the_middle_of_an_operation_ends(
    program: Answering, built: Versions, freeze: Freezing, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes to an end, the one way or the other; thawed, the program runs on and is patched."""
    monkeypatch.setattr(borrowed, "_CALL_TIMEOUT", 0.3)
    waiting = True

    def observer(name: str, subject: int) -> int:
        nonlocal waiting
        if name == moment and waiting:
            waiting = False
            write_freezer(group_of(program.pid), True)  # and do not wait: what is stopped is not frozen yet
        return 0

    def work() -> None:
        with seam.observe(observer):
            apply(program.pid, built.to[2], Conditions(timeout=0.5))
        assert not waiting

    code, said = in_child(work)
    assert code in (0, Busy.exit_code), said
    freeze(False)
    program.answers(2 if code == 0 else 1)
    apply(program.pid, built.to[2], Conditions(timeout=20))
    program.answers(2)
    revert(program.pid, conditions=Conditions(timeout=20))
    program.answers(1)
    program.never_mixed()
    at_liberty(program)


def group_of(pid: int) -> Path:
    """The folder of our own group in which a process is."""
    roots = (V1, V2, V2_ALONE)
    return next(folder for root in roots for folder in root.glob(f"livegraft-test-*-{pid}"))


def test_a_program_that_gets_hardly_any_processor_is_patched(program: Answering, built: Versions) -> None:
    with control_group(CPU, program.pid) as folder:
        (folder / "cpu.cfs_period_us").write_text("50000")
        (folder / "cpu.cfs_quota_us").write_text("1000")
        there_and_back(program, built)
