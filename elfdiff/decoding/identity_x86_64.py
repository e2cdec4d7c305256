"""Objects that code knows by their address: it compares a pointer with it, or takes a distance from it.

A pointer that the running program has stored leads to the old object, whatever the patch brings in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elfdiff.decoding.code import LEA, Code, FieldKind
from elfdiff.decoding.decode_x86_64 import RefKind

WINDOW = 16
"""Instructions behind one that takes an address within which its use is looked for."""
_COMPARING = frozenset((0x29, 0x2B, 0x39, 0x3B))
"""sub and cmp between registers and memory, 64 bits wide (Intel SDM volume 2)."""
_CALL = int(RefKind.CALL)
_PLAIN_CALL = 5
"""Bytes of a call rel32 without prefixes."""
_SECOND = 7
"""Operation of opcode 81 that is cmp; sub is 5."""


def compared_addresses(code: Code, function: int) -> Iterator[int]:
    """Addresses that a function compares something with, or subtracts; an address may come more than once."""
    references, decoded = code.references, code.decoded
    for row in range(int(references.first[function]), int(references.last[function])):
        at = int(references.instruction[row]) - code.base
        opcode, kind = int(references.opcode[row]), int(references.kind[row])
        if kind == FieldKind.ABSOLUTE_IMMEDIATE:
            operation = int(decoded.modrm[at]) >> 3 & 7
            if opcode in (0x2D, 0x3D) or (opcode == 0x81 and operation in (5, _SECOND)):
                yield int(references.target[row])
                continue
        taken = opcode == LEA or kind in (FieldKind.ABSOLUTE_IMMEDIATE, FieldKind.ABSOLUTE_IMMEDIATE64)
        if taken and _is_compared(code, function, at):
            yield int(references.target[row])


@cache
def _disassembler() -> Any:
    import capstone  # noqa: PLC0415  (87 ms, and few comparisons come here)

    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    return decoder


def _is_compared(code: Code, function: int, at: int) -> bool:
    """What the instruction at an offset puts into its register is compared before the register gets another value.

    Read in the order of the addresses; a branch away is not followed.
    """
    instructions = code.instructions(function)
    first = int(np.searchsorted(instructions, at))
    if not _may_be_compared(code, instructions[first : first + WINDOW]):
        return False
    raw = bytes(code.raw[at : int(instructions[min(first + WINDOW, len(instructions) - 1)])])
    register: str | None = None
    for instruction in _disassembler().disasm(raw, at):
        read, written = ({_whole(instruction, r) for r in registers} for registers in instruction.regs_access())
        if register is None:
            if len(written) != 1:
                return False
            register = written.pop()
            continue
        if instruction.opcode[0] in _COMPARING and register in read and register in _operands(instruction):
            return True
        if register in written or instruction.mnemonic == "call":
            return False
    return False


def _may_be_compared(code: Code, at: NDArray[np.int64]) -> bool:
    """Whether behind the first of some instructions, and in front of a call, one compares a register like its own.

    By the lower three bits of the register's number; it spares most addresses the decoding of operands.
    """
    decoded = code.decoded
    opcodes, modes = decoded.opcode[at].tolist(), decoded.modrm[at].tolist()
    calls = ((decoded.ref_kind[at] == _CALL) & (decoded.length[at] == _PLAIN_CALL)).tolist()
    register = modes[0] >> 3 & 7 if opcodes[0] == LEA else None
    for opcode, call, mode in zip(opcodes[1:], calls[1:], modes[1:], strict=True):
        if call:
            return False
        if opcode in _COMPARING and (register is None or register in (mode >> 3 & 7, mode & 7)):
            return True
    return False


def _operands(instruction: Any) -> set[str]:
    """Register operands: not those that make up an address."""
    return {_whole(instruction, operand.reg) for operand in instruction.operands if operand.type == 1}  # X86_OP_REG


def _whole(instruction: Any, register: int) -> str:
    """Name of the 64-bit register of which a register may be the lower half, whose write clears the upper one."""
    name: str = instruction.reg_name(register)
    if name.startswith("e") and name != "eflags":
        return "r" + name[1:]
    return name.removesuffix("d") if name[:1] == "r" and name[1:2].isdigit() else name
