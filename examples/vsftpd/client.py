"""A client of vsftpd: one upload, or a load of sessions that verify what they get.

    client.py store PORT NAME FOLDER    uploads a file that is not there yet; prints the code of the server's answer
    client.py load PORT                 until SIGTERM; prints how it went, and ends with 1 if anything failed

Sessions of the load upload a file and fetch it again; one session stays open from the beginning to the end.
"""

from __future__ import annotations

import ftplib
import io
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 30.0


class Failure(Exception):
    """Not the right answer."""


class Session:
    """A session that is logged in, in the folder for uploads; counts its requests and times them."""

    requests = 0
    slowest = 0.0

    def __init__(self, port: int) -> None:
        self._ftp = ftplib.FTP()
        self._timed(lambda: self._ftp.connect("127.0.0.1", port, timeout=SECONDS))
        self._timed(self._ftp.login)
        self._timed(lambda: self._ftp.cwd("uploads"))

    def store(self, name: str, content: bytes) -> str:
        return self._timed(lambda: self._ftp.storbinary(f"STOR {name}", io.BytesIO(content)))

    def require(self, name: str, content: bytes) -> None:
        parts: list[bytes] = []
        self._timed(lambda: self._ftp.retrbinary(f"RETR {name}", parts.append))
        if b"".join(parts) != content:
            raise Failure(f"{name} is not what was uploaded")

    def quit(self) -> None:
        self._timed(self._ftp.quit)

    @classmethod
    def _timed(cls, action: Callable[[], str]) -> str:
        began = time.perf_counter()
        answer = action()
        cls.requests += 1
        cls.slowest = max(cls.slowest, time.perf_counter() - began)
        return answer


def store(port: int, name: str, folder: Path) -> int:
    (folder / name).unlink(missing_ok=True)
    session = Session(port)
    try:
        answer = session.store(name, b"content")
    except ftplib.error_perm as refusal:
        answer = str(refusal)
    session.quit()
    print(answer[:3])
    return 0


def load(port: int) -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    failed = 0
    choose = random.Random(1)
    try:
        lasting = Session(port)
        number = 0
        while not stopped:
            name, content = f"{os.getpid()}.{number}", choose.randbytes(choose.randrange(1, 100_000))
            session = Session(port)
            session.store(name, content)
            session.require(name, content)
            session.quit()
            lasting.require(name, content)
            if number == 0:
                print("a whole session was served", flush=True)
            number += 1
        lasting.quit()
    except (Failure, OSError, EOFError, ftplib.Error) as error:
        print(f"failed: {error}", flush=True)
        failed = 1
    print(f"{Session.requests} requests, {failed} failed, the longest took {Session.slowest * 1000:.1f} ms", flush=True)
    return failed


def main(words: list[str]) -> int:
    match words:
        case ["store", port, name, folder]:
            return store(int(port), name, Path(folder))
        case ["load", port]:
            return load(int(port))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
