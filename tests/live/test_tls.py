"""Thread-local storage in every model: changed code finds the running threads' variables, and only those."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from elfdiff.errors import Refused
from patcher.transactions.transaction import apply, revert
from tests.compile import Compiler
from tests.live.grafting import LibraryPair, Running, library_pair, patch_for, sources, there_and_back

pytestmark = pytest.mark.root

VARIABLES = """
static __thread long a = 5, b = 7; __thread long c = 11;
SEPARATE long keep(long n) { return a + b * 2 + c * 4; }
"""
EDITED = VARIABLES + "long answer(long n) { EDIT; return keep(n) + n + c + b; }"
OTHER = VARIABLES + "long answer(long n) { EDIT; return keep(n) + n + WHICH; }"
CHANGES = {
    "edited": (EDITED, {"EDIT": ""}, {"EDIT": "n += 100"}),
    "another variable": (OTHER, {"EDIT": "", "WHICH": "b"}, {"EDIT": "", "WHICH": "a"}),
    "edited and another variable": (OTHER, {"EDIT": "", "WHICH": "b"}, {"EDIT": "n += 100", "WHICH": "a"}),
}
MODELS = {
    "default": (),
    "global-dynamic": ("-ftls-model=global-dynamic",),
    "local-dynamic": ("-ftls-model=local-dynamic",),
    "initial-exec": ("-ftls-model=initial-exec",),
    "descriptors": ("-mtls-dialect=gnu2",),
    "not optimised": ("-O0",),  # a pair of slots for each static variable, which differ in the linker's word only
}
ASKED = (0, 1, 2)
MATRIX = bool(os.environ.get("LIVEGRAFT_MATRIX"))


@pytest.fixture(scope="session")
def compiled(cache_folder: Path) -> Compiler:
    return Compiler(cache_folder / "compiled")


def filled(text: str, words: dict[str, str]) -> str:
    for word, replacement in words.items():
        text = text.replace(word, replacement)
    return text


def library(compiled: Compiler, change: str, *flags: str, **options: object) -> LibraryPair:
    text, old, new = CHANGES[change]
    return library_pair(compiled, filled(text, old), filled(text, new), *flags, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model", MODELS)
def test_a_library_finds_its_variables(model: str, change: str, compiled: Compiler, tmp_path: Path) -> None:
    pair = library(compiled, change, *MODELS[model])
    with pair.running() as process, pair.running(new=True) as truth:
        before, after = process.ask(*ASKED), truth.ask(*ASKED)
        assert before != after
        there_and_back(process, patch_for(pair.old, pair.new, tmp_path), before, after)


@pytest.mark.parametrize("model", ["default", "initial-exec", "not optimised"])
@pytest.mark.parametrize("link", ["pie", "no-pie", "static"])
def test_a_program_finds_its_variables(link: str, model: str, compiled: Compiler, tmp_path: Path) -> None:
    text, old, new = CHANGES["edited"]
    builds = [compiled(sources(text, **words), *MODELS[model], link=link) for words in (old, new)]
    with Running([builds[0]]) as process, Running([builds[1]]) as truth:
        before, after = process.ask(*ASKED), truth.ask(*ASKED)
        assert before != after
        there_and_back(process, patch_for(*builds, tmp_path), before, after)


THREADED = """
#include <errno.h>
#include <pthread.h>
static __thread long mine;
static long step(void) { static _Thread_local long steps; return ++steps; }
SEPARATE long bump(long n) { mine += n; errno = (int)mine; return mine + STEP + errno; }
static void *run(void *argument) { bump((long)argument); return (void *)bump((long)argument); }
long answer(long n) {
    pthread_t thread;
    void *result;
    pthread_create(&thread, NULL, run, (void *)n);
    pthread_join(thread, &result);
    return (long)result * 1000 + bump(1) ADD;
}
"""


@pytest.mark.parametrize("link", ["pie", "no-pie"])
def test_threads_of_before_and_after_keep_their_own(link: str, compiled: Compiler, tmp_path: Path) -> None:
    """The asking thread's variable goes on through the patch; each new thread starts from the template."""
    old, new = (compiled(sources(THREADED, STEP=s, ADD=""), "-pthread", link=link) for s in ("0", "step() * 100"))
    with Running([old]) as process:
        assert process.ask(3) == [12 * 1000 + 2]
        with pytest.raises(Refused):  # the new static variable is thread-local
            patch_for(old, new, tmp_path)
        fixed = compiled(sources(THREADED, STEP="500", ADD=""), "-pthread", link=link)
        patch = patch_for(old, fixed, tmp_path)
        apply(process.pid, patch)
        assert process.ask(3, 3) == [512 * 1000 + 504, 512 * 1000 + 506]
        revert(process.pid)
        assert process.ask(3) == [12 * 1000 + 8]


MOVED = "static __thread long DECL;\n"
ONE = MOVED + "long answer(long n) { EDIT a += n; b ^= 3 * n; return a * 10 + b; }"
BY_ADDRESS = MOVED + """
SEPARATE long *of(long n) { EDIT return n ? &a : &b; }
long answer(long n) { *of(n) += n + 1; return *of(1) * 10 + *of(0); }
"""
REWRITTEN = MOVED + """
#if NUMBER
long answer(long n) { char t[40]; snprintf(t, 40, "%ld", n); if (n > 3) b++;
    for (int i = 0; i < n; i++) a ^= b * i; return b * 100 + strlen(t); }
#else
long answer(long n) { n += a * 3; b += n; a += 7; return n + b; }
#endif
"""


@pytest.mark.parametrize("stripped", [True, False] if MATRIX else [True], ids=["stripped", "named"][: 1 + MATRIX])
@pytest.mark.parametrize("model", MODELS if MATRIX else ["default", "descriptors", "not optimised"])
@pytest.mark.parametrize("text", [ONE, BY_ADDRESS, REWRITTEN], ids=["one", "by address", "rewritten"])
@pytest.mark.parametrize("kind", ["library", "pie"])
def test_variables_that_change_places_are_refused(
    kind: str, text: str, model: str, stripped: bool, compiled: Compiler, tmp_path: Path
) -> None:
    """Of the same size, both zero at first, in changed code only: new code would read the one for the other."""
    first = filled(text, {"DECL": "a, b", "EDIT": "", "NUMBER": "0"})
    second = filled(text, {"DECL": "b, a", "EDIT": "if (n == 7) return 0;", "NUMBER": "1"})
    if kind == "library":
        pair = library_pair(compiled, first, second, *MODELS[model], stripped=stripped)
        builds = [pair.old, pair.new]
    else:
        builds = [compiled(sources(one), *MODELS[model], stripped=stripped) for one in (first, second)]
    with pytest.raises(Refused) as caught:
        patch_for(*builds, tmp_path)
    assert any(line.startswith(("tls-layout", "unpinned-address")) for line in caught.value.details)


TWINS = (
    "two functions that differ in the offset of a thread-local variable alone change bytes when the variables change "
    "places: each is taken for the other, and called for the other; what the thread has in the one is then read as the "
    "other. Symbols would tell, and they are stripped"
)


@pytest.mark.xfail(strict=True, reason=TWINS)
def test_variables_whose_only_users_are_twins_are_refused(compiled: Compiler, tmp_path: Path) -> None:
    text = MOVED + """
    SEPARATE long *first(void) { return &a; }
    SEPARATE long *second(void) { return &b; }
    long answer(long n) { *first() += 1; *second() += 2; return *first() * 10 + *second(); }
    """
    builds = [compiled(sources(text, DECL=order)) for order in ("a, b", "b, a")]
    with pytest.raises(Refused):
        patch_for(*builds, tmp_path)
