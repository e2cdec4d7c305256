"""References side by side: which reference of a new function stands where one of its old counterpart stood.

Two functions with the same masked bytes make their references at the same places (``paired``); in a function that
changed, the instructions that survived are aligned first (``aligned``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from elfdiff.code import Code

Indices = NDArray[np.int64]

MAX_ALIGNMENT = 25_000_000
"""Product of instruction counts above which two changed functions are not aligned (difflib is quadratic)."""
MIN_RUN = 3
"""Shortest run of equal instructions that counts as the same code."""


def paired(old: Code, new: Code, pairs: NDArray[np.int64]) -> tuple[Indices, Indices]:
    """Reference indices side by side for function pairs (n, 2) whose masked bytes are equal.

    Internal references are left out. Pairs whose reference counts differ contribute nothing.
    """
    a, b = old.references, new.references
    i, j = pairs[:, 0], pairs[:, 1]
    counts = a.last[i] - a.first[i]
    same = counts == b.last[j] - b.first[j]
    i, j, counts = i[same], j[same], counts[same]
    step = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    left, right = np.repeat(a.first[i], counts) + step, np.repeat(b.first[j], counts) + step
    outside = ~(a.internal[left] & b.internal[right])
    return left[outside], right[outside]


def aligned(old: Code, new: Code, i: int, j: int) -> tuple[Indices, Indices]:
    """Reference indices side by side for a function that changed, where instructions around them agree."""
    left: list[int] = []
    right: list[int] = []
    by_old, by_new = _by_instruction(old, i), _by_instruction(new, j)
    for a, b in surviving_instructions(old, new, i, j):
        first, second = by_old.get(a + old.base, []), by_new.get(b + new.base, [])
        if len(first) == len(second):
            left += first
            right += second
    return np.array(left, np.int64), np.array(right, np.int64)


def surviving_instructions(old: Code, new: Code, i: int, j: int, *, shape: bool = False) -> Iterator[tuple[int, int]]:
    """Instructions of a changed function that correspond, as offsets into the code of each build.

    ``shape``: opcode and ModRM byte must agree, displacements need not.
    """
    at_old, tokens_old = _tokens(old, i, shape)
    at_new, tokens_new = _tokens(new, j, shape)
    for a, b, size in _blocks(tokens_old, tokens_new):
        yield from zip(at_old[a : a + size].tolist(), at_new[b : b + size].tolist(), strict=True)


def _blocks(first: list[bytes], second: list[bytes]) -> list[tuple[int, int, int]]:
    """Runs (start in first, start in second, length) of instructions that correspond."""
    if len(first) == len(second) and all(a[:2] == b[:2] for a, b in zip(first, second, strict=True)):
        return [(0, 0, len(first))]
    if len(first) * len(second) > MAX_ALIGNMENT:
        return []
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    return [(block.a, block.b, block.size) for block in matcher.get_matching_blocks() if block.size >= MIN_RUN]


def _tokens(code: Code, function: int, shape: bool) -> tuple[Indices, list[bytes]]:
    """Per instruction: its offset, and its opcode (2 bytes) with its bytes, references and immediates masked."""
    at = code.instructions(function)
    lengths, opcodes = code.decoded.length[at], code.decoded.opcode[at]
    imm, size = code.decoded.imm_field[at], code.decoded.imm_size[at]
    stop = np.where(size > 0, imm, lengths)
    stop = np.where(code.decoded.ref_kind[at] > 1, 0, stop)  # a branch: wherever it leads
    if shape:
        # Register and base decide, the width of the displacement does not: a field may move to or from offset 0.
        raw_modrm = code.decoded.modrm[at]
        form = np.where(raw_modrm >= 0xC0, 0xC0, np.where((raw_modrm & 0xC7) == 5, 0x40, 0))
        modrm = (raw_modrm & 0x3F) | form
        return at, [bytes((op & 0xFF, op >> 8, m)) for op, m in zip(opcodes.tolist(), modrm.tolist(), strict=True)]
    low = int(code.starts[function]) - code.base
    raw = code.masked_bytes(function)
    tokens = [
        int(op).to_bytes(2, "little") + raw[a - low : a - low + n]
        for a, n, op in zip(at.tolist(), stop.tolist(), opcodes.tolist(), strict=True)
    ]
    return at, tokens


def _by_instruction(code: Code, function: int) -> dict[int, list[int]]:
    references = code.references
    found: dict[int, list[int]] = {}
    for index in range(int(references.first[function]), int(references.last[function])):
        if not references.internal[index]:
            found.setdefault(int(references.instruction[index]), []).append(index)
    return found
