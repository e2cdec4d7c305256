"""Which old address names the same thing as a new one, learned from code that did not change (D3).

Every reference of a function whose masked bytes are equal in both builds *pins* an old address to a new one.
Pins are votes. Writable data is mapped one to one, by strict majority on both sides: a function whose reference
is outvoted, or that would move a variable out of the row in which its neighbours stayed, names something else than
it did, and has changed though its bytes have not. Weaker evidence, used only where there is no pin: surviving
instructions of functions that changed.
"""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from elfdiff.correspondence.matching import Matching
from elfdiff.correspondence.pairing import distinct, paired
from elfdiff.decoding.code import Code
from elfdiff.images.image import STT_OBJECT, Addresses, Image, Kind, SymbolTable

DATA_KINDS = (Kind.CONSTANT, Kind.RELRO, Kind.DATA, Kind.BSS, Kind.GOT, Kind.NONE, Kind.OTHER)
WRITABLE = (Kind.DATA, Kind.BSS)


class Evidence(IntEnum):
    """What a mapped address rests on, strongest first."""

    NAME = 0  # both builds export it under the same name
    PIN = 1  # an unchanged function names both
    SURVIVOR = 2  # a surviving instruction of a changed function names both


CERTAIN = (Evidence.NAME, Evidence.PIN)


@dataclass(frozen=True)
class Pins:
    """Reference pairs of unchanged functions: indices into the two builds' references, and their targets."""

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    old: Addresses
    new: Addresses


@dataclass(frozen=True)
class AddressMap:
    """``old_of[new address] = (old address, Evidence)``, for data of every kind.

    Of writable data only what is one to one is mapped; the rest is ``disputed`` (new addresses).
    """

    pins: Pins = field(repr=False)
    old_of: dict[int, tuple[int, Evidence]] = field(repr=False)
    disputed: frozenset[int]
    order: Order = field(repr=False)

    def certain(self, address: int) -> int | None:
        """The old address that names the same thing, on evidence that needs no other."""
        found = self.old_of.get(address)
        return found[0] if found and found[1] in CERTAIN else None


class Order:
    """Mapped variables side by side: what lies between two that moved alike moved alike."""

    def __init__(self, old: Image, new: Image, mapped: dict[int, int]) -> None:
        """``mapped``: new address -> old address, of writable data."""
        self.old, self.new = old, new
        self.addresses = sorted(mapped)
        self.mapped = mapped

    def around(self, address: int) -> tuple[int | None, int | None]:
        """The mapped new addresses next to a new address, in its section; not the address itself."""
        section = self.new.section_at(address)
        if section is None:
            return None, None
        below = bisect.bisect_left(self.addresses, address) - 1
        above = bisect.bisect_right(self.addresses, address)
        left = self.addresses[below] if below >= 0 and self.addresses[below] >= section.start else None
        right = self.addresses[above] if above < len(self.addresses) and self.addresses[above] < section.end else None
        return left, right

    def fits(self, old: int, new: int) -> bool:
        """False when the variables on both sides moved alike and this one would not have, without need.

        Where something else lies at the place that it would have moved to, it had to go elsewhere: clang orders
        variables by their first use.
        """
        left, right = self.around(new)
        if left is None or right is None:
            return True
        shift = self.mapped[left] - left
        if self.mapped[right] - right != shift or old - new == shift:
            return True
        return self.mapped.get(old - shift, old) != old


def learn(old: Code, new: Code, matching: Matching, alike: NDArray[np.int64]) -> AddressMap:
    """Learn the map from the references of matched functions.

    ``alike`` are function pairs (n, 2) whose instructions make the same references though their bytes differ (line
    numbers); they pin like equal ones. Start-up code without unwind information pins nothing: it names the ends of
    sections, where variables begin that it does not mean.
    """
    pins = _pins(old, new, np.concatenate([matching.pairs(same=True), alike]))
    data = np.isin(new.image.kinds(pins.new), DATA_KINDS) & np.isin(old.image.kinds(pins.old), DATA_KINDS)
    data &= old.has_unwind[old.references.function[pins.left]]
    forward, backward = _tally(pins.old[data], pins.new[data])
    voters = _voters(new, pins, data)
    old_of: dict[int, tuple[int, Evidence]] = {}
    elements = _Elements(old.image, new.image)
    for n, votes in forward.items():
        o = _winner(votes)
        if o is not None and n not in voters.constant and elements.differ(o, n):
            continue  # whoever names these has changed, though its bytes have not
        if n in voters.constant:
            old_of[n] = _most_voted(votes), Evidence.PIN
        elif o is not None and _winner(backward[o]) == n and not _other_name(old.image, new.image, o, n):
            old_of[n] = o, Evidence.PIN
    old_of.update(_by_name(old.image, new.image))
    old_of.update({n: (elements.old_of(n), Evidence.NAME) for n in forward if n not in old_of and elements.differed(n)})
    order = _order(old, new, old_of)
    for n in [n for n, (o, e) in old_of.items() if e is Evidence.PIN and n in voters.single and not order.fits(o, n)]:
        del old_of[n]
    order = _order(old, new, old_of)
    disputed = frozenset(n for n in forward if n not in old_of)
    _add_survivors(old, new, matching, old_of, disputed, order, elements)
    return AddressMap(pins, old_of, disputed, order)


def _order(old: Code, new: Code, old_of: dict[int, tuple[int, Evidence]]) -> Order:
    kinds = new.image.kinds(np.array(list(old_of), np.int64))
    writable = np.isin(kinds, WRITABLE).tolist()
    variables = {n: o for (n, (o, _)), mine in zip(old_of.items(), writable, strict=True) if mine}
    return Order(old.image, new.image, variables)


@dataclass(frozen=True)
class _Voters:
    constant: frozenset[int]  # new addresses that are not writable: the linker may merge and split those
    single: frozenset[int]  # new addresses that one function alone names


def _voters(new: Code, pins: Pins, data: NDArray[np.bool_]) -> _Voters:
    kinds = new.image.kinds(pins.new[data])
    constant = frozenset(np.unique(pins.new[data][~np.isin(kinds, WRITABLE)]).tolist())
    functions = new.references.function[pins.right[data]]
    pairs, _, _ = distinct(pins.new[data], functions.astype(np.int64))
    addresses, counts = np.unique(pairs[:, 0], return_counts=True)
    return _Voters(constant, frozenset(addresses[counts == 1].tolist()))


def _winner(votes: dict[int, int]) -> int | None:
    """What has more votes than any other."""
    first = _most_voted(votes)
    return first if len(votes) == 1 or list(votes.values()).count(votes[first]) == 1 else None


def _most_voted(votes: dict[int, int]) -> int:
    """What has the most votes; of several the first."""
    return max(votes, key=votes.__getitem__)


def _other_name(old: Image, new: Image, o: int, n: int) -> bool:
    """Both are exported, and not under a common name."""
    first, second = old.names_at.get(o), new.names_at.get(n)
    return first is not None and second is not None and not first & second


class _Elements:
    """Places in variables that both builds have under one name, where both have all of their symbols.

    An instruction that named one element of an array and now names another is the same but for that. Only the offset is
    believed: of equal names whose numbers the compiler gave (``count.1``) each build may mean another variable.
    """

    def __init__(self, old: Image, new: Image) -> None:
        known = old.symbols.complete and new.symbols.complete
        self._old, self._new = (_objects(image.symbols) if known else ([], []) for image in (old, new))
        self._old_named, self._new_named = (_by_unique_name(objects[1]) for objects in (self._old, self._new))
        self._differed: dict[int, int] = {}

    def differ(self, o: int, n: int) -> bool:
        """Whether an old and a new address are different places in one variable."""
        first, second = _around(self._old, o), _around(self._new, n)
        if first is None or second is None or first[1:] != second[1:] or o - first[0] == n - second[0]:
            return False
        name = first[2]
        if self._old_named.get(name) != first or self._new_named.get(name) != second:
            return False
        self._differed[n] = first[0] + n - second[0]
        return True

    def differed(self, n: int) -> bool:
        """Whether a new address was found to be another place than some old one."""
        return n in self._differed

    def old_of(self, n: int) -> int:
        """The old address of such a place."""
        return self._differed[n]


_Object = tuple[int, int, str]  # address, size, name
_Objects = tuple[list[int], list[_Object]]


def _objects(symbols: SymbolTable) -> _Objects:
    """Data symbols by rising address, and their addresses."""
    rows = zip(symbols.values.tolist(), symbols.sizes.tolist(), symbols.types.tolist(), symbols.names, strict=True)
    found = sorted({(value, size, name) for value, size, kind, name in rows if kind == STT_OBJECT and size})
    return [value for value, _, _ in found], found


def _by_unique_name(objects: list[_Object]) -> dict[str, _Object]:
    counts = Counter(name for _, _, name in objects)
    return {item[2]: item for item in objects if counts[item[2]] == 1}


def _around(objects: _Objects, address: int) -> _Object | None:
    index = bisect.bisect_right(objects[0], address) - 1
    if index < 0:
        return None
    found = objects[1][index]
    return found if address < found[0] + found[1] else None


def _by_name(old: Image, new: Image) -> dict[int, tuple[int, Evidence]]:
    """Exported variables: other modules and the dynamic linker know them by name and by nothing else."""
    common = {n: old.exports[name] for name, n in new.exports.items() if name in old.exports}
    return {
        n: (o, Evidence.NAME) for n, o in common.items() if new.kind_at(n) in WRITABLE and old.kind_at(o) in WRITABLE
    }


def _pins(old: Code, new: Code, pairs: NDArray[np.int64]) -> Pins:
    left, right = paired(old, new, pairs)
    return Pins(left, right, old.references.target[left], new.references.target[right])


def _tally(first: Addresses, second: Addresses) -> tuple[dict[int, dict[int, int]], dict[int, dict[int, int]]]:
    """Votes new -> old and old -> new."""
    # Plain dictionaries: most addresses have one vote, and making a Counter costs more than counting it.
    forward: dict[int, dict[int, int]] = {}
    backward: dict[int, dict[int, int]] = {}
    pairs, _, counts = distinct(first, second)
    for (o, n), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        forward.setdefault(n, {})[o] = count
        backward.setdefault(o, {})[n] = count
    return forward, backward


def _add_survivors(
    old: Code,
    new: Code,
    matching: Matching,
    old_of: dict[int, tuple[int, Evidence]],
    disputed: frozenset[int],
    order: Order,
    elements: _Elements,
) -> None:
    left, right, _ = matching.alignments.references(matching.pairs(same=False))
    first, second = old.references.target[left], new.references.target[right]
    data = np.isin(new.image.kinds(second), DATA_KINDS) & np.isin(old.image.kinds(first), DATA_KINDS)
    forward, _ = _tally(first[data], second[data])
    taken = set(order.mapped.values())
    for n, votes in forward.items():
        o = _most_voted(votes)
        writable = new.image.kind_at(n) in WRITABLE
        wrong = writable and (o in taken or not order.fits(o, n) or _other_name(old.image, new.image, o, n))
        wrong |= writable and elements.differ(o, n)
        if n not in old_of and n not in disputed and len(votes) == 1 and not wrong:
            old_of[n] = o, Evidence.SURVIVOR
