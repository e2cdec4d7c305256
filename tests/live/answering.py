"""A running ``fixtures/answer.c`` and the patches for it, for the tests of the transaction."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

from elfdiff.patchobject import PatchObject
from fixtures.hearing import PATIENCE, next_line
from fixtures.killing import forked, was_killed
from patcher.process.memory import Memory
from patcher.process.proc import mappings
from tests.patchmaker import compile_version, make_patch

SOURCE = Path(__file__).parents[2] / "fixtures" / "answer.c"
CHANGED = ("left", "right", "answer", "held")
SPREAD = "-falign-functions=4096"  # every function on a page of its own, so that a plan has several writes
ANSWERS = {version: str(version * 1001) for version in (1, 2, 3)}


class Answering:
    """The program, running; ``ask`` sends a line and returns the answer.

    ``under`` is a command that starts the program as its only child, ``arguments`` are the program's, and to ours
    ``environment`` is added.
    """

    def __init__(
        self,
        program: Path,
        under: tuple[str, ...] = (),
        arguments: tuple[str | Path, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.program = program
        self._process = subprocess.Popen(
            [*under, program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        self.pid = self._process.pid
        assert self.line() == "ready"
        if under:
            self.pid = int(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text())

    def __enter__(self) -> Answering:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._process.communicate(timeout=PATIENCE)

    @property
    def stdin(self) -> int:
        """The descriptor from which it reads what it is to do, at our end."""
        assert self._process.stdin is not None
        return self._process.stdin.fileno()

    def line(self, patience: float = PATIENCE) -> str:
        """The next line that it says. Fails, and says what its threads do, after ``patience`` seconds."""
        return next_line(self._process, self.pid, patience).strip()

    def ask(self, question: str = "ask") -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        return self.line()

    def answers(self, version: int) -> None:
        """Assert that this version runs, in every thread, and no other."""
        assert self.ask() == ANSWERS[version]
        assert int(self.ask("calls")) > 0

    def never_mixed(self) -> None:
        """Assert that no answer was ever put together from two versions."""
        assert self.ask("mixed") == "0"

    @property
    def maps(self) -> list[str]:
        """What is mapped, without the mappings of the C library's threads, which come and go."""
        return [
            f"{item.start:x}-{item.end:x} {item.perms} {item.path}"
            for item in mappings(self.pid)
            if item.path and item.path != "[heap]"
        ]

    @property
    def patch_mappings(self) -> int:
        return sum("memfd" in line for line in self.maps)

    @property
    def descriptors(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def code(self) -> dict[str, bytes]:
        """The bytes of every executable mapping that can be read."""
        with Memory(self.pid) as memory:
            return {
                f"{item.start:x} {item.path}": memory.read(item.start, item.size)
                for item in mappings(self.pid)
                if item.executable and item.path != "[vsyscall]"
            }


@dataclass(frozen=True)
class Versions:
    """Three builds of the program and the patches from the first to the others."""

    programs: dict[int, Path]
    to: dict[int, PatchObject]


@cache
def versions(
    folder: Path, *flags: str, source: Path = SOURCE, changed: tuple[str, ...] = CHANGED, cc: str = "gcc"
) -> Versions:
    programs = {version: compile_version(source, version, folder, *flags, cc=cc) for version in ANSWERS}
    patches = {version: make_patch(programs[1], programs[version], *changed) for version in (2, 3)}
    return Versions(programs, patches)


def die_at(step: int) -> Callable[[str], None]:
    """An ``on_step`` that kills this very process at the given step, counted from 0."""
    seen = 0

    def on_step(name: str) -> None:
        nonlocal seen
        if seen == step:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    return on_step


def killed_at(step: int, work: Callable[[Callable[[str], None]], object]) -> bool:
    """Do ``work(on_step)`` in a process that is killed at a step; False if it ended before it got there."""
    return was_killed(forked(lambda: work(die_at(step))))
