"""``fixtures/surrounded.c``, running in surroundings that a patcher may meet, for the tests named after them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from elfdiff.errors import LivegraftError
from patcher.pausing.conditions import Conditions
from patcher.process.proc import status, thread_ids
from patcher.transactions import transaction
from patcher.transactions.inspection import inspect_process
from tests.live.answering import Answering, Versions, versions

SOURCE = Path(__file__).parents[2] / "fixtures" / "surrounded.c"
CHANGED = ("left", "right", "answer")
NOBODY = 65534
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")


@cache
def surrounded(folder: Path, *flags: str, cc: str = "gcc") -> Versions:
    """The three builds of the program and their patches; skips where the compiler is not installed."""
    if shutil.which(cc) is None:
        pytest.skip(f"the compiler {cc} is not installed")
    return versions(folder / "surrounded", *flags, source=SOURCE, changed=CHANGED, cc=cc)


def require(*commands: str) -> None:
    """Skip the test where one of these is missing."""
    for command in commands:
        if shutil.which(command) is None:
            pytest.skip(f"{command} is not installed")


def enter(program: Answering, *whats: str) -> None:
    """Let the program go into surroundings; skips where the kernel does not have them."""
    for what in whats:
        said = program.ask(f"enter {what}")
        if said != "entered":
            pytest.skip(f"the kernel has no {what}: {os.strerror(int(said))}")


def there_and_back(program: Answering, built: Versions, *, timeout: float = 20.0) -> None:
    """Apply, see every thread answer by the new code, revert, see every thread answer by the old."""
    before = program.code()
    program.answers(1)
    outcome = transaction.apply(program.pid, built.to[2], Conditions(timeout=timeout))
    assert not outcome.already
    program.answers(2)
    assert program.code() != before
    assert not [line for line in program.maps if "wx" in line]
    transaction.revert(program.pid, conditions=Conditions(timeout=timeout))
    program.answers(1)
    after = program.code()
    assert {name: after[name] for name in before} == before
    program.never_mixed()
    at_liberty(program)


def at_liberty(program: Answering) -> None:
    """No thread is traced or stopped."""
    for tid in thread_ids(program.pid):
        found = status(tid)
        assert (found.tracer_pid, found.state in "tT") == (0, False)


@contextmanager
def left_alone(program: Answering) -> Iterator[None]:
    """The program must be as before afterwards: no byte, mapping or descriptor of ours; it runs and is not traced."""
    before = program.code(), program.maps, program.descriptors
    yield
    assert (program.code(), program.maps, program.descriptors) == before
    assert not inspect_process(program.pid).patches
    program.answers(1)
    at_liberty(program)


def refused(program: Answering, built: Versions, kind: type[LivegraftError], match: str) -> LivegraftError:
    """Assert that apply is refused and leaves no trace; return the refusal."""
    with left_alone(program), pytest.raises(kind, match=match) as caught:
        transaction.apply(program.pid, built.to[2], Conditions(timeout=0.5))
    assert caught.value.why
    assert caught.value.next_step
    return caught.value


@contextmanager
def public_copy(program: Path) -> Iterator[Path]:
    """A copy of a program that every user may run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        copy = folder / program.name
        shutil.copy(program, copy)
        copy.chmod(0o755)
        yield copy


def in_child(work: Callable[[], None]) -> tuple[int, str]:
    """Do ``work`` in a forked process; return its exit status as of the command line, and what it said.

    An error's text is ``what | why | next``; 0 and an empty text where there was none.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code, said = 99, ""
        try:
            os.close(reading)
            work()
            code = 0
        except LivegraftError as error:
            code, said = error.exit_code, f"{error.what} | {error.why} | {error.next_step}"
        except BaseException as error:  # noqa: BLE001  # it must never return into the parent's code
            said = repr(error)
        finally:
            os.write(writing, said.encode())
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "r") as pipe:
        said = pipe.read()
    _, wait_status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(wait_status), said
