"""Old and new code of a function as the lines of a listing, what is the same folded but for some context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from elfdiff.differences.codediff_x86_64 import Body, Change, texts
from elfdiff.explain import ExplainedFunction

MIN_FOLD = 2
"""Lines that are worth folding."""


@dataclass(frozen=True)
class Cell:
    """One instruction: its offset in its function, in bytes, and its text, references by name."""

    at: int
    text: str


@dataclass(frozen=True)
class Line:
    """One line of a listing. ``folded``: it stands for so many lines that are the same, and has no cells.

    A removed and an added instruction may share a line: then ``change`` is None, since neither became the other.
    """

    old: Cell | None
    new: Cell | None
    change: Change | None
    folded: int = 0

    @property
    def mark(self) -> str:
        """As sdiff(1) has it: ``<`` removed, ``>`` added, ``|`` changed; ``~``: it names something else."""
        if self.folded:
            return ""
        if self.change is None:
            return "|"
        marks = {Change.SAME: " ", Change.OPERAND: "|", Change.REFERENCE: "~", Change.REMOVED: "<", Change.ADDED: ">"}
        return marks[self.change]


def listing(function: ExplainedFunction, context: int | None) -> Iterator[Line]:
    """The lines of a function's code. ``context``: lines kept around each difference; None keeps all."""
    assert function.new is not None
    old = texts(function.old) if function.old else []
    new = texts(function.new)
    lines = list(_lines(function, old, new))
    yield from lines if context is None else _folded(lines, context)


def _lines(function: ExplainedFunction, old: list[str], new: list[str]) -> Iterator[Line]:
    removed: list[Cell] = []
    added: list[Cell] = []
    for row in function.rows:
        first, second = _cell(function.old, old, row.old), _cell(function.new, new, row.new)
        if row.change is Change.REMOVED and first is not None:
            removed.append(first)
        elif row.change is Change.ADDED and second is not None:
            added.append(second)
        else:
            yield from _gap(removed, added)
            removed, added = [], []
            yield Line(first, second, row.change)
    yield from _gap(removed, added)


def _cell(body: Body | None, texts_: list[str], index: int | None) -> Cell | None:
    return None if body is None or index is None else Cell(body.instructions[index].at, texts_[index])


def _gap(removed: list[Cell], added: list[Cell]) -> Iterator[Line]:
    """Instructions without counterpart, beside each other to save room."""
    for k in range(max(len(removed), len(added))):
        first = removed[k] if k < len(removed) else None
        second = added[k] if k < len(added) else None
        change = None if first and second else Change.REMOVED if first else Change.ADDED
        yield Line(first, second, change)


def _folded(lines: list[Line], context: int) -> Iterator[Line]:
    keep = [False] * len(lines)
    for index, line in enumerate(lines):
        if line.change is not Change.SAME:
            for k in range(max(0, index - context), min(len(lines), index + context + 1)):
                keep[k] = True
    index = 0
    while index < len(lines):
        if keep[index]:
            yield lines[index]
            index += 1
            continue
        end = index
        while end < len(lines) and not keep[end]:
            end += 1
        if end - index < MIN_FOLD:
            yield from lines[index:end]
        else:
            yield Line(None, None, None, folded=end - index)
        index = end


