"""What C takes for a word that matters is what Python does, but for words in the code that handlers return to."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patcher.stacks.forbidden import ForbiddenRange, ForbiddenRanges
from patcher.stacks.frames_x86_64 import RESTORER_SIZE
from patcher.stacks.stacksift import StackSift
from patcher.threads import batch

FAR = 0x7F00_0000_0000

pytestmark = pytest.mark.skipif(batch.active() is None, reason=f"the pause is made in {batch.description()}")


@st.composite
def disjoint_ranges(draw: st.DrawFn) -> list[ForbiddenRange]:
    """Ranges that touch, lie close, or far away from each other."""
    steps = st.sampled_from([0, 1, 5, 64, 1 << 20, 1 << 30])
    end = draw(st.sampled_from([0x1000, 0x5555_0000_0000, FAR]))
    found = []
    for number in range(draw(st.integers(0, 8))):
        start = end + draw(steps)
        end = start + draw(st.integers(1, 40))
        found.append(ForbiddenRange(f"f{number}", start, end, draw(st.booleans())))
    return found


@settings(deadline=None)
@given(st.data(), disjoint_ranges(), st.lists(st.integers(FAR - 100, FAR + 100), max_size=3))
def test_a_word_matters_exactly_if_python_says_so(
    data: st.DataObject, ranges: list[ForbiddenRange], restorers: list[int]
) -> None:
    edges = [edge for item in ranges for edge in (item.start, item.end)] + restorers or [0]
    near = st.builds(lambda edge, off: (edge + off) % (1 << 64), st.sampled_from(edges), st.integers(-12, 12))
    words = np.array(data.draw(st.lists(near | st.integers(0, (1 << 64) - 1), max_size=6)), dtype=np.uint64)
    forbidden = ForbiddenRanges(ranges)
    sift = StackSift(os.getpid(), forbidden, 1 << 20, 1 << 20)
    sift.set_restorers(restorers)
    returning = any(start <= word < start + RESTORER_SIZE for word in words.tolist() for start in restorers)
    assert sift.matters(words) == (bool(len(forbidden.return_addresses(words))) or returning)
