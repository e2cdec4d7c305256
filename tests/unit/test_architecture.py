"""The rules of docs/architecture.md: who may import whom, which files there are, what starts quickly."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from patcher.cli import VERBS

ROOT = Path(__file__).parent.parent.parent
ROOMS = {"elfdiff": {"elfdiff"}, "trampolines": {"trampolines"}, "patcher": {"patcher", "elfdiff", "trampolines"}}
OURS = {*ROOMS, "fixtures", "tests"}
HEAVY = {"capstone", "keystone", "lief", "ptrace", "elftools"}
FOLDERS = {  # of a room, from the ground up: what each may import beside what is free to all
    "elfdiff": {
        "unwinding": "",
        "images": "",
        "dwarf": "images",
        "patches": "images",
        "decoding": "unwinding images",
        "correspondence": "images decoding",
        "differences": "unwinding images dwarf patches decoding correspondence",
        "building": "unwinding images dwarf patches decoding correspondence differences",
        "findings": "images decoding differences building",
    },
    "patcher": {
        "process": "",
        "threads": "process",
        "stacks": "process threads",
        "records": "process stacks",
        "planning": "process stacks records",
        "remote": "process threads planning",
        "targets": "process threads records planning remote",
        "pausing": "process threads stacks records planning targets",
        "transactions": "process threads records planning remote targets pausing",
        "upgrade": "process records targets pausing transactions",
        "rehearsal": "targets pausing transactions",
        "explanation": "",
        "commands": "records targets pausing transactions upgrade rehearsal explanation",
    },
}
FREE = {  # in no folder: they import no folder, and all may import them
    "elfdiff": {"errors", "findingcodes", "patchobject"},
    "patcher": {"closing", "interruption", "seam"},
}
ABOVE = {  # in no folder: they import any, and no folder imports them
    "elfdiff": {"cache", "diff", "explain"},
    "patcher": {"cli"},
}
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


def modules_named(path: Path) -> Iterator[str]:
    """What the imports of a file of ours name, with all packages around it: of ``from .a import b`` both a and b."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def place(path: Path) -> tuple[str, str]:
    """The room of a file, and the folder in it or the module that stands in none."""
    room, within, *_ = path.relative_to(ROOT).with_suffix("").parts
    return room, within


BOUND = [path for path in FILES for room, within in [place(path)] if room in FOLDERS and within not in ABOVE[room]]


@pytest.mark.parametrize("path", BOUND, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_folder_imports_only_what_it_may(path: Path) -> None:
    room, within = place(path)
    allowed = {*FREE[room], within, *FOLDERS[room].get(within, "").split()}
    ours = {name for name in modules_named(path) if name.startswith(f"{room}.")}
    assert not {name for name in ours if name.split(".")[1] not in allowed}


@pytest.mark.parametrize("room", FOLDERS)
def test_every_folder_stands_above_what_it_imports(room: str) -> None:
    below: set[str] = set()
    for folder, allowed in FOLDERS[room].items():
        assert set(allowed.split()) <= below, folder
        below.add(folder)
    assert {path.parent.name for path in (ROOT / room).glob("*/__init__.py")} == below
    text = (ROOT / "docs" / "architecture.md").read_text().split(f"\n### {room}\n")[1].split("\n### ")[0]
    assert re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE) == list(FOLDERS[room])


def test_every_folder_is_installed() -> None:
    """Which an editable installation, as ours, does not show."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(packages) == sorted({".".join(path.relative_to(ROOT).parts[:-1]) for path in FILES})


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


def test_the_architecture_lists_every_file() -> None:
    """But for the verbs, which ``livegraft --help`` lists."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    room = ""
    listed = set()
    for line in text.splitlines():
        if line.startswith("### "):
            room = line[4:].strip()
        elif room in ROOMS:
            listed |= {ROOT / room / name for name in re.findall(r"^\| `([\w/]+\.py)` \|", line)}
    verbs = {ROOT / "patcher" / "commands" / f"{verb}.py" for verb in VERBS}
    assert listed == {path for path in FILES if path.name != "__init__.py"} - verbs
