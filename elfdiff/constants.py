"""Whether what two references name says the same: strings, numbers, tables, pointer tables, initial values.

A stripped file does not say how long an object is. What is known is where objects begin: at the addresses that
code and pointer slots name. So data is compared in *segments*, from a pinned address to the next address that
both builds name, or that either build pins elsewhere. A difference is blamed on the segment's first address and,
since a table's later elements may be read through its first address, on the segments before it, back to one that
is closed: a string that fills its segment, or a number that is only ever loaded by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from elfdiff.addressmap import AddressMap
from elfdiff.code import LEA, Code, FieldKind
from elfdiff.image import Addresses, Kind
from elfdiff.jumptables_x86_64 import JumpTable
from elfdiff.matching import Matching

COMPARED = (Kind.CONSTANT, Kind.RELRO, Kind.DATA)
MAX_LOAD = 64
"""Bytes of the widest vector load: what a number that is only loaded can be long."""

Pair = tuple[int, int]
"""(old address, new address)."""


@dataclass(frozen=True)
class Segment:
    """``size`` bytes at ``old`` and ``new`` that were compared; ``whole``: it ends at the same place in both."""

    old: int
    new: int
    size: int
    equal: bool
    whole: bool
    closed: bool


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
        return segment.whole or segment.closed


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
        self.pinned = np.unique(pinned)
        self.view = memoryview(code.image.memory.tobytes())
        self.base = code.image.base
        self.slots = code.image.relative_places
        references = code.references
        taken = (references.opcode == LEA) | (references.kind >= FieldKind.ABSOLUTE_DISPLACEMENT)
        self.address_taken = set(np.unique(references.target[taken]).tolist())
        self.address_taken.update(code.image.relative_targets.tolist())

    def next_pinned(self, address: int) -> int:
        """The next pinned address, at most the section's end."""
        section = self.image.section_at(address)
        end = section.end if section else address
        index = int(np.searchsorted(self.pinned, address, "right"))
        return min(end, int(self.pinned[index])) if index < len(self.pinned) else end

    def named_offsets(self, address: int, size: int) -> Addresses:
        """Offsets in (0, size) at which something is named."""
        named = self.code.referenced
        first = int(np.searchsorted(named, address, "right"))
        last = int(np.searchsorted(named, address + size, "left"))
        return named[first:last] - address

    def string_alone(self, address: int) -> bytes | None:
        """The string at an address when nothing but zeros follows it up to the next named address."""
        named = self.code.referenced
        following = int(np.searchsorted(named, address, "right"))
        section = self.image.section_at(address)
        if section is None or section.kind is not Kind.CONSTANT:
            return None
        end = min(int(named[following]), section.end) if following < len(named) else section.end
        raw = bytes(self.content(address, end - address))
        return raw.rstrip(b"\0") if _fills(raw) else None

    def content(self, address: int, size: int) -> memoryview:
        """What the file holds there."""
        return self.view[address - self.base : address - self.base + size]

    def slot_offsets(self, address: int, size: int) -> Addresses:
        """Offsets of the pointer slots in [address, address + size)."""
        first = int(np.searchsorted(self.slots, address))
        last = int(np.searchsorted(self.slots, address + size - 7)) if size >= 8 else first
        return self.slots[first:last] - address


_TEXT = bytes(byte for byte in range(256) if byte >= 0x20 or byte in b"\t\n\r\x1b")
"""Bytes of text in any encoding that a program is likely to hold."""


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
        pairs = np.unique(np.stack([addresses.pins.old, addresses.pins.new], axis=1), axis=0)
        wanted = np.isin(old.image.kinds(pairs[:, 0]), COMPARED)
        wanted &= np.isin(new.image.kinds(pairs[:, 1]), COMPARED)
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
            return Segment(o, n, first.end - o, equal, whole=True, closed=True)
        text = self.old.string_alone(o)
        if text is not None and text == self.new.string_alone(n):
            return Segment(o, n, len(text) + 1, equal=True, whole=True, closed=True)
        left, right = self.old.next_pinned(o) - o, self.new.next_pinned(n) - n
        size = min(left, right)
        common = np.intersect1d(self.old.named_offsets(o, size), self.new.named_offsets(n, size))
        whole = left == right
        if len(common):
            size, whole = int(common[0]), True
            self.todo.append((o + size, n + size))
        loaded = o not in self.old.address_taken and n not in self.new.address_taken
        if loaded and size > MAX_LOAD:
            size, whole = MAX_LOAD, True
        equal = size > 0 and self._same(o, n, size)
        closed = loaded or _fills(bytes(self.old.content(o, size))) or _fills(bytes(self.new.content(n, size)))
        return Segment(o, n, size, equal, whole, closed)

    def _same(self, o: int, n: int, size: int) -> bool:
        slots_old, slots_new = self.old.slot_offsets(o, size), self.new.slot_offsets(n, size)
        if not len(slots_old) and not len(slots_new):
            return self.old.content(o, size) == self.new.content(n, size) or self._same_offsets(o, n, size)
        if len(slots_old) != len(slots_new) or (slots_old != slots_new).any():
            return False
        equal = _without(self.old.content(o, size), slots_old) == _without(self.new.content(n, size), slots_new)
        for offset in slots_old.tolist():
            to, tn = self.old.image.pointer_at(o + offset), self.new.image.pointer_at(n + offset)
            assert to is not None and tn is not None
            equal &= self._same_target((o, n), to, tn)
        return equal

    def _same_target(self, parent: Pair, o: int, n: int) -> bool:
        """Whether two pointers lead to the same thing; constants are queued and blamed on the parent later."""
        kind_old, kind_new = self.old.image.kind_at(o), self.new.image.kind_at(n)
        if Kind.TEXT in (kind_old, kind_new):
            return self._same_code(o, n)
        if kind_old in (Kind.CONSTANT, Kind.RELRO) and kind_new in (Kind.CONSTANT, Kind.RELRO):
            self.parents.setdefault((o, n), set()).add(parent)
            self.todo.append((o, n))
            self.slot_pairs.setdefault(n, o)
            return True
        known = self.addresses.certain(n)
        if known is not None:
            return known == o
        if not self.addresses.order.fits(o, n):
            return False  # two pointers of a table that changed places
        self.parents.setdefault((o, n), set())
        self.todo.append((o, n))  # for its initial value
        return self.slot_pairs.setdefault(n, o) == o

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

    def _same_offsets(self, o: int, n: int, size: int) -> bool:
        """A table of 32-bit offsets from itself to other constants (clang's relative lookup tables)."""
        if size < 8 or o % 4 or n % 4 or not (self._reads_as_offsets(o, size)):
            return False
        places = 4 * np.arange(size // 4, dtype=np.int64)
        first = self.old.image.int32_at(o + places)
        second = self.new.image.int32_at(n + places)
        for a, b in zip((first + o).tolist(), (second + n).tolist(), strict=True):
            if a - o == b - n:
                continue
            x, y = self.old.image.string_at(a), self.new.image.string_at(b)
            if x is None or x != y:
                return False
        return True

    def _reads_as_offsets(self, o: int, size: int) -> bool:
        targets = self.old.image.int32_at(o + 4 * np.arange(min(2, size // 4), dtype=np.int64)) + o
        return bool((self.old.image.kinds(targets) == Kind.CONSTANT).all())

    def _blame(self) -> set[Pair]:
        """Differing segments, and whoever may read into them."""
        before = {(s.old + s.size, s.new + s.size): p for p, s in self.segments.items() if s.size}
        blamed: set[Pair] = set()
        todo = [pair for pair, segment in self.segments.items() if not segment.equal]
        while todo:
            pair = todo.pop()
            if pair in blamed:
                continue
            blamed.add(pair)
            todo.extend(self.parents.get(pair, ()))
            previous = before.get(pair)
            if previous is not None and not self.segments[previous].closed:
                todo.append(previous)
        return blamed


def _fills(raw: bytes) -> bool:
    """Text, its NUL, and nothing but zero padding behind it."""
    text = raw.rstrip(b"\0")
    return len(text) < len(raw) and not text.translate(None, _TEXT)


def _without(view: memoryview, slots: NDArray[np.int64]) -> bytes:
    raw = bytearray(view)
    for offset in slots.tolist():
        raw[offset : offset + 8] = bytes(8)
    return bytes(raw)
