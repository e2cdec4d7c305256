"""``livegraft doctor`` on real processes: what it says is what apply then does, in the same words, and stops nobody."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elfdiff.errors import LivegraftError
from fixtures.tracees import compile_program, running, state_of, wait_until
from patcher import seam
from patcher.pausing.conditions import Conditions
from patcher.process.proc import SECCOMP_FILTER, status, thread_ids
from patcher.process.surroundings import SYS_ADMIN, SYS_NICE, SYS_PTRACE, limits, seccomp_modes
from patcher.targets.doctor import Examination, examine
from patcher.targets.doctorchecks import Check, Verdict
from patcher.transactions.transaction import apply
from tests.compile import Compiler
from tests.conftest import Livegraft
from tests.live.answering import Answering, Versions
from tests.live.grafting import Running
from tests.live.surroundings import AS_NOBODY, enter, in_child, left_alone, public_copy, require, surrounded
from tests.live.test_surroundings_limits import V2, control_group, freezer, is_frozen, write_freezer
from tests.live.test_surroundings_patcher import become_nobody, drop

pytestmark = pytest.mark.root


@pytest.fixture(scope="session")
def built(cache_folder: Path) -> Versions:
    return surrounded(cache_folder)


@pytest.fixture
def program(built: Versions) -> Iterator[Answering]:
    with Answering(built.programs[1]) as started:
        yield started


def check(found: Examination, name: str) -> Check:
    return next(item for item in found.checks if item.name == name)


def says_what_apply_does(program: Answering, built: Versions, name: str) -> Check:
    """The check fails, and apply is refused with the same words and exit status."""
    found = examine(program.pid)
    said = check(found, name)
    assert said.verdict is Verdict.FAILS
    assert [item.name for item in found.checks if item.verdict is Verdict.FAILS] == [name]
    with pytest.raises(LivegraftError) as caught:
        apply(program.pid, built.to[2], Conditions(timeout=0.1))
    error = caught.value
    assert error.exit_code == said.exit_code == found.exit_code
    assert error.next_step.split("=")[0] == said.next_step.split("=")[0]
    if name not in ("limits", "room"):  # which patch is meant is not known
        assert (error.what, error.why) == (said.found, said.why)
    return said


def test_a_program_that_can_be_patched_has_nothing_in_the_way(program: Answering) -> None:
    with left_alone(program):
        found = examine(program.pid)
    assert found.exit_code == 0 and found.process == "surrounded"
    assert {item.verdict for item in found.checks} <= {Verdict.OK, Verdict.DEGRADED}


def test_it_neither_seizes_nor_writes_to_the_target(program: Answering) -> None:
    touched: list[tuple[str, int]] = []

    def observer(name: str, subject: int) -> int:
        touched.append((name, subject))
        return 0

    threads = {int(name) for name in os.listdir(f"/proc/{program.pid}/task")}  # noqa: PTH208
    with seam.observe(observer), left_alone(program):
        examine(program.pid)
    assert {name for name, subject in touched if subject in threads} <= {"READ", "READV"}
    assert "SEIZE" in {name for name, _ in touched}  # a process of its own


def test_a_limit(program: Answering, built: Versions) -> None:
    used = limits(program.pid).size
    before = resource.prlimit(program.pid, resource.RLIMIT_AS)
    resource.prlimit(program.pid, resource.RLIMIT_AS, (used, before[1]))
    said = says_what_apply_does(program, built, "limits")
    assert "RLIMIT_AS" in said.why and said.exit_code == 4


def test_no_room(program: Answering, built: Versions) -> None:
    enter(program, "crowded")
    assert says_what_apply_does(program, built, "room").exit_code == 4


def test_a_tracer(program: Answering, built: Versions) -> None:
    tracer = compile_tracer()
    with running([*tracer, str(program.pid)]):
        assert says_what_apply_does(program, built, "tracer").exit_code == 6
        # Nothing more can be read than who it is.
        assert examine(program.pid).checks[-1].name == "tracer"


def compile_tracer() -> list[str]:
    import sys

    text = (
        "import sys; from patcher.threads import ptrace\n"
        "ptrace.seize(int(sys.argv[1])); print('ready', flush=True); input()"
    )
    return [sys.executable, "-c", text]


def test_a_frozen_program(program: Answering, built: Versions) -> None:
    with control_group(freezer(2) if V2.exists() else freezer(1), program.pid) as folder:
        write_freezer(folder, True)
        try:
            wait_until(lambda: is_frozen(folder), "the freezer")
            said = says_what_apply_does(program, built, "freezer")
            assert said.exit_code == 5 and str(folder) in said.next_step
        finally:
            write_freezer(folder, False)


def test_a_program_that_cannot_stop(tmp_path: Path) -> None:
    with running([compile_program("states", tmp_path), "vfork"]) as target:
        wait_until(lambda: state_of(target.pid) == "D", "the parent to wait in vfork")
        found = examine(target.pid)
        said = check(found, "threads")
        assert (said.verdict, found.exit_code) == (Verdict.FAILS, 5)
        assert f"thread {target.pid}: state D" in said.details[0]


LEADER_UNDER_A_FILTER = """
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>

static void *stay(void *unused)
{
    while (getchar() != EOF)
        ;
    exit(0);
}

int main(void)
{
    struct sock_filter all[] = { BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW) };
    struct sock_fprog program = { 1, all };
    pthread_t thread;
    pthread_create(&thread, NULL, stay, NULL);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        return 1;
    puts("ready");
    fflush(stdout);
    pthread_exit(NULL);
}
"""


def test_a_thread_that_has_ended_is_under_no_filter(cache_folder: Path) -> None:
    program = Compiler(cache_folder / "compiled")(LEADER_UNDER_A_FILTER, "-pthread")
    with Running([program]) as target:
        wait_until(lambda: state_of(target.pid) == "Z", "the main thread to have ended")
        assert status(target.pid).seccomp == SECCOMP_FILTER
        (other,) = set(thread_ids(target.pid)) - {target.pid}
        assert seccomp_modes(target.pid) == {other: 0}
        assert check(examine(target.pid), "filters").found == "no thread is under seccomp"


@pytest.mark.parametrize(
    ("lost", "name"), [(SYS_NICE, "SCHED_FIFO"), (SYS_ADMIN, "seccomp"), (SYS_PTRACE, "capabilities")]
)
def test_a_capability_that_is_missing_is_noticed_where_it_is_needed(program: Answering, lost: int, name: str) -> None:
    def work() -> None:
        drop(lost)
        found = examine(program.pid)
        # Root's own process can be traced without CAP_SYS_PTRACE only where it holds no more than we.
        if lost != SYS_PTRACE:
            assert found.exit_code == 0
        assert check(found, name).verdict is Verdict.DEGRADED, check(found, name)

    assert in_child(work) == (0, "")


def test_a_filter_that_cannot_be_suspended(program: Answering, built: Versions) -> None:
    enter(program, "kill")
    assert check(examine(program.pid), "filters").verdict is Verdict.DEGRADED

    def work() -> None:
        drop(SYS_ADMIN)
        found = examine(program.pid)
        said = check(found, "filters")
        assert (said.verdict, found.exit_code) == (Verdict.FAILS, 6)
        assert "CAP_SYS_ADMIN" in said.why
        apply(program.pid, built.to[2])

    code, said = in_child(work)
    assert code == 6 and "CAP_SYS_ADMIN" in said, said


def test_a_user_who_may_not(program: Answering, built: Versions) -> None:
    def work() -> None:
        become_nobody()
        found = examine(program.pid)
        said = check(found, "permission")
        assert (said.verdict, found.exit_code) == (Verdict.FAILS, 6)
        try:
            apply(program.pid, built.to[2])
        except LivegraftError as error:
            assert (error.what, error.why, error.next_step) == (said.found, said.why, said.next_step)
            raise

    code, said = in_child(work)
    assert code == 6, said


def test_a_user_and_his_own(built: Versions) -> None:
    require("setpriv")
    with public_copy(built.programs[1]) as copy, Answering(copy, (*AS_NOBODY, "sh", "-c", '"$0"; :')) as program:

        def work() -> None:
            become_nobody()
            found = examine(program.pid)
            assert check(found, "capabilities").verdict is Verdict.DEGRADED
            assert check(found, "SCHED_FIFO").verdict is Verdict.DEGRADED
            if not Path("/proc/sys/kernel/yama").exists():
                assert found.exit_code == 0

        assert in_child(work) == (0, "")


def test_the_command(program: Answering, livegraft: Livegraft) -> None:
    said = livegraft("doctor", program.pid).stdout
    assert "nothing is in the way" in said and "padding" in said
    body: dict[str, Any] = livegraft("doctor", program.pid, "--json").json
    assert body["pid"] == program.pid and body["possible"] is True
    assert {item["verdict"] for item in body["checks"]} <= {"ok", "degraded"}
    assert body["exit"] == {"code": 0, "name": "ok"}
    alone = livegraft("doctor", "--json").json
    assert alone["pid"] is None and "padding" not in {item["name"] for item in alone["checks"]}


def test_the_command_fails_as_apply_would(program: Answering, livegraft: Livegraft) -> None:
    enter(program, "crowded")
    outcome = livegraft("doctor", program.pid, status=4)
    assert "apply would fail, exit status 4" in outcome.stdout and "next: restart the program" in outcome.stdout
    body = livegraft("doctor", program.pid, "--json", status=4).json
    assert body["possible"] is False and body["exit"]["name"] == "refused"
    assert livegraft("doctor", 2, status=2).stdout.count("kernel thread")
    livegraft("doctor", 1 << 30, status=2)
    livegraft("doctor", "x", status=2)
