"""What ``upgrade`` prints of a process with many files: those in which nothing is to be done share a line."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import pytest

from elfdiff.errors import Busy, NothingToPatch, Refused
from patcher.commands.upgrade import _lines
from patcher.targets.outdated import FileState, OutdatedFile
from patcher.targets.selection import Listed
from patcher.transactions.group import End, Result
from patcher.upgrade.upgrading import Fate, Upgraded, UpgradedFile


def file(name: str, fate: Fate) -> UpgradedFile:
    path = f"/usr/lib/{name}"
    error = NothingToPatch("no difference") if fate is Fate.NOTHING else Refused("not safe")
    return UpgradedFile(OutdatedFile(path, FileState.NEW_BUILD, "aa", "bb", path), fate, f"/proc/7/{name}", error=error)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 40])
def test_nothing_to_patch(count: int) -> None:
    names = [f"mod_{number}.so" for number in range(count)]
    files = (*(file(name, Fate.NOTHING) for name in names), file("server", Fate.REFUSED))
    lines = _lines(Result(Listed(7, 1, 0, "server"), End.FAILED), Upgraded("server.service", files), {})
    assert lines[0] == "server (pid 7, server.service)" and "  /usr/lib/server: refused" in lines
    text = " ".join(line.strip() for line in lines)
    assert all(name in text for name in names) and max(map(len, lines)) < 120
    assert (f"{count} files: nothing to patch (mod_0.so, " in text) == (count > 2)
    assert ("/usr/lib/mod_0.so: nothing to patch" in text) == (count in (1, 2))


@pytest.mark.parametrize(
    ("fates", "said"),
    [
        ((Fate.PATCHABLE, Fate.PATCHABLE, Fate.NOTHING), "3 files, patched in one stop or not at all"),
        ((Fate.UNTRIED, Fate.REFUSED), "2 files, patched in one stop or not at all"),
        ((Fate.PATCHABLE, Fate.REFUSED), "2 files, patched in one stop, those that can be"),
    ],
)
def test_whether_all_or_some(fates: tuple[Fate, ...], said: str) -> None:
    files = tuple(file(f"{number}.so", fate) for number, fate in enumerate(fates))
    assert f"  {said}" in _lines(Result(Listed(7, 1, 0, "server"), End.DONE), Upgraded("", files), {})


def test_what_was_said_of_one_worker_is_not_said_of_each() -> None:
    """But for what is its own: another reason, and what was done."""
    files = (*(file(f"mod_{number}.so", Fate.NOTHING) for number in range(9)), file("server", Fate.REFUSED))
    busy = replace(files[-1], fate=Fate.BUSY, error=Busy("main stayed live in process 9"))
    of = {7: files, 8: files, 9: (*files[:-1], busy)}
    told: dict[Hashable, int] = {}
    lines = {
        pid: _lines(Result(Listed(pid, 1, 0, "server"), End.FAILED), Upgraded("", of[pid]), told) for pid in of
    }
    assert "  /usr/lib/server: refused" in lines[7] and "    what       not safe" in lines[7]
    for pid in (8, 9):
        assert "  9 files: nothing to patch (the same as of pid 7)" in lines[pid]
    assert lines[8][-1] == "  /usr/lib/server: refused, for the same reason as of pid 7"
    assert lines[9][-2:] == ["    build      aa -> bb", "    what       main stayed live in process 9"]
