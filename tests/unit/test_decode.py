"""The numpy decoder against capstone, on bytes made up and on the C library."""

from __future__ import annotations

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from elfdiff.decoding.decode_x86_64 import decode, instruction_starts
from tests.decoderoracle import ByUs, by_capstone, disassembler

CAPSTONE = disassembler()
PREFIXES = st.lists(st.sampled_from([0x66, 0xF2, 0xF3, 0x2E, 0x64, 0x48, 0x41, 0x44]), max_size=3).map(bytes)
ESCAPES = st.sampled_from([b"", b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a", b"\xc5", b"\xc4\xe2", b"\xc4\xe3", b"\xc4\xe1"])


@settings(max_examples=1500, deadline=None)
@given(PREFIXES, ESCAPES, st.binary(min_size=15, max_size=15))
@example(b"", b"", bytes.fromhex("48b8000102030405060708") + bytes(4))  # movabs
@example(b"", b"", bytes.fromhex("f6050100000055") + bytes(8))  # test, with an immediate behind disp32(%rip)
@example(b"", b"", bytes.fromhex("f71501000000") + bytes(9))  # not, without one
@example(b"", b"", bytes.fromhex("8fe878c2ec0e") + bytes(9))  # vprotd, AMD's XOP; libcrypto has some
@example(b"", b"", bytes.fromhex("8fe878a2c850") + bytes(9))  # vpcmov
@example(b"", b"", bytes.fromhex("8fe97890c8") + bytes(10))  # vprotb, map 9
@example(b"", b"", bytes.fromhex("8fea7810c004030201") + bytes(6))  # bextr, map 10
@example(b"", b"", bytes.fromhex("8f0501000000") + bytes(9))  # pop, no XOP
@example(b"\x66", b"", bytes.fromhex("c7050100000034120000") + bytes(5))
def test_random_instructions_are_read_as_capstone_reads_them(prefix: bytes, escape: bytes, tail: bytes) -> None:
    raw = (prefix + escape + tail)[:15]
    theirs = by_capstone(CAPSTONE, raw)
    assume(theirs is not None and not _odd(raw))
    ours = ByUs(raw + bytes(16))
    assert ours.valid(0)
    assert ours.reading(0) == theirs


LEGACY = frozenset((0x66, 0x67, 0xF2, 0xF3, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65, 0xF0))
ODD_TWO_BYTE = frozenset((0x0F, 0xB9, 0xFF, 0x20, 0x21, 0x22, 0x23, 0x78))


def _odd(raw: bytes) -> bool:
    """Encodings that no compiler makes, on which processors differ or capstone does not follow the SDM.

    66 before a near branch or ret (AMD reads 16 bits, Intel ignores it); a REX that is not the last prefix; of map 0F:
    3DNow, ud0 and ud1 (which have a ModRM byte, SDM volume 2), moves to control registers in the memory form, SSE4a.
    """
    at = next(k for k, byte in enumerate(raw) if byte not in LEGACY)
    sixteen = 0x66 in raw[:at]
    rex = at
    while 0x40 <= raw[at] <= 0x4F:
        at += 1
    misplaced = at - rex > 1 or (at > rex and (raw[at] in LEGACY or raw[at] in (0xC4, 0xC5, 0x62)))
    branch = 0x70 <= raw[at] <= 0x7F or 0xE0 <= raw[at] <= 0xEB or raw[at] == 0xC2
    branch |= raw[at] == 0x0F and 0x80 <= raw[at + 1] <= 0x8F
    two_byte = raw[at] == 0x0F and raw[at + 1] in ODD_TWO_BYTE
    return misplaced or (sixteen and branch) or two_byte


def test_an_instruction_that_the_code_s_end_cuts_is_none() -> None:
    call = bytes.fromhex("e81c000000")
    for size in range(1, 5):
        decoded = decode(np.frombuffer(b"\x90" * 20 + call[:size], np.uint8))
        assert not decoded.valid[20] and decoded.ref_kind[20] == 0
        _, final = instruction_starts(decoded.length, np.array([0]), np.array([20 + size]))
        assert final[0] == 25, "a function that ends there is not sound"


def test_xbegin_is_a_reference() -> None:
    raw = bytes.fromhex("c7f810000000") + bytes(9)
    assert ByUs(raw).reading(0) == by_capstone(CAPSTONE, raw)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=0, max_size=400))
def test_any_bytes_are_decoded_within_bounds(raw: bytes) -> None:
    decoded = decode(np.frombuffer(raw, np.uint8))
    assert len(decoded.length) == len(raw)
    assert ((decoded.length >= 1) & (decoded.length <= 15)).all()
    behind = decoded.ref_field + np.where(decoded.ref_kind == 5, 1, 4)
    assert (behind <= decoded.length)[decoded.ref_kind > 0].all()
    starts, final = instruction_starts(decoded.length, np.array([0]), np.array([len(raw)]))
    assert final[0] >= len(raw)
    assert int(starts.sum()) <= len(raw)


@pytest.mark.parametrize("chunk_edge", [-3, -1, 0, 1])
def test_an_instruction_across_the_edge_of_a_chunk_is_read_whole(chunk_edge: int) -> None:
    from elfdiff.decoding.decode_x86_64 import CHUNK

    movabs = bytes.fromhex("48b80102030405060708")
    at = CHUNK + chunk_edge
    raw = b"\x90" * at + movabs + b"\x90" * 64
    ours = ByUs(raw)
    assert ours.decoded.length[at] == 10
    assert ours.decoded.imm_field[at] == 2


def test_every_function_of_the_c_library_is_walked_to_its_end() -> None:
    """Symbol sizes are the truth; hand-written code with data inside has none to speak of."""
    path = _libc()
    with open(path, "rb") as stream:
        elf = ELFFile(stream)
        text = elf.get_section_by_name(".text")
        base, raw = text["sh_addr"], text.data()
        symbols = {
            (s["st_value"], s["st_size"])
            for s in elf.get_section_by_name(".dynsym").iter_symbols()
            if s["st_info"]["type"] in ("STT_FUNC", "STT_GNU_IFUNC") and s["st_size"]
            and base <= s["st_value"] < base + len(raw)
        }  # fmt: skip
    assert len(symbols) > 1000
    starts = np.array([a - base for a, _ in sorted(symbols)])
    ends = starts + np.array([n for _, n in sorted(symbols)])
    _, final = instruction_starts(decode(np.frombuffer(raw, np.uint8)).length, starts, ends)
    assert (final == ends).all()


def _libc() -> str:
    with open("/proc/self/maps") as maps:
        found = next((line.split()[-1] for line in maps if "libc.so.6" in line), None)
    if found is None:
        pytest.skip("this Python runs on no libc.so.6")
    return found
