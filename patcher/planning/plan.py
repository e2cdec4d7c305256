"""The plan: every byte that a transaction will write, computed before any thread is stopped.

Pure: a binding, the records of the process and the bytes that are at the entries now go in; page writes,
state words and forbidden ranges come out. What the entries hold is taken from memory and not from what a
record says, so that one rule covers a clean process, a patched one, and one whose patcher was killed between
two writes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from elfdiff.errors import Refused, TargetDamaged
from trampolines.entry_x86_64 import ENTRY_JUMP_SIZE, entry_jump
from trampolines.errors import TrampolineError

from ..process.modules import PF_X, Module
from ..records.gates import Gates, jumps_to
from ..records.record import Contents, JournalEntry, KeptCode, Record, RecordedFunction, State, state_word
from ..stacks.forbidden import ForbiddenRange
from .binding import Binding, overlay
from .lookups import WordWrite, hook_writes, unhook_writes

ReadBytes = Callable[[Sequence[tuple[int, int]]], list[bytes]]
"""Return the bytes of every (absolute address, size): Memory.read_many."""

_PAGE = 4096
_SUPERSEDED = frozenset({State.REPLACED, State.REVERTED})


@dataclass(frozen=True, slots=True)
class Situation:
    """The records of one image of a process: what is in force, what was interrupted, what lies idle.

    ``stale`` are those whose state word does not say yet that they were replaced.
    """

    applied: Record | None
    interrupted: tuple[Record, ...]
    idle: tuple[Record, ...]
    prepared: tuple[Record, ...]
    stale: tuple[Record, ...]
    everything: tuple[Record, ...] = ()  # the records of all images
    gates: tuple[Gates, ...] = ()  # those of the process, used or not
    waited: tuple[KeptCode, ...] = ()  # code that does not change and must be idle all the same

    @property
    def active(self) -> tuple[Record, ...]:
        """Every record whose entry jumps may be in place."""
        return (*((self.applied,) if self.applied else ()), *self.interrupted)


@dataclass(frozen=True, slots=True)
class PageWrite:
    """One write: ``before`` is at ``address`` now, ``after`` will be. Never crosses a page boundary."""

    address: int
    before: bytes
    after: bytes


@dataclass(frozen=True, slots=True)
class StateWrite:
    """One state word: the record's address, the 8 bytes that it has now, and those that it will have."""

    record: int
    before: bytes
    after: bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """What the pause does: ``first`` state words, ``hooks``, ``pages``, ``unhooks``, then the ``last`` state words.

    Each in order. Hooks and unhooks are words through which unwind tables are found: there before the code that needs
    them, and as long. No thread may be in what is ``forbidden``, and no stack that no thread runs on may wait in what
    is ``parkable``, a part of that. ``unchanged`` names what is forbidden although it does not change (``idleness``),
    and ``keepable`` what could be kept live (``keeping``).
    """

    first: tuple[StateWrite, ...]
    pages: tuple[PageWrite, ...]
    last: tuple[StateWrite, ...]
    forbidden: tuple[ForbiddenRange, ...]
    parkable: tuple[ForbiddenRange, ...]
    hooks: tuple[PageWrite, ...] = ()
    unhooks: tuple[PageWrite, ...] = ()
    unchanged: frozenset[str] = frozenset()
    keepable: frozenset[str] = frozenset()

    @property
    def writes(self) -> tuple[PageWrite, ...]:
        """All writes between the first and the last state words, in order."""
        return (*self.hooks, *self.pages, *self.unhooks)


@dataclass(frozen=True, slots=True)
class Part:
    """One patch that is to come into force: its record, what ``slot`` of it will say, and the image as it is now.

    ``idle`` and ``unparkable`` are ranges that nobody may be in, beside those that the records name; no stack is parked
    in the second. ``keepable`` as in ``Plan``.
    """

    own: Record
    contents: Contents
    slot: int
    now: Situation
    idle: tuple[ForbiddenRange, ...] = ()
    unparkable: tuple[ForbiddenRange, ...] = ()
    keepable: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Ending:
    """One patch that is to go out of force: an active record, and its image as it is now."""

    record: Record
    now: Situation


def situation(records: Iterable[Record], module: Module, gates: tuple[Gates, ...] = ()) -> Situation:
    """Sort the records of ``module`` by what they mean. ``gates`` are those that were found in the process.

    Raises TargetDamaged where two records both claim to be in force, which no sequence of commands leaves
    behind.
    """
    everything = tuple(records)
    own = [item for item in everything if _is_of(item, module)]
    applied = [item for item in own if item.state is State.APPLIED]
    if len(applied) > 1:
        raise TargetDamaged(
            f"two records say that their patch of {module.path} is in force",
            why=", ".join(f"{item.short_id} at {item.address:#x}" for item in applied),
            next_step="restart the program",
        )
    return Situation(
        applied=applied[0] if applied else None,
        interrupted=tuple(item for item in own if item.interrupted),
        idle=tuple(item for item in own if item.state in _SUPERSEDED),
        prepared=tuple(item for item in own if item.state is State.PREPARED),
        stale=tuple(item for item in own if item.state is not item.written),
        everything=everything,
        gates=gates,
    )


def _is_of(record: Record, module: Module) -> bool:
    contents = record.contents
    return contents.old.build_id == module.build_id and contents.old_bias == module.bias


def journal_for_apply(binding: Binding, patch_bias: int, now: Situation, read: ReadBytes) -> tuple[JournalEntry, ...]:
    """Return the journal of applying a patch whose load bias is ``patch_bias``, by rising address.

    It covers the entries of the patch and those of every active record, which go back to their file's bytes
    unless the patch redirects them. Raises Refused where an entry jump cannot be placed.
    """
    jumps = _entry_jumps(binding, patch_bias)
    pristine = _known_pristine(now.active)
    unknown = [address for address in jumps if address not in pristine]
    spans = [(address, ENTRY_JUMP_SIZE) for address in unknown]
    pristine.update(zip(unknown, read(spans), strict=True))
    settled = _settled(now.applied)
    journal = []
    for address in sorted(pristine):
        file_bytes = pristine[address]
        before = settled.get(address, file_bytes)
        journal.append(JournalEntry(address, file_bytes, before, jumps.get(address, file_bytes)))
    _require_apart(journal)
    return tuple(journal)


def _settled(applied: Record | None) -> dict[int, bytes]:
    """What the entries hold in the state to go back to: whatever was interrupted counts as not begun."""
    return {entry.address: entry.after for entry in applied.contents.journal} if applied else {}


def _known_pristine(records: Iterable[Record]) -> dict[int, bytes]:
    return {entry.address: entry.pristine for record in records for entry in record.contents.journal}


def _entry_jumps(binding: Binding, patch_bias: int) -> dict[int, bytes]:
    jumps = {}
    for function in binding.patch.functions:
        if not function.entry_jump or function.old_start is None or function.old_size is None:
            continue
        address = function.old_start + binding.old_bias
        _require_room(function.name, address, function.old_size, binding.module)
        jumps[address] = _jump(function.name, address, function.new_start + patch_bias)
    return jumps


def _jump(name: str, address: int, target: int) -> bytes:
    try:
        return entry_jump(address, target)
    except TrampolineError as error:
        raise Refused(f"the function {name} cannot be redirected", why=str(error)) from error


def _require_room(name: str, address: int, size: int, module: Module) -> None:
    if not (module.low <= address and address + max(size, ENTRY_JUMP_SIZE) <= module.high):
        raise Refused(f"the function {name} lies outside of {module.path}", why=f"its address would be {address:#x}")
    if address % _PAGE > _PAGE - ENTRY_JUMP_SIZE:
        raise Refused(
            f"the function {name} cannot be redirected safely",
            why=f"an entry jump at {address:#x} would cross a page boundary, and a death of livegraft "
            "between the two pages would leave half of it",
            next_step="restart the program instead",
        )


def _require_apart(journal: Sequence[JournalEntry]) -> None:
    for entry, following in itertools.pairwise(journal):
        if entry.address + len(entry.after) > following.address:
            raise Refused(
                "two entry jumps would overlap",
                why=f"they are at {entry.address:#x} and {following.address:#x}",
                next_step="restart the program instead",
            )


def idle_ranges(binding: Binding) -> tuple[ForbiddenRange, ...]:
    """Return what must be idle beside the functions of a patch: old functions that the new build no longer has."""
    return code_ranges(removed_code(binding))


def code_ranges(code: Iterable[KeptCode]) -> tuple[ForbiddenRange, ...]:
    """Return pieces of code as ranges that nobody may be in."""
    return tuple(ForbiddenRange(item.name, item.start, item.start + item.size) for item in code)


def removed_code(binding: Binding) -> tuple[KeptCode, ...]:
    """Return the old functions that the new build no longer has and that are not kept, absolute."""
    kept = {item.start - binding.old_bias for item in binding.kept}
    return tuple(
        KeptCode(item.name, item.start + binding.old_bias, item.size)
        for item in binding.patch.removed
        if item.size and item.start not in kept
    )


def binding_ranges(binding: Binding) -> tuple[ForbiddenRange, ...]:
    """Return what binds the slots that are to lead to the patch: a thread about to bind one would write over it.

    No stack is parked there: no switch is made on the way, and an unbound slot itself leads into its stub.
    """
    return tuple(item for slot in binding.lookups for item in slot.binding)


def plan_apply(parts: Sequence[Part], read: ReadBytes) -> Plan:
    """Return the plan that puts patches, each of another image, in force together.

    Raises Refused where an entry holds bytes that neither the file nor a record accounts for.
    """
    own = {part.own.address for part in parts}
    put_aside: list[StateWrite] = []
    pages: list[PageWrite] = []
    parkable: list[ForbiddenRange] = []
    for part in parts:
        now = part.now
        others = [item for item in now.active if item.address not in own]
        put_aside += [_to(item, State.REPLACED) for item in others]
        put_aside += [_to(item, item.state) for item in now.stale if item not in others and item.address not in own]
        wanted = {entry.address: entry.after for entry in part.contents.journal}
        pages += page_writes(wanted, _known_values(now, part.contents.journal), read)
        in_force = [item for record in now.active for item in _ranges(record.contents)]
        parkable += [*_old_ranges(part.contents), *part.idle, *in_force, *code_ranges(now.waited)]
    return Plan(
        first=tuple(_change(part.own, State.APPLYING, part.slot) for part in parts),
        hooks=_hooks(parts, read),
        pages=tuple(pages),
        # As soon as one of a set is applied, all of them are (``record``), and what they replace is replaced.
        last=(
            *(_change(part.own, State.APPLIED, part.slot, State.APPLYING) for part in parts),
            *dict.fromkeys(put_aside),
        ),
        forbidden=disjoint((*parkable, *(item for part in parts for item in part.unparkable))),
        parkable=disjoint(parkable),
        unchanged=frozenset(item.name for part in parts for item in part.now.waited),
        keepable=frozenset(name for part in parts for name in part.keepable),
    )


def _hooks(parts: Sequence[Part], read: ReadBytes) -> tuple[PageWrite, ...]:
    """The stand-ins of several patches in one slot are a chain already: each is hooked in front of the one before."""
    written: dict[int, bytes] = {}

    def held(spans: Sequence[tuple[int, int]]) -> list[bytes]:
        found = zip(spans, read(spans), strict=True)
        return [written.get(address, data) for (address, _), data in found]

    writes: list[WordWrite] = []
    earlier: list[Record] = []
    for part in parts:
        made = hook_writes(part.contents.lookups, (*part.now.everything, *earlier), held)
        written |= {item.address: item.after for item in made}
        writes += made
        earlier.append(replace(part.own, state=State.APPLYING, contents=part.contents))
    return _words(writes)


def plan_revert(endings: Sequence[Ending], read: ReadBytes, loaded: Sequence[Module] = ()) -> Plan:
    """Return the plan that takes patches, each of another image and all in the same state, out of force together.

    An applied patch, or one whose revert was interrupted, goes back to the bytes of the file. One whose apply
    was interrupted is undone: what was in force before it is in force again. ``loaded`` are the images of the
    process. Raises Refused as ``plan_apply`` does.
    """
    own = {item.record.address for item in endings}
    settled: list[StateWrite] = []
    begin: list[StateWrite] = []
    pages: list[PageWrite] = []
    ended: list[StateWrite] = []
    gone = [item.record for item in endings]
    for record, now in ((item.record, item.now) for item in endings):
        undo = record.state is State.APPLYING
        during = State.APPLYING if undo else State.REVERTING
        pristine = _known_pristine(now.active)
        back = _settled(now.applied) if undo else {}
        wanted = {address: back.get(address, file_bytes) for address, file_bytes in pristine.items()}
        pages += page_writes(wanted, _known_values(now, ()), read)
        others = [item for item in now.interrupted if item.address not in own]
        gone += others
        settled += [_to(item, item.state) for item in now.stale if item.address not in own]
        begin += [] if record.written is during else [_change(record, during, record.slot)]
        ended += [_to(item, State.REVERTED) for item in others]
    everything = endings[0].now.everything
    in_force = [range_ for item in endings for one in item.now.active for range_ in _ranges(one.contents)]
    waited = [one for item in endings for one in item.now.waited]
    forbidden = disjoint((*in_force, *code_ranges(waited)))
    return Plan(
        first=(*dict.fromkeys(settled), *begin),
        pages=tuple(pages),
        unhooks=_words(unhook_writes(gone, everything, loaded, read)),
        last=(*ended, *(_reverted(item.record) for item in endings)),
        forbidden=forbidden,
        parkable=forbidden,
        unchanged=frozenset(one.name for one in waited),
    )


def _reverted(record: Record) -> StateWrite:
    during = State.APPLYING if record.state is State.APPLYING else State.REVERTING
    return _change(record, State.REVERTED, record.slot, during)


def _words(writes: Iterable[WordWrite]) -> tuple[PageWrite, ...]:
    return tuple(PageWrite(item.address, item.before, item.after) for item in writes)


def _change(record: Record, state: State, slot: int, before: State | None = None) -> StateWrite:
    old = state_word(record.written, record.slot) if before is None else state_word(before, slot)
    return StateWrite(record.address, old, state_word(state, slot))


def _to(record: Record, state: State) -> StateWrite:
    return _change(record, state, record.slot)


def _known_values(now: Situation, journal: Sequence[JournalEntry]) -> dict[int, set[bytes]]:
    known = jumps_to(now.gates)  # a patcher has died, and whatever they go on with is written over
    for entries in (journal, *(record.contents.journal for record in now.active)):
        for entry in entries:
            known.setdefault(entry.address, set()).update((entry.pristine, entry.before, entry.after))
    return known


def page_writes(wanted: dict[int, bytes], known: dict[int, set[bytes]], read: ReadBytes) -> tuple[PageWrite, ...]:
    """Return the writes that make every address hold its wanted bytes, one a page, by rising address.

    A page where all is as wanted is left out. Raises Refused where an address holds none of its ``known``
    values.
    """
    pages: dict[int, list[int]] = {}
    for address in sorted(wanted):
        pages.setdefault(address // _PAGE, []).append(address)
    spans = [(group[0], group[-1] + len(wanted[group[-1]]) - group[0]) for group in pages.values()]
    writes = []
    for group, (start, _), data in zip(pages.values(), spans, read(spans), strict=True):
        for address in group:
            held = data[address - start : address - start + len(wanted[address])]
            _require_known(address, held, known.get(address, set()))
        after = overlay(start, data, {address: wanted[address] for address in group})
        if after != data:
            writes.append(PageWrite(start, data, after))
    return tuple(writes)


def _require_known(address: int, held: bytes, known: set[bytes]) -> None:
    if held not in known:
        raise Refused(
            f"the function entry at {address:#x} was changed by somebody else",
            why=f"it holds {held.hex(' ')}, which is neither the file's nor any patch's",
            next_step="detach the debugger or instrumentation that wrote there, or restart the program",
        )


def _old_ranges(contents: Contents) -> list[ForbiddenRange]:
    """The old code of every patched function; of what is kept, only what the entry jump takes."""
    kept = {item.start for item in contents.kept}
    sizes = [
        (function, ENTRY_JUMP_SIZE * function.entry_jump if function.old_start in kept else _taken(function))
        for function in contents.functions
    ]
    return [
        ForbiddenRange(function.name, function.old_start, function.old_start + size)
        for function, size in sizes
        if function.old_start is not None and function.old_size and size
    ]


def _taken(function: RecordedFunction) -> int:
    """Bytes of an old function, with the padding that its entry jump takes where it is shorter than that."""
    size = function.old_size or 0
    return max(size, ENTRY_JUMP_SIZE) if function.entry_jump else size


def _ranges(contents: Contents) -> list[ForbiddenRange]:
    """All code that a patch in force runs or has redirected: its own text by function, and the old
    functions."""
    patch = f"patch {contents.patch[:12]}"
    functions = [
        ForbiddenRange(f"{item.name} ({patch})", item.new_start, item.new_start + item.new_size)
        for item in contents.functions
        if item.new_size
    ]
    text = [
        ForbiddenRange(patch, item.start, item.start + item.size) for item in contents.segments if item.flags & PF_X
    ]
    jumps = [
        ForbiddenRange(f"entry at {entry.address:#x}", entry.address, entry.address + len(entry.after))
        for entry in contents.journal
    ]
    return [*functions, *_old_ranges(contents), *text, *jumps]


def disjoint(ranges: Iterable[ForbiddenRange]) -> tuple[ForbiddenRange, ...]:
    """Return ranges that cover the same addresses without overlap, by rising address.

    Where several cover an address the shortest one gives the name, so that a function wins over its segment.
    """
    unique = sorted(set(ranges), key=lambda item: (item.end - item.start, item.start, item.name))
    cuts = sorted({edge for item in unique for edge in (item.start, item.end)})
    owners: dict[int, ForbiddenRange] = {}
    positions = {cut: index for index, cut in enumerate(cuts)}
    for item in unique:
        for index in range(positions[item.start], positions[item.end]):
            owners.setdefault(index, item)
    out: list[ForbiddenRange] = []
    for index in sorted(owners):
        start, end, name = cuts[index], cuts[index + 1], owners[index].name
        if out and out[-1].end == start and out[-1].name == name:
            out[-1] = ForbiddenRange(name, out[-1].start, end)
        else:
            out.append(ForbiddenRange(name, start, end))
    return tuple(out)
