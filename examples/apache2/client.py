"""A client of Apache: one request, or a load of connections that stay open and verify what they get.

client.py get PORT PATH    prints the status and what was got
client.py load PORT        until SIGTERM; prints how it went, and ends with 1 if anything failed
"""

from __future__ import annotations

import http.client
import signal
import sys
import time

CONNECTIONS = 8
SECONDS = 30.0
PAGES = {"/page.txt": (200, b"of the site\n"), "/~somebody/page.txt": (200, b"of somebody\n")}


class Failure(Exception):
    """An answer that is not the right one."""


class Connection:
    """A connection that stays open: a request at a time. One that the server closes is not made again."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        self._http.connect()
        self._http.auto_open = False
        self.slowest = 0.0

    def get(self, path: str) -> tuple[int, bytes]:
        began = time.perf_counter()
        self._http.request("GET", path)
        answer = self._http.getresponse()
        body = answer.read()
        self.slowest = max(self.slowest, time.perf_counter() - began)
        return answer.status, body


def load(port: int) -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    requests, failed = 0, 0
    connections: list[Connection] = []
    try:
        connections += [Connection(port) for _ in range(CONNECTIONS)]
        while not stopped:
            for connection in connections:
                for path, right in PAGES.items():
                    if (got := connection.get(path)) != right:
                        raise Failure(f"{path}: {got} instead of {right}")
            if requests == 0:
                print("all connections were served", flush=True)
            requests += len(connections) * len(PAGES)
    except (Failure, OSError, http.client.HTTPException) as error:
        print(f"failed: {error!r}", flush=True)
        failed = 1
    slowest = max((connection.slowest for connection in connections), default=0.0)
    print(f"{requests} requests, {failed} failed, the longest took {slowest * 1000:.1f} ms", flush=True)
    return failed


def main(words: list[str]) -> int:
    match words:
        case ["get", port, path]:
            status, body = Connection(int(port)).get(path)
            print(status, body.decode())
            return 0
        case ["load", port]:
            return load(int(port))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
