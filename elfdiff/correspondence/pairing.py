"""References side by side: which reference of a new function stands where one of its old counterpart stood.

Two functions with the same masked bytes make their references at the same places (``paired``); in a function that
changed, the instructions that survived are aligned first (``Alignments``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elfdiff.correspondence.runs import Joined, longest_runs
from elfdiff.decoding.code import Code, References

Indices = NDArray[np.int64]

MAX_ALIGNMENT = 25_000_000
"""Product of instruction counts above which two changed functions are not aligned (the search is quadratic)."""
MIN_RUN = 3
"""Shortest run of equal instructions that counts as the same code."""
BATCH = 1 << 18
"""Instructions whose functions are aligned in one go; bounds the memory that it takes."""
_TOKEN_WORDS = 2
"""64-bit words of a token: no instruction is longer than 15 bytes."""


def paired(old: Code, new: Code, pairs: NDArray[np.int64]) -> tuple[Indices, Indices]:
    """Reference indices side by side for function pairs (n, 2) whose masked bytes are equal.

    Internal references are left out. Pairs whose reference counts differ contribute nothing.
    """
    a, b = old.references, new.references
    i, j = pairs[:, 0], pairs[:, 1]
    counts = a.last[i] - a.first[i]
    same = counts == b.last[j] - b.first[j]
    i, j, counts = i[same], j[same], counts[same]
    step = _steps(counts)
    left, right = np.repeat(a.first[i], counts) + step, np.repeat(b.first[j], counts) + step
    outside = ~(a.internal[left] & b.internal[right])
    return left[outside], right[outside]


def distinct(first: Indices, second: Indices) -> tuple[NDArray[np.int64], Indices, Indices]:
    """Different pairs (n, 2) of numbers side by side, sorted; which of them each is; how often each occurs.

    What ``numpy.unique`` gives for ``axis=0``, in a tenth of the time.
    """
    order = np.lexsort((second, first))
    a, b = first[order], second[order]
    fresh = np.ones(len(a), np.bool_)
    fresh[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    at = np.nonzero(fresh)[0]
    which = np.empty(len(a), np.int64)
    which[order] = np.cumsum(fresh) - 1
    return np.stack([a[at], b[at]], axis=1), which, np.diff(at, append=len(a))


@dataclass(frozen=True)
class Survivors:
    """Instructions of changed functions that correspond, as offsets into the code of each build.

    ``pair``: which of the function pairs asked for (sorted); ``old`` and ``new`` ascend within each.
    """

    pair: Indices
    old: Indices
    new: Indices


class Alignments:
    """The alignments of two builds' changed functions; each pair is aligned once, however often it is asked for."""

    def __init__(self, old: Code, new: Code) -> None:
        """Nothing is aligned yet."""
        self.old, self.new = old, new
        self._known: dict[tuple[int, int, bool], tuple[Indices, Indices]] = {}

    def survivors(self, pairs: NDArray[np.int64], *, shape: bool = False) -> Survivors:
        """Instructions of function pairs (n, 2) that correspond.

        ``shape``: opcode and ModRM byte must agree, displacements need not.
        """
        keys = [(i, j, shape) for i, j in pairs.tolist()]
        fresh = [key for key in dict.fromkeys(keys) if key not in self._known]
        for batch in self._batches(fresh):
            self._align(batch, shape)
        found = [self._known[key] for key in keys]
        none = [np.zeros(0, np.int64)]
        return Survivors(
            pair=np.repeat(np.arange(len(keys)), [len(a) for a, _ in found]),
            old=np.concatenate(none + [a for a, _ in found]),
            new=np.concatenate(none + [b for _, b in found]),
        )

    def references(self, pairs: NDArray[np.int64]) -> tuple[Indices, Indices, Indices]:
        """Reference indices side by side for function pairs (n, 2) that changed, and the index of the pair.

        Internal references are left out; an instruction that makes another number of them contributes none.
        """
        survivors = self.survivors(pairs)
        a, b = self.old.references, self.new.references
        outside_old, outside_new = self.old.outside, self.new.outside
        first, count = _made_by(a, outside_old, survivors.old + self.old.base)
        second, count_new = _made_by(b, outside_new, survivors.new + self.new.base)
        same = (count == count_new) & (count > 0)
        counts = count[same]
        step = _steps(counts)
        left = outside_old[np.repeat(first[same], counts) + step]
        right = outside_new[np.repeat(second[same], counts) + step]
        return left, right, np.repeat(survivors.pair[same], counts)

    def _batches(self, keys: list[tuple[int, int, bool]]) -> list[list[tuple[int, int, bool]]]:
        batches: list[list[tuple[int, int, bool]]] = []
        size = BATCH
        for i, j, shape in keys:
            if size >= BATCH:
                batches.append([])
                size = 0
            batches[-1].append((i, j, shape))
            size += int(self.old.instruction_counts[i] + self.new.instruction_counts[j])
        return batches

    def _align(self, batch: list[tuple[int, int, bool]], shape: bool) -> None:
        pairs = np.array([key[:2] for key in batch], np.int64)
        at_old, first = self.old.instructions_of(pairs[:, 0])
        at_new, second = self.new.instructions_of(pairs[:, 1])
        ends_old = np.repeat(self.old.ends[pairs[:, 0]] - self.old.base, np.diff(first))
        ends_new = np.repeat(self.new.ends[pairs[:, 1]] - self.new.base, np.diff(second))
        tokens_old = _shapes(self.old, at_old) if shape else _tokens(self.old, at_old, ends_old)
        tokens_new = _shapes(self.new, at_new) if shape else _tokens(self.new, at_new, ends_new)
        ids_old, ids_new = _intern(tokens_old, tokens_new)
        whole = _same_opcodes(self.old.decoded.opcode[at_old], self.new.decoded.opcode[at_new], first, second)
        counts_old, counts_new = np.diff(first), np.diff(second)
        sought = ~whole & (counts_old * counts_new <= MAX_ALIGNMENT)
        runs = longest_runs(Joined(ids_old, first), Joined(ids_new, second), np.nonzero(sought)[0], MIN_RUN)
        step = _steps(runs.length)
        left, right = np.repeat(runs.old, runs.length) + step, np.repeat(runs.new, runs.length) + step
        bounds = np.searchsorted(np.repeat(runs.pair, runs.length), np.arange(len(batch) + 1))
        for k, key in enumerate(batch):
            if whole[k]:
                rows = slice(first[k], first[k + 1]), slice(second[k], second[k + 1])
                self._known[key] = at_old[rows[0]], at_new[rows[1]]
            else:
                part = slice(bounds[k], bounds[k + 1])
                self._known[key] = at_old[left[part]], at_new[right[part]]


def _made_by(references: References, outside: Indices, instructions: Indices) -> tuple[Indices, Indices]:
    """Per instruction address: index into ``outside`` of its first reference, and how many it makes."""
    places = references.instruction[outside]
    first = np.searchsorted(places, instructions, "left")
    return first, np.searchsorted(places, instructions, "right") - first


def _steps(counts: Indices) -> Indices:
    """0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, and so on."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def _same_opcodes(
    old: NDArray[np.uint16], new: NDArray[np.uint16], first: Indices, second: Indices
) -> NDArray[np.bool_]:
    """Per pair: the two functions have the same opcodes in the same order, and so correspond one to one."""
    counts = np.diff(first)
    same: NDArray[np.bool_] = counts == np.diff(second)
    length = np.where(same, counts, 0)
    step = _steps(length)
    left, right = np.repeat(first[:-1], length) + step, np.repeat(second[:-1], length) + step
    differing = np.repeat(np.arange(len(counts)), length)[old[left] != new[right]]
    same[differing] = False
    return same


def _shapes(code: Code, at: Indices) -> NDArray[np.uint64]:
    """Per instruction (n, 1): its opcode and what its ModRM byte says but for the displacement's width.

    Register and base decide, the width of the displacement does not: a field may move to or from offset 0.
    """
    modrm = code.decoded.modrm[at]
    form = np.where(modrm >= 0xC0, 0xC0, np.where((modrm & 0xC7) == 5, 0x40, 0))
    shape = code.decoded.opcode[at].astype(np.uint64) << np.uint64(8) | ((modrm & 0x3F) | form).astype(np.uint64)
    return shape.reshape(-1, 1)


def _tokens(code: Code, at: Indices, ends: Indices) -> NDArray[np.uint64]:
    """Per instruction (n, 3): its opcode and length, and its bytes, references and immediates masked.

    ``ends``: where the function of each ends; only data that was read as code goes on behind it.
    """
    decoded = code.decoded
    stop = np.where(decoded.imm_size[at] > 0, decoded.imm_field[at], decoded.length[at]).astype(np.int64)
    stop = np.where(decoded.ref_kind[at] > 1, 0, np.minimum(stop, ends - at))  # a branch: wherever it leads
    words = np.zeros((len(at), 1 + _TOKEN_WORDS), np.uint64)
    words[:, 0] = decoded.opcode[at].astype(np.uint64) << np.uint64(8) | stop.astype(np.uint64)
    last = len(code.masked) - 1
    for k in range(15):
        byte = np.where(k < stop, code.masked[np.minimum(at + k, last)], 0).astype(np.uint64)
        words[:, 1 + k // 8] |= byte << np.uint64(8 * (k % 8))
    return words


def _intern(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> tuple[Indices, Indices]:
    """Numbers for the rows of two arrays, equal where and only where the rows are."""
    rows = np.concatenate([first, second])
    order = np.lexsort(rows.T)
    fresh = np.zeros(len(rows), np.int64)
    fresh[1:] = (rows[order[1:]] != rows[order[:-1]]).any(axis=1)
    numbers = np.empty(len(rows), np.int64)
    numbers[order] = np.cumsum(fresh)
    return numbers[: len(first)], numbers[len(first) :]
