"""Constants that only changed functions name, and that stay the running program's own all the same."""

from __future__ import annotations

import numpy as np

from elfdiff.decoding.code import Code
from elfdiff.differences.comparison import Comparison
from elfdiff.images.image import Kind


def surviving_constant(comparison: Comparison, target: int) -> int | None:
    """The old address of a constant that surviving instructions of changed functions name; None where it differs.

    The program may know it by its address, so that it must not be copied without need. As far as it may reach, both
    builds must name the same places and hold the same bytes; pointers in it are left to the patch.
    """
    old, new, known = comparison.old.image, comparison.new.image, comparison.addresses.old_of
    if target not in known:
        return None
    at = known[target][0]
    sections = old.section_at(at), new.section_at(target)
    if sections[0] is None or sections[1] is None or {s.kind for s in sections if s} != {Kind.CONSTANT}:
        return None
    o, n = at, target
    while n < sections[1].end:
        size = _following(comparison.new, n, sections[1].end) - n
        raw = new.read(n, size)
        if _following(comparison.old, o, sections[0].end) - o != size or old.read(o, size) != raw:
            return None
        text = new.string_at(n)
        o, n = o + size, n + size
        is_string = bool(text) and raw.rstrip(b"\0") == text
        if is_string or (n in known and comparison.constants.same(known[n][0], n)):
            break
    ends = (old.relative_places, at, o), (new.relative_places, target, n)
    plain = all(np.searchsorted(slots, low) == np.searchsorted(slots, high) for slots, low, high in ends)
    return at if plain else None


def _following(code: Code, address: int, end: int) -> int:
    """The next named address, at most ``end``."""
    following = code.next_named(address)
    return min(end, following) if following is not None else end
