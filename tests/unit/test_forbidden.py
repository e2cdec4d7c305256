"""The search for words that lead into forbidden ranges, against a search one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patcher.stacks.forbidden import ForbiddenRange, ForbiddenRanges


def leads_into(word: int, item: ForbiddenRange) -> bool:
    return item.start < word <= item.end or (word == item.start and not item.harmless_at_start)


@st.composite
def some_ranges(draw: st.DrawFn) -> list[ForbiddenRange]:
    """Neighbours, ranges far apart, and both ends of the address space."""
    ranges = []
    place = draw(st.sampled_from([0, 0x1000, 0x5555_0000_0000]))
    for number in range(draw(st.integers(0, 6))):
        start = place + draw(st.sampled_from([0, 1, 16, 4096, 1 << 20, 1 << 40]))
        place = start + draw(st.integers(1, 64))
        ranges.append(ForbiddenRange(str(number), start, place, draw(st.booleans())))
    return draw(st.permutations(ranges))


@given(some_ranges(), st.data())
def test_return_addresses(ranges: list[ForbiddenRange], data: st.DataObject) -> None:
    edges = [
        edge + d for item in ranges for edge in (item.start, item.end) for d in (-1, 0, 1) if edge + d >= 0
    ]
    words = data.draw(st.lists(st.one_of(st.sampled_from([*edges, 7]), st.integers(0, (1 << 64) - 1))))
    found = ForbiddenRanges(ranges).return_addresses(np.array(words, dtype=np.uint64)).tolist()
    assert found == [n for n, word in enumerate(words) if any(leads_into(word, item) for item in ranges)]
    for index in found:
        named = ForbiddenRanges(ranges).of_return_address(words[index])
        assert leads_into(words[index], named)


@given(some_ranges(), st.data(), st.booleans())
def test_instructions(ranges: list[ForbiddenRange], data: st.DataObject, next_instruction: bool) -> None:
    edges = [
        edge + d for item in ranges for edge in (item.start, item.end) for d in (-1, 0, 1) if edge + d >= 0
    ]
    address = data.draw(st.sampled_from([*edges, 7]))
    expected = [
        item
        for item in ranges
        if item.start <= address < item.end
        and not (next_instruction and item.harmless_at_start and address == item.start)
    ]
    found = ForbiddenRanges(ranges).of_instruction(address, next_instruction=next_instruction)
    assert [found] == (expected or [None])


def test_no_ranges() -> None:
    assert ForbiddenRanges([]).return_addresses(np.arange(10, dtype=np.uint64)).tolist() == []
    assert ForbiddenRanges([]).of_instruction(5, next_instruction=True) is None


@pytest.mark.parametrize(
    "ranges", [[(16, 16)], [(16, 8)], [(0, 16), (15, 20)], [(0, 16), (0, 16)], [(0, 100), (10, 20)]]
)
def test_empty_or_overlapping_ranges(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="overlap"):
        ForbiddenRanges(ForbiddenRange("f", start, end) for start, end in ranges)
