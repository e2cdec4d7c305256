"""Take a patch out of force again.

Every redirected function gets the bytes of its file back, at a moment when no thread is in the new code. Where apply
was killed half-way, what it had begun is undone, and what was in force before is in force again. The patch's own
memory stays mapped, since pointers to its constants may live on; applying the same patch again takes it up.
Patches that were applied as a set are taken out of force as one, in one stop, whichever of them is named.

Of several processes each is reverted in a stop of its own, and then those that were forked meanwhile, until there are
no more of them. Those that do not carry the patch are passed over. With --atomic, where one fails the patch is put in
force again in the others.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from elfdiff.errors import BadInput

from . import Report, add_conditions, add_selection, conditions_of, selection_of

if TYPE_CHECKING:
    from patcher.targets.selection import Pin
    from patcher.transactions.transaction import Outcome

_SHORTEST_ID = 4


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "id", nargs="?", default="", metavar="ID", help="first digits of the patch's id; needed if there are several"
    )
    add_selection(parser)
    add_conditions(parser, keep_live=False)


def run(arguments: argparse.Namespace) -> Report:
    """Revert."""
    from ..transactions import transaction
    from .several import one_or_each
    from .shared import set_json

    selection = selection_of(arguments)
    conditions = conditions_of(arguments)
    if arguments.id:
        _require_id(arguments.id)

    def act(pid: int, pin: Pin | None) -> Outcome:
        return transaction.revert(pid, arguments.id, conditions, pin=pin)

    undo = conditions if arguments.atomic else None
    return one_or_each(arguments.pid, selection, act, set_json, _text, undo=undo)


def _text(outcome: Outcome) -> list[str]:
    from .shared import builds_line, functions_line, head_line, pause_line, safe

    if outcome.already:
        return [head_line(outcome, "{} is out of force already; nothing was written", colon=True)]
    lines = [head_line(outcome, "{} is no longer in force", colon=True)]
    for one in outcome.members:
        lines.append(f"  build      {safe(builds_line(one.contents))}")
        lines.append(f"  functions  {functions_line(one.contents)}: undone")
    return [*lines, f"  pause      {pause_line(outcome)}"]


def _require_id(text: str) -> None:
    if len(text) < _SHORTEST_ID or any(letter not in "0123456789abcdefABCDEF" for letter in text):
        raise BadInput(
            f"{text!r} is not the id of a patch",
            why=f"an id is given by its first hexadecimal digits, {_SHORTEST_ID} or more",
            next_step="livegraft status --pid PID shows the ids of a process",
        )
