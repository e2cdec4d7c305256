"""The rows of a line number program (DWARF 5, section 6.2.5), reduced to what is asked for: address, file and line.

pyelftools decodes these as well, but keeps every register of every row, and takes about ten times as long; a diff of
builds with debug information reads the tables of all units whose code changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

EXTENDED, COPY, ADVANCE_PC, ADVANCE_LINE, SET_FILE = 0, 1, 2, 3, 4
CONST_ADD_PC, FIXED_ADVANCE_PC = 8, 9
END_SEQUENCE, SET_ADDRESS = 1, 2
MAX_ADDRESS = 1 << 64


@dataclass(frozen=True)
class LineHeader:
    """What the program's header says; ``operands[k]``: number of LEB128 operands of standard opcode k + 1."""

    minimum_instruction: int
    line_base: int
    line_range: int
    opcode_base: int
    operands: tuple[int, ...]


def rows(code: bytes, header: LineHeader) -> Iterator[tuple[int, int, int]]:
    """(address, file number, line) of each row; line -1 where a sequence ends.

    Raises ValueError for a program that no compiler writes, IndexError for one that is cut.
    """
    if not header.line_range or not 1 <= header.opcode_base <= len(header.operands) + 1:
        raise ValueError("a line table with impossible parameters")
    address, file, line, at = 0, 1, 1, 0
    while at < len(code):
        opcode = code[at]
        at += 1
        if opcode >= header.opcode_base:
            step, rest = divmod(opcode - header.opcode_base, header.line_range)
            address += step * header.minimum_instruction
            line += header.line_base + rest
            yield address % MAX_ADDRESS, file, line
        elif opcode == EXTENDED:
            size, at = _uleb(code, at)
            kind, body = code[at], code[at + 1 : at + size]
            at += size
            if kind == END_SEQUENCE:
                yield address % MAX_ADDRESS, file, -1
                address, file, line = 0, 1, 1
            elif kind == SET_ADDRESS:
                address = int.from_bytes(body, "little")
        elif opcode == COPY:
            yield address % MAX_ADDRESS, file, line
        else:
            ahead, lines, chosen, at = _standard(code, at, opcode, header)
            address, line = address + ahead, line + lines
            file = file if chosen is None else chosen


def _standard(code: bytes, at: int, opcode: int, header: LineHeader) -> tuple[int, int, int | None, int]:
    """What a standard opcode without a row adds to the address and the line, the file it sets, and what follows it."""
    if opcode == ADVANCE_LINE:
        step, at = _sleb(code, at)
        return 0, step, None, at
    if opcode == CONST_ADD_PC:
        return (255 - header.opcode_base) // header.line_range * header.minimum_instruction, 0, None, at
    if opcode == FIXED_ADVANCE_PC:
        return int.from_bytes(code[at : at + 2], "little"), 0, None, at + 2
    numbers, at = _operands(code, at, header.operands[opcode - 1])
    if opcode == ADVANCE_PC:
        return numbers[0] * header.minimum_instruction, 0, None, at
    return 0, 0, numbers[0] if opcode == SET_FILE else None, at


def _operands(code: bytes, at: int, count: int) -> tuple[list[int], int]:
    found = []
    for _ in range(count):
        number, at = _uleb(code, at)
        found.append(number)
    return found, at


def _uleb(code: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = code[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number in a line table has more than 64 bits")


def _sleb(code: bytes, at: int) -> tuple[int, int]:
    start = at
    value, at = _uleb(code, at)
    return (value - (1 << 7 * (at - start)) if code[at - 1] & 0x40 else value), at
