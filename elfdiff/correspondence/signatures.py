"""What a function looks like without addresses: numbers that are equal where, and only where, two functions agree.

The numbers count what was seen, in both builds alike; they are no hashes, so that no two different functions can
have the same one, and they do not differ from run to run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from elfdiff.decoding.arguments_x86_64 import ARGUMENTS
from elfdiff.decoding.code import LEA, Code, FieldKind
from elfdiff.images.image import Kind

MIN_STRING = 2
MAX_STRING = 512
"""Bytes of a string that are looked at."""


@dataclass(frozen=True)
class Signatures:
    """Of each function of one build: ``plain`` its masked bytes, ``strict`` also what it names by symbol or content.

    ``loose`` is ``strict`` without line numbers.
    """

    plain: list[int]
    strict: list[int]
    loose: list[int]


class _Numbers:
    """Numbers for things, from 1."""

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}

    def of(self, thing: Hashable) -> int:
        return self._known.setdefault(thing, len(self._known) + 1)


def signatures(old: Code, new: Code) -> tuple[Signatures, Signatures]:
    """The signatures of two builds, comparable with each other."""
    names, contents = _Numbers(), _Numbers()
    return _signatures(old, names, contents), _signatures(new, names, contents)


def _signatures(code: Code, names: _Numbers, contents: _Numbers) -> Signatures:
    keys = _symbolic_keys(code, names).tobytes()
    masked, unlined = code.masked.tobytes(), _without_lines(code).tobytes()
    references = code.references
    bounds = zip(
        (code.starts - code.base).tolist(),
        (code.ends - code.base).tolist(),
        (8 * references.first).tolist(),
        (8 * references.last).tolist(),
        strict=True,
    )
    plain, strict, loose = [], [], []
    for start, end, first, last in bounds:
        mine = contents.of(masked[start:end])
        named = keys[first:last]
        plain.append(mine)
        strict.append(contents.of((mine, named)))
        loose.append(contents.of((contents.of(unlined[start:end]), named)))
    return Signatures(plain, strict, loose)


def _without_lines(code: Code) -> NDArray[np.uint8]:
    """The masked code without the numbers that are put into argument registers other than the first.

    Functions made by one macro differ in little else than such a number and their line.
    """
    decoded = code.decoded
    at = np.nonzero(code.is_start & (decoded.opcode >= 0xB8) & (decoded.opcode <= 0xBF) & (decoded.imm_size == 4))[0]
    extended = (decoded.imm_field[at] == 2) & (code.raw[at] & 1 == 1)
    register = (decoded.opcode[at] & 7) + 8 * extended
    at = at[np.isin(register, ARGUMENTS[1:])]
    masked = code.masked.copy()
    for k in range(4):
        masked[at + decoded.imm_field[at] + k] = 0
    return masked


def _symbolic_keys(code: Code, names: _Numbers) -> NDArray[np.int64]:
    """Per reference: a number that says what it names where that can be said without addresses, else 0."""
    image, references = code.image, code.references
    targets, inverse = np.unique(references.target, return_inverse=True)
    kinds = image.kinds(targets)
    keys = np.zeros(len(targets), np.int64)
    for index in np.nonzero((kinds == Kind.PLT) | (kinds == Kind.GOT))[0].tolist():
        slot = image.slots.get(image.plt.get(int(targets[index]), int(targets[index])))
        if slot is not None and slot.symbol:
            keys[index] = names.of((slot.symbol, slot.version))
    constants = np.nonzero(kinds == Kind.CONSTANT)[0]
    texts = [image.string_at(address, MAX_STRING) for address in targets[constants].tolist()]
    keys[constants] = [
        names.of(text) if text is not None and len(text) >= MIN_STRING and text.isascii() else 0 for text in texts
    ]
    by_reference = keys[inverse.ravel()]
    address_taken = (references.opcode == LEA) | (references.kind >= FieldKind.ABSOLUTE_DISPLACEMENT)
    text_like = (references.kind != FieldKind.MEMORY) | address_taken | (kinds[inverse.ravel()] == Kind.GOT)
    return np.where(references.internal | ~text_like, 0, by_reference)


class Similarities:
    """How alike functions of two builds are; what is known of a function is kept."""

    def __init__(self, old: Code, new: Code) -> None:
        """Nothing is known yet."""
        self._codes = old, new
        self._known: tuple[dict[int, Counter[tuple[int, int]]], dict[int, Counter[tuple[int, int]]]] = {}, {}

    def of(self, i: int, j: int) -> float:
        """Share of equal pairs of neighbouring opcodes (Dice), 0 when one is three times as long as the other."""
        old, new = self._codes
        a, b = int(old.instruction_counts[i]), int(new.instruction_counts[j])
        if min(a, b) * 3 < max(a, b):
            return 0.0
        first, second = self._pairs(0, i), self._pairs(1, j)
        if len(second) < len(first):
            first, second = second, first
        common = sum(min(count, second[pair]) for pair, count in first.items() if pair in second)
        return 2 * common / max(1, max(0, a - 1) + max(0, b - 1))

    def _pairs(self, side: int, function: int) -> Counter[tuple[int, int]]:
        known = self._known[side].get(function)
        if known is None:
            code = self._codes[side]
            known = Counter(pairwise(code.decoded.opcode[code.instructions(function)].tolist()))
            self._known[side][function] = known
        return known
