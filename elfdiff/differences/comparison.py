"""Which functions changed, and why: by what their references lead to, not by their bytes (D2).

A function with equal masked bytes is the same only if every reference leads to the same thing: a function to its
match, an import to the same name and version, a constant to the same content, a variable to where the address map
says. What fails that is demoted to changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from elfdiff.correspondence.addressmap import AddressMap, learn
from elfdiff.correspondence.matching import Matching, match
from elfdiff.correspondence.pairing import distinct
from elfdiff.decoding.code import Code
from elfdiff.decoding.jumptables_x86_64 import JumpTable, find_jump_tables
from elfdiff.differences.constants import ConstantVerdicts, compare_constants
from elfdiff.differences.handlers import HandlerComparison
from elfdiff.differences.lines import line_only
from elfdiff.images.image import R_X86_64_IRELATIVE, Image, Kind
from elfdiff.images.linkage_x86_64 import slot_name
from elfdiff.patchobject import Reason

DATA = (Kind.RELRO, Kind.DATA, Kind.BSS)
NAMED_BY_STARTUP = (*DATA, Kind.NONE, Kind.OTHER)
"""Start-up code without unwind information names where sections end; what begins there is not what it means."""
COMPARED_BY_CONTENT = (Kind.CONSTANT, Kind.RELRO)


@dataclass(frozen=True)
class Comparison:
    """Everything that is known of a pair of builds. Functions are indices into ``old`` and ``new``."""

    old: Code
    new: Code
    matching: Matching
    addresses: AddressMap
    constants: ConstantVerdicts
    tables: tuple[dict[int, JumpTable], dict[int, JumpTable]] = field(repr=False)
    changed: dict[int, Reason]  # new function -> why
    line_only: tuple[tuple[int, int], ...]
    added: tuple[int, ...]  # new functions without counterpart
    removed: tuple[int, ...]  # old functions without counterpart
    differing_data: tuple[tuple[int, int], ...]  # (old, new) of writable variables whose initial value differs
    handlers: HandlerComparison = field(repr=False)
    decided: dict[int, tuple[int, int]] = field(default_factory=dict)
    """New function of equal bytes that is changed all the same -> the (old, new) addresses that show it."""

    def old_entry(self, function: int) -> int | None:
        """Old start address of a new function, or None when it has no counterpart."""
        i = int(self.matching.old_of[function])
        return int(self.old.starts[i]) if i >= 0 else None


def compare(old: Code, new: Code) -> Comparison:
    """Compare two builds."""
    matching = match(old, new)
    tables = find_jump_tables(old), find_jump_tables(new)
    lines = line_only(old, new, matching)
    addresses = learn(old, new, matching, np.array(lines, np.int64).reshape(-1, 2))
    constants = compare_constants(old, new, matching, addresses, tables)
    changed = {j: Reason.CODE for j in matching.pairs(same=False)[:, 1].tolist()}
    changed.update({j: Reason.LINES for _, j in lines})
    judge = _Judge(old, new, matching, addresses, constants)
    changed.update(judge.demoted())
    handlers = HandlerComparison(old, new, matching)
    changed.update({j: Reason.HANDLERS for j in handlers.differing() if changed.get(j, Reason.LINES) is Reason.LINES})
    lines = [(i, j) for i, j in lines if changed[j] is Reason.LINES]
    differing = [pair for pair in constants.differing if _writable(old.image, pair[0])]
    return Comparison(
        old=old,
        new=new,
        matching=matching,
        addresses=addresses,
        constants=constants,
        tables=tables,
        changed=changed,
        line_only=tuple(lines),
        added=tuple(np.nonzero(matching.old_of < 0)[0].tolist()),
        removed=tuple(np.nonzero(matching.new_of < 0)[0].tolist()),
        differing_data=tuple(sorted(differing)),
        decided=judge.decided,
        handlers=handlers,
    )


def _writable(image: Image, address: int) -> bool:
    return image.kind_at(address) in (Kind.DATA, Kind.BSS)


class _Judge:
    """Decides for reference pairs whether both lead to the same thing."""

    def __init__(
        self,
        old: Code,
        new: Code,
        matching: Matching,
        addresses: AddressMap,
        constants: ConstantVerdicts,
    ) -> None:
        self.old, self.new, self.matching = old, new, matching
        self.addresses, self.constants = addresses, constants
        self.known: dict[tuple[int, int], Reason | None] = {}
        self.decided: dict[int, tuple[int, int]] = {}

    def demoted(self) -> dict[int, Reason]:
        """New functions of equal bytes that are changed all the same."""
        pins = self.addresses.pins
        pairs, inverse, _ = distinct(pins.old, pins.new)
        verdicts = [self.verdict(o, n) for o, n in pairs.tolist()]
        differs = np.array([v is not None for v in verdicts], np.bool_)[inverse]
        found: dict[int, Reason] = {}
        data = np.isin(self.new.image.kinds(pins.new), NAMED_BY_STARTUP)
        unwound = self.old.has_unwind[self.old.references.function[pins.left]]
        differs &= unwound | ~(data | self._may_be_data())
        for index in np.nonzero(differs)[0].tolist():
            reason = verdicts[int(inverse[index])]
            assert reason is not None
            function = int(self.new.references.function[pins.right[index]])
            found.setdefault(function, reason)
            self.decided.setdefault(function, (int(pins.old[index]), int(pins.new[index])))
        return found

    def _may_be_data(self) -> NDArray[np.bool_]:
        """Pinned references of equal bytes into the middle of other code: what no FDE covers may be a table.

        Assemblers' tables lie in .text (perlasm) and decode as anything; the same bytes are then the same data. A
        changed callee of real code would be the start of a function.
        """
        pins, old, new = self.addresses.pins, self.old.references, self.new.references
        entered = np.isin(pins.old, self.old.starts) | np.isin(pins.new, self.new.starts)
        equal: NDArray[np.bool_] = pins.old - old.end[pins.left] == pins.new - new.end[pins.right]
        equal &= ~entered & (self.old.image.kinds(pins.old) == Kind.TEXT)
        return equal

    def verdict(self, o: int, n: int) -> Reason | None:
        """None when an old and a new address name the same thing, else why not."""
        if (o, n) not in self.known:
            self.known[o, n] = self._verdict(o, n)
        return self.known[o, n]

    def _verdict(self, o: int, n: int) -> Reason | None:
        old_kind, new_kind = self.old.image.kind_at(o), self.new.image.kind_at(n)
        if Kind.TEXT in (old_kind, new_kind):
            return None if self._same_code(o, n) else Reason.CALLEE
        copied = self.old.image.copied(o), self.new.image.copied(n)
        if copied != (None, None):
            return None if copied[0] == copied[1] else Reason.CALLEE
        linkage = (Kind.PLT, Kind.GOT)
        if old_kind in linkage and new_kind in linkage:
            return None if self._same_slot(o, n) else Reason.CALLEE
        if old_kind in COMPARED_BY_CONTENT and new_kind in COMPARED_BY_CONTENT:
            if (o, n) in self.constants.differing:
                return Reason.CONSTANT
            if (o, n) not in self.constants.segments and not self._same_string(o, n):
                return Reason.CONSTANT
            return None
        if not self.old.image.contains(o) and not self.new.image.contains(n):
            return None if o == n else Reason.CALLEE
        known = self.addresses.old_of.get(n)
        if known is None:
            return Reason.CALLEE
        return None if known[0] == o else Reason.CALLEE

    def _same_string(self, o: int, n: int) -> bool:
        text = self.old.image.string_at(o)
        return bool(text) and text == self.new.image.string_at(n)

    def _same_code(self, o: int, n: int) -> bool:
        i, j = self.old.function_of(o), self.new.function_of(n)
        if i < 0 or j < 0:
            return self.old.between_functions(o) == self.new.between_functions(n) is not None
        if self.matching.new_of[i] != j:
            return False
        into_old, into_new = o - int(self.old.starts[i]), n - int(self.new.starts[j])
        return into_old == into_new or (not bool(self.matching.same[i]) and into_old > 0 and into_new > 0)

    def _same_slot(self, o: int, n: int) -> bool:
        """Two linkage stubs or GOT slots that the dynamic linker fills with the same value."""
        old, new = self.old.image, self.new.image
        o, n = old.plt.get(o, o), new.plt.get(n, n)
        first, second = slot_name(old, o), slot_name(new, n)
        if first is None and second is None:
            to, tn = old.pointer_at(o), new.pointer_at(n)
            if to is None or tn is None:
                return to is None and tn is None
            return self.verdict(to, tn) is None
        if first is None or second is None:
            return False
        if first.type == second.type == R_X86_64_IRELATIVE:  # the addend is the resolver
            return self._same_code(first.addend, second.addend)
        return first == second


def changed_functions(comparison: Comparison, *, lines: bool) -> NDArray[np.int64]:
    """New functions that the patch must hold before closure: changed ones and added ones."""
    skipped = {Reason.LINES} if not lines else set()
    mine = {j for j, reason in comparison.changed.items() if reason not in skipped}
    return np.array(sorted(mine | set(comparison.added)), np.int64)
