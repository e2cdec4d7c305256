"""Put a patch in force in a running process.

All threads are stopped for about a millisecond, at a moment when none is in a function that changes. Until such a
moment comes, the process runs on and is looked at again. A patch of the same program that is in force already is
replaced in the same stop. Where anything is not safe, nothing is written.
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
    """Apply."""
    from elfdiff.patchfile import read_patch

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
    outcome = transaction.apply(
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
        text = [f"{head} carries patch {contents.patch[:12]} already; nothing was written"]
    else:
        text = [
            f"{head} is patched: {contents.patch[:12]}",
            f"  build      {safe(builds_line(contents))}",
            f"  functions  {functions_line(contents)}",
            f"  pause      {pause_line(outcome)}",
            f"  mapped     {outcome.mapped_bytes // 1024} KiB",
        ]
        text += [f"  {line}" for line in (*kept_lines(contents), *lifted_lines(contents), *warning_lines(patch))]
        text += [f"  replaced   {item.short_id}" for item in outcome.others]
        text += [f"  undo with  livegraft revert --pid {outcome.pid} {contents.patch[:12]}"]
    return Report({**outcome_json(outcome), "findings": findings_json(patch)}, text)
