"""The command line in forked children of this process: as isolated as a command, without the start of Python.

A child has a folder of its own, bounds on memory and processor time, and its streams in files; it is judged by what
is left of it, so that an abort of a library or an endless loop is seen as well.
"""

from __future__ import annotations

import importlib
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

SECONDS = 60
MEMORY = 2 << 30
ADDRESS_SPACE = 12 << 30
"""Images may span 2 GiB each that are never touched, so what is judged is what was resident."""
STUCK_SECONDS = 600
"""Of the clock, for a child that waits and computes nothing."""
BUG = 70
"""Exit status of a child in which something else than an error of our tree was raised."""

Key = TypeVar("Key", bound=Hashable)
Task = Callable[[Path], int]
"""Runs in the child, in an empty folder of its own; returns the exit status."""


@dataclass(frozen=True)
class Outcome:
    """How a child ended: a negative status is a signal, ``peak`` bytes, ``seconds`` of processor time, files left."""

    status: int
    stdout: str
    stderr: str
    peak: int
    seconds: float
    left: tuple[str, ...]

    @property
    def fault(self) -> str:
        """What is wrong with how it ended, or an empty string: an error of our tree is right."""
        if self.status < 0:
            return f"killed by {signal.Signals(-self.status).name} after {self.seconds:.0f} s"
        if self.status == BUG:
            return f"raised {(self.stderr.strip().splitlines() or ['?'])[-1]}"
        if self.status not in (0, 2, 3, 4):
            return f"exit {self.status}: {self.stderr.strip()}"
        if self.status != 0 and ("livegraft: " not in self.stderr or "  why: " not in self.stderr):
            return f"exit {self.status} without saying why: {self.stderr!r}"
        return f"{self.peak >> 20} MB resident" if self.peak > MEMORY else ""


def livegraft(*arguments: object) -> int:
    """A command in a child; what it would call a bug is a traceback here."""
    from patcher.cli import main

    os.environ["LIVEGRAFT_DEBUG"] = "1"
    return main([str(argument) for argument in arguments])


def run(task: Task) -> Outcome:
    """One task."""
    return next(run_all([(0, task)], jobs=1))[1]


def run_all(tasks: Iterable[tuple[Key, Task]], jobs: int = 2) -> Iterator[tuple[Key, Outcome]]:
    """The tasks, ``jobs`` at a time, each in its own child; outcomes as they come."""
    _preload()
    running: dict[int, _Child[Key]] = {}
    with tempfile.TemporaryDirectory(prefix="livegraft-fork-") as scratch:
        try:
            for number, (key, task) in enumerate(tasks):
                while len(running) >= jobs:
                    yield from _ended(running)
                child = _Child(key, task, Path(scratch) / str(number))
                running[child.descriptor] = child
            while running:
                yield from _ended(running)
        finally:  # where nobody wants the rest
            for child in running.values():
                os.kill(child.pid, signal.SIGKILL)
                child.outcome()


def _preload() -> None:
    """What every child needs is imported once."""
    for name in ("elftools.elf.elffile", "lief", "capstone", "elfdiff.diff", "elfdiff.patches.patchfile", "patcher.cli",
                 "patcher.commands.diff", "patcher.commands.inspect", "patcher.explanation.as_text", "elfdiff.explain",
                 "patcher.transactions.transaction"):  # fmt: skip
        importlib.import_module(name)


def _ended(running: dict[int, _Child[Key]]) -> Iterator[tuple[Key, Outcome]]:
    poll = select.poll()
    for descriptor in running:
        poll.register(descriptor, select.POLLIN)  # a pidfd is readable when its process has ended (pidfd_open(2))
    for descriptor, _ in poll.poll(1000):
        child = running.pop(descriptor)
        yield child.key, child.outcome()
    for child in running.values():
        if time.monotonic() > child.deadline:
            os.kill(child.pid, signal.SIGKILL)


class _Child(Generic[Key]):
    """A forked process; its folder holds ``work`` (where it runs) and its streams."""

    def __init__(self, key: Key, task: Task, folder: Path) -> None:
        self.key = key
        self.folder = folder
        self.deadline = time.monotonic() + STUCK_SECONDS
        (folder / "work").mkdir(parents=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be_child(task, folder)
        self.descriptor = os.pidfd_open(self.pid)

    def outcome(self) -> Outcome:
        """Reaps it; its folder is gone then."""
        _, status, usage = os.wait4(self.pid, 0)
        os.close(self.descriptor)
        read = {name: (self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr")}
        left = tuple(sorted(path.name for path in (self.folder / "work").iterdir()))
        shutil.rmtree(self.folder)
        return Outcome(
            status=os.waitstatus_to_exitcode(status),
            peak=usage.ru_maxrss << 10,
            seconds=usage.ru_utime + usage.ru_stime,
            left=left,
            **read,
        )


def _be_child(task: Task, folder: Path) -> NoReturn:
    status = BUG
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder / "work")
        status = task(folder / "work")
    except BaseException:  # noqa: BLE001  (a forked child must never return into the tests)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
