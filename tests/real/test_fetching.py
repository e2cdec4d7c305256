"""The cache of the distribution's programs, which tests fill side by side."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.debian import fetch, served_versions
from tests.real.conftest import available

pytestmark = [pytest.mark.apt]

SMALL = "hello"
FETCH = "import pathlib, sys; from fixtures.debian import fetch; fetch(*sys.argv[1:3], pathlib.Path(sys.argv[3]))"


def test_those_that_need_the_same_package_at_once_all_get_it(tmp_path: Path) -> None:
    """Each of them finds the cache empty, and one fetches."""
    versions = available(served_versions, SMALL)
    if not versions:
        pytest.skip(f"apt lists no package {SMALL}")
    command = [sys.executable, "-c", FETCH, SMALL, versions[0], str(tmp_path)]
    racing = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=300)[1] for process in racing]
    assert [process.returncode for process in racing] == [0, 0, 0], said
    assert fetch(SMALL, versions[0], tmp_path).file("usr/bin/hello").stat().st_size > 0
    assert not list(tmp_path.glob("tmp*")), "what was staged has its place"
