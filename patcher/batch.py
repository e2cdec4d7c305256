"""What the pause does for every thread, done for all of them by one call of C (``batch.c``).

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
from importlib.util import find_spec
from typing import Any

from . import seam

ABI = 2
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
        self.scan = _function(library, "scan", integer, pointer, pointer, ctypes.c_size_t)
        """(Filter, address of words, their number): 1 where any of the words matters."""
        self.sift = _function(
            library, "sift", integer, integer, integer, pointer, integer, pointer, ctypes.c_uint64, ctypes.c_uint64,
            pointer, ctypes.c_size_t, pointer, pointer,
        )  # fmt: skip
        """As ``livegraft_sift`` of batch.c; all pointers are addresses. Returns an errno, or 0."""

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

        A status is what waitpid(2) gives, or -1 for a thread that is no tracee any more.
        """
        numbers, statuses = array("i", tids), array("i", bytes(4 * len(tids)))
        done = self._wait(_address(numbers), len(numbers), _address(statuses))
        return statuses[:done].tolist()


def _function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = library[f"livegraft_{name}"]
    function.restype = result
    function.argtypes = arguments
    return function


def _address(numbers: array[int]) -> int:
    return numbers.buffer_info()[0]


def _failures(tids: Sequence[int], failures: array[int]) -> Failures:
    return [(tid, number) for tid, number in zip(tids, failures, strict=True) if number]


@functools.cache
def _library() -> tuple[Batch | None, str]:
    """The library, or None and why it is not used."""
    spec = find_spec("patcher._batch")
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
