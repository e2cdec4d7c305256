"""Stop all threads of a process, look at them, and let them go as if nothing had happened.

    with seize(pid) as process:       # stops nobody
        process.stop()                # the pause begins
        ... process.threads ...
        process.resume_and_detach()   # the pause ends; leaving the context does it, too

All threads are interrupted before any is waited for, so the pause does not grow by one round trip a thread.
A thread that appears meanwhile is found by reading ``/proc/PID/task`` again until nothing is new: when every
known thread is stopped and no unknown one exists, nobody is left to create one.

A signal that the program ignores, as most do SIGCHLD, is not ignored by the kernel while the thread that it is
addressed to is traced (sig_ignored, kernel/signal.c). It then wakes some thread of the process (complete_signal), and
one that does not stop, not yet or not any more, finds nothing to do and goes back to its program with EINTR. So the
``addressees`` are seized last, after all others have been interrupted, and are let go first.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack, nullcontext
from types import TracebackType
from typing import Protocol

from elfdiff.errors import BadInput, LivegraftError

from ..interruption import deferred, heed
from ..process import obstacles
from ..process.proc import addressees, executed_another_program, thread_count, thread_ids
from ..process.surroundings import seccomp_modes, waiting_place
from . import batch, ptrace, tracees
from .batch import Step
from .quiet import Undisturbed
from .registers_x86_64 import PLAIN_EINTR_RESULT, RAX, RESTART_RESULT, Registers
from .stopped import StoppedThread, StoppedThreads
from .tracees import GONE, Stop, StopKind

DEFAULT_TIMEOUT = 1.0
"""Seconds that a stop may take before it is given up. A loaded machine needs tens of milliseconds."""

_RELEASE_TIMEOUT = 1.0
_ADDRESSEES_TIMEOUT = 1.0  # for one that only waits for a processor: such a process hardly runs anyway
_REGISTERS_SIZE = ctypes.sizeof(Registers)

# An execve would replace everything that was computed about the process, so it has to be noticed.
_OPTIONS = ptrace.Option.TRACEEXEC
# Only for threads found while stopping: their own new threads are then born stopped, so that not even a chain
# of threads that each start the next one can run away. Not for the others: between seizing and stopping a new
# thread would stand still, and nobody would look.
_LATE_OPTIONS = _OPTIONS | ptrace.Option.TRACECLONE


class WholePause(Protocol):
    """A pause that is made without us (``quickpause``)."""

    @property
    def began_ns(self) -> int:
        """When it began, in ns of CLOCK_MONOTONIC."""

    @property
    def ended_ns(self) -> int:
        """When it had let go of the last thread."""

    @property
    def left(self) -> Sequence[int]:
        """The threads that it could not let go."""

    def make(self, tids: Sequence[int], last: Sequence[int]) -> Step | None:
        """Make it, for these threads that are seized, and those to be seized ``last``.

        Returns where it was left, None if it was not begun.
        """


def seize(pid: int) -> SeizedProcess:
    """Become the tracer of the threads of a process, without stopping any; of some only when it is stopped.

    Meant for immediate use: a signal that reaches a seized thread holds it until ``stop`` looks.
    Signals to this process are ``deferred`` until the threads are let go; one that was noted before is heeded now.
    Raises Interrupted, BadInput (no such process, a kernel thread, a zombie, ourselves), NotPermitted (traced already,
    no rights).
    """
    heed()
    tracees.release_abandoned()
    tracees.require_traceable(pid)
    process = SeizedProcess(pid)
    process._filtered = any(seccomp_modes(pid).values())
    # Stopped by Ctrl-Z between seizing and stopping, we would hold every thread that receives a signal.
    process._deferral.enter_context(deferred())
    try:
        if thread_count(pid) > 1:
            process._last = addressees(pid)
        process._seize_new(_OPTIONS)
    except BaseException:
        process.resume_and_detach()
        raise
    return process


class SeizedProcess:
    """A process under this tracer; a context manager that lets go of it on every way out.

    ``realtime`` says whether the last pause ran under SCHED_FIFO, ``began_ns`` when it began, before the first
    PTRACE_INTERRUPT, and ``pause_ns`` how long it took until after the last PTRACE_DETACH, both in ns of
    CLOCK_MONOTONIC (0: none yet).
    """

    def __init__(self, pid: int) -> None:
        """Use ``seize`` instead."""
        self.pid = pid
        self.began_ns = self.pause_ns = 0
        self.realtime = False
        self._running: set[int] = set()  # seized, not known to have stopped
        self._last: tuple[int, ...] = ()  # not seized yet
        self._first: tuple[int, ...] = ()  # to be let go before the others
        self._stops: dict[int, Stop] = {}
        self._dead: set[int] = set()
        self._threads: Sequence[StoppedThread] = ()
        self._filtered = False  # whether any of them is under seccomp(2)
        self._began = 0
        self._quiet: Undisturbed | None = None
        self._deferral = ExitStack()

    def __enter__(self) -> SeizedProcess:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Resume and detach."""
        self.resume_and_detach()

    @property
    def tids(self) -> tuple[int, ...]:
        """The threads that are seized, or will be by ``stop``, and have not exited, ascending."""
        return tuple(sorted({*self._running, *self._last, *self._stops}))

    @property
    def threads(self) -> Sequence[StoppedThread]:
        """The stopped threads, by rising id; empty unless stopped."""
        return self._threads

    def stop(self, timeout: float = DEFAULT_TIMEOUT, quick: WholePause | None = None) -> bool:
        """Stop every thread. On any error all of them are let go again before it is raised.

        With ``quick``, that pause is made where nothing is unusual: returns whether it was, and then all threads have
        been let go.

        Raises Busy (a thread did not stop within ``timeout`` seconds), LivegraftError (the process
        executed another program), BadInput (it exited).
        """
        if self._quiet is not None:
            raise AssertionError("stop() in a pause")
        buffer = (Registers * (2 * len(self.tids) + 8))()
        self._quiet = Undisturbed()
        self._quiet.__enter__()
        try:
            self.realtime = self._quiet.realtime
            with tracees.reaping(lambda: tuple(self._running)) if self._last else nullcontext():
                # Which calls a filter punishes is Python's to mind (``tracees.repair``).
                step = self._make(quick) if quick is not None and not self._filtered else None
                if quick is not None and step is Step.DONE:
                    self._end(quick)
                    return True
                self.began_ns = self._began = quick.began_ns if quick is not None and step else time.monotonic_ns()
                self._interrupt_all(step)
            self._stop_all(time.monotonic() + timeout, timeout)
            self._threads = self._read_threads(buffer)
            if not self._threads:
                raise self._exited()
        except BaseException:
            self.resume_and_detach()
            raise
        return False

    def _make(self, quick: WholePause) -> Step | None:
        # A thread that does not stop would be waited for without end where no signal comes.
        with tracees.waits_end() as end:
            return quick.make(sorted(self._running), self._last) if end else None

    def _interrupt_all(self, step: Step | None) -> None:
        """Interrupt all threads, and seize those that are seized last, unless it was done (``step``)."""
        again = step is None or step is Step.INTERRUPT
        if again:
            _interrupt(self._running)
        last, self._last, self._first = self._last, (), self._last
        for tid in last:
            alive = not again or tracees.try_seize(self.pid, tid, _OPTIONS)
            (self._running if alive else self._dead).add(tid)
        if again:
            _interrupt([tid for tid in last if tid in self._running])

    def _end(self, quick: WholePause) -> None:
        """What ``resume_and_detach`` does, for threads that have been let go."""
        self._running.clear()
        self._last = ()
        self._stops = dict.fromkeys(quick.left, tracees.INTERRUPTED)
        self.began_ns, self.pause_ns = quick.began_ns, quick.ended_ns - quick.began_ns
        self.resume_and_detach()

    def _stop_all(self, deadline: float, timeout: float) -> None:
        """Wait until all threads have stopped, those that were interrupted and those that appear meanwhile."""
        while True:
            self._collect(tracees.wait_for(self._running, deadline))
            if self._running:
                raise self._did_not_stop(timeout)
            self._require_same_program()
            complete = self._all_are_stopped() or self._seize_new(_LATE_OPTIONS)
            if complete and not self._running:
                break
            if time.monotonic() >= deadline:
                raise self._did_not_stop(timeout)
            _interrupt(self._running)
        for tid in self._dead & set(thread_ids(self.pid)) if self._dead else ():
            tracees.require_gone(tid, "waitpid(2), or a ptrace request, does not know it")
        if not self._stops:
            raise self._exited()

    def _exited(self) -> BadInput:
        return BadInput(
            f"process {self.pid} cannot be patched",
            why="it exited while it was being stopped",
            next_step="give the pid of a running process",
        )

    def _all_are_stopped(self) -> bool:
        """Whether there are no threads but those that have stopped.

        Each thread counts as a link of the folder (proc_task_getattr, fs/proc/base.c); those that have exited
        and were not reaped, too, so that the true answer may be missed but a wrong one is not given.
        """
        try:
            return os.stat(f"/proc/{self.pid}/task").st_nlink - 2 == len(self._stops)  # noqa: PTH116
        except OSError:
            return False  # the list of threads will say why

    def _collect(self, stops: dict[int, Stop]) -> None:
        for tid, stop in stops.items():
            self._running.discard(tid)
            if stop.kind is StopKind.GONE:
                self._dead.add(tid)
                continue
            self._stops[tid] = stop
            if stop.event == tracees.EVENT_CLONE:
                self._release_foreign(ptrace.event_message(tid))

    def _release_foreign(self, tid: int) -> None:
        # clone(2) with a signal other than SIGCHLD makes a process, not a thread, and PTRACE_O_TRACECLONE
        # attaches it nevertheless. It is not ours to stop.
        if tid in thread_ids(self.pid):
            return
        stops = tracees.wait_for([tid], time.monotonic() + _RELEASE_TIMEOUT)
        if tid not in stops:
            tracees.abandon(tid)
        elif stops[tid] is not GONE:
            tracees.detach(tid, stops[tid])

    def _require_same_program(self) -> None:
        if any(stop.event == tracees.EVENT_EXEC for stop in self._stops.values()):
            raise executed_another_program(self.pid)

    def _did_not_stop(self, timeout: float) -> LivegraftError:
        details = tuple(waiting_place(self.pid, tid) for tid in sorted(self._running))
        obstacle = obstacles.does_not_stop(self.pid, len(self._running), timeout, details)
        assert obstacle is not None
        return obstacle.as_error()

    def _seize_new(self, options: ptrace.Option) -> bool:
        """Seize the threads that appeared; repeat until a look at the task list shows nothing new.

        Returns whether that list had all threads in it: one that exits while the list is made may take the place of
        another in it (next_tid and first_tid, fs/proc/base.c), so its length has to be their number.
        """
        while True:
            listed = thread_ids(self.pid)
            complete = len(listed) == thread_count(self.pid)
            known = {*self._running, *self._last, *self._stops, *self._dead}
            unknown = [tid for tid in listed if tid not in known]
            if not unknown:
                break
            several = len(unknown) + len(self._running) + len(self._stops) > 1
            with tracees.reaping(lambda: (*self._running, *self._stops)) if several else nullcontext():
                for tid in unknown:
                    alive = tracees.try_seize(self.pid, tid, options)
                    (self._running if alive else self._dead).add(tid)
        return complete

    def _read_threads(self, buffer: ctypes.Array[Registers]) -> StoppedThreads:
        tids = sorted(self._stops)
        if len(tids) > len(buffer):
            buffer = (Registers * len(tids))()
        library = batch.active()
        if library is not None and not library.registers(tids, ctypes.addressof(buffer)):
            found = StoppedThreads(tids, buffer, self._stops)
            if self._repair_all(found):
                return found
        return self._read_each(tids, buffer)

    def _repair_all(self, found: StoppedThreads) -> bool:
        """``repair`` every thread; false if one has been killed meanwhile."""
        disturbed = found.words[:, RAX] == PLAIN_EINTR_RESULT
        if self._filtered:
            disturbed |= found.words[:, RAX] == RESTART_RESULT
        for index in disturbed.nonzero()[0].tolist() if disturbed.any() else ():
            try:
                tid = found.tids[index]
                tracees.repair(tid, found.registers[index], self._stops[tid], self._filtered)
            except ptrace.PtraceFailed as error:
                if not error.gone:
                    raise
                return False
        return True

    def _read_each(self, tids: Sequence[int], buffer: ctypes.Array[Registers]) -> StoppedThreads:
        found: list[int] = []
        for tid in tids:
            registers = buffer[len(found)]
            try:
                ptrace.read_registers_into(tid, registers)
                tracees.repair(tid, registers, self._stops[tid], self._filtered)
            except ptrace.PtraceFailed as error:
                if not error.gone:
                    raise
                tracees.require_gone(tid, error.why)
                continue  # killed in its stop; detaching it notices that, too
            found.append(tid)
        return StoppedThreads(found, buffer, self._stops)

    def resume_and_detach(self) -> None:
        """Let every thread go with its signals, and stop tracing. Does nothing the second time.

        Raises LivegraftError for an unexpected answer of the kernel, after all threads have been tried.
        """
        put_right = bool(self._threads)
        self._threads = self._last = ()
        failures: list[LivegraftError] = []
        try:
            if not put_right:
                self._await_addressees()
                self._put_right(failures)
            # Those that are stopped do not wait for the ones that still run.
            self._detach_stopped(failures)
            if self._running:
                self._stop_running(failures)
                self._detach_stopped(failures)
            if self._began:
                self.pause_ns = time.monotonic_ns() - self._began
        finally:
            self._began = 0
            quiet, self._quiet = self._quiet, None
            if quiet is not None:
                quiet.__exit__(None, None, None)
            self._deferral.close()
        if failures:
            raise failures[0]

    def _detach_stopped(self, failures: list[LivegraftError]) -> None:
        stops = {tid: self._stops[tid] for tid in self._first if tid in self._stops} | self._stops
        failures += tracees.detach_all(stops)
        self._stops.clear()

    def _stop_running(self, failures: list[LivegraftError]) -> None:
        # Only a stopped thread can be detached.
        try:
            _interrupt(self._running)
        except ptrace.PtraceFailed as error:
            failures.append(error)
        stops = tracees.wait_for(self._running, time.monotonic() + _RELEASE_TIMEOUT)
        for tid in self._running:
            if tid not in stops:
                tracees.abandon(tid)
            elif stops[tid].kind is not StopKind.GONE:
                self._stops[tid] = stops[tid]
        self._running.clear()
        self._put_right(failures)

    def _await_addressees(self) -> None:
        """Wait a little for those that are let go first: while they are traced, a signal that the program ignores ends
        what others wait in (head of this file)."""
        late = [tid for tid in self._first if tid in self._running and tracees.is_about_to_stop(tid)]
        if late:
            self._collect(tracees.wait_for(late, time.monotonic() + _ADDRESSEES_TIMEOUT))

    def _put_right(self, failures: list[LivegraftError]) -> None:
        """Repair the stopped threads, of which not all have been read: what they wait in must not end with EINTR."""
        if not self._stops:
            return
        try:
            self._read_threads((Registers * len(self._stops))())
        except LivegraftError as error:  # they must be let go all the same
            failures.append(error)


def _interrupt(tids: Collection[int]) -> None:
    library = batch.active()
    if library is not None:
        for tid, number in library.interrupt(list(tids)):
            error = ptrace.PtraceFailed(ptrace.Request.INTERRUPT, tid, number)
            if not error.gone:
                raise error
        return
    for tid in tids:
        try:
            ptrace.interrupt(tid)
        except ptrace.PtraceFailed as error:
            if not error.gone:
                raise  # a thread that is gone is reported by waitpid
