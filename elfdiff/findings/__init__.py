"""Reasons to refuse or to warn: one function a hazard (D6).

To add a hazard, write a function that yields findings from a draft, in the file of its theme, and add it to ``RULES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from elfdiff.building.patchbuild import Draft
from elfdiff.findingcodes import ASKING
from elfdiff.findings import (
    addresses,
    calling,
    classes,
    entries,
    exceptions,
    exports,
    layout,
    moves,
    startup,
    threads,
    types,
)
from elfdiff.patchobject import Finding, Severity

Rule = Callable[[Draft], Iterator[Finding]]


def find(draft: Draft, allowed: frozenset[str]) -> tuple[Finding, ...]:
    """All findings on a draft; what would refuse and has a code in ``allowed`` warns, and says that it was lifted.

    So does what asks for something at apply (``ASKING``), which is left out then.
    """
    found = [finding for rule in RULES for finding in rule(draft)]
    return tuple(
        replace(f, severity=Severity.WARN, lifted=True)
        if f.code in allowed and (f.severity is Severity.REFUSE or f.code in ASKING)
        else f
        for f in found
    )


RULES: tuple[Rule, ...] = (
    addresses.unbound_references,
    addresses.added_distances,
    addresses.variable_sizes,
    addresses.guessed_addresses,
    types.struct_layout,
    types.enumerations,
    types.variable_types,
    types.debug_information,
    layout.struct_signature,
    layout.allocation_sizes,
    exceptions.exceptions,
    classes.class_layout,
    entries.label_tables,
    addresses.initial_values,
    threads.tls_layout,
    exports.exported_symbols,
    exports.entries_inside,
    entries.short_entries,
    entries.code_without_unwind,
    startup.constructors,
    startup.changed_constructors,
    startup.static_guards,
    calling.exported_prototypes,
    calling.removed_callers,
    moves.moved_code,
    addresses.ambiguous_functions,
    addresses.kept_functions,
    addresses.known_by_address,
    entries.coroutines,
    startup.changed_resolvers,
    startup.new_imports,
    addresses.new_variables,
)
