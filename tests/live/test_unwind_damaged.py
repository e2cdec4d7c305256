"""Unwind tables that are damaged in the memory of a running process: what they no longer say counts as live."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from elfdiff.unwinding.ehframe import read_fde_table
from fixtures.stacks import Stacks, compile_program, run_stacks
from patcher.process.memory import Memory
from patcher.process.proc import mappings
from patcher.stacks.forbidden import ForbiddenRange
from patcher.stacks.quiescence import LiveFrame, StackCheck
from patcher.stacks.unwindtables import unwind_tables
from patcher.threads.stopping import seize

pytestmark = pytest.mark.root

PATIENCE = 60.0
"""Seconds for a thread to stop: on a busy machine it may have to wait for a processor."""

THREAD = "dirty"
"""It waits in over_stains(), whose frame holds words of stain(), which has returned."""
MIDDLE = "over_stains"
_INSTRUCTIONS = 17  # from the start of an FDE of gcc: length, CIE, start and size of 4 bytes each, no augmentation


@dataclass(frozen=True)
class Place:
    """Where the tables of the program are in its memory."""

    header: int
    fde: int
    fde_size: int
    cie: int


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stacks]:
    flags = ("-O2", "-fno-optimize-sibling-calls")
    program = compile_program("stacks.c", tmp_path_factory.mktemp("damaged") / "stacks", *flags)
    with run_stacks(program) as running:
        running.wait_for_main()
        yield running


@pytest.fixture(scope="module")
def place(stacks: Stacks) -> Place:
    with Memory(stacks.pid) as memory:
        header = next(t.eh_frame_hdr for t in unwind_tables(mappings(stacks.pid), memory) if t.name == "stacks")
        assert header is not None
        table = read_fde_table(header, memory.read)
        fde = int(table.addresses[table.find(stacks.function(MIDDLE).start)])
        size, cie = (int.from_bytes(memory.read(fde + offset, 4), "little") for offset in (0, 4))
    return Place(header, fde, 4 + size, fde + 4 - cie)


@contextmanager
def damaged(memory: Memory, address: int, data: bytes) -> Iterator[None]:
    """The program's memory is other there meanwhile; nothing of its own looks at it."""
    before = memory.read(address, len(data))
    assert before != data
    memory.write(address, data)
    try:
        yield
    finally:
        memory.write(address, before)


def live_in_thread(stacks: Stacks, memory: Memory) -> list[LiveFrame]:
    function = stacks.function("stain")
    with (
        StackCheck(memory, [ForbiddenRange("stain", function.start, function.end, True)]) as check,
        seize(stacks.pid) as process,
    ):
        process.stop(PATIENCE)
        return [frame for frame in check.check(process.threads).live if frame.tid == stacks.tids[THREAD]]


TABLES = {
    "search table": ("header", 0, b"\x09", "damaged"),
    "number of functions": ("header", 8, b"\xff\xff\xff\x7f", "damaged"),
    "length of an entry": ("fde", 0, b"\xf0\xff\xff\xff", "damaged"),
    "common entry": ("cie", 8, b"\x63", "damaged"),
    "augmentation": ("cie", 9, b"zQ", "damaged"),
}
INSTRUCTIONS = {
    "unknown instruction": (b"\x3f", "is not known"),
    "restore without remember": (b"\x0b", "restore_state without remember_state"),
    "register that a call destroys": (b"\x0c\x01\x08", "value of register 1 is not known"),
    "expression that finds nothing": (b"\x0f\x01\x22", "its stack is empty"),
    "endless expression": (b"\x0f\x03\x2f\xfd\xff", "does not end"),
    "unreadable return address": (b"\x0c\x07\x88\x80\x80\x80\x80\x80\x10", "could not be read"),
    "register saved in another frame": (b"\x0e\x90\x80\x01\x11\x06\x7e", "saved outside of the frame"),
    "frame of no size": (b"\x0e\x00", "does not go up"),
    "return address that stays": (b"\x08\x10", "more than 1024 frames"),
}
"""Call frame instructions (DWARF 5, 6.4.2) in place of the function's own, and a part of the reason that is given."""


def test_the_tables_clear_what_is_left_over(stacks: Stacks) -> None:
    with Memory(stacks.pid) as memory:
        assert live_in_thread(stacks, memory) == []


@pytest.mark.parametrize("what", TABLES)
def test_a_damaged_table(stacks: Stacks, place: Place, what: str) -> None:
    name, offset, data, reason = TABLES[what]
    with Memory(stacks.pid) as memory:
        with damaged(memory, getattr(place, name) + offset, data):
            (frame,) = live_in_thread(stacks, memory)
        assert not frame.certain and frame.name == "stain" and reason in frame.why
        assert live_in_thread(stacks, memory) == []


@pytest.mark.parametrize("what", INSTRUCTIONS)
def test_damaged_instructions(stacks: Stacks, place: Place, what: str) -> None:
    code, reason = INSTRUCTIONS[what]
    room = place.fde_size - _INSTRUCTIONS
    assert len(code) <= room, "the compiler describes the function with fewer instructions"
    with Memory(stacks.pid) as memory, damaged(memory, place.fde + _INSTRUCTIONS, code.ljust(room, b"\0")):
        (frame,) = live_in_thread(stacks, memory)
    assert not frame.certain and frame.name == "stain" and reason in frame.why
