"""Whether what two references name says the same: strings, numbers, tables, pointer tables, initial values.

A stripped file does not say how long an object is. What is known is where objects begin: at the addresses that
code and pointer slots name. So data is compared in *segments*, from a pinned address to the next address that
both builds name, or that either build pins elsewhere. A difference is blamed on the segment's first address and,
since a table's later elements may be read through its first address, on the segments before it, back to a barrier
(``Barrier``): a string that fills its segment, or a switch table.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from elfdiff.correspondence.addressmap import AddressMap
from elfdiff.correspondence.matching import Matching
from elfdiff.correspondence.pairing import distinct
from elfdiff.decoding.code import LEA, Code, FieldKind
from elfdiff.decoding.jumptables_x86_64 import JumpTable
from elfdiff.images.image import Addresses, Kind

_CONSTANT = Kind.CONSTANT
CONSTANTS = (Kind.CONSTANT, Kind.RELRO)
COMPARED = (Kind.CONSTANT, Kind.RELRO, Kind.DATA, Kind.BSS)
MAX_LOAD = 64
"""Bytes of the widest vector load: what a number that is only loaded can be long."""

MIN_OFFSETS = 12
"""Bytes of the shortest table of offsets that is recognised."""
MAX_ROW = 64
ROW_SIZES = (2, 4, 8, 16, 32, 64)
"""Strings that fill neighbouring pieces of such a size exactly may be rows of an array."""

OBJECT_ALIGNMENT = 32
"""gcc aligns static objects of 32 bytes and more to this on x86-64; clang to 16."""

MAX_ENDS = 3
"""Places behind a segment at which an array that it is a part of may end."""

Pair = tuple[int, int]
"""(old address, new address)."""


class Barrier(IntEnum):
    """Whether a reader of a segment may read on into the next one."""

    OPEN = 0  # a table, for all we know
    LOADED = 1  # only ever loaded by itself: its own readers do not read on, but it may be an element of a table
    TEXT = 2  # a string with its NUL
    TABLE = 3  # a switch table


@dataclass(frozen=True)
class Segment:
    """``size`` bytes at ``old`` and ``new`` that were compared.

    ``reach``: where the next segment begins, 0 where it lies elsewhere in the two builds. ``whole``: the object ends
    at the same place in both.
    """

    old: int
    new: int
    size: int
    reach: int
    equal: bool
    whole: bool
    barrier: Barrier


@dataclass(frozen=True)
class ConstantVerdicts:
    """``differing``: pairs whose content differs, blame included. ``segments`` by pair."""

    differing: frozenset[Pair]
    segments: dict[Pair, Segment] = field(repr=False)
    slot_pairs: dict[int, int] = field(repr=False)  # new address -> old address, learned from paired slots

    def same(self, old: int, new: int) -> bool:
        """Whether a pair was compared and found equal over an extent that is the same in both builds."""
        segment = self.segments.get((old, new))
        if segment is None or (old, new) in self.differing:
            return False
        return segment.whole or segment.barrier is not Barrier.OPEN


def compare_constants(
    old: Code,
    new: Code,
    matching: Matching,
    addresses: AddressMap,
    tables: tuple[dict[int, JumpTable], dict[int, JumpTable]],
) -> ConstantVerdicts:
    """Compare everything that pins pair, and what its pointer slots lead to."""
    return _Comparer(old, new, matching, addresses, tables).run()


class _Side:
    """One build as the comparer walks it."""

    def __init__(self, code: Code, pinned: Addresses, tables: dict[int, JumpTable]) -> None:
        self.code = code
        self.image = code.image
        self.tables = tables
        # Lists, since they are searched for one address at a time.
        self.pinned: list[int] = np.unique(pinned).tolist()
        self.named: list[int] = code.referenced.tolist()
        self.slot_list: list[int] = code.image.relative_places.tolist()
        self.view = memoryview(code.image.memory.tobytes())
        self._strings: dict[int, bytes | None] = {}
        self.base = code.image.base
        self.slots = code.image.relative_places
        references = code.references
        taken = (references.opcode == LEA) | (references.kind >= FieldKind.ABSOLUTE_DISPLACEMENT)
        self.address_taken = set(np.unique(references.target[taken]).tolist())
        self.address_taken.update(code.image.relative_targets.tolist())

    def next_pinned(self, address: int) -> int:
        """The next pinned address, at most the section's end."""
        return self._following(self.pinned, address)

    def next_named(self, address: int) -> int:
        """The next address that anything names, at most the section's end."""
        return self._following(self.named, address)

    def _following(self, addresses: list[int], address: int) -> int:
        section = self.image.section_at(address)
        end = section.end if section else address
        index = bisect.bisect_right(addresses, address)
        return min(end, addresses[index]) if index < len(addresses) else end

    def string_alone(self, address: int) -> bytes | None:
        """The string at an address when nothing but zeros follows it up to the next named address."""
        if address not in self._strings:
            self._strings[address] = self._string_alone(address)
        return self._strings[address]

    def _string_alone(self, address: int) -> bytes | None:
        section = self.image.section_at(address)
        if section is None or section.kind is not _CONSTANT:
            return None
        index, end = bisect.bisect_right(self.named, address), section.end
        if index < len(self.named) and self.named[index] < end:
            end = self.named[index]
        raw = bytes(self.content(address, end - address))
        text = raw.rstrip(b"\0")
        return text if 0 < len(text) < len(raw) and not text.translate(None, _TEXT) else None

    def is_text(self, address: int, size: int) -> bool:
        """Whether a stretch is one string and its padding; the bytes of a pointer are none, whatever they look like."""
        return not len(self.slot_offsets(address, size)) and _fills(bytes(self.content(address, size)))

    def content(self, address: int, size: int) -> memoryview:
        """What the file holds there."""
        return self.view[address - self.base : address - self.base + size]

    def pointer(self, address: int) -> int:
        """What the pointer slot at an address points to."""
        found = self.image.pointer_at(address)
        assert found is not None
        return found

    @cached_property
    def _rows_by_target(self) -> NDArray[np.int64]:
        return np.argsort(self.code.references.target, kind="stable")

    def users(self, address: int) -> frozenset[int]:
        """The functions that name an address."""
        references, order = self.code.references, self._rows_by_target
        first, last = np.searchsorted(references.target, [address, address + 1], sorter=order)
        return frozenset(references.function[order[first:last]].tolist())

    def may_be_array(self, start: int, element: int, ends: list[int]) -> bool:
        """Whether one array may begin at ``start``, have ``element`` inside and end in front of one of ``ends``.

        It may if for some size of its elements no place in them is a pointer in one and a number in another.
        """
        distance = element - start
        if distance % 8:
            return True
        for end in ends:
            words = np.arange(start, end - 7, 8, dtype=np.int64)
            first, last = bisect.bisect_left(self.slot_list, start), bisect.bisect_left(self.slot_list, end)
            pointer = np.isin(words, self.slots[first:last])
            number = ~pointer & (np.frombuffer(self.content(start, 8 * len(words)), np.int64) != 0)
            filled = int(np.flatnonzero(pointer | number)[-1]) + 1 if (pointer | number).any() else 0
            for size in range(1, distance // 8 + 1):
                whole = len(words) - len(words) % size
                fits = whole >= filled and 8 * (len(words) - whole) < OBJECT_ALIGNMENT
                if not (fits or distance // 8 % size == 0):
                    continue
                place = np.arange(len(words)) % size
                if set(place[pointer].tolist()).isdisjoint(place[number].tolist()):
                    return True
        return False

    def slot_offsets(self, address: int, size: int) -> Addresses:
        """Offsets of the pointer slots in [address, address + size)."""
        first = bisect.bisect_left(self.slot_list, address)
        last = bisect.bisect_left(self.slot_list, address + size - 7, first) if size >= 8 else first
        return self.slots[first:last] - address


_TEXT = bytes(byte for byte in range(256) if byte >= 0x20 or byte in b"\t\n\r\x1b")
"""Bytes of text in any encoding that a program is likely to hold."""


def _holds(addresses: Addresses, address: int) -> bool:
    """Whether an address is one of those (sorted)."""
    index = int(np.searchsorted(addresses, address))
    return index < len(addresses) and int(addresses[index]) == address


class _Comparer:
    def __init__(
        self,
        old: Code,
        new: Code,
        matching: Matching,
        addresses: AddressMap,
        tables: tuple[dict[int, JumpTable], dict[int, JumpTable]],
    ) -> None:
        self.matching, self.addresses = matching, addresses
        pairs, _, _ = distinct(addresses.pins.old, addresses.pins.new)
        wanted = np.isin(old.image.kinds(pairs[:, 0]), COMPARED)
        wanted &= np.isin(new.image.kinds(pairs[:, 1]), COMPARED)
        zeros = (old.image.kinds(pairs[:, 0]) == Kind.BSS) & (new.image.kinds(pairs[:, 1]) == Kind.BSS)
        wanted &= ~zeros
        self.pairs = pairs[wanted]
        self.old = _Side(old, self.pairs[:, 0], tables[0])
        self.new = _Side(new, self.pairs[:, 1], tables[1])
        self.segments: dict[Pair, Segment] = {}
        self.slot_pairs: dict[int, int] = {}
        self.parents: dict[Pair, set[Pair]] = {}
        self.todo: list[Pair] = []

    def run(self) -> ConstantVerdicts:
        self.todo = [(int(o), int(n)) for o, n in self.pairs[::-1]]
        while self.todo:
            pair = self.todo.pop()
            if pair not in self.segments:
                self.segments[pair] = self._segment(*pair)
        return ConstantVerdicts(frozenset(self._blame()), self.segments, self.slot_pairs)

    def _segment(self, o: int, n: int) -> Segment:
        first, second = self.old.tables.get(o), self.new.tables.get(n)
        if first is not None and second is not None:
            equal = self._same_targets(first, second)
            return Segment(o, n, first.end - o, first.end - o, equal, whole=True, barrier=Barrier.TABLE)
        text = self.old.string_alone(o)
        if text is not None and text == self.new.string_alone(n):
            ends = self.old.next_named(o) - o, self.new.next_named(n) - n
            reach = ends[0] if ends[0] == ends[1] else 0
            if reach:
                self.todo.append((o + reach, n + reach))
            return Segment(o, n, len(text) + 1, reach, equal=True, whole=True, barrier=Barrier.TEXT)
        return self._stretch(o, n)

    def _stretch(self, o: int, n: int) -> Segment:
        """Compare up to where both builds name something, or one of them something that is pinned elsewhere."""
        left, right = self.old.next_pinned(o) - o, self.new.next_pinned(n) - n
        size, whole = min(left, right), left == right
        common = _first_common(self.old.named, o, self.new.named, n, size)
        loaded = o not in self.old.address_taken and n not in self.new.address_taken
        if common:
            size, whole = common, True
        if loaded and size > MAX_LOAD:
            size, whole = MAX_LOAD - (o % 8 if o % 8 == n % 8 else 0), True  # no pointer slot is cut in two
        reach = size if whole and (common or size < min(left, right)) else 0
        if self._crosses(o, n) or _holds(self.old.code.unwind.slots, o + size):
            reach = 0  # what only exception tables name is compared with them
        if reach:
            self.todo.append((o + size, n + size))
        equal = size > 0 and self._same(o, n, size)
        if not whole:
            equal = equal and not self._goes_on(o, n, left, right)
        barrier = Barrier.LOADED if loaded else Barrier.OPEN
        if self.old.is_text(o, size) or self.new.is_text(n, size):
            barrier = Barrier.TEXT
        return Segment(o, n, size, reach or (size if whole else 0), equal, whole, barrier)

    def _crosses(self, o: int, n: int) -> bool:
        """One is writable and the other is not: a variable that changed sections has other neighbours there."""
        return (self.old.image.kind_at(o) in CONSTANTS) != (self.new.image.kind_at(n) in CONSTANTS)

    def _goes_on(self, o: int, n: int, left: int, right: int) -> bool:
        """The longer of two stretches holds more than padding behind the end of the shorter one: a table grew."""
        side, start, end = (self.old, o + right, o + left) if left > right else (self.new, n + left, n + right)
        end = min(end, side.next_named(start - 1))
        return any(side.content(start, end - start)) or len(side.slot_offsets(start, end - start)) > 0

    def _same(self, o: int, n: int, size: int) -> bool:
        slots_old, slots_new = self.old.slot_offsets(o, size), self.new.slot_offsets(n, size)
        if not len(slots_old) and not len(slots_new):
            equal = self.old.content(o, size) == self.new.content(n, size)
            by_offsets = self._same_offsets(o, n, size)
            return equal if by_offsets is None else by_offsets
        if len(slots_old) != len(slots_new) or (slots_old != slots_new).any():
            return False
        equal = _without(self.old.content(o, size), slots_old) == _without(self.new.content(n, size), slots_new)
        pairs = [(self.old.pointer(o + offset), self.new.pointer(n + offset)) for offset in slots_old.tolist()]
        if not equal or not all(self._may_be_same(to, tn) for to, tn in pairs):
            return False  # what else it points to is not paired: elements may have been inserted
        for to, tn in pairs:
            self._pair((o, n), to, tn)
        return True

    def _may_be_same(self, o: int, n: int) -> bool:
        """Whether two pointers can lead to the same thing, by what is known of both."""
        kind_old, kind_new = self.old.image.kind_at(o), self.new.image.kind_at(n)
        if Kind.TEXT in (kind_old, kind_new):
            return self._same_code(o, n)
        if kind_old in CONSTANTS and kind_new in CONSTANTS:
            first, second = self.old.string_alone(o), self.new.string_alone(n)
            if (first is None) == (second is None):
                return first == second
            # A string in one build, and in the other one with something behind it that nobody names.
            return bool(first or second) and self.old.image.string_at(o) == self.new.image.string_at(n)
        known = self.addresses.certain(n)
        return known == o if known is not None else self.addresses.order.fits(o, n)

    def _pair(self, parent: Pair, o: int, n: int) -> None:
        """Two pointers of equal tables: what they lead to is compared in turn, and blamed on the table."""
        kind_old, kind_new = self.old.image.kind_at(o), self.new.image.kind_at(n)
        if kind_old not in COMPARED or kind_new not in COMPARED:
            return
        constant = kind_old in CONSTANTS and kind_new in CONSTANTS
        self.parents.setdefault((o, n), set()).update({parent} if constant else ())
        self.slot_pairs.setdefault(n, o)
        self.todo.append((o, n))

    def _same_code(self, o: int, n: int) -> bool:
        i, j = self.old.code.function_of(o), self.new.code.function_of(n)
        if i < 0 or j < 0 or self.matching.new_of[i] != j:
            return i < 0 and j < 0 and o == n
        same_offset = o - self.old.code.starts[i] == n - self.new.code.starts[j]
        return bool(same_offset) or not bool(self.matching.same[i])

    def _same_targets(self, first: JumpTable, second: JumpTable) -> bool:
        if len(first.targets) != len(second.targets) or first.entry_size != second.entry_size:
            return False
        return all(self._same_code(o, n) for o, n in zip(first.targets.tolist(), second.targets.tolist(), strict=True))

    def _same_offsets(self, o: int, n: int, size: int) -> bool | None:
        """Whether two tables of 32-bit offsets from themselves to strings lead to the same ones; None: no such tables.

        clang makes them of switches that choose a string (relative lookup tables).
        """
        if o not in self.old.address_taken:
            return None
        first, second = self._offset_targets(self.old, o, size), self._offset_targets(self.new, n, size)
        if not len(first) or len(first) != len(second):
            return None
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            if self.old.image.string_at(a) != self.new.image.string_at(b):
                return False
        return True

    def _offset_targets(self, side: _Side, address: int, size: int) -> Addresses:
        """What the words of a constant lead to when all of them are offsets to the beginnings of strings, else none."""
        none = np.zeros(0, np.int64)
        if size < MIN_OFFSETS or size % 4 or address % 4:
            return none
        targets = side.image.int32_at(address + 4 * np.arange(size // 4, dtype=np.int64)) + address
        outside = (targets < address) | (targets >= address + size)
        if not outside.all() or not (side.image.kinds(targets) == Kind.CONSTANT).all():
            return none
        strings = [side.image.read(int(t) - 1, 2) for t in targets]
        begins = sum(pair[0] == 0 for pair in strings)  # others are tails of longer strings, merged by the linker
        return targets if all(pair[1] for pair in strings) and 2 * begins >= len(strings) else none

    def _blame(self) -> set[Pair]:
        """Differing segments, and what readers may reach them from."""
        before = {(s.old + s.reach, s.new + s.reach): p for p, s in self.segments.items() if s.reach}
        blamed: set[Pair] = set()
        seen: set[Pair] = set()
        todo = [pair for pair, segment in self.segments.items() if not segment.equal]
        blamed.update(todo)
        while todo:
            pair = todo.pop()
            if pair in seen:
                continue
            seen.add(pair)
            if pair in blamed:
                parents = self.parents.get(pair, set())
                blamed |= parents
                todo.extend(parents)
            previous = before.get(pair) if self.old.image.kind_at(pair[0]) in CONSTANTS else None
            if previous is None or not self._reads_on(self.segments[previous], self.segments[pair]):
                continue
            if self.old.image.kind_at(pair[0]) is Kind.RELRO and self._separate(pair, before):
                continue
            if self.segments[previous].barrier is not Barrier.LOADED:
                blamed.add(previous)
            todo.append(previous)
        return blamed

    def _reads_on(self, first: Segment, second: Segment) -> bool:
        """Whether ``second`` may belong to an object that begins at ``first`` or before it."""
        literal = first.barrier is Barrier.TEXT and self.old.image.kind_at(first.old) is Kind.CONSTANT
        if not literal:  # strings lie in .rodata: elsewhere text is a part of something
            return first.barrier is not Barrier.TABLE
        # Rows of a two-dimensional array of characters: equally long, and not packed like string literals are.
        packed = first.size == first.reach and first.reach not in ROW_SIZES
        rows = second.barrier is Barrier.OPEN and second.size % first.reach == 0
        if second.barrier is Barrier.TEXT and 0 < first.reach - first.size < _alignment(second.size):
            return False  # names of functions (__func__), each an object of its own, aligned by its size
        return (rows or first.reach == second.reach) and first.reach <= MAX_ROW and not packed

    def _separate(self, pair: Pair, before: dict[Pair, Pair]) -> bool:
        """Whether a segment begins an object of its own, for what the pointers in it and before it show.

        Compilers align objects of this size; what is aligned and lies inside another object is an element of an
        array, or a member of one, and an array has its pointers at the same places in every element; or it is a
        member of a structure, which its users name together with the structure.
        """
        if not self._like_an_object(pair):
            return False
        users, start = self.old.users(pair[0]), before.get(pair)
        while start is not None and not self._like_an_object(start):
            if users & self.old.users(start[0]):
                return False
            start = before.get(start)
        if start is None or users & self.old.users(start[0]):
            return False
        ends = [pair[0] + self.segments[pair].size]
        while len(ends) < MAX_ENDS and (further := self.old.next_named(ends[-1])) > ends[-1]:
            ends.append(further)
        return not self.old.may_be_array(start[0], pair[0], ends)

    def _like_an_object(self, pair: Pair) -> bool:
        """Aligned like one in both builds, and somebody takes its address: what is only loaded is a part."""
        aligned = pair[0] % OBJECT_ALIGNMENT == 0 == pair[1] % OBJECT_ALIGNMENT
        return aligned and pair[0] in self.old.address_taken and pair[1] in self.new.address_taken


def _alignment(size: int) -> int:
    """What gcc aligns a static array of so many characters to."""
    return OBJECT_ALIGNMENT if size >= OBJECT_ALIGNMENT else 16 if size >= 16 else 1


def _first_common(first: list[int], a: int, second: list[int], b: int, size: int) -> int:
    """The smallest offset in (0, size) that is in both sorted lists, counted from ``a`` and from ``b``; or 0."""
    i, j = bisect.bisect_right(first, a), bisect.bisect_right(second, b)
    while i < len(first) and j < len(second):
        x, y = first[i] - a, second[j] - b
        if x >= size or y >= size:
            return 0
        if x == y:
            return x
        i, j = i + (x < y), j + (y < x)
    return 0


def _fills(raw: bytes) -> bool:
    """Text, its NUL, and nothing but zero padding behind it; zeros alone are no text."""
    text = raw.rstrip(b"\0")
    return 0 < len(text) < len(raw) and not text.translate(None, _TEXT)


def _without(view: memoryview, slots: NDArray[np.int64]) -> bytes:
    raw = bytearray(view)
    for offset in slots.tolist():
        raw[offset : offset + 8] = bytes(8)
    return bytes(raw)
