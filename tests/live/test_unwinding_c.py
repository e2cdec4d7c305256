"""C programs whose stacks are unwound by others: backtrace(3), and pthread_cancel(3) in a patched function."""

from __future__ import annotations

from pathlib import Path

import pytest

from elfdiff.errors import Busy
from patcher.pausing.conditions import Conditions
from patcher.process.proc import mappings
from patcher.transactions.transaction import apply, revert
from tests.compile import Compiler
from tests.live.grafting import Running, patch_for, sources

pytestmark = pytest.mark.root

# Whatever is cancelled was in `waits`, which has no handlers; `holds` is told of it by its own, and `outer`, which
# does not change, by one more. `spins` is cancelled between any two instructions.
TEXT = """
#include <pthread.h>
#include <execinfo.h>
static long cleaned;
static volatile long arrived;
static volatile double heat;
static int ends[2];
static pthread_t last;
static void cleaner(void *by) { cleaned += (long)by; }
SEPARATE long waits(long n) { char c; arrived = VERSION; read(ends[0], &c, 1); return n + c; }
SEPARATE long spins(long n) {
    int old;
    pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &old);
    for (;; heat = heat * 0.5 + VERSION) arrived = VERSION;
}
SEPARATE long holds(long n) {
    long r;
    pthread_cleanup_push(cleaner, (void *)VERSION);
    r = n ? spins(n) : waits(n);
    pthread_cleanup_pop(0);
    return r + VERSION;
}
SEPARATE long outer(long n) {
    long r;
    pthread_cleanup_push(cleaner, (void *)7);
    r = n == 2 ? waits(n) : holds(n);
    pthread_cleanup_pop(0);
    return r;
}
static void *thread(void *n) { return (void *)outer((long)n); }
SEPARATE long starts(long n) {
    if (!ends[1]) pipe(ends);
    arrived = 0;
    pthread_create(&last, 0, thread, (void *)n);
    while (!arrived) usleep(1000);
    return arrived;
}
SEPARATE long cancels(void) {
    void *result; long before = cleaned;
    pthread_cancel(last); pthread_join(last, &result);
    return (result == PTHREAD_CANCELED) * 10000 + cleaned - before;
}
SEPARATE long looks(void) { void *frames[60]; return VERSION + backtrace(frames, 60); }
SEPARATE long deep(long n) { return n ? deep(n - 1) + 1 : looks(); }
long answer(long n) { return n < 3 ? starts(n) : n == 3 ? cancels() : deep(4); }
"""
CANCELS, TRACES = 3, 4
BUILDS = {
    "gcc": ("gcc", ()),
    "gcc with handlers in tables": ("gcc", ("-fexceptions",)),
    "gcc -O0 with handlers in tables": ("gcc", ("-O0", "-fexceptions")),
    "clang": ("clang", ()),
    "clang with handlers in tables": ("clang", ("-fexceptions",)),
}


@pytest.fixture(scope="session")
def compiled(cache_folder: Path) -> Compiler:
    return Compiler(cache_folder / "compiled")


def builds(name: str, compiled: Compiler) -> list[Path]:
    cc, flags = BUILDS[name]
    return [compiled(sources(TEXT, VERSION=str(n)), "-pthread", *flags, cc=cc) for n in (100, 200)]


def has_unwinder(pid: int) -> bool:
    return any("libgcc_s" in item.path for item in mappings(pid))


def cancelled(running: Running) -> list[int]:
    """What is cleaned when a thread is cancelled in each way; the versions of what it was in, between."""
    return running.ask(0, CANCELS, 1, CANCELS, 2, CANCELS)


EXPECTED = {version: [version, 10007 + version, version, 10007 + version, version, 10007] for version in (100, 200)}


@pytest.mark.parametrize("warm", [False, True], ids=["first", "again"])
@pytest.mark.parametrize("name", BUILDS)
def test_a_thread_is_cancelled_in_a_patched_function(name: str, warm: bool, compiled: Compiler, tmp_path: Path) -> None:
    """``first``: the C library loads its unwinder for it when the patch is in force."""
    old, new = builds(name, compiled)
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as running:
        assert has_unwinder(running.pid) == ("-fexceptions" in BUILDS[name][1])
        if warm:
            assert cancelled(running) == EXPECTED[100]
        for _ in range(2):
            apply(running.pid, patch)
            assert cancelled(running) == EXPECTED[200]
            revert(running.pid)
            assert cancelled(running) == EXPECTED[100]


@pytest.mark.parametrize("name", BUILDS)
def test_a_thread_that_waits_in_a_function_keeps_its_version_and_is_cancelled_there(
    name: str, compiled: Compiler, tmp_path: Path
) -> None:
    old, new = builds(name, compiled)
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as running:
        assert running.ask(0) == [100]
        with pytest.raises(Busy):
            apply(running.pid, patch, Conditions(timeout=0.1))
        assert running.ask(CANCELS) == [10107]
        apply(running.pid, patch)
        assert running.ask(0) == [200]
        with pytest.raises(Busy):
            revert(running.pid, conditions=Conditions(timeout=0.1))
        assert running.ask(CANCELS) == [10207]
        revert(running.pid)
        assert cancelled(running) == EXPECTED[100]


@pytest.mark.parametrize("name", BUILDS)
def test_backtraces_lead_through_a_patched_function(name: str, compiled: Compiler, tmp_path: Path) -> None:
    old, new = builds(name, compiled)
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as running:
        before = running.ask(TRACES)
        apply(running.pid, patch)
        assert running.ask(TRACES) == [before[0] + 100]
        revert(running.pid)
        assert running.ask(TRACES) == before


def test_an_unwinder_that_came_later_is_led_to_the_patch_by_another_apply(compiled: Compiler, tmp_path: Path) -> None:
    """Until then it sees nothing behind the patched function."""
    old, new = builds("gcc", compiled)
    patch = patch_for(old, new, tmp_path)
    with Running([new]) as renewed:
        after = renewed.ask(TRACES)
    with Running([old]) as running:
        apply(running.pid, patch)
        assert running.ask(TRACES) < after
        assert not apply(running.pid, patch).already
        assert running.ask(TRACES) == after
        assert apply(running.pid, patch).already
        revert(running.pid)
        assert running.ask(TRACES) == [after[0] - 100]


STEPS = """
#include <execinfo.h>
#include <link.h>
#include <signal.h>
static void *outermost;
static long steps, wrong, told;
static void step(int signal) {
    void *frames[60];
    int n = backtrace(frames, 60);
    steps++;
    wrong += n < 4 || frames[n - 1] != outermost;
}
static int one(struct dl_phdr_info *info, size_t size, void *data) { told += VERSION; return told > 3 * VERSION; }
SEPARATE long lists(void) {
    void *frames[60];
    outermost = frames[backtrace(frames, 60) - 1];
    signal(SIGTRAP, step);
    steps = wrong = told = 0;
    __asm__ volatile("pushf; orl $0x100, (%%rsp); popf" ::: "memory", "cc");
    dl_iterate_phdr(one, NULL);
    __asm__ volatile("pushf; andl $~0x100, (%%rsp); popf" ::: "memory", "cc");
    return told;
}
long answer(long n) { return n == 0 ? lists() : n == 1 ? steps : wrong; }
"""


def test_each_instruction_of_the_stand_ins_has_a_caller(compiled: Compiler, tmp_path: Path) -> None:
    """The stack is looked at between any two instructions while the loaded objects are listed."""
    old, new = (
        compiled(sources(STEPS, VERSION=str(n)), "-O1", "-mno-red-zone", "-fno-omit-frame-pointer") for n in (1, 2)
    )
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as running:
        _, told, before, wrong = running.ask(0, 0, 1, 2)  # the first time slots are bound
        assert (told, wrong) == (4, 0)
        apply(running.pid, patch)
        told, after, wrong = running.ask(0, 1, 2)
        assert (told, wrong) == (8, 0)
        assert after > before
