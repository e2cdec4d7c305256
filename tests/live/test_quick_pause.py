"""The pause that C makes: it is made where nothing is unusual, and Python goes on wherever it is left."""

from __future__ import annotations

import ctypes
import errno
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from elfdiff.errors import Busy, LivegraftError, TargetDamaged
from fixtures.intact import altered_code
from patcher.pausing import quickpause
from patcher.pausing.conditions import Conditions
from patcher.pausing.quickpause import QuickPause
from patcher.process.memory import Memory
from patcher.process.proc import thread_ids
from patcher.records.record import State
from patcher.stacks.quiescence import StackCheck
from patcher.threads import batch
from patcher.threads.batch import Step
from patcher.threads.registers_x86_64 import Registers
from patcher.threads.stopped import StoppedThreads
from patcher.threads.stopping import SeizedProcess
from patcher.transactions.inspection import inspect_process
from patcher.transactions.transaction import apply, check, revert
from tests.compile import Compiler
from tests.live.answering import SPREAD, Answering, Versions, versions
from tests.live.faults import EXTENT, assert_at_liberty, sample
from tests.live.grafting import MAIN, PRELUDE, library_pair, patch_for

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(batch.active() is None, reason=f"the pause is made in {batch.description()}"),
]

Held = Sequence[tuple[int, bytes]]
PATIENCE = 120.0
PATIENT = Conditions(timeout=PATIENCE)
NEVER = 1 << 40
ERRORS = (errno.EIO, errno.ESRCH, errno.EPERM, errno.EFAULT, errno.EINTR, errno.ENOMEM)
"""EIO and ESRCH of ptrace(2) say that a thread is gone, which has to be seen to be true before it is believed."""


@pytest.fixture(scope="module")
def built(cache_folder: Path) -> Versions:
    return versions(cache_folder / "answer", SPREAD)


@pytest.fixture
def running(built: Versions) -> Iterator[Answering]:
    with Answering(built.programs[1]) as program:
        yield program


@dataclass
class Observed:
    """Where pauses were left, and how many ``operations`` the last one had.

    The ``disturb``-ed operation of the next one, counted from 1, fails with ``error``.
    """

    steps: list[Step | None] = field(default_factory=list)
    operations: int = 0
    disturb: int = NEVER
    error: int = 0

    def make(self, made: Callable[[], Step | None]) -> Step | None:
        library().disturb(self.disturb, self.error)
        self.steps.append(made())
        self.operations = self.disturb - library().disturb(0, 0)
        self.disturb = NEVER
        return self.steps[-1]


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> Observed:
    made = QuickPause.make
    observed = Observed()
    monkeypatch.setattr(quickpause, "_PATIENCE_NS", int(PATIENCE * 1e9))  # a machine may have no CPU to spare
    monkeypatch.setattr(QuickPause, "make", lambda self, *tids: observed.make(lambda: made(self, *tids)))
    return observed


def library() -> batch.Batch:
    found = batch.active()
    assert found is not None
    return found


def test_a_pause_in_which_nothing_is_unusual_is_made_in_c(
    built: Versions, running: Answering, observed: Observed
) -> None:
    before = running.code()
    pid = running.pid
    for act, version in (
        (lambda: check(pid, built.to[2], PATIENT), 1),
        (lambda: apply(pid, built.to[2], PATIENT), 2),
        (lambda: apply(pid, built.to[3], PATIENT), 3),
        (lambda: revert(pid, conditions=PATIENT), 1),
    ):
        pause = act().pause
        running.answers(version)
        assert pause is not None
        assert pause.pause_ns > 0 < pause.began_ns
        assert pause.threads == len(thread_ids(pid))
        assert observed.steps[-1] is Step.DONE
    assert set(observed.steps) <= {Step.DONE, Step.STACKS}  # a thread may have been in a function at a first stop
    running.never_mixed()
    assert running.code().items() >= before.items()


def test_a_set_is_carried_by_c_as_well(observed: Observed, cache_folder: Path, tmp_path: Path) -> None:
    """A program and its library: two images, with gates of their own, in one list of writes."""
    compiled = Compiler(cache_folder / "compiled")
    text = "SEPARATE long first(long n) { return n * 10 + 3; }\nlong answer(long n) { return first(n) + 1000; }"
    pair = library_pair(compiled, text, text.replace("+ 3", "+ 7"))
    later = compiled({"main.c": PRELUDE + MAIN.replace("return x * 3", "return x * 5")}, str(pair.old))
    for name in ("program", "library"):
        (tmp_path / name).mkdir()
    both = patch_for(pair.program, later, tmp_path / "program"), patch_for(pair.old, pair.new, tmp_path / "library")
    with pair.running() as process:
        for act, answer in (
            (lambda: check(process.pid, both, PATIENT), 1013),
            (lambda: apply(process.pid, both, PATIENT), 1017),
            (lambda: revert(process.pid, conditions=PATIENT), 1013),
        ):
            assert len(act().members) == 2
            assert observed.steps[-1] is Step.DONE
            assert process.ask(1) == [answer]
        assert altered_code(process.pid) == []


def test_a_live_function_is_left_to_python(built: Versions, running: Answering, observed: Observed) -> None:
    running.ask("hold")
    with pytest.raises(Busy, match=r"\bheld\b.* stayed live"):
        apply(running.pid, built.to[2], Conditions(timeout=0.3))
    assert set(observed.steps) == {Step.STACKS}
    assert running.ask("release") == "released"
    running.answers(1)


@pytest.mark.parametrize("range_number", [0, -1])
def test_what_is_not_as_expected_is_left_to_python(
    built: Versions, running: Answering, observed: Observed, monkeypatch: pytest.MonkeyPatch, range_number: int
) -> None:
    made = QuickPause.__init__

    def init(self: QuickPause, memory: Memory, check: StackCheck, expected: Held, writes: Held) -> None:
        address, data = expected[range_number]
        other = list(expected)
        other[range_number] = address, data[:-1] + bytes([data[-1] ^ 1])
        made(self, memory, check, other, writes)

    monkeypatch.setattr(QuickPause, "__init__", init)
    apply(running.pid, built.to[2], PATIENT)  # which Python finds as it should be
    assert observed.steps[-1] is Step.COMPARE
    running.answers(2)


@EXTENT
@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_an_operation_fails_and_python_goes_on(
    built: Versions, running: Answering, observed: Observed, error: int, whole: bool
) -> None:
    """Whoever tries again succeeds, since it fails once: at each operation of the pause all is done in the end."""
    ended: Counter[str] = Counter()
    apply(running.pid, built.to[2], PATIENT)
    revert(running.pid, conditions=PATIENT)
    for number in sample(range(1, observed.operations + 1), 8, whole):
        for act, version in (
            (lambda: apply(running.pid, built.to[2], PATIENT), 2),
            (lambda: revert(running.pid, conditions=PATIENT), 1),
        ):
            observed.disturb, observed.error = number, error
            observed.steps.clear()
            act()
            assert_at_liberty(running.pid)
            running.answers(version)
            running.never_mixed()
            assert observed.steps[0] is not None
            ended[observed.steps[0].name] += 1
    print(f"{errno.errorcode[error]}: {dict(ended)}")
    if whole:  # but for CODE, which asks twice, and what another number of mappings has moved
        assert len(ended) >= len(Step) - 3


LAST_WRITES = (3, 4, 2, 5, 6)
"""How far in front of the detaches, one for each thread, one of the last writes is; a few operations come and go."""


def test_a_failed_write_in_a_process_that_cannot_be_held_is_damage(
    built: Versions, running: Answering, observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something has been written then, and nobody stands still for it to be taken back: the next command does."""
    for _ in range(2):
        apply(running.pid, built.to[2], PATIENT)
        operations = observed.operations
        revert(running.pid, conditions=PATIENT)
    made = SeizedProcess._read_threads

    def fail(self: SeizedProcess, buffer: ctypes.Array[Registers]) -> StoppedThreads:
        if observed.steps[-1] is Step.WRITE:
            raise LivegraftError("no registers", why="a test says so")
        return made(self, buffer)

    with monkeypatch.context() as patched:
        patched.setattr(SeizedProcess, "_read_threads", fail)
        for back in LAST_WRITES:
            observed.disturb, observed.error = operations - len(thread_ids(running.pid)) - back, errno.EIO
            try:
                apply(running.pid, built.to[2], PATIENT)
            except TargetDamaged as error:
                assert "patched in part" in error.what
                break
            revert(running.pid, conditions=PATIENT)
    assert observed.steps[-1] is Step.WRITE
    assert_at_liberty(running.pid)
    (found,) = (item for item in inspect_process(running.pid).patches if item.record.interrupted)
    assert found.record.state is State.APPLYING
    revert(running.pid, conditions=PATIENT)
    running.answers(1)
    apply(running.pid, built.to[2], PATIENT)
    running.answers(2)
    running.never_mixed()
