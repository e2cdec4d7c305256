"""Where the build lies that came in the place of a mapped file: as the process sees the file systems.

That is the path of the mapped file, where something lies there. A library whose file name carries its version
(libfoo.so.1.2.3) is not replaced but comes under another name; what stays is its SONAME, by which the dynamic linker
finds it, and which ldconfig(8) makes a symbolic link to the new file in the same folder.
"""

from __future__ import annotations

import os
import stat

from elfdiff.errors import LivegraftError

from .memory import Memory
from .modules import PT_DYNAMIC, Module
from .symbols import DynamicSymbols


def has_our_mounts(pid: int, tid: int) -> bool:
    """Whether a thread of a process sees the file systems that we see, so that a path means the same to both.

    Raises OSError where that may not be known, or the thread has ended.
    """
    return os.readlink(f"/proc/{pid}/task/{tid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")  # noqa: PTH115


def root_of(pid: int, tid: int) -> str:
    """What to put before a path of ``/proc/PID/maps`` to reach the file; paths there are told from the reader's root,
    so that a chroot of the process changes nothing. Raises as ``has_our_mounts``."""
    return "" if has_our_mounts(pid, tid) else f"/proc/{pid}/task/{tid}/root"


def successor(pid: int, tid: int, module: Module, memory: Memory) -> str:
    """Return the path at which the successor of a mapped file is to be looked for, whether or not one lies there.

    It is in the folder of the mapped file: a link of the SONAME's that leads elsewhere is another installation's.
    Raises as ``has_our_mounts``.
    """
    root = root_of(pid, tid)
    if os.path.lexists(root + module.path):
        return module.path
    name = _soname(module, memory)
    if not name or "/" in name:
        return module.path
    folder = module.path.rpartition("/")[0]
    try:
        if stat.S_ISLNK(os.lstat(f"{root}{folder}/{name}").st_mode):
            name = os.readlink(f"{root}{folder}/{name}")  # noqa: PTH115
    except OSError:
        return module.path  # no such name: the library is gone
    return module.path if "/" in name else f"{folder}/{name}"


def _soname(module: Module, memory: Memory) -> str:
    if module.header(PT_DYNAMIC) is None:
        return ""
    try:
        return DynamicSymbols(module, memory).soname
    except LivegraftError:
        return ""  # damaged in memory; then nothing of that name can be meant
