"""Apply, revert, check: each a transaction on one process, all or nothing.

What can be computed is computed while the program runs; then comes the pause. A target that was not changed
is as it was before, and one whose patcher was killed can be finished or undone by the next command.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from elfdiff.errors import BadInput, Changed, LivegraftError, NoSuchPatch
from elfdiff.patchobject import PatchObject

from ..interruption import heed
from ..pausing.conditions import USUAL, Conditions
from ..pausing.liveness import Watched, watch
from ..pausing.pause import Pause, carry_out
from ..pausing.steps import OnStep, no_step
from ..planning.binding import Binding
from ..planning.lookups import all_in_place, require_believable_lookups
from ..planning.placement import MARGIN
from ..planning.plan import Plan, Situation, disjoint, plan_apply, plan_revert
from ..planning.unwinders import lookup_slots
from ..planning.vetting import require_believable, require_whole_sets
from ..process.memory import Memory
from ..process.proc import has_exited
from ..records.record import INTERRUPTED, Contents, Record, State, record_size
from ..targets.selection import Pin
from ..targets.target import Snapshot, open_target, require_intact, take_snapshot
from .filters import require_calls_pass
from .gating import with_gates
from .staging import Staged, bases, in_front_of, make_draft, part_of, span_of, stage, sweep
from .units import (
    Member,
    Patches,
    bind_all,
    endings_of,
    interrupted_sets,
    journals,
    patches_of,
    require_together,
    spent,
    take_out,
    unit_of,
    units,
    words,
)

_ATTEMPTS = 3  # the dynamic linker binds a slot once; what changes oftener is somebody else's doing


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a transaction did. ``state`` is the record's now; ``pause`` is None where nothing had to be done.

    ``mapped_bytes`` is what the patch occupies in the process; ``others`` are records whose state changed with it
    (replaced, or undone); ``before`` is the record that was applied. Of a set it is what was done with the first patch,
    and ``further`` with the others, in the same stop.
    """

    pid: int
    process: str
    contents: Contents
    state: State
    pause: Pause | None
    mapped_bytes: int
    others: tuple[Record, ...] = ()
    before: Record | None = None
    further: tuple[Outcome, ...] = ()

    @property
    def already(self) -> bool:
        """Whether nothing had to be done."""
        return self.pause is None

    @property
    def members(self) -> tuple[Outcome, ...]:
        """What was done with each patch of the set, or with the one."""
        return (self, *self.further)


def apply(
    pid: int,
    patches: Patches,
    conditions: Conditions = USUAL,
    *,
    on_step: OnStep = no_step,
    pin: Pin | None = None,
) -> Outcome:
    """Put ``patches`` in force in process ``pid``, each in place of any other patch of the same image.

    All of a set come into force in one stop, or none.

    ``pin`` is that of ``open_target``. ``on_step`` is called at each point at which the death of this process leaves
    something else behind, for tests.

    Raises BadInput, NotPermitted, Refused, Busy (a function stayed live), Changed (it kept changing meanwhile),
    LivegraftError; in all these cases the target is as before. TargetDamaged where it is not.
    """
    given = patches_of(patches)
    with open_target(pid, pin) as memory:
        return _attempts(conditions, lambda left: _apply(pid, given, memory, left, on_step))


def _attempts(conditions: Conditions, attempt: Callable[[Conditions], Outcome]) -> Outcome:
    """Try again where the process has changed in between; ``attempt`` is given what is left of the time."""
    began = time.monotonic()
    for _ in range(_ATTEMPTS - 1):
        with suppress(Changed):  # a new plan will know of it; the last attempt says so
            return attempt(spent(conditions, began))
    return attempt(spent(conditions, began))


def _apply(
    pid: int, patches: Sequence[PatchObject], memory: Memory, conditions: Conditions, on_step: OnStep
) -> Outcome:
    began = time.monotonic()
    seen, undone = _recovered(look(pid, memory), (), memory, conditions, on_step)
    members = bind_all(patches, seen, memory, conditions)
    if all(_is_in_force(item, memory) for item in members):
        return _already(seen, [_applied(item) for item in members])
    require_together(members, seen)
    _require_calls_pass(members, seen, spent(conditions, began))
    staged, pause = _stage_and_commit(members, seen, memory, spent(conditions, began), on_step)
    return together(
        Outcome(
            pid, seen.name, done.contents, State.APPLIED, pause, done.mapped_bytes,
            others=tuple(one for one in (*item.now.active, *undone) if one.contents.patch != done.contents.patch),
            before=item.now.applied,
        )
        for item, done in zip(members, staged, strict=True)
    )


def together(outcomes: Iterable[Outcome]) -> Outcome:
    """Return what was done with a set in one stop, of what was done with each of its patches."""
    first, *further = outcomes
    return replace(first, further=tuple(further))


def _applied(member: Member) -> Record:
    assert member.now.applied is not None
    return member.now.applied


def _recovered(
    seen: Snapshot, but: Sequence[Record], memory: Memory, conditions: Conditions, on_step: OnStep
) -> tuple[Snapshot, tuple[Record, ...]]:
    """Undo what a dead patcher has left of sets, ``but`` for one. Returns what is seen then, and the records undone.

    A patch may be applied beside one of another image that was interrupted, but not beside some of a set.
    """
    left = {record.address for record in but}
    broken = tuple(record for record in interrupted_sets(seen) if record.address not in left)
    if not broken:
        return seen, ()
    take_out(broken, seen, memory, replace(conditions, when_idle=()), on_step)  # the names are of other images
    return look(seen.pid, memory), broken


def require_fit(pid: int, patch: PatchObject, conditions: Conditions = USUAL, *, pin: Pin | None = None) -> None:
    """Raise what ``apply`` would before it begins: the patch is for another build, an import is not there, or a filter
    may kill for it.

    Changes nothing, and stops nobody but to read such a filter. Names in ``conditions`` are not looked for: where the
    patch is to be one of a set, they may be of another.
    """
    nameless = replace(conditions, keep_live=(), when_idle=())
    with open_target(pid, pin) as memory:
        seen = look(pid, memory)
        _require_calls_pass(bind_all((patch,), seen, memory, nameless), seen, nameless)


def _require_calls_pass(members: Sequence[Member], seen: Snapshot, conditions: Conditions) -> None:
    # What is in force makes its calls already.
    require_calls_pass([item.binding for item in members if not item.held], seen, conditions.timeout)


def check(pid: int, patches: Patches, conditions: Conditions = USUAL, *, pin: Pin | None = None) -> Outcome:
    """Do all that ``apply`` does but the writing: every check, and stops of the process to look at its
    stacks.

    ``state`` of the outcome is PREPARED where ``apply`` would have put the patch in force. Raises as
    ``apply``.
    """
    given = patches_of(patches)
    with open_target(pid, pin) as memory:
        return _attempts(conditions, lambda left: _check(pid, given, memory, left))


def _check(pid: int, patches: Sequence[PatchObject], memory: Memory, conditions: Conditions) -> Outcome:
    began = time.monotonic()
    seen = look(pid, memory)
    members = bind_all(patches, seen, memory, conditions)
    if all(_is_in_force(item, memory) for item in members):
        return _already(seen, [_applied(item) for item in members])
    require_together(members, seen)
    _require_calls_pass(members, seen, spent(conditions, began))
    contents, plan = _rehearse(members, seen, memory, conditions)
    pause = carry_out(plan, seen, memory, spent(conditions, began), no_step, write=False)
    return together(
        Outcome(
            pid, seen.name, one, State.PREPARED, pause,
            record_size(one) + sum(segment.size for segment in one.segments),
            others=item.now.active,
        )
        for item, one in zip(members, contents, strict=True)
    )


def look(pid: int, memory: Memory) -> Snapshot:
    """Look at the process; refuse to go on where its records are damaged or say what cannot be."""
    seen = take_snapshot(pid, memory)
    require_intact(seen)
    require_believable(seen.records, seen.modules, seen.maps, pid)
    require_whole_sets(seen.records)
    if any(record.contents.lookups for record in seen.records):
        require_believable_lookups(seen.records, lookup_slots(seen.modules, memory), seen.modules, seen.maps)
    return seen


def _is_in_force(member: Member, memory: Memory) -> bool:
    """Whether the patch is applied, whole, with nothing left to finish."""
    binding, now = member.binding, member.now
    if now.applied is None or now.interrupted or not member.held:
        return False
    if not all_in_place(binding, now.applied, now.everything):
        return False  # an unwinder was loaded since
    journal = now.applied.contents.journal
    held = memory.read_many([(entry.address, len(entry.after)) for entry in journal])
    return all(entry.after == data for entry, data in zip(journal, held, strict=True))


def _already(seen: Snapshot, records: Sequence[Record]) -> Outcome:
    return together(as_it_was(seen.pid, seen.name, record) for record in records)


def as_it_was(pid: int, process: str, record: Record) -> Outcome:
    """Return that nothing had to be done, because of a record that a process carries."""
    return Outcome(pid, process, record.contents, record.state, None, mapped_bytes(record))


def mapped_bytes(record: Record) -> int:
    """Return how much of the process's address space a patch occupies, its record included."""
    return record.size + sum(segment.size for segment in record.contents.segments)


def _stage_and_commit(
    members: Sequence[Member], seen: Snapshot, memory: Memory, conditions: Conditions, on_step: OnStep
) -> tuple[tuple[Staged, ...], Pause]:
    heed()
    try:
        staged = stage(_of_one_set(members), seen, memory, on_step)
        plan = plan_apply([item.part for item in staged], memory.read_many)
        known = [entry for item in staged for entry in (*item.contents.journal, *journals(item.part.now))]
        gated = with_gates(plan, known, [item.binding.module for item in members], seen, memory)
        return staged, carry_out(gated.plan, seen, memory, conditions, on_step)
    except BaseException as error:
        # Whatever has come in between, an interrupt too: what is mapped and not in force goes.
        if has_exited(seen.pid) or memory.ended:
            raise
        try:
            sweep(take_snapshot(seen.pid, memory), memory)
        except LivegraftError as failure:
            # The first error is what the user must know; what is left is harmless, and the next apply sweeps.
            error.add_note(f"the unused mappings could not be removed: {failure.what}: {failure.why}")
        raise


def _of_one_set(members: Sequence[Member]) -> tuple[tuple[Binding, Situation], ...]:
    """The bindings of patches that come into force together; what their records will say of the set."""
    set_id = secrets.token_hex(8) if len(members) > 1 else ""
    return tuple((replace(item.binding, set_id=set_id, set_size=len(members)), item.now) for item in members)


def _rehearse(
    members: Sequence[Member], seen: Snapshot, memory: Memory, conditions: Conditions
) -> tuple[tuple[Contents, ...], Plan]:
    """What ``stage`` would do at the first places that it would try; and that nobody may be in a set that is broken."""
    staged: list[Staged] = []
    for item, now in _of_one_set(members):
        binding = in_front_of(item, staged, seen)
        draft = make_draft(binding, binding.module.low, now, memory)
        span = span_of(binding)
        base = bases(binding, seen, span + MARGIN + 2 * record_size(draft.contents))[0]
        draft = make_draft(binding, base, now, memory)
        staged.append(Staged(part_of(binding, draft, base + span + MARGIN, now), 0))
    plan = plan_apply([item.part for item in staged], memory.read_many)
    broken = interrupted_sets(seen)
    if broken:
        endings, _ = endings_of(broken, seen, replace(conditions, when_idle=()))
        undone = plan_revert(endings, memory.read_many, seen.modules)
        forbidden, parkable = (*plan.forbidden, *undone.forbidden), (*plan.parkable, *undone.parkable)
        plan = replace(plan, forbidden=disjoint(forbidden), parkable=disjoint(parkable))
    # There is no record yet whose state word could be compared.
    return tuple(item.contents for item in staged), replace(plan, first=(), last=())


def revert(
    pid: int,
    patch_id: str = "",
    conditions: Conditions = USUAL,
    *,
    on_step: OnStep = no_step,
    pin: Pin | None = None,
) -> Outcome:
    """Take a patch out of force: the one whose id begins with ``patch_id``, or the only one there is.

    Of a set all patches go out of force, in one stop. The functions get the bytes of their file back. A patch whose
    apply was interrupted is undone: what was in force before it is in force again. Its mappings stay, because pointers
    into its constants may live on. Raises BadInput where no patch or more than one is meant; otherwise as ``apply``.
    """
    with open_target(pid, pin) as memory:
        began = time.monotonic()
        seen = look(pid, memory)
        unit = _unit(seen, patch_id)
        seen, undone = _recovered(seen, unit, memory, conditions, on_step)
        if undone:
            unit = _unit(seen, patch_id)
        if unit[0].state is State.REVERTED:
            return _already(seen, unit)
        pause = take_out(unit, seen, memory, spent(conditions, began), on_step)
        return together(
            Outcome(
                pid, seen.name, record.contents, State.REVERTED, pause, mapped_bytes(record),
                others=(*_undone_with(record, unit, seen), *undone),
                before=record if record.state is State.APPLIED else None,
            )
            for record in unit
        )


def _undone_with(record: Record, unit: Sequence[Record], seen: Snapshot) -> tuple[Record, ...]:
    """What was interrupted of the same image, and goes out of force with a record."""
    own = {item.address for item in unit}
    key = record.contents.old.build_id, record.contents.old_bias
    return tuple(
        item
        for item in seen.records
        if item.interrupted and item.address not in own and (item.contents.old.build_id, item.contents.old_bias) == key
    )


def watch_apply(pid: int, patches: Patches, seconds: float, conditions: Conditions = USUAL) -> Watched | None:
    """Look for ``seconds`` at what keeps ``patches`` from being applied; None where they are in force already.

    Changes nothing. Raises as ``check``, but for what is live.
    """
    given = patches_of(patches)
    with open_target(pid) as memory:
        seen = look(pid, memory)
        members = bind_all(given, seen, memory, conditions)
        if all(_is_in_force(item, memory) for item in members):
            return None
        require_together(members, seen)
        contents, plan = _rehearse(members, seen, memory, conditions)
        return watch(seen, contents, plan, memory, conditions, seconds)


def watch_revert(pid: int, patch_id: str, seconds: float, conditions: Conditions = USUAL) -> Watched | None:
    """Look for ``seconds`` at what keeps a patch from being reverted; None where it is out of force already.

    Changes nothing. Raises as ``revert``, but for what is live.
    """
    with open_target(pid) as memory:
        seen = look(pid, memory)
        unit = _unit(seen, patch_id)
        if unit[0].state is State.REVERTED:
            return None
        plan = plan_revert(endings_of(unit, seen, conditions)[0], memory.read_many, seen.modules)
        contents = tuple(record.contents for record in unit)
        return watch(seen, contents, plan, memory, conditions, seconds)


def _unit(seen: Snapshot, patch_id: str) -> tuple[Record, ...]:
    """The patch that is meant, with the others of its set that are as it is."""
    record = _choose(seen, patch_id)
    return tuple(item for item in unit_of(record, seen.records) if item.state is record.state)


def _choose(seen: Snapshot, patch_id: str) -> Record:
    known = [item for item in seen.records if item.state is not State.PREPARED]
    matching = [item for item in known if item.contents.patch.startswith(patch_id.lower())]
    if not matching:
        raise _no_such_patch(seen, patch_id, known)
    active = [item for item in matching if item.state is State.APPLIED or item.interrupted]
    # What was interrupted comes first: it stands between the process and any one state.
    for candidates in ([item for item in active if item.state in INTERRUPTED], active):
        if len(units(candidates)) == 1:
            return candidates[0]
        if candidates:
            raise _which(seen, candidates)
    return _idle(seen, matching)


def _idle(seen: Snapshot, matching: Sequence[Record]) -> Record:
    reverted = [item for item in matching if item.state is State.REVERTED]
    if reverted:
        return max(reverted, key=lambda item: item.contents.time)
    raise BadInput(
        f"patch {matching[0].short_id} is not in force in process {seen.pid}",
        why="another patch of the same image has replaced it",
        next_step=f"see which one is in force: livegraft status --pid {seen.pid}",
    )


def _no_such_patch(seen: Snapshot, patch_id: str, known: Sequence[Record]) -> NoSuchPatch:
    if not known:
        return NoSuchPatch(
            f"process {seen.pid} ({seen.name}) carries no patch",
            why="none was applied since the program was started",
            next_step=f"see what a process carries: livegraft status --pid {seen.pid}",
        )
    return NoSuchPatch(
        f"process {seen.pid} ({seen.name}) carries no patch {patch_id}",
        why=f"it carries {', '.join(sorted({item.short_id for item in known}))}",
        next_step=f"livegraft revert --pid {seen.pid} {known[0].short_id}",
    )


def _which(seen: Snapshot, candidates: Sequence[Record]) -> BadInput:
    return BadInput(
        f"several patches are in force in process {seen.pid} ({seen.name})",
        why="; ".join(words(unit) for unit in units(candidates)),
        next_step=f"say which: livegraft revert --pid {seen.pid} {candidates[0].short_id}",
    )
