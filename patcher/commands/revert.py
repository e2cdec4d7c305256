"""Take a patch out of force again.

Every redirected function gets the bytes of its file back, at a moment when no thread is in the new code. Where apply
was killed half-way, what it had begun is undone, and what was in force before is in force again. The patch's own
memory stays mapped, since pointers to its constants may live on; applying the same patch again takes it up.
"""

from __future__ import annotations

import argparse

from elfdiff.errors import BadInput

from . import Report, add_deep_check, add_pid, add_timeout

_SHORTEST_ID = 4


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "id", nargs="?", default="", metavar="ID", help="first digits of the patch's id; needed if there are several"
    )
    add_pid(parser)
    add_timeout(parser)
    add_deep_check(parser)


def run(arguments: argparse.Namespace) -> Report:
    """Revert."""
    from .. import transaction
    from .shared import builds_line, functions_line, outcome_json, pause_line, safe

    if arguments.id:
        _require_id(arguments.id)
    outcome = transaction.revert(
        arguments.pid,
        arguments.id,
        timeout=arguments.timeout,
        deep_check=arguments.deep_check,
        deep_limit=arguments.deep_limit,
    )
    contents = outcome.contents
    head = f"{safe(outcome.process)} (pid {outcome.pid})"
    if outcome.already:
        text = [f"{head}: patch {contents.patch[:12]} is out of force already; nothing was written"]
    else:
        text = [
            f"{head}: patch {contents.patch[:12]} is no longer in force",
            f"  build      {safe(builds_line(contents))}",
            f"  functions  {functions_line(contents)}: undone",
            f"  pause      {pause_line(outcome)}",
        ]
    return Report(outcome_json(outcome), text)


def _require_id(text: str) -> None:
    if len(text) < _SHORTEST_ID or any(letter not in "0123456789abcdefABCDEF" for letter in text):
        raise BadInput(
            f"{text!r} is not the id of a patch",
            why=f"an id is given by its first hexadecimal digits, {_SHORTEST_ID} or more",
            next_step="livegraft status --pid PID shows the ids of a process",
        )
