"""The FDE table against what readelf and the symbol table say, and against damage."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given, settings
from hypothesis import strategies as st

from elfdiff.errors import BadInput
from elfdiff.unwinding.cfi import CallFrames
from elfdiff.unwinding.ehframe import FdeTable, read_fde_table, scan_eh_frame
from fixtures.elfbytes import ElfBytes

SOURCE = Path(__file__).parents[2] / "fixtures" / "unwind" / "shapes.cc"
COMPILERS = ["g++", "clang++"]
LEVELS = ["-O0", "-O2"]
WITHOUT_FDE = {"_init", "_fini", "__clang_call_terminate"}
"""Assembler of the C library, and a helper that clang marks nounwind and gives no unwind table."""


@pytest.fixture(scope="module", params=[(c, level) for c in COMPILERS for level in LEVELS], ids=" ".join)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler, level = request.param
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    output = tmp_path_factory.mktemp("ehframe") / "shapes"
    subprocess.run([compiler, level, SOURCE, "-o", output], check=True)
    return output


def readelf_fdes(path: Path | str) -> list[tuple[int, int]]:
    # Not checked: readelf exits with 1 where a separate debug file is named but absent.
    text = subprocess.run(
        ["readelf", "--debug-dump=frames", path], check=False, capture_output=True, text=True
    ).stdout
    pairs = re.findall(r" FDE cie=\S+ pc=([0-9a-f]+)\.\.([0-9a-f]+)", text)
    return sorted((int(start, 16), int(end, 16)) for start, end in pairs)


def table_of(path: Path | str) -> FdeTable:
    elf = ElfBytes.open(path)
    return read_fde_table(elf.eh_frame_hdr, elf.read)


def ranges(table: FdeTable) -> list[tuple[int, int]]:
    return list(zip(table.starts.tolist(), (table.starts + table.sizes).tolist(), strict=True))


def assert_same(one: FdeTable, other: FdeTable) -> None:
    for name in ("starts", "sizes", "addresses", "has_lsda"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_ranges_are_those_of_readelf(program: Path) -> None:
    expected = readelf_fdes(program)
    assert len(expected) > 10
    assert ranges(table_of(program)) == expected


def test_header_and_scan_agree(program: Path) -> None:
    elf = ElfBytes.open(program)
    assert_same(read_fde_table(elf.eh_frame_hdr, elf.read), scan_eh_frame(*elf.eh_frame, elf.read))


def libc() -> str:
    text = Path("/proc/self/maps").read_text()
    return next(word for word in text.split() if "libc.so" in word or "libc-" in word)


def test_system_libc() -> None:
    elf = ElfBytes.open(libc())
    table = read_fde_table(elf.eh_frame_hdr, elf.read)
    assert ranges(table) == readelf_fdes(libc())
    assert_same(table, scan_eh_frame(*elf.eh_frame, elf.read))


def test_functions_are_those_of_the_symbol_table(program: Path) -> None:
    with program.open("rb") as file:
        symbols = ELFFile(file).get_section_by_name(".symtab").iter_symbols()
        functions = {
            symbol["st_value"]: (symbol["st_size"], symbol.name)
            for symbol in symbols
            if symbol["st_info"]["type"] == "STT_FUNC"
            and symbol["st_size"]
            and symbol["st_shndx"] != "SHN_UNDEF"
        }
    table = table_of(program)
    sizes = dict(zip(table.starts.tolist(), table.sizes.tolist(), strict=True))
    compared = {start: entry for start, entry in functions.items() if entry[1] not in WITHOUT_FDE}
    assert len(compared) > 7
    assert {start: sizes.get(start) for start in compared} == {s: e[0] for s, e in compared.items()}


def test_lsda_marks_what_catches(program: Path) -> None:
    table = table_of(program)
    with program.open("rb") as file:
        symtab = ELFFile(file).get_section_by_name(".symtab")
        address = {symbol.name: symbol["st_value"] for symbol in symtab.iter_symbols() if symbol["st_value"]}
    assert table.has_lsda[table.find(address["_Z7catcheri"])]
    assert not table.has_lsda[table.find(address["_Z8variablei"])]


def test_find_at_the_edges() -> None:
    table = FdeTable(
        np.array([16, 32, 32]), np.array([16, 0, 8]), np.array([0, 0, 0]), np.array([False, False, False])
    )
    found = [table.find(address) for address in (0, 15, 16, 31, 32, 39, 40, 1 << 62)]
    assert found == [-1, -1, 0, 0, 2, 2, -1, -1]


def test_an_empty_table() -> None:
    header = bytes([1, 0x1B, 0x03, 0x3B]) + bytes(8)
    assert len(read_fde_table(0x1000, lambda a, n: header[a - 0x1000 : a - 0x1000 + n])) == 0
    assert len(scan_eh_frame(0x1000, 0, lambda a, n: b"")) == 0
    assert len(scan_eh_frame(0x1000, 4, lambda a, n: bytes(n))) == 0


# --- made by hand, so that each thing can be wrong alone -------------------------------------------------

BASE = 0x400000


def cie(fde_encoding: int = 0x1B, augmentation: bytes = b"zR\0", data: bytes | None = None) -> bytes:
    letters = bytes([1, fde_encoding]) if data is None else data
    body = bytes(4) + b"\x01" + augmentation + b"\x01\x78\x10" + letters + b"\x0c\x07\x08\x90\x01"
    body += bytes(-len(body) % 4)
    return len(body).to_bytes(4, "little") + body


def fde(place: int, start: int, size: int, cie_place: int = 0) -> bytes:
    body = (place + 4 - cie_place).to_bytes(4, "little")
    body += (start - (BASE + place + 8)).to_bytes(4, "little", signed=True)
    body += size.to_bytes(4, "little") + b"\0" + bytes(3)
    return len(body).to_bytes(4, "little") + body


def section(*functions: tuple[int, int]) -> bytes:
    data = cie()
    for start, size in functions:
        data += fde(len(data), start, size)
    return data


def reader(data: bytes, base: int = BASE):  # type: ignore[no-untyped-def]
    def read(address: int, size: int) -> bytes:
        if address < base or address + size > base + len(data):
            raise OSError("outside")
        return data[address - base : address - base + size]

    return read


def scan(data: bytes) -> FdeTable:
    return scan_eh_frame(BASE, len(data), reader(data))


def test_terminators_inside_the_section_do_not_end_it() -> None:
    data = section((0x1000, 16)) + bytes(8)
    data += fde(len(data), 0x2000, 32) + bytes(4)
    assert ranges(scan(data)) == [(0x1000, 0x1010), (0x2000, 0x2020)]


def test_sorted_by_start() -> None:
    assert ranges(scan(section((0x3000, 1), (0x1000, 2), (0x2000, 3)))) == [
        (0x1000, 0x1002),
        (0x2000, 0x2003),
        (0x3000, 0x3001),
    ]


def search_table(*entries: tuple[int, int], count: int | None = None, encoding: int = 0x3B) -> bytes:
    number = len(entries) if count is None else count
    data = bytes([1, 0x1B, 0x03, encoding]) + bytes(4) + number.to_bytes(4, "little")
    for start, address in entries:
        for value in (start, address):
            data += (value - HEADER).to_bytes(4, "little", signed=True)
    return data


HEADER = BASE + 0x10000


def by_header(header: bytes, data: bytes) -> FdeTable:
    whole = data + bytes(HEADER - BASE - len(data)) + header
    return read_fde_table(HEADER, reader(whole))


def two_functions() -> tuple[bytes, list[tuple[int, int]]]:
    first = len(cie())
    data = section((0x1000, 16), (0x2000, 32))
    return data, [(0x1000, BASE + first), (0x2000, BASE + first + len(fde(first, 0, 0)))]


def test_by_header() -> None:
    data, entries = two_functions()
    assert ranges(by_header(search_table(*entries), data)) == [(0x1000, 0x1010), (0x2000, 0x2020)]


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("not sorted", lambda e: search_table(e[1], e[0])),
        ("disagrees", lambda e: search_table((0x1001, e[0][1]), e[1])),
        ("cannot be read", lambda e: search_table(*e, count=1000)),
        ("not believed", lambda e: search_table(*e, count=0xFFFFFFFF)),
        ("no search table", lambda e: search_table(*e, encoding=0xFF)),
        ("no fixed size", lambda e: search_table(*e, encoding=0x31)),
        ("not supported", lambda e: search_table(*e, encoding=0x5B)),
        ("version 2", lambda e: b"\x02" + search_table(*e)[1:]),
        ("a CIE stands", lambda e: search_table((0x1000, BASE), e[1])),
        ("cannot be read", lambda e: search_table((0x1000, BASE - 64), e[1])),
    ],
)
def test_damaged_header(name: str, header) -> None:  # type: ignore[no-untyped-def]
    data, entries = two_functions()
    with pytest.raises(BadInput) as caught:
        by_header(header(entries), data)
    assert name in caught.value.why


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("overlaps", section((0x1000, 16), (0x100F, 1))),
        ("does not fit", section((0x1000, 16))[:-1]),
        ("does not fit", section((0x1000, 16)) + b"\x10\0\0\0"),
        ("does not fit", b"\xff\xff\xff\xff" + section((0x1000, 16))),
        ("is not supported", cie(0x2B) + fde(len(cie(0x2B)), 0x1000, 16)),
        ("no fixed size", cie(0x01) + fde(len(cie(0x01)), 0x1000, 16)),
        ("too short", cie(0x10) + fde(len(cie(0x10)), 0x1000, 16)[:4].replace(b"\x10", b"\x0c") + bytes(12)),
        ("unknown letter", cie(augmentation=b"zQ\0", data=b"\0")),
        ("does not say how long", cie(augmentation=b"eh\0", data=b"")),
    ],
)
def test_damaged_section(name: str, data: bytes) -> None:
    if name == "too short":
        data = cie(0x1C) + fde(len(cie(0x1C)), 0x1000, 16)
    if len(data) == len(cie(augmentation=b"zQ\0", data=b"\0")) or name == "does not say how long":
        data += fde(len(data), 0x1000, 16)
    with pytest.raises(BadInput) as caught:
        scan(data)
    assert name in caught.value.why


def test_a_range_that_leaves_the_address_space() -> None:
    data = cie(0x00)
    body = (
        (len(data) + 4).to_bytes(4, "little")
        + ((1 << 63) - 8).to_bytes(8, "little")
        + (16).to_bytes(8, "little")
    )
    body += bytes(4)
    with pytest.raises(BadInput) as caught:
        scan(data + len(body).to_bytes(4, "little") + body)
    assert "impossible" in caught.value.why


def test_a_section_of_unbelievable_size_is_not_read() -> None:
    def read(address: int, size: int) -> bytes:
        raise AssertionError(f"asked for {size} bytes")

    with pytest.raises(BadInput):
        scan_eh_frame(BASE, 1 << 40, read)


# --- fuzz --------------------------------------------------------------------------------------------------


@cache
def small_program() -> tuple[bytes, int, int, int, int]:
    """(bytes from the header to the end of .eh_frame, their address, header, .eh_frame, its size)."""
    elf = ElfBytes.open(shutil.which("readelf") or libc())
    frame, size = elf.eh_frame
    low, high = min(elf.eh_frame_hdr, frame), frame + size
    return elf.read(low, high - low), low, elf.eh_frame_hdr, frame, size


def valid_or_bad_input(data: bytes, low: int, header: int, frame: int, size: int) -> None:
    read = reader(data, low)
    for make in (lambda: read_fde_table(header, read), lambda: scan_eh_frame(frame, size, read)):
        try:
            table = make()
        except BadInput:
            continue
        ends = table.starts + table.sizes
        assert np.all(table.starts >= 0) and np.all(table.sizes >= 0) and np.all(ends >= table.starts)
        assert np.all(ends[:-1] <= table.starts[1:])
        frames = CallFrames(table, read)
        for index in range(min(len(table), 40)):
            try:
                rows = frames.rows(index)
            except BadInput:
                continue
            assert len(rows.rows) >= 1


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_bytes_give_a_valid_table_or_bad_input(data: st.DataObject) -> None:
    original, low, header, frame, size = small_program()
    damaged = bytearray(original)
    hot = st.one_of(
        st.integers(0, len(damaged) - 1),
        st.integers(header - low, header - low + 40),
        st.integers(frame - low, min(frame - low + 400, len(damaged) - 1)),
    )
    for place, value in data.draw(st.lists(st.tuples(hot, st.integers(0, 255)), min_size=1, max_size=8)):
        damaged[place] = value
    valid_or_bad_input(bytes(damaged), low, header, frame, size)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes(data: bytes) -> None:
    valid_or_bad_input(data, BASE, BASE, BASE, len(data))
