"""What the tests of the differ share: the compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compile import Compiler


@pytest.fixture(scope="session")
def compiled(cache_folder: Path) -> Compiler:
    """``compiled(source, *flags, link="pie", cc="gcc")``: the path of the linked file, built once."""
    return Compiler(cache_folder / "compiled")
