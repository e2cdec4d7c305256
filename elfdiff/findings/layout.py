"""Layouts of structures: the evidence of the code, where no types are known."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from elfdiff.building.patchbuild import Draft
from elfdiff.findings.places import functions
from elfdiff.patchobject import Finding, Severity

MIN_LAYOUT_TRACES = 2
"""So many fields that moved by the same distance, in one edited function or in several, are a changed layout."""


def struct_signature(draft: Draft) -> Iterator[Finding]:
    """Fields that moved by the same distance, or alone in a function that differs in nothing else.

    Functions whose types debug information describes are left out: ``types.struct_layout`` speaks for them.
    """
    shifted: dict[int, set[int]] = defaultdict(set)
    fields: dict[int, Counter[tuple[int, int]]] = defaultdict(Counter)
    counted: dict[int, set[tuple[int, int, int]]] = defaultdict(set)
    certain: set[int] = set()
    for trace in draft.traces:
        if trace.fields and trace.function in draft.types.described:
            continue
        distances = {new - old for old, new in trace.fields}
        for old, new in trace.fields:
            shifted[new - old].add(trace.function)
            fields[new - old][old, new] += 1
            if trace.only:
                certain.add(new - old)
            if old - new not in distances:  # to and fro in an edited function: other fields in another order
                counted[new - old].add((trace.function, old, new))
    for delta, users in sorted(shifted.items()):
        refuse = delta in certain or len(counted[delta]) >= MIN_LAYOUT_TRACES
        shown = ", ".join(f"{a:#x}->{b:#x}" for (a, b), _ in fields[delta].most_common(4))
        yield Finding(
            "struct-layout",
            Severity.REFUSE if refuse else Severity.WARN,
            f"fields moved by {delta:+d} bytes in {len(users)} function(s): {shown}",
            functions(draft, users),
            "a structure seems to have changed its layout; objects that exist already have the old one",
            "restart the program; or show by the sources, or by debug information of both builds, that no structure "
            "changed, and --allow struct-layout",
        )


def allocation_sizes(draft: Draft) -> Iterator[Finding]:
    """A constant size given to an allocator changed: a structure may have grown at its end."""
    found = [(trace.function, sizes) for trace in draft.traces for sizes in trace.sizes]
    if found:
        yield Finding(
            "allocation-size",
            Severity.REFUSE,
            f"{len(found)} constant size(s) given to an allocator differ: "
            + ", ".join(f"{a} -> {b}" for _, (a, b) in found[:4]),
            functions(draft, (j for j, _ in found)),
            "objects that exist already have the old size, and the new code may reach beyond it",
            "restart the program, or --allow allocation-size if no existing object is concerned",
        )
