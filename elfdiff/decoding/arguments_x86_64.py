"""Constant arguments of calls: numbers and source file names that are put into argument registers."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from elfdiff.decoding.code import LEA, Code, FieldKind
from elfdiff.images.image import Kind

MAX_LINE = 200_000
"""No source file of the programs at hand is longer; generated ones reach 150,000."""
WINDOW = 14
"""Instructions on either side in which the file name must be loaded and the call be made."""
ARGUMENTS = (7, 6, 2, 1, 8, 9)
"""Numbers of rdi rsi rdx rcx r8 r9, in the order of arguments (psABI, section 3.2.3)."""
ARGUMENT_REGISTERS = frozenset(ARGUMENTS)
_MEMORY, _IMMEDIATE = int(FieldKind.MEMORY), int(FieldKind.ABSOLUTE_IMMEDIATE)

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


class SourceFiles:
    """The source file names that functions of one build load; each function and each string is read once."""

    def __init__(self, code: Code) -> None:
        """Nothing is read yet."""
        self.code = code
        self._loads: dict[int, dict[int, bytes]] = {}
        self._names: dict[int, bytes | None] = {}

    def loads(self, function: int) -> dict[int, bytes]:
        """Instruction offset -> the source file name whose address it loads."""
        found = self._loads.get(function)
        if found is None:
            found = self._loads[function] = self._read(function)
        return found

    def _read(self, function: int) -> dict[int, bytes]:
        references = self.code.references
        rows = references.of(function)
        kind = references.kind[rows]
        taken = (kind == _MEMORY) & (references.opcode[rows] == LEA) | (kind == _IMMEDIATE)
        at, targets = references.instruction[rows][taken], references.target[rows][taken]
        loads = {}
        for offset, target in zip((at - self.code.base).tolist(), targets.tolist(), strict=True):
            name = self._name(target)
            if name is not None:
                loads[offset] = name
        return loads

    def _name(self, address: int) -> bytes | None:
        if address not in self._names:
            image = self.code.image
            text = image.string_at(address, 512) if image.kind_at(address) is Kind.CONSTANT else None
            self._names[address] = text if text and _SOURCE_FILE.match(text) else None
        return self._names[address]


def loaded_register(code: Code, a: int) -> int:
    """Number of the register that ``lea`` or ``mov $imm32`` loads."""
    opcode, prefix = int(code.decoded.opcode[a]), int(code.raw[a])
    rex = prefix if prefix & 0xF0 == 0x40 else 0
    if opcode == LEA:
        return (int(code.decoded.modrm[a]) >> 3 & 7) + 8 * bool(rex & 4)
    return (opcode & 7) + 8 * bool(rex & 1)
