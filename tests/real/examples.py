"""The examples, each with builds of this machine in it, as a maintainer would run them; the cycles are fewer."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

from tests.conftest import ROOT, Livegraft

CYCLES = 3
_AS_OFTEN = re.compile(r"^cycles = 10\nhold = 0\.5 ", re.MULTILINE)


@contextmanager
def copied(name: str) -> Iterator[Path]:
    """A copy of the example's folder. Everybody may enter it, since its daemon may change to another user; not so the
    folders of pytest.
    """
    with TemporaryDirectory(prefix="livegraft-example-") as scratch:
        example = Path(scratch) / name
        shutil.copytree(ROOT / "examples" / name, example)
        Path(scratch).chmod(0o755)
        for file in example.glob("*.toml"):
            text, count = _AS_OFTEN.subn(f"cycles = {CYCLES}\nhold = 0.2 ", file.read_text())
            assert count == 1
            file.write_text(text)
        yield example


def passed(file: Path, livegraft: Livegraft) -> dict[str, Any]:
    """Rehearse; what the report says. All was served."""
    report = file.with_suffix(".xml")
    said = livegraft("rehearse", file, "--json", "--junit", report, seconds=1200).json
    assert said["verdict"] == "passed" and said["cycles"] == {"asked": CYCLES, "made": CYCLES}
    assert said["load"]["requests"] > 0 and said["load"]["failed"] == 0
    suite = ElementTree.parse(report).getroot()[0]
    assert suite.attrib["failures"] == "0" and suite.attrib["tests"] == str(len(said["steps"]))
    print(f"\n{row(said)}")
    return said


def row(said: dict[str, Any]) -> str:
    """The figures of docs/daemons.md."""
    counts, pauses = said["patch"]["summary"], said["pause_us"]["apply"]
    fewest, most = pauses["processes"].values()
    processes = fewest if fewest == most else f"{fewest} to {most}"
    figures = (
        f"{counts['functions']}, {counts['entry_jumps']} redirected", counts["references"], processes,
        f"{pauses['median']} median, {pauses['largest']} largest in {pauses['count']} applies",
        f"{said['load']['requests']}, {said['load']['failed']}", f"{said['load']['longest_ms']:g}",
    )  # fmt: skip
    return f"| {' | '.join(map(str, figures))} |"


def client(name: str) -> ModuleType:
    """The client of an example, to be used in a test."""
    path = ROOT / "examples" / name / "client.py"
    spec = importlib.util.spec_from_file_location(f"examples_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
