"""Apache of Debian 12 and its security update: its modules, in the parent and all workers, under http and https.

The program itself is refused (tests/real/archive.py says why), and so is mod_ssl; each module is an image of its own.
All that can be patched are in force from one stop of each process on, as a set.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from elfdiff.diff import summary
from elfdiff.patches.patchfile import read_patch
from fixtures.apache import LOADED, MODULES, PROGRAM, HttpServer, get, run_apache
from fixtures.clients import Clients
from fixtures.debian import Unpacked
from fixtures.intact import altered_code
from patcher.records.record import State
from patcher.targets.selection import By, Selection, select_processes
from patcher.transactions.inspection import inspect_process
from tests.conftest import Livegraft
from tests.real.rows import HEAD, Row

pytestmark = [pytest.mark.apt, pytest.mark.root, pytest.mark.long]

CYCLES = 3
OLD_VERSION, NEW_VERSION = "2.4.68-1~deb12u1", "2.4.71-1~deb12u1"
VERDICTS = {
    "userdir": 0, "dir": 0, "rewrite": 0, "deflate": 0, "proxy": 0, "proxy_http": 0, "cgi": 0,
    "authz_core": 3, "mime": 3, "alias": 3, "filter": 3, "socache_shmcb": 3, "mpm_event": 3, "mpm_prefork": 3,
    "ssl": 4,
}  # fmt: skip
"""The exit status of diff for each module that is loaded."""
STRAY = "/~./stray.txt"
"""No user is called "."; the old mod_userdir looks at the wrong letters of the name, and takes it for one."""
Fetch = Callable[[str, str], Unpacked]


@pytest.fixture(scope="module")
def packages(package_version: Fetch) -> tuple[Unpacked, Unpacked]:
    return package_version("apache2-bin", OLD_VERSION), package_version("apache2-bin", NEW_VERSION)


@pytest.fixture(scope="module")
def patches(
    packages: tuple[Unpacked, Unpacked], livegraft: Livegraft, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Of the modules that can be patched. All verdicts are as expected."""
    folder = tmp_path_factory.mktemp("apache")
    assert {*LOADED, "mpm_event", "mpm_prefork"} == VERDICTS.keys()
    found = {}
    for name, status in VERDICTS.items():
        pair = [package.file(f"{MODULES}/mod_{name}.so") for package in packages]
        livegraft("diff", *pair, "-o", folder / name, status=status)
        if status == 0:
            found[name] = folder / name
    return found


def test_the_program_itself_is_refused(
    packages: tuple[Unpacked, Unpacked], livegraft: Livegraft, tmp_path: Path
) -> None:
    """The table of status lines grew, and every process has one of the old size."""
    pair = [package.file(PROGRAM) for package in packages]
    error = livegraft("diff", *pair, "-o", tmp_path / "patch", "--json", status=4).json["error"]
    assert "allocation-size" in {finding["code"] for finding in error["findings"]}


def visits(server: HttpServer, *, tls: bool) -> Callable[[Clients], None]:
    """One connection for all the time; every body is compared."""
    content = random.Random(tls).randbytes(20_000)
    name = f"file{int(tls)}"
    (server.folder / "site" / name).write_bytes(content)
    connection = server.connection(tls=tls)

    def visit(clients: Clients) -> None:
        for path in (f"/{name}", f"/old/{name}") if not tls else (f"/{name}",):
            assert clients.timed(partial(get, connection, path)) == (200, content), path
        assert clients.timed(partial(get, connection, "/~user/page")) == (200, b"a page")
        assert clients.timed(partial(get, connection, "/gone"))[0] == 404

    return visit


def comes_and_goes(server: HttpServer) -> Callable[[Clients], None]:
    """A new connection for each request."""

    def visit(clients: Clients) -> None:
        for tls in (False, True):
            with contextlib.closing(clients.timed(partial(server.connection, tls=tls))) as connection:
                assert clients.timed(partial(get, connection, "/~user/page")) == (200, b"a page")

    return visit


def tree(server: HttpServer) -> list[int]:
    return [item.pid for item in select_processes(Selection(By.TREE, str(server.pid), several=True))]


@pytest.mark.parametrize("mpm", ["event", "prefork"])
def test_the_modules_are_patched_in_all_processes_under_load(
    mpm: str,
    packages: tuple[Unpacked, Unpacked],
    patches: dict[str, Path],
    cache_folder: Path,
    livegraft: Livegraft,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pauses: list[float] = []
    counts: list[int] = []
    longest: list[int] = []
    ids = {name: read_patch(patch).id for name, patch in patches.items()}
    with run_apache(packages[0], mpm, cache_folder / "packages") as server, contextlib.ExitStack() as stack:
        for name, text in (("stray.txt", "nobody's"), ("user/page", "a page")):
            (server.folder / "home" / name).parent.mkdir(exist_ok=True)
            (server.folder / "home" / name).write_text(text)
        kept = [stack.enter_context(contextlib.closing(server.connection(tls=tls))) for tls in (False, True, False)]
        load = stack.enter_context(Clients(visits(server, tls=False), visits(server, tls=True), comes_and_goes(server)))
        load.more(200)
        calm = load.mark().longest_us

        def done(said: dict[str, Any]) -> None:
            each = [item for item in said["processes"] if item["result"] == "done"]
            counts.append(len(each))
            pauses.extend(item["pause_us"] for item in each if item["pause_us"] is not None)
            load.more(20)
            longest.append(load.mark().longest_us)

        old_answer, new_answer = (200, b"nobody's"), 404
        everywhere = ("--tree", server.pid, "--atomic", "--json")
        for _ in range(CYCLES):
            assert [get(one, STRAY) for one in kept] == [old_answer] * len(kept)
            done(livegraft("apply", *patches.values(), *everywhere).json)
            assert [get(one, STRAY)[0] for one in kept] == [new_answer] * len(kept)
            for pid in tree(server):
                carried = [one.record for one in inspect_process(pid).patches]
                assert {one.contents.patch for one in carried if one.state is State.APPLIED} == set(ids.values())
            done(livegraft("revert", ids["userdir"], *everywhere).json)
            assert [get(one, STRAY) for one in kept] == [old_answer] * len(kept)
        tally = load.stop()
        assert [altered_code(pid) for pid in tree(server)] == [[]] * len(tree(server))
        assert server.process.poll() is None
    assert (tally.failed, tally.failures) == (0, ())
    assert min(counts) > 2
    row = Row(
        f"apache2, mpm_{mpm}", f"{OLD_VERSION} -> {NEW_VERSION}: {len(patches)} modules as a set",
        [summary(read_patch(patch)) for patch in patches.values()], counts, pauses, tally.served, 0, calm, max(longest),
    )  # fmt: skip
    with capsys.disabled():
        print(f"\n{HEAD}\n{row}")
