"""An explanation as one page for a browser: nothing outside of it is referred to, and no script is needed to read it.

Names and strings come from binaries that nobody vouches for. Every text goes through ``_text``; and the page's own
content security policy lets only its one style sheet and its one script run, by their digests (CSP level 3, section
2.3.1), so that markup that slipped in could neither run nor load anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterator
from pathlib import Path

from elfdiff.explain import ExplainedFunction, Explanation
from elfdiff.patches.patchfile import require_output, write_whole
from elfdiff.patches.quoting import printable
from elfdiff.patchobject import Finding, Severity
from patcher.explanation.listing import Cell, Line, listing
from patcher.explanation.page import SCRIPT, STYLE
from patcher.explanation.words import (
    adds_line,
    functions_line,
    place_line,
    reference_counts,
    references_line,
    sentences,
)

MAX_LINES = 30_000
"""Lines of code on one page; browsers take half a minute for ten times that."""
MAX_OPEN = 40
"""Lines of code that are shown at once; more are folded away behind a heading."""
_CLASSES = {" ": "same", "<": "removed", ">": "added", "|": "changed", "~": "renamed"}
_SPOKEN = {" ": "", "<": "removed", ">": "added", "|": "changed", "~": "names something else"}


def page(explanation: Explanation, context: int, command: str) -> str:
    """The whole page. ``context``: same instructions around differences; ``command``: what shows it in a terminal."""
    title = f"{explanation.old.name}: what the patch changes"
    body = "\n".join(
        [
            *_header(explanation, command),
            "<main>",
            *_findings(explanation),
            *_overview(explanation),
            *_functions(explanation, context),
            *_left_out(explanation),
            "</main>",
        ]
    )
    policy = f"default-src 'none'; style-src '{_digest(STYLE)}'; script-src '{_digest(SCRIPT)}'; base-uri 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def write_page(text: str, path: Path) -> None:
    """Write the page whole or not at all. Raises BadInput."""
    require_output(path, (), "page")  # a device would be replaced, too
    write_whole(path, text.encode(), "page", "name a file in a folder that exists and that you may write to")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _text(text: str) -> str:
    return html.escape(printable(text))


def _code(text: str) -> str:
    return f"<code>{_text(text)}</code>"


def _header(explanation: Explanation, command: str) -> Iterator[str]:
    verdict = explanation.verdict
    if explanation.id:
        said = "can be applied to a process that runs the old build"
    elif verdict.code == 0:
        said = "these builds can be patched"
    else:
        said = f"{verdict.name}: {verdict.what}"
    kind = "good" if verdict.code == 0 else "bad" if verdict.code == 4 else "plain"
    yield f"<header>\n<h1>{_text(explanation.old.name)}</h1>"
    yield f'<p class="verdict {kind}">{_text(said)}</p>'
    if verdict.why and not explanation.findings:
        yield f"<p>{_text(verdict.why)}</p>"
    yield "<dl>"
    if explanation.id:
        yield f"<dt>Patch</dt><dd>{_code(explanation.id)}</dd>"
    yield f"<dt>Old build</dt><dd>{_code(explanation.old.build_id)}</dd>"
    yield f"<dt>New build</dt><dd>{_code(explanation.new.build_id)}</dd>"
    yield f"<dt>Shown by</dt><dd>{_code(command)}, livegraft {_text(explanation.tool_version)}</dd>"
    yield "</dl>\n</header>"


def _findings(explanation: Explanation) -> Iterator[str]:
    if not explanation.findings:
        return
    yield f'<section aria-labelledby="findings">\n<h2 id="findings">Findings ({len(explanation.findings)})</h2>'
    for finding in explanation.findings:
        yield from _finding(finding)
    yield "</section>"


def _finding(finding: Finding) -> Iterator[str]:
    refuse = finding.severity is Severity.REFUSE
    kind = "refuses" if refuse else "lifted" if finding.lifted else "warns"
    yield f'<article class="finding {kind}"><h3><span class="tag">{kind}</span> {_code(finding.code)}</h3>'
    yield f"<p><strong>{_text(finding.what)}</strong></p><p>{_text(finding.why)}.</p>"
    if finding.where:
        places = "".join(f"<li>{_code(place)}</li>" for place in finding.where)
        yield f'<ul class="names">{places}</ul>'
    yield f"<p>What would lift it: {_text(finding.lift)}.</p></article>"


def _overview(explanation: Explanation) -> Iterator[str]:
    counts, sizes = explanation.summary, explanation.sizes
    rows = [
        ("Functions", functions_line(counts)),
        ("Code", f"{sizes.old_code} bytes of old code, {sizes.new_code} bytes of new code"),
        ("Adds to the process", adds_line(explanation)),
        ("References", references_line(counts)),
        ("The new code names", reference_counts(explanation.functions) or "nothing"),
        ("Checked before writing", f"{explanation.checked} ranges of the old build"),
        ("Left out", f"{len(explanation.line_only)} functions that differ in line numbers only"),
    ]
    yield '<section aria-labelledby="overview">\n<h2 id="overview">Overview</h2>\n<dl>'
    yield from (f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in rows)
    yield "</dl>\n</section>"


def _functions(explanation: Explanation, context: int) -> Iterator[str]:
    if not explanation.functions:
        return
    yield f'<section aria-labelledby="functions">\n<h2 id="functions">Functions ({len(explanation.functions)})</h2>'
    if not explanation.complete:
        yield "<p>The patch object carries no evidence: nothing more is known of the reasons.</p>"
    yield '<div class="scroll" tabindex="0" role="region" aria-label="Table of functions">\n<table class="index">'
    yield "<caption>Sizes in bytes; a redirected function's old entry jumps to the new code.</caption>"
    heads = ("Function", "Why", "Old", "New", "Redirected")
    yield "<thead><tr>" + "".join(f'<th scope="col">{head}</th>' for head in heads) + "</tr></thead>\n<tbody>"
    for number, item in enumerate(explanation.functions):
        function = item.function
        old = "new" if function.old_size is None else str(function.old_size)
        yield (
            f'<tr><th scope="row"><a href="#f{number}">{_code(function.name)}</a></th><td>{function.reason}</td>'
            f"<td>{old}</td><td>{function.new_size}</td><td>{'yes' if function.entry_jump else 'no'}</td></tr>"
        )
    yield "</tbody></table></div>"
    room = MAX_LINES
    for number, item in enumerate(explanation.functions):
        lines = list(listing(item, context)) if room > 0 and item.new is not None else None
        room -= len(lines or ())
        yield from _function(number, item, lines)
    yield "</section>"


def _function(number: int, item: ExplainedFunction, lines: list[Line] | None) -> Iterator[str]:
    function = item.function
    yield f'<article class="function" id="f{number}"><h3>{_code(function.name)}</h3>'
    yield f'<p class="place"><span class="tag">{function.reason}</span> {_text(place_line(item))}</p>'
    said = [sentence for evidence in item.evidence for sentence in sentences(evidence, item.counts)]
    if said:
        yield "<ul>" + "".join(f"<li>{_text(sentence)}</li>" for sentence in said) + "</ul>"
    if lines is None:
        if item.new is not None:
            yield "<p>Its code is not shown here: the page is long enough.</p>"
    elif all(line.folded for line in lines):
        yield "<p>The code is the same in both builds.</p>"
    else:
        yield from _code_table(function.name, lines)
    yield "</article>"


def _code_table(name: str, lines: list[Line]) -> Iterator[str]:
    yield f"<details{' open' if len(lines) <= MAX_OPEN else ''}><summary>Old and new code</summary>"
    yield f'<table class="code"><caption class="spoken">Code of {_text(name)}</caption>'
    yield '<thead><tr><th scope="col">Old</th><th scope="col"><span class="spoken">Change</span></th>'
    yield '<th scope="col">New</th></tr></thead>\n<tbody>'
    yield from map(_line, lines)
    yield "</tbody></table></details>"


def _line(line: Line) -> str:
    if line.folded:
        noun = "instruction" if line.folded == 1 else "instructions"
        return f'<tr class="fold"><td colspan="3">{line.folded} {noun} the same</td></tr>'
    mark = f'<span aria-hidden="true">{html.escape(line.mark)}</span><span class="spoken">{_SPOKEN[line.mark]}</span>'
    return (
        f'<tr class="{_CLASSES[line.mark]}"><td class="old">{_cell(line.old)}</td>'
        f'<td class="mark">{mark}</td><td class="new">{_cell(line.new)}</td></tr>'
    )


def _cell(cell: Cell | None) -> str:
    return "" if cell is None else f"<span>{cell.at:x}</span> {_text(cell.text)}"


def _left_out(explanation: Explanation) -> Iterator[str]:
    lists = (
        ("left-out", "Left out: they differ in line numbers only", [item.name for item in explanation.line_only]),
        ("removed", "Removed: they stay in memory, and nothing leads to them", [i.name for i in explanation.removed]),
        ("imports", "Imports that the old build does not have", [i.name for i in explanation.imports]),
    )
    for key, head, names in lists:
        if names:
            yield f'<section aria-labelledby="{key}">\n<h2 id="{key}">{head}</h2>\n<ul class="names">'
            yield from (f"<li>{_code(name)}</li>" for name in names)
            yield "</ul>\n</section>"
