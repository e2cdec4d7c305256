"""Putting a bound patch into a process, and taking it out again, by system calls that the process makes
itself.

Code goes into a memory file: written through the process's own descriptor, sealed, then mapped with the
protection of each segment, so that no page is ever writable and executable (MemoryDenyWriteExecute,
systemd.exec(5)) and no file system of the target is needed. Where memory files cannot be made or executed
(``vm.memfd_noexec``, a full descriptor table), anonymous mappings are made with their final protection and
filled from outside.

The record is mapped first. If this process dies in between, what was mapped can be told by it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elfdiff.errors import LivegraftError

from .. import seam
from ..planning.binding import BoundSegment
from ..process.memory import Memory
from ..process.modules import PF_R, PF_W, PF_X
from ..process.proc import MEMFD_PATH
from .calls import (
    MAP_ANONYMOUS,
    MAP_FIXED_NOREPLACE,
    MAP_PRIVATE,
    MFD_ALLOW_SEALING,
    MFD_CLOEXEC,
    MFD_EXEC,
    RemoteCaller,
    RemoteCallError,
)
from .descriptors import Descriptor, shared_with

_PROTECTIONS = {PF_R: 1, PF_W: 2, PF_X: 4}  # PROT_*, mman.h
_RECORD_FLAGS = PF_R | PF_W
_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # F_SEAL_SEAL, SHRINK, GROW, WRITE, linux/fcntl.h
_F_ADD_SEALS = 1033
_NO_MEMORY_FILE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOSYS, errno.EPERM, errno.EACCES})
_NOT_EXECUTABLE = frozenset({errno.EPERM, errno.EACCES})


class PlaceTaken(LivegraftError):
    """The program has mapped something there since the place was chosen; nothing of ours is left there."""


@dataclass(frozen=True, slots=True)
class Image:
    """What is to be mapped: the record, if its bytes are any, and the segments at their absolute addresses."""

    record: int
    record_bytes: bytes
    segments: tuple[BoundSegment, ...]

    @property
    def parts(self) -> tuple[BoundSegment, ...]:
        """All mappings, the record first."""
        record = (BoundSegment(self.record, _RECORD_FLAGS, self.record_bytes),) if self.record_bytes else ()
        return (*record, *self.segments)


def make_memory_file(caller: RemoteCaller) -> Descriptor | None:
    """Make an empty memory file in the target; return its descriptor there, and the threads that have it.

    None where the target cannot have one (no descriptor free, forbidden, kernel before 3.17): anonymous
    mappings are the way then. Raises LivegraftError for anything else.
    """
    flags = MFD_CLOEXEC | MFD_ALLOW_SEALING
    # Kernels before 6.3 do not know MFD_EXEC and answer EINVAL.
    for attempt in (flags | MFD_EXEC, flags):
        try:
            number = caller.memfd_create(attempt)
            return Descriptor(number, shared_with(caller.pid, caller.tid))
        except RemoteCallError as error:
            if error.errno in _NO_MEMORY_FILE:
                return None
            if error.errno != errno.EINVAL or attempt == flags:
                raise
    return None


def fill_memory_file(pid: int, file: Descriptor, image: Image) -> None:
    """Write all parts of ``image`` to the empty memory file that is ``file`` in process ``pid``, and seal it.

    The target takes no part in this. Raises LivegraftError.
    """
    try:
        _announce("OPEN", pid)
        descriptor = _open_empty(pid, file)
        try:
            for part in image.parts:
                _announce("FILL", pid)
                _write_all(descriptor, part.data)
            _announce("SEAL", pid)
            fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEALS)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise LivegraftError("the patch could not be written to a memory file", why=str(error)) from error


def _open_empty(pid: int, file: Descriptor) -> int:
    # The program may have closed it and opened another: that must not be written to.
    paths = [Path(f"/proc/{pid}/task/{tid}/fd/{file.number}") for tid in sorted(file.threads)]
    path = next((path for path in paths if path.is_symlink()), None)
    if path is None:
        raise FileNotFoundError(errno.ENOENT, f"descriptor {file.number} has been closed meanwhile")
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    name = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
    if name.removesuffix(" (deleted)") != MEMFD_PATH or os.fstat(descriptor).st_size:
        os.close(descriptor)
        raise FileExistsError(errno.EEXIST, f"descriptor {file.number} is another file by now ({name})")
    return descriptor


def _announce(name: str, pid: int) -> None:
    failure = seam.announce(name, pid)
    if failure:
        raise OSError(failure, os.strerror(failure))


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def map_image(caller: RemoteCaller, memory: Memory, image: Image, descriptor: int | None) -> None:
    """Map all parts at their addresses, from the memory file or, with None, as anonymous memory.

    The caller must borrow only threads that have the descriptor.

    All or nothing: on any error what was mapped is unmapped again, or left to be swept where it is not known which
    mappings were made: the record tells. Raises PlaceTaken where something is there already, RemoteCallError.
    """
    mapped: list[tuple[int, int]] = []
    offset = 0
    answered = True
    try:
        for part in image.parts:
            answered = False
            _map_part(caller, part, descriptor, offset)
            answered = True
            mapped.append((part.start, len(part.data)))
            offset += len(part.data)
            if descriptor is None:
                _fill_anonymous(memory, part)
    except BaseException as error:
        if not answered and not isinstance(error, (RemoteCallError, PlaceTaken)):
            raise
        try:
            unmap(caller, tuple(reversed(mapped)))
        except LivegraftError as failure:
            if isinstance(error, PlaceTaken):
                raise  # no other place is to be tried while something of ours is at this one
            error.add_note(f"what was mapped could not be unmapped at once: {failure.what}: {failure.why}")
        raise


def _map_part(caller: RemoteCaller, part: BoundSegment, descriptor: int | None, offset: int) -> None:
    flags = MAP_PRIVATE | MAP_FIXED_NOREPLACE | (MAP_ANONYMOUS if descriptor is None else 0)
    protection = sum(value for bit, value in _PROTECTIONS.items() if part.flags & bit)
    size = len(part.data)
    where = 0 if descriptor is None else offset
    try:
        got = caller.mmap(part.start, size, protection, flags, -1 if descriptor is None else descriptor, where)
    except RemoteCallError as error:
        if error.errno == errno.EEXIST:
            raise PlaceTaken(f"something is mapped at {part.start:#x} already") from error
        raise
    if got != part.start:
        # Kernels before 4.17 take the address as a hint.
        caller.munmap(got, size)
        raise PlaceTaken(f"the kernel did not map at {part.start:#x} but at {got:#x}")


def _fill_anonymous(memory: Memory, part: BoundSegment) -> None:
    # The first word last: without its magic a record that is half written is none.
    memory.write(part.start + 8, part.data[8:])
    memory.write(part.start, part.data[:8])


def may_not_be_executed(error: RemoteCallError) -> bool:
    """Whether mapping failed because this memory file may not be executed (``vm.memfd_noexec``, a policy)."""
    return error.errno in _NOT_EXECUTABLE


def unmap(caller: RemoteCaller, spans: Sequence[tuple[int, int]]) -> None:
    """Unmap (start, size) ranges of ours, in order; the record's should be the last."""
    for start, size in spans:
        caller.munmap(start, size)
