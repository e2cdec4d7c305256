"""How glibc hides program counters in a jmp_buf: PTR_MANGLE (sysdeps/unix/sysv/linux/x86_64/pointer_guard.h).

A pointer is combined with the pointer guard by exclusive or and rotated left by 17 bits.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

POINTER_GUARD: Final = 0x30
"""Offset from the thread pointer (fs_base) of the guard: ``header.pointer_guard`` of struct pthread (nptl/descr.h)."""

_ROTATION = 2 * 8 + 1
_TAG_MASK = np.uint64((1 << _ROTATION) - 1)
_LEFT, _RIGHT = np.uint64(64 - _ROTATION), np.uint64(_ROTATION)


def mangled(words: NDArray[np.uint64], guard: int) -> NDArray[np.intp]:
    """Indices of the words that may be mangled addresses of user space: shape (n,) -> (number of them,).

    Addresses are below 2^47, so their 17 highest bits are 0, and those of the guard show as the lowest.
    """
    return np.flatnonzero((words & _TAG_MASK) == np.uint64(guard >> (64 - _ROTATION)))


def unmangled(words: NDArray[np.uint64], guard: int) -> NDArray[np.uint64]:
    """The addresses that ``words`` are mangled from, of the same shape."""
    return ((words >> _RIGHT) | (words << _LEFT)) ^ np.uint64(guard)
