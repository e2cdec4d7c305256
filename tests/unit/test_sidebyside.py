"""Whose old code may go on beside the new code of the others: each reason against it, beside a pair that has none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elfdiff.diff import Options, analyse
from elfdiff.patches.patchcheck import require_sound
from elfdiff.patchobject import PatchObject
from tests.compile import Compiler

HEAD = """
#include <stdio.h>
#include <stdlib.h>
#define SEPARATE __attribute__((noinline))
HEADER
long tick(long n);
long serve(long n);
long leaf(long n);
"""
MAIN = (
    HEAD
    + """
long served, other;
SEPARATE long leaf(long n) { return n * 3 + served; }
SEPARATE long serve(long n) {
    long began = SELF;
    for (;;) { n = leaf(n); if (n > 1000000) return n + began; n += HANDLE(n) + STEP; COUNTER++; }
}
SEPARATE void company1(long n) { printf("%ld %ld\\n", n, served); served += n; other++; }
SEPARATE void company2(long n) { printf("%ld x %ld\\n", n, other); served ^= n; other += 2; company1(n); }
SEPARATE long recurse(long n) { return n < 2 ? n : recurse(n / 2) * tick(n) + 1; }
int main(int argc, char **argv) { company2(argc); return serve(argc) + tick(argc) + recurse(argc); }
"""
)
TICK = (
    HEAD
    + """
static long seen;
SEPARATE long more(long n) { seen += n; return seen * 2; }
SEPARATE long tick(long n) { seen++; return more(n) + INSIDE; }
"""
)
SAME = {
    "HEADER": "long handle(long n);", "HANDLE": "handle", "SELF": "0", "STEP": "1", "COUNTER": "served", "INSIDE": "1"
}  # fmt: skip
HANDLE = HEAD + "SEPARATE long handle(long n) { return tick(n) + INSIDE; }"


def written(text: str, words: dict[str, str]) -> str:
    for word, replacement in words.items():
        text = text.replace(word, replacement)
    return text


def patch_of(
    compiled: Compiler, words: dict[str, str], *flags: str, before: dict[str, str] | None = None, one: bool = False
) -> PatchObject:
    """``before`` and ``words`` change the two builds; ``one``: all of it in one file."""
    builds = []
    for own in (before or {}, words):
        texts = {"main.c": MAIN, "tick.c": TICK, "handle.c": HANDLE}
        files = {name: written(text, {**SAME, **own}) for name, text in texts.items()}
        builds.append({"main.c": "".join(files.values())} if one else files)
    old, new = compiled.pair(*builds, *(flags or ("-g",)), stripped=False)
    result = analyse(old, new, Options())
    assert result.error is None, result.error.details
    return result.patch()


def why_not(patch: PatchObject) -> dict[str, str]:
    return {item.name: item.why_not for item in patch.old_codes}


def test_calls_into_other_units_are_believed(compiled: Compiler) -> None:
    patch = patch_of(compiled, {"STEP": "2", "INSIDE": "2"})
    assert why_not(patch) == {"serve": "", "tick": "", "handle": ""}


@pytest.mark.parametrize("flags", [("-g0",), ("-g", "-flto")], ids=["no-debug-information", "link-time-optimization"])
def test_without_knowing_the_units_they_are_not(compiled: Compiler, flags: tuple[str, ...]) -> None:
    reasons = why_not(patch_of(compiled, {"STEP": "2", "INSIDE": "2"}, *flags))
    assert "calls" in reasons["serve"] and "may be compiled for its old code" in reasons["serve"]


def test_nor_is_a_call_in_the_same_unit(compiled: Compiler) -> None:
    reasons = why_not(patch_of(compiled, {"STEP": "2", "INSIDE": "2"}, one=True))
    assert reasons["serve"] == "serve calls handle, which changes, and may be compiled for its old code"


def test_nor_one_through_an_unchanged_function_of_the_unit(compiled: Compiler) -> None:
    reasons = why_not(patch_of(compiled, {"STEP": "2", "more(n) +": "more(n) -"}, one=True))
    assert "tick is called" in reasons["serve"]


def test_nor_clang_which_does_not_say_how_it_linked(compiled: Compiler) -> None:
    words = {"STEP": "2", "INSIDE": "2"}
    builds = [
        {name: written(text, {**SAME, **own}) for name, text in {"a.c": MAIN, "b.c": TICK, "c.c": HANDLE}.items()}
        for own in ({}, words)
    ]
    old, new = compiled.pair(*builds, "-g", stripped=False, cc="clang")
    assert "may be compiled" in why_not(analyse(old, new, Options()).patch())["serve"]


def test_a_function_that_calls_nothing_that_changes_needs_no_debug_information(compiled: Compiler) -> None:
    reasons = why_not(patch_of(compiled, {"STEP": "2"}, "-g0"))
    assert reasons == {"serve": ""}


def test_a_function_that_calls_itself_would_mix_both_codes(compiled: Compiler) -> None:
    reasons = why_not(patch_of(compiled, {"tick(n) + 1": "tick(n) + 2"}))
    assert reasons["recurse"] == "recurse calls recurse, which changes, and may be compiled for its old code"


def test_another_prototype_between_units_is_none_to_be_called_by_old_code(compiled: Compiler) -> None:
    new = {"HEADER": "int handle(int n);", "long handle(long n) {": "int handle(int n) {", "INSIDE": "2", "STEP": "2"}
    assert why_not(patch_of(compiled, new))["serve"] == "serve calls handle, which is called otherwise"


def test_other_variables(compiled: Compiler) -> None:
    reasons = why_not(patch_of(compiled, {"COUNTER": "other"}))
    assert reasons["serve"].startswith("old and new code do not use the same variables: ")
    assert "other" in reasons["serve"]


def test_a_variable_that_only_the_patch_has(compiled: Compiler) -> None:
    new = {"long served, other;": "long served, other; static long fresh;", "STEP": "fresh++"}
    assert "a variable that the running program does not have" in why_not(patch_of(compiled, new))["serve"]


def test_findings_that_were_lifted(compiled: Compiler) -> None:
    words = {"STEP": "2", "INSIDE": "2", "long served, other;": "long served, other = 5;"}
    files = [
        {name: written(text, {**SAME, **own}) for name, text in {"a.c": MAIN, "b.c": TICK, "c.c": HANDLE}.items()}
        for own in ({"long served, other;": "long served, other = 4;"}, words)
    ]
    old, new = compiled.pair(*files, "-g", stripped=False)
    reasons = why_not(analyse(old, new, Options(allow=frozenset({"initial-value"}))).patch())
    assert set(reasons.values()) == {"the patch was made with --allow initial-value"}


SPIN = """
asm(".globl spin\\n.type spin, @function\\nspin:\\n.cfi_startproc\\n BEFORE\\n1: dec %rdi\\n jnz TARGET\\n"
    " mov $STEP, %eax\\n ret\\n.cfi_endproc\\n.size spin, .-spin");
"""


@pytest.mark.parametrize(
    ("before", "target", "fits"),
    [
        ("nop", "spin", False),
        ("nop", "1b", False),
        (".byte 0x0f, 0x1f, 0x40, 0", "1b", False),
        (".byte 0x0f, 0x1f, 0x44, 0, 0", "1b", True),
    ],
    ids=["entry", "1", "4", "5"],
)
def test_a_loop_back_to_what_the_entry_jump_replaces(
    compiled: Compiler, before: str, target: str, fits: bool
) -> None:
    builds = []
    for step in "12":
        spin = written(SPIN, {"BEFORE": before, "TARGET": target, "STEP": step}).replace("\\n", "\\n")
        builds.append({"main.c": written(MAIN, SAME), "tick.c": written(TICK, SAME) + HANDLE_SAME, "spin.c": spin})
    old, new = compiled.pair(*builds, stripped=False)
    reasons = why_not(analyse(old, new, Options()).patch())
    assert reasons.keys() == {"spin"}
    assert (reasons["spin"] == "") == fits
    assert fits or "where the entry jump will be" in reasons["spin"]


HANDLE_SAME = written("long spin(long); long handle(long n) { return tick(n) + spin(n) + INSIDE; }", SAME)


def test_a_patch_that_speaks_of_other_functions_is_no_patch(compiled: Compiler) -> None:
    patch = patch_of(compiled, {"STEP": "2"})
    require_sound(patch)
    (item,) = patch.old_codes
    for parts in ((), (item.parts[0] + 1,)):
        with pytest.raises(ValueError, match="the parts of serve"):
            require_sound(replace(patch, old_codes=(replace(item, parts=parts),)))
