"""Say whether livegraft can work here, and on a process.

Looks at the kernel, at our rights and, where a PID is given, at that process: who traces it, filters, limits, the
freezer, room for a patch. What the kernel allows is tried on a process of our own; the target is not stopped and not
changed. For what would fail or would go less well it says why, and the command that lifts it. The exit status is that
which apply would have, as far as it depends on these; whether a certain patch fits is for check to say.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import Report, process_id

if TYPE_CHECKING:
    from patcher.targets.doctor import Examination
    from patcher.targets.doctorchecks import Check


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("pid", type=process_id, nargs="?", metavar="PID", help="a process to look at, too")


def run(arguments: argparse.Namespace) -> Report:
    """Look."""
    from ..targets.doctor import examine

    found = examine(arguments.pid)
    text = [_verdict(found)]
    for check in found.checks:
        text += _lines(check)
    body = {
        "pid": found.pid,
        "process": found.process,
        "possible": found.exit_code == 0,
        "checks": [_json(check) for check in found.checks],
    }
    return Report(body, text, found.exit_code)


def _verdict(found: Examination) -> str:
    from .shared import safe

    whom = f"{safe(found.process)} (pid {found.pid})" if found.process else "here"
    if found.exit_code:
        return f"{whom}: apply would fail, exit status {found.exit_code}"
    return f"{whom}: nothing is in the way of apply"


def _lines(check: Check) -> list[str]:
    from .shared import safe

    lines = [f"  {check.verdict.value:9} {check.name:16} {safe(check.found)}"]
    for label, said in (("why", check.why), ("next", check.next_step)):
        if said:
            lines.append(f"  {'':9} {'':16}   {label}: {safe(said)}")
    lines += [f"  {'':9} {'':16}   {safe(detail)}" for detail in check.details]
    return lines


def _json(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "verdict": check.verdict.value,
        "found": check.found,
        "why": check.why,
        "next": check.next_step,
        "exit": check.exit_code,
        "details": list(check.details),
    }
