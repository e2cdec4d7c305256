"""Show which patches a process carries.

States: applied; reverted; replaced, by another patch of the same program; interrupted, where livegraft was killed
between its first and its last write: apply the patch again to finish it, or revert to undo it; prepared, where it
was killed before the first: the next apply clears it away. A process without patches gives an empty list.
Nothing is stopped for this, but where apply --keep-live has kept old code: then a short stop shows who is still in it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import Report, add_pid

if TYPE_CHECKING:
    from patcher.inspection import CarriedPatch, Inspection


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_pid(parser)


def run(arguments: argparse.Namespace) -> Report:
    """Look."""
    from ..inspection import inspect_process
    from .shared import safe

    found = inspect_process(arguments.pid)
    count = len(found.patches)
    carries = "no patch" if not count else "1 patch" if count == 1 else f"{count} patches"
    text = [f"{safe(found.process)} (pid {found.pid}) carries {carries}"]
    for patch in found.patches:
        text += _lines(patch, found.pid)
    text += _finishing_lines(found)
    text += [f"  damaged record at {item.address:#x}: {safe(item.why)}" for item in found.damaged]
    body = {
        "pid": found.pid,
        "process": found.process,
        "patches": [_json(patch) for patch in found.patches],
        "finishing": None if found.finishing is None else [asdict(item) for item in found.finishing],
        "damaged": [{"address": item.address, "why": item.why} for item in found.damaged],
    }
    return Report(body, text)


def _finishing_lines(found: Inspection) -> list[str]:
    from .shared import safe

    if found.finishing is None:
        return [f"  who is in kept old code is not known: {safe(found.why_unknown)}"]
    return [
        f"  thread {item.tid} ({safe(item.thread)}) {'is' if item.certain else 'may be'} still in the old code of "
        f"{safe(item.function)}, kept by {safe(item.patch[:12])}"
        for item in found.finishing
    ]


def _json(patch: CarriedPatch) -> dict[str, Any]:
    from .shared import contents_json, state_name

    return {
        "id": patch.record.contents.patch,
        "state": state_name(patch.record.state),
        "in": patch.record.state.name.lower() if patch.record.interrupted else None,
        "entries": patch.entries,
        "redirected": patch.redirected,
        "mapped_bytes": patch.mapped_bytes,
        **contents_json(patch.record.contents),
    }


def _lines(patch: CarriedPatch, pid: int) -> list[str]:
    from .shared import builds_line, functions_line, kept_lines, lifted_lines, moment, safe, state_name

    record = patch.record
    lines = [
        f"  {record.short_id}  {state_name(record.state)}",
        f"    build      {safe(builds_line(record.contents))}",
        f"    functions  {functions_line(record.contents)}",
        *(f"    {line}" for line in (*kept_lines(record.contents), *lifted_lines(record.contents))),
        f"    since      {moment(record.contents.time)}, by livegraft {safe(record.contents.tool_version)}",
    ]
    if record.interrupted:
        lines += [
            f"    livegraft was killed in the middle: {patch.redirected} of {patch.entries} entries are redirected",
            f"    to undo    livegraft revert --pid {pid} {record.short_id}",
            "    to finish  apply the same patch again",
        ]
    elif not patch.as_it_should_be:
        lines.append(f"    but {patch.redirected} of {patch.entries} entries are redirected")
    return lines
