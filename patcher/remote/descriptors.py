"""Whose descriptors are whose: threads of one process need not share a table of them (clone(2), CLONE_FILES).

A descriptor of one table is another file, or none, in another. Whatever is done with one must be done by a thread that
has that table, and seen by way of such a thread's ``/proc`` entry.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from dataclasses import dataclass

from elfdiff.errors import LivegraftError

from ..process.proc import MEMFD_PATH, living_thread, thread_ids

_SYS_KCMP = {"x86_64": 312, "aarch64": 272}  # syscall_64.tbl, asm-generic/unistd.h
_KCMP_FILES = 2  # linux/kcmp.h

Threads = frozenset[int]


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A descriptor that means the same to each of ``threads``, which are ids of one process."""

    number: int
    threads: Threads


def shared_with(pid: int, tid: int) -> Threads:
    """Return the threads of process ``pid`` that share the descriptor table of its thread ``tid``, itself included.

    Threads that start or end meanwhile may be missing. Raises BadInput (no such process), LivegraftError.
    """
    return frozenset((tid, *(other for other in thread_ids(pid) if other != tid and _same_table(tid, other))))


def leaked_memory_files(pid: int) -> tuple[Descriptor, ...]:
    """Return the descriptors that a patcher which was killed has left open in a process.

    On kernels that cannot compare tables (built without CONFIG_KCMP) only those of one thread are seen.
    Raises BadInput (no such process), LivegraftError.
    """
    found = []
    for threads in _tables(pid):
        for number in _memory_files(pid, min(threads)):
            found.append(Descriptor(number, threads))
    return tuple(found)


def _tables(pid: int) -> list[Threads]:
    tables: list[set[int]] = []
    for tid in thread_ids(pid) if _can_compare() else (living_thread(pid),):
        own = next((table for table in tables if _same_table(min(table), tid)), None)
        if own is None:
            tables.append({tid})
        else:
            own.add(tid)
    return [frozenset(table) for table in tables]


def _memory_files(pid: int, tid: int) -> list[int]:
    folder = f"/proc/{pid}/task/{tid}/fd"
    found = []
    try:
        names = os.listdir(folder)  # noqa: PTH208
    except (FileNotFoundError, ProcessLookupError):
        return []  # the thread has ended
    except OSError as error:
        raise LivegraftError(f"the descriptors of thread {tid} could not be looked at", why=str(error)) from error
    for name in names:
        try:
            path = os.readlink(f"{folder}/{name}")  # noqa: PTH115
        except FileNotFoundError:
            continue  # closed between the two looks
        if path.removesuffix(" (deleted)") == MEMFD_PATH:
            found.append(int(name))
    return sorted(found)


def _can_compare() -> bool:
    return _compare(os.getpid(), os.getpid()) == 0


def _same_table(first: int, second: int) -> bool:
    result = _compare(first, second)
    if result >= 0:
        return result == 0
    if -result in (errno.ESRCH, errno.ENOSYS):
        return False  # one has ended; or nobody can tell, and then they are taken for different
    raise LivegraftError(
        f"the descriptor tables of threads {first} and {second} could not be compared", why=os.strerror(-result)
    )


def _compare(first: int, second: int) -> int:
    """kcmp(2): 0 where both have the same table, 1 or 2 where not, or a negative errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(_SYS_KCMP[platform.machine()], first, second, _KCMP_FILES, 0, 0))
    return -ctypes.get_errno() if result < 0 else result
