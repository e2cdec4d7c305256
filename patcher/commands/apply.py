"""Put a patch in force in a running process.

All threads are stopped for about a millisecond, at a moment when none is in a function that changes. Until such a
moment comes, the process runs on and is looked at again. A patch of the same program that is in force already is
replaced in the same stop. Where anything is not safe, nothing is written.

Of several processes parents are patched before their children, each in a stop of its own, and then those that were
forked or started meanwhile, until there are no more of them; a child that a patched process has forked has the patch
from it. What does not run the program of the patch is passed over. The exit status is 8 where some failed and others
not; with --atomic all are put back as they were, and it is that of the failure.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import Report, add_deep_check, add_keep_live, add_selection, add_timeout, selection_of

if TYPE_CHECKING:
    from elfdiff.patchobject import PatchObject
    from patcher.selection import Pin
    from patcher.transaction import Outcome


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("patch", type=Path, metavar="PATCH", help="a patch object made by livegraft diff")
    add_selection(parser)
    add_timeout(parser)
    add_deep_check(parser)
    add_keep_live(parser)


def run(arguments: argparse.Namespace) -> Report:
    """Apply."""
    from elfdiff.patchfile import read_patch

    from .. import transaction

    selection = selection_of(arguments)
    patch = read_patch(arguments.patch)

    def act(pid: int, pin: Pin | None = None) -> Outcome:
        return transaction.apply(
            pid,
            patch,
            timeout=arguments.timeout,
            deep_check=arguments.deep_check,
            deep_limit=arguments.deep_limit,
            keep_live=arguments.keep_live,
            pin=pin,
        )

    if selection is None:
        outcome = act(arguments.pid)
        return Report(_json(outcome, patch), _text(outcome, patch))

    from ..conditions import Conditions
    from ..group import carry_out_each
    from .several import group_report

    undo = Conditions(arguments.timeout, arguments.deep_check, arguments.deep_limit) if arguments.atomic else None
    group = carry_out_each(selection, lambda pin: act(pin.pid, pin), undo=undo)
    return group_report(
        group, selection, lambda item: _json(item, patch), lambda item: _text(item, patch), arguments.atomic
    )


def _json(outcome: Outcome, patch: PatchObject) -> dict[str, Any]:
    from .shared import findings_json, outcome_json

    return {**outcome_json(outcome), "findings": findings_json(patch)}


def _text(outcome: Outcome, patch: PatchObject) -> list[str]:
    from .shared import builds_line, functions_line, kept_lines, lifted_lines, pause_line, safe, warning_lines

    contents = outcome.contents
    head = f"{safe(outcome.process)} (pid {outcome.pid})"
    if outcome.already:
        return [f"{head} carries patch {contents.patch[:12]} already; nothing was written"]
    return [
        f"{head} is patched: {contents.patch[:12]}",
        f"  build      {safe(builds_line(contents))}",
        f"  functions  {functions_line(contents)}",
        f"  pause      {pause_line(outcome)}",
        f"  mapped     {outcome.mapped_bytes // 1024} KiB",
        *(f"  {line}" for line in (*kept_lines(contents), *lifted_lines(contents), *warning_lines(patch))),
        *(f"  replaced   {item.short_id}" for item in outcome.others),
        f"  undo with  livegraft revert --pid {outcome.pid} {contents.patch[:12]}",
    ]
