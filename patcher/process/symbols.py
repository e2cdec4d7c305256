"""What one loaded image defines and asks for by name: its dynamic symbols, read from memory.

The tables are found through the dynamic section (gABI, "Dynamic Section", "Symbol Table", "Hash Table"; LSB 5.0
core, "Symbol Versioning"; the GNU hash table has no specification, its layout is that of binutils and glibc).
Where a name is looked for is in ``scope``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elfdiff.errors import LivegraftError

from .memory import Memory
from .modules import PT_DYNAMIC, Module

DT_NEEDED, DT_PLTRELSZ, DT_PLTGOT, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_RELA, DT_RELASZ = 1, 2, 3, 4, 5, 6, 7, 8
DT_STRSZ, DT_SONAME, DT_SYMBOLIC, DT_DEBUG, DT_JMPREL, DT_FLAGS = 10, 14, 16, 21, 23, 30
DT_GNU_HASH, DT_VERSYM, DT_VERDEF, DT_VERDEFNUM = 0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFD
DT_VERNEED, DT_VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF
DF_SYMBOLIC = 2
_ADDRESS_TAGS = frozenset(
    {DT_PLTGOT, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_RELA, DT_JMPREL, DT_GNU_HASH, DT_VERSYM, DT_VERDEF, DT_VERNEED}
)
_STB_LOCAL, _STB_GNU_UNIQUE = 0, 10
_STT_FUNC, STT_TLS, STT_GNU_IFUNC = 2, 6, 10
_STV_INTERNAL, _STV_HIDDEN = 1, 2
_SHN_UNDEF, _SHN_ABS = 0, 0xFFF1
_VERSYM_HIDDEN = 0x8000
_VERSYM_BASE = 1  # the unversioned interface of an object
_VERSYM_FIRST = 2  # the oldest version that an object defines
_VER_FLG_BASE = 1
_SYM = struct.Struct("<IBBHQQ")
_MAX_DYNAMIC = 1 << 14
_MAX_CHAIN = 1 << 16
_MAX_RELOCATIONS = 1 << 24
_MAX_STRINGS = 1 << 28
RELOCATION = np.dtype([("place", "<u8"), ("type", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])
"""Elf64_Rela (gABI, "Relocation"): r_info is the symbol's index above the type."""


@dataclass(frozen=True, slots=True)
class Definition:
    """A symbol that a module defines. ``address`` is absolute; ``type`` is STT_*.

    ``version`` is empty where it has none, and then ``version_index`` is 0 or 1. ``unique``: STB_GNU_UNIQUE.
    """

    module: Module
    name: str
    version: str
    version_index: int
    hidden_version: bool  # only a reference that names the version gets it
    address: int
    type: int
    unique: bool


class DynamicSymbols:
    """The dynamic symbols of one loaded module, read on demand."""

    def __init__(self, module: Module, memory: Memory) -> None:
        """Read the dynamic section. Raises LivegraftError where it cannot be read."""
        self.module = module
        self._memory = memory
        self.needed: tuple[str, ...] = ()
        self.soname = ""
        self.debug = 0
        """Address of struct r_debug (link.h), or 0; only the main program has it."""
        self.symbolic = False
        """It searches itself before the main program (DT_SYMBOLIC)."""
        self._tags: dict[int, int] = {}
        self._versions: dict[int, str] | None = None
        self._read_dynamic()

    def _read_dynamic(self) -> None:
        header = self.module.header(PT_DYNAMIC)
        if header is None or header.memsz > _MAX_DYNAMIC:
            return
        data = self._memory.read(self.module.bias + header.vaddr, header.memsz // 16 * 16)
        entries = []
        for tag, value in struct.iter_unpack("<QQ", data):
            if tag == 0:
                break
            entries.append((tag, value))
        self._tags = {tag: self._absolute(tag, value) for tag, value in entries}
        self.debug = self._tags.get(DT_DEBUG, 0)
        self.symbolic = DT_SYMBOLIC in self._tags or bool(self._tags.get(DT_FLAGS, 0) & DF_SYMBOLIC)
        if DT_STRTAB in self._tags:
            self.needed = tuple(self._string(value) for tag, value in entries if tag == DT_NEEDED)
            self.soname = self._string(self._tags[DT_SONAME]) if DT_SONAME in self._tags else ""

    def _absolute(self, tag: int, value: int) -> int:
        # glibc relocates these entries in place, musl and the kernel's vDSO leave them as they were linked.
        if tag in _ADDRESS_TAGS and value not in self.module:
            return value + self.module.bias
        return value

    def _string(self, offset: int) -> str:
        size = self._tags.get(DT_STRSZ, 0)
        if not 0 <= offset < size:
            raise LivegraftError(f"the string table of {self.module.path} is damaged in memory")
        # A name may lie at the very end of the table, so never read beyond what it says to hold.
        data = self._memory.read(self._tags[DT_STRTAB] + offset, min(size - offset, 4096))
        return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")

    def tag(self, number: int) -> int | None:
        """The value of an entry of the dynamic section (DT_*), None where there is none; an address is absolute."""
        return self._tags.get(number)

    def mentions(self, name: str) -> bool:
        """Whether its string table holds ``name``, so that it may define or want a symbol of that name."""
        return DT_STRTAB in self._tags and name.encode("utf-8", "surrogateescape") + b"\0" in self._strings()

    def mentioned(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of ``names`` that its string table holds."""
        if DT_STRTAB not in self._tags:
            return ()
        strings = self._strings()  # where a name may be the end of another: linkers share them
        return tuple(name for name in names if name.encode() + b"\0" in strings)

    def answers_to(self, name: str) -> bool:
        """Whether an entry DT_NEEDED of this name means this object."""
        return name.rpartition("/")[2] in (self.soname, self.module.name)

    def _words(self, address: int, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}I", self._memory.read(address, 4 * count))

    def definitions(self, name: str) -> Iterator[Definition]:
        """Yield every definition of ``name`` in this module, whatever its version.

        Raises LivegraftError where the tables are damaged or cannot be read.
        """
        for index in self._indices(name):
            definition = self._definition(index, name)
            if definition is not None:
                yield definition

    def _indices(self, name: str) -> Iterable[int]:
        if DT_SYMTAB not in self._tags or DT_STRTAB not in self._tags:
            return ()
        if DT_GNU_HASH in self._tags:
            return self._gnu_chain(name)
        return self._sysv_chain(name) if DT_HASH in self._tags else ()

    def _gnu_chain(self, name: str) -> Iterator[int]:
        table = self._tags[DT_GNU_HASH]
        bucket_count, first, bloom_words, _shift = self._words(table, 4)
        buckets = table + 16 + 8 * bloom_words
        wanted = gnu_hash(name)
        if not bucket_count:
            return
        (index,) = self._words(buckets + 4 * (wanted % bucket_count), 1)
        chains = buckets + 4 * bucket_count
        for _ in range(_MAX_CHAIN):
            if index < first:
                return
            (value,) = self._words(chains + 4 * (index - first), 1)
            if value | 1 == wanted | 1:
                yield index
            if value & 1:
                return
            index += 1
        raise LivegraftError(f"the hash table of {self.module.path} is damaged in memory")

    def _sysv_chain(self, name: str) -> Iterator[int]:
        table = self._tags[DT_HASH]
        bucket_count, chain_count = self._words(table, 2)
        if not bucket_count:
            return
        (index,) = self._words(table + 8 + 4 * (sysv_hash(name) % bucket_count), 1)
        for _ in range(min(chain_count, _MAX_CHAIN)):
            if not index:
                return
            yield index
            (index,) = self._words(table + 8 + 4 * (bucket_count + index), 1)

    def _definition(self, index: int, name: str) -> Definition | None:
        data = self._memory.read(self._tags[DT_SYMTAB] + index * _SYM.size, _SYM.size)
        name_at, info, other, section, value, _size = _SYM.unpack(data)
        kind, binding = info & 0xF, info >> 4
        # An undefined function with a value is the canonical address that a fixed-address program gave to
        # an imported function (x86-64 psABI 1.0, "Function Addresses"): there it is the definition.
        if section == _SHN_UNDEF and not (kind == _STT_FUNC and value):
            return None
        if not value and section != _SHN_ABS and kind != STT_TLS:
            return None  # glibc and musl do not take it for a definition either
        if binding == _STB_LOCAL or other & 3 in (_STV_INTERNAL, _STV_HIDDEN):
            return None
        if self._string(name_at) != name:
            return None
        address = value if section == _SHN_ABS else value + self.module.bias
        number, hidden = self._version_index(index)
        version = self._version_names().get(number, "")
        return Definition(self.module, name, version, number, hidden, address, kind, binding == _STB_GNU_UNIQUE)

    def _version_index(self, index: int) -> tuple[int, bool]:
        if DT_VERSYM not in self._tags:
            return 0, False
        (word,) = struct.unpack("<H", self._memory.read(self._tags[DT_VERSYM] + 2 * index, 2))
        return word & ~_VERSYM_HIDDEN, bool(word & _VERSYM_HIDDEN)

    def _version_names(self) -> dict[int, str]:
        """The names of the version indices that it defines or asks others for; the base has none."""
        if self._versions is None:
            self._versions = {**self._versions_needed(), **self._versions_defined()}
        return self._versions

    def _versions_defined(self) -> dict[int, str]:
        names: dict[int, str] = {}
        address = self._tags.get(DT_VERDEF, 0)
        for _ in range(min(self._tags.get(DT_VERDEFNUM, 0), _VERSYM_HIDDEN) if address else 0):
            _, flags, number, _, _, aux, following = struct.unpack("<HHHHIII", self._memory.read(address, 20))
            if not flags & _VER_FLG_BASE:
                (name_at,) = self._words(address + aux, 1)
                names[number & ~_VERSYM_HIDDEN] = self._string(name_at)
            if not following:
                break
            address += following
        return names

    def _versions_needed(self) -> dict[int, str]:
        names: dict[int, str] = {}
        address = self._tags.get(DT_VERNEED, 0)
        for _ in range(min(self._tags.get(DT_VERNEEDNUM, 0), _VERSYM_HIDDEN) if address else 0):
            _, count, _, aux, following = struct.unpack("<HHIII", self._memory.read(address, 16))
            at = address + aux
            for _ in range(count):
                _, _, number, name_at, step = struct.unpack("<IHHII", self._memory.read(at, 16))
                names[number & ~_VERSYM_HIDDEN] = self._string(name_at)
                if not step:
                    break
                at += step
            if not following:
                break
            address += following
        return names

    def relocations(self) -> NDArray[np.void]:
        """Every dynamic relocation with an addend (DT_RELA and DT_JMPREL), of type ``RELOCATION``.

        Places are virtual. Raises LivegraftError where the tables are damaged or cannot be read.
        """
        tables = []
        for table, size in ((DT_RELA, DT_RELASZ), (DT_JMPREL, DT_PLTRELSZ)):
            count = self._tags.get(size, 0) // RELOCATION.itemsize
            if table in self._tags and count:
                if count > _MAX_RELOCATIONS:
                    raise LivegraftError(f"the relocations of {self.module.path} are damaged in memory")
                data = self._memory.read(self._tags[table], count * RELOCATION.itemsize)
                tables.append(np.frombuffer(data, RELOCATION))
        return np.concatenate(tables) if tables else np.zeros(0, RELOCATION)

    def references(self, name: str, version: str, indices: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Return those of the symbol ``indices`` that are references to ``name`` in this version."""
        found: list[int] = []
        unique = np.unique(indices[indices > 0])
        if len(unique) and DT_SYMTAB in self._tags and DT_STRTAB in self._tags:
            data = self._memory.read(self._tags[DT_SYMTAB], (int(unique[-1]) + 1) * _SYM.size)
            strings = self._strings()
            wanted = name.encode("utf-8", "surrogateescape") + b"\0"
            for index in unique.tolist():
                (name_at,) = struct.unpack_from("<I", data, index * _SYM.size)
                if strings.startswith(wanted, name_at):
                    number, _ = self._version_index(index)
                    if self._version_names().get(number, "") == version:
                        found.append(index)
        return np.array(found, np.uint32)

    def _strings(self) -> bytes:
        size = self._tags.get(DT_STRSZ, 0)
        if size > _MAX_STRINGS:
            raise LivegraftError(f"the string table of {self.module.path} is damaged in memory")
        return self._memory.read(self._tags[DT_STRTAB], size)


def gnu_hash(name: str) -> int:
    """Return the hash of DT_GNU_HASH: h = h * 33 + c from 5381, 32 bits."""
    value = 5381
    for byte in name.encode("utf-8", "surrogateescape"):
        value = (value * 33 + byte) & 0xFFFFFFFF
    return value


def sysv_hash(name: str) -> int:
    """Return the hash of DT_HASH (gABI, "Hash Table")."""
    value = 0
    for byte in name.encode("utf-8", "surrogateescape"):
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ (high >> 24)) & ~high & 0xFFFFFFFF
    return value
