"""Alignment of changed functions against Python's difflib, which finds the same runs one pair at a time."""

from __future__ import annotations

import difflib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elfdiff.correspondence import runs
from elfdiff.correspondence.pairing import MIN_RUN, distinct
from elfdiff.correspondence.runs import Joined, longest_runs

sequences = st.lists(st.integers(0, 3), max_size=60)


def joined(parts: list[list[int]]) -> Joined:
    bounds = np.cumsum([0, *map(len, parts)])
    return Joined(np.array([token for part in parts for token in part], np.int64), bounds)


def found(pairs: list[tuple[list[int], list[int]]]) -> list[list[tuple[int, int, int]]]:
    old, new = joined([a for a, _ in pairs]), joined([b for _, b in pairs])
    result = longest_runs(old, new, np.arange(len(pairs)), MIN_RUN)
    blocks: list[list[tuple[int, int, int]]] = [[] for _ in pairs]
    for k, a, b, size in zip(result.pair, result.old, result.new, result.length, strict=True):
        blocks[k].append((int(a - old.bounds[k]), int(b - new.bounds[k]), int(size)))
    return blocks


def expected(a: list[int], b: list[int]) -> list[tuple[int, int, int]]:
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    return [tuple(block) for block in matcher.get_matching_blocks() if block.size >= MIN_RUN]


@settings(max_examples=300)
@given(st.lists(st.tuples(sequences, sequences), max_size=6))
def test_runs_are_those_of_difflib(pairs: list[tuple[list[int], list[int]]]) -> None:
    assert found(pairs) == [expected(a, b) for a, b in pairs]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 40), max_size=150), st.randoms(use_true_random=False))
def test_edited_sequences(original: list[int], random) -> None:
    edited = list(original)
    for _ in range(random.randrange(6)):
        at = random.randrange(len(edited) + 1)
        edited[at : at + random.randrange(4)] = [random.randrange(40) for _ in range(random.randrange(5))]
    assert found([(original, edited), (edited, original)]) == [
        expected(original, edited),
        expected(edited, original),
    ]


def test_small_chunks_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = [0, 0, 1, 0, 0, 0, 2] * 30, [0, 0, 0, 1, 0, 0, 2] * 25
    whole = found([pair])
    monkeypatch.setattr(runs, "CHUNK", 7)
    assert found([pair]) == whole == [expected(*pair)]


def test_only_the_pairs_asked_for_are_looked_at() -> None:
    same = [1, 2, 3, 4]
    result = longest_runs(joined([same, same]), joined([same, same]), np.array([1]), MIN_RUN)
    assert (result.pair.tolist(), result.old.tolist(), result.new.tolist()) == ([1], [4], [4])


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), max_size=40))
def test_distinct_pairs_are_those_of_numpy(pairs: list[tuple[int, int]]) -> None:
    rows = np.array(pairs, np.int64).reshape(-1, 2)
    found, which, counts = distinct(rows[:, 0], rows[:, 1])
    wanted, inverse, times = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    assert (found.tolist(), counts.tolist()) == (wanted.tolist(), times.tolist())
    assert which.tolist() == inverse.ravel().tolist()
