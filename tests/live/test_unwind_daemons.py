"""Stacks of daemons under load: ours and libdw's, of the very same stop, frame by frame.

An ordinary run compares some of each program; ``make soak`` compares 5,000.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fixtures import libdw
from fixtures.debian import PackageUnavailable, Unpacked, fetch, served_versions
from fixtures.memcached import run_memcached
from fixtures.postgres import postgres_build, run_postgres
from fixtures.redis import redis_build, run_benchmark, run_redis
from fixtures.stacks import compile_program
from fixtures.stepping import attached
from fixtures.tracees import running
from patcher.process.memory import Memory
from patcher.process.proc import mappings, thread_ids
from patcher.stacks.unwind import Stack, Unwinder
from patcher.stacks.unwindtables import unwind_tables
from patcher.threads.stopped import StoppedThread
from patcher.threads.stopping import seize

from .steptruth import Comparison

pytestmark = [pytest.mark.root, pytest.mark.apt]

ORDINARY, SOAK = 60, 1400
"""Stacks of each of the four programs."""
SECONDS = 900.0
CLIENTS = 4


@dataclass
class Tally:
    """What came of it. ``places``: innermost program counters; ``incomplete``: reasons, which must be none here."""

    stacks: int = 0
    frames: int = 0
    signal_frames: int = 0
    places: set[int] = field(default_factory=set)
    incomplete: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def add(self, thread: StoppedThread, stack: Stack, opinion: libdw.Opinion) -> None:
        self.stacks += 1
        self.frames += len(stack.frames)
        self.signal_frames += sum(frame.is_signal_frame for frame in stack.frames)
        self.places.add(thread.registers.rip)
        # libdw counts the frame of the signal handler's return itself among those whose pc is exact.
        ours = tuple((frame.pc, not frame.after_call or frame.is_signal_frame) for frame in stack.frames)
        theirs = opinion.frames
        if not stack.complete:
            self.incomplete[stack.why] += 1
            theirs = theirs[: len(ours)]  # libdw guesses on by the frame pointer
        elif opinion.failure:
            self.differences.append(f"libdw: {opinion.failure}: {_words(ours)} != {_words(theirs)}")
        if ours != theirs:
            self.differences.append(f"{_words(ours)} != {_words(theirs)}")


    def words(self, program: str) -> str:
        return (
            f"{program}: {self.stacks} stacks, {self.frames} frames, {self.signal_frames} signal frames, "
            f"{len(self.places)} places, incomplete {dict(self.incomplete)}, differences {len(self.differences)}"
        )


def _words(frames: Sequence[tuple[int, bool]]) -> str:
    return " ".join(f"{pc:#x}{'!' * exact}" for pc, exact in frames)


class Sampler:
    """One process, unwound by both; a context manager."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._stack = contextlib.ExitStack()
        self._memory = self._stack.enter_context(Memory(pid))
        self._libdw = self._stack.enter_context(libdw.Libdw(pid))
        self._unwinder = Unwinder(unwind_tables(mappings(pid), self._memory), self._memory.read)
        self._unwinder.prepare()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def sample(self, tally: Tally) -> None:
        """Stop the process and compare all its threads."""
        with seize(self.pid) as process:
            process.stop(timeout=20.0)
            for thread in process.threads:
                stack = self._unwinder.unwind(thread.registers, self._memory.read)
                opinion = self._libdw.unwind(thread.tid, thread.registers, self._memory.read)
                tally.add(thread, stack, opinion)


def compare(pids: Sequence[int], stacks: int) -> Tally:
    """Compare at least that many stacks, of all these processes in turn."""
    tally = Tally()
    end = time.monotonic() + SECONDS
    with contextlib.ExitStack() as stack:
        samplers = [stack.enter_context(Sampler(pid)) for pid in pids]
        while tally.stacks < stacks and time.monotonic() < end:
            for sampler in samplers:
                sampler.sample(tally)
                time.sleep(0.002)  # the load must get on
    assert tally.stacks >= stacks
    return tally


@contextlib.contextmanager
def redis(cache: Path, folder: Path) -> Iterator[Sequence[int]]:
    build = redis_build(newest("redis-tools", cache), folder / "build", cache)
    with run_redis(build, folder / "data") as server, run_benchmark(build, server.port):
        yield [server.pid]


@contextlib.contextmanager
def memcached(cache: Path, folder: Path) -> Iterator[Sequence[int]]:
    with run_memcached(newest("memcached", cache), cache) as server, server.load():
        yield [server.pid]


@contextlib.contextmanager
def postgres(cache: Path, folder: Path) -> Iterator[Sequence[int]]:
    build = postgres_build(newest("postgresql-15", cache), cache)
    with run_postgres(build) as server, server.benchmark(CLIENTS):
        yield server.pid, *server.backends


@contextlib.contextmanager
def cplusplus(cache: Path, folder: Path) -> Iterator[Sequence[int]]:
    program = compile_program("exceptions.cc", folder / "exceptions", "-O2", "-std=c++17", compiler="g++")
    with running([program]) as process:
        yield [process.pid]


def newest(package: str, cache: Path) -> Unpacked:
    try:
        versions = served_versions(package)
        if not versions:
            pytest.skip(f"the archive serves no {package}")
        return fetch(package, versions[0], cache)
    except PackageUnavailable as error:
        pytest.skip(f"{error.what}: {error.why}")


Program = Callable[[Path, Path], "contextlib.AbstractContextManager[Sequence[int]]"]
PROGRAMS = {"redis": redis, "memcached": memcached, "postgres": postgres, "C++": cplusplus}


def switches(pids: Sequence[int]) -> dict[int, int]:
    """How often each thread has waited or been preempted (proc(5), ``*_ctxt_switches``)."""
    found = {}
    for path in (Path(f"/proc/{pid}/task/{tid}/status") for pid in pids for tid in thread_ids(pid)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lines = [line for line in path.read_text().splitlines() if "ctxt_switches" in line]
            found[int(path.parent.name)] = sum(int(line.split()[1]) for line in lines)
    return found


def no_difference(program: str, cache_folder: Path, folder: Path, stacks: int, steps: int) -> None:
    """The same as libdw where the threads happen to be stopped, then at every instruction of the busiest of them.

    There it must also be what its calls and returns say.
    """
    if not libdw.available():
        pytest.skip("libdw is not installed")
    with PROGRAMS[program](cache_folder / "packages", folder) as pids:
        before = switches(pids)
        tally = compare(pids, stacks)
        after = switches(pids)
        print(tally.words(program))
        assert tally.differences == []
        # Not one that sleeps for ever: a step would take as long.
        tid = max(before.keys() & after.keys(), key=lambda tid: after[tid] - before[tid])
        assert after[tid] > before[tid] + stacks // 10
        with attached(tid) as stepper, libdw.Libdw(tid) as other:
            comparison = Comparison(stepper, other=other, throws=program == "C++")
            stack = comparison.unwind()
            assert stack.complete, stack.why
            stepper.began_with(stack)
            comparison.run(0, steps)
    comparison.report(program)
    assert comparison.complete > steps / 40 and 50 * len(comparison.garbled) <= comparison.complete * (program == "C++")


@pytest.mark.parametrize("program", PROGRAMS)
def test_stacks_are_those_of_libdw(program: str, cache_folder: Path, tmp_path: Path) -> None:
    no_difference(program, cache_folder, tmp_path, ORDINARY, 2000)


@pytest.mark.soak
@pytest.mark.parametrize("program", PROGRAMS)
def test_many_stacks_are_those_of_libdw(program: str, cache_folder: Path, tmp_path: Path) -> None:
    no_difference(program, cache_folder, tmp_path, SOAK, 60_000)
