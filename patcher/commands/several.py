"""What a verb says that worked on several processes: a result for each, as JSON and as text, and the exit status."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from elfdiff.errors import EXIT_NAMES, LivegraftError

from . import Report, plural
from .shared import error_json, error_lines, head_line, safe

if TYPE_CHECKING:
    from patcher.pausing.conditions import Conditions
    from patcher.targets.selection import Listed, Pin, Selection
    from patcher.transactions.group import Group, Result
    from patcher.transactions.transaction import Outcome

ToJson = Callable[["Outcome"], dict[str, Any]]
ToText = Callable[["Outcome"], Sequence[str]]


def one_or_each(
    pid: int,
    selection: Selection | None,
    act: Callable[[int, Pin | None], Outcome],
    to_json: ToJson,
    to_text: ToText,
    *,
    again: bool = True,
    undo: Conditions | None = None,
) -> Report:
    """Do ``act`` to process ``pid``, or to each of ``selection`` where it is given; return what is to be said of it.

    ``again`` and ``undo`` are those of ``carry_out_each``, and raises as it does, or as ``act``.
    """
    from ..transactions.group import carry_out_each

    if selection is None:
        outcome = act(pid, None)
        return Report(to_json(outcome), to_text(outcome))
    group = carry_out_each(selection, lambda pin: act(pin.pid, pin), again=again, undo=undo)
    return _group_report(group, selection, to_json, to_text, undo is not None)


def _group_report(group: Group, selection: Selection, to_json: ToJson, to_text: ToText, atomic: bool) -> Report:
    """Return what is to be said of all processes; ``to_json`` and ``to_text`` say it of one that was done."""
    code = group.exit_code
    body = {
        "selection": selection_json(selection),
        "atomic": atomic,
        "scans": group.scans,
        "settled": group.settled,
        "processes": [_json(item, to_json) for item in group.results],
    }
    text = [line for item in group.results for line in process_lines(item, to_text)]
    if code == 0:
        return Report(body, [*text, counts_line(group)])
    error = summary_error(group)
    body["error"] = error_json(error)
    first, *others = error_lines(error)
    return Report(body, text, code, [f"livegraft: {first}", *others])


def selection_json(selection: Selection) -> dict[str, Any]:
    """Return which processes were asked for, as JSON."""
    return {"by": selection.by.value, "value": selection.value, "all": selection.several}


def exit_json(code: int) -> dict[str, Any]:
    """Return an exit status as JSON."""
    return {"code": code, "name": EXIT_NAMES[code]}


def inherited(process: Listed, outcome: Outcome) -> bool:
    """Whether a process has the patch from the process that forked it."""
    return outcome.already and outcome.contents.started != process.start_time


def _json(result: Result, to_json: ToJson) -> dict[str, Any]:
    process, outcome, error = result.process, result.outcome, result.error
    own = to_json(outcome) if outcome is not None else {"pid": process.pid, "process": process.name}
    return {
        **own,
        "result": result.end.value,
        "exit": exit_json(result_code(result)),
        "late": result.late,
        "inherited": outcome is not None and inherited(process, outcome),
        **({"error": error_json(error)} if error is not None else {}),
    }


def result_code(result: Result) -> int:
    """Return the exit status that the command would have had for this process alone."""
    from ..transactions.group import End

    if result.error is not None:
        return result.error.exit_code
    return LivegraftError.exit_code if result.end in (End.UNTRIED, End.TAKEN_BACK) else 0


def process_lines(result: Result, to_text: ToText) -> list[str]:
    """Return what became of one process, for people; ``to_text`` says it of one that was done."""
    from ..transactions.group import End

    outcome = result.outcome
    head = f"{safe(result.process.name)} (pid {result.process.pid})"
    if result.end is End.DONE and outcome is not None:
        lines = list(to_text(outcome))
        if inherited(result.process, outcome):
            lines.append("  inherited  from the process that forked it")
        return lines
    if result.end is End.TAKEN_BACK and outcome is not None:
        return [head_line(outcome, f"rolled back; {{}} is {outcome.state.name.lower()} now", colon=True)]
    said = {
        End.EXITED: "has exited",
        End.UNTRIED: "was not touched",
        End.PASSED: "is passed over",
        End.STUCK: "could not be rolled back",
    }.get(result.end, "was not done")
    if result.error is None:
        return [f"{head} {said}"]
    if result.end is End.PASSED:
        return [f"{head} {said}: {safe(result.error.what)}"]
    name = EXIT_NAMES[result.error.exit_code]
    return [f"{head} {said}: {name}", *(f"  {safe(line)}" for line in error_lines(result.error))]


def counts_line(group: Group) -> str:
    """Return how many processes came to what."""
    from ..transactions.group import End

    words = {
        End.DONE: "done",
        End.FAILED: "failed",
        End.TAKEN_BACK: "rolled back",
        End.STUCK: "could not be rolled back",
        End.UNTRIED: "not touched",
        End.PASSED: "passed over",
        End.EXITED: "exited",
    }
    counts = [f"{len(group.having(end))} {word}" for end, word in words.items() if group.having(end)]
    processes = "1 process" if len(group.results) == 1 else f"{len(group.results)} processes"
    return f"{processes}: {', '.join(counts)}"


def summary_error(group: Group) -> LivegraftError:
    """Return what went wrong with all of them, in a few words; each one's own error stands with it."""
    from ..transactions.group import End

    why, next_step = "", "see what each says; run the command again for those that were not done"
    failed = group.having(End.FAILED)
    if group.interrupted is not None:
        why = group.interrupted.why.partition(" came ")[0] + " came"
    elif failed:
        why = f"{plural(len(failed), 'failure')}, the first: {failed[0].error.what}" if failed[0].error else ""
    elif not group.settled:
        why = f"after {group.scans} lists there were still new processes that had to be changed"
        next_step = "patch what makes them first, or stop it from making them for a moment"
    else:
        first = next((item.error for item in group.results if item.error is not None), None)
        why = first.what if first else "all of them have exited"
        next_step = first.next_step if first else "ps -eo pid,comm,exe lists what runs"
    if group.took_back is False:
        why += "; and there was no end to rolling back, since new processes went on appearing"
    return LivegraftError(counts_line(group), why=why, next_step=next_step)
