"""What functions do with exceptions: compared between two builds.

The running program finds a function's handlers through its unwind tables: the frame description names the
personality routine (through its CIE) and the function's exception table, and that one names the types that are caught.
These references are as much the function's as those of its instructions: where they differ the function has changed,
and in a patch they lead to the running program's routine and types.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from elfdiff.code import Code
from elfdiff.cursor import damaged
from elfdiff.ehframe import FdeTable, read_cie, read_fde_table, scan_eh_frame
from elfdiff.errors import BadInput
from elfdiff.image import Addresses, Image
from elfdiff.lsda import EncodedPointer, Lsda, read_lsda, read_pointer
from elfdiff.matching import Matching
from elfdiff.typeinfo import TypePairs

TYPE_SYMBOL = "_ZTI"

Identity = tuple[str, bytes | int]
"""What an encoded pointer leads to, as both builds would call it."""


@dataclass(frozen=True)
class Handlers:
    """The personality routine and the exception table of one function; None where it has none.

    ``own`` are the fields of its frame description that name the function itself and its table.
    """

    personality: EncodedPointer | None
    table: Lsda | None
    own: tuple[EncodedPointer, ...] = ()


class UnwindTables:
    """The unwind tables of one build, by function."""

    def __init__(self, code: Code) -> None:
        """Nothing is read until it is asked for."""
        self.code = code

    @cached_property
    def fdes(self) -> FdeTable:
        """All frame descriptions of the image."""
        image = self.code.image
        if image.eh_frame_hdr is not None:
            return read_fde_table(image.eh_frame_hdr, image.read)
        assert image.eh_frame is not None
        return scan_eh_frame(*image.eh_frame, image.read)

    @cached_property
    def with_table(self) -> Addresses:
        """Functions that have an exception table, ascending."""
        found: Addresses = np.nonzero(self.code.has_lsda)[0].astype(np.int64)
        return found

    def of(self, function: int) -> Handlers:
        """The handlers of a function. Raises BadInput where its tables are damaged or of an unknown kind."""
        start, read = int(self.code.starts[function]), self.code.image.read
        row = self.fdes.find(start)
        if row < 0 or int(self.fdes.starts[row]) != start:
            return Handlers(None, None)
        address = int(self.fdes.addresses[row])
        cie = read_cie(address + 4 - int.from_bytes(read(address + 4, 4), "little"), read)
        personality = None
        if cie.personality_place:
            personality = read_pointer(cie.personality_place, cie.personality_encoding, read)
        begin = read_pointer(address + 8, cie.fde_encoding, read)
        area = int(self.fdes.lsdas[row])
        if not area:
            return Handlers(personality, None, (begin,))
        table = read_lsda(area, start, read)
        self._require_inside(function, table)
        # Behind start and size, of equal width, comes the length of the augmentation data, one byte (``ehframe``).
        named = read_pointer(begin.place + 2 * begin.width + 1, cie.lsda_encoding, read)
        own = (begin, named) if table.landing_base is None else (begin, named, table.landing_base)
        return Handlers(personality, table, own)

    def _require_inside(self, function: int, table: Lsda) -> None:
        size = self.code.size(function)
        if not all(0 <= site.landing_pad < size for site in table.call_sites if site.landing_pad is not None):
            damaged("a language-specific data area", table.address, "a landing pad lies outside of its function")


class HandlerComparison:
    """Whether two functions do the same with exceptions."""

    def __init__(self, old: Code, new: Code, matching: Matching) -> None:
        """Nothing is read until it is asked for."""
        self.matching = matching
        self.old, self.new = UnwindTables(old), UnwindTables(new)
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
