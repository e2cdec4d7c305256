"""What the pause does for every thread, done for all of them by one call of C (``batch.c``), and whole pauses.

Optional, and only shorter: where the library was not built, or LIVEGRAFT_PURE is set, the callers do the same in
Python, one thread after the other. So they do while somebody observes the seam, who must be told of every single
operation.
"""

from __future__ import annotations

import ctypes
import functools
import os
from array import array
from collections.abc import Callable, Sequence
from enum import IntEnum
from importlib.util import find_spec
from typing import Any

from .. import seam

ABI = 4
"""Version of what ``batch.c`` exports; a library that says another one is not used."""

Failures = list[tuple[int, int]]
"""(thread id, errno) of each thread that a request failed for."""

_PURE = "LIVEGRAFT_PURE"


class Filter(ctypes.Structure):
    """``struct filter`` of batch.c: addresses of arrays, and their lengths."""

    _fields_ = (
        ("starts", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("harmless", ctypes.c_void_p),
        ("ranges", ctypes.c_int64),
        ("lows", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("clusters", ctypes.c_int64),
        ("restorers", ctypes.c_void_p),
        ("restorer_count", ctypes.c_int64),
        ("restorer_size", ctypes.c_uint64),
    )


class Stacks(ctypes.Structure):
    """``struct stacks`` of batch.c."""

    _fields_ = (
        ("pid", ctypes.c_int),
        ("maps", ctypes.c_int),
        ("filter", Filter),
        ("max_stack", ctypes.c_uint64),
        ("max_stacks", ctypes.c_uint64),
        ("start_stack", ctypes.c_uint64),
        ("words", ctypes.c_void_p),
        ("room", ctypes.c_size_t),
        ("scanned", ctypes.c_uint64),
        ("strays", ctypes.c_int64),
    )


class Range(ctypes.Structure):
    """``struct range`` of batch.c."""

    _fields_ = (("address", ctypes.c_uint64), ("size", ctypes.c_uint64), ("bytes", ctypes.c_void_p))


class WholePause(ctypes.Structure):
    """``struct pause`` of batch.c."""

    _fields_ = (
        ("stacks", ctypes.c_void_p),
        ("tids", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("last", ctypes.c_int32),
        ("task", ctypes.c_int32),
        ("status", ctypes.c_int32),
        ("statm", ctypes.c_int32),
        ("memory", ctypes.c_int32),
        ("code_size", ctypes.c_char_p),
        ("mapped", ctypes.c_uint64 * 2),
        ("own_stacks", ctypes.c_int32),
        ("call_count", ctypes.c_int32),
        ("calls", ctypes.c_void_p),
        ("expected", ctypes.c_void_p),
        ("expected_count", ctypes.c_int64),
        ("writes", ctypes.c_void_p),
        ("write_count", ctypes.c_int64),
        ("patience", ctypes.c_uint64),
        ("registers", ctypes.c_void_p),
        ("statuses", ctypes.c_void_p),
        ("failures", ctypes.c_void_p),
        ("signals", ctypes.c_void_p),
        ("odd", ctypes.c_void_p),
        ("written", ctypes.c_int64),
        ("began", ctypes.c_uint64),
        ("ended", ctypes.c_uint64),
    )


class Step(IntEnum):
    """``enum step`` of batch.c: before or in which step a pause was left to Python."""

    DONE = 0
    INTERRUPT = 1
    WAIT = 2
    THREADS = 3
    REGISTERS = 4
    STACKS = 5
    CODE = 6
    COMPARE = 7
    WRITE = 8


class Call(IntEnum):
    """``enum call`` of batch.c: what is done with a system call that says EINTR."""

    LEAVE = 0
    REPAIR = 1
    ASK = 2


class Batch:
    """The library. Every function must be called by the thread that is the tracer."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Take the functions of an opened library."""
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        self.source = _function(library, "batch_source", ctypes.c_char_p)().decode()
        self._interrupt = _function(library, "interrupt", integer, pointer, integer, pointer)
        self._registers = _function(library, "registers", integer, pointer, integer, pointer, pointer)
        self._detach = _function(library, "detach", integer, pointer, pointer, integer, pointer)
        self._wait = _function(library, "wait", integer, pointer, integer, pointer)
        self._mapped = _function(library, "mapped", integer, integer, pointer)
        self._pause = _function(library, "pause", integer, pointer)
        self._sift = _function(library, "sift", integer, pointer, pointer, pointer, integer, pointer)
        self.scan = _function(library, "scan", integer, pointer, pointer, ctypes.c_size_t)
        """(Filter, address of words, their number): 1 where any of the words matters."""
        self.disturb = _function(library, "disturb", ctypes.c_long, ctypes.c_long, integer)
        """For tests: (n, errno) makes the n-th operation from now on fail, or kills this process before it (errno 0).

        Returns how many operations were still to come until the last one that was asked for, 0 if it has been made."""

    def sift(self, stacks: Stacks, tids: Sequence[int], registers: int, odd: int) -> int:
        """As ``livegraft_sift`` of batch.c; ``registers`` and ``odd`` are addresses. Returns an errno, or 0."""
        numbers = array("i", tids)
        return int(self._sift(ctypes.byref(stacks), _address(numbers), registers, len(numbers), odd))

    def mapped(self, statm: int) -> tuple[int, int]:
        """The pages that are mapped, and those of data and stacks, by a descriptor of ``/proc/PID/statm``.

        (0, 0), which no process has, where they cannot be read.
        """
        counts = array("Q", (0, 0))
        return (counts[0], counts[1]) if self._mapped(statm, _address(counts)) == 0 else (0, 0)

    def pause(self, pause: WholePause) -> Step:
        """As ``livegraft_pause`` of batch.c."""
        return Step(self._pause(ctypes.byref(pause)))

    def interrupt(self, tids: Sequence[int]) -> Failures:
        """PTRACE_INTERRUPT of every thread."""
        numbers, failures = array("i", tids), array("i", bytes(4 * len(tids)))
        failed = self._interrupt(_address(numbers), len(numbers), _address(failures))
        return _failures(tids, failures) if failed else []

    def registers(self, tids: Sequence[int], registers: int) -> Failures:
        """PTRACE_GETREGS of every thread, into an array of ``struct user_regs_struct`` at an address."""
        numbers, failures = array("i", tids), array("i", bytes(4 * len(tids)))
        failed = self._registers(_address(numbers), len(numbers), registers, _address(failures))
        return _failures(tids, failures) if failed else []

    def detach(self, tids: Sequence[int], signals: Sequence[int]) -> Failures:
        """PTRACE_DETACH of every thread with its signal, 0 for none."""
        numbers, failures = array("i", tids), array("i", bytes(4 * len(tids)))
        delivered = array("i", signals)
        failed = self._detach(_address(numbers), _address(delivered), len(numbers), _address(failures))
        return _failures(tids, failures) if failed else []

    def wait(self, tids: Sequence[int]) -> list[int]:
        """Wait for threads in this order until a signal comes; return the statuses of those waited for.

        A status is what waitpid(2) gives of a stop, 0 for a thread that has exited, -1 for one that is no tracee any
        more.
        """
        numbers, statuses = array("i", tids), array("i", bytes(4 * len(tids)))
        done = self._wait(_address(numbers), len(numbers), _address(statuses))
        return statuses[:done].tolist()


def _function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = library[f"livegraft_{name}"]
    function.restype = result
    function.argtypes = arguments
    return function


def _address(numbers: array[Any]) -> int:
    return numbers.buffer_info()[0]


def _failures(tids: Sequence[int], failures: array[int]) -> Failures:
    return [(tid, number) for tid, number in zip(tids, failures, strict=True) if number]


@functools.cache
def _library() -> tuple[Batch | None, str]:
    """The library, or None and why it is not used."""
    spec = find_spec("patcher.threads._batch")
    if spec is None or spec.origin is None:
        return None, "not built"
    try:
        library = ctypes.CDLL(spec.origin)
        found = _function(library, "batch_abi", ctypes.c_int)()
    except (OSError, AttributeError) as error:
        return None, f"cannot be opened: {error}"
    if found != ABI:
        return None, f"stale: built for version {found}, wanted is {ABI}"
    return Batch(library), ""


def active() -> Batch | None:
    """The library; None where Python is to do its work."""
    if seam.observed() or os.environ.get(_PURE):
        return None
    return _library()[0]


def description() -> str:
    """What shortens the pause, in words: ``C``, or ``Python`` and why."""
    if os.environ.get(_PURE):
        return f"Python ({_PURE} is set)"
    library, why = _library()
    return "C" if library else f"Python (the C library is {why})"
