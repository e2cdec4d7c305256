"""An explanation as lines of text for a terminal or a file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from elfdiff.differences.codediff_x86_64 import Change
from elfdiff.explain import ExplainedFunction, Explanation
from elfdiff.patches.quoting import printable
from elfdiff.patchobject import Finding
from patcher.explanation.listing import Cell, Line, listing
from patcher.explanation.words import (
    adds_line,
    functions_line,
    place_line,
    plural,
    reference_counts,
    references_line,
    sentences,
)

SIDE_BY_SIDE = 100
"""Columns below which a listing has old and new below each other."""
MAX_COLUMN = 90
"""Columns of one side; wider only spreads the two sides apart."""
LEGEND = "< removed   > added   | changed   ~ names something else"


@dataclass(frozen=True)
class Style:
    """How text is set: columns of the terminal, and whether it takes colours."""

    width: int
    colour: bool

    def paint(self, text: str, *codes: int) -> str:
        """The text with a colour or weight (ECMA-48, SGR) where colours are taken."""
        if not self.colour or not codes:
            return text
        return f"\x1b[{';'.join(map(str, codes))}m{text}\x1b[0m"


BOLD, DIM, RED, GREEN, YELLOW, CYAN = 1, 2, 31, 32, 33, 36


def overview(explanation: Explanation, style: Style) -> Iterator[str]:
    """Everything but listings of code."""
    yield from _head(explanation, style)
    findings = [line for finding in explanation.findings for line in _finding(finding, style)]
    if explanation.verdict.code:
        yield from findings  # they are what is asked for
    for item in explanation.functions:
        yield from _function(item, style)
    if not explanation.complete:
        yield "    (the patch object carries no evidence: nothing more is known of the reasons)"
    yield from _rest(explanation, style)
    if not explanation.verdict.code:
        yield from findings


def _head(explanation: Explanation, style: Style) -> Iterator[str]:
    old, new = explanation.old, explanation.new
    title = f"patch {explanation.id}" if explanation.id else f"{old.name} -> {new.name}, not written to a patch object"
    yield style.paint(printable(title), BOLD)
    yield f"  made by    livegraft {printable(explanation.tool_version)}"
    yield printable(f"  old build  {old.name} {old.build_id}")
    yield printable(f"  new build  {new.name} {new.build_id}")
    verdict = explanation.verdict
    if not explanation.id:
        said = "it can be patched" if verdict.code == 0 else f"{verdict.name}: {verdict.what}"
        yield printable(f"  verdict    {said}")
        if verdict.why and not explanation.findings:
            yield printable(f"             {verdict.why}")
    yield f"  functions  {functions_line(explanation.summary)}"


def _function(item: ExplainedFunction, style: Style) -> Iterator[str]:
    function = item.function
    yield f"    {style.paint(printable(function.name), CYAN)}  {function.reason}  {place_line(item)}"
    for evidence in item.evidence:
        for sentence in sentences(evidence, item.counts):
            yield f"      {sentence}"


def _rest(explanation: Explanation, style: Style) -> Iterator[str]:
    counts, sizes = explanation.summary, explanation.sizes
    yield f"  references {references_line(counts)}"
    named = reference_counts(explanation.functions)
    if named:
        yield f"             the new code names {named}"
    yield f"  adds       {adds_line(explanation)}"
    yield f"  code       {sizes.old_code} bytes of old code, {sizes.new_code} bytes of new code"
    yield f"  checked    {plural(explanation.checked, 'range')} of the old build before anything is written"
    yield f"  left out   {plural(len(explanation.line_only), 'function')} that differ in line numbers only"
    yield from _wrapped([item.name for item in explanation.line_only], style)
    if explanation.removed:
        yield f"  removed    {plural(len(explanation.removed), 'function')}, to which nothing leads any more"
        yield from _wrapped([item.name for item in explanation.removed], style)
    yield from _old_codes(explanation, style)


def _old_codes(explanation: Explanation, style: Style) -> Iterator[str]:
    may = [item.name for item in explanation.old_codes if not item.why_not]
    if may:
        yield f"  keep-live  {plural(len(may), 'function')} may finish the old code beside the new code of the others"
        yield from _wrapped(may, style)
    if len(may) < len(explanation.old_codes):
        yield f"             {len(explanation.old_codes) - len(may)} may not (--json says why)"


def _wrapped(names: Sequence[str], style: Style) -> list[str]:
    """Names in lines no longer than the terminal."""
    indent = " " * 13
    wrapper = textwrap.TextWrapper(max(style.width, 40), break_long_words=False, break_on_hyphens=False)
    wrapper.initial_indent = wrapper.subsequent_indent = indent
    return wrapper.wrap(", ".join(map(printable, names)))


def _finding(finding: Finding, style: Style) -> Iterator[str]:
    first, *rest = finding.lines()
    colour = RED if finding.severity == "refuse" else YELLOW
    yield f"  {style.paint(f'{finding.severity:<10}', colour)} {printable(first)}"
    yield from (f"             {printable(line.strip())}" for line in rest)


# -- listings -------------------------------------------------------------------------------------------------------


def listings(functions: Sequence[ExplainedFunction], context: int | None, style: Style) -> Iterator[str]:
    """Old and new code of functions, side by side where there is room for it."""
    yield style.paint(LEGEND if style.width >= SIDE_BY_SIDE else "- old   + new", DIM)
    for item in functions:
        yield ""
        yield style.paint(f"{printable(item.function.name)}  {place_line(item)}", BOLD)
        lines = list(listing(item, context))
        if item.old is not None and all(line.folded for line in lines):
            yield "  (the same code in both builds)"
            continue
        yield from _side_by_side(lines, style) if style.width >= SIDE_BY_SIDE else _unified(lines, style)


_COLOURS = {"<": RED, ">": GREEN, "|": YELLOW, "~": YELLOW}


def _side_by_side(lines: list[Line], style: Style) -> Iterator[str]:
    digits = max((len(f"{cell.at:x}") for line in lines for cell in (line.old, line.new) if cell), default=1)
    column = min(MAX_COLUMN, (style.width - 3) // 2)
    for line in lines:
        if line.folded:
            yield style.paint(_fold(line), DIM)
            continue
        left, right = _set(line.old, digits, column), _set(line.new, digits, column)
        text = f"{left:<{column}} {line.mark} {right}".rstrip()
        colour = _COLOURS.get(line.mark)
        yield text if colour is None else style.paint(text, colour)


def _unified(lines: list[Line], style: Style) -> Iterator[str]:
    """Like ``diff -u``: what was removed in front of what was added."""
    digits = max((len(f"{cell.at:x}") for line in lines for cell in (line.old, line.new) if cell), default=1)
    pending: list[str] = []
    for line in lines:
        if line.folded or line.change is Change.SAME:
            yield from pending
            pending = []
            text = _fold(line) if line.folded else f"  {_set(line.new, digits, style.width - 2)}"
            yield style.paint(text, DIM) if line.folded else text
            continue
        if line.old is not None:
            yield style.paint(f"- {_set(line.old, digits, style.width - 2)}", RED)
        if line.new is not None:
            pending.append(style.paint(f"+ {_set(line.new, digits, style.width - 2)}", GREEN))
    yield from pending


def _fold(line: Line) -> str:
    return f"  ... {plural(line.folded, 'instruction')} the same"


def _set(cell: Cell | None, digits: int, width: int) -> str:
    """Offset and text, cut to the column; what is cut ends in an ellipsis."""
    if cell is None:
        return ""
    text = f"{cell.at:{digits}x}  {printable(cell.text)}"
    return text if len(text) <= width else f"{text[: max(1, width - 1)]}…"
