"""Small programs that answer on a pipe, patched while they run: for tests of linkage and toolchains.

A program defines ``long answer(long n)``; ``MAIN`` reads a number a line and answers ``count result``. The count is in
a variable of the running program that no patch may touch.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from elfdiff.diff import Options, diff
from elfdiff.patches.patchfile import read_patch, write_patch
from elfdiff.patchobject import PatchObject, Severity
from fixtures.hearing import next_line
from fixtures.intact import altered_code, writable_and_executable
from patcher.transactions.transaction import apply, revert
from tests.compile import Compiler

PRELUDE = """
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#define SEPARATE __attribute__((noinline, noclone))
long answer(long n);
"""
MAIN = """
static long count;
static long company_a, company_b;
SEPARATE int company1(int x) { company_a += x; fprintf(stderr, "one %ld\\n", company_a); return x * 3; }
SEPARATE int company2(int x) { company_b ^= x; fprintf(stderr, "two %ld\\n", company_b); return x + 4; }
SEPARATE int company3(int x) { for (int i = 0; i < x; i++) company_a += company1(i) * company2(x - i); return 2; }
int main(int argc, char **argv) {
    char line[64];
    if (argc > 5) return company3(argc);
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        long result = answer(atol(line));
        printf("%ld %ld\\n", ++count, result);
    }
    return 0;
}
"""
"""``main`` and code that never changes, so that a pair of builds is more than the one function in question."""


def sources(text: str, **words: str) -> dict[str, str]:
    """The files of a program: ``text`` with every word in capitals replaced, and ``main`` apart from it."""
    for word, replacement in words.items():
        text = text.replace(word, replacement)
    return {"main.c": PRELUDE + MAIN, "answer.c": PRELUDE + text}


@dataclass
class Running:
    """A started program; ``ask`` puts a number and checks that the program's count goes on."""

    command: Sequence[str | Path]
    environment: Mapping[str, str] = field(default_factory=dict)
    asked: int = 0

    def __enter__(self) -> Running:
        self._process = subprocess.Popen(
            [str(word) for word in self.command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, **self.environment},
        )  # fmt: skip
        assert self._line() == "ready"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        self._process.communicate()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _line(self) -> str:
        return next_line(self._process).strip()

    def put(self, number: int) -> None:
        """Put a question without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n")

    def ask(self, *numbers: int) -> list[int]:
        """The answers. Fails where the program's state did not go on."""
        answers = []
        for number in numbers:
            self.put(number)
            count, _, result = self._line().partition(" ")
            self.asked += 1
            assert int(count) == self.asked, "its state did not go on"
            answers.append(int(result))
        return answers


def patch_for(old: Path, new: Path, folder: Path, *, allow: Sequence[str] = ()) -> PatchObject:
    """The patch of a pair, written to a file and read again. Raises what ``diff`` raises."""
    file = folder / "fix.patch"
    write_patch(diff(old, new, Options(allow=frozenset(allow))), file)
    return read_patch(file)


def warnings(patch: PatchObject) -> set[str]:
    """Codes of what a patch warns of."""
    return {finding.code for finding in patch.findings if finding.severity is Severity.WARN}


def there_and_back(program: Running, patch: PatchObject, before: Sequence[int], after: Sequence[int]) -> None:
    """Apply and revert, twice; questions are 0, 1, ... and the answers those given, as stateless functions give."""
    numbers = range(len(before))
    assert program.ask(*numbers) == list(before)
    for _ in range(2):
        apply(program.pid, patch)
        assert program.ask(*numbers) == list(after)
        assert altered_code(program.pid) != []
        assert writable_and_executable(program.pid) == []
        revert(program.pid)
        assert program.ask(*numbers) == list(before)
        assert altered_code(program.pid) == []


COMPANY = MAIN[MAIN.index("static long company_a") : MAIN.index("int main")]
SONAME = "libanswer.so"


@dataclass(frozen=True)
class LibraryPair:
    """Two builds of a library that defines ``answer``, and the program that is linked with it."""

    old: Path
    new: Path
    program: Path

    def running(self, *, new: bool = False, **environment: str) -> Running:
        """The program with the old library, or with the new one."""
        folder = (self.new if new else self.old).parent
        return Running([self.program], {"LD_LIBRARY_PATH": str(folder), **environment})


def library_pair(
    compiled: Compiler, old: str, new: str, *flags: str, cc: str = "gcc", stripped: bool = True, main: str = MAIN
) -> LibraryPair:
    """Build both texts as ``libanswer.so``, beside code that does not change."""
    builds = []
    for text in (old, new):
        files = {"answer.c": PRELUDE + text, "company.c": PRELUDE + COMPANY}
        built = compiled(files, *flags, f"-Wl,-soname,{SONAME}", link="library", cc=cc, stripped=stripped)
        builds.append(named(built, SONAME))
    program = compiled({"main.c": PRELUDE + main}, str(builds[0]))
    return LibraryPair(builds[0], builds[1], program)


def named(built: Path, name: str) -> Path:
    """The same file under another name, in a folder of its own; never written in place, as others may run it."""
    target = built.parent / "named" / name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        draft = target.with_name(f"{name}.{os.getpid()}")
        shutil.copy(built, draft)
        draft.replace(target)
    return target
