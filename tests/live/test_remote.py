"""System calls in real processes: they work everywhere, nobody notices, and our death costs nothing."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elfdiff.errors import BadInput, Busy, LivegraftError
from fixtures.hearing import next_line
from fixtures.killing import any_thread, kill_patchers
from fixtures.tracees import (
    Torture,
    compile_program,
    flood_of_signals,
    handled_signals,
    run_torture,
    running,
    state_of,
    wait_until,
)
from patcher.process.memory import Memory
from patcher.process.modules import modules
from patcher.process.proc import mappings, status, thread_ids
from patcher.remote.borrowed import borrow_thread, by_preference
from patcher.remote.calls import (
    MAP_ANONYMOUS,
    MAP_FIXED_NOREPLACE,
    MAP_PRIVATE,
    MFD_CLOEXEC,
    PROT_EXEC,
    PROT_READ,
    RemoteCaller,
    RemoteCallError,
    slot_for_stub,
)
from patcher.remote.caves import Cave, find_caves, free_slot, old_stubs
from patcher.threads import tracees
from patcher.threads.ptrace import read_registers, rseq_configuration, write_registers
from patcher.threads.tracees import INTERRUPTED
from trampolines.stub_x86_64 import RESTORED, STUB_SIZE, stub_bytes

pytestmark = pytest.mark.root

Build = Callable[..., Path]
GETPID, KILL, PAUSE = 39, 62, 34
PAGE = 4096


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("tracees")
    return lambda name, *flags: compile_program(name, folder, *flags)


@pytest.fixture
def torture(build: Build, tmp_path: Path) -> Iterator[Torture]:
    with run_torture(build("torture"), tmp_path) as running_torture:
        yield running_torture


@pytest.fixture
def plain(build: Build) -> Iterator[subprocess.Popen[str]]:
    with running([build("states"), "plain"]) as target:
        wait_until(lambda: state_of(target.pid) == "S", "the target to wait")
        yield target


def caves_of(pid: int, memory: Memory) -> tuple[Cave, ...]:
    return find_caves(modules(mappings(pid), memory))


def getpid(pid: int) -> int:
    with Memory(pid) as memory, RemoteCaller(pid, memory) as caller:
        return caller.call(GETPID)


@pytest.mark.parametrize("link", [("-pie",), ("-no-pie",), ("-static",), ("-static-pie",)])
def test_it_works_in_every_kind_of_executable(build: Build, link: tuple[str, ...]) -> None:
    with running([build("states", *link), "plain"]) as target:
        for _ in range(3):
            assert getpid(target.pid) == target.pid
        assert target.poll() is None


def test_the_calls_that_a_patcher_needs(plain: subprocess.Popen[str]) -> None:
    pid = plain.pid
    with Memory(pid) as memory, RemoteCaller(pid, memory) as caller:
        address = caller.mmap(0, 2 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS)
        caller.mprotect(address, PAGE, PROT_READ | PROT_EXEC)
        descriptor = caller.memfd_create(MFD_CLOEXEC)
        perms = [item.perms for item in mappings(pid) if address <= item.start < address + 2 * PAGE]
        assert perms == ["r-xp", "r--p"]
        link = Path(f"/proc/{pid}/fd/{descriptor}")
        assert str(link.readlink()) == "/memfd:livegraft (deleted)"
        caller.close(descriptor)
        caller.munmap(address, 2 * PAGE)
        assert not link.is_symlink()
        assert not any(address in item for item in mappings(pid))


def test_a_refused_call_says_which_and_why(plain: subprocess.Popen[str]) -> None:
    with Memory(plain.pid) as memory, RemoteCaller(plain.pid, memory) as caller:
        taken = mappings(plain.pid)[0].start
        with pytest.raises(RemoteCallError) as caught:
            caller.mmap(taken, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE)
        assert caught.value.errno == errno.EEXIST
        assert f"mmap({taken:#x}" in caught.value.what
        assert "EEXIST" in caught.value.why
        assert caller.call(GETPID) == plain.pid  # and it goes on


def test_all_six_arguments_arrive(plain: subprocess.Popen[str]) -> None:
    path = Path(f"/proc/{plain.pid}/exe").resolve()
    with Memory(plain.pid) as memory, RemoteCaller(plain.pid, memory) as caller:
        with pytest.raises(ValueError, match="at most 6"):
            caller.call(GETPID, *range(7))
        descriptor = caller.memfd_create(MFD_CLOEXEC)
        with open(f"/proc/{plain.pid}/fd/{descriptor}", "r+b") as file:
            file.write(path.read_bytes()[: 4 * PAGE])
        address = caller.mmap(0, PAGE, PROT_READ, MAP_PRIVATE, descriptor, 3 * PAGE)
        caller.close(descriptor)
        assert memory.read(address, PAGE) == path.read_bytes()[3 * PAGE : 4 * PAGE]


def test_nothing_is_left_behind(plain: subprocess.Popen[str]) -> None:
    with Memory(plain.pid) as memory:
        caves = caves_of(plain.pid, memory)
        before = [memory.read(cave.start, cave.end - cave.start) for cave in caves]
        registers = _registers(plain.pid)
        with RemoteCaller(plain.pid, memory) as caller:
            caller.call(GETPID)
            during = [memory.read(cave.start, cave.end - cave.start) for cave in caves]
        after = [memory.read(cave.start, cave.end - cave.start) for cave in caves]
    assert before == after != during
    assert status(plain.pid).tracer_pid == 0
    wait_until(lambda: state_of(plain.pid) == "S", "the target to wait again")
    assert _registers(plain.pid) == registers


def _registers(pid: int) -> bytes:
    with Memory(pid) as memory:
        thread = borrow_thread(pid, pid, memory)
        assert thread is not None
        found = bytes(read_registers(pid))
        thread.give_back(INTERRUPTED)
    return found


def test_nobody_notices_whichever_thread_makes_the_calls(torture: Torture) -> None:
    random.seed(3)
    with Memory(torture.pid) as memory:
        for _ in range(5):
            for tally in torture.tallies:
                with RemoteCaller(torture.pid, memory, candidates=lambda _, tid=tally.tid: [tid]) as caller:
                    for _ in range(3):
                        address = caller.mmap(0, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS)
                        caller.munmap(address, PAGE)
            time.sleep(random.uniform(0, 0.02))
    torture.wait_for_progress()
    assert torture.complaints == []


def test_killed_at_any_moment_nobody_notices(torture: Torture) -> None:
    outcome = kill_patchers(torture, kills=40, seed=random.randrange(1 << 30), preferred=True)
    assert outcome.wrong == []
    assert outcome.calls > 0  # else all were killed before they did anything


def test_killed_at_any_moment_any_thread_goes_on(torture: Torture) -> None:
    """Threads that no patcher would choose: the few instructions before the repair may show EINTR, no more."""
    kill_patchers(torture, kills=40, seed=random.randrange(1 << 30), preferred=False)
    assert [tally for tally in torture.complaints if tally.wrong or tally.early] == []


@pytest.mark.parametrize("call", ["sigsuspend", "ppoll", "epoll_pwait", "epoll_wait", "nanosleep"])
def test_a_signal_to_the_borrowed_thread_still_interrupts_its_call(build: Build, call: str) -> None:
    with running([build("wakeup"), call]) as target:
        wait_until(lambda: state_of(target.pid) == "S", "the target to wait")
        with Memory(target.pid) as memory, RemoteCaller(target.pid, memory) as caller:
            caller.call(GETPID)
            os.kill(target.pid, signal.SIGUSR1)
        output, _ = target.communicate(timeout=10)
    assert output == f"handled=1 errno={errno.EINTR}\n"


@pytest.mark.parametrize("call", ["epoll_wait", "nanosleep"])
def test_a_signal_between_two_calls_is_delivered_first(build: Build, call: str) -> None:
    """The thread is let go with the signal in the middle, and borrowed again at the entry of the handler."""
    with running([build("wakeup"), call]) as target:
        wait_until(lambda: state_of(target.pid) == "S", "the target to wait")
        with Memory(target.pid) as memory, RemoteCaller(target.pid, memory) as caller:
            for _ in range(3):
                assert caller.call(GETPID) == target.pid
                os.kill(target.pid, signal.SIGUSR1)
        output, _ = target.communicate(timeout=10)
    handled, error = output.split()
    assert int(handled.removeprefix("handled=")) in (1, 2, 3)  # equal pending signals are one
    assert error == f"errno={errno.EINTR}"


def test_no_queued_signal_is_lost_and_calls_still_work(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "counts"
    with running([build("signals"), path]) as target, flood_of_signals(target.pid) as end_flood:
        for _ in range(60):
            with Memory(target.pid) as memory:
                chosen = any_thread(random.Random(1))
                with RemoteCaller(target.pid, memory, candidates=chosen) as caller:
                    for _ in range(5):
                        assert caller.call(GETPID) == target.pid
        sent = end_flood()
        wait_until(lambda: handled_signals(path) >= sent, "all signals")
        assert handled_signals(path) == sent > 0


def test_a_stopped_process_can_be_called_and_stays_stopped(build: Build) -> None:
    with running([build("wakeup"), "nanosleep"]) as target:
        os.kill(target.pid, signal.SIGSTOP)
        wait_until(lambda: state_of(target.pid) == "T", "the target to stop")
        for _ in range(3):
            assert getpid(target.pid) == target.pid
            wait_until(lambda: state_of(target.pid) == "T", "the target to be stopped again")
        os.kill(target.pid, signal.SIGCONT)
        wait_until(lambda: state_of(target.pid) == "S", "the target to go on")
        os.kill(target.pid, signal.SIGUSR1)
        output, _ = target.communicate(timeout=10)
    assert output == f"handled=1 errno={errno.EINTR}\n"


def test_a_call_under_a_filter_that_kills_for_it(build: Build) -> None:
    with running([build("states"), "filter"]) as target:
        with Memory(target.pid) as memory, RemoteCaller(target.pid, memory) as caller:
            address = caller.mmap(0, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS)
            caller.munmap(address, PAGE)
            descriptor = caller.memfd_create(MFD_CLOEXEC)
            caller.close(descriptor)
        assert status(target.pid).seccomp == 2
        wait_until(lambda: state_of(target.pid) == "S", "the target to go on")
        # The filter is in force again: the same call without us is death.
        _call_unsuspended(target.pid)
        assert target.wait(10) == -signal.SIGSYS


def _call_unsuspended(pid: int) -> None:
    with Memory(pid) as memory:
        slot = slot_for_stub(pid, memory)
        thread = borrow_thread(pid, pid, memory)
        assert thread is not None
        thread.aim(memory, slot)
        launch = thread.registers.copy()
        launch.rip, launch.rax, launch.orig_rax = slot, 9, (1 << 64) - 1
        write_registers(pid, launch)
        tracees.detach(pid, INTERRUPTED)


def test_a_thread_in_a_restartable_sequence_is_not_borrowed(build: Build) -> None:
    """A stop makes the kernel abort the sequence, so that now and then it is caught outside; never inside."""
    with running([build("states"), "rseq"]) as target, Memory(target.pid) as memory:
        seen: dict[bool, int] = {True: 0, False: 0}

        def refused_often() -> bool:
            thread = borrow_thread(target.pid, target.pid, memory)
            seen[thread is None] += 1
            if thread is not None:
                start = _sequence_start(target.pid, memory)
                assert thread.registers.rip != start  # its only instruction
                thread.give_back(INTERRUPTED)
            return seen[True] >= 20

        wait_until(refused_often, "the sequence")
        assert status(target.pid).tracer_pid == 0
        assert target.poll() is None


def _sequence_start(tid: int, memory: Memory) -> int:
    """Address of the sequence that is entered now, or -1 (struct rseq, struct rseq_cs of linux/rseq.h)."""
    descriptor = int.from_bytes(memory.read(rseq_configuration(tid).address + 8, 8), "little")
    return int.from_bytes(memory.read(descriptor + 8, 8), "little") if descriptor else -1


def test_a_parent_in_vfork_is_not_waited_for(build: Build) -> None:
    with running([build("states"), "vfork"]) as target:
        wait_until(lambda: state_of(target.pid) == "D", "the parent to wait in vfork")
        assert getpid(target.pid) == target.pid  # by the other thread
        assert by_preference(target.pid) == [thread_ids(target.pid)[1]]


def test_a_thread_that_has_children_is_not_asked_before_others(build: Build) -> None:
    """Though it waits in pause(2), and they in epoll_wait(2), which a stop may end with EINTR."""
    with running([build("children"), "1"]) as target:
        main, other, parent = thread_ids(target.pid)
        wait_until(lambda: {state_of(tid) for tid in (main, other, parent)} == {"S"}, "the threads to wait")
        assert by_preference(target.pid) == [main, other, parent]


@pytest.mark.parametrize("program", [("states", "exec"), ("sharing",)])
def test_an_execve_meanwhile_is_an_error_and_harmless(build: Build, program: tuple[str, ...]) -> None:
    """Even if the address space that was opened lives on, since a child of vfork(2) is in it."""
    name, *arguments = program
    with running([build(name), *arguments]) as target:
        with Memory(target.pid) as memory, RemoteCaller(target.pid, memory) as caller:
            assert target.stdin is not None
            target.stdin.write("x")
            target.stdin.flush()
            assert next_line(target) == "ready"
            with pytest.raises(LivegraftError, match="could not be"):
                caller.call(GETPID)
        assert getpid(target.pid) == target.pid


def test_a_process_that_has_exited_is_bad_input(plain: subprocess.Popen[str]) -> None:
    with Memory(plain.pid) as memory, RemoteCaller(plain.pid, memory) as caller:
        caller.call(GETPID)
        os.kill(plain.pid, signal.SIGKILL)  # Popen would ask waitpid first, and take the stop for an exit
        with pytest.raises((BadInput, LivegraftError)):
            caller.call(GETPID)
    with pytest.raises(BadInput), Memory(plain.pid) as memory, RemoteCaller(plain.pid, memory):
        pass


def test_two_patchers_at_once_are_one_too_many(plain: subprocess.Popen[str]) -> None:
    holder = (
        "import sys\n"
        "from patcher.threads.exclusive import exclusive\n"
        "with exclusive(int(sys.argv[1])):\n"
        "    print('ready', flush=True); sys.stdin.read()\n"
    )
    with Memory(plain.pid) as memory:
        another = running([sys.executable, "-c", holder, str(plain.pid)])
        with another, pytest.raises(Busy), RemoteCaller(plain.pid, memory):
            pass
        with RemoteCaller(plain.pid, memory), pytest.raises(Busy), RemoteCaller(plain.pid, memory):
            pass
    assert getpid(plain.pid) == plain.pid


def test_an_interrupt_waits_until_the_thread_is_back(plain: subprocess.Popen[str]) -> None:
    reached = False
    with (
        pytest.raises(KeyboardInterrupt),
        Memory(plain.pid) as memory,
        RemoteCaller(plain.pid, memory) as caller,
    ):
        caller.call(GETPID)
        os.kill(os.getpid(), signal.SIGINT)
        reached = caller.call(GETPID) == plain.pid
    assert reached
    assert status(plain.pid).tracer_pid == 0
    assert getpid(plain.pid) == plain.pid


# What a killed patcher leaves behind.


@pytest.fixture
def static(build: Build) -> Iterator[subprocess.Popen[str]]:
    """A target with a single cave, so that a test can fill it."""
    with running([build("states", "-static"), "plain"]) as target:
        wait_until(lambda: state_of(target.pid) == "S", "the target to wait")
        yield target


def fill(memory: Memory, caves: tuple[Cave, ...], tid: int) -> list[int]:
    context = dict.fromkeys((*RESTORED, "rip"), 0)
    slots = [slot for cave in caves for slot in cave.slots()]
    for slot in slots:
        memory.write(slot, stub_bytes(context, tid))
    return slots


def test_a_stub_left_behind_is_stepped_over(static: subprocess.Popen[str]) -> None:
    with Memory(static.pid) as memory:
        caves = caves_of(static.pid, memory)
        (cave,) = caves
        left = stub_bytes(dict.fromkeys((*RESTORED, "rip"), 7), static.pid)
        memory.write(cave.slots()[0], left)
        assert free_slot(caves, memory) == cave.slots()[1]
        assert [old.tid for old in old_stubs(caves, memory)] == [static.pid]
        assert getpid(static.pid) == static.pid
        assert memory.read(cave.slots()[0], STUB_SIZE) == left


def test_stubs_of_threads_that_are_gone_or_through_are_reclaimed(static: subprocess.Popen[str]) -> None:
    with Memory(static.pid) as memory:
        caves = caves_of(static.pid, memory)
        for owner in (1 << 29, static.pid):
            slots = fill(memory, caves, owner)
            assert free_slot(caves, memory) is None
            assert getpid(static.pid) == static.pid
            assert free_slot(caves, memory) == slots[0]


def test_a_stub_that_a_thread_may_return_to_is_not_touched(static: subprocess.Popen[str]) -> None:
    """As if a signal handler ran on top of the stub: its address is on the stack."""
    with Memory(static.pid) as memory:
        caves = caves_of(static.pid, memory)
        slots = fill(memory, caves, static.pid)
        thread = borrow_thread(static.pid, static.pid, memory)
        assert thread is not None
        stack = thread.registers.rsp + 64
        thread.give_back(INTERRUPTED)
        kept = memory.read(stack, 8 * len(slots))
        memory.write(stack, b"".join((slot + 2).to_bytes(8, "little") for slot in slots))
        with pytest.raises(LivegraftError, match="no room"):
            getpid(static.pid)
        memory.write(stack, kept)
        assert getpid(static.pid) == static.pid


def test_a_thread_that_sits_in_a_left_stub_comes_back_by_itself(static: subprocess.Popen[str]) -> None:
    """The patcher is gone while its call still blocks; the next patcher works around it."""
    with Memory(static.pid) as memory:
        slot = slot_for_stub(static.pid, memory)
        thread = borrow_thread(static.pid, static.pid, memory)
        assert thread is not None
        before = bytes(thread.registers)
        thread.aim(memory, slot)
        launch = thread.registers.copy()
        launch.rip, launch.rax, launch.orig_rax = slot, PAUSE, (1 << 64) - 1
        write_registers(static.pid, launch)
        tracees.detach(static.pid, INTERRUPTED)
        wait_until(lambda: state_of(static.pid) == "S", "the remote pause")
        assert free_slot(caves_of(static.pid, memory), memory) != slot
        assert getpid(static.pid) == static.pid  # by the thread that is inside of the old stub
        assert memory.read(slot, 2) == b"\x0f\x05"
        # Bring it out of pause by a second round: what it returns to are its own registers.
        thread = borrow_thread(static.pid, static.pid, memory)
        assert thread is not None
        assert slot <= thread.registers.rip < slot + STUB_SIZE
        thread.registers.rax = (1 << 64) - errno.EINTR
        thread.registers.orig_rax = (1 << 64) - 1
        thread.give_back(INTERRUPTED)
        wait_until(lambda: state_of(static.pid) == "S", "the target to wait again")
        assert _registers(static.pid) == before


def test_padding_that_is_not_zero_is_not_used(static: subprocess.Popen[str]) -> None:
    with Memory(static.pid) as memory:
        caves = caves_of(static.pid, memory)
        for cave in caves:
            for slot in cave.slots():
                memory.write(slot + STUB_SIZE - 1, b"\x90")
        with pytest.raises(LivegraftError, match="no room") as caught:
            getpid(static.pid)
        assert "padding found" in caught.value.why


def test_the_padding_belongs_to_no_segment(torture: Torture) -> None:
    with Memory(torture.pid) as memory:
        loaded = modules(mappings(torture.pid), memory)
        for cave in find_caves(loaded):
            (module,) = [item for item in loaded if item.path == cave.path]
            assert cave.end % PAGE == 0
            for header in module.headers:
                start = module.bias + header.vaddr
                assert not (start < cave.end and cave.start < start + header.memsz)


def test_the_kernel_does_give_the_flags_back(plain: subprocess.Popen[str]) -> None:
    """The stub relies on it (Intel SDM, SYSCALL): carry and direction flag before and after, by our own call."""
    code = bytes.fromhex(
        "f9 fd"  # stc; std
        "b8 27000000"  # mov eax, 39 (getpid)
        "0f05"  # syscall
        "9c 58"  # pushf; pop rax
        "fc c3"  # cld; ret
    )
    import mmap as memory_map

    page = memory_map.mmap(-1, PAGE, prot=memory_map.PROT_READ | memory_map.PROT_WRITE | memory_map.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    flags = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)()
    assert flags & 0x401 == 0x401
