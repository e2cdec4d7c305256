"""Live functions are found, dead ones are not, and what cannot be known counts as live."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures.hearing import next_line
from fixtures.stacks import Stacks, compile_program, run_stacks
from patcher.process.memory import Memory
from patcher.process.proc import mappings
from patcher.stacks.forbidden import ForbiddenRange
from patcher.stacks.quiescence import ANY_FUNCTION, LiveFrame, Quiescence, StackCheck
from patcher.stacks.stackmemory import StackMemory
from patcher.stacks.unwind import Unwinder
from patcher.stacks.unwindtables import unwind_tables
from patcher.threads.registers_x86_64 import Registers
from patcher.threads.stopped import StoppedThread
from patcher.threads.stopping import seize

from .test_unwind import EXPECTED

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("either")]

PATIENCE = 60.0
"""Seconds for a thread to stop: on a busy machine it may have to wait for a processor."""

FLAGS = ("-O2", "-fno-optimize-sibling-calls")


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stacks]:
    program = compile_program("stacks.c", tmp_path_factory.mktemp("quiescence") / "stacks", *FLAGS)
    with run_stacks(program) as running:
        running.wait_for_main()
        yield running


@pytest.fixture
def memory(stacks: Stacks) -> Iterator[Memory]:
    with Memory(stacks.pid) as memory:
        yield memory


def function_range(stacks: Stacks, name: str, *, harmless_at_start: bool = True) -> ForbiddenRange:
    function = stacks.function(name)
    return ForbiddenRange(name, function.start, function.end, harmless_at_start)


def check(stacks: Stacks, memory: Memory, *ranges: ForbiddenRange, max_stack: int = 8 << 20) -> Quiescence:
    with StackCheck(memory, ranges, max_stack=max_stack) as stack_check, seize(stacks.pid) as process:
        process.stop(PATIENCE)
        return stack_check.check(process.threads)


def check_function(stacks: Stacks, memory: Memory, name: str) -> Quiescence:
    return check(stacks, memory, function_range(stacks, name))


def threads_of(stacks: Stacks, live: tuple[LiveFrame, ...]) -> set[str]:
    names = {tid: name for name, tid in stacks.tids.items()}
    return {names[frame.tid] for frame in live}


ENTRIES = {"thread_main", "main"}
WITHOUT_CFI = {
    "without_cfi": {"without_cfi", "above_without_cfi", "thread_main"},
    "dirty_without_cfi": {
        "without_cfi",
        "over_stains_without_cfi",
        "dirty_without_cfi",
        "stain",
        "thread_main",
    },
    "split": {"without_cfi", "split", "above_split", "thread_main"},
}
"""What counts as live in those threads behind the function that cannot be unwound."""
FUNCTIONS = sorted(
    {name for names in EXPECTED.values() for name in names}
    | {n for names in WITHOUT_CFI.values() for n in names}
)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_live_function_is_found_in_the_threads_that_it_is_live_in(
    stacks: Stacks, memory: Memory, name: str
) -> None:
    found = check_function(stacks, memory, name)
    # At its first instruction a function with an entry jump is not live: that is asked elsewhere.
    certain = {thread for thread, names in EXPECTED.items() if name in names and name != "first_instruction"}
    if name == "park":
        certain |= WITHOUT_CFI.keys()
    uncertain = {thread for thread, names in WITHOUT_CFI.items() if name in names}
    assert threads_of(stacks, tuple(f for f in found.live if f.certain)) == certain
    assert threads_of(stacks, tuple(f for f in found.live if not f.certain)) == uncertain
    assert found.quiescent == (not found.live)
    assert found.threads_checked == len(stacks.tids)


def test_frames_say_where_they_are(stacks: Stacks, memory: Memory) -> None:
    (frame,) = check_function(stacks, memory, "outer_handler").live[:1]
    assert (
        frame.name == "outer_handler"
        and frame.depth is not None
        and frame.why == "waits for a call to return"
    )
    assert frame.stack[frame.depth] == frame.pc
    function = stacks.function("outer_handler")
    assert function.start < frame.pc <= function.end
    names = [stacks.function_at(pc - 1) for pc in frame.stack]
    assert names.index("park") < frame.depth < names.index("interrupted")


def test_every_activation_is_reported(stacks: Stacks, memory: Memory) -> None:
    assert len(check_function(stacks, memory, "deep").live) == 41


def test_a_function_that_nobody_is_in(stacks: Stacks, memory: Memory) -> None:
    found = check_function(stacks, memory, "never_called")
    assert found.quiescent and found.unwound == 0
    assert found.bytes_scanned > 2000 * len(stacks.tids)


def test_many_functions_at_once(stacks: Stacks, memory: Memory) -> None:
    names = ["never_called", "callback", "variable", "alternate"]
    found = check(stacks, memory, *(function_range(stacks, name) for name in names))
    assert {frame.name for frame in found.live} == {"callback", "variable", "alternate"}
    assert threads_of(stacks, found.live) == {"callback", "aligned", "alternate"}


# --- words that are left over ---


def test_a_stale_word_is_cleared_by_unwinding(stacks: Stacks, memory: Memory) -> None:
    found = check_function(stacks, memory, "stain")
    assert threads_of(stacks, found.live) == {"dirty_without_cfi"}, "not the thread that can be unwound"
    assert found.unwound >= 2, "the words are on both stacks"


def test_a_stale_word_counts_where_unwinding_ends_early(stacks: Stacks, memory: Memory) -> None:
    (frame,) = check_function(stacks, memory, "stain").live
    assert not frame.certain and frame.depth is None
    assert "cannot be unwound" in frame.why and "no unwind information" in frame.why


# --- program counters ---


@pytest.mark.parametrize(
    ("low", "high", "harmless", "live"),
    [
        (0, 1, False, True),
        (0, 1, True, False),
        (-3, 1, True, True),
        (-5, 0, True, False),
        (1, 9, False, False),
    ],
)
def test_a_program_counter_inside_a_range(
    stacks: Stacks, memory: Memory, low: int, high: int, harmless: bool, live: bool
) -> None:
    with seize(stacks.pid) as process:
        process.stop(PATIENCE)
        (thread,) = (t for t in process.threads if t.tid == stacks.tids["in_register"])
        pc = thread.registers.rip
        forbidden = ForbiddenRange("here", pc + low, pc + high, harmless)
        with StackCheck(memory, [forbidden]) as stack_check:
            found = stack_check.check(process.threads)
    if not live:
        assert found.quiescent
    else:
        (frame,) = found.live
        assert (frame.pc, frame.depth, frame.certain, frame.why) == (pc, 0, True, "is executing")


def test_interrupted_before_the_first_instruction(stacks: Stacks, memory: Memory) -> None:
    harmless = check(stacks, memory, function_range(stacks, "first_instruction", harmless_at_start=True))
    assert harmless.quiescent
    found = check(stacks, memory, function_range(stacks, "first_instruction", harmless_at_start=False))
    (frame,) = found.live
    assert frame.certain and frame.pc == stacks.function("first_instruction").start
    assert threads_of(stacks, found.live) == {"first"}


def test_a_function_that_ends_with_the_call_that_it_is_in(stacks: Stacks, memory: Memory) -> None:
    (frame,) = check_function(stacks, memory, "last_is_a_call").live
    end = stacks.function("last_is_a_call").end
    beyond = ForbiddenRange("beyond", end, end + 8)
    assert frame.pc <= end
    assert check(stacks, memory, beyond).quiescent, "the return address is not in the next function"


def test_a_return_address_in_a_register_only(stacks: Stacks, memory: Memory) -> None:
    (frame,) = check_function(stacks, memory, "above_in_register").live
    assert frame.certain and threads_of(stacks, (frame,)) == {"in_register"}


# --- stacks ---


def test_the_interrupted_stack_of_a_thread_on_an_alternate_stack(stacks: Stacks, memory: Memory) -> None:
    """Without following the signal frame there would be no hit, and so no unwinding."""
    found = check_function(stacks, memory, "alternate")
    (frame,) = found.live
    assert frame.certain
    tid = stacks.tids["alternate"]
    with seize(stacks.pid) as process:
        process.stop(PATIENCE)
        (pointer,) = (t.registers.rsp for t in process.threads if t.tid == tid)
    with StackMemory(stacks.pid) as stack_memory:
        end = stack_memory.end(pointer, 0, 1 << 62)
        assert end is not None
        words = stack_memory.read([(pointer & ~7, end - (pointer & ~7))]).words.tolist()
    function = stacks.function("alternate")
    assert not any(function.start < word <= function.end for word in words), "the test shows nothing"


def test_a_thread_that_has_returned_to_the_restorer(stacks: Stacks, memory: Memory) -> None:
    """As it is for two instructions: the handler's return address is below rsp already."""
    tid = stacks.tids["alternate"]
    unwinder = Unwinder(unwind_tables(mappings(stacks.pid), memory), memory.read)
    with seize(stacks.pid) as process:
        process.stop(PATIENCE)
        (thread,) = (t for t in process.threads if t.tid == tid)
        stack = unwinder.unwind(thread.registers, memory.read)
        (depth,) = (n for n, frame in enumerate(stack.frames) if frame.is_signal_frame)
        registers = Registers.from_buffer_copy(thread.registers)
        registers.rip, registers.rsp = stack.frames[depth].pc, stack.frames[depth - 1].cfa
        returned = StoppedThread(tid, registers, 0, False)
        for name, live in (("alternate", True), ("handler", False), ("never_called", False)):
            with StackCheck(memory, [function_range(stacks, name)]) as stack_check:
                assert stack_check.check([returned]).quiescent is not live, name


def test_a_stack_that_is_split_into_several_mappings(stacks: Stacks, memory: Memory) -> None:
    tid = stacks.tids["split"]
    with seize(stacks.pid) as process:
        process.stop(PATIENCE)
        (pointer,) = (t.registers.rsp for t in process.threads if t.tid == tid)
    (mapping,) = (mapping for mapping in mappings(stacks.pid) if pointer in mapping)
    found = check_function(stacks, memory, "above_split")
    (frame,) = found.live
    assert threads_of(stacks, found.live) == {"split"} and not frame.certain
    address = int(frame.why.split(" at ")[1].split()[0], 16)
    assert address >= mapping.end, "it was in the first mapping anyway"


def test_a_stack_that_is_too_large_is_unwound(stacks: Stacks, memory: Memory) -> None:
    found = check(stacks, memory, function_range(stacks, "never_called"), max_stack=64)
    assert found.unwound == len(stacks.tids)
    assert threads_of(stacks, found.live) == set(WITHOUT_CFI)
    for frame in found.live:
        assert (frame.name, frame.certain) == (ANY_FUNCTION, False)
        assert "larger than what is scanned" in frame.why


def test_large_stacks_lose_no_frame(stacks: Stacks, memory: Memory) -> None:
    found = check(stacks, memory, function_range(stacks, "aligned"), max_stack=64)
    assert threads_of(stacks, tuple(frame for frame in found.live if frame.certain)) == {"aligned"}


def test_ends_of_stacks_are_the_same_without_the_query(stacks: Stacks) -> None:
    with (
        StackMemory(stacks.pid) as new,
        StackMemory(stacks.pid, may_query=False) as old,
        seize(stacks.pid) as process,
    ):
        process.stop(PATIENCE)
        stops = [(thread.registers.rsp, thread.registers.fs_base, 1 << 62) for thread in process.threads]
        ends = [new.end(*stop) for stop in stops]
        assert ends == [old.end(*stop) for stop in stops]
        assert all(end is not None and end > stop[0] for end, stop in zip(ends, stops, strict=True))
        for nowhere in (8, 1 << 46, (1 << 47) - 4096):
            assert new.end(nowhere, 0, 1 << 62) is old.end(nowhere, 0, 1 << 62) is None


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program("odd.c", tmp_path_factory.mktemp("quiescence") / "odd", *FLAGS)


def test_a_stack_pointer_that_leads_nowhere(odd: Path) -> None:
    with run_stacks(odd, "nostack") as running, Memory(running.pid) as memory:
        # The program says "ready" a few instructions before it gives up its stack.
        found = check(running, memory, function_range(running, "never_called"))
        while found.quiescent:
            found = check(running, memory, function_range(running, "never_called"))
    (frame,) = found.live
    assert (frame.name, frame.certain, frame.tid) == (ANY_FUNCTION, False, running.pid)
    assert "is in no mapping" in frame.why


def test_a_return_address_of_zero_clears_only_what_is_below(odd: Path) -> None:
    """Wrong unwind information finds a zero easily, so the walk may have ended too early."""
    with run_stacks(odd, "zero") as running, Memory(running.pid) as memory:
        assert next_line(running.process) == "waits"
        base = check(running, memory, function_range(running, "zero_base"))
        within = check(running, memory, function_range(running, "also_never_called"))
        beyond = check(running, memory, function_range(running, "never_called"))
    assert [frame.certain for frame in base.live] == [True]
    assert within.quiescent and within.unwound == 1, "the word is there, but below the last frame"
    (frame,) = beyond.live
    assert not frame.certain and "the return address is 0" in frame.why


def test_a_restorer_that_was_made_after_the_preparation(odd: Path) -> None:
    with (
        run_stacks(odd, "late") as running,
        Memory(running.pid) as memory,
        StackCheck(memory, [function_range(running, "late")]) as stack_check,
    ):
        assert running.process.stdin is not None
        running.process.stdin.write("x")
        running.process.stdin.flush()
        assert next_line(running.process) == "waits"
        with seize(running.pid) as process:
            process.stop(PATIENCE)
            found = stack_check.check(process.threads)
    (frame,) = found.live
    assert frame.name == "late" and not frame.certain, "the restorer has no unwind information"


def test_a_check_can_be_repeated(stacks: Stacks, memory: Memory) -> None:
    with StackCheck(memory, [function_range(stacks, "callback")]) as stack_check:
        answers = []
        for _ in range(5):
            stack_check.refresh()
            with seize(stacks.pid) as process:
                process.stop(PATIENCE)
                answers.append(stack_check.check(process.threads).live)
    assert len(set(answers)) == 1 and len(answers[0]) == 1
