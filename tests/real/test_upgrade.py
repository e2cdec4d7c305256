"""The security update of Debian's redis-server, installed over the running one, and brought into it by one command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.debian import Unpacked
from fixtures.intact import altered_code
from fixtures.load import Load
from fixtures.redis import redis_build, run_redis
from tests.conftest import Livegraft

pytestmark = [pytest.mark.apt, pytest.mark.root, pytest.mark.slow]

PROGRAM = "usr/bin/redis-check-rdb"
OLD_VERSION, NEW_VERSION = "5:7.0.15-1~deb12u7", "5:7.0.15-1~deb12u10"
TIMEOUT = ("--timeout", 60)


def test_redis_is_upgraded_under_load_and_back(
    package_version: Callable[[str, str], Unpacked],
    cache_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    livegraft: Livegraft,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    old, new = (package_version("redis-tools", version) for version in (OLD_VERSION, NEW_VERSION))
    installed, link, data = tmp_path / "redis-check-rdb", tmp_path / "redis-server", tmp_path / "data"
    shutil.copy(old.file(PROGRAM), installed)
    link.symlink_to(installed)
    data.mkdir()
    build = replace(redis_build(old, tmp_path / "old", cache_folder / "packages"), server=link)
    with run_redis(build, data) as server, Load(server.port, "resp", rate=1000.0) as load:
        shutil.copy(new.file(PROGRAM), tmp_path / "arriving")
        (tmp_path / "arriving").rename(installed)
        dry = livegraft("upgrade", "--pid", server.pid, "--dry-run", "--json", *TIMEOUT).json["processes"][0]
        assert dry["files"][0]["result"] == "patchable" and altered_code(server.pid) == []
        done = livegraft("upgrade", "--pid", server.pid, "--json", *TIMEOUT).json["processes"][0]
        (file,) = done["files"]
        assert (file["path"], file["result"]) == (str(installed), "patched")
        assert len(file["outcome"]["functions"]) == 10
        load.more(2000)
        (again,) = livegraft("upgrade", "--pid", server.pid, "--json", *TIMEOUT).json["processes"]
        assert again["files"][0]["result"] == "already"
        livegraft("revert", "--pid", server.pid, *TIMEOUT)
        load.more(2000)
        assert altered_code(server.pid) == []
        report = load.stop()
    assert (report.failed, report.reconnects, report.failures) == (0, 0, ())
