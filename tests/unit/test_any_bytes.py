"""Readers of files and of memory: any bytes give a value, or an error of our tree that says what is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from elfdiff.errors import BadInput, LivegraftError, Refused
from elfdiff.images.elffile import EHDR, MAX_NAME, PHDR, SHDR, Strings
from elfdiff.images.imagefile import _unpack_relr, load_image
from elfdiff.patches.patchcheck import decoded, decoded_all
from elfdiff.patches.patchfile import read_patch
from elfdiff.patchobject import Build, CheckedRange, Finding, Import, PatchFunction
from elfdiff.unwinding.cfi import CallFrames
from elfdiff.unwinding.cursor import Cursor
from elfdiff.unwinding.dwarfexpression import evaluate
from elfdiff.unwinding.ehframe import read_fde_table, scan_eh_frame
from elfdiff.unwinding.lsda import read_pointer

WORD = st.integers(0, (1 << 64) - 1)
KINDS = (Build, PatchFunction, CheckedRange, Import, Finding)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def survived(read: Callable[[], object]) -> object:
    """What it returns, or None for an error of bad input that says why and what to do."""
    try:
        return read()
    except (BadInput, Refused) as error:
        assert error.what and error.why and error.next_step
        return None


# -- fields -------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=40), st.lists(st.sampled_from(["take", "uleb", "sleb", "string", "u8", "i4"]), max_size=8))
def test_fields_are_read_within_their_block(data: bytes, fields: list[str]) -> None:
    cursor = Cursor(data, 0x1000, "a test")
    readers: dict[str, Callable[[], object]] = {
        "take": lambda: cursor.take(3), "uleb": cursor.uleb128, "sleb": cursor.sleb128, "string": cursor.string,
        "u8": lambda: cursor.unsigned(8), "i4": lambda: cursor.signed(4),
    }  # fmt: skip
    for name in fields:
        before = cursor.position
        if survived(readers[name]) is not None:
            assert before <= cursor.position <= len(data)


@given(st.integers(0, (1 << 64) - 1), st.integers(0, 2))
def test_leb128_numbers_are_read_as_written(value: int, padding: int) -> None:
    """DWARF 5, 7.6; producers may pad them."""
    raw = bytearray()
    rest = value
    while True:
        raw.append(rest & 0x7F | 0x80)
        rest >>= 7
        if not rest:
            break
    raw += b"\x80" * min(padding, 10 - len(raw))
    raw[-1] &= 0x7F
    cursor = Cursor(bytes(raw), 0, "a test")
    assert cursor.uleb128() == value and cursor.at_end()


@given(st.binary(min_size=10, max_size=30).map(lambda b: bytes(byte | 0x80 for byte in b)))
def test_endless_leb128_numbers_are_damage(data: bytes) -> None:
    with pytest.raises(BadInput):
        Cursor(data, 0, "a test").uleb128()


# -- unwind tables ------------------------------------------------------------------------------------------------


def reader(data: bytes, base: int) -> Callable[[int, int], bytes]:
    return lambda address, size: data[address - base : address - base + size] if address >= base else b""


@settings(max_examples=300)
@given(st.binary(max_size=120), st.binary(max_size=60))
def test_a_search_table_of_any_bytes(table: bytes, frames: bytes) -> None:
    data = b"\x01\x1b\x03\x3b" + table + frames
    survived(lambda: read_fde_table(0x1000, reader(data, 0x1000)))


@settings(max_examples=300)
@given(st.binary(max_size=48), st.binary(max_size=48), st.integers(0, 60))
def test_unwind_instructions_of_any_bytes(of_cie: bytes, of_fde: bytes, at: int) -> None:
    """A sound table whose instructions are anything: a row, or damage."""
    base, start = 0x1000, 0x2000
    body = b"\0\0\0\0\x01zR\0\x01\x78\x10\x01\x1b" + of_cie
    body += bytes(-len(body) % 4)
    cie = len(body).to_bytes(4, "little") + body
    place = base + len(cie)
    fde = (len(cie) + 4).to_bytes(4, "little") + (start - place - 8).to_bytes(4, "little", signed=True)
    fde += (64).to_bytes(4, "little") + b"\0" + of_fde
    fde += bytes(-len(fde) % 4)
    data = cie + len(fde).to_bytes(4, "little") + fde
    read = reader(data, base)
    table = survived(lambda: scan_eh_frame(base, len(data), read))
    assert table is not None and len(table) == 1  # type: ignore[arg-type]
    survived(lambda: CallFrames(table, read).row(start + at))  # type: ignore[arg-type]


@settings(max_examples=300)
@given(st.binary(max_size=40), WORD)
def test_expressions_of_any_bytes(code: bytes, initial: int) -> None:
    def memory(address: int, size: int) -> bytes:
        return bytes(size)

    result = survived(lambda: evaluate(code, dict.fromkeys(range(17), 8), memory, (initial,)))
    assert result is None or (isinstance(result, int) and 0 <= result < 1 << 64)


# -- ELF files ----------------------------------------------------------------------------------------------------


@given(st.binary(max_size=60), st.integers(0, 80))
def test_names_are_read_from_any_string_table(data: bytes, offset: int) -> None:
    def read() -> str:
        return Strings(Path("x"), "section .strtab", data).at(offset)

    name = survived(read)
    if isinstance(name, str):
        raw = name.encode("utf-8", "surrogateescape")
        assert data[offset : offset + len(raw) + 1] == raw + b"\0"


def test_names_without_end_are_not_gathered() -> None:
    """Each symbol named by another byte of one long name."""
    strings = Strings(Path("x"), "section .strtab", b"a" * (MAX_NAME - 2) + b"\0")
    with pytest.raises(BadInput):
        for offset in range(MAX_NAME - 2):
            strings.at(offset)


@given(st.lists(WORD, max_size=20))
def test_packed_relocations_of_any_words_lie_inside(words: list[int]) -> None:
    base, high = 0x1000, 0x9000
    places = survived(lambda: _unpack_relr(Path("x"), np.array(words, np.uint64), base, high))
    if isinstance(places, np.ndarray):
        assert ((places >= base) & (places <= high - 8)).all()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=600), st.lists(st.tuples(st.integers(16, 63), st.integers(0, 255)), max_size=6))
def test_a_file_of_any_bytes_is_bad_input(tail: bytes, changes: list[tuple[int, int]]) -> None:
    """With a header that is right but for some bytes, so that tables are looked for."""
    magic = b"\x7fELF\2\1\1" + bytes(9)
    head = bytearray(EHDR.pack(magic, 3, 62, 1, 0, 64, 120, 0, EHDR.size, PHDR.size, 1, SHDR.size, 3, 1))
    for at, value in changes:
        head[at] = value
    with TemporaryDirectory() as folder:
        path = Path(folder) / "any"
        path.write_bytes(bytes(head) + tail)
        with pytest.raises(LivegraftError) as caught:
            load_image(path)
        assert caught.value.exit_code in (2, 4)
        assert caught.value.why and caught.value.next_step
        with pytest.raises(BadInput):
            read_patch(path)


# -- descriptions -------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.sampled_from(KINDS), JSON)
def test_a_description_of_anything(kind: type, value: object) -> None:
    for read in (decoded, decoded_all):
        try:
            read(kind, value)
        except ValueError as error:
            assert str(error)


GOOD = {
    "name": "f", "reason": "code", "new_start": 16, "new_size": 5, "old_start": None, "old_size": None,
    "entry_jump": False,
}  # fmt: skip


def test_a_description_as_it_should_be() -> None:
    assert decoded(PatchFunction, json.loads(json.dumps(GOOD))).new_start == 16


@given(st.sampled_from(sorted(GOOD)), JSON)
def test_a_field_of_another_kind_is_not_taken(field: str, value: object) -> None:
    kinds = {"name": str, "reason": str, "new_start": int, "new_size": int, "entry_jump": bool}
    assume(field in kinds and type(value) is not kinds[field])
    with pytest.raises(ValueError, match="PatchFunction"):
        decoded(PatchFunction, GOOD | {field: value})


@pytest.mark.parametrize("value", [b"\xff" * 7 + b"\x7f", b"\xff" * 8, b"\0" * 5 + b"\x80\0\0"])
@pytest.mark.parametrize("encoding", [0x00, 0x04, 0x0C])
def test_a_pointer_beyond_all_addresses_is_damage(value: bytes, encoding: int) -> None:
    """Of an exception table; such an addend fits no relocation (found by the fuzzer)."""
    image = bytes(0x100) + value
    with pytest.raises(BadInput) as caught:
        read_pointer(0x100, encoding, lambda address, size: image[address : address + size])
    assert "no address of a program" in caught.value.why
