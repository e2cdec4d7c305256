"""memcached of Debian 12: the update changes only code that Debian does not compile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.debian import Unpacked
from tests.conftest import Livegraft

pytestmark = [pytest.mark.apt]

PROGRAM = "usr/bin/memcached"


def test_the_update_has_nothing_to_patch(
    package_version: Callable[[str, str], Unpacked], livegraft: Livegraft, tmp_path: Path
) -> None:
    """CVE-2023-46852 and CVE-2023-46853 are in the proxy, CVE-2026-47783 and CVE-2026-47784 in SASL's own password
    file; Debian configures neither (debian/rules: --enable-sasl --enable-tls)."""
    old, new = (package_version("memcached", version) for version in ("1.6.18-1", "1.6.18-1+deb12u1"))
    patch = tmp_path / "memcached.patch"
    assert old.file(PROGRAM).read_bytes() != new.file(PROGRAM).read_bytes()
    outcome = livegraft("diff", old.file(PROGRAM), new.file(PROGRAM), "-o", patch, "--json", status=3)
    assert outcome.json["exit"] == {"code": 3, "name": "nothing-to-patch"}
    assert list(tmp_path.iterdir()) == []
