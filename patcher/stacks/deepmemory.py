"""All memory in which a stack may lie that no thread runs on: what is mapped writable, and was ever written to.

Pages that do not exist are not touched, since to read one would make it. So it is asked first which exist:
PAGEMAP_SCAN (ioctl on /proc/PID/pagemap, Documentation/admin-guide/mm/pagemap.rst; kernel commit 52526ca7fdb9,
v6.7), or on older kernels the 64 bits that the file has for each page.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elfdiff.errors import LivegraftError, NotPermitted

from .. import seam
from ..closing import Closing
from ..process.proc import Mapping, by_living_thread, living_thread, mapping_over, mappings, no_such_process
from .stackmemory import process_vm_readv

_PAGE = 4096
_CHUNK = 1 << 19  # bytes: what is read is looked at while it is in the processor's cache
_IOV_MAX = 1024  # UIO_MAXIOV, include/uapi/linux/uio.h
LEAD = 64
"""Words before each chunk that are those before it in the process, so that what belongs together is seen together."""

# struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, category_mask,
# category_anyof_mask, return_mask; struct page_region: start, end, categories (include/uapi/linux/fs.h).
_SCAN_ARG = struct.Struct("<12Q")
_PAGEMAP_SCAN = 3 << 30 | _SCAN_ARG.size << 16 | ord("f") << 8 | 16
_WALK_END = 4 * 8
_FILE, _PRESENT, _SWAPPED, _PFNZERO = 1 << 2, 1 << 3, 1 << 4, 1 << 5
_REGION_WORDS = 3
_REGIONS = 1 << 14  # in one call
_PAGEMAP_BATCH = 1 << 20  # pages
# Bits of an entry of /proc/PID/pagemap.
_ENTRY_FILE, _ENTRY_SWAPPED, _ENTRY_PRESENT = np.uint64(1 << 61), np.uint64(1 << 62), np.uint64(1 << 63)

_SHARED_MEMORY = ("/dev/zero", "/memfd:", "/dev/shm/", "/SYSV", "/dev/hugepages/", "/anon_hugepage")

_RAMP = np.arange(0, _CHUNK, 8, dtype=np.uint64)
_Runs = NDArray[np.uint64]


def may_hold_stacks(mapping: Mapping) -> bool:
    """Whether a stack may be there: it is writable, and its memory is the process's own or shared memory.

    Shared mappings of files on a disk and of devices are not looked at.
    """
    return mapping.writable and (mapping.private or mapping.path.startswith(_SHARED_MEMORY))


@dataclass(frozen=True, slots=True)
class Survey:
    """What there is to look at: ``runs`` has shape (n, 2), the start and end of each run of pages, rising.

    ``maps`` are all mappings of the process at that moment.
    """

    maps: tuple[Mapping, ...]
    runs: _Runs

    @property
    def size(self) -> int:
        """Bytes of all runs."""
        return int((self.runs[:, 1] - self.runs[:, 0]).sum())

    def mapping(self, address: int) -> Mapping | None:
        """The mapping that holds an address."""
        return mapping_over(self.maps, address, 1)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of memory; ``words`` are valid until the next one.

    ``lead`` are the same words with ``LEAD`` more before them. ``pieces`` has shape (n, 2): the index of the first
    word of each piece, and its address.
    """

    words: NDArray[np.uint64]
    lead: NDArray[np.uint64]
    pieces: _Runs

    def addresses(self, indices: NDArray[np.intp]) -> NDArray[np.uint64]:
        """The addresses of words."""
        at = np.searchsorted(self.pieces[:, 0], indices.astype(np.uint64), side="right") - 1
        inside = indices.astype(np.uint64) - self.pieces[at, 0]
        return np.asarray(self.pieces[at, 1] + np.uint64(8) * inside, dtype=np.uint64)


    def every_address(self) -> NDArray[np.uint64]:
        """The address of every word."""
        first = self.pieces[:, 0].astype(np.intp)
        counts = np.diff(first, append=len(self.words))
        begins = self.pieces[:, 1] - np.uint64(8) * self.pieces[:, 0]
        return np.asarray(np.repeat(begins, counts) + _RAMP[: len(self.words)], dtype=np.uint64)


class DeepMemory(Closing):
    """The memory of one process in which stacks may lie; a context manager."""

    def __init__(self, pid: int, *, may_scan: bool = True) -> None:
        """``may_scan`` false does as on kernels before 6.7. Raises BadInput (no such process), NotPermitted."""
        self._pid = pid
        self._may_scan = may_scan
        self._buffer = np.zeros(LEAD + _CHUNK // 8, dtype=np.uint64)
        self._regions = np.zeros((_REGIONS, _REGION_WORDS), dtype=np.uint64)
        self._descriptor = -1
        self._descriptor = by_living_thread(pid, lambda tid: _open_pagemap(pid, tid))

    def close(self) -> None:
        """Close the descriptor. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def survey(self) -> Survey:
        """What there is to look at now. Raises LivegraftError, NotPermitted."""
        maps = mappings(self._pid)
        found = [self._existing(mapping) for mapping in maps if may_hold_stacks(mapping)]
        runs = np.concatenate(found) if found else np.zeros((0, 2), np.uint64)
        return Survey(maps, _joined(runs))

    # --- which pages exist ---

    def _existing(self, mapping: Mapping) -> _Runs:
        if self._may_scan:
            found = self._scan(mapping)
            if found is not None:
                return found
            self._may_scan = False  # an older kernel
        return self._listed(mapping)

    def _scan(self, mapping: Mapping) -> _Runs | None:
        """Start and end of the runs of pages that exist; None where the kernel has no such call."""
        # In a private mapping what still is the file's holds no stack, and neither does a page of zeros.
        inverted = _FILE | _PFNZERO if mapping.private else 0
        found = []
        start = mapping.start
        while start < mapping.end:
            vector = self._regions.ctypes.data
            argument = bytearray(
                _SCAN_ARG.pack(
                    _SCAN_ARG.size, 0, start, mapping.end, 0, vector, _REGIONS, 0,
                    inverted, inverted, _PRESENT | _SWAPPED, _PRESENT | _SWAPPED,
                )
            )  # fmt: skip
            try:
                _announced(self._pid)
                count = fcntl.ioctl(self._descriptor, _PAGEMAP_SCAN, argument, True)
            except OSError as error:
                if error.errno in (errno.ENOTTY, errno.EINVAL):
                    return None
                raise _unknown_pages(self._pid, error) from error
            found.append(self._regions[:count, :2].copy())
            (start,) = struct.unpack_from("<Q", argument, _WALK_END)
        return np.concatenate(found)

    def _listed(self, mapping: Mapping) -> _Runs:
        found = []
        for start in range(mapping.start, mapping.end, _PAGEMAP_BATCH * _PAGE):
            count = (min(mapping.end, start + _PAGEMAP_BATCH * _PAGE) - start) // _PAGE
            try:
                _announced(self._pid)
                data = os.pread(self._descriptor, 8 * count, start // _PAGE * 8)
            except OSError as error:
                raise _unknown_pages(self._pid, error) from error
            if len(data) != 8 * count:
                raise _unknown_pages(self._pid, OSError(errno.EIO, "the file ends early"))
            entries = np.frombuffer(data, dtype=np.uint64)
            exists = (entries & (_ENTRY_PRESENT | _ENTRY_SWAPPED)) != 0
            if mapping.private:
                exists &= (entries & _ENTRY_FILE) == 0
            edges = np.flatnonzero(np.diff(exists.astype(np.int8), prepend=0, append=0))
            found.append((edges.astype(np.uint64) * np.uint64(_PAGE) + np.uint64(start)).reshape(-1, 2))
        return np.concatenate(found)

    # --- what is in them ---

    def chunks(self, survey: Survey) -> Iterator[Chunk]:
        """All memory of a survey, piece by piece. The process is stopped since the survey.

        Raises LivegraftError where it cannot be read, NotPermitted.
        """
        self._buffer[:LEAD] = 0
        for pieces in _cut(survey.runs):
            count = int(pieces[:, 1].sum()) // 8
            words = self._buffer[LEAD : LEAD + count]
            self._read(pieces, words)
            firsts = (np.cumsum(pieces[:, 1]) - pieces[:, 1]) // np.uint64(8)
            lead = self._buffer[: LEAD + count]
            yield Chunk(words, lead, np.stack([firsts, pieces[:, 0]], axis=1))
            self._buffer[:LEAD] = lead[-LEAD:].copy()

    def _read(self, pieces: _Runs, words: NDArray[np.uint64]) -> None:
        position = 0
        for first in range(0, len(pieces), _IOV_MAX):
            batch = np.ascontiguousarray(pieces[first : first + _IOV_MAX])
            size = int(batch[:, 1].sum()) // 8
            self._read_batch(batch, words[position : position + size])
            position += size

    def _read_batch(self, batch: _Runs, into: NDArray[np.uint64]) -> None:
        local = np.array([into.ctypes.data, into.nbytes], dtype=np.uint64)
        number = seam.announce("READV", self._pid)
        if not number:
            # By whatever thread lives: it is stopped, and goes on living.
            tid = living_thread(self._pid)
            got = process_vm_readv()(tid, local.ctypes.data, 1, batch.ctypes.data, len(batch), 0)
            if got == into.nbytes:
                return
            number = ctypes.get_errno() if got < 0 else errno.EFAULT
        if number == errno.ESRCH:
            raise no_such_process(self._pid)
        kind = NotPermitted if number == errno.EPERM else LivegraftError
        raise kind(f"memory of process {self._pid} could not be read", why=os.strerror(number))


def _announced(pid: int) -> None:
    failure = seam.announce("PAGES", pid)
    if failure:
        raise OSError(failure, os.strerror(failure))


def _open_pagemap(pid: int, tid: int) -> int:
    try:
        _announced(pid)
        return os.open(f"/proc/{pid}/task/{tid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise no_such_process(pid) from error
    except PermissionError as error:
        raise NotPermitted(
            f"/proc/{pid}/pagemap may not be read",
            why=f"the kernel answered {error.strerror}; this is user {os.geteuid()}",
            next_step="run as the owner of the process with ptrace rights, or as root",
        ) from error
    except OSError as error:
        raise _unknown_pages(pid, error) from error


def _unknown_pages(pid: int, error: OSError) -> LivegraftError:
    if error.errno == errno.ESRCH:
        return no_such_process(pid)
    return LivegraftError(f"which pages of process {pid} exist is not known", why=error.strerror or str(error))


def _joined(runs: _Runs) -> _Runs:
    """Runs that touch each other made one."""
    if not len(runs):
        return runs
    apart = runs[1:, 0] != runs[:-1, 1]
    starts = runs[np.concatenate([[True], apart]), 0]
    ends = runs[np.concatenate([apart, [True]]), 1]
    return np.stack([starts, ends], axis=1)


def _cut(runs: _Runs) -> Iterator[_Runs]:
    """(address, size) of pieces that together make a chunk, chunk by chunk."""
    sizes = runs[:, 1] - runs[:, 0]
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    begins = ends - sizes
    cuts = np.union1d(begins, np.arange(0, total, _CHUNK, dtype=np.uint64)).astype(np.uint64)
    owner = np.searchsorted(begins, cuts, side="right") - 1
    addresses = runs[owner, 0] + (cuts - begins[owner])
    lengths = np.diff(cuts, append=np.uint64(total))
    pieces = np.stack([addresses, lengths], axis=1)
    limits = np.searchsorted(cuts, np.arange(0, total, _CHUNK, dtype=np.uint64)).tolist()
    for first, last in zip(limits, [*limits[1:], len(cuts)], strict=True):
        yield pieces[first:last]
