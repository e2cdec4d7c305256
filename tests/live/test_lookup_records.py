"""What records say of the slots through which unwind tables are looked up: forged, or of images that are gone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from elfdiff.errors import Changed, TargetDamaged
from elfdiff.patchobject import PatchObject
from fixtures.intact import altered_code
from patcher.planning.lookups import Chains
from patcher.planning.unwinders import LookupSlot, lookup_slots
from patcher.process.memory import Memory
from patcher.process.modules import Module, module_of, modules
from patcher.process.proc import mappings
from patcher.records.record import (
    FIRST_SLOT,
    STATE_OFFSET,
    Contents,
    Record,
    RecordedLookup,
    RecordedSegment,
    State,
    encode_slot,
    state_word,
)
from patcher.records.search import find_records
from patcher.transactions.transaction import apply, check, revert
from tests.compile import Compiler
from tests.live.grafting import PRELUDE, Running, patch_for, sources

pytestmark = pytest.mark.root

PROGRAM = """
#include <dlfcn.h>
typedef long depth_of_stack(void);
static void *plugin;
static long target = 5;
SEPARATE long asks(depth_of_stack *depth) { return depth() + VERSION; }
long answer(long n) {
    if (n == 0) return (plugin = dlopen(getenv("PLUGIN"), RTLD_LAZY)) != NULL;
    if (n == 1) return dlclose(plugin);
    if (n == 3) return (long)&target;
    return n == 4 ? target : asks((depth_of_stack *)dlsym(plugin, "depth"));
}
"""
PLUGIN = """
#include <unwind.h>
static _Unwind_Reason_Code one_more(struct _Unwind_Context *context, void *n) { ++*(long *)n; return _URC_NO_REASON; }
long depth(void) { long n = 0; _Unwind_Backtrace(one_more, &n); return n; }
"""
OPEN, CLOSE, DEPTH, TARGET, CONTENT = range(5)


@pytest.fixture
def built(cache_folder: Path, tmp_path: Path) -> tuple[Path, Path, PatchObject]:
    """The old program, the plugin with an unwinder of its own, whose slots are bound lazily, and the patch."""
    compiled = Compiler(cache_folder / "compiled")
    old, new = (compiled(sources(PROGRAM, VERSION=str(n))) for n in (100, 200))
    plugin = compiled(PRELUDE + PLUGIN, "-static-libgcc", "-Wl,-z,lazy", link="library")
    return old, plugin, patch_for(old, new, tmp_path)


@contextmanager
def opened(built: tuple[Path, Path, PatchObject]) -> Iterator[tuple[Running, list[int]]]:
    """The running program with the plugin, its slots bound, and what it answers to DEPTH."""
    old, plugin, _ = built
    with Running([old], {"PLUGIN": str(plugin)}) as running:
        assert running.ask(OPEN) == [1]
        yield running, running.ask(DEPTH)


def slots(pid: int) -> tuple[LookupSlot, ...]:
    with Memory(pid) as memory:
        return lookup_slots(modules(mappings(pid), memory), memory)


def test_an_image_with_a_slot_is_unloaded_before_the_revert(built: tuple[Path, Path, PatchObject]) -> None:
    with opened(built) as (running, before):
        apply(running.pid, built[2])
        assert running.ask(DEPTH, CLOSE) == [before[0] + 100, 0]
        revert(running.pid)
        assert running.ask(OPEN, DEPTH) == [1, *before]
        apply(running.pid, built[2])
        assert running.ask(DEPTH) == [before[0] + 100]


def test_an_image_with_a_slot_is_loaded_again_before_the_revert(built: tuple[Path, Path, PatchObject]) -> None:
    """At the same address, its slot not bound again: it holds what no record has ever seen in it."""
    with opened(built) as (running, before):
        apply(running.pid, built[2])
        (slot,) = slots(running.pid)
        assert running.ask(CLOSE, OPEN) == [0, 1]
        (again,) = slots(running.pid)
        assert (again.address, again.module.bias) == (slot.address, slot.module.bias)
        assert again.value != again.function
        revert(running.pid)
        assert running.ask(DEPTH) == before
        assert altered_code(running.pid) == []
        apply(running.pid, built[2])
        assert running.ask(DEPTH) == [before[0] + 100]


def test_an_image_that_was_loaded_again_is_led_to_the_patch_by_another_apply(
    built: tuple[Path, Path, PatchObject],
) -> None:
    with opened(built) as (running, before):
        apply(running.pid, built[2])
        assert running.ask(CLOSE, OPEN) == [0, 1]
        assert not apply(running.pid, built[2]).already
        assert running.ask(DEPTH) == [before[0] + 100]
        revert(running.pid)
        assert running.ask(DEPTH) == before


def test_a_slot_that_is_bound_while_the_patch_is_prepared_is_no_failure(built: tuple[Path, Path, PatchObject]) -> None:
    """The first stack is looked at between the plan and the pause."""
    old, plugin, patch = built
    with Running([old], {"PLUGIN": str(plugin)}) as running:
        assert running.ask(OPEN) == [1]
        depths = []

        def on_step(name: str) -> None:
            if name == "mapped" and not depths:
                depths.extend(running.ask(DEPTH))

        (slot,) = slots(running.pid)
        assert slot.value != slot.function
        assert not apply(running.pid, patch, on_step=on_step).already
        assert running.ask(DEPTH) == [depths[0] + 100]
        revert(running.pid)
        assert running.ask(DEPTH) == depths
        (slot,) = slots(running.pid)
        assert slot.value == slot.function


def test_a_process_that_changes_again_and_again_is_given_up(built: tuple[Path, Path, PatchObject]) -> None:
    with opened(built) as (running, before):
        (slot,) = slots(running.pid)
        tries = []

        def on_step(name: str) -> None:
            if name == "mapped":
                tries.append(name)
                with Memory(running.pid) as memory:  # another value each time, with the same meaning
                    memory.write(slot.address, (slot.value if len(tries) % 2 else stub).to_bytes(8, "little"))

        assert running.ask(CLOSE, OPEN) == [0, 1]
        (unbound,) = slots(running.pid)
        assert unbound.address == slot.address
        stub = unbound.value
        with pytest.raises(Changed, match="changed while the patch was being prepared"):
            apply(running.pid, built[2], on_step=on_step)
        assert 1 < len(tries) < 10
        assert altered_code(running.pid) == []
        assert running.ask(DEPTH) == before


Change = Callable[[RecordedLookup, Module, int], RecordedLookup]
FORGED: dict[str, Change] = {
    "another place": lambda item, libc, target: replace(item, slot=target),
    "beside the slot": lambda item, libc, target: replace(item, slot=item.slot + 8),
    "within the slot": lambda item, libc, target: replace(item, slot=item.slot + 1),
    "what was there before is data": lambda item, libc, target: replace(item, before=target),
    "what was there before is nothing": lambda item, libc, target: replace(item, before=0),
    "a stand-in elsewhere": lambda item, libc, target: replace(item, stand_in=item.before),
    "a stand-in that is data": lambda item, libc, target: replace(item, stand_in=target),
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_record_has_nothing_written(forged: str, built: tuple[Path, Path, PatchObject]) -> None:
    def change(record: Record, libc: Module, target: int) -> Contents:
        (item,) = record.contents.lookups
        return replace(record.contents, lookups=(FORGED[forged](item, libc, target),))

    with opened(built) as (running, before):
        apply(running.pid, built[2])
        target = running.ask(TARGET)[0]
        forge(running.pid, target, change)
        seen = slots(running.pid)
        for command in (revert, lambda pid: apply(pid, built[2]), lambda pid: check(pid, built[2])):
            with pytest.raises(TargetDamaged, match="cannot be believed"):
                command(running.pid)
            assert slots(running.pid) == seen
        assert running.ask(CONTENT, DEPTH) == [5, before[0] + 100]


def test_a_forged_record_does_not_make_its_own_code_of_another_image(built: tuple[Path, Path, PatchObject]) -> None:
    """It says that the C library's code is a segment of the patch, and that its stand-in is there."""

    def change(record: Record, libc: Module, target: int) -> Contents:
        (text,) = [item for item in libc.mappings if item.executable]
        (item,) = record.contents.lookups
        segment = RecordedSegment(text.start, text.size, 5, record.contents.segments[0].digest)
        lookups = (replace(item, stand_in=item.passes_to),)
        return replace(record.contents, segments=(*record.contents.segments, segment), lookups=lookups)

    with opened(built) as (running, _):
        apply(running.pid, built[2])
        forge(running.pid, running.ask(TARGET)[0], change)
        with pytest.raises(TargetDamaged, match="cannot be believed"):
            revert(running.pid)


def test_a_slot_of_an_image_that_is_not_there_is_left_alone(built: tuple[Path, Path, PatchObject]) -> None:
    """What the record says of it would be refused, if it were to be written."""

    def change(record: Record, libc: Module, target: int) -> Contents:
        (item,) = record.contents.lookups
        return replace(record.contents, lookups=(replace(item, slot=target, before=target, build_id="00" * 20),))

    with opened(built) as (running, before):
        apply(running.pid, built[2])
        forge(running.pid, running.ask(TARGET)[0], change)
        revert(running.pid)
        assert running.ask(CONTENT, DEPTH) == [5, *before]


def test_a_record_that_was_never_in_force_is_nothing_to_believe(built: tuple[Path, Path, PatchObject]) -> None:
    """A patcher that was killed early has left a record whose segments are not mapped yet."""

    def change(record: Record, libc: Module, target: int) -> Contents:
        away = tuple(replace(item, start=item.start + (1 << 40)) for item in record.contents.segments)
        lookups = tuple(replace(item, stand_in=item.stand_in + (1 << 40)) for item in record.contents.lookups)
        return replace(record.contents, segments=away, lookups=lookups)

    with opened(built) as (running, before):
        apply(running.pid, built[2])
        revert(running.pid)
        address = forge(running.pid, running.ask(TARGET)[0], change)
        with Memory(running.pid) as memory:
            memory.write(address + STATE_OFFSET, state_word(State.PREPARED, FIRST_SLOT))
        apply(running.pid, built[2])
        assert running.ask(DEPTH) == [before[0] + 100]
        revert(running.pid)
        assert running.ask(DEPTH) == before


def test_a_record_that_was_never_in_force_says_nothing_of_a_slot(built: tuple[Path, Path, PatchObject]) -> None:
    """Its stand-in is that of another record, and what it says was there before is not written."""
    with opened(built) as (running, before):
        apply(running.pid, built[2])
        maps = mappings(running.pid)
        with Memory(running.pid) as memory:
            (record,), _ = find_records(maps, memory)
        (item,) = record.contents.lookups
        never = replace(item, before=item.before + 1)
        forged = replace(record, address=0, state=State.PREPARED, contents=replace(record.contents, lookups=(never,)))
        for records in ((record, forged), (forged, record)):
            assert Chains(records).without(item.stand_in, lambda _: True) == item.before
        revert(running.pid)
        assert running.ask(DEPTH) == before


def forge(pid: int, target: int, change: Callable[[Record, Module, int], Contents]) -> int:
    """Write other contents over those of the only record of a process, as it can itself; where the record is."""
    maps = mappings(pid)
    with Memory(pid) as memory:
        (record,), damaged = find_records(maps, memory)
        assert not damaged
        loaded = modules(maps, memory)
        (slot,) = lookup_slots(loaded, memory)
        libc = module_of(loaded, record.contents.lookups[0].passes_to)
        assert libc is not None
        assert re.match(r"ld-|libc", libc.name)
        assert slot.address == record.contents.lookups[0].slot
        memory.write(record.address + record.slot, encode_slot(change(record, libc, target)))
    return record.address
