"""Whether a call ends at an address: what a return address must have in front of it."""

from __future__ import annotations

from typing import Final

LONGEST_CALL: Final = 7
"""Bytes of the longest call, without the prefixes, which stand before its opcode."""

_CALL_RELATIVE, _GROUP_5, _CALL = 0xE8, 0xFF, 2  # Intel SDM, volume 2: CALL; opcode FF, ModRM.reg 2 is CALL r/m64
_SIB, _NO_BASE = 4, 5


def ends_with_call(code: bytes) -> bool:
    """Whether the last bytes of ``code`` may be a near call, direct or through a register or memory.

    ``code`` are the ``LONGEST_CALL`` bytes before the address. Bytes that only look like a call count, too.
    """
    if len(code) != LONGEST_CALL:
        raise ValueError(f"{len(code)} bytes instead of {LONGEST_CALL}")
    if code[-5] == _CALL_RELATIVE:
        return True
    return any(code[-size] == _GROUP_5 and _length(code[-size:]) == size for size in (2, 3, 4, 6, 7))


def _length(code: bytes) -> int:
    """Bytes of the instruction FF /2 that begins ``code``; 0 where it is no call (SDM volume 2, tables 2-2 and 2-3)."""
    mode, operation, register = code[1] >> 6, code[1] >> 3 & 7, code[1] & 7
    if operation != _CALL:
        return 0
    if mode == 3:
        return 2
    if register == _SIB:
        if len(code) < 3:
            return 0
        displacement = 4 if mode == 0 and code[2] & 7 == _NO_BASE else (0, 1, 4)[mode]
        return 3 + displacement
    return 2 + (4 if mode == 0 and register == _NO_BASE else (0, 1, 4)[mode])
