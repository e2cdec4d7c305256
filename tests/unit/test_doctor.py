"""The checks of ``doctor`` and the obstacles, for every value that they may be given."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from elfdiff.errors import BadInput, Busy, LivegraftError, NotPermitted, Refused
from patcher.process import obstacles
from patcher.process.obstacles import Obstacle
from patcher.process.surroundings import CAPABILITY_NAMES, SYS_PTRACE, Credentials, Freezer, Limits
from patcher.targets import doctorchecks
from patcher.targets.doctor import Examination
from patcher.targets.doctorchecks import Check, Verdict

OK, DEGRADED, FAILS = Verdict.OK, Verdict.DEGRADED, Verdict.FAILS
ALL = sum(1 << number for number in CAPABILITY_NAMES)
ROOT = Credentials((0, 0, 0), ALL, ALL, "user:[1]", 0)
USER = Credentials((1000, 1000, 1000), 0, 0, "user:[1]", 1000)
OTHER = Credentials((1001, 1001, 1001), 0, 0, "user:[1]", 1001)


def sound(check: Check) -> None:
    """What is in the way has a reason, and fails by an exit status; what is not has none."""
    assert check.found
    assert (check.exit_code != 0) == (check.verdict is FAILS)
    assert bool(check.why) == (check.verdict is not OK)


@pytest.mark.parametrize(
    ("scope", "own", "verdict", "code"),
    [
        (None, USER, OK, 0),
        (0, USER, OK, 0),
        (1, ROOT, OK, 0),
        (1, USER, DEGRADED, 0),
        (2, ROOT, OK, 0),
        (2, USER, FAILS, 6),
        (3, ROOT, FAILS, 6),
        (3, USER, FAILS, 6),
    ],
)
def test_yama(scope: int | None, own: Credentials, verdict: Verdict, code: int) -> None:
    check = doctorchecks.yama(scope, own)
    sound(check)
    assert (check.verdict, check.exit_code) == (verdict, code)


@pytest.mark.parametrize(
    ("check", "verdict", "code"),
    [
        (doctorchecks.processor("x86_64"), OK, 0),
        (doctorchecks.processor("aarch64"), FAILS, 4),
        (doctorchecks.capabilities(ROOT), OK, 0),
        (doctorchecks.capabilities(USER), DEGRADED, 0),
        (doctorchecks.tracing(0), OK, 0),
        (doctorchecks.tracing(errno.EPERM), FAILS, 6),
        (doctorchecks.text_writes(0, 0), OK, 0),
        (doctorchecks.text_writes(errno.EIO, 0), DEGRADED, 0),
        (doctorchecks.text_writes(errno.EIO, errno.EIO), FAILS, 6),
        (doctorchecks.vectored_reads(0), OK, 0),
        (doctorchecks.vectored_reads(errno.ENOSYS), FAILS, 6),
        (doctorchecks.sequences(0), OK, 0),
        (doctorchecks.sequences(errno.EIO), DEGRADED, 0),
        (doctorchecks.suspension(0), OK, 0),
        (doctorchecks.suspension(errno.EPERM), DEGRADED, 0),
        (doctorchecks.realtime(0), OK, 0),
        (doctorchecks.realtime(errno.EPERM), DEGRADED, 0),
        (doctorchecks.memory_files(None), OK, 0),
        (doctorchecks.memory_files(0), OK, 0),
        (doctorchecks.memory_files(1), OK, 0),
        (doctorchecks.memory_files(2), DEGRADED, 0),
        (doctorchecks.mapping_queries(0), OK, 0),
        (doctorchecks.mapping_queries(errno.ENOTTY), OK, 0),
    ],
)
def test_each_value_of_each_check(check: Check, verdict: Verdict, code: int) -> None:
    sound(check)
    assert (check.verdict, check.exit_code) == (verdict, code)


def test_every_capability_that_is_missing_is_named() -> None:
    for number, name in CAPABILITY_NAMES.items():
        check = doctorchecks.capabilities(replace(ROOT, effective=ALL & ~(1 << number)))
        assert f"without {name}" in check.found
        assert check.verdict is (DEGRADED if number == SYS_PTRACE else OK)


def refusal(own: Credentials, other: Credentials, yama: int | None = None, label: str = "") -> Obstacle:
    return obstacles.may_not_be_traced(7, "daemon", own, other, yama, label, "the kernel answered EPERM")


@pytest.mark.parametrize(
    ("obstacle", "why", "next_step"),
    [
        (refusal(ROOT, USER, yama=3), "nobody may trace", "reboot"),
        (refusal(USER, OTHER), "belongs to user 1001, this is user 1000", "sudo"),
        (refusal(USER, OTHER, yama=1), "belongs to user 1001", "sudo"),
        (refusal(USER, USER, yama=1), "ptrace_scope is 1", "sysctl kernel.yama.ptrace_scope=0"),
        (refusal(USER, USER, yama=2), "ptrace_scope is 2", "sudo"),
        (refusal(USER, replace(USER, owner=0)), "not dumpable", "sudo"),
        (refusal(USER, replace(USER, permitted=4)), "capabilities that we lack", "sudo"),
        (refusal(replace(ROOT, effective=0), USER), "without CAP_SYS_PTRACE", "--cap-add SYS_PTRACE"),
        (refusal(replace(ROOT, effective=0, permitted=0), ROOT), "capabilities that we lack", "--cap-add SYS_PTRACE"),
        (refusal(ROOT, replace(USER, user_namespace="user:[2]")), "another user namespace", "in the namespace"),
        (refusal(ROOT, USER, label="httpd (enforce)"), "confines it as httpd (enforce)", "dmesg"),
        (refusal(ROOT, USER, label="unconfined"), "the kernel answered EPERM", "dmesg"),
        (refusal(USER, USER), "the kernel answered EPERM", "sudo"),
    ],
)
def test_who_may_not_trace_is_told_why(obstacle: Obstacle, why: str, next_step: str) -> None:
    assert obstacle.kind is NotPermitted
    assert why in obstacle.why and next_step in obstacle.next_step
    error = obstacle.as_error()
    assert (error.what, error.why, error.next_step) == (obstacle.what, obstacle.why, obstacle.next_step)


def test_only_scope_one_is_lifted_by_sysctl() -> None:
    assert "sysctl" not in refusal(USER, USER, yama=2).next_step


FREE = Limits(
    size=100, size_limit=None, data=100, data_limit=None, locked=0, locked_limit=None,
    mappings=10, mappings_limit=100, committed=10, commit_limit=None, descriptors=3, descriptors_limit=10,
)  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "why", "next_step"),
    [
        (replace(FREE, size_limit=149), "RLIMIT_AS is 149", "prlimit --pid 7 --as="),
        (replace(FREE, data_limit=149), "RLIMIT_DATA is 149", "prlimit --pid 7 --data="),
        (replace(FREE, locked=1, locked_limit=50), "RLIMIT_MEMLOCK", "prlimit --pid 7 --memlock="),
        (replace(FREE, mappings=96), "vm.max_map_count is 100", "sysctl vm.max_map_count="),
        (replace(FREE, commit_limit=59), "vm.overcommit_memory is 2", "sysctl vm.overcommit_memory=0"),
    ],
)
def test_each_limit_is_named_where_it_is_passed_and_not_before(limits: Limits, why: str, next_step: str) -> None:
    found = obstacles.no_more_memory(7, "daemon", limits, 50, 5)
    assert found is not None and found.kind is Refused
    assert why in found.why and found.next_step.startswith(next_step)
    # One byte, or one mapping, less: it is just enough.
    smaller = obstacles.no_more_memory(7, "daemon", limits, 49, 4)
    assert smaller is None


def test_memory_that_is_not_locked_does_not_count_against_its_limit() -> None:
    assert obstacles.no_more_memory(7, "daemon", replace(FREE, locked=0, locked_limit=0), 50, 5) is None
    assert obstacles.no_more_memory(7, "daemon", FREE, 1 << 40, 5) is None


@pytest.mark.parametrize(
    ("obstacle", "kind"),
    [
        (obstacles.foreign_proc(False), BadInput),
        (obstacles.not_a_target(7, "d", "it is a kernel thread"), BadInput),
        (obstacles.traced(7, "d", 8, "gdb"), NotPermitted),
        (obstacles.not_for_this_processor(7, "d", (32, "i386")), Refused),
        (obstacles.not_for_this_processor(7, "d", (32, "x86-64")), Refused),  # x32
        (obstacles.not_for_this_processor(7, "d", (64, "AArch64")), Refused),
        (obstacles.frozen(7, "d", Freezer("/sys/fs/cgroup/a/cgroup.freeze", "0")), Busy),
        (obstacles.does_not_stop(7, 2, 1.0, ("thread 8: state D",)), Busy),
        (obstacles.filter_stays("d", 8, "EPERM"), NotPermitted),
        (obstacles.no_room(0x1000, 1, (0, 1)), Refused),
        (obstacles.no_padding(7, 1, "none"), LivegraftError),
        (obstacles.unexplained_no_memory(7, "d", 1, errno.ENOMEM), Refused),
    ],
)
def test_an_obstacle_is_raised_as_what_doctor_says(obstacle: Obstacle | None, kind: type[LivegraftError]) -> None:
    assert obstacle is not None
    assert obstacle.what and obstacle.why and obstacle.next_step
    assert type(obstacle.as_error()) is kind
    check = doctorchecks.judged("name", "nothing", obstacle)
    sound(check)
    assert check.exit_code == kind.exit_code
    assert (check.found, check.why, check.next_step) == (obstacle.what, obstacle.why, obstacle.next_step)


def test_what_is_not_there_is_no_obstacle() -> None:
    assert obstacles.foreign_proc(True) is None
    assert obstacles.not_a_target(7, "d", "") is None
    assert obstacles.traced(7, "d", 0, "") is None
    assert obstacles.not_for_this_processor(7, "d", (64, "x86-64")) is None
    assert obstacles.not_for_this_processor(7, "d", None) is None
    assert obstacles.frozen(7, "d", None) is None
    assert obstacles.does_not_stop(7, 0, 1.0, ()) is None
    assert doctorchecks.judged("name", "nothing", None).verdict is OK


def test_the_first_check_that_fails_decides() -> None:
    checks = (
        doctorchecks.ok("a", "x"),
        doctorchecks.degraded("b", "x", "y"),
        doctorchecks.tracing(errno.EPERM),
        doctorchecks.processor("sparc"),
    )
    assert Examination(1, "d", checks).exit_code == 6
    assert Examination(1, "d", checks[:2]).exit_code == 0
