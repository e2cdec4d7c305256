"""Functions that take a line number wherever the program calls them (``OPENSSL_free``, ``errfinish``).

At many calls a number stands in the register behind a source file's name, at most of them another number for each
file: nothing but a line number does that, and then any change of it is one, however far it moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from elfdiff.decoding.arguments_x86_64 import (
    ARGUMENTS,
    MAX_LINE,
    WINDOW,
    SourceFiles,
    argument,
    immediate,
    loaded_register,
)
from elfdiff.decoding.code import FieldKind
from elfdiff.decoding.decode_x86_64 import RefKind

SAMPLE = 96
"""Calls of a function that are looked at to learn whether it takes a line number."""
MIN_SITES, MIN_FILES = 8, 3
"""So many of them pass a number behind a source file's name, of so many files, before it counts as one."""
BEHIND = dict(pairwise(ARGUMENTS))
"""The register of the next argument: a line number follows its file name."""


class LineParameters:
    """Learned from the calls of one build, for each callee when it is asked for."""

    def __init__(self, files: SourceFiles) -> None:
        """Learn from the code that loads them."""
        self.files, self.code = files, files.code
        self._known: dict[int, int | None] = {}

    def register_of(self, callee: int) -> int | None:
        """Number of the register of a function's line number, None if it is not known to take one."""
        if callee not in self._known:
            self._known[callee] = self._learn(callee)
        return self._known[callee]

    def called_by(self, function: int) -> frozenset[int]:
        """Registers in which the functions that one function calls take line numbers."""
        references = self.code.references
        rows = references.of(function)
        callees = set(references.target[rows][references.kind[rows] == FieldKind.CALL].tolist())
        return frozenset(r for r in map(self.register_of, callees) if r is not None)

    def _learn(self, callee: int) -> int | None:
        references = self.code.references
        rows = np.nonzero((references.target == callee) & (references.kind == FieldKind.CALL))[0]
        rows = rows[:: max(1, len(rows) // SAMPLE)]
        seen: dict[int, list[tuple[bytes, int]]] = {}
        for row in rows.tolist():
            for register, file, value in _files_and_numbers(self.files, row):
                seen.setdefault(register, []).append((file, value))
        for register, sites in seen.items():
            numbers = [site for site in sites if 0 < site[1] <= MAX_LINE]
            several = len(numbers) >= MIN_SITES and len({file for file, _ in numbers}) >= MIN_FILES
            if several and 2 * len(set(numbers)) >= len(numbers) and 2 * len(numbers) >= len(sites):
                return register
        return None


def _files_and_numbers(source: SourceFiles, row: int) -> Iterator[tuple[int, bytes, int]]:
    """(register, file name, number) of the argument behind a source file's name, at one call; 0: no number."""
    code, references = source.code, source.code.references
    function = int(references.function[row])
    at = code.instructions(function)
    index = int(np.searchsorted(at, references.instruction[row] - code.base))
    loads = source.loads(function)
    files: dict[int, bytes] = {}
    numbers: dict[int, int] = {}
    for offset in at[max(0, index - WINDOW) : index][::-1].tolist():
        if int(code.decoded.ref_kind[offset]) == RefKind.CALL:
            break
        register = argument(code, offset, np.zeros(0, np.int64))
        if offset in loads:
            files.setdefault(loaded_register(code, offset), loads[offset])
        elif register is not None:
            numbers.setdefault(register, immediate(code, offset))
    for register, file in files.items():
        if register in BEHIND:
            yield BEHIND[register], file, numbers.get(BEHIND[register], 0)
