"""Classes: other virtual functions and other bases are refused, edits of them are not."""

from __future__ import annotations

import pytest

from elfdiff.diff import Options, diff
from elfdiff.errors import Refused
from tests.compile import Compiler
from tests.verdict import COMPANY, PRELUDE

CLASSES = """
struct Root { long n = 1; virtual long area() { return n; } virtual long kind() { return 1; } virtual ~Root() {} };
struct Other { long m = 2; virtual long extra() { return 2; } };
struct Shape : BASES { long area() override { EDIT; return n * 3; } MEMBERS };
static Root *made;
SEPARATE Root *make(int x) { return x > 3 ? new Root : new Shape; }
SEPARATE long use(int x) { if (!made) made = make(x); return made->area() + made->kind(); }
"""
MAIN = "\nint main(int n, char **v) { return company4(n) + use(n); }\n"
BUILDS = {
    "g++ pie": ("g++", "pie", ()),
    "g++ fixed": ("g++", "no-pie", ()),
    "g++ library": ("g++", "library", ()),
    "g++ bundled": ("g++", "pie", ("-static-libstdc++", "-static-libgcc")),
    "clang++ pie": ("clang++", "pie", ()),
    "clang++ -O0": ("clang++", "no-pie", ("-O0",)),
}
CHANGES = {
    "one more": {"MEMBERS": "virtual long more() { return 4; }"},
    "an override more": {"MEMBERS": "long kind() override { return 5; }"},
    "another base": {"BASES": "Root, Other"},
}
PLAIN = {"BASES": "Root", "EDIT": "", "MEMBERS": ""}


def refused(compiled: Compiler, name: str, words: dict[str, str]) -> set[str]:
    cc, link, flags = BUILDS[name]
    builds = []
    for version in (PLAIN, {**PLAIN, **words}):
        text = PRELUDE + COMPANY + CLASSES + MAIN
        for word, replacement in version.items():
            text = text.replace(word, replacement)
        builds.append(compiled({"main.cc": text}, "-std=gnu++17", *flags, link=link, cc=cc))
    try:
        diff(builds[0], builds[1], Options())
    except Refused as error:
        return {finding.code for finding in error.findings}
    return set()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_class_with_other_virtual_functions_or_bases_is_refused(change: str, build: str, compiled: Compiler) -> None:
    assert "class-layout" in refused(compiled, build, CHANGES[change])


@pytest.mark.parametrize("build", BUILDS)
def test_an_edited_virtual_function_is_no_other_one(build: str, compiled: Compiler) -> None:
    assert refused(compiled, build, {"EDIT": "if (n > 5) puts(\"large\")"}) == set()
