"""Functions that are called otherwise than before, by callers that are not rebuilt with them.

A caller that keeps its bytes is none of these: the new build calls the new function with the very same bytes, so they
are right for it. Left are callers that the new build does not have, and callers in other modules.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from elfdiff.building.patchbuild import Draft
from elfdiff.decoding.code import LEA, TRANSFERS
from elfdiff.findings.places import MANY, functions
from elfdiff.patchobject import Finding, Severity

CLONES = (".isra.", ".constprop.", ".part.")
"""What gcc appends to the name of a function whose parameters it changed for the callers that it saw."""


def exported_prototypes(draft: Draft) -> Iterator[Finding]:
    """A function that other modules call by name takes other parameters or gives another result."""
    comparison = draft.comparison
    exported = set(comparison.old.image.exports.values())
    found = {j: texts for j, texts in draft.types.prototypes.items() if comparison.old_entry(j) in exported}
    library = comparison.old.image.section(".interp") is None
    if found:
        yield Finding(
            "calling-convention",
            Severity.REFUSE if library else Severity.WARN,
            f"{len(found)} exported function(s) are called otherwise: {_shown(draft, found)}",
            functions(draft, found),
            "other modules of the running program call them as before",
            "restart the program; or --allow calling-convention if no loaded module calls them by name",
        )


def removed_callers(draft: Draft) -> Iterator[Finding]:
    """A changed function is called otherwise, and code that only the old build has may still call it."""
    comparison = draft.comparison
    old, references = comparison.old, comparison.old.references
    doubtful = {
        entry: j
        for j in (comparison.new.function_of(f.new_start) for f in draft.functions)
        if (entry := comparison.old_entry(j)) is not None and _called_otherwise(draft, j)
    }
    if not doubtful:
        return
    entered = _entered_from_outside(draft)
    rows = np.isin(references.kind, TRANSFERS) & np.isin(references.target, list(doubtful))
    rows &= np.isin(references.function, [i for i in comparison.removed if int(old.starts[i]) in entered])
    if rows.any():
        callers = np.unique(references.function[rows]).tolist()
        callees = {doubtful[int(target)] for target in np.unique(references.target[rows])}
        yield Finding(
            "calling-convention",
            Severity.REFUSE,
            f"{len(callees)} function(s) are called otherwise, and {len(callers)} function(s) that the new build does "
            "not have call them",
            (*functions(draft, callees), *(f"called by {name}" for name in functions(draft, callers, old=True))),
            "those callers stay in memory, and pointers to them may be stored in live data",
            "restart the program; or --allow calling-convention if nothing calls these functions any more",
        )


def _called_otherwise(draft: Draft, function: int) -> bool:
    """By its prototype; where that is not known, a clone may have other parameters than its predecessor."""
    if function in draft.types.described:
        return function in draft.types.prototypes
    i = int(draft.comparison.matching.old_of[function])
    names = draft.comparison.old.names[i], draft.comparison.new.names[function]
    return any(mark in name for mark in CLONES for name in names)


def _entered_from_outside(draft: Draft) -> set[int]:
    """Old addresses that are exported, or that pointers in data or code lead to."""
    old = draft.comparison.old
    taken = old.references.opcode == LEA
    addresses = set(old.references.target[taken].tolist()) | set(old.image.relative_targets.tolist())
    return addresses | set(old.image.exports.values())


def _shown(draft: Draft, found: dict[int, tuple[str, str]]) -> str:
    names = draft.comparison.new.names
    return "; ".join(f"{names[j]}: {before} -> {after}" for j, (before, after) in sorted(found.items())[:MANY])
