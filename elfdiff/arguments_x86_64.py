"""Constant arguments of calls: numbers and source file names that are put into argument registers."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from elfdiff.code import LEA, Code, FieldKind
from elfdiff.image import Kind

MAX_LINE = 200_000
"""No source file of the programs at hand is longer; generated ones reach 150,000."""
WINDOW = 14
"""Instructions on either side in which the file name must be loaded and the call be made."""
ARGUMENTS = (7, 6, 2, 1, 8, 9)
"""Numbers of rdi rsi rdx rcx r8 r9, in the order of arguments (psABI, section 3.2.3)."""
ARGUMENT_REGISTERS = frozenset(ARGUMENTS)

_SOURCE_FILE = re.compile(rb"[\w./+~-]*\w\.(?:c|h|cc|cpp|cxx|hh|hpp|inc|y|l|S)\Z")


def argument(code: Code, a: int, inside: NDArray[np.int64]) -> int | None:
    """The register of ``mov $imm32, argument register`` when only its immediate differs, else None."""
    field, opcode = int(code.decoded.imm_field[a]), int(code.decoded.opcode[a])
    if not 0xB8 <= opcode <= 0xBF or code.decoded.imm_size[a] != 4 or (inside < field).any():
        return None
    rex_b = field == 2 and bool(code.raw[a] & 1)
    register = (opcode & 7) + 8 * rex_b
    return register if register in ARGUMENT_REGISTERS else None


def immediate(code: Code, a: int) -> int:
    """The 32-bit immediate of an instruction."""
    field = a + int(code.decoded.imm_field[a])
    return int.from_bytes(code.raw[field : field + 4].tobytes(), "little")


def file_loads(code: Code, function: int) -> dict[int, bytes]:
    """Instruction offset -> the source file name whose address it loads."""
    references, image = code.references, code.image
    rows = references.of(function)
    loads = {}
    for address, kind, opcode, target in zip(
        references.instruction[rows].tolist(),
        references.kind[rows].tolist(),
        references.opcode[rows].tolist(),
        references.target[rows].tolist(),
        strict=True,
    ):
        if (kind == FieldKind.MEMORY and opcode == LEA) or kind == FieldKind.ABSOLUTE_IMMEDIATE:
            section = image.section_at(target)
            text = image.string_at(target, 512) if section and section.kind is Kind.CONSTANT else None
            if text and _SOURCE_FILE.match(text):
                loads[address - code.base] = text
    return loads


def loaded_register(code: Code, a: int) -> int:
    """Number of the register that ``lea`` or ``mov $imm32`` loads."""
    opcode, prefix = int(code.decoded.opcode[a]), int(code.raw[a])
    rex = prefix if prefix & 0xF0 == 0x40 else 0
    if opcode == LEA:
        return (int(code.decoded.modrm[a]) >> 3 & 7) + 8 * bool(rex & 4)
    return (opcode & 7) + 8 * bool(rex & 1)
