"""From readable text to machine code: the only place that uses the assembler.

The assembler is not believed: what it makes is read back by a disassembler (``readback``), labels included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .errors import TrampolineError
from .readback import decode, require_same

_LABEL = re.compile(r"@(\w+)")
_NEAR_LABEL = re.compile(r"\[rip \+ @(\w+)\]")


def assemble(lines: Sequence[str]) -> bytes:
    """The machine code of statements in Intel syntax. Raises TrampolineError where they are none."""
    import keystone  # noqa: PLC0415  # 50 ms, and only those who make code need it

    assembler = keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_64)
    try:
        code, count = assembler.asm("\n".join(lines), as_bytes=True)
    except keystone.KsError as error:
        raise TrampolineError(f"the code does not assemble: {error}") from error
    if count != len(lines) or code is None:
        raise TrampolineError(f"{count} of {len(lines)} statements were assembled")
    return bytes(code)


def assemble_function(lines: Sequence[str], data_size: int) -> bytes:
    """Position-independent code that lies behind ``data_size`` bytes of its data, read back.

    ``name:`` is a label, ``@name`` in an operand refers to it; ``[rip + @data]`` is where the data begins and stands
    in the first statement only. Statements are written as the disassembler prints them. Raises TrampolineError.
    """
    first, *rest = lines
    if first.count("[rip + @data]") != 1 or any("@data" in line for line in rest):
        raise TrampolineError("the first statement, and no other, must refer to the data")
    # Its own size is that of any instruction with REX, opcode, ModRM and a 32-bit displacement.
    head = first.replace("[rip + @data]", f"[rip - {data_size + 7:#x}]")
    code = assemble([head, *(_LABEL.sub(r"\1", line) for line in rest)])
    instructions = [line for line in lines if not line.endswith(":")]
    places = {"data": 0}
    addresses = [one.address for one in decode(code, data_size)]
    if len(addresses) != len(instructions):
        raise TrampolineError(f"{len(addresses)} instructions were made, {len(instructions)} were intended")
    number = 0
    for line in lines:
        if line.endswith(":"):
            places[line[:-1]] = addresses[number]
        else:
            number += 1
    require_same(code, [_meaning(line, places) for line in instructions], data_size)
    return code


def _meaning(line: str, places: dict[str, int]) -> str:
    """A statement as it must read back, labels resolved."""
    line = _NEAR_LABEL.sub(lambda found: f"[{places[found[1]]:#x}]", line)
    return _LABEL.sub(lambda found: f"{places[found[1]]:#x}", line)
