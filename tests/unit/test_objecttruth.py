"""The oracle of object files finds what it must: each kind of difference once, and no other."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.objecttruth import Difference, compare_objects

TEXT = """
extern int other(int), another(int);
extern void report(const char *file, int line);
static const int numbers[4] = {1, 2, 3, FOUR};
static int seen = SEEN;
static int __attribute__((noinline)) helper(int x) { return x * HELPED + 77; }
int calls(int x) { return helper(x) + 1; }
int by_number(int x) { return numbers[x & 3]; }
const char *by_text(void) { return WORD; }
int by_name(int x) { return CALLED(x); }
int counts(int x) { return seen += x; }
int chooses(int x) { switch (x) { case 1: return other(4); case 2: return CASE; case 3: return another(1);
    case 4: return other(7); case 5: return other(11); default: return 0; } }
LINES
void complains(int x) { if (x) report("file.c", __LINE__); }
int last(int x) { return x ^ 5; }
"""
BEFORE = {
    "FOUR": "4", "SEEN": "0x11", "HELPED": "9", "WORD": '"one"', "CALLED": "other", "CASE": "other(5)", "LINES": "",
}  # fmt: skip


def compare(folder: Path, **changes: str) -> Difference:
    objects = []
    for number, words in enumerate((BEFORE, {**BEFORE, **changes})):
        text = TEXT
        for word, value in words.items():
            text = text.replace(word, value)
        build = folder / str(number)
        build.mkdir()
        (build / "unit.c").write_text(text)
        command = ["gcc", "-g", "-O2", "-fPIC", "-fcf-protection=none", "-c", "unit.c"]
        subprocess.run(command, cwd=build, check=True)
        objects.append({"unit.o": build / "unit.o"})
    return compare_objects(*objects)


def test_equal_builds_are_equal(tmp_path: Path) -> None:
    assert compare(tmp_path) == Difference({}, frozenset(), frozenset(), frozenset(), frozenset())


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"FOUR": "5"}, {"by_number"}),
        ({"HELPED": "1000"}, {"unit.c:helper"}),  # another size: everything behind it is elsewhere
        ({"WORD": '"two"'}, {"by_text"}),
        ({"CALLED": "another"}, {"by_name"}),
        ({"CASE": "another(5)"}, {"chooses"}),
    ],
)
def test_what_changed_is_named_and_nothing_else(
    tmp_path: Path, changes: dict[str, str], changed: set[str]
) -> None:
    difference = compare(tmp_path, **changes)
    assert set(difference.changed) == changed
    assert not difference.line_only | difference.added | difference.removed | difference.initial


def test_an_initial_value_changes_no_function(tmp_path: Path) -> None:
    difference = compare(tmp_path, SEEN="0x12")
    assert difference.initial == {"unit.c:seen"}
    assert not difference.changed


def test_a_new_function_and_its_caller(tmp_path: Path) -> None:
    difference = compare(tmp_path, LINES="int fresh(int x) { return x + 3; }", CASE="fresh(5)")
    assert difference.added == {"fresh"}
    assert set(difference.changed) == {"chooses"}


def test_line_numbers_are_told_from_numbers(tmp_path: Path) -> None:
    """The same two numbers, once as lines of the source and once not."""
    difference = compare(tmp_path, LINES="\n" * 40)
    assert difference.line_only == {"complains"}
    assert not difference.changed


def test_a_number_that_is_no_line_is_a_change(tmp_path: Path) -> None:
    difference = compare(tmp_path, CASE="other(45)")
    assert set(difference.changed) == {"chooses"}
    assert not difference.line_only
