"""Every byte of machine code that we make, decoded again and compared with what was meant.

The assembler accepts some text that it then encodes as something else without a word, so its output is not
believed: a second, independent tool has to read the same instructions back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from .errors import TrampolineError

_RIP_OPERAND = re.compile(r"(?:[a-z]+ ptr )?\[rip(?: ([+-]) (0x[0-9a-f]+|\d+))?\]")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One decoded instruction; ``text`` is Intel syntax with PC-relative operands as ``[0xADDRESS]``."""

    address: int
    size: int
    text: str


@cache
def _decoder() -> Any:
    import capstone  # noqa: PLC0415  # 60 ms, and only those who make code need it

    return capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)


def decode(code: bytes, address: int = 0) -> tuple[Instruction, ...]:
    """Return the instructions of ``code`` as if it lay at ``address``.

    Raises TrampolineError where any byte belongs to no instruction.
    """
    found = tuple(decode_leading(code, address))
    position = found[-1].address + found[-1].size if found else address
    if position != address + len(code):
        raise TrampolineError(f"the bytes from {position:#x} on are no instruction")
    return found


def decode_leading(code: bytes, address: int = 0) -> Iterator[Instruction]:
    """Yield the instructions of ``code`` up to the first byte that belongs to none."""
    for start, size, mnemonic, operands in _decoder().disasm_lite(code, address):
        yield Instruction(start, size, _absolute(f"{mnemonic} {operands}".strip(), start + size))


def _absolute(text: str, following: int) -> str:
    def replace(operand: re.Match[str]) -> str:
        distance = int(operand[2] or "0", 0)
        return f"[{following + (-distance if operand[1] == '-' else distance):#x}]"

    return _RIP_OPERAND.sub(replace, text)


def require_same(code: bytes, intended: Sequence[str], address: int = 0) -> None:
    """Check that ``code`` at ``address`` is exactly ``intended`` (texts as in ``Instruction``).

    Raises TrampolineError naming the first instruction that differs.
    """
    found = decode(code, address)
    for index, (one, text) in enumerate(zip(found, intended, strict=False)):
        if one.text != text:
            raise TrampolineError(
                f"instruction {index} at {one.address:#x} reads {one.text!r}, not {text!r} as intended"
            )
    if len(found) != len(intended):
        raise TrampolineError(f"{len(found)} instructions were made, {len(intended)} were intended")
