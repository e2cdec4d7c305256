"""Matching and address map, which see no symbols, against the symbols of the same builds: none may be wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from elfdiff.addressmap import Evidence
from elfdiff.code import load_code
from elfdiff.comparison import Comparison, compare
from elfdiff.image import Kind
from elfdiff.imagefile import load_image
from fixtures.build import Variant, build_kv, matrix
from tests.compile import Compiler
from tests.randomprogram import move_functions, move_variables, random_edit, random_program
from tests.truth import Truth

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
