"""The entry jump: the five bytes at the start of an old function that lead to its new code.

A direct near jump (Intel SDM volume 2, JMP, opcode E9). It clobbers nothing: no register, no flag, no stack.
That matters, since at a function's entry all argument registers are live, r10 may hold a static chain, al the
number of vector registers of a variadic call (psABI section 3.2.3), and callers compiled with -fipa-ra may
expect any register to survive.

Five bytes are the shortest jump with a reach of 2 GiB; new code is therefore placed within 2 GiB of the old.

Where the old function starts with endbr64, the jump takes its place. That is legal as long as user space runs
without indirect branch tracking: mainline Linux has supported user shadow stacks since 6.6, but user IBT
not at all, so endbr64 is executed as a no-op and nothing misses it. Under a kernel with user IBT an indirect
call to the patched entry would raise #CP; there the jump has to go behind the endbr64 (``entry + 4``), and
nine bytes have to be free of live program counters instead of five.

Shadow stacks are not concerned: a jump pushes nothing.
"""

from __future__ import annotations

from .errors import TrampolineError

ENTRY_JUMP_SIZE = 5
"""Bytes that an entry jump replaces."""

_REACH = 1 << 31
_USER_LIMIT = 1 << 64


def entry_jump(entry: int, target: int) -> bytes:
    """Return the five bytes that, written at ``entry``, jump to ``target`` (absolute addresses).

    Raises TrampolineError where the target is more than 2 GiB away, counted from the end of the jump.
    """
    if not (0 <= entry < _USER_LIMIT and 0 <= target < _USER_LIMIT):
        raise TrampolineError(f"a jump from {entry:#x} to {target:#x} leaves the address space")
    displacement = target - (entry + ENTRY_JUMP_SIZE)
    if not -_REACH <= displacement < _REACH:
        raise TrampolineError(f"{target:#x} is out of reach of a jump at {entry:#x}: {displacement:#x} bytes")
    return bytes(
        (
            0xE9,  # jmp rel32
            *displacement.to_bytes(4, "little", signed=True),  # from the end of the instruction
        )
    )


def entry_jump_target(entry: int, code: bytes) -> int | None:
    """Return where the entry jump at the start of ``code``, found at ``entry``, leads; None if it is none.

    Raises TrampolineError on fewer than five bytes.
    """
    if len(code) < ENTRY_JUMP_SIZE:
        raise TrampolineError(f"an entry jump has {ENTRY_JUMP_SIZE} bytes, not {len(code)}")
    if code[0] != 0xE9:
        return None
    return entry + ENTRY_JUMP_SIZE + int.from_bytes(code[1:ENTRY_JUMP_SIZE], "little", signed=True)
