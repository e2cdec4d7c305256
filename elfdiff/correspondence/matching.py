"""Which old function is which new one, without symbols.

From sure to less sure, each step seeing only what is left:

1. the same masked bytes and the same symbolic references (imports by name, strings by content), once in each build;
2. what the code of matched functions calls at the same place, and what paired pointer slots point to;
3. equal ones in link order between two matched neighbours, then such as differ in line numbers only;
4. in a gap between matched neighbours, the pairing of highest similarity (order kept).

What references say outvotes what order says. Symbols are not used, they serve the tests as the truth; only exported
functions keep their names, since other modules know them by nothing else.
"""

from __future__ import annotations

import bisect
import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from elfdiff.correspondence.pairing import Alignments, distinct, paired
from elfdiff.correspondence.signatures import Similarities, signatures
from elfdiff.decoding.code import Code
from elfdiff.images.image import Kind

MIN_SIMILARITY = 0.5
"""Share of equal pairs of neighbouring opcodes below which two functions of a gap are not the same function."""
MAX_GAP = 200
"""Functions of a gap that are compared each with each."""
MAX_SLOTS = 4096
"""Bytes of a pointer table whose slots vote, where nothing says how far it reaches."""
MAX_TABLE = 1 << 16
"""Bytes of any object whose slots vote."""


class How(IntEnum):
    """What a match rests on; a lower number is stronger."""

    NAME = 5  # set apart: both builds export it under the same name
    UNIQUE = 1
    REFERENCE = 2
    ORDER = 3
    SIMILAR = 4


@dataclass(frozen=True)
class Matching:
    """Indices of functions; -1 where there is no counterpart.

    ``new_of[i]`` is the new function of old function i, ``old_of`` the reverse; ``same[i]``: equal masked bytes;
    ``how[i]``: a ``How``, 0 where unmatched.
    """

    new_of: NDArray[np.int64]
    old_of: NDArray[np.int64]
    how: NDArray[np.uint8]
    same: NDArray[np.bool_]
    contradicted: frozenset[int]  # old functions that references mostly pair otherwise than they are matched
    alignments: Alignments = field(repr=False, compare=False)

    def pairs(self, *, same: bool) -> NDArray[np.int64]:
        """Matched function pairs (n, 2), of equal or of different masked bytes."""
        i = np.nonzero((self.new_of >= 0) & (self.same == same))[0]
        return np.stack([i, self.new_of[i]], axis=1)


def match(old: Code, new: Code) -> Matching:
    """Match the functions of two builds."""
    return _Matcher(old, new).run()


class _Matcher:
    def __init__(self, old: Code, new: Code) -> None:
        self.old, self.new = old, new
        self.alignments = Alignments(old, new)
        self.similarities = Similarities(old, new)
        first, second = signatures(old, new)
        self.plain_old, self.strict_old, self.loose_old = first.plain, first.strict, first.loose
        self.plain_new, self.strict_new, self.loose_new = second.plain, second.strict, second.loose
        self._plain = np.array(first.plain, np.int64), np.array([*second.plain, 0], np.int64)  # [-1]: unmatched
        self._counted_with = np.full(len(old), -1, np.int64)
        self.new_of = np.full(len(old), -1, np.int64)
        self.old_of = np.full(len(new), -1, np.int64)
        self.how = np.zeros(len(old), np.uint8)
        self.votes: dict[int, Counter[int]] = {}
        self.counted: set[tuple[int, int]] = set()

    def run(self) -> Matching:
        self._unique(self.strict_old, self.strict_new)
        self._unique(self.plain_old, self.plain_new)
        self._follow(equal=True)
        self._in_order(self.strict_old, self.strict_new)
        self._follow(equal=True)
        self._in_order(self.plain_old, self.plain_new)
        self._follow(equal=False)
        self._unique(self.loose_old, self.loose_new, How.SIMILAR)
        self._in_order(self.loose_old, self.loose_new, How.SIMILAR)
        self._similar()
        self._follow(equal=False)
        self._vote_slots()
        self._correct()
        self._replaced()
        self._keep_exports()
        contradicted = frozenset(self._contradicted())
        return Matching(self.new_of, self.old_of, self.how, self._same(), contradicted, self.alignments)

    def _same(self) -> NDArray[np.bool_]:
        """Which old functions are matched with one of the same masked bytes."""
        same: NDArray[np.bool_] = (self.new_of >= 0) & (self._plain[0] == self._plain[1][self.new_of])
        return same

    def _link(self, i: int, j: int, how: How) -> None:
        self.new_of[i], self.old_of[j], self.how[i] = j, i, how

    def _unlink(self, i: int) -> None:
        j = int(self.new_of[i])
        if j >= 0:
            self.new_of[i], self.old_of[j], self.how[i] = -1, -1, 0

    def _unique(self, first: list[int], second: list[int], how: How = How.UNIQUE) -> None:
        mine: list[int] = np.nonzero(self.new_of < 0)[0].tolist()
        theirs: list[int] = np.nonzero(self.old_of < 0)[0].tolist()
        once_old = Counter(first[i] for i in mine)
        once_new = Counter(second[j] for j in theirs)
        place = {second[j]: j for j in theirs if once_new[second[j]] == 1}
        for i in mine:
            if once_old[first[i]] == 1 and first[i] in place:
                self._link(i, place[first[i]], how)

    def _gaps(self) -> Iterable[tuple[list[int], list[int]]]:
        """Unmatched functions between neighbours that are matched in the same order, old and new."""
        matched = np.nonzero(self.new_of >= 0)[0]
        kept = _increasing(self.new_of[matched].tolist())
        new_of, old_of = self.new_of.tolist(), self.old_of.tolist()
        anchors = [(i, new_of[i]) for i in matched[kept].tolist()]
        edges = [(-1, -1), *anchors, (len(self.old), len(self.new))]
        for (a, b), (c, d) in pairwise(edges):
            if c - a > 1 and d - b > 1:
                first = [i for i in range(a + 1, c) if new_of[i] < 0]
                second = [j for j in range(b + 1, d) if old_of[j] < 0]
                if first and second:
                    yield first, second

    def _in_order(self, first: list[int], second: list[int], how: How = How.ORDER) -> None:
        for mine, theirs in list(self._gaps()):
            a, b = [first[i] for i in mine], [second[j] for j in theirs]
            for x, y, size in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks():
                for k in range(size):
                    self._link(mine[x + k], theirs[y + k], how)

    def _follow(self, *, equal: bool) -> None:
        """Let matched functions vote for what they refer to, until nothing new is matched.

        ``equal``: only functions of the same masked bytes; a function that calls others in another order has the
        same bytes, too, and its votes must not part what is the same.
        """
        while True:
            before = int((self.new_of >= 0).sum())
            self._collect_votes()
            for i, votes in self.votes.items():
                if self.new_of[i] < 0:
                    self._elect(i, votes, equal=equal)
            if int((self.new_of >= 0).sum()) == before:
                return

    def _elect(self, i: int, votes: Counter[int], *, equal: bool) -> None:
        """The function with most of the votes, unless it is taken on equal or better grounds."""
        free = [(count, j) for j, count in votes.items() if self.old_of[j] < 0]
        if equal:
            free = [(count, j) for count, j in free if self.plain_old[i] == self.plain_new[j]]
        if not free:
            return
        count, j = max(free)
        if 2 * count > votes.total() and self.similarities.of(i, j) > MIN_SIMILARITY / 2:
            self._link(i, j, How.REFERENCE)

    def _collect_votes(self) -> None:
        fresh_same: list[tuple[int, int]] = []
        fresh_changed: list[tuple[int, int]] = []
        fresh = np.nonzero((self.new_of >= 0) & (self.new_of != self._counted_with))[0]
        self._counted_with[fresh] = self.new_of[fresh]
        for i, j in zip(fresh.tolist(), self.new_of[fresh].tolist(), strict=True):
            if (i, j) in self.counted:
                continue
            self.counted.add((i, j))
            (fresh_same if self.plain_old[i] == self.plain_new[j] else fresh_changed).append((i, j))
        if fresh_same:
            self._vote(*paired(self.old, self.new, np.array(fresh_same, np.int64)))
        if fresh_changed:
            left, right, _ = self.alignments.references(np.array(fresh_changed, np.int64))
            self._vote(left, right)

    def _vote(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
        if not len(left):
            return
        a, b = self.old.references.target[left], self.new.references.target[right]
        i = _exact(self.old, a)
        j = _exact(self.new, b)
        both = (i >= 0) & (j >= 0)
        pairs, _, counts = distinct(i[both], j[both])
        for (x, y), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            self.votes.setdefault(x, Counter())[y] += count

    def _correct(self) -> None:
        """Undo matches by order that references contradict: identical twins linked in another order."""
        for i, votes in self.votes.items():
            j, count = votes.most_common(1)[0]
            if self.new_of[i] == j:
                continue
            weak = self.how[i] in (How.ORDER, How.SIMILAR, 0)
            weak &= self.how[i] != How.ORDER or self.plain_old[i] == self.plain_new[j]
            if weak and 2 * count > votes.total():
                rival = int(self.old_of[j])
                if rival >= 0 and self.how[rival] in (How.UNIQUE, How.REFERENCE):
                    continue
                if rival >= 0:
                    self._unlink(rival)
                self._unlink(i)
                self._link(i, j, How.REFERENCE)
        self._in_order(self.strict_old, self.strict_new)
        self._in_order(self.plain_old, self.plain_new)

    def _replaced(self) -> None:
        """What stands in all places where a vanished function stood is that function, however little it resembles it.

        Pointers to it that the program has stored must lead to the new code as well.
        """
        suitors: dict[int, list[int]] = {}
        for i, votes in self.votes.items():
            for j in votes:
                suitors.setdefault(j, []).append(i)
        for i, votes in self.votes.items():
            j = next(iter(votes))
            if self.new_of[i] < 0 and len(votes) == 1 and self.old_of[j] < 0 and suitors[j] == [i]:
                self._link(i, j, How.REFERENCE)

    def _contradicted(self) -> Iterable[int]:
        """Functions whose match most references, or the slots of paired tables, speak against."""
        for i, votes in self.votes.items():
            j, count = votes.most_common(1)[0]
            if self.new_of[i] >= 0 and self.new_of[i] != j and 2 * count > votes.total():
                yield i
                if self.old_of[j] >= 0:
                    yield int(self.old_of[j])

    def _vote_slots(self) -> None:
        """Pointer tables that paired references name vote for what their slots point to."""
        left, right = paired(self.old, self.new, self._same_pairs())
        pairs = set(
            zip(self.old.references.target[left].tolist(), self.new.references.target[right].tolist(), strict=True)
        )
        changed = np.nonzero((self.new_of >= 0) & ~self._same())[0]
        first, second, _ = self.alignments.references(np.stack([changed, self.new_of[changed]], axis=1))
        pairs.update(
            zip(self.old.references.target[first].tolist(), self.new.references.target[second].tolist(), strict=True)
        )
        seen: set[tuple[int, int]] = set()
        todo = self._tables(pairs)
        while todo:
            seen.update(todo)
            todo = self._tables({pair for o, n in todo for pair in self._vote_table(o, n)} - seen)

    def _vote_table(self, o: int, n: int) -> list[tuple[int, int]]:
        """Let the slots of two objects vote; pairs of further objects that they point to, side by side."""
        functions, texts, objects = self._slots(o, n)
        agreeing = sum(self.new_of[i] == j for i, j in functions)
        permuted = {int(self.new_of[i]) for i, _ in functions} == {j for _, j in functions}
        open_on_both = sum(self.new_of[i] < 0 and self.old_of[j] < 0 for i, j in functions)
        alone = open_on_both == 1 and agreeing == len(functions) - 1  # what replaced the one that vanished
        alike = sum(texts)
        if 2 * alike < len(texts) or not (2 * agreeing >= len(functions) or permuted or alone):
            return []  # elements were inserted, and nothing is side by side
        for i, j in functions:
            if self.how[i] in (How.ORDER, How.SIMILAR, 0):  # what is unique by its bytes was moved in the table
                self.votes.setdefault(i, Counter())[j] += 1
        return objects

    def _tables(self, pairs: set[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those of the paired addresses at which pointers may lie."""
        both = np.array(sorted(pairs), np.int64).reshape(-1, 2)
        holds = np.isin(self.old.image.kinds(both[:, 0]), (Kind.RELRO, Kind.DATA, Kind.CONSTANT))
        slots = self.old.image.relative_places
        first = np.searchsorted(slots, both[:, 0])
        near = np.zeros(len(both), np.bool_)
        if len(slots):
            near = slots[np.minimum(first, len(slots) - 1)] - both[:, 0] < MAX_SLOTS
        return [(int(o), int(n)) for o, n in both[holds & near]]

    def _slots(self, o: int, n: int) -> tuple[list[tuple[int, int]], list[bool], list[tuple[int, int]]]:
        """What the slots of two objects point to, side by side: functions, strings (are they equal?), other objects.

        An object reaches to where something else is named, or as far as pointer follows upon pointer. Objects behind
        strings that differ are of different rows, and are left out.
        """
        old, new = self.old.image, self.new.image
        functions: list[tuple[int, int]] = []
        texts: list[bool] = []
        objects: list[tuple[int, int]] = []
        alike = True
        reach = min(_reach(self.old, o), _reach(self.new, n))
        for offset in range(0, max(MAX_SLOTS, min(reach, MAX_TABLE)), 8):
            to, tn = old.pointer_at(o + offset), new.pointer_at(n + offset)
            if (to is None) != (tn is None) or (to is None and offset >= reach):
                break
            if to is None or tn is None:
                continue
            i, j = self.old.function_of(to), self.new.function_of(tn)
            kinds = old.kind_at(to), new.kind_at(tn)
            if min(i, j) >= 0 and self.old.starts[i] == to and self.new.starts[j] == tn:
                functions.append((i, j))
            elif kinds == (Kind.CONSTANT, Kind.CONSTANT):
                texts.append(old.string_at(to) == new.string_at(tn))
                alike &= texts[-1]
            elif kinds[0] in (Kind.RELRO, Kind.DATA) and kinds[1] in (Kind.RELRO, Kind.DATA):
                objects += [(to, tn)] if alike else []
                alike = True
        return functions, texts, objects

    def _same_pairs(self) -> NDArray[np.int64]:
        same = np.nonzero(self._same())[0]
        return np.stack([same, self.new_of[same]], axis=1)

    def _keep_exports(self) -> None:
        """Exported functions are reached by name from other modules: there the name is the function."""
        old, new = self.old.image.exports, self.new.image.exports
        for name in old.keys() & new.keys():
            i, j = self.old.function_of(old[name]), self.new.function_of(new[name])
            if min(i, j) < 0 or self.old.starts[i] != old[name] or self.new.starts[j] != new[name]:
                continue
            if self.new_of[i] != j and not self._share_name(i, int(self.new_of[i])):
                rival = int(self.old_of[j])
                if rival >= 0:
                    self._unlink(rival)
                self._unlink(i)
                self._link(i, j, How.NAME)

    def _share_name(self, i: int, j: int) -> bool:
        """Two functions are exported under a common name (one of several)."""
        if j < 0:
            return False
        mine = self.old.image.names_at.get(int(self.old.starts[i]), frozenset())
        return bool(mine & self.new.image.names_at.get(int(self.new.starts[j]), frozenset()))

    def _similar(self) -> None:
        for mine, theirs in list(self._gaps()):
            self._best_pairing(mine[:MAX_GAP], theirs[:MAX_GAP])

    def _best_pairing(self, mine: list[int], theirs: list[int]) -> None:
        """Order-preserving pairing with the highest sum of similarities (Needleman-Wunsch without gap cost)."""
        weight = np.array([[self.similarities.of(i, j) for j in theirs] for i in mine])
        weight[weight < MIN_SIMILARITY] = 0
        best = np.zeros((len(mine) + 1, len(theirs) + 1))
        for x in range(len(mine) - 1, -1, -1):
            for y in range(len(theirs) - 1, -1, -1):
                best[x, y] = max(best[x + 1, y], best[x, y + 1], best[x + 1, y + 1] + weight[x, y])
        x = y = 0
        while x < len(mine) and y < len(theirs):
            if weight[x, y] > 0 and best[x, y] == best[x + 1, y + 1] + weight[x, y]:
                self._link(mine[x], theirs[y], How.SIMILAR)
                x, y = x + 1, y + 1
            elif best[x, y] == best[x + 1, y]:
                x += 1
            else:
                y += 1


def _reach(code: Code, address: int) -> int:
    """Bytes from an address to the next one that anything names."""
    following = code.next_named(address)
    return following - address if following is not None else 0


def _exact(code: Code, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the function that starts at each address, or -1."""
    index = code.function_at(addresses)
    return np.where((index >= 0) & (code.starts[index] == addresses), index, -1)


def _increasing(values: list[int]) -> list[int]:
    """Indices of a longest increasing subsequence (patience sorting)."""
    tails: list[int] = []
    at: list[int] = []
    previous = [-1] * len(values)
    for index, value in enumerate(values):
        k = bisect.bisect_left(tails, value)
        if k == len(tails):
            tails.append(value)
            at.append(index)
        else:
            tails[k], at[k] = value, index
        previous[index] = at[k - 1] if k else -1
    chain = []
    index = at[-1] if at else -1
    while index >= 0:
        chain.append(index)
        index = previous[index]
    return chain[::-1]
