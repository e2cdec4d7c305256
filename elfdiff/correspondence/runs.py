"""Runs of equal tokens of two sequences, for many pairs of sequences at once.

What is found is what Ratcliff and Obershelp's method finds ("Pattern Matching: the Gestalt Approach", Dr. Dobb's
Journal, July 1988), as Python's ``difflib`` has it: the longest common run, of several the first in the one
sequence and then in the other; then the same on its left and on its right. Runs below a minimum are not looked for,
which changes nothing about the others: a run is split off only where no longer one is left.

Here all pairs are worked on together by numpy: the runs of all pairs are found once, and every round takes the
longest of each stretch that is left and cuts the others to what remains on its two sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

CHUNK = 1 << 20
"""Pairs of equal places that are looked at in one go."""


@dataclass(frozen=True)
class Joined:
    """Sequences of tokens end to end; sequence k is ``tokens[bounds[k]:bounds[k + 1]]``."""

    tokens: Indices
    bounds: Indices


@dataclass(frozen=True)
class Runs:
    """Equal stretches: ``length`` tokens from ``old`` in the one and ``new`` in the other, both in joined tokens.

    ``pair`` says of which two sequences; sorted by pair, then by ``old``, and by ``new`` at the same time.
    """

    pair: Indices
    old: Indices
    new: Indices
    length: Indices


def longest_runs(old: Joined, new: Joined, pairs: Indices, minimum: int) -> Runs:
    """The runs of at least ``minimum`` tokens that sequences k of ``old`` and ``new`` share, k in ``pairs``."""
    found: list[Runs] = []
    todo = _maximal(old, new, pairs, minimum)
    stretch = todo.pair  # numbers of the stretches that are left, ascending
    while len(todo.pair):
        order = np.lexsort((todo.new, todo.old, -todo.length, stretch))
        best = order[np.unique(stretch[order], return_index=True)[1]]
        taken = Runs(todo.pair[best], todo.old[best], todo.new[best], todo.length[best])
        found.append(taken)
        which = np.searchsorted(stretch[best], stretch)
        todo, stretch = _cut(todo, taken, which, minimum)
    none = np.zeros(0, np.int64)
    pair, first, second, length = (
        np.concatenate([none, *(getattr(runs, name) for runs in found)]) for name in ("pair", "old", "new", "length")
    )
    order = np.lexsort((first, pair))
    return Runs(pair[order], first[order], second[order], length[order])


def _cut(todo: Runs, taken: Runs, which: Indices, minimum: int) -> tuple[Runs, Indices]:
    """What is left of each run on both sides of the one that was taken from its stretch, and new stretch numbers.

    ``which``: for each run, the index of the one taken.
    """
    low_old, low_new = taken.old[which], taken.new[which]
    high_old, high_new = low_old + taken.length[which], low_new + taken.length[which]
    before = np.minimum(todo.length, np.minimum(low_old - todo.old, low_new - todo.new))
    skip = np.maximum(0, np.maximum(high_old - todo.old, high_new - todo.new))
    after = todo.length - skip
    left, right = before >= minimum, after >= minimum
    pair = np.concatenate([todo.pair[left], todo.pair[right]])
    first = np.concatenate([todo.old[left], (todo.old + skip)[right]])
    second = np.concatenate([todo.new[left], (todo.new + skip)[right]])
    length = np.concatenate([before[left], after[right]])
    number = np.concatenate([2 * which[left], 2 * which[right] + 1])
    order = np.argsort(number, kind="stable")
    return Runs(pair[order], first[order], second[order], length[order]), number[order]


def _maximal(old: Joined, new: Joined, pairs: Indices, minimum: int) -> Runs:
    """All runs of at least ``minimum`` tokens that cannot be made longer at either end."""
    first, second = _windows(old, new, minimum)
    pair_old, place_old = _places(old, pairs, minimum)
    pair_new, place_new = _places(new, pairs, minimum)
    begins: list[tuple[Indices, Indices, Indices]] = []
    ends: list[tuple[Indices, Indices, Indices]] = []
    for p, a, b in _equal_places(first[place_old], pair_old, place_old, second[place_new], pair_new, place_new):
        goes_on = (a > old.bounds[p]) & (b > new.bounds[p])
        goes_on &= old.tokens[a - 1] == new.tokens[b - 1]
        begins.append((p[~goes_on], a[~goes_on], b[~goes_on]))
        a_end, b_end = a + minimum, b + minimum
        goes_on = (a_end < old.bounds[p + 1]) & (b_end < new.bounds[p + 1])
        inside = np.nonzero(goes_on)[0]
        goes_on[inside] = old.tokens[a_end[inside]] == new.tokens[b_end[inside]]
        ends.append((p[~goes_on], a_end[~goes_on], b_end[~goes_on]))
    p, a, b = _by_diagonal(begins)
    _, a_end, _ = _by_diagonal(ends)
    length = a_end - a
    order = np.argsort(p, kind="stable")
    return Runs(p[order], a[order], b[order], length[order])


def _by_diagonal(parts: list[tuple[Indices, Indices, Indices]]) -> tuple[Indices, Indices, Indices]:
    """Places by pair, by how far apart the two are, and by place: so begins and ends of runs stand side by side."""
    none = np.zeros(0, np.int64)
    p, a, b = (np.concatenate([none, *(part[k] for part in parts)]) for k in range(3))
    order = np.lexsort((a, b - a, p))
    return p[order], a[order], b[order]


def _windows(old: Joined, new: Joined, size: int) -> tuple[Indices, Indices]:
    """Per place a number for the ``size`` tokens that begin there, equal where and only where these are.

    The last ``size - 1`` places have none.
    """
    count_old = len(old.tokens)
    joined = np.concatenate([old.tokens, new.tokens])
    numbers = joined
    base = int(joined.max(initial=0)) + 1
    for k in range(1, size):
        combined = numbers[:-1] * base + joined[k:]  # both factors are below the number of tokens: no overflow
        numbers = np.unique(combined, return_inverse=True)[1].astype(np.int64)
    return numbers[:count_old], numbers[count_old:]


def _places(joined: Joined, pairs: Indices, size: int) -> tuple[Indices, Indices]:
    """(pair, place) of every window that lies inside its sequence."""
    counts = np.maximum(0, joined.bounds[pairs + 1] - joined.bounds[pairs] - size + 1)
    step = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(pairs, counts), np.repeat(joined.bounds[pairs], counts) + step


def _equal_places(
    first: Indices, pair_old: Indices, place_old: Indices, second: Indices, pair_new: Indices, place_new: Indices
) -> Iterator[tuple[Indices, Indices, Indices]]:
    """(pair, place in old, place in new) of equal windows of the same pair, in chunks of about ``CHUNK``."""
    scale = max(int(first.max(initial=0)), int(second.max(initial=0))) + 1
    key_old, key_new = pair_old * scale + first, pair_new * scale + second
    order = np.argsort(key_new, kind="stable")
    key_new, place_new = key_new[order], place_new[order]
    low = np.searchsorted(key_new, key_old, "left")
    counts = np.searchsorted(key_new, key_old, "right") - low
    some = np.nonzero(counts)[0]
    low, counts, total = low[some], counts[some], np.cumsum(counts[some])
    pair_old, place_old = pair_old[some], place_old[some]
    start = 0
    while start < len(some):
        done = int(total[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(total, done + CHUNK, "right")))
        part = counts[start:stop]
        step = np.arange(int(part.sum())) - np.repeat(np.cumsum(part) - part, part)
        right = place_new[np.repeat(low[start:stop], part) + step]
        yield np.repeat(pair_old[start:stop], part), np.repeat(place_old[start:stop], part), right
        start = stop
