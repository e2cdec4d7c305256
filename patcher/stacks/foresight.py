"""What stacks of a process that runs lead through: read beforehand, so that less is left to do in the pause.

Nothing is concluded from it, so what cannot be seen is left out: a thread that waits in the kernel shows its stack
pointer (proc(5), ``syscall``), one that runs does not, and one may end, and take its stack along, between two looks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elfdiff.errors import BadInput, LivegraftError, NotPermitted

from ..process.memory import Memory
from ..process.proc import mapping_over, mappings, read_proc_file, thread_ids

_MAX_THREADS = 512
_MAX_STACK = 32 << 10  # bytes of one stack, from its stack pointer


def words_on_stacks(memory: Memory) -> NDArray[np.uint64]:
    """Program counters and words on the stacks of threads that wait just now; shape (n,), in no order.

    A program counter is given as if it were a return address: one more. Raises BadInput (no such process),
    NotPermitted.
    """
    maps = mappings(memory.pid)
    counters: list[int] = []
    runs: list[tuple[int, int]] = []
    for tid in thread_ids(memory.pid)[:_MAX_THREADS]:
        found = _waiting(memory.pid, tid)
        if found is None:
            continue
        pointer, counter = found[0] & ~7, found[1]
        counters.append(counter + 1)
        mapping = mapping_over(maps, pointer, 8)
        if mapping is not None:
            runs.append((pointer, min(mapping.end - pointer, _MAX_STACK)))
    stacks = [np.frombuffer(data, dtype="<u8") for data in _read(memory, runs)]
    return np.concatenate([np.array(counters, dtype=np.uint64), *stacks])


def _waiting(pid: int, tid: int) -> tuple[int, int] | None:
    """(stack pointer, program counter) of a thread in a system call, None of any other."""
    try:
        words = read_proc_file(pid, f"task/{tid}/syscall").split()
    except (BadInput, NotPermitted):
        return None
    return (int(words[-2], 16), int(words[-1], 16)) if len(words) > 2 else None  # else: "running"


def _read(memory: Memory, runs: list[tuple[int, int]]) -> list[bytes]:
    try:
        return memory.read_many(runs)
    except NotPermitted:
        raise
    except LivegraftError:
        return []  # one of the stacks is gone
