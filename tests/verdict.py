"""One small pair of programs, what the differ says of it, and what the symbols of the same builds say.

A pair is one C text in which words in capitals stand for what differs: ``Pair(text, STEP=("1", "2"))``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from elfdiff.diff import Options, diff
from elfdiff.errors import LivegraftError, NothingToPatch, Refused
from elfdiff.patchobject import Finding, PatchFunction, PatchObject, Severity
from tests.compile import Compiler
from tests.truth import Truth, changed_functions, misbound

PRELUDE = """
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define SEPARATE __attribute__((noinline, noclone, noipa))
"""
COMPANY = """
static long company_a, company_b;
static char company_text[64];
SEPARATE int company1(int x) { company_a += x; printf("company one %ld\\n", company_a); return x * 3; }
SEPARATE int company2(int x) { company_b ^= x; snprintf(company_text, sizeof company_text, "two %d", x); return 4; }
SEPARATE int company3(int x) { for (int i = 0; i < x; i++) company_a += company1(i) * company2(x - i); return 2; }
SEPARATE int company4(int x) { if (x > 100) exit(3); if (x > 50) abort(); return company3(x) ^ (int)company_b; }
"""
"""Code that never changes, so that a pair is more than the one function in question."""


@dataclass(frozen=True)
class Verdict:
    """What came of a pair. ``error`` is None where there is a patch."""

    patch: PatchObject | None
    error: LivegraftError | None
    old: Truth
    new: Truth

    @property
    def nothing(self) -> bool:
        """There was nothing to patch."""
        return isinstance(self.error, NothingToPatch)

    @property
    def refused(self) -> set[str]:
        """Codes of the findings for which it was refused."""
        if not isinstance(self.error, Refused):
            return set()
        return {finding.code for finding in self.error.findings}

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Whatever it found, refusing or not."""
        return self.error.findings if isinstance(self.error, Refused) else self.made.findings

    @property
    def warned(self) -> set[str]:
        """Codes of the warnings that the patch carries."""
        return {f.code for f in self.made.findings if f.severity is Severity.WARN}

    @property
    def made(self) -> PatchObject:
        """The patch, which must be there."""
        assert self.patch is not None, f"{self.error}: {self.error.why if self.error else ''}"
        return self.patch

    @cached_property
    def functions(self) -> dict[str, PatchFunction]:
        """The patch's functions by their names in the new build."""
        names = {s.start: s.name for s in self.new.symbols if s.kind == "STT_FUNC" and s.size}
        return {names[f.new_start]: f for f in self.made.functions}

    @property
    def reasons(self) -> dict[str, str]:
        """Why each function is in the patch."""
        return {name: str(f.reason) for name, f in self.functions.items()}

    @property
    def left_out(self) -> set[str]:
        """Functions that changed by the truth of symbols, and are not in the patch."""
        return changed_functions(self.old, self.new) - self.functions.keys()

    def check(self) -> Verdict:
        """Nothing is left out; every reference leads where the new build means; entries keep their functions."""
        assert not self.left_out
        assert misbound(self.made, self.old, self.new) == []
        for name, function in self.functions.items():
            if function.old_start is not None:
                assert name in {s.name for s in self.old.symbols_at(function.old_start)}
        return self

    @property
    def safe(self) -> bool:
        """Refused, or a patch that holds every change: what must be said of a pair that really changed."""
        return bool(self.refused) or (self.patch is not None and not self.left_out)


@dataclass(frozen=True)
class Pair:
    """The sources of a pair; ``files`` are further ones, with the same words."""

    text: str
    words: Mapping[str, tuple[str, str]]
    files: Mapping[str, str]

    def sources(self, number: int) -> dict[str, str]:
        """File name -> C text of the old (0) or new (1) build."""
        files = {"main.c": PRELUDE + COMPANY + self.text}
        files.update({name: PRELUDE + text for name, text in self.files.items()})
        for word, versions in self.words.items():
            files = {name: text.replace(word, versions[number]) for name, text in files.items()}
        return files


def program(text: str, calls: str, files: Mapping[str, str] | None = None, **words: tuple[str, str]) -> Pair:
    """A pair with a ``main`` that makes ``calls`` (an expression; n is an unknown int)."""
    main = f"\nint main(int n, char **v) {{ return company4(n) + ({calls}); }}\n"
    return Pair(text + main, words, files or {})


def judge(
    compiled: Compiler,
    pair: Pair,
    *flags: str,
    link: str = "pie",
    cc: str = "gcc",
    stripped: bool = True,
    lines: bool = False,
    allow: tuple[str, ...] = (),
) -> Verdict:
    """Compile both, compare them without symbols, keep the symbols for the judge."""
    sources = pair.sources(0), pair.sources(1)
    named = [compiled(s, *flags, link=link, cc=cc, stripped=False) for s in sources]
    seen = [compiled(s, *flags, link=link, cc=cc, stripped=stripped) for s in sources]
    patch = error = None
    try:
        patch = diff(seen[0], seen[1], Options(lines=lines, allow=frozenset(allow)))
    except LivegraftError as raised:
        error = raised
    return Verdict(patch, error, Truth(named[0]), Truth(named[1]))
