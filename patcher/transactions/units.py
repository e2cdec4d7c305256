"""Units: what is put in force, and taken out of it, together. A patch alone, or a set (``record``).

A set was shown to be safe, and asked for, together. So it is replaced and reverted together, and where a patcher has
died in it, all of it is undone before anything else is done.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from elfdiff.errors import BadInput, LivegraftError, NotConcerned, Refused
from elfdiff.patchobject import PatchObject

from ..pausing.conditions import Conditions
from ..pausing.keeping import kept_code, names_by_patch
from ..pausing.pause import Pause, carry_out
from ..pausing.steps import OnStep
from ..planning.binding import Binding, bind
from ..planning.idleness import named_code, waiting_for, widen
from ..planning.plan import Ending, Situation, plan_revert, situation
from ..planning.vetting import module_of_record
from ..process.memory import Memory
from ..process.modules import PF_W, Module
from ..records.record import JournalEntry, Record, State
from ..targets.target import Snapshot
from .gating import with_gates
from .staging import sweep_stubs

Patches = PatchObject | Sequence[PatchObject]
"""A patch alone, or a set."""


@dataclass(frozen=True, slots=True)
class Member:
    """One patch of a unit that is to come into force, and the image that it is for, as it is now."""

    binding: Binding
    now: Situation

    @property
    def held(self) -> bool:
        """Whether this very patch is applied."""
        applied = self.now.applied
        return applied is not None and applied.contents.patch == self.binding.patch.id


def patches_of(patches: Patches) -> tuple[PatchObject, ...]:
    """Return the patches of a unit. Raises BadInput where one is there twice, or two are of the same image."""
    given = (patches,) if isinstance(patches, PatchObject) else tuple(patches)
    for index, patch in enumerate(given):
        for other in given[:index]:
            if patch.id == other.id:
                raise BadInput(
                    f"the patch {patch.id[:12]} was given twice",
                    why=f"each patch of a set changes another image, and both are of {patch.old.name}",
                    next_step="give each patch once",
                )
            if patch.old.build_id == other.old.build_id:
                raise BadInput(
                    f"two of the patches are of the same image, {patch.old.name}",
                    why=f"{other.id[:12]} and {patch.id[:12]} both start from build {patch.old.build_id}, "
                    "and only one of them can be in force",
                    next_step="give one of them; another applied later replaces it",
                )
    return given


def bind_all(
    patches: Sequence[PatchObject], seen: Snapshot, memory: Memory, conditions: Conditions
) -> tuple[Member, ...]:
    """Bind the patches of a unit, in the order of the images' addresses.

    Raises as ``bind``, of a set saying which patch it is about; NotConcerned where the process has not all the images;
    what ``named_code`` raises.
    """
    names = names_by_patch(patches, conditions.keep_live)
    members = []
    for patch in patches:
        try:
            binding = bind(patch, seen.modules, memory, seen.records)
            kept = kept_code(patch, names[patch.id], binding.old_bias)
        except LivegraftError as error:
            if len(patches) > 1:
                _name_member(error, patch, len(patches))
            raise
        members.append(Member(replace(binding, kept=kept), situation(seen.records, binding.module, seen.gates)))
    named = named_code(seen.pid, conditions.when_idle, [item.binding.module for item in members])
    widened = [Member(*widen(item.binding, item.now, named, conditions.own_idle)) for item in members]
    return tuple(sorted(widened, key=lambda item: item.binding.module.low))


def _name_member(error: LivegraftError, patch: PatchObject, count: int) -> None:
    error.what = f"{error.what} (patch {patch.id[:12]} of {patch.old.name})"
    error.args = (error.what,)
    if isinstance(error, NotConcerned):
        error.why += f"; all {count} patches of the set, or none of them"


def require_together(members: Sequence[Member], seen: Snapshot) -> None:
    """Raise Refused where a set that is in force would be left in part, or a patch in force cannot join the new one.

    It joins by another copy of itself (``staging``), since a record that is in force cannot be given another set: a
    death between two state words would not tell any more what was there before.
    """
    for item in members if len(members) > 1 else ():
        if item.held and any(segment.flags & PF_W for segment in item.binding.patch.segments):
            patch = item.binding.patch
            raise Refused(
                f"the patch {patch.id[:12]} of {patch.old.name} is in force already, and cannot become one of a set",
                why="it has brought variables, which would begin anew",
                next_step="apply the others by themselves; or take it back first: "
                f"livegraft revert --pid {seen.pid} {patch.id[:12]}",
            )
    covered = {record.address for item in members for record in item.now.active}
    for address in covered:
        record = next(item for item in seen.records if item.address == address)
        left = [item for item in unit_of(record, seen.records) if _in_force(item) and item.address not in covered]
        if left:
            raise Refused(
                f"the patch {record.short_id} of {record.contents.old.name} is in force as one of a set of "
                f"{record.contents.set_size}",
                why=f"replaced alone, it would leave {words(left)} in force, which was applied together with it",
                next_step="give a patch of each of these images in one command, or take the set back first: "
                f"livegraft revert --pid {seen.pid} {record.short_id}",
            )


def _in_force(record: Record) -> bool:
    return record.state is State.APPLIED or record.interrupted


def words(records: Iterable[Record]) -> str:
    """Return the patches of records for people."""
    return ", ".join(f"{item.short_id} of {item.contents.old.name}" for item in records)


def unit_of(record: Record, records: Iterable[Record]) -> tuple[Record, ...]:
    """Return the records of the set that a record is one of, itself included; itself where it is alone."""
    if not record.contents.set_id:
        return (record,)
    return tuple(item for item in records if item.contents.set_id == record.contents.set_id)


def units(records: Iterable[Record]) -> list[tuple[Record, ...]]:
    """Return records grouped by the unit that they are of."""
    found: dict[str | int, list[Record]] = {}
    for item in records:
        found.setdefault(item.contents.set_id or item.address, []).append(item)
    return [tuple(group) for group in found.values()]


def interrupted_sets(seen: Snapshot) -> tuple[Record, ...]:
    """Return the records of sets in which a patcher has died between its first and its last write."""
    return tuple(item for item in seen.records if item.interrupted and item.contents.set_id)


def take_out(
    records: Sequence[Record], seen: Snapshot, memory: Memory, conditions: Conditions, on_step: OnStep
) -> Pause:
    """Take the patches of these active records out of force in one stop; where their apply was interrupted, undo it.

    Raises as ``carry_out``; Refused where none of their images is mapped any more.
    """
    endings, modules = endings_of(records, seen, conditions)
    sweep_stubs(seen.pid, memory)
    plan = plan_revert(endings, memory.read_many, seen.modules)
    known = [entry for item in endings for entry in journals(item.now)]
    gated = with_gates(plan, known, modules, seen, memory)
    return carry_out(gated.plan, seen, memory, conditions, on_step)


def endings_of(
    records: Sequence[Record], seen: Snapshot, conditions: Conditions
) -> tuple[tuple[Ending, ...], tuple[Module, ...]]:
    """Return how these active records end, one of each image, and the images.

    Of an image that is gone only the state is to be changed. Raises Refused where none is mapped, and what
    ``named_code`` raises.
    """
    endings: dict[tuple[str, int], Ending] = {}
    modules: dict[tuple[str, int], Module] = {}
    for record in records:
        key = record.contents.old.build_id, record.contents.old_bias
        if key in endings:
            continue  # of the same image, and undone with it
        module = module_of_record(record, seen.modules)
        if module is None:
            endings[key] = Ending(record, Situation(None, (), (), (), (), seen.records, seen.gates))
        else:
            endings[key] = Ending(record, situation(seen.records, module, seen.gates))
            modules[key] = module
    if not modules:
        raise Refused(
            f"{records[0].contents.old.name} is no longer mapped where patch {records[0].short_id} found it",
            why="the program has unloaded the image; its functions and the entry jumps in them are gone",
            next_step="nothing is to be reverted",
        )
    named = named_code(seen.pid, conditions.when_idle, list(modules.values()))
    for key, module in modules.items():
        ending = endings[key]
        endings[key] = replace(ending, now=waiting_for(ending.now, module, named, conditions.own_idle))
    return tuple(endings.values()), tuple(modules.values())


def journals(now: Situation) -> tuple[JournalEntry, ...]:
    """Return the entries of all records that may be in force."""
    return tuple(entry for record in now.active for entry in record.contents.journal)


def spent(conditions: Conditions, since: float) -> Conditions:
    """Return the conditions with what is left of the time, which began at ``since`` (``time.monotonic``)."""
    return replace(conditions, timeout=max(0.0, conditions.timeout - (time.monotonic() - since)))
