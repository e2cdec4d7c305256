"""After an upgrade on disk: the processes that run the old files are patched to the new ones, or it is said why not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elfdiff import diff as differ
from elfdiff.diff import Options
from elfdiff.images.imagefile import load_image
from elfdiff.patchobject import PatchObject
from fixtures.build import DEFAULT
from fixtures.daemon import PROBES, Daemon, probe, run_kv
from fixtures.hearing import next_line
from fixtures.intact import altered_code
from fixtures.load import Load
from patcher.pausing.conditions import Conditions
from patcher.targets.outdated import OutdatedProcess
from patcher.targets.selection import By, Selection
from patcher.transactions.group import End, carry_out_each
from patcher.upgrade import upgrading
from patcher.upgrade.cache import PatchCache
from patcher.upgrade.upgrading import Fate, Upgrade, restart_of
from tests.conftest import ROOT, Livegraft
from tests.live.answering import CHANGED, versions
from tests.live.forking import SOURCE, Forking
from tests.live.replacing import TIMEOUT, one, put

pytestmark = pytest.mark.root

Kv = Callable[..., Path]
RATE = 3000.0


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the patches of this test are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "livegraft"


@pytest.fixture
def program(kv: Kv, tmp_path: Path) -> Path:
    """The old build, installed where no other process runs it."""
    place = tmp_path / "installed" / "kv"
    place.parent.mkdir()
    put(kv(1), place)
    return place


@pytest.fixture
def daemon(program: Path) -> Iterator[Daemon]:
    with run_kv(program) as running:
        yield running


def untouched(daemon: Daemon) -> bool:
    return probe(daemon.port) == PROBES[1] and altered_code(daemon.pid) == []


def test_there_under_load_again_and_back(daemon: Daemon, program: Path, kv: Kv, livegraft: Livegraft) -> None:
    put(kv(2), program)
    with Load(daemon.port, rate=RATE) as load:
        dry = livegraft("upgrade", "--pid", daemon.pid, "--dry-run", "--json", *TIMEOUT).json
        assert dry["dry_run"] and one(dry)["result"] == "patchable" and one(dry)["outcome"]["functions"]
        assert untouched(daemon)

        done = livegraft("upgrade", "--pid", daemon.pid, "--json", *TIMEOUT).json
        assert done["schema"] == 1 and done["exit"]["code"] == 0 and "error" not in done
        file = one(done)
        assert (file["path"], file["result"], file["state"]) == (str(program), "patched", "new-build")
        assert file["patch"] == one(dry)["patch"] and not file["compared"]  # the dry run did
        load.more(2000)
        assert probe(daemon.port) == PROBES[2]

        again = livegraft("upgrade", "--pid", daemon.pid, *TIMEOUT)
        assert f"{program}: patched already" in again.stdout
        livegraft("revert", "--pid", daemon.pid, *TIMEOUT)
        load.more(2000)
        assert untouched(daemon)
        report = load.stop()
    assert (report.failed, report.reconnects, report.failures) == (0, 0, ())


def test_what_is_refused_says_why_and_to_restart(daemon: Daemon, program: Path, kv: Kv, livegraft: Livegraft) -> None:
    put(kv(4), program)
    done = livegraft("upgrade", "--pid", daemon.pid, status=4)
    assert f"{program}: refused" in done.stdout and "finding    struct-layout: " in done.stdout
    assert f"next       restart it: end process {daemon.pid} (kv)" in done.stdout
    file = one(livegraft("upgrade", "--pid", daemon.pid, "--dry-run", "--json", status=4).json)
    assert file["result"] == "refused" and file["error"]["findings"] and "restart it" in file["error"]["next"]
    assert f"explained  livegraft inspect {file['mapped']} {program}" in done.stdout
    assert "struct-layout" in livegraft("inspect", file["mapped"], program).stdout
    assert untouched(daemon)


def test_a_refusal_is_found_once_and_not_kept(
    program: Path, kv: Kv, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def counted(old: Path, new: Path, options: Options) -> PatchObject:
        compared.append(new)
        return differ.diff(old, new, options)

    monkeypatch.setattr(upgrading, "diff", counted)
    with run_kv(program), run_kv(program), PatchCache(kept) as cache:
        put(kv(4), program)
        for runs in (1, 2):
            upgrade = Upgrade(cache, Conditions(), dry_run=False, everybody=False)
            group = carry_out_each(Selection(By.EXE, str(program), True), upgrade.act)
            assert group.exit_code == 4 and len(group.having(End.FAILED)) == 2 and len(compared) == runs
    assert list(kept.iterdir()) == []


def test_builds_that_differ_in_nothing_that_matters(
    daemon: Daemon, program: Path, kv: Kv, tmp_path: Path, livegraft: Livegraft
) -> None:
    build_id = bytes.fromhex(load_image(kv(1)).build_id)
    raw = kv(1).read_bytes()
    assert raw.count(build_id) == 1
    other = tmp_path / "other"
    shutil.copy(kv(1), other)
    other.write_bytes(raw.replace(build_id, bytes(len(build_id) - 1) + b"\1"))
    put(other, program)
    value = livegraft("upgrade", "--pid", daemon.pid, "--json", status=3).json
    assert one(value)["result"] == "nothing-to-patch" and value["processes"][0]["result"] == "not-concerned"
    put(kv(1), program)  # the same build again
    assert one(livegraft("upgrade", "--pid", daemon.pid, "--json", status=3).json)["state"] == "same-build"
    assert untouched(daemon)


def test_a_process_that_is_up_to_date_is_left_alone(daemon: Daemon, livegraft: Livegraft) -> None:
    value = livegraft("upgrade", "--pid", daemon.pid, "--json", status=3).json
    assert value["processes"][0]["files"] == [] and "not known to run an old build" in value["error"]["why"]


def test_each_pair_of_builds_is_compared_once(program: Path, kv: Kv, kept: Path, livegraft: Livegraft) -> None:
    def files(value: dict[str, Any]) -> list[dict[str, Any]]:
        return [file for process in value["processes"] for file in process["files"]]

    with run_kv(program) as first, run_kv(program) as second:
        put(kv(2), program)
        which = ("--exe", program, "--all", "--json", *TIMEOUT)
        done = files(livegraft("upgrade", *which).json)
        assert [file["compared"] for file in done] == [True, False]
        (entry,) = kept.iterdir()
        written = entry.stat().st_mtime_ns
        assert (kept.stat().st_mode & 0o777, probe(first.port), probe(second.port)) == (0o700, PROBES[2], PROBES[2])
        livegraft("revert", "--exe", program, "--all", *TIMEOUT)
        assert untouched(first) and untouched(second)
        again = files(livegraft("upgrade", *which).json)
        assert [(file["result"], file["compared"]) for file in again] == [("patched", False)] * 2
        assert [item.stat().st_mtime_ns for item in kept.iterdir()] == [written]
        assert probe(first.port) == probe(second.port) == PROBES[2]


@pytest.mark.parametrize("damage", ["cut", "a byte", "another pair", "others may write"])
def test_an_entry_that_cannot_be_believed_is_made_again(
    damage: str, daemon: Daemon, program: Path, kv: Kv, kept: Path, livegraft: Livegraft
) -> None:
    put(kv(3), program)
    livegraft("upgrade", "--pid", daemon.pid, "--dry-run", *TIMEOUT)
    (another,) = kept.iterdir()
    put(kv(2), program)
    livegraft("upgrade", "--pid", daemon.pid, "--dry-run", *TIMEOUT)
    (entry,) = set(kept.iterdir()) - {another}
    whole = entry.read_bytes()
    if damage == "cut":
        entry.write_bytes(whole[: len(whole) // 2])
    elif damage == "a byte":
        entry.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    elif damage == "another pair":
        shutil.copy(another, entry)
    else:
        entry.chmod(0o666)
    done = livegraft("upgrade", "--pid", daemon.pid, "--json", *TIMEOUT)
    assert one(done.json)["compared"] and done.json["cache"]["discarded"] == [entry.name]
    assert f"{entry.name} in {kept} could not be believed" in done.stderr
    assert entry.read_bytes() == whole and entry.stat().st_mode & 0o022 == 0
    assert probe(daemon.port) == PROBES[2]


def test_a_folder_that_others_may_write_to_is_refused(
    daemon: Daemon, program: Path, kv: Kv, kept: Path, livegraft: Livegraft
) -> None:
    put(kv(2), program)
    kept.mkdir(parents=True)
    kept.chmod(0o777)
    error = livegraft("upgrade", "--pid", daemon.pid, "--json", status=6).json["error"]
    assert str(kept) in error["what"] and "XDG_CACHE_HOME" in error["next"]
    assert untouched(daemon)


def test_a_deleted_file_without_a_successor(daemon: Daemon, program: Path, livegraft: Livegraft) -> None:
    program.unlink()
    file = one(livegraft("upgrade", "--pid", daemon.pid, "--json", status=4).json)
    assert (file["result"], file["state"]) == ("refused", "gone")
    assert f"there is no file {program}" in file["error"]["what"] and "restart it" in file["error"]["next"]
    program.write_text("no program\n")
    file = one(livegraft("upgrade", "--pid", daemon.pid, "--json", status=4).json)
    assert f"{program}: not an ELF file" in file["error"]["what"]
    shutil.copy("/bin/true", program.with_name("arriving"))
    program.with_name("arriving").rename(program)
    file = one(livegraft("upgrade", "--pid", daemon.pid, "--json", status=4).json)
    assert f"the running {program} and {program} are two different programs" in file["error"]["what"]
    assert untouched(daemon)


def test_a_file_that_others_could_have_written_is_refused(
    daemon: Daemon, program: Path, kv: Kv, livegraft: Livegraft
) -> None:
    put(kv(2), program)
    program.chmod(0o777)
    error = one(livegraft("upgrade", "--pid", daemon.pid, "--json", status=4).json)["error"]
    assert "could have been written by others" in error["what"]
    program.chmod(0o755)
    shutil.chown(program, 12345)
    error = one(livegraft("upgrade", "--pid", daemon.pid, "--json", status=4).json)["error"]
    assert "user 12345 owns it" in error["why"]
    assert untouched(daemon)


@pytest.mark.parametrize("how", ["replaced", "deleted", "written to"])
def test_a_file_that_is_replaced_meanwhile_is_noticed(
    how: str, daemon: Daemon, program: Path, kv: Kv, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meddling(old: Path, new: Path, options: Options) -> PatchObject:
        patch = differ.diff(old, new, options)
        if how == "replaced":
            put(kv(3), program)
        elif how == "deleted":
            program.unlink()
        else:
            program.write_bytes(kv(3).read_bytes())
        return patch

    put(kv(2), program)
    monkeypatch.setattr(upgrading, "diff", meddling)
    with PatchCache(kept) as cache:
        upgrade = Upgrade(cache, Conditions(), dry_run=False, everybody=False)
        group = carry_out_each(Selection(By.PID, str(daemon.pid)), upgrade.act)
    assert group.exit_code == 1 and list(kept.iterdir()) == []
    (file,) = upgrade.done[group.results[0].process.key].files
    assert file.error is not None and "was replaced while it was compared" in file.error.what
    assert "try again" in file.error.next_step and untouched(daemon)


def test_another_mount_namespace_has_its_own_files(kv: Kv, tmp_path: Path, livegraft: Livegraft) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        put(kv(1), folder / "kv")
    put(kv(3), here / "kv")  # what lies at the same path in our namespace is not what the process is upgraded to
    script = 'mount --bind "$1" "$2" && exec "$2/kv" 0'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", there, here]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            port = int(next_line(process).split()[1])
            (there / "kv").unlink()
            assert one(livegraft("upgrade", "--pid", process.pid, "--json", status=4).json)["result"] == "refused"
            (there / "kv").symlink_to(kv(2))  # would lead out of it
            assert one(livegraft("upgrade", "--pid", process.pid, "--json", status=4).json)["result"] == "refused"
            assert probe(port) == PROBES[1]
            put(kv(2), there / "kv")
            assert one(livegraft("upgrade", "--pid", process.pid, "--json", *TIMEOUT).json)["result"] == "patched"
            assert probe(port) == PROBES[2]
        finally:
            process.kill()


def test_a_master_and_its_workers(cache_folder: Path, tmp_path: Path, livegraft: Livegraft) -> None:
    built = versions(cache_folder / "forking", source=SOURCE, changed=CHANGED)
    program = tmp_path / f"fork{os.getpid()}"
    put(built.programs[1], program)
    with Forking(program, 2) as master:
        put(built.programs[2], program)
        value = livegraft("upgrade", "--tree", master.pid, "--json", *TIMEOUT).json
        assert [item["pid"] for item in value["processes"]] == [master.pid, *master.workers]
        assert master.versions() == [2, 2, 2]
        master.fork()  # which has the patch from its parent
        value = livegraft("upgrade", "--exe", program, "--all", "--json", *TIMEOUT).json
        assert [file["result"] for item in value["processes"] for file in item["files"]] == ["already"] * 4
        put(built.programs[3], program)  # another upgrade, on top of the first
        livegraft("upgrade", "--exe", program, "--all", *TIMEOUT)
        assert master.versions() == [3] * 4


def test_what_runs_in_a_chroot_is_upgraded_to_what_lies_there(kv: Kv, tmp_path: Path, livegraft: Livegraft) -> None:
    static = replace(DEFAULT, link="static")
    program = tmp_path / "jail" / "kv"
    program.parent.mkdir()
    put(kv(1, static), program)
    command = ["chroot", program.parent, "/kv", "0"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            port = int(next_line(process).split()[1])
            put(kv(2, static), program)
            file = one(livegraft("upgrade", "--pid", process.pid, "--json", *TIMEOUT).json)
            assert (file["path"], file["result"]) == (str(program), "patched") and probe(port) == PROBES[2]
        finally:
            process.kill()


ALONE = """
mkfifo "$3/said"
"$1" 0 > "$3/said" &
read word port < "$3/said"
cp "$2" "$3/arriving" && mv "$3/arriving" "$1"
shift 3
exec "$@"
"""


def alone(program: Path, new: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run livegraft where there are no other processes than the daemon: what is meant for all of them."""
    folder.mkdir()
    tool = [sys.executable, "-c", "import sys; from patcher.cli import main; sys.exit(main())", "upgrade", *words]
    own = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", ALONE, "sh", program, new, folder]
    return subprocess.run([*own, *tool], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def test_all_processes_of_the_machine_only_with_leave(program: Path, kv: Kv, tmp_path: Path) -> None:
    done = alone(program, kv(2), tmp_path / "one")
    assert done.returncode == 2 and "--all for all of them" in done.stderr and f"kv {program}" in done.stderr
    put(kv(1), program)
    done = alone(program, kv(2), tmp_path / "two", "--all", *map(str, TIMEOUT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{program}: patched" in done.stdout and done.stdout.count("(pid ") == 1
    put(kv(1), program)
    done = alone(program, kv(1), tmp_path / "three", "--all")
    assert done.returncode == 3, done.stdout + done.stderr


def test_one_that_runs_the_new_build_already_is_passed_over(daemon: Daemon, program: Path, kv: Kv, kept: Path) -> None:
    put(kv(2), program)
    with run_kv(program) as newer, PatchCache(kept) as cache:
        upgrade = Upgrade(cache, Conditions(60.0), dry_run=False, everybody=False)
        group = carry_out_each(Selection(By.EXE, str(program), True), upgrade.act)
        ends = {item.process.pid: item.end for item in group.results}
        assert ends == {daemon.pid: End.DONE, newer.pid: End.PASSED}
        assert probe(daemon.port) == probe(newer.port) == PROBES[2] and altered_code(newer.pid) == []
    assert [file.fate for done in upgrade.done.values() for file in done.files] == [Fate.PATCHED]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pid", "0"], "not a process id"),
        (["--pid", "1", "--name", "x"], "not allowed with"),
        (["--pid", "1", "--all"], "does not go with --pid"),
        (["--pid", "4194303"], "there is no process"),
        (["--name", "no process has it"], "matches no process"),
        (["--atomic", "--all"], "unrecognized arguments"),
    ],
)
def test_wrong_usage(livegraft: Livegraft, words: list[str], said: str) -> None:
    done = livegraft("upgrade", *words, status=2)
    assert said in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_how_it_is_restarted() -> None:
    process = OutdatedProcess(7, "nginx", 0, "nginx.service", (), ())
    assert restart_of(process) == "systemctl restart nginx.service"
    assert "end process 7 (nginx)" in restart_of(replace(process, unit="session-1.scope"))
