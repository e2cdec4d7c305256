"""A server whose main loop changes: threads finish the loop in its old code while everything else runs the new one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from elfdiff.errors import BadInput, Busy, Refused, TargetDamaged
from elfdiff.patches.patchfile import write_patch
from elfdiff.patchobject import PatchObject
from fixtures.intact import altered_code
from patcher.cli import main
from patcher.pausing.conditions import Conditions
from patcher.pausing.pause import Pause, carry_out
from patcher.planning.plan import Plan
from patcher.process.memory import Memory
from patcher.process.proc import thread_ids
from patcher.records.record import KeptCode, State, encode_slot
from patcher.targets.target import Snapshot
from patcher.transactions import transaction
from patcher.transactions.inspection import inspect_process
from patcher.transactions.transaction import apply, check, revert
from tests.compile import Compiler
from tests.live.grafting import PRELUDE, Running, patch_for

pytestmark = pytest.mark.root

AT_ONCE = Conditions(timeout=0)
HEAD = (
    PRELUDE
    + """
#include <pthread.h>
#include <stdatomic.h>
long handle(long n);
"""
)
MAIN = (
    HEAD
    + """
static long count;
static atomic_long mixed, turns[3];
static atomic_int leave, started;
static long company_a, company_b;
SEPARATE int company1(int x) { company_a += x; fprintf(stderr, "one %ld\\n", company_a); return x * 3; }
SEPARATE int company2(int x) { company_b ^= x; fprintf(stderr, "two %ld\\n", company_b); return x + 4; }
SEPARATE int company3(int x) { for (int i = 0; i < x; i++) company_a += company1(i) * company2(x - i); return 2; }

/* Which code a thread of it runs shows in turns[]: the loop never returns before it is told to. */
SEPARATE void *work(void *unused)
{
    while (!leave) {
        long got = handle(7);
        if (got != 7 * 1 && got != 7 * 2 && got != 7 * 3)
            atomic_fetch_add(&mixed, 1);
        atomic_fetch_add(&turns[LOOP - 1], 1);
        started = 1;
        usleep(100);
    }
    return (void *)LOOP;
}

static pthread_t worker;
static long progress(int version)
{
    long before = turns[version - 1];
    while (turns[version - 1] == before)
        usleep(100);
    return 1;
}

/* serve() is the main loop: it changes, and never returns before its input ends. */
SEPARATE long serve(void)
{
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        long n = atol(line), result = LOOP * 1000;
        if (n < 100) result += handle(n);
        else if (n == 100) result = mixed;
        else if (n <= 103) result = progress(n - 100);
        else if (n == 110) { void *got; leave = 1; pthread_join(worker, &got); leave = 0; result = (long)got; }
        else if (n == 111) { pthread_create(&worker, 0, work, 0); result = 1; }
        printf("%ld %ld\\n", ++count, result);
    }
    return count;
}

int main(int argc, char **argv)
{
    if (argc > 5) return company3(argc);
    setvbuf(stdout, NULL, _IOLBF, 0);
    pthread_create(&worker, 0, work, 0);
    while (!started)
        usleep(100);
    puts("ready");
    return serve() == 0;
}
"""
)
HANDLE = HEAD + "static long handled; SEPARATE long handle(long n) { handled++; return n * HANDLED; }"


def sources(loop: int, handled: int) -> dict[str, str]:
    return {"main.c": MAIN.replace("LOOP", str(loop)), "handle.c": HANDLE.replace("HANDLED", str(handled))}


BOTH = ("serve", "work")
KEPT = Conditions(keep_live=BOTH)
OLD_THREAD, NEW_THREAD, END, START, MIXED = 101, 102, 110, 111, 100
"""Questions: wait until a thread runs the old loop, or the new one; end the thread (which loop was it?); start one."""


@pytest.fixture(scope="module")
def compiled(cache_folder: Path) -> Compiler:
    return Compiler(cache_folder / "compiled")


@pytest.fixture(scope="module")
def old(compiled: Compiler) -> Path:
    return compiled(sources(1, 1), "-g", "-pthread", stripped=False)


@pytest.fixture(scope="module")
def to(compiled: Compiler, old: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], PatchObject]:
    """Patches by the versions of loop and handler that they lead to."""
    versions = ((2, 2), (3, 3), (1, 3))
    folder = tmp_path_factory.mktemp("patches")
    return {v: patch_for(old, compiled(sources(*v), "-g", "-pthread", stripped=False), folder) for v in versions}


Patches = dict[tuple[int, int], PatchObject]


@pytest.fixture
def running(old: Path) -> Iterator[Running]:
    with Running([old]) as program:
        yield program
        assert program.ask(MIXED) == [0]


def inside(pid: int) -> set[tuple[int, str]]:
    found = inspect_process(pid).finishing
    assert found is not None and all(item.certain for item in found)
    return {(item.tid, item.function) for item in found}


def test_without_it_the_loop_keeps_the_patch_out_and_the_way_is_told(running: Running, to: Patches) -> None:
    with pytest.raises(Busy) as caught:
        apply(running.pid, to[2, 2], AT_ONCE)
    assert any(f"--keep-live {names}" in caught.value.next_step for names in ("serve,work", "work,serve"))
    with pytest.raises(Busy) as caught:
        apply(running.pid, to[2, 2], Conditions(timeout=0, keep_live=("work",)))
    assert "--keep-live serve" in caught.value.next_step
    assert running.ask(5, OLD_THREAD) == [1005, 1]


def test_what_is_kept_live_cannot_be_waited_for(running: Running, to: Patches) -> None:
    with pytest.raises(BadInput) as caught:
        apply(running.pid, to[2, 2], Conditions(keep_live=BOTH, when_idle=("serve",)))
    assert caught.value.what == "serve cannot be both kept live and idle"
    with pytest.raises(Busy) as busy:
        apply(running.pid, to[2, 2], Conditions(timeout=0, keep_live=BOTH, when_idle=("main",)))
    assert busy.value.what.startswith("main stayed live") and "--no-when-idle" in busy.value.next_step
    assert altered_code(running.pid) == []
    assert running.ask(5, OLD_THREAD) == [1005, 1]


def test_old_activations_go_on_and_new_calls_run_new_code(running: Running, to: Patches) -> None:
    worker = max(thread_ids(running.pid))
    apply(running.pid, to[2, 2], KEPT)
    assert running.ask(5, OLD_THREAD) == [1010, 1]
    assert inside(running.pid) == {(running.pid, "serve"), (worker, "work")}
    assert running.ask(END, START, NEW_THREAD) == [1, 1, 1]  # the old loop ends; the next one is the new loop
    assert inside(running.pid) == {(running.pid, "serve")}
    assert running.ask(5, END) == [1010, 2]


def test_revert_minds_new_code_only(running: Running, to: Patches) -> None:
    apply(running.pid, to[2, 2], KEPT)
    running.ask(END, START, NEW_THREAD)
    with pytest.raises(Busy) as caught:
        revert(running.pid, conditions=AT_ONCE)
    assert caught.value.what.startswith("work (patch ")
    running.ask(END)
    revert(running.pid)
    assert running.ask(5, START, OLD_THREAD) == [1005, 1, 1]
    assert altered_code(running.pid) == []
    assert inspect_process(running.pid).finishing == ()


def test_a_patch_that_replaces_it_asks_again(running: Running, to: Patches) -> None:
    apply(running.pid, to[2, 2], KEPT)
    with pytest.raises(Busy):
        apply(running.pid, to[3, 3], AT_ONCE)
    apply(running.pid, to[3, 3], KEPT)
    assert running.ask(5, OLD_THREAD, END, START, 103, END) == [1015, 1, 1, 1, 1, 3]
    revert(running.pid)
    assert running.ask(5) == [1005]


def test_one_that_leaves_the_loop_alone_need_not(running: Running, to: Patches) -> None:
    apply(running.pid, to[2, 2], KEPT)
    apply(running.pid, to[1, 3])
    assert running.ask(5, OLD_THREAD, END, START, OLD_THREAD) == [1015, 1, 1, 1, 1]


def test_of_what_is_kept_only_the_entry_jump_must_be_free(
    running: Running, to: Patches, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []

    def noted(plan: Plan, seen: Snapshot, memory: Memory, asked: Conditions, *more: object, **options: object) -> Pause:
        plans.append(plan)
        return carry_out(plan, seen, memory, asked, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(transaction, "carry_out", noted)
    check(running.pid, to[2, 2], KEPT)
    sizes = {item.name: item.end - item.start for item in plans[0].forbidden}
    whole = {item.name: item.old_size for item in to[2, 2].functions}
    assert sizes["serve"] == sizes["work"] == 5
    assert sizes["handle"] == whole["handle"] > 5
    assert not altered_code(running.pid)


def test_names_that_cannot_be_kept(running: Running, to: Patches, compiled: Compiler, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nosuch: no function"):
        check(running.pid, to[2, 2], Conditions(keep_live=("nosuch",)))
    with pytest.raises(BadInput, match="company1: no function"):
        check(running.pid, to[2, 2], Conditions(keep_live=("company1",)))
    pair = compiled.pair(sources(1, 1), sources(2, 2), "-pthread", stripped=False)
    with Running([pair[0]]) as program:
        patch = patch_for(*pair, tmp_path)
        with pytest.raises(Refused) as caught:
            apply(program.pid, patch, Conditions(keep_live=("serve",)))
        assert "calls handle, which changes" in caught.value.why
        assert not altered_code(program.pid)


def test_two_functions_of_one_name_are_told_apart_by_address(running: Running, to: Patches) -> None:
    (serve,) = [item for item in to[2, 2].old_codes if item.name == "serve"]
    double = replace(to[2, 2], old_codes=(*to[2, 2].old_codes, replace(serve, parts=(serve.parts[0] + 1,))))
    with pytest.raises(BadInput, match="the name of 2 functions"):
        check(running.pid, double, KEPT)
    check(running.pid, double, Conditions(keep_live=(hex(serve.parts[0]), "work")))


def test_what_a_killed_patcher_has_begun_can_be_undone_under_the_loop(running: Running, to: Patches) -> None:
    patcher = os.fork()
    if patcher == 0:
        try:
            apply(running.pid, to[2, 2], KEPT, on_step=lambda name: os._exit(7) if name == "page" else None)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(patcher, 0)[1]) == 7
    assert inspect_process(running.pid).patches[0].record.state is State.APPLYING
    revert(running.pid)
    assert running.ask(5, OLD_THREAD) == [1005, 1]
    assert altered_code(running.pid) == []


@pytest.mark.parametrize("said", ["kept", "idle"])
def test_a_record_that_names_what_is_no_code_is_not_believed(running: Running, to: Patches, said: str) -> None:
    apply(running.pid, to[2, 2], KEPT)
    record = inspect_process(running.pid).patches[0].record
    for forged in (KeptCode("serve", 0x1000, 64), KeptCode("serve", record.address, 64), KeptCode("serve", 1 << 62, 1)):
        contents = replace(record.contents, **{said: (forged,)})
        with Memory(running.pid) as memory:
            memory.write(record.address + record.slot, encode_slot(contents))
        with pytest.raises(TargetDamaged):
            revert(running.pid)


def test_the_commands(running: Running, to: Patches, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fix.patch"
    write_patch(to[2, 2], file)
    pid = ("--pid", str(running.pid))
    assert main(["apply", str(file), *pid, "--keep-live", "serve,work", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {item["name"] for item in said["kept"]} == set(BOTH)
    assert main(["status", *pid, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {item["function"] for item in said["finishing"]} == set(BOTH)
    assert main(["status", *pid]) == 0
    assert f"thread {running.pid} (program) is still in the old code of serve, kept by" in capsys.readouterr().out
    assert main(["apply", str(file), *pid, "--keep-live", "serve,,work"]) == 2
    assert main(["inspect", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {item["name"]: item["why_not"] for item in said["old_codes"]} == {"serve": "", "work": "", "handle": ""}
    assert main(["inspect", str(file)]) == 0
    assert "keep-live" in capsys.readouterr().out
