"""Exception tables (language-specific data areas): what each call site of a function does with an exception.

Read as gcc and clang write them for C++ (Itanium C++ ABI, "Exception Handling", level II; LSB 5.0 core, 10.5.1 for the
pointer encodings; the table itself has no specification beside the assembler text in gcc's except.cc). An area is

    LPStart encoding [LPStart]  TType encoding [ULEB128 distance to TTBase]
    call-site encoding  ULEB128 length  call sites  action records  type table (before TTBase)  specifications (behind)

Everything in it that names code is relative to the function, so a function that only moved keeps its table but for
the types, which are fields of fixed size before TTBase.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from elfdiff.unwinding.cursor import Cursor, ReadBytes, read_exactly
from elfdiff.unwinding.ehframe import PE_ABSPTR, PE_INDIRECT, PE_OMIT, PE_PCREL, fixed_format

MAX_TABLE = 1 << 24
"""Bytes of one area that are believed."""
END_OF_ADDRESSES = 1 << 47
"""Behind the addresses that a program can have (psABI x86-64, 3.3.2)."""
MAX_ACTIONS = 1 << 12
"""Length of one chain of actions that is believed."""
_HEADER = 64


@dataclass(frozen=True)
class EncodedPointer:
    """A pointer field of an unwind table; ``address`` is None for a null pointer.

    ``indirect``: a slot at ``address`` holds the pointer. ``place`` is the field's address, ``width`` its bytes,
    ``relative`` says that it counts from its place.
    """

    place: int
    width: int
    relative: bool
    indirect: bool
    address: int | None
    signed: bool = False


@dataclass(frozen=True)
class CallSite:
    """[start, start + length) from the function's start; ``landing_pad`` likewise, None where there is none.

    ``actions`` are the filters of its chain in order: 0 a cleanup, positive a type's index, negative a
    specification. An empty chain with a landing pad is a cleanup.
    """

    start: int
    length: int
    landing_pad: int | None
    actions: tuple[int, ...]


@dataclass(frozen=True)
class Lsda:
    """One language-specific data area; ``types`` by index (from 1), ``specifications`` by their negative filter."""

    address: int
    call_sites: tuple[CallSite, ...]
    types: dict[int, EncodedPointer] = field(repr=False)
    specifications: dict[int, tuple[int, ...]] = field(repr=False)
    landing_base: EncodedPointer | None = None
    """What landing pads count from, where it is not the function's start."""


def read_pointer(place: int, encoding: int, read: ReadBytes) -> EncodedPointer:
    """The pointer field at ``place`` (LSB 5.0 core, 10.5.1). Raises ``BadInput`` for encodings of other bases."""
    format_ = np.dtype(fixed_format(encoding, place))
    raw = read_exactly(read, place, format_.itemsize, "an encoded pointer")
    value = int(np.frombuffer(raw, format_)[0])
    base = encoding & 0x70
    if base not in (PE_ABSPTR, PE_PCREL):
        Cursor(raw, place, "an encoded pointer").fail(f"encoding {encoding:#x} has a base that nothing gives here")
    relative = base == PE_PCREL
    address = None if value == 0 else value + (place if relative else 0)
    if address is not None and not 0 <= address < END_OF_ADDRESSES:
        Cursor(raw, place, "an encoded pointer").fail(f"{address:#x} is no address of a program")
    return EncodedPointer(
        place, format_.itemsize, relative, bool(encoding & PE_INDIRECT), address, signed=format_.kind == "i"
    )


def read_lsda(address: int, function: int, read: ReadBytes) -> Lsda:
    """The area at ``address`` of the function that starts at ``function``.

    Raises ``BadInput`` where it is damaged, or of a kind that no C++ compiler writes.
    """
    head = _cursor(address, _HEADER, read)
    base: EncodedPointer | None = None
    encoding = head.unsigned(1)
    if encoding != PE_OMIT:
        base = read_pointer(address + head.position, encoding, read)
        head.take(base.width)
    landing_base = function if base is None or base.address is None else base.address
    type_encoding = head.unsigned(1)
    distance = head.uleb128() if type_encoding != PE_OMIT else 0
    type_base = address + head.position + distance if type_encoding != PE_OMIT else None
    site_encoding, length = head.unsigned(1), head.uleb128()
    if length > MAX_TABLE:
        head.fail(f"it claims {length} bytes of call sites")
    sites = Cursor(read_exactly(read, address + head.position, length, _WHERE), address + head.position, _WHERE)
    actions = _Actions(address + head.position + length, read)
    found = []
    while not sites.at_end():
        found.append(_call_site(sites, site_encoding, landing_base - function, actions))
    filters = {value for site in found for value in site.actions}
    specifications = _specifications(filters, type_base, sites, read)
    wanted = {value for value in filters if value > 0} | {t for types in specifications.values() for t in types}
    types = _types(wanted, type_encoding, type_base, sites, read)
    return Lsda(address, tuple(found), types, specifications, base)


_WHERE = "a language-specific data area"


def _cursor(address: int, size: int, read: ReadBytes) -> Cursor:
    """A cursor over up to ``size`` bytes; fewer where what is readable ends before."""
    from elfdiff.errors import LivegraftError  # noqa: PLC0415

    while True:
        try:
            return Cursor(bytes(read(address, size)), address, _WHERE)
        except LivegraftError:
            if size == 1:
                raise
            size //= 2


def _call_site(cursor: Cursor, encoding: int, pad_offset: int, actions: _Actions) -> CallSite:
    start, length, pad = (_number(cursor, encoding) for _ in range(3))
    action = cursor.uleb128()
    return CallSite(start, length, pad + pad_offset if pad else None, actions.chain(action) if pad else ())


def _number(cursor: Cursor, encoding: int) -> int:
    if encoding == 0x01:  # DW_EH_PE_uleb128
        return cursor.uleb128()
    if encoding & 0xF0:
        cursor.fail(f"call-site encoding {encoding:#x}")
    format_ = np.dtype(fixed_format(encoding, cursor.address))
    return cursor.signed(format_.itemsize) if format_.kind == "i" else cursor.unsigned(format_.itemsize)


class _Actions:
    """The action records: (SLEB128 filter, SLEB128 displacement from its own place to the next; 0 ends)."""

    def __init__(self, address: int, read: ReadBytes) -> None:
        self.address, self.read = address, read
        self.known: dict[int, tuple[int, ...]] = {}

    def chain(self, action: int) -> tuple[int, ...]:
        """The filters of the chain that begins ``action - 1`` bytes into the table; empty for 0."""
        if action and action not in self.known:
            self.known[action] = self._walk(action)
        return self.known.get(action, ())

    def _walk(self, action: int) -> tuple[int, ...]:
        place, filters = self.address + action - 1, []
        for _ in range(MAX_ACTIONS):
            cursor = _cursor(place, 20, self.read)
            filters.append(cursor.sleb128())
            at = place + cursor.position
            step = cursor.sleb128()
            if not step:
                return tuple(filters)
            place = at + step
        cursor.fail("its actions go round in a circle")


def _specifications(
    filters: set[int], type_base: int | None, cursor: Cursor, read: ReadBytes
) -> dict[int, tuple[int, ...]]:
    found = {}
    for value in sorted(value for value in filters if value < 0):
        if type_base is None:
            cursor.fail("an action names a specification and there is no type table")
        types, at = [], type_base - value - 1
        for _ in range(MAX_ACTIONS):
            one = _cursor(at, 10, read)
            index = one.uleb128()
            at += one.position
            if not index:
                break
            types.append(index)
        else:
            cursor.fail("a specification does not end")
        found[value] = tuple(types)
    return found


def _types(
    wanted: set[int], encoding: int, type_base: int | None, cursor: Cursor, read: ReadBytes
) -> dict[int, EncodedPointer]:
    if not wanted:
        return {}
    if type_base is None:
        cursor.fail("an action names a type and there is no type table")
    width = np.dtype(fixed_format(encoding, type_base)).itemsize
    return {index: read_pointer(type_base - index * width, encoding, read) for index in sorted(wanted)}
