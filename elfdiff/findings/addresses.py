"""Addresses of which it is not certain what they are, and variables that start otherwise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from elfdiff.building.patchbuild import Draft
from elfdiff.building.variables import object_at
from elfdiff.decoding.code import LEA, Code, FieldKind
from elfdiff.decoding.identity_x86_64 import compared_addresses
from elfdiff.findings.places import AT_END, AT_START, MANY, called_by, functions, name_at, where
from elfdiff.images.image import STT_OBJECT, Image, Kind, SymbolTable
from elfdiff.patchobject import Finding, Severity

MAX_DISTANCE = 1 << 40
"""No image is larger."""


def unbound_references(draft: Draft) -> Iterator[Finding]:
    """A reference of the new code for which no evidence says what it names in the running program."""
    by_target: dict[int, set[int]] = defaultdict(set)
    why: dict[int, str] = {}
    resized = {target for target, _, _ in resized_variables(draft)}
    for item in draft.resolver.unbound:
        if item.target not in resized:
            by_target[item.target].add(item.function)
            why[item.target] = item.why
    if by_target:
        places = [
            f"{where(draft.comparison.new.image, t)} ({why[t]}) in {', '.join(_users(draft, by_target[t]))}"
            for t in sorted(by_target)[:MANY]
        ]
        yield Finding(
            "unpinned-address",
            Severity.REFUSE,
            f"{len(by_target)} address(es) of the new build cannot be found in the old one",
            tuple(places[:MANY]),
            "the new code would read or write something else than the running program does",
            "builds with symbols (not stripped) say what the addresses are",
        )


def added_distances(draft: Draft) -> Iterator[Finding]:
    """A changed function adds 64-bit distances to an address of its own image: no reference shows what it means.

    The large and the medium code model of position-independent code (psABI x86-64, 3.5.4) do; in both the distance
    is the immediate of a ``movabs``, where any other number of its size has a shorter encoding.
    """
    code = draft.comparison.new
    if code.image.fixed_address:
        return
    found = [j for j in sorted({code.function_of(f.new_start) for f in draft.functions}) if _adds_distances(code, j)]
    if found:
        yield Finding(
            "unpinned-address",
            Severity.REFUSE,
            f"{len(found)} changed function(s) compute addresses from 64-bit distances",
            functions(draft, found),
            "what such a distance leads to is somewhere else in the running program",
            "build without -mcmodel=large or -mcmodel=medium, or restart the program",
        )


def _adds_distances(code: Code, function: int) -> bool:
    at = code.instructions(function)
    at = at[code.decoded.imm_size[at] == 8]
    if not len(at):
        return False
    distances = np.array(
        [int.from_bytes(code.raw[a : a + 8].tobytes(), "little", signed=True) for a in at + code.decoded.imm_field[at]],
        np.int64,
    )
    distances = distances[np.abs(distances // 2) < MAX_DISTANCE]
    rows = code.references.of(function)
    taken = code.references.target[rows][code.references.opcode[rows] == LEA]
    reached = (taken[:, None] + distances).ravel()
    return bool(((reached >= code.image.base) & (reached < code.image.high)).any())


def _users(draft: Draft, indices: set[int]) -> tuple[str, ...]:
    """Some of the functions that name an address; -1 stands for a pointer in data."""
    return functions(draft, sorted(indices - {-1})[:3]) + (("data",) if -1 in indices else ())


def variable_sizes(draft: Draft) -> Iterator[Finding]:
    """A variable that the patch uses has another size by the symbols of both builds."""
    image = draft.comparison.new.image
    resized = resized_variables(draft)
    variables = _writable(image, {target for target, _, _ in resized})
    sizes = {name_at(image, variables[target]): (old, new) for target, old, new in resized}
    grown = {name: pair for name, pair in sizes.items() if pair[1] > pair[0]}
    shrunk = {name: pair for name, pair in sizes.items() if pair[1] < pair[0]}
    if grown:
        yield Finding(
            "variable-size",
            Severity.REFUSE,
            f"{len(grown)} variable(s) that the new code uses grew",
            tuple(f"{name}: {a} -> {b} bytes" for name, (a, b) in sorted(grown.items())[:MANY]),
            "the running program has room for the old size, and behind that lies another variable",
            "restart the program",
        )
    if shrunk:
        yield Finding(
            "variable-size",
            Severity.WARN,
            f"{len(shrunk)} variable(s) that the new code uses shrank",
            tuple(f"{name}: {a} -> {b} bytes" for name, (a, b) in sorted(shrunk.items())[:MANY]),
            "the running program keeps all of it; the new code does not look at the rest",
            "nothing to do",
        )


def resized_variables(draft: Draft) -> list[tuple[int, int, int]]:
    """(new address that the patch names, old size, new size) of variables whose symbols differ in size.

    The address map must know them, or their names be unique in both builds.
    """
    comparison = draft.comparison
    old, new = comparison.old.image.symbols, comparison.new.image.symbols
    references, mapped = comparison.new.references, draft.resolver.variables.mapped
    used = {int(references.target[row]) for row in draft.resolver.resolved}
    used |= {item.target for item in draft.resolver.unbound}
    named = _variables_by_name(old), _variables_by_name(new)
    found = []
    for target, address in sorted(_writable(comparison.new.image, used).items()):
        index = object_at(new, address)
        if index is None:
            continue
        at, name = mapped.get(int(new.values[index])), new.names[index]
        other = object_at(old, at) if at is not None else None
        if at is None and len(named[0].get(name, ())) == 1 == len(named[1].get(name, ())):
            other = named[0][name][0]
        if other is not None and old.sizes[other] != new.sizes[index]:
            found.append((target, int(old.sizes[other]), int(new.sizes[index])))
    return found


def _writable(image: Image, targets: set[int]) -> dict[int, int]:
    """The targets that are writable variables, or slots of the GOT that hold the address of one -> the variable."""
    found = {}
    for target in targets:
        address: int | None = target
        if image.kind_at(target) is Kind.GOT:
            slot = image.slots.get(target)
            address = image.exports.get(slot.symbol) if slot is not None else image.pointer_at(target)
        if address is not None and image.kind_at(address) in (Kind.DATA, Kind.BSS):
            found[target] = address
    return found


def _variables_by_name(symbols: SymbolTable) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for index in np.nonzero(symbols.types == STT_OBJECT)[0].tolist():
        found[symbols.names[index]].append(index)
    return found


def guessed_addresses(draft: Draft) -> Iterator[Finding]:
    """Variables bound by their neighbours alone."""
    guessed = draft.resolver.by_interval
    if guessed:
        yield Finding(
            "neighbour-address",
            Severity.WARN,
            f"{len(guessed)} variable(s) are bound by their neighbours, which all moved alike",
            tuple(f"{n:#x} -> {o:#x}" for n, o in sorted(guessed.items())[:MANY]),
            "no unchanged function names them; the old build names the predicted addresses",
            "builds with symbols (not stripped) would make it certain",
        )


def ambiguous_functions(draft: Draft) -> Iterator[Finding]:
    """A function that live data may point to, and that unchanged code takes for another one than its bytes say."""
    old = draft.comparison.old
    references = old.references
    taken = (references.opcode == LEA) | (references.kind >= FieldKind.ABSOLUTE_DISPLACEMENT)
    pointers = np.union1d(references.target[taken], old.image.relative_targets)
    doubted = draft.comparison.matching.contradicted | _folded(draft)
    doubtful = [i for i in sorted(doubted) if int(old.starts[i]) in pointers]
    if doubtful:
        yield Finding(
            "ambiguous-function",
            Severity.REFUSE,
            f"{len(doubtful)} function(s) of the old build may be one or another function of the new one",
            functions(draft, doubtful, old=True),
            "their bytes say one thing, what refers to them another; pointers to them may be stored in live data",
            "restart the program",
        )


def kept_functions(draft: Draft) -> Iterator[Finding]:
    """An old function without counterpart to which tables of the old build point: who copied a pointer keeps it."""
    comparison = draft.comparison
    old = comparison.old
    # ``constructors`` speaks for what the start and the end of a program call.
    pointed = set(old.image.relative_targets.tolist()) - called_by(old.image, (*AT_START, *AT_END))
    kept = [i for i in comparison.removed if int(old.starts[i]) in pointed and not _has_twin(old, i, comparison.new)]
    if kept:
        yield Finding(
            "kept-function",
            Severity.REFUSE,
            f"{len(kept)} function(s) that tables of the old build point to are gone in the new one",
            functions(draft, kept, old=True),
            "objects that exist may hold pointers to them and would go on with the old code, fixed or not",
            "if no object that lives on holds such a pointer, or may go on with the old code, --allow kept-function",
        )


def _has_twin(old: Code, i: int, new: Code) -> bool:
    """A function of the new build has the same code: which of several twins is gone makes no difference."""
    alike = np.nonzero(new.ends - new.starts == old.size(i))[0].tolist()
    return any(new.masked_bytes(j) == old.masked_bytes(i) for j in alike)


def known_by_address(draft: Draft) -> Iterator[Finding]:
    """The new code compares pointers with a constant that differs: stored ones lead to the old constant."""
    comparison, resolver = draft.comparison, draft.resolver
    found: dict[int, int] = {}
    for function in draft.functions:
        j = comparison.new.function_of(function.new_start)
        for target in compared_addresses(comparison.new, j):
            owned = target in resolver.owned.constants and target not in comparison.tables[1]
            if owned and target in comparison.addresses.old_of and not resolver.may_be_end(j, target):
                found.setdefault(target, j)
    if found:
        yield Finding(
            "constant-identity",
            Severity.REFUSE,
            f"{len(found)} constant(s) that differ are compared by their address",
            tuple(where(comparison.new.image, t) for t in sorted(found)[:MANY]),
            "pointers to them that the running program has stored lead to the old ones, and are equal no more",
            "restart the program; or --allow constant-identity if no such pointer is stored",
        )


def _folded(draft: Draft) -> set[int]:
    """Old functions whose address unchanged code takes where it takes that of another, unrelated one in the new build.

    Linkers that fold identical code (--icf=all) make one function of two, or two of one when they part. A change of
    the source from one function to another that both builds have is none of this.
    """
    comparison = draft.comparison
    old, new, pins = comparison.old, comparison.new, comparison.addresses.pins
    references, matching = old.references, comparison.matching
    taken = (references.opcode[pins.left] == LEA) | (references.kind[pins.left] >= FieldKind.ABSOLUTE_DISPLACEMENT)
    first, second = old.function_at(pins.old[taken]), new.function_at(pins.new[taken])
    entries = (first >= 0) & (second >= 0)
    entries &= (old.starts[first] == pins.old[taken]) & (new.starts[second] == pins.new[taken])
    first, second = first[entries], second[entries]
    doubtful = (matching.new_of[first] != second) & ((matching.new_of[first] < 0) | (matching.old_of[second] < 0))
    return set(first[doubtful].tolist())


def initial_values(draft: Draft) -> Iterator[Finding]:
    """Writable variables whose initial value differs: the running one has its own value by now."""
    differing = draft.comparison.differing_data
    if differing:
        yield Finding(
            "initial-value",
            Severity.REFUSE,
            f"{len(differing)} writable variable(s) start with another value in the new build",
            tuple(where(draft.comparison.new.image, n) for _, n in differing[:MANY]),
            "code that did not change uses them, and the running program keeps the value that it has",
            "if the running values may stay, --allow initial-value",
        )


def new_variables(draft: Draft) -> Iterator[Finding]:
    """Variables that only the patch has: they start with their initial value."""
    own = draft.resolver.new_variables
    if own:
        yield Finding(
            "new-variable",
            Severity.WARN,
            f"{len(own)} variable(s) are new and live in the patch",
            tuple(where(draft.comparison.new.image, n) for n in sorted(own)[:MANY]),
            "they start with their initial value when the patch is applied",
            "nothing to do",
        )
