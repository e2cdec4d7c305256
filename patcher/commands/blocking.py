"""Show what is in the way of a patch.

Looks at the process again and again for a while, in stops of about a millisecond, and writes nothing. Says of each
function that changes and was live which thread was in it, where it was called from and since when; which functions were
never live; and in how many of the looks apply could have gone ahead. The exit status is 5 if something was in the way
at the last look. With --revert it is about taking a patch out of force.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elfdiff.errors import BadInput, Busy

from . import Report, add_deep_check, add_pid, add_when_idle, conditions_of, plural, seconds

if TYPE_CHECKING:
    from patcher.pausing.liveness import Activation, Watched

_MOST_SHOWN = 12


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "patches", nargs="*", type=Path, metavar="PATCH", help="a patch object made by livegraft diff, or a set of them"
    )
    parser.add_argument(
        "--revert", nargs="?", const="", metavar="ID", help="ask for revert instead: of the patch with this id"
    )
    add_pid(parser)
    add_deep_check(parser)
    add_when_idle(parser)
    parser.add_argument(
        "--for", dest="seconds", type=seconds, default=1.0, metavar="SECONDS", help="how long to look (default: 1)"
    )


def run(arguments: argparse.Namespace) -> Report:
    """Look."""
    from elfdiff.patches.patchfile import read_patch

    from ..transactions import transaction

    if bool(arguments.patches) == (arguments.revert is not None):
        raise BadInput(
            "name a patch object, or give --revert",
            why="what is in the way depends on what is to be written",
            next_step="livegraft blocking PATCH --pid PID",
        )
    conditions = conditions_of(arguments)
    if arguments.patches:
        patches = [read_patch(path) for path in arguments.patches]
        watched = transaction.watch_apply(arguments.pid, patches, arguments.seconds, conditions)
    else:
        watched = transaction.watch_revert(arguments.pid, arguments.revert, arguments.seconds, conditions)
    if watched is None:
        nothing: dict[str, Any] = {"pid": arguments.pid, "looks": 0, "quiescent": 0}
        nothing |= {name: [] for name in ("live", "seen", "never_live", "when_idle")}
        return Report(nothing, ["nothing would be written, so nothing is in the way"])
    return Report(_json(watched), _lines(watched), Busy.exit_code if watched.now else 0)


def _json(watched: Watched) -> dict[str, Any]:
    now = watched.now
    return {
        "pid": watched.pid,
        "process": watched.process,
        "id": watched.contents[0].patch,
        "set": [item.patch for item in watched.contents] if len(watched.contents) > 1 else [],
        "seconds": round(watched.seconds, 3),
        "looks": watched.looks,
        "quiescent": watched.quiescent,
        "live": [_activation_json(item) for item in now],
        "seen": [_activation_json(item) for item in watched.activations if item not in now],
        "never_live": list(watched.never_live),
        "when_idle": list(watched.unchanged),
        "waits_for_returns": not watched.waiting,
        "why_not": watched.waiting,
    }


def _activation_json(item: Activation) -> dict[str, Any]:
    return {**asdict(item), "stack": list(item.stack), "age": round(item.age, 3), "from_the_start": item.first == 1}


def _lines(watched: Watched) -> list[str]:
    from .shared import safe

    head = f"{safe(watched.process)} (pid {watched.pid})"
    now = watched.now
    rest = len(watched.activations) - len(now)
    lines = [f"{head}: {'in the way now' if now else 'nothing is in the way now'}"]
    for item in now[:_MOST_SHOWN]:
        lines += _activation_lines(item, watched)
    lines += [f"  and {len(now) - _MOST_SHOWN} more"] if len(now) > _MOST_SHOWN else []
    lines += [f"  before that: {plural(rest, 'other activation')}"] if rest else []
    lines.append(f"  quiescent   in {watched.quiescent} of {plural(watched.looks, 'look')} in {watched.seconds:.1f} s")
    lines.append(f"  apply waits {f'blindly: {watched.waiting}' if watched.waiting else 'for threads to return'}")
    if watched.unchanged:
        lines.append(f"  when idle   {', '.join(map(safe, watched.unchanged))}: unchanged, and waited for as well")
    if watched.never_live:
        lines.append(f"  never live  {', '.join(map(safe, watched.never_live))}")
    return lines


def _activation_lines(item: Activation, watched: Watched) -> list[str]:
    from .shared import safe

    name = f" ({safe(item.thread)})" if item.thread else ""
    who = f"thread {item.tid}{name}" if item.tid else "a stack that no thread runs on"
    since = f"for {item.age:.1f} s"
    if item.first == 1:
        since = f"since before the first look, {item.age:.1f} s ago"
    often = "in every look" if item.looks == watched.looks else f"in {item.looks} of {watched.looks} looks"
    sure = "is in" if item.certain else "may be in"
    return [
        f"  {who} {sure} {safe(item.function)}, {since}, {often}: {safe(item.why)}",
        *(f"      #{depth} {safe(frame)}" for depth, frame in enumerate(item.stack)),
    ]
