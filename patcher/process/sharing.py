"""Processes that share their memory: a child of vfork(2) before its execve(2), or of clone(2) with CLONE_VM.

To patch such a process is to patch the other one, too, whose threads would neither be stopped nor looked at.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time

from . import obstacles
from .proc import living_thread, status, thread_ids

_SYS_KCMP = {"x86_64": 312, "aarch64": 272}  # syscall_64.tbl, asm-generic/unistd.h
_KCMP_VM = 1  # linux/kcmp.h
_PATIENCE = 1.0  # seconds; a child of posix_spawn(3) executes its program after some microseconds
_REST = 1e-3


def require_own_memory(pid: int) -> None:
    """Return once no other process shares the memory of process ``pid``, as far as the kernel lets us see.

    A process one of whose threads waits for such a child (vfork(2)) may pass: it cannot be stopped while it does.
    Raises Busy where one goes on sharing it, BadInput (no such process).
    """
    end = time.monotonic() + _PATIENCE
    # Only those of the first look: a program that never stops spawning has a new one at every moment.
    others = sharers(pid)
    while others:
        if time.monotonic() >= end:
            waits = any(status(tid).state == "D" for tid in thread_ids(pid))
            obstacle = None if waits else obstacles.shares_memory(pid, status(pid).name, others)
            if obstacle is not None:
                raise obstacle.as_error()
            return
        time.sleep(_REST)
        others = tuple(item for item in others if item in sharers(pid))


def sharers(pid: int) -> tuple[int, ...]:
    """Return the other processes that share the memory of ``pid``, ascending.

    Those of which this user may not know it are missing, and all of them on kernels without kcmp(2).
    Raises BadInput (no such process).
    """
    own = living_thread(pid)
    compare = ctypes.CDLL(None).syscall
    number = _SYS_KCMP[platform.machine()]
    others = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208
    return tuple(other for other in others if other != pid and compare(number, own, other, _KCMP_VM, 0, 0) == 0)
