"""Each hazard: a pair that has it, and one that almost does."""

from __future__ import annotations

import pytest

from tests.compile import Compiler
from tests.verdict import Pair, Verdict, judge, program

STEP = ("1", "2")

LAYOUT = (
    "struct s { FIRST int a; SECOND int b; int c; };\n"
    "SEPARATE int one(struct s *p) { puts(\"1\"); return p->FIELD++; }\n"
    "SEPARATE int two(struct s *p) { puts(\"2\"); return p->FIELD * 3; }\n"
    "SEPARATE int makes(int x) { struct s *p = calloc(3, 64); return one(p + x) + two(p); }\n"
)  # fmt: skip


def layout(field: str, **words: tuple[str, str]) -> Pair:
    """A structure on the heap, of which two functions use one field."""
    return program(LAYOUT.replace("FIELD", field), "makes(n)", None, **{"FIRST": ("", ""), "SECOND": ("", ""), **words})


@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_a_field_inserted_in_the_middle_is_refused(cc: str, compiled: Compiler) -> None:
    verdict = judge(compiled, layout("b", SECOND=("", "int inserted;")), cc=cc)
    assert "struct-layout" in verdict.refused


def test_an_array_that_takes_the_displacement_out_of_a_byte_is_refused(compiled: Compiler) -> None:
    pair = layout("b", FIRST=("char pad[104];", "char pad[104];"), SECOND=("", "int inserted[6];"))
    assert "struct-layout" in judge(compiled, pair).refused


def test_the_layout_can_be_allowed(compiled: Compiler) -> None:
    pair = layout("b", SECOND=("", "int inserted;"))
    assert "struct-layout" in judge(compiled, pair, allow=("struct-layout",)).warned


def test_locals_that_moved_are_no_layout(compiled: Compiler) -> None:
    pair = program(
        "SEPARATE void fill(char *p, int n) { memset(p, n, 16); }\n"
        "SEPARATE int edited(int x) { char a[16], b[SIZE], c[16]; fill(a, x); fill(b, 1); fill(c, 2);"
        " return a[x] + b[1] + c[x]; }\n"
        "SEPARATE int edited2(int x) { char a[16], b[SIZE], c[16]; fill(a, 4); fill(b, 1); fill(c, 2);"
        " return a[x] + b[1] * c[x]; }\n",
        "edited(n) + edited2(n)", SIZE=("16", "64"),
    )  # fmt: skip
    for level in ("-O0", "-O2"):
        assert judge(compiled, pair, level).check().reasons.keys() >= {"edited", "edited2"}


def test_fields_that_change_places_are_refused(compiled: Compiler) -> None:
    pair = program(
        "struct s { ORDER; int c; };\n"
        "SEPARATE int one(struct s *p) { puts(\"1\"); return p->a++; }\n"
        "SEPARATE int two(struct s *p) { puts(\"2\"); return p->b * 3; }\n"
        "SEPARATE int makes(int x) { struct s *p = calloc(3, 64); return one(p + x) + two(p); }\n",
        "makes(n)", ORDER=("int a, b", "int b, a"),
    )  # fmt: skip
    assert judge(compiled, pair).refused


def test_a_shifted_field_with_one_user_is_refused(compiled: Compiler) -> None:
    pair = program(
        "struct s { int a; SECOND int b; };\nSEPARATE int one(struct s *p) { puts(\"1\"); return p->b++; }\n"
        "SEPARATE int makes(int x) { struct s *p = calloc(3, 64); return one(p + x); }\n",
        "makes(n)", SECOND=("", "int inserted;"),
    )  # fmt: skip
    assert judge(compiled, pair).refused


def test_a_structure_that_grew_at_its_end_is_refused(compiled: Compiler) -> None:
    pair = program(
        "struct s { int a; long b; FIELD };\n"
        "SEPARATE struct s *makes(int x) { struct s *p = malloc(sizeof *p); p->a = x; p->b = 1; INIT; return p; }\n"
        "SEPARATE int uses(struct s *p) { return p->a + p->b SUM; }\n", "uses(makes(n))",
        FIELD=("", "long c;"), INIT=("", "p->c = 2"), SUM=("", "+ p->c"),
    )  # fmt: skip
    assert judge(compiled, pair).refused


LABELS = program(
    "SEPARATE int edited(int x) { static void *const labels[] = {&&a, &&b, &&c}; goto *labels[x % 3];\n"
    "a: puts(\"a\"); x += STEP; b: puts(\"b\"); x *= 3; c: puts(\"c\"); return x; }\n", "edited(n)", STEP=STEP,
)  # fmt: skip


@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_a_table_of_labels_is_refused_and_can_be_allowed(cc: str, compiled: Compiler) -> None:
    assert judge(compiled, LABELS, cc=cc).refused == {"label-table"}
    verdict = judge(compiled, LABELS, cc=cc, allow=("label-table",)).check()
    assert verdict.warned == {"label-table"}
    start = min(p for p, target in verdict.new.pointers.items() if inside_edited(verdict, target))
    rows = {int(r["place"]): r for r in verdict.made.relocations}
    assert [int(rows[start + 8 * k]["symbol"]) for k in range(3)] == [1, 1, 1], "labels of the new code"


def inside_edited(verdict: Verdict, address: int) -> bool:
    function = verdict.new.functions["edited"]
    return function.start < address < function.start + function.size


def test_a_table_of_labels_of_unchanged_code_is_no_hazard(compiled: Compiler) -> None:
    text = LABELS.text.replace("STEP", "1").replace(
        "\nint main", 'SEPARATE int other(int x) { puts("o"); return x * STEP; }\nint main'
    )
    pair = Pair(text.replace("edited(n)", "edited(n) + other(n)"), {"STEP": ("3", "5")}, {})
    assert judge(compiled, pair).check().reasons == {"other": "code"}


INITIAL = program(
    "static int front = 4, limit = NUM, back = 5;\n"
    "SEPARATE int uses(int x) { front += x; back -= x; limit++; return front * limit; }\n"
    "SEPARATE int edited(int x) { puts(\"e\"); return x * STEP; }\n",
    "uses(n) + edited(n)", NUM=("10", "20"), STEP=("3", "5"),
)  # fmt: skip


def test_another_initial_value_is_refused_and_can_be_allowed(compiled: Compiler) -> None:
    assert judge(compiled, INITIAL).refused == {"initial-value"}
    verdict = judge(compiled, INITIAL, allow=("initial-value",)).check()
    assert verdict.reasons == {"edited": "code"}
    assert verdict.warned == {"initial-value"}


@pytest.mark.parametrize("values", [("", "= 5"), ("= 5", "")])
def test_an_initial_value_that_comes_or_goes_is_refused(values: tuple[str, str], compiled: Compiler) -> None:
    pair = program(
        "static int front = 4, limit VALUE, zero;\n"
        "SEPARATE int uses(int x) { front += x; limit++; zero -= x; return front * limit; }\n"
        "SEPARATE int edited(int x) { puts(\"e\"); return x * STEP; }\n",
        "uses(n) + edited(n)", VALUE=values, STEP=("3", "5"),
    )  # fmt: skip
    assert "initial-value" in judge(compiled, pair).refused


def test_more_thread_local_storage_is_refused(compiled: Compiler) -> None:
    pair = program(
        "static __thread int a; NEW\nSEPARATE int edited(int x) { a += x; EDIT; return a; }\n", "edited(n)",
        NEW=("", "static __thread int b;"), EDIT=("", "b++"),
    )  # fmt: skip
    assert judge(compiled, pair).refused == {"tls-layout"}


def test_other_initial_values_of_thread_local_storage_are_refused(compiled: Compiler) -> None:
    pair = program("static __thread int a = NUM;\n"
                   "SEPARATE int edited(int x) { a += x * STEP; return a; }\n", "edited(n)",
                   NUM=("3", "4"), STEP=("1", "5"))  # fmt: skip
    assert "tls-layout" in judge(compiled, pair).refused


def test_the_same_thread_local_storage_is_no_hazard(compiled: Compiler) -> None:
    pair = program("static __thread int a;\nSEPARATE int edited(int x) { a += x * STEP; return a; }\n", "edited(n)",
                   STEP=("1", "5"))  # fmt: skip
    assert judge(compiled, pair).check().reasons == {"edited": "code"}


def test_thread_local_variables_that_change_places_are_refused(compiled: Compiler) -> None:
    pair = program(
        "static __thread int ORDER;\nSEPARATE int one(int x) { aa += x; return aa; }\n"
        "SEPARATE int two(int x) { bb -= x; return bb; }\n", "one(n) + two(n)", ORDER=("aa, bb", "bb, aa"),
    )  # fmt: skip
    assert "tls-layout" in judge(compiled, pair).refused


def test_a_new_constructor_is_refused(compiled: Compiler) -> None:
    pair = program(
        "static int q;\nNEW\nSEPARATE int edited(int x) { q += x * STEP; return q; }\n", "edited(n)",
        NEW=("", "__attribute__((constructor)) static void init(void) { q = 4; }"), STEP=("1", "5"),
    )  # fmt: skip
    assert "constructors" in judge(compiled, pair).refused


SHORT = "SEPARATE void edited(int x) { EDIT; }\nSEPARATE int behind(int x) { return x * 3; }\n"


def test_a_function_shorter_than_the_entry_jump_is_refused(compiled: Compiler) -> None:
    pair = program(SHORT, "(edited(n), behind(n))", EDIT=("", 'puts("x")'))
    assert "short-function" in judge(compiled, pair, "-Os", "-falign-functions=1").refused


def test_a_short_function_with_padding_behind_it_is_patched(compiled: Compiler) -> None:
    pair = program(SHORT, "(edited(n), behind(n))", EDIT=("", 'puts("x")'))
    verdict = judge(compiled, pair, "-falign-functions=16").check()
    assert verdict.functions["edited"].old_size == 1


def test_a_new_import_is_bound_later(compiled: Compiler) -> None:
    pair = program("SEPARATE int edited(int x) { puts(\"e\"); EDIT; return x; }\n", "edited(n)",
                   EDIT=("", "x += strtol(\"4\", 0, x)"))  # fmt: skip
    verdict = judge(compiled, pair).check()
    assert verdict.warned == {"new-import"}
    assert [(i.name, i.version) for i in verdict.made.imports] == [("strtol", "GLIBC_2.2.5")]


def test_an_import_that_unpatched_code_had_is_not_new(compiled: Compiler) -> None:
    pair = program(
        'SEPARATE int edited(int x) { puts("e"); EDIT; return x; }\n', "edited(n)", EDIT=("", 'printf("%d", x)')
    )
    verdict = judge(compiled, pair).check()
    assert (verdict.warned, verdict.made.imports) == (set(), ())


def test_another_library_is_left_to_the_process(compiled: Compiler) -> None:
    """One that the process loaded when it started will do: patcher/process/scope.py refuses the others."""
    pair = program("double cos(double);\nSEPARATE int edited(int x) { puts(\"e\"); EDIT; return x; }\n", "edited(n)",
                   EDIT=("", "x += cos(x)"))  # fmt: skip
    verdict = judge(compiled, pair, "-lm", "-Wl,--as-needed")
    assert verdict.warned >= {"new-library", "new-import"}
    assert verdict.made.needed == ("libm.so.6",)


@pytest.mark.parametrize("table", [True, False])
def test_code_that_throws_or_catches_needs_the_search_table(table: bool, compiled: Compiler) -> None:
    pair = program(
        "#include <stdexcept>\nSEPARATE int throws(int x) { if (x > 3) throw std::runtime_error(\"big\"); return x; }\n"
        "SEPARATE int edited(int x) { try { return throws(x) * 2; } catch (std::exception &e) { return STEP; } }\n",
        "edited(n)", STEP=("1", "3"),
    )  # fmt: skip
    flag = "-Wl,--eh-frame-hdr" if table else "-Wl,--no-eh-frame-hdr"
    verdict = judge(compiled, pair, "-x", "c++", "-std=gnu++17", "-fpermissive", flag, cc="g++")
    assert verdict.refused == (set() if table else {"exceptions"})


def test_stored_labels_are_refused_at_a_fixed_address_too(compiled: Compiler) -> None:
    pair = program(
        "static void *saved;\nSEPARATE int edited(int x) { static void *const labels[] = {&&a, &&b, &&c};\n"
        "if (!saved) saved = labels[x % 3]; goto *saved;\n"
        'a: puts("a"); x += STEP; saved = labels[1]; b: puts("b"); x *= 3; c: puts("c"); return x; }\n',
        "edited(n)",
        STEP=STEP,
    )
    assert judge(compiled, pair, link="no-pie").refused == {"label-table"}


def test_a_changed_constructor_is_reported(compiled: Compiler) -> None:
    pair = program(
        "static int q;\n__attribute__((constructor)) static void init(void) { q = NUM; }\n"
        "SEPARATE int uses(int x) { q += x; return q; }\n",
        "uses(n)",
        NUM=("4", "5"),
    )
    verdict = judge(compiled, pair)
    assert verdict.refused or verdict.warned


def test_a_program_that_switches_stacks_is_warned_of(compiled: Compiler) -> None:
    pair = program(
        "#include <ucontext.h>\nstatic ucontext_t here, there;\n"
        "SEPARATE int edited(int x) { puts(\"e\"); return x * STEP; }\n"
        "SEPARATE int switches(int x) { swapcontext(&here, &there); return x; }\n",
        "edited(n) + switches(n)",
        STEP=("3", "5"),
    )
    verdict = judge(compiled, pair)
    assert not verdict.refused, "what no files can tell is decided when it is applied"
    assert verdict.warned == {"coroutines"}


HANDLERS = (
    "struct methods { const char *name; int (*open)(int), (*check)(int); };\n"
    "SEPARATE int opens(int x) { return company1(x) + 1; }\nCHECKS\n"
    'struct methods one = {"one", opens, FIRST}, two = {"two", opens, SECOND};\n'
    "SEPARATE int runs(int x) { struct methods *m = x & 1 ? &one : &two; return m->open(x) + m->check(x); }"
)
CHECK = "SEPARATE int {0}(int x) {{ {1} }}"
SHARED = CHECK.format("checks", "company2(x); return company1(x) * 5;")
SPLIT = CHECK.format("checks", "if (x > 3) company3(x); return company1(x) ^ 7;") + "\n" + CHECK.format(
    "other", 'for (int i = 0; i < x; i++) printf("%d %ld\\n", i, company_a); return (int)company_b;'
)  # fmt: skip


def test_a_function_that_two_new_ones_replace_is_kept_by_who_points_to_it(compiled: Compiler) -> None:
    """Of two slots that held one function each holds another one now: nothing says which of them it became."""
    words = {"CHECKS": (SHARED, SPLIT), "FIRST": ("checks", "checks"), "SECOND": ("checks", "other")}
    verdict = judge(compiled, program(HANDLERS, "runs(n)", **words))
    assert verdict.refused & {"kept-function", "ambiguous-function"}


def test_a_function_that_is_gone_and_that_no_table_held_is_no_hazard(compiled: Compiler) -> None:
    helper = CHECK.format("helper", "company2(x); return company1(x) * 5;")
    pair = program(
        "HELPER\nSEPARATE int edited(int x) { return CALL + company4(x); }", "edited(n)",
        HELPER=(helper, ""), CALL=("helper(x)", "company1(x) * 9"),
    )  # fmt: skip
    assert judge(compiled, pair).check().reasons == {"edited": "code"}
