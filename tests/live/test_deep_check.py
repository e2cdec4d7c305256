"""Coroutines that are parked in a patched function are found, wherever their stacks are; others are not in the way."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from elfdiff.errors import Busy, LivegraftError, Refused
from elfdiff.patches.patchfile import write_patch
from elfdiff.patchobject import PatchObject
from fixtures.hearing import next_line
from fixtures.intact import altered_code
from fixtures.stacks import functions_of
from patcher import seam
from patcher.pausing.conditions import Conditions
from patcher.process.memory import Memory
from patcher.process.modules import modules
from patcher.process.proc import mappings, status
from patcher.stacks.deepcheck import DeepCheck
from patcher.stacks.deepmemory import DeepMemory, Survey
from patcher.stacks.forbidden import ForbiddenRange
from patcher.stacks.switching_x86_64 import stack_switchers
from patcher.stacks.unwind import Unwinder
from patcher.threads.stopping import seize
from patcher.transactions.transaction import apply, check, revert, watch_apply
from tests.compile import Compiler
from tests.live.grafting import patch_for

pytestmark = pytest.mark.root

SOURCE = (Path(__file__).parents[2] / "fixtures" / "coroutines.c").read_text()
OLD, NEW = "-DFACTOR=3", "-DFACTOR=5"
PLACES = ("heap", "mapped", "static", "local")
WAIT = 0.15  # seconds in which the coroutine does not go on by itself
BRIEF = Conditions(timeout=WAIT)


class Parking:
    """The program, running."""

    def __init__(self, program: Path, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.pid = self._process.pid
        assert self._line() == "ready"

    def __enter__(self) -> Parking:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._process.communicate()

    def _line(self) -> str:
        return next_line(self._process).strip()

    def tell(self, command: str) -> str:
        """Its answer to a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        return self._line()


@dataclass(frozen=True)
class Pair:
    """The old program and the patch that makes it the new one."""

    program: Path
    patch: PatchObject


@pytest.fixture(scope="module")
def compiled(cache_folder: Path) -> Compiler:
    return Compiler(cache_folder / "compiled")


@pytest.fixture(scope="module")
def pair(compiled: Compiler, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Pair:
    """A build by how it is linked and its flags."""
    link, *flags = getattr(request, "param", ("pie",))
    old, new = (compiled(SOURCE, "-pthread", factor, *flags, link=link, stripped=False) for factor in (OLD, NEW))
    return Pair(old, patch_for(old, new, tmp_path_factory.mktemp("deep")))


def kinds(*flags: tuple[str, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("pair", flags, indirect=True, ids="".join, scope="module")


def busy(program: Parking, pair: Pair, *, deep_check: bool | None = None) -> Busy:
    """The refusal of ``apply``, after which nothing has changed."""
    with pytest.raises(Busy) as caught:
        apply(program.pid, pair.patch, Conditions(timeout=WAIT, deep_check=deep_check))
    assert altered_code(program.pid) == []
    assert caught.value.exit_code == 5
    return caught.value


@pytest.mark.parametrize("where", ["first", "thread"])
@pytest.mark.parametrize("place", PLACES)
@kinds(("pie",), ("static",), ("pie", "-DJUMPING"))
def test_a_parked_coroutine_keeps_a_function_live_until_it_has_ended(pair: Pair, place: str, where: str) -> None:
    with Parking(pair.program, where) as program:
        assert program.tell("ask") == "6"  # leaves a return address below the stack pointer, which is in nobody's way
        assert check(program.pid, pair.patch, BRIEF).pause
        program.tell(f"park {place}")
        error = busy(program, pair)
        assert "work" in error.what and "a stack that no thread runs on" in error.why
        assert ("[stack]" if (place, where) == ("local", "first") else "anonymous memory") in error.details[0]
        assert program.tell("finish") == "6"
        if place in ("heap", "mapped"):  # what it has left is gone with its stack
            apply(program.pid, pair.patch)
            assert program.tell("ask") == "10"


@kinds(("pie", "-DHANDMADE"), ("pie", "-DHANDMADE", "-O0"), ("no-pie", "-DHANDMADE"))
def test_switches_that_the_program_makes_itself_are_found_where_it_is_asked_for(pair: Pair) -> None:
    with Parking(pair.program) as program:
        program.tell("park mapped")
        error = busy(program, pair, deep_check=True)
        assert "work" in error.what
        outcome = check(program.pid, pair.patch)
        assert outcome.pause is not None and outcome.pause.searched == 0, "nothing shows that it has coroutines"
        program.tell("finish")
        outcome = apply(program.pid, pair.patch, Conditions(deep_check=True))
        assert outcome.pause is not None and outcome.pause.searched > 0
        assert program.tell("ask") == "10"


def test_a_parked_coroutine_is_waited_for_in_a_function_that_does_not_change(pair: Pair) -> None:
    with Parking(pair.program) as program:
        program.tell("idle mapped")
        with pytest.raises(Busy) as caught:
            apply(program.pid, pair.patch, Conditions(timeout=WAIT, when_idle=("other",)))
        assert "other" in caught.value.what and "a stack that no thread runs on" in caught.value.why
        program.tell("finish")
        apply(program.pid, pair.patch, Conditions(when_idle=("other",)))
        program.tell("idle mapped")
        with pytest.raises(Busy) as caught:
            revert(program.pid, conditions=BRIEF)
        assert caught.value.what.startswith("other stayed live")
        revert(program.pid, conditions=Conditions(own_idle=False))
        assert program.tell("ask") == "6" and altered_code(program.pid) == []


def test_a_coroutine_in_the_new_code_keeps_it_from_being_reverted(pair: Pair) -> None:
    with Parking(pair.program) as program:
        apply(program.pid, pair.patch)
        program.tell("park mapped")
        with pytest.raises(Busy) as caught:
            revert(program.pid, conditions=BRIEF)
        assert "work" in caught.value.what and pair.patch.id[:12] in caught.value.what
        assert program.tell("finish") == "10"
        revert(program.pid)
        assert program.tell("ask") == "6" and altered_code(program.pid) == []


@pytest.mark.parametrize("place", PLACES)
def test_coroutines_elsewhere_are_in_nobodys_way(pair: Pair, place: str) -> None:
    with Parking(pair.program) as program:
        program.tell(f"idle {place}")
        outcome = apply(program.pid, pair.patch, BRIEF)
        assert outcome.pause is not None and outcome.pause.searched > 0
        assert program.tell("ask") == "10"
        assert program.tell("finish") == "10"


@kinds(("pie",), ("no-pie",))
def test_a_coroutine_that_was_interrupted_in_a_patched_function(pair: Pair) -> None:
    """Its signal handler has switched away: where it goes on is in the signal frame, and no call is there."""
    with Parking(pair.program) as program:
        program.tell("trap mapped")
        error = busy(program, pair)
        assert "trapped" in error.what and "signal frame" in error.details[0]
        assert program.tell("finish") == "12"
        apply(program.pid, pair.patch)


@pytest.mark.parametrize("place", PLACES)
@kinds(("pie",), ("static",), ("pie", "-DJUMPING"), ("pie", "-DJUMPING", "-O0"))
def test_what_a_coroutine_has_left_below_itself_is_in_nobodys_way(pair: Pair, place: str) -> None:
    with Parking(pair.program) as program:
        program.tell(f"serve {place}")
        busy(program, pair)
        program.tell("step")
        words = return_addresses(pair, program)
        assert words, "nothing is left over, so that this shows nothing"
        apply(program.pid, pair.patch, BRIEF)
        program.tell("step")
        with pytest.raises(Busy, match="work"):
            revert(program.pid, conditions=BRIEF)
        program.tell("step")
        revert(program.pid, conditions=BRIEF)


@kinds(("pie", "-DHANDMADE"))
def test_where_somebody_else_switches_nothing_is_known_to_be_left_over(pair: Pair) -> None:
    with Parking(pair.program) as program:
        program.tell("serve mapped")
        program.tell("step")
        busy(program, pair, deep_check=True)


def return_addresses(pair: Pair, program: Parking) -> list[int]:
    """Where in memory the address is to which ``park`` returns in ``work``."""
    with Memory(program.pid) as memory, DeepMemory(program.pid) as deep:
        (work,) = (item for item in functions_of(pair.program, program.pid) if item.name == "work")
        return [
            address
            for chunk in deep.chunks(deep.survey())
            for address in chunk.addresses(
                np.flatnonzero((chunk.words > np.uint64(work.start)) & (chunk.words < np.uint64(work.end)))
            ).tolist()
            if memory.read(address, 8)
        ]


@kinds(("pie", "-DJUMPING"))
def test_what_glibc_hides_in_a_jump_buffer(pair: Pair) -> None:
    with Parking(pair.program) as program, Memory(program.pid) as memory:
        program.tell("idle mapped")
        (leave,) = (item for item in functions_of(pair.program, program.pid) if item.name == "leave")
        forbidden = ForbiddenRange("leave", leave.start, leave.end)
        with DeepCheck(memory, [forbidden], 1 << 30) as deep, seize(program.pid) as process:
            process.stop()
            found, _ = deep.check(process.threads, (), Unwinder((), memory.read))
        assert {"a jump buffer of setjmp", "an address in it"} <= {item.kind for item in found}


@pytest.mark.parametrize("deep_check", [None, False], ids=["searched", "not-searched"])
def test_two_builds_never_meet_in_a_storm_of_coroutines(pair: Pair, deep_check: bool | None) -> None:
    """``pass`` is parked between what it calls before and after. Without the search they meet, or it shows nothing."""
    with Parking(pair.program) as program:
        program.tell("storm")
        for _ in range(3 if deep_check is None else 20):
            apply(program.pid, pair.patch, Conditions(timeout=60, deep_check=deep_check))
            revert(program.pid, conditions=Conditions(timeout=60, deep_check=deep_check))
            if int(program.tell("mixed")):
                break
        assert int(program.tell("passes")) > 0
        assert (int(program.tell("mixed")) == 0) is (deep_check is None)


def test_no_deep_check_does_not_look(pair: Pair) -> None:
    with Parking(pair.program) as program:
        program.tell("park mapped")
        outcome = apply(program.pid, pair.patch, Conditions(deep_check=False))
        assert outcome.pause is not None and outcome.pause.searched == 0
        assert program.tell("finish") == "6", "it has ended in the old code"
        assert program.tell("ask") == "10"


@kinds(("pie", "-DHANDMADE"))
def test_words_that_are_left_over_block_until_they_are_gone(pair: Pair) -> None:
    """A stack that is kept when its coroutine has ended looks like one that is parked, where nothing says more."""
    with Parking(pair.program) as program:
        program.tell("park static")
        program.tell("finish")
        busy(program, pair, deep_check=True)
        program.tell("wipe")
        apply(program.pid, pair.patch, Conditions(deep_check=True))


def test_it_waits_without_stopping_anybody(pair: Pair) -> None:
    with Parking(pair.program) as program:
        program.tell("park mapped")
        with pytest.raises(Busy, match="work") as caught:
            apply(program.pid, pair.patch, Conditions(timeout=1.0))
        stops = int(caught.value.why.split("looked ")[1].split()[0])
        assert stops <= 3, "the word was there all the time"


def test_too_much_memory_is_refused_before_anything_is_stopped(pair: Pair) -> None:
    with Parking(pair.program) as program:
        with pytest.raises(Refused, match="too much memory") as caught:
            apply(program.pid, pair.patch, Conditions(deep_limit=4096))
        assert "--deep-limit" in caught.value.next_step and "MiB" in caught.value.why
        assert altered_code(program.pid) == []
        apply(program.pid, pair.patch, Conditions(deep_limit=1 << 30))


@pytest.mark.parametrize(
    ("flags", "link", "found"),
    [
        ((), "pie", "makecontext"),
        ((), "static", "linked in"),
        ((), "static-pie", "linked in"),
        (("-DHANDMADE",), "pie", ""),
        (("-DHANDMADE",), "static", ""),
    ],
)
def test_who_may_switch_stacks(compiled: Compiler, flags: tuple[str, ...], link: str, found: str) -> None:
    with Parking(compiled(SOURCE, "-pthread", OLD, *flags, link=link)) as program, Memory(program.pid) as memory:
        switchers = stack_switchers(modules(mappings(program.pid), memory), memory)
        assert [found in str(item) for item in switchers] == [True] * bool(found), "the C library is none"


def test_the_command_line(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "deep.patch"
    write_patch(pair.patch, file)
    command = [sys.executable, "-m", "patcher.cli", "apply", str(file), "--json", "--timeout", str(WAIT)]
    with Parking(pair.program) as program:
        program.tell("park mapped")
        command += ["--pid", str(program.pid)]
        assert subprocess.run(command, check=False, capture_output=True).returncode == 5
        assert subprocess.run([*command, "--deep-limit", "0"], check=False, capture_output=True).returncode == 4
        program.tell("finish")
        done = subprocess.run(command, check=True, capture_output=True)
        assert json.loads(done.stdout)["searched_bytes"] > 0


@pytest.mark.parametrize("name", ["PAGES", "READV"])
def test_whatever_it_cannot_read_nothing_is_written(pair: Pair, name: str) -> None:
    """Every tenth of the operations fails in turn, on the way to a stop and in it."""
    with Parking(pair.program) as program:
        failed = 0
        for number in itertools.count(0, 10):
            left = [number]

            def fail(operation: str, _: int, left: list[int] = left) -> int:
                left[0] -= operation == name
                return errno.EIO if operation == name and left[0] < 0 else 0

            with seam.observe(fail):
                try:
                    check(program.pid, pair.patch, Conditions(timeout=5.0))
                    break
                except LivegraftError as error:
                    assert "Input/output error" in f"{error} {error.why}"
                    failed += 1
            assert status(program.pid).tracer_pid == 0
            assert program.tell("ask") == "6" and altered_code(program.pid) == []
        assert failed


def test_blocking_shows_coroutines(pair: Pair) -> None:
    with Parking(pair.program) as program:
        program.tell("park mapped")
        watched = watch_apply(program.pid, pair.patch, 0.0)
        assert watched is not None
        (found,) = {(item.tid, item.thread, item.function, item.certain) for item in watched.now}
        assert found == (0, "", "work", False)
        program.tell("finish")
        watched = watch_apply(program.pid, pair.patch, 0.0)
        assert watched is not None and not watched.now and watched.quiescent == 1


# --- memory ---


@pytest.fixture
def parked(pair: Pair) -> Iterator[Parking]:
    with Parking(pair.program) as program:
        yield program


def _pages(survey: Survey) -> set[int]:
    return {page for start, end in survey.runs.tolist() for page in range(start, end, 4096)}


def test_pages_are_the_same_without_the_newer_call(parked: Parking) -> None:
    """But for pages of zeros, which the file does not tell from others."""
    with DeepMemory(parked.pid) as newer, DeepMemory(parked.pid, may_scan=False) as older, Memory(parked.pid) as memory:
        found, listed, later = _pages(newer.survey()), _pages(older.survey()), _pages(newer.survey())
        assert found and found <= listed
        assert not any(any(memory.read(page, 4096)) for page in listed - later), "which may have come meanwhile"


def test_what_is_read_is_what_is_there(parked: Parking) -> None:
    with DeepMemory(parked.pid) as deep, Memory(parked.pid) as memory:
        survey = deep.survey()
        count = 0
        for chunk in deep.chunks(survey):
            at = np.arange(0, len(chunk.words), 511, dtype=np.intp)
            held = memory.read_many([(address, 8) for address in chunk.addresses(at).tolist()])
            assert [int.from_bytes(data, "little") for data in held] == chunk.words[at].tolist()
            count += chunk.words.nbytes
        assert count == survey.size


def test_looking_makes_no_page(parked: Parking) -> None:
    def resident() -> int:
        return int(Path(f"/proc/{parked.pid}/statm").read_text().split()[1])

    before = resident()
    with DeepMemory(parked.pid) as deep:
        for _ in deep.chunks(deep.survey()):
            pass
    assert resident() == before
