"""Stopping real processes: nobody in them may notice, and nobody may be left standing."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from elfdiff.errors import BadInput, Busy, LivegraftError, NotPermitted
from fixtures.hearing import next_line
from fixtures.tracees import (
    Torture,
    children_of,
    compile_program,
    flood_of_signals,
    handled_signals,
    run_torture,
    running,
    state_of,
    wait_until,
)
from patcher import seam
from patcher.process.proc import mappings, status, thread_ids
from patcher.threads import ptrace, tracees
from patcher.threads.stopping import seize

pytestmark = pytest.mark.root

Build = Callable[..., Path]

# A call of each kind that the kernel ends with EINTR because of a stop by a tracer alone.
NEVER_RESTARTED = {
    "epoll_wait", "epoll_pwait2", "select read-only", "pselect read-only", "ppoll read-only", "sigtimedwait", "semop",
    "semtimedop", "recv", "recv of a datagram", "socket preadv2", "socket pwritev2", "socket splice",
    "socket sendfile", "sendmmsg", "accept", "connect", "connect by TCP", "io_getevents", "io_uring",
}  # fmt: skip


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("tracees")
    return lambda name, *flags: compile_program(name, folder, *flags)


@pytest.fixture
def torture(build: Build, tmp_path: Path) -> Iterator[Torture]:
    with run_torture(build("torture"), tmp_path) as running_torture:
        yield running_torture


def pause(pid: int) -> None:
    with seize(pid) as process:
        process.stop()


@pytest.mark.usefixtures("either")
def test_nobody_notices_being_stopped(torture: Torture) -> None:
    random.seed(1)
    for _ in range(120):
        pause(torture.pid)
        time.sleep(random.uniform(0, 0.01))
    torture.wait_for_progress()
    assert torture.complaints == []


def test_the_torture_program_notices_a_tracer_that_does_not_care(torture: Torture) -> None:
    """Without this, the test above could pass for nothing."""

    def stop_carelessly() -> bool:
        for tid in thread_ids(torture.pid):
            ptrace.seize(tid)
            ptrace.interrupt(tid)
            os.waitpid(tid, 0x40000000)
            ptrace.detach(tid)
        return {tally.name for tally in torture.complaints} >= NEVER_RESTARTED

    wait_until(stop_carelessly, "EINTR in the calls that are never restarted")
    assert all(not tally.wrong for tally in torture.complaints)


def test_all_threads_stand_still_and_show_where_they_are(torture: Torture) -> None:
    with seize(torture.pid) as process:
        assert process.threads == ()
        process.stop()
        assert {state_of(tid) for tid in thread_ids(torture.pid)} == {"t"}
        assert [thread.tid for thread in process.threads] == list(thread_ids(torture.pid))
        code = [item for item in mappings(torture.pid) if item.executable]
        for thread in process.threads:
            assert any(thread.registers.rip in item for item in code)
        rounds = torture.tallies[0].rounds
        assert torture.tallies[0].rounds == rounds
        assert process.pause_ns == 0
        process.resume_and_detach()
        assert process.threads == ()
        assert process.pause_ns > 0
        assert "t" not in {state_of(tid) for tid in thread_ids(torture.pid)}
    torture.wait_for_progress()


def test_an_error_in_the_pause_lets_everybody_go(torture: Torture) -> None:
    with pytest.raises(ZeroDivisionError), seize(torture.pid) as process:
        process.stop()
        1 / 0  # noqa: B018
    assert status(torture.pid).tracer_pid == 0
    torture.wait_for_progress()
    assert torture.complaints == []


def test_nobody_notices_a_stop_that_was_given_up(torture: Torture) -> None:
    """The threads that had stopped and had not been looked at are put right before they are let go, too."""
    for _ in range(5):
        failed: list[int] = []

        def once(name: str, subject: int, failed: list[int] = failed) -> int:
            if name != "GETREGS" or failed:
                return 0
            failed.append(subject)
            return errno.EPERM

        with seize(torture.pid) as process, seam.observe(once), pytest.raises(ptrace.PtraceFailed):
            process.stop()
        assert failed
    torture.wait_for_progress()
    assert torture.complaints == []


def test_a_process_that_was_only_seized_is_let_go(torture: Torture) -> None:
    with seize(torture.pid) as process:
        assert process.tids == thread_ids(torture.pid)
    assert {status(tid).tracer_pid for tid in thread_ids(torture.pid)} == {0}
    torture.wait_for_progress()
    assert torture.complaints == []


@pytest.mark.parametrize("call", ["sigsuspend", "ppoll", "epoll_pwait", "epoll_wait", "nanosleep"])
@pytest.mark.parametrize("moment", ["seized", "stopped"])
def test_a_signal_in_the_pause_still_interrupts_the_call(build: Build, call: str, moment: str) -> None:
    """The program waits for this very EINTR: a call that was restarted by hand would now wait for ever."""
    with running([build("wakeup"), call]) as target:
        wait_until(lambda: state_of(target.pid) == "S", "the target to wait")
        with seize(target.pid) as process:
            if moment == "seized":
                os.kill(target.pid, signal.SIGUSR1)
                wait_until(lambda: state_of(target.pid) == "t", "the signal to arrive")
            process.stop()
            if moment == "stopped":
                os.kill(target.pid, signal.SIGUSR1)
        output, _ = target.communicate(timeout=10)
    assert output == f"handled=1 errno={errno.EINTR}\n"


@pytest.mark.usefixtures("either")
def test_an_ignored_signal_in_the_pause_interrupts_nothing(build: Build) -> None:
    """Only a tracer makes such a signal wake the thread at all."""
    with running([build("wakeup"), "epoll_wait"]) as target:
        wait_until(lambda: state_of(target.pid) == "S", "the target to wait")
        with seize(target.pid) as process:
            os.kill(target.pid, signal.SIGWINCH)
            wait_until(lambda: state_of(target.pid) == "t", "the signal to arrive")
            process.stop()
            assert process.threads[0].signal == signal.SIGWINCH
        os.kill(target.pid, signal.SIGUSR1)
        output, _ = target.communicate(timeout=10)
    assert output == f"handled=1 errno={errno.EINTR}\n"


@pytest.mark.parametrize("source", ["a child", "kill(2)"])
def test_an_ignored_signal_at_any_request_interrupts_nothing(build: Build, source: str) -> None:
    """The kernel does not ignore it while the thread that it is addressed to is traced, and wakes another for it."""
    with running([build("children"), "60"]) as target:
        children = [pid for tid in thread_ids(target.pid) for pid in children_of(target.pid, tid)]
        operations: list[str] = []

        def all_rest() -> bool:
            return {state_of(tid) for tid in thread_ids(target.pid)} <= {"S", "t"}

        def disturb(name: str, subject: int) -> int:
            if name == "WAIT":
                return 0  # which comes many times over
            operations.append(name)
            wait_until(all_rest, "the threads to stop, or to wait")
            if source == "kill(2)":
                os.kill(target.pid, signal.SIGCHLD)
            else:
                child = children.pop()
                os.kill(child, signal.SIGKILL)
                wait_until(lambda: state_of(child) == "Z", "its death")
            wait_until(all_rest, "the threads to stop, or to wait")
            return 0

        with seam.observe(disturb), seize(target.pid) as process:
            process.stop(timeout=30.0)
        assert {"SEIZE", "INTERRUPT", "DETACH"} <= set(operations)
        wait_until(all_rest, "the target to go on")
        target.kill()
        assert target.communicate()[0] == ""


@pytest.mark.usefixtures("either")
def test_no_queued_signal_is_lost(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "counts"
    with running([build("signals"), path]) as target, flood_of_signals(target.pid) as end_flood:
        pauses = with_signal = 0
        while pauses < 100 or with_signal < 20:
            with seize(target.pid) as process:
                process.stop()
                with_signal += any(thread.signal for thread in process.threads)
            pauses += 1
        sent = end_flood()
        wait_until(lambda: handled_signals(path) >= sent, "all signals")
        assert handled_signals(path) == sent > 0


@pytest.mark.usefixtures("either")
def test_a_stopped_process_stays_stopped_until_it_is_continued(build: Build) -> None:
    with running([build("wakeup"), "nanosleep"]) as target:
        os.kill(target.pid, signal.SIGSTOP)
        wait_until(lambda: state_of(target.pid) == "T", "the target to stop")
        for _ in range(3):
            with seize(target.pid) as process:
                process.stop()
                assert [thread.in_group_stop for thread in process.threads] == [True]
            wait_until(lambda: state_of(target.pid) == "T", "the target to be stopped again")
        os.kill(target.pid, signal.SIGCONT)
        wait_until(lambda: state_of(target.pid) == "S", "the target to go on")


@pytest.mark.usefixtures("either")
def test_a_stop_signal_in_the_pause_acts_after_it(build: Build) -> None:
    with running([build("wakeup"), "nanosleep"]) as target:
        with seize(target.pid) as process:
            process.stop()
            os.kill(target.pid, signal.SIGSTOP)
        wait_until(lambda: state_of(target.pid) == "T", "the target to stop")


@pytest.mark.usefixtures("either")
def test_threads_that_come_and_go_are_all_stopped(build: Build) -> None:
    with running([build("churn")]) as target:
        for _ in range(100):
            with seize(target.pid) as process:
                process.stop()
                stopped = {thread.tid for thread in process.threads}
                assert set(process.tids) == stopped
                states = {tid: state_of(tid) for tid in thread_ids(target.pid)}
                assert {state for tid, state in states.items() if tid in stopped} == {"t"}
                # A thread that is on its way out may still be listed; it runs no more user code.
                assert {state for tid, state in states.items() if tid not in stopped} <= {"Z", "X", ""}
        assert target.poll() is None


@pytest.mark.usefixtures("either")
def test_a_process_whose_main_thread_has_ended(build: Build) -> None:
    with running([build("states"), "headless"]) as target:
        assert state_of(target.pid) == "Z"
        with seize(target.pid) as process:
            process.stop()
            assert target.pid not in {thread.tid for thread in process.threads}
            assert len(process.threads) == 1
        assert status(thread_ids(target.pid)[1]).tracer_pid == 0


@pytest.mark.usefixtures("either")
def test_an_execve_before_the_stop_is_noticed(build: Build) -> None:
    with running([build("states"), "exec"]) as target:
        other = thread_ids(target.pid)[1]
        with seize(target.pid) as process:
            assert target.stdin is not None
            target.stdin.write("x")
            target.stdin.flush()
            # execve has killed it and waits until its tracer has taken notice.
            wait_until(lambda: state_of(other) == "Z", "execve")
            with pytest.raises(LivegraftError, match="executed another program"):
                process.stop()
        assert next_line(target) == "ready"  # the new program runs on
        assert status(target.pid).tracer_pid == 0


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("call", ["poll", "nanosleep", "clock_nanosleep", "futex"])
def test_a_filter_that_does_not_know_restart_syscall_has_nothing_to_punish(build: Build, call: str) -> None:
    """The kernel goes on with these by that call; what sshd's unprivileged child died of, beside an apply."""

    def counts() -> tuple[int, int]:
        assert target.stdin is not None
        target.stdin.write("?\n")
        target.stdin.flush()
        ended, wrong = map(int, next_line(target).split())
        return ended, wrong

    with running([build("restarted"), call]) as target:
        waited = 0
        for _ in range(100):
            with seize(target.pid) as process:
                process.stop()
                waited += sum(thread.registers.result in (-514, -516) for thread in process.threads)
        assert waited > 10, "none of the stops was in the middle of a wait"
        before, wrong = counts()
        wait_until(lambda: counts()[0] > before + 3, "further waits to end")
        assert wrong == counts()[1] == 0


@pytest.mark.usefixtures("either")
def test_a_thread_that_cannot_stop_makes_us_busy_and_delays_nobody(build: Build) -> None:
    with running([build("states"), "vfork"]) as target:
        wait_until(lambda: state_of(target.pid) == "D", "the parent to wait in vfork")
        process = seize(target.pid)
        with pytest.raises(Busy) as caught:
            process.stop(timeout=0.05)
        assert "state D" in caught.value.details[0]
        other = thread_ids(target.pid)[1]
        assert status(other).tracer_pid == 0
        assert tracees.release_abandoned() == 1
        assert target.stdin is not None
        target.stdin.write("x")
        target.stdin.flush()
        wait_until(lambda: tracees.release_abandoned() == 0, "the parent to come back")
        assert next_line(target) == "over"


@pytest.mark.usefixtures("either")
def test_a_process_killed_in_the_pause_is_no_error(build: Build) -> None:
    with running([build("wakeup"), "nanosleep"]) as target:
        with seize(target.pid) as process:
            process.stop()
            os.kill(target.pid, signal.SIGKILL)  # Popen would ask waitpid first, and take the stop for an exit
            wait_until(lambda: state_of(target.pid) in {"Z", ""}, "its death")
        wait_until(lambda: tracees.release_abandoned() == 0, "its exit status")


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("moment", ["before", "within"])
def test_how_a_child_of_ours_ended_is_left_to_whoever_started_it(build: Build, moment: str) -> None:
    """Its tracer and its parent are one process, which can take the status once."""
    with running([build("states"), "plain"]) as target:
        with seize(target.pid) as process, suppress(BadInput):  # it exited while it was being stopped
            if moment == "within":
                process.stop()
            os.kill(target.pid, signal.SIGKILL)
            wait_until(lambda: state_of(target.pid) in {"Z", ""}, "its death")
            if moment == "before":
                process.stop()
        wait_until(lambda: tracees.release_abandoned() == 0, "all threads to be let go")
        assert target.wait(30) == -signal.SIGKILL


def test_two_that_take_notice_of_the_same_deaths_are_no_error() -> None:
    """Only one of them can reap each (``reaping``)."""
    wrong: list[BaseException] = []

    def take_notice(tids: Sequence[int], begin: threading.Barrier) -> None:
        try:
            begin.wait(30)
            for tid in tids:
                assert tracees.poll(tid) is tracees.GONE
        except BaseException as error:  # noqa: BLE001  # what a thread raises is seen by nobody
            wrong.append(error)

    for _ in range(10):
        with running(["sh", "-c", "for n in 1 2 3 4 5 6 7 8; do sleep 100 & done; echo ready; wait"]) as target:
            tids = children_of(target.pid, target.pid)
            for tid in tids:
                assert tracees.try_seize(tid, tid, ptrace.Option(0))
                os.kill(tid, signal.SIGKILL)
            wait_until(lambda tids=tids: all(state_of(tid) == "Z" for tid in tids), "their deaths")
            begin = threading.Barrier(2)
            both = [threading.Thread(target=take_notice, args=(tids, begin)) for _ in range(2)]
            for thread in both:
                thread.start()
            for thread in both:
                thread.join()
            assert len(tids) == 8 and wrong == []


def test_a_process_that_is_traced_already_names_its_tracer(build: Build) -> None:
    tracer = (
        "import sys\n"
        "from patcher.threads.stopping import seize\n"
        "process = seize(int(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with (
        running([build("wakeup"), "nanosleep"]) as target,
        running([sys.executable, "-c", tracer, str(target.pid)]) as other,
    ):
        with pytest.raises(NotPermitted) as caught:
            seize(target.pid)
        assert f"process {other.pid} ({status(other.pid).name}) traces it" in caught.value.why
        assert caught.value.next_step
        assert status(target.pid).tracer_pid == other.pid


def _zombie() -> Iterator[int]:
    process = subprocess.Popen(["true"])
    wait_until(lambda: state_of(process.pid) == "Z", "its death")
    yield process.pid
    process.wait()


def test_what_cannot_be_a_target_is_refused_with_its_reason(torture: Torture) -> None:
    thread = thread_ids(torture.pid)[3]
    zombie = _zombie()
    reasons = {
        2: "kernel thread",
        os.getpid(): "this very process",
        thread: f"a thread of process {torture.pid}",
        next(zombie): "has exited",
        1 << 30: "does not exist",
    }
    for pid, reason in reasons.items():
        with pytest.raises(BadInput) as caught:
            seize(pid)
        assert reason in caught.value.why
    next(zombie, None)


def test_a_user_without_rights_is_told_what_helps(build: Build) -> None:
    script = (
        "import os, sys\n"
        "from elfdiff.errors import NotPermitted\n"
        "from patcher.threads.stopping import seize\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: seize(int(sys.argv[1]))\n"
        "except NotPermitted as error: print(error.why, '|', error.next_step)\n"
    )
    with running([build("wakeup"), "nanosleep"]) as target:
        said = subprocess.run(
            [sys.executable, "-c", script, str(target.pid)], capture_output=True, text=True, check=True
        ).stdout
    assert "belongs to user 0, this is user 65534" in said
    assert "root" in said.rpartition("|")[2]


def test_an_abandoned_thread_that_still_stops_is_let_go_before_a_command_ends(build: Build) -> None:
    """Else it would stand still for as long as a tracer lives that has given it up."""
    with running([build("wakeup"), "nanosleep"]) as target:
        for _ in range(200):
            ptrace.seize(target.pid)
            ptrace.interrupt(target.pid)
            tracees.abandon(target.pid)
            tracees.reap()
            assert status(target.pid).tracer_pid == 0


def test_a_stop_is_not_taken_by_who_reaps(build: Build) -> None:
    """What has been taken is gone, and the signal with it."""
    looks: list[int] = []

    def held() -> list[int]:
        looks.append(target.pid)
        return looks[:1]

    with running([build("states"), "plain"]) as target:
        with seize(target.pid) as process:
            os.kill(target.pid, signal.SIGTERM)
            wait_until(lambda: state_of(target.pid) == "t", "the signal to stop it")
            with tracees.reaping(held):
                wait_until(lambda: len(looks) > 2, "several looks")
            process.stop()
        assert target.wait(30) == -signal.SIGTERM


def test_an_interrupt_waits_until_nobody_is_stopped(build: Build) -> None:
    with running([build("wakeup"), "nanosleep"]) as target:
        reached = False
        with pytest.raises(KeyboardInterrupt), seize(target.pid) as process:
            process.stop()
            os.kill(os.getpid(), signal.SIGINT)
            reached = True
            assert state_of(target.pid) == "t"
            process.resume_and_detach()
        assert reached
        assert status(target.pid).tracer_pid == 0
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_the_tracer_is_real_time_in_the_pause_only(build: Build) -> None:
    with running([build("wakeup"), "nanosleep"]) as target, seize(target.pid) as process:
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
        process.stop()
        assert process.realtime == (os.sched_getscheduler(0) == os.SCHED_FIFO)
        process.resume_and_detach()
        assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_without_the_right_to_be_real_time_it_works_and_says_so(build: Build) -> None:
    script = (
        "import ctypes, resource, sys\n"
        "assert ctypes.CDLL(None).prctl(24, 23, 0, 0, 0) == 0\n"  # PR_CAPBSET_DROP, CAP_SYS_NICE
        "resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))\n"
        "import os; os.execv(sys.executable, [sys.executable, '-c', sys.argv[2], sys.argv[1]])\n"
    )
    work = (
        "import sys\n"
        "from patcher.threads.stopping import seize\n"
        "with seize(int(sys.argv[1])) as process:\n"
        "    process.stop(); print(process.realtime, len(process.threads))\n"
    )
    with running([build("wakeup"), "nanosleep"]) as target:
        command = [sys.executable, "-c", script, str(target.pid), work]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == "False 1\n"


def test_stopping_twice_is_two_pauses(torture: Torture) -> None:
    for _ in range(2):
        with seize(torture.pid) as process:
            process.stop()
            assert process.threads
            process.resume_and_detach()
            process.resume_and_detach()


def test_seizing_must_not_be_mixed_up_with_another_thread_of_ours(build: Build) -> None:
    """ptrace belongs to a thread of the tracer: what it seized ends with it, and nothing stays behind."""
    with running([build("wakeup"), "nanosleep"]) as target:
        thread = threading.Thread(target=lambda: seize(target.pid))
        thread.start()
        thread.join()
        wait_until(lambda: status(target.pid).tracer_pid == 0, "the kernel to detach")
        pause(target.pid)
        wait_until(lambda: state_of(target.pid) == "S", "the target to go on")


def test_a_thread_that_stops_late_is_put_right(torture: Torture) -> None:
    names = ("epoll_wait", "epoll_pwait", "epoll_wait forever", "recv", "sigtimedwait")
    tids = [tally.tid for tally in torture.tallies if tally.name in names]
    before = sum(tally.interrupted for tally in torture.tallies)
    for tid in tids:
        ptrace.seize(tid, ptrace.Option.NONE)
        ptrace.interrupt(tid)
        tracees.abandon(tid)
    wait_until(lambda: tracees.release_abandoned() == 0, "the last to stop")
    torture.wait_for_progress()
    assert sum(tally.interrupted for tally in torture.tallies) == before
