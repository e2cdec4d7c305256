"""Explain a patch object, or what two builds come to.

For a patch object: its two builds, every function with the reason why it is in the patch and the evidence for it, what
was left out, the references that are rewritten, sizes, and every finding. With two builds instead (inspect OLD NEW) the
same is said of the patch that diff would make of them, also where it would refuse; nothing is written, and the exit
status is 0 if the pair could be explained, whatever the verdict is.

--diff shows old and new code side by side, with names instead of addresses; without FUNCTION of all functions.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import Report
from .diff import add_comparison, comparison_options

if TYPE_CHECKING:
    from elfdiff.explain import ExplainedFunction, Explanation
    from patcher.explanation.as_text import Style

PLAIN_WIDTH = 160
"""Columns of a listing that goes to no terminal, unless COLUMNS says otherwise."""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("patch", type=Path, metavar="PATCH", help="a patch object made by livegraft diff, or a build")
    parser.add_argument("new", type=Path, nargs="?", metavar="NEW", help="a second build: explain the pair PATCH NEW")
    parser.add_argument("-v", "--verbose", action="store_true", help="list every reference that is rewritten")
    parser.add_argument(
        "--diff",
        nargs="*",
        metavar="FUNCTION",
        help="show old and new code of these functions (names or addresses), or of all",
    )
    parser.add_argument(
        "--context", type=_lines, default=3, metavar="N", help="same instructions shown around differences (3)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write all of it as one page for a browser")
    add_comparison(parser.add_argument_group("with two builds, as for diff"))


def run(arguments: argparse.Namespace) -> Report:
    """Read or compare, and show."""
    from elfdiff.explain import select
    from elfdiff.patches.patchfile import require_output
    from patcher.explanation.as_json import explanation_json, listings_json
    from patcher.explanation.as_text import listings, overview

    if arguments.html is not None:
        require_output(arguments.html, [path for path in (arguments.patch, arguments.new) if path is not None], "page")
    explanation = _explanation(arguments)
    chosen: tuple[ExplainedFunction, ...] = ()
    if arguments.diff is not None:
        _must_be_complete(explanation, arguments.patch)
        chosen = select(explanation, arguments.diff) if arguments.diff else explanation.functions
    json = explanation_json(explanation)
    style = _style()
    text = list(overview(explanation, style))
    if arguments.verbose:
        text += [f"  {r.place:#x} {r.type} {r.symbol}{r.addend:+#x}" for r in explanation.rewritten]
    if arguments.diff is not None:
        if arguments.json:
            json["diff"] = listings_json(chosen)
        else:
            text = list(listings(chosen, arguments.context, style))
    notes = []
    if arguments.html is not None:
        _write_page(explanation, arguments)
        json["html"] = str(arguments.html)
        notes.append(f"wrote {arguments.html}")
    return Report(json, text, notes=notes)


def _explanation(arguments: argparse.Namespace) -> Explanation:
    from elfdiff.errors import BadInput
    from elfdiff.explain import explain, explain_pair
    from elfdiff.patches.patchfile import read_patch

    options = comparison_options(arguments)
    if arguments.new is not None:
        return explain_pair(arguments.patch, arguments.new, options)
    if options.lines or options.allow or options.debug_dirs:
        raise BadInput(
            "--lines, --allow and --debug-dir need two builds",
            why="a patch object is shown as it was made",
            next_step="livegraft inspect OLD NEW",
        )
    return explain(read_patch(arguments.patch))


def _must_be_complete(explanation: Explanation, path: Path) -> None:
    from elfdiff.errors import BadInput

    if not explanation.complete:
        raise BadInput(
            f"{path}: the patch object does not hold the old code",
            why=f"livegraft {explanation.tool_version} made it without an explanation",
            next_step="make it again with this version: livegraft diff OLD NEW -o PATCH",
        )


def _style() -> Style:
    from patcher.explanation.as_text import Style

    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns
    return Style(width, terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")


def _write_page(explanation: Explanation, arguments: argparse.Namespace) -> None:
    from patcher.explanation.as_html import page, write_page

    names = [path.name for path in (arguments.patch, arguments.new) if path is not None]
    write_page(page(explanation, arguments.context, " ".join(["livegraft inspect", *names])), arguments.html)


def _lines(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 7 else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of lines")
    return value
