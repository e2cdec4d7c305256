"""DWARF expressions: every operation that call frame information may use, and every way to fail."""

from __future__ import annotations

import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elfdiff.errors import BadInput
from elfdiff.unwinding.dwarfexpression import evaluate

WORD = (1 << 64) - 1
REGISTERS = {7: 0x7000, 16: 0x1234B}


def memory(address: int, size: int) -> bytes:
    if not 0x7000 <= address < 0x7100:
        raise OSError("not mapped")
    return bytes((address + i) & 0xFF for i in range(size))


def run(code: str | bytes, *initial: int) -> int:
    expression = bytes.fromhex(code) if isinstance(code, str) else code
    return evaluate(expression, REGISTERS, memory, initial)


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("30", 0),
        ("4f", 31),
        ("08ff", 255),
        ("09ff", WORD),
        ("0affff", 65535),
        ("0bfeff", WORD - 1),
        ("0cffffffff", 0xFFFFFFFF),
        ("0dffffffff", WORD),
        ("0effffffffffffff7f", WORD >> 1),
        ("0fffffffffffffffff", WORD),
        ("10808001", 16384),
        ("117f", WORD),
        ("030807060504030201", 0x0102030405060708),
        ("7708", 0x7008),
        ("7778", 0x6FF8),
        ("920708", 0x7008),
        ("770806", 0x0F0E0D0C0B0A0908),
        ("77089401", 0x08),
        ("77089404", 0x0B0A0908),
        ("3112" + "22", 2),
        ("313214" + "1c1c", 0),
        ("3132331502", 1),
        ("313213", 1),
        ("3132161c", 1),
        ("313233171c1c", 4),  # 1 2 3 -> 3 1 2 -> 3 - (1 - 2)
        ("312305", 6),
        ("3196", 1),
        ("312f010030" + "32", 2),
        ("3231280100" + "96", 2),
        ("09f8331b", (-2) & WORD),
        ("3809fd1b", (-2) & WORD),
        ("09f819", 8),
        ("311f", WORD),
        ("3020", WORD),
        ("09ff09fe2b", 1),
        ("310840" + "24", 0),
        ("310840" + "25", 0),
        ("09ff0850" + "26", WORD),
    ],
)
def test_value(code: str, value: int) -> None:
    assert run(code) == value


def test_the_initial_value_is_on_the_stack() -> None:
    assert run("2308", 0x1000) == 0x1008


@pytest.mark.parametrize(
    ("program_counter", "offset"), [(0x12340, 8), (0x1234A, 8), (0x1234B, 16), (0x1234F, 16)]
)
def test_the_expression_of_plt_stubs(program_counter: int, offset: int) -> None:
    """GNU ld's: rsp + 8 + ((rip & 15) >= 11) * 8; the stub has pushed from byte 11 on."""
    code = bytes.fromhex("7708" + "8000" + "3f1a3b2a332422")
    assert evaluate(code, {7: 0x7000, 16: program_counter}, memory) == 0x7000 + offset


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("", "stack is empty"),
        ("22", "stack is empty"),
        ("3122", "stack is empty"),
        ("3116", "stack is empty"),
        ("313217", "stack is empty"),
        ("311501", "stack is empty"),
        ("31301b", "division by zero"),
        ("31301d", "division by zero"),
        ("2ffdff", "does not end within"),
        ("2fff7f", "leaves the expression"),
        ("2ff0ff", "leaves the expression"),
        ("312ffcff", "deeper than"),
        ("7508", "register 5 is not known"),
        ("3006", "cannot be read"),
        ("09ff06", "outside any address space"),
        ("77009403", "word of 3 bytes"),
        ("0c00", "ends within"),
        ("57", "unknown"),
        ("9c", "unknown"),
        ("9804000000", "unknown"),
        ("ff", "unknown"),
    ],
)
def test_failure(code: str, why: str) -> None:
    with pytest.raises(BadInput) as caught:
        run(code)
    assert why in caught.value.why


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


WORDS = st.integers(0, WORD)
BINARY = {
    0x1A: operator.and_,
    0x1C: operator.sub,
    0x1E: operator.mul,
    0x21: operator.or_,
    0x22: operator.add,
    0x27: operator.xor,
    0x29: operator.eq,
    0x2E: operator.ne,
    0x2A: lambda a, b: signed(a) >= signed(b),
    0x2B: lambda a, b: signed(a) > signed(b),
    0x2C: lambda a, b: signed(a) <= signed(b),
    0x2D: lambda a, b: signed(a) < signed(b),
}


@given(st.sampled_from(sorted(BINARY)), WORDS, WORDS)
def test_binary_operations_are_modulo_2_to_the_64(operation: int, a: int, b: int) -> None:
    code = b"\x0e" + a.to_bytes(8, "little") + b"\x0e" + b.to_bytes(8, "little") + bytes([operation])
    assert run(code) == int(BINARY[operation](a, b)) & WORD


@given(st.binary(max_size=40))
def test_random_bytes_give_a_word_or_bad_input(code: bytes) -> None:
    try:
        value = run(code, 0x7000)
    except BadInput:
        return
    assert 0 <= value <= WORD
