"""One linked ELF file as it will lie in memory.

Only what survives ``strip`` is required: program and section headers, ``.eh_frame``, the dynamic tables.
Addresses are virtual (link time); ``memory[address - base]`` is the byte there.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elfdiff.errors import BadInput

Addresses = NDArray[np.int64]

PAGE = 0x1000
SHORT_STRING = 128
"""Bytes that are looked at first for the end of a string; few are longer."""
MAX_SPAN = 1 << 31
"""An image that spans more cannot be addressed by rel32; also bounds what a damaged header can make us allocate."""

R_X86_64_64, R_X86_64_COPY, R_X86_64_GLOB_DAT, R_X86_64_JUMP_SLOT = 1, 5, 6, 7
R_X86_64_RELATIVE, R_X86_64_IRELATIVE = 8, 37
SYMBOL_VALUES = (R_X86_64_64, R_X86_64_GLOB_DAT, R_X86_64_JUMP_SLOT)
"""Relocations that fill a slot with the value of a symbol (psABI, section 4.4.1)."""

RELA_DTYPE = np.dtype([("offset", "<u8"), ("info", "<u8"), ("addend", "<i8")])
SYMBOL_DTYPE = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("shndx", "<u2"), ("value", "<u8"), ("size", "<u8")]
)
STT_OBJECT, STT_FUNC, STT_TLS, STT_GNU_IFUNC = 1, 2, 6, 10


class Kind(IntEnum):
    """What a section means to the differ."""

    NONE = 0  # no section there
    TEXT = 1  # code with functions
    PLT = 2  # linkage stubs
    GOT = 3  # slots that the dynamic linker fills, never named by the program
    CONSTANT = 4  # .rodata: never written, no relocations in position-independent images
    RELRO = 5  # written once, by relocation: .data.rel.ro and the like
    DATA = 6  # initialised writable data
    BSS = 7  # zero-initialised writable data
    OTHER = 8  # tables for linker and unwinder


_NO_SECTION = Kind.NONE  # a member is looked up by name in its class each time, which is slow in a hot path


@dataclass(frozen=True)
class Section:
    """An allocated, non-empty section; ``end`` is exclusive."""

    name: str
    start: int
    end: int
    kind: Kind
    loaded_end: int  # == end unless SHT_NOBITS, then == start


@dataclass(frozen=True)
class LoadSegment:
    """A PT_LOAD program header; ``flags`` are PF_X=1, PF_W=2, PF_R=4."""

    vaddr: int
    memsz: int
    filesz: int
    flags: int


@dataclass(frozen=True)
class Slot:
    """An 8-byte place that the dynamic linker fills with the value of a symbol."""

    type: int
    symbol: str
    version: str
    addend: int
    weak: bool = False  # 0 where nothing defines the symbol


@dataclass(frozen=True)
class TlsTemplate:
    """PT_TLS: the initial image of thread-local storage."""

    vaddr: int
    filesz: int
    memsz: int
    align: int


@dataclass(frozen=True)
class SymbolTable:
    """Defined symbols, sorted by address: the best table that the file has (.symtab, else .dynsym)."""

    values: Addresses
    sizes: Addresses
    types: NDArray[np.uint8]
    names: tuple[str, ...]
    complete: bool  # .symtab: static symbols are named as well


@dataclass(frozen=True)
class Export:
    """A defined dynamic symbol: ``value`` is an address, or an offset in thread-local storage; ``type`` is STT_*."""

    name: str
    version: str  # empty where it has none
    value: int
    size: int
    type: int

    @property
    def key(self) -> str:
        """Name and version: two versions of one name are two things."""
        return f"{self.name}@{self.version}" if self.version else self.name


@dataclass(frozen=True)
class ThreadLocal:
    """A thread-local variable by its symbol; ``offset`` counts from the start of the template."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Image:
    """See the module. Arrays must be treated as read-only."""

    path: Path
    build_id: str
    fixed_address: bool
    base: int
    memory: NDArray[np.uint8]
    segments: tuple[LoadSegment, ...]
    sections: tuple[Section, ...]
    relative_places: Addresses = field(repr=False)  # sorted; the pointer slots of the image ...
    relative_targets: Addresses = field(repr=False)  # ... and what each points to
    slots: dict[int, Slot] = field(repr=False)  # symbolic slots by address
    plt: dict[int, int] = field(repr=False)  # linkage stub -> its slot
    tls: TlsTemplate | None
    eh_frame_hdr: int | None
    eh_frame: tuple[int, int] | None  # start, size
    symbols: SymbolTable = field(repr=False)
    exported: tuple[Export, ...] = field(repr=False)  # what other modules reach by name
    thread_locals: tuple[ThreadLocal, ...] | None = field(repr=False)  # None where .symtab was stripped
    copies: frozenset[int]  # variables of libraries that the dynamic linker copies into the program
    needed: tuple[str, ...]

    @cached_property
    def exports(self) -> dict[str, int]:
        """Name with version -> address of the exported functions and variables, thread-local ones left out."""
        return {export.key: export.value for export in self.exported if export.type != STT_TLS}

    @cached_property
    def names_at(self) -> dict[int, frozenset[str]]:
        """The exported names of each address that has any."""
        found: dict[int, set[str]] = {}
        for name, address in self.exports.items():
            found.setdefault(address, set()).add(name)
        return {address: frozenset(names) for address, names in found.items()}

    @cached_property
    def _copied(self) -> tuple[list[int], list[int]]:
        """Start and end of each variable that the dynamic linker copies into the program, by rising address."""
        starts = sorted(self.copies)
        ends = []
        for start in starts:
            rows = slice(*np.searchsorted(self.symbols.values, [start, start + 1]).tolist())
            ends.append(start + max(1, *self.symbols.sizes[rows].tolist(), 0))
        return starts, ends

    def copied(self, address: int) -> tuple[str, int] | None:
        """(symbol, offset into it) of the library's variable whose copy an address lies in; None where in none."""
        starts, ends = self._copied
        index = bisect.bisect_right(starts, address) - 1
        if index < 0 or address >= ends[index]:
            return None
        return self.slots[starts[index]].symbol, address - starts[index]

    @property
    def name(self) -> str:
        """The file's name without directories."""
        return self.path.name

    @property
    def high(self) -> int:
        """One past the last address of the image."""
        return self.base + len(self.memory)

    def contains(self, address: int) -> bool:
        """Whether an address lies in the image."""
        return self.base <= address < self.high

    def read(self, address: int, size: int) -> bytes:
        """The bytes at a virtual address. Raises BadInput outside the image."""
        offset = address - self.base
        if offset < 0 or size < 0 or offset + size > len(self.memory):
            raise BadInput(
                f"{self.path}: address {address:#x} (+{size}) lies outside the image",
                why="a table of the file points to where no segment is",
                next_step="the file is damaged; take it from its package again",
            )
        return self.memory[offset : offset + size].tobytes()

    @cached_property
    def _section_starts(self) -> Addresses:
        return np.array([s.start for s in self.sections], np.int64)

    @cached_property
    def _section_ends(self) -> Addresses:
        return np.array([s.end for s in self.sections], np.int64)

    @cached_property
    def _section_kinds(self) -> NDArray[np.uint8]:
        return np.array([s.kind for s in self.sections], np.uint8)

    def kinds(self, addresses: Addresses) -> NDArray[np.uint8]:
        """The ``Kind`` of the section at each address."""
        index = np.clip(np.searchsorted(self._section_starts, addresses, "right") - 1, 0, None)
        inside = (addresses >= self._section_starts[index]) & (addresses < self._section_ends[index])
        return np.where(inside, self._section_kinds[index], np.uint8(Kind.NONE)).astype(np.uint8)

    def section_at(self, address: int) -> Section | None:
        """The section that contains an address."""
        index = bisect.bisect_right(self._start_list, address) - 1
        if index < 0 or address >= self.sections[index].end:
            return None
        return self.sections[index]

    @cached_property
    def _start_list(self) -> list[int]:
        return [section.start for section in self.sections]

    def kind_at(self, address: int) -> Kind:
        """The ``Kind`` of the section at one address."""
        starts, sections = self._start_list, self.sections
        index = bisect.bisect_right(starts, address) - 1
        if index < 0 or address >= sections[index].end:
            return _NO_SECTION
        return sections[index].kind

    def section(self, name: str) -> Section | None:
        """The section of that name."""
        return next((s for s in self.sections if s.name == name), None)

    def int32_at(self, addresses: Addresses) -> Addresses:
        """The signed little-endian 32-bit values at the addresses."""
        offsets = addresses - self.base
        parts = [self.memory[offsets + k].astype(np.uint32) << np.uint32(8 * k) for k in range(4)]
        word: NDArray[np.uint32] = parts[0] | parts[1] | parts[2] | parts[3]
        return word.view(np.int32).astype(np.int64)

    def pointer_at(self, address: int) -> int | None:
        """What the pointer slot at an address points to, or None where there is no relative slot."""
        return self._pointers.get(address)

    @cached_property
    def _pointers(self) -> dict[int, int]:
        pairs = zip(self.relative_places[::-1].tolist(), self.relative_targets[::-1].tolist(), strict=True)
        return dict(pairs)  # of several relocations of one place the first counts

    def string_at(self, address: int, limit: int = 4096) -> bytes | None:
        """The NUL-terminated bytes at an address, or None when they do not end within ``limit``."""
        section = self.section_at(address)
        if section is None:
            return None
        offset = address - self.base
        stop = min(offset + limit, section.loaded_end - self.base)
        short = min(offset + SHORT_STRING, stop)
        raw = self.memory[offset:short].tobytes()
        end = raw.find(b"\0")
        if end < 0 and short < stop:
            raw = self.memory[offset:stop].tobytes()
            end = raw.find(b"\0")
        return raw[:end] if end >= 0 else None
