"""One shape of data or code: a C text that is two programs, the old one and the new one, and how it is built.

The text says ``PICK(old, new)`` (or ``#if VERSION``) where the two differ, defines ``void answer(int n)``, which
prints one line without its end, and says ``COUNT`` once on each way through it, in code that changes. ``main`` (below)
is in a file of its own that does not change: it reads a number a line, prints how often COUNT was passed since the
start of the process, and has it answered.

What is right before and after a patch is what the two programs say when each is simply started; only where a patched
process rightly says something else (``after``), because it keeps its state, is that written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

PRELUDE = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define SEPARATE __attribute__((noinline, noclone))
#if VERSION == 1
#define PICK(old, new) old
#else
#define PICK(old, new) new
#endif
#define COUNT served++
static long served;
static volatile int zero;
SEPARATE long served_so_far(void) { return served + zero; }
void answer(int n);
"""
MAIN = """
#include <stdio.h>
#include <stdlib.h>
long served_so_far(void);
void answer(int n);
int main(void) {
    char line[64];
    printf("ready\\n");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        int n = atoi(line);
        printf("%ld ", served_so_far());
        answer(n);
        printf("\\n");
        fflush(stdout);
    }
    return 0;
}
"""


@dataclass(frozen=True)
class Build:
    """How a pair is compiled and linked; the name is for test ids."""

    cc: str = "gcc"
    level: str = "-O2"
    link: str = "pie"
    flags: tuple[str, ...] = ()
    stripped: bool = True

    @property
    def name(self) -> str:
        """As ``gcc-O2-pie-stripped``, with further flags at the end."""
        parts = [self.cc + self.level, self.link, "stripped" if self.stripped else "symbols"]
        return "-".join([*parts, *(flag.lstrip("-").replace("=", "_") for flag in self.flags)])


GCC, CLANG = Build(), Build(cc="clang")
USUAL = (GCC, CLANG)
PLAIN = (replace(GCC, level="-O0"), replace(CLANG, level="-O0", stripped=False))
"""As written: nothing inlined, every variable in memory."""
WIDE = (replace(GCC, level="-O3", flags=("-mavx2",)), replace(CLANG, level="-O3", flags=("-mavx2",)))
SMALL = (replace(GCC, level="-Os"),)
FIXED = (replace(GCC, link="no-pie"), replace(CLANG, link="no-pie"))
STATIC = (replace(GCC, link="static"),)
GUARDED = (replace(GCC, flags=("-fcf-protection=full",)),)


@dataclass(frozen=True)
class Shape:
    """A pair. ``builds`` are those of an ordinary run; ``make matrix`` takes all that ``fits``.

    ``questions`` are put before, after and after the revert. ``after`` replaces what the new program says, by its
    question. ``refused`` are the codes of the findings that must be there instead of a patch, ``allow`` those that are
    lifted. ``nothing``: there is nothing to patch. ``busy``: a
    changed function never returns. ``flags`` are needed by every build of it; ``fits`` are the
    compilers that can build it. ``files`` are further C texts, with the same prelude, ``main`` another main; ``xfail``
    says what is wrong where it goes wrong.
    """

    name: str
    text: str
    questions: tuple[int, ...] = (0, 1, 2, 5)
    builds: tuple[Build, ...] = (GCC,)
    after: Mapping[int, str] = field(default_factory=dict)
    refused: frozenset[str] = frozenset()
    allow: frozenset[str] = frozenset()
    warned: frozenset[str] = frozenset()
    nothing: bool = False
    busy: bool = False
    main: str = MAIN
    xfail: str = ""
    flags: tuple[str, ...] = ()
    fits: tuple[str, ...] = ("gcc", "clang")
    files: Mapping[str, str] = field(default_factory=dict)

    def sources(self, version: int) -> dict[str, str]:
        """File name -> C text of the old (1) or new (2) program."""
        head = f"#define VERSION {version}\n{PRELUDE}"
        found = {"shape.c": head + self.text, "main.c": f"#define VERSION {version}\n{self.main}"}
        others = head.replace("static long served;", "extern long served;").split("SEPARATE long")[0]
        others += "#undef COUNT\nvoid answer(int n);\n"
        found.update({name: others + text for name, text in self.files.items()})
        return found


def full_matrix(shape: Shape) -> list[Build]:
    """Everything that is crossed by ``make matrix``."""
    kinds = (("pie", True), ("pie", False), ("no-pie", True))
    builds = [
        Build(cc, level, link, (), stripped)
        for cc in ("gcc", "clang")
        for level in ("-O0", "-O2", "-O3", "-Os")
        for link, stripped in kinds
    ]
    builds += [Build(cc, link=link) for cc in ("gcc", "clang") for link in ("static", "static-pie")]
    guards = ("-fcf-protection=full",)
    sections = ("-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections")
    for flags in (guards, ("-fno-plt",), sections, ("-mcmodel=large",), ("-flto",)):
        builds += [Build(cc, flags=flags) for cc in ("gcc", "clang")]
    builds += [Build(cc, level="-O3", flags=("-mavx2", "-funroll-loops")) for cc in ("gcc", "clang")]
    return [build for build in builds if build.cc in shape.fits]
