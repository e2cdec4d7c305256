"""Explanations: the evidence for every reason, code side by side, and what of them is stored in a patch object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elfdiff.decoding.code import FieldKind
from elfdiff.diff import Options, diff
from elfdiff.differences.codediff_x86_64 import Change, texts
from elfdiff.errors import BadInput, NothingToPatch
from elfdiff.explain import ExplainedFunction, Explanation, explain, explain_pair, select
from elfdiff.patches.evidence import Evidence, EvidenceKind, FunctionEvidence, Names, Reference, pack, unpack
from elfdiff.patches.patchfile import read_patch, write_patch
from elfdiff.patches.quoting import MAX_QUOTED, is_text, printable, quote, quote_both
from elfdiff.patchobject import FORMAT_VERSION, PatchObject
from patcher.explanation.words import sentences
from tests.compile import Compiler
from tests.verdict import Pair, program

REASONS = program(
    "static int check(int x, int y) { if (x > LIMIT) { puts(\"too big\"); x -= y; } if (y < 3) return 7 * x;"
    " return x * y + 2 + rand(); }\n"
    "SEPARATE int alone(int x) { return check(x, rand()) - 1; }\n"
    "SEPARATE int inlining(int x) { puts(\"a\"); for (int i = 0; i < x; i++) x += check(i, x) ^ rand(); puts(\"b\");"
    " return x; }\n"
    "static const int table[] = {1, 2, 3, TABLE, 5, 6};\n"
    "static const char *const names[] = {\"one\", \"two\", NAME, \"four\"};\n"
    "SEPARATE int reads(int x) { return table[x & 3]; }\n"
    "SEPARATE int tells(int x) { puts(names[x & 3]); return x; }\n"
    "SEPARATE int greets(int x) { puts(GREETING); return x + 1; }\n"
    "SEPARATE double scales(double x) { return x * FACTOR; }\n"
    "SEPARATE int first(int x) { return x * 3 + rand(); }\n"
    "SEPARATE int second(int x) { return x * 5 - rand(); }\n"
    "SEPARATE int calls(int x) { return CALLEE(x) + 1; }\n"
    "SEPARATE int prints(int x) { return OUTPUT(\"same\") + x; }\n"
    "SEPARATE int switches(int x) { switch (x) { case 0: return rand(); case 1: return 17 * rand();"
    " case 2: puts(\"x\"); return 4; case 3: abort(); case 4: return x ^ 12; CASE } return 0; }\n"
    "FRESH",
    "alone(n) + inlining(n) + reads(n) + tells(n) + greets(n) + (int)scales(n) + first(n) + second(n) + calls(n)"
    " + prints(n) + switches(n) + (system(\"\"), remove(\"\")) + (USES)",
    LIMIT=("10", "20"), TABLE=("4", "9"), NAME=('"three"', '"drei"'), GREETING=('"hello, world"', '"hello, moon"'),
    FACTOR=("1.5", "2.5"), CALLEE=("first", "second"), OUTPUT=("system", "remove"),
    CASE=("", "case 5: puts(\"five\"); return 5;"), USES=("0", "fresh(n)"),
    FRESH=("", "SEPARATE int fresh(int x) { puts(\"fresh\"); return x - 9; }\n"),
)  # fmt: skip
"""Every reason for which a function can be in a patch, but line numbers."""

REFUSED = program(
    "struct s { int a; WORD int b, c; };\n"
    "SEPARATE int one(struct s *s) { int x = rand(); return (s->c * 3 ^ x) + (x < 9 ? 5 : rand()) - 4; }\n"
    "SEPARATE int two(struct s *s) { int x = rand(); puts(\"two\"); if (x < 9) x += 5 - rand();"
    " return (s->c * 3 ^ x) + s->b - 4; }\n",
    "one((struct s *)v) + two((struct s *)v)", WORD=("", "long more;"),
)  # fmt: skip
LINES = program("SEPARATE int edited(int x) { assert(x); return x + ADD; }\nMORE\n"
                "SEPARATE int below(int x) { assert(x > 3); return x; }\n"
                "SEPARATE int further(int x) { assert(x > 4); return x; }\n",
                "edited(n) + below(n) + further(n)", ADD=("1", "2"), MORE=("", "\n\n"))  # fmt: skip


def build(compiled: Compiler, pair: Pair, *flags: str, stripped: bool = False) -> tuple[Path, Path]:
    old, new = (compiled(pair.sources(k), *flags, stripped=stripped) for k in (0, 1))
    return old, new


@pytest.fixture(scope="session")
def reasons(compiled: Compiler) -> Explanation:
    return explain(diff(*build(compiled, REASONS), Options()))


Said = Callable[[str], str]


@pytest.fixture(scope="session")
def said(reasons: Explanation) -> Said:
    """All sentences about a function."""

    def about(name: str) -> str:
        (item,) = select(reasons, [name])
        return "\n".join(sentence for e in item.evidence for sentence in sentences(e, item.counts))

    return about


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("alone", ("its instructions differ: 1 with other operands",)),
        ("inlining", ("with other operands", "the change of alone is found in it")),
        ("reads", ("the table at table", "{03 00 00 00 04 00 00 00}", "{03 00 00 00 09 00 00 00}")),
        ("tells", ("the table at names", '+0x10: "three" -> +0x10: "drei"')),
        ("greets", ('a string, which differs: "hello, world" -> "hello, moon"',)),
        ("scales", ("a number, which differs: 1.5 -> 2.5",)),
        ("calls", ("another function: first -> second",)),
        ("prints", ("another function: system@plt -> remove@plt",)),
        ("switches", ("its instructions differ", 'names now "five"')),
        ("fresh", ("no counterpart; used by main",)),
        ("main", ("names now fresh",)),
    ],
)
def test_each_reason_has_its_evidence(name: str, words: tuple[str, ...], said: Said) -> None:
    assert all(word in said(name) for word in words), said(name)


def test_a_part_says_what_it_hangs_together_with(reasons: Explanation) -> None:
    parts = [f for f in reasons.functions if f.function.reason == "closure"]
    assert [e.subject for part in parts for e in part.evidence] == ["switches"] * len(parts)
    assert parts and parts[0].function.name.endswith(".cold")


def test_every_function_has_evidence_and_none_has_anothers(reasons: Explanation) -> None:
    kinds = {
        "code": {EvidenceKind.CODE, EvidenceKind.NAMES, EvidenceKind.INLINED},
        "constant": {EvidenceKind.CONSTANT}, "callee": {EvidenceKind.CALLEE, EvidenceKind.VARIABLE},
        "closure": {EvidenceKind.CLOSURE}, "new": {EvidenceKind.NEW, EvidenceKind.MOVED},
    }  # fmt: skip
    for item in reasons.functions:
        assert item.evidence, item.function.name
        assert {e.kind for e in item.evidence} <= kinds[item.function.reason]


def test_debug_information_names_lines_and_inlined_functions(compiled: Compiler) -> None:
    old, new = build(compiled, REASONS, "-g")
    (item,) = select(explain_pair(old, new, Options()), ["inlining"])
    told = [sentence for e in item.evidence for sentence in sentences(e, item.counts)]
    assert any("main.c:" in sentence for sentence in told)
    assert "the difference lies in code of check, which is inlined here" in told
    line = next(k for k, text in enumerate(REASONS.sources(0)["main.c"].splitlines(), 1) if "int check(" in text)
    assert any(f"main.c:{line}" in sentence for sentence in told), (line, told)


def test_a_changed_structure_is_no_inlined_function(compiled: Compiler) -> None:
    found = explain_pair(*build(compiled, REFUSED), Options())
    assert found.verdict.name == "refused"
    assert {f.code for f in found.findings} >= {"struct-layout"}
    assert {f.function.name for f in found.functions} >= {"one", "two"}
    assert not [e for f in found.functions for e in f.evidence if e.kind is EvidenceKind.INLINED]


# -- code side by side --------------------------------------------------------------------------------------------


def rows(item: ExplainedFunction) -> list[tuple[str, str, str]]:
    assert item.new is not None
    old, new = texts(item.old) if item.old else [], texts(item.new)
    return [
        (row.change.value, "" if row.old is None else old[row.old], "" if row.new is None else new[row.new])
        for row in item.rows
    ]


def test_the_code_is_shown_with_names(reasons: Explanation) -> None:
    greets, prints, scales = (rows(*select(reasons, [name])) for name in ("greets", "prints", "scales"))
    changed = [row for row in greets if row[0] != Change.SAME]
    assert changed == [("reference", 'lea rdi, "hello, world"', 'lea rdi, "hello, moon"')]
    assert ("same", "call puts@plt", "call puts@plt") in greets
    assert any(a.endswith("system@plt") and b.endswith("remove@plt") for _, a, b in prints)
    assert any("[1.5]" in a and "[2.5]" in b for _, a, b in scales)


def test_every_instruction_stands_in_one_row_and_in_order(reasons: Explanation) -> None:
    for item in reasons.functions:
        assert item.new is not None
        assert [r.new for r in item.rows if r.new is not None] == list(range(len(item.new.instructions)))
        count = len(item.old.instructions) if item.old else 0
        assert [r.old for r in item.rows if r.old is not None] == list(range(count))
        assert sum(i.size for i in item.new.instructions) == item.function.new_size


def test_what_is_called_the_same_is_the_same_bytes_but_for_references(reasons: Explanation) -> None:
    for item in reasons.functions:
        for row in item.rows:
            if row.change is Change.SAME and item.old and item.new and row.old is not None and row.new is not None:
                assert item.old.instructions[row.old].masked == item.new.instructions[row.new].masked


BRANCHES = program(
    "asm(\".type jumper, @function\\njumper: .cfi_startproc\\n MORE test %edi, %edi\\n je TARGETf\\n js 3f\\n\"\n"
    "    \" mov $1, %eax\\n add $5, %eax\\n ret\\n1: mov $2, %eax\\n sub $6, %eax\\n ret\\n\"\n"
    "    \"2: mov $3, %eax\\n xor $7, %eax\\n ret\\n3: mov $4, %eax\\n and $8, %eax\\n ret\\n\"\n"
    "    \".cfi_endproc\\n.size jumper, .-jumper\");\nint jumper(int);\n", "jumper(n)",
    MORE=("", "xor %edx, %edx; lea 4(%rdi), %ecx; mov %ecx, %esi;"), TARGET=("1", "2"),
)  # fmt: skip


def test_a_branch_is_the_same_where_it_leads_to_the_same(compiled: Compiler) -> None:
    (item,) = select(explain_pair(*build(compiled, BRANCHES), Options()), ["jumper"])
    branches = [(change, old.split()[0]) for change, old, new in rows(item) if old.startswith("j") and new]
    assert branches == [("reference", "je"), ("same", "js")], "both have other distances now"


@pytest.mark.parametrize("link", ["no-pie", "library"])
@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_every_link_and_compiler_is_explained(link: str, cc: str, compiled: Compiler) -> None:
    old, new = (compiled(REASONS.sources(k), link=link, cc=cc) for k in (0, 1))
    found = explain_pair(old, new, Options())
    assert found.functions
    strings = {label for f in found.functions for i in (f.new.instructions if f.new else ()) for label in
               (r.label for r in i.references)}  # fmt: skip
    assert '"hello, moon"' in strings
    for item in found.functions:
        rows(item)


# -- what is stored -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def patch(compiled: Compiler) -> PatchObject:
    return diff(*build(compiled, REASONS, stripped=True), Options())


def test_the_file_carries_the_whole_explanation(patch: PatchObject, tmp_path: Path) -> None:
    written = write_patch(patch, tmp_path / "fix")
    assert explain(read_patch(tmp_path / "fix")) == explain(written)


def test_a_patch_without_evidence_is_shown_all_the_same(patch: PatchObject, tmp_path: Path) -> None:
    written = write_patch(replace(patch, evidence=b"", old_code=b""), tmp_path / "fix")
    found = explain(read_patch(tmp_path / "fix"))
    assert not found.complete
    assert [f.function for f in found.functions] == list(written.functions)
    assert all(not f.rows and not f.evidence for f in found.functions)


def test_the_format_did_not_change_for_who_applies_patches(patch: PatchObject, tmp_path: Path) -> None:
    """A reader that does not know the sections passes them over: so the format's number need not be raised."""
    write_patch(patch, tmp_path / "with")
    write_patch(replace(patch, evidence=b"", old_code=b""), tmp_path / "without")
    first, second = (replace(read_patch(tmp_path / name), id="", evidence=b"", old_code=b"", relocations=None)  # type: ignore[arg-type]
                     for name in ("with", "without"))  # fmt: skip
    assert first == second
    assert FORMAT_VERSION >= 1


@pytest.mark.parametrize("damage", [
    {"evidence": b"no zlib"}, {"evidence": pack(())}, {"old_code": b"\x90"},
], ids=["not packed", "of no function", "another old code"])  # fmt: skip
def test_evidence_that_does_not_fit_is_bad_input(damage: dict[str, bytes], patch: PatchObject) -> None:
    with pytest.raises(BadInput) as caught:
        explain(replace(patch, **damage))  # type: ignore[arg-type]
    assert caught.value.next_step


@pytest.mark.parametrize("runs", [((0, 0, 10**6),), ((5, 5, 2), (1, 1, 1)), ((10**7, 0, 0),)])
def test_an_alignment_that_lies_is_bad_input(runs: tuple[tuple[int, int, int], ...], patch: PatchObject) -> None:
    evidence = list(unpack(patch.evidence))
    evidence[0] = replace(evidence[0], runs=runs)
    with pytest.raises(BadInput):
        explain(replace(patch, evidence=pack(tuple(evidence))))


def test_too_much_evidence_is_none(patch: PatchObject, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader would not accept is not written."""
    items = unpack(patch.evidence)
    monkeypatch.setattr("elfdiff.patches.evidence.MAX_UNPACKED", 1000)
    assert pack(items) == b""
    with pytest.raises(BadInput):
        unpack(patch.evidence)


def test_a_reference_behind_the_end_is_bad_input(patch: PatchObject) -> None:
    evidence = list(unpack(patch.evidence))
    evidence[0] = replace(evidence[0], new=(Reference(10**6, FieldKind.CALL, Names.FUNCTION, "x"),))
    with pytest.raises(BadInput):
        explain(replace(patch, evidence=pack(tuple(evidence))))


labels = st.text(max_size=20)
references = st.builds(Reference, st.integers(0, 1 << 40), st.integers(1, 8), st.sampled_from(Names), labels)
evidence_values = st.builds(Evidence, st.sampled_from(EvidenceKind), labels, labels, labels)
functions = st.builds(
    FunctionEvidence,
    st.lists(evidence_values, max_size=3).map(tuple),
    st.lists(references, max_size=4).map(tuple),
    st.lists(references, max_size=4).map(tuple),
    st.lists(st.tuples(*[st.integers(0, 1 << 40)] * 3), max_size=4).map(tuple),
)


@settings(max_examples=30)
@given(st.lists(functions, max_size=2).map(tuple))
def test_what_is_packed_is_unpacked(items: tuple[FunctionEvidence, ...]) -> None:
    assert unpack(pack(items)) == items


@given(st.binary(max_size=200))
def test_anything_else_is_bad_input(raw: bytes) -> None:
    with pytest.raises(BadInput):
        unpack(raw)


# -- verdicts -----------------------------------------------------------------------------------------------------


def test_nothing_to_patch_is_explained(compiled: Compiler) -> None:
    pair = program("SEPARATE int x1(int x) { return x; }\n", "x1(n)")
    old = compiled(pair.sources(0))
    new = compiled({**pair.sources(0), "unused.c": "static int unused;"})
    found = explain_pair(old, new, Options())
    assert found.verdict.code == NothingToPatch.exit_code
    assert not found.functions
    assert found.sizes.executable == 0
    same = explain_pair(old, old, Options())
    assert same.verdict.code == NothingToPatch.exit_code
    assert "same build" in same.verdict.what


def test_builds_of_different_kinds_are_explained(compiled: Compiler) -> None:
    old, new = (compiled(REASONS.sources(0), link=link) for link in ("pie", "no-pie"))
    found = explain_pair(old, new, Options())
    assert found.verdict.name == "refused"
    assert "position-independent" in found.verdict.what


def test_what_differs_in_line_numbers_only_is_named(compiled: Compiler) -> None:
    pair = build(compiled, LINES)
    found = explain_pair(*pair, Options())
    assert {item.name for item in found.line_only} == {"below", "further"}
    assert {f.function.name for f in found.functions} == {"edited"}
    whole = explain_pair(*pair, Options(lines=True))
    (below,) = select(whole, ["below"])
    assert [e.kind for e in below.evidence] == [EvidenceKind.LINES]


def test_a_function_is_found_by_name_and_by_either_address(reasons: Explanation) -> None:
    (item,) = select(reasons, ["greets"])
    assert item.function.old_start is not None
    assert select(reasons, [hex(item.function.old_start)])[0].function.name
    assert item in select(reasons, [hex(item.function.new_start)])
    with pytest.raises(BadInput) as caught:
        select(reasons, ["greet"])
    assert "greets" in caught.value.next_step


# -- quoting ------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.text(max_size=40))
def test_what_is_shown_cannot_act_on_a_terminal(text: str) -> None:
    assert printable(text).isprintable()
    assert quote(text.encode("utf-8", "surrogatepass")).isprintable()


@given(st.binary(max_size=40))
def test_any_bytes_can_be_quoted(raw: bytes) -> None:
    assert quote(raw).isprintable()
    assert is_text(raw) in (True, False)


@given(st.text("abc", min_size=1, max_size=200), st.integers(0, 199))
def test_two_strings_that_differ_look_different(text: str, at: int) -> None:
    at %= len(text)
    other = text[:at] + "X" + text[at + 1 :]
    first, second = quote_both(text.encode(), other.encode())
    assert first != second
    assert len(first) <= MAX_QUOTED + 4
