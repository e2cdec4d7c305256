"""Which functions changed: by what their references lead to, not by their bytes."""

from __future__ import annotations

import pytest

from elfdiff.errors import BadInput, NothingToPatch, Refused
from tests.compile import Compiler
from tests.verdict import PRELUDE, Verdict, judge, program

COMPILERS = ("gcc", "clang")


@pytest.mark.parametrize("cc", COMPILERS)
@pytest.mark.parametrize("level", ["-O0", "-O2", "-Os"])
def test_changed_code_is_the_only_thing_patched(cc: str, level: str, compiled: Compiler) -> None:
    pair = program("static int a;\nSEPARATE int edited(int x) { a += STEP; return a * x; }\n", "edited(n)",
                   STEP=("3", "5"))  # fmt: skip
    assert judge(compiled, pair, level, cc=cc).check().reasons == {"edited": "code"}


@pytest.mark.parametrize("cc", COMPILERS)
def test_another_callee_is_a_change_though_no_byte_of_code_says_so(cc: str, compiled: Compiler) -> None:
    pair = program(
        "SEPARATE int one(int x) { return x + 1; }\nSEPARATE int two(int x) { return x * x * 5; }\n"
        "SEPARATE int edited(int x) { return WHICH(x) + 7; }\n"
        "SEPARATE int same(int x) { return one(x) + two(x) + 9; }\n",
        "edited(n) + same(n)", WHICH=("one", "two"),
    )  # fmt: skip
    assert judge(compiled, pair, cc=cc).check().reasons == {"edited": "callee"}


def test_another_import_is_a_change(compiled: Compiler) -> None:
    pair = program(
        "int close(int), dup(int);\nSEPARATE int edited(int x) { return WHICH(x) + 7; }\n"
        "SEPARATE int same(int x) { return close(x) + dup(x); }\n",
        "edited(n) + same(n)", WHICH=("close", "dup"),
    )  # fmt: skip
    assert judge(compiled, pair).check().reasons == {"edited": "callee"}


def test_twins_are_told_apart_by_those_who_use_them(compiled: Compiler) -> None:
    """Two getters of equal bytes, written down in another order: their users decide which is which."""
    getters = ("SEPARATE int get_a(void) { return a; }\nSEPARATE int get_b(void) { return b; }\n",
               "SEPARATE int get_b(void) { return b; }\nSEPARATE int get_a(void) { return a; }\n")  # fmt: skip
    pair = program(
        "static int a, b;\nGETTERS\nSEPARATE int sets(int x) { a += x; b -= 3 * x; return get_a() ^ 4 * get_b(); }\n"
        "SEPARATE int edited(int x) { return get_b() + STEP; }\n",
        "sets(n) + edited(n)", GETTERS=getters, STEP=("1", "2"),
    )  # fmt: skip
    assert judge(compiled, pair).check().reasons == {"edited": "code"}


@pytest.mark.parametrize("cc", COMPILERS)
def test_a_new_function_has_no_entry_of_its_own(cc: str, compiled: Compiler) -> None:
    pair = program(
        "NEW SEPARATE int edited(int x) { puts(\"e\"); return CALL; }\n", "edited(n)",
        NEW=("", "SEPARATE int fresh(int x) { puts(\"fresh\"); return x * 3; }"), CALL=("x", "x + fresh(x)"),
    )  # fmt: skip
    verdict = judge(compiled, pair, cc=cc).check()
    assert verdict.reasons.items() >= {"edited": "code", "fresh": "new"}.items()
    fresh = verdict.functions["fresh"]
    assert (fresh.old_start, fresh.entry_jump) == (None, False)


def test_a_removed_function_is_noted(compiled: Compiler) -> None:
    pair = program(
        "static int a;\nOLD SEPARATE int edited(int x) { puts(\"e\"); return CALL; }\n", "edited(n)",
        OLD=("SEPARATE int gone(int x) { puts(\"gone\"); return x * 3 + a++; }", ""), CALL=("x + gone(x)", "x"),
    )  # fmt: skip
    verdict = judge(compiled, pair).check()
    (removed,) = verdict.made.removed
    assert verdict.old.functions["gone"].start == removed.start
    assert verdict.old.functions["gone"].size == removed.size


def test_cold_parts_come_with_their_functions(compiled: Compiler) -> None:
    pair = program(
        "static int a;\n__attribute__((cold)) SEPARATE void far(int x) { printf(\"far %d\", x); }\n"
        "__attribute__((noinline)) int edited(int x) { if (x > 90) { far(x); far(a); x ^= a; }"
        " a += x * STEP; return a; }\n",
        "edited(n)", STEP=("3", "5"),
    )  # fmt: skip
    verdict = judge(compiled, pair).check()
    assert verdict.reasons == {"edited": "code", "edited.cold": "closure"}
    assert [verdict.functions[name].entry_jump for name in ("edited", "edited.cold")] == [True, False]


UNITS = {
    "a.c": PRELUDE + "static int ca; SEPARATE int fa(int x) { ca += x; return ca ^ printf(\"a %d\", x); }\n"
    "SEPARATE int fa2(int x) { return fa(x) * 3; }\n",
    "b.c": PRELUDE + "static long cb[5]; extern int fa2(int); SEPARATE int fb(int x) { cb[x & 3]++; puts(\"b\");"
    " return fa2(x); }\nSEPARATE int fb2(int x) { return cb[1] + fb(x + 2); }\n",
    "c.c": PRELUDE + "static const int t[] = {1000001, 1000005}; extern int fb2(int);\n"
    "SEPARATE int fc(int x) { return t[x] + fb2(x); }\n"
    "int main(int n, char **v) { return fc(n) + strlen(v[0]); }\n",
}  # fmt: skip
ORDERS = [("a.c", "b.c", "c.c"), ("c.c", "b.c", "a.c"), ("b.c", "c.c", "a.c")]


@pytest.mark.parametrize("order", ORDERS[1:], ids="-".join)
@pytest.mark.parametrize("cc", COMPILERS)
def test_another_order_of_linking_is_no_change(cc: str, order: tuple[str, ...], compiled: Compiler) -> None:
    from elfdiff.diff import Options, diff

    old, new = (compiled(UNITS, cc=cc, order=o) for o in (ORDERS[0], order))
    assert old.read_bytes() != new.read_bytes()
    with pytest.raises(NothingToPatch):
        diff(old, new, Options())


def test_two_different_programs_are_no_pair(compiled: Compiler) -> None:
    from elfdiff.diff import Options, diff

    other = PRELUDE + "".join(
        f"SEPARATE double g{k}(double *x) {{ for (int i = 0; i < {k + 3}; i++) x[i] *= x[i + {k}] / {k}.5;"
        f" return x[{k}]; }}\n"
        for k in range(1, 12)
    )
    other += "double q[99]; int main() { return " + " + ".join(f"g{k}(q)" for k in range(1, 12)) + "; }\n"
    pair = program("", "0").sources(0)
    with pytest.raises((BadInput, Refused)):
        diff(compiled(pair), compiled(other), Options())


SWAPPED = {
    "bodies": ('puts("A"); return va + x;', "vb++; return vb - x * 3;"),
    "twins": ("return va + x * 3;", "return vb + x * 3;"),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_exported_functions_that_swap_their_bodies_are_changes(name: str, compiled: Compiler) -> None:
    one, two = SWAPPED[name]
    pair = program(
        "int va, vb;\nint first(int x) { FIRST }\nint second(int x) { SECOND }\nint sum(int x) { return va + vb; }\n",
        "0", FIRST=(one, two), SECOND=(two, one),
    )  # fmt: skip
    assert judge(compiled, pair, link="library").safe


def crossed(verdict: Verdict) -> set[str]:
    """Functions of both builds to whose new code the patch leads an entry that was another function's."""
    return {
        name
        for name, function in verdict.functions.items()
        if function.old_start is not None
        and name in verdict.old.functions
        and verdict.old.functions[name].start != function.old_start
    }


TAKEN_FOR_ANOTHER = {
    "twins named by a table only": program(
        "static int a, b;\nBOTH\nstatic int (*const t[])(int) = {fa, fb};\n"
        "SEPARATE int edited(int x) { return t[x](x) + STEP; }\n"
        "SEPARATE int sets(int x) { a += x; b -= 2 * x; return a * b; }\n",
        "edited(n) + sets(n)",
        BOTH=(
            "SEPARATE int fa(int x) { return a + x; }\nSEPARATE int fb(int x) { return b + x; }",
            "SEPARATE int fb(int x) { return b + x; }\nSEPARATE int fa(int x) { return a + x; }",
        ),
        STEP=("1", "3"),
    ),
    "a shifted enumeration": program(
        'enum e { A = 5, NEW B, C };\nSEPARATE int rep(const char *s, int k) { return printf("%d %s", k, s); }\n'
        'SEPARATE int one(int x) { return rep("net", B); }\nSEPARATE int two(int x) { return rep("net", C); }\n',
        "one(n) + two(n)",
        NEW=("", "FRESH,"),
    ),
    "fields that change places": program(
        'struct s { ORDER; int c; };\nSEPARATE int one(struct s *p) { puts("one"); return p->a++; }\n'
        'SEPARATE int two(struct s *p) { puts("two"); return p->b++; }\n'
        "SEPARATE int makes(int x) { struct s *p = calloc(3, 64); return one(p + x) + two(p); }\n",
        "makes(n)",
        ORDER=("int a, b", "int b, a"),
    ),
}


CROSSED = pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="new code with the old bytes of another function is matched with that one. Where a pointer to "
    "either may be stored this is refused (ambiguous-function); here both are only called, and all callers are patched",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n.startswith("twins") else CROSSED) for n in TAKEN_FOR_ANOTHER]
)
def test_no_entry_leads_to_another_function(name: str, compiled: Compiler) -> None:
    verdict = judge(compiled, TAKEN_FOR_ANOTHER[name])
    assert verdict.refused or not crossed(verdict)
