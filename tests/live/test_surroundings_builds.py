"""Floating-point state across stops, remote calls and deaths of the patcher; programs of several kinds and compilers.

Every worker of ``fixtures/surrounded.c`` waits with patterns in all registers that XSAVE knows (x87 with its control
word, MXCSR, SSE, AVX and, where the processor has it, AVX-512), and counts in ``lost`` what has changed.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from fixtures.tracees import wait_until
from patcher import seam
from patcher.process.proc import thread_ids
from patcher.transactions.transaction import apply, revert
from tests.live.answering import Answering, Versions, versions
from tests.live.surroundings import in_child, surrounded, there_and_back

pytestmark = pytest.mark.root


@pytest.fixture(scope="session")
def built(cache_folder: Path) -> Versions:
    return surrounded(cache_folder)


def kept(program: Answering) -> None:
    """No worker has found anything changed; asking wakes all of them, so that they look."""
    assert program.ask() in ("1001", "2002")
    assert program.ask("lost") == "0"


def test_floating_point_state_is_kept(built: Versions) -> None:
    with Answering(built.programs[1]) as program:
        for _ in range(5):
            there_and_back(program, built)
            kept(program)


def test_the_loss_of_one_register_would_be_noticed(built: Versions) -> None:
    """PTRACE_SETFPREGS by a tracer that does not care: the counter counts."""
    import ctypes
    import time

    from patcher.threads import ptrace, tracees

    request = ctypes.CDLL(None, use_errno=True).ptrace
    request.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    get_registers, set_registers = 14, 15  # PTRACE_GETFPREGS, PTRACE_SETFPREGS, linux/ptrace.h
    with Answering(built.programs[1]) as program:
        worker = thread_ids(program.pid)[-1]
        # read(2) is call 0: it has loaded the patterns.
        wait_until(lambda: Path(f"/proc/{worker}/syscall").read_text().startswith("0 "), "the worker to wait")
        ptrace.seize(worker)
        ptrace.interrupt(worker)
        stop = tracees.wait_for([worker], time.monotonic() + 20)[worker]
        area = (ctypes.c_uint8 * 512)()
        assert request(get_registers, worker, None, ctypes.addressof(area)) == 0
        area[160 + 16 * 7] ^= 1  # one bit of xmm7
        assert request(set_registers, worker, None, ctypes.addressof(area)) == 0
        tracees.detach(worker, stop)
        program.ask()
        assert program.ask("lost") == "1"


OPERATIONS = ("GETREGS", "SETREGS", "SYSCALL", "DETACH")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_floating_point_state_is_kept_where_the_patcher_is_killed(built: Versions, operation: str) -> None:
    """At the first five operations of a kind, as far as there are as many."""
    with Answering(built.programs[1]) as program:
        killed = 0
        for number in range(5):
            code, said = in_child(lambda number=number: _die_at(program.pid, built, operation, number))  # type: ignore[misc]
            kept(program)
            if code == 0:
                break
            assert code == -signal.SIGKILL, said
            killed += 1
        assert killed > 1
        apply(program.pid, built.to[2])
        program.answers(2)
        revert(program.pid)
        program.answers(1)
        kept(program)


def _die_at(pid: int, built: Versions, operation: str, number: int) -> None:
    seen = 0

    def observer(name: str, subject: int) -> int:
        nonlocal seen
        if name == operation:
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
        return 0

    with seam.observe(observer):
        apply(pid, built.to[2])


BUILDS = {
    "static": ("gcc", "-static", "-DROOM"),
    "static-pie": ("gcc", "-static-pie", "-DROOM"),
    "no-pie": ("gcc", "-no-pie"),
    "cet": ("gcc", "-fcf-protection=full"),
    "avx512": ("gcc", "-mavx512f", "-mprefer-vector-width=512", "-O3"),
    "clang": ("clang", "-Wno-unused-command-line-argument"),
    "clang, cet": ("clang", "-fcf-protection=full", "-Wno-unused-command-line-argument"),
    "clang, static": ("clang", "-static", "-DROOM", "-Wno-unused-command-line-argument"),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())
def test_every_kind_of_program_is_patched_and_keeps_its_state(cache_folder: Path, build: tuple[str, ...]) -> None:
    if "-mavx512f" in build and "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the processor has no AVX-512")
    made = surrounded(cache_folder, *build[1:], cc=build[0])
    if "-fcf-protection=full" in build:
        function = next(item for item in made.to[2].checked if item.name == "left")
        code = made.programs[1].read_bytes()
        assert code.count(b"\xf3\x0f\x1e\xfa") > 3 and function.size > 4  # endbr64
    with Answering(made.programs[1]) as program:
        there_and_back(program, made)
        kept(program)


@pytest.mark.parametrize("link", [(), ("-static", "-DROOM")], ids=["dynamic", "static"])
def test_a_program_of_another_c_library_is_patched(cache_folder: Path, link: tuple[str, ...]) -> None:
    """musl: another linker, another way to make threads, no rseq; static, nothing of a library is there."""
    if shutil.which("musl-gcc") is None:
        pytest.skip("musl-gcc is not installed")
    made = versions(cache_folder / "answer", *link, cc="musl-gcc")
    with Answering(made.programs[1]) as program:
        there_and_back(program, made)
