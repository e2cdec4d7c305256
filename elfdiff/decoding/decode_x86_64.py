"""Lengths and reference fields of x86-64 instructions, decoded at every byte at once by numpy.

The differ needs of most instructions only where they end and which of their bytes are an address; that takes
tables and some thirty array operations instead of one call of a disassembler per instruction. Encodings after the
Intel SDM, volume 2, chapter 2 and appendix A. Checked against capstone on every instruction of real programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

# What follows the opcode, as bits.
MODRM, IMM8, IMM_Z, IMM16, REL32, REL8, IMM_V, MOFFS, GROUP3, INVALID = (1 << k for k in range(10))

CHUNK = 1 << 17
"""Bytes decoded per step: the intermediate arrays of a step stay in the cache."""
LOOKAHEAD = 40
"""More than the longest prefix run plus instruction that a step may read behind its last byte."""
MAX_PREFIXES = 14
FEW = 48
"""So many functions are walked faster one after the other than all at once."""


class RefKind(IntEnum):
    """How an instruction names another address relative to itself."""

    NONE = 0
    MEMORY = 1  # disp32(%rip): a load, store, lea, or a jump through a slot
    CALL = 2  # call rel32
    JUMP = 3  # jmp rel32
    BRANCH = 4  # jcc rel32
    SHORT = 5  # jmp, jcc, loop, jrcxz rel8


@dataclass(frozen=True)
class Decoded:
    """One entry per byte of the code: what an instruction that starts there would be.

    Offsets count from the instruction's first byte; 0 means that it has no such field.
    """

    length: Bytes  # 1..15; 1 where ``valid`` is false
    valid: NDArray[np.bool_]
    opcode: NDArray[np.uint16]  # opcode byte + 0x100 * map (1: 0F, 2: 0F38, 3: 0F3A, 5: VEX, 6: EVEX, 7: XOP)
    ref_kind: Bytes
    ref_field: Bytes  # of the rel8, rel32 or disp32(%rip)
    disp_field: Bytes  # of a disp32 that is not relative to rip
    imm_field: Bytes  # of an immediate of 4 or 8 bytes
    imm_size: Bytes  # 0, 4 or 8
    modrm: Bytes  # 0 where there is none


def _one_byte_map() -> NDArray[np.uint16]:
    t = np.zeros(256, np.uint16)
    for op in range(0x00, 0x40, 8):  # add or adc sbb and sub xor cmp
        t[op : op + 4] = MODRM
        t[op + 4], t[op + 5], t[op + 6 : op + 8] = IMM8, IMM_Z, INVALID
    t[[0x26, 0x2E, 0x36, 0x3E]] = 0  # segment prefixes, never reached as opcodes
    t[[0x60, 0x61, 0x62, 0x82, 0x9A, 0xCE, 0xD4, 0xD5, 0xD6, 0xEA, 0x27, 0x2F, 0x37, 0x3F]] = INVALID
    t[0x63], t[0x68], t[0x69], t[0x6A], t[0x6B] = MODRM, IMM_Z, MODRM | IMM_Z, IMM8, MODRM | IMM8
    t[0x70:0x80] = REL8
    t[0x80], t[0x81], t[0x83] = MODRM | IMM8, MODRM | IMM_Z, MODRM | IMM8
    t[0x84:0x90] = MODRM
    t[0xA0:0xA4], t[0xA8], t[0xA9] = MOFFS, IMM8, IMM_Z
    t[0xB0:0xB8], t[0xB8:0xC0] = IMM8, IMM_V
    t[0xC0:0xC2], t[0xC2], t[0xC6], t[0xC7] = MODRM | IMM8, IMM16, MODRM | IMM8, MODRM | IMM_Z
    t[0xC8], t[0xCA], t[0xCD] = IMM16 | IMM8, IMM16, IMM8
    t[0xD0:0xD4], t[0xD8:0xE0] = MODRM, MODRM
    t[0xE0:0xE4], t[0xE4:0xE8], t[0xE8:0xEA], t[0xEB] = REL8, IMM8, REL32, REL8
    t[0xF6], t[0xF7], t[0xFE:0x100] = MODRM | GROUP3 | IMM8, MODRM | GROUP3 | IMM_Z, MODRM
    return t


def _two_byte_map() -> NDArray[np.uint16]:
    t = np.full(256, MODRM, np.uint16)
    bare = [0x05, 0x06, 0x07, 0x08, 0x09, 0x0B, 0x0E, 0x77, 0xA0, 0xA1, 0xA2, 0xA8, 0xA9, 0xAA]
    t[bare] = 0
    t[0x30:0x38] = t[0xC8:0xD0] = 0
    t[[0x0F, 0x70, 0x71, 0x72, 0x73, 0xA4, 0xAC, 0xBA, 0xC2, 0xC4, 0xC5, 0xC6]] = MODRM | IMM8
    t[0x80:0x90] = REL32
    t[[0x04, 0x0A, 0x0C]] = INVALID
    return t


ONE_BYTE, TWO_BYTE = _one_byte_map(), _two_byte_map()
VEX_MAP1 = TWO_BYTE.copy()
VEX_MAP1[0x80:0x90] = MODRM  # kortest and the like where the legacy map has jcc rel32
XOP_MAPS = np.full(32, INVALID, np.uint16)
XOP_MAPS[[8, 9, 10]] = MODRM | IMM8, MODRM, MODRM | IMM_Z
PREFIX = np.zeros(256, np.bool_)
PREFIX[[0x66, 0x67, 0xF2, 0xF3, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65, 0xF0]] = True


def decode(code: Bytes) -> Decoded:
    """Decode at every byte of ``code`` (uint8 array of any length)."""
    n = len(code)
    padded = np.concatenate([code, np.zeros(LOOKAHEAD, np.uint8)])
    result = Decoded(
        length=np.empty(n, np.uint8),
        valid=np.empty(n, np.bool_),
        opcode=np.empty(n, np.uint16),
        ref_kind=np.empty(n, np.uint8),
        ref_field=np.empty(n, np.uint8),
        disp_field=np.empty(n, np.uint8),
        imm_field=np.empty(n, np.uint8),
        imm_size=np.empty(n, np.uint8),
        modrm=np.empty(n, np.uint8),
    )
    for start in range(0, n, CHUNK):
        size = min(CHUNK, n - start)
        _decode_chunk(padded[start : start + size + LOOKAHEAD], size, result, slice(start, start + size))
    last = np.arange(max(0, n - LOOKAHEAD), n)
    cut = last[last + result.length[last] > n]  # keeps its length, so that no walk ends there as if it were whole
    result.valid[cut], result.ref_kind[cut] = False, RefKind.NONE
    return result


@dataclass
class _Cursor:
    """Where each of the instructions of a chunk has been read up to, and what was learned on the way."""

    position: NDArray[np.int32]
    flags: NDArray[np.uint16]
    opcode: NDArray[np.uint16]
    operand16: NDArray[np.bool_]
    address32: NDArray[np.bool_]
    rex_w: NDArray[np.bool_]


def _prefixes(b: Bytes, n: int) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Position behind the legacy prefixes; whether 66 and 67 are among them."""
    position = np.arange(n, dtype=np.int32)
    operand16, address32 = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
    active = np.nonzero(PREFIX[b[:n]])[0]
    for _ in range(MAX_PREFIXES):
        if not len(active):
            break
        value = b[position[active]]
        operand16[active] |= value == 0x66
        address32[active] |= value == 0x67
        position[active] += 1
        active = active[PREFIX[b[position[active]]]]
    return position, operand16, address32


def _opcodes(b: Bytes, n: int) -> _Cursor:
    """Read prefixes, REX and the opcode with its map."""
    position, operand16, address32 = _prefixes(b, n)
    first = b[position]
    rex = (first & 0xF0) == 0x40
    rex_w = rex & ((first & 8) != 0)
    position += rex
    first = b[position]
    flags, opcode = ONE_BYTE[first], first.astype(np.uint16)
    position += 1

    at = np.nonzero(first == 0x0F)[0]
    second = b[position[at]]
    flags[at], opcode[at] = TWO_BYTE[second], second + np.uint16(0x100)
    position[at] += 1
    for escape, number, what in ((0x38, 2, MODRM), (0x3A, 3, MODRM | IMM8)):
        some = at[second == escape]
        flags[some], opcode[some] = what, b[position[some]] + np.uint16(0x100 * number)
        position[some] += 1

    plain = ~rex  # a REX before a VEX or EVEX prefix is #UD
    at = np.nonzero((first == 0xC5) & plain)[0]
    op = b[position[at] + 1]
    flags[at], opcode[at] = VEX_MAP1[op], op + np.uint16(0x500)
    position[at] += 2
    at = np.nonzero((first == 0xC4) & plain)[0]
    _vector(b, at, position, flags, opcode, map_mask=0x1F, size=3, page=0x500)
    at = np.nonzero((first == 0x62) & plain)[0]
    _vector(b, at, position, flags, opcode, map_mask=0x07, size=4, page=0x600)
    # AMD's XOP (AMD64 manual, volume 3, 1.2.9): 8F, where pop has 0 in ModRM.reg; the map begins at 8.
    at = np.nonzero((first == 0x8F) & plain)[0]
    at = at[(b[position[at]] & 0x1F) >= 8]
    flags[at] = XOP_MAPS[b[position[at]] & 0x1F]
    opcode[at] = b[position[at] + 2] + np.uint16(0x700)
    position[at] += 3
    return _Cursor(position, flags, opcode, operand16, address32, rex_w)


def _vector(
    b: Bytes,
    at: NDArray[np.intp],
    position: NDArray[np.int32],
    flags: NDArray[np.uint16],
    opcode: NDArray[np.uint16],
    *,
    map_mask: int,
    size: int,
    page: int,
) -> None:
    """Three-byte VEX and EVEX: the map is a field of the prefix, the opcode its last byte."""
    opcode_map = b[position[at]] & map_mask
    op = b[position[at] + size - 1]
    other = np.where(opcode_map == 3, np.uint16(MODRM | IMM8), np.uint16(MODRM))
    flags[at] = np.where(opcode_map == 1, VEX_MAP1[op], other)
    opcode[at] = op + np.uint16(page)
    position[at] += size


def _decode_chunk(b: Bytes, n: int, out: Decoded, where: slice) -> None:
    # Everything counts from the instruction's first byte in 8 bits: the time goes with the bytes that are moved.
    c = _opcodes(b, n)
    flags = c.flags
    has_modrm = (flags & MODRM) != 0
    modrm = np.where(has_modrm, b[c.position], np.uint8(0))
    mod, rm, reg = modrm >> 6, modrm & 7, (modrm >> 3) & 7
    sib = has_modrm & (mod != 3) & (rm == 4)
    base5 = (b[c.position + 1] & 7) == 5
    rip = has_modrm & (mod == 0) & (rm == 5)
    no_base = has_modrm & (mod == 0) & sib & base5
    disp32 = rip | no_base | (has_modrm & (mod == 2))
    disp_at = (c.position - np.arange(n, dtype=np.int32)).astype(np.uint8) + has_modrm + sib
    imm_at = disp_at + (has_modrm & (mod == 1)) + _times(4, disp32)

    # The immediate: f6/f7 have one only as test (reg 0 and 1).
    takes = np.where(((flags & GROUP3) != 0) & (reg >= 2), np.uint16(0), flags)
    half = c.operand16 & ~c.rex_w
    word = _times(4, (takes & (IMM_Z | IMM_V)) != 0)
    word >>= half
    word <<= ((takes & IMM_V) != 0) & c.rex_w
    moffs = _times(8, (takes & MOFFS) != 0) >> c.address32
    xbegin = (c.opcode == 0xC7) & (modrm == 0xF8) & ~c.operand16  # its "immediate" is a rel32
    word[xbegin] = 0
    relative = ((flags & REL32) != 0) | xbegin
    short = (flags & REL8) != 0
    length = imm_at + word + moffs + _times(1, (takes & IMM8) != 0) + _times(2, (takes & IMM16) != 0)
    length += _times(4, relative) + short
    valid = ((flags & INVALID) == 0) & (length <= 15)
    out.length[where] = np.where(valid, length, np.uint8(1))
    out.valid[where] = valid
    out.opcode[where] = c.opcode
    out.modrm[where] = modrm
    kind = _times(RefKind.MEMORY, rip)
    kind[short] = RefKind.SHORT
    kind[relative] = RefKind.BRANCH
    kind[relative & (c.opcode == 0xE8)] = RefKind.CALL
    kind[relative & (c.opcode == 0xE9)] = RefKind.JUMP
    kind[~valid] = RefKind.NONE
    out.ref_kind[where] = kind
    out.ref_field[where] = np.where(rip, disp_at, imm_at * (relative | short))
    out.disp_field[where] = disp_at * (disp32 & ~rip)
    out.imm_field[where] = imm_at * (word >= 4)
    out.imm_size[where] = word * (word >= 4)


def _times(number: int, where: NDArray[np.bool_]) -> Bytes:
    """A number where something holds, 0 elsewhere."""
    found: Bytes = where.view(np.uint8) * np.uint8(number)
    return found


def instruction_starts(
    length: Bytes, starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Walk all functions at once. Offsets into the code; returns (is an instruction start, final offsets).

    A function is decoded soundly when its final offset is its end.
    """
    marks = np.zeros(len(length) + 16, np.bool_)
    final = np.asarray(starts, np.int64).copy()
    active = np.nonzero(final < ends)[0]
    at, stop = final[active], np.asarray(ends, np.int64)[active]
    while len(active) > FEW:
        marks[at] = True
        at = at + length[at]
        going = at < stop
        if not going.all():
            final[active[~going]] = at[~going]
            active, at, stop = active[going], at[going], stop[going]
    steps = length.tobytes()
    for function, first, end in zip(active.tolist(), at.tolist(), stop.tolist(), strict=True):
        seen, place = [], first
        while place < end:
            seen.append(place)
            place += steps[place]
        marks[seen] = True
        final[function] = place
    return marks[: len(length)], final
