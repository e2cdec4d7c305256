"""Gating: a plan that writes several pages of entry jumps becomes one that comes into force at a single write.

Pure but for the room that the gates need. The pages of a gated plan are, in order: the gates themselves, to which
nothing leads yet; each page with jumps to the gates, which go on as before; the word, by which all of them go on as
after; each page with what it is to hold in the end. So the threads that run on when the patcher dies run one version,
whatever it was that it wrote last, and every step can be undone by writing what was there.

The gates of an image lie near it. Where a plan writes to several images, all gates ask the word of the first ones.

A plan stays as it is where one write does it all, and where code at an entry cannot run elsewhere
(``trampolines.gate_x86_64``) or the target can map no room: then a death between two pages leaves a mixed set until
the next command, which ``Gated.why_not`` says.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from elfdiff.errors import Refused
from trampolines.entry_x86_64 import ENTRY_JUMP_SIZE, entry_jump
from trampolines.errors import TrampolineError
from trampolines.gate_x86_64 import GATE_ALIGNMENT, LONGEST_WINDOW, gate

from ..pausing.steps import no_step
from ..planning.binding import BoundSegment, overlay
from ..planning.placement import Surroundings, candidates, stack_reserve
from ..planning.plan import PageWrite, Plan, disjoint
from ..process.memory import Memory
from ..process.modules import PF_R, PF_X, Module
from ..process.proc import mapping_over, mappings, mmap_min_addr, read_proc_file, stack_limit, start_brk
from ..records.gates import (
    AFTER,
    BEFORE,
    HEADER_SIZE,
    MAGIC,
    ROW_SIZE,
    WORD_OFFSET,
    Gates,
    encode_gates,
    find_gates,
    gate_ranges,
    is_idle,
    seen_through,
)
from ..records.record import JournalEntry
from ..remote.calls import RemoteCallError
from ..remote.mapping import Image, PlaceTaken
from ..targets.target import Snapshot
from .staging import map_anonymous, map_sealed

_PAGE = 4096
_LONGEST_GATE = 16 * (ENTRY_JUMP_SIZE + 5)
"""Bytes kept for one: the fixed part, and twice five instructions each of which became a longer one."""
_REACH = 1 << 31
_FAR = 1 << 62
"""A word that no image is near: its gates are the longest."""


@dataclass(frozen=True, slots=True)
class Gated:
    """A plan, and why a death between two of its pages would leave a mixed set; empty where it would not."""

    plan: Plan
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class _Change:
    """One entry: what it holds, what that does (``before``), what it will hold; and the old code from there on."""

    address: int
    before: bytes
    after: bytes
    following: bytes


@dataclass(frozen=True, slots=True)
class _Room:
    """The gates of one image as they will be: absolute start, contents, and the jump from each entry to its gate."""

    start: int
    contents: bytes
    jumps: dict[int, bytes]


def with_gates(
    plan: Plan, known: Sequence[JournalEntry], images: Sequence[Module], seen: Snapshot, memory: Memory
) -> Gated:
    """Return the gated plan for a process of which ``known`` are the entries, as its believable records say.

    ``images`` are those that the plan changes. May map room for gates in the target. Raises Refused where a gate that
    was found does what no record knows; Busy, LivegraftError, as ``RemoteCaller`` does.
    """
    if seen.gates:  # who is in one that a dead patcher left has not gone on yet
        plan = replace(plan, forbidden=disjoint((*plan.forbidden, *gate_ranges(seen.gates))))
    if len(plan.pages) < 2:
        return Gated(plan)
    addresses = sorted({entry.address for entry in known})
    shadow_stack = "shstk" in read_proc_file(seen.pid, "status")  # x86_Thread_features, Documentation/arch/x86/shstk
    changes = {
        module: _changes([write for write in plan.pages if write.address in module], addresses, known, seen, memory)
        for module in images
    }
    changes = {module: found for module, found in changes.items() if found}
    rooms: list[_Room] = []
    try:
        for module, found in changes.items():  # can it be done at all, before anything is mapped
            _contents(module.low - _size(len(found)), _FAR, found, shadow_stack)
        for module, found in changes.items():
            start = _room(_size(len(found)), module, seen, memory, [room.start for room in rooms])
            word = (rooms[0].start if rooms else start) + WORD_OFFSET
            rooms.append(_Room(start, *_contents(start, word, found, shadow_stack)))
    except TrampolineError as error:
        return Gated(plan, str(error))
    except RemoteCallError as error:
        return Gated(plan, f"the target can map no room for it: {error.why}")
    own = [Gates(room.start, len(room.contents), False, ()) for room in rooms]
    forbidden = disjoint((*plan.forbidden, *gate_ranges(own)))
    return Gated(replace(plan, pages=_order(plan.pages, rooms, memory), forbidden=forbidden))


def _covers(write: PageWrite, address: int) -> bool:
    return write.address <= address and address + ENTRY_JUMP_SIZE <= write.address + len(write.before)


def _size(entries: int) -> int:
    """Bytes of room for so many entries: a power of two of pages, so that room is seldom too small a second time."""
    needed = HEADER_SIZE + entries * (ROW_SIZE + _LONGEST_GATE)
    return _PAGE << (-(-needed // _PAGE) - 1).bit_length()


def _changes(
    pages: Sequence[PageWrite],
    addresses: Sequence[int],
    known: Sequence[JournalEntry],
    seen: Snapshot,
    memory: Memory,
) -> tuple[_Change, ...]:
    values: dict[int, set[bytes]] = {}
    for entry in known:
        values.setdefault(entry.address, set()).update((entry.pristine, entry.before, entry.after))
    changes = []
    for write in pages:
        for address in (item for item in addresses if _covers(write, item)):
            at = address - write.address
            held, after = (data[at : at + ENTRY_JUMP_SIZE] for data in (write.before, write.after))
            before = seen_through(seen.gates, address, held)
            if before not in values[address]:
                raise Refused(
                    f"the gate of the entry at {address:#x} cannot be believed",
                    why=f"it would go on with {before.hex(' ')}, of which no record knows",
                    next_step="restart the program; something in it has written over the gates",
                )
            if held != after:
                changes.append(_Change(address, before, after, _following(address, seen, memory)))
    return tuple(changes)


def _following(address: int, seen: Snapshot, memory: Memory) -> bytes:
    mapping = mapping_over(seen.maps, address, ENTRY_JUMP_SIZE)
    end = address + ENTRY_JUMP_SIZE if mapping is None else min(address + LONGEST_WINDOW, mapping.end)
    return memory.read(address + ENTRY_JUMP_SIZE, end - address - ENTRY_JUMP_SIZE)


def _contents(
    start: int, word: int, changes: Sequence[_Change], shadow_stack: bool
) -> tuple[bytes, dict[int, bytes]]:
    """The bytes of the mapping at ``start`` whose gates ask ``word``, and the jump that leads to each entry's gate."""
    code = b""
    first = start + HEADER_SIZE + len(changes) * ROW_SIZE
    first += -first % GATE_ALIGNMENT
    rows = []
    for change in changes:
        address = first + len(code)
        before, after = ((data + change.following, change.address) for data in (change.before, change.after))
        made = gate(address, word, before, after, shadow_stack)
        code += made.ljust(-(-len(made) // GATE_ALIGNMENT) * GATE_ALIGNMENT, b"\xcc")
        rows.append((change.address, address, change.before, change.after))
    jumps = {address: entry_jump(address, place) for address, place, _, _ in rows}
    return encode_gates(rows, bytes(first - start - HEADER_SIZE - len(changes) * ROW_SIZE) + code, word), jumps


def _order(pages: Sequence[PageWrite], rooms: Sequence[_Room], memory: Memory) -> tuple[PageWrite, ...]:
    """All writes in order."""
    fill = []
    for room in rooms:
        held = memory.read(room.start, len(room.contents))
        fill += [
            PageWrite(room.start + at, held[at : at + _PAGE], room.contents[at : at + _PAGE])
            for at in range(0, len(held), _PAGE)
        ]
    jumps = {address: jump for room in rooms for address, jump in room.jumps.items()}
    switched = [(page, overlay(page.address, page.before, _within(page, jumps))) for page in pages]
    return (
        *fill,
        *(PageWrite(page.address, page.before, gated) for page, gated in switched),
        PageWrite(rooms[0].start, MAGIC + BEFORE, MAGIC + AFTER),
        *(PageWrite(page.address, gated, page.after) for page, gated in switched),
    )


def _within(page: PageWrite, jumps: dict[int, bytes]) -> dict[int, bytes]:
    return {address: jump for address, jump in jumps.items() if _covers(page, address)}


def _room(size: int, module: Module, seen: Snapshot, memory: Memory, given: Collection[int]) -> int:
    """Where gates may be put: where others were that nobody uses, or in a new mapping. ``given`` are other images'.

    Raises RemoteCallError where the target may map nothing, Refused where there is no room near the image.
    """
    maps = mappings(seen.pid)  # since it was looked at, the patch has been mapped and what nobody used unmapped
    found = find_gates(maps, memory)
    for old in found:
        near = max(module.high, old.start + old.size) - min(module.low, old.start) < _REACH
        if old.size >= size and near and old.start not in given and is_idle(old, found, memory):
            return old.start
    reserve = stack_reserve(stack_limit(seen.pid))
    around = Surroundings(maps, start_brk(seen.pid), mmap_min_addr(), reserve)
    taken: PlaceTaken | None = None
    for start in candidates(around, module.low, module.high, size, module.fixed_address):
        empty = encode_gates((), b"", start + WORD_OFFSET).ljust(size, b"\0")
        image = Image(0, b"", (BoundSegment(start, PF_R | PF_X, empty),))
        try:
            if not map_sealed(image, memory, no_step):
                map_anonymous(image, memory)
        except PlaceTaken as error:
            taken = error
        else:
            return start
    raise Refused(
        "there is no room for the patch",
        why="the program has mapped something at every place that was free a moment ago",
        next_step="try again",
    ) from taken
