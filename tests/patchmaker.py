"""Patch objects without the differ: from two programs linked with ``-ffunction-sections -Wl,--emit-relocs``.

The linker's own relocations say what each reference of a named function leads to, so that a patch can be made by
symbol name alone. Only for tests of the injector: it believes what it is told about which functions changed.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from elftools.elf.elffile import ELFFile

from elfdiff.patchobject import (
    OLD_IMAGE,
    PATCH_IMAGE,
    RELOCATION_DTYPE,
    Build,
    CheckedRange,
    PatchFunction,
    PatchObject,
    Reason,
    RelocationType,
    Segment,
)

PAGE = 4096
INT3 = 0xCC
PC32_KINDS = (2, 4)  # R_X86_64_PC32, R_X86_64_PLT32
FLAGS = ("-O2", "-Wall", "-Wextra", "-ffunction-sections", "-Wl,--emit-relocs", "-Wl,--build-id", "-pthread")


def compile_version(
    source: Path, version: int, folder: Path, *flags: str, cc: str = "gcc", library: Path | None = None
) -> Path:
    """Compile ``source`` with ``-DVERSION``; the file name is the same for every version, as in an upgrade.

    ``library`` is linked with it.
    """
    out = folder / _digest(source) / f"v{version}{''.join((cc, *flags))}" / source.stem
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        # Into a file of our own first: tests that run at the same time may build the same program.
        draft = out.with_name(f"{out.name}.{os.getpid()}")
        libraries = [library] if library else []
        subprocess.run([cc, *FLAGS, *flags, f"-DVERSION={version}", "-o", draft, source, *libraries], check=True)
        draft.rename(out)
    return out


def _digest(source: Path) -> str:
    """Of a source file and what it includes by a relative name: what was built from other text is not taken again."""
    pending, seen = [source], {}
    while pending:
        path = pending.pop()
        seen[path] = path.read_text()
        included = (path.parent / name for name in re.findall(r'^#include "(.*)"', seen[path], re.MULTILINE))
        pending += [item for item in included if item not in seen]
    return hashlib.sha256("".join(seen[path] for path in sorted(seen)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Symbol:
    name: str
    start: int
    size: int
    is_function: bool


class Linked:
    """What the patch maker needs to know of one linked program."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            elf = ELFFile(file)
            self.loads = [segment.header for segment in elf.iter_segments("PT_LOAD")]
            self.contents = path.read_bytes()
            self.fixed = elf.header.e_type == "ET_EXEC"
            self.symbols = {
                item.name: Symbol(
                    item.name, item.entry.st_value, item.entry.st_size, item.entry.st_info.type == "STT_FUNC"
                )
                for item in elf.get_section_by_name(".symtab").iter_symbols()
                if item.entry.st_value and item.name and item.entry.st_info.type != "STT_SECTION"
            }
            self.symbols.update(plt_entries(path))
            self.relocations = [
                (item.entry.r_offset, item.entry.r_info_type)
                for section in elf.iter_sections()
                if section.name.startswith(".rela.text")
                for item in section.iter_relocations()
            ]
            self.build_id = next(
                note.n_desc
                for segment in elf.iter_segments("PT_NOTE")
                for note in segment.iter_notes()
                if note.n_type == "NT_GNU_BUILD_ID"
            )
            self.rodata = [
                (section["sh_addr"], section["sh_addr"] + section["sh_size"])
                for section in elf.iter_sections()
                if section.name.startswith(".rodata")
            ]

    @property
    def build(self) -> Build:
        low = min(load.p_vaddr for load in self.loads) // PAGE * PAGE
        high = -(-max(load.p_vaddr + load.p_memsz for load in self.loads) // PAGE) * PAGE
        return Build(self.path.name, self.build_id, low, high, self.fixed)

    def read(self, address: int, size: int) -> bytes:
        for load in self.loads:
            if load.p_vaddr <= address and address + size <= load.p_vaddr + load.p_filesz:
                start = address - load.p_vaddr + load.p_offset
                return self.contents[start : start + size]
        raise KeyError(hex(address))

    def at(self, address: int) -> Symbol:
        for symbol in self.symbols.values():
            if symbol.start <= address < symbol.start + max(symbol.size, 1):
                return symbol
        raise KeyError(f"{self.path}: nothing is named at {address:#x}")


def plt_entries(path: Path) -> dict[str, Symbol]:
    text = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^([0-9a-f]+) <([^>]*@plt)>:", text, re.MULTILINE)
    return {name: Symbol(name, int(address, 16), 16, True) for address, name in found}


def make_patch(old_path: Path, new_path: Path, *names: str) -> PatchObject:
    """Return the patch that redirects the named functions of one program to those of the other."""
    old, new = Linked(old_path), Linked(new_path)
    functions = tuple(_function(old, new, name) for name in names)
    segments = _segments(new, functions)
    relocations = sorted(
        row
        for place, kind in new.relocations
        if any(item.new_start <= place < item.new_start + item.new_size for item in functions)
        if (row := _relocation(old, new, names, place, kind)) is not None
    )
    checked = tuple(
        CheckedRange(item.name, item.old_start, item.old_size, digest(old.read(item.old_start, item.old_size)))
        for item in functions
        if item.old_start is not None and item.old_size is not None
    )
    identity = hashlib.sha256(old.contents + new.contents + repr(functions).encode())
    return PatchObject(
        id=identity.hexdigest(),
        tool_version="test",
        old=old.build,
        new=new.build,
        segments=segments,
        functions=functions,
        imports=(),
        relocations=np.array(relocations, dtype=RELOCATION_DTYPE),
        checked=checked,
        findings=(),
        removed=(),
        line_only=(),
        eh_frame_hdr=None,
    )


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _function(old: Linked, new: Linked, name: str) -> PatchFunction:
    was, will = old.symbols[name], new.symbols[name]
    return PatchFunction(name, Reason.CODE, will.start, will.size, was.start, was.size, True)


def _segments(new: Linked, functions: tuple[PatchFunction, ...]) -> tuple[Segment, ...]:
    low = min(item.new_start for item in functions) // PAGE * PAGE
    high = -(-max(item.new_start + item.new_size for item in functions) // PAGE) * PAGE
    text = bytearray([INT3]) * (high - low)  # whatever is not meant to run must not be run
    for item in functions:
        start = item.new_start - low
        text[start : start + item.new_size] = new.read(item.new_start, item.new_size)
    segments = [Segment(low, high - low, 5, bytes(text))]
    start = min(start for start, _ in new.rodata)
    end = max(end for _, end in new.rodata)
    base = start // PAGE * PAGE
    data = bytes(start - base) + new.read(start, end - start)
    segments.append(Segment(base, -(-len(data) // PAGE) * PAGE, 4, data))
    return tuple(segments)


def _relocation(
    old: Linked, new: Linked, names: tuple[str, ...], place: int, kind: int
) -> tuple[int, int, int, int] | None:
    relative = kind in PC32_KINDS
    (field,) = struct.unpack("<i", new.read(place, 4))
    pointee = field + place + 4 if relative else field
    if any(start <= pointee < end for start, end in new.rodata):
        return None if relative else (place, kind, PATCH_IMAGE, field)
    symbol = new.at(pointee)
    if symbol.name in names and relative:
        return None
    # The address of a patched function is that of its old entry, so that pointers compare equal.
    moved = field + old.symbols[symbol.name].start - symbol.start
    if relative:
        return (place, RelocationType.PC32, OLD_IMAGE, moved + place)
    return (place, kind, OLD_IMAGE, moved)
