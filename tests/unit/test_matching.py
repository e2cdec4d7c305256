"""Matching and address map, which see no symbols, against the symbols of the same builds: none may be wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from elfdiff.correspondence.addressmap import Evidence
from elfdiff.decoding.code import load_code
from elfdiff.differences.comparison import Comparison, compare
from elfdiff.images.image import Kind
from elfdiff.images.imagefile import load_image
from fixtures.build import Variant, build_kv, matrix
from tests.compile import Compiler
from tests.randomprogram import move_functions, move_variables, random_edit, random_program
from tests.truth import Truth
from tests.verdict import judge, program

VARIANTS = [variant for variant in matrix() if variant.link != "static"]


def kv_pair(old: int, new: int, variant: Variant, folder: Path) -> tuple[Comparison, Truth, Truth]:
    """Compared without symbols; a stripped build has the addresses of the one with symbols."""
    seen = [load_code(load_image(build_kv(v, replace(variant, stripped=True), folder))) for v in (old, new)]
    named = [Truth(build_kv(v, replace(variant, stripped=False), folder)) for v in (old, new)]
    return compare(*seen), *named


def wrong_matches(comparison: Comparison, old: Truth, new: Truth) -> list[tuple[set[str], set[str]]]:
    """Matched functions that have no name in common, of those that are named in both builds."""
    found = []
    for i, j in enumerate(comparison.matching.new_of.tolist()):
        if j >= 0:
            names = [
                {s.name for s in truth.symbols_at(int(code.starts[k])) if s.kind == "STT_FUNC"}
                for truth, code, k in ((old, comparison.old, i), (new, comparison.new, j))
            ]
            known = names[0] & new.functions.keys() and names[1] & old.functions.keys()
            if known and not names[0] & names[1]:
                found.append((names[0], names[1]))
    return found


def wrong_variables(comparison: Comparison, old: Truth, new: Truth) -> list[str]:
    """Pinned addresses of writable data that are not the same byte of the same variable."""
    found = []
    for n, (o, evidence) in comparison.addresses.old_of.items():
        section = comparison.new.image.section_at(n)
        if section is None or section.kind not in (Kind.DATA, Kind.BSS) or evidence is not Evidence.PIN:
            continue
        first, second = old.symbols_at(o), new.symbols_at(n)
        if first and second and not old.names(o) & new.names(n):
            found.append(f"{old.names(o)} for {new.names(n)}")
    return found


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("versions", [(1, 2), (2, 3)])
def test_nothing_of_kv_is_matched_wrongly(versions: tuple[int, int], variant: Variant, cache_folder: Path) -> None:
    comparison, old, new = kv_pair(*versions, variant, cache_folder / "build")
    assert wrong_matches(comparison, old, new) == []
    assert wrong_variables(comparison, old, new) == []
    matched = int((comparison.matching.new_of >= 0).sum())
    assert matched >= len(comparison.old) - 1
    pinned = [n for n, (_, e) in comparison.addresses.old_of.items() if e is Evidence.PIN]
    assert len(pinned) > 20


@pytest.mark.parametrize("seed", range(12))
def test_nothing_of_a_shuffled_program_is_matched_wrongly(seed: int, compiled: Compiler) -> None:
    """Functions and variables in another order, nothing else changed."""
    random = Random(seed)
    old = random_program(random, 12)
    new = move_variables(move_functions(old, random), random)
    comparison, truth_old, truth_new = compared(compiled, old.text(), new.text(), random.choice(("-O0", "-O2")))
    assert wrong_matches(comparison, truth_old, truth_new) == []
    assert wrong_variables(comparison, truth_old, truth_new) == []


def compared(compiled: Compiler, old: str, new: str, *flags: str) -> tuple[Comparison, Truth, Truth]:
    seen = [load_code(load_image(compiled(text, *flags))) for text in (old, new)]
    named = [Truth(compiled(text, *flags, stripped=False)) for text in (old, new)]
    return compare(*seen), *named


@pytest.mark.parametrize("seed", range(100, 110))
def test_few_of_an_edited_program_are_matched_wrongly(seed: int, compiled: Compiler) -> None:
    """A removed function may be taken for a new one; one that both builds have must be found again."""
    random = Random(seed)
    old = random_program(random, 12)
    new, _ = random_edit(old, random, 2)
    comparison, truth_old, truth_new = compared(compiled, old.text(), new.text(), "-O2")
    assert wrong_matches(comparison, truth_old, truth_new) == []


def test_twins_that_differ_in_a_number_and_their_line_keep_their_number(compiled: Compiler) -> None:
    """One macro makes them; the new build has them in another order, and every line moved."""
    twin = 'SEPARATE int f{0}(int x) {{ report({0}, "twins.c", {1}, x); return x + company1(x); }}\n'
    old = "".join(twin.format(bits, line) for bits, line in ((192, 40), (128, 50), (256, 51)))
    new = "".join(twin.format(bits, line) for bits, line in ((128, 73), (256, 74), (192, 75)))
    pair = program(
        'SEPARATE int report(int k, const char *f, int l, int x) { return printf("%s %d %d %d", f, k, l, x); }\n'
        "TWINS\nint (*const twins[])(int) = {f128, f192, f256};\n"
        "SEPARATE int edited(int n) { return company1(n) + STEP; }",
        "twins[n](n) + edited(n)", TWINS=(old, new), STEP=("1", "2222"),
    )  # fmt: skip
    judge(compiled, pair, lines=True).check()


def test_a_callback_that_was_rewritten_is_known_by_its_place_in_a_table(compiled: Compiler) -> None:
    """Live data points to the old one, so its entry must lead to the new one."""
    long = (
        "for (int i = 0; i < x; i++) { if (i % 3 == 1) company_a ^= company2(i) << 3; else company_b += i * x; }"
        ' printf("many %ld\\n", company_b); if (x > 7) company3(x); return (int)(company_a % 17);'
    )
    pair = program(
        "struct methods { int (*open)(int), (*check)(int), (*close)(int); };\n"
        "SEPARATE int opens(int x) { return company1(x) + 1; }\nSEPARATE int checks(int x) { BODY }\n"
        "SEPARATE int closes(int x) { return company2(x) + 2; }\n"
        "struct methods methods = {opens, checks, closes};\n"
        "SEPARATE int runs(int x) { return methods.open(x) + methods.check(x) + methods.close(x); }",
        "runs(n)", BODY=("return 1;", long),
    )  # fmt: skip
    verdict = judge(compiled, pair).check()
    assert verdict.reasons == {"checks": "code"}
    assert verdict.functions["checks"].entry_jump


def test_a_rewritten_callback_is_known_by_a_table_that_only_a_table_names(compiled: Compiler) -> None:
    """As OpenSSL's providers are built: a list of algorithms, each with a table of numbered functions."""
    long = (
        "for (int i = 0; i < x; i++) { if (i % 3 == 1) company_a ^= company2(i) << 3; else company_b += i * x; }"
        ' printf("many %ld\\n", company_b); if (x > 7) company3(x); return (int)(company_a % 17);'
    )
    pair = program(
        "struct entry { int id; int (*f)(int); };\nstruct algorithm { const char *names; const struct entry *f; };\n"
        "SEPARATE int opens(int x) { return company1(x) + 1; }\nSEPARATE int checks(int x) { BODY }\n"
        "SEPARATE int closes(int x) { return company2(x) + 2; }\n"
        "static const struct entry first[] = {{1, opens}, {2, closes}, {0, 0}};\n"
        "static const struct entry second[] = {{1, opens}, {7, checks}, {2, closes}, {0, 0}};\n"
        'static const struct algorithm all[] = {{"one", first}, {"two", second}, {0, 0}};\n'
        "SEPARATE const struct algorithm *query(int x) { puts(\"query\"); return all + x; }\n"
        "SEPARATE int runs(int x) { return query(x & 1)->f[x & 3].f(x); }",
        "runs(n)", BODY=("return 1;", long),
    )  # fmt: skip
    verdict = judge(compiled, pair).check()
    assert verdict.reasons == {"checks": "code"}
    assert verdict.functions["checks"].entry_jump
