"""Code that must not be live, and the search for it among many words at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CLUSTER_GAP = (
    1 << 20
)  # ranges that are further apart are looked for separately: between them lies other code


@dataclass(frozen=True, slots=True)
class ForbiddenRange:
    """Code that must not be live, absolute addresses [start, end).

    ``harmless_at_start``: a thread that is about to execute the first instruction does not count. True for
    an entry that gets a jump, unless code of the function itself leads back to it.
    """

    name: str
    start: int
    end: int
    harmless_at_start: bool = False


class ForbiddenRanges:
    """Forbidden ranges by rising address, prepared for searching."""

    def __init__(self, ranges: Iterable[ForbiddenRange]) -> None:
        """Raises ``ValueError`` where one is empty or two overlap."""
        self._ranges = sorted(ranges, key=lambda item: item.start)
        self._start_list = [item.start for item in self._ranges]
        self._starts = np.array(self._start_list, dtype=np.uint64)
        self._ends = np.array([item.end for item in self._ranges], dtype=np.uint64)
        self._harmless = np.array([item.harmless_at_start for item in self._ranges], dtype=np.bool_)
        if bool(np.any(self._starts >= self._ends)) or bool(np.any(self._starts[1:] < self._ends[:-1])):
            raise ValueError("forbidden ranges are empty or overlap")
        self._clusters = self._find_clusters()

    def __len__(self) -> int:
        """Number of ranges."""
        return len(self._ranges)

    @property
    def arrays(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.bool_]]:
        """Start, end and whether the start is harmless, of every range."""
        return self._starts, self._ends, self._harmless

    @property
    def clusters(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Lowest start, and distance to the highest end, of each group of neighbours."""
        lows = np.array([low for low, _ in self._clusters], dtype=np.uint64)
        return lows, np.array([span for _, span in self._clusters], dtype=np.uint64)

    def _find_clusters(self) -> list[tuple[np.uint64, np.uint64]]:
        """(lowest start, distance to the highest end) of each group of neighbours."""
        clusters: list[tuple[int, int]] = []
        for item in self._ranges:
            if clusters and item.start - clusters[-1][1] < _CLUSTER_GAP:
                clusters[-1] = (clusters[-1][0], item.end)
            else:
                clusters.append((item.start, item.end))
        return [(np.uint64(low), np.uint64(high - low)) for low, high in clusters]

    def return_addresses(self, words: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Indices of the words that may lead back into a range, ascending.

        A return address lies behind a call, so the end of a range counts and its start does not; but where
        the start is not harmless it counts, too, since a signal frame holds addresses of another kind.
        """
        inside = [np.flatnonzero(words - low <= span) for low, span in self._clusters]
        if not inside:
            return np.zeros(0, dtype=np.intp)
        candidates = inside[0] if len(inside) == 1 else np.sort(np.concatenate(inside))
        if not len(candidates):
            return candidates
        values = words[candidates]
        at = np.searchsorted(self._starts, values, side="right") - 1
        here, before = np.maximum(at, 0), np.maximum(at - 1, 0)
        harmless = self._harmless[here] & (values == self._starts[here])
        found = (at >= 0) & (values <= self._ends[here]) & ~harmless
        found |= (at >= 1) & (values == self._ends[before])
        return np.asarray(candidates[found], dtype=np.intp)

    def of_return_address(self, word: int) -> ForbiddenRange:
        """The range that ``return_addresses`` found a word for."""
        index = bisect_right(self._start_list, word) - 1
        if word == self._start_list[index] and index and word == self._ranges[index - 1].end:
            return self._ranges[index - 1]
        return self._ranges[index]

    def of_instruction(self, address: int, *, next_instruction: bool) -> ForbiddenRange | None:
        """The range that holds an instruction, or None.

        ``next_instruction``: it has not been executed yet; then a harmless start is no hit.
        """
        index = bisect_right(self._start_list, address) - 1
        if index < 0 or address >= self._ranges[index].end:
            return None
        found = self._ranges[index]
        if next_instruction and found.harmless_at_start and address == found.start:
            return None
        return found
