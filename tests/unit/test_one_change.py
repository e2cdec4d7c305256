"""One function of a random program is changed: exactly it is in the patch, and whoever inlines it."""

from __future__ import annotations

from random import Random

import pytest

from elfdiff.diff import Options, diff
from elfdiff.errors import NothingToPatch, Refused
from elfdiff.patchobject import Reason
from tests.compile import Compiler
from tests.randomprogram import Program, edit_number, random_program
from tests.truth import Truth, changed_functions

SEEDS = range(200, 224)
SEPARATE = "#define N __attribute__((noinline,noclone,noipa))\n"
MOVES = (Reason.CLOSURE, Reason.NEW)
"""Why a function is in a patch that did not change itself."""


def edited(seed: int) -> tuple[Program, Program, set[str]]:
    """A program, the same with another number in one function, and that function."""
    random = Random(seed)
    before = random_program(random, random.choice((6, 12, 20)))
    after = edit_number(before, random)
    return before, after, {f.name for f, g in zip(before.functions, after.functions, strict=True) if f != g}


BLAMED = {(203, False), (203, True), (208, False), (218, False), (218, True)}
"""Cases in which strings of the changed function follow an array of constants, whose readers are in the patch, too."""
CASES = [
    pytest.param(seed, inlined, id=f"{seed}-{'inlined' if inlined else 'separate'}", marks=[
        pytest.mark.xfail(strict=True, raises=AssertionError, reason="where a constant array ends is not known")
    ] if (seed, inlined) in BLAMED else [])
    for seed in SEEDS for inlined in (False, True)
]  # fmt: skip


@pytest.mark.parametrize(("seed", "inlined"), CASES)
def test_exactly_what_changed_is_in_the_patch(seed: int, inlined: bool, compiled: Compiler) -> None:
    before, after, names = edited(seed)
    texts = [program.text().replace(SEPARATE, "#define N\n" if inlined else SEPARATE) for program in (before, after)]
    flags = (Random(seed).choice(("-O0", "-O2", "-O3", "-Os")),)
    cc = Random(seed).choice(("gcc", "clang"))
    old, new = (Truth(compiled(text, *flags, cc=cc, stripped=False)) for text in texts)
    if old.objects.keys() != new.objects.keys():
        return  # the compiler has taken a variable apart (clang: v.0, v.1), so names do not tell what is what
    changed = changed_functions(old, new)
    if not inlined:
        changed &= names  # by construction: every function is compiled for itself
    try:
        patch = diff(*(compiled(text, *flags, cc=cc) for text in texts), Options())
    except NothingToPatch:
        assert not changed
        return
    except Refused as error:
        print(f"refused: {error.why}")
        return
    known = {s.start: s.name for s in new.symbols if s.kind == "STT_FUNC" and s.size}
    found = {known[f.new_start]: f.reason for f in patch.functions}
    assert changed <= found.keys()
    assert {name for name, reason in found.items() if reason not in MOVES} <= changed
