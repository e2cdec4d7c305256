"""The probes of a rehearsal: a question to the daemon, by a command or over TCP, and the judgement of the answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from pathlib import Path

from elfdiff.errors import LivegraftError

from ..interruption import heed
from .children import Child, tail
from .file import Probe
from .readiness import LOOPBACK

_SLICE = 0.05  # seconds between looks at noted signals
_MOST_ANSWER = 1 << 20  # bytes
_PATIENCE = 2.0  # seconds that a probe which ran too long has for ending


def run_command(probe: Probe, command: Sequence[str], folder: Path, scratch: Path, until: float) -> str:
    """Run a command in ``folder``, until a moment of the monotonic clock at most; what it prints.

    Its output goes through files in ``scratch``. Raises BadInput where it cannot be started, LivegraftError where it
    fails or takes too long, Interrupted.
    """
    output, errors = scratch / "probe.output", scratch / "probe.errors"
    errors.unlink(missing_ok=True)
    child = Child(f"probe {probe.name}", command, folder, {}, output, errors)
    try:
        in_time = child.wait(until)
        status, how = child.status, child.how_it_ended
    finally:
        child.end(_PATIENCE)
    said = tuple(f"it said on stderr: {line}" for line in tail(errors).splitlines()[-12:])
    if not in_time:
        raise _no_answer(probe, f"{command[0]} ran on", said)
    if status != 0:
        raise LivegraftError(
            f"probe {probe.name}: {command[0]} failed",
            why=how,
            next_step="a probe prints its answer and ends with 0",
            details=said,
        )
    return tail(output)


def talk(probe: Probe, port: int, until: float) -> str:
    """Send, and read until what was read matches or the other side has closed. Raises LivegraftError, Interrupted."""
    got = b""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=max(0.001, until - time.monotonic())) as line:
            line.sendall(probe.send.encode())
            line.settimeout(_SLICE)
            while not probe.expect.search(_text(got)) and len(got) < _MOST_ANSWER:
                heed()
                if time.monotonic() >= until:
                    raise _no_answer(probe, f"it sent {_cut(_text(got))}", ())
                try:
                    data = line.recv(1 << 16)
                except TimeoutError:
                    continue
                if not data:
                    break
                got += data
    except OSError as error:
        raise LivegraftError(
            f"probe {probe.name}: the daemon does not answer at port {port}",
            why=str(error),
            next_step="see whether it serves that port: start.ready",
        ) from error
    return _text(got)


def require_expected(probe: Probe, state: str, answer: str) -> None:
    """Judge an answer; ``state`` is ``before`` or ``after``. Raises LivegraftError."""
    expected = probe.before if state == "before" else probe.after
    if not expected.fits(answer):
        raise LivegraftError(
            f"probe {probe.name}: not the answer that is expected {state} the patch",
            why=f"expected {expected}, got {_cut(answer)}",
            next_step=f"correct the program, or {state} of this probe",
        )


def _text(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")


def _no_answer(probe: Probe, what: str, details: tuple[str, ...]) -> LivegraftError:
    return LivegraftError(
        f"probe {probe.name}: no whole answer within {probe.timeout:g} seconds",
        why=what,
        next_step="see whether the daemon hangs; or give it more time (timeout), or another end of the answer (expect)",
        details=details,
    )


def _cut(answer: str) -> str:
    text = repr(answer)
    return text if len(text) <= 1000 else f"{text[:996]} ..."
