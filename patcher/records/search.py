"""The records of a process: found in its memory, and their states told from those of all.

A patcher may have died between two state words. What an applied record replaces is replaced, whether its own word says
so yet or not. And the state of each patch of a set follows from those of the others, since all words were written
before the first entry, and again after the last:

    some reverted           every entry is as it was before; all are reverted
    else some reverting     entries may hold either; all are reverting
    else some applied       every entry has its jump; all are applied
    else some applying      entries may hold either, and those of which the words were not written yet were not begun
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from elfdiff.errors import LivegraftError

from ..process.memory import Memory
from ..process.proc import MEMFD_PATH, Mapping
from .record import MAGIC, DamagedRecord, Record, State, decode_record

_MAX_RECORD = 64 << 20


def find_records(maps: Sequence[Mapping], memory: Memory) -> tuple[tuple[Record, ...], tuple[DamagedRecord, ...]]:
    """Return all records of a process by rising address, and what begins like one and is damaged.

    Looks at the first bytes of every private writable mapping that is anonymous or comes from a memory file
    of our name. A mapping that cannot be read cannot have been written by a patcher and is no record.
    """
    records = []
    damaged = []
    for mapping in maps:
        if not _may_hold_record(mapping) or not _has_magic(mapping, memory):
            continue
        try:
            record = decode_record(memory.read(mapping.start, mapping.size), mapping.start)
        except LivegraftError as error:
            damaged.append(DamagedRecord(mapping.start, error.why))
        else:
            records.append(record)
    return tuple(_supersede(_of_sets(records))), tuple(damaged)


def _may_hold_record(mapping: Mapping) -> bool:
    if mapping.perms != "rw-p" or mapping.size > _MAX_RECORD:
        return False
    return mapping.path in ("", MEMFD_PATH)


def _has_magic(mapping: Mapping, memory: Memory) -> bool:
    try:
        return memory.read(mapping.start, len(MAGIC)) == MAGIC
    except LivegraftError:
        return False


def _of_sets(records: Sequence[Record]) -> list[Record]:
    """Tell the state of each of a set from those of all."""
    states: dict[str, set[State]] = {}
    for item in records:
        if item.contents.set_id:
            states.setdefault(item.contents.set_id, set()).add(item.state)
    return [
        replace(item, state=_in_its_set(item.state, states[item.contents.set_id])) if item.contents.set_id else item
        for item in records
    ]


def _in_its_set(own: State, states: set[State]) -> State:
    if own not in (State.APPLYING, State.APPLIED, State.REVERTING):
        return own
    order = (State.REVERTED, State.REVERTING, State.APPLIED, State.APPLYING)
    return next(state for state in order if state in states)


def _supersede(records: Sequence[Record]) -> list[Record]:
    """Count as replaced what an applied record says to have replaced.

    The state word of the replaced record is written after that of the new one; a patcher that died in between
    has left both as applied.
    """
    gone = {name for item in records if item.state is State.APPLIED for name in item.contents.replaces}
    return [
        replace(item, state=State.REPLACED)
        if item.contents.instance in gone and item.state not in (State.PREPARED, State.REVERTED)
        else item
        for item in records
    ]
