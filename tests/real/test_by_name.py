"""Matching and address map of stripped builds, against the symbols of the same builds: none may be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from elfdiff.decoding.code import load_code
from elfdiff.differences.comparison import compare
from elfdiff.images.imagefile import load_image
from fixtures import recipes
from fixtures.source import Built, Recipe, before_and_after
from tests.real.conftest import available
from tests.truth import Truth
from tests.unit.test_matching import wrong_matches, wrong_variables

pytestmark = [pytest.mark.apt, pytest.mark.slow]


@pytest.fixture(scope="session")
def builds(cache_folder: Path) -> Callable[[Recipe], tuple[Built, Built]]:
    """Both builds of a recipe; skips with the reason where they cannot be made."""
    return lambda recipe: available(before_and_after, recipe, cache_folder / "sources")


@pytest.mark.parametrize(
    ("recipe", "program"),
    [
        pytest.param(
            recipe, program, id=program, marks=pytest.mark.long if recipe in (recipes.TOR, recipes.FRR) else ()
        )
        for recipe in (recipes.VSFTPD, recipes.MEMCACHED, recipes.TOR, recipes.FRR)
        for program in recipe.programs
    ],
)
def test_functions_and_variables_keep_their_names(
    recipe: Recipe, program: str, builds: Callable[[Recipe], tuple[Built, Built]]
) -> None:
    old, new = builds(recipe)
    comparison = compare(*(load_code(load_image(build.stripped(program))) for build in (old, new)))
    truth = [Truth(build.linked(program)) for build in (old, new)]
    common = truth[0].functions.keys() & truth[1].functions.keys()
    matched = int((comparison.matching.new_of >= 0).sum())
    print(program, len(comparison.old), "functions, matched", matched, "pins", len(comparison.addresses.old_of))
    assert wrong_matches(comparison, *truth) == []
    assert wrong_variables(comparison, *truth) == []
    assert matched >= 0.99 * len(common)
