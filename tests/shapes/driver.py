"""Builds a shape, patches it while it runs, takes the patch back, and judges by what the process says."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

from elfdiff.diff import Options, diff
from elfdiff.errors import Busy, LivegraftError, NothingToPatch, Refused
from elfdiff.patches.patchfile import read_patch, write_patch
from elfdiff.patchobject import PatchObject, Severity
from fixtures.hearing import next_line
from fixtures.intact import altered_code
from patcher.pausing.conditions import USUAL, Conditions
from patcher.transactions.transaction import apply, revert
from tests.compile import Compiler
from tests.shapes.model import Build, Shape

BRIEF = Conditions(timeout=0.2)
"""To wait for what never comes: a function of these shapes returns never or within microseconds."""


class Running:
    """A started program; ``ask`` puts a question and checks that none before it was lost.

    ``counted`` is how many questions the program has answered by its own count, which nothing resets.
    """

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", bufsize=1
        )
        self.pid = self._process.pid
        self.counted = 0
        assert self._line() == "ready"

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        self._process.communicate()

    def _line(self) -> str:
        return next_line(self._process)

    def say(self, words: str) -> str:
        """Send a line; the next line of the program."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{words}\n")
        return self._line()

    def ask(self, question: int) -> str:
        """The answer. Fails where the program's own count is not that of the questions."""
        count, _, answer = self.say(str(question)).partition(" ")
        assert int(count) == self.counted, "its state did not go on"
        self.counted += 1
        return answer

    def ask_all(self, questions: tuple[int, ...]) -> dict[int, str]:
        """Question -> answer."""
        return {question: self.ask(question) for question in questions}


@dataclass(frozen=True)
class Made:
    """A pair and what the differ says of it: a patch, or the reason why there is none."""

    old: Path
    new: Path
    patch: PatchObject | None
    error: LivegraftError | None

    @property
    def refused(self) -> frozenset[str]:
        """Codes of the findings for which it was refused."""
        findings = self.error.findings if isinstance(self.error, Refused) else ()
        return frozenset(finding.code for finding in findings)

    @property
    def warned(self) -> frozenset[str]:
        """Codes of the warnings that the patch carries."""
        findings = self.patch.findings if self.patch else ()
        return frozenset(f.code for f in findings if f.severity is Severity.WARN)


def make(shape: Shape, build: Build, compiled: Compiler, folder: Path) -> Made:
    """Compile both programs and compare them; the patch is one that was written and read again."""
    flags = (build.level, *build.flags, *shape.flags)
    old, new = (
        compiled(shape.sources(version), *flags, link=build.link, cc=build.cc, stripped=build.stripped)
        for version in (1, 2)
    )
    try:
        patch = diff(old, new, Options(allow=shape.allow))
    except (Refused, NothingToPatch) as error:
        return Made(old, new, None, error)
    write_patch(patch, folder / "patch")
    return Made(old, new, read_patch(folder / "patch"), None)


@cache
def said(program: Path, questions: tuple[int, ...]) -> dict[int, str]:
    """What a program says that was just started: the truth of its version."""
    with Running(program) as fresh:
        return fresh.ask_all(questions)


def exercise(shape: Shape, made: Made) -> None:
    """Patch the running old program and take the patch back; its answers must be the right ones all along."""
    assert made.patch is not None
    before, after = said(made.old, shape.questions), {**said(made.new, shape.questions), **shape.after}
    assert before != after, "nothing that this shape says would show a patch"
    with Running(made.old) as process:
        assert process.ask_all(shape.questions) == before
        apply(process.pid, made.patch, BRIEF if shape.busy else USUAL)
        assert process.ask_all(shape.questions) == after
        assert altered_code(process.pid)
        revert(process.pid)
        assert process.ask_all(shape.questions) == before
        assert not altered_code(process.pid)


def outcome(shape: Shape, build: Build, compiled: Compiler, folder: Path) -> str:
    """One word for the table of ``make matrix``: patched, nothing, refused with its codes, busy or wrong."""
    made = make(shape, build, compiled, folder)
    if isinstance(made.error, NothingToPatch):
        return "nothing"
    if made.patch is None:
        return "refused: " + ", ".join(sorted(made.refused)) if made.refused else f"refused: {made.error}"
    try:
        exercise(shape, made)
    except Busy:
        return "busy"
    except AssertionError as wrong:
        return f"wrong: {wrong}"
    return "patched"
