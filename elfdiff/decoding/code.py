"""The functions of an image and every reference that their instructions make.

A reference is a field of an instruction that names an address: relative to ``rip`` everywhere, and in images
linked at a fixed address also an absolute 32- or 64-bit field whose value lies in a section of the image. The
latter is a reading, not a fact (an integer can look like an address); whoever rewrites it needs a second witness.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from elfdiff.decoding.decode_x86_64 import Decoded, RefKind, decode, instruction_starts
from elfdiff.decoding.exceptiontables import UnwindTables
from elfdiff.errors import BadInput, Refused
from elfdiff.images.image import Addresses, Image, Kind
from elfdiff.unwinding.ehframe import FdeTable, read_fde_table, scan_eh_frame

LEA = 0x8D
NOP_MODRM, NOP, INT3 = 0x11F, 0x90, 0xCC


class FieldKind(IntEnum):
    """What the bytes of a reference are. The first six equal ``decode_x86_64.RefKind``."""

    MEMORY = 1
    CALL = 2
    JUMP = 3
    BRANCH = 4
    SHORT = 5
    ABSOLUTE_DISPLACEMENT = 6  # disp32 without rip, sign-extended
    ABSOLUTE_IMMEDIATE = 7  # imm32
    ABSOLUTE_IMMEDIATE64 = 8  # movabs imm64


TRANSFERS = (FieldKind.CALL, FieldKind.JUMP, FieldKind.BRANCH, FieldKind.SHORT)


@dataclass(frozen=True)
class References:
    """All references, ordered by instruction and field; arrays of shape (n,)."""

    function: NDArray[np.int32]  # index of the function that makes it
    instruction: Addresses
    field: Addresses  # address of the first byte of the field
    end: Addresses  # address behind the instruction: what a relative field counts from
    kind: NDArray[np.uint8]  # FieldKind
    opcode: NDArray[np.uint16]
    target: Addresses
    internal: NDArray[np.bool_]  # stays inside the function; not masked
    first: NDArray[np.int64]  # per function: its references are [first[i], last[i])
    last: NDArray[np.int64]

    def of(self, function: int) -> slice:
        """The references of one function."""
        return slice(int(self.first[function]), int(self.last[function]))


@dataclass(frozen=True)
class Code:
    """Functions are sorted by address; index i is the i-th function. ``base`` is the address of ``raw[0]``."""

    image: Image
    base: int
    raw: NDArray[np.uint8] = field(repr=False)
    decoded: Decoded = field(repr=False)
    starts: Addresses
    ends: Addresses
    has_unwind: NDArray[np.bool_]  # an FDE gives the bounds; else what lies between FDEs
    has_lsda: NDArray[np.bool_]
    sound: NDArray[np.bool_]  # instructions fill the function exactly
    is_start: NDArray[np.bool_] = field(repr=False)  # per byte: an instruction starts here
    references: References = field(repr=False)
    masked: NDArray[np.uint8] = field(repr=False)  # ``raw`` with the fields that lead outside zeroed

    def __len__(self) -> int:
        """Number of functions."""
        return len(self.starts)

    def function_at(self, addresses: Addresses) -> NDArray[np.int64]:
        """Index of the function that contains each address, or -1."""
        index = np.searchsorted(self.starts, addresses, "right") - 1
        inside = (index >= 0) & (addresses < self.ends[np.clip(index, 0, None)])
        return np.where(inside, index, -1)

    def function_of(self, address: int) -> int:
        """Index of the function that contains one address, or -1."""
        index = bisect.bisect_right(self._start_list, address) - 1
        return index if index >= 0 and address < int(self.ends[index]) else -1

    @cached_property
    def _start_list(self) -> list[int]:
        starts: list[int] = self.starts.tolist()
        return starts

    def size(self, function: int) -> int:
        """Bytes of a function."""
        return int(self.ends[function] - self.starts[function])

    def masked_bytes(self, function: int) -> bytes:
        """The function with every field zeroed that leads outside of it."""
        a, b = int(self.starts[function]) - self.base, int(self.ends[function]) - self.base
        return self.masked[a:b].tobytes()

    def raw_bytes(self, function: int) -> bytes:
        """The function as it is in the file."""
        a, b = int(self.starts[function]) - self.base, int(self.ends[function]) - self.base
        return self.raw[a:b].tobytes()

    def instructions(self, function: int) -> NDArray[np.int64]:
        """Offsets into ``raw`` of the function's instructions."""
        first, last = self._instruction_bounds
        return self._instruction_offsets[first[function] : last[function]]

    def instructions_of(self, functions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The instructions of several functions end to end; those of the k-th are [bounds[k], bounds[k + 1])."""
        first, last = (bound[functions] for bound in self._instruction_bounds)
        bounds = np.concatenate([[0], np.cumsum(last - first)])
        step = np.arange(bounds[-1]) - np.repeat(bounds[:-1], last - first)
        return self._instruction_offsets[np.repeat(first, last - first) + step], bounds

    @cached_property
    def instruction_counts(self) -> NDArray[np.int64]:
        """Instructions of each function."""
        first, last = self._instruction_bounds
        return last - first

    @cached_property
    def _instruction_offsets(self) -> NDArray[np.int64]:
        return np.nonzero(self.is_start)[0]

    @cached_property
    def _instruction_bounds(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        offsets = self._instruction_offsets
        return np.searchsorted(offsets, self.starts - self.base), np.searchsorted(offsets, self.ends - self.base)

    @cached_property
    def outside(self) -> NDArray[np.int64]:
        """Indices of the references that are not internal."""
        return np.nonzero(~self.references.internal)[0]

    def instruction_at(self, addresses: Addresses) -> NDArray[np.bool_]:
        """Whether an instruction of some function starts at each address."""
        offsets = addresses - self.base
        inside = (offsets >= 0) & (offsets < len(self.is_start))
        return inside & self.is_start[np.clip(offsets, 0, len(self.is_start) - 1)]

    @cached_property
    def unwind(self) -> UnwindTables:
        """The exception tables of the functions."""
        return UnwindTables(self)

    @cached_property
    def referenced(self) -> Addresses:
        """Every address that code or a pointer slot of the image names or that it exports, sorted, no repetition."""
        exported = np.array(list(self.image.exports.values()), np.int64)
        named = self.references.target[~self.references.internal]
        return np.unique(np.concatenate([named, self.image.relative_targets, exported, self.unwind.slots]))

    @cached_property
    def _referenced_list(self) -> list[int]:
        referenced: list[int] = self.referenced.tolist()
        return referenced

    def next_named(self, address: int) -> int | None:
        """The next address behind this one that anything names (``referenced``), None where there is none."""
        index = bisect.bisect_right(self._referenced_list, address)
        return self._referenced_list[index] if index < len(self._referenced_list) else None

    @cached_property
    def may_be_data(self) -> NDArray[np.bool_]:
        """Per function: no FDE covers it, and as code it is broken or leads where no instruction begins.

        Assemblers put tables in .text (perlasm), and those decode as anything.
        """
        references = self.references
        broken = (self.image.kinds(references.target) == Kind.TEXT) & ~self.instruction_at(references.target)
        found = ~self.sound
        found[np.unique(references.function[broken])] = True
        return found & ~self.has_unwind

    def between_functions(self, address: int) -> bytes | None:
        """What lies from an address of the code to the next function; None inside of functions."""
        index = bisect.bisect_right(self._start_list, address)
        section = self.image.section_at(address)
        if section is None or section.kind is not Kind.TEXT or self.function_of(address) >= 0:
            return None
        end = min(section.end, self._start_list[index]) if index < len(self._start_list) else section.end
        return self.image.read(address, end - address)

    @cached_property
    def named_by_unwound(self) -> frozenset[int]:
        """The addresses that functions with unwind information or pointer slots name: start-up code left out."""
        rows = ~self.references.internal & self.has_unwind[self.references.function]
        return frozenset(self.references.target[rows].tolist()) | frozenset(self.image.relative_targets.tolist())

    @cached_property
    def names(self) -> tuple[str, ...]:
        """A name for each function: its symbol, or its address."""
        symbols = self.image.symbols
        known: dict[int, str] = {}
        for value, kind, name in zip(symbols.values.tolist(), symbols.types.tolist(), symbols.names, strict=True):
            if kind in (2, 10) or value not in known:
                known[value] = name
        return tuple(known.get(start, hex(start)) for start in self.starts.tolist())


def code_bytes(image: Image) -> tuple[int, NDArray[np.uint8]]:
    """Address and bytes of what lies from the first section of code to the last. Raises Refused where there is none."""
    text = [s for s in image.sections if s.kind in (Kind.TEXT, Kind.PLT)]
    if not any(s.kind is Kind.TEXT for s in text):
        raise Refused(f"{image.path}: no section holds code", next_step="name a program or a shared library")
    base, high = min(s.start for s in text), max(s.end for s in text)
    return base, image.memory[base - image.base : high - image.base]


def load_code(image: Image) -> Code:
    """Find and decode the functions of an image. Raises BadInput or Refused as ``read_fde_table`` does."""
    base, raw = code_bytes(image)
    decoded = decode(raw)
    starts, ends, has_unwind, has_lsda = _bounds(image, raw, decoded, base)
    is_start, final = instruction_starts(decoded.length, starts - base, ends - base)
    sound = final == ends - base
    references = _references(image, decoded, is_start, base, starts, ends, raw, has_unwind)
    return Code(
        image=image,
        base=base,
        raw=raw,
        decoded=decoded,
        starts=starts,
        ends=ends,
        has_unwind=has_unwind,
        has_lsda=has_lsda,
        sound=sound,
        is_start=is_start,
        references=references,
        masked=_mask(raw, base, references),
    )


def _fde_table(image: Image) -> FdeTable:
    if image.eh_frame_hdr is not None:
        return read_fde_table(image.eh_frame_hdr, image.read)
    assert image.eh_frame is not None
    return scan_eh_frame(*image.eh_frame, image.read)


def _bounds(
    image: Image, raw: NDArray[np.uint8], decoded: Decoded, base: int
) -> tuple[Addresses, Addresses, NDArray[np.bool_], NDArray[np.bool_]]:
    """Function bounds: the FDEs, and between them whatever is not padding."""
    table = _fde_table(image)
    kinds = image.kinds(table.starts)
    mine = (kinds == Kind.TEXT) & (table.sizes > 0)
    starts, sizes, lsda = table.starts[mine], table.sizes[mine], table.has_lsda[mine]
    if len(starts) and int((starts + sizes).max()) > base + len(raw):
        raise BadInput(
            f"{image.path}: .eh_frame describes code behind the end of the code",
            why=f"a function ends at {int((starts + sizes).max()):#x}, the code at {base + len(raw):#x}",
            next_step="the file is damaged; take it from its package again",
        )
    gaps = _gaps(image, starts, starts + sizes, raw, decoded, base)
    all_starts = np.concatenate([starts, np.array([a for a, _ in gaps], np.int64)])
    all_ends = np.concatenate([starts + sizes, np.array([b for _, b in gaps], np.int64)])
    unwind = np.arange(len(all_starts)) < len(starts)
    order = np.argsort(all_starts, kind="stable")
    has_lsda = np.concatenate([lsda, np.zeros(len(gaps), np.bool_)])
    return all_starts[order], all_ends[order], unwind[order], has_lsda[order]


def _gaps(
    image: Image,
    starts: Addresses,
    ends: Addresses,
    raw: NDArray[np.uint8],
    decoded: Decoded,
    base: int,
) -> list[tuple[int, int]]:
    """Code that no FDE covers: (start, end) of each stretch that holds more than padding."""
    length, opcode = decoded.length, decoded.opcode
    padding = (opcode == NOP_MODRM) | (opcode == NOP) | (opcode == INT3)
    found: list[tuple[int, int]] = []
    for section in (s for s in image.sections if s.kind is Kind.TEXT):
        inside = (starts >= section.start) & (starts < section.end)
        lows = [section.start, *ends[inside].tolist()]
        highs = [*starts[inside].tolist(), section.end]
        for low, high in zip(lows, highs, strict=True):
            at, stop = low - base, high - base
            while at < stop and (padding[at] or raw[at] == 0):
                at += int(length[at]) if padding[at] else 1
            if at < stop:
                found.append((at + base, high))
    return found


def _references(
    image: Image,
    decoded: Decoded,
    is_start: NDArray[np.bool_],
    base: int,
    starts: Addresses,
    ends: Addresses,
    raw: NDArray[np.uint8],
    has_unwind: NDArray[np.bool_],
) -> References:
    at = np.nonzero(is_start & decoded.valid)[0]
    columns = [_relative_fields(raw, decoded, at)]
    if image.fixed_address:
        columns += _absolute_fields(image, raw, decoded, at, base, starts, ends)
    instruction, offset, kind, target = (np.concatenate(c) for c in zip(*columns, strict=True))
    order = np.lexsort((offset, instruction))
    instruction, offset, kind, target = instruction[order], offset[order], kind[order], target[order]
    relative = kind <= FieldKind.SHORT
    target = np.where(relative, target + base, target)
    # Data among code reads as anything: there, what leads out of the image is no reference. In functions it is
    # one: a weak symbol that nothing defines has address 0 in programs at a fixed address.
    real = (target >= image.base) & (target < image.high)
    real |= has_unwind[np.searchsorted(starts, instruction + base, "right") - 1]
    instruction, offset, kind, target = instruction[real], offset[real], kind[real], target[real]
    relative = relative[real]
    address = instruction + base
    function = np.searchsorted(starts, address, "right") - 1
    inside = (target >= starts[function]) & (target < ends[function])
    own_address = (kind == FieldKind.MEMORY) & (target == starts[function])
    counts = np.arange(len(starts))
    return References(
        function=function.astype(np.int32),
        instruction=address,
        field=address + offset,
        end=address + decoded.length[instruction],
        kind=kind,
        opcode=decoded.opcode[instruction],
        target=target,
        internal=relative & inside & ~own_address,
        first=np.searchsorted(function, counts, "left"),
        last=np.searchsorted(function, counts, "right"),
    )


_Columns = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]


def _relative_fields(raw: NDArray[np.uint8], decoded: Decoded, at: NDArray[np.int64]) -> _Columns:
    """(instruction, field offset, kind, target), all but the kind relative to the code's base."""
    kind = decoded.ref_kind[at]
    at, kind = at[kind != RefKind.NONE], kind[kind != RefKind.NONE]
    offset = decoded.ref_field[at].astype(np.int64)
    place = at + offset
    wide = word_at(raw, place)
    narrow = raw[place].astype(np.int8).astype(np.int64)
    displacement = np.where(kind == RefKind.SHORT, narrow, wide)
    return at, offset, kind, at + decoded.length[at] + displacement


def _absolute_fields(
    image: Image,
    raw: NDArray[np.uint8],
    decoded: Decoded,
    at: NDArray[np.int64],
    base: int,
    starts: Addresses,
    ends: Addresses,
) -> list[_Columns]:
    """Fields of a fixed-address image whose value lies in it, behind its headers; targets are absolute.

    An address of code is one only where a function starts, or inside the function itself (a label): other numbers
    in the range of the code are numbers.
    """
    low = min(section.start for section in image.sections if section.kind is not Kind.OTHER)  # lld: .rodata comes first
    high = image.sections[-1].end
    owner = np.zeros(len(raw), np.int64)
    owner[at] = np.searchsorted(starts, at + base, "right") - 1
    found = []
    for fields, sizes, size, kind in (
        (decoded.disp_field, None, 4, FieldKind.ABSOLUTE_DISPLACEMENT),
        (decoded.imm_field, decoded.imm_size, 4, FieldKind.ABSOLUTE_IMMEDIATE),
        (decoded.imm_field, decoded.imm_size, 8, FieldKind.ABSOLUTE_IMMEDIATE64),
    ):
        has = (fields[at] > 0) if sizes is None else (sizes[at] == size)
        place = at[has] + fields[at[has]]
        value = word_at(raw, place)
        if size == 8:
            value = (value & 0xFFFFFFFF) | (word_at(raw, place + 4) << 32)
        which = at[has]
        label = (value >= starts[owner[which]]) & (value < ends[owner[which]])
        code = np.isin(value, starts) | label | (image.kinds(value) != Kind.TEXT)
        named = (value >= low) & (value <= high) & code
        if sizes is not None:
            named &= _may_take_address(decoded, which)
        which = which[named]
        kinds = np.full(len(which), kind, np.uint8)
        found.append((which, place[named] - which, kinds, value[named]))
    return found


def _may_take_address(decoded: Decoded, at: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Instructions whose immediate can be an address: mov, push, add, sub, cmp; nobody masks or multiplies one."""
    opcode, operation = decoded.opcode[at], decoded.modrm[at] >> 3 & 7
    group = (opcode == 0x81) & np.isin(operation, (0, 5, 7))  # add, sub, cmp
    move = ((opcode >= 0xB8) & (opcode <= 0xBF)) | (opcode == 0xC7)
    may: NDArray[np.bool_] = group | move | np.isin(opcode, (0x68, 0x05, 0x2D, 0x3D))
    return may


def word_at(raw: NDArray[np.uint8], place: NDArray[np.int64]) -> NDArray[np.int64]:
    """The signed little-endian 32-bit values at the places; near the end, the last four bytes."""
    place = np.minimum(place, max(0, len(raw) - 4))
    parts = [raw[place + k].astype(np.uint32) << np.uint32(8 * k) for k in range(4)]
    word: NDArray[np.uint32] = parts[0] | parts[1] | parts[2] | parts[3]
    return word.view(np.int32).astype(np.int64)


def _mask(raw: NDArray[np.uint8], base: int, references: References) -> NDArray[np.uint8]:
    masked = raw.copy()
    outside = ~references.internal
    place, kind = references.field[outside] - base, references.kind[outside]
    masked[place] = 0
    for k in range(1, 4):
        masked[place[kind != FieldKind.SHORT] + k] = 0
    for k in range(4, 8):
        masked[place[kind == FieldKind.ABSOLUTE_IMMEDIATE64] + k] = 0
    return masked
