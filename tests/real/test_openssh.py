"""OpenSSH's server: the listener and the sessions that are open are patched; new connections run the file on disk.

CVE-2026-35414: a certificate for one user called "nobody,visitor" is taken for one of visitor's.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import pytest

from elfdiff.diff import summary
from elfdiff.patches.patchfile import read_patch
from fixtures import recipes
from fixtures.clients import Clients
from fixtures.debian import Unpacked, library_path
from fixtures.hearing import next_line
from fixtures.intact import altered_code
from fixtures.openssh import SshServer, run_sshd
from fixtures.source import Built, Recipe
from fixtures.tracees import wait_until
from patcher.targets.selection import By, Selection, select_processes
from tests.conftest import Livegraft
from tests.real.archive import PAIRS, Pair
from tests.real.examples import copied, passed
from tests.real.rows import HEAD, Row

pytestmark = [pytest.mark.apt, pytest.mark.root, pytest.mark.long]

CYCLES = 3
CLIENTS_VERSION = "1:9.2p1-2+deb12u9"
CONTENT = random.Random(5).randbytes(8 << 20)
PUBLISHED = [pair for pair in PAIRS if pair.package == "openssh-server"]
Fetch = Callable[[str, str], Unpacked]
SourcePair = Callable[[Recipe], tuple[Built, Built]]


@pytest.fixture(scope="module")
def clients(package_version: Fetch) -> Unpacked:
    return package_version("openssh-client", CLIENTS_VERSION)


class _Ended:
    """A client that is ended with the test, however that ends; a context manager."""

    process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


class Shell(_Ended):
    """An interactive session: a shell at a terminal, which answers through it."""

    def __init__(self, server: SshServer) -> None:
        self.process = subprocess.Popen(
            [server.ssh()[0], "-tt", *server.ssh()[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=server.environment,
        )  # fmt: skip
        self._asked = 0

    def ask(self) -> None:
        """A sum; what is typed is echoed, and is not the answer."""
        self._asked += 1
        assert self.process.stdin is not None
        self.process.stdin.write(f"echo =$(({self._asked} * 1000 + 1))=\n".encode())
        self.process.stdin.flush()
        while f"={self._asked * 1000 + 1}=" not in next_line(self.process):
            pass

    def leave(self) -> None:
        out, _ = self.process.communicate(b"exit 7\n", timeout=60)
        assert self.process.returncode == 7, out


class Copy(_Ended):
    """A file that scp fetches at a limited rate; held in between, so that it is under way for as long as is wanted."""

    def __init__(self, server: SshServer, name: str) -> None:
        (server.home / "big").write_bytes(CONTENT)
        self._copy = server.folder / name
        command = [str(server.clients / "scp"), "-S", server.ssh()[0], "-l", "40000", *server.options()]
        self.process = subprocess.Popen(
            [*command, f"visitor@127.0.0.1:{server.home}/big", self._copy], env=server.environment
        )
        wait_until(lambda: self._size() > 0, "scp has begun")
        self.hold()

    def _size(self) -> int:
        return self._copy.stat().st_size if self._copy.exists() else 0

    def hold(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        assert self.process.poll() is None and self._size() < len(CONTENT), "it ended too early"

    def more(self) -> None:
        """Let it go on for a moment."""
        size = self._size()
        self.process.send_signal(signal.SIGCONT)
        wait_until(lambda: self._size() > size, "scp goes on")
        self.hold()

    def finish(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        assert self.process.wait(120) == 0
        assert self._copy.read_bytes() == CONTENT
        self._copy.unlink()


def logins(server: SshServer) -> Callable[[Clients], None]:
    def visit(load: Clients) -> None:
        assert load.timed(server.log_in), "a login was refused"

    return visit


def tree(server: SshServer) -> list[int]:
    return [item.pid for item in select_processes(Selection(By.TREE, str(server.pid), several=True))]


@pytest.mark.parametrize("pair", PUBLISHED, ids=[pair.name for pair in PUBLISHED])
def test_the_published_update_waits_for_main_for_ever(
    pair: Pair,
    package_version: Fetch,
    clients: Unpacked,
    cache_folder: Path,
    livegraft: Livegraft,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """main() names the version of the package and never returns, in the listener and in every session. The debug
    information, without which it cannot be kept live, is not in the archive that has the packages.
    """
    old, new = (package_version(pair.package, version) for version in (pair.old, pair.new))
    patch, program = tmp_path / "patch", old.file(pair.path)
    livegraft("diff", program, new.file(pair.path), "-o", patch)
    monkeypatch.setenv("LD_LIBRARY_PATH", library_path(program, old, cache_folder / "packages"))
    with run_sshd(program, clients, cache_folder / "packages") as server:
        with Shell(server) as shell:
            shell.ask()
            for pid in tree(server)[:2]:
                error = livegraft("apply", patch, "--pid", pid, "--timeout", 1, "--json", status=5).json["error"]
                assert any("0xed30" in line for line in (error["what"], error["why"], *error["details"])), error
                assert altered_code(pid) == []
            shell.ask()
            shell.leave()
        assert server.log_in()


@pytest.fixture
def patch(source_pair: SourcePair, livegraft: Livegraft, tmp_path: Path) -> Path:
    pair = source_pair(recipes.OPENSSH)
    patch = tmp_path / "sshd.patch"
    livegraft("diff", *(build.stripped("sshd") for build in pair), "-o", patch)
    return patch


def test_sessions_and_logins_while_a_fix_comes_and_goes(
    source_pair: SourcePair,
    patch: Path,
    clients: Unpacked,
    cache_folder: Path,
    livegraft: Livegraft,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A listener that does not execute itself anew (sshd -r): what it forks runs what the listener runs."""
    old, _ = source_pair(recipes.OPENSSH)
    pauses: list[float] = []
    counts: list[int] = []
    longest: list[int] = []
    with ExitStack() as stack:
        server = stack.enter_context(run_sshd(old.stripped("sshd"), clients, cache_folder / "packages", "-r"))
        shell, copy = stack.enter_context(Shell(server)), stack.enter_context(Copy(server, "copy"))
        shell.ask()
        with Clients(logins(server)) as load:
            load.more(5)
            calm = load.mark().longest_us
            for _ in range(CYCLES):
                for verb, fixed in ((["apply", patch], True), (["revert"], False)):
                    assert server.log_in("comma") is fixed, "as it was before"
                    # The new code refuses that name as soon as it is offered.
                    with server.waiting("comma" if fixed else "right") as waiting:
                        load.mark()
                        done = livegraft(*verb, "--tree", server.pid, "--atomic", "--json").json
                        load.more(2)
                        longest.append(load.mark().longest_us)
                        assert waiting.go_on() is not fixed
                    assert server.log_in("comma") is not fixed
                    assert server.log_in("right")
                    shell.ask()
                    copy.more()
                    each = [item for item in done["processes"] if item["result"] == "done"]
                    counts.append(len(each))
                    pauses += [item["pause_us"] for item in each if item["pause_us"] is not None]
            tally = load.stop()
        copy.finish()
        shell.ask()
        shell.leave()
        assert altered_code(server.pid) == []
    assert (tally.failed, tally.failures) == (0, ())
    row = Row(
        "sshd", "9.2p1-2+deb12u10: without CVE-2026-35414.patch -> with it", [summary(read_patch(patch))], counts,
        pauses, tally.served, 0, calm, max(longest),
    )  # fmt: skip
    with capsys.disabled():
        print(f"\n{HEAD}\n{row}")


def test_the_rehearsal(
    source_pair: SourcePair,
    clients: Unpacked,
    cache_folder: Path,
    livegraft: Livegraft,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    programs = clients.file("usr/bin/ssh").parent
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("LD_LIBRARY_PATH", library_path(programs / "ssh", clients, cache_folder / "packages"))
    with copied("openssh") as example:
        for label, build in zip(("old", "new"), source_pair(recipes.OPENSSH), strict=True):
            (example / label).mkdir()
            shutil.copy(build.stripped("sshd"), example / label / "sshd")
        said = passed(example / "rehearsal.toml", livegraft)
    assert said["pause_us"]["apply"]["processes"]["fewest"] >= 3, "the listener and both processes of the open session"


def test_a_new_connection_runs_what_lies_on_disk(
    source_pair: SourcePair, patch: Path, clients: Unpacked, cache_folder: Path, livegraft: Livegraft, tmp_path: Path
) -> None:
    """sshd as it is started: for each connection the listener executes its own file anew, and no patch outlives that.

    So the fix is complete when the new file lies there, too, as after an upgrade.
    """
    old, new = source_pair(recipes.OPENSSH)
    program = tmp_path / "sshd"
    shutil.copy(old.stripped("sshd"), program)
    with ExitStack() as stack:
        server = stack.enter_context(run_sshd(program, clients, cache_folder / "packages"))
        shell, copy = stack.enter_context(Shell(server)), stack.enter_context(Copy(server, "copy"))
        shell.ask()
        with server.waiting("comma") as waiting:
            carrying = set(tree(server))
            done = livegraft("apply", patch, "--tree", server.pid, "--atomic", "--json").json["processes"]
            assert {item["pid"] for item in done if item["result"] == "done"} <= carrying and len(done) > 5
            assert not waiting.go_on(), "a connection that was open runs the new code"
        assert server.log_in("comma"), "a new one runs the old file"
        with server.waiting("right") as waiting:
            (started, *_) = [pid for pid in tree(server) if pid not in carrying]
            assert livegraft("status", "--pid", started, "--json").json["patches"] == []
            assert waiting.go_on()
        shutil.copy(new.stripped("sshd"), tmp_path / "arriving")
        (tmp_path / "arriving").rename(program)
        assert not server.log_in("comma"), "it runs the new file"
        with Clients(logins(server)) as load:
            for verb in (["revert"], ["apply", patch]):
                livegraft(*verb, "--tree", server.pid, "--atomic")
                load.more(3)
                copy.more()
                shell.ask()
            tally = load.stop()
        assert (tally.failed, tally.failures) == (0, ())
        assert not server.log_in("comma") and server.log_in("right")
        copy.finish()
        shell.leave()
