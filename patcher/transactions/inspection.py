"""What patches a process carries, for people and programs that ask; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elfdiff.errors import Busy, LivegraftError, NotPermitted

from ..pausing.keeping import Finishing, finishing
from ..process.memory import Memory
from ..process.proc import mappings
from ..records.gates import Gates, find_gates, seen_through
from ..records.record import DamagedRecord, Record, State
from ..records.search import find_records
from ..threads.tracees import require_traceable
from .transaction import mapped_bytes


@dataclass(frozen=True, slots=True)
class CarriedPatch:
    """One patch that a process carries.

    ``redirected`` of the ``entries`` of its functions lead to its code at this moment, at once or through a gate: all
    of them if it is applied, none if it is reverted, and if it was interrupted either, or any number where its entry
    jumps could not be gated. None where they cannot be read. ``inherited`` says that it was not this process that was
    patched, but one that it descends from by fork(2), and that it carries the record since.
    """

    record: Record
    entries: int
    redirected: int | None
    mapped_bytes: int
    inherited: bool

    @property
    def as_it_should_be(self) -> bool:
        """Whether the entries say the same as the state."""
        wanted = {State.APPLIED: self.entries, State.REVERTED: 0, State.REPLACED: 0, State.PREPARED: 0}
        return self.record.interrupted or self.redirected == wanted[self.record.state]


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that is known of a process: its patches by rising address of their records.

    ``finishing`` are the threads in old code that a patch has kept; None where they could not be stopped for a look,
    and ``why_unknown`` says why.
    """

    pid: int
    process: str
    patches: tuple[CarriedPatch, ...]
    damaged: tuple[DamagedRecord, ...]
    finishing: tuple[Finishing, ...] | None = ()
    why_unknown: str = ""


def inspect_process(pid: int) -> Inspection:
    """Look for the patches of a process. Stops it only where a patch has kept old code, to see who is in it.

    Raises BadInput (no such process, a kernel thread, a zombie, this process), NotPermitted.
    """
    found = require_traceable(pid)
    with Memory(pid) as memory:
        maps = mappings(pid)
        records, damaged = find_records(maps, memory)
        gates = find_gates(maps, memory)
        patches = tuple(_carried(record, memory, gates, found.start_time) for record in records)
        inside, why = _finishing(pid, records, memory)
    return Inspection(pid, found.name, patches, damaged, inside, why)


def _finishing(
    pid: int, records: tuple[Record, ...], memory: Memory
) -> tuple[tuple[Finishing, ...] | None, str]:
    """Who is in kept old code; what else is known of the process is said in any case."""
    try:
        return finishing(pid, records, memory), ""
    except (Busy, NotPermitted) as error:
        return None, f"{error.what}: {error.why}"


def _carried(record: Record, memory: Memory, gates: Sequence[Gates], start_time: int) -> CarriedPatch:
    journal = [entry for entry in record.contents.journal if entry.after != entry.pristine]
    spans = [(entry.address, len(entry.after)) for entry in journal]
    try:
        held = memory.read_many(spans)
    except LivegraftError:
        redirected = None  # the image was unloaded, and its functions with it
    else:
        pairs = zip(journal, held, strict=True)
        redirected = sum(entry.after == seen_through(gates, entry.address, data) for entry, data in pairs)
    inherited = record.contents.started != start_time
    return CarriedPatch(record, len(journal), redirected, mapped_bytes(record), inherited)
