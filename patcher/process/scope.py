"""Where the dynamic linker looks for a symbol, and what it finds there.

The order is that of its own list of loaded objects, restricted to what the patched module may see; which definition
is taken follows glibc (elf/dl-lookup.c, check_match and do_lookup_x of glibc 2.36). musl has no versions of its own
and agrees where there are none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from elfdiff.errors import LivegraftError, Refused

from .chosen import chosen_implementation
from .memory import Memory
from .modules import Module
from .symbols import STT_GNU_IFUNC, STT_TLS, Definition, DynamicSymbols

_MAX_LINK_MAP = 4096
_VERSYM_FIRST = 2  # the oldest version that an object defines


@dataclass(frozen=True, slots=True)
class Scope:
    """What a module may see. ``searched`` is in the order of the search; ``everything`` is all that is loaded.

    ``ambiguous``: the module was opened at run time, so that a name which both its own libraries (``own``) and the
    program define may mean either (RTLD_DEEPBIND, dlopen(3)).
    """

    searched: tuple[DynamicSymbols, ...]
    everything: tuple[DynamicSymbols, ...]
    own: tuple[DynamicSymbols, ...] = ()
    ambiguous: bool = False


def search_scope(loaded: Sequence[Module], patched: Module, memory: Memory) -> Scope:
    """Return what ``patched`` may see, in the order in which the dynamic linker searches.

    That is the main program, what was preloaded, what these need, then what ``patched`` needs. An object that was
    opened at run time for somebody else is left out. Raises LivegraftError where memory cannot be read.
    """
    tables = {module.bias: DynamicSymbols(module, memory) for module in loaded}
    everything = tuple(tables.values())
    mine = tables[patched.bias]
    main = next((table for table in everything if table.debug), None)
    if main is None:
        return Scope((mine,), everything)
    order = [tables[bias] for bias in _link_map(main.debug, memory) if bias in tables]
    if main in order:
        order.remove(main)
    order.insert(0, main)
    visible = _at_start(order)
    own = tuple(_closure([mine], order))
    searched = [*visible, *(table for table in own if table not in visible)]
    if mine.symbolic:
        searched.remove(mine)
        searched.insert(0, mine)
    return Scope(tuple(searched), everything, own, mine not in visible)


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


def _at_start(order: Sequence[DynamicSymbols]) -> list[DynamicSymbols]:
    """Return what was loaded with the program: itself, what was preloaded, and what these need.

    The linker's list begins with these, breadth first from the program and the preloaded objects; how many were
    preloaded shows by that. Where it does not show (another dynamic linker), what stands in front of the first
    object that the program needs was preloaded.
    """
    for preloaded in range(len(order)):
        found = _closure(order[: 1 + preloaded], order)
        if found == list(order[: len(found)]):
            return found
    roots = [order[0]]
    for table in order[1:]:
        if any(table.answers_to(name) for name in order[0].needed):
            break
        roots.append(table)
    first = _closure(roots if len(roots) < len(order) else roots[:1], order)
    return [table for table in order if table in first]


def _closure(roots: Sequence[DynamicSymbols], order: Sequence[DynamicSymbols]) -> list[DynamicSymbols]:
    closure = list(roots)
    for table in closure:  # grows while it is walked: breadth first
        for name in table.needed:
            found = next((other for other in order if other.answers_to(name)), None)
            if found is not None and found not in closure:
                closure.append(found)
    return closure


def require_libraries(needed: Sequence[str], scope: Scope, name: str) -> None:
    """Raise Refused, naming it, where a library that the new build of ``name`` needs was not loaded with the program.

    One that somebody opened at run time does not count: it can be closed again while the patch is in force.
    """
    for library in needed:
        if any(table.answers_to(library) for table in scope.searched):
            continue
        opened = any(table.answers_to(library) for table in scope.everything)
        raise Refused(
            f"new-library: the new build of {name} needs {library}, which the process has not loaded"
            + (" for it" if opened else ""),
            why="it was opened at run time, and may be closed again at any time" if opened
            else "loaded are " + ", ".join(sorted(table.module.name for table in scope.searched)),
            next_step="restart the program, so that the dynamic linker loads what the new build needs",
        )  # fmt: skip


def resolve(name: str, version: str, scope: Scope, memory: Memory, *, weak: bool = False) -> int:
    """Return the absolute address of a symbol as the dynamic linker would bind it; 0 for ``weak`` and undefined.

    Raises Refused where nothing in ``scope`` defines it, where which definition is meant cannot be told, where it is
    thread-local, or an indirect function (STT_GNU_IFUNC) whose choice the dynamic linker has nowhere made.
    """
    wanted = f"{name}@{version}" if version else name
    found = _first(name, version, scope.searched)
    if found is None and weak:
        return 0
    if found is None:
        raise Refused(
            f"the new code needs {wanted}, which the process has not loaded",
            why=f"none of {', '.join(table.module.name for table in scope.searched)} defines it",
            next_step="restart the program, so that the dynamic linker loads what the new build needs",
        )
    _require_one(found, wanted, scope)
    if found.type == STT_TLS:
        raise Refused(
            f"the new code needs {wanted}, which is thread-local in {found.module.name}",
            why="where a thread keeps it is known only to code that runs inside the process",
            next_step="restart the program instead",
        )
    if found.type == STT_GNU_IFUNC:
        return chosen_implementation(found, wanted, scope.everything, memory)
    return found.address


def _first(name: str, version: str, tables: Sequence[DynamicSymbols]) -> Definition | None:
    return next((found for table in tables if (found := _match(table, name, version)) is not None), None)


def _match(table: DynamicSymbols, name: str, version: str) -> Definition | None:
    """The definition that a reference gets from one object, as check_match of glibc decides."""
    newer: list[Definition] = []
    for item in table.definitions(name):
        if version:
            if item.version == version or (not item.version and not item.hidden_version):
                return item
        elif item.version_index <= _VERSYM_FIRST:
            return item  # no version asked for: the base or the oldest one
        elif not item.hidden_version:
            newer.append(item)
    return newer[0] if len(newer) == 1 else None


def _require_one(found: Definition, wanted: str, scope: Scope) -> None:
    """Refuse a name that another definition may stand for, by how its library was opened or by being unique."""
    others = scope.own if scope.ambiguous else ()
    if found.unique:  # the first one that was bound in the process stands for all (STB_GNU_UNIQUE)
        others = scope.everything
    for table in others:
        rival = _match(table, found.name, found.version)
        if rival is not None and rival.address != found.address:
            raise Refused(
                f"the new code needs {wanted}, which more than one library defines",
                why=f"{found.module.name} and {rival.module.name} do, and which one is meant depends on how they "
                "were opened",
                next_step="restart the program instead",
            )
