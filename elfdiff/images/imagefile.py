"""From an ELF file to an ``Image``: what its tables say of the memory that it will be (gABI, psABI)."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elfdiff.errors import BadInput, Refused
from elfdiff.images.elffile import (
    ET_EXEC,
    NHDR,
    NT_GNU_BUILD_ID,
    PT_LOAD,
    PT_NOTE,
    PT_TLS,
    SHF_ALLOC,
    SHF_EXECINSTR,
    SHF_TLS,
    SHF_WRITE,
    SHT_DYNAMIC,
    SHT_DYNSYM,
    SHT_GNU_VERDEF,
    SHT_GNU_VERNEED,
    SHT_GNU_VERSYM,
    SHT_NOBITS,
    SHT_PROGBITS,
    SHT_REL,
    SHT_RELA,
    SHT_RELR,
    SHT_SYMTAB,
    USER_SPACE,
    ElfFile,
    ProgramHeader,
    SectionHeader,
    damaged,
    open_elf,
)
from elfdiff.images.image import (
    MAX_SPAN,
    PAGE,
    R_X86_64_COPY,
    R_X86_64_RELATIVE,
    RELA_DTYPE,
    STT_FUNC,
    STT_GNU_IFUNC,
    STT_OBJECT,
    STT_TLS,
    SYMBOL_DTYPE,
    Addresses,
    Export,
    Image,
    Kind,
    LoadSegment,
    Section,
    Slot,
    SymbolTable,
    ThreadLocal,
    TlsTemplate,
)
from elfdiff.images.linkage_x86_64 import linkage_stubs

VERNEED = struct.Struct("<HHIII")  # Elf64_Verneed: version, count, file, first auxiliary, next
VERNAUX = struct.Struct("<IHHII")  # Elf64_Vernaux: hash, flags, index, name, next
VERDEF = struct.Struct("<HHHHIII")  # Elf64_Verdef: version, flags, index, count, hash, first auxiliary, next
VERDAUX = struct.Struct("<II")  # Elf64_Verdaux: name, next
VER_FLG_BASE = 1
DT_NEEDED, DT_RELA, DT_RELASZ = 1, 7, 8
R_X86_64_NONE = 0
STB_WEAK = 2
RELR_DTYPE = np.dtype([("word", "<u8")])
DYNAMIC_DTYPE = np.dtype([("tag", "<i8"), ("value", "<u8")])
MAX_TLS = 1 << 31
MAX_NOTES = 1 << 20


def load_image(path: Path) -> Image:
    """Read an ELF file. Raises BadInput for what is no linked x86-64 ELF program, Refused for what we cannot judge."""
    with open_elf(path) as file:
        return _Reader(file).image()


class _Reader:
    """Collects the parts of an Image from one file; lives only while loading."""

    def __init__(self, file: ElfFile) -> None:
        self.file = file
        self.path = file.path
        self.fixed_address = file.type == ET_EXEC
        self._require_sections()
        self.dynamic_symbols = file.table(file.section(".dynsym", SHT_DYNSYM), SYMBOL_DTYPE)
        self.dynamic_strings = file.strings(".dynstr")

    def image(self) -> Image:
        segments, base, memory = self._load()
        sections = self._sections(base, memory)
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
            plt=linkage_stubs(sections, base, memory, slots),
            tls=self._tls(base, memory),
            eh_frame_hdr=header.start if header else None,
            eh_frame=(eh_frame.start, eh_frame.end - eh_frame.start),
            symbols=self._symbols(),
            exported=self._exported(),
            thread_locals=self._thread_locals(),
            copies=frozenset(place for place, slot in slots.items() if slot.type == R_X86_64_COPY),
            needed=self._needed(),
        )

    def _damaged(self, why: str) -> BadInput:
        return damaged(self.path, why)

    def _require_sections(self) -> None:
        if not self.file.sections:
            raise Refused(
                f"{self.path}: the file has no section headers",
                why="they were cut off (sstrip, or a packer)",
                next_step="use the file as its package ships it",
            )

    def _load(self) -> tuple[tuple[LoadSegment, ...], int, NDArray[np.uint8]]:
        """(segments, base, memory); segments rise and do not overlap (gABI, "Program Header", PT_LOAD)."""
        loads = [header for header in self.file.segments if header.type == PT_LOAD and header.memsz]
        if not loads:
            raise self._damaged("no PT_LOAD program header")
        for one, other in pairwise(loads):
            if one.vaddr + one.memsz > other.vaddr:
                raise self._damaged(f"the segments at {one.vaddr:#x} and {other.vaddr:#x} overlap or are out of order")
        base = loads[0].vaddr & -PAGE
        high = (loads[-1].vaddr + loads[-1].memsz + PAGE - 1) & -PAGE
        if high - base > MAX_SPAN:
            raise self._damaged(f"its segments span {high - base:#x} bytes")
        memory = np.zeros(high - base, np.uint8)
        for header in loads:
            start = header.vaddr - base
            self.file.read_into(header.offset, memory[start : start + header.filesz].data)
        return tuple(LoadSegment(h.vaddr, h.memsz, h.filesz, h.flags) for h in loads), base, memory

    def _tls(self, base: int, memory: NDArray[np.uint8]) -> TlsTemplate | None:
        header = next((header for header in self.file.segments if header.type == PT_TLS), None)
        if header is None:
            return None
        inside = base <= header.vaddr and header.vaddr + header.filesz <= base + len(memory)
        if not inside or header.memsz > MAX_TLS or header.align & (header.align - 1):
            raise self._damaged(
                f"thread-local storage at {header.vaddr:#x} (+{header.memsz:#x}), aligned to {header.align:#x}"
            )
        return TlsTemplate(header.vaddr, header.filesz, header.memsz, header.align)

    def _sections(self, base: int, memory: NDArray[np.uint8]) -> tuple[Section, ...]:
        """The allocated sections by address; they do not overlap and say of the file what the segments say."""
        found = []
        for header in self.file.sections:
            thread_bss = header.flags & SHF_TLS and header.type == SHT_NOBITS
            if not header.flags & SHF_ALLOC or header.size == 0 or thread_bss:
                continue
            start, end = header.address, header.address + header.size
            if start < base or end > base + len(memory):
                raise self._damaged(f"section {header.name} lies outside the segments")
            self._require_agreement(header)
            loaded_end = start if header.type == SHT_NOBITS else end
            found.append(Section(header.name, start, end, _kind(header), loaded_end))
        found.sort(key=lambda s: s.start)
        for one, other in pairwise(found):
            if one.end > other.start:
                raise self._damaged(f"the sections {one.name} and {other.name} overlap")
        return tuple(found)

    def _require_agreement(self, header: SectionHeader) -> None:
        """A section's content is where its segment has it: two readers of the file read the same."""
        if header.type == SHT_NOBITS:
            return
        for segment in self.file.segments:
            if segment.type == PT_LOAD and 0 <= header.address - segment.vaddr < segment.filesz:
                inside = header.address + header.size <= segment.vaddr + segment.filesz
                if inside and header.offset - segment.offset == header.address - segment.vaddr:
                    return
        raise self._damaged(f"section {header.name} lies elsewhere in the file than the segments say")

    def _relocations(self, base: int, memory: NDArray[np.uint8]) -> tuple[Addresses, Addresses, dict[int, Slot]]:
        """(places, targets) of the relative relocations, by place, and the symbolic slots."""
        places, targets, slots = [], [], {}
        versions = self._versions()
        for section in self._relocation_sections():
            table = self.file.table(section, RELA_DTYPE)
            table = table[table["info"] & 0xFFFFFFFF != R_X86_64_NONE]
            if np.any((table["offset"] < base) | (table["offset"] > base + len(memory) - 8)):
                raise self._damaged(f"a relocation of {section.name} lies outside the segments")
            types, indices = table["info"] & 0xFFFFFFFF, table["info"] >> np.uint64(32)
            relative = types == R_X86_64_RELATIVE
            places.append(table["offset"][relative].astype(np.int64))
            targets.append(table["addend"][relative])
            for row, kind, index in zip(table[~relative], types[~relative], indices[~relative], strict=True):
                symbol = self._symbol_name(section.name, int(index))
                version = versions.get(int(index), "")
                weak = bool(index) and int(self.dynamic_symbols["info"][int(index)]) >> 4 == STB_WEAK
                slots[int(row["offset"])] = Slot(int(kind), symbol, version, int(row["addend"]), weak)
        words = self.file.table(self.file.section(".relr.dyn", SHT_RELR), RELR_DTYPE)["word"]
        packed = _unpack_relr(self.path, words, base, base + len(memory))
        places.append(packed)
        targets.append(_words_at(memory, packed - base))
        place = np.concatenate(places)
        order = np.argsort(place, kind="stable")
        return place[order], np.concatenate(targets).astype(np.int64)[order], slots

    def _relocation_sections(self) -> list[SectionHeader]:
        """What the dynamic linker applies; it goes by addresses, so nothing of its table may be left over."""
        loaded = [s for s in self.file.sections if s.flags & SHF_ALLOC and s.size]
        if any(s.type == SHT_REL for s in loaded):
            raise self._damaged("it has relocations without addends (SHT_REL), which x86-64 does not know")
        tables = sorted((s for s in loaded if s.type == SHT_RELA), key=lambda s: s.address)
        entries = dict(zip(*(self._dynamic()[name].tolist() for name in ("tag", "value")), strict=True))
        at, size = entries.get(DT_RELA, 0), entries.get(DT_RELASZ, 0)
        end = at + size
        for table in tables:
            if table.address <= at < table.address + table.size:
                at = table.address + table.size
        if size and at < end:
            raise Refused(
                f"{self.path}: relocations from {at:#x} to {end:#x} are in no section",
                why="the dynamic section names them, but no section header of type SHT_RELA covers them",
                next_step="use the file as its package ships it",
            )
        return tables

    def _symbol_name(self, table: str, index: int) -> str:
        if index == 0:
            return ""
        if index >= len(self.dynamic_symbols):
            raise self._damaged(f"{table} names symbol {index} of {len(self.dynamic_symbols)}")
        return self.dynamic_strings.at(int(self.dynamic_symbols["name"][index]))

    def _versions(self) -> dict[int, str]:
        """Symbol index -> version name, its own and those that other libraries provide (LSB 5.0, Symbol Versioning)."""
        section = self.file.section(".gnu.version", SHT_GNU_VERSYM)
        table = self.file.table(section, np.dtype([("index", "<u2")]))["index"]
        names = {**self._needed_versions(), **self._defined_versions()}
        return {k: names[v & 0x7FFF] for k, v in enumerate(table.tolist()) if v & 0x7FFF in names}

    def _needed_versions(self) -> dict[int, str]:
        needs = self.file.content(self.file.section(".gnu.version_r", SHT_GNU_VERNEED))
        names: dict[int, str] = {}
        group, left = 0, len(needs) // VERNAUX.size
        while len(needs):
            _, count, _, first, following = self._version_row(VERNEED, needs, group)
            at = group + first
            for _ in range(count):
                left -= 1
                if left < 0:
                    raise self._damaged(".gnu.version_r has more entries than fit in it")
                _, _, index, name, step = self._version_row(VERNAUX, needs, at)
                names[index & 0x7FFF] = self.dynamic_strings.at(name)
                at += step
            if not following:
                break
            group += following
        return names

    def _defined_versions(self) -> dict[int, str]:
        """Those of the file itself; the base, which stands for no version, is left out."""
        section = self.file.section(".gnu.version_d", SHT_GNU_VERDEF)
        defined = self.file.content(section)
        names: dict[int, str] = {}
        at = 0
        for _ in range(len(defined) // VERDEF.size):
            _, flags, index, _, _, first, following = self._version_row(VERDEF, defined, at)
            name, _ = self._version_row(VERDAUX, defined, at + first)
            if not flags & VER_FLG_BASE:
                names[index & 0x7FFF] = self.dynamic_strings.at(name)
            if not following:
                break
            at += following
        return names

    def _version_row(self, kind: struct.Struct, needs: bytes, at: int) -> tuple[int, ...]:
        if at + kind.size > len(needs):
            raise self._damaged(f".gnu.version_r, of {len(needs)} bytes, leads to byte {at}")
        return kind.unpack_from(needs, at)

    def _symbols(self) -> SymbolTable:
        section = self.file.section(".symtab", SHT_SYMTAB)
        complete = section is not None and section.size > 0
        table = self.file.table(section, SYMBOL_DTYPE) if complete else self.dynamic_symbols
        strings = self.file.strings(".strtab") if complete else self.dynamic_strings
        types = table["info"] & 0xF
        wanted = np.isin(types, (STT_OBJECT, STT_FUNC, STT_GNU_IFUNC, 0)) & (table["shndx"] != 0)
        wanted &= (table["shndx"] < 0xFF00) & (table["name"] != 0)
        table, types = table[wanted], types[wanted]
        self._require_addresses(table)
        order = np.argsort(table["value"], kind="stable")
        return SymbolTable(
            values=table["value"][order].astype(np.int64),
            sizes=table["size"][order].astype(np.int64),
            types=types[order],
            names=tuple(strings.at(offset) for offset in table["name"][order].tolist()),
            complete=complete,
        )

    def _require_addresses(self, table: NDArray[np.void]) -> None:
        if np.any(table["value"] > USER_SPACE) or np.any(table["size"] > USER_SPACE):
            raise self._damaged("a symbol's address or size is not one of a program")

    def _exported(self) -> tuple[Export, ...]:
        """The defined dynamic symbols, by table index."""
        table, versions = self.dynamic_symbols, self._versions()
        types = table["info"] & 0xF
        defined = (table["shndx"] != 0) & (table["shndx"] < 0xFF00)
        rows = np.nonzero(defined & np.isin(types, (STT_OBJECT, STT_FUNC, STT_TLS, STT_GNU_IFUNC)))[0]
        self._require_addresses(table[rows])
        return tuple(
            Export(
                self.dynamic_strings.at(int(table["name"][row])), versions.get(row, ""),
                int(table["value"][row]), int(table["size"][row]), int(types[row]),
            )
            for row in rows.tolist()
        )  # fmt: skip

    def _thread_locals(self) -> tuple[ThreadLocal, ...] | None:
        section = self.file.section(".symtab", SHT_SYMTAB)
        if section is None or not section.size:
            return None
        table, strings = self.file.table(section, SYMBOL_DTYPE), self.file.strings(".strtab")
        table = table[(table["info"] & 0xF == STT_TLS) & (table["shndx"] != 0) & (table["shndx"] < 0xFF00)]
        rows = zip(table["name"].tolist(), table["value"].tolist(), table["size"].tolist(), strict=True)
        return tuple(ThreadLocal(strings.at(name), offset, size) for name, offset, size in rows)

    def _build_id(self) -> str:
        """NT_GNU_BUILD_ID in a PT_NOTE segment: what a process has in memory, too."""
        for header in self.file.segments:
            if header.type == PT_NOTE:
                found = self._build_id_in(header)
                if found:
                    return found
        raise Refused(
            f"{self.path}: the file has no build-id",
            why="a patch object is tied to one build, and the build-id is what names it in a process",
            next_step="link with -Wl,--build-id",
        )

    def _build_id_in(self, header: ProgramHeader) -> str:
        """Walks the notes of a segment (gABI, "Note Section"): name and description are padded to its alignment."""
        if header.filesz > MAX_NOTES:
            raise self._damaged(f"a note segment of {header.filesz} bytes is not believed")
        notes, at, align = self.file.read(header.offset, header.filesz), 0, 8 if header.align == 8 else 4
        while at + NHDR.size <= len(notes):
            name_size, size, kind = NHDR.unpack_from(notes, at)
            name = at + NHDR.size
            start = (name + name_size + align - 1) & -align
            if start + size > len(notes):
                raise self._damaged(f"the note at byte {header.offset + at:#x} leads behind its segment")
            if kind == NT_GNU_BUILD_ID and notes[name : name + name_size] == b"GNU\0":
                return notes[start : start + size].hex()
            at = (start + size + align - 1) & -align
        return ""

    def _dynamic(self) -> NDArray[np.void]:
        """The dynamic section up to its end (gABI, DT_NULL)."""
        table = self.file.table(self.file.section(".dynamic", SHT_DYNAMIC), DYNAMIC_DTYPE)
        (ends,) = np.nonzero(table["tag"] == 0)
        return table[: int(ends[0])] if len(ends) else table

    def _needed(self) -> tuple[str, ...]:
        table = self._dynamic()
        return tuple(self.dynamic_strings.at(name) for name in table["value"][table["tag"] == DT_NEEDED].tolist())


def _kind(header: SectionHeader) -> Kind:
    name = header.name
    if header.flags & SHF_EXECINSTR:
        return Kind.PLT if name in (".plt", ".plt.got", ".plt.sec", ".iplt") else Kind.TEXT
    if name in (".got", ".got.plt"):
        return Kind.GOT
    if header.flags & SHF_WRITE:
        if name == "__patchable_function_entries":
            return Kind.OTHER  # addresses of nops, for the kernel's and other tracers; no program reads them
        relro = name.startswith((".data.rel.ro", ".init_array", ".fini_array", ".preinit_array", ".dynamic"))
        if relro or name in (".tdata", "__libc_IO_vtables", "__libc_subfreeres", "__libc_atexit"):
            return Kind.RELRO
        return Kind.BSS if header.type == SHT_NOBITS else Kind.DATA
    if header.type == SHT_PROGBITS and not name.startswith((".eh_frame", ".gcc_except_table", ".interp")):
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
    """The 64-bit words at offsets that are known to lie inside."""
    words = np.zeros(len(offsets), np.uint64)
    for k in range(8):
        words |= memory[offsets + k].astype(np.uint64) << np.uint64(8 * k)
    return words.astype(np.int64)


def _unpack_relr(path: Path, words: NDArray[np.uint64], base: int, high: int) -> Addresses:
    """Places of a DT_RELR table (gABI proposal "Relative relocations", generic-abi 2017), all in [base, high - 8]."""
    places: list[int] = []
    where = 0
    for word in words.tolist():
        first = len(places)
        if not word & 1:
            places.append(word)
            where = word + 8
        else:
            places.extend(where + 8 * bit for bit in range(63) if word >> (bit + 1) & 1)
            where += 63 * 8
        if len(places) > first and not (base <= places[first] and places[-1] <= high - 8):
            raise damaged(path, f"the relocation of .relr.dyn at {places[-1]:#x} lies outside the segments")
    return np.array(places, np.int64)

