"""What a patch changes and why each function is in it: one value, of which text, JSON and a page are views.

It is made of a patch object alone: the evidence and the old code that it carries, and the new code that it holds.
"""

from __future__ import annotations

import bisect
import difflib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

from elfdiff.diff import Options, analyse, summary
from elfdiff.differences.codediff_x86_64 import Body, Change, Row, compare_code, immediate_differs, read_bodies
from elfdiff.errors import EXIT_NAMES, BadInput, LivegraftError
from elfdiff.patches.evidence import Evidence, EvidenceKind, FunctionEvidence, Names, Reference, unpack
from elfdiff.patches.patchfile import symbol_name
from elfdiff.patchobject import (
    RELOCATION_DTYPE,
    Build,
    Finding,
    Import,
    LineOnly,
    OldCode,
    PatchFunction,
    PatchObject,
    Reason,
    RelocationType,
    RemovedFunction,
    Segment,
)

MIN_CONTAINED = 0.7
"""Share of a function's opcodes that another one must have, too, to be taken for one that holds a copy of it."""
MIN_CHANGE = 3
"""Removed and added instructions that tell one function's change from another's."""
MIN_MOVED = 0.8
"""Share of a new function's neighbouring opcodes that an old one must have to be where its code comes from."""
MIN_BODY = 6
"""Instructions of the smallest function that is recognised inside another."""
MANY_ALIKE = 40
"""Functions that are compared with each for one change; and inlined ones that are named."""
MANY_NAMED = 3
MANY_NAMES = 6
"""Names that only one code has, of which so many are told."""
CLOSE_NAMES = 4


@dataclass(frozen=True)
class Verdict:
    """What ``diff`` says of the pair: exit status and its stable name, and an error's words, empty where it is none."""

    code: int
    name: str
    what: str
    why: str
    next_step: str


@dataclass(frozen=True)
class CodeCounts:
    """Instructions of both codes, and how many changed in which way."""

    old: int
    new: int
    removed: int
    added: int
    operand: int
    reference: int

    @property
    def changed(self) -> int:
        """All that are not the same."""
        return self.removed + self.added + self.operand + self.reference


@dataclass(frozen=True)
class ExplainedFunction:
    """One function of the patch. ``references``: how many of its references name what (new code).

    ``old``, ``new`` and ``rows`` are its code side by side; ``old`` is None where it is new, all are empty where the
    patch carries no explanation.
    """

    function: PatchFunction
    evidence: tuple[Evidence, ...]
    counts: CodeCounts | None
    references: dict[Names, int]
    old: Body | None = field(repr=False)
    new: Body | None = field(repr=False)
    rows: tuple[Row, ...] = field(repr=False)


@dataclass(frozen=True)
class Sizes:
    """Bytes that the patch adds to a process, whole pages, by what they may be used for; and its code's own bytes."""

    executable: int
    constant: int
    writable: int
    old_code: int
    new_code: int


@dataclass(frozen=True)
class Rewritten:
    """One field of the patch that is written when it is applied; ``type`` is the psABI's name of the relocation."""

    place: int
    type: str
    symbol: str
    addend: int


@dataclass(frozen=True)
class Explanation:
    """Everything that is to be said. ``id`` is empty for a pair of builds that is no patch object (yet).

    ``complete`` is False for a patch object without evidence: then nothing is known of the codes' differences.
    ``segments`` are without their data; ``checked``: ranges of the old build that are compared before anything is
    written.
    """

    id: str
    tool_version: str
    old: Build
    new: Build
    verdict: Verdict
    complete: bool
    functions: tuple[ExplainedFunction, ...]
    removed: tuple[RemovedFunction, ...]
    line_only: tuple[LineOnly, ...]
    findings: tuple[Finding, ...]
    imports: tuple[Import, ...]
    sizes: Sizes
    summary: dict[str, int]
    segments: tuple[Segment, ...]
    rewritten: tuple[Rewritten, ...] = field(repr=False)
    checked: int
    old_codes: tuple[OldCode, ...] = ()


def explain_pair(old: Path, new: Path, options: Options) -> Explanation:
    """Explain what ``diff`` would make of two builds, or why it would not. Raises BadInput as ``diff`` does."""
    result = analyse(old, new, options)
    if result.draft is not None:
        return explain(result.patch(), result.error)
    return explain(_empty(result.old, result.new), result.error)


def _empty(old: Build, new: Build) -> PatchObject:
    """The patch of two builds that cannot be compared: nothing."""
    return PatchObject(
        id="", tool_version=version("livegraft"), old=old, new=new, segments=(), functions=(), imports=(),
        relocations=np.zeros(0, RELOCATION_DTYPE), checked=(), findings=(), removed=(), line_only=(), eh_frame_hdr=None,
    )  # fmt: skip


def explain(patch: PatchObject, error: LivegraftError | None = None) -> Explanation:
    """Explain a patch object; ``error``: why there would be none. Raises BadInput if its evidence is damaged."""
    functions = _explained(patch) if patch.evidence else tuple(_plain(function) for function in patch.functions)
    return Explanation(
        id=patch.id,
        tool_version=patch.tool_version,
        old=patch.old,
        new=patch.new,
        verdict=verdict(error),
        complete=bool(patch.evidence) or not patch.functions,
        functions=functions,
        removed=patch.removed,
        line_only=patch.line_only,
        findings=patch.findings,
        imports=patch.imports,
        sizes=_sizes(patch),
        summary=summary(patch),
        segments=tuple(replace(segment, data=b"") for segment in patch.segments) if patch.functions else (),
        rewritten=tuple(_rewritten(patch)),
        checked=len(patch.checked),
        old_codes=patch.old_codes,
    )


def _rewritten(patch: PatchObject) -> Iterator[Rewritten]:
    for place, kind, symbol, addend in patch.relocations.tolist():
        yield Rewritten(place, RelocationType(kind).name, symbol_name(patch, symbol), addend)


def verdict(error: LivegraftError | None) -> Verdict:
    """The verdict that an error stands for; None: there is a patch."""
    if error is None:
        return Verdict(0, EXIT_NAMES[0], "", "", "")
    return Verdict(error.exit_code, error.code, error.what, error.why, error.next_step)


def select(explanation: Explanation, names: Iterable[str]) -> tuple[ExplainedFunction, ...]:
    """The functions of these names or addresses (of either build, hexadecimal), in the patch's order.

    Raises BadInput for a name that is not in the patch, with those that are close to it.
    """
    wanted: set[int] = set()
    known = [_handles(item.function) for item in explanation.functions]
    for name in names:
        found = {k for k, handles in enumerate(known) if name in handles}
        if not found:
            close = difflib.get_close_matches(name, sorted(set().union(*known)), CLOSE_NAMES, 0.5)
            raise BadInput(
                f"{name}: no such function in the patch",
                why=f"it holds {len(known)} function(s), none of this name or address",
                next_step=f"one of these is close: {', '.join(close)}" if close else "livegraft inspect lists them",
            )
        wanted |= found
    return tuple(item for k, item in enumerate(explanation.functions) if k in wanted)


def _handles(function: PatchFunction) -> set[str]:
    starts = [start for start in (function.old_start, function.new_start) if start is not None]
    return {function.name, *(hex(start) for start in starts)}


def _sizes(patch: PatchObject) -> Sizes:
    by_use = Counter[int]()
    for segment in patch.segments if patch.functions else ():
        by_use[segment.flags & 3] += segment.size
    return Sizes(
        executable=by_use[1],
        constant=by_use[0],
        writable=by_use[2],
        old_code=sum(f.old_size or 0 for f in patch.functions),
        new_code=sum(f.new_size for f in patch.functions),
    )


# -- functions ----------------------------------------------------------------------------------------------------


def _plain(function: PatchFunction) -> ExplainedFunction:
    return ExplainedFunction(function, (), None, {}, None, None, ())


def _explained(patch: PatchObject) -> tuple[ExplainedFunction, ...]:
    evidence = unpack(patch.evidence)
    if len(evidence) != len(patch.functions):
        raise _inconsistent(f"{len(patch.functions)} functions, and evidence for {len(evidence)}")
    old_parts = list(_old_parts(patch, evidence))
    new_parts = list(_new_parts(patch, evidence))
    bodies = read_bodies([part for part in old_parts if part is not None] + new_parts)
    old_bodies = iter(bodies[: len(bodies) - len(new_parts)])
    found = []
    for function, item, part, new in zip(
        patch.functions, evidence, old_parts, bodies[len(bodies) - len(new_parts) :], strict=True
    ):
        old = None if part is None else next(old_bodies)
        rows = compare_code(old or Body(0, b"", ()), new, item.runs)
        names = Counter(reference.names for reference in item.new)
        counts = _counts(old, new, rows)
        found.append(ExplainedFunction(function, item.evidence, counts, dict(names), old, new, rows))
    return tuple(_with_code(found))


_Part = tuple[int, bytes, tuple[Reference, ...]]


def _old_parts(patch: PatchObject, evidence: tuple[FunctionEvidence, ...]) -> Iterator[_Part | None]:
    at = 0
    for function, item in zip(patch.functions, evidence, strict=True):
        if function.old_start is None:
            yield None
            continue
        size = function.old_size or 0
        yield function.old_start, patch.old_code[at : at + size], item.old
        at += size
    if at != len(patch.old_code):
        raise _inconsistent(f"{at} bytes of old code are described, {len(patch.old_code)} are there")


def _new_parts(patch: PatchObject, evidence: tuple[FunctionEvidence, ...]) -> Iterator[_Part]:
    segments = sorted(patch.segments, key=_start)
    for function, item in zip(patch.functions, evidence, strict=True):
        index = bisect.bisect_right(segments, function.new_start, key=_start) - 1
        if index < 0:
            raise _inconsistent(f"{function.name} lies outside the patch")
        segment = segments[index]
        low = function.new_start - segment.vaddr
        if low + function.new_size > segment.size:
            raise _inconsistent(f"{function.name} lies outside the patch")
        code = segment.data[low : low + function.new_size].ljust(function.new_size, b"\0")
        yield function.new_start, code, item.new


def _start(segment: Segment) -> int:
    return segment.vaddr


def _counts(old: Body | None, new: Body, rows: tuple[Row, ...]) -> CodeCounts:
    changes = Counter(row.change for row in rows)
    return CodeCounts(
        old=len(old.instructions) if old else 0,
        new=len(new.instructions),
        removed=changes[Change.REMOVED],
        added=changes[Change.ADDED],
        operand=changes[Change.OPERAND],
        reference=changes[Change.REFERENCE],
    )


def _inconsistent(why: str) -> BadInput:
    return BadInput(
        "the patch object's explanation does not fit it",
        why=why,
        next_step="make it again: livegraft diff OLD NEW -o PATCH",
    )


# -- evidence that the codes give -----------------------------------------------------------------------------------


def _with_code(found: list[ExplainedFunction]) -> Iterator[ExplainedFunction]:
    """Put what the codes show in front of the evidence of each function that has own changes."""
    inlined = _Inlined(found)
    moved = _moved(found)
    for number, item in enumerate(found):
        if item.function.reason is not Reason.CODE:
            yield replace(item, evidence=(*item.evidence, *moved.get(item.function.new_start, ())))
            continue
        evidence = [Evidence(EvidenceKind.CODE), *_names(item), *item.evidence]
        if not any(e.kind in (EvidenceKind.SOURCE, EvidenceKind.INLINED) for e in item.evidence):
            evidence += [Evidence(EvidenceKind.INLINED, subject=name) for name in inlined.into(number)]
        yield replace(item, evidence=tuple(evidence))


def _moved(functions: list[ExplainedFunction]) -> dict[int, tuple[Evidence, ...]]:
    """New functions (by address) that hold most of the old code of a function that names them.

    A compiler splits a function when its beginning alone is worth inlining (``.part``); the rest is then a new one.
    """
    found: dict[int, tuple[Evidence, ...]] = {}
    added = {f"new:{f.function.name}": f for f in functions if f.function.old_start is None}
    added.update({f.function.name: f for f in functions if f.function.old_start is None})
    for item in functions:
        if item.old is None or item.new is None or item.counts is None or not item.counts.removed:
            continue
        before = Counter(pairwise(i.opcode for i in item.old.instructions))
        for label in {r.label for i in item.new.instructions for r in i.references} & added.keys():
            part = added[label]
            assert part.new is not None
            now = Counter(pairwise(i.opcode for i in part.new.instructions))
            if len(part.new.instructions) >= MIN_BODY and (before & now).total() >= MIN_MOVED * now.total():
                found[part.function.new_start] = (Evidence(EvidenceKind.MOVED, subject=item.function.name),)
    return found


_SAID = (Names.FUNCTION, Names.IMPORT, Names.VARIABLE, Names.NEW_VARIABLE, Names.CONSTANT, Names.OWN_CONSTANT)


def _names(item: ExplainedFunction) -> Iterator[Evidence]:
    """What only one of the two codes names: functions, imports, variables, strings."""
    sides = []
    for body in (item.old, item.new):
        references = [r for i in (body.instructions if body else ()) for r in i.references if r.names in _SAID]
        constants = (Names.CONSTANT, Names.OWN_CONSTANT)
        sides.append(dict.fromkeys(r.label for r in references if r.names not in constants or '"' in r.label))
    gone, gained = (
        [label for label in mine if label not in other] for mine, other in (sides, (sides[1], sides[0]))
    )
    if gone or gained:
        yield Evidence(EvidenceKind.NAMES, "", _listed(gone), _listed(gained))


def _listed(labels: list[str]) -> str:
    """The most telling names first: strings and symbols, then places that have none."""
    labels = sorted(labels, key=lambda label: label.startswith(("0x", ".", "new:")))
    more = f" and {len(labels) - MANY_NAMES} more" if len(labels) > MANY_NAMES else ""
    return ", ".join(labels[:MANY_NAMES]) + more


_Hunk = tuple[object, ...]


class _Inlined:
    """Which functions' change appears in which others: a compiler copies a small function into its callers.

    Without debug information this is likelihood, not proof: every difference of the smaller function is found in
    the larger one, and so is most of the rest of it.
    """

    def __init__(self, functions: list[ExplainedFunction]) -> None:
        self.functions = functions
        self.hunks = [Counter(_hunks(item)) if self._eligible(item) else Counter[_Hunk]() for item in functions]
        self.by_hunk: dict[_Hunk, list[int]] = {}
        for number, hunks in enumerate(self.hunks):
            for hunk in hunks:
                self.by_hunk.setdefault(hunk, []).append(number)
        self.work: dict[int, tuple[frozenset[str], Counter[int]]] = {}

    @staticmethod
    def _eligible(item: ExplainedFunction) -> bool:
        return item.function.reason is Reason.CODE and item.old is not None

    def into(self, number: int) -> list[str]:
        """Names of the functions whose change appears in this one, largest first."""
        mine, size = self.hunks[number], len(self.functions[number].rows)
        candidates = {other for hunk in mine for other in self.by_hunk[hunk][:MANY_ALIKE]}
        found = []
        for other in candidates - {number}:
            item = self.functions[other]
            smaller = MIN_BODY <= len(item.rows) < size
            if smaller and not self.hunks[other] - mine and self._telling(item) and self._contained(other, number):
                found.append((len(item.rows), item.function.name))
        return [name for _, name in sorted(found, reverse=True)[:MANY_NAMED]]

    @staticmethod
    def _telling(item: ExplainedFunction) -> bool:
        """A change that two functions hardly share by chance, as they share the moved fields of a structure."""
        counts, old, new = item.counts, item.old, item.new
        assert counts is not None and old is not None and new is not None
        if counts.removed + counts.added >= MIN_CHANGE:
            return True
        operands = (row for row in item.rows if row.change is Change.OPERAND)
        return any(immediate_differs(old, new, row) for row in operands)

    def _contained(self, small: int, large: int) -> bool:
        """Whether the larger function names all that the smaller one names, and does most of its work."""
        first, second = self._work(small), self._work(large)
        return not first[0] - second[0] and (first[1] & second[1]).total() >= MIN_CONTAINED * first[1].total()

    def _work(self, number: int) -> tuple[frozenset[str], Counter[int]]:
        """What a function names, and its opcodes, those left out that depend on where code stands."""
        if number not in self.work:
            body = self.functions[number].new
            items = body.instructions if body else ()
            names = frozenset(r.label for item in items for r in item.references)
            opcodes = Counter(item.opcode for item in items if item.inner is None and item.opcode not in _PLACED)
            self.work[number] = names, opcodes
        return self.work[number]


_PLACED = frozenset((*range(0x50, 0x60), 0xC3, 0x90, 0x11F))
"""push, pop, ret, nop (Intel SDM, volume 2, appendix A)."""


def _hunks(item: ExplainedFunction) -> Iterator[_Hunk]:
    """The differences of a function in terms that survive inlining: opcodes, numbers and names, no registers."""
    old, new = item.old, item.new
    assert old is not None and new is not None
    for changed, rows in groupby(item.rows, key=lambda row: row.change is not Change.SAME):
        if not changed:
            continue
        parts: list[object] = []
        for row in rows:
            one = old.instructions[row.old] if row.old is not None else None
            other = new.instructions[row.new] if row.new is not None else None
            if one is not None and other is not None and row.change is Change.OPERAND:
                parts.append((one.opcode, *_tails(one.masked, other.masked)))
            elif one is not None and other is not None:
                labels = tuple(tuple(r.label for r in side.references) for side in (one, other))
                parts.append((one.opcode, labels))
            else:
                parts.append((row.change, (one or other).opcode))  # type: ignore[union-attr]
        yield tuple(parts)


def _tails(one: bytes, other: bytes) -> tuple[bytes, bytes]:
    """Two byte strings from their first difference on."""
    common = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[common:], other[common:]
