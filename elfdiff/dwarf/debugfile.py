"""Where the debug information of a build is: in its own file, or in a separate debug file.

gdb manual, "Separate Debug Files": by build-id in ``DIR/.build-id/xx/rest.debug``, or by the name and CRC-32 in
``.gnu_debuglink``. A separate file is believed only if its build-id is the build's own; another one would name
functions and types of another build.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elfdiff.errors import BadInput, Refused
from elfdiff.images.elffile import open_regular
from elfdiff.images.image import STT_FUNC, STT_GNU_IFUNC, STT_OBJECT, SYMBOL_DTYPE, Image, SymbolTable

SYSTEM_DIRECTORY = Path("/usr/lib/debug")
MAX_DEBUG_SIZE = 4 << 30
"""Bytes of a file, and of its debug sections decompressed, beyond which it is not read."""
_NT_GNU_BUILD_ID = 3
_SHF_COMPRESSED = 0x800
_SHT_NOBITS = 8


@dataclass(frozen=True)
class DebugFile:
    """A file that describes a build. ``separate``: it is another one than the build itself.

    ``described``: it has DWARF; else only its symbols are of use. ``alternate``: the file of shared debug
    information that it refers to (``.gnu_debugaltlink``, dwz(1)); ``notes`` say what could not be used.
    """

    path: Path
    separate: bool
    described: bool
    alternate: Path | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Section:
    type: int
    flags: int
    offset: int
    size: int


def find_debug_file(image: Image, directories: tuple[Path, ...] = ()) -> DebugFile | None:
    """Look for the debug information of an image; None where there is none.

    ``directories`` are searched before the system's own. Raises Refused for a debug file of another build, BadInput
    for one that cannot be read.
    """
    own = _read(image.path)
    sections = _sections(image.path, own)
    if {".debug_info", ".zdebug_info"} & sections.keys():
        return _describe(image.path, own, sections, separate=False, directories=directories)
    for path in _candidates(image, directories, _debug_link(own, sections)):
        if path.is_file() and not path.samefile(image.path):
            raw = _read(path)
            theirs = _sections(path, raw)
            _check(image, path, raw, theirs, _debug_link(own, sections))
            return _describe(path, raw, theirs, separate=True, directories=directories)
    return None


def debug_symbols(file: DebugFile) -> SymbolTable | None:
    """The symbols that a separate debug file has of its build; None where it has none. Raises BadInput."""
    raw = _read(file.path)
    sections = _sections(file.path, raw)
    table, strings = sections.get(".symtab"), sections.get(".strtab")
    if table is None or strings is None or _SHT_NOBITS in (table.type, strings.type):
        return None
    rows = np.frombuffer(raw, SYMBOL_DTYPE, table.size // SYMBOL_DTYPE.itemsize, table.offset)
    text = raw[strings.offset : strings.offset + strings.size]
    types = rows["info"] & 0xF
    wanted = np.isin(types, (STT_OBJECT, STT_FUNC, STT_GNU_IFUNC, 0)) & (rows["shndx"] != 0)
    wanted &= (rows["shndx"] < 0xFF00) & (rows["name"] != 0)
    rows, types = rows[wanted], types[wanted]
    order = np.argsort(rows["value"], kind="stable")
    return SymbolTable(
        values=rows["value"][order].astype(np.int64),
        sizes=rows["size"][order].astype(np.int64),
        types=types[order],
        names=tuple(_text(text, int(offset)) for offset in rows["name"][order]),
        complete=True,
    )


def _text(table: bytes, offset: int) -> str:
    end = table.find(b"\0", offset)
    return table[offset:end].decode("utf-8", "surrogateescape") if end >= offset else ""


def _candidates(image: Image, directories: tuple[Path, ...], link: tuple[str, int] | None) -> list[Path]:
    """Where a debug file may be, in the order of gdb: by build-id first."""
    roots = (*directories, SYSTEM_DIRECTORY)
    found = [_by_build_id(root, image.build_id) for root in roots]
    if link is not None:
        folder = image.path.resolve().parent
        found += [folder / link[0], folder / ".debug" / link[0]]
        found += [root / folder.relative_to("/") / link[0] for root in roots]
        found += [root / link[0] for root in directories]
    return found


def _by_build_id(root: Path, build_id: str) -> Path:
    return root / ".build-id" / build_id[:2] / f"{build_id[2:]}.debug"


def _check(image: Image, path: Path, raw: bytes, sections: dict[str, _Section], link: tuple[str, int] | None) -> None:
    """The file describes this build: its build-id says so, or where it has none, the checksum."""
    theirs = _build_id(raw, sections)
    if theirs is not None:
        if theirs != image.build_id:
            raise Refused(
                f"{path}: this debug file is not of {image.path}",
                why=f"its build-id is {theirs}, that of the build is {image.build_id}",
                next_step="take the debug file of the same build, or move this one away",
            )
        return
    checksum = zlib.crc32(raw)
    if link is None or path.name != link[0] or checksum != link[1]:
        expected = f"{link[1]:#010x}" if link else "none"
        raise Refused(
            f"{path}: this debug file is not of {image.path}",
            why=f"it has no build-id, and its CRC-32 is {checksum:#010x} where .gnu_debuglink says {expected}",
            next_step="take the debug file of the same build, or move this one away",
        )


def _describe(
    path: Path, raw: bytes, sections: dict[str, _Section], *, separate: bool, directories: tuple[Path, ...]
) -> DebugFile:
    described = ".debug_info" in sections and sections[".debug_info"].type != _SHT_NOBITS
    notes = []
    if ".zdebug_info" in sections:
        notes.append(f"{path.name}: compressed in the GNU way of before 2013 (.zdebug_info), which is not read")
    alternate = _alternate(path, raw, sections, directories) if described else None
    if described and ".gnu_debugaltlink" in sections and alternate is None:
        notes.append(f"{path.name}: the debug information that it shares with other files (dwz) is not installed")
    _bound(path, raw, sections)
    return DebugFile(path, separate, described, alternate, tuple(notes))


def _alternate(path: Path, raw: bytes, sections: dict[str, _Section], directories: tuple[Path, ...]) -> Path | None:
    """The file that ``.gnu_debugaltlink`` names (a path, NUL, its build-id), if it is there and is that one."""
    section = sections.get(".gnu_debugaltlink")
    if section is None:
        return None
    name, _, build_id = raw[section.offset : section.offset + section.size].partition(b"\0")
    places = [path.resolve().parent / name.decode("utf-8", "surrogateescape")]
    places += [_by_build_id(root, build_id.hex()) for root in (*directories, SYSTEM_DIRECTORY)]
    for place in places:
        if place.is_file():
            theirs = _read(place)
            if _build_id(theirs, _sections(place, theirs)) == build_id.hex():
                return place
    return None


def _bound(path: Path, raw: bytes, sections: dict[str, _Section]) -> None:
    """Compressed sections say how large they are (gABI, Elf64_Chdr); a damaged one must not fill the memory."""
    total = 0
    for name, section in sections.items():
        if name.startswith(".debug_") and section.flags & _SHF_COMPRESSED and section.size >= 24:
            total += struct.unpack_from("<Q", raw, section.offset + 8)[0]
    if total > MAX_DEBUG_SIZE:
        raise _damaged(path, f"its debug sections would be {total} bytes long")


def _debug_link(raw: bytes, sections: dict[str, _Section]) -> tuple[str, int] | None:
    """Name and CRC-32 in ``.gnu_debuglink``: a string padded to four bytes, then the checksum."""
    section = sections.get(".gnu_debuglink")
    if section is None:
        return None
    content = raw[section.offset : section.offset + section.size]
    name, end, _ = content.partition(b"\0")
    at = (len(name) + 4) & -4
    if not end or not name or b"/" in name or at + 4 > len(content):
        return None
    return name.decode("utf-8", "surrogateescape"), int.from_bytes(content[at : at + 4], "little")


def _build_id(raw: bytes, sections: dict[str, _Section]) -> str | None:
    section = sections.get(".note.gnu.build-id")
    if section is None or section.type == _SHT_NOBITS or section.size < 16:
        return None
    name_size, size, kind = struct.unpack_from("<III", raw, section.offset)
    at = section.offset + 12 + ((name_size + 3) & -4)
    if kind != _NT_GNU_BUILD_ID or at + size > section.offset + section.size:
        return None
    return raw[at : at + size].hex()


def _read(path: Path) -> bytes:
    with open_regular(path, "make the debug file readable") as (descriptor, size):
        if size > MAX_DEBUG_SIZE:
            raise _damaged(path, f"the file has {size} bytes; none larger than {MAX_DEBUG_SIZE} is believed")
        with open(descriptor, "rb", closefd=False) as stream:
            return stream.read(MAX_DEBUG_SIZE)


def _sections(path: Path, raw: bytes) -> dict[str, _Section]:
    """The sections by name; of several with one name the first (gABI, section headers)."""
    if raw[:6] != b"\x7fELF\x02\x01" or len(raw) < 64:
        raise _damaged(path, "it is no 64-bit little-endian ELF file")
    table = struct.unpack_from("<Q", raw, 0x28)[0]
    size, count, names_index = struct.unpack_from("<HHH", raw, 0x3A)
    if not count:
        return {}
    if size != 64 or table + 64 * count > len(raw) or names_index >= count:
        raise _damaged(path, "its section headers lie behind its end")
    rows = [struct.unpack_from("<IIQQQQ", raw, table + 64 * k) for k in range(count)]
    names = raw[rows[names_index][4] :][: rows[names_index][5]]
    found: dict[str, _Section] = {}
    for name, kind, flags, _, offset, length in rows[1:]:
        if kind != _SHT_NOBITS and offset + length > len(raw):
            raise _damaged(path, "a section lies behind its end")
        text = names[name : names.find(b"\0", name)].decode("latin-1")
        found.setdefault(text, _Section(kind, flags, offset, length))
    return found


def _damaged(path: Path, why: str) -> BadInput:
    return BadInput(
        f"{path}: its debug information cannot be read", why=why, next_step="take the file again, or strip it"
    )
