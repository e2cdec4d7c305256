"""Why each function is in a patch: the evidence, collected where both builds are at hand.

What follows from the two codes alone (how many instructions differ, whose change was inlined) is not written down
here; ``explain`` works it out from them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from elfdiff.building.naming import as_address, string_at
from elfdiff.building.patchbuild import Draft
from elfdiff.building.sourceplaces import source_evidence
from elfdiff.decoding.code import Code
from elfdiff.differences.comparison import Comparison
from elfdiff.differences.constants import Segment
from elfdiff.images.image import Image, Kind
from elfdiff.patches.evidence import MAX_LABEL, Evidence, EvidenceKind, FunctionEvidence, Reference, Run
from elfdiff.patches.quoting import hexadecimal, quote_both
from elfdiff.patchobject import Reason

MANY = 8
"""Callers, pointers and the like that one piece of evidence names."""
MAX_STEPS = 64
"""Segments that are walked from a blamed constant to the one that differs."""
WORD = 8
MAX_COMPARED = 1 << 16
"""Bytes of one constant in which the first difference is looked for."""


def collect(draft: Draft, joined: dict[int, int]) -> tuple[FunctionEvidence, ...]:
    """The evidence for each function of a draft, in its order; ``joined`` as ``closure.joined`` gives it."""
    return _Collector(draft, joined).run()


def old_code(draft: Draft) -> bytes:
    """The old code of the draft's functions, one behind the other, those without a counterpart left out."""
    image = draft.comparison.old.image
    return b"".join(
        image.read(f.old_start, f.old_size or 0) for f in draft.functions if f.old_start is not None and f.old_size
    )


class _Collector:
    def __init__(self, draft: Draft, joined: dict[int, int]) -> None:
        self.draft, self.joined = draft, joined
        self.comparison: Comparison = draft.comparison
        self.naming = draft.naming
        self.first: dict[tuple[int, int], tuple[int, str, str] | None] = {}  # segment -> what differs first in it

    def run(self) -> tuple[FunctionEvidence, ...]:
        members = [self.comparison.new.function_of(f.new_start) for f in self.draft.functions]
        runs = self._runs(members)
        found = []
        for function, j in zip(self.draft.functions, members, strict=True):
            i = int(self.comparison.matching.old_of[j])
            found.append(
                FunctionEvidence(
                    evidence=(*self._evidence(function.reason, j), *self._places(function.reason, i, j, runs)),
                    old=self._references(self.comparison.old, i) if i >= 0 else (),
                    new=self._references(self.comparison.new, j),
                    runs=runs.get(j, ()),
                )
            )
        return tuple(found)

    def _references(self, code: Code, function: int) -> tuple[Reference, ...]:
        references = code.references
        rows = references.of(function)
        start = int(code.starts[function])
        name = self.naming.old if code is self.comparison.old else self.naming.new
        outside = np.nonzero(~references.internal[rows])[0] + rows.start
        fields, kinds = references.field[outside].tolist(), references.kind[outside].tolist()
        return tuple(
            Reference(at - start, kind, *name(row))
            for row, at, kind in zip(outside.tolist(), fields, kinds, strict=True)
        )

    def _runs(self, members: list[int]) -> dict[int, tuple[Run, ...]]:
        """Per new function that has a counterpart: its alignment, as the differ has it."""
        old, new, matching = self.comparison.old, self.comparison.new, self.comparison.matching
        pairs = [(int(matching.old_of[j]), j) for j in members if matching.old_of[j] >= 0]
        changed = [(i, j) for i, j in pairs if not matching.same[i]]
        found: dict[int, tuple[Run, ...]] = {
            j: ((0, 0, len(old.instructions(i))),) for i, j in pairs if matching.same[i]
        }
        survivors = matching.alignments.survivors(np.array(changed, np.int64).reshape(-1, 2))
        bounds = np.searchsorted(survivors.pair, np.arange(len(changed) + 1))
        for k, (i, j) in enumerate(changed):
            rows = slice(int(bounds[k]), int(bounds[k + 1]))
            first = np.searchsorted(old.instructions(i), survivors.old[rows])
            second = np.searchsorted(new.instructions(j), survivors.new[rows])
            breaks = np.nonzero((np.diff(first) != 1) | (np.diff(second) != 1))[0] + 1
            starts = np.concatenate([np.zeros(min(1, len(first)), np.int64), breaks])
            lengths = np.diff(np.append(starts, len(first)))
            found[j] = tuple(zip(first[starts].tolist(), second[starts].tolist(), lengths.tolist(), strict=True))
        return found

    # -- reasons ------------------------------------------------------------------------------------------------

    def _evidence(self, reason: Reason, j: int) -> list[Evidence]:
        if reason is Reason.NEW:
            return [Evidence(EvidenceKind.NEW, subject=self._users(j))]
        if reason is Reason.CLOSURE:
            return [Evidence(EvidenceKind.CLOSURE, subject=self.naming.function(self.joined[j]), new=self._how(j))]
        if reason is Reason.LINES:
            return [Evidence(EvidenceKind.LINES)]
        if reason in (Reason.CONSTANT, Reason.CALLEE) and j in self.comparison.decided:
            return [self._decided(j, *self.comparison.decided[j])]
        return []

    def _places(self, reason: Reason, i: int, j: int, runs: dict[int, tuple[Run, ...]]) -> Iterator[Evidence]:
        if reason is Reason.CODE and any(self.draft.debug):
            codes = self.comparison.old, self.comparison.new
            yield from source_evidence(self.draft.debug, codes, (i, j), runs.get(j, ()))

    def _decided(self, j: int, o: int, n: int) -> Evidence:
        old, new = self.comparison.old.image, self.comparison.new.image
        kinds = old.kind_at(o), new.kind_at(n)
        if all(kind in (Kind.CONSTANT, Kind.RELRO) for kind in kinds):
            return self._number(j, o, n) or self._constant(o, n)
        data = all(kind in (Kind.DATA, Kind.BSS, Kind.RELRO, Kind.CONSTANT) for kind in kinds)
        names = self.naming.old_address(o), self.naming.new_address(n)
        if data and self.comparison.addresses.old_of.get(n) is None:
            return Evidence(EvidenceKind.VARIABLE, "unknown", *names)
        return Evidence(EvidenceKind.VARIABLE if data else EvidenceKind.CALLEE, "", *names)

    def _users(self, j: int) -> str:
        """The functions that name a new one, and the places of data that point to it."""
        code = self.comparison.new
        references, start = code.references, int(code.starts[j])
        users = np.unique(references.function[(references.target == start) & ~references.internal]).tolist()
        names = [self.naming.function(user) for user in users if user != j]
        places = code.image.relative_places[code.image.relative_targets == start].tolist()
        names += [self.naming.new_address(place) for place in places]
        return ", ".join(names[:MANY]) + (f" and {len(names) - MANY} more" if len(names) > MANY else "")

    def _how(self, j: int) -> str:
        """Whether a switch table joins a function with the one that it hangs together with, in either build."""
        other, matching = self.joined[j], self.comparison.matching
        sides = [(self.comparison.new, self.comparison.tables[1], j, other)]
        i, k = int(matching.old_of[j]), int(matching.old_of[other])
        if min(i, k) >= 0:
            sides.append((self.comparison.old, self.comparison.tables[0], i, k))
        for code, tables, mine, theirs in sides:
            for table in tables.values():
                if table.function in (mine, theirs):
                    target = theirs if table.function == mine else mine
                    inside = (table.targets >= code.starts[target]) & (table.targets < code.ends[target])
                    if inside.any():
                        return "switch table"
        return "branch"

    def _number(self, j: int, o: int, n: int) -> Evidence | None:
        """A number that the function loads by itself, read as the loading instruction reads it."""
        labels = []
        i = int(self.comparison.matching.old_of[j])
        for code, function, address, name in (
            (self.comparison.old, i, o, self.naming.old),
            (self.comparison.new, j, n, self.naming.new),
        ):
            rows = code.references.of(function)
            row = rows.start + int(np.argmax(code.references.target[rows] == address))
            if as_address(code, row):
                return None
            labels.append(name(row)[1])
        return Evidence(EvidenceKind.CONSTANT, "number", *labels) if labels[0] != labels[1] else None

    # -- constants ----------------------------------------------------------------------------------------------

    def _constant(self, o: int, n: int) -> Evidence:
        """What differs of a constant, walked to from the one that is blamed."""
        where = self.naming.old_address(o)
        tables = self.comparison.tables[0].get(o), self.comparison.tables[1].get(n)
        if tables[0] is not None and tables[1] is not None:
            counts = [f"{len(t.targets)} cases" for t in tables if t is not None]
            return Evidence(EvidenceKind.CONSTANT, "switch table", *counts)
        strings = self._strings(o, n)
        if strings is not None:
            return Evidence(EvidenceKind.CONSTANT, "string", *strings)
        old, new = self._difference(o, n)
        subject = f"what follows {where}" if where.startswith('"') else f"the table at {where}"
        return Evidence(EvidenceKind.CONSTANT, subject[:MAX_LABEL], old, new)

    def _strings(self, o: int, n: int) -> tuple[str, str] | None:
        first, second = string_at(self.comparison.old.image, o), string_at(self.comparison.new.image, n)
        if first is None or second is None or first == second:
            return None
        return quote_both(first, second)

    def _difference(self, o: int, n: int) -> tuple[str, str]:
        """Old and new content at the first place that differs, in the segments that can be reached from a pair."""
        seen: set[tuple[int, int]] = set()
        todo = [(o, n)]
        while todo and len(seen) < MAX_STEPS:
            pair = todo.pop(0)
            segment = self.comparison.constants.segments.get(pair)
            if segment is None or pair in seen:
                continue
            seen.add(pair)
            if not segment.equal:
                return self._strings(*pair) or self._in_segment(segment, o)
            todo += self._children(segment)
            if segment.reach:
                todo.append((segment.old + segment.reach, segment.new + segment.reach))
        return "", ""

    def _children(self, segment: Segment) -> list[tuple[int, int]]:
        """What the pointer slots of an equal segment lead to, where that differs."""
        first, second = self.comparison.old.image, self.comparison.new.image
        found = []
        for place in _slots(first, segment.old, segment.size):
            a, b = first.pointer_at(place), second.pointer_at(place - segment.old + segment.new)
            if a is not None and b is not None and (a, b) in self.comparison.constants.differing:
                found.append((a, b))
        return found

    def _in_segment(self, segment: Segment, root: int) -> tuple[str, str]:
        """The pointer or word of a segment that differs first, with its offset from ``root``, the whole constant."""
        key = segment.old, segment.new
        if key not in self.first:
            self.first[key] = self._first_difference(segment)
        found = self.first[key]
        if found is not None:
            offset, old, new = found
            at = segment.old + offset - root
            return f"+{at:#x}: {old}", f"+{at:#x}: {new}"
        if segment.size > MAX_COMPARED:
            return "", ""
        return f"{segment.old + segment.size - root} bytes", "another length"

    def _first_difference(self, segment: Segment) -> tuple[int, str, str] | None:
        """(offset, old, new) of the first pointer or word that differs."""
        first, second = self.comparison.old.image, self.comparison.new.image
        size = segment.size
        slots = {place - segment.old for place in _slots(first, segment.old, size)}
        slots |= {place - segment.new for place in _slots(second, segment.new, size)}
        raw = first.read(segment.old, size), second.read(segment.new, size)
        for offset in range(0, min(size, MAX_COMPARED), WORD):
            if offset in slots:
                a, b = first.pointer_at(segment.old + offset), second.pointer_at(segment.new + offset)
                if a is not None and b is not None and self._paired(a, b):
                    continue
                old = "no pointer" if a is None else self.naming.old_address(a)
                new = "no pointer" if b is None else self.naming.new_address(b)
            else:
                old, new = (hexadecimal(side[offset : offset + WORD]) for side in raw)
            if old != new:
                return offset, old, new
        return None

    def _paired(self, a: int, b: int) -> bool:
        """Whether two pointers are known to lead to the same thing; the rest is told by its name."""
        comparison = self.comparison
        if (a, b) in comparison.constants.differing:
            return False
        known = comparison.addresses.old_of.get(b)
        if known is not None and known[0] == a:
            return True
        i, j = comparison.old.function_of(a), comparison.new.function_of(b)
        starts = i >= 0 and j >= 0 and comparison.old.starts[i] == a and comparison.new.starts[j] == b
        return bool(starts) and int(comparison.matching.new_of[i]) == j


def _slots(image: Image, start: int, size: int) -> list[int]:
    """The pointer slots in [start, start + size)."""
    first, last = np.searchsorted(image.relative_places, [start, start + size])
    places: list[int] = image.relative_places[int(first) : int(last)].tolist()
    return places
