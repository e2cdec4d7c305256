"""What debug information of both builds shows: layouts, values, variables and prototypes that differ (D6)."""

from __future__ import annotations

from collections.abc import Iterator

from elfdiff.building.patchbuild import Draft
from elfdiff.differences.typecomparison import TypeChange
from elfdiff.findings.places import MANY, functions
from elfdiff.patchobject import Finding, Severity


def struct_layout(draft: Draft) -> Iterator[Finding]:
    """A structure, union or class whose objects lie otherwise in memory, in a unit with changed code."""
    for change in draft.types.layouts:
        yield Finding(
            "struct-layout",
            Severity.REFUSE,
            f"{change.kind} {change.name} has another layout: {_shown(change)}",
            _users(draft, change),
            "objects that exist already have the old layout, and the new code would take their fields for others",
            "restart the program; or --allow struct-layout if no object of this type outlives the changed functions",
        )


def enumerations(draft: Draft) -> Iterator[Finding]:
    """A name of an enumeration that stands for another number: live variables hold the old one."""
    for change in draft.types.enumerations:
        yield Finding(
            "enum-values",
            Severity.REFUSE,
            f"enum {change.name} gives other numbers to {len(change.differences)} name(s): {_shown(change)}",
            _users(draft, change),
            "variables of the running program hold the old numbers, and the new code takes them for other names",
            "restart the program; or --allow enum-values if no such number is kept (a count of the others, say)",
        )


def variable_types(draft: Draft) -> Iterator[Finding]:
    """A variable that keeps its name and has another type."""
    for change in draft.types.variables:
        yield Finding(
            "variable-type",
            Severity.REFUSE,
            f"variable {change.name} has another type: {_shown(change)}",
            _users(draft, change),
            "the running program keeps the value that it has, as the old type lays it out",
            "restart the program; or --allow variable-type if the new code reads the old value right",
        )


def debug_information(draft: Draft) -> Iterator[Finding]:
    """Debug information that is there and could not be used."""
    if draft.types.notes:
        yield Finding(
            "debug-info",
            Severity.WARN,
            "some debug information was not used",
            draft.types.notes[:MANY],
            "types that it would describe are judged by the code alone",
            "install what is missing, or name its folder with --debug-dir",
        )


def _shown(change: TypeChange) -> str:
    rest = len(change.differences) - MANY
    return "; ".join(change.differences[:MANY]) + (f"; and {rest} more" if rest > 0 else "")


def _users(draft: Draft, change: TypeChange) -> tuple[str, ...]:
    """The changed functions that may use it, or at least the unit that has it."""
    return functions(draft, change.users) or (f"code of {change.unit}",)
