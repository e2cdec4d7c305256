"""Which variable of the running program a variable of the new build is, or whether it is new (D3).

Evidence in order: references of unchanged code, paired pointer slots, symbols where both builds have all of theirs,
neighbours. A wrong answer here corrupts a running program, so each of them can also end in a reason to refuse.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from elfdiff.correspondence.addressmap import CERTAIN
from elfdiff.differences.comparison import Comparison
from elfdiff.images.image import STT_OBJECT, Addresses, Kind, SymbolTable

MAX_ALIGNMENT = 32
"""Padding in front of a variable beyond this is not believed to be padding; compilers align arrays so."""


@dataclass(frozen=True)
class OldVariable:
    """It is the running program's variable at ``address``; ``guessed``: by its neighbours alone."""

    address: int
    guessed: bool = False


@dataclass(frozen=True)
class NewVariable:
    """It is new, and reaches at most to ``end``. ``neighbour``: the mapped variable in front of it, if any.

    Without symbols a new variable can still turn out to be the tail of its neighbour, grown: whoever uses it must
    check that the new code does not use both as one.
    """

    end: int
    neighbour: int | None


class Variables:
    """Answers for one comparison; addresses are those of the new build unless said otherwise."""

    def __init__(self, comparison: Comparison) -> None:
        """Collect what is mapped on evidence."""
        self.comparison = comparison
        self.old, self.new = comparison.old, comparison.new
        addresses = comparison.addresses
        self.mapped = dict(addresses.order.mapped)
        for n, (o, _) in addresses.old_of.items():
            if self.new.image.kind_at(n) in (Kind.DATA, Kind.BSS):
                self.mapped[n] = o
        for n, o in comparison.constants.slot_pairs.items():
            self.mapped.setdefault(n, o)
        self.addresses = sorted(self.mapped)

    @cached_property
    def _old_taken(self) -> set[int]:
        return set(self.mapped.values())

    def find(self, target: int, *, whole: bool) -> OldVariable | NewVariable | str:
        """What a writable address of the new build is; a string says why that cannot be told.

        ``whole``: the new code may reach beyond the first eight bytes, so the size matters.
        """
        if target in self.comparison.addresses.disputed:
            return "the evidence for it contradicts itself"
        if target in self.mapped:
            if self._is_another(target):
                return "the evidence for it is that of another variable of the new build, or of another part of one"
            grown = self._grown(target, self.mapped[target]) if whole else None
            return grown or OldVariable(self.mapped[target])
        if target in self.new.image.copies:
            return "it is a library's variable of which the running program has no copy"
        named = self._by_name(target)
        return named if named is not None else self._by_neighbours(target)

    @cached_property
    def _claims(self) -> dict[int, list[int]]:
        """Old address -> the new ones that are mapped to it, where there are several."""
        claims: dict[int, list[int]] = {}
        for n, o in self.mapped.items():
            claims.setdefault(o, []).append(n)
        return {o: several for o, several in claims.items() if len(several) > 1}

    def _is_another(self, target: int) -> bool:
        """Whether a second new address is mapped to the same old one, and ``target`` has no better right to it.

        A surviving instruction of a changed function that names another element of an array says so of the old element.
        """
        rivals = [n for n in self._claims.get(self.mapped[target], ()) if n != target]
        return bool(rivals) and (not self._is_certain(target) or any(self._is_certain(n) for n in rivals))

    def _is_certain(self, target: int) -> bool:
        found = self.comparison.addresses.old_of.get(target)
        return found is None or found[1] in CERTAIN

    # -- neighbours ------------------------------------------------------------------------------------------

    def _around(self, target: int) -> tuple[int | None, int | None]:
        """The mapped addresses next to ``target`` in its section, not itself."""
        section = self.new.image.section_at(target)
        assert section is not None
        below = bisect.bisect_left(self.addresses, target) - 1
        above = bisect.bisect_right(self.addresses, target)
        left = self.addresses[below] if below >= 0 and self.addresses[below] >= section.start else None
        right = self.addresses[above] if above < len(self.addresses) and self.addresses[above] < section.end else None
        return left, right

    def _by_neighbours(self, target: int) -> OldVariable | NewVariable | str:
        left, right = self._around(target)
        if left is not None and right is not None and self.mapped[left] - left == self.mapped[right] - right:
            predicted = target + self.mapped[left] - left
            if _is_named(self.old.referenced, predicted) or self._same_content(predicted, target, right - target):
                return OldVariable(predicted, guessed=True)
        if self._is_new(target, left, right):
            section = self.new.image.section_at(target)
            assert section is not None
            return NewVariable(right if right is not None else section.end, left)
        return "it may be a part of an existing variable or a new one"

    def _same_content(self, o: int, n: int, size: int) -> bool:
        """Both builds start with the same bytes there and no pointer, and the old one names nothing of it.

        Then it does not matter whether this is a part of the variable in front that no old code named, or a new
        variable in what was padding: no old code uses those bytes, and they hold what the new variable begins with.
        """
        old, new = self.old.image, self.new.image
        slots = [np.searchsorted(i.relative_places, [a - 7, a + size]) for i, a in ((old, o), (new, n))]
        slots.append(np.searchsorted(self.old.referenced, [o, o + size]))
        empty = all(int(first) == int(last) for first, last in slots)
        section = old.section_at(o)
        inside = section is not None and o + size <= section.end
        return empty and inside and old.read(o, size) == new.read(n, size)

    def _is_new(self, target: int, left: int | None, right: int | None) -> bool:
        """No old variable can be meant: none is left over there, and it is no field of its left neighbour.

        Fields: in the old build the left neighbour reaches at most to the next named address; what lies farther
        from it than that in the new build is no part of it, unless it grew.
        """
        section = self.new.image.section_at(target)
        old_section = self.old.image.section(section.name) if section else None
        if old_section is None:
            return True
        low = self.mapped[left] if left is not None else old_section.start
        high = self.mapped[right] if right is not None and self.mapped[right] > low else old_section.end
        named = self.old.referenced
        between = named[int(np.searchsorted(named, low)) : int(np.searchsorted(named, high))].tolist()
        unwound = self.old.named_by_unwound
        if any(address not in self._old_taken and address in unwound for address in between):
            return False
        if left is None:
            return low == high
        following = self.old.next_named(low)
        reach = min(following, old_section.end) if following is not None else old_section.end
        return target - left >= reach - low

    def _grown(self, target: int, o: int) -> str | None:
        """Why the variable at ``target`` may be larger than the running one, or None."""
        sizes = _size_at(self.new.image.symbols, target), _size_at(self.old.image.symbols, o)
        if sizes[0] is not None and sizes[1] is not None:
            return f"it has {sizes[0]} bytes, the running one {sizes[1]}" if sizes[0] > sizes[1] else None
        _, right = self._around(target)
        room, old_room = self._room(target, o, right)
        if room <= old_room:
            return None
        following = self.new.next_named(target)
        limit = min(following, target + room) if following is not None else target + room
        align = min(limit & -limit, MAX_ALIGNMENT)
        if limit < target + room and limit <= -(-(target + old_room) // align) * align:
            return None  # something new lies behind it, no farther than alignment explains
        return f"it may have grown: {room} bytes to what lies behind it, {old_room} in the running program"

    def _room(self, target: int, o: int, right: int | None) -> tuple[int, int]:
        """Bytes up to the next mapped variable, in the new and in the old build."""
        if right is not None and self.mapped[right] > o:
            return right - target, self.mapped[right] - o
        new_section, old_section = self.new.image.section_at(target), self.old.image.section_at(o)
        assert new_section is not None
        return new_section.end - target, (old_section.end if old_section else o) - o

    # -- symbols ---------------------------------------------------------------------------------------------

    def _by_name(self, target: int) -> OldVariable | NewVariable | None:
        """By symbol, where both builds have all of theirs and the name says it."""
        old, new = self.old.image.symbols, self.new.image.symbols
        if not (old.complete and new.complete):
            return None
        index = object_at(new, target)
        if index is None:
            return None
        start, size, name = int(new.values[index]), int(new.sizes[index]), new.names[index]
        same = [k for k, other in enumerate(old.names) if other == name and old.types[k] == STT_OBJECT]
        if not same:
            return NewVariable(start + size, None)
        if len(same) == 1 and new.names.count(name) == 1 and int(old.sizes[same[0]]) == size:
            return OldVariable(int(old.values[same[0]]) + target - start)
        return None


def object_at(symbols: SymbolTable, address: int) -> int | None:
    """Index of the data symbol that covers an address."""
    index = int(np.searchsorted(symbols.values, address, "right")) - 1
    while index >= 0 and (symbols.types[index] != STT_OBJECT or not symbols.sizes[index]):
        index -= 1
    covers = index >= 0 and symbols.values[index] <= address < symbols.values[index] + symbols.sizes[index]
    return index if covers else None


def _size_at(symbols: SymbolTable, address: int) -> int | None:
    """Bytes of the data symbol that starts at an address."""
    index = object_at(symbols, address)
    return int(symbols.sizes[index]) if index is not None and symbols.values[index] == address else None


def _is_named(named: Addresses, address: int) -> bool:
    index = int(np.searchsorted(named, address))
    return index < len(named) and int(named[index]) == address
