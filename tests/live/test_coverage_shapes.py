"""What compilers make of data and code, each patched while it runs, and judged by what the process says.

The shapes are in ``tests/shapes``. An ordinary run takes the builds that a shape names; ``make matrix`` takes all.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from elfdiff.errors import Busy, NothingToPatch, Refused
from fixtures.intact import altered_code
from patcher.transactions.transaction import apply
from tests.compile import Compiler
from tests.shapes import constants, control, functions, switches, variables
from tests.shapes.driver import BRIEF, Made, Running, exercise, make, outcome
from tests.shapes.model import Build, Shape, full_matrix

pytestmark = pytest.mark.root

SHAPES: tuple[Shape, ...] = tuple(
    chain(constants.SHAPES, variables.SHAPES, switches.SHAPES, functions.SHAPES, control.SHAPES)
)
MATRIX = bool(os.environ.get("LIVEGRAFT_MATRIX"))
CASES = [
    pytest.param(
        shape, build, id=f"{shape.name}-{build.name}",
        marks=[pytest.mark.xfail(strict=True, raises=AssertionError, reason=shape.xfail)] if shape.xfail else [],
    )
    for shape in SHAPES
    for build in shape.builds
]  # fmt: skip


@pytest.fixture(scope="session")
def compiled(cache_folder: Path) -> Compiler:
    return Compiler(cache_folder / "shapes")


def linkable(build: Build) -> Build:
    """The build; skips where its linker is not installed."""
    for flag in build.flags:
        linker = flag.removeprefix("-fuse-ld=")
        if linker != flag and shutil.which(f"ld.{linker}") is None and shutil.which(linker) is None:
            pytest.skip(f"the linker {linker} is not installed")
    return build


@pytest.mark.parametrize(("shape", "build"), CASES)
def test_a_running_program_gets_the_new_shape_and_the_old_one_back(
    shape: Shape, build: Build, compiled: Compiler, tmp_path: Path
) -> None:
    made = make(shape, linkable(build), compiled, tmp_path)
    if shape.nothing:
        assert isinstance(made.error, NothingToPatch)
    elif shape.refused:
        assert isinstance(made.error, Refused)
        assert shape.refused <= made.refused, made.error.details
    else:
        assert made.patch is not None, made.error and (made.error.why, made.error.details)
        assert shape.warned <= made.warned
        (stay_busy if shape.busy else exercise)(shape, made)


def stay_busy(shape: Shape, made: Made) -> None:
    """A function that never returns is never patched; the process is as before."""
    assert made.patch is not None
    with Running(made.old) as process:
        before = process.ask_all(shape.questions)
        with pytest.raises(Busy):
            apply(process.pid, made.patch, BRIEF)
        assert process.ask_all(shape.questions) == before
        assert not altered_code(process.pid)


def test_every_shape_has_a_name_of_its_own() -> None:
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)


def buildable(shape: Shape) -> Iterator[Build]:
    """All builds of ``make matrix``, then those of the shape that are not among them."""
    builds = full_matrix(shape)
    yield from builds
    yield from (build for build in shape.builds if build not in builds)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])
def test_no_build_of_a_shape_goes_wrong(shape: Shape, compiled: Compiler, tmp_path: Path) -> None:
    """The whole cross product. A build may be refused, or may make no difference; it may never be wrong."""
    outcomes: Counter[str] = Counter()
    wrong = []
    for build in buildable(shape):
        said = outcome(shape, build, compiled, tmp_path)
        outcomes[said.split("\n")[0][:60] if said.startswith("wrong") else said] += 1
        if said.startswith("wrong"):
            wrong.append(f"{build.name}: {said}")
    print(f"\n{shape.name}: " + ", ".join(f"{number} {said}" for said, number in sorted(outcomes.items())))
    assert not wrong
