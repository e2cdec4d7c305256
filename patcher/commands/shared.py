"""What the verbs that work on a process say in common: a patch, a build, a pause, as JSON and as text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from elfdiff.errors import LivegraftError, Refused

from . import plural

if TYPE_CHECKING:
    from elfdiff.patchobject import Build, PatchObject
    from patcher.records.record import Contents, RecordedFunction, State
    from patcher.transactions.transaction import Outcome


def error_json(error: LivegraftError) -> dict[str, Any]:
    """Return an error as JSON, with the findings where it is the differ that refuses."""
    said: dict[str, Any] = {"what": error.what, "why": error.why, "next": error.next_step}
    said["details"] = [*error.details, *getattr(error, "__notes__", ())]
    if isinstance(error, Refused) and error.findings:
        said["findings"] = [asdict(finding) for finding in error.findings]
    return said


def error_lines(error: LivegraftError) -> list[str]:
    """Return an error as lines of text: what, why, what to do next, details."""
    lines = [error.what]
    lines += [f"  {label}: {text}" for label, text in (("why", error.why), ("next", error.next_step)) if text]
    return lines + [f"  {line}" for line in (*error.details, *getattr(error, "__notes__", ()))]


def unreadable_line(count: int) -> str:
    """Return that some processes may not be looked at, and who may."""
    who = "the kernel keeps them from root, too" if os.geteuid() == 0 else "root sees all that are not kept from it"
    return f"{count} process{'' if count == 1 else 'es'} could not be looked at; {who}"


def state_name(state: State) -> str:
    """Return the stable name of a state, as JSON has it: both unfinished ones are ``interrupted``."""
    name = state.name.lower()
    return "interrupted" if name in ("applying", "reverting") else name


def build_json(build: Build, bias: int) -> dict[str, Any]:
    """Return a build as JSON; ``bias`` is its load bias."""
    return {"name": build.name, "build_id": build.build_id, "bias": bias}


def function_json(function: RecordedFunction) -> dict[str, Any]:
    """Return a patched function as JSON; absolute addresses, null where it is new."""
    return {
        "name": function.name,
        "old_start": function.old_start,
        "old_size": function.old_size,
        "new_start": function.new_start,
        "new_size": function.new_size,
        "entry_jump": function.entry_jump,
    }


def contents_json(contents: Contents) -> dict[str, Any]:
    """Return what a record says as JSON."""
    return {
        "old": build_json(contents.old, contents.old_bias),
        "new": build_json(contents.new, contents.new_bias),
        "applied_at": moment(contents.time),
        "tool_version": contents.tool_version,
        "lifted": list(contents.lifted),
        "kept": [asdict(item) for item in contents.kept],
        "when_idle": [asdict(item) for item in contents.idle],
        "functions": [function_json(item) for item in contents.functions],
    }


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """Return what a transaction did as JSON."""
    pause = outcome.pause
    return {
        "pid": outcome.pid,
        "process": outcome.process,
        "id": outcome.contents.patch,
        "state": state_name(outcome.state),
        "already": outcome.already,
        "pause_us": None if pause is None else round(pause.pause_ns / 1000),
        "pause_began_ns": None if pause is None else pause.began_ns,
        "tries": 0 if pause is None else pause.tries,
        "threads": None if pause is None else pause.threads,
        "realtime": None if pause is None else pause.realtime,
        "searched_bytes": None if pause is None else pause.searched,
        "waits": None if pause is None else asdict(pause.waits),
        "mapped_bytes": outcome.mapped_bytes,
        "others": [{"id": item.contents.patch, "was": state_name(item.state)} for item in outcome.others],
        **contents_json(outcome.contents),
    }


def set_json(outcome: Outcome, more: Callable[[Outcome], dict[str, Any]] = lambda _: {}) -> dict[str, Any]:
    """Return what a transaction did as JSON; ``set`` holds the same of each patch of a set, and nothing of one alone.

    ``more`` is said of each beside that.
    """
    members = [{**outcome_json(one), **more(one)} for one in outcome.members]
    return {**members[0], "set": members if len(members) > 1 else []}


def head_line(outcome: Outcome, text: str, *, colon: bool = False) -> str:
    """Return process, pid and ``text``, in which ``{}`` is what the patch, or the set, is called."""
    ids = " ".join(one.contents.patch[:12] for one in outcome.members)
    alone = ids if text.endswith(": {}") else f"patch {ids}"
    named = f"the set {ids}" if outcome.further else alone
    return f"{safe(outcome.process)} (pid {outcome.pid}){':' if colon else ''} {text.format(named)}"


def noted_lines(contents: Contents) -> list[str]:
    """Return what was unusual: what was kept live, waited for as well, or lifted; names come from the target."""
    return [*_kept_lines(contents), *_idle_lines(contents), *_lifted_lines(contents)]


def _kept_lines(contents: Contents) -> list[str]:
    names = dict.fromkeys(safe(item.name) for item in contents.kept)
    return [f"kept live  {', '.join(names)}: threads that are in it finish the old code"] if names else []


def _idle_lines(contents: Contents) -> list[str]:
    names = dict.fromkeys(safe(item.name) for item in contents.idle)
    return [f"when idle  {', '.join(names)}: unchanged, and waited for as well"] if names else []


def _lifted_lines(contents: Contents) -> list[str]:
    return [f"lifted     {', '.join(map(safe, contents.lifted))}, by --allow"] if contents.lifted else []


def patches_meant(outcome: Outcome, patches: Sequence[PatchObject]) -> list[PatchObject]:
    """Return the patch that an outcome is about; none where it is another one, which was put back."""
    return [patch for patch in patches if patch.id == outcome.contents.patch]


def findings_json(patches: Sequence[PatchObject]) -> list[dict[str, Any]]:
    """Return the findings of patches as JSON."""
    return [asdict(item) for patch in patches for item in patch.findings]


def warning_lines(patches: Sequence[PatchObject]) -> list[str]:
    """Return what patches warn of, a line each."""
    return [f"warning    {item.code}: {item.what}" for patch in patches for item in patch.findings if not item.lifted]


def moment(seconds: int) -> str:
    """Return a time since the epoch in ISO 8601, UTC."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError):
        return "unknown"  # the record is the target's to write


def builds_line(contents: Contents) -> str:
    """Return ``name old-id -> new-id``."""
    return f"{contents.old.name} {contents.old.build_id[:12]} -> {contents.new.build_id[:12]}"


def functions_line(contents: Contents) -> str:
    """Return how many functions are redirected, new, or moved along."""
    redirected = sum(item.entry_jump for item in contents.functions)
    new = sum(item.old_start is None for item in contents.functions)
    rest = len(contents.functions) - redirected - new
    parts = [f"{plural(redirected, 'function')} redirected"]
    parts += [f"{new} new"] if new else []
    parts += [f"{rest} moved along"] if rest else []
    return ", ".join(parts)


def pause_line(outcome: Outcome) -> str:
    """Return how long the process stood still."""
    pause = outcome.pause
    if pause is None:
        return "none"
    line = f"{pause.pause_ns / 1000:.0f} us for {plural(pause.threads, 'thread')}, at the {ordinal(pause.tries)} try"
    return line + (f", {pause.searched / 2**20:.1f} MiB searched for coroutines" if pause.searched else "")


def ordinal(number: int) -> str:
    """Return ``1st``, ``2nd``, ``11th``."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ending}"


def safe(text: str) -> str:
    """Return ``text`` with control characters escaped: names come from the process that is looked at."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def member_lines(outcome: Outcome, patches: Sequence[PatchObject], mapped: str, replaced: str) -> list[str]:
    """Return what there is to say of each patch of an outcome, and of its one pause; with the words for two lines."""
    pause = [f"  pause      {pause_line(outcome)}"]
    lines = pause if outcome.further else []
    for one in outcome.members:
        contents = one.contents
        lines = [
            *lines,
            f"  build      {safe(builds_line(contents))}",
            f"  functions  {functions_line(contents)}",
            *([] if outcome.further else pause),
            f"  {mapped:9}  {one.mapped_bytes // 1024} KiB",
            *(f"  {line}" for line in (*noted_lines(contents), *warning_lines(patches_meant(one, patches)))),
            *(f"  {replaced:9}  {item.short_id}" for item in one.others),
        ]
    return lines
