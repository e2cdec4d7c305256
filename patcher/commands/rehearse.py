"""Rehearse a patch under load, as a job of a CI.

FILE says in TOML how to start the old build and how to know that it is ready, what load to put on it, and what to ask
it with which answers before and after the patch (docs/rehearsal.md). The patch is made, and then applied and reverted
as often as the file says, with every question asked in between. Whatever happens, all that was started is ended.

The exit status is 0 if all went well, 1 if a probe, the load or the daemon failed, 2 if the file is wrong; where the
patch could not be made or applied it is that of diff or apply.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from elfdiff.errors import BadInput

from . import Report


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("file", type=Path, metavar="FILE", help="what is rehearsed, in TOML")
    parser.add_argument("--junit", type=Path, metavar="XML", help="write the steps as JUnit XML, for the CI's reports")


def run(arguments: argparse.Namespace) -> Report:
    """Rehearse."""
    from elfdiff.patches.patchfile import require_output

    from ..rehearsal.file import read_rehearsal
    from ..rehearsal.rehearsing import rehearse
    from .rehearsalreport import json, junit, junit_of_bad_file, text

    if arguments.junit is not None:
        require_output(arguments.junit, (arguments.file,), "report")
    try:
        asked = read_rehearsal(arguments.file)
    except BadInput as error:
        _write(arguments.junit, junit_of_bad_file(arguments.file.name, error))
        raise
    outcome = rehearse(asked)
    _write(arguments.junit, junit(outcome))
    return Report(json(outcome), text(outcome), outcome.exit_code)


def _write(path: Path | None, report: bytes) -> None:
    from elfdiff.patches.patchfile import write_whole

    if path is not None:
        write_whole(path, report, "report", "name a file in a folder that exists and that you may write to")
