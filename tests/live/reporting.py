"""A program of ``fixtures/tracees`` that includes answering.h: built in versions, running, patched there and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from elfdiff.patchobject import PatchObject
from fixtures.tracees import SOURCES, Tally, Torture, run_torture, wait_until
from patcher.pausing.conditions import Conditions
from patcher.transactions.transaction import Outcome, apply, revert
from tests.patchmaker import compile_version, make_patch

CHANGED = ("left", "right", "answer")
PATIENT = Conditions(timeout=30)


@dataclass(frozen=True)
class Pair:
    """The running build and the patch to the next version."""

    program: Path
    patch: PatchObject


def pair(name: str, folder: Path, *others: str) -> Pair:
    """Versions 1 and 2 of a program of ``fixtures/tracees``; the patch changes ``others``, too."""
    old, new = (compile_version(SOURCES / f"{name}.c", version, folder) for version in (1, 2))
    return Pair(old, make_patch(old, new, *CHANGED, *others))


@dataclass(frozen=True)
class Reporting:
    """A running program and its patch."""

    torture: Torture
    patch: PatchObject

    @property
    def pid(self) -> int:
        return self.torture.pid

    def tally(self, name: str) -> Tally:
        return next(tally for tally in self.torture.tallies if tally.name == name)

    def answer_of(self, name: str) -> int:
        """Return what the thread or child of a tally answers now; asserts that it never mixed two versions."""
        before = self.tally(name).rounds

        def asked() -> bool:
            self.torture.require_alive()
            return self.tally(name).rounds > before + 1

        wait_until(asked, "an answer")
        assert self.tally(name).wrong == 0
        return self.tally(name).last_error

    def answers(self, version: int) -> None:
        """Assert that it goes on answering in this version."""
        assert self.answer_of("answer") == version * 1001

    def there(self) -> Outcome:
        """Apply, and see that it is in force."""
        outcome = apply(self.pid, self.patch, PATIENT)
        self.answers(2)
        return outcome

    def back(self) -> Outcome:
        """Revert, and see that it is out of force."""
        outcome = revert(self.pid, conditions=PATIENT)
        self.answers(1)
        return outcome


@contextmanager
def reporting(built: Pair, folder: Path, *arguments: str) -> Iterator[Reporting]:
    """Start the program and wait until it is ready."""
    with run_torture(built.program, folder, *arguments) as torture:
        yield Reporting(torture, built.patch)
