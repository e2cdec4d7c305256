"""Where each reference of the patch leads: to the patch itself, or to something of the old image (D3, D4).

What the new code shares with the running program (variables, unchanged functions, imports, equal constants) is
found in the old image; what is its own (patched functions, switch tables, changed and new constants, variables
that are provably new) is found in the patch, at the new build's address. What is neither is not guessed: it is
reported as unbound, and refused.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

from elfdiff.building.survivors import surviving_constant
from elfdiff.building.variables import NewVariable, OldVariable, Variables, object_at
from elfdiff.decoding.code import LEA, FieldKind
from elfdiff.differences.comparison import Comparison
from elfdiff.images.image import R_X86_64_64, R_X86_64_IRELATIVE, SYMBOL_VALUES, Addresses, Kind, Slot
from elfdiff.images.linkage_x86_64 import SlotName, slot_name
from elfdiff.patchobject import FIRST_IMPORT, OLD_IMAGE, PATCH_IMAGE, Import

MIN_ALIGNMENT = 16
"""An unknown constant named by an immediate must begin at such an address or behind a zero byte."""

STUB_SIZE = 16

# Plain names: in a hot path, looking up a member of an enumeration by name is what takes the time.
_MEMORY, _SHORT, _IMMEDIATE = int(FieldKind.MEMORY), int(FieldKind.SHORT), int(FieldKind.ABSOLUTE_IMMEDIATE)
_OWNABLE = (Kind.CONSTANT, Kind.RELRO, Kind.DATA, Kind.BSS)


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
        self.new_variables: dict[int, NewVariable] = {}
        self.used_code: set[int] = set()  # old addresses of unchanged code and stubs that the patch calls
        self._known: dict[tuple[int, bool], Place | str] = {}
        self._old_stubs = self._stubs_by_name()
        self._old_slots = self._slots_by_name()
        self.variables = Variables(comparison)
        self._labels = self._label_slots()
        self._types = comparison.handlers.types.new.addresses

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
        return self._taking[row]

    @cached_property
    def _taking(self) -> list[bool]:
        """Per reference: it takes an address."""
        references = self.new.references
        load = (references.kind == FieldKind.MEMORY) & (references.opcode == LEA)
        taking: list[bool] = (load | (references.kind >= FieldKind.ABSOLUTE_DISPLACEMENT)).tolist()
        return taking

    @cached_property
    def _columns(self) -> tuple[list[int], list[int], list[int]]:
        """Target, kind and opcode of each reference, as lists: they are read one by one."""
        references = self.new.references
        return references.target.tolist(), references.kind.tolist(), references.opcode.tolist()

    def _reference(self, row: int) -> Place | str:
        targets, kinds, opcodes = self._columns
        wide = kinds[row] == _MEMORY and _is_vector(opcodes[row])
        found = self.address(targets[row], taken=self._taking[row] or wide)
        if isinstance(found, Place) and kinds[row] == _SHORT and found.symbol != PATCH_IMAGE:
            return "a short branch cannot reach the old image"
        return found

    def _may_be_a_number(self, row: int, found: Place) -> bool:
        """An immediate of a fixed-address image without a second witness that it is an address.

        Witnesses: it moved with something that moved, or its place begins something. What is bound to the same
        number in the old image is right either way.
        """
        targets, kinds, _ = self._columns
        target = targets[row]
        if kinds[row] != _IMMEDIATE or found == Place(OLD_IMAGE, target):
            return False
        known = self.comparison.addresses.old_of.get(target)
        if known is not None and known[0] != target:
            return False
        if self._moved_with_its_function(row):
            return False
        return target % MIN_ALIGNMENT != 0 and self.new.image.read(target - 1, 1) != b"\0"

    def _moved_with_its_function(self, row: int) -> bool:
        """It names the start of a function, and the old function named where that one was before it moved."""
        references, old = self.new.references, self.old.references
        function = self.new.function_of(int(references.target[row]))
        entry = self.comparison.old_entry(function) if function >= 0 else None
        i = int(self.comparison.matching.old_of[int(references.function[row])])
        if entry is None or i < 0 or int(self.new.starts[function]) != int(references.target[row]):
            return False
        mine = old.of(i)
        return bool(((old.target[mine] == entry) & (old.kind[mine] == FieldKind.ABSOLUTE_IMMEDIATE)).any())

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
                if first in self._types or self.new.image.copied(first):
                    continue  # a type or a library's variable: not an array of the program's
                again = True
                for target in (first, second):
                    self._take_from_patch(target, by_target[target], found, other=first)

    def _adjacent(self, first: int, second: int) -> bool:
        """Data of the same kind of section with nothing named between."""
        following = bisect.bisect_right(self._named, first)
        if following == len(self._named) or self._named[following] != second or self._ends_before(first, second):
            return False
        return self.new.image.kind_at(first) in _OWNABLE and self.new.image.kind_at(second) in _OWNABLE

    def _ends_before(self, first: int, second: int) -> bool:
        """By its symbol an object has ended before the second address, which is then not its end."""
        symbols = self.new.image.symbols
        index = object_at(symbols, first) if symbols.complete else None
        return index is not None and int(symbols.values[index] + symbols.sizes[index]) < second

    @cached_property
    def _named(self) -> list[int]:
        named: list[int] = self.new.referenced.tolist()
        return named

    def _take_from_patch(self, target: int, rows: list[int], found: dict[int, Place], *, other: int) -> None:
        section = self.new.image.section_at(target)
        constant = section is not None and section.kind in (Kind.CONSTANT, Kind.RELRO)
        shared = self.comparison.handlers.types.old_of(target) is not None or self.new.image.copied(target)
        if constant and not shared:
            self.owned.constants.setdefault(target, self._constant_end(target))
            for row in rows:
                found[row] = Place(PATCH_IMAGE, target)
            return
        for row in rows:
            del found[row]
            self._note(row, f"it may be a variable or the end of the one at {other:#x}")

    def may_be_end(self, function: int, target: int) -> bool:
        """A function takes the address of what lies before the target, too: the target may be the end of that.

        Of a string nobody takes the end but by its length.
        """
        references, image = self.new.references, self.new.image
        rows = range(int(references.first[function]), int(references.last[function]))
        before = {int(references.target[row]) for row in rows if self._takes_address(row)}
        before = {first for first in before if self._adjacent(first, target)}
        return any(image.read(first, target - first).rstrip(b"\0") != image.string_at(first) for first in before)

    def note_slot(self, place: int, target: int, why: str) -> None:
        """Note a pointer slot of owned data that leads nowhere known."""
        self.unbound.append(Unbound(-1, target, f"the pointer at {place:#x}: {why}"))

    def address(self, target: int, *, taken: bool) -> Place | str:
        """Where a new address is found; a string says why it cannot be told.

        ``taken``: it is used as a pointer, or more than eight bytes at it are accessed.
        """
        key = (target, taken)
        if key not in self._known:
            self._known[key] = self._resolve(target, taken)
        return self._known[key]

    def _resolve(self, target: int, taken: bool) -> Place | str:
        copied = self.new.image.copied(target)
        if copied is not None:
            return self._copy(*copied)
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
            return self._variable(target, taken)
        if self.new.image.fixed_address and not self.new.image.contains(target):
            return Place(OLD_IMAGE, target)  # a number or a weak symbol that nothing defines: the same everywhere
        known = self.comparison.addresses.certain(target)
        return Place(OLD_IMAGE, known) if known is not None else "no unchanged code names it"

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
        if not entry and old_entry is not None and self._is_equal_data(function):
            self.used_code.add(old_entry)
            return Place(OLD_IMAGE, old_entry + target - int(self.new.starts[function]))
        if not entry:
            return "it lies inside a function that is not patched"
        if old_entry is None:
            return "the function has no counterpart in the old build"
        self.used_code.add(old_entry)
        return Place(OLD_IMAGE, old_entry)

    def _is_equal_data(self, function: int) -> bool:
        """A table among the code, the same in both builds to the last byte."""
        other = int(self.comparison.matching.old_of[function])
        equal = self.old.raw_bytes(other) == self.new.raw_bytes(function)
        return bool(self.new.may_be_data[function]) and bool(self.old.may_be_data[other]) and equal

    def _stub(self, target: int) -> Place | str:
        image = self.new.image
        slot_address = image.plt.get(target)
        slot = image.slots.get(slot_address) if slot_address is not None else None
        if slot is None or slot_address is None:
            return "the linkage stub has no symbol"
        name = self._slot_name(slot_address)
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
            place = self._import(slot)
            if isinstance(place, str):
                return place
            self.owned.slots[slot_address] = place
        self.owned.stubs[target] = slot_address
        return Place(PATCH_IMAGE, target)

    def _slot(self, target: int) -> Place | str:
        image = self.new.image
        slot = image.slots.get(target)
        if slot is not None:
            name = self._slot_name(target)
            if isinstance(name, str):
                return name
            if name in self._old_slots:
                return Place(OLD_IMAGE, self._old_slots[name])
            if not slot.symbol or slot.type not in SYMBOL_VALUES:
                return "a slot of thread-local storage or an indirect function without counterpart"
            place = self._import(slot)
            if isinstance(place, str):
                return place
            self.owned.slots[target] = place
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

    def _copy(self, symbol: str, offset: int) -> Place | str:
        """A library's variable that the dynamic linker copies into the program: the running program's copy."""
        for address in self.old.image.copies:
            if self.old.image.slots[address].symbol == symbol:
                return Place(OLD_IMAGE, address + offset)
        return "it is a library's variable of which the running program has no copy"

    def _import(self, slot: Slot) -> Place | str:
        own = self.new.image.exports.get(slot.symbol)
        if own is not None and slot.symbol not in self.old.image.exports:
            return self.address(own + slot.addend, taken=True)  # only the patch has what it names
        wanted = Import(slot.symbol, slot.version, slot.weak)
        if wanted not in self.imports:
            self.imports.append(wanted)
        return Place(FIRST_IMPORT + self.imports.index(wanted), slot.addend if slot.type == R_X86_64_64 else 0)

    def _slot_name(self, address: int) -> SlotName | str:
        """What names a slot of the new build, its resolver (IRELATIVE) by the old build's address."""
        name = slot_name(self.new.image, address)
        assert name is not None
        if name.type != R_X86_64_IRELATIVE:
            return name
        function = self.new.function_of(name.addend)
        old_entry = self.comparison.old_entry(function) if function >= 0 else None
        if old_entry is None:
            return "the resolver of the indirect function has no counterpart"
        return name._replace(addend=old_entry)

    def _stubs_by_name(self) -> dict[SlotName, int]:
        image = self.old.image
        found: dict[SlotName, int] = {}
        for stub, address in image.plt.items():
            name = slot_name(image, address)
            if name is not None:
                found.setdefault(name, stub)
        return found

    def _slots_by_name(self) -> dict[SlotName, int]:
        """The slots that only the dynamic linker writes: a variable that begins as a pointer to an import is none."""
        image = self.old.image
        found: dict[SlotName, int] = {}
        for address in image.slots:
            name = slot_name(image, address)
            if name is not None and image.kind_at(address) is Kind.GOT:
                found[name] = address
        return found

    def content(self, slot_address: int) -> Place | str:
        """What a pointer slot of the new build holds, for a slot that the patch is to have itself."""
        slot = self.new.image.slots.get(slot_address)
        if slot is not None:
            return self._import(slot) if slot.symbol and slot.type in SYMBOL_VALUES else "a slot without a symbol"
        pointed = self.new.image.pointer_at(slot_address)
        return "a slot without relocation" if pointed is None else self.address(pointed, taken=True)

    # -- constants ------------------------------------------------------------------------------------------

    def _constant(self, target: int) -> Place | str:
        comparison = self.comparison
        if target in comparison.tables[1]:
            self.owned.constants[target] = comparison.tables[1][target].end
            return Place(PATCH_IMAGE, target)
        known = comparison.handlers.types.old_of(target)
        if known is not None:
            return Place(OLD_IMAGE, known)  # a type must stay the one that live objects and exceptions have
        known = comparison.addresses.certain(target)
        if known is not None and comparison.constants.same(known, target) and not self._holds_labels(target):
            return Place(OLD_IMAGE, known)
        survived = surviving_constant(comparison, target)
        if survived is not None:
            return Place(OLD_IMAGE, survived)
        self.owned.constants[target] = self._constant_end(target)
        return Place(PATCH_IMAGE, target)

    def _constant_end(self, target: int) -> int:
        """As far as the object may reach: to the next constant that is the old build's own."""
        section = self.new.image.section_at(target)
        assert section is not None
        following = bisect.bisect_right(self._old_constants, target)
        if following < len(self._old_constants):
            return min(section.end, self._old_constants[following])
        return section.end

    @cached_property
    def _old_constants(self) -> list[int]:
        """The addresses that the new build names and at which the old build's own constant lies, sorted."""
        known, same = self.comparison.addresses.old_of, self.comparison.constants.same
        named = self.new.referenced.tolist()
        return [address for address in named if address in known and same(known[address][0], address)]

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

    def _variable(self, target: int, taken: bool) -> Place | str:
        found = self.variables.find(target, whole=taken)
        if isinstance(found, OldVariable):
            if found.guessed:
                self.by_interval[target] = found.address
            return Place(OLD_IMAGE, found.address)
        if isinstance(found, NewVariable):
            self.owned.variables[target] = found.end
            self.new_variables[target] = found
            return Place(PATCH_IMAGE, target)
        return found

    def finish(self) -> None:
        """Look at the new variables once more, when all that the patch refers to is known.

        Without symbols, what looks new may be the tail of its grown neighbour. Code that uses it as such takes the
        neighbour's address, or walks over both with vector instructions.
        """
        references = self.new.references
        users: dict[int, list[int]] = {}
        for row in self.resolved:
            users.setdefault(int(references.target[row]), []).append(row)
        for target, variable in self.new_variables.items():
            if variable.neighbour is None:
                continue
            front = users.get(variable.neighbour, [])
            mine = users.get(target, [])
            together = {int(references.function[r]) for r in front} & {int(references.function[r]) for r in mine}
            wide = any(_is_vector(int(references.opcode[row])) for row in mine)
            if any(self._takes_address(row) for row in front) or (together and wide):
                function = int(references.function[mine[0]]) if mine else -1
                self.unbound.append(
                    Unbound(function, target, f"it may be the end of the variable at {variable.neighbour:#x}, grown")
                )


_SCALAR_TWO_BYTE = frozenset(
    (
        *range(0x140, 0x150),
        *range(0x190, 0x1A0),
        *(0x1AF, 0x1B6, 0x1B7, 0x1BE, 0x1BF, 0x12A, 0x12C, 0x12D, 0x12E, 0x12F, 0x151, 0x158, 0x159, 0x15A, 0x15C),
        *(0x15D, 0x15E, 0x15F, 0x16E, 0x17E, 0x1B0, 0x1B1, 0x1C0, 0x1C1),
    )
)
"""cmov, imul, movzx, movsx, setcc, scalar conversions and arithmetic, movd, and the atomic ones."""


def _is_vector(opcode: int) -> bool:
    """Whether an instruction may access more than eight bytes; moves that exist in both widths count as wide."""
    return opcode >= 0x100 and opcode not in _SCALAR_TWO_BYTE
