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
