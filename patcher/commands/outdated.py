"""List the processes that run files which were replaced on disk.

For each file: new-build, where another build lies in its place, that is at its path, or for a library by its SONAME in
the same folder (livegraft upgrade --dry-run says whether a patch is possible); same-build, where the same build lies
there again; patched, where the process carries a patch to the build that lies there; gone, where no program lies there;
unknown, where there is no build-id to compare. Looks at every process, stops none, changes nothing. Processes of other
users are seen by root only.

--batch prints lines as needrestart -b does, a NEEDRESTART-SVC for each systemd unit with a file that is not patched,
and a LIVEGRAFT-PID for each file of each process.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import Report

if TYPE_CHECKING:
    from patcher.targets.outdated import OutdatedFile, OutdatedProcess, Survey


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--batch", action="store_true", help="print lines for scripts, as needrestart -b does")


def run(arguments: argparse.Namespace) -> Report:
    """Look."""
    from ..targets.outdated import survey
    from .shared import unreadable_line

    found = survey()
    text = _batch(found) if arguments.batch else _table(found)
    notes = [] if arguments.batch or not found.unreadable else [unreadable_line(found.unreadable)]
    return Report(_json(found), text, notes=notes)


def _json(found: Survey) -> dict[str, Any]:
    return {
        "looked_at": found.looked_at,
        "unreadable": found.unreadable,
        "processes": [
            {**asdict(process), "files": [{**asdict(file), "state": file.state.value} for file in process.files]}
            for process in found.processes
        ],
    }


def _table(found: Survey) -> list[str]:
    """A row for each file; processes of one name that run the same file share it: a server has workers."""
    if not found.processes:
        return [f"none of {found.looked_at} processes runs a file that was deleted or replaced"]
    pids: dict[tuple[str, ...], list[str]] = {}
    for process in found.processes:
        for file in process.files:
            pids.setdefault(_row(process, file), []).append(str(process.pid))
    head = ("NAME", "STATE", "FILE", "PACKAGE", "UNIT", "PIDS")
    rows = [head, *((*row, ",".join(running)) for row, running in pids.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(process: OutdatedProcess, file: OutdatedFile) -> tuple[str, ...]:
    from .shared import safe

    path = file.path if file.successor == file.path else f"{file.path} -> {file.successor.rpartition('/')[2]}"
    return tuple(safe(word) or "-" for word in (process.name, file.state.value, path, file.package, process.unit))


def _batch(found: Survey) -> list[str]:
    from importlib.metadata import version

    from ..targets.outdated import FileState
    from .shared import safe

    done = (FileState.PATCHED, FileState.SAME_BUILD)
    units = {
        process.unit
        for process in found.processes
        if process.unit and any(file.state not in done for file in process.files)
    }
    return [
        f"NEEDRESTART-VER: livegraft {version('livegraft')}",
        *(f"NEEDRESTART-SVC: {safe(unit)}" for unit in sorted(units)),
        *(
            f"LIVEGRAFT-PID: {process.pid} {file.state.value} {safe(file.path)}"
            for process in found.processes
            for file in process.files
        ),
    ]
