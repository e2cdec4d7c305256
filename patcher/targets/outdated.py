"""Processes that run an executable or a library whose file was deleted or replaced: what an upgrade has left behind.

Finding them must be fast on a machine with thousands of processes, so the mappings of each are only searched for what
looks suspicious; the few that do are then looked at as a patch would: which ELF images they are, by their build-ids.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from elfdiff.errors import BadInput, NotPermitted, Refused
from elfdiff.images.elffile import open_elf

from ..process.memory import Memory
from ..process.modules import PT_NOTE, Module, build_id_in_notes, modules
from ..process.packages import owners
from ..process.proc import by_living_thread, mappings, no_such_process, status
from ..process.successors import root_of, successor
from ..records.record import Record, State
from ..records.search import find_records

_CODE = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ ..x. [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+) +(/.*)$", re.MULTILINE)
"""A mapping of a file that may be executed (proc(5), ``/proc/PID/maps``): device, inode, path."""
_DELETED = b" (deleted)"
_NOT_FILES = (b"/memfd:", b"/dev/", b"/SYSV", b"/[", b"/anon_hugepage")
_UNITS = (".service", ".socket", ".mount", ".scope")
_MAX_NOTES = 1 << 16


class FileState(Enum):
    """What became of a file that a process has mapped; the values are stable names."""

    NEW_BUILD = "new-build"  # another build lies in its place: a patch may be made of the two
    SAME_BUILD = "same-build"  # the same build lies there again: nothing is to be patched
    PATCHED = "patched"  # the process carries a patch to the build that lies there
    GONE = "gone"  # nothing lies there, or no program
    UNKNOWN = "unknown"  # one of the two has no build-id, or could not be read


@dataclass(frozen=True, slots=True)
class OutdatedFile:
    """A mapped image whose file is another one now.

    ``running`` is the build-id of what is mapped, ``on_disk`` that of the file in its place now, each empty where there
    is none. ``successor`` is the path of the latter: ``path``, but for a library whose file name carries its version.
    ``package`` is the installed package that ``successor`` belongs to, as ``name version``, or empty.
    """

    path: str
    state: FileState
    running: str
    on_disk: str
    successor: str
    package: str = ""


@dataclass(frozen=True, slots=True)
class OutdatedProcess:
    """A process that runs outdated files. ``unit`` is its systemd unit, or empty; ``patches`` are ids in force."""

    pid: int
    name: str
    uid: int
    unit: str
    files: tuple[OutdatedFile, ...]
    patches: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """All outdated processes by rising pid; ``unreadable`` processes were not this user's to look at."""

    looked_at: int
    unreadable: int
    processes: tuple[OutdatedProcess, ...]


def survey() -> Survey:
    """Look at every process. Those that end meanwhile are left out. Raises LivegraftError."""
    searcher = _Searcher()
    found = []
    looked_at = unreadable = 0
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):  # noqa: PTH208
        try:
            suspicious = searcher.suspicious(pid, pid)
            looked_at += 1
            process = _look_closer(pid, suspicious) if suspicious else None
        except (BadInput, FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        except (PermissionError, NotPermitted):
            unreadable += 1
            continue
        if process is not None:
            found.append(process)
    return Survey(looked_at, unreadable, _with_packages(found))


def outdated_process(pid: int) -> OutdatedProcess | None:
    """Return what is outdated in one process, None where nothing is; packages are not asked for.

    Raises BadInput (no such process), NotPermitted, LivegraftError.
    """
    try:
        suspicious = by_living_thread(pid, lambda tid: _Searcher().suspicious(pid, tid))
    except PermissionError as error:
        raise NotPermitted(
            f"what process {pid} has mapped may not be seen",
            why=str(error),
            next_step="run as the owner of the process with ptrace rights, or as root",
        ) from error
    except (FileNotFoundError, ProcessLookupError) as error:
        raise no_such_process(pid) from error
    return _look_closer(pid, suspicious) if suspicious else None


class _Searcher:
    """Searches mappings for files that are no longer what lies at their path; each path is asked about once."""

    def __init__(self) -> None:
        self._files: dict[bytes, tuple[int, int, int] | None] = {}

    def suspicious(self, pid: int, tid: int) -> set[str]:
        """Paths of a process, looked at by way of one of its threads, whose files may have been replaced."""
        with open(f"/proc/{pid}/task/{tid}/maps", "rb") as file:
            mapped = {match.groups() for match in _CODE.finditer(file.read())}
        if not mapped:
            return set()  # a kernel thread, a zombie, or statically linked in memory
        root = root_of(pid, tid).encode()
        found = set()
        for major, minor, inode, path in mapped:
            if path.startswith(_NOT_FILES):
                continue
            if path.endswith(_DELETED):
                found.add(os.fsdecode(path.removesuffix(_DELETED)))
            elif self._identity(root + path) != (int(major, 16), int(minor, 16), int(inode)):
                found.add(os.fsdecode(path))
        return found

    def _identity(self, path: bytes) -> tuple[int, int, int] | None:
        if path not in self._files or path.startswith(b"/proc/"):
            try:
                found = os.stat(path)  # noqa: PTH116
            except OSError:
                self._files[path] = None
            else:
                self._files[path] = (os.major(found.st_dev), os.minor(found.st_dev), found.st_ino)
        return self._files[path]


def _look_closer(pid: int, suspicious: set[str]) -> OutdatedProcess | None:
    """Return what is outdated in a process, or None where a second look clears all of it."""
    with Memory(pid) as memory:
        maps = mappings(pid)
        loaded = modules(maps, memory)
        records, _ = find_records(maps, memory)
        active = [item for item in records if item.state is State.APPLIED or item.interrupted]
        files = []
        for module in loaded:
            if module.path in suspicious:
                found = _outdated(pid, module, memory, active)
                # A file system in layers shows another device number than stat(2); the same build there is the same
                # file.
                if module.deleted or found.state is not FileState.SAME_BUILD:
                    files.append(found)
    if not files:
        return None
    seen = status(pid)
    patches = tuple(item.contents.patch for item in active)
    return OutdatedProcess(pid, seen.name, seen.uid, unit_of(pid), tuple(files), patches)


def _outdated(pid: int, module: Module, memory: Memory, active: Sequence[Record]) -> OutdatedFile:
    path, on_disk = by_living_thread(pid, lambda tid: _build_on_disk(pid, tid, module, memory))
    if on_disk is None:
        return OutdatedFile(module.path, FileState.GONE, module.build_id, "", path)
    patched = any(
        item.contents.old.build_id == module.build_id and item.contents.new.build_id == on_disk for item in active
    )
    if not on_disk or not module.build_id:
        state = FileState.UNKNOWN
    elif on_disk == module.build_id:
        state = FileState.SAME_BUILD
    else:
        state = FileState.PATCHED if patched else FileState.NEW_BUILD
    return OutdatedFile(module.path, state, module.build_id, on_disk, path)


def _build_on_disk(pid: int, tid: int, module: Module, memory: Memory) -> tuple[str, str | None]:
    """The path of what has come in the place of a module's file, and its build-id; None for none, "" for one without.

    Raises OSError where the thread has ended.
    """
    path = successor(pid, tid, module, memory)
    try:
        with open_elf(Path(root_of(pid, tid) + path)) as file:
            for header in file.segments:
                if header.type == PT_NOTE and header.filesz <= _MAX_NOTES:
                    notes = file.read(header.offset, header.filesz)
                    found = build_id_in_notes(notes, 8 if header.align == 8 else 4)
                    if found:
                        return path, found
    except Refused:
        return path, ""
    except BadInput:
        return path, None
    return path, ""


def unit_of(pid: int) -> str:
    """Return the systemd unit of a process by its control group (``/proc/PID/cgroup``), or an empty string."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return next(_units_in(lines), "")


def _units_in(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        for part in reversed(line.split(":", 2)[-1].split("/")):
            if part.endswith(_UNITS):
                yield part


def _with_packages(found: Sequence[OutdatedProcess]) -> tuple[OutdatedProcess, ...]:
    known = owners({file.successor for process in found for file in process.files})
    return tuple(
        replace(process, files=tuple(replace(file, package=known.get(file.successor, "")) for file in process.files))
        for process in found
    )
