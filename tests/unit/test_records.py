"""The states of records, told from those of all: what a patcher has done that died between two state words."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from elfdiff.errors import TargetDamaged
from patcher.planning.plan import Ending, Part, Plan, plan_apply, plan_revert, situation
from patcher.planning.vetting import require_whole_sets
from patcher.process.modules import Module
from patcher.records.record import FIRST_SLOT, JournalEntry, Record, State, state_word
from patcher.records.search import _of_sets, _supersede
from tests.unit.test_record import contents

IMAGES = (0x5555_5555_0000, 0x7FFF_0000_0000)
FILE, JUMP, OTHER = b"\x55\x48\x89\xe5\x53", b"\xe9\2\0\0\0", b"\xe9\3\0\0\0"
MODULES = tuple(
    Module(f"/{bias:x}", f"{index:02x}" * 20, bias, bias, bias + 0x8000, False, False, (), ())
    for index, bias in enumerate(IMAGES)
)


def member(image: int, state: State, version: int = 2, replaces: tuple[str, ...] = ()) -> Record:
    """The patch of an image, one of the set of this version."""
    entry = JournalEntry(IMAGES[image] + 0x1000, FILE, JUMP if replaces else FILE, OTHER if version == 3 else JUMP)
    base = contents()
    made = contents(
        patch=f"{version}{image}" * 32,
        instance=f"{version}{image}" * 8,
        old=replace(base.old, build_id=MODULES[image].build_id),
        old_bias=IMAGES[image],
        journal=(entry,),
        functions=(),
        replaces=replaces,
        set_id=f"0{version}" * 8,
        set_size=2,
    )
    address = 0x6000_0000_0000 + version * 0x10000 + image * 0x8000
    return Record(address, 0x4000, state, state, FIRST_SLOT, made)


class Process:
    """Records and entries as plans see them; dies after any number of writes."""

    def __init__(self, *records: Record) -> None:
        self.records = {item.address: item for item in records}
        self.entries = {bias + 0x1000: FILE for bias in IMAGES}

    def read(self, spans: list[tuple[int, int]]) -> list[bytes]:
        return [self.entries[start] for start, _ in spans]

    def carry_out(self, plan: Plan, writes: int = 1000) -> bool:
        """Whether all of it was done."""
        pages = [(page.address, page.before, page.after) for page in plan.writes]
        states = [[(item.record, item.before, item.after) for item in part] for part in (plan.first, plan.last)]
        everything = [*states[0], *pages, *states[1]]
        for address, before, after in everything[:writes]:
            if address in self.entries:
                assert self.entries[address] == before
                self.entries[address] = after
            else:
                record = self.records[address]
                assert state_word(record.written, record.slot) == before
                state = next(item for item in State if state_word(item, record.slot) == after)
                self.records[address] = replace(record, written=state, state=state)
        return writes >= len(everything)

    def seen(self) -> list[Record]:
        return _supersede(_of_sets(list(self.records.values())))

    def states(self, version: int) -> set[State]:
        return {item.state for item in self.seen() if item.contents.set_id == f"0{version}" * 8}

    def running(self) -> set[bytes]:
        return set(self.entries.values())

    def apply(self, version: int) -> Plan:
        seen = self.seen()
        own = [item for item in seen if item.contents.set_id == f"0{version}" * 8]
        nows = [situation(seen, module) for module in MODULES]
        return plan_apply(
            [Part(item, item.contents, FIRST_SLOT, now) for item, now in zip(own, nows, strict=True)], self.read
        )

    def revert(self, version: int) -> Plan:
        seen = self.seen()
        active = [item for item in seen if item.contents.set_id == f"0{version}" * 8 and item.state != State.PREPARED]
        modules = {module.bias: module for module in MODULES}
        return plan_revert(
            [Ending(item, situation(seen, modules[item.contents.old_bias])) for item in active], self.read
        )


def prepared(version: int) -> list[Record]:
    replaces = [(("2" + str(image)) * 8,) if version == 3 else () for image in (0, 1)]
    return [member(image, State.PREPARED, version, replaces[image]) for image in (0, 1)]


def test_a_death_between_any_two_writes_of_an_apply_is_undone_or_done() -> None:
    for writes in itertools.count():
        process = Process(*prepared(2))
        done = process.carry_out(process.apply(2), writes)
        states = process.states(2)
        if State.APPLIED in states:
            assert states == {State.APPLIED} and process.running() == {JUMP}
        elif State.APPLYING in states:
            process.carry_out(process.revert(2))
            assert process.running() == {FILE} and process.states(2) <= {State.REVERTED, State.PREPARED}
        if done:
            assert states == {State.APPLIED}
            break


def test_a_death_between_any_two_writes_of_a_replacement_goes_back_or_is_done() -> None:
    for writes in itertools.count():
        process = Process(*prepared(2), *prepared(3))
        process.carry_out(process.apply(2))
        done = process.carry_out(process.apply(3), writes)
        states = process.states(3)
        if State.APPLIED in states:
            assert process.running() == {OTHER} and process.states(2) == {State.REPLACED}
        else:
            if State.APPLYING in states:
                process.carry_out(process.revert(3))
            assert process.running() == {JUMP} and process.states(2) == {State.APPLIED}
        if done:
            break


def test_a_death_between_any_two_writes_of_a_revert_is_finished() -> None:
    for writes in itertools.count():
        process = Process(*prepared(2))
        process.carry_out(process.apply(2), 5)  # one of the state words was not written yet
        assert {item.written for item in process.records.values()} == {State.APPLIED, State.APPLYING}
        done = process.carry_out(process.revert(2), writes)
        (state,) = process.states(2)
        if state is State.REVERTING:
            process.carry_out(process.revert(2))
        assert process.running() == ({JUMP} if state is State.APPLIED else {FILE})
        if done:
            assert state is State.REVERTED
            break


def test_a_set_of_which_a_record_is_gone_is_not_believed() -> None:
    with pytest.raises(TargetDamaged, match="cannot be believed"):
        require_whole_sets([member(0, State.APPLIED)])
    require_whole_sets([member(0, State.APPLIED), member(1, State.APPLIED)])
    require_whole_sets([member(0, State.APPLYING)])
