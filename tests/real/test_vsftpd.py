"""vsftpd, patched while it listens: a file that deny_file names can be uploaded before, not after, and again later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures import recipes
from fixtures.intact import altered_code
from fixtures.source import Built, Recipe
from fixtures.vsftpd import DENIED, run_vsftpd
from tests.conftest import Livegraft

pytestmark = [pytest.mark.apt, pytest.mark.root]


def test_the_fix_of_deny_file_is_in_force_while_it_is_applied(
    source_pair: Callable[[Recipe], tuple[Built, Built]], livegraft: Livegraft, tmp_path: Path
) -> None:
    """Without 0070-realpath_wrapper.patch a name that does not exist yet is not denied (CVE-2015-1419)."""
    old, new = source_pair(recipes.VSFTPD)
    patch = tmp_path / "vsftpd.patch"
    livegraft("diff", old.stripped("vsftpd"), new.stripped("vsftpd"), "-o", patch)
    with run_vsftpd(old.stripped("vsftpd")) as server:
        assert server.store(DENIED).startswith("226")
        assert server.store("allowed.txt").startswith("226")
        livegraft("apply", patch, "--pid", server.pid)
        assert server.store(DENIED).startswith("550")
        assert not (server.uploads / DENIED).exists()
        assert server.store("allowed.txt").startswith("226")
        assert (server.uploads / "allowed.txt").read_bytes() == b"content"
        livegraft("revert", "--pid", server.pid)
        assert server.store(DENIED).startswith("226")
        assert altered_code(server.pid) == []
        assert server.process.poll() is None
