"""Switch tables, found by what they contain rather than by how a compiler addresses them.

A function that has an indirect jump (``jmp *reg`` or ``jmp *mem``, opcode FF /4) and names a constant may dispatch
through it. Position-independent code keeps 32-bit offsets from the table to the cases, fixed-address code 64-bit
addresses. A constant counts as a table when its leading entries all lead to instructions and at least one of them
lies in the function itself; it ends where an entry does not lead to an instruction or where the next referenced
address begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elfdiff.decoding.code import LEA, Code, FieldKind
from elfdiff.images.image import Addresses, Kind

MAX_ENTRIES = 1 << 16
_MOV_LOAD, _GROUP5 = 0x8B, 0xFF


@dataclass(frozen=True)
class JumpTable:
    """``entry_size`` is 4 (offsets from the table) or 8 (addresses); ``targets`` are virtual addresses."""

    address: int
    function: int
    entry_size: int
    targets: Addresses

    @property
    def end(self) -> int:
        """One past its last byte."""
        return self.address + self.entry_size * len(self.targets)


def find_jump_tables(code: Code) -> dict[int, JumpTable]:
    """All switch tables of an image, by address."""
    references, image = code.references, code.image
    dispatching = _functions_with_indirect_jump(code)
    candidates = dispatching[references.function] & ~references.internal
    lea = (references.kind == FieldKind.MEMORY) & (references.opcode == LEA)
    absolute = references.kind >= FieldKind.ABSOLUTE_DISPLACEMENT
    candidates &= (lea | absolute) & (image.kinds(references.target) == Kind.CONSTANT)
    if not image.fixed_address:  # most candidates are strings: their first word leads nowhere
        rows = np.nonzero(candidates)[0]
        first = references.target[rows] + image.int32_at(references.target[rows])
        candidates[rows] = code.instruction_at(first)
    tables: dict[int, JumpTable] = {}
    for index in np.nonzero(candidates)[0].tolist():
        address = int(references.target[index])
        if address not in tables:
            table = _table_at(code, address, int(references.function[index]))
            if table is not None:
                tables[address] = table
    return tables


def _functions_with_indirect_jump(code: Code) -> NDArray[np.bool_]:
    decoded = code.decoded
    jumps = (decoded.opcode == 0xFF) & ((decoded.modrm >> 3 & 7) == 4) & code.is_start
    through_slot = (decoded.modrm & 0xC7) == 0x05  # jmp *slot(%rip): a linkage stub or a tail call
    at = np.nonzero(jumps & ~through_slot)[0] + code.base
    found = np.zeros(len(code), np.bool_)
    found[code.function_at(at)] = True
    return found


def _table_at(code: Code, address: int, function: int) -> JumpTable | None:
    section = code.image.section_at(address)
    assert section is not None
    following = code.next_named(address)
    limit = min(following, section.end) if following is not None else section.end
    for entry_size in (8, 4) if code.image.fixed_address else (4,):
        count = min((limit - address) // entry_size, MAX_ENTRIES)
        if count <= 0:
            continue
        places = address + entry_size * np.arange(count, dtype=np.int64)
        values = code.image.int32_at(places)
        if entry_size == 8:
            high = code.image.int32_at(places + 4)
            targets = np.where(high == 0, values, -1)
        else:
            targets = values + address
        sound = code.instruction_at(targets)
        length = count if sound.all() else int(np.argmin(sound))
        targets = targets[:length]
        inside = (targets >= code.starts[function]) & (targets < code.ends[function])
        if inside.any():
            return JumpTable(address, function, entry_size, targets)
    return None


def kept_labels(code: Code, function: int, tables: dict[int, JumpTable]) -> int | None:
    """Address of an instruction that takes the address of a label of its function otherwise than to jump there.

    Labels as values (computed goto) can be stored, a switch's cases cannot. Both look alike in an image at a fixed
    address, where a table holds 64-bit addresses: there each use of the table must be a jump through it, or the load
    of an entry that is jumped to at once. None where no label is taken.
    """
    references, decoded = code.references, code.decoded
    for row in range(int(references.first[function]), int(references.last[function])):
        kind, target = int(references.kind[row]), int(references.target[row])
        at = int(references.instruction[row])
        taken = references.opcode[row] == LEA or kind >= FieldKind.ABSOLUTE_DISPLACEMENT
        if code.starts[function] <= target < code.ends[function]:
            known = target in (int(code.starts[function]), at, int(references.end[row]))  # its entry; where am I
            if taken and not known and code.instruction_at(np.array([target]))[0]:
                return at
        elif taken and target in tables and tables[target].entry_size == 8:
            offset = at - code.base
            jump = decoded.opcode[offset] == _GROUP5 and decoded.modrm[offset] >> 3 & 7 == 4
            if not jump and not _jumped_to_at_once(code, function, offset):
                return at
    return None


def _jumped_to_at_once(code: Code, function: int, offset: int) -> bool:
    """The instruction at an offset loads a register, and the next one jumps to what is in it."""
    decoded = code.decoded
    if decoded.opcode[offset] != _MOV_LOAD:
        return False
    register = (int(decoded.modrm[offset]) >> 3 & 7) + (_rex(code, offset) << 1 & 8)  # REX.R
    instructions = code.instructions(function)
    following = int(np.searchsorted(instructions, offset, "right"))
    if following == len(instructions):
        return False
    jump = int(instructions[following])
    modrm = int(decoded.modrm[jump])
    to_register = decoded.opcode[jump] == _GROUP5 and modrm & 0xF8 == 0xE0
    return to_register and (modrm & 7) + (_rex(code, jump) << 3 & 8) == register  # REX.B


def _rex(code: Code, offset: int) -> int:
    """The REX prefix of an instruction (Intel SDM 2.2.1), 0 where there is none; 3E (notrack) may precede it."""
    first = int(code.raw[offset])
    if first == 0x3E:
        first = int(code.raw[offset + 1])
    return first if first & 0xF0 == 0x40 else 0
