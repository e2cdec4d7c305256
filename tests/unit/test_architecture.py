"""The rules of docs/architecture.md: who may import whom, which files there are, what starts quickly."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ROOMS = {"elfdiff": {"elfdiff"}, "trampolines": {"trampolines"}, "patcher": {"patcher", "elfdiff", "trampolines"}}
OURS = {*ROOMS, "fixtures", "tests"}
HEAVY = {"capstone", "keystone", "lief", "ptrace", "elftools"}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level package of every absolute import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:  # a relative one cannot leave its top package
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    foreign = {name for name in imports(ast.parse(path.read_text())) if name in OURS - ROOMS[room]}
    assert not foreign


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_never_prints_and_swallows_nothing(path: Path) -> None:
    room = path.relative_to(ROOT).parts
    tree = ast.parse(path.read_text())
    if room[0] != "patcher" or (room[1] != "commands" and room[1] != "cli.py"):
        prints = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "print"]
        assert not prints
    bare = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.type is None]
    assert not bare


def test_help_starts_without_the_heavy_packages() -> None:
    program = (
        "import sys\nfrom patcher.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', *sorted({HEAVY!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_every_file_that_the_architecture_lists_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    room = ""
    missing = []
    for line in text.splitlines():
        if line.startswith("### "):
            room = line[4:].strip()
        for name in re.findall(r"`(\w+\.py)`", line) if line.startswith("| `") else []:
            if room in ROOMS and not (ROOT / room / name).exists():
                missing.append(f"{room}/{name}")
    assert not missing
