"""The plan: from any mix of bytes that our own commands can leave, to one version, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elfdiff.errors import Refused, TargetDamaged
from patcher.planning.plan import Ending, Part, Plan, disjoint, page_writes, plan_apply, plan_revert, situation
from patcher.process.modules import Module
from patcher.records.record import FIRST_SLOT, JournalEntry, Record, RecordedFunction, State, state_word
from patcher.stacks.forbidden import ForbiddenRange, ForbiddenRanges
from tests.unit.test_record import contents

BASE = 0x5555_5555_0000
MODULE = Module("/bin/prog", "aa" * 20, BASE, BASE, BASE + 0x8000, False, False, (), ())
FILE = b"\x55\x48\x89\xe5\x53"
ENTRIES = tuple(BASE + offset for offset in (0x1000, 0x1020, 0x1FF0, 0x2000, 0x3800))


class Text:
    """The program's text as far as a plan sees it."""

    def __init__(self) -> None:
        self.bytes = bytearray(FILE * 0x2000)[:0x8000]
        for address in ENTRIES:
            self.bytes[address - BASE : address - BASE + 5] = FILE

    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        return [bytes(self.bytes[start - BASE : start - BASE + size]) for start, size in spans]

    def carry_out(self, plan: Plan, pages: int = 1 << 30) -> None:
        for write in plan.pages[:pages]:
            assert self.read([(write.address, len(write.before))]) == [write.before]
            self.bytes[write.address - BASE : write.address - BASE + len(write.after)] = write.after

    def entries(self) -> list[bytes]:
        return self.read([(address, 5) for address in ENTRIES])


def jump(version: int) -> bytes:
    return bytes([0xE9, version, 0, 0, 0])


def record(version: int, state: State, before: bytes = FILE, replaces: tuple[str, ...] = ()) -> Record:
    """A patch that redirects all entries to ``version``; what it says to come from is ``before``."""
    journal = tuple(JournalEntry(address, FILE, before, jump(version)) for address in ENTRIES)
    functions = tuple(
        RecordedFunction(f"f{address:x}", address, 16, 0x5000_0000_0000 + version * 0x10000, 16, True)
        for address in ENTRIES
    )
    made = contents(
        patch=f"{version:02x}" * 32,
        instance=f"{version:02x}" * 8,
        journal=journal,
        functions=functions,
        replaces=replaces,
        old_bias=BASE,
    )
    return Record(0x6000_0000_0000 + version * 0x10000, 0x4000, state, state, FIRST_SLOT, made)


def everything(version: int) -> list[bytes]:
    return [jump(version) if version > 1 else FILE] * len(ENTRIES)


def apply_plan(text: Text, own: Record, others: Sequence[Record] = ()) -> Plan:
    now = situation([own, *others], MODULE)
    return plan_apply([Part(own, own.contents, FIRST_SLOT, now)], text.read)


def test_apply_writes_every_entry_and_one_page_at_a_time() -> None:
    text = Text()
    plan = apply_plan(text, record(2, State.PREPARED))
    assert len(plan.pages) == 3
    for write in plan.pages:
        assert write.address // 4096 == (write.address + len(write.after) - 1) // 4096
    text.carry_out(plan)
    assert text.entries() == everything(2)


def test_states_go_from_prepared_through_applying_to_applied() -> None:
    own = record(2, State.PREPARED)
    plan = apply_plan(Text(), own)
    assert [write.after for write in plan.first] == [state_word(State.APPLYING, FIRST_SLOT)]
    assert plan.first[0].before == state_word(State.PREPARED, FIRST_SLOT)
    assert [write.after for write in plan.last] == [state_word(State.APPLIED, FIRST_SLOT)]


def test_the_replaced_record_is_put_aside_after_the_new_one_is_in_force() -> None:
    text = Text()
    old = record(2, State.APPLIED)
    text.carry_out(apply_plan(text, record(2, State.PREPARED)))
    new = record(3, State.PREPARED, jump(2), (old.contents.instance,))
    plan = apply_plan(text, new, [old])
    assert [write.record for write in plan.last] == [new.address, old.address]
    assert plan.last[1].after == state_word(State.REPLACED, FIRST_SLOT)
    text.carry_out(plan)
    assert text.entries() == everything(3)


@settings(deadline=None)
@given(st.integers(0, 3), st.sampled_from(["finish", "undo", "other"]))
def test_any_prefix_of_an_apply_can_be_finished_undone_or_replaced(pages: int, way: str) -> None:
    text = Text()
    text.carry_out(apply_plan(text, record(2, State.PREPARED)), pages)
    dead = record(2, State.APPLYING)
    if way == "finish":
        text.carry_out(apply_plan(text, dead))
        assert text.entries() == everything(2)
    elif way == "undo":
        plan = plan_revert([Ending(dead, situation([dead], MODULE))], text.read)
        assert not plan.first and plan.last[-1].after == state_word(State.REVERTED, FIRST_SLOT)
        text.carry_out(plan)
        assert text.entries() == everything(1)
    else:
        plan = apply_plan(text, record(3, State.PREPARED), [dead])
        assert plan.last[1] == replace(plan.last[1], record=dead.address)
        text.carry_out(plan)
        assert text.entries() == everything(3)


@settings(deadline=None)
@given(st.integers(0, 3))
def test_undoing_a_replacement_brings_back_what_was_in_force(pages: int) -> None:
    text = Text()
    text.carry_out(apply_plan(text, record(2, State.PREPARED)))
    applied = record(2, State.APPLIED)
    text.carry_out(apply_plan(text, record(3, State.PREPARED, jump(2)), [applied]), pages)
    dead = record(3, State.APPLYING, jump(2))
    plan = plan_revert([Ending(dead, situation([applied, dead], MODULE))], text.read)
    text.carry_out(plan)
    assert text.entries() == everything(2)
    assert [write.record for write in plan.last] == [dead.address]


@settings(deadline=None)
@given(st.integers(0, 3), st.booleans())
def test_any_prefix_of_a_revert_can_be_finished_or_applied_again(pages: int, again: bool) -> None:
    text = Text()
    text.carry_out(apply_plan(text, record(2, State.PREPARED)))
    applied = record(2, State.APPLIED)
    plan = plan_revert([Ending(applied, situation([applied], MODULE))], text.read)
    assert plan.first[0].after == state_word(State.REVERTING, FIRST_SLOT)
    text.carry_out(plan, pages)
    dead = record(2, State.REVERTING)
    if again:
        text.carry_out(apply_plan(text, dead))
    else:
        text.carry_out(plan_revert([Ending(dead, situation([dead], MODULE))], text.read))
    assert text.entries() == everything(2 if again else 1)


def test_an_entry_with_foreign_bytes_is_refused() -> None:
    text = Text()
    text.bytes[0x1020] = 0xCC
    with pytest.raises(Refused, match="changed by somebody else"):
        apply_plan(text, record(2, State.PREPARED))


def test_two_records_in_force_are_damage() -> None:
    with pytest.raises(TargetDamaged, match="two records"):
        situation([record(2, State.APPLIED), record(3, State.APPLIED)], MODULE)


def test_records_of_another_image_are_left_alone() -> None:
    other = record(2, State.APPLIED)
    moved = replace(other, contents=replace(other.contents, old_bias=BASE + 0x100000))
    assert situation([moved], MODULE).active == ()


def test_old_and_new_code_in_force_is_forbidden_and_idle_code_is_not() -> None:
    text = Text()
    plan = apply_plan(text, record(2, State.PREPARED), [record(3, State.REVERTED)])
    assert {item.start for item in plan.forbidden} == set(ENTRIES)
    applied = record(2, State.APPLIED)
    text.carry_out(plan)
    plan = apply_plan(text, record(3, State.PREPARED, jump(2)), [applied])
    starts = {item.start for item in plan.forbidden}
    assert starts > set(ENTRIES) and applied.contents.functions[0].new_start in starts
    ForbiddenRanges(plan.forbidden)


def test_nothing_is_written_where_all_is_as_wanted() -> None:
    wanted = {ENTRIES[0]: FILE, ENTRIES[1]: jump(2)}
    writes = page_writes(wanted, {address: {FILE, jump(2)} for address in wanted}, Text().read)
    assert [write.after.count(jump(2)) for write in writes] == [1]
    assert page_writes({ENTRIES[0]: FILE}, {ENTRIES[0]: {FILE}}, Text().read) == ()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), max_size=12))
def test_disjoint_covers_the_same_addresses_and_never_overlaps(spans: list[tuple[int, int]]) -> None:
    ranges = [ForbiddenRange(f"{start}+{size}", start, start + size) for start, size in spans]
    out = disjoint(ranges)
    for first, second in pairwise(out):
        assert first.end <= second.start
    covered = {address for item in ranges for address in range(item.start, item.end)}
    assert {address for item in out for address in range(item.start, item.end)} == covered
    for item in out:
        owner = next(one for one in ranges if one.name == item.name)
        assert owner.start <= item.start and item.end <= owner.end
        shortest = min(one.end - one.start for one in ranges if one.start <= item.start < one.end)
        assert owner.end - owner.start == shortest
