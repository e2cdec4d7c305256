"""capstone's reading of instructions, in the terms of ``elfdiff.decoding.decode_x86_64``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import capstone
import numpy as np
from capstone import x86_const

from elfdiff.decoding.decode_x86_64 import RefKind, decode

_JUMPS = (x86_const.X86_GRP_JUMP, x86_const.X86_GRP_CALL, x86_const.X86_GRP_BRANCH_RELATIVE)


@dataclass(frozen=True)
class Reading:
    """Length of one instruction; where its relative field begins (0: none) and how long it is; what it leads to."""

    length: int
    field: int
    field_size: int
    target: int | None  # counted from the instruction's first byte


def by_capstone(disassembler: capstone.Cs, raw: bytes) -> Reading | None:
    """One instruction, or None where capstone decodes none. Needs ``detail``."""
    return next((_reading(i) for i in disassembler.disasm(raw, 0, 1)), None)


def all_by_capstone(disassembler: capstone.Cs, raw: bytes) -> Iterator[tuple[int, Reading]]:
    """(offset, reading) of the instructions of a stretch of code, up to the first that capstone does not know."""
    for i in disassembler.disasm(raw, 0):
        reading = _reading(i)
        target = None if reading.target is None else reading.target - i.address
        yield i.address, Reading(reading.length, reading.field, reading.field_size, target)


def disassembler() -> capstone.Cs:
    """With operands."""
    made = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    made.detail = True
    return made


def _reading(i: capstone.CsInsn) -> Reading:
    for operand in i.operands:
        if operand.type == x86_const.X86_OP_MEM and operand.mem.base == x86_const.X86_REG_RIP:
            return Reading(i.size, i.disp_offset, 4, i.address + i.size + operand.mem.disp)
        if operand.type == x86_const.X86_OP_IMM and any(i.group(g) for g in _JUMPS):
            target = operand.imm - (1 << 64) if operand.imm >= 1 << 63 else operand.imm
            return Reading(i.size, i.imm_offset, i.imm_size, target)
    return Reading(i.size, 0, 0, None)


class ByUs:
    """The same readings, of a whole stretch decoded at once."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.decoded = decode(np.frombuffer(raw, np.uint8))

    def valid(self, offset: int) -> bool:
        return bool(self.decoded.valid[offset])

    def reading(self, offset: int) -> Reading:
        length, kind = int(self.decoded.length[offset]), int(self.decoded.ref_kind[offset])
        if kind == RefKind.NONE:
            return Reading(length, 0, 0, None)
        field, size = int(self.decoded.ref_field[offset]), 1 if kind == RefKind.SHORT else 4
        value = int.from_bytes(self.raw[offset + field : offset + field + size], "little", signed=True)
        return Reading(length, field, size, length + value)
