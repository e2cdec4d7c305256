"""Where the unwind tables of a process are: every ELF image that is mapped to run, and the vDSO."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from elfdiff.errors import BadInput
from elfdiff.unwinding.cursor import ReadBytes
from elfdiff.unwinding.ehframe import FdeTable, read_fde_table, scan_eh_frame

from ..process.memory import Memory
from ..process.modules import PF_X, PT_GNU_EH_FRAME, PT_LOAD, Module, modules
from ..process.proc import Mapping, living_thread

_PAGE = 4096
_MAX_SECTIONS = 4096
_SHDR = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr (gABI, "Section Header")


@dataclass(frozen=True, slots=True)
class UnwindTable:
    """Where code is, [low, high), and the unwind information for it; all absolute addresses.

    ``eh_frame_hdr`` is the address of the search table, or None; then ``eh_frame`` is the address and the size
    of the section itself, or None where there is neither, so that no stack leads through this code. All is
    read from memory, where every address has its final value; so no load bias is needed.
    """

    name: str
    low: int
    high: int
    eh_frame_hdr: int | None
    eh_frame: tuple[int, int] | None = None

    def read_fdes(self, read: ReadBytes) -> FdeTable:
        """The FDEs. Raises ``BadInput`` where they are damaged or there are none."""
        if self.eh_frame_hdr is not None:
            return read_fde_table(self.eh_frame_hdr, read)
        if self.eh_frame is not None:
            return scan_eh_frame(*self.eh_frame, read)
        raise BadInput(f"{self.name} has no unwind information", why="no PT_GNU_EH_FRAME, no .eh_frame")


def unwind_tables(maps: Sequence[Mapping], memory: Memory) -> tuple[UnwindTable, ...]:
    """The unwind tables of all ELF images in a process, the vDSO among them, by rising address.

    Raises ``LivegraftError`` where the process goes away.
    """
    images = [*modules(maps, memory), *_vdso(maps, memory)]
    tables = [table for image in images for table in _tables_of(image, memory)]
    return tuple(sorted(tables, key=lambda table: table.low))


def _vdso(maps: Sequence[Mapping], memory: Memory) -> tuple[Module, ...]:
    """The vDSO; an image like any other, but for the file that it does not have."""
    return modules([replace(mapping, inode=-1) for mapping in maps if mapping.path == "[vdso]"], memory)


def _tables_of(image: Module, memory: Memory) -> Iterator[UnwindTable]:
    header = image.header(PT_GNU_EH_FRAME)
    eh_frame_hdr = None if header is None else image.bias + header.vaddr
    eh_frame = _eh_frame_of_executable(image, memory) if header is None else None
    for segment in image.headers:
        if segment.type == PT_LOAD and segment.flags & PF_X:
            low = image.bias + segment.vaddr
            yield UnwindTable(image.name, low, low + segment.memsz, eh_frame_hdr, eh_frame)


def _eh_frame_of_executable(image: Module, memory: Memory) -> tuple[int, int] | None:
    """(address, size) of ``.eh_frame`` by the section headers of the file; None where that is not to be had.

    gcc links static executables without PT_GNU_EH_FRAME: their start-up code registers ``.eh_frame`` itself.
    Section headers are not in memory, so the file is read, which the kernel keeps even if it was deleted.
    """
    try:
        with open(f"/proc/{memory.pid}/task/{living_thread(memory.pid)}/exe", "rb") as file:
            head = file.read(_PAGE)
            if head != memory.read(image.low, len(head)):
                return None  # not the executable
            table, entry_size, count, names = _section_table(head)
            if entry_size != _SHDR.size or not names < count <= _MAX_SECTIONS:
                return None
            file.seek(table)
            sections = list(_SHDR.iter_unpack(file.read(count * _SHDR.size)))
            file.seek(sections[names][4])
            strings = file.read(sections[names][5])
    except (OSError, struct.error, IndexError):
        return None
    for name, _type, _flags, address, _offset, size, *_ in sections:
        if strings[name : name + 10] == b".eh_frame\0":
            return image.bias + address, size
    return None


def _section_table(head: bytes) -> tuple[int, int, int, int]:
    """(file offset, size of an entry, number of entries, index of the string table), from the ELF header."""
    (offset,) = struct.unpack_from("<Q", head, 0x28)
    entry_size, count, names = struct.unpack_from("<HHH", head, 0x3A)
    return offset, entry_size, count, names
