"""Bring processes up to the files that replaced theirs on disk.

For each executable and library of a process whose file was replaced: the old file, which stays readable while it is
mapped, is compared with the one that came in its place (at its path, or for a library by its SONAME in the same
folder), and the patch is applied. All images of one process are patched in one stop, as a set, and taken back as one.
Where one of them cannot be patched, the process is left as it is, since they may belong together; with --partial what
can be patched is. Functions that are named (--keep-live, --when-idle) may be of any of these images. A patch is made
once for each pair of builds and kept (below XDG_CACHE_HOME, for root in /var/cache/livegraft). What cannot be patched
is listed with the reason, and how to restart it.

--dry-run compares, and does what check does: it says what would be done, and changes nothing in any process.

The exit status is 0 if all that was outdated is up to date, 3 if there was nothing to patch, 8 if some was done and
some not.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Hashable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from elfdiff.errors import BadInput, NothingToPatch, Refused

from . import Report, add_conditions, add_selection, conditions_of, selection_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patcher.targets.outdated import OutdatedFile, OutdatedProcess
    from patcher.targets.selection import Selection
    from patcher.transactions.group import Group, Result
    from patcher.upgrade.cache import PatchCache
    from patcher.upgrade.upgrading import Upgrade, Upgraded, UpgradedFile

_MOST_SHOWN = 20
_MOST_FINDINGS = 3
_FEWEST_TOGETHER = 3  # a server has dozens of modules, of which an upgrade changes some
_Told = dict[Hashable, int]
"""What was said already, and of which process: a server may have hundreds of workers that run the same files."""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_selection(parser, changes=False, required=False)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; no process is changed")
    parser.add_argument(
        "--partial", action="store_true", help="patch what can be patched of a process, also where not all of it can"
    )
    add_conditions(parser)


def run(arguments: argparse.Namespace) -> Report:
    """Upgrade."""
    from ..targets.selection import By
    from ..transactions.group import carry_out_each
    from ..upgrade.cache import PatchCache, default_folder
    from ..upgrade.upgrading import Upgrade

    selection = _selection(arguments)
    everybody = selection.by is By.ALL
    with PatchCache(default_folder()) as cache:
        upgrade = Upgrade(
            cache,
            conditions_of(arguments),
            dry_run=arguments.dry_run,
            everybody=everybody,
            partial=arguments.partial,
        )
        group = carry_out_each(selection, upgrade.act, again=not arguments.dry_run)
        return _report(group, selection, upgrade, cache, arguments.dry_run)


def _selection(arguments: argparse.Namespace) -> Selection:
    """Which processes are meant. Raises BadInput (wrong usage, none was named), NothingToPatch."""
    from ..targets.selection import By, Selection

    if any(getattr(arguments, by.value) is not None for by in By if by is not By.ALL):
        return selection_of(arguments) or Selection(By.PID, str(arguments.pid))
    if not arguments.all:
        raise _none_named()
    return Selection(By.ALL, "", True)


def _none_named() -> BadInput | NothingToPatch:
    from ..targets.outdated import FileState, survey

    done = (FileState.PATCHED, FileState.SAME_BUILD)
    found = [item for item in survey().processes if any(file.state not in done for file in item.files)]
    if not found:
        return NothingToPatch(
            "no process is known to run an old build",
            why="none that may be looked at runs a file that was replaced by another build",
            next_step="nothing is to be done",
        )
    lines = [_old_files(item, [file for file in item.files if file.state not in done]) for item in found]
    more = [f"and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else []
    return BadInput(
        f"{len(found)} of the processes run files that were replaced, and none of them was named",
        why="all of them are upgraded only with --all",
        next_step="--all for all of them, or --pid, --name, --exe, --unit or --tree; with --dry-run nothing is changed",
        details=(*lines[:_MOST_SHOWN], *more),
    )


def _old_files(process: OutdatedProcess, files: Sequence[OutdatedFile]) -> str:
    first = f"{process.pid} {process.name} {files[0].path}"
    return first if len(files) == 1 else f"{first} and {len(files) - 1} more"


def _report(group: Group, selection: Selection, upgrade: Upgrade, cache: PatchCache, dry_run: bool) -> Report:
    from .several import counts_line, selection_json, summary_error
    from .shared import error_json, error_lines, unreadable_line

    shown = [item for item in group.results if _is_shown(item, selection, upgrade)]
    body = {
        "selection": selection_json(selection),
        "dry_run": dry_run,
        "cache": {"folder": str(cache.folder), "discarded": list(cache.discarded)},
        "scans": group.scans,
        "settled": group.settled,
        "unreadable": upgrade.unreadable,
        "processes": [_json(item, upgrade.done.get(item.process.key)) for item in shown],
    }
    told: _Told = {}
    text = [line for item in shown for line in _lines(item, upgrade.done.get(item.process.key), told)]
    notes = [f"{name} in {cache.folder} could not be believed, and was made again" for name in cache.discarded]
    if upgrade.unreadable:
        notes.append(unreadable_line(upgrade.unreadable))
    if group.exit_code == 0:
        return Report(body, [*text, counts_line(group)], 0, notes)
    error = summary_error(group)
    if group.exit_code == Refused.exit_code:
        error.next_step = "restart those that were refused; how is said with each"
    body["error"] = error_json(error)
    first, *others = error_lines(error)
    return Report(body, text, group.exit_code, [*notes, f"livegraft: {first}", *others])


def _is_shown(result: Result, selection: Selection, upgrade: Upgrade) -> bool:
    """Of all processes of the machine only those are of interest that run something old."""
    from ..targets.selection import By
    from ..transactions.group import End

    return selection.by is not By.ALL or result.process.key in upgrade.done or result.end is End.FAILED


def _json(result: Result, done: Upgraded | None) -> dict[str, Any]:
    from .several import exit_json, result_code
    from .shared import error_json

    return {
        "pid": result.process.pid,
        "process": result.process.name,
        "unit": done.unit if done else "",
        "result": result.end.value,
        "exit": exit_json(result_code(result)),
        "late": result.late,
        "files": [_file_json(item) for item in done.files] if done else [],
        **({"error": error_json(result.error)} if result.error is not None else {}),
    }


def _file_json(item: UpgradedFile) -> dict[str, Any]:
    from .shared import error_json, findings_json, outcome_json

    file = asdict(item.file)
    file.pop("package")
    return {
        **file,
        "state": item.file.state.value,
        "mapped": item.mapped,
        "result": item.fate.value,
        "compared": item.compared,
        "patch": item.patch.id if item.patch else item.outcome.contents.patch if item.outcome else None,
        "outcome": outcome_json(item.outcome) if item.outcome else None,
        "findings": findings_json([item.patch]) if item.patch else [],
        **({"error": error_json(item.error)} if item.error is not None else {}),
    }


def _lines(result: Result, done: Upgraded | None, told: _Told) -> list[str]:
    from ..upgrade.upgrading import GOOD, Fate
    from .several import process_lines
    from .shared import safe

    if done is None:
        return process_lines(result, lambda _: ())
    unit = f", {safe(done.unit)}" if done.unit else ""
    lines = [f"{safe(result.process.name)} (pid {result.process.pid}{unit})"]
    if len(done.files) > 1:
        some = {item.fate in GOOD for item in done.files if item.fate is not Fate.NOTHING} == {True, False}
        which = ", those that can be" if some else " or not at all"
        lines.append(f"  {len(done.files)} files, patched in one stop{which}")
    same = [item for item in done.files if item.fate is Fate.NOTHING]
    shown = [item for item in done.files if len(same) < _FEWEST_TOGETHER or item not in same]
    pid = result.process.pid
    if len(shown) < len(done.files):
        names = ", ".join(safe(item.file.path.rpartition("/")[2]) for item in same)
        first = told.setdefault(tuple(item.file for item in same), pid)
        text = f"{len(same)} files: nothing to patch ({names if first == pid else f'the same as of pid {first}'})"
        lines += textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    for item in shown:
        error = item.error  # where it names the process, as of a function that stays live, it is another one each time
        first = told.setdefault((done.unit, item.file, error.what, error.why), pid) if error else pid
        lines += [f"  {line}" for line in (_file_lines(item) if first == pid else _as_of(item, first))]
    return lines


def _head(item: UpgradedFile) -> str:
    from ..upgrade.upgrading import Fate
    from .shared import safe

    said = {Fate.PATCHABLE: "can be patched", Fate.NOTHING: "nothing to patch", Fate.ALREADY: "patched already"}
    return f"{safe(item.file.path)}: {said.get(item.fate, item.fate.value.replace('-', ' '))}"


def _as_of(item: UpgradedFile, pid: int) -> list[str]:
    return [f"{_head(item)}, for the same reason as of pid {pid}"]


def _file_lines(item: UpgradedFile) -> list[str]:
    from ..upgrade.upgrading import Fate
    from .shared import functions_line, pause_line, safe, warning_lines

    lines = [_head(item)]
    if item.fate is Fate.UNTRIED:
        lines.append("  why        another file of the process cannot be patched; --partial patches what can be")
    else:
        came = f" of {item.file.successor}" if item.file.successor != item.file.path else ""
        builds = f"{item.file.running[:12] or 'none'} -> {item.file.on_disk[:12] or 'none'}"
        lines.append(f"  build      {builds}{safe(came)}")
    if item.error is not None:
        lines += _why_not(item)
    outcome = item.outcome
    if outcome is not None and not outcome.already:
        lines += [
            f"  functions  {functions_line(outcome.contents)}",
            f"  pause      {pause_line(outcome)}",
            *(f"  {safe(line)}" for line in (warning_lines([item.patch]) if item.patch else [])),
        ]
    if item.fate is Fate.PATCHED and outcome is not None:
        lines.append(f"  undo with  livegraft revert --pid {outcome.pid} {outcome.contents.patch[:12]}")
    return lines


def _why_not(item: UpgradedFile) -> list[str]:
    """The reason in short: all findings are in the JSON, and inspect explains them."""
    from .shared import safe

    error = item.error
    assert error is not None
    lines = [f"  what       {safe(error.what)}"]
    findings = error.findings if isinstance(error, Refused) else ()
    if findings:
        lines += [f"  finding    {safe(f'{one.code}: {one.what}')}" for one in findings[:_MOST_FINDINGS]]
        if len(findings) > _MOST_FINDINGS:
            lines.append(f"             and {len(findings) - _MOST_FINDINGS} more")
        lines.append(f"  explained  livegraft inspect {item.mapped} {safe(item.file.successor)}")
    elif error.why:
        lines.append(f"  why        {safe(error.why)}")
    return lines + ([f"  next       {safe(error.next_step)}"] if error.next_step else [])
