"""From a comparison to a patch object: what it holds, and every field of it that leads out (D4)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from elfdiff.building.handlerlinks import relocate_handlers
from elfdiff.building.moves import Move, moves
from elfdiff.building.naming import Naming
from elfdiff.building.resolution import STUB_SIZE, Resolver
from elfdiff.decoding.code import TRANSFERS, Code, FieldKind
from elfdiff.differences.comparison import Comparison
from elfdiff.differences.layout_x86_64 import LayoutTraces, layout_traces
from elfdiff.differences.typecomparison import TypeVerdict, compare_types
from elfdiff.dwarf.debuginfo import DebugInfo
from elfdiff.images.image import PAGE, Addresses, Image, Kind
from elfdiff.patchobject import (
    ENTRY_JUMP_SIZE,
    PATCH_IMAGE,
    RELOCATION_DTYPE,
    Build,
    CheckedRange,
    Finding,
    LineOnly,
    PatchFunction,
    PatchObject,
    Reason,
    RelocationType,
    RemovedFunction,
    Segment,
)

PF_X, PF_W, PF_R = 1, 2, 4
MERGED_GAP = 16 * PAGE
"""Pages of the same kind that lie no farther apart become one segment, so that a patch has few mappings."""
INT3 = 0xCC

_ABSOLUTE_TYPES = {
    FieldKind.ABSOLUTE_DISPLACEMENT: RelocationType.ABS32S,
    FieldKind.ABSOLUTE_IMMEDIATE: RelocationType.ABS32S,
    FieldKind.ABSOLUTE_IMMEDIATE64: RelocationType.ABS64,
}


@dataclass
class Draft:
    """A patch before its verdict: what findings look at."""

    comparison: Comparison
    functions: tuple[PatchFunction, ...]
    resolver: Resolver
    relocations: list[tuple[int, int, int, int]] = field(default_factory=list)
    debug: tuple[DebugInfo | None, DebugInfo | None] = (None, None)  # of the old and the new build

    @cached_property
    def types(self) -> TypeVerdict:
        """What debug information says of the types that the patch's functions use. Raises BadInput."""
        members = tuple(self.comparison.new.function_of(function.new_start) for function in self.functions)
        return compare_types(self.comparison, self.debug, members)

    @property
    def exceptions(self) -> bool:
        """Whether exceptions may pass through the patch's functions: they have handlers, or it is a C++ program."""
        new = self.comparison.new
        handling = any(new.has_lsda[new.function_of(function.new_start)] for function in self.functions)
        needs = any(name.startswith(("libstdc++", "libc++")) for name in new.image.needed)
        return handling or needs or bool(self.comparison.handlers.types.new.by_name)

    @cached_property
    def naming(self) -> Naming:
        """What the references of both builds are called."""
        return Naming(self.comparison, self.resolver)

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        """What moves from one of the patch's functions to another that is called in turn with it."""
        code = self.comparison.new
        return moves(self.comparison, self.naming, [code.function_of(f.new_start) for f in self.functions])

    @cached_property
    def traces(self) -> tuple[LayoutTraces, ...]:
        """What the changed functions show of changed layouts."""
        comparison = self.comparison
        pairs = [
            (int(i), int(j))
            for i, j in comparison.matching.pairs(same=False)
            if comparison.changed.get(int(j)) is not Reason.LINES
        ]
        return tuple(layout_traces(comparison.matching.alignments, pairs))


def draft(comparison: Comparison, members: NDArray[np.int64], reasons: dict[int, Reason]) -> Draft:
    """Resolve every reference of the patch's functions and of what they own."""
    resolver = Resolver(comparison, frozenset(members.tolist()))
    result = Draft(comparison, (), resolver)
    for function in members.tolist():
        _relocate_function(result, function)
    result.relocations += relocate_handlers(comparison, members.tolist(), resolver)
    _relocate_owned(result)
    resolver.finish()
    result.functions = _functions(comparison, members, reasons, resolver.forced_entries)
    return result


def _relocate_function(result: Draft, function: int) -> None:
    references = result.comparison.new.references
    for row, place in result.resolver.function(function).items():
        kind, at = FieldKind(int(references.kind[row])), int(references.field[row])
        if kind in _ABSOLUTE_TYPES:
            result.relocations.append((at, _ABSOLUTE_TYPES[kind], place.symbol, place.address))
        elif place.symbol != PATCH_IMAGE:
            # The field counts from the instruction's end, the relocation from the field (psABI, S + A - P).
            addend = place.address - (int(references.end[row]) - at)
            result.relocations.append((at, RelocationType.PC32, place.symbol, addend))


def _relocate_owned(result: Draft) -> None:
    """Pointer slots in owned data and GOT slots; what they lead to may be owned in turn."""
    resolver, image = result.resolver, result.comparison.new.image
    done: set[int] = set()
    symbolic = np.array(sorted(image.slots.keys() - image.copies), np.int64)
    while True:
        extents = {**resolver.owned.constants, **resolver.owned.variables}
        places = set(_slots_in(image.relative_places, extents)) - done
        named = set(_slots_in(symbolic, extents)) - done
        if not places and not named:
            break
        done |= places | named
        for place in sorted(places):
            _relocate_slot(result, place)
        for place in sorted(named):
            held = resolver.content(place)
            if isinstance(held, str):
                resolver.note_slot(place, image.slots[place].addend, held)
            else:
                resolver.owned.slots[place] = held
    for slot, filled in resolver.owned.slots.items():
        result.relocations.append((slot, RelocationType.ABS64, filled.symbol, filled.address))


def _slots_in(places: Addresses, extents: dict[int, int]) -> list[int]:
    """Those of the places (sorted) that lie in one of the extents, which may overlap."""
    bounds = np.searchsorted(places, np.array(list(extents.items()), np.int64).reshape(-1, 2))
    steps = np.bincount(bounds[:, 0], minlength=len(places) + 1) - np.bincount(bounds[:, 1], minlength=len(places) + 1)
    inside: list[int] = places[np.cumsum(steps[:-1]) > 0].tolist()
    return inside


def _relocate_slot(result: Draft, place: int) -> None:
    resolver = result.resolver
    target = result.comparison.new.image.pointer_at(place)
    assert target is not None
    if _is_a_number(result.comparison.new, target):
        return
    found = resolver.address(target, taken=True)
    if isinstance(found, str):
        resolver.note_slot(place, target, found)
    else:
        result.relocations.append((place, RelocationType.ABS64, found.symbol, found.address))


def _is_a_number(code: Code, target: int) -> bool:
    """A word of a fixed-address image, taken for a pointer, that leads between the bytes of one instruction."""
    function = code.function_of(target) if code.image.fixed_address else -1
    inside = function >= 0 and bool(code.has_unwind[function]) and bool(code.sound[function])
    return inside and not code.instruction_at(np.array([target]))[0]


def _functions(
    comparison: Comparison, members: NDArray[np.int64], reasons: dict[int, Reason], forced: set[int]
) -> tuple[PatchFunction, ...]:
    old, new = comparison.old, comparison.new
    members_old = comparison.matching.old_of[members]
    entered = _entered(old, members_old[members_old >= 0])
    found = []
    for j, i in zip(members.tolist(), members_old.tolist(), strict=True):
        start = int(old.starts[i]) if i >= 0 else None
        default = Reason.NEW if i < 0 else Reason.CLOSURE
        found.append(
            PatchFunction(
                name=new.names[j] if i < 0 else old.names[i],
                reason=reasons.get(j, default),
                new_start=int(new.starts[j]),
                new_size=new.size(j),
                old_start=start,
                old_size=old.size(i) if i >= 0 else None,
                entry_jump=start is not None and (start in entered or start in forced),
            )
        )
    return tuple(found)


def _entered(old: Code, patched: NDArray[np.int64]) -> set[int]:
    """Old entries of patched functions that anything but a jump of a patched function may lead to.

    The others are parts that only patched functions branch to, and those are never entered again.
    """
    references = old.references
    by_jump = np.isin(references.kind, TRANSFERS) & (references.kind != FieldKind.CALL)
    inside = by_jump & np.isin(references.function, patched)
    named = np.unique(references.target[~inside])
    starts = old.starts[patched]
    jumped = np.unique(references.target[inside])
    # A function that nothing names at all may be reached in a way that we do not see: it keeps its jump.
    unseen = starts[~np.isin(starts, jumped)]
    kept = starts[np.isin(starts, named) | np.isin(starts, old.image.relative_targets)]
    exported = starts[np.isin(starts, old.image.symbols.values)] if not old.image.symbols.complete else starts[:0]
    return {int(start) for start in np.concatenate([unseen, kept, exported])}


def _tool_version() -> str:
    from importlib.metadata import version  # noqa: PLC0415  (15 ms, and only a patch that is made has one)

    return version("livegraft")


def build(result: Draft, findings: tuple[Finding, ...]) -> PatchObject:
    """Lay out the pages and write down what must be checked. ``id`` is set when the object is written."""
    comparison = result.comparison
    old, new = comparison.old.image, comparison.new.image
    relocations = np.array(sorted(set(result.relocations)), RELOCATION_DTYPE)
    return PatchObject(
        id="",
        tool_version=_tool_version(),
        old=build_of(old),
        new=build_of(new),
        segments=_segments(result),
        functions=result.functions,
        imports=tuple(result.resolver.imports),
        relocations=relocations,
        checked=_checked(result),
        findings=findings,
        removed=tuple(
            RemovedFunction(comparison.old.names[i], int(comparison.old.starts[i]), comparison.old.size(i))
            for i in comparison.removed
        ),
        line_only=tuple(
            LineOnly(comparison.old.names[i], int(comparison.old.starts[i]), int(comparison.new.starts[j]))
            for i, j in comparison.line_only
        ),
        eh_frame_hdr=new.eh_frame_hdr,
        needed=tuple(name for name in new.needed if name not in old.needed),
        exceptions=result.exceptions,
    )


def build_of(image: Image) -> Build:
    """A build's identity and span."""
    return Build(image.name, image.build_id, image.base, image.high, image.fixed_address)


def _checked(result: Draft) -> tuple[CheckedRange, ...]:
    """The old bytes that the patch stands on: functions it replaces, functions and stubs it calls."""
    old = result.comparison.old
    ranges = {
        f.old_start: (f.name, max(f.old_size, ENTRY_JUMP_SIZE) if f.entry_jump else f.old_size)
        for f in result.functions
        if f.old_start is not None and f.old_size
    }
    for address in result.resolver.used_code:
        function = old.function_of(address)
        if function >= 0:
            ranges.setdefault(address, (old.names[function], old.size(function)))
        else:
            slot = old.image.slots.get(old.image.plt.get(address, 0))
            ranges.setdefault(address, (f"{slot.symbol if slot else hex(address)}@plt", STUB_SIZE))
    return tuple(
        CheckedRange(name, start, size, hashlib.blake2b(old.image.read(start, size), digest_size=16).hexdigest())
        for start, (name, size) in sorted(ranges.items())
        if size
    )


def _segments(result: Draft) -> tuple[Segment, ...]:
    """Runs of pages with equal protection, filled from the new build; code that is not the patch's is int3."""
    image = result.comparison.new.image
    pages: dict[int, int] = {}

    def cover(start: int, end: int, flags: int) -> None:
        for page in range(start & -PAGE, end, PAGE):
            pages[page] = pages.get(page, 0) | flags

    text = [(f.new_start, f.new_start + f.new_size) for f in result.functions]
    text += [(stub, stub + STUB_SIZE) for stub in result.resolver.owned.stubs]
    for start, end in text:
        cover(start, end, PF_R | PF_X)
    for section in image.sections:
        if section.kind is Kind.CONSTANT or section.name.startswith((".eh_frame", ".gcc_except_table")):
            cover(section.start, section.end, PF_R)
    for start, end in result.resolver.owned.constants.items():
        cover(start, end, PF_R)
    for start in result.resolver.owned.slots:
        cover(start, start + 8, PF_R)
    for start, end in result.resolver.owned.variables.items():
        cover(start, end, PF_R | PF_W)
    keep = np.zeros(len(image.memory), np.bool_)
    for start, end in text:
        keep[start - image.base : end - image.base] = True
    return tuple(_segment(image, keep, low, high, flags) for low, high, flags in _runs(pages))


def _runs(pages: dict[int, int]) -> list[tuple[int, int, int]]:
    """(start, end, flags) of runs; gaps inside a run are at most ``MERGED_GAP`` long and hold no other page."""
    runs: list[tuple[int, int, int]] = []
    for page, flags in sorted(pages.items()):
        if runs and runs[-1][2] == flags and page - runs[-1][1] <= MERGED_GAP:
            runs[-1] = (runs[-1][0], page + PAGE, flags)
        else:
            runs.append((page, page + PAGE, flags))
    return runs


def _segment(image: Image, keep: NDArray[np.bool_], low: int, high: int, flags: int) -> Segment:
    content = image.memory[low - image.base : high - image.base].copy()
    if flags & PF_X:
        addresses = np.arange(low, high, dtype=np.int64)
        code = np.isin(image.kinds(addresses), (Kind.TEXT, Kind.PLT, Kind.NONE))
        content[code & ~keep[low - image.base : high - image.base]] = INT3
    data = content.tobytes().rstrip(b"\0")
    return Segment(vaddr=low, size=high - low, flags=flags, data=data)
