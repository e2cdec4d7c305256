"""The exception tables of one build, by function: personality routine, call sites, types (``lsda``)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from elfdiff.errors import BadInput
from elfdiff.images.image import Addresses
from elfdiff.unwinding.cursor import damaged
from elfdiff.unwinding.ehframe import FdeTable, read_cie, read_fde_table, scan_eh_frame
from elfdiff.unwinding.lsda import EncodedPointer, Lsda, read_lsda, read_pointer

if TYPE_CHECKING:
    from elfdiff.decoding.code import Code


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

    @cached_property
    def slots(self) -> Addresses:
        """The slots that hold types and personality routines for the tables, and nothing else; sorted."""
        found: set[int] = set()
        for function in self.with_table.tolist():
            try:
                handlers = self.of(function)
            except BadInput:
                continue  # what the table cannot be read for is refused where the function is compared or patched
            pointers = [handlers.personality, *(handlers.table.types.values() if handlers.table else ())]
            found |= {p.address for p in pointers if p is not None and p.indirect and p.address is not None}
        return np.array(sorted(found), np.int64)

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
