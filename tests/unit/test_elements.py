"""A changed function that uses another element of the same array: the instruction survives, what it names does not."""

from __future__ import annotations

from tests.compile import Compiler
from tests.verdict import judge, program

ELEMENTS = """
static long turns[3];
SEPARATE long take(long n) { turns[ELEMENT]++; return n + STEP; }
SEPARATE long turn(long n) { long now = turns[n % 3]; return now + STEP * n; }
"""
PAIR = program(ELEMENTS, "take(n) + turn(n)", ELEMENT=("0", "1"), STEP=("1", "2"))


def test_symbols_say_which_element_it_is(compiled: Compiler) -> None:
    verdict = judge(compiled, PAIR, stripped=False)
    assert verdict.made
    verdict.check()


def test_without_symbols_it_is_told_or_refused(compiled: Compiler) -> None:
    verdict = judge(compiled, PAIR)
    if not verdict.refused:
        verdict.check()


UNCHANGED = """
static long turns[3];
SEPARATE long take(long n) { turns[n % 3]++; return n + STEP; }
SEPARATE long turn(long n) { while (turns[ELEMENT] < n) company1(n); return n; }
"""


def test_a_function_that_differs_in_the_element_alone_has_changed(compiled: Compiler) -> None:
    pair = program(UNCHANGED.replace("turns[n % 3]++;", "turns[ELEMENT]++;"), "take(n) + turn(n)", ELEMENT=("0", "1"),
                   STEP=("1", "2"))  # fmt: skip
    verdict = judge(compiled, pair, stripped=False).check()
    assert "turn" in verdict.reasons
