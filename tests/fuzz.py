"""Damaged ELF files through ``livegraft diff``: a clear error or a valid verdict, whatever is in them.

    python -m tests.fuzz --rounds 10000 --seed 1       as ``make fuzz`` does
    python -m tests.fuzz --rounds 1 --seed 4711        one round again
    python -m tests.fuzz --rounds 1 --seed 4711 --small     ... and with what is not needed left out

A round is one damaged file, compared both ways: as the old build and as the new one.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from patcher.commands.diff import LIFTABLE
from tests.compile import Compiler
from tests.forkserver import Outcome, Task, livegraft, run, run_all
from tests.mutation import Mutation, mutation
from tests.verdict import program

C_PAIR = program(
    "static int a = 3; static long b; static const char *const t[] = {\"x\", \"y TEXT\"}; static __thread int own;\n"
    "static int (*const ops[])(const char *) = {puts, atoi};\n"
    "SEPARATE int edited(int x) { puts(t[x & 1]); a += x; EDIT; return ops[x & 1](t[0]); }\n"
    "SEPARATE int uses(int x) { b -= x; a *= b; own++; switch (x) { case 0: puts(\"0\"); break; case 1: puts(\"1\");"
    " break; case 2: puts(\"2\"); break; case 3: puts(\"3\"); break; case 4: x++; puts(\"4\"); } return x + own; }\n",
    "edited(n) + uses(n)", EDIT=("", "if (b > 3) puts(\"more\")"), TEXT=("cat", "dog"),
)  # fmt: skip

CXX = """
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>
struct Shape { virtual ~Shape() {} virtual int area(int x) const = 0; };
struct Square : Shape {
    int area(int x) const override { if (x > 40) throw std::runtime_error("large"); return x * x; }
};
struct Round : Shape { int area(int x) const override { return x * STEP; } };
static std::vector<std::string> seen;
__attribute__((noinline)) int measure(const Shape &s, int x) {
    try { std::string text = std::to_string(x); seen.push_back(text); return s.area(x) + (int)text.size(); }
    catch (const std::runtime_error &error) { std::puts(error.what()); return -1; }
}
__attribute__((noinline)) int twice(const Shape &s, int x) {
    static Round round; return measure(s, x) + measure(round, STEP);
}
int main(int n, char **v) { Square s; try { return twice(s, n) + (int)seen.size(); } catch (...) { return 1; } }
"""


@dataclass(frozen=True)
class Subject:
    """An undamaged pair."""

    name: str
    old: Path
    new: Path


MAX_FAULTS = 40
LIFTED = [word for code in LIFTABLE for word in ("--allow", code)]
"""What a finding would end early goes the whole way."""


def subjects(compiled: Compiler, packages: Path | None) -> list[Subject]:
    """The pairs, the small ones often; ``packages``: where to fetch redis to, None for none."""
    c, options = (C_PAIR.sources(0), C_PAIR.sources(1)), ("-g", "-Wl,-z,pack-relative-relocs")
    cxx = [{"main.cc": CXX.replace("STEP", step)} for step in ("3", "5")]
    made = [
        Subject("program", *compiled.pair(*c)),
        Subject("library", *compiled.pair(*c, link="library")),
        Subject("fixed", *compiled.pair(*c, link="no-pie")),
        Subject("debug", *compiled.pair(*c, *options, stripped=False)),
        Subject("c++", *compiled.pair(*cxx, "-std=gnu++17", cc="g++")),
        Subject("clang", *compiled.pair(*c, "-Wl,--emit-relocs", cc="clang", stripped=False)),
    ] * 4
    made.append(Subject("static", *compiled.pair(*c, link="static")))
    if packages is not None:
        from fixtures.debian import old_and_new

        old, new = (build.file("usr/bin/redis-check-rdb") for build in old_and_new("redis-tools", packages))
        made = [*made * 3, Subject("redis", old, new)]
    return made


@dataclass(frozen=True)
class Round:
    """``seed`` decides the rest: the pair, which file of it is damaged and how."""

    seed: int
    subject: Subject
    of_new: bool
    mutation: Mutation

    @property
    def file(self) -> Path:
        """The file that is damaged."""
        return self.subject.new if self.of_new else self.subject.old

    def task(self) -> Task:
        """Writes the damaged file and compares it, as the build that it is of, with the other."""
        def compare(folder: Path) -> int:
            damaged = folder / "damaged"
            damaged.write_bytes(self.mutation.apply(self.file.read_bytes()))
            pair = (self.subject.old, damaged) if self.of_new else (damaged, self.subject.new)
            status = livegraft("diff", *pair, "-o", folder / "patch", *LIFTED)
            damaged.unlink()
            return status if status else livegraft("inspect", folder / "patch")

        return compare

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.subject.name} {'new' if self.of_new else 'old'}, {self.mutation.how}"


def rounds(pairs: list[Subject], first: int, count: int) -> Iterator[Round]:
    """One round for each seed from ``first`` on, and the same damage to the other build."""
    for seed in range(first, first + count):
        random = Random(seed)
        subject = random.choice(pairs)
        for of_new in (False, True):
            one = Round(seed, subject, of_new, Mutation(""))
            yield replace(one, mutation=mutation(one.file.read_bytes(), seed))


@dataclass
class Result:
    """What came of a run; ``faults`` are (round, what is wrong)."""

    statuses: Counter[int] = field(default_factory=Counter)
    by_subject: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: list[tuple[Round, str]] = field(default_factory=list)  # the first of each kind
    kinds: Counter[str] = field(default_factory=Counter)
    slowest: tuple[float, str] = (0.0, "")
    largest: tuple[int, str] = (0, "")

    def add(self, one: Round, outcome: Outcome) -> None:
        """Count one outcome."""
        self.statuses[outcome.status] += 1
        self.by_subject[one.subject.name, outcome.status] += 1
        self.slowest = max(self.slowest, (outcome.seconds, str(one)))
        self.largest = max(self.largest, (outcome.peak, str(one)))
        left = outcome.left if outcome.status else ()
        fault = outcome.fault or (f"left {left}" if left else "")
        kind = re.sub(r"/\S+|0x[0-9a-f]+|\d+|'.*?'", "#", fault)
        self.kinds[kind] += bool(fault)
        if self.kinds[kind] == 1:
            self.faults.append((one, fault))

    def counts(self) -> str:
        """How many comparisons ended how."""
        each = ", ".join(f"exit {status}: {n}" for status, n in sorted(self.statuses.items()))
        return f"{self.statuses.total()} comparisons: {each}"

    def lines(self) -> list[str]:
        """For the reader of the log."""
        return [
            self.counts(),
            f"slowest {self.slowest[0]:.1f} s ({self.slowest[1]})",
            f"largest {self.largest[0] >> 20} MB ({self.largest[1]})",
            *(f"FAULT {one}: {fault:.300}" for one, fault in self.faults),
            *(f"{self.kinds.total()} faults of {len(self.faults)} kinds" for _ in self.faults[:1]),
        ]


def fuzz(pairs: list[Subject], first: int, count: int, say: Callable[[str], None] = lambda line: None) -> Result:
    """Run ``count`` rounds from seed ``first`` on."""
    result = Result()
    for one, outcome in run_all((one, one.task()) for one in rounds(pairs, first, count)):
        faults = len(result.faults)
        result.add(one, outcome)
        if len(result.faults) > faults:
            say(f"FAULT {one}: {result.faults[-1][1]:.300}")
        if len(result.faults) >= MAX_FAULTS:
            say(f"stopped after {MAX_FAULTS} kinds of faults")
            break
        if result.statuses.total() % 1000 == 0:
            say(f"of {2 * count} now {result.counts()}")
    return result


def smaller(one: Round, wanted: str) -> Round:
    """The same fault with as few edits, and as few bytes in them, as one pass leaves."""
    kind = wanted.split(":", maxsplit=1)[0]

    def still(edits: tuple[object, ...], cut: int | None) -> bool:
        attempt = replace(one, mutation=Mutation("", edits, cut))  # type: ignore[arg-type]
        return run(attempt.task()).fault.split(":")[0] == kind

    edits, cut = one.mutation.edits, one.mutation.cut
    if cut is not None and still(edits, None):
        cut = None
    for edit in edits:
        without = tuple(e for e in edits if e is not edit)
        if still(without, cut):
            edits = without
    for k, edit in enumerate(edits):
        size = len(edit.data)
        while size > 1 and still((*edits[:k], replace(edit, data=edit.data[: size // 2]), *edits[k + 1 :]), cut):
            size //= 2
            edits = (*edits[:k], replace(edit, data=edit.data[:size]), *edits[k + 1 :])
    return replace(one, mutation=Mutation(one.mutation.how, edits, cut))


def main(arguments: list[str] | None = None) -> int:
    """Runs the rounds, prints what came of them; exit status 1 where anything else than a verdict did."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="leave out of a fault what is not needed for it")
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    options = parser.parse_args(arguments)
    pairs = subjects(Compiler(options.cache.resolve() / "compiled"), options.cache.resolve() / "packages")
    result = fuzz(pairs, options.seed, options.rounds, lambda line: print(line, file=sys.stderr, flush=True))
    for one, fault in result.faults if options.small else ():
        print(f"{one.subject.name}: {fault}\n  {smaller(one, fault).mutation!r}")
    print(*result.lines(), sep="\n")
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
