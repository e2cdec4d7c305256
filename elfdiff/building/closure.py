"""What must move together: functions that jump into each other's middle.

A compiler splits a function in hot and cold parts that branch into one another, also through switch tables. Half
a function in the old build and half in the new one is neither; so whatever shares such an edge with a patched
function, in either build, is patched with it. Parts need not be told from functions for this.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elfdiff.decoding.code import TRANSFERS, Code, FieldKind
from elfdiff.decoding.jumptables_x86_64 import JumpTable
from elfdiff.differences.comparison import Comparison


def joined(comparison: Comparison, seeds: NDArray[np.int64]) -> dict[int, int]:
    """New functions that must be in a patch of ``seeds``, each with the one that it hangs together with.

    A seed hangs together with itself. The order is that of finding.
    """
    adjoining = neighbours(comparison.new, comparison.tables[1])
    new_of = comparison.matching.new_of
    for i, k in edges(comparison.old, comparison.tables[0]):
        a, b = int(new_of[i]), int(new_of[k])
        if a >= 0 and b >= 0:
            adjoining.setdefault(a, set()).add(b)
            adjoining.setdefault(b, set()).add(a)
    found = {function: function for function in seeds.tolist()}
    todo = list(found)
    while todo:
        function = todo.pop()
        for other in sorted(adjoining.get(function, ())):
            if other not in found:
                found[other] = function
                todo.append(other)
    return found


def closure(comparison: Comparison, seeds: NDArray[np.int64]) -> NDArray[np.int64]:
    """New functions that must be in a patch of ``seeds``, sorted; the seeds included."""
    return np.array(sorted(joined(comparison, seeds)), np.int64)


def neighbours(code: Code, tables: dict[int, JumpTable]) -> dict[int, set[int]]:
    """Per function: those that it branches into the middle of, or that branch into its own."""
    found: dict[int, set[int]] = {}
    for a, b in edges(code, tables):
        found.setdefault(a, set()).add(b)
        found.setdefault(b, set()).add(a)
    return found


def together(adjoining: dict[int, set[int]], function: int) -> set[int]:
    """What a function hangs together with by branches into the middle of each other, itself included."""
    found, todo = {function}, [function]
    while todo:
        more = adjoining.get(todo.pop(), set()) - found
        found |= more
        todo += more
    return found


def edges(code: Code, tables: dict[int, JumpTable]) -> set[tuple[int, int]]:
    """Pairs of functions one of which branches into the middle of the other."""
    references = code.references
    transfer = np.isin(references.kind, TRANSFERS) | (references.kind == FieldKind.MEMORY)
    rows = np.nonzero(transfer & ~references.internal)[0]
    other = code.function_at(references.target[rows])
    inside = (other >= 0) & (code.starts[np.clip(other, 0, None)] != references.target[rows])
    # A short branch cannot be made to reach the old image, so even its target's entry must come along.
    inside |= (other >= 0) & (references.kind[rows] == FieldKind.SHORT)
    # A table among the code branches nowhere, and who reads it is no part of it.
    inside &= ~code.may_be_data[references.function[rows]]
    inside &= ~(code.may_be_data[np.clip(other, 0, None)] & (references.kind[rows] == FieldKind.MEMORY))
    edges = set(zip(references.function[rows[inside]].tolist(), other[inside].tolist(), strict=True))
    for table in tables.values():
        for function in np.unique(code.function_at(table.targets)).tolist():
            if function not in (-1, table.function):
                edges.add((table.function, function))
    return edges
