"""Staging: bringing a patch into a process without putting it in force.

Either the mappings of an earlier application of the same patch are taken again (they stay after a revert,
because pointers into their constants may live on), or new ones are made. Nothing of the program's own is
changed here, and everything can be taken out again.
"""

from __future__ import annotations

import errno
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

from elfdiff.errors import Refused

from ..pausing.keeping import keepable
from ..pausing.steps import OnStep
from ..planning.binding import Binding, BoundSegment, relocate
from ..planning.lookups import Chains, kept, lookup_segments, lookup_span, reusable
from ..planning.placement import MARGIN, Surroundings, candidates, stack_reserve
from ..planning.plan import Part, Situation, binding_ranges, idle_ranges, journal_for_apply, plan_apply, removed_code
from ..process.fitness import no_memory
from ..process.memory import Memory
from ..process.modules import PF_W
from ..process.proc import mapping_over, mappings, mmap_min_addr, stack_limit, start_brk, status
from ..records.gates import is_idle
from ..records.record import (
    FIRST_SLOT,
    Contents,
    Record,
    RecordedFunction,
    RecordedSegment,
    State,
    encode_record,
    encode_slot,
    free_slot,
    permissions,
    record_size,
    segment_digest,
)
from ..remote.borrowed import among
from ..remote.calls import RemoteCaller, RemoteCallError, erase_old_stubs
from ..remote.descriptors import leaked_memory_files
from ..remote.mapping import (
    Image,
    PlaceTaken,
    fill_memory_file,
    make_memory_file,
    map_image,
    may_not_be_executed,
    unmap,
)
from ..targets.target import Snapshot, own_mappings
from ..threads.exclusive import exclusive

_NO_MEMORY = frozenset({errno.ENOMEM, errno.EAGAIN})  # mmap(2): a limit; memory that would have to be locked

@dataclass(frozen=True, slots=True)
class Staged:
    """A patch that is in the process and not in force; ``mapped_bytes`` count its record, too."""

    part: Part
    mapped_bytes: int

    @property
    def contents(self) -> Contents:
        """What its record will say."""
        return self.part.contents


def stage(
    members: Sequence[tuple[Binding, Situation]], seen: Snapshot, memory: Memory, on_step: OnStep
) -> tuple[Staged, ...]:
    """Bring patches into the process, each of another image; ``plan_apply`` of their parts puts them in force.

    Raises Refused where there is no room or the entries are not as known, Busy and LivegraftError where the
    target could not be made to map memory; then what is left of the patches in it is for ``sweep``.
    """
    sweep(seen, memory)
    done: list[Staged] = []
    for binding, now in members:
        behind = in_front_of(binding, done, seen)
        done.append(_stage_one(behind, now, seen, memory, on_step, tuple(done)))
        seen = replace(seen, maps=mappings(seen.pid))  # where the next one finds room
    return tuple(done)


def in_front_of(binding: Binding, earlier: Sequence[Staged], seen: Snapshot) -> Binding:
    """The binding with its stand-ins in front of those of the patches that come into force with it."""
    chains = Chains(seen.records)
    values = {
        item.slot: item.stand_in
        for staged in earlier
        for item in staged.contents.lookups
    }
    return replace(
        binding,
        lookups=tuple(
            slot
            if (first := values.get(slot.address)) is None or first in chains.links(slot.value)
            else replace(slot, value=first, function=first)
            for slot in binding.lookups
        ),
    )


def _stage_one(
    binding: Binding,
    now: Situation,
    seen: Snapshot,
    memory: Memory,
    on_step: OnStep,
    earlier: tuple[Staged, ...],
) -> Staged:
    # What is in force stays as it is until all of a set is.
    candidates = (*now.interrupted, *now.idle) if binding.set_id else (*now.active, *now.idle)
    for record in candidates:
        if record.contents.patch == binding.patch.id and _is_whole(record, binding, seen, memory):
            staged = _stage_again(record, binding, now, memory)
            if staged is not None:
                return staged
    return _stage_anew(binding, now, seen, memory, on_step, earlier)


def _is_whole(record: Record, binding: Binding, seen: Snapshot, memory: Memory) -> bool:
    """Whether all mappings of a record are in place, with the bytes that the patch has today."""
    for segment in record.contents.segments:
        mapping = mapping_over(seen.maps, segment.start, segment.size)
        if mapping is None or mapping.perms != permissions(segment.flags):
            return False
    if not record.contents.segments:
        return False
    if not reusable(binding, record.contents.lookups, seen.records):
        return False
    bias = record.contents.new_bias
    bound = relocate(binding, bias) + lookup_segments(binding, bias, record.contents.lookups)[0]
    if [item.start for item in bound] != [item.start for item in record.contents.segments]:
        return False
    constant = [item for item in bound if not item.flags & PF_W]
    held = memory.read_many([(item.start, len(item.data)) for item in constant])
    return all(item.data == data for item, data in zip(constant, held, strict=True))


def _stage_again(record: Record, binding: Binding, now: Situation, memory: Memory) -> Staged | None:
    """Use the mappings of an idle or interrupted record; None where its slot is too small for what it
    replaces.

    Variables that the patch brought keep their values, as pointers to them may.
    """
    bias = record.contents.new_bias
    journal = journal_for_apply(binding, bias, now, memory.read_many)
    replaces = tuple(item.contents.instance for item in now.active if item.address != record.address)
    contents = replace(
        record.contents,
        instance=secrets.token_hex(8),
        tool_version=version("livegraft"),
        time=int(time.time()),
        journal=journal,
        replaces=replaces,
        lookups=kept(record.contents.lookups, binding, now.everything),
        kept=binding.kept,
        started=status(memory.pid).start_time,
        removed=removed_code(binding),
        idle=binding.idle,
        set_id=binding.set_id,
        set_size=binding.set_size,
    )
    data = encode_slot(contents)
    slot = free_slot(record, data)
    if slot is None:
        return None
    memory.write(record.address + slot, data)  # not in force until its state word says so
    mapped = record.size + sum(item.size for item in contents.segments)
    return Staged(_part(record, contents, slot, now, binding), mapped)


def _part(own: Record, contents: Contents, slot: int, now: Situation, binding: Binding) -> Part:
    return Part(own, contents, slot, now, idle_ranges(binding), binding_ranges(binding), keepable(binding.patch))


def sweep(seen: Snapshot, memory: Memory) -> None:
    """Take away what patchers that did not come to an end have left: mappings never in force, open memory
    files, stubs.

    Raises LivegraftError, Busy.
    """
    sweep_stubs(seen.pid, memory)
    spans = _garbage(seen, memory)
    descriptors = leaked_memory_files(seen.pid)
    if spans:
        with RemoteCaller(seen.pid, memory) as caller:
            unmap(caller, spans)
    for descriptor in descriptors:
        with RemoteCaller(seen.pid, memory, candidates=among(descriptor.threads)) as caller:
            caller.close(descriptor.number)


def sweep_stubs(pid: int, memory: Memory) -> None:
    """Erase the stubs that killed patchers left behind program text. Raises LivegraftError, Busy."""
    with exclusive(pid):
        erase_old_stubs(pid, memory)


def _garbage(seen: Snapshot, memory: Memory) -> tuple[tuple[int, int], ...]:
    prepared = [record for record in seen.records if record.state is State.PREPARED]
    spans = [span for record in prepared for span in own_mappings(record, seen.maps, memory)]
    if len(prepared) == len(seen.records):  # nothing was ever begun, so that nobody has been in a gate
        spans += [(gates.start, gates.size) for gates in seen.gates if is_idle(gates, seen.gates, memory)]
    return tuple(spans)


def span_of(binding: Binding) -> int:
    """Return how many bytes from its lowest a bound patch takes, its stand-ins included."""
    return binding.patch.high - binding.patch.low + lookup_span(binding)


def bases(binding: Binding, seen: Snapshot, size: int) -> tuple[int, ...]:
    """Return where a block of ``size`` bytes may be put for this binding, best first. Raises Refused."""
    module = binding.module
    around = Surroundings(seen.maps, start_brk(seen.pid), mmap_min_addr(), stack_reserve(stack_limit(seen.pid)))
    return candidates(around, module.low, module.high, size, module.fixed_address)


def _stage_anew(
    binding: Binding,
    now: Situation,
    seen: Snapshot,
    memory: Memory,
    on_step: OnStep,
    earlier: tuple[Staged, ...],
) -> Staged:
    # The size of a record depends on where the patch is, by the digits of its addresses.
    room = 2 * record_size(make_draft(binding, binding.module.low, now, memory).contents)
    span = span_of(binding)
    taken: PlaceTaken | None = None
    for base in bases(binding, seen, span + MARGIN + room):
        draft = make_draft(binding, base, now, memory)
        try:
            return _map_at(binding, draft, base + span + MARGIN, now, memory, on_step, earlier)
        except PlaceTaken as error:
            taken = error
    raise Refused(
        "there is no room for the patch",
        why="the program has mapped something at every place that was free a moment ago",
        next_step="try again",
    ) from taken


def _map_at(
    binding: Binding,
    draft: Draft,
    record_at: int,
    now: Situation,
    memory: Memory,
    on_step: OnStep,
    earlier: tuple[Staged, ...],
) -> Staged:
    """Map a draft, from a memory file if possible; a plan is made first, since it may refuse."""
    part = part_of(binding, draft, record_at, now)
    plan_apply((*(item.part for item in earlier), part), memory.read_many)
    contents = draft.contents
    image = Image(record_at, encode_record(contents), draft.segments)
    total = sum(len(part.data) for part in image.parts)
    try:
        if not map_sealed(image, memory, on_step):
            contents = replace(contents, sealed=False)
            image = replace(image, record_bytes=encode_record(contents))
            map_anonymous(image, memory)
    except RemoteCallError as error:
        if error.errno in _NO_MEMORY:
            raise no_memory(memory.pid, total, len(image.parts), error.errno).as_error() from error
        raise
    on_step("mapped")
    return Staged(replace(part, own=replace(part.own, contents=contents), contents=contents), total)


def part_of(binding: Binding, draft: Draft, record_at: int, now: Situation) -> Part:
    """Return a draft as a part of a plan, its record at ``record_at``."""
    size = record_size(draft.contents)
    own = Record(record_at, size, State.PREPARED, State.PREPARED, FIRST_SLOT, draft.contents)
    return _part(own, draft.contents, FIRST_SLOT, now, binding)


def map_anonymous(image: Image, memory: Memory) -> None:
    """Map as anonymous memory, filled from outside. Raises as ``map_image``."""
    with RemoteCaller(memory.pid, memory) as caller:
        map_image(caller, memory, image, None)


def map_sealed(image: Image, memory: Memory, on_step: OnStep) -> bool:
    """Map from a memory file; False where the target can have none, or may not execute it. Raises as ``map_image``.

    Two visits: between them the file is filled from here, and no thread of the target is held for that.
    """
    with RemoteCaller(memory.pid, memory) as caller:
        file = make_memory_file(caller)
    if file is None:
        return False
    on_step("memory file")
    fill_memory_file(memory.pid, file, image)  # where it fails, ``sweep`` closes the file
    with RemoteCaller(memory.pid, memory, candidates=among(file.threads)) as caller:
        try:
            done = _map_or_not(caller, memory, image, file.number)
        except PlaceTaken:
            caller.close(file.number)  # after any other error it is swept
            raise
        caller.close(file.number)
    return done


def _map_or_not(caller: RemoteCaller, memory: Memory, image: Image, descriptor: int) -> bool:
    try:
        map_image(caller, memory, image, descriptor)
    except RemoteCallError as error:
        if may_not_be_executed(error):
            return False
        raise
    return True


@dataclass(frozen=True, slots=True)
class Draft:
    """A patch bound to a place: what its record will say, and its segments."""

    contents: Contents
    segments: tuple[BoundSegment, ...]


def make_draft(binding: Binding, base: int, now: Situation, memory: Memory) -> Draft:
    """Return the patch as it will be when its lowest byte is at ``base``. Writes nothing.

    Raises Refused where a reference does not reach, or an entry jump cannot be placed.
    """
    patch = binding.patch
    bias = base - patch.low
    extra, lookups = lookup_segments(binding, bias)
    segments = relocate(binding, bias) + extra
    contents = Contents(
        patch=patch.id,
        instance=secrets.token_hex(8),
        tool_version=version("livegraft"),
        time=int(time.time()),
        sealed=True,
        old=patch.old,
        old_bias=binding.old_bias,
        new=patch.new,
        new_bias=bias,
        eh_frame_hdr=None if patch.eh_frame_hdr is None else patch.eh_frame_hdr + bias,
        segments=tuple(
            RecordedSegment(item.start, len(item.data), item.flags, segment_digest(item.data)) for item in segments
        ),
        functions=_functions(binding, bias),
        journal=journal_for_apply(binding, bias, now, memory.read_many),
        replaces=tuple(record.contents.instance for record in now.active),
        lifted=tuple(sorted({item.code for item in patch.findings if item.lifted})),
        lookups=lookups,
        kept=binding.kept,
        started=status(memory.pid).start_time,
        removed=removed_code(binding),
        idle=binding.idle,
        set_id=binding.set_id,
        set_size=binding.set_size,
    )
    return Draft(contents, segments)


def _functions(binding: Binding, bias: int) -> tuple[RecordedFunction, ...]:
    return tuple(
        RecordedFunction(
            name=item.name,
            old_start=None if item.old_start is None else item.old_start + binding.old_bias,
            old_size=item.old_size,
            new_start=item.new_start + bias,
            new_size=item.new_size,
            entry_jump=item.entry_jump,
        )
        for item in binding.patch.functions
    )
