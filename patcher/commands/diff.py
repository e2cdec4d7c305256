"""Make a patch object from two builds of one program.

OLD is the build that runs, NEW the one that it is to become: linked ELF files, stripped or not. What differs in
line numbers only is left out. What cannot be shown to be safe is refused with the reason (exit status 4), and
builds without a difference that matters give no patch (exit status 3); in both cases no file is written.

Debug information, in the files or in separate debug files, lets types be compared instead of guessed at, and names
source lines.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from elfdiff.findingcodes import LIFTABLE

from . import Report, plural


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("old", type=Path, metavar="OLD", help="the build that runs")
    parser.add_argument("new", type=Path, metavar="NEW", help="the build that it is to become")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PATCH", help="the patch object to write")
    parser.add_argument("--lines", action="store_true", help="include functions that differ in line numbers only")
    parser.add_argument(
        "--debug-dir",
        action="append",
        type=Path,
        default=[],
        metavar="DIR",
        help="look here for separate debug files, by build-id or debug link, before /usr/lib/debug (may be repeated)",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="CODE",
        help="let the finding CODE warn where it would refuse (may be repeated): " + ", ".join(LIFTABLE),
    )


def run(arguments: argparse.Namespace) -> Report:
    """Compare and write."""
    from elfdiff.diff import Options, diff, summary
    from elfdiff.errors import BadInput
    from elfdiff.patchfile import write_patch

    from .inspect import finding_lines, patch_json

    unknown = sorted(set(arguments.allow) - set(LIFTABLE))
    if unknown:
        raise BadInput(f"--allow {unknown[0]}: no such liftable finding", next_step=f"one of: {', '.join(LIFTABLE)}")
    options = Options(arguments.lines, frozenset(arguments.allow), tuple(arguments.debug_dir))
    patch = diff(arguments.old, arguments.new, options)
    patch = write_patch(patch, arguments.output)
    counts = summary(patch)
    json: dict[str, Any] = {"patch": str(arguments.output), **patch_json(patch)}
    text = [
        f"{arguments.output}: patch {patch.id[:12]} for {patch.old.name}",
        f"  build      {patch.old.build_id[:12]} -> {patch.new.build_id[:12]}",
        f"  functions  {functions_line(counts)}",
        f"  left out   {plural(counts['line_only'], 'function')} that differ in line numbers only",
        f"  bound      {plural(counts['references'], 'reference')}, all of them",
        *(f"  {line}" for line in finding_lines(patch)),
        f"  next       livegraft apply {arguments.output} --pid PID",
    ]
    return Report(json, text)


def functions_line(counts: dict[str, int]) -> str:
    """Return how many functions are in a patch, by reason."""
    reasons = ("code", "constant", "callee", "closure", "lines", "new")
    parts = [f"{counts[f'functions_{reason}']} {reason}" for reason in reasons if counts[f"functions_{reason}"]]
    return f"{counts['functions']} ({', '.join(parts)}); {counts['entry_jumps']} redirected"
