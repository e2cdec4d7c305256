"""What came of a rehearsal, as lines of text, as JSON (schema 1), and as JUnit XML for the reports of a CI.

JUnit XML has no standard; this is what Jenkins, GitLab and GitHub's readers have in common: ``testsuites`` with one
``testsuite``, a ``testcase`` for each step with ``classname``, ``name`` and ``time`` in seconds, and ``failure`` in it.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any
from xml.etree import ElementTree

from elfdiff.diff import summary
from elfdiff.errors import LivegraftError
from elfdiff.patchobject import PatchObject

from ..explanation.words import functions_line
from ..rehearsal.patching import Patched
from ..rehearsal.rehearsing import Figures, Outcome, Pauses, Step
from . import plural
from .shared import error_json, error_lines

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no place for, not even escaped (section 2.2)."""
_LABEL = 10


def text(outcome: Outcome) -> list[str]:
    """Return lines for people."""
    asked = outcome.asked
    lines = [f"{asked.name}: {outcome.verdict}, {outcome.cycles} of {plural(asked.cycles, 'cycle')}"]
    for patch in outcome.patches:
        of = f" ({patch.old.name})" if len(asked.pairs) > 1 else ""
        lines += [
            f"  {'build':{_LABEL}} {patch.old.build_id[:12]} -> {patch.new.build_id[:12]}{of}",
            f"  {'functions':{_LABEL}} {functions_line(summary(patch))}",
            *(f"  {'warning':{_LABEL}} {finding.code}: {finding.what}" for finding in patch.findings),
        ]
    for name in ("apply", "revert"):
        pauses = outcome.pauses(name)
        if pauses is not None:
            lines.append(f"  {name:{_LABEL}} {_pauses_line(pauses)}")
    answers = sum(step.name.startswith("probe ") and step.error is None for step in outcome.steps)
    lines.append(f"  {'probes':{_LABEL}} {len(asked.probes)}; {plural(answers, 'answer')} as expected")
    lines.append(f"  {'load':{_LABEL}} {_load_line(outcome)}")
    for step in outcome.steps:
        if step.error is not None:
            first, *rest = _failure_lines(step, step.error)
            lines += [f"  {'failed':{_LABEL}} {first}", *(f"  {'':{_LABEL}} {line}" for line in rest)]
    return lines


def _pauses_line(pauses: Pauses) -> str:
    fewest, most = min(pauses.processes), max(pauses.processes)
    several = f" in {fewest if fewest == most else f'{fewest} to {most}'} processes" if most > 1 else ""
    times = f"{pauses.median_us:.0f} us (median), {pauses.largest_us:.0f} us (largest)"
    return f"{pauses.count} times{several}; pause {times}"


def _load_line(outcome: Outcome) -> str:
    if outcome.asked.load is None:
        return "none"
    figures = outcome.figures
    said = (
        (figures.requests, "{} requests"),
        (figures.failed, "{} failed"),
        (figures.longest_ms, "the longest took {:g} ms"),
    )
    return ", ".join(form.format(value) for value, form in said if value is not None) or "no figures"


def place(step: Step) -> str:
    """Return where in the rehearsal a step was made."""
    return f"cycle {step.cycle}" if step.cycle else "around the cycles"


def _failure_lines(step: Step, error: LivegraftError) -> list[str]:
    where = f"{step.name}, in cycle {step.cycle}" if step.cycle else step.name
    what, *rest = error_lines(error)
    return [f"{where}: {what}", *rest]


def json(outcome: Outcome) -> dict[str, Any]:
    """Return it as JSON; ``error`` is there only where it failed, as every verb has it."""
    asked, patches = outcome.asked, [_patch_json(patch) for patch in outcome.patches]
    body: dict[str, Any] = {
        "file": str(asked.file),
        "verdict": outcome.verdict,
        "patch": patches[0] if patches else None,
        "patches": patches,
        "cycles": {"asked": asked.cycles, "made": outcome.cycles},
        "pause_us": {name: _pauses_json(outcome.pauses(name)) for name in ("apply", "revert")},
        "load": None if asked.load is None else asdict(outcome.figures),
        "seconds": round(outcome.seconds, 3),
        "steps": [_step_json(step) for step in outcome.steps],
    }
    if outcome.error is not None:
        body["error"] = error_json(outcome.error)
    return body


def _patch_json(patch: PatchObject) -> dict[str, Any]:
    return {
        "id": patch.id,
        "old": asdict(patch.old),
        "new": asdict(patch.new),
        "summary": summary(patch),
        "findings": [asdict(finding) for finding in patch.findings],
    }


def _pauses_json(pauses: Pauses | None) -> dict[str, Any] | None:
    if pauses is None:
        return None
    return {
        "count": pauses.count,
        "median": round(pauses.median_us),
        "largest": round(pauses.largest_us),
        "processes": {"fewest": min(pauses.processes), "most": max(pauses.processes)},
    }


def _step_json(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "cycle": step.cycle,
        "seconds": round(step.seconds, 3),
        "pause_us": round(max(step.pauses_us)) if step.pauses_us else None,
        "processes": [_process_json(item) for item in step.processes],
        "error": None if step.error is None else error_json(step.error),
    }


def _process_json(item: Patched) -> dict[str, Any]:
    pause = None if item.pause_us is None else round(item.pause_us)
    return {"pid": item.pid, "process": item.process, "pause_us": pause}


def junit(outcome: Outcome) -> bytes:
    """Return it as JUnit XML, a test case for each step."""
    properties = _properties(outcome)
    return _document(f"livegraft rehearse {outcome.asked.name}", outcome.steps, outcome.seconds, properties)


def junit_of_bad_file(name: str, error: LivegraftError) -> bytes:
    """Return JUnit XML for a rehearsal that could not even be read: one test case, which failed."""
    return _document(f"livegraft rehearse {name}", (Step("file", 0, 0.0, error),), 0.0, {})


def _properties(outcome: Outcome) -> dict[str, object]:
    found: dict[str, object] = {"cycles": outcome.cycles}
    for name in ("apply", "revert"):
        pauses = outcome.pauses(name)
        if pauses is not None:
            found[f"{name}.pause_us.median"] = round(pauses.median_us)
            found[f"{name}.pause_us.largest"] = round(pauses.largest_us)
    figures: Figures = outcome.figures
    found |= {f"load.{name}": value for name, value in asdict(figures).items() if value is not None}
    return found


def _document(name: str, steps: tuple[Step, ...], seconds: float, properties: dict[str, object]) -> bytes:
    counts = {
        "tests": str(len(steps)),
        "failures": str(sum(step.error is not None for step in steps)),
        "errors": "0",
        "skipped": "0",
        "time": f"{seconds:.3f}",
    }
    root = ElementTree.Element("testsuites", {"name": _xml(name), **counts})
    began = datetime.now(UTC) - timedelta(seconds=seconds)
    when = began.strftime("%Y-%m-%dT%H:%M:%S")
    suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(name), **counts, "timestamp": when})
    if properties:
        held = ElementTree.SubElement(suite, "properties")
        for key, value in properties.items():
            ElementTree.SubElement(held, "property", {"name": key, "value": str(value)})
    for step in steps:
        _case(suite, step)
    ElementTree.indent(root)
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode").encode() + b"\n"


def _case(suite: ElementTree.Element, step: Step) -> None:
    attributes = {"classname": f"rehearsal.{place(step)}", "name": _xml(step.name), "time": f"{step.seconds:.3f}"}
    case = ElementTree.SubElement(suite, "testcase", attributes)
    if step.error is not None:
        message = _xml(f"{step.error.what}: {step.error.why}")
        failure = ElementTree.SubElement(case, "failure", {"message": message, "type": step.error.code})
        failure.text = _xml("\n".join(error_lines(step.error)))
    elif step.processes:
        ElementTree.SubElement(case, "system-out").text = _xml("\n".join(map(_process_line, step.processes)))


def _process_line(item: Patched) -> str:
    pause = "done already" if item.pause_us is None else f"pause {item.pause_us:.0f} us"
    return f"{item.process}, pid {item.pid}: {pause}"


def _xml(text: str) -> str:
    """Return text that XML can hold; ElementTree escapes the rest."""
    return _NO_XML.sub(lambda found: repr(found[0])[1:-1], text)
