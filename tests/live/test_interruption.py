"""livegraft is killed at every point of a transaction; the target lives, and the next command finds its way.

Every function has a page of its own here, so that a death can leave some entries redirected and others not.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from elfdiff.errors import BadInput
from fixtures.intact import altered_code
from patcher.process.memory import Memory
from patcher.process.proc import mappings
from patcher.records.record import STATE_OFFSET, RecordedSegment, State, encode_slot, state_word
from patcher.remote.descriptors import leaked_memory_files
from patcher.transactions.inspection import CarriedPatch, inspect_process
from patcher.transactions.transaction import apply, revert
from tests.live.answering import ANSWERS, CHANGED, SPREAD, Answering, Versions, killed_at, versions

pytestmark = pytest.mark.root

# Of each plan: the gates, four pages that lead to them, their word, the four pages as they are to be.
PAGES, WORD = 10, 6
# "memory file", "mapped", "begun", the pages, the state word; a replacement has one state word more, a revert no memory
# file and no mapping.
APPLY_STEPS, REPLACE_STEPS, REVERT_STEPS = PAGES + 4, PAGES + 5, PAGES + 2
BEGUN = 2

OnStep = Callable[[str], None]


@pytest.fixture(scope="module")
def built(cache_folder: Path) -> Versions:
    return versions(cache_folder / "answer", SPREAD)


def patches(program: Answering) -> dict[str, CarriedPatch]:
    return {item.record.contents.patch: item for item in inspect_process(program.pid).patches}


def settled(program: Answering, version: int) -> None:
    """One version runs, whole; nothing of a dead patcher is left."""
    program.answers(version)
    assert not leaked_memory_files(program.pid)
    found = patches(program).values()
    assert all(item.as_it_should_be and not item.record.interrupted for item in found)
    if version == 1:
        assert not altered_code(program.pid)


def test_the_steps_are_those_that_the_tests_go_through(built: Versions) -> None:
    with Answering(built.programs[1]) as program:
        steps: list[str] = []
        apply(program.pid, built.to[2], on_step=steps.append)
        assert len(steps) == APPLY_STEPS and steps[BEGUN] == "begun" and steps.count("page") == PAGES
        steps.clear()
        apply(program.pid, built.to[3], on_step=steps.append)
        assert len(steps) == REPLACE_STEPS
        steps.clear()
        revert(program.pid, on_step=steps.append)
        assert len(steps) == REVERT_STEPS


@pytest.mark.parametrize("step", range(APPLY_STEPS))
@pytest.mark.parametrize("then", ["same", "other", "revert"])
def test_an_apply_that_was_killed(built: Versions, step: int, then: str) -> None:
    with Answering(built.programs[1]) as program:
        assert killed_at(step, lambda on_step: apply(program.pid, built.to[2], on_step=on_step))
        program.ask("calls")
        found = patches(program).get(built.to[2].id)
        if step < BEGUN:
            assert found is None or found.record.state is State.PREPARED
            program.answers(1)
        elif step < APPLY_STEPS - 1:
            assert found is not None and found.record.state is State.APPLYING
            passed = step >= BEGUN + WORD
            assert found.redirected == (len(CHANGED) if passed else 0)
            program.answers(2 if passed else 1)
        else:
            assert found is not None and found.record.state is State.APPLIED
        program.never_mixed()

        if then == "same":
            assert apply(program.pid, built.to[2]).already is (step == APPLY_STEPS - 1)
            settled(program, 2)
        elif then == "other":
            apply(program.pid, built.to[3])
            settled(program, 3)
        elif step < BEGUN:
            with pytest.raises(BadInput, match="carries no patch"):
                revert(program.pid)
            program.answers(1)
            return
        else:
            assert not revert(program.pid).already
            settled(program, 1)
        revert(program.pid)
        settled(program, 1)


@pytest.mark.parametrize("step", range(REPLACE_STEPS))
@pytest.mark.parametrize("then", ["same", "first", "revert"])
def test_a_replacement_that_was_killed(built: Versions, step: int, then: str) -> None:
    with Answering(built.programs[1]) as program:
        apply(program.pid, built.to[2])
        assert killed_at(step, lambda on_step: apply(program.pid, built.to[3], on_step=on_step))
        program.ask("calls")
        found = patches(program)
        begun = BEGUN <= step < BEGUN + 1 + PAGES
        assert found[built.to[2].id].record.state is (State.APPLIED if step < BEGUN + 1 + PAGES else State.REPLACED)
        if begun:
            assert found[built.to[3].id].record.state is State.APPLYING
        program.answers(3 if step >= BEGUN + WORD else 2)
        program.never_mixed()

        if then == "same":
            apply(program.pid, built.to[3])
            settled(program, 3)
        elif then == "first":
            assert apply(program.pid, built.to[2]).already is (step < BEGUN)
            settled_but_for_garbage(program, 2)
        else:
            revert(program.pid)
            settled_but_for_garbage(program, 2 if begun else 1)
        revert(program.pid)
        assert program.ask() == ANSWERS[1]
        apply(program.pid, built.to[2])
        settled(program, 2)


def settled_but_for_garbage(program: Answering, version: int) -> None:
    """Commands that make no system call in the target leave what a dead patcher left for the next that does."""
    program.answers(version)
    assert all(item.as_it_should_be and not item.record.interrupted for item in patches(program).values())


@pytest.mark.parametrize("step", range(REVERT_STEPS))
@pytest.mark.parametrize("then", ["revert", "same", "other"])
def test_a_revert_that_was_killed(built: Versions, step: int, then: str) -> None:
    with Answering(built.programs[1]) as program:
        apply(program.pid, built.to[2])
        assert killed_at(step, lambda on_step: revert(program.pid, on_step=on_step))
        program.ask("calls")
        state = patches(program)[built.to[2].id].record.state
        assert state is (State.REVERTING if step < REVERT_STEPS - 1 else State.REVERTED)
        program.answers(1 if step >= WORD else 2)
        program.never_mixed()
        if then == "revert":
            assert revert(program.pid).already is (step == REVERT_STEPS - 1)
            settled(program, 1)
        elif then == "same":
            apply(program.pid, built.to[2])
            settled(program, 2)
        else:
            apply(program.pid, built.to[3])
            settled(program, 3)


def test_a_death_in_an_apply_that_follows_a_death_in_a_revert(built: Versions) -> None:
    with Answering(built.programs[1]) as program:
        apply(program.pid, built.to[2])
        assert killed_at(2, lambda on_step: revert(program.pid, on_step=on_step))
        assert killed_at(BEGUN + 2, lambda on_step: apply(program.pid, built.to[3], on_step=on_step))
        assert {item.record.state for item in patches(program).values()} == {State.REVERTING, State.APPLYING}
        with pytest.raises(BadInput, match="several"):
            revert(program.pid)
        revert(program.pid, built.to[3].id)
        settled(program, 1)


def test_repeated_deaths_leave_no_mappings_behind(built: Versions) -> None:
    with Answering(built.programs[1]) as program:
        for _ in range(3):
            assert killed_at(0, lambda on_step: apply(program.pid, built.to[2], on_step=on_step))
            assert killed_at(1, lambda on_step: apply(program.pid, built.to[2], on_step=on_step))
        apply(program.pid, built.to[2])
        settled(program, 2)
        assert program.patch_mappings == 4  # the record, text, constants, and the gates


def test_anonymous_mappings_of_a_dead_patcher_are_known_by_their_contents(built: Versions) -> None:
    with Answering(built.programs[1]) as program:
        resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (program.descriptors, 4096))
        before = mappings(program.pid)
        assert killed_at(0, lambda on_step: apply(program.pid, built.to[2], on_step=on_step))
        record = patches(program)[built.to[2].id].record
        assert record.state is State.PREPARED and not record.contents.sealed
        outcome = apply(program.pid, built.to[2])
        settled(program, 2)
        assert len(patches(program)) == 1
        added = 1 + len(outcome.contents.segments) + 1  # the gates
        assert len(mappings(program.pid)) == len(before) + added


@pytest.mark.parametrize("sealed", [True, False])
def test_unmapping_garbage_spares_what_is_not_ours(built: Versions, sealed: bool) -> None:
    with Answering(built.programs[1]) as program:
        assert killed_at(1, lambda on_step: apply(program.pid, built.to[2], on_step=on_step))
        record = patches(program)[built.to[2].id].record
        # A record that claims memory of the program: the patcher died before it had mapped its own there.
        heap = next(item for item in mappings(program.pid) if item.path == "[heap]")
        claim = RecordedSegment(heap.start, heap.size, 6, "00" * 16)
        forged = replace(record.contents, sealed=sealed, segments=(claim,))
        with Memory(program.pid) as memory:
            memory.write(record.address + record.slot, encode_slot(forged))
        assert patches(program)[built.to[2].id].record.contents == forged
        apply(program.pid, built.to[2])
        assert heap in mappings(program.pid)
        settled(program, 2)


def test_a_killed_patchers_state_word_decides_alone(built: Versions) -> None:
    # All entries were written, the last state word was not.
    with Answering(built.programs[1]) as program:
        apply(program.pid, built.to[2])
        record = patches(program)[built.to[2].id].record
        with Memory(program.pid) as memory:
            memory.write(record.address + STATE_OFFSET, state_word(State.APPLYING, record.slot))
        assert patches(program)[built.to[2].id].record.interrupted
        assert not apply(program.pid, built.to[2]).already
        settled(program, 2)
