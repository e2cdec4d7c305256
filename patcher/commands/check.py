"""Do everything that apply would do but the writing.

Reads the patch twice, by livegraft's own reader and by LIEF. Reads the process, binds the patch to it, looks for
room, then stops all threads and looks whether a function that would change is on a stack, as often and as long as
apply would. The exit status is the one that apply would have. Several processes are looked at once each.
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
    add_selection(parser, changes=False)
    add_timeout(parser)
    add_deep_check(parser)
    add_keep_live(parser)


def run(arguments: argparse.Namespace) -> Report:
    """Check."""
    from elfdiff.patchfile import read_patch
    from elfdiff.secondopinion import confirm_with_lief

    from .. import transaction

    selection = selection_of(arguments)
    patch = read_patch(arguments.patch)
    confirm_with_lief(patch, arguments.patch)

    def act(pid: int, pin: Pin | None = None) -> Outcome:
        return transaction.check(
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

    from ..group import carry_out_each
    from .several import group_report

    group = carry_out_each(selection, lambda pin: act(pin.pid, pin), again=False)
    return group_report(group, selection, lambda item: _json(item, patch), lambda item: _text(item, patch))


def _json(outcome: Outcome, patch: PatchObject) -> dict[str, Any]:
    from .shared import findings_json, outcome_json

    state = "applied" if outcome.already else "applicable"
    body = {**outcome_json(outcome), "findings": findings_json(patch), "state": state}
    body.pop("applied_at")
    return body


def _text(outcome: Outcome, patch: PatchObject) -> list[str]:
    from .shared import builds_line, functions_line, kept_lines, lifted_lines, pause_line, safe, warning_lines

    contents = outcome.contents
    head = f"{safe(outcome.process)} (pid {outcome.pid})"
    if outcome.already:
        return [f"{head} carries patch {contents.patch[:12]} already"]
    return [
        f"{head} can take patch {contents.patch[:12]}",
        f"  build      {safe(builds_line(contents))}",
        f"  functions  {functions_line(contents)}",
        f"  pause      {pause_line(outcome)}",
        f"  to map     {outcome.mapped_bytes // 1024} KiB",
        *(f"  {line}" for line in (*kept_lines(contents), *lifted_lines(contents), *warning_lines(patch))),
        *(f"  replaces   {item.short_id}" for item in outcome.others),
    ]
