"""Where each reference of the patch leads: to the patch itself, or to something of the old image (D3, D4).

What the new code shares with the running program (variables, unchanged functions, imports, equal constants) is
found in the old image; what is its own (patched functions, switch tables, changed and new constants, variables
that are provably new) is found in the patch, at the new build's address. What is neither is not guessed: it is
reported as unbound, and refused.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from elfdiff.addressmap import Evidence
from elfdiff.code import LEA, FieldKind
from elfdiff.comparison import Comparison
from elfdiff.image import Addresses, Kind, Slot
from elfdiff.patchobject import FIRST_IMPORT, OLD_IMAGE, PATCH_IMAGE, Import

MIN_ALIGNMENT = 16
"""An unknown constant named by an immediate must begin at such an address or behind a zero byte."""

STUB_SIZE = 16


@dataclass(frozen=True)
class Place:
    """What a reference leads to: an index of the relocation's symbol, and the address it is added to."""

    symbol: int  # OLD_IMAGE, PATCH_IMAGE or an import
    address: int


@dataclass(frozen=True)
class Unbound:
    """A reference for which no evidence decides; ``function`` (new) makes it."""

    function: int
    target: int
    why: str


@dataclass
class Owned:
    """What the patch keeps of its own, beside the functions: [start, end) in the new build, by what it is."""

    constants: dict[int, int] = field(default_factory=dict)  # start -> end; slots in it are relocated
    variables: dict[int, int] = field(default_factory=dict)
    stubs: dict[int, int] = field(default_factory=dict)  # linkage stub -> its slot
    slots: dict[int, Place] = field(default_factory=dict)  # slot -> what it is filled with


class Resolver:
    """Resolves references of patched functions; collects what the patch must own and what stays open."""

    def __init__(self, comparison: Comparison, functions: frozenset[int]) -> None:
        """``functions``: all new functions of the patch, closure included."""
        self.comparison = comparison
        self.old, self.new = comparison.old, comparison.new
        self.functions = functions
        self.owned = Owned()
        self.resolved: dict[int, Place] = {}  # reference of the new build -> where it leads
        self.unbound: list[Unbound] = []
        self.imports: list[Import] = []
        self.forced_entries: set[int] = set()  # old entries whose address the new code takes
        self.by_interval: dict[int, int] = {}  # new variable address -> old one, by neighbours only
        self.new_variables: set[int] = set()
        self.used_code: set[int] = set()  # old addresses of unchanged code and stubs that the patch calls
        self._known: dict[tuple[int, bool], Place | str] = {}
        self._old_stubs = self._stubs_by_name()
        self._old_slots = self._slots_by_name()
        self._evidence = self._variable_evidence()
        self._old_variables = {old for _, old in self._evidence}
        self._labels = self._label_slots()

    # -- the references of one function -------------------------------------------------------------------

    def function(self, function: int) -> dict[int, Place]:
        """Where the external references of a function lead, by row of the new build's references.

        What is unbound is left out, and noted.
        """
        references = self.new.references
        rows = range(int(references.first[function]), int(references.last[function]))
        found: dict[int, Place] = {}
        doubtful: list[int] = []
        for row in rows:
            if not references.internal[row]:
                place = self._reference(row)
                if isinstance(place, str):
                    self._note(row, place)
                elif self._may_be_a_number(row, place):
                    doubtful.append(row)
                else:
                    found[row] = place
        for row in doubtful:
            place = self._reference(row)
            if isinstance(place, Place) and self._inside_named(int(references.target[row]), found):
                found[row] = place
            else:
                self._note(row, "the immediate may be a number or an address")
        self._keep_together(found)
        self.resolved.update(found)
        return found

    def _note(self, row: int, why: str) -> None:
        references = self.new.references
        self.unbound.append(Unbound(int(references.function[row]), int(references.target[row]), why))

    def _takes_address(self, row: int) -> bool:
        references = self.new.references
        kind = int(references.kind[row])
        return kind >= FieldKind.ABSOLUTE_DISPLACEMENT or (
            kind == FieldKind.MEMORY and int(references.opcode[row]) == LEA
        )

    def _reference(self, row: int) -> Place | str:
        references = self.new.references
        found = self.address(int(references.target[row]), taken=self._takes_address(row))
        if isinstance(found, Place) and references.kind[row] == FieldKind.SHORT and found.symbol != PATCH_IMAGE:
            return "a short branch cannot reach the old image"
        return found

    def _may_be_a_number(self, row: int, found: Place) -> bool:
        """An immediate of a fixed-address image without a second witness that it is an address.

        Witnesses: it moved with something that moved, or its place begins something. What is bound to the same
        number in the old image is right either way.
        """
        references = self.new.references
        target = int(references.target[row])
        if references.kind[row] != FieldKind.ABSOLUTE_IMMEDIATE or found == Place(OLD_IMAGE, target):
            return False
        known = self.comparison.addresses.old_of.get(target)
        if known is not None and known[0] != target:
            return False
        return target % MIN_ALIGNMENT != 0 and self.new.image.read(target - 1, 1) != b"\0"

    def _inside_named(self, target: int, found: dict[int, Place]) -> bool:
        """The same function names the beginning of the owned constant in which the target lies."""
        references = self.new.references
        named = (int(references.target[row]) for row in found)
        return any(start < target < self.owned.constants.get(start, 0) for start in named)

    def _keep_together(self, found: dict[int, Place]) -> None:
        """A pointer to what lies behind an array may be the array's end: then both must move alike.

        Of two neighbouring addresses that one function takes, with nothing named between them, the second may be
        the end of the first. Constants of which one would be the old build's are then both taken from the patch
        (their bytes are equal); variables that would not keep their distance are unbound.
        """
        references = self.new.references
        rows = [row for row in found if self._takes_address(row)]
        by_target: dict[int, list[int]] = {}
        for row in rows:
            by_target.setdefault(int(references.target[row]), []).append(row)
        targets = sorted(by_target)
        again = True
        while again:
            again = False
            for first, second in pairwise(targets):
                a, b = found.get(by_target[first][0]), found.get(by_target[second][0])
                if a is None or b is None or not self._adjacent(first, second):
                    continue
                if a.symbol == b.symbol and b.address - a.address == second - first:
                    continue
                again = True
                for target in (first, second):
                    self._take_from_patch(target, by_target[target], found, other=first)

    def _adjacent(self, first: int, second: int) -> bool:
        """Data of the same kind of section with nothing named between."""
        named = self.new.referenced
        following = int(np.searchsorted(named, first, "right"))
        kinds = self.new.image.kinds(np.array([first, second]))
        data = (Kind.CONSTANT, Kind.RELRO, Kind.DATA, Kind.BSS)
        return following < len(named) and int(named[following]) == second and bool(np.isin(kinds, data).all())

    def _take_from_patch(self, target: int, rows: list[int], found: dict[int, Place], *, other: int) -> None:
        section = self.new.image.section_at(target)
        if section is not None and section.kind in (Kind.CONSTANT, Kind.RELRO):
            self.owned.constants.setdefault(target, self._constant_end(target))
            for row in rows:
                found[row] = Place(PATCH_IMAGE, target)
            return
        for row in rows:
            del found[row]
            self._note(row, f"it may be a variable or the end of the one at {other:#x}")

    def note_slot(self, place: int, target: int, why: str) -> None:
        """Note a pointer slot of owned data that leads nowhere known."""
        self.unbound.append(Unbound(-1, target, f"the pointer at {place:#x}: {why}"))

    def address(self, target: int, *, taken: bool) -> Place | str:
        """Where a new address is found; a string says why it cannot be told. ``taken``: it is used as a pointer."""
        key = (target, taken)
        if key not in self._known:
            self._known[key] = self._resolve(target, taken)
        return self._known[key]

    def _resolve(self, target: int, taken: bool) -> Place | str:
        kind = self.new.image.kind_at(target)
        if kind is Kind.TEXT:
            return self._code(target, taken)
        if kind is Kind.PLT:
            return self._stub(target)
        if kind is Kind.GOT:
            return self._slot(target)
        if kind in (Kind.CONSTANT, Kind.RELRO):
            return self._constant(target)
        if kind in (Kind.DATA, Kind.BSS):
            return self._variable(target)
        known = self.comparison.addresses.old_of.get(target)
        if known is not None and known[1] is Evidence.PIN:
            return Place(OLD_IMAGE, known[0])
        return "no unchanged code names it"

    # -- code -----------------------------------------------------------------------------------------------

    def _code(self, target: int, taken: bool) -> Place | str:
        function = self.new.function_of(target)
        if function < 0:
            before = self.new.function_of(target - 1)
            if before in self.functions and int(self.new.ends[before]) == target:
                return Place(PATCH_IMAGE, target)  # behind a call that never returns: unreachable, kept as it is
            return "it lies between functions"
        entry = int(self.new.starts[function]) == target
        old_entry = self.comparison.old_entry(function)
        if function in self.functions:
            if entry and taken and old_entry is not None:
                # Function pointers keep their value across the patch: the old entry, which jumps to the new code.
                self.forced_entries.add(old_entry)
                return Place(OLD_IMAGE, old_entry)
            return Place(PATCH_IMAGE, target)
        if not entry:
            return "it lies inside a function that is not patched"
        if old_entry is None:
            return "the function has no counterpart in the old build"
        self.used_code.add(old_entry)
        return Place(OLD_IMAGE, old_entry)

    def _stub(self, target: int) -> Place | str:
        image = self.new.image
        slot_address = image.plt.get(target)
        slot = image.slots.get(slot_address) if slot_address is not None else None
        if slot is None or slot_address is None:
            return "the linkage stub has no symbol"
        name = self._slot_key(slot)
        if isinstance(name, str):
            return name
        if name in self._old_stubs:
            stub = self._old_stubs[name]
            self.used_code.add(stub)
            return Place(OLD_IMAGE, stub)
        filled = self._slot(slot_address)
        if isinstance(filled, str):
            return filled
        if filled.symbol != PATCH_IMAGE:  # the old build has a slot but no stub for it
            self.owned.slots[slot_address] = self._import(slot)
        self.owned.stubs[target] = slot_address
        return Place(PATCH_IMAGE, target)

    def _slot(self, target: int) -> Place | str:
        image = self.new.image
        slot = image.slots.get(target)
        if slot is not None:
            name = self._slot_key(slot)
            if isinstance(name, str):
                return name
            if name in self._old_slots:
                return Place(OLD_IMAGE, self._old_slots[name])
            if not slot.symbol or slot.type not in (1, 6, 7):
                return "a slot of thread-local storage or an indirect function without counterpart"
            self.owned.slots[target] = self._import(slot)
            return Place(PATCH_IMAGE, target)
        pointed = image.pointer_at(target)
        if pointed is None:
            known = self.comparison.addresses.old_of.get(target)
            return Place(OLD_IMAGE, known[0]) if known else "a slot without relocation"
        inner = self.address(pointed, taken=True)
        if isinstance(inner, str):
            return inner
        self.owned.slots[target] = inner
        return Place(PATCH_IMAGE, target)

    def _import(self, slot: Slot) -> Place:
        wanted = Import(slot.symbol, slot.version)
        if wanted not in self.imports:
            self.imports.append(wanted)
        return Place(FIRST_IMPORT + self.imports.index(wanted), slot.addend if slot.type == 1 else 0)

    def _slot_key(self, slot: Slot) -> tuple[bool, str, str, int] | str:
        """(is thread-local, symbol, version, addend in old addresses) that names a slot in both builds."""
        thread_local = slot.type not in (1, 6, 7, 37)
        addend = slot.addend
        if slot.type == 37:  # R_X86_64_IRELATIVE: the addend is the resolver
            function = self.new.function_of(addend)
            old_entry = self.comparison.old_entry(function) if function >= 0 else None
            if old_entry is None:
                return "the resolver of the indirect function has no counterpart"
            addend = old_entry
        return thread_local, slot.symbol, slot.version, addend

    def _stubs_by_name(self) -> dict[tuple[bool, str, str, int], int]:
        image = self.old.image
        found: dict[tuple[bool, str, str, int], int] = {}
        for stub, address in image.plt.items():
            slot = image.slots.get(address)
            if slot is not None:
                found.setdefault((slot.type not in (1, 6, 7, 37), slot.symbol, slot.version, slot.addend), stub)
        return found

    def _slots_by_name(self) -> dict[tuple[bool, str, str, int], int]:
        image = self.old.image
        return {
            (slot.type not in (1, 6, 7, 37), slot.symbol, slot.version, slot.addend): address
            for address, slot in image.slots.items()
            if image.section_at(address) is not None
        }

    # -- constants ------------------------------------------------------------------------------------------

    def _constant(self, target: int) -> Place | str:
        comparison = self.comparison
        if target in comparison.tables[1]:
            self.owned.constants[target] = comparison.tables[1][target].end
            return Place(PATCH_IMAGE, target)
        known = comparison.addresses.old_of.get(target)
        pinned = known is not None and known[1] is Evidence.PIN and comparison.constants.same(known[0], target)
        if known is not None and pinned and not self._holds_labels(target):
            return Place(OLD_IMAGE, known[0])
        self.owned.constants[target] = self._constant_end(target)
        return Place(PATCH_IMAGE, target)

    def _constant_end(self, target: int) -> int:
        """As far as the object may reach: to the next constant that is the old build's own."""
        section = self.new.image.section_at(target)
        assert section is not None
        named = self.new.referenced
        for address in named[int(np.searchsorted(named, target, "right")) :].tolist():
            if address >= section.end:
                break
            known = self.comparison.addresses.old_of.get(address)
            if known is not None and self.comparison.constants.same(known[0], address):
                return int(address)
        return section.end

    def _label_slots(self) -> Addresses:
        """Pointer slots that lead into the middle of a patched function: tables of labels, not of functions."""
        image = self.new.image
        function = self.new.function_at(image.relative_targets)
        middle = (function >= 0) & (self.new.starts[np.clip(function, 0, None)] != image.relative_targets)
        middle &= self.new.has_unwind[np.clip(function, 0, None)]  # start-up code has entries that no FDE shows
        for table in self.comparison.tables[1].values():
            middle &= (image.relative_places < table.address) | (image.relative_places >= table.end)
        middle &= np.isin(function, np.array(sorted(self.functions), np.int64))
        found: Addresses = image.relative_places[middle]
        return found

    def _holds_labels(self, target: int) -> bool:
        index = int(np.searchsorted(self._labels, target))
        return index < len(self._labels) and int(self._labels[index]) < self._constant_end(target)

    @property
    def label_tables(self) -> list[int]:
        """Owned constants that hold addresses of labels."""
        return [start for start in self.owned.constants if self._is_label_table(start)]

    def _is_label_table(self, start: int) -> bool:
        return start not in self.comparison.tables[1] and self._holds_labels(start)

    # -- variables ------------------------------------------------------------------------------------------

    def _variable_evidence(self) -> list[tuple[int, int]]:
        """(new, old) of all writable addresses that rest on references, sorted by new address."""
        addresses = self.comparison.addresses
        pairs = {n: o for n, (o, _) in addresses.old_of.items()}
        for n, o in self.comparison.constants.slot_pairs.items():
            pairs.setdefault(n, o)
        items = sorted(pairs.items())
        kinds = self.new.image.kinds(np.array([n for n, _ in items], np.int64))
        return [item for item, kind in zip(items, kinds, strict=True) if kind in (Kind.DATA, Kind.BSS)]

    def _variable(self, target: int) -> Place | str:
        index = bisect.bisect_left(self._evidence, (target, -1))
        if index < len(self._evidence) and self._evidence[index][0] == target:
            return Place(OLD_IMAGE, self._evidence[index][1])
        by_name = self._variable_by_name(target)
        if by_name is not None:
            return by_name
        section = self.new.image.section_at(target)
        assert section is not None
        left = self._evidence[index - 1] if index and self._evidence[index - 1][0] >= section.start else None
        right = (
            self._evidence[index] if index < len(self._evidence) and self._evidence[index][0] < section.end else None
        )
        if left and right and left[1] - left[0] == right[1] - right[0]:
            predicted = target + left[1] - left[0]
            if self._old_names(predicted):
                self.by_interval[target] = predicted
                return Place(OLD_IMAGE, predicted)
        if self._is_new(target, section.name, left, right):
            return self._own_variable(target)
        return "it may be a part of an existing variable or a new one"

    def _own_variable(self, target: int) -> Place:
        section = self.new.image.section_at(target)
        assert section is not None
        index = bisect.bisect_right(self._evidence, (target, 1 << 62))
        following = self._evidence[index][0] if index < len(self._evidence) else section.end
        self.owned.variables[target] = min(following, section.end)
        self.new_variables.add(target)
        return Place(PATCH_IMAGE, target)

    def _variable_by_name(self, target: int) -> Place | None:
        """By symbol, where both builds have all of theirs."""
        old, new = self.old.image.symbols, self.new.image.symbols
        if not (old.complete and new.complete):
            return None
        index = int(np.searchsorted(new.values, target, "right")) - 1
        while index >= 0 and new.types[index] != 1:
            index -= 1
        if index < 0 or not new.values[index] <= target < new.values[index] + max(1, int(new.sizes[index])):
            return None
        name, size = new.names[index], int(new.sizes[index])
        same = [k for k, other in enumerate(old.names) if other == name and old.types[k] == 1]
        if not same:
            return self._own_variable(target)
        if len(same) == 1 and int(old.sizes[same[0]]) == size and new.names.count(name) == 1:
            return Place(OLD_IMAGE, int(old.values[same[0]]) + target - int(new.values[index]))
        return None

    def _old_names(self, address: int) -> bool:
        named = self.old.referenced
        index = int(np.searchsorted(named, address))
        return index < len(named) and int(named[index]) == address

    def _is_new(
        self, target: int, section_name: str, left: tuple[int, int] | None, right: tuple[int, int] | None
    ) -> bool:
        """Proof that no old variable can be meant: none is left over, and it cannot be a field of its left neighbour.

        Fields: in the old build the left neighbour reaches at most to the next named address; what lies farther
        from it than that in the new build is no part of it.
        """
        section = self.old.image.section(section_name)
        if section is None:
            return True
        low = left[1] if left else section.start
        high = right[1] if right and right[1] > low else section.end
        named = self.old.referenced
        between = named[int(np.searchsorted(named, low)) : int(np.searchsorted(named, high))].tolist()
        if any(address not in self._old_variables for address in between if address != section.end):
            return False
        if left is None:
            return low == high
        following = int(np.searchsorted(named, left[1], "right"))
        reach = int(named[following]) if following < len(named) else section.end
        return target - left[0] >= min(reach, section.end) - left[1]
