"""Sets: patches of a program and its library come into force in one stop, all or none, and are taken back as one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from elfdiff.errors import BadInput, Busy, NotConcerned, Refused
from elfdiff.patches.patchfile import write_patch
from fixtures.intact import altered_code, writable_and_executable
from patcher.pausing.conditions import Conditions
from patcher.records.record import State
from patcher.transactions.inspection import inspect_process
from patcher.transactions.transaction import apply, check, revert, watch_apply
from tests.compile import Compiler
from tests.conftest import Livegraft
from tests.live.answering import SPREAD, Answering, killed_at, versions
from tests.live.grafting import MAIN, PRELUDE, Running, named, patch_for
from tests.live.pairing import Pairs, pairs, version_in_force

pytestmark = pytest.mark.root

PATIENCE = 60.0
PATIENT = Conditions(timeout=PATIENCE)
NOTED = ([{"hold"}, {"complain"}], [{"complain"}, {"hold"}])
"""By image, in the order of their addresses: functions that do not change, one of the program, one of the library."""


@pytest.fixture(scope="module")
def built(cache_folder: Path) -> Pairs:
    return pairs(cache_folder / "answer")


@pytest.fixture
def program(built: Pairs) -> Iterator[Answering]:
    with built.start() as running:
        yield running


def both(program: Answering, version: int) -> None:
    """Assert that program and library run this version, and never did another pair."""
    program.answers(version)
    program.never_mixed()


def test_there_and_back_in_one_stop_each(built: Pairs, program: Answering, either: str) -> None:
    for version in (2, 3, 2):
        outcome = apply(program.pid, built.to[version], PATIENT)
        assert len(outcome.members) == 2 and len({one.pause for one in outcome.members}) == 1
        both(program, version)
        assert version_in_force(program, built) == version and writable_and_executable(program.pid) == []
    gone = revert(program.pid, conditions=PATIENT)
    assert {one.contents.patch for one in gone.members} == {patch.id for patch in built.to[2]}
    both(program, 1)
    assert version_in_force(program, built) == 1 and altered_code(program.pid) == []


@pytest.mark.parametrize("member", [0, 1])
def test_whichever_is_named_all_of_a_set_is_reverted(member: int, built: Pairs, program: Answering) -> None:
    apply(program.pid, built.to[2], PATIENT)
    assert apply(program.pid, built.to[2]).already
    assert apply(program.pid, built.to[2][member]).already  # by itself it is in force, too
    assert len(revert(program.pid, built.to[2][member].id[:12], PATIENT).members) == 2
    both(program, 1)
    assert revert(program.pid, built.to[2][member].id).already
    assert altered_code(program.pid) == []


def test_a_set_in_force_is_replaced_as_one(built: Pairs, program: Answering) -> None:
    apply(program.pid, built.to[2], PATIENT)
    for patch in built.to[3]:
        for command in (apply, check):
            with pytest.raises(Refused, match="one of a set of 2"):
                command(program.pid, patch)
    both(program, 2)
    assert version_in_force(program, built) == 2
    outcome = apply(program.pid, built.to[3], PATIENT)
    assert [[item.contents.patch for item in one.others] for one in outcome.members] == [
        [built.to[2][0].id],
        [built.to[2][1].id],
    ]
    both(program, 3)


def test_patches_that_were_applied_alone_become_a_set(built: Pairs, program: Answering) -> None:
    apply(program.pid, built.to[2][0], PATIENT)
    assert program.ask() == "2001"
    apply(program.pid, built.to[2], PATIENT)
    program.answers(2)
    assert version_in_force(program, built) == 2
    assert len(revert(program.pid, conditions=PATIENT).members) == 2
    for patch in built.to[2]:
        apply(program.pid, patch, PATIENT)
    assert apply(program.pid, built.to[2]).already
    with pytest.raises(BadInput, match="several patches are in force"):
        revert(program.pid)
    apply(program.pid, built.to[3], PATIENT)
    program.answers(3)
    revert(program.pid, conditions=PATIENT)
    program.answers(1)
    assert altered_code(program.pid) == []


def test_one_function_that_stays_live_keeps_all_of_a_set_out(built: Pairs, program: Answering, either: str) -> None:
    assert program.ask("hold") == "held"
    for command in (apply, check):
        with pytest.raises(Busy, match="held"):
            command(program.pid, built.to[2], Conditions(timeout=3.0))  # for all threads to stop on a busy machine
    watched = watch_apply(program.pid, built.to[2], 0.1)
    assert watched is not None and "held" in {item.function for item in watched.now} and len(watched.contents) == 2
    both(program, 1)
    assert altered_code(program.pid) == [] and inspect_process(program.pid).patches == ()
    assert program.ask("release") == "released"
    apply(program.pid, built.to[2], PATIENT)
    both(program, 2)


def test_what_is_named_is_looked_for_in_all_images_of_a_set(built: Pairs, program: Answering) -> None:
    with pytest.raises(BadInput, match="a function of 2 images"):
        check(program.pid, built.to[2], Conditions(when_idle=("deregister_tm_clones",)))
    with pytest.raises(BadInput, match="no function of"):
        check(program.pid, built.to[2], Conditions(when_idle=("nobody",)))
    with pytest.raises(Busy, match=r"\bmain\b.* stayed live"):
        apply(program.pid, built.to[2], Conditions(timeout=3.0, when_idle=("complain", "main")))
    assert inspect_process(program.pid).patches == ()
    outcome = apply(program.pid, built.to[2], Conditions(timeout=PATIENCE, when_idle=("complain", "hold")))
    assert [{item.name for item in one.contents.idle} for one in outcome.members] in NOTED
    both(program, 2)


def test_death_at_every_step_leaves_all_or_none(built: Pairs, program: Answering) -> None:
    """Until the first state word of the set says applied, all is undone; from then on all of it is in force."""
    versions: list[tuple[int | None, int]] = []
    for step in range(100):
        if not killed_at(step, lambda on_step: apply(program.pid, built.to[2], PATIENT, on_step=on_step)):
            break
        found = version_in_force(program, built)
        running = int(program.ask()) // 1001
        program.never_mixed()
        versions.append((found, running))
        assert found in (None, running)
        outcome = revert(program.pid, conditions=PATIENT) if found != 1 else None
        assert outcome is None or not outcome.already
        both(program, 1)
        assert version_in_force(program, built) == 1
    assert {(1, 1), (None, 1), (None, 2), (2, 2)} == set(versions)
    both(program, 2)
    assert revert(program.pid, conditions=PATIENT) and altered_code(program.pid) == []


def test_death_at_every_step_of_a_replacement_and_a_revert(built: Pairs, program: Answering) -> None:
    for step in range(0, 100, 2):
        apply(program.pid, built.to[2], PATIENT)
        killed = killed_at(step, lambda on_step: apply(program.pid, built.to[3], PATIENT, on_step=on_step))
        program.never_mixed()
        if version_in_force(program, built) is None:
            # Another command than that which was interrupted undoes it first.
            apply(program.pid, built.to[2], PATIENT)
            both(program, 2)
        if not killed:
            break
    for step in range(1, 100, 2):
        killed = killed_at(step, lambda on_step: revert(program.pid, conditions=PATIENT, on_step=on_step))
        program.never_mixed()
        apply(program.pid, built.to[3], PATIENT)
        both(program, 3)
        if not killed:
            break
    revert(program.pid, conditions=PATIENT)
    both(program, 1)
    assert altered_code(program.pid) == []


@pytest.fixture
def files(built: Pairs, tmp_path: Path) -> dict[int, list[Path]]:
    named = {version: [tmp_path / f"{version}-{kind}" for kind in ("program", "library")] for version in built.to}
    for version, paths in named.items():
        for patch, path in zip(built.to[version], paths, strict=True):
            write_patch(patch, path)
    return named


def test_the_command_line(files: dict[int, list[Path]], program: Answering, livegraft: Livegraft) -> None:
    words = ("--pid", program.pid, "--timeout", PATIENCE, "--json")
    assert {one["state"] for one in livegraft("check", *files[2], *words).json["set"]} == {"applicable"}
    applied = livegraft("apply", *files[2], *words).json
    assert [one["id"] for one in applied["set"]] == [applied["id"], applied["set"][1]["id"]] and not applied["already"]
    patches = livegraft("status", "--pid", program.pid, "--json").json["patches"]
    assert len({one["set"]["id"] for one in patches}) == 1 and {one["set"]["size"] for one in patches} == {2}
    assert "set        of 2, with " in livegraft("status", "--pid", program.pid).stdout
    assert livegraft("blocking", *files[3], "--pid", program.pid, "--for", 0, "--json", status=None).json["set"]
    said = livegraft("revert", "--pid", program.pid, "--timeout", PATIENCE).stdout
    assert "the set " in said and said.count("undone") == 2
    both(program, 1)


def test_wrong_sets_are_said_and_nothing_is_touched(
    files: dict[int, list[Path]], program: Answering, tmp_path: Path, livegraft: Livegraft
) -> None:
    one, other = files[2]
    for words, status, said in (
        ((one, one), 2, "was given twice"),
        ((one, files[3][0]), 2, "two of the patches are of the same image"),
        ((one, tmp_path / "none"), 2, "none"),
        ((one, other, "--keep-live", "nothing"), 2, "nothing: no function"),
    ):
        outcome = livegraft("apply", *words, "--pid", program.pid, status=status)
        assert said in outcome.text and "Traceback" not in outcome.text
    assert altered_code(program.pid) == [] and inspect_process(program.pid).patches == ()


def test_a_process_without_one_of_the_images_is_not_concerned(
    built: Pairs, cache_folder: Path, files: dict[int, list[Path]], livegraft: Livegraft
) -> None:
    alone = versions(cache_folder / "answer", SPREAD)  # which has no library
    with Answering(alone.programs[1]) as program:
        with pytest.raises(NotConcerned, match=f"patch {built.to[2][1].id[:12]} of libright.so"):
            apply(program.pid, (alone.to[2], built.to[2][1]))
        assert altered_code(program.pid) == [] and inspect_process(program.pid).patches == ()
    with subprocess.Popen(["sleep", "60"]) as other:
        group = livegraft("apply", *files[2], "--tree", other.pid, "--json", status=4).json
        assert [item["result"] for item in group["processes"]] == ["not-concerned"]
        other.kill()


def test_a_set_on_several_processes_and_all_taken_back_where_one_fails(
    built: Pairs, files: dict[int, list[Path]], livegraft: Livegraft
) -> None:
    with built.start() as first, built.start() as second:
        apply(first.pid, built.to[3], PATIENT)
        assert second.ask("hold") == "held"
        words = ("--exe", built.program, "--all", "--timeout", 1, "--atomic", "--json")
        found = livegraft("apply", *files[2], *words, status=5).json["processes"]
        assert {item["pid"]: item["result"] for item in found} == {first.pid: "rolled-back", second.pid: "failed"}
        both(first, 3)
        both(second, 1)
        assert {item.record.state for item in inspect_process(first.pid).patches} == {State.APPLIED, State.REVERTED}
        assert second.ask("release") == "released"
        livegraft("apply", *files[2], "--exe", built.program, "--all", "--timeout", PATIENCE)
        both(first, 2)
        both(second, 2)
        livegraft("revert", "--exe", built.program, "--all", "--timeout", PATIENCE)
        for one in (first, second):
            both(one, 1)
            assert altered_code(one.pid) == []


NEEDS = "long helped(long n);\nlong answer(long n) { return helped(n) CALL; }"
HELPS = "EXTRA\nSEPARATE long helped(long n) { return n * 3 EDIT; }"


def test_what_only_the_new_library_has_cannot_be_bound_to(cache_folder: Path, tmp_path: Path) -> None:
    """Also where the patch that brings it is in the same set; the refusal names the symbol and the patch."""
    compiled = Compiler(cache_folder / "compiled")

    def library(extra: str, edit: str) -> Path:
        text = PRELUDE + HELPS.replace("EXTRA", extra).replace("EDIT", edit)
        return named(compiled({"helps.c": text}, "-Wl,-soname,libhelps.so", link="library"), "libhelps.so")

    def program(call: str, beside: Path) -> Path:
        return compiled({"main.c": PRELUDE + MAIN, "needs.c": PRELUDE + "long extra(long n);\n" + call}, str(beside))

    libraries = library("", ""), library("long extra(long n) { return n + 500; }", "+ 1")
    old, new = (
        program(NEEDS.replace("CALL", call), beside)
        for call, beside in zip(("", "+ extra(n)"), libraries, strict=True)
    )
    for name in ("program", "library"):
        (tmp_path / name).mkdir()
    of_program = patch_for(old, new, tmp_path / "program")
    of_library = patch_for(*libraries, tmp_path / "library")
    with Running([old], {"LD_LIBRARY_PATH": str(libraries[0].parent)}) as process:
        assert process.ask(1) == [3]
        with pytest.raises(Refused, match=f"extra.*patch {of_program.id[:12]}"):
            apply(process.pid, (of_program, of_library), PATIENT)
        assert process.ask(1) == [3] and altered_code(process.pid) == []
        assert inspect_process(process.pid).patches == ()
        apply(process.pid, of_library, PATIENT)
        assert process.ask(1) == [4]
