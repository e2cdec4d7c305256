"""The checks of ``doctor`` that concern the machine and ourselves: pure functions of what was read or tried."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from enum import Enum

from elfdiff.errors import LivegraftError, NotPermitted, Refused

from ..process.obstacles import Obstacle
from ..process.surroundings import CAPABILITY_NAMES, SYS_PTRACE, YAMA, Credentials


class Verdict(Enum):
    """What a check comes to: apply works, works but not as well, or fails."""

    OK = "ok"
    DEGRADED = "degraded"
    FAILS = "fails"


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, under a stable ``name``, and what was found.

    Where the verdict is not OK, ``why`` says what it costs or what stands in the way, and ``next_step`` the command
    that lifts it, where there is one. ``exit_code`` is the one that apply would have, 0 unless it fails.
    """

    name: str
    verdict: Verdict
    found: str
    why: str = ""
    next_step: str = ""
    exit_code: int = 0
    details: tuple[str, ...] = ()


def ok(name: str, found: str) -> Check:
    """Nothing is in the way."""
    return Check(name, Verdict.OK, found)


def degraded(name: str, found: str, why: str, next_step: str = "") -> Check:
    """It works, but not as well."""
    return Check(name, Verdict.DEGRADED, found, why, next_step)


def judged(name: str, found: str, obstacle: Obstacle | None) -> Check:
    """OK with what was ``found``, or what the obstacle says."""
    if obstacle is None:
        return ok(name, found)
    code = obstacle.kind.exit_code
    return Check(name, Verdict.FAILS, obstacle.what, obstacle.why, obstacle.next_step, code, obstacle.details)


def _fails(name: str, kind: type[LivegraftError], found: str, why: str, next_step: str) -> Check:
    return Check(name, Verdict.FAILS, found, why, next_step, kind.exit_code)


def _said(number: int) -> str:
    return f"{errno.errorcode.get(number, str(number))} ({os.strerror(number)})"


def processor(machine: str) -> Check:
    """The processor that the kernel runs on, as uname(2) has it."""
    if machine == "x86_64":
        return ok("processor", machine)
    return _fails("processor", Refused, machine, "livegraft patches 64-bit programs for x86-64", "")


def capabilities(own: Credentials) -> Check:
    """Which capabilities we hold (capabilities(7)); what the lack of one costs is said where it is needed."""
    held = [name for number, name in CAPABILITY_NAMES.items() if own.has(number)]
    lacking = [name for number, name in CAPABILITY_NAMES.items() if not own.has(number)]
    found = f"user {own.uids[1]}, with {', '.join(held) or 'none'}"
    found += f"; without {', '.join(lacking)}" if lacking else ""
    if own.has(SYS_PTRACE):
        return ok("capabilities", found)
    why = "processes of other users cannot be patched"
    return degraded("capabilities", found, why, "run as root: sudo livegraft ...")


def yama(scope: int | None, own: Credentials) -> Check:
    """``kernel.yama.ptrace_scope`` (Documentation/admin-guide/LSM/Yama.rst)."""
    if scope is None:
        return ok("yama", "not in this kernel")
    found = f"{YAMA} is {scope}"
    if scope >= 3:
        return _fails("yama", NotPermitted, found, "nobody may trace", "only a reboot lifts this setting")
    if scope == 0 or own.has(SYS_PTRACE):
        return ok("yama", found)
    if scope == 2:
        why = "only who holds CAP_SYS_PTRACE may trace"
        return _fails("yama", NotPermitted, found, why, "run as root: sudo livegraft ...")
    why = "only our own children may be traced without CAP_SYS_PTRACE"
    return degraded("yama", found, why, "run as root: sudo livegraft ..., or sysctl kernel.yama.ptrace_scope=0")


def tracing(number: int) -> Check:
    """Whether a child of our own can be seized and stopped (ptrace(2))."""
    if not number:
        return ok("ptrace", "a process of our own can be seized and stopped")
    return _fails(
        "ptrace",
        NotPermitted,
        "not even a process of our own can be seized and stopped",
        f"the kernel answered {_said(number)}; a filter of the container or a security module forbids it",
        "docker run --cap-add SYS_PTRACE --security-opt seccomp=unconfined, or run livegraft outside of the sandbox",
    )


def text_writes(write: int, poke: int) -> Check:
    """Whether ``/proc/PID/mem`` writes to program text (``proc_mem.force_override``, kernel commit 41e8149c8892)."""
    if not write:
        return ok("text writes", "by /proc/PID/mem")
    if not poke:
        return degraded(
            "text writes",
            "by PTRACE_POKETEXT, 8 bytes at a time",
            f"/proc/PID/mem answered {_said(write)}; the pause is longer, and a kill -9 in it can leave half a page",
            "boot with proc_mem.force_override=always, or ptrace",
        )
    return _fails(
        "text writes",
        NotPermitted,
        "program text cannot be written",
        f"/proc/PID/mem answered {_said(write)}, PTRACE_POKETEXT {_said(poke)}",
        "boot with proc_mem.force_override=ptrace",
    )


def vectored_reads(number: int) -> Check:
    """Whether process_vm_readv(2) works: stacks are read by it."""
    if not number:
        return ok("process_vm_readv", "works")
    return _fails(
        "process_vm_readv",
        NotPermitted,
        "does not work",
        "the kernel lacks CONFIG_CROSS_MEMORY_ATTACH, or a filter of the container forbids it",
        "run livegraft outside of the container",
    )


def sequences(number: int) -> Check:
    """Whether the kernel tells where restartable sequences are (PTRACE_GET_RSEQ_CONFIGURATION, Linux 5.13)."""
    if not number:
        return ok("rseq", "PTRACE_GET_RSEQ_CONFIGURATION works")
    return degraded(
        "rseq",
        f"PTRACE_GET_RSEQ_CONFIGURATION answered {_said(number)}",
        "only a thread that waits in a system call can map the patch; where none does, apply is busy (5)",
        "a kernel from 5.13 on",
    )


def suspension(number: int) -> Check:
    """Whether the filter of a thread can be suspended (PTRACE_O_SUSPEND_SECCOMP, ptrace(2))."""
    if not number:
        return ok("seccomp", "filters can be suspended")
    return degraded(
        "seccomp",
        f"filters cannot be suspended: {_said(number)}",
        "processes under a system-call filter are refused (6)",
        "run as root outside of any sandbox or container",
    )


def realtime(number: int) -> Check:
    """Whether SCHED_FIFO is granted (sched(7))."""
    if not number:
        return ok("SCHED_FIFO", "granted")
    return degraded(
        "SCHED_FIFO",
        f"not granted: {_said(number)}",
        "threads that are let go preempt us while the others still stand: with many busy threads the pause was "
        "measured at 5 to 30 ms instead of 2",
        "run with CAP_SYS_NICE, or: ulimit -r 10",
    )


def memory_files(noexec: int | None) -> Check:
    """``vm.memfd_noexec`` of our pid namespace (Documentation/admin-guide/sysctl/vm.rst, Linux 6.3)."""
    if noexec is None:
        return ok("memory files", "executable, as on every kernel before 6.3")
    if noexec < 2:
        return ok("memory files", f"executable (vm.memfd_noexec is {noexec})")
    return degraded(
        "memory files",
        f"not executable: vm.memfd_noexec is {noexec}",
        "the patch is mapped as anonymous memory, which is not sealed",
        "sysctl vm.memfd_noexec=1",
    )


def mapping_queries(number: int) -> Check:
    """Whether mappings can be asked for one by one (PROCMAP_QUERY, Linux 6.11); not needed."""
    return ok("PROCMAP_QUERY", "known to the kernel" if not number else "unknown; mappings are read as text")
