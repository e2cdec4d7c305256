"""Types by debug information: what changed is named exactly, and what did not is no hazard."""

from __future__ import annotations

import pytest

from elfdiff.diff import Options, diff
from elfdiff.errors import Refused
from elfdiff.patchobject import Finding
from tests.compile import Compiler
from tests.verdict import Pair, Verdict, judge, program

DWARF = [("gcc", "-gdwarf-5"), ("gcc", "-gdwarf-4"), ("clang", "-gdwarf-5"), ("clang", "-gdwarf-4")]

USERS = (
    "SEPARATE int one(struct s *p) { puts(\"1\"); return p->b++ EDIT; }\n"
    "SEPARATE int two(struct s *p) { puts(\"2\"); return p->b * 3; }\n"
    "SEPARATE int makes(int x) { struct s *p = calloc(3, 96); return one(p + x) + two(p); }\n"
)  # fmt: skip


def described(
    compiled: Compiler, pair: Pair, *flags: str, cc: str = "gcc", link: str = "pie", allow: tuple[str, ...] = ()
) -> Verdict:
    return judge(compiled, pair, "-g", *flags, cc=cc, link=link, stripped=False, allow=allow)


def structure(old: str, new: str, users: str = USERS, more: str = "") -> Pair:
    """struct s as it was and is, and functions that use its member b; one of them is edited."""
    text = f"{more}\nstruct s {{ BODY }};\n{users}"
    return program(text, "makes(n)", None, BODY=(old, new), EDIT=("", "+ 7"))


def layouts(verdict: Verdict, code: str = "struct-layout") -> list[Finding]:
    return [finding for finding in verdict.findings if finding.code == code]


CHANGED = {
    "inserted in the middle": ("int a; int b; int c;", "int a; int n; int b; int c;", "b at 4 -> 8"),
    "appended": ("int a; int b;", "int a; int b; long n;", "size 8 -> 16"),
    "put into padding": ("int a; int b; long c; char d;", "int a; int b; long c; char d; char n;", "new n at 17"),
    "reordered": ("int a; int b; int c;", "int b; int a; int c;", "b at 4 -> 0"),
    "widened": ("int a; int b; int c;", "long a; int b; int c;", "int32 -> int64"),
    "another kind of value": ("int a; int b; int c;", "int a; int b; float c;", "int32 -> float32"),
    "array grown": ("int a[3]; int b; int c;", "int a[5]; int b; int c;", "int32[3] -> int32[5]"),
    "bit-field moved": ("int b; int x:3; int y:4;", "int b; int x:5; int y:4;", "y at 4.3 -> 4.5"),
    "other pointee": ("int b; struct u *c;", "int b; struct v *c;", "struct u * -> struct v *"),
    "in a nested one": ("int a; struct {int i, j;} in; int b;", "int a; struct {int i, k, j;} in; int b;", "in.j at 8"),
    "in an unnamed one": ("int a; struct {int i, j;}; int b;", "int a; struct {int j, i;}; int b;", "j at 8 -> 4"),
    "union grown": ("int b; union {int i;} u; int c;", "int b; union {int i; long l;} u; int c;", "u"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_changed_layout_is_refused_and_named(what: str, compiled: Compiler) -> None:
    old, new, said = CHANGED[what]
    verdict = described(compiled, structure(old, new))
    found = layouts(verdict)
    assert "struct-layout" in verdict.refused
    assert len(found) == 1 and "struct s " in found[0].what and said in found[0].what
    assert any(place.startswith("one (main.c:") for place in found[0].where)


@pytest.mark.parametrize(("cc", "dwarf"), DWARF)
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_it_is_found_in_all_dialects(cc: str, dwarf: str, level: str, compiled: Compiler) -> None:
    for what in ("inserted in the middle", "bit-field moved"):
        old, new, said = CHANGED[what]
        found = layouts(described(compiled, structure(old, new), dwarf, level, cc=cc))
        assert len(found) == 1 and said in found[0].what


KEPT = {
    "nothing": ("int a; int b;", "int a; int b;"),
    "a member of a union": ("int b; union {int i; long l;} u;", "int b; union {int i; long l; char c[8];} u;"),
    "a name": ("int a; int b; int c;", "int a; int b; int renamed;"),
    "a sign": ("int a; int b; int c;", "unsigned a; int b; const int c;"),
    "a use": ("int a; int b; long c;", "int a; int b; /* c, padded */ long c;"),
}


@pytest.mark.parametrize("what", KEPT)
def test_a_layout_that_did_not_change_is_no_hazard(what: str, compiled: Compiler) -> None:
    verdict = described(compiled, structure(*KEPT[what])).check()
    assert verdict.reasons == {"one": "code"}
    assert verdict.findings == ()


SHIFTED = program(
    "struct s { int a; int b; int c; };\n"
    "SEPARATE int one(struct s *p) { puts(\"1\"); return p->FIELD++; }\n"
    "SEPARATE int two(struct s *p) { puts(\"2\"); return p->FIELD * 3; }\n"
    "SEPARATE int makes(int x) { struct s *p = calloc(3, 96); return one(p + x) + two(p); }\n",
    "makes(n)", FIELD=("a", "b"),
)  # fmt: skip


def test_the_signature_is_silent_where_types_prove_that_nothing_moved(compiled: Compiler) -> None:
    """Two functions that were edited to use the next field look like a moved field to who sees no types."""
    assert judge(compiled, SHIFTED).refused == {"struct-layout"}
    verdict = described(compiled, SHIFTED).check()
    assert (verdict.refused, verdict.warned) == (set(), set())


def test_the_signature_speaks_where_one_build_has_no_types(compiled: Compiler) -> None:
    bare = compiled(SHIFTED.sources(0), stripped=False)
    described_one = compiled(SHIFTED.sources(1), "-g", stripped=False)
    with pytest.raises(Refused) as caught:
        diff(bare, described_one, Options())
    assert [finding.code for finding in caught.value.findings] == ["struct-layout"]


@pytest.mark.parametrize(("cc", "flag"), [("gcc", "-g1"), ("clang", "-g1"), ("clang", "-gline-tables-only")])
def test_the_signature_speaks_where_debug_information_has_lines_alone(cc: str, flag: str, compiled: Compiler) -> None:
    verdict = judge(compiled, structure(*CHANGED["inserted in the middle"][:2]), flag, cc=cc, stripped=False)
    assert verdict.refused == {"struct-layout"}
    assert "fields moved by +4 bytes" in verdict.findings[0].what


# -- who uses a type --------------------------------------------------------------------------------------------


def test_a_structure_on_the_stack_of_changed_functions_alone_is_refused_too(compiled: Compiler) -> None:
    """Nothing in the files proves that no pointer to one was kept; who knows it can say so."""
    pair = program(
        "struct s { int a; MORE int b; };\n"
        "SEPARATE int fills(struct s *p, int x) { puts(\"f\"); p->a = x; p->b = x * 3; return x; }\n"
        "SEPARATE int edited(int x) { struct s local; fills(&local, x); return local.a + local.b; }\n",
        "edited(n)", MORE=("", "int n;"),
    )  # fmt: skip
    assert "struct-layout" in described(compiled, pair).refused
    allowed = described(compiled, pair, allow=("struct-layout",)).check()
    assert [(f.code, f.lifted) for f in allowed.findings] == [("struct-layout", True)]


APART = program(
    "int other(int);\nSEPARATE int edited(int x) { puts(\"e\"); return x * STEP; }\n", "edited(n) + other(n)",
    {"other.c": "struct s { int a; MORE };\nSEPARATE int other(int x) { struct s *p = malloc(64); p->a = x;\n"
                "puts(\"o\"); return p->a; }\n"},
    STEP=("3", "5"), MORE=("", "int n;"),
)  # fmt: skip


def test_a_structure_that_only_unchanged_code_of_another_unit_knows_is_no_hazard(compiled: Compiler) -> None:
    """Code of equal bytes reaches what it reaches where it was: the new member concerns nobody yet."""
    assert described(compiled, APART).check().findings == ()


def test_a_structure_that_a_unit_gets_to_know_is_compared_with_what_other_units_knew(compiled: Compiler) -> None:
    """The variable lies in code that did not change, and is shorter than the new code takes it for."""
    old, new = "struct s { long a; };\n", "struct s { long a, n; };\n"
    pair = program(
        "struct s;\nextern struct s *get(void);\nKNOWN"
        "SEPARATE int edited(int x) { puts(\"e\"); struct s *p = get(); return p != 0 USE; }\n", "edited(n)",
        {"other.c": "KNOWS" + "static struct s the;\nSEPARATE struct s *get(void) { the.a++; return &the; }\n"},
        KNOWN=("", new), KNOWS=(old, new), USE=("", "+ p->n"),
    )  # fmt: skip
    found = layouts(described(compiled, pair))
    assert len(found) == 1 and "struct s has another layout: size 8 -> 16" in found[0].what


def test_a_structure_that_is_new_is_no_hazard(compiled: Compiler) -> None:
    pair = program(
        "NEW\nSEPARATE int edited(int x) { EDIT; puts(\"e\"); return x; }\n", "edited(n)",
        NEW=("", "struct fresh { int a, b; };"), EDIT=("", "struct fresh f = {x, 4}; x += printf(\"%p\", &f)"),
    )  # fmt: skip
    assert layouts(described(compiled, pair).check()) == []


def test_a_static_variable_of_a_function_has_a_type_too(compiled: Compiler) -> None:
    pair = program(
        "SEPARATE int edited(int x) { static TYPE kept; puts(\"e\"); kept += x; return kept * 3; }\n", "edited(n)",
        TYPE=("int", "float"),
    )  # fmt: skip
    verdict = described(compiled, pair)
    assert "variable-type" in verdict.refused
    assert any("edited()::kept" in finding.what for finding in verdict.findings)


@pytest.mark.parametrize("flags", [("-flto",), ("-flto", "-O3")])
def test_types_of_inlined_code_of_other_units_are_found(flags: tuple[str, ...], compiled: Compiler) -> None:
    pair = program(
        "struct s;\nint reads(struct s *p);\nstruct s *makes(int x);\n"
        "SEPARATE int edited(int x) { puts(\"e\"); return reads(makes(x)) + 1; }\n", "edited(n)",
        {"other.c": "struct s { int a; MORE int b; };\nint reads(struct s *p) { return p->b * 3; }\n"
                    "SEPARATE struct s *makes(int x) { puts(\"m\"); return calloc(x, 64); }\n"},
        MORE=("", "int n;"),
    )  # fmt: skip
    verdict = described(compiled, pair, *flags)
    found = layouts(verdict)
    assert len(found) == 1 and "b at 4 -> 8" in found[0].what


# -- C++ --------------------------------------------------------------------------------------------------------

CLASSES = (
    "namespace room { struct Base { int first; BASE virtual int say(int x); VIRTUAL virtual ~Base() {} };\n"
    "class Derived : public Base { public: struct Inner { short s; INNER int i; }; Inner inner; int last;"
    " int say(int x) override; }; }\n"
    "int room::Base::say(int x) { return x; }\nint room::Derived::say(int x) { puts(\"s\"); return x + last; }\n"
    "SEPARATE int edited(room::Derived *p, int x) { puts(\"e\"); return p->say(x) + p->inner.i * STEP; }\n"
)  # fmt: skip
CXX = ("-x", "c++", "-std=gnu++17", "-fpermissive")
MEMBERS = {
    "nothing": ({}, set()),
    "in a nested class": ({"INNER": ("", "short t, u, v;")}, {"room::Derived::Inner", "room::Derived"}),
    "in a base class": ({"BASE": ("", "long grown;")}, {"room::Base", "room::Derived"}),
    "a virtual function": ({"VIRTUAL": ("", "virtual int more(int x) { return x; }")}, {"room::Base"}),
}


@pytest.mark.parametrize("what", MEMBERS)
@pytest.mark.parametrize("cc", ["g++", "clang++"])
def test_classes(what: str, cc: str, compiled: Compiler) -> None:
    words, names = MEMBERS[what]
    filled = {"BASE": ("", ""), "VIRTUAL": ("", ""), "INNER": ("", ""), "STEP": ("3", "5"), **words}
    pair = program(CLASSES, "(int)(n > 90 ? edited(new room::Derived, n) : 0)", None, **filled)
    verdict = judge(
        compiled, pair, "-g", *CXX, cc=cc, stripped=False, allow=("exceptions", "allocation-size", "calling-convention")
    )
    said = {finding.what.split(" has another")[0] for finding in layouts(verdict) if "has another" in finding.what}
    assert {f"struct {name}" for name in names} <= said
    assert names or not said
