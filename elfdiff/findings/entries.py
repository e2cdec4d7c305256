"""Code that cannot be redirected, or of which a thread or stored data may hold what the patch cannot reach."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from elfdiff.building.patchbuild import Draft
from elfdiff.decoding.jumptables_x86_64 import kept_labels
from elfdiff.findings.places import MANY, functions, where
from elfdiff.images.image import PAGE
from elfdiff.patchobject import ENTRY_JUMP_SIZE, Finding, PatchFunction, Severity

STACK_SWITCHERS = frozenset(("makecontext", "swapcontext", "setcontext"))


def short_entries(draft: Draft) -> Iterator[Finding]:
    """An old function with no room for the entry jump."""
    old = draft.comparison.old
    places = [
        f"{function.name} ({why}, at {function.old_start:#x})"
        for function in draft.functions
        if function.entry_jump and (why := _no_room(draft, function))
    ]
    if places:
        yield Finding(
            "short-function",
            Severity.REFUSE,
            f"{len(places)} function(s) of {old.image.name} have no room for the entry jump",
            tuple(places[:MANY]),
            "the jump would overwrite the function behind, or could be left half written by a death of livegraft",
            "restart the program",
        )


def _no_room(draft: Draft, function: PatchFunction) -> str | None:
    assert function.old_start is not None and function.old_size is not None
    if function.old_start % PAGE > PAGE - ENTRY_JUMP_SIZE:
        return "it begins at the end of a page"  # two pages are written one after the other
    if function.old_size < ENTRY_JUMP_SIZE and not _padded(draft, function):
        return f"{function.old_size} bytes"
    return None


def _padded(draft: Draft, function: PatchFunction) -> bool:
    """The bytes behind a short function up to the jump's end are padding of its section that nothing names."""
    old = draft.comparison.old
    assert function.old_start is not None and function.old_size is not None
    end, need = function.old_start + function.old_size, function.old_start + ENTRY_JUMP_SIZE
    section = old.image.section_at(function.old_start)
    if section is None or need > section.end:
        return False
    named = old.referenced
    first, last = np.searchsorted(named, [end, need])
    at = end - old.base
    offset = 0
    while end + offset < need:
        opcode = int(old.decoded.opcode[at + offset])
        if opcode not in (0x90, 0xCC, 0x11F) or old.function_of(end + offset) >= 0:
            return False
        offset += int(old.decoded.length[at + offset])
    return int(first) == int(last)


def code_without_unwind(draft: Draft) -> Iterator[Finding]:
    """Changed code whose bounds or instructions are not certain."""
    code = draft.comparison.new
    places = []
    for function in draft.functions:
        j = code.function_of(function.new_start)
        i = draft.comparison.old.function_of(function.old_start) if function.old_start is not None else -1
        uncertain = not (code.has_unwind[j] and code.sound[j])
        uncertain |= i >= 0 and not (draft.comparison.old.has_unwind[i] and draft.comparison.old.sound[i])
        if uncertain:
            places.append(j)
    if places:
        yield Finding(
            "no-unwind",
            Severity.REFUSE,
            f"{len(places)} changed stretch(es) of code have no unwind information or hold data",
            functions(draft, places),
            "neither their bounds nor whether a thread is in them can be told",
            "restart the program",
        )


def label_tables(draft: Draft) -> Iterator[Finding]:
    """Labels of a changed function are values (computed goto): old ones may be stored in live data."""
    comparison = draft.comparison
    tables = draft.resolver.label_tables
    places = [where(comparison.new.image, t) for t in sorted(tables)]
    for function in draft.functions:
        j = comparison.new.function_of(function.new_start)
        taken = kept_labels(comparison.new, j, comparison.tables[1])
        if taken is None and function.old_start is not None:
            taken = kept_labels(comparison.old, comparison.old.function_of(function.old_start), comparison.tables[0])
        if taken is not None:
            places += functions(draft, [j])
    if places:
        yield Finding(
            "label-table",
            Severity.REFUSE,
            f"changed functions take the addresses of their labels in {len(places)} place(s)",
            tuple(places[:MANY]),
            "if the program stores label addresses (direct threaded code), stored ones lead into the old code",
            "if labels are only jumped to and never stored, --allow label-table",
        )


def coroutines(draft: Draft) -> Iterator[Finding]:
    """A program that switches stacks: one that no thread runs on may hold a frame of a changed function."""
    switching = {slot.symbol for slot in draft.comparison.old.image.slots.values()} & STACK_SWITCHERS
    if switching:
        yield Finding(
            "coroutines",
            Severity.WARN,
            "the program switches between stacks of its own",
            tuple(sorted(switching)),
            "a stack that no thread runs on just now may return into a changed function: apply, check and revert "
            "search the writable memory of the process for it, which makes the pause longer",
            "nothing to do; --no-deep-check leaves the search out, --deep-limit raises what it may look at",
        )
