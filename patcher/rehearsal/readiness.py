"""Waiting until a process that was started is ready: a port that accepts, a line of its output, a file."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path

from elfdiff.errors import LivegraftError

from .children import Child, wait_until
from .file import Ready

LOOPBACK = "127.0.0.1"
_CONNECT_SECONDS = 1.0


def wait_until_ready(child: Child, ready: Ready, seconds: float, until: float) -> int | None:
    """Wait until a moment of the monotonic clock at most; the port, where it is the process that says it.

    ``ready`` without placeholders; its file is an absolute path. ``seconds`` is how long that is, for the message.
    Raises LivegraftError where the process ends or does not become ready, Interrupted.
    """
    found: list[re.Match[str]] = []
    condition, missing = _condition(ready, child, found)
    came = wait_until(condition, until, child)
    if child.status is not None:
        raise ended_early(child)
    if not came:
        raise LivegraftError(
            f"{child.role} was not ready within {seconds:g} seconds",
            why=f"it runs, but {missing}",
            next_step="see what it says; give it more time (timeout), or another sign of being ready (ready)",
            details=child.said(),
        )
    return _port_in(found[0], child) if ready.names_port else None


def ended_early(child: Child) -> LivegraftError:
    """What is said of a process that was to run on."""
    return LivegraftError(
        f"{child.role} ended early",
        why=child.how_it_ended,
        next_step="it must run, in the foreground, until it gets SIGTERM" if child.status == 0 else "see what it says",
        details=child.said(),
    )


def free_port() -> int:
    """A port of the loopback interface that nobody listens at; whoever is started next can ask for it."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        return int(listener.getsockname()[1])


def _condition(ready: Ready, child: Child, found: list[re.Match[str]]) -> tuple[Callable[[], bool], str]:
    """What is to come true, and what is said where it does not; a line that is found goes into ``found``."""
    if ready.line is not None:
        lines = _Lines(child.output, ready.line)
        return lambda: lines.find(found), f"no line of its output has a match of {ready.line.pattern!r}"
    if ready.file:
        return Path(ready.file).exists, f"there is no {ready.file}"
    port = int(ready.port)
    return lambda: _accepts(port), f"nobody accepts connections at port {port}"


class _Lines:
    """The lines of an output that grows: each is looked at once."""

    def __init__(self, path: Path, pattern: re.Pattern[str]) -> None:
        self._path = path
        self._pattern = pattern
        self._offset = 0

    def find(self, found: list[re.Match[str]]) -> bool:
        """Look at what has come since; a match goes into ``found``."""
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            whole, end, _ = stream.read().rpartition(b"\n")
        self._offset += len(whole) + len(end)
        for line in whole.decode(errors="backslashreplace").splitlines():
            match = self._pattern.search(line)
            if match:
                found.append(match)
                return True
        return False


def _accepts(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _port_in(match: re.Match[str], child: Child) -> int:
    text = match["port"] or ""
    if text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16:
        return int(text)
    raise LivegraftError(
        f"{child.role} says no port in the line that shows that it is ready",
        why=f"{text!r} is no port, in {match.string!r}",
        next_step="correct the group port of start.ready",
        details=child.said(),
    )
