"""A client of sshd: one login, or a load of logins, copies and a session that stays open.

client.py login PORT FOLDER KEY    prints "in" or "refused"
client.py load PORT FOLDER         until SIGTERM; prints how it went, and ends with 1 if anything failed

FOLDER is what start.sh has made.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 60.0
CONTENT = random.Random(5).randbytes(1 << 20)


class Failure(Exception):
    """Not the right answer."""


class Visitor:
    """The user, at a server; counts requests and times them."""

    def __init__(self, port: int, folder: Path) -> None:
        self._port, self._folder = port, folder
        self.requests = 0
        self.slowest = 0.0

    def options(self, key: str) -> list[str]:
        """Those of ssh(1) and scp(1): nobody's configuration, this server, one key."""
        said = {
            "Port": self._port, "IdentityFile": self._folder / key, "IdentitiesOnly": "yes",
            "UserKnownHostsFile": self._folder / "known", "StrictHostKeyChecking": "yes", "LogLevel": "ERROR",
            "PreferredAuthentications": "publickey", "ConnectTimeout": int(SECONDS),
        }  # fmt: skip
        return ["-F", "none", *(word for name, value in said.items() for word in ("-o", f"{name}={value}"))]

    def ssh(self, key: str, *words: str) -> list[str]:
        return ["ssh", *self.options(key), "visitor@127.0.0.1", *words]

    def is_let_in(self, key: str) -> bool:
        done = subprocess.run(
            self.ssh(key, "echo in"), capture_output=True, text=True, check=False, timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if (done.returncode, done.stdout) == (0, "in\n"):
            return True
        if "Permission denied (publickey)" in done.stderr:
            return False
        raise Failure(f"a login ended with {done.returncode}: {done.stdout}{done.stderr}")

    def log_in(self) -> None:
        if not self.is_let_in("user"):
            raise Failure("a login was refused")

    def copy(self) -> None:
        """There and back."""
        sent, got = self._folder / "sent", self._folder / "got"
        sent.write_bytes(CONTENT)
        there = f"visitor@127.0.0.1:{self._folder}/home/copy"
        for pair in ((sent, there), (there, got)):
            subprocess.run(["scp", "-q", *self.options("user"), *map(str, pair)], check=True, timeout=SECONDS)
        if got.read_bytes() != CONTENT:
            raise Failure("what was copied there and back is something else")

    def timed(self, action: Callable[[], None]) -> None:
        began = time.perf_counter()
        action()
        self.requests += 1
        self.slowest = max(self.slowest, time.perf_counter() - began)


class Shell:
    """A session that stays open."""

    def __init__(self, visitor: Visitor) -> None:
        self._asked = 0
        self._process = subprocess.Popen(
            visitor.ssh("user", "sh"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self) -> None:
        """A sum."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._asked += 1
        self._process.stdin.write(f"echo $(({self._asked} * 1000 + 1))\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if answer != f"{self._asked * 1000 + 1}\n":
            raise Failure(f"the open session answers {answer!r}")

    def leave(self) -> None:
        self._process.communicate("exit 7\n", timeout=SECONDS)
        if self._process.returncode != 7:
            raise Failure(f"the open session has ended with {self._process.returncode}")


def load(visitor: Visitor) -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    failed = 0
    try:
        shell = Shell(visitor)
        while not stopped:
            for action in (shell.ask, visitor.log_in, shell.ask, visitor.copy):
                visitor.timed(action)
            if visitor.requests == 4:
                print("everything was served", flush=True)
        shell.leave()
    except (Failure, OSError, subprocess.SubprocessError) as error:
        print(f"failed: {error}", flush=True)
        failed = 1
    slowest = visitor.slowest * 1000
    print(f"{visitor.requests} requests, {failed} failed, the longest took {slowest:.1f} ms", flush=True)
    return failed


def main(words: list[str]) -> int:
    match words:
        case ["login", port, folder, key]:
            print("in" if Visitor(int(port), Path(folder)).is_let_in(key) else "refused")
            return 0
        case ["load", port, folder]:
            return load(Visitor(int(port), Path(folder)))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
