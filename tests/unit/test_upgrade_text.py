"""What ``upgrade`` prints of a process with many files: those in which nothing is to be done share a line."""

from __future__ import annotations

import pytest

from elfdiff.errors import NothingToPatch, Refused
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
    lines = _lines(Result(Listed(7, 1, 0, "server"), End.FAILED), Upgraded("server.service", files))
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
    assert f"  {said}" in _lines(Result(Listed(7, 1, 0, "server"), End.DONE), Upgraded("", files))
