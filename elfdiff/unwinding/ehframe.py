"""The table of frame description entries (FDEs): where every function starts and how long it is.

Reads ``.eh_frame_hdr`` and ``.eh_frame`` (LSB 5.0 core, "Exception Frames"; DWARF 5, 6.4.1) out of any source
of bytes: a file's image, the memory of a process, the vDSO, a patch. All FDEs are decoded at once by numpy;
each CIE is parsed once. What a function's unwind rules are is the business of ``cfi``.

Anything that is not as the standard says raises ``BadInput``: a wrong bound here would be a wrong function.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from elfdiff.unwinding.cursor import Cursor, ReadBytes, damaged, read_exactly

Addresses = NDArray[np.int64]

MAX_EH_FRAME = 1 << 28
"""Largest ``.eh_frame`` that is read, in bytes; the largest programs known have a tenth of it."""
MAX_FDES = 1 << 24
"""Most entries a search table may have."""
_MAX_CIE = 1 << 12
_NOT_ZERO = re.compile(rb"[^\0]")

# Pointer encodings: low four bits the format, next three the base (LSB 5.0, 10.5.1).
PE_ABSPTR, PE_PCREL, PE_DATAREL, PE_INDIRECT, PE_OMIT = 0x00, 0x10, 0x30, 0x80, 0xFF
_FORMATS = {0x0: "<u8", 0x2: "<u2", 0x3: "<u4", 0x4: "<u8", 0xA: "<i2", 0xB: "<i4", 0xC: "<i8"}


@dataclass(frozen=True)
class FdeTable:
    """All FDEs of one image, sorted by start; one element each, shape (n,).

    ``starts`` are virtual addresses of the code, ``sizes`` its bytes, ``addresses`` the virtual addresses of
    the FDEs themselves, ``lsdas`` those of the language-specific data areas (C++ exception tables) that they
    name, 0 where they name none.
    Ranges do not overlap.
    """

    starts: Addresses
    sizes: Addresses
    addresses: Addresses
    lsdas: Addresses

    @property
    def has_lsda(self) -> NDArray[np.bool_]:
        """Whether each FDE names a language-specific data area."""
        named: NDArray[np.bool_] = self.lsdas != 0
        return named

    def __len__(self) -> int:
        """Number of FDEs."""
        return len(self.starts)

    def find(self, address: int) -> int:
        """Index of the FDE whose range holds ``address``, or -1."""
        index = int(np.searchsorted(self.starts, address, side="right")) - 1
        if index >= 0 and address < int(self.starts[index]) + int(self.sizes[index]):
            return index
        return -1


@dataclass(frozen=True)
class Cie:
    """A common information entry: what its FDEs share (DWARF 5, 6.4.1; augmentations: LSB 5.0, 10.6.1.1).

    ``lsda_encoding`` and ``personality_encoding`` are ``PE_OMIT`` where there is none; ``personality_place`` is the
    address of the field that names the personality routine. ``has_augmentation`` is the letter z.
    """

    address: int
    code_alignment: int
    data_alignment: int
    return_address_register: int
    fde_encoding: int
    lsda_encoding: int
    has_augmentation: bool
    is_signal_frame: bool
    instructions: bytes = field(repr=False)
    personality_encoding: int = PE_OMIT
    personality_place: int = 0


# --- the search table -------------------------------------------------------------------------------------


def read_fde_table(eh_frame_hdr: int, read: ReadBytes) -> FdeTable:
    """All FDEs that the binary search table at ``eh_frame_hdr`` lists (LSB 5.0 core, 10.6.2).

    Raises ``BadInput`` where the header, its table or an FDE is damaged, where the table is absent or not
    sorted, and where FDEs overlap or disagree with the table; then ``scan_eh_frame`` may still do.
    """
    starts, addresses = _search_table(eh_frame_hdr, read)
    if len(starts) == 0:
        return _empty_table()
    if not bool(np.all(starts[1:] >= starts[:-1])):
        damaged(".eh_frame_hdr", eh_frame_hdr, "its search table is not sorted")
    table = _decode_fdes(addresses, _block_of(addresses, read), read)
    if not np.array_equal(table.starts, starts):
        damaged(".eh_frame_hdr", eh_frame_hdr, "its search table disagrees with the FDEs that it names")
    return table


def _search_table(header: int, read: ReadBytes) -> tuple[Addresses, Addresses]:
    """(starts, FDE addresses) as the table has them, virtual addresses."""
    version, frame_encoding, count_encoding, table_encoding = read_exactly(read, header, 4, ".eh_frame_hdr")
    if version != 1:
        damaged(".eh_frame_hdr", header, f"version {version}, only 1 is defined")
    if PE_OMIT in (count_encoding, table_encoding):
        damaged(".eh_frame_hdr", header, "it has no search table")
    frame_size = np.dtype(fixed_format(frame_encoding, header)).itemsize
    count_type = np.dtype(fixed_format(count_encoding, header))
    if count_encoding & 0xF0:
        damaged(".eh_frame_hdr", header, f"FDE count encoding {count_encoding:#x} is not a plain number")
    place = header + 4 + frame_size
    raw_count = read_exactly(read, place, count_type.itemsize, ".eh_frame_hdr")
    count = int(np.frombuffer(raw_count, count_type)[0])
    if not 0 <= count <= MAX_FDES:
        damaged(".eh_frame_hdr", place, f"it claims {count} FDEs, more than {MAX_FDES} are not believed")
    return _search_entries(header, place + count_type.itemsize, count, table_encoding, read)


def _search_entries(header: int, place: int, count: int, encoding: int, read: ReadBytes) -> tuple[Addresses, Addresses]:
    entry = np.dtype(fixed_format(encoding, header))
    data = read_exactly(read, place, count * 2 * entry.itemsize, "the search table of .eh_frame_hdr")
    values = np.frombuffer(data, entry).astype(np.int64)
    relative = encoding & 0xF0
    if relative == PE_DATAREL:
        values = values + header
    elif relative == PE_PCREL:
        values = values + (place + entry.itemsize * np.arange(2 * count, dtype=np.int64))
    elif relative != PE_ABSPTR:
        damaged(".eh_frame_hdr", header, f"table encoding {encoding:#x} is not supported")
    if count and int(values.min()) < 0:
        damaged(".eh_frame_hdr", header, "its search table names a negative address")
    return values[0::2], values[1::2]


def fixed_format(encoding: int, address: int) -> str:
    """The numpy format of a pointer encoding of fixed size; ``BadInput`` for others (LEB128, unknown)."""
    try:
        return _FORMATS[encoding & 0x0F]
    except KeyError:
        damaged("a pointer encoding", address, f"{encoding:#x} has no fixed size or is not defined")


def _block_of(addresses: Addresses, read: ReadBytes) -> _Block:
    """The bytes from the first FDE to the end of the last."""
    low, last = int(addresses.min()), int(addresses.max())
    length = int.from_bytes(read_exactly(read, last, 4, "an FDE"), "little")
    size = last + 4 + length - low
    if size > MAX_EH_FRAME:
        damaged(".eh_frame", low, f"its FDEs span {size} bytes, more than {MAX_EH_FRAME} are not believed")
    return _Block(np.frombuffer(read_exactly(read, low, size, ".eh_frame"), np.uint8), low)


# --- .eh_frame from its beginning -------------------------------------------------------------------------


def scan_eh_frame(eh_frame: int, size: int, read: ReadBytes) -> FdeTable:
    """All FDEs of the ``.eh_frame`` at ``eh_frame``, ``size`` bytes; for files without a search table.

    A zero terminator inside the section does not end it (linkers leave them between object files). Raises
    ``BadInput`` as ``read_fde_table`` does.
    """
    if not 0 <= size <= MAX_EH_FRAME:
        damaged(".eh_frame", eh_frame, f"{size} bytes, more than {MAX_EH_FRAME} are not believed")
    data = read_exactly(read, eh_frame, size, ".eh_frame")
    offsets = _fde_offsets(data, eh_frame)
    if not offsets:
        return _empty_table()
    addresses = np.array(offsets, dtype=np.int64) + eh_frame
    return _decode_fdes(addresses, _Block(np.frombuffer(data, np.uint8), eh_frame), read)


def _fde_offsets(data: bytes, address: int) -> list[int]:
    offsets: list[int] = []
    position, end = 0, len(data)
    while position + 4 <= end:
        length = int.from_bytes(data[position : position + 4], "little")
        if length == 0:
            position = _after_zeros(data, position)
            continue
        if length < 4 or position + 4 + length > end:
            damaged("an entry of .eh_frame", address + position, f"length {length:#x} does not fit")
        if data[position + 4 : position + 8] != b"\0\0\0\0":  # zero there makes it a CIE
            offsets.append(position)
        position += 4 + length
    return offsets


def _after_zeros(data: bytes, position: int) -> int:
    """Where the first entry after a run of zeros may start; entries are aligned to 4 bytes."""
    found = _NOT_ZERO.search(data, position)
    if found is None:
        return len(data)
    return position + (found.start() - position) // 4 * 4


# --- FDEs, all at once ------------------------------------------------------------------------------------


def _empty_table() -> FdeTable:
    none = np.zeros(0, dtype=np.int64)
    return FdeTable(none, none, none, none)


@dataclass(frozen=True)
class _Block:
    """A run of bytes of ``.eh_frame`` and its virtual address."""

    data: NDArray[np.uint8]
    address: int

    def gather(self, places: Addresses, format_: str) -> Addresses:
        """The integer of that format at each virtual address; all must lie inside."""
        window = np.lib.stride_tricks.sliding_window_view(self.data, np.dtype(format_).itemsize)
        return np.ascontiguousarray(window[places - self.address]).view(format_).ravel().astype(np.int64)

    def require(self, holds: bool, why: str) -> None:
        """Raise ``BadInput`` unless it holds."""
        if not holds:
            damaged(".eh_frame", self.address, why)


def _decode_fdes(addresses: Addresses, block: _Block, read: ReadBytes) -> FdeTable:
    end = block.address + len(block.data)
    block.require(bool(np.all((addresses >= block.address) & (addresses <= end - 8))), "an FDE is cut off")
    lengths = block.gather(addresses, "<u4")
    block.require(not bool(np.any(lengths == 0xFFFFFFFF)), "64-bit entries are not supported")
    ends = addresses + 4 + lengths
    block.require(bool(np.all((lengths >= 8) & (ends <= end))), "the length of an FDE does not fit")
    cie_pointers = block.gather(addresses + 4, "<u4")
    block.require(bool(np.all(cie_pointers != 0)), "a CIE stands where an FDE should")
    cie_addresses, which = np.unique(addresses + 4 - cie_pointers, return_inverse=True)
    cies = [read_cie(int(address), read) for address in cie_addresses]
    starts, sizes, after = _ranges([cies[i].fde_encoding for i in which], addresses, block, ends)
    lsda_encodings = [cies[i].lsda_encoding for i in which]
    return _checked_table(starts, sizes, addresses, _lsdas(lsda_encodings, after, block, ends))


def _ranges(
    encodings: list[int], addresses: Addresses, block: _Block, ends: Addresses
) -> tuple[Addresses, Addresses, Addresses]:
    """(starts, sizes, address of what follows them) for each FDE, by the pointer encoding of its CIE."""
    starts, sizes, after = (np.zeros(len(addresses), dtype=np.int64) for _ in range(3))
    for encoding in set(encodings):
        block.require(encoding & 0xF0 in (PE_ABSPTR, PE_PCREL), f"FDE encoding {encoding:#x} is not supported")
        rows = np.flatnonzero(np.array(encodings) == encoding)
        format_ = fixed_format(encoding, block.address)
        width = np.dtype(format_).itemsize
        places = addresses[rows] + 8
        after[rows] = places + 2 * width
        block.require(bool(np.all(after[rows] <= ends[rows])), "an FDE is too short")
        values = block.gather(places, format_)
        starts[rows] = values + places if encoding & 0xF0 == PE_PCREL else values
        sizes[rows] = block.gather(places + width, format_)
    return starts, sizes, after


def _lsdas(encodings: list[int], places: Addresses, block: _Block, ends: Addresses) -> Addresses:
    """The LSDA pointer in each FDE's augmentation data, at ``places``; 0 where it is null or absent."""
    found = np.zeros(len(places), dtype=np.int64)
    for encoding in set(encodings) - {PE_OMIT}:
        rows = np.flatnonzero(np.array(encodings) == encoding)
        format_ = fixed_format(encoding, block.address)
        width = np.dtype(format_).itemsize
        here = places[rows]
        block.require(bool(np.all(here + 1 + width <= ends[rows])), "an FDE ends within its augmentation")
        # A ULEB128 length; more than one byte would be more augmentation data than any producer knows.
        lengths = block.gather(here, "<u1")
        block.require(bool(np.all((lengths >= width) & (lengths < 0x80))), "unknown augmentation data")
        values = block.gather(here + 1, format_)
        used = values != 0
        block.require(encoding & 0xF0 in (PE_ABSPTR, PE_PCREL) or not used.any(), f"LSDA encoding {encoding:#x}")
        found[rows] = np.where(used, values + (here + 1) * (encoding & 0xF0 == PE_PCREL), 0)
    return found


def _checked_table(starts: Addresses, sizes: Addresses, addresses: Addresses, lsdas: Addresses) -> FdeTable:
    order = np.lexsort((sizes, starts))
    table = FdeTable(starts[order], sizes[order], addresses[order], lsdas[order])
    ends = table.starts + table.sizes  # wraps into the negative where the range leaves the address space
    wrong = (table.starts < 0) | (table.sizes < 0) | (ends < table.starts)
    wrong[:-1] |= table.starts[1:] < ends[:-1]
    if bool(wrong.any()):
        first = int(np.flatnonzero(wrong)[0])
        start, size = int(table.starts[first]), int(table.sizes[first])
        why = f"its range, {size} bytes at {start:#x}, overlaps another or is impossible"
        damaged("an FDE", int(table.addresses[first]), why)
    return table


# --- CIEs -------------------------------------------------------------------------------------------------


def read_cie(address: int, read: ReadBytes) -> Cie:
    """The CIE at a virtual address. Raises ``BadInput`` where it is damaged or its augmentation unknown."""
    length = int.from_bytes(read_exactly(read, address, 4, "a CIE"), "little")
    if not 9 <= length <= _MAX_CIE:
        damaged("a CIE", address, f"length {length:#x} is not believed")
    cursor = Cursor(read_exactly(read, address + 4, length, "a CIE"), address + 4, "a CIE")
    if cursor.unsigned(4) != 0:
        cursor.fail("it is not a CIE: its id is not 0")
    version = cursor.unsigned(1)
    if version not in (1, 3):  # .eh_frame knows no other; 4 adds fields that nothing writes there
        cursor.fail(f"version {version}")
    augmentation = cursor.string()
    code_alignment, data_alignment = cursor.uleb128(), cursor.sleb128()
    return_register = cursor.unsigned(1) if version == 1 else cursor.uleb128()
    letters = _augmentation(augmentation, cursor)
    return Cie(
        address=address,
        code_alignment=code_alignment,
        data_alignment=data_alignment,
        return_address_register=return_register,
        fde_encoding=letters.fde_encoding,
        lsda_encoding=letters.lsda_encoding,
        has_augmentation=augmentation.startswith(b"z"),
        is_signal_frame=b"S" in augmentation,
        instructions=cursor.take(len(cursor.data) - cursor.position),
        personality_encoding=letters.personality_encoding,
        personality_place=letters.personality_place,
    )


@dataclass(frozen=True)
class _Augmentation:
    fde_encoding: int = PE_ABSPTR
    lsda_encoding: int = PE_OMIT
    personality_encoding: int = PE_OMIT
    personality_place: int = 0


def _augmentation(letters: bytes, cursor: Cursor) -> _Augmentation:
    """Take the augmentation data of a CIE (LSB 5.0, 10.6.1.1.1); the cursor stands after it then."""
    if not letters:
        return _Augmentation()
    if not letters.startswith(b"z"):
        cursor.fail(f"augmentation {letters!r} does not say how long its data is")
    size = cursor.uleb128()
    data = Cursor(cursor.take(size), cursor.address + cursor.position - size, "the augmentation of a CIE")
    fde_encoding, lsda_encoding = PE_ABSPTR, PE_OMIT
    personality, personality_place = PE_OMIT, 0
    for letter in letters[1:].decode("latin-1"):
        if letter == "R":
            fde_encoding = data.unsigned(1)
        elif letter == "L":
            lsda_encoding = data.unsigned(1)
        elif letter == "P":
            personality = data.unsigned(1)
            personality_place = data.address + data.position
            data.take(np.dtype(fixed_format(personality, address=cursor.address)).itemsize)
        elif letter != "S":
            cursor.fail(f"augmentation {letters!r} has the unknown letter {letter!r}")
    return _Augmentation(fde_encoding, lsda_encoding, personality, personality_place)
