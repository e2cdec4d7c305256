"""Something moves between functions that are called in turn: found where that is so, and only there."""

from __future__ import annotations

import pytest

from elfdiff.building.moves import Move
from elfdiff.diff import Options, analyse, diff
from elfdiff.patchobject import Severity
from tests.compile import Compiler

HEAD = """
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define SEPARATE __attribute__((noinline, noclone))
static long state[8];
SEPARATE int known(const char *user) { state[0]++; return strcmp(user, "alice") == 0; }
SEPARATE void rest(void) { state[1] += state[2] * 3; fprintf(stderr, "rest %ld\\n", state[1]); }
SEPARATE int company1(int x) { state[3] += x; fprintf(stderr, "one %ld\\n", state[3]); return x * 3; }
SEPARATE int company2(int x) { state[4] ^= x; fprintf(stderr, "two %ld\\n", state[4]); return x + 4; }
SEPARATE int company3(int x) { for (int i = 0; i < x; i++) state[5] += company1(i) * company2(x - i); return 2; }
static char *volatile name = "alice";
"""
PARTS = """
SEPARATE int first(char *user) {
    for (char *c = user; *c; c++) state[6] += *c;
    FIRST
    if (state[6] > 5000) puts("a");
    return state[6] & 1;
}
SEPARATE int second(char *user) {
    for (char *c = user; *c; c++) state[7] ^= *c;
    SECOND
    if (state[7] > 5000) puts("b");
    return state[7] | 2;
}
"""
TAIL = "int main(int argc, char **argv) { return argc > 4 ? company3(argc) : caller(argc, argv[0]); }"
CHECK = "if (!known(user)) return 0;"

STRAIGHT = "SEPARATE int caller(int n, char *u) { if (!first(u)) return 1; rest(); return second(u); }"
APART = "SEPARATE int caller(int n, char *u) { rest(); return n > 2 ? first(u) + 1 : second(u) + 2; }"
TURNS = """SEPARATE int caller(int n, char *u) { int k = 0; while (fgets(u, 9, stdin)) {
    if (*u == 'a') k += first(u); else if (*u == 'b') k += second(u); else rest(); } return k; }"""
SERVER = """SEPARATE int caller(int n, char *u) { int k = 0; while (fgets(u, 9, stdin)) {
    if (first(u)) { rest(); k += second(u); } } return k; }"""
WRAPPED = """SEPARATE int one(char *u) { state[2]++; return first(u) + 1; }
SEPARATE int two(char *u) { state[2]--; return second(u) + 2; }
SEPARATE int caller(int n, char *u) { if (one(u) > n) return 1; rest(); return two(u) * 2; }"""
JUMPING = """static jmp_buf way;
SEPARATE int caller(int n, char *u) { if (setjmp(way) || !first(u)) return 1; rest(); return second(u); }"""
ENDLESS = """static jmp_buf way;
SEPARATE __attribute__((noreturn)) int caller(int n, char *u) {
    if (setjmp(way)) rest();
    for (;;) { first(u); rest(); second(u); } }"""
CASES = """SEPARATE int caller(int n, char *u) { int k = 0; for (;;) { switch (n) {
    case 0: k += first(u); break; case 1: rest(); n = 7; break; case 2: k += second(u); return k; case 3: k ^= 5; break;
    case 4: k += 9; n = 0; break; case 5: return k * 3; case 6: rest(); return 8; default: return k; } n++; } }"""


def moves(
    compiled: Compiler, caller: str, old: tuple[str, str] = ("", CHECK), new: tuple[str, str] = (CHECK, ""), *flags: str
) -> tuple[list[Move], list[str], Severity | None]:
    """The moves, the instructions' targets between the calls, and what the finding comes to."""
    builds = []
    for first, second in (old, new):
        parts = PARTS.replace("FIRST", first).replace("SECOND", second)
        builds.append(compiled(HEAD + parts + caller + TAIL, *flags, stripped=False))
    result = analyse(*builds, Options())
    assert result.draft is not None
    code = result.draft.comparison.old
    found = list(result.draft.moves)
    calls = code.references.instruction.tolist()
    targets = [
        code.names[code.function_of(int(code.references.target[row]))]
        for row, at in enumerate(calls)
        if any(start <= at < end for move in found for start, end in move.between)
        and code.function_of(int(code.references.target[row])) >= 0
        and not code.references.internal[row]
    ]
    findings = [item for item in result.findings if item.code == "moved-code"]
    return found, targets, findings[0].severity if findings else None


@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize("back", [False, True])
def test_a_check_that_moves_between_two_calls(compiled: Compiler, level: str, back: bool) -> None:
    sides = [("", CHECK), (CHECK, "")]
    found, called, severity = moves(compiled, STRAIGHT, *(sides[::-1] if back else sides), level)
    assert len(found) == 1 and not found[0].whole and found[0].what == ("known",)
    assert [name for name in called if name in ("first", "rest", "second")] == ["first", "rest", "second"]
    assert severity is Severity.WARN


@pytest.mark.parametrize("caller", [APART, TURNS], ids=["either or", "in turns of a loop"])
def test_calls_of_which_none_follows_the_other(compiled: Compiler, caller: str) -> None:
    assert moves(compiled, caller) == ([], [], None)


def test_a_caller_that_changes_itself_is_waited_for_anyway(compiled: Compiler) -> None:
    builds = []
    for (first, second), step in (("", CHECK), "3"), ((CHECK, ""), "5"):
        parts = PARTS.replace("FIRST", first).replace("SECOND", second)
        caller = STRAIGHT.replace("return 1", f"return {step}")
        builds.append(compiled(HEAD + parts + caller + TAIL, stripped=False))
    patch = diff(*builds, Options())
    assert {"caller", "first", "second"} <= {item.name for item in patch.functions}
    assert [item for item in patch.findings if item.code == "moved-code"] == []
    assert {item.name for item in patch.idle} == {"caller between second and first"}  # where it may be kept live


def test_nothing_moves_where_both_keep_it_or_one_has_it_anew(compiled: Compiler) -> None:
    assert moves(compiled, STRAIGHT, ("", CHECK), (CHECK, CHECK))[0] == []
    assert moves(compiled, STRAIGHT, ("", ""), (CHECK, ""))[0] == []
    assert moves(compiled, STRAIGHT, (CHECK, CHECK), ("", CHECK))[0] == []


def test_where_a_loop_waits_for_the_next_is_not_between_the_calls(compiled: Compiler) -> None:
    found, called, severity = moves(compiled, SERVER)
    assert len(found) == 1 and not found[0].whole and severity is Severity.WARN
    assert {"first", "rest", "second"} <= set(called)
    (move,) = found
    assert sum(end - start for start, end in move.between) < 60
    assert "fgets" not in " ".join(called)


def test_a_wrapper_between_caller_and_function(compiled: Compiler) -> None:
    found, called, _ = moves(compiled, WRAPPED)
    assert len(found) == 1 and {"one", "rest", "two"} <= set(called)


def test_the_calls_of_a_switch_are_followed(compiled: Compiler) -> None:
    found, _, severity = moves(compiled, CASES, ("", CHECK), (CHECK, ""), "-O2", "-fno-jump-tables")
    with_table = moves(compiled, CASES, ("", CHECK), (CHECK, ""), "-O2", "-fjump-tables")
    assert not found and severity is None  # from one turn of the loop to the next: nothing says which comes first
    assert with_table[0] == [] and with_table[2] is None


def test_where_the_flow_is_unknown_all_of_the_caller_must_be_idle(compiled: Compiler) -> None:
    (move,), _, severity = moves(compiled, JUMPING)
    assert move.whole and not move.hopeless and severity is Severity.WARN


def test_what_never_returns_cannot_be_waited_for_as_a_whole(compiled: Compiler) -> None:
    (move,), _, severity = moves(compiled, ENDLESS)
    assert move.whole and move.hopeless and severity is Severity.REFUSE


def test_what_everybody_names_is_no_evidence(compiled: Compiler) -> None:
    one = "SEPARATE int crowd{0}(char *u) {{ state[1] += {0}; return known(u) + {0}; }}\n"
    crowd = "".join(one.format(number) for number in range(40))
    all_of_it = " + ".join(f"crowd{number}(u)" for number in range(40))
    caller = STRAIGHT.replace("rest();", "rest(); all(u);")
    assert moves(compiled, f"{crowd}SEPARATE int all(char *u) {{ return {all_of_it}; }}\n{caller}")[0] == []


def test_what_a_new_function_names_its_caller_names(compiled: Compiler) -> None:
    helper = 'SEPARATE int fresh(char *u) { if (known(u)) return 1; fprintf(stderr, "no %s\\n", u); return 0; }'
    parts = PARTS.replace("FIRST", "if (!fresh(user)) return 0;").replace("SECOND", "")
    old = compiled(HEAD + PARTS.replace("FIRST", "").replace("SECOND", CHECK) + STRAIGHT + TAIL, stripped=False)
    new = compiled(HEAD + helper + parts + STRAIGHT + TAIL, stripped=False)
    result = analyse(old, new, Options())
    assert result.draft is not None
    (move,) = result.draft.moves
    assert "known" in move.what
