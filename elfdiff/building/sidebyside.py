"""Which old functions may go on in their old code while the rest of the program runs the new code.

A thread that never leaves a function (a main loop) may finish it in the old code if nothing that both codes share has
changed: data and types, which the findings say, the variables that they use, and how functions call each other. The
last is more than a prototype: a compiler that saw the body of a callee may count on registers that it leaves alone
(gcc -fipa-ra), memory that it does not write (-fipa-modref) or a stack that it does not need aligned. It sees the
bodies of its own compilation unit. So a call from old code to a function that changes is believed only between units,
without link-time optimization, and to a prototype that is known and the same; and what the old code calls in its own
unit must not reach a changed function there. An unchanged caller needs none of this: the new build has it byte for
byte.

Beside that, nothing in the old code may lead to the bytes that its entry jump replaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from elfdiff.building.closure import neighbours, together
from elfdiff.building.patchbuild import Draft
from elfdiff.building.variables import object_at
from elfdiff.decoding.code import LEA, TRANSFERS, FieldKind
from elfdiff.findingcodes import MOVED_CODE, NEW_IMPORT
from elfdiff.images.image import Kind
from elfdiff.patchobject import ENTRY_JUMP_SIZE, OLD_IMAGE, PATCH_IMAGE, Finding, OldCode

HARMLESS_WHEN_LIFTED = frozenset({"constructors", "exported-symbol", MOVED_CODE, NEW_IMPORT})
"""Findings that say nothing of what old and new code share while they run."""
_SEPARATE_C = re.compile(r"GNU C\d* (?!.*-flto)")
"""DW_AT_producer of code that gcc compiled from C, unit by unit; with -flto it is ``GNU GIMPLE``. In C++ a body may be
in several units."""
_WRITABLE = (Kind.DATA, Kind.BSS)
_MANY = 3


def old_codes(draft: Draft, findings: tuple[Finding, ...]) -> tuple[OldCode, ...]:
    """What can be said of the old code of each function that changes or goes away. Raises BadInput."""
    return tuple(_SideBySide(draft, findings).verdicts())


class _SideBySide:
    def __init__(self, draft: Draft, findings: tuple[Finding, ...]) -> None:
        self.draft = draft
        self.comparison = draft.comparison
        self.old, self.new = draft.comparison.old, draft.comparison.new
        self.lifted = sorted({f.code for f in findings if f.lifted} - HARMLESS_WHEN_LIFTED)
        self.functions = {
            self.old.function_of(f.old_start): f for f in draft.functions if f.old_start is not None and f.old_size
        }
        self.removed = {i for i in self.comparison.removed if self.old.size(i)}
        self.neighbours = neighbours(self.old, self.comparison.tables[0])

    def verdicts(self) -> Iterator[OldCode]:
        for i in (*self.functions, *sorted(self.removed)):
            parts = together(self.neighbours, i)
            why_not = next(self._reasons(i, parts), "")
            ours = parts & (self.functions.keys() | self.removed)  # others are no part of the patch
            starts = tuple(int(self.old.starts[k]) for k in (i, *sorted(ours - {i})))
            yield OldCode(self.old.names[i], starts, why_not)

    def _reasons(self, function: int, parts: set[int]) -> Iterator[str]:
        if self.lifted:
            yield f"the patch was made with --allow {', '.join(self.lifted)}"
        unknown = [k for k in parts if not (self.old.has_unwind[k] and self.old.sound[k])]
        if unknown:
            yield f"the bounds or the instructions of {self._names(unknown)} are not certain"
        stray = [k for k in parts if k not in self.functions and k not in self.removed]
        if stray:
            yield f"it shares code with {self._names(stray)}, which is not in the patch"
        yield from self._leads_from_one_to_another(function)
        yield from self._returns_to_entry(parts)
        yield from self._other_variables(function, parts)
        yield from self._calls(parts)

    def _leads_from_one_to_another(self, function: int) -> Iterator[str]:
        for move in self.draft.moves:
            if move.caller == function and move.hopeless:
                names = self._names([move.source]), self._names([move.destination])
                yield f"it calls {names[0]} and {names[1]}, and {', '.join(move.what)} moves from one to the other"

    def _names(self, functions: Iterable[int]) -> str:
        names = sorted({self.old.names[k] for k in functions})
        return ", ".join(names[:_MANY]) + (f" and {len(names) - _MANY} more" if len(names) > _MANY else "")

    # -- the entry jump -------------------------------------------------------------------------------------

    def _returns_to_entry(self, parts: set[int]) -> Iterator[str]:
        jumps = [int(self.old.starts[k]) for k in parts if k in self.functions and self.functions[k].entry_jump]
        leads_to = np.array(sorted({at for k in parts for at in self._reached(k)}), np.int64)
        for start in jumps:
            first, last = np.searchsorted(leads_to, [start, start + ENTRY_JUMP_SIZE])
            if first < last:
                yield f"its old code leads back to {int(leads_to[first]):#x}, where the entry jump will be"

    def _reached(self, function: int) -> Iterator[int]:
        """Where the function's own code goes on but by a call or a return: branches, labels, cases, handlers."""
        references = self.old.references
        rows = references.of(function)
        inside = np.isin(references.kind[rows], TRANSFERS) & (references.kind[rows] != FieldKind.CALL)
        target = references.target[rows]
        own = (target > self.old.starts[function]) & (target < self.old.ends[function])
        label = (references.opcode[rows] == LEA) & own
        yield from target[inside | label].tolist()
        for table in self.comparison.tables[0].values():
            if table.function == function:
                yield from table.targets.tolist()
        if self.old.has_lsda[function]:
            handlers = self.old.unwind.of(function).table
            for site in handlers.call_sites if handlers else ():
                if site.landing_pad is not None:
                    yield int(self.old.starts[function]) + site.landing_pad

    # -- variables ------------------------------------------------------------------------------------------

    def _other_variables(self, function: int, parts: set[int]) -> Iterator[str]:
        used = {self._variable(at) for k in parts for at in self._writable(k)}
        if function in self.removed:
            known = {self._variable(at) for at, _ in self.comparison.addresses.old_of.values()}
            strange = used - known
            if strange:
                yield f"it uses {self._variables(strange)}, and it is not known what the new build uses instead"
            return
        references, resolver = self.new.references, self.draft.resolver
        theirs: set[int] = set()
        for k in parts & self.functions.keys():
            rows = references.of(int(self.comparison.matching.new_of[k]))
            for row in range(rows.start, rows.stop):
                place = resolver.resolved.get(row)
                if place is None:
                    continue
                if place.symbol == PATCH_IMAGE and self._is_new_variable(place.address):
                    yield f"its new code uses {place.address:#x}, a variable that the running program does not have"
                if place.symbol == OLD_IMAGE and self._is_writable(place.address):
                    theirs.add(self._variable(place.address))
        if used != theirs:
            yield f"old and new code do not use the same variables: {self._variables(used ^ theirs)}"

    def _writable(self, function: int) -> list[int]:
        references = self.old.references
        rows = references.of(function)
        targets = references.target[rows][~references.internal[rows]]
        found: list[int] = targets[np.isin(self.old.image.kinds(targets), _WRITABLE)].tolist()
        return found

    def _is_writable(self, address: int) -> bool:
        return bool(np.isin(self.old.image.kinds(np.array([address])), _WRITABLE)[0])

    def _is_new_variable(self, address: int) -> bool:
        return any(start <= address < end for start, end in self.draft.resolver.owned.variables.items())

    def _variable(self, address: int) -> int:
        """Where the variable starts that an old address lies in, as far as symbols tell; else the address."""
        symbols = self.old.image.symbols
        index = object_at(symbols, address)
        return int(symbols.values[index]) if index is not None else address

    def _variables(self, addresses: Iterable[int]) -> str:
        symbols = self.old.image.symbols
        shown = []
        for address in sorted(addresses):
            index = object_at(symbols, address)
            shown.append(symbols.names[index] if index is not None else hex(address))
        return ", ".join(shown[:_MANY]) + (f" and {len(shown) - _MANY} more" if len(shown) > _MANY else "")

    # -- calls ----------------------------------------------------------------------------------------------

    def _calls(self, parts: set[int]) -> Iterator[str]:
        goes_on, todo = set(parts), list(parts)
        while todo:
            caller = todo.pop()
            for callee in self._callees(caller):
                if callee in self.functions:
                    if callee in parts and callee not in self._entered_from(caller):
                        continue
                    yield from self._call(caller, callee)
                elif callee in self.removed:  # it stays what it was, and is called by what does
                    if callee not in goes_on:
                        goes_on.add(callee)
                        todo.append(callee)
                elif callee in self._reaching and not self._apart(caller, callee):
                    yield from self._through(caller, callee)

    def _call(self, caller: int, callee: int) -> Iterator[str]:
        name = self.old.names[callee]
        if not self._by_name(caller, callee) and not self._apart(caller, callee):
            yield f"{self.old.names[caller]} calls {name}, which changes, and may be compiled for its old code"
        j = int(self.comparison.matching.new_of[callee])
        types = self.draft.types
        if self.comparison.matching.same[callee] or (j in types.described and j not in types.prototypes):
            return
        said = "is called otherwise" if j in types.prototypes else "may be called otherwise"
        yield f"{self.old.names[caller]} calls {name}, which {said}"

    def _through(self, caller: int, first: int) -> Iterator[str]:
        """Unchanged functions of the caller's unit, whose bodies the compiler saw, down to a changed one."""
        seen, todo = {first}, [first]
        while todo:
            function = todo.pop()
            for callee in self._callees(function) & self._reaching:
                if callee in seen or self._apart(function, callee):
                    continue
                if callee in self.functions:
                    yield (
                        f"{self.old.names[caller]} calls {self.old.names[first]}, from where {self.old.names[callee]} "
                        "is called, which changes, and may be compiled for its old code"
                    )
                seen.add(callee)
                todo.append(callee)

    def _callees(self, function: int) -> set[int]:
        """Functions at whose entry a call or a jump of this one leads, also through the image's own exports."""
        return self._direct(function) | self._named(function)

    def _direct(self, function: int) -> set[int]:
        first, last = np.searchsorted(self._edges[0], [function, function + 1])
        found: list[int] = self._edges[1][first:last].tolist()
        return set(found)

    def _named(self, function: int) -> set[int]:
        references, image = self.old.references, self.old.image
        found = set()
        for target in references.target[references.of(function)].tolist():
            slot = image.slots.get(image.plt.get(target, target))
            entry = image.exports.get(slot.symbol) if slot is not None and slot.symbol else None
            if entry is not None:
                found.add(self.old.function_of(entry))
        return found - {-1}

    def _by_name(self, caller: int, callee: int) -> bool:
        """Only through the dynamic linker, which may find another definition, so that no body is counted on."""
        return callee not in self._direct(caller)

    def _entered_from(self, caller: int) -> set[int]:
        """What a function enters by a call: within one closure, jumps are not calls."""
        references = self.old.references
        rows = references.of(caller)
        targets = references.target[rows][references.kind[rows] == FieldKind.CALL]
        return {self.old.function_of(int(at)) for at in targets}

    @cached_property
    def _edges(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(caller, callee) of every call and jump to an entry, sorted, none twice."""
        references = self.old.references
        rows = np.nonzero(np.isin(references.kind, TRANSFERS))[0]
        callee = self.old.function_at(references.target[rows])
        entry = (callee >= 0) & (self.old.starts[np.clip(callee, 0, None)] == references.target[rows])
        pairs = np.unique(np.stack([references.function[rows[entry]].astype(np.int64), callee[entry]]), axis=1)
        return pairs[0], pairs[1]

    @cached_property
    def _reaching(self) -> frozenset[int]:
        """Functions from which calls lead to one that changes, those included."""
        caller, callee = self._edges
        found = np.zeros(len(self.old), np.bool_)
        found[list(self.functions)] = True
        count = -1
        while count != int(found.sum()):
            count = int(found.sum())
            found[caller[found[callee]]] = True
        return frozenset(np.nonzero(found)[0].tolist())

    def _apart(self, one: int, other: int) -> bool:
        """Whether two functions were compiled without sight of each other, which only debug information can say."""
        units = self._unit(one), self._unit(other)
        return None not in units and units[0] != units[1]

    def _unit(self, function: int) -> int | None:
        if function not in self._units:
            debug = self.draft.debug[0]
            unit = debug.unit_at(int(self.old.starts[function])) if debug is not None else None
            known = unit is not None and _SEPARATE_C.match(unit.producer)
            self._units[function] = int(unit.cu.cu_offset) if unit is not None and known else None
        return self._units[function]

    @cached_property
    def _units(self) -> dict[int, int | None]:
        return {}
