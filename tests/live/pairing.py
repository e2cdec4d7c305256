"""A program and its library that are patched together: ``fixtures/answer.c`` or one that includes it, and ``right.c``.

Every answer is put together from both, so one that comes from two versions is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from elfdiff.patchobject import PatchObject
from patcher.records.record import State
from patcher.transactions.inspection import inspect_process
from tests.live.answering import ANSWERS, CHANGED, SOURCE, SPREAD, Answering
from tests.live.grafting import named
from tests.patchmaker import compile_version, make_patch

LIBRARY = "libright.so"
_OF_PROGRAM = tuple(name for name in CHANGED if name != "right")
_LIBRARY_FLAGS = ("-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}")


@dataclass(frozen=True)
class Pairs:
    """The old program and library, and the sets that lead to the other versions: the program's patch first."""

    program: Path
    library: Path
    to: dict[int, tuple[PatchObject, PatchObject]]

    @property
    def environment(self) -> Mapping[str, str]:
        """What makes the program find the old library."""
        return {"LD_LIBRARY_PATH": str(self.library.parent)}

    def start(self) -> Answering:
        """The old program, running."""
        return Answering(self.program, environment=self.environment)


@cache
def pairs(folder: Path, source: Path = SOURCE) -> Pairs:
    """Build three versions of both."""
    libraries = {
        version: named(compile_version(SOURCE.with_name("right.c"), version, folder, *_LIBRARY_FLAGS), LIBRARY)
        for version in ANSWERS
    }
    programs = {
        version: compile_version(source, version, folder, "-DAPART", SPREAD, library=libraries[1])
        for version in ANSWERS
    }
    return Pairs(
        programs[1],
        libraries[1],
        {
            version: (
                make_patch(programs[1], programs[version], *_OF_PROGRAM),
                make_patch(libraries[1], libraries[version], "right"),
            )
            for version in (2, 3)
        },
    )


def version_in_force(program: Answering, built: Pairs) -> int | None:
    """Which version ``status`` says that both run; None where it says that a command on the set was interrupted.

    Asserts that it tells the truth: entries are as the states say, and never one patch is in force without the other.
    """
    found = inspect_process(program.pid)
    assert not found.damaged
    sets = {version: {patch.id for patch in both} for version, both in built.to.items()}
    states = [item for item in found.patches if item.record.state is not State.PREPARED]
    if any(item.record.interrupted for item in states):
        return None
    assert all(item.as_it_should_be for item in found.patches), found
    applied = {item.record.contents.patch for item in states if item.record.state is State.APPLIED}
    assert applied in ({*()}, *sets.values()), applied
    return next((version for version, ids in sets.items() if ids == applied), 1)
