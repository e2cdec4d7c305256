"""A client of redis: a load that verifies every answer, and the questions of the rehearsal.

client.py load PORT             until SIGTERM; prints how it went, and ends with 1 if anything failed
client.py restore PORT          gives RESTORE a damaged hash; prints what becomes of it
client.py save PORT             BGSAVE and BGREWRITEAOF, one after the other; prints how they ended
client.py replica PORT SOCKET   whether the replica, which listens at SOCKET, has what was written last
"""

from __future__ import annotations

import random
import signal
import socket
import sys
import time

CONNECTIONS = 8
KEYS = 500
SECONDS = 30.0
JOBS = {"BGSAVE": ("rdb_bgsave_in_progress", "rdb_last_bgsave_status"),
        "BGREWRITEAOF": ("aof_rewrite_in_progress", "aof_last_bgrewrite_status")}  # fmt: skip

Answer = bytes | int | None | list["Answer"]


class Failure(Exception):
    """An answer that is not the right one, or an error."""


class Connection:
    """One connection: a request at a time, in RESP2."""

    def __init__(self, where: int | str) -> None:
        """Connect to a port of the loopback interface, or to a socket in the file system."""
        if isinstance(where, int):
            self._socket = socket.create_connection(("127.0.0.1", where), timeout=SECONDS)
        else:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(SECONDS)
            self._socket.connect(where)
        self._file = self._socket.makefile("rb")
        self.slowest = 0.0

    def ask(self, *words: bytes | str | int) -> Answer:
        began = time.perf_counter()
        parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        text = b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        self._socket.sendall(b"*%d\r\n%s" % (len(parts), text))
        answer = self._read()
        self.slowest = max(self.slowest, time.perf_counter() - began)
        return answer

    def _read(self) -> Answer:
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise Failure("the connection was closed")
        kind, rest = line[:1], line[1:-2]
        if kind == b"-":
            raise Failure(rest.decode())
        if kind == b"+":
            return rest
        number = int(rest)
        if kind == b":":
            return number
        if number < 0:
            return None
        if kind == b"$":
            return self._file.read(number + 2)[:-2]
        return [self._read() for _ in range(number)]


class Session:
    """A connection and the keys that only it writes."""

    def __init__(self, port: int, number: int) -> None:
        self._number = number
        self._random = random.Random(number)
        self._values: dict[str, bytes] = {}
        self._pushed = 0
        self.connection = Connection(port)

    def round(self) -> int:
        """Set a key, get another, add to a list; how many requests that are."""
        ask = self.connection.ask
        key = f"{self._number}.{self._random.randrange(KEYS)}"
        value = self._random.randbytes(self._random.randrange(400))
        require("set", ask("SET", key, value), b"OK")
        self._values[key] = value
        key = self._random.choice(list(self._values))
        require("get", ask("GET", key), self._values[key])
        self._pushed += 1
        require("rpush", ask("RPUSH", f"{self._number}.list", self._pushed), self._pushed)
        return 3


def require(what: str, answer: Answer, right: Answer) -> None:
    if answer != right:
        raise Failure(f"{what}: {answer!r} instead of {right!r}")


def load(port: int) -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    requests, failed = 0, 0
    sessions: list[Session] = []
    try:
        sessions += [Session(port, number) for number in range(CONNECTIONS)]
        ready = False
        while not stopped:
            requests += sum(session.round() for session in sessions)
            if not ready:
                print("all connections were served", flush=True)
                ready = True
    except (Failure, OSError) as error:
        print(f"failed: {error}", flush=True)
        failed = 1
    slowest = max((session.connection.slowest for session in sessions), default=0.0)
    print(f"{requests} requests, {failed} failed, the longest took {slowest * 1000:.1f} ms", flush=True)
    return failed


def restore(port: int) -> str:
    """A hash of a kind that no server writes any more: a field k with a value of four bytes, val1, whose length is
    given in five bytes, which is for lengths from 254.
    """
    content = b"\x01" + b"\x01k" + b"\xfe" + (4).to_bytes(4, "little") + b"\x00val1" + b"\xff"
    payload = b"\x09" + bytes([len(content)]) + content + (9).to_bytes(2, "little") + bytes(8)
    ask = Connection(port).ask
    ask("DEBUG", "SET-SKIP-CHECKSUM-VALIDATION", 1)
    ask("DEL", "restored")
    try:
        ask("RESTORE", "restored", 0, payload)
    except Failure as refusal:
        return str(refusal)
    return f"restored as {ask('HGETALL', 'restored')!r}"


def save(port: int) -> str:
    said = []
    connection = Connection(port)
    for job, (going_on, status) in JOBS.items():
        connection.ask(job)
        while (now := persistence(connection))[going_on] != "0":
            time.sleep(0.02)
        said.append(f"{job} {now[status]}")
    return ", ".join(said)


def persistence(connection: Connection) -> dict[str, str]:
    text = connection.ask("INFO", "persistence")
    assert isinstance(text, bytes)
    return dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)


def replica(port: int, path: str) -> str:
    master = Connection(port)
    value = random.randbytes(20)
    master.ask("SET", "written-last", value)
    if master.ask("WAIT", 1, int(SECONDS * 1000)) != 1:
        return "it does not follow"
    return "it follows" if Connection(path).ask("GET", "written-last") == value else "it has another value"


def main(words: list[str]) -> int:
    match words:
        case ["load", port]:
            return load(int(port))
        case ["restore", port]:
            print(restore(int(port)))
        case ["save", port]:
            print(save(int(port)))
        case ["replica", port, path]:
            print(replica(int(port), path))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
