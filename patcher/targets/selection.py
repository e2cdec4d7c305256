"""Which processes a command is about: chosen by pid, executable, name, systemd unit or descent.

``choose`` is a pure function of what ``/proc`` said. Between that and the work on a process its number may become
another's, so whoever works on one holds it by a ``Pin``: a pidfd, and the time at which the listed process started.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from elfdiff.errors import BadInput, LivegraftError, NotPermitted

from ..process.proc import executable_of, has_exited, no_such_process, read_proc_file
from .outdated import unit_of

_PF_KTHREAD = 0x00200000  # include/linux/sched.h
_COMM = 15  # TASK_COMM_LEN without its zero
_ENDED = "ZX"
_MOST_SHOWN = 20

Key = tuple[int, int]
"""Pid and start time in clock ticks: no two processes have the same since the machine was started."""


class By(Enum):
    """What a process is chosen by; the values are the names of the options."""

    PID = "pid"
    EXE = "exe"
    NAME = "name"
    UNIT = "unit"
    TREE = "tree"
    ALL = "all"  # every process there is, but for kernel threads and ourselves


@dataclass(frozen=True, slots=True)
class Selection:
    """What was asked for; ``several`` says that more than one process may be meant."""

    by: By
    value: str
    several: bool = False

    @property
    def words(self) -> str:
        """It as an option, for messages."""
        return f"--{self.by.value} {self.value}".rstrip()


@dataclass(frozen=True, slots=True)
class Listed:
    """A process as ``/proc`` listed it. ``start_time`` is in clock ticks since boot; ``name`` is its comm.

    ``exe`` is the path of its executable without ``(deleted)``, empty for a kernel thread, None where this user may
    not know it. ``exe`` and ``unit`` are empty, too, where nobody asked for them.
    """

    pid: int
    parent: int
    start_time: int
    name: str
    kernel_thread: bool = False
    exe: str | None = ""
    unit: str = ""

    @property
    def key(self) -> Key:
        """What names the process for ever."""
        return self.pid, self.start_time


@dataclass(frozen=True, slots=True)
class Pin:
    """A process that its number cannot be taken from unnoticed; ``descriptor`` is a pidfd (pidfd_open(2))."""

    process: Listed
    descriptor: int

    @property
    def pid(self) -> int:
        """Its number, which means this process for as long as it has not ``exited``."""
        return self.process.pid

    def exited(self) -> bool:
        """Whether all its threads have ended; from then on its number may be another's."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def ending(self) -> bool:
        """Whether it has exited, or is about to and will execute nothing more.

        Its memory is gone some time before the pidfd says so: the kernel frees it in between (do_exit, kernel/exit.c).
        """
        return has_exited(self.pid) or self.exited()  # in this order, or the number might be another's by then

    def require_alive(self) -> None:
        """Raise BadInput where it has exited: what was just opened by its number may be another's."""
        if self.exited():
            raise no_such_process(self.pid)


@contextmanager
def pinned(process: Listed) -> Iterator[Pin]:
    """Hold a listed process. Raises BadInput (it has exited, its number is free or another's), LivegraftError."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError as error:
        raise no_such_process(process.pid) from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # its number is that of a thread by now
            raise no_such_process(process.pid) from error
        raise LivegraftError(
            f"process {process.pid} could not be held by a pidfd",
            why=f"pidfd_open(2): {error.strerror}",
            next_step=f"livegraft works on it by its number alone with --pid {process.pid}",
        ) from error
    try:
        # The descriptor is of whoever has the number now, so the start time is asked only when it is held.
        now = _read_stat(process.pid)
        if now is None or now.start_time != process.start_time:
            raise no_such_process(process.pid)
        yield Pin(process, descriptor)
    finally:
        os.close(descriptor)


def list_processes(by: By) -> tuple[Listed, ...]:
    """Return every process that has not exited, by rising pid, with what choosing ``by`` needs to know of each.

    The list is not of one moment: a process that lives all the time is in it, one that starts or ends meanwhile may be.
    """
    found = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):  # noqa: PTH208
        process = _read_stat(pid)
        if process is None:
            continue
        if by is By.EXE and not process.kernel_thread:
            process = _with(process, exe=_exe_of(pid))
        if by is By.UNIT:
            process = _with(process, unit=unit_of(pid))
        found.append(process)
    return tuple(found)


def _with(process: Listed, *, exe: str | None = "", unit: str = "") -> Listed:
    return Listed(
        process.pid, process.parent, process.start_time, process.name, process.kernel_thread, exe, unit
    )


def _read_stat(pid: int) -> Listed | None:
    """Return what ``/proc/PID/stat`` says (proc(5)), or None where the process has exited."""
    try:
        text = read_proc_file(pid, "stat")
    except (BadInput, NotPermitted):
        return None  # with hidepid= others' processes are not to be seen
    head, _, rest = text.rpartition(")")
    fields = rest.split()
    state, parent, flags, threads, start_time = fields[0], *(int(fields[number - 3]) for number in (4, 9, 20, 22))
    if state in _ENDED and threads <= 1:  # a main thread may end before the others
        return None
    return Listed(pid, parent, start_time, head.partition("(")[2], bool(flags & _PF_KTHREAD))


def _exe_of(pid: int) -> str | None:
    try:
        return executable_of(pid)
    except (BadInput, FileNotFoundError, ProcessLookupError):
        return ""
    except (NotPermitted, PermissionError):
        return None


def choose(
    selection: Selection, processes: Sequence[Listed], own: int, known: Collection[Key] | None = None
) -> tuple[Listed, ...]:
    """Return the processes that are meant, parents before their children; never process ``own``, no kernel threads.

    ``known`` are those that were chosen before, None the first time: a tree is what descends from any of them, so
    that its number cannot make another process its root, and children that have lost their parent still belong to it.
    """
    if selection.by is By.TREE:
        wanted = _descendants(processes, _roots(int(selection.value), processes, known))
    else:
        wanted = [item for item in processes if _is_meant(item, selection)]
    depths = _depths(processes)
    chosen = [item for item in wanted if item.pid != own and not item.kernel_thread]
    return tuple(sorted(chosen, key=lambda item: (depths[item.pid], item.start_time, item.pid)))


def _is_meant(process: Listed, selection: Selection) -> bool:
    value = selection.value
    if selection.by is By.ALL:
        return True
    if selection.by is By.PID:
        return process.pid == int(value)
    if selection.by is By.NAME:
        return os.fsencode(process.name) == os.fsencode(value)[:_COMM]
    if selection.by is By.UNIT:
        return process.unit != "" and process.unit in (value, f"{value}.service")
    return bool(process.exe) and process.exe in _paths(value)


def _paths(value: str) -> tuple[str, ...]:
    """The paths by which the kernel may know an executable: as it was given, and with symbolic links followed."""
    return os.path.abspath(value), os.path.realpath(value)  # noqa: PTH100


def _roots(pid: int, processes: Sequence[Listed], known: Collection[Key] | None) -> set[int]:
    return {item.pid for item in processes if (item.pid == pid if known is None else item.key in known)}


def _descendants(processes: Sequence[Listed], roots: set[int]) -> list[Listed]:
    children: dict[int, list[Listed]] = {}
    for item in processes:
        children.setdefault(item.parent, []).append(item)
    found = {item.pid: item for item in processes if item.pid in roots}
    pending = list(found)
    while pending:
        for child in children.get(pending.pop(), ()):
            if child.pid not in found:
                found[child.pid] = child
                pending.append(child.pid)
    return list(found.values())


def _depths(processes: Sequence[Listed]) -> dict[int, int]:
    """How many ancestors each process has in the list; a list is not of one moment, so it may have a circle."""
    parents = {item.pid: item.parent for item in processes}
    depths = {}
    for pid, parent in parents.items():
        seen = {pid}
        above = parent
        while above in parents and above not in seen:
            seen.add(above)
            above = parents[above]
        depths[pid] = len(seen)
    return depths


def select_processes(selection: Selection) -> tuple[Listed, ...]:
    """Return the processes that are meant now, parents before their children.

    Raises BadInput where there is none, and where there are more than one without ``several``.
    """
    processes = list_processes(selection.by)
    chosen = choose(selection, processes, os.getpid())
    if not chosen:
        raise _none(selection, sum(item.exe is None for item in processes))
    if len(chosen) > 1 and not selection.several:
        raise _too_many(selection, chosen)
    return chosen


def select_again(selection: Selection, known: Collection[Key]) -> tuple[Listed, ...]:
    """Return the processes that are meant now, of which there may be none left; ``known`` as for ``choose``."""
    return choose(selection, list_processes(selection.by), os.getpid(), known)


def _none(selection: Selection, hidden: int) -> BadInput:
    if selection.by in (By.TREE, By.PID):
        return no_such_process(int(selection.value))
    meanings = {
        By.ALL: "this user may see no other process",
        By.EXE: f"no process runs the file {_paths(selection.value)[0]}",
        By.NAME: f"no process has the name {selection.value!r} in /proc/PID/comm",
        By.UNIT: f"no process is in the control group of unit {selection.value}",
    }
    why = meanings[selection.by]
    if hidden:
        why += f"; of {hidden} processes user {os.geteuid()} may not know the executable"
    if selection.by is By.EXE and not Path(selection.value).exists():
        why += "; no such file is there now, which is no hindrance if it was deleted"
    return BadInput(f"{selection.words} matches no process", why=why, next_step="ps -eo pid,comm,exe lists them")


def _too_many(selection: Selection, chosen: Sequence[Listed]) -> BadInput:
    details = [f"{item.pid} {item.name}" for item in chosen[:_MOST_SHOWN]]
    details += [f"and {len(chosen) - _MOST_SHOWN} more"] if len(chosen) > _MOST_SHOWN else []
    return BadInput(
        f"{selection.words} matches {len(chosen)} processes",
        why="without --all one process is meant, and which of them is not said",
        next_step=f"--all for all of them, --tree {chosen[0].pid} for that one and what descends from it, or --pid PID",
        details=tuple(details),
    )
