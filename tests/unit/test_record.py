"""The record: what is written comes back, and nothing else is taken for one."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elfdiff.errors import LivegraftError
from elfdiff.patchobject import Build
from patcher.records.record import (
    STATE_OFFSET,
    Contents,
    JournalEntry,
    RecordedFunction,
    RecordedSegment,
    State,
    decode_record,
    encode_record,
    encode_slot,
    free_slot,
    permissions,
    record_size,
    state_word,
)

ADDRESS = 0x7000_0000_0000
PATCH = "ab" * 32


def contents(**changes: object) -> Contents:
    base = Contents(
        patch=PATCH,
        instance="0011223344556677",
        tool_version="0.1.0",
        time=1_700_000_000,
        sealed=True,
        old=Build("prog", "aa" * 20, 0, 0x5000, False),
        old_bias=0x5555_5555_0000,
        new=Build("prog", "bb" * 20, 0, 0x6000, False),
        new_bias=-0x1000,
        eh_frame_hdr=None,
        segments=(RecordedSegment(0x5555_4555_0000, 0x2000, 5, "cc" * 16),),
        functions=(RecordedFunction("f", 0x5555_5555_1000, 32, 0x5555_4555_0100, 48, True),),
        journal=(JournalEntry(0x5555_5555_1000, b"\x90" * 5, b"\x90" * 5, b"\xe9\1\2\3\4"),),
        replaces=(),
        lifted=("struct-layout",),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_what_is_written_comes_back() -> None:
    record = decode_record(encode_record(contents()), ADDRESS)
    assert record.contents == contents()
    assert record.state is record.written is State.PREPARED
    assert record.size == record_size(contents()) == len(encode_record(contents()))


def test_the_state_word_is_one_aligned_word() -> None:
    assert STATE_OFFSET % 8 == 0
    data = bytearray(encode_record(contents()))
    data[STATE_OFFSET : STATE_OFFSET + 8] = state_word(State.REVERTING, 64)
    assert decode_record(bytes(data), ADDRESS).state is State.REVERTING


def test_the_slot_not_in_force_can_be_rewritten_and_put_in_force_by_the_state_word() -> None:
    data = bytearray(encode_record(contents()))
    before = decode_record(bytes(data), ADDRESS)
    later = contents(replaces=("99" * 8,), instance="8899aabbccddeeff")
    slot = free_slot(before, encode_slot(later))
    assert slot is not None and slot != before.slot and slot % 8 == 0
    data[slot : slot + len(encode_slot(later))] = encode_slot(later)
    assert decode_record(bytes(data), ADDRESS).contents == contents()
    data[STATE_OFFSET : STATE_OFFSET + 8] = state_word(State.APPLYING, slot)
    after = decode_record(bytes(data), ADDRESS)
    assert (after.contents, after.state) == (later, State.APPLYING)
    assert free_slot(after, encode_slot(contents())) == before.slot


def test_a_slot_that_does_not_fit_is_not_offered() -> None:
    record = decode_record(encode_record(contents()), ADDRESS)
    entry = contents().journal[0]
    many = contents(journal=tuple(replace(entry, address=n * 16) for n in range(1000)))
    assert free_slot(record, encode_slot(many)) is None


def refuses(data: bytes, why: str) -> None:
    with pytest.raises(LivegraftError) as caught:
        decode_record(data, ADDRESS)
    assert why in caught.value.why


def test_every_kind_of_damage_is_named() -> None:
    good = encode_record(contents())
    refuses(b"", "no header")
    refuses(good[:-4096], "the mapping has")
    refuses(good.replace(b"LVGRAFT", b"LVGRAFX", 1), "no header")
    refuses(good[:8] + struct.pack("<I", 9) + good[12:], "format is 9")
    refuses(good[:STATE_OFFSET] + state_word(State.APPLIED, 72) + good[STATE_OFFSET + 8 :], "state word")
    refuses(good[:STATE_OFFSET] + struct.pack("<Q", 64 << 32 | 77) + good[STATE_OFFSET + 8 :], "state word")
    refuses(good[:64] + struct.pack("<Q", 1 << 40) + good[72:], "bytes long")
    refuses(good.replace(b'"patch"', b'"hctap"', 1), "digest")


@pytest.mark.parametrize(
    "wrong",
    [
        {"functions": "text"},
        {"functions": ({"name": 1},)},
        {"time": -1},
        {"time": True},
        {"patch": "not hex"},
        {"old_bias": 1 << 70},
        {"sealed": 1},
        {"segments": (RecordedSegment(1, 4096, 5, ""),)},
        {"journal": (JournalEntry(16, b"1", b"22", b"3"),)},
        {"eh_frame_hdr": "x"},
    ],
)
def test_a_text_with_the_right_digest_and_wrong_fields_is_refused(wrong: dict[str, object]) -> None:
    # The target computes a digest as well as we do, so the digest proves nothing about the fields.
    with pytest.raises(LivegraftError):
        decode_record(encode_record(contents(**wrong)), ADDRESS)


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 8191), st.integers(1, 255))
def test_flipped_and_random_bytes_give_a_record_or_a_clear_error(noise: bytes, at: int, flip: int) -> None:
    data = bytearray(encode_record(contents()))
    data[at % len(data)] ^= flip
    for candidate in (bytes(data), noise, encode_record(contents())[:72] + noise):
        try:
            decode_record(candidate, ADDRESS)
        except LivegraftError as error:
            assert error.why


def test_permissions_are_written_as_the_kernel_does() -> None:
    assert [permissions(flags) for flags in (4, 5, 6, 0)] == ["r--p", "r-xp", "rw-p", "---p"]
