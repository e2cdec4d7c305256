"""The list of codes is what the rules use and what the documentation tells."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from elfdiff.findingcodes import CODES, LIFTABLE

ROOT = Path(__file__).parent.parent.parent


def used() -> set[str]:
    """The first argument of every ``Finding(...)`` in the rules."""
    found = set()
    for path in (ROOT / "elfdiff" / "findings").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding":
                assert node.args and isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: no plain code"
                found.add(node.args[0].value)
    return found


def test_every_code_is_listed_and_every_listed_one_is_used() -> None:
    assert used() == set(CODES)


def test_the_documentation_lists_them_with_what_may_be_lifted() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (yes|no) \|", (ROOT / "docs" / "findings.md").read_text(), re.MULTILINE)
    assert dict(rows) == {code: "yes" if liftable else "no" for code, (liftable, _) in CODES.items()}
    assert {code for code, lifted in rows if lifted == "yes"} == set(LIFTABLE)
