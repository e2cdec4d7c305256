"""Classes whose live objects do not fit the new code."""

from __future__ import annotations

from collections.abc import Iterator

from elfdiff.building.patchbuild import Draft
from elfdiff.differences.classes import differing_classes
from elfdiff.findings.places import MANY
from elfdiff.patchobject import Finding, Severity


def class_layout(draft: Draft) -> Iterator[Finding]:
    """A class with other virtual functions or other bases: live objects have the old vtable, whatever made them."""
    comparison = draft.comparison
    types = comparison.handlers.types
    if not types.new.by_name or not draft.functions:
        return
    found = differing_classes(comparison.old, comparison.new, (types.old, types.new), comparison.matching)
    if found:
        yield Finding(
            "class-layout",
            Severity.REFUSE,
            f"{len(found)} class(es) have other virtual functions or other bases",
            tuple(f"{item.name}: {item.what}" for item in found[:MANY]),
            "objects that live have the old table of virtual functions, through which the new code would call",
            "if no object of these classes lives that the new code uses, --allow class-layout",
        )
