"""What two routers carry, watched from the first one; their namespaces are made by start.sh.

    client.py serve ADDRESS PORT           a server that sends back what it gets
    client.py ask VTYSH FOLDER COMMAND     prints what the first router answers, to a vtysh of its own
    client.py load VTYSH FOLDER            until SIGTERM; prints how it went, and ends with 1 if anything failed

The load keeps a connection open over the routes that the routers have learned, and opens others; keeps a session of
vtysh open; lets the second router announce and withdraw routes, and sees them come into the kernel of the first and go
again; and has the kernel report every route that is lost meanwhile.
"""

from __future__ import annotations

import json
import os
import random
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 60.0
LASTING = {f"10.4.{number}.0/24" for number in range(1, 21)} | {"10.2.0.1"}
SERVER = ("10.2.0.1", 7000)


class Failure(Exception):
    """Not the right answer, or none."""


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise Failure(f"not within {SECONDS:g} seconds: {what}")
        time.sleep(0.01)


def run(*command: str) -> str:
    """What it prints. In a group of its own: a signal that ends the load lets it finish."""
    return subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, timeout=SECONDS, process_group=0
    ).stdout


def kernel_routes() -> set[str]:
    """What OSPF has put into the kernel's table."""
    text = run("ip", "-json", "route", "show", "proto", "ospf")
    return {str(route["dst"]) for route in json.loads(text or "[]")}


class Vtysh:
    """A session of vtysh with one router, open until the end."""

    def __init__(self, program: str, folder: Path) -> None:
        self._process = subprocess.Popen(
            [program, "--vty_socket", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, process_group=0, env={**os.environ, "TERM": "dumb", "VTYSH_PAGER": "cat"},
        )  # fmt: skip
        self._prompt = re.compile(rb"(?:^|[\r\n])[-\w]+(?:\(config[-\w]*\))?# $")
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None and self._process.stdin is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._selector.register(self._output, selectors.EVENT_READ)
        self._answer()

    def ask(self, command: str) -> str:
        """The answer, without the echo of the command and the prompt."""
        self._input.write(command.encode() + b"\n")
        self._input.flush()
        answer = self._answer()
        return answer.removeprefix(command).strip("\r\n")

    def close(self) -> None:
        self._input.close()
        if self._process.wait(SECONDS) != 0:
            raise Failure(f"vtysh ended with {self._process.returncode}")

    def _answer(self) -> str:
        said = b""
        deadline = time.monotonic() + SECONDS
        while not (found := self._prompt.search(said)):
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                raise Failure(f"vtysh does not answer; it said {said[-200:]!r}")
            part = os.read(self._output.fileno(), 65536)
            if not part:
                raise Failure(f"vtysh has ended; it said {said[-200:]!r}")
            said += part
        return said[: found.start()].decode()


class Echo:
    """A connection to the server, over the other router."""

    def __init__(self) -> None:
        self._socket = socket.create_connection(SERVER, timeout=SECONDS, source_address=("10.1.0.1", 0))

    def require(self, content: bytes) -> None:
        self._socket.sendall(content)
        got = b""
        while len(got) < len(content):
            part = self._socket.recv(65536)
            if not part:
                raise Failure("the server closed the connection")
            got += part
        if got != content:
            raise Failure("not what was sent")

    def close(self) -> None:
        self._socket.close()


class Load:
    """What goes on until it is to end, or until the first failure."""

    def __init__(self, program: str, folder: Path) -> None:
        self.requests = 0
        self.slowest = 0.0
        self._choose = random.Random(1)
        until(lambda: kernel_routes() >= LASTING, "the routes of the other router")
        self._second = (folder / "second" / "zebra.pid").read_text().strip()
        self._vtysh = Vtysh(program, folder / "first")
        self._lasting = Echo()
        self._monitor = subprocess.Popen(["ip", "monitor", "route"], stdout=subprocess.PIPE, text=True, process_group=0)
        self._lost: list[str] = []
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def go_round(self, number: int) -> None:
        content = self._choose.randbytes(self._choose.randrange(1, 50_000))
        self._timed(lambda: self._lasting.require(content))
        self._timed(lambda: self._connect_once(content))
        self._timed(self._require_routes)
        self._timed(self._require_neighbour)
        self._timed(lambda: self._announce(f"10.{100 + number // 250 % 100}.{number % 250}.0/24"))

    def end(self) -> None:
        self._lasting.close()
        self._vtysh.close()
        self._monitor.terminate()
        self._listener.join(SECONDS)
        self._monitor.wait(SECONDS)
        if self._lost:
            raise Failure(f"the kernel lost routes: {self._lost[:3]}")

    def _timed(self, action: Callable[[], None]) -> None:
        began = time.perf_counter()
        action()
        self.requests += 1
        self.slowest = max(self.slowest, time.perf_counter() - began)

    def _connect_once(self, content: bytes) -> None:
        echo = Echo()
        echo.require(content)
        echo.close()

    def _require_routes(self) -> None:
        """In the kernel, and in zebra by way of the session that is open."""
        if missing := LASTING - kernel_routes():
            raise Failure(f"the kernel has no route to {sorted(missing)}")
        routes = json.loads(self._vtysh.ask("show ip route ospf json"))
        installed = {prefix for prefix, (route, *_) in routes.items() if route.get("installed")}
        if missing := {name if "/" in name else f"{name}/32" for name in LASTING} - installed:
            raise Failure(f"zebra has no route to {sorted(missing)}")

    def _require_neighbour(self) -> None:
        answer = self._vtysh.ask("show ip ospf neighbor")
        if not re.search(r"\bFull/", answer):
            raise Failure(f"the routers are not adjacent: {answer!r}")

    def _announce(self, prefix: str) -> None:
        """A route that the second router's kernel gets comes into the kernel of the first, and goes again."""
        self._second_kernel("add", prefix)
        until(lambda: prefix in kernel_routes(), f"{prefix} is announced")
        self._second_kernel("delete", prefix)
        until(lambda: prefix not in kernel_routes(), f"{prefix} is withdrawn")

    def _second_kernel(self, action: str, prefix: str) -> None:
        run("nsenter", "--target", self._second, "--net", "ip", "route", action, prefix, "dev", "lo")

    def _listen(self) -> None:
        assert self._monitor.stdout is not None
        for line in self._monitor.stdout:
            words = line.split()
            if words[:1] == ["Deleted"] and LASTING & set(words):
                self._lost.append(line.strip())


def load(program: str, folder: Path) -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    going: Load | None = None
    failed = 0
    try:
        going = Load(program, folder)
        number = 0
        while not stopped:
            going.go_round(number)
            if number == 0:
                print("a whole round was served", flush=True)
            number += 1
        going.end()
    except (Failure, OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"failed: {error}", flush=True)
        failed = 1
    if going is not None:
        print(f"{going.requests} requests, {failed} failed, the longest took {going.slowest * 1000:.1f} ms", flush=True)
    os._exit(failed)  # the listener may wait for the kernel


def ask(program: str, folder: Path, command: str) -> int:
    session = Vtysh(program, folder / "first")
    print("\n".join(line.strip() for line in session.ask(command).splitlines() if line.strip()))
    session.close()
    return 0


def serve(address: str, port: int) -> int:
    """One thread a connection."""

    def echo(connection: socket.socket) -> None:
        with connection:
            while part := connection.recv(65536):
                connection.sendall(part)

    with socket.create_server((address, port)) as listener:
        while True:
            threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()


def main(words: list[str]) -> int:
    match words:
        case ["serve", address, port]:
            return serve(address, int(port))
        case ["ask", program, folder, command]:
            return ask(program, Path(folder), command)
        case ["load", program, folder]:
            return load(program, Path(folder))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
