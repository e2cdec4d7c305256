"""Put a patch in force in a running process.

All threads are stopped for about a millisecond, at a moment when none is in a function that changes. Until such a
moment comes, the process runs on and is looked at again. A patch of the same program that is in force already is
replaced in the same stop. Where anything is not safe, nothing is written.

Several patches, of an executable and its libraries, are a set: they come into force in one stop, all or none, and are
reverted together. One that is in force as one of a set is replaced only together with the others.

Of several processes parents are patched before their children, each in a stop of its own, and then those that were
forked or started meanwhile, until there are no more of them; a child that a patched process has forked has the patch
from it. What does not run the program of the patch is passed over. The exit status is 8 where some failed and others
not; with --atomic all are put back as they were, and it is that of the failure.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import Report, add_conditions, add_patches, add_selection, conditions_of, selection_of

if TYPE_CHECKING:
    from elfdiff.patchobject import PatchObject
    from patcher.targets.selection import Pin
    from patcher.transactions.transaction import Outcome


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_patches(parser)
    add_selection(parser)
    add_conditions(parser)


def run(arguments: argparse.Namespace) -> Report:
    """Apply."""
    from elfdiff.patches.patchfile import read_patch

    from ..transactions import transaction
    from ..transactions.units import patches_of
    from .several import one_or_each

    selection = selection_of(arguments)
    conditions = conditions_of(arguments)
    patches = patches_of([read_patch(path) for path in arguments.patches])

    def act(pid: int, pin: Pin | None) -> Outcome:
        return transaction.apply(pid, patches, conditions, pin=pin)

    return one_or_each(
        arguments.pid,
        selection,
        act,
        lambda item: _json(item, patches),
        lambda item: _text(item, patches),
        undo=conditions if arguments.atomic else None,
    )


def _json(outcome: Outcome, patches: Sequence[PatchObject]) -> dict[str, Any]:
    from .shared import findings_json, patches_meant, set_json

    return set_json(outcome, lambda one: {"findings": findings_json(patches_meant(one, patches))})


def _text(outcome: Outcome, patches: Sequence[PatchObject]) -> list[str]:
    from .shared import head_line, member_lines

    if outcome.already:
        return [head_line(outcome, "carries {} already; nothing was written")]
    lines = [head_line(outcome, "is patched: {}"), *member_lines(outcome, patches, "mapped", "replaced")]
    return [*lines, f"  undo with  livegraft revert --pid {outcome.pid} {outcome.contents.patch[:12]}"]
