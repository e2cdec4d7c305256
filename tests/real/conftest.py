"""Programs of the distribution, fetched on first use; a skip with its reason where that is not possible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.debian import PackageUnavailable, Unpacked, old_and_new

Pair = tuple[Unpacked, Unpacked]


@pytest.fixture(scope="session")
def package_pair(cache_folder: Path) -> Callable[[str], Pair]:
    """``package_pair(name)``: the two newest versions that the archive serves, older one first."""

    def pair(package: str) -> Pair:
        try:
            return old_and_new(package, cache_folder / "packages")
        except PackageUnavailable as error:
            pytest.skip(f"{error.what}: {error.why}")

    return pair
