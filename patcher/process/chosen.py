"""Indirect functions: which implementation the dynamic linker has chosen for a symbol (STT_GNU_IFUNC).

Only the symbol's resolver knows, and it must run in the process; nothing is run for it here. But the dynamic linker
has run it for whoever asked before, and has written down the answer: in the slot of another image that imports the
same symbol (R_X86_64_GLOB_DAT, R_X86_64_JUMP_SLOT, R_X86_64_64), or in a slot of the defining image itself
(R_X86_64_IRELATIVE with that resolver, psABI section 4.4.1). A slot counts only if its value lies in the code of the
image that defines the symbol, or in the vDSO (``time`` of glibc): one that is not yet bound (lazy binding) points into
the image that it is in.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import numpy as np

from elfdiff.errors import Refused

from .memory import Memory
from .modules import PF_X, PT_LOAD, Module
from .proc import mappings
from .symbols import Definition, DynamicSymbols

_R_64, _R_GLOB_DAT, _R_JUMP_SLOT, _R_IRELATIVE = 1, 6, 7, 37


def chosen_implementation(
    definition: Definition, wanted: str, loaded: Sequence[DynamicSymbols], memory: Memory
) -> int:
    """Return the absolute address of the implementation of ``definition``, an indirect function.

    ``wanted`` is the symbol with its version, for the message. Raises Refused where no slot of the process holds it,
    or slots disagree; LivegraftError where memory cannot be read.
    """
    found: dict[int, str] = {}
    vdso = next((item for item in mappings(memory.pid) if item.path == "[vdso]"), None)
    for table in loaded:
        for place in _slots(definition, table):
            (value,) = struct.unpack("<Q", memory.read(place, 8))
            code = _is_code_of(definition.module, value) or (vdso is not None and value in vdso)
            if code and value != definition.address:
                found.setdefault(value, f"{value:#x} by the slot at {place:#x} of {table.module.name}")
    if len(found) == 1:
        return next(iter(found))
    raise Refused(
        f"the new code needs {wanted}, which is an indirect function in {definition.module.name}",
        why="which implementation it stands for cannot be proved: "
        + (f"slots disagree ({', '.join(found.values())})" if found else "nothing in the process has bound it yet"),
        next_step="restart the program instead",
    )


def _slots(definition: Definition, table: DynamicSymbols) -> Iterator[int]:
    """Absolute addresses of the slots of one image that hold what the resolver said."""
    relocations = table.relocations()
    if table.module == definition.module:
        resolver = definition.address - table.module.bias
        mine = (relocations["type"] == _R_IRELATIVE) & (relocations["addend"] == resolver)
    else:
        mine = np.isin(relocations["type"], (_R_64, _R_GLOB_DAT, _R_JUMP_SLOT))
        # The addend of a slot is not used but for R_X86_64_64 (psABI, section 4.4.1).
        mine &= (relocations["type"] != _R_64) | (relocations["addend"] == 0)
        named = table.references(definition.name, definition.version, relocations["symbol"][mine])
        mine &= np.isin(relocations["symbol"], named)
    for place in relocations["place"][mine].tolist():
        address = int(place) + table.module.bias
        if address in table.module:
            yield address


def _is_code_of(module: Module, address: int) -> bool:
    return any(
        header.type == PT_LOAD and header.flags & PF_X and 0 <= address - module.bias - header.vaddr < header.filesz
        for header in module.headers
    )
