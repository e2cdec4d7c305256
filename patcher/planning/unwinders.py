"""Where a process looks up unwind tables: the slots through which its unwinders call the C library.

An unwinder (libgcc_s, LLVM's libunwind, or a program with either linked in) finds the tables of an image by
``_dl_find_object`` (glibc 2.35 and later) or ``dl_iterate_phdr``, both of which live in another image; so it calls them
through a slot that the dynamic linker fills (psABI x86-64, 4.4.1: GLOB_DAT, JUMP_SLOT). Everything is read from memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from elfdiff.errors import LivegraftError, Refused

from ..process.memory import Memory
from ..process.modules import PF_X, PT_LOAD, Module, module_of
from ..process.scope import resolve, search_scope
from ..process.symbols import DT_PLTGOT, DynamicSymbols
from ..stacks.forbidden import ForbiddenRange

FIND_OBJECT, ITERATE = "_dl_find_object", "dl_iterate_phdr"
_VERSIONS = {FIND_OBJECT: ("GLIBC_2.35", ""), ITERATE: ("GLIBC_2.2.5", "")}
"""As glibc for x86-64 names them; musl has no versions."""
_FILLED = (6, 7)  # R_X86_64_GLOB_DAT, R_X86_64_JUMP_SLOT (psABI, 4.4.1)
_LOADS_UNWINDER = ("pthread_cancel", "pthread_exit")
_MAX_LINK_MAP = 4096
_STUB = 16


@dataclass(frozen=True, slots=True)
class LookupSlot:
    """A slot that calls go through; ``value`` is what it holds, ``function`` what a call reaches.

    The two differ where the dynamic linker has not bound the slot yet; ``binding`` is then the code in which a thread
    may be on its way to bind it, and which must be idle when the slot is written.
    """

    symbol: str
    address: int
    value: int
    function: int
    module: Module
    binding: tuple[ForbiddenRange, ...] = ()


def lookup_slots(loaded: Sequence[Module], memory: Memory) -> tuple[LookupSlot, ...]:
    """Every slot of the process through which unwind tables are looked up, by rising address.

    Of an image that can call ``_dl_find_object`` only that one counts. Raises LivegraftError where memory cannot be
    read, Refused where what an unbound slot will be bound to is not known.
    """
    found = [slot for module in loaded for slot in _of_module(module, loaded, memory)]
    return tuple(sorted(found, key=lambda slot: slot.address))


def require_unwinder(slots: Sequence[LookupSlot], loaded: Sequence[Module], memory: Memory) -> None:
    """Raise Refused where an exception may pass and an unwinder of the process would not find its handlers.

    Either there is none that looks them up through ``slots``, or one more would be loaded later: the C library loads
    libgcc_s itself when a thread is first cancelled or ends itself (glibc, misc/unwind-link.c).
    """
    step = "restart the program; or, if no exception passes through these functions, make the patch with "
    if not slots:
        raise Refused(
            "exceptions: no image of the process looks up unwind tables in a way that is known",
            why="exceptions may pass through the changed functions, and an unwinder that is linked in statically, or "
            "not loaded yet, would not find their handlers",
            next_step=step + "--allow exceptions",
        )
    tables = [DynamicSymbols(module, memory) for module in loaded]
    if any(table.soname.startswith("libgcc_s.so") for table in tables):
        return
    for table in tables:
        for name in _LOADS_UNWINDER:
            if table.mentions(name) and next(table.definitions(name), None) is None:
                raise Refused(
                    "exceptions: an unwinder that the process may need is not loaded yet",
                    why=f"{table.module.name} calls {name}, which loads libgcc_s; that would not find the handlers of "
                    "the changed functions",
                    next_step=step + "--allow exceptions",
                )


def link_map_of(module: Module, loaded: Sequence[Module], memory: Memory) -> int:
    """The address of a module's struct link_map (link.h), or 0 where the process has no list of them."""
    for candidate in loaded:
        debug = DynamicSymbols(candidate, memory).debug
        if debug:
            return next((entry for entry, bias in _link_maps(debug, memory) if bias == module.bias), 0)
    return 0


def _link_maps(debug: int, memory: Memory) -> Iterator[tuple[int, int]]:
    """(address, l_addr) of every struct link_map from r_debug.r_map on."""
    (entry,) = struct.unpack("<Q", memory.read(debug + 8, 8))
    for _ in range(_MAX_LINK_MAP):
        if not entry:
            return
        bias, _name, _dynamic, following = struct.unpack("<QQQQ", memory.read(entry, 32))
        yield entry, bias
        entry = following
    raise LivegraftError("the dynamic linker's list of objects is damaged in memory")


def _of_module(module: Module, loaded: Sequence[Module], memory: Memory) -> list[LookupSlot]:
    table = DynamicSymbols(module, memory)
    for symbol, versions in _VERSIONS.items():
        found = [
            _slot(symbol, version, address, table, loaded, memory)
            for version in versions
            for address in _slots_of(symbol, version, table)
        ]
        used = [slot for slot in found if slot.value]  # a weak symbol that nothing defines leaves 0
        if used:
            return used
    return []


def _slots_of(symbol: str, version: str, table: DynamicSymbols) -> list[int]:
    """The absolute addresses of the slots that the dynamic linker fills with the address of a symbol."""
    if not table.mentions(symbol):
        return []
    relocations = table.relocations()
    relocations = relocations[np.isin(relocations["type"], _FILLED)]
    named = table.references(symbol, version, relocations["symbol"])
    places: list[int] = relocations["place"][np.isin(relocations["symbol"], named)].tolist()
    return sorted({place + table.module.bias for place in places if place + table.module.bias in table.module})


def _slot(
    symbol: str, version: str, address: int, table: DynamicSymbols, loaded: Sequence[Module], memory: Memory
) -> LookupSlot:
    module = table.module
    (value,) = struct.unpack("<Q", memory.read(address, 8))
    stub = _unbound(value, module, memory) if value in module else None
    if stub is None:
        return LookupSlot(symbol, address, value, value, module)
    function = resolve(symbol, version, search_scope(loaded, module, memory), memory)
    ranges = [ForbiddenRange(f"{symbol}@plt of {module.name}", start, start + _STUB) for start in (value, stub)]
    return LookupSlot(symbol, address, value, function, module, (*ranges, *_dynamic_linker(table, loaded, memory)))


def _unbound(value: int, module: Module, memory: Memory) -> int | None:
    """Where the linkage stub at ``value`` jumps to have its slot bound; None where there is none.

    ``[endbr64] push $index; [bnd] jmp first stub`` (psABI x86-64, 5.2).
    """
    code = memory.read(value, _STUB).removeprefix(b"\xf3\x0f\x1e\xfa")
    at = value + _STUB - len(code)
    jump = next((at for at in (5, 6) if code[at : at + 1] == b"\xe9" and (at == 5 or code[5] == 0xF2)), None)
    if code[:1] != b"\x68" or jump is None:
        return None
    first = at + jump + 5 + int.from_bytes(code[jump + 1 : jump + 5], "little", signed=True)
    return first if first in module else None


def _dynamic_linker(table: DynamicSymbols, loaded: Sequence[Module], memory: Memory) -> tuple[ForbiddenRange, ...]:
    """The code of the image that binds the slots of a module: the third word of its GOT leads there (psABI, 5.2)."""
    module, words = table.module, table.tag(DT_PLTGOT)
    if words is None:
        raise LivegraftError(f"the dynamic section of {module.path} is damaged in memory")
    (resolver,) = struct.unpack("<Q", memory.read(words + 16, 8))
    linker = module_of(loaded, resolver)
    if linker is None:
        raise LivegraftError(f"what binds the symbols of {module.path} is in no image", why=f"it is at {resolver:#x}")
    return tuple(
        ForbiddenRange(f"{linker.name} (binding symbols)", linker.bias + h.vaddr, linker.bias + h.vaddr + h.memsz)
        for h in linker.headers
        if h.type == PT_LOAD and h.flags & PF_X
    )
