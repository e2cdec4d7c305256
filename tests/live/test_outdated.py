"""What runs from files that were deleted or replaced: found, told apart by build, and not found where all is well."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elfdiff.diff import Options, diff
from elfdiff.patches.patchfile import write_patch
from fixtures.daemon import Daemon, run_kv
from fixtures.hearing import next_line
from patcher.process.packages import owners
from patcher.targets.outdated import FileState, OutdatedProcess, survey, unit_of
from patcher.transactions.transaction import apply, revert
from tests.compile import Compiler
from tests.conftest import Livegraft

pytestmark = pytest.mark.root

Kv = Callable[..., Path]


def found(pid: int) -> OutdatedProcess | None:
    return next((process for process in survey().processes if process.pid == pid), None)


def states(pid: int) -> dict[str, FileState]:
    process = found(pid)
    return {Path(file.path).name: file.state for file in process.files} if process else {}


def put(source: Path, place: Path) -> None:
    """Put a file in the place of another as a package manager does: under another name first."""
    shutil.copy(source, place.with_name("arriving"))
    place.with_name("arriving").rename(place)


@pytest.fixture
def installed(kv: Kv, tmp_path: Path) -> Iterator[tuple[Daemon, Path]]:
    program = tmp_path / "kv"
    put(kv(1), program)
    with run_kv(program) as daemon:
        yield daemon, program


def test_what_runs_from_the_file_at_its_path_is_not_outdated(installed: tuple[Daemon, Path]) -> None:
    assert found(installed[0].pid) is None


def test_a_replaced_executable_is_a_new_build_until_it_is_patched(
    installed: tuple[Daemon, Path], kv: Kv, tmp_path: Path
) -> None:
    daemon, program = installed
    put(kv(2), program)
    process = found(daemon.pid)
    assert process is not None and not process.patches
    (file,) = process.files
    assert (file.path, file.state) == (str(program), FileState.NEW_BUILD)
    assert file.running != file.on_disk
    patch = write_patch(diff(kv(1), kv(2), Options()), tmp_path / "fix")
    assert (patch.old.build_id, patch.new.build_id) == (file.running, file.on_disk)
    apply(daemon.pid, patch)
    assert states(daemon.pid) == {"kv": FileState.PATCHED}
    put(kv(3), program)  # and another upgrade
    assert states(daemon.pid) == {"kv": FileState.NEW_BUILD}
    put(kv(2), program)
    revert(daemon.pid)
    assert states(daemon.pid) == {"kv": FileState.NEW_BUILD}


def test_the_same_build_again_and_no_build_at_all(installed: tuple[Daemon, Path], kv: Kv) -> None:
    daemon, program = installed
    put(kv(1), program)
    assert states(daemon.pid) == {"kv": FileState.SAME_BUILD}
    program.unlink()
    assert states(daemon.pid) == {"kv": FileState.GONE}
    program.write_text("no program\n")
    assert states(daemon.pid) == {"kv": FileState.GONE}


LIBRARY = "int answer(void) { return VERSION; }\n"
USER = """
#include <dlfcn.h>
#include <stdio.h>
int main(int count, char **words) {
    if (!dlopen(words[count - 1], RTLD_NOW)) return 1;
    puts("ready"); fflush(stdout);
    return getchar();
}
"""


def test_a_replaced_library_is_found_however_it_was_loaded(cache_folder: Path, tmp_path: Path) -> None:
    compiled = Compiler(cache_folder / "outdated")
    builds = [compiled(LIBRARY, f"-DVERSION={version}", link="library") for version in (1, 2)]
    library = tmp_path / "libanswer.so"
    put(builds[0], library)
    user = compiled(USER)
    with subprocess.Popen([user, library], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert next_line(process) == "ready"
        assert states(process.pid) == {}
        put(builds[1], library)
        assert states(process.pid) == {"libanswer.so": FileState.NEW_BUILD}


def test_another_mount_namespace_has_its_own_files(kv: Kv, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    put(kv(1), here / "kv")
    put(kv(2), there / "kv")
    script = 'mount --bind "$1" "$2" && exec "$2/kv" 0'
    # In the process's own view the file at its path is the one that it runs; in ours another lies there.
    command = ["unshare", "--mount", "sh", "-c", script, "sh", there, here]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            assert next_line(process)
            assert found(process.pid) is None
            put(kv(1), there / "kv")
            assert states(process.pid) == {"kv": FileState.NEW_BUILD}
        finally:
            process.kill()


def test_packages_are_those_that_the_manager_names() -> None:
    if shutil.which("dpkg-query") is None:
        pytest.skip("there is no dpkg here")
    command = ["dpkg-query", "--show", "--showformat", "${Version}", "dpkg"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert owners(["/usr/bin/dpkg", "/no/such/file"]) == {"/usr/bin/dpkg": f"dpkg {version}"}


def test_the_unit_is_the_control_group_that_is_one(installed: tuple[Daemon, Path], tmp_path: Path) -> None:
    assert unit_of(installed[0].pid) == ""
    for hierarchy in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup/pids")):
        group = hierarchy / "livegraft-test.service"
        try:
            group.mkdir()
        except OSError:
            continue
        if not (group / "cgroup.procs").exists():
            group.rmdir()  # where version 1 is mounted, the first is but a folder of hierarchies
            continue
        try:
            (group / "cgroup.procs").write_text(str(installed[0].pid))
        except OSError:
            group.rmdir()
            continue
        try:
            assert unit_of(installed[0].pid) == group.name
        finally:
            (hierarchy / "cgroup.procs").write_text(str(installed[0].pid))
            group.rmdir()
        return
    pytest.skip("no control group can be made here")


def test_workers_share_a_row(kv: Kv, tmp_path: Path, livegraft: Livegraft) -> None:
    program = tmp_path / "kv"
    put(kv(1), program)
    with run_kv(program) as first, run_kv(program) as second:
        put(kv(2), program)
        (row,) = [line for line in livegraft("outdated").stdout.splitlines() if str(program) in line.split()]
        assert row.split()[-1] == ",".join(map(str, sorted((first.pid, second.pid))))


def test_the_command_line(installed: tuple[Daemon, Path], kv: Kv, livegraft: Livegraft) -> None:
    daemon, program = installed
    put(kv(2), program)
    with run_kv(kv(1)):  # which is up to date
        (row,) = [line for line in livegraft("outdated").stdout.splitlines() if str(program) in line.split()]
    assert row.split() == ["kv", "new-build", str(program), "-", "-", str(daemon.pid)]
    listed = {process["pid"]: process for process in livegraft("outdated", "--json").json["processes"]}
    assert listed[daemon.pid]["files"][0]["state"] == "new-build"
    batch = livegraft("outdated", "--batch").stdout.splitlines()
    assert batch[0].startswith("NEEDRESTART-VER: ")
    assert f"LIVEGRAFT-PID: {daemon.pid} new-build {program}" in batch
