"""Apply and revert on running programs: the new behaviour comes, the old one goes, and nothing is left over."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from elfdiff.errors import Busy, LivegraftError, NotPermitted, Refused, TargetDamaged
from elfdiff.patchobject import FIRST_IMPORT, RELOCATION_DTYPE, Import, RelocationType
from fixtures.intact import altered_code
from patcher.pausing.conditions import Conditions
from patcher.process.memory import Memory
from patcher.process.proc import mappings
from patcher.records.record import State, encode_slot
from patcher.threads.exclusive import exclusive
from patcher.threads.stopping import seize
from patcher.transactions.inspection import inspect_process
from patcher.transactions.transaction import apply, check, revert
from tests.live.answering import CHANGED, SPREAD, Answering, Versions, versions
from tests.patchmaker import make_patch

pytestmark = pytest.mark.root


@pytest.fixture(scope="session")
def folder(cache_folder: Path) -> Path:
    return cache_folder / "answer"


@pytest.fixture(scope="session")
def built(folder: Path) -> Versions:
    return versions(folder)


@pytest.fixture
def running(built: Versions) -> Iterator[Answering]:
    with Answering(built.programs[1]) as program:
        yield program


def states(pid: int) -> list[State]:
    return [item.record.state for item in inspect_process(pid).patches]


KINDS = {"pie": (), "no-pie": ("-no-pie",), "static": ("-static",), "static-pie": ("-static-pie",)}


@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS.keys())
def test_apply_changes_the_answer_of_all_threads_and_revert_changes_it_back(
    folder: Path, flags: tuple[str, ...]
) -> None:
    built = versions(folder, *flags)
    with Answering(built.programs[1]) as program:
        program.answers(1)
        outcome = apply(program.pid, built.to[2])
        program.answers(2)
        assert outcome.pause is not None and outcome.pause.threads == 5
        assert states(program.pid) == [State.APPLIED]
        assert altered_code(program.pid)
        revert(program.pid)
        program.answers(1)
        assert states(program.pid) == [State.REVERTED]
        assert not altered_code(program.pid)
        program.never_mixed()
        assert program.ask("pages") == "mapped"


def test_no_page_of_a_patch_is_writable_and_executable(running: Answering, built: Versions) -> None:
    apply(running.pid, built.to[2])
    assert running.patch_mappings == 3
    assert not [line for line in running.maps if "wx" in line]


def test_applying_twice_is_success_and_writes_nothing(running: Answering, built: Versions) -> None:
    apply(running.pid, built.to[2])
    before = running.code(), running.maps
    again = apply(running.pid, built.to[2])
    assert again.already and again.pause is None
    assert (running.code(), running.maps) == before


def test_fifty_cycles_grow_nothing(running: Answering, built: Versions) -> None:
    apply(running.pid, built.to[2])
    revert(running.pid)
    before = running.maps, running.descriptors
    for _ in range(50):
        assert not apply(running.pid, built.to[2]).already
        running.answers(2)
        revert(running.pid)
        running.answers(1)
    assert (running.maps, running.descriptors) == before
    running.never_mixed()


def test_a_third_version_replaces_the_second_in_one_stop(running: Answering, built: Versions) -> None:
    apply(running.pid, built.to[2])
    outcome = apply(running.pid, built.to[3])
    running.answers(3)
    assert [item.contents.patch for item in outcome.others] == [built.to[2].id]
    assert sorted(states(running.pid)) == [State.APPLIED, State.REPLACED]
    revert(running.pid)
    running.answers(1)
    assert not altered_code(running.pid)
    running.never_mixed()


def test_going_to_and_fro_between_two_patches_grows_nothing(running: Answering, built: Versions) -> None:
    for version in (2, 3, 2, 3):
        apply(running.pid, built.to[version])
    before = running.maps
    for version in (2, 3) * 5:
        apply(running.pid, built.to[version])
        running.answers(version)
    assert running.maps == before
    revert(running.pid)
    running.answers(1)
    assert not altered_code(running.pid)


def test_a_patch_of_fewer_functions_gives_the_others_back(running: Answering, built: Versions) -> None:
    apply(running.pid, built.to[2])
    less = make_patch(built.programs[1], built.programs[3], "held")
    apply(running.pid, less)
    running.answers(1)
    apply(running.pid, built.to[2])
    running.answers(2)


def test_a_live_function_is_busy_and_leaves_no_trace(running: Answering, built: Versions) -> None:
    running.ask("hold")
    before = running.code(), running.maps, running.descriptors
    with pytest.raises(Busy) as caught:
        apply(running.pid, built.to[2], Conditions(timeout=0.3))
    assert "held" in caught.value.what
    assert any("libc" in line for line in caught.value.details)
    assert (running.code(), running.maps, running.descriptors) == before
    assert not states(running.pid)
    running.answers(1)
    running.ask("release")
    apply(running.pid, built.to[2])
    running.answers(2)


def test_a_thread_in_the_new_code_keeps_it_from_being_reverted(running: Answering, built: Versions) -> None:
    apply(running.pid, built.to[2])
    running.ask("hold")
    with pytest.raises(Busy) as caught:
        revert(running.pid, conditions=Conditions(timeout=0.3))
    assert built.to[2].id[:12] in caught.value.what
    running.answers(2)
    assert states(running.pid) == [State.APPLIED]
    running.ask("release")
    revert(running.pid)
    running.answers(1)


def test_check_writes_nothing_and_answers_like_apply(running: Answering, built: Versions) -> None:
    before = running.code(), running.maps
    outcome = check(running.pid, built.to[2])
    assert outcome.state is State.PREPARED and outcome.pause is not None
    assert (running.code(), running.maps) == before
    running.answers(1)
    running.ask("hold")
    with pytest.raises(Busy):
        check(running.pid, built.to[2], Conditions(timeout=0.2))


def test_a_process_whose_file_was_replaced_is_patched_from_memory(built: Versions, tmp_path: Path) -> None:
    program = tmp_path / "answer"
    program.write_bytes(built.programs[1].read_bytes())
    program.chmod(0o755)
    with Answering(program) as running:
        program.unlink()
        program.write_bytes(built.programs[2].read_bytes())
        apply(running.pid, built.to[2])
        running.answers(2)


@pytest.mark.parametrize(("version", "message"), [(2, "already runs the new build"), (3, "another build")])
def test_another_build_is_refused(built: Versions, version: int, message: str) -> None:
    with Answering(built.programs[version]) as running:
        before = running.code(), running.maps
        with pytest.raises(Refused, match=message) as caught:
            apply(running.pid, built.to[2])
        assert built.to[version].new.build_id in caught.value.why
        assert (running.code(), running.maps) == before


def test_code_that_somebody_else_changed_is_refused(running: Answering, built: Versions) -> None:
    held = next(item for item in built.to[2].checked if item.name == "held")
    image = next(item for item in running.maps if "answer" in item)
    address = int(image.split("-")[0], 16) + held.start + held.size - 1
    with Memory(running.pid) as memory:
        memory.write(address, b"\xcc")
    with pytest.raises(Refused, match="not the code of build") as caught:
        apply(running.pid, built.to[2])
    assert "held" in caught.value.why
    running.answers(1)


def test_an_entry_that_was_changed_after_a_revert_is_noticed(running: Answering, built: Versions) -> None:
    apply(running.pid, built.to[2])
    revert(running.pid)
    functions = inspect_process(running.pid).patches[0].record.contents.functions
    held = next(item for item in functions if item.name == "held")
    assert held.old_start is not None
    with Memory(running.pid) as memory:
        memory.write(held.old_start, b"\xcc")
    for patch in (built.to[2], built.to[3]):
        with pytest.raises(Refused, match="not the code of build"):
            apply(running.pid, patch)
    running.answers(1)


def test_an_entry_that_somebody_else_changed_is_not_reverted(running: Answering, built: Versions) -> None:
    apply(running.pid, built.to[2])
    held = next(
        item for item in inspect_process(running.pid).patches[0].record.contents.functions if item.name == "held"
    )
    assert held.old_start is not None
    with Memory(running.pid) as memory:
        memory.write(held.old_start, b"\xcc")
    with pytest.raises(Refused, match="changed by somebody else"):
        revert(running.pid)
    running.answers(2)


@pytest.mark.parametrize("step", range(11))
def test_a_failure_between_two_writes_is_rolled_back(folder: Path, step: int) -> None:
    built = versions(folder, SPREAD)
    seen = 0

    def fail(name: str) -> None:
        nonlocal seen
        if name in ("begun", "page"):
            if seen == step:
                raise LivegraftError("made to fail")
            seen += 1

    with Answering(built.programs[1]) as running:
        before = running.code(), running.maps, running.descriptors
        with pytest.raises(LivegraftError, match="made to fail"):
            apply(running.pid, built.to[2], on_step=fail)
        assert seen == step
        assert (running.code(), running.maps, running.descriptors) == before
        running.answers(1)
        apply(running.pid, built.to[2])
        running.answers(2)
        running.never_mixed()


def test_an_interrupt_in_the_pause_acts_after_it_and_unmaps_nothing(running: Answering, built: Versions) -> None:
    def interrupt(name: str) -> None:
        if name == "begun":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        apply(running.pid, built.to[2], on_step=interrupt)
    running.answers(2)
    assert states(running.pid) == [State.APPLIED]
    revert(running.pid)
    running.answers(1)


def test_without_a_free_descriptor_the_patch_is_mapped_anonymously(running: Answering, built: Versions) -> None:
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (running.descriptors, 4096))
    apply(running.pid, built.to[2])
    running.answers(2)
    assert running.patch_mappings == 0
    assert states(running.pid) == [State.APPLIED]
    revert(running.pid)
    running.answers(1)
    maps = len(running.maps)
    apply(running.pid, built.to[2])
    running.answers(2)
    assert len(running.maps) == maps
    assert not [line for line in running.maps if "wx" in line]


@pytest.mark.parametrize(("level", "files"), [(1, 3), (2, 0)])
def test_where_memory_files_are_not_executable_the_patch_is_mapped_all_the_same(
    built: Versions, level: int, files: int
) -> None:
    setting = Path("/proc/sys/vm/memfd_noexec")
    if not setting.exists() or shutil.which("unshare") is None:
        pytest.skip("the kernel has no vm.memfd_noexec, or there is no unshare to try it in")
    # The setting belongs to a pid namespace: 1 makes files executable on demand only, 2 never (kernel 6.3).
    script = f'echo {level} > {setting} && exec "$0"'
    with Answering(built.programs[1], ("unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", script)) as inside:
        apply(inside.pid, built.to[2])
        inside.answers(2)
        assert inside.patch_mappings == files
        revert(inside.pid)
        inside.answers(1)


def test_a_record_that_was_tampered_with_stops_everything(running: Answering, built: Versions) -> None:
    apply(running.pid, built.to[2])
    record = inspect_process(running.pid).patches[0].record
    with Memory(running.pid) as memory:
        memory.write(record.address + record.slot + 60, b"?")
    found = inspect_process(running.pid)
    assert not found.patches and [item.address for item in found.damaged] == [record.address]
    for act in (lambda: revert(running.pid), lambda: apply(running.pid, built.to[3])):
        with pytest.raises(TargetDamaged, match="record"):
            act()
    running.answers(2)


def forge(pid: int, **changes: object) -> None:
    """Let the program write its own record: well-formed, and false."""
    record = inspect_process(pid).patches[0].record
    entry = replace(record.contents.journal[0], **changes)  # type: ignore[arg-type]
    contents = replace(record.contents, journal=(entry, *record.contents.journal[1:]))
    with Memory(pid) as memory:
        memory.write(record.address + record.slot, encode_slot(contents))


@pytest.mark.parametrize(
    "changes",
    [
        {"pristine": b"\xcc" * 5},
        {"after": b"\xe9\0\0\0\0"},
        {"after": b"\xcc" * 5},
        {"address": 0x1000},
        {"pristine": b"\xcc" * 4, "before": b"\xcc" * 4, "after": b"\xcc" * 4},
    ],
)
def test_a_forged_record_gets_nothing_written(running: Answering, built: Versions, changes: dict[str, object]) -> None:
    apply(running.pid, built.to[2])
    forge(running.pid, **changes)
    assert states(running.pid) == [State.APPLIED]
    before = running.code()
    for act in (lambda: revert(running.pid), lambda: apply(running.pid, built.to[3])):
        with pytest.raises(TargetDamaged, match="cannot be believed"):
            act()
    assert running.code() == before
    running.answers(2)


def test_a_process_that_is_traced_is_left_alone_and_the_tracer_named(running: Answering, built: Versions) -> None:
    ready, done = os.pipe(), os.pipe()
    tracer = os.fork()
    if tracer == 0:
        with seize(running.pid):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        with pytest.raises(NotPermitted, match="traced already") as caught:
            apply(running.pid, built.to[2])
        assert str(tracer) in caught.value.why
    finally:
        os.write(done[1], b"x")
        os.waitpid(tracer, 0)
    apply(running.pid, built.to[2])
    running.answers(2)


def test_two_livegrafts_do_not_work_on_one_process(running: Answering, built: Versions) -> None:
    with exclusive(running.pid, "syscall"), pytest.raises(Busy, match="another livegraft"):
        apply(running.pid, built.to[2])
    running.answers(1)


def test_an_import_is_resolved_in_the_process(running: Answering, built: Versions) -> None:
    patch = built.to[2]
    place = patch.segments[1].vaddr + 0xF00
    row = np.array([(place, RelocationType.ABS64, FIRST_IMPORT, 0)], dtype=RELOCATION_DTYPE)
    importing = replace(
        patch,
        id="1" * 64,
        imports=(Import("getppid", "GLIBC_2.2.5"),),
        relocations=np.sort(np.concatenate((patch.relocations, row)), order="place"),
    )
    outcome = apply(running.pid, importing)
    libc = next(item for item in mappings(running.pid) if item.path.endswith("/libc.so.6"))
    listing = subprocess.run(["nm", "-D", libc.path], capture_output=True, text=True, check=True).stdout
    value = next(line.split()[0] for line in listing.splitlines() if " getppid@" in line)
    with Memory(running.pid) as memory:
        slot = memory.read(place + outcome.contents.new_bias, 8)
    assert int.from_bytes(slot, "little") == libc.start + int(value, 16)
    running.answers(2)


def test_functions_of_the_patch_are_those_that_were_named(running: Answering, built: Versions) -> None:
    outcome = apply(running.pid, built.to[2])
    assert {item.name for item in outcome.contents.functions} == set(CHANGED)
