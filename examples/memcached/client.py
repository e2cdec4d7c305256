"""A client of memcached's binary protocol with SASL: one login, or a load that verifies every answer.

    client.py login PORT USER PASSWORD    prints welcome or rejected
    client.py load PORT                   until SIGTERM; prints how it went, and ends with 1 if anything failed
"""

from __future__ import annotations

import random
import signal
import socket
import struct
import sys
import time

HEADER = struct.Struct("!BBHBBHIIQ")
REQUEST, RESPONSE = 0x80, 0x81
GET, SET, LOGIN = 0x00, 0x01, 0x21
NO_ERROR, REJECTED = 0x00, 0x20
USER, PASSWORD = "load@example", "secret"  # without a realm SASL would add the name of the host
CONNECTIONS = 8
KEYS = 200
ROUNDS_PER_SESSION = 200
SECONDS = 30.0


class Failure(Exception):
    """An answer that is not the right one."""


class Connection:
    """One connection: a request at a time."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        self._file = self._socket.makefile("rb")
        self.slowest = 0.0

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def ask(self, code: int, key: bytes, extras: bytes = b"", value: bytes = b"") -> tuple[int, bytes]:
        """Return the status and the value of the answer."""
        began = time.perf_counter()
        size = len(extras) + len(key) + len(value)
        head = HEADER.pack(REQUEST, code, len(key), len(extras), 0, 0, size, 0, 0)
        self._socket.sendall(head + extras + key + value)
        magic, said, key_size, extras_size, _, status, size, _, _ = HEADER.unpack(self._read(HEADER.size))
        body = self._read(size)
        self.slowest = max(self.slowest, time.perf_counter() - began)
        if (magic, said) != (RESPONSE, code):
            raise Failure(f"an answer to {said:#x} where {code:#x} was asked")
        return status, body[extras_size + key_size :]

    def login(self, user: str, password: str) -> bool:
        status, _ = self.ask(LOGIN, b"PLAIN", value=f"\0{user}\0{password}".encode())
        if status not in (NO_ERROR, REJECTED):
            raise Failure(f"a login was answered with status {status:#x}")
        return status == NO_ERROR

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise Failure("the connection was closed")
        return data


class Session:
    """A connection that is logged in, and the keys that only it writes."""

    def __init__(self, port: int, number: int) -> None:
        self._port = port
        self._number = number
        self._random = random.Random(number)
        self._values: dict[bytes, bytes] = {}
        self._rounds = 0
        self._connection = self._open()

    def _open(self) -> Connection:
        connection = Connection(self._port)
        if not connection.login(USER, PASSWORD):
            raise Failure("the right password was rejected")
        return connection

    def round(self) -> tuple[int, float]:
        """Set a key and get another; log in anew now and then. Return how many requests, and the slowest."""
        key = f"{self._number}.{self._random.randrange(KEYS)}".encode()
        value = self._random.randbytes(self._random.randrange(1, 400))
        status, _ = self._connection.ask(SET, key, bytes(8), value)
        if status != NO_ERROR:
            raise Failure(f"set was answered with status {status:#x}")
        self._values[key] = value
        self._require(self._random.choice(list(self._values)))
        slowest, self._connection.slowest = self._connection.slowest, 0.0
        self._rounds += 1
        if self._rounds % ROUNDS_PER_SESSION == 0:
            self._connection.close()
            self._connection = self._open()
        return 2, slowest

    def require_all(self) -> int:
        """Get every key that was ever set. Return how many."""
        for key in self._values:
            self._require(key)
        return len(self._values)

    def _require(self, key: bytes) -> None:
        status, got = self._connection.ask(GET, key)
        if status != NO_ERROR or got != self._values[key]:
            raise Failure(f"get {key!r}: status {status:#x}, {got!r} instead of {self._values[key]!r}")


def load(port: int) -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    requests, failed, slowest = 0, 0, 0.0
    try:
        sessions = [Session(port, number) for number in range(CONNECTIONS)]
        ready = False
        while not stopped:
            for session in sessions:
                served, longest = session.round()
                requests += served
                slowest = max(slowest, longest)
            if not ready:
                print("all connections were served", flush=True)
                ready = True
        requests += sum(session.require_all() for session in sessions)
    except (Failure, OSError) as error:
        print(f"failed: {error}", flush=True)
        failed += 1
    print(f"{requests} requests, {failed} failed, the longest took {slowest * 1000:.1f} ms", flush=True)
    return 1 if failed else 0


def main(words: list[str]) -> int:
    match words:
        case ["login", port, user, password]:
            connection = Connection(int(port))
            print("welcome" if connection.login(user, password) else "rejected")
            connection.close()
            return 0
        case ["load", port]:
            return load(int(port))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
