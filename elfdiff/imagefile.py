"""Reading an ELF file into an ``Image``; the only place that knows the file format's tables.

pyelftools reads the headers; tables that are long, or whose counts a damaged file could make endless, are read here.
"""

from __future__ import annotations

import io
import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from elfdiff.errors import BadInput, Refused
from elfdiff.image import (
    MAX_SPAN,
    PAGE,
    R_X86_64_COPY,
    R_X86_64_RELATIVE,
    RELA_DTYPE,
    STT_FUNC,
    STT_GNU_IFUNC,
    STT_OBJECT,
    SYMBOL_DTYPE,
    Addresses,
    Image,
    Kind,
    LoadSegment,
    Section,
    Slot,
    SymbolTable,
    TlsTemplate,
)

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile


VERNEED = struct.Struct("<HHIII")  # Elf64_Verneed: version, count, file, first auxiliary, next
VERNAUX = struct.Struct("<IHHII")  # Elf64_Vernaux: hash, flags, index, name, next
DT_NEEDED = 1


def load_image(path: Path) -> Image:
    """Read an ELF file. Raises BadInput for what is no linked x86-64 ELF program, Refused for what we cannot judge."""
    from elftools.common.exceptions import ELFError  # noqa: PLC0415  (60 ms, needed here only)
    from elftools.construct import ConstructError  # noqa: PLC0415

    try:
        with open(path, "rb") as stream:
            size = stream.seek(0, 2)
            if size == 0:
                raise BadInput(f"{path}: the file is empty", next_step="name a linked ELF program or library")
            view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            return _Reader(path, np.frombuffer(view, np.uint8)).image()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}", why=str(error), next_step="name two existing ELF files") from error
    except (ELFError, ConstructError, UnicodeDecodeError, AssertionError) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error


def _damaged(path: Path, why: str) -> BadInput:
    return BadInput(f"{path}: not a readable ELF file", why=why, next_step="the file is cut or damaged; take it again")


_OBJECT_TYPES = {
    "ET_REL": ("an object file (.o)", "link it first: livegraft compares linked programs and libraries"),
    "ET_CORE": ("a core file", "name the program that dumped it instead"),
    "ET_NONE": ("an ELF file of no type", "name a linked program or library"),
}


class _Reader:
    """Collects the parts of an Image from one file; lives only while loading."""

    def __init__(self, path: Path, raw: NDArray[np.uint8]) -> None:
        from elftools.elf.elffile import ELFFile  # noqa: PLC0415

        self.path = path
        self.raw = raw
        if raw[:4].tobytes() != b"\x7fELF":
            raise BadInput(
                f"{path}: not an ELF file",
                why=f"it starts with {raw[:4].tobytes()!r}",
                next_step="name a linked ELF program or library (a script's interpreter, not the script)",
            )
        self._check_identity(raw[:64].tobytes())
        self._check_tables(raw[:64].tobytes())
        self.elf: ELFFile = ELFFile(io.BytesIO(raw.tobytes()))
        header = self.elf.header
        kind = header["e_type"]
        if kind in _OBJECT_TYPES:
            what, hint = _OBJECT_TYPES[kind]
            raise BadInput(f"{path}: this is {what}, not a linked program", next_step=hint)
        if kind not in ("ET_EXEC", "ET_DYN"):
            raise _damaged(path, f"ELF type {kind}")
        self.fixed_address = kind == "ET_EXEC"

    def _check_identity(self, head: bytes) -> None:
        if len(head) < 64:
            raise _damaged(self.path, f"only {len(head)} bytes long")
        machine = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
        if head[4] != 2 or head[5] != 1 or machine != 62:
            bits = {1: "32-bit", 2: "64-bit"}.get(head[4], "unknown-class")
            raise BadInput(
                f"{self.path}: not an x86-64 program",
                why=f"{bits} ELF for machine {machine} (x86-64 is 64-bit, machine 62)",
                next_step="only x86-64 is supported so far",
            )

    def _check_tables(self, head: bytes) -> None:
        """The header tables lie in the file, and so does every section (gABI, ELF header)."""
        tables = struct.unpack_from("<QQIHHHHHH", head, 0x20)
        program, section, _, _, program_size, program_count, section_size, section_count, _ = tables
        if program + program_size * program_count > len(self.raw) or program_size not in (0, 56):
            raise _damaged(self.path, "its program headers lie behind its end")
        if section + section_size * section_count > len(self.raw) or section_size not in (0, 64):
            raise _damaged(self.path, "its section headers lie behind its end")
        for number in range(section_count):
            kind = struct.unpack_from("<I", self.raw[section + 64 * number :][:8].tobytes(), 4)[0]
            offset, size = struct.unpack("<QQ", self.raw[section + 64 * number + 24 :][:16].tobytes())
            if kind not in (0, 8) and offset + size > len(self.raw):  # SHT_NULL, SHT_NOBITS
                raise _damaged(self.path, f"section {number} lies behind its end")

    def image(self) -> Image:
        segments, tls, base, memory = self._load()
        sections = self._sections(base, base + len(memory))
        by_name = {s.name: s for s in sections}
        relative_places, relative_targets, slots = self._relocations(base, memory)
        if self.fixed_address:
            relative_places, relative_targets = _pointer_words(sections, base, memory)
        eh_frame = by_name.get(".eh_frame")
        if eh_frame is None:
            raise Refused(
                f"{self.path}: no .eh_frame, so the bounds of its functions are unknown",
                why="livegraft takes function bounds and unwind rules from .eh_frame",
                next_step="build with -fasynchronous-unwind-tables (the default of gcc and clang on x86-64)",
            )
        header = by_name.get(".eh_frame_hdr")
        return Image(
            path=self.path,
            build_id=self._build_id(),
            fixed_address=self.fixed_address,
            base=base,
            memory=memory,
            segments=segments,
            sections=sections,
            relative_places=relative_places,
            relative_targets=relative_targets,
            slots=slots,
            plt=_linkage_stubs(sections, base, memory, slots),
            tls=tls,
            eh_frame_hdr=header.start if header else None,
            eh_frame=(eh_frame.start, eh_frame.end - eh_frame.start),
            symbols=self._symbols(),
            exports=self._exports(),
            copies=frozenset(place for place, slot in slots.items() if slot.type == R_X86_64_COPY),
            needed=self._needed(),
        )

    def _load(self) -> tuple[tuple[LoadSegment, ...], TlsTemplate | None, int, NDArray[np.uint8]]:
        loads, tls = [], None
        for header in (segment.header for segment in self.elf.iter_segments()):
            if header["p_type"] == "PT_TLS":
                tls = TlsTemplate(header["p_vaddr"], header["p_filesz"], header["p_memsz"], header["p_align"])
            if header["p_type"] == "PT_LOAD":
                loads.append(header)
        if not loads:
            raise _damaged(self.path, "no PT_LOAD program header")
        base = min(h["p_vaddr"] for h in loads) & -PAGE
        high = (max(h["p_vaddr"] + h["p_memsz"] for h in loads) + PAGE - 1) & -PAGE
        if high - base > MAX_SPAN:
            raise _damaged(self.path, f"its segments span {high - base:#x} bytes")
        memory = np.zeros(high - base, np.uint8)
        for h in loads:
            end = h["p_offset"] + h["p_filesz"]
            if end > len(self.raw) or h["p_filesz"] > h["p_memsz"]:
                raise _damaged(self.path, f"a segment ends at byte {end}, the file at {len(self.raw)}")
            start = h["p_vaddr"] - base
            memory[start : start + h["p_filesz"]] = self.raw[h["p_offset"] : end]
        segments = tuple(LoadSegment(h["p_vaddr"], h["p_memsz"], h["p_filesz"], h["p_flags"]) for h in loads)
        return segments, tls, base, memory

    def _sections(self, base: int, high: int) -> tuple[Section, ...]:
        if self.elf.num_sections() == 0:
            raise Refused(
                f"{self.path}: the file has no section headers",
                why="they were cut off (sstrip, or a packer)",
                next_step="use the file as its package ships it",
            )
        found = []
        for section in self.elf.iter_sections():
            h = section.header
            size, start = h["sh_size"], h["sh_addr"]
            thread_bss = h["sh_flags"] & 0x400 and h["sh_type"] == "SHT_NOBITS"
            if not h["sh_flags"] & 0x2 or size == 0 or thread_bss:  # SHF_ALLOC
                continue
            if start < base or start + size > high:
                raise _damaged(self.path, f"section {section.name} lies outside the segments")
            loaded_end = start if h["sh_type"] == "SHT_NOBITS" else start + size
            kind = _kind(section.name, h["sh_type"], h["sh_flags"])
            found.append(Section(section.name, start, start + size, kind, loaded_end))
        return tuple(sorted(found, key=lambda s: s.start))

    def _array(self, name: str, dtype: np.dtype[np.void]) -> NDArray[np.void]:
        section = self.elf.get_section_by_name(name)
        if section is None or section.header["sh_type"] == "SHT_NOBITS":
            return np.zeros(0, dtype)
        start, size = section.header["sh_offset"], section.header["sh_size"]
        if start + size > len(self.raw):
            raise _damaged(self.path, f"section {name} ends at byte {start + size}")
        size -= size % dtype.itemsize
        return np.frombuffer(self.raw[start : start + size].tobytes(), dtype)

    def _bytes(self, name: str) -> bytes:
        return self._array(name, np.dtype([("byte", "u1")])).tobytes()

    def _relocations(self, base: int, memory: NDArray[np.uint8]) -> tuple[Addresses, Addresses, dict[int, Slot]]:
        places, targets, slots = [], [], {}
        symbols = self._array(".dynsym", SYMBOL_DTYPE)
        strings = self._bytes(".dynstr")
        versions = self._versions()
        for name in (".rela.dyn", ".rela.plt", ".rela.iplt"):
            table = self._array(name, RELA_DTYPE)
            types, indices = table["info"] & 0xFFFFFFFF, table["info"] >> np.uint64(32)
            relative = types == R_X86_64_RELATIVE
            places.append(table["offset"][relative].astype(np.int64))
            targets.append(table["addend"][relative])
            for row, kind, index in zip(table[~relative], types[~relative], indices[~relative], strict=True):
                if int(index) >= max(1, len(symbols)):
                    raise _damaged(self.path, f"{name} names symbol {index} of {len(symbols)}")
                symbol = _string(strings, int(symbols["name"][index])) if index else ""
                version = versions.get(int(index), "")
                slots[int(row["offset"])] = Slot(int(kind), symbol, version, int(row["addend"]))
        packed = _unpack_relr(self._array(".relr.dyn", np.dtype([("word", "<u8")]))["word"])
        places.append(packed)
        targets.append(_words_at(memory, packed - base))
        place = np.concatenate(places)
        order = np.argsort(place, kind="stable")
        return place[order], np.concatenate(targets).astype(np.int64)[order], slots

    def _versions(self) -> dict[int, str]:
        """Symbol index -> version name, for versions that other libraries provide (gABI: .gnu.version_r)."""
        table = self._array(".gnu.version", np.dtype([("index", "<u2")]))["index"]
        needs, strings = self._bytes(".gnu.version_r"), self._bytes(".dynstr")
        names: dict[int, str] = {}
        group = 0
        while group + VERNEED.size <= len(needs):
            _, count, _, first, following = VERNEED.unpack_from(needs, group)
            at = group + first
            for _ in range(count):
                if at + VERNAUX.size > len(needs):
                    raise _damaged(self.path, ".gnu.version_r leads behind its end")
                _, _, index, name, step = VERNAUX.unpack_from(needs, at)
                names[index & 0x7FFF] = _string(strings, name)
                if not step:
                    break
                at += step
            if not following:
                break
            group += following
        return {k: names[int(v) & 0x7FFF] for k, v in enumerate(table) if int(v) & 0x7FFF in names}

    def _symbols(self) -> SymbolTable:
        table, strings = self._array(".symtab", SYMBOL_DTYPE), self._bytes(".strtab")
        complete = bool(len(table))
        if not complete:
            table, strings = self._array(".dynsym", SYMBOL_DTYPE), self._bytes(".dynstr")
        types = table["info"] & 0xF
        wanted = np.isin(types, (STT_OBJECT, STT_FUNC, STT_GNU_IFUNC, 0)) & (table["shndx"] != 0)
        wanted &= (table["shndx"] < 0xFF00) & (table["name"] != 0)
        table, types = table[wanted], types[wanted]
        order = np.argsort(table["value"], kind="stable")
        return SymbolTable(
            values=table["value"][order].astype(np.int64),
            sizes=table["size"][order].astype(np.int64),
            types=types[order],
            names=tuple(_string(strings, int(offset)) for offset in table["name"][order]),
            complete=complete,
        )

    def _exports(self) -> dict[str, int]:
        table, strings = self._array(".dynsym", SYMBOL_DTYPE), self._bytes(".dynstr")
        types = table["info"] & 0xF
        defined = (table["shndx"] != 0) & (table["shndx"] < 0xFF00)
        table = table[defined & np.isin(types, (STT_OBJECT, STT_FUNC, STT_GNU_IFUNC))]
        return {
            _string(strings, int(name)): int(value) for name, value in zip(table["name"], table["value"], strict=True)
        }

    def _build_id(self) -> str:
        from elftools.elf.sections import NoteSection  # noqa: PLC0415

        for section in self.elf.iter_sections():
            if isinstance(section, NoteSection):
                for note in section.iter_notes():
                    if note["n_type"] == "NT_GNU_BUILD_ID":
                        return str(note["n_desc"])
        raise Refused(
            f"{self.path}: the file has no build-id",
            why="a patch object is tied to one build, and the build-id is what names it in a process",
            next_step="link with -Wl,--build-id",
        )

    def _needed(self) -> tuple[str, ...]:
        table = self._array(".dynamic", np.dtype([("tag", "<i8"), ("value", "<u8")]))
        strings = self._bytes(".dynstr")
        return tuple(_string(strings, int(offset)) for offset in table["value"][table["tag"] == DT_NEEDED])


def _string(table: bytes, offset: int) -> str:
    end = table.find(b"\0", offset)
    return table[offset:end].decode("utf-8", "surrogateescape") if 0 <= offset < end else ""


def _kind(name: str, section_type: str, flags: int) -> Kind:
    write, execute = bool(flags & 1), bool(flags & 4)
    if execute:
        return Kind.PLT if name in (".plt", ".plt.got", ".plt.sec", ".iplt") else Kind.TEXT
    if name in (".got", ".got.plt"):
        return Kind.GOT
    if write:
        relro = name.startswith((".data.rel.ro", ".init_array", ".fini_array", ".preinit_array", ".dynamic"))
        if relro or name in (".tdata", "__libc_IO_vtables", "__libc_subfreeres", "__libc_atexit"):
            return Kind.RELRO
        return Kind.BSS if section_type == "SHT_NOBITS" else Kind.DATA
    if section_type == "SHT_PROGBITS" and not name.startswith((".eh_frame", ".gcc_except_table", ".interp")):
        return Kind.CONSTANT
    return Kind.OTHER


_POINTED_TO = (Kind.TEXT, Kind.PLT, Kind.CONSTANT, Kind.RELRO, Kind.DATA, Kind.BSS)


def _pointer_words(sections: tuple[Section, ...], base: int, memory: NDArray[np.uint8]) -> tuple[Addresses, Addresses]:
    """Pointer slots of a fixed-address image, which has no relocations left: aligned words that look like one.

    A word counts when its value lies in a section that a program can point to. An integer can look the same; what
    is made of such a slot must hold for both readings or be refused.
    """
    places, targets = [], []
    for section in sections:
        if section.kind in (Kind.CONSTANT, Kind.RELRO, Kind.DATA):
            place = np.arange((section.start + 7) & -8, section.loaded_end - 7, 8, dtype=np.int64)
            places.append(place)
            targets.append(_words_at(memory, place - base))
    if not places:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    place, target = np.concatenate(places), np.concatenate(targets)
    named = np.zeros(len(place), np.bool_)
    for section in sections:
        if section.kind in _POINTED_TO:
            named |= (target >= section.start) & (target < section.end)
    return place[named], target[named]


def _words_at(memory: NDArray[np.uint8], offsets: Addresses) -> Addresses:
    if len(offsets) and (offsets.min() < 0 or offsets.max() + 8 > len(memory)):
        raise BadInput("a relocation lies outside the image", next_step="the file is damaged; take it again")
    words = np.zeros(len(offsets), np.uint64)
    for k in range(8):
        words |= memory[offsets + k].astype(np.uint64) << np.uint64(8 * k)
    return words.astype(np.int64)


def _unpack_relr(words: NDArray[np.uint64]) -> Addresses:
    """Places of a DT_RELR table (gABI proposal "Relative relocations", generic-abi 2017)."""
    places: list[int] = []
    where = 0
    for word in words.tolist():
        if not word & 1:
            places.append(word)
            where = word + 8
        else:
            places.extend(where + 8 * bit for bit in range(63) if word >> (bit + 1) & 1)
            where += 63 * 8
    return np.array(places, np.int64)


def _linkage_stubs(
    sections: tuple[Section, ...], base: int, memory: NDArray[np.uint8], slots: dict[int, Slot]
) -> dict[int, int]:
    """Linkage stub -> GOT slot: ``[endbr64] [bnd] jmp *slot(%rip)`` (psABI, section 5.2).

    Stubs are 16 bytes long, in .plt.got and in static programs 8; that the slot is one tells them from other bytes.
    """
    stubs: dict[int, int] = {}
    for section in sections:
        if section.kind is not Kind.PLT:
            continue
        code = memory[section.start - base : section.end - base].tobytes()
        for offset in range(0, len(code), 8):
            entry = code[offset : offset + 16]
            jump = next((k for k in (0, 4, 5) if entry[k : k + 2] == b"\xff\x25"), None)
            if jump is not None:
                displacement = int.from_bytes(entry[jump + 2 : jump + 6], "little", signed=True)
                slot = section.start + offset + jump + 6 + displacement
                if slot in slots:
                    stubs[section.start + offset] = slot
    return stubs
