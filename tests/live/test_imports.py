"""Imports that only the new code has are bound as the dynamic linker would bind them, or refused by name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from elfdiff.errors import Refused
from patcher.transactions.transaction import apply
from tests.compile import Compiler
from tests.live.grafting import Running, patch_for, sources, there_and_back, warnings

pytestmark = pytest.mark.root

MATRIX = bool(os.environ.get("LIVEGRAFT_MATRIX"))

CODE = """
DECLARE
long answer(long n) { char text[64]; snprintf(text, sizeof text, "%ld", n * 7 + 10); EDIT; return atol(text); }
"""
OLD = {"DECLARE": "", "EDIT": ""}


@pytest.fixture(scope="session")
def compiled(cache_folder: Path) -> Compiler:
    return Compiler(cache_folder / "compiled")


def pair(compiled: Compiler, edit: str, *flags: str, declare: str = "", **options: object) -> tuple[Path, Path]:
    """Builds without and with ``edit``, which may use ``n`` and ``text`` ("10" for 0, "17" for 1)."""
    old, new = sources(CODE, **OLD), sources(CODE, DECLARE=declare, EDIT=edit)
    return compiled(old, *flags, **options), compiled(new, *flags, **options)  # type: ignore[arg-type]


BEFORE = [10, 17, 24]
NEW_IMPORTS = {
    "plain": "return labs(strtol(text, 0, 10) - 100)",
    "indirect": 'return strlen(text) + strspn(text, "12") * 10 + (memchr(text, n + 48, 9) != 0) * 100',
    "of the old version": 'asm(".symver memcpy, memcpy@GLIBC_2.2.5"); memcpy(text, "5", n); return atol(text)',
    "of the new version": 'asm(".symver memcpy, memcpy@GLIBC_2.14"); memcpy(text, "5", n); return atol(text)',
    "weak and defined": "extern long labs(long) __attribute__((weak)); return labs ? labs(n - 9) : 99",
    "weak and nobody's": "extern long nobody(void) __attribute__((weak)); return nobody ? nobody() : n + 77",
}
KINDS = {
    "pie": {"link": "pie"},
    "no-pie": {"link": "no-pie"},
    "now": {"link": "pie", "flags": ("-Wl,-z,now",)},
    "lazy": {"link": "pie", "flags": ("-Wl,-z,lazy",)},
    "no-plt": {"link": "pie", "flags": ("-fno-plt",)},
    "cet": {"link": "pie", "flags": ("-fcf-protection=full",)},
    "clang": {"link": "pie", "cc": "clang"},
}


def answers(program: Path, **environment: str) -> list[int]:
    """What a build says when it is simply started."""
    with Running([program], environment) as process:
        return process.ask(0, 1, 2)


@pytest.mark.parametrize("kind", KINDS if MATRIX else ["pie", "no-pie", "no-plt", "clang"])
@pytest.mark.parametrize("case", NEW_IMPORTS)
def test_a_new_import_is_bound(case: str, kind: str, compiled: Compiler, tmp_path: Path) -> None:
    options = dict(KINDS[kind])
    flags = ("-fno-builtin", *options.pop("flags", ()))  # type: ignore[misc]
    old, new = pair(compiled, NEW_IMPORTS[case], *flags, **options)
    after = answers(new)
    assert after != BEFORE
    patch = patch_for(old, new, tmp_path)
    if case != "weak and nobody's" or kind != "no-pie":  # at a fixed address the linker writes a 0
        assert patch.imports and "new-import" in warnings(patch)
    with Running([old]) as process:
        there_and_back(process, patch, BEFORE, after)


def test_an_indirect_function_that_nobody_has_bound_is_refused(compiled: Compiler, tmp_path: Path) -> None:
    old, new = pair(compiled, "extern long time(long *); return n + time(0)")
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as process:
        with pytest.raises(Refused, match=r"needs time@GLIBC_2\.2\.5, which is an indirect function in libc") as caught:
            apply(process.pid, patch)
        assert "nothing in the process has bound it" in caught.value.why
        assert process.ask(0, 1) == BEFORE[:2]


def test_an_indirect_function_is_taken_from_whoever_bound_it(compiled: Compiler, tmp_path: Path) -> None:
    """A library that was preloaded has bound ``time``, to the vDSO."""
    other = compiled("long time(long *); long other(void) { return time(0); }", "-Wl,-z,now", link="library")
    old, new = pair(compiled, "extern long time(long *); return n + (time(0) > 1600000000)")
    patch = patch_for(old, new, tmp_path)
    with Running([old], {"LD_PRELOAD": str(other)}) as process:
        there_and_back(process, patch, BEFORE, [1, 2, 3])


DATA = "extern char **environ; extern char *tzname[]; return n + (environ != 0) + (tzname[0] != 0)"


def test_a_library_variable_by_its_slot_is_bound(compiled: Compiler, tmp_path: Path) -> None:
    old, new = pair(compiled, DATA, "-fPIC")
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as process:
        there_and_back(process, patch, BEFORE, answers(new))


@pytest.mark.parametrize("link", ["pie", "no-pie"])
def test_a_library_variable_that_the_new_build_copies_is_refused(link: str, compiled: Compiler, tmp_path: Path) -> None:
    """The new code has room for a distance within the program only; the running program has no copy there."""
    old, new = pair(compiled, DATA, link=link)
    with pytest.raises(Refused) as caught:
        patch_for(old, new, tmp_path)
    assert any("of which the running program has no copy" in line for line in caught.value.details)


@pytest.mark.parametrize("link", ["pie", "no-pie"])
def test_a_copied_variable_is_the_running_one(link: str, compiled: Compiler, tmp_path: Path) -> None:
    old, new = pair(compiled, "return n + (stderr == stdout) * 50 + (fileno(stderr) == 2)", link=link)
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as process:
        there_and_back(process, patch, BEFORE, answers(new))


# -- libraries --------------------------------------------------------------------------------------------------

INNER = "long inner(long n) { return n * 1000; }"
OUTER = "long inner(long); long outer(long n) { return inner(n) + 1; }"
USES_INNER = "return inner(n) + 3"


def library(compiled: Compiler, text: str, name: str, folder: Path, *flags: str) -> Path:
    """A library whose file is called ``name``, in ``folder``; never written to in place, as others may run it."""
    built = compiled(text, f"-Wl,-soname,{name}", f"-Wl,-rpath,{folder}", *flags, link="library")
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{name}.{os.getpid()}"
    shutil.copy(built, draft)
    return draft.rename(folder / name)


@pytest.fixture(scope="module")
def linked(compiled: Compiler, cache_folder: Path) -> tuple[Path, Path, Path]:
    """Old, new, folder: the old build needs libouter, which needs libinner; the new build needs libinner as well."""
    folder = cache_folder / "libraries"
    inner = library(compiled, INNER, "libinner.so", folder)
    outer = library(compiled, OUTER, "libouter.so", folder, str(inner))
    rpath = ("-Wl,--disable-new-dtags", f"-Wl,-rpath,{folder}", "-Wl,--no-as-needed", str(outer))
    old = compiled(sources(CODE, **OLD), *rpath)
    new = compiled(sources(CODE, DECLARE="long inner(long);", EDIT=USES_INNER), *rpath, str(inner))
    return old, new, folder


def test_a_library_that_another_one_brought_will_do(linked: tuple[Path, Path, Path], tmp_path: Path) -> None:
    old, new, _ = linked
    patch = patch_for(old, new, tmp_path)
    assert patch.needed == ("libinner.so",) and "new-library" in warnings(patch)
    with Running([old]) as process:
        there_and_back(process, patch, BEFORE, [3, 1003, 2003])


def test_a_preloaded_library_goes_first(linked: tuple[Path, Path, Path], compiled: Compiler, tmp_path: Path) -> None:
    """Also behind one that the program needs anyway, which then comes earlier in the linker's list."""
    old, new, folder = linked
    other = library(compiled, "long inner(long n) { return -n; }", "libother.so", folder)
    patch = patch_for(old, new, tmp_path)
    for preloaded in (f"{other}", f"{folder}/libouter.so {other}", f"libc.so.6 {other}"):
        with Running([old], {"LD_PRELOAD": preloaded}) as process, Running([new], {"LD_PRELOAD": preloaded}) as truth:
            after = truth.ask(0, 1, 2)
            assert after == [3, 2, 1]
            there_and_back(process, patch, BEFORE, after)


def test_a_library_that_is_not_loaded_is_refused(compiled: Compiler, tmp_path: Path) -> None:
    edit = {"DECLARE": "double cbrt(double);", "EDIT": "return cbrt(n)"}
    old = compiled(sources(CODE, **OLD))
    new = compiled(sources(CODE, **edit), "-lm")
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as process:
        with pytest.raises(Refused, match=r"new-library: the new build of program needs libm\.so\.6"):
            apply(process.pid, patch)
        assert process.ask(0, 1) == BEFORE[:2]


OPENS = """
#include <dlfcn.h>
static void *handle;
long answer(long n) {
    char text[64];
    if (n == 9) return (handle = dlopen(getenv("PLUGIN"), RTLD_NOW | MODE)) != NULL;
    snprintf(text, sizeof text, "%ld", n * 7 + 10);
    EDIT;
    return atol(text);
}
"""


@pytest.mark.parametrize("mode", ["RTLD_LOCAL", "RTLD_GLOBAL"])
def test_a_library_that_was_opened_at_run_time_is_refused(
    mode: str, linked: tuple[Path, Path, Path], compiled: Compiler, tmp_path: Path
) -> None:
    """It may be closed again, and the patch would be left with a call into nothing."""
    inner = linked[2] / "libinner.so"
    old = compiled(sources(OPENS, EDIT="", MODE=mode))
    new = compiled(sources("long inner(long);" + OPENS, EDIT=USES_INNER, MODE=mode), str(inner))
    patch = patch_for(old, new, tmp_path)
    with Running([old], {"PLUGIN": str(inner)}) as process:
        assert process.ask(9) == [1]
        with pytest.raises(Refused, match=r"new-library: .*libinner\.so") as caught:
            apply(process.pid, patch)
        assert "opened at run time" in caught.value.why
        assert process.ask(0, 1) == BEFORE[:2]


def test_a_reference_without_a_version_gets_the_oldest_one(
    compiled: Compiler, cache_folder: Path, tmp_path: Path
) -> None:
    """Linked against a library that had no versions yet; glibc takes the base or the first version."""
    folder = cache_folder / "libraries"
    script = folder / "versions"
    folder.mkdir(parents=True, exist_ok=True)
    script.write_text("V1 { global: level; }; V2 { global: level; } V1;")
    text = 'asm(".symver first, level@V1"); asm(".symver second, level@@V2");'
    text += "long first(void) { return 1; } long second(void) { return 2; }"
    plain = library(compiled, "long level(void) { return 0; }", "liblevel.so", folder / "plain")
    versioned = library(compiled, text, "liblevel.so", folder, f"-Wl,--version-script,{script}")
    flags = ("-Wl,--no-as-needed", f"-Wl,-rpath,{folder}", "-Wl,--disable-new-dtags")
    old = compiled(sources(CODE, **OLD), *flags, str(plain))
    edit = {"DECLARE": "long level(void);", "EDIT": "return n * 10 + level()"}
    new, newest = (compiled(sources(CODE, **edit), *flags, str(one)) for one in (plain, versioned))
    for build, after in ((new, [1, 11, 21]), (newest, [2, 12, 22])):
        assert answers(build) == after, "what the dynamic linker does"
        patch = patch_for(old, build, tmp_path)
        with Running([old]) as process:
            there_and_back(process, patch, BEFORE, after)


# -- indirect functions of the program itself -------------------------------------------------------------------

OWN = """
static long one(long n) { return n + 1 ONE; }
static long other(long n) { return n * 7 + 2; }
static void *pick(void) { __builtin_cpu_init(); return __builtin_cpu_supports("sse2") FLIP 0 ? one : other; }
long chosen(long n) __attribute__((ifunc("pick")));
long answer(long n) { return chosen(n) * 10; }
"""


def own(compiled: Compiler, link: str, **words: str) -> Path:
    return compiled(sources(OWN, **{"ONE": "", "FLIP": "!=", **words}), link=link)


@pytest.mark.parametrize("link", ["pie", "no-pie", "static"])
def test_an_implementation_that_was_chosen_is_patched(link: str, compiled: Compiler, tmp_path: Path) -> None:
    old, new = own(compiled, link), own(compiled, link, ONE="+ 8")
    with Running([old]) as process:
        there_and_back(process, patch_for(old, new, tmp_path), [10, 20], [90, 100])


@pytest.mark.parametrize("link", ["pie", "no-pie", "static"])
def test_another_choice_is_refused(link: str, compiled: Compiler, tmp_path: Path) -> None:
    """The resolver ran when the program started; what it chose then would stay, whatever it would choose now."""
    old, new = own(compiled, link), own(compiled, link, FLIP="==")
    with pytest.raises(Refused) as caught:
        patch_for(old, new, tmp_path)
    assert any("resolver(s) of indirect functions" in line for line in caught.value.details)
