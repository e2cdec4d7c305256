"""An explanation as JSON (schema 1). Addresses are virtual addresses of the build that they belong to, in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from elfdiff.explain import ExplainedFunction, Explanation
from patcher.explanation.listing import Cell, Line, listing


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    """Everything but listings; ``id`` is null for a pair of builds that is no patch object."""
    return {
        "id": explanation.id or None,
        "tool_version": explanation.tool_version,
        "old": asdict(explanation.old),
        "new": asdict(explanation.new),
        "verdict": asdict(explanation.verdict),
        "explained": explanation.complete,
        "summary": explanation.summary,
        "sizes": asdict(explanation.sizes),
        "segments": [{"vaddr": s.vaddr, "size": s.size, "flags": s.flags} for s in explanation.segments],
        "functions": [_function(item) for item in explanation.functions],
        "imports": [asdict(item) for item in explanation.imports],
        "removed": [asdict(item) for item in explanation.removed],
        "old_codes": [asdict(item) for item in explanation.old_codes],
        "line_only": [asdict(item) for item in explanation.line_only],
        "findings": [asdict(item) for item in explanation.findings],
        "references": [asdict(item) for item in explanation.rewritten],
    }


def _function(item: ExplainedFunction) -> dict[str, Any]:
    return {
        **asdict(item.function),
        "evidence": [asdict(evidence) for evidence in item.evidence],
        "instructions": None if item.counts is None else asdict(item.counts),
        "references": {str(names): count for names, count in item.references.items()},
    }


def listings_json(functions: Sequence[ExplainedFunction]) -> list[dict[str, Any]]:
    """Old and new code of functions side by side, nothing folded."""
    return [
        {"name": item.function.name, "lines": [_line(line) for line in listing(item, None)]} for item in functions
    ]


def _line(line: Line) -> dict[str, Any]:
    return {"change": line.change or "replaced", "old": _cell(line.old), "new": _cell(line.new)}


def _cell(cell: Cell | None) -> dict[str, Any] | None:
    return None if cell is None else {"offset": cell.at, "text": cell.text}
