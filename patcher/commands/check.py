"""Do everything that apply would do but the writing.

Reads the patch twice, by livegraft's own reader and by LIEF. Reads the process, binds the patch to it, looks for
room, then stops all threads and looks whether a function that would change is on a stack, as often and as long as
apply would. The exit status is the one that apply would have. Several processes are looked at once each.
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
    add_selection(parser, changes=False)
    add_conditions(parser)


def run(arguments: argparse.Namespace) -> Report:
    """Check."""
    from elfdiff.patches.patchfile import read_patch
    from elfdiff.patches.secondopinion import confirm_with_lief

    from ..transactions import transaction
    from ..transactions.units import patches_of
    from .several import one_or_each

    selection = selection_of(arguments)
    conditions = conditions_of(arguments)
    patches = patches_of([read_patch(path) for path in arguments.patches])
    for patch, path in zip(patches, arguments.patches, strict=True):
        confirm_with_lief(patch, path)

    def act(pid: int, pin: Pin | None) -> Outcome:
        return transaction.check(pid, patches, conditions, pin=pin)

    return one_or_each(
        arguments.pid,
        selection,
        act,
        lambda item: _json(item, patches),
        lambda item: _text(item, patches),
        again=False,
    )


def _json(outcome: Outcome, patches: Sequence[PatchObject]) -> dict[str, Any]:
    from .shared import findings_json, patches_meant, set_json

    state = "applied" if outcome.already else "applicable"
    body = set_json(outcome, lambda one: {"findings": findings_json(patches_meant(one, patches)), "state": state})
    for item in (body, *body["set"]):
        item.pop("applied_at", None)
    return body


def _text(outcome: Outcome, patches: Sequence[PatchObject]) -> list[str]:
    from .shared import head_line, member_lines

    if outcome.already:
        return [head_line(outcome, "carries {} already")]
    return [head_line(outcome, "can take {}"), *member_lines(outcome, patches, "to map", "replaces")]
