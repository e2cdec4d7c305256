from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from patcher.threads.quiet import Undisturbed, ticking


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """Whatever a test does, this process ends up as it was."""
    before = _own_state()
    yield
    assert _own_state() == before


def _own_state() -> tuple[object, ...]:
    mask = frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    scheduling = (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority)
    return mask, scheduling, gc.isenabled(), signal.getsignal(signal.SIGALRM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP])
def test_a_signal_acts_on_leaving(number: signal.Signals) -> None:
    seen: list[int] = []
    before = signal.signal(number, lambda which, _: seen.append(which))
    try:
        with Undisturbed():
            os.kill(os.getpid(), number)
            time.sleep(0)
            assert seen == []
        assert seen == [number]
    finally:
        signal.signal(number, before)


def test_garbage_is_not_collected_and_a_disabled_collector_stays_disabled() -> None:
    with Undisturbed():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    with Undisturbed():
        pass
    try:
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_error_undoes_it_all() -> None:
    with pytest.raises(ZeroDivisionError), Undisturbed():
        1 / 0  # noqa: B018


def test_somebody_elses_timer_goes_on() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda which, _: seen.append(which))
    signal.setitimer(signal.ITIMER_REAL, 1000, 500)
    try:
        with Undisturbed(), ticking(0.001):
            pass
        delay, interval = signal.setitimer(signal.ITIMER_REAL, 0)
        assert 900 < delay <= 1000
        assert interval == 500
        assert seen == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_timer_that_ran_out_meanwhile_acts_on_leaving() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda which, _: seen.append(which))
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    try:
        with Undisturbed():
            time.sleep(0.01)
            assert seen == []
        end = time.monotonic() + 10
        while not seen and time.monotonic() < end:
            time.sleep(0.001)
        assert seen == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_ticks_interrupt_and_end() -> None:
    with ticking(0.001) as outside:
        assert not outside
    with Undisturbed():
        with ticking(0.001) as inside:
            assert inside
            assert signal.getitimer(signal.ITIMER_REAL)[1] > 0
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_in_another_thread_there_are_no_ticks() -> None:
    answers: list[bool] = []

    def work() -> None:
        with Undisturbed(), ticking(0.001) as possible:
            answers.append(possible)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]


def test_one_inside_of_another_leaves_everything_to_it() -> None:
    with Undisturbed() as outer:
        inside = _own_state()
        with Undisturbed() as inner:
            assert inner.realtime == outer.realtime
        assert _own_state() == inside
        with ticking(0.01) as possible:
            assert possible
    with Undisturbed():
        assert not gc.isenabled()
