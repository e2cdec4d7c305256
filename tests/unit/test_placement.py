"""Where a patch is put: near enough, in nobody's way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elfdiff.errors import Refused
from patcher.planning.placement import MARGIN, STACK_RESERVE, Surroundings, candidates, stack_reserve
from patcher.process.proc import Mapping

PAGE = 4096
GIB = 1 << 30


def mapping(start: int, end: int, path: str = "", perms: str = "rw-p") -> Mapping:
    return Mapping(start, end, perms, 0, "00:00", 0, path)


def around(*maps: Mapping, start_brk: int = 0, lowest: int = 65536) -> Surroundings:
    return Surroundings(tuple(maps), start_brk, lowest)


IMAGE = mapping(0x5555_5555_0000, 0x5555_5565_0000, "/bin/x", "r-xp")
STACK = mapping(0x7FFF_F000_0000, 0x7FFF_F010_0000, "[stack]")


def place(where: Surroundings, size: int = PAGE, fixed: bool = False, image: Mapping = IMAGE) -> tuple[int, ...]:
    return candidates(where, image.start, image.end, size, fixed)


def test_the_nearest_room_is_first() -> None:
    bases = place(around(IMAGE, STACK), 3 * PAGE)
    assert bases[0] in (IMAGE.end + MARGIN, IMAGE.start - MARGIN - 3 * PAGE)


def test_the_growth_area_of_the_heap_is_the_last_resort() -> None:
    heap = mapping(IMAGE.end + PAGE, IMAGE.end + 16 * PAGE, "[heap]")
    bases = place(around(IMAGE, heap, STACK, start_brk=heap.start))
    assert bases[0] < IMAGE.start
    above = [base for base in bases if base > IMAGE.end]
    assert bases.index(above[0]) == len(bases) - len(above)
    assert all(base > heap.end + GIB for base in above)


def test_a_heap_that_does_not_exist_yet_is_kept_free_too() -> None:
    start_brk = IMAGE.end + 100 * PAGE
    bases = place(around(IMAGE, STACK, start_brk=start_brk), 200 * PAGE)
    assert not [base for base in bases if base + 200 * PAGE > start_brk and base < start_brk + GIB]


def test_room_between_the_image_and_a_far_heap_is_used() -> None:
    start_brk = IMAGE.end + 1000 * PAGE
    assert IMAGE.end + MARGIN in place(around(IMAGE, STACK, start_brk=start_brk))[:2]


def test_the_stack_keeps_its_reserve() -> None:
    library = mapping(STACK.start - 300 * (1 << 20), STACK.start - 290 * (1 << 20), "/lib/y")
    bases = place(around(library, STACK), 1 << 20, image=library)
    assert all(base + (1 << 20) <= STACK.start - STACK_RESERVE or base > STACK.end for base in bases)


def test_a_fixed_image_is_patched_below_two_gib() -> None:
    image = mapping(0x400000, 0x500000, "/bin/x", "r-xp")
    heap = mapping(0x2000000, 0x2100000, "[heap]")
    bases = place(around(image, heap, STACK, start_brk=heap.start), 16 * PAGE, True, image)
    assert all(base >= 65536 and base + 16 * PAGE <= 1 << 31 for base in bases)


def test_no_room_is_refused_with_the_window() -> None:
    below = mapping(65536, 0x400000)
    image = mapping(0x400000, 0x500000, "/bin/x", "r-xp")
    above = mapping(0x500000, 1 << 32)
    with pytest.raises(Refused, match="no room"):
        place(around(below, image, above), PAGE, True, image)


def test_reserve_follows_the_stack_limit() -> None:
    assert stack_reserve(None) == STACK_RESERVE == stack_reserve(8 << 20)
    assert stack_reserve(4 * GIB) == 4 * GIB


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Surroundings, Mapping]:
    base = draw(st.sampled_from([0x400000, 0x5555_5555_0000, 0x7F00_0000_0000]))
    image = mapping(base, base + PAGE * draw(st.integers(1, 5000)), "/bin/x", "r-xp")
    maps = [image]
    position = image.end
    for _ in range(draw(st.integers(0, 6))):
        position += PAGE * draw(st.integers(0, 300_000))
        end = position + PAGE * draw(st.integers(1, 300_000))
        maps.append(mapping(position, end, draw(st.sampled_from(["", "[stack]", "/lib/y"]))))
        position = end
    brk = draw(st.sampled_from([0, image.end, image.end + 33 * PAGE]))
    return around(*maps, start_brk=brk), image


@settings(deadline=None)
@given(layouts(), st.integers(1, 1 << 26), st.booleans())
def test_every_candidate_is_free_and_reachable(layout: tuple[Surroundings, Mapping], size: int, fixed: bool) -> None:
    where, image = layout
    fixed = fixed and image.start == 0x400000
    try:
        bases = place(where, size, fixed, image)
    except Refused:
        return
    assert bases and len(set(bases)) == len(bases)
    for base in bases:
        end = base + -(-size // PAGE) * PAGE
        assert base % PAGE == 0 and base >= where.lowest
        assert image.end - base < 1 << 31 and end - image.start < 1 << 31
        assert not fixed or end <= 1 << 31
        below = 0
        for item in where.mappings:
            # A stack cannot grow through what lies below it, so no more than that gap is its own.
            reserve = min(STACK_RESERVE, item.start - below) if item.path == "[stack]" else 0
            assert end + MARGIN <= item.start - reserve or base - MARGIN >= item.end or end <= below
            below = item.end
