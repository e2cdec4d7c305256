"""Processes that a command starts, and ends again in any case, with all that they have started in their turn.

Each is the leader of a session of its own, so that a Ctrl-C at the terminal reaches only this process. It is looked at
with WNOWAIT and collected at the very end: until then no other process can get its number, nor that of its session.
What it has started is found by session, by descent, and by a variable in the environment, for daemons that leave
the session of who started them. Signals are sent through pidfds, to processes that were looked at through them.

While signals are deferred (``interruption``) each wait heeds them.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from elfdiff.errors import BadInput, LivegraftError

from ..interruption import heed

MARK = "LIVEGRAFT_STARTED_BY"
"""The variable that marks what a child has started: its value is the child's own."""
PATIENCE = 10.0
"""Seconds between SIGTERM and SIGKILL, and from SIGKILL to giving up."""
_SLICE = 0.02  # seconds: so often is looked at what nothing tells of, and at noted signals
_TAIL = 1 << 16  # bytes of the end of an output that are of interest


class Child:
    """A process that was started, and its output."""

    def __init__(
        self,
        role: str,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        output: Path,
        errors: Path | None = None,
    ) -> None:
        """Start it in ``folder``. ``output`` is a file for both its output streams, or for one where there is a file
        for ``errors``; ``environment`` is added to ours. Raises BadInput where it cannot be started.
        """
        self.role = role
        self.output = output
        self._mark = secrets.token_hex(16)
        self._seen: set[tuple[int, int]] = set()  # what is known to belong to it: process id, time of its start
        with output.open("wb") as out, (errors or output).open("ab") as err:
            try:
                self._process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env={**os.environ, **environment, MARK: self._mark},
                    stdin=subprocess.DEVNULL,
                    stdout=out if errors else err,  # appended to by both: neither writes over what the other wrote
                    stderr=err,
                    start_new_session=True,
                )
            except OSError as error:
                raise BadInput(
                    f"{role}: {command[0]} cannot be started: {error.strerror}",
                    why=str(error),
                    next_step="name a program that is executable, by its path or as one in PATH",
                ) from error
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError as error:  # no descriptor is left: nobody would ever end it
            self._process.kill()
            self._process.wait()
            raise LivegraftError(
                f"{role}: no descriptor for process {self.pid}: {error.strerror}",
                why=str(error),
                next_step="raise the limit of open files (ulimit -n)",
            ) from error

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status, or minus the number of the signal that ended it; None while it runs."""
        if self._process.returncode is not None:
            return self._process.returncode
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    @property
    def how_it_ended(self) -> str:
        """In words."""
        status = self.status
        if status is None:
            return "it runs"
        if status >= 0:
            return f"it ended with exit status {status}"
        try:
            return f"it was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"it was ended by signal {-status}"

    def wait(self, until: float) -> bool:
        """Wait until it has ended, or until a moment of the monotonic clock; whether it has. Raises Interrupted."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        while self.status is None and (left := until - time.monotonic()) > 0:
            heed()
            poll.poll(min(left, _SLICE) * 1000)
        return self.status is not None

    def said(self, lines: int = 12) -> tuple[str, ...]:
        """The last lines of its output."""
        return tuple(f"{self.role} said: {line}" for line in tail(self.output).splitlines()[-lines:])

    def terminate(self, patience: float = PATIENCE) -> bool:
        """Send SIGTERM to it alone and wait; whether it has ended. Signals are not heeded.

        What it has started is looked up before, as long as it can be told by its descent.
        """
        self._family()
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(patience * 1000)) or self.status is not None

    def end(self, patience: float = PATIENCE) -> None:
        """End it and all that it has started: by SIGTERM, then by SIGKILL. May be called again.

        Raises LivegraftError where a process is left, which only the kernel or another user can hold.
        """
        if self._process.returncode is not None:
            return
        if self.status is None:
            self.terminate(patience)
        self._end_all(signal.SIGTERM, 0.0 if self.status is None else patience)
        left = self._end_all(signal.SIGKILL, PATIENCE)
        if self.status is not None:
            self._process.wait()
            os.close(self._pidfd)
        if left:
            raise LivegraftError(
                f"{self.role}: {len(left)} process(es) could not be ended: {', '.join(str(one.pid) for one in left)}",
                why="they are still there after SIGKILL",
                next_step="see what they wait for: /proc/PID/stack",
            )

    def _end_all(self, number: signal.Signals, patience: float) -> list[_Entry]:
        """Send a signal to every process of it, until none is left; who is left after ``patience`` seconds.

        None is left where two looks found none: the environment of a process is empty while it executes a program.
        """
        until = time.monotonic() + patience
        sent: set[tuple[int, int]] = set()
        while family := self._family() or self._family_later():
            for entry in family:
                if entry.identity not in sent:
                    sent.add(entry.identity)
                    _send(entry, number)
            if time.monotonic() >= until:
                return family
            time.sleep(_SLICE)  # processes that are no children of ours: nothing tells when all of them have ended
        return []

    def _family_later(self) -> list[_Entry]:
        time.sleep(_SLICE)
        return self._family()

    def _family(self) -> list[_Entry]:
        """Every process of it: of its session, below it, with its mark, or below one that was seen to be one of it."""
        entries = list(_entries())
        below = {self.pid, *(entry.pid for entry in entries if entry.identity in self._seen)}
        while more := {entry.pid for entry in entries if entry.parent in below} - below:
            below |= more
        family = [
            entry
            for entry in entries
            if entry.session == self.pid or entry.pid in below or _has_mark(entry.pid, self._mark)
        ]
        self._seen |= {entry.identity for entry in family}
        return family


def tail(path: Path) -> str:
    """The end of a file of text; what is no UTF-8 is escaped."""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _TAIL))
        return stream.read(_TAIL).decode(errors="backslashreplace")


def wait_until(condition: Callable[[], bool], until: float, watched: Child) -> bool:
    """Wait for what nothing tells of, as long as the child lives; whether it came true. Raises Interrupted."""
    while not condition():
        if watched.status is not None or time.monotonic() >= until:
            return condition()
        watched.wait(min(until, time.monotonic() + _SLICE))
    return True


@dataclass(frozen=True, slots=True)
class _Entry:
    """A process as /proc/PID/stat has it (proc(5)); ``started`` tells it from a later one with its number."""

    pid: int
    parent: int
    session: int
    started: int

    @property
    def identity(self) -> tuple[int, int]:
        """What no other process has, also later."""
        return self.pid, self.started


def _entry(pid: int) -> _Entry | None:
    """None where there is no such process, or only what is left of it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # from the third, the state
    if fields[0] in "ZX" and int(fields[17]) <= 1:  # a main thread may end before the others
        return None
    return _Entry(pid, int(fields[1]), int(fields[3]), int(fields[19]))


def _entries() -> Iterator[_Entry]:
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and (entry := _entry(int(path.name))) is not None:
            yield entry


def _has_mark(pid: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False  # another user's, or gone


def _send(entry: _Entry, number: signal.Signals) -> None:
    try:
        pidfd = os.pidfd_open(entry.pid)
    except ProcessLookupError:
        return
    try:
        now = _entry(entry.pid)
        if now is not None and now.identity == entry.identity:
            signal.pidfd_send_signal(pidfd, number)
    except (ProcessLookupError, PermissionError):
        pass  # gone; or another user's, and then it is found again
    finally:
        os.close(pidfd)
