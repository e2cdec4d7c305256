"""Room for a patch within 2 GiB of the image that it patches.

A rel32 reference reaches 2 GiB to either side (x86-64 psABI 1.0, small code model), so every byte of the
patch must be that near to every byte of the image. Pure: mappings in, addresses out. Whether an address is
still free is known only to mmap with MAP_FIXED_NOREPLACE, so there are several candidates, to be tried in
order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..process.obstacles import no_room
from ..process.proc import Mapping

_PAGE = 4096
_REACH = (1 << 31) - _PAGE  # a page of slack: a displacement counts from the end of its instruction
_ABS32_LIMIT = 1 << 31  # R_X86_64_32S sign-extends
_USER_LIMIT = (1 << 47) - _PAGE  # highest user address with four-level page tables
MARGIN = 16 * _PAGE
"""Bytes kept free on either side, so that no mapping of the program merges with one of ours."""
STACK_RESERVE = 256 << 20
"""Bytes kept free below the main stack, at least, for it to grow into."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What placement must know of a process: its mappings by rising address, and where growth is to be
    expected.

    ``start_brk`` is where the heap of brk(2) begins (0: unknown); ``stack_reserve`` how many bytes below the
    mapping ``[stack]`` are kept for it; ``lowest`` is the lowest address that may be mapped.
    """

    mappings: tuple[Mapping, ...]
    start_brk: int
    lowest: int
    stack_reserve: int = STACK_RESERVE


@dataclass(frozen=True, slots=True)
class _Room:
    """A free range [start, end) in which a block may be placed; ``last_resort`` where the heap may come."""

    start: int
    end: int
    last_resort: bool = False


def candidates(around: Surroundings, low: int, high: int, size: int, fixed_address: bool) -> tuple[int, ...]:
    """Return page-aligned addresses for a block of ``size`` bytes, best first.

    [low, high) is the image, absolute. With ``fixed_address`` the block stays below 2 GiB as a whole, because
    such code holds 32-bit absolute addresses. Nearest to the image is best, but inside the area into which
    the heap grows only its far end is offered, and last. Raises Refused where there is no room.
    """
    block = -(-size // _PAGE) * _PAGE
    window_low = max(high - _REACH, around.lowest)
    window_high = min(low + _REACH, _ABS32_LIMIT if fixed_address else _USER_LIMIT)
    found: list[tuple[bool, int, int]] = []
    for room in _rooms(around):
        start, end = max(room.start, window_low), min(room.end, window_high)
        for base in _bases(start, end, block, low, room.last_resort):
            found.append((room.last_resort, _distance(base, block, low, high), base))
    if not found:
        raise no_room(low, block, (window_low, window_high)).as_error()
    return tuple(dict.fromkeys(base for _, _, base in sorted(found)))


def _distance(base: int, block: int, low: int, high: int) -> int:
    return base - high if base >= high else low - (base + block)


def _bases(start: int, end: int, block: int, low: int, far_only: bool) -> Iterator[int]:
    first = -(-(start + MARGIN) // _PAGE) * _PAGE
    last = (end - MARGIN - block) // _PAGE * _PAGE
    if first > last:
        return
    if far_only:
        yield last
        return
    nearest, farthest = (last, first) if end <= low else (first, last)
    yield nearest
    # Where the program has just taken the nearest place, one a little further off is likely to be free.
    yield nearest + (farthest - nearest) // 16 // _PAGE * _PAGE
    yield farthest


def _rooms(around: Surroundings) -> Iterator[_Room]:
    heap_found = not around.start_brk
    for start, end in _gaps(around):
        if heap_found or end <= around.start_brk:
            yield _Room(start, end)
            continue
        # The first gap that ends above start_brk is the one that the heap grows into.
        heap_found = True
        if start < around.start_brk:
            yield _Room(start, around.start_brk)
        yield _Room(max(start, around.start_brk), end, last_resort=True)


def _gaps(around: Surroundings) -> Iterator[tuple[int, int]]:
    position = around.lowest
    for mapping in around.mappings:
        reserve = around.stack_reserve if mapping.path == "[stack]" else 0
        if mapping.start - reserve > position:
            yield position, mapping.start - reserve
        position = max(position, mapping.end)
    if position < _USER_LIMIT:
        yield position, _USER_LIMIT


def stack_reserve(soft_limit: int | None) -> int:
    """Return how many bytes to keep free below the stack, given RLIMIT_STACK (None: unlimited)."""
    if soft_limit is None:
        # Without a limit the kernel lays mappings out bottom-up, far away from the stack.
        return STACK_RESERVE
    return max(STACK_RESERVE, soft_limit)
