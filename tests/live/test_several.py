"""Several processes at once: which are meant, one result for each, children forked meanwhile, and all put back."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from elfdiff.errors import BadInput, Busy, LivegraftError
from elfdiff.patches.patchfile import write_patch
from elfdiff.patchobject import PatchObject
from fixtures.hearing import next_line
from fixtures.intact import altered_code
from fixtures.tracees import SOURCES, state_of, wait_until
from patcher.pausing.conditions import Conditions
from patcher.process.proc import is_leaving, mappings
from patcher.process.sharing import sharers
from patcher.targets.selection import By, Listed, Selection, list_processes, pinned
from patcher.transactions.group import End, carry_out_each
from patcher.transactions.transaction import apply
from tests.conftest import Livegraft
from tests.live.answering import CHANGED, versions
from tests.live.forking import SOURCE, Forking
from tests.patchmaker import compile_version

pytestmark = pytest.mark.root

WORKERS = 3
TRIES = 10


@dataclass(frozen=True)
class Prepared:
    """The old build under a name of its own, so that no other process matches; patches by version, as files too."""

    program: Path
    patches: dict[int, PatchObject]
    files: dict[int, Path]


@pytest.fixture
def prepared(cache_folder: Path, tmp_path: Path) -> Prepared:
    built = versions(cache_folder / "forking", source=SOURCE, changed=CHANGED)
    program = tmp_path / f"fork{os.getpid()}"
    shutil.copy(built.programs[1], program)
    files = {version: tmp_path / f"to{version}.patch" for version in built.to}
    for version, path in files.items():
        write_patch(built.to[version], path)
    return Prepared(program, built.to, files)


@pytest.fixture
def master(prepared: Prepared) -> Iterator[Forking]:
    with Forking(prepared.program, WORKERS) as program:
        yield program


def ends(value: dict[str, Any]) -> dict[int, str]:
    return {item["pid"]: item["result"] for item in value["processes"]}


def everybody(master: Forking) -> list[int]:
    return [master.pid, *master.workers]


def untouched(pid: int) -> bool:
    return not altered_code(pid) and not any("livegraft" in item.path for item in mappings(pid))


def test_more_than_one_process_is_refused_without_leave(
    master: Forking, prepared: Prepared, livegraft: Livegraft
) -> None:
    for verb in (["apply", prepared.files[2]], ["check", prepared.files[2]], ["revert"]):
        error = livegraft(*verb, "--exe", prepared.program, "--json", status=2).json["error"]
        assert f"matches {WORKERS + 1} processes" in error["what"]
        assert [int(line.split()[0]) for line in error["details"]] == everybody(master)
        assert "--all" in error["next"] and f"--tree {master.pid}" in error["next"]
    assert all(untouched(pid) for pid in everybody(master))


@pytest.mark.parametrize("by", ["exe", "name", "tree"])
def test_there_and_back_with_one_result_for_each(
    master: Forking, prepared: Prepared, livegraft: Livegraft, by: str
) -> None:
    which = {
        "exe": ["--exe", prepared.program, "--all"],
        "name": ["--name", prepared.program.name, "--all"],
        "tree": ["--tree", master.pid],
    }[by]
    checked = livegraft("check", prepared.files[2], *which, "--json").json
    assert [item["state"] for item in checked["processes"]] == ["applicable"] * (WORKERS + 1)
    assert master.versions() == [1] * (WORKERS + 1)

    applied = livegraft("apply", prepared.files[2], *which, "--json").json
    assert applied["schema"] == 1 and applied["exit"] == {"code": 0, "name": "ok"} and "error" not in applied
    assert applied["selection"]["by"] == by and applied["settled"] and not applied["atomic"]
    assert [item["pid"] for item in applied["processes"]] == everybody(master)
    for item in applied["processes"]:
        assert item["exit"] == {"code": 0, "name": "ok"} and item["result"] == "done" and item["state"] == "applied"
        assert item["pause_us"] > 0 and not item["late"] and not item["inherited"]
    assert master.versions() == [2] * (WORKERS + 1)

    again = livegraft("apply", prepared.files[2], *which, "--json").json
    assert all(item["already"] for item in again["processes"]) and again["scans"] == 1
    shown = livegraft("status", *which[:2], "--json").json
    assert [item["patches"][0]["state"] for item in shown["processes"]] == ["applied"] * (WORKERS + 1)

    reverted = livegraft("revert", *which)
    assert reverted.stdout.count("is no longer in force") == WORKERS + 1
    assert reverted.stdout.endswith(f"{WORKERS + 1} processes: {WORKERS + 1} done\n")
    assert master.versions() == [1] * (WORKERS + 1)


def test_an_executable_that_was_replaced_on_disk_is_found_by_its_path(
    master: Forking, prepared: Prepared, livegraft: Livegraft
) -> None:
    prepared.program.unlink()
    link = prepared.program.with_name("link")
    link.symlink_to(prepared.program)
    livegraft("apply", prepared.files[2], "--exe", link, "--all")
    shutil.copy("/bin/true", prepared.program)
    livegraft("apply", prepared.files[3], "--exe", prepared.program, "--all")
    assert master.versions() == [3] * (WORKERS + 1)


@pytest.fixture
def unit() -> Iterator[Callable[[int], str]]:
    """A control group named like a unit of systemd, into which processes can be put."""
    name = f"livegraft-{os.getpid()}.service"
    homes = (Path("/sys/fs/cgroup/systemd"), Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
    home = next((item for item in homes if (item / "cgroup.procs").exists()), None)
    if home is None:
        pytest.skip("no hierarchy of control groups is mounted")
    group = home / name
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")

    def put(pid: int) -> str:
        (group / "cgroup.procs").write_text(str(pid))
        return name

    yield put
    for pid in (group / "cgroup.procs").read_text().split():
        (home / "cgroup.procs").write_text(pid)
    group.rmdir()


def test_the_processes_of_a_unit(
    master: Forking, prepared: Prepared, livegraft: Livegraft, unit: Callable[[int], str]
) -> None:
    name = unit(master.workers[1])
    livegraft("apply", prepared.files[2], "--unit", name)  # one process is meant, so no leave is needed
    assert master.versions() == [1, 1, 2, 1]
    unit(master.pid)
    value = livegraft("apply", prepared.files[2], "--unit", name.removesuffix(".service"), "--all", "--json").json
    assert [(item["pid"], item["already"]) for item in value["processes"]] == [
        (master.pid, False), (master.workers[1], True),
    ]  # fmt: skip


def test_a_child_of_a_patched_process_is_patched_says_so_and_is_independent(
    master: Forking, prepared: Prepared, livegraft: Livegraft
) -> None:
    livegraft("apply", prepared.files[2], "--pid", master.pid)
    child = master.fork()
    (carried,) = livegraft("status", "--pid", child, "--json").json["patches"]
    assert carried["state"] == "applied" and carried["inherited"]
    assert "inherited  from the process that forked it" in livegraft("status", "--pid", child).stdout
    assert not livegraft("status", "--pid", master.pid, "--json").json["patches"][0]["inherited"]
    assert livegraft("apply", prepared.files[2], "--pid", child, "--json").json["already"]

    livegraft("revert", "--pid", child)
    assert master.versions() == [2, 1, 1, 1, 1] and not altered_code(child)
    livegraft("apply", prepared.files[2], "--pid", child)
    assert not livegraft("status", "--pid", child, "--json").json["patches"][0]["inherited"]
    livegraft("revert", "--pid", master.pid)
    assert master.versions() == [1, 1, 1, 1, 2]
    assert not altered_code(master.pid)


def test_a_child_forked_in_the_midst_is_found(master: Forking, prepared: Prepared) -> None:
    forked = []

    def act(pin: Any) -> Any:
        if not forked:
            forked.append(master.fork())  # by a master that is still unpatched, after the processes were listed
        return apply(pin.pid, prepared.patches[2], pin=pin)

    group = carry_out_each(Selection(By.TREE, str(master.pid), True), act)
    assert master.versions() == [2] * (WORKERS + 2)
    assert group.exit_code == 0 and group.settled and group.scans == 3
    assert [item.process.pid for item in group.results if item.late] == forked


def test_that_there_is_no_end_is_said(master: Forking, prepared: Prepared) -> None:
    def act(pin: Any) -> Any:
        return apply(pin.pid, prepared.patches[2], pin=pin)

    group = carry_out_each(Selection(By.TREE, str(master.pid), True), act, most_scans=1)
    assert not group.settled and group.exit_code == 8


def test_a_program_that_forks_without_end_is_patched_as_a_whole(
    prepared: Prepared, livegraft: Livegraft
) -> None:
    with Forking(prepared.program, 0) as master:
        master.ask("storm")
        assert master.tally()[1:] == [0, 0, 0]
        for words, version in ((["apply", prepared.files[2]], 2), (["apply", prepared.files[3]], 3), (["revert"], 1)):
            value = livegraft(*words, "--tree", master.pid, "--json").json
            assert value["settled"] and set(ends(value).values()) <= {"done", "exited"}
            # Whoever the last list has not shown to be changed would still ask for the old answer.
            counts = master.tally()
            assert counts[version - 1] > 0 and sum(counts) == counts[version - 1], value


def test_one_that_is_busy_makes_it_partial(master: Forking, prepared: Prepared, livegraft: Livegraft) -> None:
    master.ask("hold", worker=1)
    done = livegraft("apply", prepared.files[2], "--tree", master.pid, "--timeout", "0.2", "--json", status=8)
    value = done.json
    assert value["exit"] == {"code": 8, "name": "partial"} and "1 failed" in value["error"]["what"]
    failed = next(item for item in value["processes"] if item["pid"] == master.workers[1])
    assert failed["exit"] == {"code": 5, "name": "busy"} and "held" in failed["error"]["what"]
    assert master.versions() == [2, 2, 1, 2]
    text = livegraft("apply", prepared.files[2], "--tree", master.pid, "--timeout", "0.2", status=8)
    assert "was not done: busy" in text.stdout and text.stderr.startswith("livegraft: 4 processes: 3 done, 1 failed\n")
    master.ask("release", worker=1)
    livegraft("apply", prepared.files[2], "--tree", master.pid)
    assert master.versions() == [2] * (WORKERS + 1)


def test_all_that_fail_alike_give_their_exit_status(
    master: Forking, prepared: Prepared, livegraft: Livegraft
) -> None:
    master.ask("hold")
    for worker in range(WORKERS):
        master.ask("hold", worker=worker)
    livegraft("apply", prepared.files[2], "--tree", master.pid, "--timeout", "0", status=5)
    livegraft("revert", "--tree", master.pid, status=2)  # nobody carries a patch
    assert all(untouched(pid) for pid in everybody(master))


@pytest.mark.parametrize("before", [1, 2])
def test_atomic_puts_all_back_as_they_were(
    master: Forking, prepared: Prepared, livegraft: Livegraft, before: int
) -> None:
    if before != 1:
        livegraft("apply", prepared.files[before], "--tree", master.pid)
    master.ask("hold", worker=1)
    words = ["apply", prepared.files[3], "--tree", master.pid, "--timeout", "0.2", "--atomic", "--json"]
    value = livegraft(*words, status=5).json
    wanted = ("rolled-back", "rolled-back", "failed", "not-tried")
    assert ends(value) == dict(zip(everybody(master), wanted, strict=True))
    assert master.versions() == [before] * (WORKERS + 1)
    in_force = [
        [patch["new"]["build_id"] for patch in item["patches"] if patch["state"] == "applied"]
        for item in livegraft("status", "--tree", master.pid, "--json").json["processes"]
    ]
    assert in_force == [[] if before == 1 else [prepared.patches[before].new.build_id]] * (WORKERS + 1)
    master.ask("release", worker=1)
    applied = livegraft(*words).json
    assert set(ends(applied).values()) == {"done"} and applied["atomic"]
    assert master.versions() == [3] * (WORKERS + 1)
    livegraft("revert", "--tree", master.pid)
    assert master.versions() == [1] * (WORKERS + 1)
    assert not any(altered_code(pid) for pid in everybody(master))


def test_atomic_puts_back_a_revert(master: Forking, prepared: Prepared, livegraft: Livegraft) -> None:
    livegraft("apply", prepared.files[2], "--tree", master.pid)
    master.ask("hold", worker=1)
    words = ["revert", "--tree", master.pid, "--timeout", "0.2", "--atomic"]
    said = livegraft(*words, status=5)
    assert said.stdout.count("rolled back; patch") == 2 and "is applied now" in said.stdout
    assert master.versions() == [2] * (WORKERS + 1)
    master.ask("release", worker=1)
    livegraft(*words)
    assert master.versions() == [1] * (WORKERS + 1)


def test_atomic_puts_back_children_that_have_inherited_it(master: Forking, prepared: Prepared) -> None:

    forked = []

    def act(pin: Any) -> Any:
        if pin.pid == master.workers[0]:
            forked.append(master.fork())  # by the master, which is patched by now
            raise Busy("stopped here")
        return apply(pin.pid, prepared.patches[2], pin=pin)

    group = carry_out_each(Selection(By.TREE, str(master.pid), True), act, undo=Conditions())
    assert group.exit_code == 5
    assert master.versions() == [1] * (WORKERS + 2)
    taken_back = {item.process.pid for item in group.having(End.TAKEN_BACK)}
    assert taken_back == {master.pid, *forked}


def test_processes_that_run_something_else_are_passed_over(
    master: Forking, prepared: Prepared, livegraft: Livegraft
) -> None:
    value = livegraft("apply", prepared.files[2], "--tree", os.getpid(), "--json").json
    found = ends(value)
    assert found[os.getpid()] == "not-concerned" and all(found[pid] == "done" for pid in everybody(master))
    assert master.versions() == [2] * (WORKERS + 1)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        assert ends(livegraft("apply", prepared.files[2], "--tree", other.pid, "--json", status=4).json) == {
            other.pid: "not-concerned"
        }


@pytest.mark.parametrize("atomic", [False, True])
def test_a_signal_ends_it_between_two_processes(master: Forking, prepared: Prepared, atomic: bool) -> None:
    master.ask("hold", worker=0)
    command = [sys.executable, "-m", "patcher.cli", "apply", prepared.files[2], "--tree", str(master.pid)]
    with subprocess.Popen(
        [*command, "--timeout", "60", *(["--atomic"] if atomic else [])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        wait_until(lambda: not untouched(master.workers[0]), "it to wait for the worker")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == (1 if atomic else 8), out + err
    assert "SIGTERM came" in err and "too late" not in err
    assert master.versions() == [1 if atomic else 2, 1, 1, 1]
    assert untouched(master.workers[0])


def listed(pid: int) -> Listed:
    return next(item for item in list_processes(By.PID) if item.pid == pid)


def test_a_number_that_is_another_process_by_now_is_not_touched(master: Forking, prepared: Prepared) -> None:
    was = replace(listed(master.workers[0]), start_time=1)
    with pytest.raises(BadInput), pinned(was):
        pass
    victim = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    process = listed(victim.pid)
    with pinned(process) as pin:
        victim.kill()
        victim.wait()
        assert pin.exited()
        # The number is free, and the kernel may give it to anybody: here it is the worker's, with the old pidfd.
        taken = replace(pin, process=replace(process, pid=master.workers[0]))
        with pytest.raises(BadInput):
            apply(taken.pid, prepared.patches[2], pin=taken)
    assert untouched(master.workers[0])
    with pytest.raises(BadInput), pinned(process):
        pass


def test_one_that_exits_before_its_turn_is_no_failure(master: Forking, prepared: Prepared) -> None:
    def act(pin: Any) -> Any:
        if pin.pid == master.pid:
            os.kill(master.workers[0], signal.SIGKILL)
            wait_until(lambda: state_of(master.workers[0]) == "Z", "the worker to exit")
        return apply(pin.pid, prepared.patches[2], pin=pin)

    group = carry_out_each(Selection(By.TREE, str(master.pid), True), act)
    assert group.exit_code == 0
    assert [item.process.pid for item in group.having(End.EXITED)] == [master.workers[0]]


LARGE = "memory = bytearray(1 << 29); print('ready', flush=True); input()"


def test_one_that_is_about_to_exit_is_no_failure(prepared: Prepared) -> None:
    """Its memory is gone while the kernel still frees it, and its pidfd does not say yet that it has exited."""
    seen = []

    def act(pin: Any) -> Any:
        os.kill(pin.pid, signal.SIGKILL)
        wait_until(lambda: is_leaving(pin.pid), "the process to leave")
        try:
            return apply(pin.pid, prepared.patches[2], pin=pin)
        except LivegraftError:
            seen.append(not pin.exited())
            raise

    for _ in range(TRIES):
        with subprocess.Popen([sys.executable, "-c", LARGE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as large:
            assert next_line(large) == "ready"
            group = carry_out_each(Selection(By.PID, str(large.pid)), act)
            assert [item.end for item in group.results] == [End.EXITED]
        if seen[-1]:
            return
    pytest.skip("the kernel was faster every time")


def test_a_child_in_the_memory_of_its_parent_is_no_process_of_its_own(
    cache_folder: Path, prepared: Prepared
) -> None:
    program = compile_version(SOURCES / "states.c", 1, cache_folder / "states")
    with subprocess.Popen([program, "vfork"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        wait_until(lambda: state_of(parent.pid) == "D", "the parent to wait in vfork")
        (child,) = (item.pid for item in list_processes(By.PID) if item.parent == parent.pid)
        assert sharers(child) == (parent.pid,)
        with pytest.raises(Busy) as caught:
            apply(child, prepared.patches[2])
        assert f"shares its memory with process {parent.pid}" in caught.value.what
        parent.kill()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required"),
        (["--exe", "/nowhere/to/be/found"], "matches no process"),
        (["--exe", ""], "names nothing"),
        (["--name", "no process has it"], "matches no process"),
        (["--unit", "nowhere.service", "--all"], "matches no process"),
        (["--tree", "4194303"], "there is no process"),
        (["--tree", "x"], "not a process id"),
        (["--pid", "1", "--name", "x"], "not allowed with"),
        (["--pid", "1", "--all"], "does not go with --pid"),
        (["--pid", "1", "--atomic"], "does not go with --pid"),
        (["--all"], "required"),
    ],
)
@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_wrong_usage(prepared: Prepared, livegraft: Livegraft, verb: str, words: list[str], said: str) -> None:
    first = [verb, prepared.files[2]] if verb == "apply" else [verb]
    done = livegraft(*first, *words, status=2)
    assert said in done.stderr and "Traceback" not in done.stderr and not done.stdout
    error = livegraft(*first, *words, "--json", status=2).json["error"]
    assert said in error["what"] and error["next"]
