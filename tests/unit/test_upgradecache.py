"""The folder of patches that ``upgrade`` keeps: whose it must be, and what goes when it is full."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from elfdiff.errors import NotPermitted
from patcher.upgrade.cache import PatchCache, default_folder


def test_the_oldest_go_first_and_what_was_left_unfinished(tmp_path: Path) -> None:
    with PatchCache(tmp_path / "kept", limit=12) as cache:
        for time, name in enumerate((".livegraft-died", "first", "second", "third"), 1):
            (cache.folder / name).write_bytes(bytes(6))
            os.utime(cache.folder / name, (time, time))
        (cache.folder / ".livegraft-at-work").write_bytes(bytes(6))
        cache._bound("third")
        assert sorted(item.name for item in cache.folder.iterdir()) == [".livegraft-at-work", "second", "third"]


def test_the_newest_stays_however_large_it_is(tmp_path: Path) -> None:
    with PatchCache(tmp_path / "kept", limit=1) as cache:
        (cache.folder / "only").write_bytes(bytes(6))
        cache._bound("only")
        assert (cache.folder / "only").exists()


def test_a_folder_must_be_this_users_alone_and_no_link(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o770)
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("shared", "link"):
        with pytest.raises(NotPermitted) as caught:
            PatchCache(tmp_path / name)
        assert name in caught.value.what and "XDG_CACHE_HOME" in caught.value.next_step


def test_where_patches_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        assert default_folder() == Path("/var/cache/livegraft")
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert default_folder() == Path.home() / ".cache" / "livegraft"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/livegraft")
