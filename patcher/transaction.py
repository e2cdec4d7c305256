"""Apply, revert, check: each a transaction on one process, all or nothing.

What can be computed is computed while the program runs; then comes the pause. A target that was not changed
is as it was before, and one whose patcher was killed can be finished or undone by the next command.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version

from elfdiff.errors import BadInput, Changed, LivegraftError, NoSuchPatch, Refused
from elfdiff.patchobject import PatchObject

from .binding import Binding, bind
from .conditions import DEEP_LIMIT, Conditions
from .gating import with_gates
from .interruption import heed
from .keeping import keepable, kept_code
from .liveness import Watched, watch
from .lookups import all_in_place, require_believable_lookups
from .memory import Memory
from .modules import Module
from .pause import Pause, carry_out
from .placement import MARGIN
from .plan import Plan, Situation, binding_ranges, idle_ranges, plan_apply, plan_revert, situation
from .proc import has_exited
from .record import FIRST_SLOT, INTERRUPTED, Contents, JournalEntry, Record, State, record_size
from .selection import Pin
from .staging import Staged, bases, make_draft, span_of, stage, sweep, sweep_stubs
from .steps import OnStep, no_step
from .target import Snapshot, open_target, require_intact, take_snapshot
from .unwinders import lookup_slots
from .vetting import module_of_record, require_believable

DEFAULT_TIMEOUT = 10.0
"""Seconds to wait for patched functions to be idle."""
_ATTEMPTS = 3  # the dynamic linker binds a slot once; what changes oftener is somebody else's doing


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a transaction did. ``state`` is the record's now; ``already`` says that nothing had to be done.

    ``pause`` is None where nothing was stopped; ``mapped_bytes`` is what the patch occupies in the process;
    ``others`` are records whose state changed with it (replaced, or undone); ``before`` is the record that was applied.
    """

    pid: int
    process: str
    contents: Contents
    state: State
    already: bool
    pause: Pause | None
    mapped_bytes: int
    others: tuple[Record, ...]
    before: Record | None = None


def apply(
    pid: int,
    patch: PatchObject,
    *,
    timeout: float = DEFAULT_TIMEOUT,
    deep_check: bool | None = None,
    deep_limit: int = DEEP_LIMIT,
    keep_live: Sequence[str] = (),
    on_step: OnStep = no_step,
    pin: Pin | None = None,
) -> Outcome:
    """Put ``patch`` in force in process ``pid``, in place of any other patch of the same image.

    ``timeout`` (seconds) is for the functions to become idle; ``deep_check``, ``deep_limit`` and ``keep_live`` are
    those of ``Conditions``, ``pin`` is that of ``open_target``. ``on_step`` is called at each point at which the death
    of this process leaves something else behind, for tests.

    Raises BadInput, NotPermitted, Refused, Busy (a function stayed live), Changed (it kept changing meanwhile),
    LivegraftError; in all these cases the target is as before. TargetDamaged where it is not.
    """
    with open_target(pid, pin) as memory:
        asked = Conditions(timeout, deep_check, deep_limit, tuple(keep_live), keepable(patch))
        return _attempts(asked, lambda left: _apply(pid, patch, memory, left, on_step))


def _attempts(conditions: Conditions, attempt: Callable[[Conditions], Outcome]) -> Outcome:
    """Try again where the process has changed in between; ``attempt`` is given what is left of the time."""
    deadline = time.monotonic() + conditions.timeout

    def left() -> Conditions:
        return replace(conditions, timeout=max(0.0, deadline - time.monotonic()))

    for _ in range(_ATTEMPTS - 1):
        with suppress(Changed):  # a new plan will know of it; the last attempt says so
            return attempt(left())
    return attempt(left())


def _apply(pid: int, patch: PatchObject, memory: Memory, conditions: Conditions, on_step: OnStep) -> Outcome:
    seen, binding, now = _bind(pid, patch, memory, conditions.keep_live)
    if _in_force(now, binding, memory):
        assert now.applied is not None
        return _already(seen, now.applied)
    staged, pause = _stage_and_commit(binding, now, seen, memory, conditions, on_step)
    others = tuple(record for record in now.active if record.contents.patch != patch.id)
    mapped = staged.mapped_bytes
    return Outcome(pid, seen.name, staged.contents, State.APPLIED, False, pause, mapped, others, now.applied)


def check(
    pid: int,
    patch: PatchObject,
    *,
    timeout: float = DEFAULT_TIMEOUT,
    deep_check: bool | None = None,
    deep_limit: int = DEEP_LIMIT,
    keep_live: Sequence[str] = (),
    pin: Pin | None = None,
) -> Outcome:
    """Do all that ``apply`` does but the writing: every check, and stops of the process to look at its
    stacks.

    ``state`` of the outcome is PREPARED where ``apply`` would have put the patch in force. Raises as
    ``apply``.
    """
    with open_target(pid, pin) as memory:
        asked = Conditions(timeout, deep_check, deep_limit, tuple(keep_live), keepable(patch))
        return _attempts(asked, lambda left: _check(pid, patch, memory, left))


def _check(pid: int, patch: PatchObject, memory: Memory, conditions: Conditions) -> Outcome:
    seen, binding, now = _bind(pid, patch, memory, conditions.keep_live)
    if _in_force(now, binding, memory):
        assert now.applied is not None
        return _already(seen, now.applied)
    contents, plan = _rehearse(binding, now, seen, memory)
    pause = carry_out(plan, seen, memory, conditions, no_step, write=False)
    mapped = record_size(contents) + sum(item.size for item in contents.segments)
    return Outcome(pid, seen.name, contents, State.PREPARED, False, pause, mapped, now.active)


def _bind(
    pid: int, patch: PatchObject, memory: Memory, keep_live: Sequence[str] = ()
) -> tuple[Snapshot, Binding, Situation]:
    seen = look(pid, memory)
    binding = bind(patch, seen.modules, memory, seen.records)
    binding = replace(binding, kept=kept_code(patch, keep_live, binding.old_bias))
    return seen, binding, situation(seen.records, binding.module, seen.gates)


def look(pid: int, memory: Memory) -> Snapshot:
    """Look at the process; refuse to go on where its records are damaged or say what cannot be."""
    seen = take_snapshot(pid, memory)
    require_intact(seen)
    require_believable(seen.records, seen.modules, seen.maps, pid)
    if any(record.contents.lookups for record in seen.records):
        require_believable_lookups(seen.records, lookup_slots(seen.modules, memory), seen.modules, seen.maps)
    return seen


def _in_force(now: Situation, binding: Binding, memory: Memory) -> bool:
    """Whether the patch is applied, whole, with nothing left to finish."""
    if now.applied is None or now.interrupted or now.applied.contents.patch != binding.patch.id:
        return False
    if not all_in_place(binding, now.applied, now.everything):
        return False  # an unwinder was loaded since
    journal = now.applied.contents.journal
    held = memory.read_many([(entry.address, len(entry.after)) for entry in journal])
    return all(entry.after == data for entry, data in zip(journal, held, strict=True))


def _already(seen: Snapshot, record: Record) -> Outcome:
    return Outcome(seen.pid, seen.name, record.contents, record.state, True, None, mapped_bytes(record), ())


def mapped_bytes(record: Record) -> int:
    """Return how much of the process's address space a patch occupies, its record included."""
    return record.size + sum(segment.size for segment in record.contents.segments)


def _stage_and_commit(
    binding: Binding,
    now: Situation,
    seen: Snapshot,
    memory: Memory,
    conditions: Conditions,
    on_step: OnStep,
) -> tuple[Staged, Pause]:
    heed()
    try:
        staged = stage(binding, now, seen, memory, version("livegraft"), on_step)
        known = (*staged.contents.journal, *journals(now))
        gated = with_gates(staged.plan, known, binding.module, seen, memory)
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


def journals(now: Situation) -> tuple[JournalEntry, ...]:
    """Return the entries of all records that may be in force."""
    return tuple(entry for record in now.active for entry in record.contents.journal)


def _rehearse(binding: Binding, now: Situation, seen: Snapshot, memory: Memory) -> tuple[Contents, Plan]:
    """What ``stage`` would do at the first place that it would try."""
    tool = version("livegraft")
    draft = make_draft(binding, binding.module.low, now, memory, tool)
    span = span_of(binding)
    base = bases(binding, seen, span + MARGIN + 2 * record_size(draft.contents))[0]
    contents = make_draft(binding, base, now, memory, tool).contents
    own = Record(base + span + MARGIN, record_size(contents), State.PREPARED, State.PREPARED, FIRST_SLOT, contents)
    plan = plan_apply(own, contents, FIRST_SLOT, now, memory.read_many, idle_ranges(binding), binding_ranges(binding))
    # There is no record yet whose state word could be compared.
    return contents, replace(plan, first=(), last=())


def revert(
    pid: int,
    patch_id: str = "",
    *,
    timeout: float = DEFAULT_TIMEOUT,
    deep_check: bool | None = None,
    deep_limit: int = DEEP_LIMIT,
    on_step: OnStep = no_step,
    pin: Pin | None = None,
) -> Outcome:
    """Take a patch out of force: the one whose id begins with ``patch_id``, or the only one there is.

    The functions get the bytes of their file back. A patch whose apply was interrupted is undone: what was in
    force before it is in force again. Its mappings stay, because pointers into its constants may live on.
    Raises BadInput where no patch or more than one is meant; otherwise as ``apply``.
    """
    with open_target(pid, pin) as memory:
        seen = look(pid, memory)
        record = _choose(seen, patch_id)
        if record.state is State.REVERTED:
            return _already(seen, record)
        module = _module_of(record, seen)
        now = situation(seen.records, module, seen.gates)
        sweep_stubs(pid, memory)
        plan = plan_revert(record, now, memory.read_many, seen.modules)
        gated = with_gates(plan, journals(now), module, seen, memory)
        pause = carry_out(gated.plan, seen, memory, Conditions(timeout, deep_check, deep_limit), on_step)
        others = tuple(item for item in now.interrupted if item.address != record.address)
        before = record if record.state is State.APPLIED else None
        size = mapped_bytes(record)
        return Outcome(pid, seen.name, record.contents, State.REVERTED, False, pause, size, others, before)


def watch_apply(pid: int, patch: PatchObject, seconds: float, conditions: Conditions | None = None) -> Watched | None:
    """Look for ``seconds`` at what keeps ``patch`` from being applied; None where it is in force already.

    Changes nothing. Raises as ``check``, but for what is live.
    """
    with open_target(pid) as memory:
        seen, binding, now = _bind(pid, patch, memory)
        if _in_force(now, binding, memory):
            return None
        contents, plan = _rehearse(binding, now, seen, memory)
        return watch(seen, contents, plan, memory, conditions or Conditions(), seconds)


def watch_revert(pid: int, patch_id: str, seconds: float, conditions: Conditions | None = None) -> Watched | None:
    """Look for ``seconds`` at what keeps a patch from being reverted; None where it is out of force already.

    Changes nothing. Raises as ``revert``, but for what is live.
    """
    with open_target(pid) as memory:
        seen = look(pid, memory)
        record = _choose(seen, patch_id)
        if record.state is State.REVERTED:
            return None
        now = situation(seen.records, _module_of(record, seen), seen.gates)
        plan = plan_revert(record, now, memory.read_many, seen.modules)
        return watch(seen, record.contents, plan, memory, conditions or Conditions(), seconds)


def _module_of(record: Record, seen: Snapshot) -> Module:
    module = module_of_record(record, seen.modules)
    if module is None:
        raise Refused(
            f"{record.contents.old.name} is no longer mapped where patch {record.short_id} found it",
            why="the program has unloaded the image; its functions and the entry jumps in them are gone",
            next_step="nothing is to be reverted",
        )
    return module


def _choose(seen: Snapshot, patch_id: str) -> Record:
    known = [item for item in seen.records if item.state is not State.PREPARED]
    matching = [item for item in known if item.contents.patch.startswith(patch_id.lower())]
    if not matching:
        raise _no_such_patch(seen, patch_id, known)
    active = [item for item in matching if item.state is State.APPLIED or item.interrupted]
    # What was interrupted comes first: it stands between the process and any one state.
    for candidates in ([item for item in active if item.state in INTERRUPTED], active):
        if len(candidates) == 1:
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
        why=", ".join(f"{item.short_id} of {item.contents.old.name}" for item in candidates),
        next_step=f"say which: livegraft revert --pid {seen.pid} {candidates[0].short_id}",
    )
