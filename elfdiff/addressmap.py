"""Which old address names the same thing as a new one, learned from code that did not change (D3).

Every reference of a function whose masked bytes are equal in both builds *pins* an old address to a new one.
Pins are votes: where they agree they are evidence, where they disagree the minority is a finding. Weaker
evidence, used only where there is no pin: the same pointer slot of paired tables, and references of surviving
instructions in functions that changed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from elfdiff.code import Code
from elfdiff.image import Addresses, Kind
from elfdiff.matching import Matching
from elfdiff.pairing import aligned, paired

DATA_KINDS = (Kind.CONSTANT, Kind.RELRO, Kind.DATA, Kind.BSS, Kind.GOT, Kind.NONE, Kind.OTHER)
WRITABLE = (Kind.DATA, Kind.BSS)


class Evidence(IntEnum):
    """What a mapped address rests on, strongest first."""

    PIN = 1  # an unchanged function names both
    SURVIVOR = 2  # a surviving instruction of a changed function names both
    SLOT = 3  # the same slot of paired tables points to both
    INTERVAL = 4  # both neighbours moved alike, and the old build names the predicted address


@dataclass(frozen=True)
class Pins:
    """Reference pairs of unchanged functions: indices into the two builds' references, and their targets."""

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    old: Addresses
    new: Addresses


@dataclass(frozen=True)
class Contradiction:
    """Pins that disagree: a new address of writable data with more than one old one, or the reverse."""

    address: int  # in the new build where ``new`` is true, else in the old one
    new: bool
    votes: tuple[tuple[int, int], ...]  # (address in the other build, number of pins), most first


@dataclass(frozen=True)
class AddressMap:
    """``old_of[new address] = (old address, Evidence)``, for data of every kind."""

    pins: Pins = field(repr=False)
    old_of: dict[int, tuple[int, Evidence]] = field(repr=False)
    new_of: dict[int, int] = field(repr=False)  # reverse of what rests on pins
    contradictions: tuple[Contradiction, ...]

    def old(self, address: int) -> int | None:
        """The old address that names the same thing, or None where nothing is known."""
        found = self.old_of.get(address)
        return found[0] if found else None


def learn(old: Code, new: Code, matching: Matching, alike: NDArray[np.int64]) -> AddressMap:
    """Learn the map from the references of matched functions.

    ``alike`` are function pairs (n, 2) whose instructions make the same references though their bytes differ (line
    numbers); they pin like equal ones.
    """
    pins = _pins(old, new, np.concatenate([matching.pairs(same=True), alike]))
    data = np.isin(new.image.kinds(pins.new), DATA_KINDS) & np.isin(old.image.kinds(pins.old), DATA_KINDS)
    forward, backward = _tally(pins.old[data], pins.new[data])
    old_of = {n: (votes.most_common(1)[0][0], Evidence.PIN) for n, votes in forward.items()}
    new_of = {o: votes.most_common(1)[0][0] for o, votes in backward.items()}
    contradictions = (
        *_contradictions(forward, new, is_new=True),
        *_contradictions(backward, old, is_new=False),
    )
    _add_survivors(old, new, matching, old_of)
    return AddressMap(pins, old_of, new_of, contradictions)


def _pins(old: Code, new: Code, pairs: NDArray[np.int64]) -> Pins:
    left, right = paired(old, new, pairs)
    return Pins(left, right, old.references.target[left], new.references.target[right])


def _tally(first: Addresses, second: Addresses) -> tuple[dict[int, Counter[int]], dict[int, Counter[int]]]:
    """Votes new -> old and old -> new."""
    forward: dict[int, Counter[int]] = {}
    backward: dict[int, Counter[int]] = {}
    pairs, counts = np.unique(np.stack([first, second], axis=1), axis=0, return_counts=True)
    for (o, n), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        forward.setdefault(n, Counter())[o] += count
        backward.setdefault(o, Counter())[n] += count
    return forward, backward


def _contradictions(tally: dict[int, Counter[int]], code: Code, *, is_new: bool) -> tuple[Contradiction, ...]:
    """Disagreements about writable data; constants may be merged or split by the linker, variables may not."""
    split = sorted(address for address, votes in tally.items() if len(votes) > 1)
    kinds = code.image.kinds(np.array(split, np.int64))
    return tuple(
        Contradiction(address, is_new, tuple(tally[address].most_common()))
        for address, kind in zip(split, kinds, strict=True)
        if kind in WRITABLE
    )


def _add_survivors(old: Code, new: Code, matching: Matching, old_of: dict[int, tuple[int, Evidence]]) -> None:
    lefts, rights = [], []
    for i, j in matching.pairs(same=False).tolist():
        left, right = aligned(old, new, i, j)
        lefts.append(left)
        rights.append(right)
    if not lefts:
        return
    first = old.references.target[np.concatenate(lefts)]
    second = new.references.target[np.concatenate(rights)]
    data = np.isin(new.image.kinds(second), DATA_KINDS) & np.isin(old.image.kinds(first), DATA_KINDS)
    forward, _ = _tally(first[data], second[data])
    for n, votes in forward.items():
        if n not in old_of and len(votes) == 1:
            old_of[n] = (votes.most_common(1)[0][0], Evidence.SURVIVOR)
