"""The headers and tables of an ELF file (gABI, "Object Files"), for a reader that believes no number in it.

Every count, offset and size is checked where it is read, so that a damaged file is an error that names the damage,
and costs neither more memory nor more time than a whole one. Only what is asked for is read.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elfdiff.errors import BadInput, Refused

EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR = struct.Struct("<IIQQQQQQ")
SHDR = struct.Struct("<IIQQQQIIQQ")
NHDR = struct.Struct("<III")

ET_NONE, ET_REL, ET_EXEC, ET_DYN, ET_CORE = range(5)
PT_LOAD, PT_NOTE, PT_TLS = 1, 4, 7
SHT_NULL, SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_RELA, SHT_DYNAMIC, SHT_NOBITS = 0, 1, 2, 3, 4, 6, 8
SHT_REL, SHT_DYNSYM, SHT_RELR, SHT_GNU_VERNEED, SHT_GNU_VERSYM = 9, 11, 19, 0x6FFFFFFE, 0x6FFFFFFF
SHT_GNU_VERDEF = 0x6FFFFFFD
SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR, SHF_TLS = 0x1, 0x2, 0x4, 0x400
NT_GNU_BUILD_ID = 3

USER_SPACE = 1 << 47
"""End of the addresses that a program can be linked for (psABI, section 3.3.2)."""
MAX_TABLE = 1 << 29
"""Bytes of one table; the string table of the largest programs known has half of it."""
MAX_NAME = 1 << 16
"""Bytes of one name; the longest mangled C++ names known have a quarter of it."""
MAX_SHARING = 16
"""How many times longer all names of a string table may be than the table, in which they share endings."""

_MAGIC = b"\x7fELF"
_OTHER_FILES = {
    b"!<arch>\n": ("an archive of object files", "link it first, and name the program or library"),
    b"#!": ("a script", "name the program that runs it, or a library that this program loads"),
}
_OTHER_TYPES = {
    ET_NONE: ("an ELF file of no type", "name a linked program or library"),
    ET_REL: ("an object file (.o) or a kernel module", "name a linked program or library"),
    ET_CORE: ("a core file", "name the program that dumped it instead"),
}


@dataclass(frozen=True)
class ProgramHeader:
    """Elf64_Phdr; the file's bytes of the segment lie in the file, its addresses in user space."""

    type: int
    flags: int
    offset: int
    vaddr: int
    filesz: int
    memsz: int
    align: int


@dataclass(frozen=True)
class SectionHeader:
    """Elf64_Shdr with its name; what it has in the file lies in the file."""

    name: str
    type: int
    flags: int
    address: int
    offset: int
    size: int
    entry_size: int

    @property
    def in_file(self) -> bool:
        """Whether it has content in the file."""
        return self.type not in (SHT_NULL, SHT_NOBITS)


@contextmanager
def open_elf(path: Path) -> Iterator[ElfFile]:
    """Open a build for the time of a ``with``; at its end the file must be as it was at the beginning.

    Raises BadInput for what is no linked x86-64 program or library, for damage and for a file that is changed
    meanwhile, Refused for what is sound but not supported.
    """
    with open_regular(path, "name two existing ELF files") as (descriptor, size):
        yield ElfFile(path, descriptor, size)


@contextmanager
def open_regular(path: Path, next_step: str) -> Iterator[tuple[int, int]]:
    """(descriptor, size) of a file that is read. Raises BadInput for what is no file, or is changed meanwhile."""
    try:
        # Non-blocking: to open a FIFO would wait for whoever writes to it (open(2)); regular files do not care.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            before = os.fstat(descriptor)
            _require_regular(path, before, next_step)
            yield descriptor, before.st_size
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}", why=str(error), next_step=next_step) from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise _changed(path)


def _require_regular(path: Path, status: os.stat_result, next_step: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = what.get(stat.S_IFMT(status.st_mode), "a device")
        raise BadInput(
            f"{path}: this is {kind}, not a file",
            why="it is read as a whole, so it must be a regular file",
            next_step=next_step,
        )


def _changed(path: Path) -> BadInput:
    return BadInput(
        f"{path}: the file was changed while it was read",
        why="its size or its time of modification is another than before",
        next_step="wait until what writes it has finished, and try again",
    )


def damaged(path: Path, why: str) -> BadInput:
    """The error for a number in a file that cannot be right."""
    return BadInput(f"{path}: not a readable ELF file", why=why, next_step="the file is cut or damaged; take it again")


class ElfFile:
    """An open file, its headers checked: no segment, no section ends behind the file's end."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        """Read the headers of the open file of ``size`` bytes. Raises as ``open_elf`` does."""
        self.path = path
        self.size = size
        self._descriptor = descriptor
        if size == 0:
            raise BadInput(
                f"{path}: the file is empty", why="it has 0 bytes", next_step="name a linked ELF program or library"
            )
        head = self.read(0, min(size, EHDR.size))
        _check_kind(path, head)
        header = EHDR.unpack(head)
        self.type: int = header[1]
        _check_type(path, self.type)
        self.sections = self._sections(header[6], header[11], header[12], header[13])
        _check_content(path, self.sections)
        self.segments = self._segments(header[5], header[9], header[10])
        self._by_name = {section.name: section for section in reversed(self.sections)}

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the file. Raises BadInput outside of it, and where it has become shorter."""
        raw = bytearray(self._bounded(offset, size))
        self.read_into(offset, memoryview(raw))
        return bytes(raw)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill a view of bytes with what the file holds from ``offset`` on. Raises as ``read`` does."""
        self._bounded(offset, len(view))
        while len(view):
            count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise _changed(self.path)
            view, offset = view[count:], offset + count

    def _bounded(self, offset: int, size: int) -> int:
        if offset + size > self.size:
            raise damaged(self.path, f"{size} bytes at {offset:#x} lie behind its end at {self.size:#x}")
        return size

    # -- headers ------------------------------------------------------------------------------------------------

    def _segments(self, offset: int, entry_size: int, count: int) -> tuple[ProgramHeader, ...]:
        if count == 0xFFFF:  # PN_XNUM
            raise _too_many(self.path, "program headers")
        if count and entry_size != PHDR.size:
            raise damaged(self.path, f"its program headers are said to have {entry_size} bytes each, not {PHDR.size}")
        rows = PHDR.iter_unpack(self._header_table("program headers", offset, count * PHDR.size))
        headers = (ProgramHeader(*row[:4], *row[5:]) for row in rows)
        return tuple(self._checked_segment(number, header) for number, header in enumerate(headers))

    def _checked_segment(self, number: int, header: ProgramHeader) -> ProgramHeader:
        if header.type not in (PT_LOAD, PT_NOTE, PT_TLS):
            return header
        end = header.offset + header.filesz
        if end > self.size:
            raise damaged(self.path, f"segment {number} ends at byte {end:#x}, the file at {self.size:#x}")
        if header.filesz > header.memsz:
            raise damaged(self.path, f"segment {number} has more bytes in the file than in memory")
        if header.vaddr + header.memsz > USER_SPACE:
            raise damaged(
                self.path, f"segment {number} at {header.vaddr:#x} (+{header.memsz:#x}) is no address of a program"
            )
        return header

    def _sections(self, offset: int, entry_size: int, count: int, names: int) -> tuple[SectionHeader, ...]:
        if count == 0 and offset == 0:
            return ()
        if count == 0 or names == 0xFFFF:  # the real numbers are in section header 0 then (SHN_XINDEX)
            raise _too_many(self.path, "section headers")
        if entry_size != SHDR.size:
            raise damaged(self.path, f"its section headers are said to have {entry_size} bytes each, not {SHDR.size}")
        rows = list(SHDR.iter_unpack(self._header_table("section headers", offset, count * SHDR.size)))
        if names >= count or rows[names][1] != SHT_STRTAB:
            raise damaged(self.path, f"section {names} should hold the names of the sections, but is no string table")
        strings = self._strings(rows[names][4], rows[names][5], "the names of the sections")
        return tuple(self._checked_section(number, row, strings) for number, row in enumerate(rows))

    def _checked_section(self, number: int, row: tuple[int, ...], strings: Strings) -> SectionHeader:
        name, kind, flags, address, offset, size, _, _, _, entry_size = row
        header = SectionHeader(strings.at(name) if kind else "", kind, flags, address, offset, size, entry_size)
        if header.in_file and offset + size > self.size:
            raise damaged(self.path, f"section {number} ({header.name}) lies behind its end")
        return header

    def _header_table(self, what: str, offset: int, size: int) -> bytes:
        if offset + size > self.size:
            raise damaged(self.path, f"its {what} lie behind its end")
        return self.read(offset, size)

    # -- tables -------------------------------------------------------------------------------------------------

    def section(self, name: str, *types: int) -> SectionHeader | None:
        """The section of a name, or None. Raises BadInput where it is of another type or there are two."""
        found = self._by_name.get(name)
        if found is None:
            return None
        if found.type not in types:
            raise damaged(self.path, f"section {name} is of type {found.type:#x}")
        if sum(section.name == name for section in self.sections) > 1:
            raise damaged(self.path, f"more than one section is named {name}")
        return found

    def table(self, section: SectionHeader | None, dtype: np.dtype[np.void]) -> NDArray[np.void]:
        """The rows of a table, none where there is no such section. Raises BadInput where they do not fit."""
        if section is None:
            return np.zeros(0, dtype)
        if section.size % dtype.itemsize or section.entry_size not in (0, dtype.itemsize):
            raise damaged(
                self.path,
                f"section {section.name} has {section.size} bytes in rows of {section.entry_size}, "
                f"not in rows of {dtype.itemsize}",
            )
        return np.frombuffer(self.content(section), dtype)

    def content(self, section: SectionHeader | None) -> bytes:
        """The bytes of a section, none where there is no such section. Raises BadInput for what is too large."""
        if section is None:
            return b""
        if section.size > MAX_TABLE:
            raise damaged(self.path, f"section {section.name} has {section.size} bytes, which is not believed")
        return self.read(section.offset, section.size)

    def strings(self, name: str) -> Strings:
        """The string table of that name, an empty one where there is none."""
        section = self.section(name, SHT_STRTAB)
        if section is None:
            return Strings(self.path, name, b"")
        return self._strings(section.offset, section.size, f"section {name}")

    def _strings(self, offset: int, size: int, name: str) -> Strings:
        if size > MAX_TABLE:
            raise damaged(self.path, f"{name}: {size} bytes are not believed")
        return Strings(self.path, name, self.read(offset, size))


class Strings:
    """A string table (gABI, "String Table"): names that end with a zero and may share endings."""

    def __init__(self, path: Path, name: str, data: bytes) -> None:
        """``name`` is what errors call it. Raises BadInput where it does not end with a zero."""
        self._path, self._name, self._data = path, name, data
        self._left = MAX_SHARING * len(data) + MAX_NAME
        self._read: dict[int, str] = {}
        if data and data[-1] != 0:
            raise damaged(path, f"{name} does not end with a zero")

    def at(self, offset: int) -> str:
        """The name at an offset. Raises BadInput outside, for endless names, and for too many of them."""
        if offset in self._read:
            return self._read[offset]
        end = self._data.find(b"\0", offset, offset + MAX_NAME)
        if end < 0:
            raise damaged(self._path, f"{self._name}, of {len(self._data)} bytes, has no name at {offset:#x}")
        self._left -= end - offset
        if self._left < 0:
            raise damaged(self._path, f"the names in {self._name} overlap to many times its {len(self._data)} bytes")
        name = self._read[offset] = self._data[offset:end].decode("utf-8", "surrogateescape")
        return name


def _check_kind(path: Path, head: bytes) -> None:
    """Whether it is an ELF file for x86-64 at all (gABI, "ELF Identification")."""
    for magic, (what, hint) in _OTHER_FILES.items():
        if head.startswith(magic):
            raise BadInput(f"{path}: this is {what}", why=f"it starts with {magic!r}", next_step=hint)
    if head[:4] != _MAGIC:
        raise BadInput(
            f"{path}: not an ELF file",
            why=f"it starts with {head[:4]!r}",
            next_step="name a linked ELF program or library (a script's interpreter, not the script)",
        )
    if len(head) < EHDR.size:
        raise damaged(path, f"only {len(head)} bytes long")
    machine = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
    if head[4] != 2 or head[5] != 1 or machine != 62:
        bits = {1: "32-bit", 2: "64-bit"}.get(head[4], "unknown-class")
        order = {1: "little-endian", 2: "big-endian"}.get(head[5], "unknown-order")
        raise BadInput(
            f"{path}: not an x86-64 program",
            why=f"{bits} {order} ELF for machine {machine} (x86-64 is 64-bit, little-endian, machine 62)",
            next_step="only x86-64 is supported so far",
        )


def _check_type(path: Path, kind: int) -> None:
    if kind in _OTHER_TYPES:
        what, hint = _OTHER_TYPES[kind]
        why = f"its ELF type is {kind}; programs and libraries have 2 (ET_EXEC) or 3 (ET_DYN)"
        raise BadInput(f"{path}: this is {what}, not a linked program", why=why, next_step=hint)
    if kind not in (ET_EXEC, ET_DYN):
        raise damaged(path, f"ELF type {kind}")


def _check_content(path: Path, sections: tuple[SectionHeader, ...]) -> None:
    """Files of the right type that are no build; their segments lead nowhere."""
    code = [s for s in sections if s.flags & SHF_ALLOC and s.flags & SHF_EXECINSTR and s.size]
    if code and all(s.type == SHT_NOBITS for s in code):
        raise BadInput(
            f"{path}: this is a separate debug file, without the code",
            why=f"its section {code[0].name} has no content (objcopy --only-keep-debug)",
            next_step="name the program or library itself",
        )
    if any(s.name == ".livegraft" for s in sections):
        raise BadInput(
            f"{path}: this is a patch object, not a build",
            why="it has a section .livegraft",
            next_step="name two builds of a program; a patch object goes to: livegraft apply",
        )


def _too_many(path: Path, what: str) -> Refused:
    return Refused(
        f"{path}: the file has more {what} than livegraft reads",
        why="it uses extended numbering, for more than 65,279 of them",
        next_step="link it without so many sections (no linker makes them of itself)",
    )
