"""Make a patch object from two builds of one program.

OLD is the build that runs, NEW the one that it is to become: linked ELF files, stripped or not. What differs in
line numbers only is left out. What cannot be shown to be safe is refused with the reason (exit status 4), and
builds without a difference that matters give no patch (exit status 3); in both cases no file is written.

Debug information, in the files or in separate debug files, lets types be compared instead of guessed at, and names
source lines.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elfdiff.findingcodes import LIFTABLE

from . import Report, plural

if TYPE_CHECKING:
    from elfdiff.diff import Options
    from elfdiff.patchobject import PatchObject


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("old", type=Path, metavar="OLD", help="the build that runs")
    parser.add_argument("new", type=Path, metavar="NEW", help="the build that it is to become")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PATCH", help="the patch object to write")
    add_comparison(parser)


def add_comparison(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add how two builds are compared."""
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
    keeping = parser.add_mutually_exclusive_group() if isinstance(parser, argparse.ArgumentParser) else parser
    keeping.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="keep decoded builds here, 14 bytes per byte of code (default: $LIVEGRAFT_CACHE, else they are not kept)",
    )
    keeping.add_argument("--no-cache", action="store_true", help="neither read nor keep analyses")


def cache_folder(arguments: argparse.Namespace) -> Path | None:
    """Where analyses of builds are kept; None where they are not, which is so unless somebody asks for it."""
    if arguments.no_cache:
        return None
    named = arguments.cache_dir or os.environ.get("LIVEGRAFT_CACHE")
    return Path(named) if named else None


def comparison_options(arguments: argparse.Namespace) -> Options:
    """What ``add_comparison`` asked for. Raises BadInput for an unknown code or folder."""
    from elfdiff.diff import Options
    from elfdiff.errors import BadInput

    unknown = sorted(set(arguments.allow) - set(LIFTABLE))
    if unknown:
        raise BadInput(f"--allow {unknown[0]}: no such liftable finding", next_step=f"one of: {', '.join(LIFTABLE)}")
    missing = [folder for folder in arguments.debug_dir if not folder.is_dir()]
    if missing:
        raise BadInput(f"--debug-dir {missing[0]}: no such folder", next_step="name a folder like /usr/lib/debug")
    dirs, cache = tuple(arguments.debug_dir), cache_folder(arguments)
    return Options(arguments.lines, frozenset(arguments.allow), dirs, cache)


def run(arguments: argparse.Namespace) -> Report:
    """Compare and write."""
    from elfdiff.diff import diff, summary
    from elfdiff.patches.patchfile import require_output, write_patch
    from patcher.explanation.words import functions_line

    require_output(arguments.output, (arguments.old, arguments.new))
    patch = diff(arguments.old, arguments.new, comparison_options(arguments))
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


def patch_json(patch: PatchObject) -> dict[str, Any]:
    """Return a patch object as JSON; addresses are virtual addresses of the build that they belong to."""
    from elfdiff.diff import summary

    return {
        "id": patch.id,
        "tool_version": patch.tool_version,
        "old": asdict(patch.old),
        "new": asdict(patch.new),
        "summary": summary(patch),
        "segments": [{"vaddr": s.vaddr, "size": s.size, "flags": s.flags} for s in patch.segments],
        "functions": [asdict(function) for function in patch.functions],
        "imports": [asdict(item) for item in patch.imports],
        "removed": [asdict(item) for item in patch.removed],
        "when_idle": [asdict(item) for item in patch.idle],
        "line_only": [asdict(item) for item in patch.line_only],
        "findings": [asdict(item) for item in patch.findings],
    }


def finding_lines(patch: PatchObject) -> list[str]:
    """Return the findings for people."""
    lines = []
    for finding in patch.findings:
        first, *rest = finding.lines()
        lines += [f"{finding.severity:<10} {first}", *(f"           {line}" for line in rest)]
    return lines
