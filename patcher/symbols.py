"""Looking up a symbol by name and version in the images that a process has loaded.

The tables are read from memory through the dynamic section (gABI, "Dynamic Section", "Symbol Table", "Hash
Table"; LSB 5.0 core, "Symbol Versioning"; the GNU hash table has no specification, its layout is that of
binutils and glibc). The order is the dynamic linker's: its own list of loaded objects, restricted to what the
patched module may see.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from elfdiff.errors import LivegraftError, Refused

from .memory import Memory
from .modules import PT_DYNAMIC, Module

DT_NEEDED, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SONAME, DT_DEBUG = 1, 4, 5, 6, 10, 14, 21
DT_GNU_HASH, DT_VERSYM, DT_VERDEF, DT_VERDEFNUM = 0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFD
_ADDRESS_TAGS = frozenset({DT_HASH, DT_STRTAB, DT_SYMTAB, DT_GNU_HASH, DT_VERSYM, DT_VERDEF})
_STB_LOCAL = 0
_STT_FUNC, _STT_TLS, _STT_GNU_IFUNC = 2, 6, 10
_STV_INTERNAL, _STV_HIDDEN = 1, 2
_SHN_UNDEF, _SHN_ABS = 0, 0xFFF1
_VERSYM_HIDDEN = 0x8000
_VERSYM_BASE = 1  # the unversioned interface of an object
_SYM = struct.Struct("<IBBHQQ")
_MAX_DYNAMIC = 1 << 14
_MAX_CHAIN = 1 << 16
_MAX_LINK_MAP = 4096


@dataclass(frozen=True, slots=True)
class Definition:
    """A symbol that a module defines. ``address`` is absolute; ``type`` is STT_*; ``version`` may be
    empty."""

    module: Module
    name: str
    version: str
    address: int
    type: int
    default: bool  # the version that a reference without one gets


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
        self._tags: dict[int, int] = {}
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
        kind = info & 0xF
        # An undefined function with a value is the canonical address that a fixed-address program gave to
        # an imported function (x86-64 psABI 1.0, "Function Addresses"): there it is the definition.
        if section == _SHN_UNDEF and not (kind == _STT_FUNC and value):
            return None
        if info >> 4 == _STB_LOCAL or other & 3 in (_STV_INTERNAL, _STV_HIDDEN):
            return None
        if self._string(name_at) != name:
            return None
        address = value if section == _SHN_ABS else value + self.module.bias
        version, default = self._version(index)
        return Definition(self.module, name, version, address, kind, default)

    def _version(self, index: int) -> tuple[str, bool]:
        if DT_VERSYM not in self._tags:
            return "", True
        (word,) = struct.unpack("<H", self._memory.read(self._tags[DT_VERSYM] + 2 * index, 2))
        number = word & ~_VERSYM_HIDDEN
        if number <= _VERSYM_BASE or DT_VERDEF not in self._tags:
            return "", True
        return self._version_names().get(number, ""), not word & _VERSYM_HIDDEN

    def _version_names(self) -> dict[int, str]:
        names = {}
        address = self._tags[DT_VERDEF]
        for _ in range(min(self._tags.get(DT_VERDEFNUM, 0), _VERSYM_HIDDEN)):
            _, _, number, _, _, aux, following = struct.unpack("<HHHHIII", self._memory.read(address, 20))
            (name_at,) = self._words(address + aux, 1)
            names[number] = self._string(name_at)
            if not following:
                break
            address += following
        return names


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


def search_scope(loaded: Sequence[Module], patched: Module, memory: Memory) -> tuple[DynamicSymbols, ...]:
    """Return the modules whose symbols ``patched`` may see, in the order in which the dynamic linker
    searches.

    That is the main program, what was preloaded, what the program needs, then what ``patched`` needs. An
    object that was opened at run time for somebody else is left out. Raises LivegraftError where memory
    cannot be read.
    """
    tables = {module.bias: DynamicSymbols(module, memory) for module in loaded}
    main = next((table for table in tables.values() if table.debug), None)
    if main is None:
        return (tables[patched.bias],)
    order = [tables[bias] for bias in _link_map(main.debug, memory) if bias in tables]
    if main in order:
        order.remove(main)
    order.insert(0, main)
    preloaded = _preloaded(order, main)
    first = _closure(main, order)
    visible = [table for table in order if table in first or table in preloaded]
    own = _closure(tables[patched.bias], order)
    return (*visible, *(table for table in order if table in own and table not in visible))


def _link_map(debug: int, memory: Memory) -> Iterator[int]:
    """Yield l_addr of every struct link_map (link.h) from r_debug.r_map on."""
    (entry,) = struct.unpack("<Q", memory.read(debug + 8, 8))
    for _ in range(_MAX_LINK_MAP):
        if not entry:
            return
        bias, _name, _dynamic, following = struct.unpack("<QQQQ", memory.read(entry, 32))
        yield bias
        entry = following
    raise LivegraftError("the dynamic linker's list of objects is damaged in memory")


def _answers_to(table: DynamicSymbols, name: str) -> bool:
    return name.rpartition("/")[2] in (table.soname, table.module.name)


def _preloaded(order: Sequence[DynamicSymbols], main: DynamicSymbols) -> list[DynamicSymbols]:
    """What stands between the main program and the first object that it needs."""
    found = []
    for table in order[1:]:
        if any(_answers_to(table, name) for name in main.needed):
            break
        found.append(table)
    return found if len(found) < len(order) - 1 else []


def _closure(start: DynamicSymbols, order: Sequence[DynamicSymbols]) -> list[DynamicSymbols]:
    closure = [start]
    for table in closure:  # grows while it is walked: breadth first
        for name in table.needed:
            found = next((other for other in order if _answers_to(other, name)), None)
            if found is not None and found not in closure:
                closure.append(found)
    return closure


def resolve(name: str, version: str, scope: Sequence[DynamicSymbols]) -> int:
    """Return the absolute address of a symbol as the dynamic linker would bind it.

    Raises Refused where nothing in ``scope`` defines it, or where it is an indirect function (STT_GNU_IFUNC:
    only its resolver, run in the target, knows the address) or thread-local.
    """
    wanted = f"{name}@{version}" if version else name
    for table in scope:
        matches = [item for item in table.definitions(name) if _satisfies(item, version)]
        addresses = {item.address for item in matches}
        if len(addresses) > 1:
            matches = [item for item in matches if item.default]
        if matches:
            return _plain_address(matches[0], wanted)
    raise Refused(
        f"the new code needs {wanted}, which the process has not loaded",
        why=f"none of {', '.join(table.module.name for table in scope)} defines it",
        next_step="restart the program, so that the dynamic linker loads what the new build needs",
    )


def _satisfies(definition: Definition, version: str) -> bool:
    if version and definition.version:
        return definition.version == version
    return definition.default


def _plain_address(definition: Definition, wanted: str) -> int:
    if definition.type in (_STT_GNU_IFUNC, _STT_TLS):
        kind = "an indirect function" if definition.type == _STT_GNU_IFUNC else "thread-local"
        raise Refused(
            f"the new code needs {wanted}, which is {kind} in {definition.module.name}",
            why="its address is known only to code that runs inside the process",
            next_step="restart the program instead",
        )
    return definition.address
