"""The command line in a process of its own, with something happening at its n-th operation on a target.

The patcher is forked from the tests, which saves its imports, and runs ``patcher.cli.main`` under an observer of
``patcher.seam``. Afterwards the target is looked at, and what the patcher said is compared with what is there.
"""

from __future__ import annotations

import io
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from elfdiff.errors import BadInput
from elfdiff.patches.patchfile import write_patch
from elfdiff.patches.secondopinion import confirm_with_lief
from fixtures.hearing import PATIENCE
from fixtures.intact import altered_code
from patcher import cli, seam
from patcher.process.proc import status, thread_ids
from patcher.records.record import State
from patcher.remote.descriptors import leaked_memory_files
from patcher.transactions import transaction
from patcher.transactions.inspection import inspect_process
from tests.live.answering import Answering, Versions

BUSY = 5  # exit status
_SWEEPS, _TRIES = 5, 5

T = TypeVar("T")

Happening = Callable[[str, int], int]
"""What happens at an operation, given its name and its subject; returns the errno to fail with, or 0."""


def nothing(name: str, subject: int) -> int:
    return 0


@dataclass(frozen=True)
class Said:
    """How a patcher ended: its exit status, or minus the signal; the JSON on its stdout, and its stderr."""

    status: int
    json: dict[str, Any]
    stderr: str

    @property
    def error(self) -> dict[str, Any]:
        return dict(self.json.get("error", {}))

    @property
    def summary(self) -> str:
        """One word for counting: the exit's name, and for an error its first words."""
        name = str(self.json.get("exit", {}).get("name", f"signal {-self.status}"))
        return name if not self.error else f"{name}: {self.error['what']}"


def at(number: int, happening: Happening, *, ever_after: bool = False) -> seam.Observer:
    """An observer that lets ``happening`` decide on operation ``number``, counted from 0, and not on the others.

    ``ever_after``: on all that follow, too.
    """
    seen = -1

    def observer(name: str, subject: int) -> int:
        nonlocal seen
        seen += 1
        return happening(name, subject) if seen == number or (ever_after and seen > number) else 0

    return observer


class Patcher:
    """A patcher that runs; ``wait`` for what it says."""

    def __init__(
        self,
        words: Sequence[object],
        observer: seam.Observer = nothing,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        """``before`` and ``after`` the command are called in its process."""
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.pid = os.fork()
        if self.pid == 0:
            self._be_patcher([*map(str, words), "--json"], observer, before, after)
        self._handle = os.pidfd_open(self.pid)

    def _be_patcher(
        self,
        words: list[str],
        observer: seam.Observer,
        before: Callable[[], None],
        after: Callable[[], object],
    ) -> None:
        code = 99  # nothing that the command line would return
        try:
            os.dup2(self._out.fileno(), 1)
            os.dup2(self._err.fileno(), 2)
            sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8")
            sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8", write_through=True)
            before()
            with seam.observe(observer):
                code = cli.main(words)
            sys.stdout.flush()
            after()
        except BaseException:  # noqa: BLE001  # it must not return into the tests
            sys.__excepthook__(*sys.exc_info())
        finally:
            os._exit(code)

    def stopped_or_ended(self) -> bool:
        """Wait until the patcher has been stopped by a signal, and return True; False if it has ended."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT | os.WNOHANG)
            if found is not None:
                return found.si_code == os.CLD_STOPPED
            time.sleep(0.002)
        raise AssertionError("the patcher neither stops nor ends")

    def wait(self) -> Said:
        ended, _, _ = select.select([self._handle], [], [], PATIENCE)
        if not ended:
            where = Path(f"/proc/{self.pid}/stack").read_text()
            os.kill(self.pid, signal.SIGKILL)
        os.close(self._handle)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert ended, f"the patcher is stuck: {where}"
        text = []
        for file in (self._out, self._err):
            file.seek(0)
            text.append(file.read().decode())
            file.close()
        assert text[0] or code < 0, f"exit {code}, nothing on stdout: {text[1]}"
        return Said(code, json.loads(text[0]) if text[0] else {}, text[1])


def run(words: Sequence[object], observer: seam.Observer = nothing, before: Callable[[], None] = lambda: None) -> Said:
    """Run a command to its end, ``before`` it in its process."""
    return Patcher(words, observer, before).wait()


@dataclass(frozen=True)
class Command:
    """A command on a target: what was done to it before, its words, and the version that runs before and after."""

    name: str
    prepare: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]
    before: int
    after: int


COMMANDS = {
    item.name: item
    for item in (
        Command("check", (), ("check", "2"), 1, 1),
        Command("apply", (), ("apply", "2"), 1, 2),
        Command("apply again", (("apply", "2"), ("revert",)), ("apply", "2"), 1, 2),
        Command("replace", (("apply", "2"),), ("apply", "3"), 2, 3),
        Command("revert", (("apply", "2"),), ("revert",), 2, 1),
    )
}


@dataclass(frozen=True)
class Scene:
    """The program in three versions, and the patch objects that lead from the first to the others."""

    built: Versions
    files: dict[int, Path]

    @staticmethod
    def write(built: Versions, folder: Path) -> Scene:
        files = {version: folder / f"{version}.patch" for version in built.to}
        to = {version: write_patch(patch, files[version]) for version, patch in built.to.items()}
        scene = Scene(replace(built, to=to), files)
        scene._warm_up()
        return scene

    def _warm_up(self) -> None:
        """Import and assemble once, and not in every patcher."""
        confirm_with_lief(self.built.to[2], self.files[2])
        with self.start() as program:
            transaction.apply(program.pid, self.built.to[2])
            inspect_process(program.pid)
            transaction.revert(program.pid)

    def start(self) -> Answering:
        return Answering(self.built.programs[1])

    def words(self, words: Sequence[str], pid: int, timeout: int = 60) -> list[object]:
        """The arguments for the command line; a number stands for the patch that leads to this version."""
        return [words[0], *(self.files[int(word)] for word in words[1:]), "--pid", pid, "--timeout", timeout]

    def succeed(self, program: Answering, *commands: Sequence[str]) -> None:
        for words in commands:
            for _ in range(_TRIES):  # on a machine without CPU to spare a thread stays for long where it is
                said = run(self.words(words, program.pid))
                if said.status != BUSY:
                    break
            assert said.status == 0, said

    def operations(self, command: Command) -> list[str]:
        """The names of the operations of a command that succeeds, in order."""
        with self.start() as program, tempfile.TemporaryFile() as file:
            self.succeed(program, *command.prepare)

            def observer(name: str, subject: int) -> int:
                os.write(file.fileno(), f"{name}\n".encode())
                return 0

            said = run(self.words(command.words, program.pid), observer)
            assert said.status == 0, said
            file.seek(0)
            return file.read().decode().split("\n")[:-1]

    def version_in_force(self, program: Answering) -> int:
        """The version that the records of a target say it runs; asserts that they agree with its code."""
        found = inspect_process(program.pid)
        assert not found.damaged
        for item in found.patches:
            assert not item.record.interrupted and item.as_it_should_be, item
        applied = {item.record.contents.patch for item in found.patches if item.record.state is State.APPLIED}
        versions = [version for version, patch in self.built.to.items() if patch.id in applied]
        assert len(versions) == len(applied) <= 1, applied
        return versions[0] if versions else 1

    def assert_sound(self, program: Answering, version: int) -> None:
        """The target goes on, in every thread, and runs this version whole, as its records say."""
        assert_at_liberty(program.pid)
        assert self.version_in_force(program) == version
        program.answers(version)
        program.never_mixed()
        assert program.ask("pages") == "mapped"

    def assert_usable(self, program: Answering) -> None:
        """The next commands do what they say, and sweep whatever an earlier one has left."""
        # One that is in force already would be no change, and only changes sweep.
        other = 3 if self.version_in_force(program) == 2 else 2
        for words, version in ((("apply", str(other)), other), (("revert",), 1)):
            self.succeed(program, words)
            self.assert_sound(program, version)
        assert not leaked_memory_files(program.pid)
        for _ in range(_SWEEPS):  # a thread that gets no CPU for long keeps its stub for the next command
            if altered_code(program.pid):
                self.succeed(program, ("apply", "2"), ("revert",))
        assert altered_code(program.pid) == []
        assert not [item for item in inspect_process(program.pid).patches if item.record.state is State.PREPARED]


def assert_at_liberty(pid: int) -> None:
    """No thread of the target is traced or stopped."""
    for tid in thread_ids(pid):
        try:
            found = status(tid)
        except BadInput:
            continue  # it has ended
        assert not found.tracer_pid and found.state not in "tT", found


EXTENT = pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["some", "all"])
"""``whole`` is true in ``make soak``."""


def sample(cases: Sequence[T], count: int, whole: bool) -> list[T]:
    """Some of the cases, others each day, or all. The seed is printed; LIVEGRAFT_SEED sets it.

    Of all, LIVEGRAFT_EVERY=n takes every n-th, from one on that changes.
    """
    if whole:
        every = int(os.environ.get("LIVEGRAFT_EVERY", "1"))
        first = random.randrange(every)
        print(f"every {every}. of {len(cases)} cases, from {first} on")
        return list(cases[first::every])
    seed = int(os.environ.get("LIVEGRAFT_SEED", str(int(time.time()) // 86400)))
    print(f"LIVEGRAFT_SEED={seed}: {min(count, len(cases))} of {len(cases)} cases")
    return random.Random(seed).sample(list(cases), min(count, len(cases)))
