"""What the new code shares with the running program is found in the old image, what is its own in the patch."""

from __future__ import annotations

import pytest

from tests.compile import Compiler
from tests.verdict import Pair, Verdict, judge, program

G = "SEPARATE int uses(int x) { pre[x] = 2; t[x] += 3; %s; return pre[0]; }\n"
LOOP = 'SEPARATE int edited(int x) { puts("e"); for (int *p = t; p != t + 300; p++) *p += x * STEP; return 0; }\n'
STEP = ("1", "2")
CALLS = "edited(n) + uses(n)"


def test_a_new_variable_lives_in_the_patch(compiled: Compiler) -> None:
    pair = program(
        "static int a; static long b; NEW static int c;\n"
        "SEPARATE int edited(int x) { puts(\"e\"); a += x; EDIT; return c; }\n"
        "SEPARATE int uses(int x) { b -= x; c ^= 3; a *= b; return a; }\n",
        CALLS, NEW=("", "static long fresh;"), EDIT=("", "if (fresh++ > 3) puts(\"x\")"),
    )  # fmt: skip
    verdict = judge(compiled, pair).check()
    assert verdict.warned == {"new-variable"}
    fresh = verdict.new.objects["fresh"].start
    (home,) = [s for s in verdict.made.segments if s.vaddr <= fresh < s.vaddr + s.size]
    assert home.flags == 6, "readable and writable"


@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_a_new_variable_in_what_was_padding_is_not_what_lay_behind(level: str, compiled: Compiler) -> None:
    """It takes the address of ``a``, which moves: without symbols that cannot be told from another field."""
    pair = program(
        "static int a; NEW static long b; static int c;\n"
        "SEPARATE int edited(int x) { puts(\"e\"); a += x; EDIT; return c; }\n"
        "SEPARATE int uses(int x) { b -= x; c ^= 3; a *= b; return a; }\n",
        CALLS, NEW=("", "static int fresh;"), EDIT=("", "if (fresh++ > 3) puts(\"x\")"),
    )  # fmt: skip
    verdict = judge(compiled, pair, level)
    assert verdict.refused or verdict.check()


def test_a_new_variable_in_padding_that_nothing_moved_for_may_live_there(compiled: Compiler) -> None:
    """Nobody uses those bytes, and they are what the new variable begins with."""
    pair = program(
        "long b __attribute__((aligned(32))); NEW int a; int c;\n"  # gcc lays them out last first
        "SEPARATE int edited(int x) { puts(\"e\"); a += x; EDIT; return c; }\n"
        "SEPARATE int uses(int x) { b -= x; c ^= 3; a *= b; return a; }\n",
        CALLS, NEW=("", "int fresh;"), EDIT=("", "if (fresh++ > 3) puts(\"x\")"),
    )  # fmt: skip
    verdict = judge(compiled, pair)
    old, new = verdict.old, verdict.new
    fresh, bias = new.objects["fresh"].start, old.objects["a"].start - new.objects["a"].start
    assert old.objects["b"].start - new.objects["b"].start == bias, "the pair is not what this test needs"
    assert verdict.warned == {"neighbour-address"}
    assert not any(s.start <= fresh + bias < s.start + s.size for s in old.objects.values())
    assert all(s.flags != 6 for s in verdict.made.segments), "no storage of its own"


def test_a_new_variable_that_does_not_start_with_zero_lives_in_the_patch_or_nowhere(compiled: Compiler) -> None:
    pair = program(
        "long b __attribute__((aligned(32))) = 2; NEW int a = 1; int c = 3;\n"
        "SEPARATE int edited(int x) { puts(\"e\"); a += x; EDIT; return c; }\n"
        "SEPARATE int uses(int x) { b -= x; c ^= 3; a *= b; return a; }\n",
        CALLS, NEW=("", "int fresh = 77;"), EDIT=("", "if (fresh++ > 3) puts(\"x\")"),
    )  # fmt: skip
    verdict = judge(compiled, pair)
    assert "unpinned-address" in verdict.refused or verdict.check()


def test_a_new_variable_keeps_its_initial_value(compiled: Compiler) -> None:
    pair = program(
        "int a = 1; NEW long b = 2; int c = 3;\nSEPARATE int edited(int x) { puts(\"e\"); a += x; EDIT; return c; }\n"
        "SEPARATE int uses(int x) { b -= x; c ^= 3; a *= b; return a; }\n",
        CALLS, NEW=("", "int fresh = 77;"), EDIT=("", "if (fresh++ > 3) puts(\"x\")"),
    )  # fmt: skip
    verdict = judge(compiled, pair).check()
    fresh = verdict.new.objects["fresh"].start
    (home,) = [s for s in verdict.made.segments if s.vaddr <= fresh < s.vaddr + s.size]
    assert home.data[fresh - home.vaddr] == 77


def test_a_removed_variable_is_nobodys(compiled: Compiler) -> None:
    pair = program(
        "static int a; static long b; OLD static int c;\n"
        "SEPARATE int edited(int x) { puts(\"e\"); a += x; EDIT; return c; }\n"
        "SEPARATE int uses(int x) { b -= x; c ^= 3; a *= b; return a; }\n",
        CALLS, OLD=("static long gone;", ""), EDIT=("if (gone++ > 3) puts(\"x\")", ""),
    )  # fmt: skip
    judge(compiled, pair).check()


ENDS = {
    "stays": program(
        f"static int pre[4]; static int t[300]; static int post;\n{LOOP}{G % 'post += x'}", CALLS, STEP=STEP
    ),
    "is removed": program(
        f"static int pre[4]; static int t[300]; POST\n{LOOP}{G % 'USE'}",
        CALLS, STEP=STEP, POST=("static int post;", ""), USE=("post += x", "x++"),
    ),
    "is new": program(
        f"static int pre[4]; static int t[300]; POST\n{LOOP}{G % 'USE'}",
        CALLS, STEP=STEP, POST=("", "static int post;"), USE=("x++", "post += x"),
    ),
    "grows": program(
        f"static int pre[4]; static int t[300]; static long post[SIZE];\n{LOOP}{G % 'post[x & 1] += x'}",
        CALLS, STEP=STEP, SIZE=("2", "6"),
    ),
    "is in front": program(
        f"POST static int t[300]; static int pre[4];\n{LOOP}{G % 'USE'}",
        CALLS, STEP=STEP, POST=("", "static int post;"), USE=("x++", "post += x"),
    ),
}  # fmt: skip


def both_ends(verdict: Verdict) -> tuple[int, int]:
    """Where the patch binds the beginning of ``t`` and what lies 1200 bytes behind it in ``edited``."""
    start = verdict.new.objects["t"].start
    bound = {}
    relocations = {int(r["place"]): r for r in verdict.made.relocations}
    for i in verdict.new.instructions("edited"):
        if i.target in (start, start + 1200) and i.field in relocations:
            row = relocations[i.field]
            assert row["symbol"] == 0
            bound[i.target - start] = int(row["addend"]) + i.address + i.size - i.field
    return bound.get(0, 0), bound.get(1200, bound.get(0, 0) + 1200)


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("cc", ["gcc", "clang"])
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_both_ends_of_an_array_are_bound_alike(name: str, cc: str, level: str, compiled: Compiler) -> None:
    """``for (p = t; p != t + N; p++)``: the end is the address of whatever the linker put behind."""
    verdict = judge(compiled, ENDS[name], level, cc=cc)
    if verdict.refused:
        return
    low, high = both_ends(verdict.check())
    assert high - low == 1200


CONST_END = {
    "changes": ("1000000005, 1, 2, 3", "1000000006, 1, 2, 3"),
    "stays": ("1000000005, 1, 2, 3", "1000000005, 1, 2, 3"),
}


@pytest.mark.parametrize("name", CONST_END)
@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_both_ends_of_a_constant_array_are_found_in_one_image(name: str, cc: str, compiled: Compiler) -> None:
    pair = program(
        "extern const int t[300], post[4];\n"
        "SEPARATE int edited(int x) { puts(\"e\"); "
        "for (const int *p = t; p != t + 300; p++) x += *p * STEP; return x; }\n"
        "SEPARATE int uses(int x) { return t[x] + post[x]; }\n",
        CALLS, {"t.c": "const int post0[4] = {1}; const int t[300] = {1000000001}; const int post[4] = {POST};"},
        STEP=STEP, POST=CONST_END[name],
    )  # fmt: skip
    verdict = judge(compiled, pair, cc=cc).check()
    start = verdict.new.objects["t"].start
    rows = {int(r["place"]) for r in verdict.made.relocations}
    images = {
        i.field in rows
        for i in verdict.new.instructions("edited")
        if i.target is not None and start <= i.target <= start + 1200
    }
    assert len(images) == 1


WRONG_VARIABLE = {
    "field": program(
        "static struct { int a, b, c, d; } st;\nSEPARATE int edited(int x) { st.FIELD += x; return st.d; }\n"
        "SEPARATE int uses(int x) { return st.a + st.d; }\n",
        CALLS, FIELD=("b", "c"),
    ),
    "field that is written elsewhere": program(
        "static struct { int a, b, c, d; } st;\nSEPARATE int edited(int x) { return st.FIELD; }\n"
        "SEPARATE int uses(int x) { st.a++; st.b++; st.c += 2; st.d += 3; return 0; }\n",
        CALLS, FIELD=("b", "c"),
    ),
    "new variable in place of an old one": program(
        "static int a; NEW\nSEPARATE int edited(int x) { WHICH += x; return WHICH; }\n"
        "SEPARATE int uses(int x) { return a += x; }\n",
        CALLS, NEW=("", "static int b;"), WHICH=("a", "b"),
    ),
    "pointers swapped": program(
        "static int a = 1000, b = 2000;\nint *const t[] = {ORDER};\nSEPARATE int edited(int x) { return ++*t[x]; }\n"
        "SEPARATE int uses(int x) { return x; }\n",
        CALLS, ORDER=("&a, &b", "&b, &a"),
    ),
    "another stream": program(
        "SEPARATE int edited(int x) { if (x > 3) fprintf(STREAM, \"over %d\", x); return x; }\n"
        "SEPARATE int uses(int x) { return x; }\n",
        CALLS, STREAM=("stdout", "stderr"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_VARIABLE)
def test_the_same_bytes_that_name_another_variable_are_a_change(name: str, compiled: Compiler) -> None:
    assert judge(compiled, WRONG_VARIABLE[name]).safe


EDITED_TOO = program(
    "static int a; NEW\n"
    "SEPARATE int edited(int x) { puts(\"e\"); WHICH += x; puts(\"m\"); x *= 7;"
    " if (x > STEP) puts(\"o\"); return 0; }\n"
    "SEPARATE int uses(int x) { return USES; }\n",
    CALLS, NEW=("", "static int b;"), WHICH=("a", "b"), STEP=STEP, USES=("a += x", "a += x"),
)  # fmt: skip


def test_a_new_variable_is_not_the_one_that_it_replaces(compiled: Compiler) -> None:
    verdict = judge(compiled, EDITED_TOO)
    if verdict.patch is not None:
        verdict.check()


GROWN = {
    "array": program(
        "static int pre0; static int t[SIZE]; static int post;\n"
        "SEPARATE int edited(int x) { for (int i = 0; i < SIZE; i++) t[i] += x; return t[x]; }\n"
        "SEPARATE int uses(int x) { pre0 += x; post -= x; return pre0 * post + t[0]; }\n",
        CALLS, SIZE=("8", "16"),
    ),
    "initialised array": program(
        "int pre0 = 1; int t[SIZE] = {1, 2, 3}; int post = 2;\n"
        "SEPARATE int edited(int x) { for (int i = 0; i < SIZE; i++) t[i] += x; return t[x]; }\n"
        "SEPARATE int uses(int x) { pre0 += x; post -= x; return pre0 * post + t[0]; }\n",
        CALLS, SIZE=("8", "16"),
    ),
    "buffer": program(
        "static int pre0; static char t[SIZE]; static int post;\n"
        "SEPARATE int edited(int x) { snprintf(t, sizeof t, \"%d\", x); return puts(t); }\n"
        "SEPARATE int uses(int x) { pre0 += x; post -= x; return pre0 * post + t[x]; }\n",
        CALLS, SIZE=("32", "64"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("stripped", [True, False])
@pytest.mark.parametrize("name", GROWN)
def test_a_variable_that_grew_is_refused(name: str, stripped: bool, compiled: Compiler) -> None:
    assert judge(compiled, GROWN[name], stripped=stripped).refused


NEW_STREAM = {
    "where .data ends": program(
        "SEPARATE int edited(int x) { if (x > 3) { EDIT; puts(\"over\"); } return x; }\n",
        "edited(n)", EDIT=("", "fprintf(stderr, \"over %d\", x)"),
    ),
    "elsewhere": program(
        "SEPARATE int edited(int x) { if (x > 3) { EDIT; puts(\"over\"); }"
        " return atoi(\"4\") + strtol(\"4\", 0, x); }\n",
        "edited(n)", EDIT=("", "fprintf(stderr, \"over %d\", x)"),
    ),
}  # fmt: skip
"""``stderr`` is copied into the program by the dynamic linker (R_X86_64_COPY); the old build has no copy."""


@pytest.mark.parametrize("stripped", [True, False])
@pytest.mark.parametrize("name", NEW_STREAM)
def test_a_library_s_variable_of_which_there_is_no_copy_is_refused(
    name: str, stripped: bool, compiled: Compiler
) -> None:
    assert judge(compiled, NEW_STREAM[name], stripped=stripped).refused


@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_a_new_variable_where_data_ends_lives_in_the_patch(cc: str, compiled: Compiler) -> None:
    pair = program(
        "NEW\nSEPARATE int edited(int x) { puts(\"e\"); EDIT; return x; }\n"
        "SEPARATE int uses(int x) { return x; }\n",
        CALLS, NEW=("", "long fresh[16] __attribute__((aligned(64)));"), EDIT=("", "fresh[x & 7]++"),
    )  # fmt: skip
    verdict = judge(compiled, pair, cc=cc)
    if verdict.patch is not None:
        verdict.check()


APPENDED = program(
    "struct s { int a; FIELD }; static struct s s; static int after;\n"
    "SEPARATE int through(struct s *p) { puts(\"t\"); return p->a++ + EXTRA; }\n"
    "SEPARATE int edited(int x) { puts(\"e\"); STORE; return through(&s); }\n"
    "SEPARATE int uses(int x) { after += x; return after + s.a; }\n",
    CALLS, FIELD=("", "int b;"), EXTRA=("1", "p->b"), STORE=("", "s.b = x"),
)  # fmt: skip


def test_a_field_appended_to_a_static_structure_is_refused(compiled: Compiler) -> None:
    """By name it would be a new variable, through a pointer it is what lies behind the old structure."""
    assert judge(compiled, APPENDED).refused


MOVED_FIELD: Pair = program(
    "static struct s { int a; FIELD int b; int c; } s;\n"
    "SEPARATE int through(struct s *p) { puts(\"t\"); return p->b++; }\n"
    "SEPARATE int edited(int x) { puts(\"e\"); return s.b + x; }\n"
    "SEPARATE int uses(int x) { s.a = x; s.c -= x; return through(&s); }\n",
    CALLS, FIELD=("", "int inserted;"),
)  # fmt: skip


def test_a_field_inserted_into_a_static_structure_is_refused(compiled: Compiler) -> None:
    assert judge(compiled, MOVED_FIELD).refused
