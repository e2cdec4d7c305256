"""Whole stacks of real threads: equal to gdb's, and to what the program says of itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from fixtures.stacks import Stacks, compile_program, gdb_stacks, run_stacks
from fixtures.tracees import wait_until
from patcher.process.memory import Memory
from patcher.process.proc import mappings
from patcher.stacks.foresight import words_on_stacks
from patcher.stacks.unwind import Stack, StackEnd, Unwinder
from patcher.stacks.unwindtables import UnwindTable, unwind_tables
from patcher.threads.stopping import seize

pytestmark = pytest.mark.root

PATIENCE = 60.0
"""Seconds for a thread to stop: on a busy machine it may have to wait for a processor."""

BUILDS = [
    ("gcc", "-O0"),
    ("gcc", "-O2"),
    ("gcc", "-O2", "-fomit-frame-pointer", "-fno-asynchronous-unwind-tables", "-funwind-tables"),
    ("gcc", "-O2", "-fno-omit-frame-pointer", "-no-pie"),
    ("gcc", "-Os", "-static"),
    ("clang", "-O2"),
    ("clang", "-O0", "-fomit-frame-pointer"),
]


@pytest.fixture(scope="module", params=BUILDS, ids=" ".join)
def stacks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stacks]:
    compiler, *flags = request.param
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    program = compile_program(
        "stacks.c",
        tmp_path_factory.mktemp("unwind") / "stacks",
        *flags,
        "-fno-optimize-sibling-calls",
        compiler=compiler,
    )
    with run_stacks(program) as running:
        running.wait_for_main()
        yield running


def unwind_all(pid: int, *, max_frames: int = 1024) -> dict[int, Stack]:
    with Memory(pid) as memory:
        unwinder = Unwinder(unwind_tables(mappings(pid), memory), memory.read)
        unwinder.prepare()
        with seize(pid) as process:
            process.stop(PATIENCE)
            return {
                thread.tid: unwinder.unwind(thread.registers, memory.read, max_frames=max_frames)
                for thread in process.threads
            }


EXPECTED = {
    "main": ["park", "wait_for_all", "main"],
    "deep": ["park", *["deep"] * 41, "thread_main"],
    "aligned": ["park", "variable", "aligned", "thread_main"],
    "callback": ["park", "by_value", "callback", "thread_main"],
    "last": ["park", "park_for_ever", "last_is_a_call", "leave", "last", "thread_main"],
    "in_vdso": ["in_vdso", "thread_main"],
    "in_plt": ["in_plt", "thread_main"],
    "interrupted": ["park", "handler", "interrupted", "thread_main"],
    "nested": ["park", "handler", "outer_handler", "interrupted", "thread_main"],
    "anywhere": ["park", "handler", "interrupted_anywhere", "thread_main"],
    "first": ["park", "handler", "first_instruction", "at_first_instruction", "thread_main"],
    "alternate": ["park", "handler", "interrupted", "alternate", "thread_main"],
    "alternate_nested": [
        *["park", "handler", "outer_handler"],
        *["interrupted", "alternate_nested", "thread_main"],
    ],
    "dirty": ["park", "over_stains", "dirty", "thread_main"],
    "in_register": ["in_register", "above_in_register", "thread_main"],
}
"""Those frames of each thread that lie in the program itself."""


def own_frames(stacks: Stacks, stack: Stack) -> list[str]:
    own = {name for names in EXPECTED.values() for name in names}
    names = [stacks.function_at(frame.executing) for frame in stack.frames]
    return [name for name in names if name in own]


def test_stacks_are_what_the_program_says(stacks: Stacks) -> None:
    found = unwind_all(stacks.pid)
    for name, frames in EXPECTED.items():
        stack = found[stacks.tids[name]]
        assert stack.complete and stack.end is StackEnd.OUTERMOST, (name, stack.why)
        assert own_frames(stacks, stack) == frames, name


def test_stacks_are_those_of_gdb(stacks: Stacks, tmp_path: Path) -> None:
    if shutil.which("gdb") is None:
        pytest.skip("gdb is not installed")
    with stacks.frozen():
        found = unwind_all(stacks.pid)
        expected = gdb_stacks(stacks.pid, tmp_path / "script")
    assert found.keys() == expected.keys()
    for name, tid in stacks.tids.items():
        pcs = [frame.pc for frame in found[tid].frames]
        if name in ("without_cfi", "dirty_without_cfi", "split"):
            # gdb guesses on, by reading the code; what we have must be the beginning of what it has.
            assert pcs == expected[tid][: len(pcs)]
        else:
            assert pcs == expected[tid], name


def test_a_function_without_unwind_information_ends_the_walk(stacks: Stacks) -> None:
    stack = unwind_all(stacks.pid)[stacks.tids["without_cfi"]]
    assert not stack.complete
    assert [stacks.function_at(frame.executing) for frame in stack.frames][-1] == "park"
    assert "no unwind information for" in stack.why


def test_return_addresses_and_interrupted_addresses_are_told_apart(stacks: Stacks) -> None:
    for stack in unwind_all(stacks.pid).values():
        assert not stack.frames[0].after_call
        for inner, outer in pairwise(stack.frames):
            assert outer.after_call is not inner.is_signal_frame


def test_interrupted_at_the_first_instruction(stacks: Stacks) -> None:
    stack = unwind_all(stacks.pid)[stacks.tids["first"]]
    start = stacks.function("first_instruction").start
    (frame,) = [frame for frame in stack.frames if frame.pc == start]
    assert frame.executing == start, "the byte before belongs to another function"


def test_threads_that_run_are_unwound_wherever_they_stop(stacks: Stacks) -> None:
    spinning = {stacks.tids[name]: name for name in ("in_vdso", "in_plt")}
    places: set[int] = set()
    with Memory(stacks.pid) as memory:
        unwinder = Unwinder(unwind_tables(mappings(stacks.pid), memory), memory.read)
        for _ in range(2000):  # ends after some twenty, unless the threads get no CPU
            with seize(stacks.pid) as process:
                process.stop(PATIENCE)
                for thread in process.threads:
                    if thread.tid in spinning:
                        stack = unwinder.unwind(thread.registers, memory.read)
                        assert stack.complete, stack.why
                        assert own_frames(stacks, stack) == EXPECTED[spinning[thread.tid]]
                        places.add(stack.frames[0].pc)
            if len(places) > 6:
                return
    raise AssertionError(f"the threads were met at {len(places)} places only")


def test_too_many_frames(stacks: Stacks) -> None:
    stack = unwind_all(stacks.pid, max_frames=20)[stacks.tids["deep"]]
    assert (len(stack.frames), stack.complete, stack.why) == (20, False, "more than 20 frames")


def test_without_tables_there_is_only_the_reason(stacks: Stacks) -> None:
    with Memory(stacks.pid) as memory, seize(stacks.pid) as process:
        process.stop(PATIENCE)
        registers = process.threads[0].registers
        assert not Unwinder([], memory.read).unwind(registers, memory.read).complete
        here = UnwindTable("nothing", registers.rip & ~0xFFF, (registers.rip | 0xFFF) + 1, 0x10)
        stack = Unwinder([here], memory.read).unwind(registers, memory.read)
    assert not stack.complete and stack.frames == ()
    assert "nothing: the unwind table is damaged" in stack.why


def test_an_unreadable_stack_is_incomplete(stacks: Stacks) -> None:
    def read(address: int, size: int) -> bytes:
        raise OSError(f"nothing at {address:#x}")

    with Memory(stacks.pid) as memory, seize(stacks.pid) as process:
        unwinder = Unwinder(unwind_tables(mappings(stacks.pid), memory), memory.read)
        process.stop(PATIENCE)
        for thread in process.threads:
            stack = unwinder.unwind(thread.registers, read)
            assert not stack.complete and "nothing at" in stack.why


# --- before the pause ---

RUNNING = {"in_vdso", "in_plt"}
UNFORESEEN = {"alternate", "alternate_nested", "split", "first", "in_register"}
"""What they are in is on another stack, farther up than is looked at, no return address, or in a register."""


def wait_until_all_wait(stacks: Stacks) -> None:
    """After an earlier stop they are woken one after the other, and make their system calls anew."""
    paths = [Path(f"/proc/{stacks.pid}/task/{tid}/syscall") for name, tid in stacks.tids.items() if name not in RUNNING]
    wait_until(lambda: all(path.read_text() != "running\n" for path in paths), "all threads wait")


def test_what_was_foreseen_is_not_read_in_the_pause(stacks: Stacks) -> None:
    reads = 0

    def read(address: int, size: int) -> bytes:
        nonlocal reads
        reads += 1
        return memory.read(address, size)

    with Memory(stacks.pid) as memory:
        unwinder = Unwinder(unwind_tables(mappings(stacks.pid), memory), read)
        unwinder.prepare()
        wait_until_all_wait(stacks)
        foreseen = unwinder.foresee(words_on_stacks(memory), 2000)
        before = reads
        unseen = {stacks.tids[name] for name in RUNNING | UNFORESEEN}
        with seize(stacks.pid) as process:
            process.stop(PATIENCE)
            seen = [thread for thread in process.threads if thread.tid not in unseen]
            frames = sum(len(unwinder.unwind(thread.registers, memory.read).frames) for thread in seen)
    assert frames > 100 and foreseen > 20
    assert reads == before


def test_foreseeing_has_a_limit(stacks: Stacks) -> None:
    with Memory(stacks.pid) as memory:
        unwinder = Unwinder(unwind_tables(mappings(stacks.pid), memory), memory.read)
        wait_until_all_wait(stacks)
        assert unwinder.foresee(words_on_stacks(memory), 7) == 7


def test_an_unwinder_is_renewed_without_reading_again_what_did_not_change(stacks: Stacks) -> None:
    reads: list[int] = []

    def read(address: int, size: int) -> bytes:
        reads.append(address)
        return memory.read(address, size)

    with Memory(stacks.pid) as memory:
        tables = unwind_tables(mappings(stacks.pid), memory)
        changed = tables[-1]
        unwinder = Unwinder(tables, read)
        unwinder.prepare()
        reads.clear()
        renewed = unwinder.renewed(tables, lambda table: table != changed)
        renewed.prepare()
        again = set(reads)
        reads.clear()
        Unwinder([changed], read).prepare()
        assert again == set(reads) and again
