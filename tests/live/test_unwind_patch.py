"""Stacks in a patch's own code, at every instruction: entry jumps, patched functions, stand-ins of the unwinder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from fixtures.stepping import attached
from patcher.pausing.pause import patch_tables
from patcher.process.memory import Memory
from patcher.targets.target import take_snapshot
from patcher.transactions.transaction import apply
from tests.compile import Compiler
from tests.live.grafting import Running, patch_for, sources
from tests.live.throwing import everything

from .steptruth import Comparison

pytestmark = pytest.mark.root

FEWEST_STEPS = 200  # of one answer: reading a line and printing another take more
TEXT = """
struct wide { long words[9]; };
SEPARATE static struct wide spread(long n) {
    struct wide wide;
    for (int i = 0; i < 9; i++) wide.words[i] = n * i + STEP;
    return wide;
}
SEPARATE static int compare(const void *a, const void *b) { return *(const long *)a > *(const long *)b ? STEP : -STEP; }
SEPARATE static long deep(long n) {
    volatile char room[100 + STEP];
    room[n] = n;
    return n ? deep(n - 1) + room[n] : STEP;
}
SEPARATE static long written(long n) {
    char text[64];
    snprintf(text, sizeof text, "%ld %d", n, STEP);
    return atol(text) + strlen(text);
}
long answer(long n) {
    struct wide wide = spread(n);
    qsort(wide.words, 9, sizeof *wide.words, compare);
    return wide.words[STEP] + deep(5) + written(n);
}
"""


def step_an_answer(old: Path, new: Path, folder: Path, question: int, steps: int) -> tuple[Comparison, int]:
    """Patch a program, ask it, and step through its answer; what came of it, and how many addresses of the patch's."""
    patch = patch_for(old, new, folder)
    with Running([old]) as program:
        program.ask(question)
        apply(program.pid, patch)
        with Memory(program.pid) as memory:
            tables = patch_tables(take_snapshot(program.pid, memory).records)
        with attached(program.pid) as stepper:
            comparison = Comparison(stepper, tables=tables, throws=True)
            stack = comparison.unwind()
            assert stack.complete, stack.why
            stepper.began_with(stack)
            for _ in range(steps // FEWEST_STEPS):  # so that it never waits: a step would
                program.put(question)
            comparison.run(0, steps)
    comparison.report("patch")
    own = [pc for pc in comparison.visited if any(table.low <= pc < table.high for table in tables)]
    return comparison, len(own)


@pytest.fixture(scope="session")
def compiled(cache_folder: Path) -> Compiler:
    return Compiler(cache_folder / "compiled")


def test_patched_functions(compiled: Compiler, tmp_path: Path) -> None:
    old, new = (compiled(sources(TEXT, STEP=step), "-O2") for step in ("1", "2"))
    comparison, own = step_an_answer(old, new, tmp_path, 3, 3000)
    assert own > 50 and comparison.garbled == []
    assert comparison.complete > 20 * len(comparison.incomplete)


@pytest.mark.soak
@pytest.mark.parametrize("question", range(6))
def test_exceptions_through_patched_functions(compiled: Compiler, tmp_path: Path, question: int) -> None:
    versions: list[Mapping[str, str]] = [everything(version) for version in (1, 2)]
    flags = ("-std=gnu++17", "-fexceptions", "-pthread", "-O2")
    old, new = (compiled(files, *flags, cc="g++") for files in versions)
    comparison, own = step_an_answer(old, new, tmp_path, question, 60_000)
    assert own > 20
    assert 50 * len(comparison.garbled) < comparison.complete
