"""Targets under filters, without rights, in other namespaces and roots: patched all the same, or refused by name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from patcher import seam
from patcher.process.proc import status, thread_ids
from patcher.transactions.transaction import apply, revert
from tests.live.answering import Answering, Versions
from tests.live.surroundings import (
    AS_NOBODY,
    NOBODY,
    enter,
    in_child,
    public_copy,
    require,
    surrounded,
    there_and_back,
)

pytestmark = pytest.mark.root


@pytest.fixture(scope="session")
def built(cache_folder: Path) -> Versions:
    return surrounded(cache_folder)


FILTERS = ("strict", "kill", "errno", "trap", "notify", "other-filters", "no-write-execute-filter")
RIGHTS = ("no-write-execute", "no-new-privileges", "undumpable", "locked")


@pytest.mark.parametrize("what", [*FILTERS, *RIGHTS])
def test_a_program_that_has_given_up_rights_is_patched(built: Versions, what: str) -> None:
    with Answering(built.programs[1]) as program:
        enter(program, what)
        modes = {tid: status(tid).seccomp for tid in thread_ids(program.pid)}
        there_and_back(program, built)
        assert {tid: status(tid).seccomp for tid in thread_ids(program.pid)} == modes
        assert any(modes.values()) == (what in FILTERS)
        assert program.ask("trapped") == "0"


def test_each_filter_is_in_force_again(built: Versions) -> None:
    """After a remote call by each of the threads: what the filter forbids is forbidden."""
    with Answering(built.programs[1]) as program:
        enter(program, "errno")
        there_and_back(program, built)
        assert program.ask("enter no-new-privileges") == "1"  # EPERM: prctl is not allowed


@pytest.mark.parametrize("what", ["strict", "kill", "trap", "errno"])
def test_a_patcher_killed_on_the_way_into_a_call_leaves_a_filter_nothing_to_punish(built: Versions, what: str) -> None:
    """At the entry of each call that is made in the target, from its launch up to the stop before the filter."""
    with Answering(built.programs[1]) as program:
        enter(program, what)
        for number in range(1, 4):
            code, _ = in_child(lambda number=number: _die_at_launch(program.pid, built, number))  # type: ignore[misc]
            assert code == -9
            assert int(program.ask("calls")) > 0
            assert program.ask("trapped") == "0"
        apply(program.pid, built.to[2])
        program.answers(2)
        revert(program.pid)
        program.answers(1)
        program.never_mixed()


@pytest.mark.xfail(
    strict=True,
    raises=(AssertionError, BrokenPipeError, ProcessLookupError),  # it dies, has died, or is even buried
    reason="ptrace(2) has no way to change a call and to resume the thread in one step: killed between these two, "
    "the patcher leaves a call to the filter that it has not allowed; a few microseconds for each call",
)
def test_a_patcher_killed_with_a_forbidden_call_in_the_registers(built: Versions) -> None:
    with Answering(built.programs[1]) as program:
        enter(program, "kill")
        code, _ = in_child(lambda: _die_at_entry(program.pid, built))
        assert code == -9
        program.answers(1)


def _die_at_launch(pid: int, built: Versions, number: int) -> None:
    """Die when the ``number``-th call has been launched, and the thread has not got to the entry stop."""
    _die_at_step(pid, built, lambda resumed: resumed == 2 * number - 1)


def _die_at_entry(pid: int, built: Versions) -> None:
    """Die when the thread is at the entry stop, and has the real call in its registers."""
    _die_at_step(pid, built, lambda resumed: resumed == 2)


def _die_at_step(pid: int, built: Versions, here: object) -> None:
    resumed = 0

    def observer(name: str, subject: int) -> int:
        nonlocal resumed
        if name == "SYSCALL":
            resumed += 1
            if here(resumed):  # type: ignore[operator]
                os.kill(os.getpid(), 9)
        return 0

    with seam.observe(observer):
        apply(pid, built.to[2])


ALL_NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--mount-proc")


@pytest.mark.parametrize(
    "options",
    [("--mount",), ("--ipc", "--uts", "--net"), ("--pid", "--fork", "--mount-proc"), ("--user",), ALL_NAMESPACES],
    ids=" ".join,
)
def test_a_program_in_other_namespaces_is_patched(built: Versions, options: tuple[str, ...]) -> None:
    require("unshare")
    # A child of its own in every case, as the fixture expects.
    options = options if "--fork" in options else (*options, "--fork")
    with Answering(built.programs[1], ("unshare", *options)) as program:
        there_and_back(program, built)


def test_a_program_in_all_namespaces_of_an_unprivileged_user_is_patched(built: Versions) -> None:
    require("unshare", "setpriv")
    under = (*AS_NOBODY, "unshare", "--user", "--map-root-user", *ALL_NAMESPACES)
    with public_copy(built.programs[1]) as copy, Answering(copy, under) as program:
        assert status(program.pid).uid == NOBODY
        assert len(status(program.pid).ns_pid) == 2
        assert Path(f"/proc/{program.pid}/uid_map").read_text().split() == ["0", str(NOBODY), "1"]
        there_and_back(program, built)


def test_a_program_without_any_privileges_is_patched(built: Versions) -> None:
    with Answering(built.programs[1]) as program:
        enter(program, "nobody", "undumpable", "no-new-privileges")
        assert status(program.pid).uid == NOBODY
        there_and_back(program, built)


def test_a_program_in_a_root_without_proc_is_patched(built: Versions, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with Answering(built.programs[1]) as program:
        enter(program, f"root {root}")
        assert Path(f"/proc/{program.pid}/root").readlink() == root
        there_and_back(program, built)


def test_a_program_whose_files_are_gone_is_patched(built: Versions) -> None:
    with public_copy(built.programs[1]) as copy, Answering(copy) as program:
        shutil.rmtree(copy.parent)
        there_and_back(program, built)
        copy.parent.mkdir()  # for what takes it away again


def test_a_sandbox_that_shares_nothing_and_allows_nothing(built: Versions, tmp_path: Path) -> None:
    """All of it at once, as a careful service has it."""
    require("unshare")
    with Answering(built.programs[1], ("unshare", *ALL_NAMESPACES)) as program:
        enter(program, f"root {tmp_path}", "nobody", "undumpable", "no-write-execute", "kill")
        there_and_back(program, built)
