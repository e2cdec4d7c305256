"""New code under an old system-call filter: refused where the filter may kill for it, applied where it does not."""

from __future__ import annotations

import errno
import functools
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from elfdiff.diff import Options, diff
from elfdiff.errors import Busy, LivegraftError, NotPermitted, Refused
from elfdiff.patches.patchfile import read_patch, write_patch
from elfdiff.patchobject import PatchObject
from fixtures import seccomp
from fixtures.hearing import PATIENCE, next_line
from fixtures.tracees import Torture, compile_program, run_torture, running, state_of, wait_until
from patcher import seam
from patcher.pausing.conditions import Conditions
from patcher.process import surroundings
from patcher.transactions import filters
from patcher.transactions.filters import filter_programs
from patcher.transactions.transaction import apply, check, revert
from tests.conftest import Livegraft
from tests.live.answering import Answering
from tests.live.replacing import TIMEOUT, one, put
from tests.live.surroundings import SOURCE, at_liberty, enter, in_child, left_alone
from tests.patchmaker import compile_version

pytestmark = pytest.mark.root

PATIENT = Conditions(timeout=20)
UNDER = Path(seccomp.__file__)
GETPPID, MOUNT = 110, 165  # syscall_64.tbl
KILLING = {
    "strict": r"thread \d+ is in strict mode",
    "kill": r"the filter of thread \d+ may answer by SECCOMP_RET_KILL_PROCESS",
    "trap": r"the filter of thread \d+ may answer by SECCOMP_RET_TRAP",
    "other-filters": r"thread \d+ is in strict mode",
    "other-kill": r"the filter of thread \d+ may answer by SECCOMP_RET_KILL_PROCESS",
}
SPARING = ("errno", "notify", "no-write-execute-filter", "no-new-privileges")


@dataclass(frozen=True)
class Built:
    """Two builds of ``fixtures/surrounded.c``, and the patch without and with the finding lifted, as files, too."""

    old: Path
    new: Path
    files: tuple[Path, Path]
    patch: PatchObject
    allowed: PatchObject


def build(cache: Path, folder: Path, condition: str) -> Built:
    old, new = (
        compile_version(SOURCE, version, cache / "surrounded", "-fno-ipa-ra", f"-DNEW_IMPORT={condition}")
        for version in (1, 2)
    )
    files = folder / "fix", folder / "allowed"
    for file, allowed in zip(files, ((), ("new-import",)), strict=True):
        write_patch(diff(old, new, Options(allow=frozenset(allowed))), file)
    return Built(old, new, files, *map(read_patch, files))


@pytest.fixture(scope="module")
def built(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The new code has a call that it never makes."""
    return build(cache_folder, tmp_path_factory.mktemp("built"), "seed==77")


@pytest.fixture(scope="module")
def calling(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The new code makes its call each time."""
    return build(cache_folder, tmp_path_factory.mktemp("calling"), "1")


@contextmanager
def under(built: Built, *rules: seccomp.Rule, folder: Path) -> Iterator[Answering]:
    """The old build under a filter of libseccomp, which lets everything else pass."""
    lib = seccomp.library()
    if lib is None:
        pytest.skip("libseccomp is not installed")
    (folder / "filter").write_bytes(seccomp.made(lib, seccomp.ALLOW, rules))
    with Answering(Path(sys.executable), arguments=(UNDER, folder / "filter", "--", built.old)) as program:
        assert set(surroundings.seccomp_modes(program.pid).values()) == {2}
        yield program


def refused(program: Answering, patch: PatchObject, kind: type[LivegraftError], match: str) -> LivegraftError:
    """Assert that check and apply refuse, in the same words, and leave no trace."""
    said = set()
    for command in (check, apply):
        with left_alone(program), pytest.raises(kind, match="system-call filter of process") as caught:
            command(program.pid, patch, PATIENT)
        error = caught.value
        said.add((error.what, error.why, error.next_step))
    assert len(said) == 1
    caught.match(r"may kill it for what the new code calls")
    assert re.search(match, error.why), error.why
    assert "--allow new-import" in error.next_step
    return error


def there_and_back(program: Answering, patch: PatchObject) -> None:
    program.answers(1)
    check(program.pid, patch, PATIENT)
    program.answers(1)
    apply(program.pid, patch, PATIENT)
    program.answers(2)
    revert(program.pid, conditions=PATIENT)
    program.answers(1)
    program.never_mixed()
    at_liberty(program)


def test_the_patch_is_what_the_tests_are_about(built: Built) -> None:
    assert [item.name for item in built.patch.imports] == ["getppid"]
    for patch, lifted in ((built.patch, False), (built.allowed, True)):
        (finding,) = (item for item in patch.findings if item.code == "new-import")
        assert finding.lifted == lifted
        assert finding.severity == "warn"
        assert "filter" in finding.why


@pytest.mark.parametrize("what", KILLING)
def test_a_new_import_is_refused_where_a_filter_may_kill(built: Built, what: str) -> None:
    with Answering(built.old) as program:
        enter(program, what)
        error = refused(program, built.patch, Refused, KILLING[what])
        assert "the patch imports getppid, which the old build does not" in error.why
        there_and_back(program, built.allowed)
        assert program.ask("trapped") == "0"


@pytest.mark.parametrize("what", SPARING)
def test_a_new_import_is_applied_where_no_filter_kills(built: Built, what: str) -> None:
    with Answering(built.old) as program:
        there_and_back(program, built.patch)
        enter(program, what)
        there_and_back(program, built.patch)


def test_new_code_that_is_let_through_or_gets_an_error_goes_on(calling: Built) -> None:
    with Answering(calling.old) as program:
        enter(program, "errno")
        there_and_back(program, calling.patch)


def test_new_code_that_makes_a_forbidden_call_dies_of_it(calling: Built) -> None:
    """What all this is about: the apply succeeds, and the process dies some time after it."""
    with Answering(calling.old) as program:
        enter(program, "kill")
        refused(program, calling.patch, Refused, "SECCOMP_RET_KILL_PROCESS")
        apply(program.pid, calling.allowed, PATIENT)
        assert int(program.ask("calls")) > 0  # it lives until it comes to the call
        os.write(program.stdin, b"ask\n")
        wait_until(lambda: state_of(program.pid) == "Z", "its death")
    assert program._process.returncode == -signal.SIGSYS


def test_new_code_that_makes_a_trapped_call_gets_the_signal(calling: Built) -> None:
    with Answering(calling.old) as program:
        enter(program, "trap")
        refused(program, calling.patch, Refused, "SECCOMP_RET_TRAP")
        apply(program.pid, calling.allowed, PATIENT)
        program.answers(2)
        assert program.ask("trapped") == str(int(signal.SIGSYS))


def test_a_filter_of_libseccomp_is_asked_for_calls_of_64_bits_alone(built: Built, tmp_path: Path) -> None:
    """It kills for all other architectures, as those do that systemd makes."""
    with under(built, (seccomp.ERRNO | seccomp.EPERM, MOUNT), folder=tmp_path) as program:
        there_and_back(program, built.patch)
    with under(built, (seccomp.KILL_PROCESS, GETPPID), folder=tmp_path) as program:
        refused(program, built.patch, Refused, "SECCOMP_RET_KILL_PROCESS")


def test_every_filter_of_a_thread_is_asked(built: Built, tmp_path: Path) -> None:
    """A later one that only lets calls fail does not take away what an earlier one does, nor the other way round."""
    with under(built, (seccomp.KILL_PROCESS, GETPPID), folder=tmp_path) as program:
        enter(program, "no-write-execute-filter")
        refused(program, built.patch, Refused, "SECCOMP_RET_KILL_PROCESS")
    with under(built, (seccomp.ERRNO | seccomp.EPERM, MOUNT), folder=tmp_path) as program:
        enter(program, "no-write-execute-filter")
        check(program.pid, built.patch, PATIENT)
        enter(program, "kill")
        refused(program, built.patch, Refused, "SECCOMP_RET_KILL_PROCESS")


def test_a_patcher_that_may_not_read_filters_does_not_guess(built: Built) -> None:
    with Answering(built.old) as program:
        enter(program, "no-write-execute-filter")

        def without_rights() -> None:
            seccomp.enter(_ALLOW_ALL)  # a tracer that is under a filter itself is shown none
            apply(program.pid, built.patch, PATIENT)

        with left_alone(program):
            code, said = in_child(without_rights)
        assert code == NotPermitted.exit_code, said
        assert "cannot be read" in said and "EACCES" in said and "run as root" in said


_ALLOW_ALL = (0x06).to_bytes(4, "little") + seccomp.ALLOW.to_bytes(4, "little")


# -- the look itself --------------------------------------------------------------------------------------------


@pytest.fixture
def torture(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Iterator[Torture]:
    """The program that notices being stopped, under three filters."""
    lib = seccomp.library()
    if lib is None:
        pytest.skip("libseccomp is not installed")
    files = [tmp_path / f"filter{number}" for number in range(3)]
    for number, file in enumerate(files):
        file.write_bytes(seccomp.made(lib, seccomp.ALLOW, [(seccomp.ERRNO | seccomp.EPERM, MOUNT + number)]))
    script = tmp_path / "torture"
    program = compile_program("torture", tmp_path_factory.mktemp("tracees"))
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {UNDER} {" ".join(map(str, files))} -- {program} "$@"\n')
    script.chmod(0o755)
    with run_torture(script, tmp_path) as started:
        yield started


@pytest.mark.usefixtures("either")
def test_nobody_notices_the_look(torture: Torture) -> None:
    random.seed(3)
    for _ in range(30):
        modes = surroundings.seccomp_modes(torture.pid)
        assert set(modes.values()) == {2}
        assert len(filter_programs(torture.pid, modes, time.monotonic() + PATIENCE)) == 3
        time.sleep(random.uniform(0, 0.01))
    torture.wait_for_progress()
    assert torture.complaints == []


def at_the_look(does: Callable[[], int]) -> seam.Observer:
    return lambda name, _: does() if name == "SECCOMP_GET_FILTER" else 0


def test_a_look_at_many_threads_takes_several_stops(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "_LONGEST_LOOK", 0.0)
    seized: list[int] = []

    def observer(name: str, subject: int) -> int:
        if name == "SEIZE":
            seized.append(subject)
        return 0

    with Answering(built.old) as program:
        enter(program, "other-kill")
        modes = surroundings.seccomp_modes(program.pid)
        with seam.observe(observer), left_alone(program):
            found = filter_programs(program.pid, modes, time.monotonic() + PATIENCE)
        (tid,) = (tid for tid, mode in modes.items() if mode)
        assert list(found.values()) == [tid]
        assert sorted(seized) == sorted([*modes] * len(modes))
        refused(program, built.patch, Refused, KILLING["other-kill"])


def test_the_look_waits_for_a_thread_that_cannot_stop(tmp_path: Path) -> None:
    """As the pause does: a parent waits for its child of vfork(2) until the first stop has been given up."""
    with running([compile_program("states", tmp_path), "vfork"]) as target:
        wait_until(lambda: state_of(target.pid) == "D", "the parent to wait in vfork")
        modes = surroundings.seccomp_modes(target.pid)
        with pytest.raises(Busy):
            filter_programs(target.pid, modes, time.monotonic())
        let_go: list[str] = []

        def observer(name: str, _: int) -> int:
            if name == "DETACH" and not let_go:
                let_go.append(name)
                assert target.stdin is not None
                target.stdin.write("x")
                target.stdin.flush()
            return 0

        with seam.observe(observer):
            assert filter_programs(target.pid, modes, time.monotonic() + PATIENCE) == {}
        assert let_go
        assert next_line(target) == "over"


def test_a_patcher_killed_in_the_look_leaves_nothing(built: Built) -> None:
    def dies() -> None:
        with seam.observe(at_the_look(functools.partial(os.kill, os.getpid(), signal.SIGKILL))):  # type: ignore[arg-type]
            apply(program.pid, built.patch)

    with Answering(built.old) as program:
        enter(program, "errno")
        with left_alone(program):
            assert in_child(dies)[0] == -signal.SIGKILL
        there_and_back(program, built.patch)


@pytest.mark.parametrize("number", ["ESRCH", "EIO", "EACCES", "EINVAL", "ENOENT", "EMEDIUMTYPE"])
def test_a_look_that_fails_is_an_error_and_leaves_nothing(built: Built, number: str) -> None:
    with Answering(built.old) as program:
        enter(program, "errno")
        with left_alone(program), seam.observe(at_the_look(lambda: int(getattr(errno, number)))):
            with pytest.raises(LivegraftError) as caught:
                apply(program.pid, built.patch, PATIENT)
            assert caught.value.next_step
        there_and_back(program, built.patch)


def test_nothing_is_asked_where_nothing_can_happen(built: Built, tmp_path: Path) -> None:
    """No filter, no new function, or the finding lifted."""
    asked: list[str] = []

    def observer(name: str, _: int) -> int:
        asked.append(name)
        return 0

    other = compile_version(SOURCE, 3, tmp_path, "-fno-ipa-ra")  # without NEW_IMPORT it is another program
    plain = compile_version(SOURCE, 1, tmp_path, "-fno-ipa-ra")
    write_patch(diff(plain, other, Options()), tmp_path / "plain")
    patch = read_patch(tmp_path / "plain")
    assert not patch.imports
    with seam.observe(observer):
        with Answering(built.old) as program:
            apply(program.pid, built.patch, PATIENT)
            program.answers(2)
        with Answering(built.old) as program:
            enter(program, "kill")
            apply(program.pid, built.allowed, PATIENT)
            program.answers(2)
        with Answering(plain) as program:
            enter(program, "kill")
            apply(program.pid, patch, PATIENT)
            program.answers(3)
        assert "SEIZE" in asked and "SECCOMP_GET_FILTER" not in asked
        with Answering(built.old) as program:
            enter(program, "errno")
            apply(program.pid, built.patch, PATIENT)
            assert "SECCOMP_GET_FILTER" in asked
            asked.clear()
            assert apply(program.pid, built.patch, PATIENT).already
            assert "SECCOMP_GET_FILTER" not in asked


# -- by the command line ----------------------------------------------------------------------------------------


def test_the_commands_say_so(built: Built, livegraft: Livegraft) -> None:
    with Answering(built.old) as program:
        enter(program, "kill")
        with left_alone(program):
            done = livegraft("check", built.files[0], "--pid", program.pid, status=4)
            assert "may kill it for what the new code calls" in done.stderr and "Traceback" not in done.text
            error = livegraft("apply", built.files[0], "--pid", program.pid, "--json", status=4).json["error"]
            assert "getppid" in error["why"] and "--allow new-import" in error["next"]
        done = livegraft("apply", built.files[1], "--pid", program.pid, *TIMEOUT)
        assert "new-import, by --allow" in done.stdout
        program.answers(2)


def test_each_of_several_processes_is_asked(built: Built, livegraft: Livegraft, tmp_path: Path) -> None:
    program = tmp_path / built.old.name
    shutil.copy(built.old, program)
    with Answering(program) as free, Answering(program) as confined:
        enter(confined, "kill")
        with left_alone(confined):
            done = livegraft("apply", built.files[0], "--exe", program, "--all", "--json", *TIMEOUT, status=8)
        results = {item["pid"]: item for item in done.json["processes"]}
        assert results[free.pid]["result"] == "done"
        assert results[confined.pid]["result"] == "failed"
        assert "system-call filter" in results[confined.pid]["error"]["what"]
        free.answers(2)


def test_an_upgrade_is_refused_and_says_to_restart(
    built: Built, livegraft: Livegraft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / built.old.name
    put(built.old, place)
    with Answering(place) as program:
        enter(program, "kill")
        put(built.new, place)
        with left_alone(program):
            file = one(livegraft("upgrade", "--pid", program.pid, "--json", *TIMEOUT, status=4).json)
        assert file["result"] == "refused"
        assert "system-call filter" in file["error"]["what"] and "restart it" in file["error"]["next"]
