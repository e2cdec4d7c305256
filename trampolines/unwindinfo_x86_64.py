"""Unwind information for code that we make, so that exceptions and backtraces pass through its frames.

Derived from the instructions themselves: where each moves the stack pointer or saves a register (psABI x86-64, 3.2.1),
the unwinder is told (DWARF 5, 6.4.2; the form is that of .eh_frame, LSB 5.0 core, 10.6).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import TrampolineError
from .readback import Instruction, decode

_SAVED = {"rbx": 3, "rbp": 6, "r12": 12, "r13": 13, "r14": 14, "r15": 15}  # psABI x86-64, figure 3.36
_RBP, _RSP, _RETURN_ADDRESS = 6, 7, 16
_ADVANCE, _OFFSET, _RESTORE = 0x40, 0x80, 0xC0
_ADVANCE1, _DEF_CFA, _DEF_CFA_REGISTER, _DEF_CFA_OFFSET = 0x02, 0x0C, 0x0D, 0x0E
_PCREL_SDATA4, _UDATA4, _DATAREL_SDATA4 = 0x1B, 0x03, 0x3B
_WORD = 8
_MOVES = re.compile(r"(add|sub) rsp, (0x[0-9a-f]+|\d+)")
_WRITES = re.compile(r"(?!cmp|test)\w+ (e|r)?sp\b|enter|leave|iretq|xchg .*\brsp")


@dataclass(frozen=True, slots=True)
class Frame:
    """A function: where it starts, its size in bytes, and its call frame instructions."""

    start: int
    size: int
    rules: bytes


def frames(code: bytes, start: int) -> tuple[Frame, ...]:
    """The frames of functions that lie one behind the other from ``start`` on, each up to its only return.

    Raises TrampolineError where the stack pointer is moved in a way that is not known.
    """
    found: list[Frame] = []
    function: list[Instruction] = []
    for one in decode(code, start):
        function.append(one)
        if one.text == "ret":
            first = function[0].address
            found.append(Frame(first, one.address + one.size - first, _rules(function)))
            function = []
    if function:
        raise TrampolineError("a function does not return")
    return tuple(found)


def _rules(function: Sequence[Instruction]) -> bytes:
    """Call frame instructions behind those of ``_cie``: at the entry the frame address is rsp + 8."""
    rules, told = bytearray(), function[0].address
    register, offset = _RSP, _WORD
    for one in function:
        name, _, operand = one.text.partition(" ")
        moved = _MOVES.fullmatch(one.text)
        before = register, offset
        saved = b""
        if name in ("push", "pop") and operand in _SAVED and register == _RSP:
            offset += _WORD if name == "push" else -_WORD
            number = _SAVED[operand]
            saved = bytes([_OFFSET | number, offset // _WORD]) if name == "push" else bytes([_RESTORE | number])
        elif one.text == "mov rbp, rsp":
            register = _RBP
        elif moved is not None:
            offset += (int(moved[2], 0) if moved[1] == "sub" else -int(moved[2], 0)) if register == _RSP else 0
        elif name == "leave" and register == _RBP:
            register, offset, saved = _RSP, offset - _WORD, bytes([_RESTORE | _RBP])
        elif _WRITES.match(one.text) or name in ("push", "pop"):
            raise TrampolineError(f"{one.text!r} moves the stack pointer in a way that is not known")
        if saved or before != (register, offset):
            end = one.address + one.size
            rules += _advance(end - told) + _define(before, register, offset) + saved
            told = end
    if (register, offset) != (_RSP, _WORD):
        raise TrampolineError("a function returns with another stack pointer")
    return bytes(rules)


def _advance(distance: int) -> bytes:
    if not 0 < distance < 256:
        raise TrampolineError(f"{distance} bytes of code without a change of the frame")
    return bytes([_ADVANCE | distance]) if distance < _ADVANCE else bytes([_ADVANCE1, distance])


def _define(before: tuple[int, int], register: int, offset: int) -> bytes:
    if not 0 < offset < 128:  # a number of one byte
        raise TrampolineError(f"a frame of {offset} bytes")
    if before == (register, offset):
        return b""
    if before[0] == register:
        return bytes([_DEF_CFA_OFFSET, offset])
    return bytes([_DEF_CFA_REGISTER, register]) if before[1] == offset else bytes([_DEF_CFA, register, offset])


def unwind_info(functions: Sequence[Frame], at: int) -> tuple[bytes, int]:
    """The bytes of .eh_frame and .eh_frame_hdr that will lie at ``at``, and the offset of the latter.

    ``functions`` are at the addresses at which they will lie.
    """
    data = bytearray(_entry(0, b"\x01zR\0\x01" + bytes([0x80 - _WORD, _RETURN_ADDRESS, 1, _PCREL_SDATA4])
                            + bytes([_DEF_CFA, _RSP, _WORD, _OFFSET | _RETURN_ADDRESS, 1])))  # fmt: skip
    places = []
    for item in sorted(functions, key=lambda one: one.start):
        place = len(data)
        places.append((item.start, at + place))
        body = struct.pack("<iIB", item.start - (at + place + 8), item.size, 0) + item.rules
        data += _entry(place + 4, body)
    data += bytes(4)  # the end
    header = at + len(data)
    table = b"".join(struct.pack("<ii", start - header, place - header) for start, place in places)
    encodings = bytes([1, _PCREL_SDATA4, _UDATA4, _DATAREL_SDATA4])
    return bytes(data) + encodings + struct.pack("<iI", at - header - 4, len(places)) + table, len(data)


def _entry(identity: int, body: bytes) -> bytes:
    """A CIE (``identity`` 0) or an FDE (the distance to its CIE), filled up with DW_CFA_nop."""
    body = body.ljust(-(-(len(body) + 8) // _WORD) * _WORD - 8, b"\0")
    return struct.pack("<II", len(body) + 4, identity) + body
