"""Relocating a patch, and refusing one that contradicts itself."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elfdiff.errors import BadInput, Refused
from elfdiff.patchobject import (
    FIRST_IMPORT,
    OLD_IMAGE,
    PATCH_IMAGE,
    RELOCATION_DTYPE,
    Build,
    CheckedRange,
    PatchFunction,
    PatchObject,
    Reason,
    RelocationType,
    Segment,
)
from patcher.planning.binding import Binding, _require_sound, overlay, relocate
from patcher.process.modules import Module

Row = tuple[int, int, int, int]
OLD_BIAS = 0x5555_5555_0000
PATCH_BIAS = 0x5555_4000_0000
IMPORTS = (0x7F00_1234_5678, 0x7F00_0000_1000)
TEXT = Segment(0x1000, 0x2000, 5, bytes(range(256)) * 20)
DATA = Segment(0x4000, 0x1000, 4, b"constant")


def patch(*rows: Row, segments: tuple[Segment, ...] = (TEXT, DATA), **changes: object) -> PatchObject:
    base = PatchObject(
        id="ab" * 32,
        tool_version="test",
        old=Build("prog", "aa" * 20, 0, 0x10000, False),
        new=Build("prog", "bb" * 20, 0, 0x10000, False),
        segments=segments,
        functions=(),
        imports=(),
        relocations=np.array(sorted(rows), dtype=RELOCATION_DTYPE),
        checked=(),
        findings=(),
        removed=(),
        line_only=(),
        eh_frame_hdr=None,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def bound(*rows: Row) -> list[bytes]:
    module = Module("/bin/prog", "aa" * 20, OLD_BIAS, OLD_BIAS, OLD_BIAS + 0x10000, False, False, (), ())
    return [item.data for item in relocate(Binding(patch(*rows), module, IMPORTS), PATCH_BIAS)]


def test_segments_come_out_page_by_page_at_their_place() -> None:
    module = Module("/bin/prog", "aa" * 20, OLD_BIAS, OLD_BIAS, OLD_BIAS + 0x10000, False, False, (), ())
    text, data = relocate(Binding(patch(), module, ()), PATCH_BIAS)
    assert (text.start, text.end, text.flags) == (PATCH_BIAS + 0x1000, PATCH_BIAS + 0x3000, 5)
    assert text.data == TEXT.data + bytes(0x2000 - len(TEXT.data))
    assert data.data == b"constant" + bytes(0x1000 - 8)


def test_each_kind_is_written_by_its_formula() -> None:
    text, data = bound(
        (0x1010, RelocationType.PC32, OLD_IMAGE, 0x2000 - 4),
        (0x1020, RelocationType.ABS64, FIRST_IMPORT + 1, 8),
        (0x4000, RelocationType.ABS64, PATCH_IMAGE, 0x1010),
        (0x4FF8, RelocationType.ABS64, OLD_IMAGE, -1),
    )
    (distance,) = struct.unpack_from("<i", text, 0x10)
    assert PATCH_BIAS + 0x1014 + distance == OLD_BIAS + 0x2000
    assert struct.unpack_from("<Q", text, 0x20) == (IMPORTS[1] + 8,)
    assert struct.unpack_from("<Q", data) == (PATCH_BIAS + 0x1010,)
    assert struct.unpack_from("<Q", data, 0xFF8) == (OLD_BIAS - 1,)
    assert text[0x14:0x20] == TEXT.data[0x14:0x20]


def test_32_bit_absolute_fields_hold_low_addresses_only() -> None:
    module = Module("/bin/prog", "aa" * 20, 0, 0x400000, 0x500000, True, False, (), ())
    rows = ((0x1000, RelocationType.ABS32, OLD_IMAGE, 0x404040), (0x1004, RelocationType.ABS32S, OLD_IMAGE, -2))
    text, _ = relocate(Binding(patch(*rows), module, ()), 0x300000)
    assert struct.unpack_from("<Ii", text.data) == (0x404040, -2)
    for kind, addend in ((RelocationType.ABS32, -1), (RelocationType.ABS32S, 1 << 31)):
        with pytest.raises(Refused, match="do not reach"):
            relocate(Binding(patch((0x1000, kind, OLD_IMAGE, addend)), module, ()), 0)


def test_a_reference_out_of_reach_is_refused() -> None:
    with pytest.raises(Refused, match="1 references of the patch do not reach"):
        bound((0x1000, RelocationType.PC32, FIRST_IMPORT, 0))


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (((0x1000, 7, OLD_IMAGE, 0),), "type 7"),
        (((0x1000, RelocationType.ABS64, FIRST_IMPORT + 2, 0),), "not listed"),
        (((0x2FFC, RelocationType.ABS64, OLD_IMAGE, 0),), "not inside a segment"),
        (((0x3000, RelocationType.PC32, OLD_IMAGE, 0),), "not inside a segment"),
        (((0x1000, RelocationType.ABS64, OLD_IMAGE, 0), (0x1004, RelocationType.PC32, OLD_IMAGE, 0)), "overlap"),
        (((0x1000, RelocationType.ABS64, OLD_IMAGE, 1 << 62),), "48 bits"),
        (((0xFFFF_FFFF_FFFF_FFFF, RelocationType.ABS64, OLD_IMAGE, 0),), "48 bits"),
    ],
)
def test_relocations_that_make_no_sense_are_bad_input(rows: tuple[Row, ...], why: str) -> None:
    with pytest.raises(BadInput) as caught:
        bound(*rows)
    assert why in caught.value.why


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 0x1FF),  # places 16 bytes apart never overlap
            st.sampled_from([RelocationType.ABS64, RelocationType.PC32]),
            st.sampled_from([OLD_IMAGE, PATCH_IMAGE]),
            st.integers(-(1 << 20), 1 << 20),
        ),
        unique_by=lambda row: row[0],
    )
)
def test_all_at_once_is_the_same_as_one_by_one(rows: list[Row]) -> None:
    placed = [(0x1000 + 16 * place, *rest) for place, *rest in rows]
    expected = bytearray(TEXT.data.ljust(TEXT.size, b"\0"))
    for place, kind, symbol, addend in placed:
        value = (OLD_BIAS, PATCH_BIAS)[symbol] + addend
        if kind == RelocationType.PC32:
            struct.pack_into("<i", expected, place - 0x1000, value - place - PATCH_BIAS)
        else:
            struct.pack_into("<Q", expected, place - 0x1000, value)
    assert bound(*placed)[0] == expected  # type: ignore[arg-type]


def function(**changes: object) -> PatchFunction:
    base = PatchFunction("f", Reason.CODE, 0x1100, 32, 0x900, 32, True)
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"segments": (Segment(0x1000, 0x1000, 7, b""),)},
        {"segments": (Segment(0x1001, 0x1000, 5, b""),)},
        {"segments": (Segment(0x1000, 4, 5, b"12345"),)},
        {"segments": (TEXT, Segment(0x2000, 0x1000, 4, b""))},
        {"functions": (function(new_start=0x4000),)},
        {"functions": (function(new_size=0x10000),)},
        {"functions": (function(old_start=None, old_size=None),)},
        {"functions": (function(),)},
        {"functions": (function(),), "checked": (CheckedRange("f", 0x900, 31, ""),)},
    ],
)
def test_a_patch_that_contradicts_itself_is_bad_input(changes: dict[str, object]) -> None:
    _require_sound(patch())
    _require_sound(patch(functions=(function(),), checked=(CheckedRange("f", 0x900, 32, ""),)))
    with pytest.raises(BadInput, match="contradicts itself"):
        _require_sound(patch(**changes))  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=64), st.integers(-20, 80), st.binary(min_size=1, max_size=16))
def test_overlay_lays_bytes_where_they_are_and_nowhere_else(data: bytes, offset: int, piece: bytes) -> None:
    out = overlay(1000, data, {1000 + offset: piece})
    assert len(out) == len(data)
    for index, byte in enumerate(out):
        inside = 0 <= index - offset < len(piece)
        assert byte == (piece[index - offset] if inside else data[index])
