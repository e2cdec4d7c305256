"""Programs of the distribution, fetched on first use; a skip with its reason where that is not possible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest

from fixtures.debian import PackageUnavailable, Unpacked, VersionGone, exact, old_and_new
from fixtures.source import Built, Recipe, before_and_after

Pair = tuple[Unpacked, Unpacked]
P = ParamSpec("P")
R = TypeVar("R")


def available(get: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """What ``get`` fetches or builds. A skip where this machine cannot; a failure where the archive has moved on."""
    try:
        return get(*arguments, **options)
    except VersionGone as error:
        pytest.fail(f"{error.what}: {error.why}; {error.next_step}")
    except PackageUnavailable as error:
        pytest.skip(f"{error.what}: {error.why}")


@pytest.fixture(scope="session")
def package_pair(cache_folder: Path) -> Callable[[str], Pair]:
    """``package_pair(name)``: the two newest versions that the archive serves, older one first."""

    return lambda package: available(old_and_new, package, cache_folder / "packages")


@pytest.fixture(scope="session")
def package_version(cache_folder: Path) -> Callable[[str, str], Unpacked]:
    """``package_version(name, version)``: exactly this one; fails where the archive serves others only."""
    return lambda package, version: available(exact, package, version, cache_folder / "packages")


@pytest.fixture(scope="session")
def source_pair(cache_folder: Path) -> Callable[[Recipe], tuple[Built, Built]]:
    """Both builds of a recipe; skips with the reason where they cannot be made."""
    return lambda recipe: available(before_and_after, recipe, cache_folder / "sources")
