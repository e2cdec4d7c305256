"""Do everything that apply would do but the writing.

Reads the patch twice, by livegraft's own reader and by LIEF. Reads the process, binds the patch to it, looks for
room, then stops all threads and looks whether a function that would change is on a stack, as often and as long as
apply would. The exit status is the one that apply would have.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import Report, add_deep_check, add_keep_live, add_pid, add_timeout


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("patch", type=Path, metavar="PATCH", help="a patch object made by livegraft diff")
    add_pid(parser)
    add_timeout(parser)
    add_deep_check(parser)
    add_keep_live(parser)


def run(arguments: argparse.Namespace) -> Report:
    """Check."""
    from elfdiff.patchfile import read_patch
    from elfdiff.secondopinion import confirm_with_lief

    from .. import transaction
    from .shared import (
        builds_line,
        findings_json,
        functions_line,
        kept_lines,
        lifted_lines,
        outcome_json,
        pause_line,
        safe,
        warning_lines,
    )

    patch = read_patch(arguments.patch)
    confirm_with_lief(patch, arguments.patch)
    outcome = transaction.check(
        arguments.pid,
        patch,
        timeout=arguments.timeout,
        deep_check=arguments.deep_check,
        deep_limit=arguments.deep_limit,
        keep_live=arguments.keep_live,
    )
    contents = outcome.contents
    head = f"{safe(outcome.process)} (pid {outcome.pid})"
    if outcome.already:
        text = [f"{head} carries patch {contents.patch[:12]} already"]
    else:
        text = [
            f"{head} can take patch {contents.patch[:12]}",
            f"  build      {safe(builds_line(contents))}",
            f"  functions  {functions_line(contents)}",
            f"  pause      {pause_line(outcome)}",
            f"  to map     {outcome.mapped_bytes // 1024} KiB",
        ]
        text += [f"  {line}" for line in (*kept_lines(contents), *lifted_lines(contents), *warning_lines(patch))]
        text += [f"  replaces   {item.short_id}" for item in outcome.others]
    state = "applied" if outcome.already else "applicable"
    body = {**outcome_json(outcome), "findings": findings_json(patch), "state": state}
    body.pop("applied_at")
    return Report(body, text)
