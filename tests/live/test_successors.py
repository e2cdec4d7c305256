"""A library whose file name carries its version is replaced by a file of another name: found by its SONAME."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.intact import altered_code
from patcher.targets.outdated import FileState, OutdatedFile, outdated_process
from tests.compile import Compiler
from tests.conftest import Livegraft
from tests.live.grafting import SONAME, Running, library_pair
from tests.live.replacing import TIMEOUT, one, put

pytestmark = pytest.mark.root

TEXT = """
SEPARATE long first(long n) { return n * 10 + 3; }
long answer(long n) { return first(n) + 1000; }
"""


class Versioned:
    """A folder of a library as ldconfig(8) keeps it: the SONAME is a link to a file with the version in its name."""

    def __init__(self, folder: Path, old: Path, new: Path) -> None:
        folder.mkdir()
        self.link = folder / SONAME
        self.old, self.new = folder / f"{SONAME}.1.2.3", folder / f"{SONAME}.1.2.10"
        self._build = new
        put(old, self.old)
        self.link.symlink_to(self.old.name)

    def upgrade(self, target: str | None = None) -> None:
        """Unpack the new file, lead the link to it, or to ``target``, and remove the old file."""
        put(self._build, self.new)
        arriving = self.link.with_name("arriving")
        arriving.symlink_to(target if target is not None else self.new.name)
        arriving.rename(self.link)
        self.old.unlink()


Started = Callable[..., tuple[Running, Versioned]]


@pytest.fixture
def started(cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Running, Versioned]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pair = library_pair(Compiler(cache_folder / "compiled"), TEXT, TEXT.replace("+ 3", "+ 7"))
    library = Versioned(tmp_path / "lib", pair.old, pair.new)
    return Running([pair.program], {"LD_LIBRARY_PATH": str(library.link.parent)}), library


def outdated(pid: int) -> OutdatedFile:
    process = outdated_process(pid)
    assert process is not None
    (file,) = process.files
    return file


def test_it_is_upgraded_and_reverted(started: tuple[Running, Versioned], livegraft: Livegraft) -> None:
    running, library = started
    with running as process:
        assert process.ask(1) == [1013]
        library.upgrade()
        file = outdated(process.pid)
        assert (file.path, file.successor) == (str(library.old), str(library.new))
        assert file.state is FileState.NEW_BUILD
        done = livegraft("upgrade", "--pid", process.pid, *TIMEOUT)
        assert f"{library.old}: patched" in done.stdout and f" of {library.new}" in done.stdout
        assert process.ask(1) == [1017]
        assert outdated(process.pid).state is FileState.PATCHED
        (row,) = [line for line in livegraft("outdated").stdout.splitlines() if line.split()[-1] == str(process.pid)]
        assert f"{library.old} -> {library.new.name}" in row
        livegraft("revert", "--pid", process.pid)
        assert process.ask(1) == [1013] and altered_code(process.pid) == []


def test_what_lies_at_the_old_path_comes_first(started: tuple[Running, Versioned], cache_folder: Path) -> None:
    running, library = started
    with running as process:
        library.upgrade()
        put(Path("/bin/true"), library.old)
        file = outdated(process.pid)
        assert file.successor == str(library.old) and file.on_disk != "" and file.state is FileState.NEW_BUILD


@pytest.mark.parametrize("target", ["../elsewhere", "/nowhere", "none.so", "."])
def test_a_link_that_leads_elsewhere_is_no_successor(
    target: str, started: tuple[Running, Versioned], livegraft: Livegraft
) -> None:
    running, library = started
    with running as process:
        library.upgrade(target)
        put(library.new, library.link.parent.parent / "elsewhere")
        assert outdated(process.pid).state is FileState.GONE
        file = one(livegraft("upgrade", "--pid", process.pid, "--json", status=4).json)
        assert file["result"] == "refused" and process.ask(1) == [1013] and altered_code(process.pid) == []


def test_without_the_link_it_is_gone(started: tuple[Running, Versioned]) -> None:
    running, library = started
    with running as process:
        library.upgrade()
        library.link.unlink()
        file = outdated(process.pid)
        assert (file.state, file.successor) == (FileState.GONE, str(library.old))


def test_a_library_of_another_mount_namespace(
    started: tuple[Running, Versioned], tmp_path: Path, livegraft: Livegraft
) -> None:
    running, library = started
    here = tmp_path / "here"
    here.mkdir()
    script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    words = ["unshare", "--mount", "sh", "-c", script, "sh", library.link.parent, here, *running.command]
    with Running(words, {"LD_LIBRARY_PATH": str(here)}) as process:
        library.upgrade()  # which our own view of the folder does not show
        assert not list(here.iterdir())
        file = outdated(process.pid)
        assert (file.path, file.successor) == (str(here / library.old.name), str(here / library.new.name))
        livegraft("upgrade", "--pid", process.pid, *TIMEOUT)
        assert process.ask(1) == [1017]
