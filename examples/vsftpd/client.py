"""A client of vsftpd: one upload, or a load of sessions that verify what they get.

    client.py store PORT NAME FOLDER    uploads a file that is not there yet; prints the code of the server's answer
    client.py load PORT FOLDER          until SIGTERM; prints how it went, and ends with 1 if anything failed
    client.py open NAME FOLDER          has the load upload it in a session that is open since the load began

Sessions of the load upload a file and fetch it again; two sessions stay open from the beginning to the end. FOLDER is
the server's own folder.
"""

from __future__ import annotations

import ftplib
import io
import os
import random
import signal
import socket
import sys
import threading
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


def stored(session: ftplib.FTP, name: str, folder: Path) -> str:
    """The code of the server's answer to the upload of a file that is not there yet."""
    (folder / "root" / "uploads" / name).unlink(missing_ok=True)
    try:
        return session.storbinary(f"STOR {name}", io.BytesIO(b"content"))[:3]
    except ftplib.error_perm as refusal:
        return str(refusal)[:3]


def opened(port: int) -> ftplib.FTP:
    session = ftplib.FTP()
    session.connect("127.0.0.1", port, timeout=SECONDS)
    session.login()
    session.cwd("uploads")
    return session


def store(port: int, name: str, folder: Path) -> int:
    with opened(port) as session:
        print(stored(session, name, folder))
    return 0


def answer(listener: socket.socket, session: ftplib.FTP, folder: Path) -> None:
    """Upload what others ask for, in one session that stays open."""
    while True:
        line, _ = listener.accept()
        with line:
            line.sendall(stored(session, line.recv(100).decode(), folder).encode())


def ask(name: str, folder: Path) -> int:
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(SECONDS)
        line.connect(str(folder / "open"))
        line.sendall(name.encode())
        print(line.recv(100).decode())
    return 0


def load(port: int, folder: Path) -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    failed = 0
    choose = random.Random(1)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "open"))
    listener.listen()
    try:
        threading.Thread(target=answer, args=(listener, opened(port), folder), daemon=True).start()
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
        case ["load", port, folder]:
            return load(int(port), Path(folder))
        case ["open", name, folder]:
            return ask(name, Path(folder))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
