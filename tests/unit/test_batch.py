"""The C library: whether it is used, and that it was built from the text that stands beside it."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from patcher import seam
from patcher.threads import batch

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def library() -> batch.Batch:
    found = batch.active()
    if found is None:
        pytest.skip(f"the pause is made in {batch.description()}")
    return found


def test_the_library_is_not_older_than_its_text(library: batch.Batch) -> None:
    """If this fails: build it again, as ``make test`` does."""
    text = (ROOT / "patcher" / "threads" / "batch.c").read_bytes()
    assert library.source == hashlib.sha256(text).hexdigest()[:16]


def test_who_observes_the_seam_sees_single_operations(library: batch.Batch) -> None:
    with seam.observe(lambda name, subject: 0):
        assert batch.active() is None
    assert batch.active() is library


def test_without_it_python_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVEGRAFT_PURE", "1")
    assert batch.active() is None
    assert batch.description() == "Python (LIVEGRAFT_PURE is set)"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ("batch.ABI = -1", "stale: built for version 4, wanted is -1"),
        ("batch.find_spec = lambda name: None", "not built"),
        ("batch.find_spec = lambda name: type('Spec', (), {'origin': '/dev/null'})", "cannot be opened"),
    ],
)
def test_a_library_that_does_not_fit_is_not_used_and_it_is_said_why(
    library: batch.Batch, spoil: str, why: str
) -> None:
    script = f"from patcher.threads import batch; {spoil}; print(batch.active(), batch.description())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("None Python (the C library is ")
    assert why in done.stdout


def true_in_c(checks: list[str], folder: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    source = folder / "checks.c"
    asserts = "".join(f'_Static_assert({check}, "");\n' for check in checks)
    source.write_text(f'#include "{ROOT / "patcher" / "threads" / "batch.c"}"\n#include <stddef.h>\n{asserts}')
    done = subprocess.run(["cc", "-fsyntax-only", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "structure"),
    [("filter", batch.Filter), ("stacks", batch.Stacks), ("range", batch.Range), ("pause", batch.WholePause)],
)
def test_structures_are_laid_out_as_in_c(name: str, structure: type[ctypes.Structure], tmp_path: Path) -> None:
    checks = [f"sizeof(struct {name}) == {ctypes.sizeof(structure)}"]
    for field, *_ in structure._fields_:
        place = getattr(structure, field)
        checks.append(f"offsetof(struct {name}, {field}) == {place.offset}")
        checks.append(f"sizeof((struct {name}){{0}}.{field}) == {place.size}")
    true_in_c(checks, tmp_path)


def test_steps_are_those_of_c(tmp_path: Path) -> None:
    true_in_c([f"{step.name} == {step.value}" for step in batch.Step], tmp_path)
