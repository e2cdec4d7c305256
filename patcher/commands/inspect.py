"""Show what a patch object holds.

Its two builds, every function with the reason why it is in the patch, what was left out, the references that were
rewritten and what the differ found worth a warning. With -v also every reference.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import Report, plural

if TYPE_CHECKING:
    from elfdiff.patchobject import PatchFunction, PatchObject


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("patch", type=Path, metavar="PATCH", help="a patch object made by livegraft diff")
    parser.add_argument("-v", "--verbose", action="store_true", help="list every reference that was rewritten")


def run(arguments: argparse.Namespace) -> Report:
    """Read and show."""
    from elfdiff.diff import summary
    from elfdiff.patchfile import read_patch

    from .diff import functions_line

    patch = read_patch(arguments.patch)
    counts = summary(patch)
    json = {**patch_json(patch), "references": _references(patch)}
    text = [
        f"patch {patch.id}",
        f"  made by    livegraft {patch.tool_version}",
        f"  old build  {patch.old.name} {patch.old.build_id}",
        f"  new build  {patch.new.name} {patch.new.build_id}",
        f"  size       {counts['bytes'] // 1024} KiB in {plural(len(patch.segments), 'segment')}",
        f"  functions  {functions_line(counts)}",
        *(f"    {_function_line(function)}" for function in patch.functions),
        f"  references {_references_line(counts)}",
        f"  checked    {plural(len(patch.checked), 'range')} of the old build before anything is written",
        f"  left out   {plural(len(patch.line_only), 'function')} that differ in line numbers only",
        *(f"    {item.name}" for item in patch.line_only),
        *(f"  removed    {item.name}" for item in patch.removed),
        *(f"  {line}" for line in finding_lines(patch)),
    ]
    if arguments.verbose:
        text += [f"  {r['place']:#x} {r['type']} {r['symbol']}{r['addend']:+#x}" for r in json["references"]]
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
        "line_only": [asdict(item) for item in patch.line_only],
        "findings": [asdict(item) for item in patch.findings],
    }


def finding_lines(patch: PatchObject) -> list[str]:
    """Return the findings for people."""
    lines = []
    for finding in patch.findings:
        lines.append(f"{finding.severity:<10} {finding.code}: {finding.what}")
        lines.append(f"             {finding.why}")
    return lines


def _references(patch: PatchObject) -> list[dict[str, Any]]:
    from elfdiff.patchfile import symbol_name
    from elfdiff.patchobject import RelocationType

    return [
        {
            "place": int(row["place"]),
            "type": RelocationType(int(row["type"])).name,
            "symbol": symbol_name(patch, int(row["symbol"])),
            "addend": int(row["addend"]),
        }
        for row in patch.relocations
    ]


def _references_line(counts: dict[str, int]) -> str:
    return (
        f"{counts['references']} rewritten: {counts['references_old_image']} into the running program, "
        f"{counts['references_patch']} inside the patch, {counts['references_imports']} to imports"
    )


def _function_line(function: PatchFunction) -> str:
    new = f"{function.new_start:#x}+{function.new_size}"
    if function.old_start is None:
        return f"{function.name:<32} {function.reason:<9} new {new}"
    how = "redirected" if function.entry_jump else "moves along"
    return f"{function.name:<32} {function.reason:<9} {function.old_start:#x}+{function.old_size} -> {new} {how}"
