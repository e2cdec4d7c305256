"""One patcher at a time for a process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from elfdiff.errors import Busy, LivegraftError, NotPermitted

from .. import seam
from ..process.proc import no_such_process


@contextmanager
def exclusive(pid: int, name: str = "personality") -> Iterator[None]:
    """Hold a process against every other user of this function with the same ``name``.

    The lock is a flock(2) on ``/proc/PID/NAME``: it is bound to the process itself and not to a number, needs
    no directory of ours, ends with the death of its holder, and can be taken only by root and the user to whom the
    process belongs. ``name`` must be a file that nobody else may open, and that can be opened as well when the main
    thread has ended, or two patchers would lock different files (``personality``, ``syscall``; not ``mem``).

    Raises Busy (somebody else holds it), BadInput (no such process), NotPermitted, LivegraftError (no lock to be had).
    """
    descriptor = _open(pid, name)
    try:
        try:
            failure = seam.announce("LOCK", pid)
            if failure:
                raise OSError(failure, os.strerror(failure))  # the kind of OSError follows from the number
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(
                f"process {pid} is being patched by another livegraft",
                why=f"it holds the lock on /proc/{pid}/{name}",
                next_step="wait for it to end, and try again",
            ) from error
        except OSError as error:
            raise LivegraftError(
                f"process {pid} could not be held against other livegrafts",
                why=f"flock(2) of /proc/{pid}/{name}: {error.strerror}",
                next_step="try again",
            ) from error
        yield
    finally:
        os.close(descriptor)


def _open(pid: int, name: str) -> int:
    try:
        return os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise no_such_process(pid) from error
    except PermissionError as error:
        raise NotPermitted(
            f"process {pid} may not be patched by user {os.geteuid()}",
            why=f"/proc/{pid}/{name}: {error.strerror}",
            next_step="run as root",
        ) from error
    except OSError as error:
        raise LivegraftError(f"/proc/{pid}/{name} could not be opened", why=error.strerror or str(error)) from error
