"""The process of a command: held exclusively while it is changed, and what was seen in it.

Two livegrafts that change one process at the same time would compute from the same state and both write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from elfdiff.errors import BadInput, Interrupted, LivegraftError, TargetDamaged

from ..interruption import deferred, heed
from ..process.fitness import require_fit, require_permitted
from ..process.memory import Memory
from ..process.modules import Module, modules
from ..process.proc import Mapping, executed_another_program, has_exited, mapping_over, mappings, status
from ..process.sharing import require_own_memory
from ..records.gates import Gates, find_gates
from ..records.record import DamagedRecord, Record, permissions, segment_digest
from ..records.search import find_records
from ..threads.exclusive import exclusive
from ..threads.tracees import reap, require_traceable
from .selection import Pin

# Not the file that a single remote call locks: this lock is held around many of them.
_LOCK = "syscall"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was seen in a process at one moment, all by rising address."""

    pid: int
    name: str
    maps: tuple[Mapping, ...]
    modules: tuple[Module, ...]
    records: tuple[Record, ...]
    damaged: tuple[DamagedRecord, ...]
    gates: tuple[Gates, ...] = ()


def take_snapshot(pid: int, memory: Memory) -> Snapshot:
    """Look at a process. Raises BadInput (it is gone), LivegraftError (its memory cannot be read)."""
    maps = mappings(pid)
    records, damaged = find_records(maps, memory)
    return Snapshot(pid, status(pid).name, maps, modules(maps, memory), records, damaged, find_gates(maps, memory))


@contextmanager
def open_target(pid: int, pin: Pin | None = None) -> Iterator[Memory]:
    """Open the memory of a process that is to be changed, and keep other livegrafts away from it.

    With a ``pin`` it is certainly the process that is pinned: whatever is written later goes to the memory that was
    opened, and to none that another process has under the same number.

    Signals to this process are ``deferred`` meanwhile. Raises Interrupted (one was noted before),
    BadInput (no such process, a zombie, a kernel thread, this process), NotPermitted (not ours to trace, traced
    already), Busy (another livegraft is at work on it, or it shares its memory with another process). Whatever is
    raised inside becomes BadInput where the process has exited, and LivegraftError where it has executed another
    program.
    """
    with deferred():
        heed()
        found = require_traceable(pid)
        require_permitted(found)
        require_fit(found)
        try:
            require_own_memory(pid)
            with exclusive(pid, _LOCK), Memory(pid) as memory:
                if pin is not None:
                    pin.require_alive()
                try:
                    yield memory
                except (LivegraftError, OSError) as error:
                    if not isinstance(error, Interrupted) and memory.ended and not has_exited(pid):
                        raise executed_another_program(pid) from error
                    raise
        except (LivegraftError, OSError) as error:
            # Whatever could not be done with it: this is why.
            if not isinstance(error, BadInput) and has_exited(pid):
                raise exited(pid, found.name) from error
            raise
        finally:
            reap()


def exited(pid: int, name: str) -> BadInput:
    """Return the error that says that a process has exited while it was being worked on."""
    return BadInput(
        f"process {pid} ({name}) has exited",
        why="it ended while livegraft was at work on it",
        next_step="give the pid of a running process",
    )


def require_intact(seen: Snapshot) -> None:
    """Raise TargetDamaged where a record is damaged: then nobody knows which functions are redirected."""
    if seen.damaged:
        raise TargetDamaged(
            f"process {seen.pid} carries a record that cannot be read",
            why="; ".join(f"at {item.address:#x}: {item.why}" for item in seen.damaged),
            next_step="restart the program; until then livegraft does not touch it",
        )


def own_mappings(record: Record, maps: Sequence[Mapping], memory: Memory) -> tuple[tuple[int, int], ...]:
    """Return (start, size) of what is certainly left of a prepared record's mappings, its own one last.

    The patcher may have died before it had made them all, and the program may have mapped something of its
    own there since. Mappings of a memory file are ours if it is the file of the record; anonymous ones if
    place, size, protection and contents are those that the record says.
    """
    home = mapping_over(maps, record.address, record.size)
    found = []
    for segment in record.contents.segments:
        mapping = mapping_over(maps, segment.start, segment.size)
        if home is None or mapping is None or mapping.perms != permissions(segment.flags):
            continue
        if (mapping.device, mapping.inode, mapping.path) != (home.device, home.inode, home.path):
            continue
        if record.contents.sealed or segment_digest(memory.read(*segment.span)) == segment.digest:
            found.append(segment.span)
    return (*found, (record.address, record.size))
