"""C++ exceptions thrown in, caught in, and passing through patched functions."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest

from elfdiff.diff import Options, diff
from elfdiff.errors import Busy, Refused
from elfdiff.patchobject import Reason
from fixtures.intact import altered_code
from patcher.planning.unwinders import lookup_slots
from patcher.process.memory import Memory
from patcher.process.modules import modules
from patcher.process.proc import mapping_over, mappings
from patcher.records.record import State
from patcher.transactions.inspection import inspect_process
from patcher.transactions.transaction import apply, revert
from tests.compile import Compiler
from tests.live.answering import killed_at
from tests.live.grafting import MAIN, Running, library_pair, patch_for, there_and_back
from tests.live.throwing import ASKED, BACKTRACE, CHANGED, TYPES, UNVERSIONED, everything, program

pytestmark = pytest.mark.root

CPP = ("-std=gnu++17", "-fexceptions", "-pthread")
BUNDLED = ("-static-libgcc", "-static-libstdc++")
LIBCXX = ("-stdlib=libc++", "-lunwind")
"""LLVM's unwinder, which asks dl_iterate_phdr. glibc cancels threads and looks at stacks by libgcc_s all the same."""
BUILDS = {
    "gcc -O2": ("g++", "pie", ("-O2",)),
    "gcc -O0": ("g++", "pie", ("-O0",)),
    "gcc fixed -O2": ("g++", "no-pie", ("-O2",)),
    "gcc fixed -O0": ("g++", "no-pie", ("-O0",)),
    "gcc bundled": ("g++", "pie", ("-O2", *BUNDLED)),
    "gcc bound at start": ("g++", "pie", ("-O1", "-Wl,-z,now")),
    "gcc protected": ("g++", "pie", ("-Os", "-fcf-protection=full")),
    "clang -O2": ("clang++", "pie", ("-O2",)),
    "clang -O0": ("clang++", "pie", ("-O0",)),
    "clang fixed -O2": ("clang++", "no-pie", ("-O2",)),
    "clang bundled": ("clang++", "no-pie", ("-O0", *BUNDLED)),
    "clang lld": ("clang++", "pie", ("-O2", "-fuse-ld=lld")),
    "clang libc++": ("clang++", "pie", ("-O2", *LIBCXX)),
    "clang libc++ fixed": ("clang++", "no-pie", ("-O2", *LIBCXX)),
    "clang libc++ bundled": ("clang++", "no-pie", ("-O2", *LIBCXX, "-Wl,-Bstatic", "-lunwind", "-Wl,-Bdynamic")),
}


@pytest.fixture(scope="session")
def compiled(cache_folder: Path) -> Compiler:
    return Compiler(cache_folder / "compiled")


def built(compiled: Compiler, sources: dict[str, str], *flags: str, link: str = "pie", cc: str = "g++") -> Path:
    return compiled(sources, *CPP, *flags, link=link, cc=cc)


COLD = ("gcc -O2", "gcc fixed -O0", "gcc bundled", "gcc bound at start", "clang lld", "clang libc++ fixed")
"""Builds in which the first exception of all is thrown when the patch is in force: slots are not bound yet."""


@pytest.mark.parametrize(("name", "warm"), [(name, name not in COLD) for name in BUILDS], ids=str)
def test_exceptions_are_thrown_caught_and_pass(name: str, warm: bool, compiled: Compiler, tmp_path: Path) -> None:
    cc, link, flags = BUILDS[name]
    if "-lunwind" in flags:
        require_libcxx()
    other_unwinder = "-static-libgcc" in flags or "-lunwind" in flags
    sources = (everything(version, cancels=not other_unwinder) for version in (1, 2))
    old, new = (built(compiled, source, *flags, link=link, cc=cc) for source in sources)
    patch = patch_for(old, new, tmp_path)
    asked = [n for n in ASKED if n != BACKTRACE or not other_unwinder]  # backtrace(3) loads another unwinder
    with Running([old]) as fresh, Running([new]) as renewed:
        before, after = fresh.ask(*asked), renewed.ask(*asked)
    assert [b - a for a, b in zip(before, after, strict=True)] == [0 if n in UNVERSIONED else 1000 for n in asked]
    with Running([old]) as program:
        if warm:
            assert program.ask(*asked) == before
        for _ in range(2):
            apply(program.pid, patch)
            assert program.ask(*asked) == after
            revert(program.pid)
            assert program.ask(*asked) == before
        assert altered_code(program.pid) == []
        assert slots_of(program.pid) == "plain"


def require_libcxx() -> None:
    if shutil.which("clang++") is None:
        pytest.skip("the compiler clang++ is not installed")
    for library in ("libc++.so", "libunwind.so"):
        found = subprocess.run(["clang++", f"-print-file-name={library}"], capture_output=True, text=True, check=False)
        if not found.stdout.startswith("/"):
            pytest.skip(f"LLVM's C++ library is not installed: {library} (libc++-dev, libunwind-14-dev)")


def slots_of(pid: int) -> str:
    """Whether the slots through which unwind tables are looked up lead to the C library, or to a patch."""
    with Memory(pid) as memory:
        slots = lookup_slots(modules(mappings(pid), memory), memory)
        own = {item.start for item in mappings(pid) if "memfd:livegraft" in item.path}
        return "patched" if any(mapping_over(mappings(pid), s.value, 1).start in own for s in slots) else "plain"


def test_an_unwinder_that_would_be_loaded_later_is_a_reason_to_refuse(compiled: Compiler, tmp_path: Path) -> None:
    """pthread_cancel(3) loads libgcc_s when it is first called, whatever unwinder the program has itself."""
    old, new = (built(compiled, everything(version), "-O2", *BUNDLED) for version in (1, 2))
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as program:
        with pytest.raises(Refused, match=r"exceptions: .* is not loaded yet"):
            apply(program.pid, patch)
        assert altered_code(program.pid) == []


IN_FLIGHT = TYPES + """
static std::exception_ptr kept;
SEPARATE void keep() { try { thrower(2); } catch (...) { kept = std::current_exception(); } }
SEPARATE long caught() { try { std::rethrow_exception(kept); } catch (const Base &b) { return VERSION + b.tell(); } }
"""


def test_an_exception_thrown_before_the_patch_is_caught_by_it_and_after_it(compiled: Compiler, tmp_path: Path) -> None:
    old, new = (built(compiled, program(IN_FLIGHT, KEPT, VERSION=str(v))) for v in (100, 200))
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as running:
        assert running.ask(0, 1) == [1, 102]
        apply(running.pid, patch)
        assert running.ask(1, 0, 1) == [202, 1, 202]
        revert(running.pid)
        assert running.ask(1) == [102]


KEPT = "if (n) return caught(); keep(); return 1;"
OTHER_TYPE = TYPES + """
SEPARATE long caught(long n) { try { thrower(n); } catch (const TYPE &) { return 10; } return 0; }
SEPARATE long outer(long n) { try { return caught(n); } catch (...) { return 20; } }
"""


@pytest.mark.parametrize("link", ["pie", "no-pie"])
@pytest.mark.parametrize("cc", ["g++", "clang++"])
def test_another_type_is_caught_by_the_same_instructions(
    cc: str, link: str, compiled: Compiler, tmp_path: Path
) -> None:
    types = ("Base", "Derived", "Plain")
    builds = [
        built(compiled, program(OTHER_TYPE, "return outer(n);", TYPE=name), cc=cc, link=link) for name in types
    ]
    for build, expected in zip(builds[1:], ([20, 20, 10], [10, 20, 20]), strict=True):
        patch = patch_for(builds[0], build, tmp_path)
        assert patch.functions[0].reason in (Reason.HANDLERS, Reason.CLOSURE)  # its unlikely part may come first
        assert Reason.CODE not in {function.reason for function in patch.functions}
        with Running([builds[0]]) as running:
            there_and_back(running, patch, [20, 10, 10], expected)


def test_handlers_that_did_not_change_are_no_change(compiled: Compiler) -> None:
    """Another function grew, so that all of the tables moved."""
    old, new = (built(compiled, program(TYPES + CHANGED.replace("VERSION", "1"), MOVED, BY=by)) for by in ("", "n++;"))
    patch = diff(old, new, Options())
    assert Reason.HANDLERS not in {function.reason for function in patch.functions}
    assert len(patch.functions) <= 2  # one, and its unlikely part


MOVED = "BY try { catches(n); rethrows(n); passes(n); nests(n); words(n); } catch (...) { return 0; } return n;"
BUSY = TYPES + """
static std::atomic<long> done, wrong;
SEPARATE long risky(long n) {
    Guard g; std::string s(30, 'x');
    if (n % 3 == 0) throw Derived("risky");
    if (n % 3 == 1) thrower(1);
    try { thrower(0); } catch (const Plain &p) { return VERSION + p.n; }
    return 0;
}
SEPARATE void work() {
    for (long n = 0; n < 25000; n++, done++)
        try { long got = risky(n); wrong += got != 105 && got != 205; wrong += n % 3 != 2; }
        catch (const Base &b) { wrong += b.tell() != (n % 3 == 0 ? 2 : 1); }
}
static std::vector<std::thread> threads;
SEPARATE long command(long n) {
    if (n == 0) for (int i = 0; i < 4; i++) threads.emplace_back(work);
    if (n < 2) return done;
    for (auto &thread : threads) thread.join();
    return wrong;
}
"""


@pytest.mark.parametrize("cc", ["g++", "clang++"])
def test_threads_throw_while_the_patch_comes_and_goes(cc: str, compiled: Compiler, tmp_path: Path) -> None:
    old, new = (built(compiled, program(BUSY, "return command(n);", VERSION=str(v)), cc=cc) for v in (100, 200))
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as running:
        running.ask(0)
        rounds = 0
        while running.ask(1) != [100000]:
            for step in (lambda: apply(running.pid, patch), lambda: revert(running.pid)):
                with contextlib.suppress(Busy):
                    step()
                    rounds += 1
        assert running.ask(2) == [0]
        assert rounds > 1


def test_a_static_program_is_refused(compiled: Compiler, tmp_path: Path) -> None:
    """Its unwinder asks a function that is linked in, through no slot."""
    old, new = (
        built(compiled, everything(version), "-Wl,--eh-frame-hdr", link="static", cc="clang++") for version in (1, 2)
    )
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as running:
        with pytest.raises(Refused, match="exceptions: no image of the process looks up unwind tables"):
            apply(running.pid, patch)
        assert altered_code(running.pid) == []


LIBRARY = """
#include <stdexcept>
SEPARATE long inner(long n) { if (n > 2) throw std::runtime_error("inner"); return n; }
SEPARATE long middle(long n) {
    try { return inner(n) + VERSION; }
    catch (const std::exception &) { return 7 + VERSION; }
}
long entry(long n) asm("answer");
long entry(long n) { return middle(n); }
"""
SHOWING = MAIN.replace("printf(\"%ld %ld\\n\", ++count, result)", "printf(\"%ld %ld\\n\", ++count, shown(result))")
SHOWING = "SEPARATE long shown(long x) { fprintf(stderr, \"OFFSET\"); return x + OFFSET; }\n" + SHOWING


@pytest.mark.parametrize("first", [0, 1], ids=["the earlier patch goes first", "the later patch goes first"])
def test_patches_of_two_images_share_the_slots(first: int, compiled: Compiler, tmp_path: Path) -> None:
    texts = [LIBRARY.replace("VERSION", version) for version in ("100", "200")]
    old, new = (
        library_pair(compiled, *texts, "-std=gnu++17", cc="g++", main=SHOWING.replace("OFFSET", by))
        for by in ("1000", "2000")
    )
    patches = []
    for number, pair in enumerate(((old.program, new.program), (old.old, old.new))):
        folder = tmp_path / str(number)
        folder.mkdir()
        patches.append(patch_for(*pair, folder))
    with old.running() as running:
        assert running.ask(1, 5) == [1101, 1107]
        for patch in patches:
            apply(running.pid, patch)
        assert running.ask(1, 5) == [2201, 2207]
        assert slots_of(running.pid) == "patched"
        revert(running.pid, patches[first].id)
        assert running.ask(1, 5) == ([1201, 1207] if first == 0 else [2101, 2107])
        apply(running.pid, patches[first])
        assert running.ask(1, 5) == [2201, 2207]
        revert(running.pid, patches[first].id)
        revert(running.pid, patches[1 - first].id)
        assert running.ask(1, 5) == [1101, 1107]
        assert slots_of(running.pid) == "plain"


LISTING = """
#include <link.h>
struct Seen { long objects, ours, counted; };
static int one(struct dl_phdr_info *info, size_t size, void *data) {
    Seen *seen = (Seen *)data;
    bool table = false;
    for (int k = 0; k < info->dlpi_phnum; k++) table |= info->dlpi_phdr[k].p_type == PT_GNU_EH_FRAME;
    seen->objects++;
    seen->ours += table && strstr(info->dlpi_name, "livegraft") != nullptr;
    seen->counted += size >= 48 && info->dlpi_adds >= 4;
    return 0;
}
SEPARATE long edited(long n) { if (n > 100) throw n; return n + VERSION; }
"""
LISTED = """
    Seen seen{};
    dl_iterate_phdr(one, &seen);
    if (n == 0) return seen.objects;
    if (n == 1) return seen.ours;
    if (n == 2) return seen.counted - seen.objects;
    try { return edited(n); } catch (long) { return 1; }
"""


def test_a_patch_is_an_object_among_those_that_are_loaded(compiled: Compiler, tmp_path: Path) -> None:
    """As dl_iterate_phdr(3) tells: unwinders that know nothing better look there. So is what tells of it."""
    old, new = (built(compiled, program(LISTING, LISTED, VERSION=str(v))) for v in (100, 200))
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as running:
        (objects,) = running.ask(0)
        assert running.ask(1, 2, 3) == [0, 0, 103]
        apply(running.pid, patch)
        assert running.ask(0, 1, 2, 3, 101) == [objects + 2, 2, 0, 203, 1]
        revert(running.pid)
        assert running.ask(0, 1, 2, 3) == [objects, 0, 0, 103]


THROWING = LISTING + """
static int throws(struct dl_phdr_info *, size_t, void *data) { if (--*(long *)data < 0) throw 5; return 0; }
"""
THROWN = "try { dl_iterate_phdr(throws, &n); } catch (int k) { return edited(k); } return 0;"


def test_a_callback_that_throws_passes_the_list_of_objects(compiled: Compiler, tmp_path: Path) -> None:
    old, new = (built(compiled, program(THROWING, THROWN, VERSION=str(v))) for v in (100, 200))
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as running:
        assert running.ask(0, 1, 100) == [105, 105, 0]
        apply(running.pid, patch)
        assert running.ask(0, 1, 2, 100) == [205, 205, 205, 0]


def test_a_patcher_killed_at_any_step_leaves_exceptions_whole(compiled: Compiler, tmp_path: Path) -> None:
    old, new = (built(compiled, program(IN_FLIGHT, KEPT, VERSION=str(v))) for v in (100, 200))
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as running:
        step = 0
        while killed_at(step, lambda on_step: apply(running.pid, patch, on_step=on_step)):
            assert running.ask(0, 1)[1] in (102, 202)
            if states(running.pid):
                revert(running.pid)
            assert running.ask(0, 1) == [1, 102]
            assert slots_of(running.pid) == "plain"
            step += 1
        assert step > 3  # from the second time on the mappings are there already
        assert running.ask(0, 1) == [1, 202]
        step = 0
        while killed_at(step, lambda on_step: revert(running.pid, on_step=on_step)):
            assert running.ask(0, 1)[1] in (102, 202)
            apply(running.pid, patch)
            assert running.ask(0, 1) == [1, 202]
            assert slots_of(running.pid) == "patched"
            step += 1
        assert running.ask(0, 1) == [1, 102]
        assert slots_of(running.pid) == "plain"


def states(pid: int) -> list[State]:
    """Of patches that may be in force."""
    found = [item.record for item in inspect_process(pid).patches]
    return [record.state for record in found if record.state is State.APPLIED or record.interrupted]
