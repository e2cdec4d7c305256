"""The two files of an upgrade, held open: the one that a process has mapped, and the one that came in its place.

Both are read through descriptors, so that a path cannot mean another file halfway. Whether the new one was replaced or
written to meanwhile is asked at the end.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from elfdiff.errors import LivegraftError, NotPermitted, Refused

from .modules import Module
from .proc import by_living_thread, read_proc_file, status
from .successors import has_our_mounts

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # to open a FIFO would wait for whoever writes to it
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class HeldFile:
    """An open file. ``stamp`` is another when it was written to or replaced; ``digest`` is SHA-256 in hex."""

    path: str
    descriptor: int
    stamp: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class FilePair:
    """What process ``pid`` has mapped, and what lies at its path now."""

    pid: int
    old: HeldFile
    new: HeldFile


@contextmanager
def held_files(pid: int, module: Module, successor: str) -> Iterator[FilePair]:
    """Open the file of a module and the one at the path ``successor`` for the time of a ``with``.

    Raises BadInput (no such process), NotPermitted, Refused (no file is at the path, or one that somebody with fewer
    rights than the process could have put there), LivegraftError.
    """
    with ExitStack() as open_files:
        old = by_living_thread(pid, lambda tid: open_mapped(pid, tid, module))
        open_files.callback(os.close, old)
        new = by_living_thread(pid, lambda tid: _open_on_disk(pid, tid, successor))
        open_files.callback(os.close, new)
        _require_trustworthy(pid, successor, os.fstat(new))
        yield FilePair(pid, _held(module.path, old), _held(successor, new))


def _held(path: str, descriptor: int) -> HeldFile:
    # The stamp first: what is written while the digest is made shows in the next stamp.
    return HeldFile(path, descriptor, _stamp(os.fstat(descriptor)), _digest(descriptor))


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest(descriptor: int) -> str:
    with open(descriptor, "rb", closefd=False) as stream:
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_mapped(pid: int, tid: int, module: Module) -> int:
    """Open the very file that is mapped, deleted or not (proc(5), map_files; the executable also by exe)."""
    mapping = module.mappings[0]
    names = (f"/proc/{tid}/map_files/{mapping.start:x}-{mapping.end:x}", f"/proc/{pid}/task/{tid}/exe")
    refusal: OSError | None = None
    for name in names:
        try:
            descriptor = os.open(name, _FLAGS)
        except OSError as error:  # map_files is root's; exe is the owner's, too
            refusal = refusal or error
            continue
        if os.fstat(descriptor).st_ino == mapping.inode:
            return descriptor
        os.close(descriptor)
    what = f"the file that process {pid} has mapped as {module.path} could not be opened"
    if isinstance(refusal, PermissionError):
        raise NotPermitted(what, why=f"map_files: {refusal.strerror}", next_step="run it as root")
    why = f"map_files: {refusal.strerror}" if refusal else "the mapping has become another"
    raise LivegraftError(what, why=why, next_step="try again")


def _open_on_disk(pid: int, tid: int, path: str) -> int:
    try:
        if has_our_mounts(pid, tid):  # then a path in /proc/PID/maps is told from our root, also in a chroot
            descriptor = os.open(path, _FLAGS)
        else:
            descriptor = _open_below(f"/proc/{pid}/task/{tid}/root", path)
    except OSError as error:
        raise Refused(
            f"there is no file {path} that it could be upgraded to",
            why=f"as process {pid} sees it: {error.strerror}",
            next_step="install the new build",
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Refused(f"{path} is no regular file", why="a build is one", next_step="install the new build")
    return descriptor


def _open_below(root: str, path: str) -> int:
    """Open a file in another mount namespace. A symbolic link there would lead into our file systems: none is followed.

    What the kernel shows as mapped is a path without links.
    """
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    *parents, name = [part for part in path.split("/") if part]
    for part in parents:
        try:
            below = os.open(part, _FOLDER, dir_fd=folder)
        finally:
            os.close(folder)
        folder = below
    try:
        return os.open(name, _FLAGS | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        os.close(folder)


def _require_trustworthy(pid: int, path: str, found: os.stat_result) -> None:
    """Its code will run with the rights of the process: whoever could have written it must have had them, too."""
    owners = {0, status(pid).uid, _root_of_namespace(pid)}
    if found.st_uid in owners and not found.st_mode & 0o022:
        return
    raise Refused(
        f"{path} could have been written by others than the user of process {pid}",
        why=f"user {found.st_uid} owns it, its mode is {stat.S_IMODE(found.st_mode):#o}",
        next_step=f"if it is what it should be: chown and chmod go-w {path}",
    )


def _root_of_namespace(pid: int) -> int:
    """The user that is root in the user namespace of a process (user_namespaces(7)), as we number users."""
    for line in read_proc_file(pid, "uid_map").splitlines():
        inside, outside, _ = map(int, line.split())
        if inside == 0:
            return outside
    return 0


@contextmanager
def as_paths(pair: FilePair) -> Iterator[tuple[Path, Path]]:
    """Give both files paths for who reads them, with their own name, for the time of a ``with``."""
    with ExitStack() as made:
        paths = []
        try:
            folder = made.enter_context(tempfile.TemporaryDirectory(prefix="livegraft-"))
            for side, file in (("old", pair.old), ("new", pair.new)):
                path = Path(folder, side, Path(file.path).name)
                path.parent.mkdir()
                path.symlink_to(f"/proc/{os.getpid()}/fd/{file.descriptor}")
                paths.append(path)
        except OSError as error:
            hint = "name a folder that you may write to by TMPDIR"
            raise LivegraftError("no temporary folder could be made", why=str(error), next_step=hint) from error
        yield paths[0], paths[1]


def require_unchanged(pair: FilePair) -> None:
    """Raise LivegraftError where one of the files was written to since it was opened, or the new one replaced."""
    for file in (pair.old, pair.new):
        if _stamp(os.fstat(file.descriptor)) != file.stamp and _digest(file.descriptor) != file.digest:
            raise _being_replaced(file.path, "its content is another than at the beginning")
    try:
        now = by_living_thread(pair.pid, lambda tid: _open_on_disk(pair.pid, tid, pair.new.path))
    except Refused as error:
        raise _being_replaced(pair.new.path, error.why) from error
    try:
        same = _stamp(os.fstat(now))[:2] == pair.new.stamp[:2]
    finally:
        os.close(now)
    if not same:
        raise _being_replaced(pair.new.path, "another file lies there than at the beginning")


def _being_replaced(path: str, why: str) -> LivegraftError:
    return LivegraftError(
        f"{path} was replaced while it was compared", why=why, next_step="wait until the upgrade is over, and try again"
    )
