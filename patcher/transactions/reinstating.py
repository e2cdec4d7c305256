"""Taking back what one command did to a process: what was in force before it is in force again.

Needs no patch object: a patch that was replaced or reverted keeps its mappings and its record, which says all that its
entries held and what must be idle. Only what a record says is taken back, by the ``instance`` of the transaction, so
that a child that inherited it is found, and what somebody else did since is left alone.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

from elfdiff.errors import LivegraftError, Refused

from ..pausing.conditions import Conditions
from ..pausing.pause import carry_out
from ..pausing.steps import no_step
from ..planning.idleness import waiting_again
from ..planning.lookups import Chains
from ..planning.plan import Part, ReadBytes, Situation, code_ranges, plan_apply, situation
from ..planning.unwinders import LookupSlot, lookup_slots
from ..planning.vetting import module_of_record
from ..process.memory import Memory
from ..process.modules import PF_W
from ..process.proc import mapping_over, status
from ..records.record import (
    Contents,
    JournalEntry,
    Record,
    RecordedLookup,
    State,
    encode_slot,
    free_slot,
    permissions,
    segment_digest,
)
from ..targets.selection import Pin
from ..targets.target import Snapshot, open_target
from .gating import with_gates
from .staging import sweep
from .transaction import Outcome, look, mapped_bytes, revert, together
from .units import journals, units

_ACTIVE = frozenset({State.APPLIED, State.REVERTED})


@dataclass(frozen=True, slots=True)
class Done:
    """What a command did in one transaction, and so how it is taken back.

    ``applied`` says whether it put the patch of the record in force, or out of force. ``before`` is the instance that
    was in force before an apply, or empty.
    """

    applied: bool
    before: str = ""


def take_back(pin: Pin, done: Mapping[str, Done], conditions: Conditions) -> Outcome | None:
    """Take back the transaction of which a process carries the records; None where it carries none of ``done``.

    ``done`` is by instance. What a set has replaced comes into force again after the set has been taken out of force,
    each unit of it in a stop of its own. Raises as ``revert``, and Refused where what was in force before is no longer
    whole.
    """
    with open_target(pin.pid, pin) as memory:
        seen = look(pin.pid, memory)
        found = [item for item in seen.records if _is_to_be_taken_back(item, done)]
        if not found:
            return None
        record = found[0]
        before = [done[item.contents.instance].before for item in found]
        if not done[record.contents.instance].applied:
            return _reinstate(found, seen, memory, conditions)
        if any(before) and len(found) == 1:
            return _reinstate([_record_of(before[0], record, seen)], seen, memory, conditions)
    outcome = revert(pin.pid, record.contents.patch, conditions, pin=pin)
    if not any(before):
        return outcome
    with open_target(pin.pid, pin) as memory:
        seen = look(pin.pid, memory)
        for unit in units([_record_of(instance, record, seen) for instance in before if instance]):
            outcome = _reinstate(unit, look(pin.pid, memory), memory, conditions)
    return outcome


def _is_to_be_taken_back(record: Record, done: Mapping[str, Done]) -> bool:
    how = done.get(record.contents.instance)
    return how is not None and record.state is (State.APPLIED if how.applied else State.REVERTED)


def _record_of(instance: str, after: Record, seen: Snapshot) -> Record:
    for record in seen.records:
        if record.contents.instance == instance and record.state is State.REPLACED:
            return record
    raise _not_whole(seen, f"the record of what patch {after.short_id} replaced is gone")


def _reinstate(records: Sequence[Record], seen: Snapshot, memory: Memory, conditions: Conditions) -> Outcome:
    """Put the patches of records that are out of force in force again, in one stop."""
    records = sorted(records, key=lambda item: item.contents.old_bias + item.contents.old.low)  # as they were staged
    modules = [module_of_record(record, seen.modules) for record in records]
    images = [module for module in modules if module is not None]
    if len(images) < len(records):
        raise _not_whole(seen, "the image is no longer mapped")
    for record in records:
        _require_whole(record, seen, memory)
    sweep(seen, memory)
    set_id = secrets.token_hex(8) if len(records) > 1 else ""
    slots: dict[int, LookupSlot] = {}
    if any(record.contents.lookups for record in records):
        slots = {slot.address: slot for slot in lookup_slots(seen.modules, memory)}
    parts = []
    for record, module in zip(records, images, strict=True):
        now = waiting_again(situation(seen.records, module, seen.gates), record.contents.idle)
        contents = replace(_again(record, now, slots, seen, memory), set_id=set_id, set_size=len(records))
        parts.append(_part(record, contents, now, slots, seen, memory))
        slots |= _behind(slots, contents, now)
    plan = plan_apply(parts, memory.read_many)
    known = [entry for part in parts for entry in (*part.contents.journal, *journals(part.now))]
    gated = with_gates(plan, known, images, seen, memory)
    pause = carry_out(gated.plan, seen, memory, conditions, no_step)
    return together(
        Outcome(
            seen.pid, seen.name, part.contents, State.APPLIED, pause, mapped_bytes(part.own), others=part.now.active
        )
        for part in parts
    )


def _again(
    record: Record, now: Situation, slots: Mapping[int, LookupSlot], seen: Snapshot, memory: Memory
) -> Contents:
    return replace(
        record.contents,
        instance=secrets.token_hex(8),
        tool_version=version("livegraft"),
        time=int(time.time()),
        journal=_journal(record, now, memory.read_many),
        replaces=tuple(item.contents.instance for item in now.active),
        lookups=tuple(_lookup(item, slots.get(item.slot), now, seen) for item in record.contents.lookups),
        started=status(seen.pid).start_time,
    )


def _part(
    record: Record,
    contents: Contents,
    now: Situation,
    slots: Mapping[int, LookupSlot],
    seen: Snapshot,
    memory: Memory,
) -> Part:
    data = encode_slot(contents)
    slot = free_slot(record, data)
    if slot is None:
        raise _not_whole(seen, "its record has no room for what it replaces")
    memory.write(record.address + slot, data)  # not in force until its state word says so
    idle = code_ranges(contents.removed)
    binding = tuple(item for place in slots.values() for item in place.binding) if contents.lookups else ()
    return Part(record, contents, slot, now, idle, binding)


def _behind(slots: Mapping[int, LookupSlot], contents: Contents, now: Situation) -> dict[int, LookupSlot]:
    """The slots as the next of a set finds them: the stand-ins of this one are in front."""
    chains = Chains(now.everything)
    return {
        item.slot: replace(slots[item.slot], value=item.stand_in, function=item.stand_in)
        for item in contents.lookups
        if item.stand_in not in chains.links(slots[item.slot].value)
    }


def _require_whole(record: Record, seen: Snapshot, memory: Memory) -> None:
    for segment in record.contents.segments:
        mapping = mapping_over(seen.maps, *segment.span)
        if mapping is None or mapping.perms != permissions(segment.flags):
            raise _not_whole(seen, f"its mapping at {segment.start:#x} is gone")
        if not segment.flags & PF_W and segment_digest(memory.read(*segment.span)) != segment.digest:
            raise _not_whole(seen, f"its mapping at {segment.start:#x} holds other bytes")


def _journal(record: Record, now: Situation, read: ReadBytes) -> tuple[JournalEntry, ...]:
    """The journal of bringing ``record`` into force, as ``journal_for_apply`` makes it from a patch."""
    pristine = {entry.address: entry.pristine for item in now.active for entry in item.contents.journal}
    jumps = {entry.address: entry.after for entry in record.contents.journal if entry.after != entry.pristine}
    unknown = [address for address in jumps if address not in pristine]
    spans = [(address, len(jumps[address])) for address in unknown]
    pristine.update(zip(unknown, read(spans), strict=True))
    settled = {entry.address: entry.after for entry in now.applied.contents.journal} if now.applied else {}
    return tuple(
        JournalEntry(at, pristine[at], settled.get(at, pristine[at]), jumps.get(at, pristine[at]))
        for at in sorted(pristine)
    )


def _lookup(item: RecordedLookup, slot: LookupSlot | None, now: Situation, seen: Snapshot) -> RecordedLookup:
    if slot is None:
        raise _not_whole(seen, f"the slot of {item.symbol} at {item.slot:#x} is gone")
    if item.stand_in in Chains(now.everything).links(slot.value):
        return item
    if item.passes_to != slot.function:
        raise _not_whole(seen, f"the slot of {item.symbol} at {item.slot:#x} leads elsewhere by now")
    return replace(item, before=slot.value)


def _not_whole(seen: Snapshot, why: str) -> LivegraftError:
    return Refused(
        f"what was in force in process {seen.pid} ({seen.name}) cannot be put in force again",
        why=why,
        next_step=f"see what it carries: livegraft status --pid {seen.pid}",
    )
