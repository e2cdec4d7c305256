"""Between two stops: waiting until threads have returned, on programs whose threads return when the test says so."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from elfdiff.patchobject import PatchObject
from patcher import seam
from patcher.pausing import returns
from patcher.pausing.breakpoints_x86_64 import MAX_BREAKPOINTS, Breakpoint
from patcher.pausing.conditions import Conditions
from patcher.process.proc import status, thread_ids
from patcher.transactions.transaction import Outcome, apply, watch_apply
from tests.compile import Compiler
from tests.live.grafting import Running, patch_for, sources

pytestmark = pytest.mark.root

PATIENT = Conditions(timeout=1e5)
WORKER = """
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
static sem_t gates[3], inside, outside;
static int ending;
static volatile long signals;
static pthread_t worker;
static void pass(sem_t *gate) { while (sem_wait(gate)) ; }
static void count(int number) { signals++; }
SEPARATE long relay(long n);
SEPARATE long work(long n) {
    if (!n) { sem_post(&inside); pass(&gates[0]); return STEP; }
    long got = relay(n - 1);
    sem_post(&outside);
    pass(&gates[n]);
    if (ending) pthread_exit(0);
    return got * 2;
}
SEPARATE long relay(long n) { long got = work(n); return got + 1; }
static void *body(void *unused) { relay(1); sem_post(&outside); for (;;) pause(); }
SEPARATE long answer(long n) {
    if (n == 0) {
        signal(SIGUSR1, count);
        pthread_create(&worker, 0, body, 0);
        pass(&inside);
        return 0;
    }
    if (n == 1) { sem_post(&gates[0]); pass(&outside); return 1; }
    if (n == 2) { sem_post(&gates[1]); pass(&outside); return 2; }
    if (n == 3) { ending = 1; sem_post(&gates[1]); pthread_join(worker, 0); return 3; }
    if (n == 4) { pthread_kill(worker, SIGUSR1); return 4; }
    if (n == 5) return signals;
    sem_post(&gates[0]);
    return work(0);
}
"""
"""0: a thread goes in, two activations deep. 1: the inner one returns. 2: the outer one does. 3: or the thread ends."""


@pytest.fixture(scope="module")
def pair(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PatchObject]:
    compiled = Compiler(cache_folder / "compiled")
    old, new = compiled.pair(sources(WORKER, STEP="7"), sources(WORKER, STEP="8"))
    return old, patch_for(old, new, tmp_path_factory.mktemp("patch"))


@pytest.fixture
def program(pair: tuple[Path, PatchObject], monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """With a thread in the patched function. Nothing but its return ends a wait."""
    monkeypatch.setattr(returns, "_LONGEST_WAIT", 1e6)
    with Running([pair[0]]) as program:
        program.ask(0)
        yield program


@contextmanager
def while_waiting(*actions: Callable[[], object]) -> Iterator[None]:
    """Do one action at each time when somebody begins to wait for an event."""
    left = list(actions)
    watching = False

    def observer(name: str, subject: int) -> int:
        nonlocal watching
        watching |= name == "BREAKPOINT"
        watching &= name != "SEIZE"
        if watching and name == "WAIT" and left:
            left.pop(0)()
        return 0

    with seam.observe(observer):
        yield
    assert not left, "nobody waited"


def patched(outcome: Outcome, program: Running) -> None:
    assert outcome.pause is not None
    assert (outcome.pause.tries, outcome.pause.waits) == (2, returns.Waits(returns=1))
    assert program.ask(6) == [8]


def test_a_return_ends_the_wait(program: Running, pair: tuple[Path, PatchObject]) -> None:
    program.ask(1)
    with while_waiting(lambda: program.ask(2)):
        patched(apply(program.pid, pair[1], PATIENT), program)


def test_an_inner_return_to_the_same_address_does_not(program: Running, pair: tuple[Path, PatchObject]) -> None:
    with while_waiting(lambda: program.ask(1), lambda: program.ask(2)):
        patched(apply(program.pid, pair[1], PATIENT), program)


def test_the_end_of_a_thread_does(program: Running, pair: tuple[Path, PatchObject]) -> None:
    program.ask(1)
    with while_waiting(lambda: program.ask(3)):
        patched(apply(program.pid, pair[1], PATIENT), program)


def test_nobody_is_traced_meanwhile_and_signals_arrive(program: Running, pair: tuple[Path, PatchObject]) -> None:
    program.ask(1)
    seen = []

    def look() -> None:
        seen.extend(status(tid).tracer_pid for tid in thread_ids(program.pid))
        program.ask(*[4] * 100)
        while program.ask(5) == [0]:
            pass
        program.ask(2)

    with while_waiting(look):
        patched(apply(program.pid, pair[1], PATIENT), program)
    assert seen == [0, 0]


def test_without_breakpoints_it_looks_again_and_again(program: Running, pair: tuple[Path, PatchObject]) -> None:
    refused = 0

    def refuse(name: str, subject: int) -> int:
        nonlocal refused
        if name != "BREAKPOINT":
            return 0
        refused += 1
        if refused == 3:
            program.ask(1, 2)
        return errno.EACCES

    with seam.observe(refuse):
        outcome = apply(program.pid, pair[1], PATIENT)
    assert outcome.pause is not None
    assert outcome.pause.waits.returns == 0 and outcome.pause.waits.polls == refused == outcome.pause.tries - 1
    assert os.strerror(errno.EACCES) in outcome.pause.waits.why
    assert program.ask(6) == [8]


def test_a_thread_without_a_free_debug_register_cannot_be_waited_for(
    program: Running, pair: tuple[Path, PatchObject]
) -> None:
    worker = max(thread_ids(program.pid))
    with ExitStack() as taken:
        for number in range(MAX_BREAKPOINTS):
            taken.enter_context(Breakpoint(worker, 0x1000 + 8 * number))
        watched = watch_apply(program.pid, pair[1], 0.0)
        assert watched is not None and os.strerror(errno.ENOSPC) in watched.waiting
    program.ask(1, 2)
    assert apply(program.pid, pair[1]).pause is not None


def test_a_death_while_waiting_costs_the_target_nothing(program: Running, pair: tuple[Path, PatchObject]) -> None:
    program.ask(1)
    patcher = os.fork()
    if patcher == 0:
        try:
            with while_waiting(lambda: os.kill(os.getpid(), signal.SIGKILL)):
                apply(program.pid, pair[1], PATIENT)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(patcher, 0)[1]) == signal.SIGKILL
    program.ask(2, 4)
    assert program.ask(6) == [7]
    assert apply(program.pid, pair[1]).pause is not None
    assert program.ask(6) == [8]


def test_a_thread_that_began_in_the_function_is_not_waited_for() -> None:
    frame = returns.LiveFrame(1, "main", 0x10, 0, True, (0x10,), "", 0x100)
    assert returns.awaited([frame]) == ((), "main is where thread 1 began, and returns to nobody")


def test_the_outermost_activation_of_each_thread_is_waited_for() -> None:
    stack = (0x10, 0x20, 0x30)
    inner, outer = (returns.LiveFrame(1, "f", stack[d], d, True, stack, "", 0x100 * d) for d in (0, 1))
    assert returns.awaited([inner, outer])[0] == (returns.Return(1, 0x30, 0x100),)
    assert returns.awaited([outer, inner])[0] == (returns.Return(1, 0x30, 0x100),)
    doubtful = returns.LiveFrame(2, "f", 0x10, None, False, (), "")
    assert returns.awaited([inner, doubtful]) == ((), "the stack of thread 2 cannot be unwound")
