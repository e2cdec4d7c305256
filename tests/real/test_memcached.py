"""memcached of Debian 12: the update changes only code that Debian does not compile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Livegraft
from tests.real.conftest import Pair

pytestmark = [pytest.mark.apt]

PROGRAM = "usr/bin/memcached"


def test_the_update_has_nothing_to_patch(
    package_pair: Callable[[str], Pair], livegraft: Livegraft, tmp_path: Path
) -> None:
    old, new = package_pair("memcached")
    if (old.version, new.version) != ("1.6.18-1", "1.6.18-1+deb12u1"):
        pytest.skip(f"the archive serves another pair by now: {old.version}, {new.version}")
    patch = tmp_path / "memcached.patch"
    assert old.file(PROGRAM).read_bytes() != new.file(PROGRAM).read_bytes()
    outcome = livegraft("diff", old.file(PROGRAM), new.file(PROGRAM), "-o", patch, "--json", status=3)
    assert outcome.json["exit"] == {"code": 3, "name": "nothing-to-patch"}
    assert list(tmp_path.iterdir()) == []
