"""The parts of the deep check that need no process: what a call looks like, and what glibc makes of a pointer."""

from __future__ import annotations

import capstone
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from patcher.stacks.callsites_x86_64 import LONGEST_CALL, ends_with_call
from patcher.stacks.mangling_x86_64 import mangled, unmangled

CALLS = [
    "e8 01 02 03 04", "ff d0", "41 ff d3", "ff 10", "ff 55 08", "ff 14 24", "ff 14 c5 00 10 00 00", "ff 54 24 08",
    "ff 94 24 00 01 00 00", "ff 92 00 01 00 00", "ff 15 00 10 00 00", "41 ff 94 c5 00 01 00 00", "3e ff d0",
    "67 e8 01 02 03 04", "65 ff 14 25 10 00 00 00",
]  # fmt: skip
OTHERS = ["ff e0", "ff 25 00 10 00 00", "e9 01 02 03 04", "48 89 e5", "ff 74 24 08", "c3", "ff 18"]
"""The last is a far call: no compiler makes one, and what it leaves on the stack is no word of 64 bits."""

FAR = 3  # Intel SDM, volume 2: CALL; opcode FF, ModRM.reg 3 is CALL m16:32, "call" to capstone like the near ones


@pytest.mark.parametrize("code", CALLS)
@pytest.mark.parametrize("before", [0x90, 0xE8, 0xFF, 0x00])
def test_every_form_of_a_call_is_known(code: str, before: int) -> None:
    data = bytes([before]) * LONGEST_CALL + bytes.fromhex(code)
    assert ends_with_call(data[-LONGEST_CALL:])


@pytest.mark.parametrize("code", OTHERS)
def test_what_is_no_call_is_none(code: str) -> None:
    assert not ends_with_call((bytes([0x90]) * LONGEST_CALL + bytes.fromhex(code))[-LONGEST_CALL:])


@given(st.binary(min_size=LONGEST_CALL, max_size=LONGEST_CALL))
@example(bytes.fromhex("0000000000ff18"))
def test_what_capstone_takes_for_a_call_is_one(code: bytes) -> None:
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    for size in range(2, LONGEST_CALL + 1):
        for instruction in decoder.disasm(code[-size:], 0, 1):
            far = instruction.opcode[0] == 0xFF and instruction.modrm >> 3 & 7 == FAR
            if instruction.mnemonic == "call" and instruction.size == size and not far:
                assert ends_with_call(code), instruction.op_str


@given(st.integers(0, (1 << 64) - 1), st.lists(st.integers(0, (1 << 47) - 1), min_size=1, max_size=50))
def test_a_mangled_address_is_found_and_read(guard: int, addresses: list[int]) -> None:
    """PTR_MANGLE as the C library's source has it: xor, then rol $17."""
    whole = (1 << 64) - 1
    hidden = [((address ^ guard) << 17 | (address ^ guard) >> 47) & whole for address in addresses]
    words = np.array(hidden, dtype=np.uint64)
    assert mangled(words, guard).tolist() == list(range(len(addresses)))
    assert unmangled(words, guard).tolist() == addresses
