"""vsftpd, patched with all its sessions: those that are open obey the new code at once, and the old one again later.

A session is two processes that descend from the listener, one of them in a chroot and, where that is asked for, under a
system-call filter.
"""

from __future__ import annotations

import contextlib
import ftplib
import io
import random
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elfdiff.diff import summary
from elfdiff.patches.patchfile import read_patch
from fixtures import recipes
from fixtures.clients import Clients
from fixtures.intact import altered_code
from fixtures.source import Built, Recipe
from fixtures.vsftpd import DENIED, FtpServer, run_vsftpd
from patcher.targets.selection import By, Selection, select_processes
from tests.conftest import Livegraft
from tests.real.rows import HEAD, Row

pytestmark = [pytest.mark.apt, pytest.mark.root]

CYCLES = 2
OPEN_SESSIONS = 2
BIG = random.Random(1).randbytes(24 << 20)  # more than the kernel keeps of a connection
SOME = 1 << 16
PATIENCE = 60.0
SANDBOXED = {"seccomp_sandbox": "YES", "deny_file": ""}
SourcePair = Callable[[Recipe], tuple[Built, Built]]
Ask = Callable[[ftplib.FTP], bool]


class Transfer:
    """A file that is on its way, in a session of its own; ``finish`` brings the rest over and compares."""

    def __init__(self, server: FtpServer, command: str, name: str) -> None:
        self._file = server.uploads / name
        self._session = server.session()
        self._line = self._session.transfercmd(f"{command} {name}")
        self._line.settimeout(PATIENCE)
        self._sends = command == "STOR"
        self._part = b""
        if self._sends:
            self._line.sendall(BIG[:SOME])
        else:
            self._line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOME)
            self._part = self._line.recv(SOME)

    def goes_on(self) -> bool:
        """Whether the server has not said yet that it is done."""
        assert self._session.sock is not None
        return not select.select([self._session.sock], [], [], 0)[0]

    def finish(self) -> None:
        if self._sends:
            self._line.sendall(BIG[SOME:])
        else:
            rest = iter(lambda: self._line.recv(1 << 20), b"")
            assert self._part + b"".join(rest) == BIG
        self._line.close()
        assert self._session.voidresp().startswith("226")
        assert self._file.read_bytes() == BIG
        self._session.quit()
        self._session.close()


def visits(server: FtpServer) -> Callable[[Clients], None]:
    """Whole sessions, one after the other: something is stored, fetched again and compared."""
    choose = random.Random(2)

    def visit(clients: Clients) -> None:
        name, content = f"visit.{threading.get_ident()}", choose.randbytes(choose.randrange(1, 50_000))
        (server.uploads / name).unlink(missing_ok=True)  # nobody may write over a file
        with clients.timed(server.session) as session:
            clients.timed(lambda: session.storbinary(f"STOR {name}", io.BytesIO(content)))
            require_content(clients, session, name, content)

    return visit


def stays(server: FtpServer) -> Callable[[Clients], None]:
    """One session for all the time, which fetches the same again and again."""
    content = random.Random(3).randbytes(30_000)
    (server.uploads / "kept").write_bytes(content)
    session = server.session()

    def stay(clients: Clients) -> None:
        require_content(clients, session, "kept", content)

    return stay


def require_content(clients: Clients, session: ftplib.FTP, name: str, content: bytes) -> None:
    parts: list[bytes] = []
    clients.timed(lambda: session.retrbinary(f"RETR {name}", parts.append))
    assert b"".join(parts) == content, f"{name} is not what was stored"


@contextlib.contextmanager
def open_sessions(server: FtpServer) -> Iterator[list[ftplib.FTP]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(server.session()) for _ in range(OPEN_SESSIONS)]


def secluded(server: FtpServer, *, filtered: bool) -> int:
    """How many processes of the tree are in a chroot and under a system-call filter (or under none)."""
    mode = "Seccomp:\t2" if filtered else "Seccomp:\t0"

    def looked_at(pid: int) -> bool:
        try:
            chroot = Path(f"/proc/{pid}/root").readlink() != Path("/")
            return chroot and mode in Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False  # a session of the load, which has ended

    return sum(looked_at(item.pid) for item in tree(server))


def tree(server: FtpServer) -> list[Any]:
    return list(select_processes(Selection(By.TREE, str(server.pid), several=True)))


def cycles(
    title: str, pair: tuple[Built, Built], server: FtpServer, is_new: Ask, filtered: bool, livegraft: Livegraft,
    folder: Path,
) -> Row:  # fmt: skip
    """Apply and revert it in the whole tree, under load, ``CYCLES`` times; each time with transfers going on."""
    patch = folder / "vsftpd.patch"
    livegraft("diff", *(build.stripped("vsftpd") for build in pair), "-o", patch)
    (server.uploads / "big").write_bytes(BIG)
    pauses: list[float] = []
    counts: list[int] = []
    longest: list[int] = []
    with open_sessions(server) as sessions, Clients(visits(server), stays(server)) as load:
        load.more(20)
        calm = load.mark().longest_us
        for number in range(CYCLES):
            for verb, new in ((["apply", patch], True), (["revert"], False)):
                (server.uploads / f"up.{number}").unlink(missing_ok=True)
                transfers = [Transfer(server, "RETR", "big"), Transfer(server, "STOR", f"up.{number}")]
                assert [is_new(session) for session in sessions] == [not new] * OPEN_SESSIONS
                assert secluded(server, filtered=filtered) >= OPEN_SESSIONS + len(transfers)
                load.mark()
                done = livegraft(*verb, "--tree", server.pid, "--atomic", "--json").json
                load.more(10)
                longest.append(load.mark().longest_us)
                assert all(one.goes_on() for one in transfers)
                assert [is_new(session) for session in sessions] == [new] * OPEN_SESSIONS
                for one in transfers:
                    one.finish()
                processes = [item for item in done["processes"] if item["result"] == "done"]
                counts.append(len(processes))
                pauses += [item["pause_us"] for item in processes if item["pause_us"] is not None]
        tally = load.stop()
        for session in sessions:
            assert not is_new(session)
    assert altered_code(server.pid) == []
    assert (tally.failed, tally.failures) == (0, ())
    assert min(counts) > 2 * OPEN_SESSIONS
    versions = f"3.0.5-0.2: {title}"
    return Row("vsftpd", versions, [summary(read_patch(patch))], counts, pauses, tally.served, 0, calm, max(longest))


def denied(server: FtpServer) -> Ask:
    def ask(session: ftplib.FTP) -> bool:
        """Whether what deny_file names is refused; both answers leave the session as it was."""
        answer = server.store(DENIED, session=session)
        assert answer[:3] in ("226", "550"), answer
        assert (server.uploads / DENIED).exists() == answer.startswith("226")
        return answer.startswith("550")

    return ask


def test_open_sessions_obey_deny_file_while_the_fix_is_in_force(
    source_pair: SourcePair, livegraft: Livegraft, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without 0070-realpath_wrapper.patch a name that does not exist yet is not denied (CVE-2015-1419)."""
    pair = source_pair(recipes.VSFTPD)
    with run_vsftpd(pair[0].stripped("vsftpd"), anon_umask="022") as server:
        title = "without 0070-realpath_wrapper.patch -> with it"
        row = cycles(title, pair, server, denied(server), False, livegraft, tmp_path)
        assert server.process.poll() is None
    with capsys.disabled():
        print(f"\n{HEAD}\n{row}")


def test_sessions_under_a_system_call_filter_change_what_they_announce(
    source_pair: SourcePair, livegraft: Livegraft, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FEAT names UTF8 in the old build always, in the new one where it is configured (RFC 2389)."""
    pair = source_pair(recipes.VSFTPD_FEATURES)
    with run_vsftpd(pair[0].stripped("vsftpd"), anon_umask="022", **SANDBOXED) as server:
        title = "FEAT with UTF8 -> without, seccomp_sandbox=YES"
        row = cycles(title, pair, server, lambda one: "UTF8" not in one.sendcmd("FEAT"), True, livegraft, tmp_path)
        assert server.process.poll() is None
    with capsys.disabled():
        print(f"\n{HEAD}\n{row}")


def breaks_off(store: Callable[[], str]) -> bool:
    """Whether the session dies of it. Its other half may come to say so, or not."""
    try:
        return store().startswith("500 OOPS")
    except (EOFError, ftplib.Error, ConnectionError):
        return True


def test_a_fix_for_whose_calls_a_filter_may_kill_is_refused_and_kills_where_that_is_lifted(
    source_pair: SourcePair, livegraft: Livegraft, tmp_path: Path
) -> None:
    """It asks where a path leads, and the sandbox of a session kills for that: a session of the new build dies, too."""
    old, new = (build.stripped("vsftpd") for build in source_pair(recipes.VSFTPD))
    for file, options in (("fix", ()), ("lifted", ("--allow", "new-import"))):
        livegraft("diff", old, new, "-o", tmp_path / file, *options)
    with run_vsftpd(old, anon_umask="022", seccomp_sandbox="YES") as server, server.session() as session:
        assert server.store(DENIED, session=session).startswith("226")
        done = livegraft("apply", tmp_path / "fix", "--tree", server.pid, "--atomic", "--json", status=4).json
        ends = {item["pid"]: item["result"] for item in done["processes"]}
        (refused,) = (item for item in done["processes"] if item["result"] == "failed")
        assert "system-call filter" in refused["error"]["what"] and "SECCOMP_RET_" in refused["error"]["why"]
        assert ends[server.pid] == "rolled-back"
        assert altered_code(server.pid) == []
        assert server.store(DENIED, session=session).startswith("226")

        livegraft("apply", tmp_path / "lifted", "--tree", server.pid, "--atomic")
        assert breaks_off(lambda: server.store(DENIED, session=session))
        livegraft("revert", "--tree", server.pid)
        session.close()
        assert server.store(DENIED).startswith("226")
