"""Whether the system-call filters of a process may kill it for what new code calls.

A filter (seccomp(2)) is that of the build that has set it up, and nobody can take it away. New code that imports what
the old build does not may make system calls that it never made: where one of its threads may be killed for such a call,
the patch is refused. Which calls a function of a library makes nobody can tell.

The filters are read in short stops of their own, outside of the pause, in which nothing else is done. What new code
calls through old imports is not asked for.
"""

from __future__ import annotations

import ctypes
import errno
import time
from collections.abc import Mapping, Sequence

from elfdiff.errors import Busy
from elfdiff.findingcodes import NEW_IMPORT

from ..planning.binding import Binding
from ..process import obstacles, surroundings
from ..process.filterprogram_x86_64 import killing_action
from ..process.obstacles import Obstacle
from ..process.proc import SECCOMP_FILTER, SECCOMP_STRICT, mapping_over
from ..targets.target import Snapshot
from ..threads import ptrace, tracees
from ..threads.ptrace import PtraceFailed
from ..threads.stopping import seize

_REST = 0.02  # seconds between two stops
_LONGEST_LOOK = 5e-4  # seconds in one stop, for one thread more


def require_calls_pass(bindings: Sequence[Binding], seen: Snapshot, timeout: float) -> None:
    """Refuse patches that import functions which the old build does not, where a filter may kill for what these call.

    Stops the process for a moment where it imports such functions, is under a filter, and the finding was not lifted;
    changes nothing. ``timeout``: seconds for all threads to stop. Raises Refused, NotPermitted (the filters cannot be
    read), Busy (a thread does not stop), and what ``seize`` and ``stop`` raise.
    """
    imports = tuple(dict.fromkeys(name for binding in bindings for name in _new_functions(binding, seen)))
    found = _obstacle(seen.pid, seen.name, imports, time.monotonic() + timeout) if imports else None
    if found is not None:
        raise found.as_error()


def _new_functions(binding: Binding, seen: Snapshot) -> list[str]:
    """Names of imports that new code may call: what is data makes no system call, and what is nowhere is not called."""
    patch = binding.patch
    if any(finding.code == NEW_IMPORT and finding.lifted for finding in patch.findings):
        return []
    found = []
    for item, address in zip(patch.imports, binding.imports, strict=True):
        mapping = mapping_over(seen.maps, address, 1)
        if address and (mapping is None or mapping.executable):
            found.append(item.name)
    return found


def _obstacle(pid: int, name: str, imports: tuple[str, ...], deadline: float) -> Obstacle | None:
    modes = surroundings.seccomp_modes(pid)
    if not any(modes.values()):
        return None
    for tid, mode in modes.items():
        if mode == SECCOMP_STRICT:
            how = f"thread {tid} is in strict mode, which kills for all but read, write, exit and sigreturn"
            return obstacles.filter_may_kill(pid, name, how, imports)
    try:
        programs = filter_programs(pid, modes, deadline)
    except PtraceFailed as error:
        if error.request is not ptrace.Request.SECCOMP_GET_FILTER:
            raise
        return obstacles.filter_unreadable(pid, name, error.tid, error.why)
    for program, tid in programs.items():
        action = killing_action(program)
        if action:
            how = f"the filter of thread {tid} may answer by {action}"
            return obstacles.filter_may_kill(pid, name, how, imports)
    return None


def filter_programs(pid: int, modes: Mapping[int, int], deadline: float) -> dict[bytes, int]:
    """Return all filters of all threads, each an array of struct sock_filter with one thread that is under it.

    ``modes`` as ``surroundings.seccomp_modes``; ``deadline`` is a time.monotonic() value for all threads to stop.
    Raises PtraceFailed where the kernel does not show them, otherwise as ``require_calls_pass``.
    """
    look = _Look(modes)
    while True:
        try:
            with seize(pid) as process:
                process.stop()
                complete = look.at(process.tids)
        except Busy:
            if time.monotonic() + _REST >= deadline:
                raise
            complete = False  # it may be waiting for a child of vfork(2)
        if complete:
            return look.result()
        time.sleep(_REST)


class _Look:
    """Looks at the filters of some threads in each stop, so that none is long however many there are."""

    def __init__(self, modes: Mapping[int, int]) -> None:
        self._modes = modes
        self._buffer = ptrace.FilterBuffer()
        self._found: dict[bytes, int] = {}
        self._seen: set[int] = set()
        self._gone: dict[int, str] = {}

    def at(self, tids: Sequence[int]) -> bool:
        """Look at stopped threads, at one at least; whether all have been looked at. Raises PtraceFailed."""
        end = time.monotonic() + _LONGEST_LOOK
        for tid in tids:
            if tid in self._seen:
                continue
            self._seen.add(tid)
            try:
                for program in _programs_of(tid, self._modes.get(tid, 0), self._buffer):
                    self._found.setdefault(program, tid)
            except PtraceFailed as error:
                if not error.gone:
                    raise
                self._gone[tid] = error.why
            if time.monotonic() >= end:
                break
        return self._seen.issuperset(tids)

    def result(self) -> dict[bytes, int]:
        """What was found. Raises LivegraftError where a thread that was said to be gone lives on."""
        for tid, why in self._gone.items():
            tracees.require_gone(tid, why)
        return self._found


def _programs_of(tid: int, mode: int, buffer: ctypes.Array[ctypes.c_char]) -> list[bytes]:
    """The filters of a stopped thread. ``mode`` was its mode a moment ago, 0 where it is new."""
    found: list[bytes] = []
    while True:
        try:
            found.append(ptrace.seccomp_filter(tid, len(found), buffer))
        except PtraceFailed as error:
            if error.errno == errno.ENOENT and found:
                return found
            if error.errno == errno.EINVAL and mode != SECCOMP_FILTER:
                return []  # it has none
            raise
