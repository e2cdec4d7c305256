"""A client of the private Tor network, which runs inside of its network namespace.

    client.py ask FOLDER ROLE KEY     prints what that tor says of GETINFO KEY at its control socket
    client.py load FOLDER             until SIGTERM; prints how it went, and ends with 1 if anything failed

The load connects through the client's SOCKS socket to a server of its own that sends back what it gets. One stream
stays open from the beginning to the end, with data on its way all the time; others are opened and closed beside it,
every fourth on a circuit of its own. All that comes back is compared with what was sent.
"""

from __future__ import annotations

import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

SECONDS = 120.0


class Failure(Exception):
    """Not the right answer, or none."""


class NoStream(Failure):
    """The client could not open one."""


class Control:
    """The control socket of one tor (control-spec)."""

    def __init__(self, folder: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        self._socket.connect(str(folder / "control"))
        self._stream = self._socket.makefile("r", newline="\r\n")
        self.ask("AUTHENTICATE")

    def ask(self, command: str) -> list[str]:
        """The lines of the answer, without their codes. Raises Failure where it is none of success."""
        self._socket.sendall(command.encode() + b"\r\n")
        lines = []
        while True:
            line = self._stream.readline().rstrip("\r\n")
            if line[:3] != "250":
                raise Failure(f"{command}: {line!r}")
            lines.append(line[4:])
            if line[3:4] == " ":
                return lines

    def info(self, key: str) -> str:
        line = self.ask(f"GETINFO {key}")[0]
        return line.removeprefix(f"{key}=")

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


class Stream:
    """A stream through the network (SOCKS 5, RFC 1928); each name has circuits of its own (IsolateSOCKSAuth)."""

    def __init__(self, folder: Path, name: str, port: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        self._socket.connect(str(folder / "client" / "socks"))
        user = name.encode()
        self._exchange(b"\x05\x01\x02", b"\x05\x02")
        self._exchange(b"\x01" + bytes([len(user)]) + user + b"\x01x", b"\x01\x00")
        address = socket.inet_aton("127.0.0.1") + port.to_bytes(2, "big")
        self._socket.sendall(b"\x05\x01\x00\x01" + address)
        answer = self.receive(4)
        if answer[:2] != b"\x05\x00":
            raise NoStream(f"no stream: {answer.hex()}")
        self.receive({1: 4, 4: 16}[answer[3]] + 2)

    def _exchange(self, sent: bytes, expected: bytes) -> None:
        self._socket.sendall(sent)
        if (answer := self.receive(len(expected))) != expected:
            raise Failure(f"the SOCKS socket answered {answer.hex()} to {sent.hex()}")

    def send(self, content: bytes) -> None:
        self._socket.sendall(content)

    def receive(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            part = self._socket.recv(size - len(got))
            if not part:
                raise Failure("a stream was closed")
            got += part
        return got

    def require_back(self, content: bytes) -> None:
        if self.receive(len(content)) != content:
            raise Failure("not what was sent")

    def close(self) -> None:
        self._socket.close()


def serve(listener: socket.socket) -> None:
    """One thread a connection."""

    def echo(connection: socket.socket) -> None:
        with connection:
            while part := connection.recv(65536):
                connection.sendall(part)

    while True:
        threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()


class Load:
    """What goes on until it is to end, or until the first failure."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        listener = socket.create_server(("127.0.0.1", 0))
        self._port = int(listener.getsockname()[1])
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._begun = threading.Barrier(3)
        self._requests = 0
        self._slowest = 0.0
        self._failures: list[str] = []

    def run(self) -> int:
        signal.signal(signal.SIGTERM, lambda _number, _frame: self._stopped.set())
        self._wait_for_network()
        threads = [threading.Thread(target=self._guarded, args=(body,)) for body in (self._last, self._come_and_go)]
        for thread in threads:
            thread.start()
        try:
            self._begun.wait(SECONDS)
            print("all streams were served", flush=True)
        except threading.BrokenBarrierError:
            self._stopped.set()
        for thread in threads:
            thread.join()
        for failure in self._failures:
            print(f"failed: {failure}")
        longest = f"the longest took {self._slowest * 1000:.1f} ms"
        print(f"{self._requests} requests, {len(self._failures)} failed, {longest}", flush=True)
        return bool(self._failures)

    def _wait_for_network(self) -> None:
        """Until a stream was served. A client that says so has circuits, but an exit may not be ready to connect."""
        deadline = time.monotonic() + 2 * SECONDS
        control = Control(self._folder / "client")
        while control.info("status/circuit-established") != "1" or not self._is_served():
            if time.monotonic() > deadline:
                raise Failure(f"no stream within {2 * SECONDS:g} seconds")
            time.sleep(0.1)
        control.close()

    def _is_served(self) -> bool:
        try:
            self._once("first", b"is anybody there?")
        except NoStream:
            return False
        return True

    def _guarded(self, body: Callable[[], None]) -> None:
        try:
            body()
        except (Failure, OSError) as error:
            self._failures.append(f"{type(error).__name__}: {error}")
            self._stopped.set()
            self._begun.abort()

    def _timed(self, action: Callable[[], None]) -> None:
        began = time.perf_counter()
        action()
        with self._lock:
            self._requests += 1
            self._slowest = max(self._slowest, time.perf_counter() - began)

    def _last(self) -> None:
        """Two pieces are on their way at any moment, whatever happens to the network's programs."""
        choose = random.Random(1)
        stream = Stream(self._folder, "lasting", self._port)
        first = pieces = choose.randbytes(20_000)
        stream.send(first)
        begun = False
        while not self._stopped.is_set():
            following = choose.randbytes(20_000)
            stream.send(following)
            piece, pieces = pieces, following
            self._timed(partial(stream.require_back, piece))
            if not begun:
                self._begun.wait(SECONDS)
                begun = True
        stream.require_back(pieces)
        stream.close()

    def _come_and_go(self) -> None:
        choose = random.Random(2)
        number = 0
        while not self._stopped.is_set():
            content = choose.randbytes(choose.randrange(1, 5_000))
            self._timed(partial(self._once, f"name{number // 4}", content))
            if number == 0:
                self._begun.wait(SECONDS)
            number += 1

    def _once(self, name: str, content: bytes) -> None:
        stream = Stream(self._folder, name, self._port)
        stream.send(content)
        stream.require_back(content)
        stream.close()


def main(words: list[str]) -> int:
    match words:
        case ["ask", folder, role, key]:
            control = Control(Path(folder) / role)
            print(control.info(key))
            control.close()
            return 0
        case ["load", folder]:
            return Load(Path(folder)).run()
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
