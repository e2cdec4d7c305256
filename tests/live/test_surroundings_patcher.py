"""The patcher's own surroundings: without root, without rights, beside another tracer, with a foreign ``/proc``."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elfdiff.errors import NotPermitted, Refused
from fixtures.tracees import running, wait_until
from patcher import seam
from patcher.pausing.conditions import Conditions
from patcher.process.memory import Memory
from patcher.process.proc import mappings, status
from patcher.process.surroundings import SYS_ADMIN, SYS_PTRACE, status_fields
from patcher.remote.calls import slot_for_stub
from patcher.transactions.transaction import apply, revert
from tests.live.answering import Answering, Versions
from tests.live.surroundings import (
    AS_NOBODY,
    NOBODY,
    at_liberty,
    enter,
    in_child,
    left_alone,
    public_copy,
    require,
    surrounded,
    there_and_back,
)
from trampolines.stub_x86_64 import RESTORED, stub_bytes

pytestmark = pytest.mark.root

_PR_CAPBSET_DROP, _PR_SET_DUMPABLE = 24, 4  # linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="session")
def built(cache_folder: Path) -> Versions:
    return surrounded(cache_folder)


@pytest.fixture
def program(built: Versions) -> Iterator[Answering]:
    with Answering(built.programs[1]) as started:
        yield started


def become_nobody() -> None:
    """As sudo -u nobody would start us: another user, no capabilities, dumpable as after an execve."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def drop(*capabilities: int) -> None:
    """Give up capabilities of this process for ever, and stay root."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    effective = int(status_fields(os.getpid())["CapEff"], 16) & ~sum(1 << number for number in capabilities)
    low, high = effective & 0xFFFFFFFF, effective >> 32
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    if _libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def test_a_user_patches_a_process_of_his_own(program: Answering, built: Versions) -> None:
    require("setpriv")
    there_and_back(program, built)  # imports what that user may not be able to read here
    # An intermediate process, as fixtures expect of what stands before a program; it changes nothing.
    with public_copy(built.programs[1]) as copy, Answering(copy, (*AS_NOBODY, "sh", "-c", '"$0"; :')) as own:
        assert status(own.pid).uid == NOBODY

        def work() -> None:
            become_nobody()
            outcome = apply(own.pid, built.to[2])
            assert outcome.pause is not None and not outcome.pause.realtime
            assert os.sched_getscheduler(0) == os.SCHED_OTHER

        code, said = in_child(work)
        scope = Path("/proc/sys/kernel/yama/ptrace_scope")
        if scope.exists() and int(scope.read_text()) > 0:
            assert code == NotPermitted.exit_code and "ptrace_scope" in said
            return
        assert (code, said) == (0, "")
        own.answers(2)
        revert(own.pid)
        own.answers(1)


@pytest.mark.parametrize("what", [None, "undumpable", "nobody"])
def test_a_user_may_not_patch_what_is_not_his(program: Answering, built: Versions, what: str | None) -> None:
    if what:
        enter(program, what)
    with left_alone(program):
        code, said = in_child(lambda: (become_nobody(), apply(program.pid, built.to[2]))[0])
        assert code == NotPermitted.exit_code, said
        # A process that changed its user is not dumpable, even to that user.
        expected = "not dumpable" if what == "nobody" else "belongs to user 0, this is user 65534"
        assert expected in said and "sudo livegraft" in said


def test_root_without_the_right_to_trace_is_told_which(built: Versions) -> None:
    with public_copy(built.programs[1]) as copy, Answering(copy, (*AS_NOBODY, "sh", "-c", '"$0"; :')) as program:
        code, said = in_child(lambda: (drop(SYS_PTRACE), apply(program.pid, built.to[2]))[0])
        assert code == NotPermitted.exit_code, said
        assert "CAP_SYS_PTRACE" in said and "--cap-add SYS_PTRACE" in said
        program.answers(1)
        at_liberty(program)


def test_without_cap_sys_admin_a_filter_stays_and_the_program_is_refused(program: Answering, built: Versions) -> None:
    enter(program, "kill")
    with left_alone(program):
        code, said = in_child(lambda: (drop(SYS_ADMIN), apply(program.pid, built.to[2]))[0])
        assert code == NotPermitted.exit_code, said
        assert "CAP_SYS_ADMIN" in said and "cannot be suspended" in said
    there_and_back(program, built)  # with it, it works


def test_without_cap_sys_admin_a_thread_without_a_filter_does(program: Answering, built: Versions) -> None:
    enter(program, "other-filters")  # but for one thread
    code, said = in_child(lambda: (drop(SYS_ADMIN), apply(program.pid, built.to[2]))[0])
    assert (code, said) == (0, "")
    program.answers(2)


# --- a kernel that does not let us write to text ------------------------------------------------------------------


def forbid_text_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As proc_mem.force_override=never has it, to which this kernel need not have been booted: no write to a mapping
    that is not writable, but by PTRACE_POKETEXT."""
    real = Memory._pwrite

    def pwrite(memory: Memory, address: int, data: bytes) -> int:
        if not any(address in item and item.writable for item in mappings(memory.pid)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(memory, address, data)

    monkeypatch.setattr(Memory, "_pwrite", pwrite)


def test_where_text_is_not_written_by_proc_mem_it_is_poked(
    program: Answering, built: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_text_writes(monkeypatch)
    there_and_back(program, built)
    resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (0, 0))  # no memory file: text is written, too
    there_and_back(program, built)


def test_where_text_is_not_written_by_proc_mem_stubs_of_dead_threads_are_erased(
    program: Answering, built: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = 1 << 22  # the highest thread id that there may be, pid_max(5); nobody has it
    with Memory(program.pid) as memory:
        before = program.code()
        address = slot_for_stub(program.pid, memory)
        memory.write(address, stub_bytes(dict.fromkeys((*RESTORED, "rip"), 0), gone))
        assert program.code() != before
        forbid_text_writes(monkeypatch)
        apply(program.pid, built.to[2])
        program.answers(2)
        revert(program.pid)
        program.answers(1)
        after = program.code()
        assert {name: after[name] for name in before} == before


# --- other tracers ---------------------------------------------------------------------------------------------


def test_a_program_under_gdb_is_refused_and_gdb_goes_on(program: Answering, built: Versions) -> None:
    require("gdb")
    command = ["gdb", "-q", "-nx", "-p", str(program.pid)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as gdb:
        assert gdb.stdin is not None and gdb.stdout is not None

        def command_gdb(*lines: str) -> str:
            """What gdb says to these commands."""
            assert gdb.stdin is not None and gdb.stdout is not None
            gdb.stdin.write("\n".join([*lines, "echo \\n--end--\\n"]) + "\n")
            gdb.stdin.flush()
            said = []
            for line in gdb.stdout:
                if line.strip().removeprefix("(gdb) ").endswith("--end--"):
                    break
                said.append(line)
            return "".join(said)

        command_gdb("set confirm off", "set pagination off")
        assert status(program.pid).tracer_pid == gdb.pid
        with pytest.raises(NotPermitted, match="traced already") as caught:
            apply(program.pid, built.to[2])
        assert f"process {gdb.pid} (gdb)" in caught.value.why
        assert "0x" in command_gdb("info registers rip")
        assert "left" in command_gdb("info address left")
        command_gdb("detach", "quit")
    at_liberty(program)
    there_and_back(program, built)


def test_a_program_under_strace_is_refused_and_strace_goes_on(
    program: Answering, built: Versions, tmp_path: Path
) -> None:
    require("strace")
    log = tmp_path / "log"
    with subprocess.Popen(
        ["strace", "-f", "-o", log, "-p", str(program.pid)], stderr=subprocess.DEVNULL
    ) as strace:
        wait_until(lambda: status(program.pid).tracer_pid == strace.pid, "strace")
        program.answers(1)
        with pytest.raises(NotPermitted, match="traced already") as caught:
            apply(program.pid, built.to[2])
        assert "(strace)" in caught.value.why
        before = log.stat().st_size
        program.answers(1)
        wait_until(lambda: log.stat().st_size > before, "strace to go on")
        strace.terminate()
    wait_until(lambda: status(program.pid).tracer_pid == 0, "the end of strace")
    there_and_back(program, built)


_TRACER = """
import sys
from patcher.threads import ptrace
ptrace.seize(int(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("moment", ["CALL 319", "CALL 9", "SEIZE"])
def test_somebody_who_comes_to_trace_in_the_middle_is_named(program: Answering, built: Versions, moment: str) -> None:
    """Between two visits nobody traces the program, and a debugger may come; what was mapped is taken away again."""
    tracers: list[object] = []

    def observer(name: str, subject: int) -> int:
        # Any thread that we do not hold now; at the first seizure of all none is held.
        if name == moment and not tracers:
            free = next(int(tid) for tid in os.listdir(f"/proc/{program.pid}/task") if not status(int(tid)).tracer_pid)  # noqa: PTH208
            context = running([sys.executable, "-c", _TRACER, str(free)])
            tracers.append(context)
            context.__enter__()
        return 0

    try:
        with seam.observe(observer), pytest.raises(NotPermitted, match="traced already"):
            apply(program.pid, built.to[2], Conditions(timeout=5))
        assert tracers
        program.answers(1)
    finally:
        for context in tracers:
            context.__exit__(None, None, None)  # type: ignore[attr-defined]
    wait_until(lambda: not any(status(tid).tracer_pid for tid in _tids(program.pid)), "the tracer to be gone")
    there_and_back(program, built)


def _tids(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]  # noqa: PTH208


# --- numbers that mean others ----------------------------------------------------------------------------------


def test_a_foreign_proc_is_refused_since_its_numbers_mean_other_processes(program: Answering, built: Versions) -> None:
    require("unshare")
    script = (
        "import sys\n"
        "from elfdiff.errors import BadInput\n"
        "from patcher.transactions.inspection import inspect_process\n"
        "try: inspect_process(int(sys.argv[1]))\n"
        "except BadInput as error: print(error.what, '|', error.next_step)\n"
    )
    command = ["unshare", "--pid", "--fork", sys.executable, "-c", script, str(program.pid)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "/proc does not show the processes of this pid namespace" in said and "mount -t proc" in said
    # With a /proc of its own the number means nobody at all.
    command[1:1] = ["--mount-proc"]
    with left_alone(program):
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("there is no process")


# Four lines of i386: it says "ready" and waits for ever.
_I386 = r"""
.code32
.globl _start
_start: mov $4, %eax; mov $1, %ebx; mov $text, %ecx; mov $6, %edx; int $0x80
1: mov $29, %eax; int $0x80; jmp 1b
.section .rodata
text: .ascii "ready\n"
"""


def test_a_program_of_32_bits_is_refused_by_name(built: Versions, tmp_path: Path) -> None:
    source, program = tmp_path / "small.s", tmp_path / "small"
    source.write_text(_I386)
    options = ["-m32", "-nostdlib", "-static", "-no-pie", "-o", program]
    done = subprocess.run(["gcc", *options, source], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"gcc cannot make programs of 32 bits: {done.stderr}")
    with running([program]) as target:
        with pytest.raises(Refused, match="is a 32-bit program for i386"):
            apply(target.pid, built.to[2])
        assert status(target.pid).tracer_pid == 0
        assert target.poll() is None
