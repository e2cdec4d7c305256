"""Loaded ELF images of a process: where each is mapped, its load bias and its build-id.

Everything is read from memory, never from the file: after an upgrade the file of that name is another build
or gone. ELF structures are those of the gABI ("Program Header", "Note Section") for 64-bit little-endian
objects.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from elfdiff.errors import LivegraftError, NotConcerned, Refused

from .memory import Memory
from .proc import Mapping

PT_LOAD, PT_DYNAMIC, PT_NOTE, PT_GNU_EH_FRAME = 1, 2, 4, 0x6474E550  # gABI, program header
PF_X, PF_W, PF_R = 1, 2, 4
ET_EXEC, ET_DYN = 2, 3
_EM_X86_64 = 62
_NT_GNU_BUILD_ID = 3
_PAGE = 4096
_EHDR_SIZE = 64
_PHDR = struct.Struct("<IIQQQQQQ")
_MAX_PROGRAM_HEADERS = 256  # real images have a dozen; a bound keeps damaged headers from costing anything
_MAX_NOTES = 1 << 16


@dataclass(frozen=True, slots=True)
class ProgramHeader:
    """One Elf64_Phdr; ``vaddr`` is virtual, without load bias."""

    type: int
    flags: int
    offset: int
    vaddr: int
    filesz: int
    memsz: int
    align: int


@dataclass(frozen=True, slots=True)
class Module:
    """One ELF image mapped in a process; addresses are absolute, ``low`` and ``high`` page aligned.

    ``build_id`` is the lower-case hex of NT_GNU_BUILD_ID, or empty where there is none. ``bias`` is load
    address minus virtual address. ``mappings`` are those made from its file, by rising address. ``deleted``
    says that the file of that name is no longer the one that is mapped.
    """

    path: str
    build_id: str
    bias: int
    low: int
    high: int
    fixed_address: bool
    deleted: bool
    headers: tuple[ProgramHeader, ...]
    mappings: tuple[Mapping, ...]

    @property
    def name(self) -> str:
        """The file name without directories."""
        return self.path.rpartition("/")[2]

    def __contains__(self, address: object) -> bool:
        """Whether ``address`` lies in its span."""
        return isinstance(address, int) and self.low <= address < self.high

    def header(self, kind: int) -> ProgramHeader | None:
        """Return its first program header of a type, or None."""
        return next((header for header in self.headers if header.type == kind), None)


def modules(maps: Sequence[Mapping], memory: Memory) -> tuple[Module, ...]:
    """Return every x86-64 ELF image that is mapped to run in the process, by rising address.

    ``maps`` are the mappings of the same process. A file that is mapped as mere data, or an image that was
    only mapped in part, is not among them. Raises LivegraftError where the process goes away.
    """
    found = (_module_at(mapping, maps, memory) for mapping in _image_starts(maps, memory))
    return tuple(module for module in found if module is not None)


def find_module(loaded: Sequence[Module], build_id: str, name: str) -> Module:
    """Return the module that is the build ``build_id``.

    ``name`` is the file name that the build had, used to say what is mapped instead. Raises Refused where no
    module is that build, or more than one is.
    """
    matches = [module for module in loaded if module.build_id == build_id]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise Refused(
            f"{name} is mapped {len(matches)} times in the process",
            why="a patch binds to one image, and which of them is meant cannot be known: "
            + ", ".join(f"{module.path} at {module.low:#x}" for module in matches),
            next_step="restart the program instead",
        )
    raise _wrong_build(loaded, build_id, name)


def _wrong_build(loaded: Sequence[Module], build_id: str, name: str) -> Refused:
    namesakes = [module for module in loaded if module.name == name]
    if not namesakes:
        return NotConcerned(
            f"the process has not loaded {name} of build {build_id}",
            why="it has loaded " + (", ".join(sorted({module.name for module in loaded})) or "no ELF image"),
            next_step="give the pid of a process that runs this build",
        )
    return Refused(
        f"the process runs another build of {name}",
        why=f"mapped is build {', '.join(module.build_id or 'without id' for module in namesakes)}; "
        f"the patch is for build {build_id}",
        next_step="make a patch from the build that is mapped: livegraft diff OLD NEW -o PATCH",
    )


def module_of(loaded: Sequence[Module], address: int) -> Module | None:
    """Return the module whose span holds ``address``, or None."""
    return next((module for module in loaded if address in module), None)


def _image_starts(maps: Sequence[Mapping], memory: Memory) -> Iterator[Mapping]:
    starts = [
        mapping
        for mapping in maps
        if mapping.readable and mapping.offset == 0 and mapping.inode and mapping.size >= _EHDR_SIZE
    ]
    for mapping in starts:
        if _read_or_none(memory, mapping.start, 4) == b"\x7fELF":
            yield mapping


def _read_or_none(memory: Memory, address: int, size: int) -> bytes | None:
    """Bytes of a mapping, or None where it cannot be read (a device, or a file cut short behind the
    mapping)."""
    try:
        return memory.read(address, size)
    except LivegraftError:
        return None


def _module_at(start: Mapping, maps: Sequence[Mapping], memory: Memory) -> Module | None:
    parsed = _program_headers(start.start, memory)
    if parsed is None:
        return None
    kind, headers = parsed
    loads = [header for header in headers if header.type == PT_LOAD]
    first = next((header for header in loads if header.offset < _PAGE), None)
    if first is None:
        return None
    bias = start.start - (first.vaddr - first.offset)
    if not any(header.flags & PF_X for header in loads) or (kind == ET_EXEC and bias):
        return None
    own = tuple(item for item in maps if (item.device, item.inode) == (start.device, start.inode))
    if not all(_is_mapped(header, bias, own) for header in loads if header.flags & PF_X):
        return None
    low = bias + min(header.vaddr for header in loads) // _PAGE * _PAGE
    high = bias + -(-max(header.vaddr + header.memsz for header in loads) // _PAGE) * _PAGE
    return Module(
        path=start.path,
        build_id=_build_id(headers, bias, memory),
        bias=bias,
        low=low,
        high=high,
        fixed_address=kind == ET_EXEC,
        deleted=start.deleted,
        headers=headers,
        mappings=tuple(item for item in own if low <= item.start < high),
    )


def _is_mapped(header: ProgramHeader, bias: int, own: Sequence[Mapping]) -> bool:
    """Whether the first page of a segment is mapped executable from the right place of the file."""
    address = bias + header.vaddr
    return any(
        item.executable and address in item and item.offset + address - item.start == header.offset for item in own
    )


def _program_headers(base: int, memory: Memory) -> tuple[int, tuple[ProgramHeader, ...]] | None:
    """Return e_type and the program headers of the image at ``base``; None where it is not for x86-64."""
    ehdr = _read_or_none(memory, base, _EHDR_SIZE)
    if ehdr is None or ehdr[4:6] != b"\x02\x01":  # ELFCLASS64, ELFDATA2LSB
        return None
    kind, machine = struct.unpack_from("<HH", ehdr, 16)
    (offset,) = struct.unpack_from("<Q", ehdr, 32)
    entry_size, count = struct.unpack_from("<HH", ehdr, 54)
    if machine != _EM_X86_64 or kind not in (ET_EXEC, ET_DYN):
        return None
    if entry_size != _PHDR.size or not 0 < count <= _MAX_PROGRAM_HEADERS:
        return None
    table = _read_or_none(memory, base + offset, count * _PHDR.size)
    if table is None:
        return None
    headers = []
    for p_type, flags, p_offset, vaddr, _paddr, filesz, memsz, align in _PHDR.iter_unpack(table):
        headers.append(ProgramHeader(p_type, flags, p_offset, vaddr, filesz, memsz, align))
    return kind, tuple(headers)


def _build_id(headers: Sequence[ProgramHeader], bias: int, memory: Memory) -> str:
    for header in headers:
        if header.type == PT_NOTE and header.filesz <= _MAX_NOTES:
            notes = _read_or_none(memory, bias + header.vaddr, header.filesz)
            found = build_id_in_notes(notes or b"", 8 if header.align == 8 else 4)
            if found:
                return found
    return ""


def build_id_in_notes(notes: bytes, align: int) -> str:
    """Return the lower-case hex of the first NT_GNU_BUILD_ID, or an empty string.

    ``notes`` are the bytes of a PT_NOTE segment whose entries are padded to ``align`` (4 or 8) bytes.
    """
    position = 0
    while position + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, position)
        name = position + 12
        descriptor = name + -(-name_size // align) * align
        if align == 8:
            # Name and descriptor together are padded to 8, the name alone is not (gABI, x86-64 psABI 5.1).
            descriptor = -(-(name + name_size) // 8) * 8
        end = descriptor + size
        if end > len(notes):
            return ""
        if kind == _NT_GNU_BUILD_ID and notes[name : name + name_size] == b"GNU\0":
            return notes[descriptor:end].hex()
        position = -(-end // align) * align
    return ""
