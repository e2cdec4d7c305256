"""Constants by content: what differs must bring its readers into the patch, what says the same must not."""

from __future__ import annotations

import pytest

from tests.compile import Compiler
from tests.verdict import Pair, judge, program

READS = "SEPARATE int reads(int x) { return t[x]; }\n"
CALL = "reads(n)"


def table(declaration: str, **words: tuple[str, str]) -> Pair:
    """A table that ``reads`` indexes and nobody else names."""
    return program(declaration + READS, CALL, **words)


DIFFERING = {
    "string": program('SEPARATE int reads(int x) { return puts("a WORD"); }', CALL, WORD=("cat", "dog")),
    "string behind a pointer": program(
        'static const char *const t[] = {"a", "b WORD", "c"};\nSEPARATE int reads(int x) { return puts(t[x]); }',
        CALL, WORD=("cat", "dog"),
    ),
    "double": program("SEPARATE double reads(double x) { return x * NUM; }", "(int)reads(n)", NUM=("1.5", "1.25")),
    "float vector": program(
        "SEPARATE void reads(float *x) { for (int i = 0; i < 64; i++) x[i] *= NUM; }\nfloat q[64];",
        "(reads(q), n)", NUM=("1.5f", "1.25f"),
    ),
    "ints": table("static const int t[] = {1000000001, 1000000002, NUM};\n", NUM=("1000000003", "1000000004")),
    "first int": table("static const int t[] = {NUM, 1000000002, 1};\n", NUM=("1000000003", "1000000004")),
    "small ints": table("static const int t[] = {1, 2, 3, NUM};\n", NUM=("4", "5")),
    "bytes": table("static const unsigned char t[] = {1, 2, 200, NUM};\n", NUM=("4", "5")),
    "values of a switch": program(
        "SEPARATE int reads(int x) { switch (x) { case 0: return 51; case 1: return NUM; case 2: return 97;"
        " case 3: return 111; case 4: return 17; case 5: return 1; } return 0; }", CALL, NUM=("8", "9"),
    ),
    "functions": program(
        "SEPARATE int fa(int x) { return x + 1; }\nSEPARATE int fb(int x) { return x * x; }\n"
        "static int (*const t[])(int) = {NAMES};\nSEPARATE int reads(int x) { return t[x](x); }",
        CALL, NAMES=("fa, fb", "fb, fa"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERING)
@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_readers_of_what_differs_are_patched(name: str, cc: str, compiled: Compiler) -> None:
    verdict = judge(compiled, DIFFERING[name], "-O3" if "vector" in name else "-O2", cc=cc).check()
    assert verdict.reasons["reads"] == "constant"
    assert cc == "clang" or len(verdict.reasons) == 1


SAME = {
    "moved strings": program(
        'SEPARATE int reads(int x) { return puts("a word"); }\nSEPARATE int edits(int x) { puts("WORD"); return x; }',
        "reads(n) + edits(n)", WORD=("short", "something that is much longer"),
    ),
    "moved table of strings": program(
        'static const char *const t[] = {"a", "b", "c"};\nSEPARATE int reads(int x) { return puts(t[x]); }\n'
        'SEPARATE int edits(int x) { puts("WORD"); return x; }',
        "reads(n) + edits(n)", WORD=("short", "something that is much longer"),
    ),
    "moved switch": program(
        'SEPARATE int reads(int x) { switch (x) { case 0: puts("a"); return 5; case 1: puts("b"); return 8;'
        ' case 2: puts("c"); return 9; case 3: puts("d"); return 1; case 4: puts("e"); return 7; } return 0; }\n'
        'SEPARATE int edits(int x) { puts("WORD"); return x; }',
        "reads(n) + edits(n)", WORD=("short", "something that is much longer"),
    ),
    "tail of another string": program(
        'SEPARATE int reads(int x) { return puts("word"); }\nSEPARATE int edits(int x) { puts("WORD"); return x; }',
        "reads(n) + edits(n)", WORD=("short", "a longer word"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_readers_of_what_only_moved_are_left(name: str, cc: str, compiled: Compiler) -> None:
    verdict = judge(compiled, SAME[name], cc=cc).check()
    assert verdict.reasons["edits"] == "constant"
    assert "reads" not in verdict.reasons


def test_a_grown_switch_is_a_change(compiled: Compiler) -> None:
    pair = program(
        'SEPARATE int reads(int x) { switch (x) { case 0: puts("a"); return 5; case 1: puts("b"); return 8;'
        ' case 2: puts("c"); return 9; case 3: puts("d"); return 1; case 4: puts("e"); return 7; CASE } return 0; }',
        CALL, CASE=("", 'case 5: puts("f"); return 6;'),
    )  # fmt: skip
    verdict = judge(compiled, pair).check()
    assert verdict.reasons["reads"] == "code"


ELSEWHERE = "extern TYPE t[];\nSEPARATE int reads(int x) { return t[x]; }\n"
DIRECT = "SEPARATE int direct(void) { return t[3]; }\n"
POINTED = "SEPARATE int deref(const int *p) { return *p + 1; }\n"
BOTH = "reads(n) + direct()"
BIG = ("1000000005", "1000000006")


def elsewhere(content: str, code: str, *, type_: str = "const int", **words: tuple[str, str]) -> Pair:
    """A table in another translation unit, so that the compiler does not fold its elements."""
    text = ELSEWHERE.replace("TYPE", type_) + code
    return program(text, BOTH, {"table.c": f"{type_} t[40] = {{{content}}};"}, **words)


ESCAPES = {
    "far behind an element that is loaded directly": (
        "Segment cut at MAX_LOAD: what lies more than 64 bytes behind a loaded address is never compared",
        elsewhere("1000000001, 2000000001, 3, 4, 5, [30] = NUM, 99", DIRECT, NUM=BIG),
    ),
    "behind zeros": (
        "a run of zeros in front of a named element counts as a closed string: blame stops at it",
        elsewhere(
            "0, 0, 0, NUM, 1000000009",
            POINTED + "SEPARATE int direct(void) { return deref(&t[3]); }", NUM=BIG,
        ),
    ),
    "behind an element that is loaded directly": (
        "a loaded element counts as closed and stops the blame on its way to the table's beginning",
        elsewhere(
            "1000000001, 1000000001, 1, 3, NUM, 1000000009",
            POINTED + "SEPARATE int direct(void) { return deref(&t[4]) + t[3]; }", NUM=BIG,
        ),
    ),
    "row of a table of strings": (
        "a first row that is text and zeros counts as a closed string, though later rows are read through it",
        program(
            "extern const char t[4][8];\nSEPARATE int reads(int x) { return puts(t[x]); }\n"
            "SEPARATE int direct(void) { return puts(t[1]); }",
            BOTH, {"table.c": 'const char t[4][8] = {"a", "WORD", "c", "d"};'}, WORD=("b", "B"),
        ),
    ),
    "small numbers": (
        "_same_offsets takes a table of small ints for offsets to strings; two that lead to zero bytes are 'equal'",
        table("static const int t[] = {1, 2, 3, NUM};\n", NUM=("5", "6")),
    ),
    "small numbers, far": (
        "_same_offsets takes a table of small ints for offsets to strings; two that lead to zero bytes are 'equal'",
        table("static const int t[300] = {1, 2, 3, [299] = NUM};\n", NUM=("6", "7")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_readers_through_the_beginning_of_a_table_are_patched(name: str, compiled: Compiler) -> None:
    verdict = judge(compiled, ESCAPES[name][1])
    assert verdict.refused or "reads" in verdict.reasons


GROWN = {
    "numbers": elsewhere("1000000001, 1000000001, 3, 4 MORE", "SEPARATE int direct(void) { int s = 0;"
    " for (int i = 0; i < COUNT; i++) s += reads(i); return s; }", MORE=("", ", 5, 6, 7, 8"), COUNT=("4", "8")),
    "strings": program('static const char *const t[] = {"a", "b", "c" MORE};\n'
    "SEPARATE const char *reads(int x) { return t[x]; }\nSEPARATE int direct(void) { int s = 0;"
    " for (int i = 0; i < COUNT; i++) s += puts(reads(i)); return s; }", "direct()",
    MORE=("", ', "d", "e"'), COUNT=("3", "5")),
}  # fmt: skip


@pytest.mark.parametrize("name", GROWN)
def test_a_table_that_grew_brings_its_reader(name: str, compiled: Compiler) -> None:
    pair = GROWN[name]
    pair = Pair(pair.text, pair.words, {k: v.replace("t[40]", "t[]") for k, v in pair.files.items()})
    verdict = judge(compiled, pair)
    assert verdict.safe


def test_a_table_with_a_sentinel_that_grew_brings_its_reader(compiled: Compiler) -> None:
    pair = program(
        'static const char *const t[] = {"a", "b", MORE 0};\nSEPARATE const char *reads(int x) { return t[x]; }\n'
        "SEPARATE int prints(int n) { int s = 0; for (int i = 0; reads(i); i++) s += puts(reads(i)); return s; }",
        "prints(n)", MORE=("", '"c", "d",'),
    )  # fmt: skip
    assert judge(compiled, pair).check().reasons == {"reads": "constant"}


KINDS = {"objects.c": """
struct shape { const char *name; long sizes[5]; int (*draw)(int); const char *more; };
struct route { long cost, limit; const char *from, *to; long spare[4]; };
struct group { int (*enter)(int), (*leave)(int); long id[6]; };
extern int company1(int), company2(int);
const struct group last = {company2, company1, {91, LAST}};
const struct route middle = {MIDDLE, 5000000002, "here", "there", {7, 8, 9, 10}};
const struct shape first = {"first", {1000000001, FIRST, 4, 5, 6}, company1, "of all"};
"""}  # fmt: skip
USERS = """
extern const char first[], middle[], last[];
SEPARATE long uses_first(int n) { return first[n]; }
SEPARATE long uses_middle(int n) { return middle[n]; }
SEPARATE long uses_last(int n) { return last[n]; }
"""


@pytest.mark.parametrize("which", ["FIRST", "MIDDLE", "LAST"])
@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_objects_of_other_shapes_are_other_objects(which: str, cc: str, compiled: Compiler) -> None:
    words = {"FIRST": ("3", "3"), "MIDDLE": ("4", "4"), "LAST": ("5", "5"), which: BIG}
    pair = program(USERS, "uses_first(n) + uses_middle(n) + uses_last(n)", KINDS, **words)
    verdict = judge(compiled, pair, cc=cc).check()
    reader = f"uses_{which.lower()}"
    assert verdict.reasons[reader] == "constant"
    if cc == "gcc":  # clang aligns them to 16 only, and then the one before could be the beginning of a structure
        assert verdict.reasons == {reader: "constant"}


ROW = "struct row { const char *name; long v[SIZE]; };\n"
ROWS = {"rows.c": ROW + 'const struct row rows[5] = {{"a", {1}}, {"b", {2}}, {"c", {3}}, {0, {NUM}}, {"e", {5}}};'}
ROW_USERS = ROW + (
    "extern const struct row rows[5];\nSEPARATE long reads(int n) { return rows[n].v[0]; }\n"
    "SEPARATE long deref(const struct row *r) { return r->v[0]; }\n"
    "SEPARATE long direct(void) { return deref(&rows[2]); }\nSEPARATE long other(void) { return deref(&rows[3]); }"
)


@pytest.mark.parametrize("size", [1, 3, 7, 11])
def test_a_named_element_is_still_a_part_of_its_array(size: int, compiled: Compiler) -> None:
    pair = program(ROW_USERS, "reads(n) + direct() + other()", ROWS, NUM=BIG, SIZE=(str(size), str(size)))
    assert judge(compiled, pair).check().reasons["reads"] == "constant"


MEMBERS = {"objects.c": """
struct all { const char *name; long pad[3]; char text[32]; int (*call)(int); };
extern int company1(int);
const struct all all = {"all", {1, 2, 3}, "WORD", company1};
"""}  # fmt: skip
MEMBER_USERS = """
struct all { const char *name; long pad[3]; char text[32]; int (*call)(int); };
extern const struct all all;
SEPARATE int deref(const struct all *a) { return a->text[2]; }
SEPARATE int whole(int n) { return deref(&all) + puts(all.text); }
"""


def test_a_named_member_is_still_a_part_of_its_structure(compiled: Compiler) -> None:
    pair = program(MEMBER_USERS, "whole(n)", MEMBERS, WORD=("some words", "other words"))
    assert judge(compiled, pair).check().reasons["whole"] == "constant"


EXPORTED = {"objects.c": """
extern int company1(int), company2(int);
int level = 3;
int (*hook_a)(int) = company1; int (*hook_b)(int) = company2; const char *label_a = "WORD"; const char *label_b = "b";
"""}  # fmt: skip


def test_exported_variables_end_where_the_next_one_begins(compiled: Compiler) -> None:
    """A number that is loaded by itself may be followed by pointers that only other modules know."""
    pair = program("extern int level; SEPARATE int reads(int n) { return n + level + WORD; }", "reads(n)", {
        "objects.c": EXPORTED["objects.c"].replace("WORD", "a")}, WORD=("1", "2222"))  # fmt: skip
    assert judge(compiled, pair, "-rdynamic").check().reasons == {"reads": "code"}


TABLE_IN_CODE = """
asm(".text; .balign 64; .type in_code, @object; in_code: .long 0, 0, 0x3305eb90, NUM, 0x90e8, 0xe9, 0x7f74, 0x0f74;"
    ".asciz \\"made by hand, tuned by hand; 0123456789\\"; .balign 64; .size in_code, . - in_code");
SEPARATE int reads(int n) { int r; asm("lea in_code(%%rip), %%rax; movl (%%rax,%1,4), %0"
    : "=r"(r) : "r"((long)n) : "rax"); return r; }
SEPARATE int edited(int n) { company1(n); STEP return n; }
"""


@pytest.mark.parametrize("numbers", [("1", "1"), ("1", "2")], ids=["same", "other"])
def test_a_table_among_the_code_is_data(numbers: tuple[str, str], compiled: Compiler) -> None:
    """perlasm keeps tables in .text without an FDE; what reads them changes only with them."""
    step = ("", "puts(\"a step more\"); company2(n); company3(n);")
    pair = program(TABLE_IN_CODE, "edited(n) + reads(n)", NUM=numbers, STEP=step)
    verdict = judge(compiled, pair)
    if numbers[0] == numbers[1]:
        assert verdict.check().reasons == {"edited": "code"}
    else:
        assert "no-unwind" in verdict.refused or "unpinned-address" in verdict.refused or "reads" in verdict.reasons


def test_names_of_functions_are_no_rows_of_a_table(compiled: Compiler) -> None:
    """``__func__`` makes an array for each function, and gcc aligns them to the same distance."""
    pair = program(
        'static const char first[] = "name_of_the_first", second[] = "name_of_another_WORD";\n'
        'static const char last[] = "name_of_last_one";\n'
        "SEPARATE int uses_first(int n) { return puts(first); }\n"
        "SEPARATE int uses_second(int n) { return puts(second); }\n"
        "SEPARATE int uses_last(int n) { return puts(last); }",
        "uses_first(n) + uses_second(n) + uses_last(n)", WORD=("one", "two"),
    )  # fmt: skip
    assert judge(compiled, pair, "-fno-merge-constants").check().reasons == {"uses_second": "constant"}
