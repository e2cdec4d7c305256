"""Addresses of which it is not certain what they are, and variables that start otherwise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from elfdiff.code import LEA, FieldKind
from elfdiff.findings.places import MANY, where
from elfdiff.patchbuild import Draft
from elfdiff.patchobject import Finding, Severity


def unbound_references(draft: Draft) -> Iterator[Finding]:
    """A reference of the new code for which no evidence says what it names in the running program."""
    names = draft.comparison.new.names
    by_target: dict[int, set[str]] = defaultdict(set)
    why: dict[int, str] = {}
    for item in draft.resolver.unbound:
        by_target[item.target].add(names[item.function] if item.function >= 0 else "data")
        why[item.target] = item.why
    if by_target:
        places = [
            f"{where(draft.comparison.new.image, t)} ({why[t]}) in {', '.join(sorted(by_target[t])[:3])}"
            for t in sorted(by_target)
        ]
        yield Finding(
            "unpinned-address",
            Severity.REFUSE,
            f"{len(by_target)} address(es) of the new build cannot be found in the old one",
            tuple(places[:MANY]),
            "the new code would read or write something else than the running program does",
            "builds with symbols (not stripped) say what the addresses are",
        )


def guessed_addresses(draft: Draft) -> Iterator[Finding]:
    """Variables bound by their neighbours alone."""
    guessed = draft.resolver.by_interval
    if guessed:
        yield Finding(
            "neighbour-address",
            Severity.WARN,
            f"{len(guessed)} variable(s) are bound by their neighbours, which all moved alike",
            tuple(f"{n:#x} -> {o:#x}" for n, o in sorted(guessed.items())[:MANY]),
            "no unchanged function names them; the old build names the predicted addresses",
            "builds with symbols (not stripped) would make it certain",
        )


def ambiguous_functions(draft: Draft) -> Iterator[Finding]:
    """A function that live data may point to, and that unchanged code takes for another one than its bytes say."""
    old = draft.comparison.old
    references = old.references
    taken = (references.opcode == LEA) | (references.kind >= FieldKind.ABSOLUTE_DISPLACEMENT)
    pointers = np.union1d(references.target[taken], old.image.relative_targets)
    doubtful = [i for i in sorted(draft.comparison.matching.contradicted) if int(old.starts[i]) in pointers]
    if doubtful:
        yield Finding(
            "ambiguous-function",
            Severity.REFUSE,
            f"{len(doubtful)} function(s) of the old build may be one or another function of the new one",
            tuple(old.names[i] for i in doubtful[:MANY]),
            "their bytes say one thing, what refers to them another; pointers to them may be stored in live data",
            "restart the program",
        )


def initial_values(draft: Draft) -> Iterator[Finding]:
    """Writable variables whose initial value differs: the running one has its own value by now."""
    differing = draft.comparison.differing_data
    if differing:
        yield Finding(
            "initial-value",
            Severity.REFUSE,
            f"{len(differing)} writable variable(s) start with another value in the new build",
            tuple(where(draft.comparison.new.image, n) for _, n in differing[:MANY]),
            "code that did not change uses them, and the running program keeps the value that it has",
            "if the running values may stay, --allow initial-value",
        )


def new_variables(draft: Draft) -> Iterator[Finding]:
    """Variables that only the patch has: they start with their initial value."""
    own = draft.resolver.new_variables
    if own:
        yield Finding(
            "new-variable",
            Severity.WARN,
            f"{len(own)} variable(s) are new and live in the patch",
            tuple(where(draft.comparison.new.image, n) for n in sorted(own)[:MANY]),
            "they start with their initial value when the patch is applied",
            "nothing to do",
        )
