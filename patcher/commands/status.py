"""Show which patches a process carries.

States: applied; reverted; replaced, by another patch of the same program; interrupted, where livegraft was killed
between its first and its last write: apply the patch again to finish it, or revert to undo it; prepared, where it
was killed before the first: the next apply clears it away. A process without patches gives an empty list.
Nothing is stopped for this, but where apply --keep-live has kept old code: then a short stop shows who is still in it.

A child has the patches of the process that forked it, which is said of each. Of several processes all are shown, with
or without --all.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from elfdiff.errors import BadInput, LivegraftError, Partial

from . import Report, add_selection, selection_of

if TYPE_CHECKING:
    from patcher.targets.selection import Selection
    from patcher.transactions.inspection import CarriedPatch, Inspection


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_selection(parser, changes=False)


def run(arguments: argparse.Namespace) -> Report:
    """Look."""
    from ..transactions.inspection import inspect_process

    selection = selection_of(arguments)
    if selection is not None:
        return _of_several(replace(selection, several=True))
    found = inspect_process(arguments.pid)
    return Report(_body(found), _text(found))


def _of_several(selection: Selection) -> Report:
    from ..targets.selection import pinned, select_processes
    from ..transactions.inspection import inspect_process
    from .several import exit_json, selection_json
    from .shared import error_json, error_lines, safe

    bodies, text, codes = [], [], []
    for process in select_processes(selection):
        head = {"pid": process.pid, "process": process.name}
        try:
            with pinned(process):
                found = inspect_process(process.pid)
        except BadInput:
            continue  # it has exited
        except LivegraftError as error:
            codes.append(error.exit_code)
            bodies.append({**head, "exit": exit_json(error.exit_code), "error": error_json(error)})
            text += [safe(line) for line in error_lines(error)]
            continue
        codes.append(0)
        bodies.append({**_body(found), "exit": exit_json(0)})
        text += _text(found)
    body = {"selection": selection_json(selection), "processes": bodies}
    distinct = set(codes)
    return Report(body, text, distinct.pop() if len(distinct) == 1 else Partial.exit_code if 0 in distinct else 1)


def _text(found: Inspection) -> list[str]:
    from .shared import safe

    count = len(found.patches)
    carries = "no patch" if not count else "1 patch" if count == 1 else f"{count} patches"
    text = [f"{safe(found.process)} (pid {found.pid}) carries {carries}"]
    for patch in found.patches:
        text += _lines(patch, found)
    text += _finishing_lines(found)
    return text + [f"  damaged record at {item.address:#x}: {safe(item.why)}" for item in found.damaged]


def _body(found: Inspection) -> dict[str, Any]:
    return {
        "pid": found.pid,
        "process": found.process,
        "patches": [_json(patch) for patch in found.patches],
        "finishing": None if found.finishing is None else [asdict(item) for item in found.finishing],
        "damaged": [{"address": item.address, "why": item.why} for item in found.damaged],
    }


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
        "inherited": patch.inherited,
        "set": {"id": patch.record.contents.set_id, "size": patch.record.contents.set_size}
        if patch.record.contents.set_id
        else None,
        **contents_json(patch.record.contents),
    }


def _lines(patch: CarriedPatch, found: Inspection) -> list[str]:
    from .shared import builds_line, functions_line, moment, noted_lines, safe, state_name

    record = patch.record
    lines = [
        f"  {record.short_id}  {state_name(record.state)}",
        f"    build      {safe(builds_line(record.contents))}",
        f"    functions  {functions_line(record.contents)}",
        *(f"    {line}" for line in noted_lines(record.contents)),
        f"    since      {moment(record.contents.time)}, by livegraft {safe(record.contents.tool_version)}",
    ]
    if record.contents.set_id:
        others = [
            item.record.short_id
            for item in found.patches
            if item is not patch and item.record.contents.set_id == record.contents.set_id
        ]
        company = " ".join(others) or "none that is left"
        lines.append(f"    set        of {record.contents.set_size}, with {company}")
    if patch.inherited:
        lines.append("    inherited  from the process that forked it")
    if record.interrupted:
        lines += [
            f"    livegraft was killed in the middle: {patch.redirected} of {patch.entries} entries are redirected",
            f"    to undo    livegraft revert --pid {found.pid} {record.short_id}",
            f"    to finish  apply the same {'set' if record.contents.set_id else 'patch'} again",
        ]
    elif not patch.as_it_should_be:
        lines.append(f"    but {patch.redirected} of {patch.entries} entries are redirected")
    return lines
