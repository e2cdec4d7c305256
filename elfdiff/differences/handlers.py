"""What functions do with exceptions: compared between two builds.

The running program finds a function's handlers through its unwind tables: the frame description names the
personality routine (through its CIE) and the function's exception table, and that one names the types that are caught.
These references are as much the function's as those of its instructions: where they differ the function has changed,
and in a patch they lead to the running program's routine and types.
"""

from __future__ import annotations

import numpy as np

from elfdiff.correspondence.matching import Matching
from elfdiff.decoding.code import Code
from elfdiff.decoding.exceptiontables import UnwindTables
from elfdiff.errors import BadInput
from elfdiff.images.image import Image
from elfdiff.images.typeinfo import TypePairs
from elfdiff.unwinding.lsda import EncodedPointer, Lsda

TYPE_SYMBOL = "_ZTI"

Identity = tuple[str, bytes | int]
"""What an encoded pointer leads to, as both builds would call it."""


class HandlerComparison:
    """Whether two functions do the same with exceptions."""

    def __init__(self, old: Code, new: Code, matching: Matching) -> None:
        """Nothing is read until it is asked for."""
        self.matching = matching
        self.old, self.new = old.unwind, new.unwind
        self.types = TypePairs(old.image, new.image)

    def differing(self) -> list[int]:
        """New functions whose exception table says something else than the one of their counterpart, ascending.

        A table that cannot be read counts as different.
        """
        if not (len(self.old.with_table) or len(self.new.with_table)):
            return []
        theirs = self.matching.new_of[self.old.with_table]
        functions = np.union1d(self.new.with_table, theirs[theirs >= 0])
        paired = functions[self.matching.old_of[functions] >= 0]
        return [j for j in paired.tolist() if not self._same(int(self.matching.old_of[j]), j)]

    def _same(self, i: int, j: int) -> bool:
        try:
            first, second = self.old.of(i), self.new.of(j)
        except BadInput:
            return False
        return self._same_pointer(first.personality, second.personality) and self._same_table(first.table, second.table)

    def _same_table(self, first: Lsda | None, second: Lsda | None) -> bool:
        if first is None or second is None:
            return first is None and second is None
        plain = first.call_sites == second.call_sites and first.specifications == second.specifications
        if not plain or first.types.keys() != second.types.keys():
            return False
        return all(self._same_pointer(first.types[index], second.types[index]) for index in first.types)

    def _same_pointer(self, first: EncodedPointer | None, second: EncodedPointer | None) -> bool:
        if first is None or second is None:
            return first is None and second is None
        a, b = self._identity(self.old, first, is_new=False), self._identity(self.new, second, is_new=True)
        return a is not None and a == b

    def _identity(self, tables: UnwindTables, pointer: EncodedPointer, *, is_new: bool) -> Identity | None:
        """None where nothing says what it is."""
        if pointer.address is None:
            return "nothing", 0
        image, address = tables.code.image, pointer.address
        symbol = _symbol(image, address)
        if symbol:
            return ("type", symbol[len(TYPE_SYMBOL) :]) if symbol.startswith(TYPE_SYMBOL.encode()) else ("name", symbol)
        if pointer.indirect:
            held = image.pointer_at(address)
            if held is None:
                return None
            address = held
        name = (self.types.new if is_new else self.types.old).name(address)
        if name is not None:
            return "type", name.lstrip(b"*")
        function = tables.code.function_of(address)
        if function < 0 or int(tables.code.starts[function]) != address:
            return None
        return "function", function if is_new else int(self.matching.new_of[function])


def _symbol(image: Image, address: int) -> bytes:
    """The symbol that a slot, a linkage stub or a copied variable at an address stands for; empty where none does."""
    slot = image.slots.get(image.plt.get(address, address))
    return slot.symbol.encode("utf-8", "surrogateescape") if slot is not None and not slot.addend else b""
