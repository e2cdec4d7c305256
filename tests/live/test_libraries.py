"""A shared library is patched in the program that uses it: linked, opened at run time, interposable or not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from elfdiff.errors import LivegraftError, Refused
from fixtures.intact import altered_code
from patcher.transactions.transaction import apply, check, revert
from tests.compile import Compiler
from tests.conftest import Livegraft
from tests.live.grafting import MAIN, PRELUDE, Running, library_pair, patch_for, there_and_back

pytestmark = pytest.mark.root

TEXT = """
STATE
#define API __attribute__((visibility("VISIBILITY")))
API long exported_state = 3;
static long quiet_state = 4;
API SEPARATE long first(long n) { exported_state += 0; return n * 10 + exported_state FIRST; }
API SEPARATE long second(long n) { return first(n) + quiet_state SECOND; }
SEPARATE long (*chosen(long n))(long) { return n > 1 ? first : second; }
long answer(long n) { return chosen(n)(n) + second(n) * 1000; }
static __attribute__((constructor)) void begin(void) { quiet_state = 40; }
"""
KINDS = {
    "interposable": ((), "default"),
    "protected": ((), "protected"),
    "hidden": ((), "hidden"),
    "symbolic": (("-Wl,-Bsymbolic",), "default"),
    "symbolic functions": (("-Wl,-Bsymbolic-functions",), "default"),
    "no semantic interposition": (("-fno-semantic-interposition",), "default"),
    "no plt": (("-fno-plt",), "default"),
    "lld": (("-fuse-ld=lld",), "default"),
    "mold": (("-fuse-ld=mold",), "default"),
    "cet, now": (("-fcf-protection=full", "-Wl,-z,now"), "default"),
    "sysv hash": (("-Wl,--hash-style=sysv",), "default"),
}
OPENS = """
#include <dlfcn.h>
static void *handle;
long answer(long n) {
    if (n == -1) return (handle = dlopen(getenv("LIBRARY"), RTLD_NOW)) != NULL;
    if (n == -2) return dlclose(handle);
    return ((long (*)(long))dlsym(handle, "answer"))(n);
}
"""


@pytest.fixture(scope="session")
def compiled(cache_folder: Path) -> Compiler:
    return Compiler(cache_folder / "compiled")


def filled(text: str, **words: str) -> str:
    defaults = {"STATE": "", "VISIBILITY": "default", "FIRST": "", "SECOND": ""}
    for word, replacement in {**defaults, **words}.items():
        text = text.replace(word, replacement)
    return text


@pytest.mark.parametrize("stripped", [True, False], ids=["stripped", "symbols"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_linked_library_is_patched(kind: str, stripped: bool, compiled: Compiler, tmp_path: Path) -> None:
    flags, visibility = KINDS[kind]
    old = filled(TEXT, VISIBILITY=visibility)
    new = filled(TEXT, VISIBILITY=visibility, FIRST="+ 5", SECOND="+ first(n + 1)")
    pair = library_pair(compiled, old, new, *flags, stripped=stripped)
    with pair.running() as process, pair.running(new=True) as truth:
        before, after = process.ask(0, 1, 2), truth.ask(0, 1, 2)
        assert before != after
        there_and_back(process, patch_for(pair.old, pair.new, tmp_path), before, after)


def test_what_is_interposed_stays_interposed(compiled: Compiler, tmp_path: Path) -> None:
    """The program has a ``first`` of its own, which the library's calls go to, in the new code as well."""
    main = MAIN.replace("int main(", "long first(long n) { return n + 7000; }\nint main(", 1)
    new = filled(TEXT, FIRST="+ 5", SECOND="+ first(n + 1)")
    pair = library_pair(compiled, filled(TEXT), new, main=main)
    program = compiled({"main.c": PRELUDE + main}, str(pair.old), "-rdynamic")
    with pair.running() as _:
        pass
    environment = ({"LD_LIBRARY_PATH": str(one.parent)} for one in (pair.old, pair.new))
    with Running([program], next(environment)) as process, Running([program], next(environment)) as truth:
        before, after = process.ask(0, 1, 2), truth.ask(0, 1, 2)
        assert before[2] % 1000000 > 7000 and before != after
        there_and_back(process, patch_for(pair.old, pair.new, tmp_path), before, after)


@pytest.fixture
def opened(compiled: Compiler, tmp_path: Path) -> tuple[Running, Path, Path]:
    """A program that opens the old library when asked -1 and closes it when asked -2; old and new library."""
    pair = library_pair(compiled, filled(TEXT), filled(TEXT, FIRST="+ 5"))
    program = compiled({"main.c": PRELUDE + MAIN, "opens.c": PRELUDE + OPENS}, "-ldl")
    return Running([program], {"LIBRARY": str(pair.old)}), pair.old, pair.new


def test_an_opened_library_is_patched(opened: tuple[Running, Path, Path], tmp_path: Path) -> None:
    running, old, new = opened
    patch = patch_for(old, new, tmp_path)
    with running as process:
        with pytest.raises(Refused, match="has not loaded libanswer"):
            apply(process.pid, patch)
        assert process.ask(-1, 0, 2) == [1, 43000 + 43, 63000 + 23]
        apply(process.pid, patch)
        assert process.ask(0, 2) == [48000 + 48, 68000 + 28]
        revert(process.pid)
        assert process.ask(0, 2) == [43000 + 43, 63000 + 23]


def test_a_library_that_was_closed_and_opened_again_is_not_taken_for_patched(
    opened: tuple[Running, Path, Path], tmp_path: Path
) -> None:
    """Its code is the file's again, wherever it is: apply must patch it again or refuse, and never say that it is."""
    running, old, new = opened
    patch = patch_for(old, new, tmp_path)
    with running as process:
        assert process.ask(-1) == [1]
        apply(process.pid, patch)
        assert process.ask(0, -2, -1, 0) == [48048, 0, 1, 43043]
        try:
            outcome = apply(process.pid, patch)
        except LivegraftError:
            assert process.ask(0) == [43043]
        else:
            assert not outcome.already
            assert process.ask(0) == [48048]


def test_a_library_that_was_closed_is_left_alone(opened: tuple[Running, Path, Path], tmp_path: Path) -> None:
    running, old, new = opened
    patch = patch_for(old, new, tmp_path)
    with running as process:
        assert process.ask(-1) == [1]
        apply(process.pid, patch)
        assert process.ask(-2) == [0]
        for command in (revert, lambda pid: apply(pid, patch), lambda pid: check(pid, patch)):
            with pytest.raises(LivegraftError):
                command(process.pid)
        assert altered_code(process.pid) == []
        assert process.ask(-1, 0) == [1, 43043]


def test_a_set_is_reverted_though_its_library_was_closed(
    opened: tuple[Running, Path, Path], compiled: Compiler, tmp_path: Path
) -> None:
    """Of the library only the record is left to be changed; what it leaves in the program is taken back."""
    running, old, new = opened
    later = OPENS.replace("return dlclose(handle);", "return dlclose(handle) + 7;")
    program = compiled({"main.c": PRELUDE + MAIN, "opens.c": PRELUDE + later}, "-ldl")
    for name in ("library", "program"):
        (tmp_path / name).mkdir()
    both = patch_for(old, new, tmp_path / "library"), patch_for(Path(running.command[0]), program, tmp_path / "program")
    with running as process:
        with pytest.raises(Refused, match="has not loaded libanswer"):
            apply(process.pid, both)
        assert process.ask(-1) == [1]
        apply(process.pid, both)
        assert process.ask(0, -2) == [48048, 7]
        assert len(revert(process.pid).members) == 2
        assert process.ask(-1, 0, -2) == [1, 43043, 0] and altered_code(process.pid) == []


IN_A_NAMESPACE = 'mount -t tmpfs none "$0" && cp "$1" "$LIBRARY" && exec "$2"'


@pytest.mark.parametrize("fate", ["there", "deleted", "replaced"])
def test_a_library_that_only_another_mount_namespace_has(
    fate: str, compiled: Compiler, tmp_path: Path, livegraft: Livegraft
) -> None:
    """Opened at run time from a file system that nobody else sees, and in which its file may be gone by now."""
    pair = library_pair(compiled, filled(TEXT), filled(TEXT, FIRST="+ 5"))
    program = compiled({"main.c": PRELUDE + MAIN, "opens.c": PRELUDE + OPENS}, "-ldl")
    library = tmp_path / "hidden" / "libanswer.so"
    library.parent.mkdir()
    patch = tmp_path / "fix.patch"
    patch_for(pair.old, pair.new, tmp_path)
    command = ["unshare", "--mount", "sh", "-c", IN_A_NAMESPACE, library.parent, pair.old, program]
    with Running(command, {"LIBRARY": str(library)}) as process:
        assert process.ask(-1, 0) == [1, 43043] and not library.exists()
        within = ["nsenter", "--target", str(process.pid), "--mount"]
        if fate != "there":
            subprocess.run([*within, "rm", library], check=True)
        if fate == "replaced":
            subprocess.run([*within, "cp", pair.new, library], check=True)
        livegraft("apply", patch, "--pid", process.pid, "--timeout", 60)
        assert process.ask(0, 2) == [48048, 68028]
        livegraft("revert", "--pid", process.pid, "--timeout", 60)
        assert process.ask(0, 2) == [43043, 63023]


DROPS = {
    "gone": ('API long extra(long n) { return n; }', ""),
    "larger": ("API long extra[4];", "API long extra[8];"),
    "smaller": ("API long extra[4];", "API long extra[2];"),
    "data, once a function": ("API long extra(long n) { return n; }", "API long extra = 5;"),
    "thread-local, once not": ("API long extra;", "API __thread long extra;"),
    "indirect, once not": (
        "API long extra(long n) { return n; }",
        "static long real(long n) { return n; } static void *pick(void) { return real; }"
        'API long extra(long n) __attribute__((ifunc("pick")));',
    ),
}


@pytest.mark.parametrize("case", DROPS)
def test_what_other_modules_bind_to_must_stay(case: str, compiled: Compiler, tmp_path: Path) -> None:
    api = '#define API __attribute__((visibility("default")))\n'
    old, new = DROPS[case]
    pair = library_pair(compiled, filled(TEXT, STATE=api + old), filled(TEXT, STATE=api + new, FIRST="+ 5"))
    with pytest.raises(Refused) as caught:
        patch_for(pair.old, pair.new, tmp_path)
    assert any(line.startswith("exported-symbol") for line in caught.value.details)


def test_more_exports_are_no_hazard(compiled: Compiler, tmp_path: Path) -> None:
    api = '#define API __attribute__((visibility("default")))\nAPI long extra(long n) { return n; }'
    pair = library_pair(compiled, filled(TEXT), filled(TEXT, STATE=api, FIRST="+ 5"))
    with pair.running() as process, pair.running(new=True) as truth:
        there_and_back(process, patch_for(pair.old, pair.new, tmp_path), process.ask(0, 1), truth.ask(0, 1))


VERSIONED = """
asm(".symver one, level@V1");
SEPARATE long one(long n) { return n + 1; }
#if TWO
asm(".symver two, level@@V2");
SEPARATE long two(long n) { return n + 2000 + TWO; }
#endif
long answer(long n) { return n * 3 EDIT; }
"""


@pytest.mark.parametrize("stripped", [True, False], ids=["stripped", "symbols"])
def test_a_new_version_of_a_symbol_leaves_the_old_one_alone(stripped: bool, compiled: Compiler, tmp_path: Path) -> None:
    """The program bound to level@V1 keeps it, also where another function is level by default now."""
    script = tmp_path / "versions"
    script.write_text("V1 { global: level; answer; local: *; }; V2 { } V1;")
    one = VERSIONED.replace("level@V1", "level@@V1").replace("TWO", "0")
    flags = (f"-Wl,--version-script={script}",)
    main = MAIN.replace("long result = answer(atol(line));", "long result = answer(atol(line)) + level(5) * 100;")
    main = "long level(long n);\n" + main
    versions = {"0": one, "1": VERSIONED.replace("TWO", "1")}
    old, new = versions["0"].replace("EDIT", ""), versions["1"].replace("EDIT", "+ 7")
    pair = library_pair(compiled, old, new, *flags, stripped=stripped, main=main)
    with pair.running() as process, pair.running(new=True) as truth:
        before, after = process.ask(0, 1), truth.ask(0, 1)
        assert (before, after) == ([600, 603], [607, 610])
        there_and_back(process, patch_for(pair.old, pair.new, tmp_path), before, after)
