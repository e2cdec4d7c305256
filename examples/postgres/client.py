"""A client of PostgreSQL, by its protocol (version 3) over a Unix socket: a few statements, or a checked load.

    client.py ask FOLDER USER STATEMENT...   prints what each statement answers: its rows, or its tag, or the error
    client.py load FOLDER                    until SIGTERM; prints how it went, and ends with 1 if anything failed

The load moves money between accounts in six sessions; one transaction stays open from the beginning to the end, reads
from its snapshot and from a cursor, and commits at last; and one session after the other is opened and closed. Every
answer is compared with what it must be.
"""

from __future__ import annotations

import random
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 60.0
ACCOUNTS = 100
MOVERS = 6
EACH = 1000  # in an account at the beginning
SEQUENCE = 10_000_000


class Failure(Exception):
    """Not the right answer."""


class Session:
    """A session; counts its requests and times them, the opening of the session included."""

    def __init__(self, folder: Path, user: str) -> None:
        self.requests = 0
        self.slowest = 0.0
        began = time.perf_counter()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        self._socket.connect(str(folder / ".s.PGSQL.5432"))
        self._stream = self._socket.makefile("rb")
        start = b"".join(word.encode() + b"\0" for word in ("user", user, "database", "postgres")) + b"\0"
        self._socket.sendall(struct.pack("!ii", len(start) + 8, 3 << 16) + start)
        self._answer()
        self._note(began)

    def ask(self, statement: str) -> str:
        """Rows as lines with tabs between values; without rows the command tag; of an error its text."""
        began = time.perf_counter()
        text = statement.encode() + b"\0"
        self._socket.sendall(b"Q" + struct.pack("!i", len(text) + 4) + text)
        answer = self._answer()
        self._note(began)
        return answer

    def require(self, statement: str, expected: str) -> None:
        answer = self.ask(statement)
        if answer != expected:
            raise Failure(f"{statement}: {answer!r} instead of {expected!r}")

    def close(self) -> None:
        self._socket.sendall(b"X" + struct.pack("!i", 4))
        if self._stream.read(1) != b"":
            raise Failure("something was said after the end")
        self._stream.close()
        self._socket.close()

    def _note(self, began: float) -> None:
        self.requests += 1
        self.slowest = max(self.slowest, time.perf_counter() - began)

    def _answer(self) -> str:
        """All until the server is ready for the next query (ReadyForQuery)."""
        rows: list[str] = []
        tag = ""
        while True:
            kind, content = self._message()
            if kind == b"D":
                rows.append(_values(content))
            elif kind == b"C":
                tag = content[:-1].decode()
            elif kind == b"E":
                fields = {part[:1]: part[1:].decode() for part in content.split(b"\0") if part}
                tag = f"{fields[b'S']}: {fields[b'M']}"
                if fields[b"S"] == "FATAL":
                    raise Failure(tag)
            elif kind == b"Z":
                return "\n".join(rows) or tag

    def _message(self) -> tuple[bytes, bytes]:
        head = self._stream.read(5)
        if len(head) < 5:
            raise Failure("the server closed the connection")
        (length,) = struct.unpack("!i", head[1:])
        return head[:1], self._stream.read(length - 4)


def _values(content: bytes) -> str:
    """A row (DataRow) with tabs between its values."""
    (count,) = struct.unpack_from("!h", content)
    values, at = [], 2
    for _ in range(count):
        (length,) = struct.unpack_from("!i", content, at)
        values.append("" if length < 0 else content[at + 4 : at + 4 + length].decode())
        at += 4 + max(0, length)
    return "\t".join(values)


class Load:
    """What goes on until it is to end, or until the first failure."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._sessions: list[Session] = []
        self.failures: list[str] = []
        self._first_rounds = threading.Barrier(MOVERS + 3)

    def run(self) -> int:
        signal.signal(signal.SIGTERM, lambda _number, _frame: self._stopped.set())
        self._prepare()
        bodies = [self._move] * MOVERS + [self._stay, self._come_and_go]
        threads = [threading.Thread(target=self._guarded, args=(number, body)) for number, body in enumerate(bodies)]
        for thread in threads:
            thread.start()
        try:
            self._first_rounds.wait(SECONDS)
            print("all sessions were served", flush=True)
        except threading.BrokenBarrierError:
            self._stopped.set()
        for thread in threads:
            thread.join()
        requests = sum(session.requests for session in self._sessions)
        slowest = max(session.slowest for session in self._sessions)
        for failure in self.failures:
            print(f"failed: {failure}")
        print(f"{requests} requests, {len(self.failures)} failed, the longest took {slowest * 1000:.1f} ms", flush=True)
        return bool(self.failures)

    def _prepare(self) -> None:
        session = self._session()
        session.require("create table account (id int primary key, balance int not null)", "CREATE TABLE")
        filled = f"insert into account select n, {EACH} from generate_series(1, {ACCOUNTS}) n"
        session.require(filled, f"INSERT 0 {ACCOUNTS}")
        session.close()

    def _session(self) -> Session:
        session = Session(self._folder, "postgres")
        with self._lock:
            self._sessions.append(session)
        return session

    def _guarded(self, number: int, body: Callable[[random.Random], None]) -> None:
        try:
            body(random.Random(number))
        except (Failure, OSError, struct.error) as error:
            self.failures.append(str(error))
            self._stopped.set()
            self._first_rounds.abort()

    def _go_on(self, first: bool) -> bool:
        if first:
            self._first_rounds.wait(SECONDS)
        return not self._stopped.is_set()

    def _move(self, choose: random.Random) -> None:
        """Money moves between two accounts; there is always the same amount of it."""
        session = self._session()
        first, going = True, True
        while going:
            low, high = sorted(choose.sample(range(1, ACCOUNTS + 1), 2))
            amount = choose.randrange(-50, 51)
            session.require("begin", "BEGIN")
            session.require(f"update account set balance = balance - {amount} where id = {low}", "UPDATE 1")
            session.require(f"update account set balance = balance + {amount} where id = {high}", "UPDATE 1")
            session.require("commit", "COMMIT")
            session.require("select sum(balance), count(*) from account", f"{ACCOUNTS * EACH}\t{ACCOUNTS}")
            going, first = self._go_on(first), False
        session.close()

    def _stay(self, _choose: random.Random) -> None:
        """One transaction, which sees the same all the time, and what it has done itself."""
        session = self._session()
        session.require("begin isolation level repeatable read", "BEGIN")
        session.require("create temporary table mine (n int) on commit drop", "CREATE TABLE")
        session.require(f"declare row cursor for select n from generate_series(1, {SEQUENCE}) n", "DECLARE CURSOR")
        seen = session.ask("select id, balance from account order by id")
        first, going, number = True, True, 0
        while going:
            number += 1
            session.require("select id, balance from account order by id", seen)
            session.require(f"insert into mine values ({number})", "INSERT 0 1")
            session.require("select count(*), max(n) from mine", f"{number}\t{number}")
            session.require("fetch 1 from row", str(number))
            going, first = self._go_on(first), False
            self._stopped.wait(0.01)
        session.require("commit", "COMMIT")
        session.close()

    def _come_and_go(self, choose: random.Random) -> None:
        """Each session is a process of its own, which the server forks."""
        first, going = True, True
        while going:
            session = self._session()
            number = choose.randrange(1000)
            session.require(f"select {number} + 1, length(repeat('x', {number}))", f"{number + 1}\t{number}")
            session.close()
            going, first = self._go_on(first), False


def ask(folder: Path, user: str, statements: list[str]) -> int:
    session = Session(folder, user)
    for statement in statements:
        print(session.ask(statement))
    session.close()
    return 0


def main(words: list[str]) -> int:
    match words:
        case ["ask", folder, user, *statements] if statements:
            return ask(Path(folder), user, statements)
        case ["load", folder]:
            return Load(Path(folder)).run()
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
