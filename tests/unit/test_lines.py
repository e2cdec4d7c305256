"""A difference in ``__LINE__`` alone is no change; any other argument is one."""

from __future__ import annotations

import re

import pytest

from tests.compile import Compiler
from tests.verdict import Pair, judge, program

ASSERTS = program(
    "ABOVE\nSEPARATE int one(int x) { assert(x < 900); return x + 1; }\n"
    "SEPARATE int two(int x) { assert(x < 800); assert(x != 3); return x * x; }\n",
    "one(n) + two(n)", ABOVE=("", "\n\n\n"),
)  # fmt: skip


@pytest.mark.parametrize("cc", ["gcc", "clang"])
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_shifted_asserts_are_nothing_to_patch(cc: str, level: str, compiled: Compiler) -> None:
    assert judge(compiled, ASSERTS, level, cc=cc).nothing


def test_shifted_asserts_beside_a_real_change_are_left_out_and_reported(compiled: Compiler) -> None:
    text = ASSERTS.text.replace("return x + 1", "return x + STEP")
    pair = Pair(text, {**ASSERTS.words, "STEP": ("1", "5")}, {})
    verdict = judge(compiled, pair)
    assert verdict.reasons == {"one": "code"}
    (line,) = verdict.made.line_only
    assert line.old_start == verdict.old.functions["two"].start
    assert line.new_start == verdict.new.functions["two"].start


def test_shifted_asserts_are_included_on_request(compiled: Compiler) -> None:
    assert judge(compiled, ASSERTS, lines=True).check().reasons == {"one": "lines", "two": "lines"}


REPORT = (
    "SEPARATE int report(const char *f, int k, int x) { return printf(\"%s %d %d\", f, k, x); }\n"
    "SEPARATE int first(int x) { report(\"net.c\", FIRST, x); return 3; }\n"
    "SEPARATE int second(int x) { report(\"net.c\", SECOND, x); return 4; }\n"
    "SEPARATE int third(int x) { report(\"net.c\", THIRD, x); return 5; }\n"
)  # fmt: skip


def reports(first: tuple[int, int], second: tuple[int, int], third: tuple[int, int]) -> Pair:
    """Three functions that pass a number beside a file name, old and new."""
    words = {"FIRST": first, "SECOND": second, "THIRD": third}
    return program(
        REPORT, "first(n) + second(n) + third(n)", None, **{k: (str(a), str(b)) for k, (a, b) in words.items()}
    )


def test_an_argument_beside_a_file_name_that_moved_alone_is_a_change(compiled: Compiler) -> None:
    assert judge(compiled, reports((10, 10), (20, 23), (30, 30))).check().reasons == {"second": "code"}


def test_arguments_that_moved_alike_are_lines(compiled: Compiler) -> None:
    assert judge(compiled, reports((10, 14), (20, 24), (30, 34))).nothing


def test_an_argument_above_lines_that_stayed_is_a_change(compiled: Compiler) -> None:
    assert judge(compiled, reports((10, 12), (20, 20), (30, 30))).check().reasons == {"first": "code"}


@pytest.mark.parametrize("numbers", [((10, 10), (20, 20), (30, 60)), ((10, 10), (20, 20), (30, 31))])
def test_the_last_argument_beside_a_file_name_is_a_change(
    numbers: tuple[tuple[int, int], ...], compiled: Compiler
) -> None:
    verdict = judge(compiled, reports(*numbers))
    assert verdict.patch is not None and "third" in verdict.reasons


def test_a_lone_number_beside_a_file_name_is_a_change(compiled: Compiler) -> None:
    pair = program(
        "SEPARATE int load(const char *f, int seconds) { return printf(\"%s %d\", f, seconds); }\n"
        "SEPARATE int edited(int x) { load(\"rules.y\", NUM); return x; }\n", "edited(n)", NUM=("30", "60"),
    )  # fmt: skip
    verdict = judge(compiled, pair)
    assert verdict.patch is not None and "edited" in verdict.reasons


def test_a_shifted_enumeration_is_a_change_beside_a_file_name(compiled: Compiler) -> None:
    pair = program(
        "enum level { LOW, NEW HIGH, TOP };\n"
        "SEPARATE int log_(int level, const char *s) { return printf(\"%d %s\", level, s); }\n"
        "SEPARATE int edited(int x) { return log_(HIGH, \"net.c\"); }\n"
        "SEPARATE int other(int x) { return log_(TOP, \"other\") + log_(LOW, \"net.c\"); }\n",
        "edited(n) + other(n)", NEW=("", "MIDDLE,"),
    )  # fmt: skip
    verdict = judge(compiled, pair)
    assert verdict.patch is not None and {"edited", "other"} <= verdict.reasons.keys()


def test_a_shifted_enumeration_without_a_file_name_is_a_change(compiled: Compiler) -> None:
    pair = program(
        "enum level { LOW, NEW HIGH, TOP };\n"
        "SEPARATE int log_(int level, const char *s) { return printf(\"%d %s\", level, s); }\n"
        "SEPARATE int edited(int x) { return log_(HIGH, \"net\"); }\n"
        "SEPARATE int other(int x) { return log_(TOP, \"other\") + log_(LOW, \"net\"); }\n",
        "edited(n) + other(n)", NEW=("", "MIDDLE,"),
    )  # fmt: skip
    assert judge(compiled, pair).check().reasons.items() >= {"edited": "code", "other": "code"}.items()


UNITS = 4
"""Files with so many functions each, all of which call ``note`` with their file and line."""


def noted(shift: dict[int, int], numbers: dict[int, int], behind: str = "") -> dict[str, str]:
    """Files whose lines from function k on moved by shift[k]; ``numbers[k]`` is passed in front of the file name."""
    files = {}
    for unit in range(UNITS):
        text, line = "extern int note(int, const char *, int, int);\n", 10 + unit
        for k in range(8):
            line += 10 + shift.get(8 * unit + k, 0)
            call = f'note({numbers.get(8 * unit + k, 300 + k)}, "u{unit}.c", {line}, x)'
            text += f"SEPARATE int f{8 * unit + k}(int x) {{ {call}; return x + {k}; }}\n"
        files[f"u{unit}.c"] = text
    return files


def note_pair(old: dict[str, str], new: dict[str, str]) -> Pair:
    names = [f"f{k}" for k in range(8 * UNITS)]
    main = "".join(f"extern int {name}(int);\n" for name in names) + (
        'SEPARATE int note(int n, const char *f, int l, int x) { return printf("%d %s %d %d\\n", n, f, l, x); }\n'
        "SEPARATE int step(int x) { return x * STEP; }\n"
    )
    files = {name: f"BODY_{name[:-2].upper()}" for name in old}
    words = {f"BODY_{name[:-2].upper()}": (old[name], new[name]) for name in old}
    calls = "step(n) + " + " + ".join(f"{name}(n)" for name in names)
    return program(main, calls, files, **words, STEP=("3", "5"))


@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_what_a_function_takes_as_a_line_everywhere_is_one_however_it_moved(cc: str, compiled: Compiler) -> None:
    """Each function of a file moved by another number, so that no neighbour moved alike."""
    pair = note_pair(noted({}, {}), noted({9: 3, 10: 1, 12: 5, 13: -4, 30: 7}, {}))
    assert judge(compiled, pair, cc=cc).reasons == {"step": "code"}


@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_a_number_in_another_argument_of_such_a_function_is_a_change(cc: str, compiled: Compiler) -> None:
    pair = note_pair(noted({}, {}), noted({9: 3, 10: 1, 12: 5}, {11: 350, 20: 351}))
    assert judge(compiled, pair, cc=cc).reasons == {"step": "code", "f11": "code", "f20": "code"}


def test_a_level_behind_the_file_name_is_no_line(compiled: Compiler) -> None:
    """A number that repeats itself in every file is none, whatever stands in front of it."""
    old, new = noted({}, {}), noted({}, {})
    for files in (old, new):
        for name, text in files.items():
            lines = [re.sub(r'(".*\.c"), \d+', r"\1, 70", line) for line in text.splitlines(keepends=True)]
            files[name] = "".join(lines)
    new["u2.c"] = new["u2.c"].replace(", 70, x)", ", 71, x)", 3).replace(", 71, x)", ", 70, x)", 2)
    assert judge(compiled, note_pair(old, new)).check().reasons == {"step": "code", "f18": "code"}
