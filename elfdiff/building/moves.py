"""Code that moves from one changed function to another which is called after it, or before it, by the same caller.

A check of the user that moves so is made twice or never by a thread that is between the two calls when a patch comes
into force: it has left one function in its old state and enters the other in its new one. That neither is live does
not help. So nobody may be between the calls, in the code of the caller that leads from one to the other.

What moves is seen by its references: a function, import, variable or string that one function named and names no
longer, and the other did not name and does now. What a function without counterpart names counts as named by those
that call it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass

import numpy as np

from elfdiff.building.closure import neighbours, together
from elfdiff.building.naming import Named, Naming
from elfdiff.decoding.code import TRANSFERS, Code
from elfdiff.decoding.flow_x86_64 import Flow, backwards, flow, forwards, leaves, reachable
from elfdiff.differences.comparison import Comparison
from elfdiff.patches.evidence import Names
from elfdiff.patchobject import IdleCode

COMMON = frozenset({"__stack_chk_fail@plt", "__stack_chk_fail"})
DEPTH = 2
"""Calls from the common caller down to a function that something moves from or to, one of its own included."""
RARE, RARE_SHARE = 32, 100
"""What more functions than these name, and more than one in so many, says nothing: a common helper of all code."""
_MEANS_SOMETHING = frozenset({Names.FUNCTION, Names.IMPORT, Names.VARIABLE, Names.NEW_VARIABLE})
_STRINGS = frozenset({Names.CONSTANT, Names.OWN_CONSTANT})


@dataclass(frozen=True)
class Move:
    """``what`` moves from function ``source`` to ``destination``, both called by ``caller``; all are old functions.

    ``between`` is the code of the caller that nobody may be in, [start, end) at old addresses; all of it where
    ``whole``, since the flow in it is not certain. ``hopeless``: it is all of a function that never returns.
    """

    what: tuple[str, ...]
    source: int
    destination: int
    caller: int
    between: tuple[tuple[int, int], ...]
    whole: bool
    hopeless: bool


def moves(comparison: Comparison, naming: Naming, patched: Iterable[int]) -> tuple[Move, ...]:
    """All moves between the functions of a patch; ``patched`` are indices of the new build."""
    return tuple(_Search(comparison, naming).moves([j for j in patched if comparison.matching.old_of[j] >= 0]))


def idle_code(old: Code, found: Iterable[Move]) -> tuple[IdleCode, ...]:
    """What must be idle for these moves, but for what never is."""
    names = old.names
    pieces = {
        (start, end): f"{names[move.caller]} between {names[move.source]} and {names[move.destination]}"
        for move in reversed(tuple(found))
        if not move.hopeless
        for start, end in move.between
    }
    return tuple(IdleCode(pieces[start, end], start, end - start) for start, end in sorted(pieces))


class _Search:
    def __init__(self, comparison: Comparison, naming: Naming) -> None:
        self.comparison, self.old = comparison, comparison.old
        self.adjoining = neighbours(comparison.old, comparison.tables[0])
        self.first = _Content(comparison.old, naming.old, frozenset(comparison.removed), self.adjoining)
        new_adjoining = neighbours(comparison.new, comparison.tables[1])
        self.second = _Content(comparison.new, naming.new, frozenset(comparison.added), new_adjoining)
        self.flows: dict[int, Flow | None] = {}
        self.ways: dict[int, frozenset[int]] = {}

    def moves(self, patched: list[int]) -> Iterator[Move]:
        moved = self._moved(patched)
        if not moved:
            return
        self.callers, self.sites = _calls(self.old)
        for (source, destination), what in sorted(moved.items()):
            ways = self._ways(source), self._ways(destination)
            # What leads to both is no step on the way to one of them: there, a common caller is nearer.
            one, other = ways[0] - ways[1] | {source}, ways[1] - ways[0] | {destination}
            callers = self._callers(one) & self._callers(other) - {source, destination}
            for caller in sorted(callers):
                between = self._between(caller, one, other)
                if between is not None:
                    yield Move(tuple(sorted(what)), source, destination, caller, *between)

    def _callers(self, functions: Iterable[int]) -> frozenset[int]:
        parts = {part for one in functions for part in together(self.adjoining, one)}
        return frozenset(caller for part in parts for caller in self.callers.get(part, ()))

    def _ways(self, function: int) -> frozenset[int]:
        """The function, and what calls it in less than ``DEPTH`` steps."""
        if function not in self.ways:
            found = frozenset({function})
            for _ in range(DEPTH - 1):
                found |= self._callers(found)
            self.ways[function] = found
        return self.ways[function]

    def _moved(self, patched: list[int]) -> dict[tuple[int, int], set[str]]:
        """What moves from which old function to which."""
        lost: dict[str, set[int]] = defaultdict(set)
        gained: dict[str, set[int]] = defaultdict(set)
        for j in patched:
            i = int(self.comparison.matching.old_of[j])
            before, after = self.first.of(i), self.second.of(j)
            for label in before - after:
                lost[label].add(i)
            for label in after - before:
                gained[label].add(i)
        found: dict[tuple[int, int], set[str]] = defaultdict(set)
        for label in self._rare(lost.keys() & gained.keys()):
            for source in lost[label]:
                for destination in gained[label] - together(self.adjoining, source):
                    found[source, destination].add(label)
        return found

    def _rare(self, labels: Set[str]) -> Iterator[str]:
        """Those that few functions of the old build name."""
        references = self.old.references
        most = max(RARE, len(self.old) // RARE_SHARE)
        for label in sorted(labels):
            rows = np.isin(references.target, list(self.first.places.get(label, ())))
            if len(np.unique(references.function[rows])) <= most:
                yield label

    def _between(
        self, caller: int, one: Set[int], other: Set[int]
    ) -> tuple[tuple[tuple[int, int], ...], bool, bool] | None:
        """The code of a caller between its calls that lead to one and to the other of two functions.

        None where it does not call one after the other.
        """
        parts = together(self.adjoining, caller)
        sites = [self._sites(parts, ways) for ways in (one, other)]
        if not all(sites):
            return None
        if caller not in self.flows:
            self.flows[caller] = flow(self.old, parts, self.comparison.tables[0])
        known = self.flows[caller]
        if known is None:
            hopeless = self.old.names[caller] == "main" or not leaves(self.old, parts)
            return tuple((int(self.old.starts[k]), int(self.old.ends[k])) for k in sorted(parts)), True, hopeless
        onward = forwards(known, int(self.old.starts[caller]))
        found: set[int] = set()
        for before, after in (sites, sites[::-1]):
            if reachable(onward, [at for site in before for at in onward[site]]) & after:
                left = reachable(known, [at for site in before for at in known[site]])
                found |= before | left & reachable(backwards(known), after, never=before)
        return (self._ranges(found), False, False) if found else None

    def _sites(self, parts: Set[int], callees: Set[int]) -> frozenset[int]:
        """Where a function with its parts calls some others, or one of their parts."""
        entries = {part for one in callees for part in together(self.adjoining, one)}
        return frozenset(at for k in parts for entry in entries for at in self.sites.get((k, entry), ()))

    def _ranges(self, instructions: set[int]) -> tuple[tuple[int, int], ...]:
        found: list[tuple[int, int]] = []
        for at in sorted(instructions):
            end = at + int(self.old.decoded.length[at - self.old.base])
            if found and found[-1][1] == at:
                found[-1] = found[-1][0], end
            else:
                found.append((at, end))
        return tuple(found)


def _calls(code: Code) -> tuple[dict[int, set[int]], dict[tuple[int, int], list[int]]]:
    """Who calls each function directly, and where each caller calls it: addresses of calls, and of jumps to it."""
    references = code.references
    rows = np.nonzero(np.isin(references.kind, TRANSFERS) & ~references.internal)[0]
    own = _own_stubs(code)
    targets = np.array([own.get(target, target) for target in references.target[rows].tolist()], np.int64)
    callees = code.function_at(targets)
    at_start = (callees >= 0) & (code.starts[np.clip(callees, 0, None)] == targets)
    found: tuple[dict[int, set[int]], dict[tuple[int, int], list[int]]] = defaultdict(set), defaultdict(list)
    for row, callee in zip(rows[at_start].tolist(), callees[at_start].tolist(), strict=True):
        caller = int(references.function[row])
        found[0][callee].add(caller)
        found[1][caller, callee].append(int(references.instruction[row]))
    return found


def _own_stubs(code: Code) -> dict[int, int]:
    """Linkage stubs through which an image calls functions of its own -> those functions."""
    image = code.image
    found = {}
    for stub, at in image.plt.items():
        slot = image.slots.get(at)
        target = image.exports.get(slot.symbol) if slot is not None and slot.symbol else image.pointer_at(at)
        if target is not None:
            found[stub] = target
    return found


class _Content:
    """What the functions of one build name, by what it is called."""

    def __init__(
        self,
        code: Code,
        name: Callable[[int], Named],
        alone: frozenset[int],
        adjoining: dict[int, set[int]],
    ) -> None:
        """``alone`` are the functions without counterpart: what they name, their callers name."""
        self.code, self.name, self.alone, self.adjoining = code, name, alone, adjoining
        self.known: dict[int, tuple[set[str], set[int]]] = {}
        self.places: dict[str, set[int]] = {}

    def of(self, function: int) -> set[str]:
        """What a function names, with its cold parts and the functions without counterpart that it names."""
        found: set[str] = set()
        seen: set[int] = set()
        todo = [*together(self.adjoining, function)]
        while todo:
            one = todo.pop()
            if one not in seen:
                seen.add(one)
                if one not in self.known:
                    self.known[one] = self._named(one)
                labels, others = self.known[one]
                found |= labels
                todo += [part for other in others for part in together(self.adjoining, other)]
        return found - COMMON

    def _named(self, function: int) -> tuple[set[str], set[int]]:
        """What its own instructions name, and the functions without counterpart among that."""
        references = self.code.references
        rows = references.of(function)
        labels: set[str] = set()
        others: set[int] = set()
        for row in (np.nonzero(~references.internal[rows])[0] + rows.start).tolist():
            callee = self.code.function_of(int(references.target[row]))
            if callee in self.alone:
                others.add(callee)
                continue
            kind, label = self.name(row)
            if kind in _MEANS_SOMETHING or (kind in _STRINGS and label.startswith('"')):
                labels.add(label)
                self.places.setdefault(label, set()).add(int(references.target[row]))
        return labels, others
