"""Callers and variables that the new build takes for something else than the running program has."""

from __future__ import annotations

import pytest

from tests.compile import Compiler
from tests.verdict import Pair, Verdict, judge, program

STEP = ("3", "5")


def described(compiled: Compiler, pair: Pair, *flags: str, cc: str = "gcc", link: str = "pie") -> Verdict:
    return judge(compiled, pair, "-g", *flags, cc=cc, link=link, stripped=False)


def codes(verdict: Verdict) -> set[str]:
    return verdict.refused | {f.code for f in verdict.findings}


ENUM = (
    "enum state { VALUES };\nstatic enum state now;\n"
    "SEPARATE int edited(int x) { if (now == IDLE) { puts(\"idle\"); now = BUSY; } return now * x; }\n"
    "SEPARATE int other(int x) { if (now == DONE) puts(\"done\"); return x * STEP; }\n"
)  # fmt: skip


@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_a_renumbered_enumeration_is_refused_and_can_be_allowed(cc: str, compiled: Compiler) -> None:
    pair = program(ENUM, "edited(n) + other(n)", VALUES=("IDLE, BUSY, DONE", "IDLE, WAIT, BUSY, DONE"), STEP=STEP)
    verdict = described(compiled, pair, cc=cc)
    assert verdict.refused == {"enum-values"}
    (finding,) = verdict.findings
    assert "BUSY: 1 -> 2" in finding.what and "DONE: 2 -> 3" in finding.what
    allowed = judge(compiled, pair, "-g", cc=cc, stripped=False, allow=("enum-values",)).check()
    assert [(f.code, f.lifted) for f in allowed.findings] == [("enum-values", True)]


@pytest.mark.parametrize("values", ["IDLE, BUSY, DONE, MORE", "IDLE=0, BUSY=1, DONE=2"])
def test_an_enumeration_that_keeps_its_numbers_is_no_hazard(values: str, compiled: Compiler) -> None:
    pair = program(ENUM, "edited(n) + other(n)", VALUES=("IDLE, BUSY, DONE", values), STEP=STEP)
    assert described(compiled, pair).check().findings == ()


def test_an_enumeration_without_a_name_is_looked_at_too(compiled: Compiler) -> None:
    text = ENUM.replace("enum state { VALUES };", "enum { VALUES };").replace("enum state now", "int now")
    pair = program(text, "edited(n) + other(n)", VALUES=("IDLE, BUSY, DONE", "IDLE, WAIT, BUSY, DONE"), STEP=STEP)
    assert described(compiled, pair).refused == {"enum-values"}


TABLE = (
    "char table[SIZE], behind[64];\nSEPARATE int fills(int x) { memset(behind, x, sizeof behind); return behind[x]; }\n"
    "SEPARATE int edited(int x) { for (int i = 0; i < SIZE; i++) table[i] = x; return table[x] * STEP; }\n"
)


@pytest.mark.parametrize("link", ["pie", "no-pie", "library"])
def test_a_variable_that_grew_is_refused_by_name(link: str, compiled: Compiler) -> None:
    pair = program(TABLE, "edited(n) + fills(n)", SIZE=("32", "64"), STEP=STEP)
    verdict = judge(compiled, pair, stripped=link == "library", link=link)
    assert "variable-size" in verdict.refused
    found = [f for f in verdict.findings if f.code == "variable-size"]
    assert found[0].where == ("table: 32 -> 64 bytes",)


def test_a_variable_that_shrank_is_told(compiled: Compiler) -> None:
    verdict = judge(compiled, program(TABLE, "edited(n) + fills(n)", SIZE=("64", "32"), STEP=STEP), stripped=False)
    assert "variable-size" in verdict.check().warned


def test_a_variable_of_the_same_size_is_no_hazard(compiled: Compiler) -> None:
    verdict = judge(compiled, program(TABLE, "edited(n) + fills(n)", SIZE=("64", "64"), STEP=STEP), stripped=False)
    assert verdict.check().findings == ()


@pytest.mark.parametrize(("old", "new"), [("int", "float"), ("struct {int a, b;}", "struct {short a, x; int b;}")])
def test_a_variable_of_another_type_is_refused(old: str, new: str, compiled: Compiler) -> None:
    pair = program(
        "static TYPE value;\nSEPARATE int edited(int x) { memset(&value, x, sizeof value);"
        " return *(char *)&value * STEP; }\n",
        "edited(n)", TYPE=(old, new), STEP=STEP,
    )  # fmt: skip
    assert "variable-type" in described(compiled, pair).refused


PARAMETER = (
    "SEPARATE int callee(int a PARAMETER) { puts(\"c\"); return a * 3 USE; }\n"
    "SEPARATE int one(int x) { puts(\"1\"); return callee(x ARGUMENT) + 1; }\n"
    "SEPARATE int two(int x) { puts(\"2\"); return callee(x + 4 ARGUMENT) - 1; }\n"
)  # fmt: skip
ADDED = {"PARAMETER": ("", ", int b"), "USE": ("", "+ b"), "ARGUMENT": ("", ", x")}


@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_a_parameter_that_all_callers_pass_is_no_hazard(level: str, compiled: Compiler) -> None:
    verdict = described(compiled, program(PARAMETER, "one(n) + two(n)", None, **ADDED), level)
    assert verdict.check().reasons.keys() == {"callee", "one", "two"}
    assert verdict.findings == ()


def test_an_exported_function_with_another_prototype_is_refused_in_a_library(compiled: Compiler) -> None:
    pair = program(PARAMETER, "one(n) + two(n)", None, **ADDED)
    verdict = described(compiled, pair, link="library")
    assert verdict.refused == {"calling-convention"}
    assert "callee: int32 (int32) -> int32 (int32, int32)" in verdict.findings[0].what


def test_the_same_prototype_in_other_words_is_no_hazard(compiled: Compiler) -> None:
    pair = program("typedef int number;\nSEPARATE TYPE edited(const TYPE x) { puts(\"e\"); return x * STEP; }\n",
                   "edited(n)", TYPE=("int", "number"), STEP=STEP)  # fmt: skip
    assert described(compiled, pair, link="library").check().findings == ()


STALE = (
    "static int (*stored)(int);\n"
    "SEPARATE int callee(int a PARAMETER) { puts(\"c\"); return a * 3 USE; }\n"
    "GONE\nSEPARATE int calls(int x) { if (stored) x += stored(x); return x; }\n"
    "SEPARATE int one(int x) { puts(\"1\"); STORE; return callee(x ARGUMENT) + 1; }\n"
)  # fmt: skip


def stale(gone: str, **words: tuple[str, str]) -> Pair:
    return program(STALE, "one(n) + calls(n)", None, GONE=(gone, ""), STORE=("stored = gone", ""), **words)


GONE = "SEPARATE int gone(int x) { for (int i = 0; i < 9; i++) { printf(\"%d\", x); x ^= callee(x + i); } return x; }"


def test_a_stored_pointer_to_a_caller_that_is_gone_is_refused(compiled: Compiler) -> None:
    verdict = described(compiled, stale(GONE, **ADDED))
    assert "calling-convention" in verdict.refused
    finding = next(f for f in verdict.findings if f.code == "calling-convention")
    assert any(place.startswith("called by gone (main.c:") for place in finding.where)


def test_such_a_caller_of_a_function_that_is_called_as_before_is_no_hazard(compiled: Compiler) -> None:
    pair = stale(GONE, PARAMETER=("", ""), USE=("", "+ 7"), ARGUMENT=("", ""))
    assert "calling-convention" not in codes(described(compiled, pair))


def test_a_static_variable_that_was_initialised_already_is_told(compiled: Compiler) -> None:
    text = (
        "SEPARATE int first(int x) { return x * 3; }\nSEPARATE int edited(int x) { static int once = first(x);"
        " return once + x * STEP; }\nSEPARATE int other(int x) { puts(\"o\"); return x * OTHER; }\n"
    )
    flags = ("-x", "c++", "-std=gnu++17", "-fpermissive")
    for step, other, told in ((STEP, ("3", "3"), True), (("3", "3"), STEP, False)):
        pair = program(text, "edited(n) + other(n)", STEP=step, OTHER=other)
        verdict = judge(compiled, pair, *flags, cc="g++", allow=("exceptions",))
        assert ("static-guard" in verdict.check().warned) == told
