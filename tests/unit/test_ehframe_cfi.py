"""Unwind rows against readelf's, row by row; and instructions made by hand."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from elfdiff.errors import BadInput
from elfdiff.unwinding.cfi import CallFrames, CfaRule, Rule, RuleKind, UnwindRow
from elfdiff.unwinding.ehframe import FdeTable, read_fde_table
from fixtures.elfbytes import ElfBytes

from .test_ehframe import BASE, SOURCE, cie, libc, reader, scan

# psABI x86-64 1.0, figure 3.36
NAMES = ["rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)), "ra"]
NUMBERS = {name: number for number, name in enumerate(NAMES)}


def readelf_rows(path: Path | str) -> Iterator[tuple[int, dict[str, str]]]:
    """(address, column -> text) of every row that readelf prints for an FDE."""
    command = ["readelf", "-wN", "--debug-dump=frames-interp", str(path)]
    text = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    columns: list[str] = []
    in_fde = False
    for line in text.splitlines():
        words = re.sub(r"r\d+ \((\w+)\)", r"\1", line).split()  # "r9 (r9)"
        if re.search(r" (FDE|CIE) ", line):
            in_fde, columns = " FDE " in line, []
        elif words[:1] == ["LOC"]:
            columns = words[1:]
        elif in_fde and columns and words and "ZERO" not in words:
            yield int(words[0], 16), dict(zip(columns, words[1:], strict=True))


def cfa_text(rule: CfaRule) -> str:
    return "exp" if rule.expression else f"{NAMES[rule.register]}{rule.offset:+d}"


def rule_text(rule: Rule | None) -> str:
    if rule is None:
        return "u"  # readelf says u for a register without a rule too
    return {
        RuleKind.UNDEFINED: "u",
        RuleKind.SAME_VALUE: "s",
        RuleKind.OFFSET: f"c{rule.value:+d}",
        RuleKind.VAL_OFFSET: f"v{rule.value:+d}",
        RuleKind.REGISTER: NAMES[rule.value] if rule.kind is RuleKind.REGISTER else "",
        RuleKind.EXPRESSION: "exp",
        RuleKind.VAL_EXPRESSION: "vexp",
    }[rule.kind]


def compare(path: Path | str) -> int:
    elf = ElfBytes.open(path)
    frames = CallFrames(read_fde_table(elf.eh_frame_hdr, elf.read), elf.read)
    compared = 0
    expected = list(readelf_rows(path))
    for number, (address, columns) in enumerate(expected):
        if number + 1 < len(expected) and expected[number + 1][0] == address:
            continue  # an empty row, replaced by the next
        row = frames.row(address)
        if row is None:  # the end of a function may have a row that holds for no byte
            assert address in frames.table.starts + frames.table.sizes
            continue
        got = {name: rule_text(row.rules.get(NUMBERS[name])) for name in columns if name != "CFA"}
        assert got | {"CFA": cfa_text(row.cfa)} == columns, f"{address:#x}"
        assert set(row.rules) <= {NUMBERS[name] for name in columns if name != "CFA"}
        compared += 1
    return compared


def test_rows_of_libc() -> None:
    assert compare(libc()) > 10_000


@pytest.mark.parametrize("level", ["-O0", "-O2", "-O2 -fomit-frame-pointer -mno-omit-leaf-frame-pointer"])
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_rows_of_a_cxx_program(compiler: str, level: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    program = tmp_path / "shapes"
    subprocess.run([compiler, *level.split(), "-static-libstdc++", SOURCE, "-o", program], check=True)
    assert compare(program) > 3000  # the static C++ library is in it


def test_the_vdso_like_any_file(tmp_path: Path) -> None:
    line = next(line for line in Path("/proc/self/maps").read_text().splitlines() if "[vdso]" in line)
    start, end = (int(word, 16) for word in line.split()[0].split("-"))
    with open("/proc/self/mem", "rb") as memory:
        memory.seek(start)
        (tmp_path / "vdso").write_bytes(memory.read(end - start))
    assert compare(tmp_path / "vdso") > 10


def test_the_signal_frame_of_the_c_library() -> None:
    elf = ElfBytes.open(libc())
    frames = CallFrames(read_fde_table(elf.eh_frame_hdr, elf.read), elf.read)
    code = max((data for start, data in elf.segments), key=len)
    base = next(start for start, data in elf.segments if data is code)
    restorer = base + code.index(bytes.fromhex("48c7c00f0000000f05"))
    row = frames.row(restorer)
    assert row is not None and row.is_signal_frame
    assert row.cfa == CfaRule(expression=bytes([0x77, 0xA0, 0x01, 0x06]))  # *(rsp + 160)
    assert row.rules[16] == Rule(RuleKind.EXPRESSION, expression=bytes([0x77, 0xA8, 0x01]))
    before = frames.row(restorer - 1)
    assert before is not None and before.is_signal_frame, "a return address is looked up one byte before"


# --- instructions made by hand ------------------------------------------------------------------------------


def rows_of(instructions: bytes, *, size: int = 0x100) -> tuple[UnwindRow, ...]:
    head = cie()
    body = (len(head) + 4).to_bytes(4, "little")
    body += (0x1000 - (BASE + len(head) + 8)).to_bytes(4, "little", signed=True)
    body += size.to_bytes(4, "little") + b"\0" + instructions
    body += bytes(-len(body) % 4)
    data = head + len(body).to_bytes(4, "little") + body
    return CallFrames(scan(data), reader(data)).rows(0).rows


CFA, RA = CfaRule(7, 8), {16: Rule(RuleKind.OFFSET, -8)}


@pytest.mark.parametrize(
    ("instructions", "cfa", "rules"),
    [
        ("", CFA, {}),
        ("0e10", CfaRule(7, 16), {}),
        ("0d06", CfaRule(6, 8), {}),
        ("0c0620", CfaRule(6, 32), {}),
        ("12067c", CfaRule(6, 32), {}),
        ("137e", CfaRule(7, 16), {}),
        ("0f027710", CfaRule(expression=b"\x77\x10"), {}),
        ("8602", CFA, {6: Rule(RuleKind.OFFSET, -16)}),
        ("050602", CFA, {6: Rule(RuleKind.OFFSET, -16)}),
        ("110602", CFA, {6: Rule(RuleKind.OFFSET, -16)}),
        ("2f0602", CFA, {6: Rule(RuleKind.OFFSET, 16)}),
        ("140602", CFA, {6: Rule(RuleKind.VAL_OFFSET, -16)}),
        ("15067e", CFA, {6: Rule(RuleKind.VAL_OFFSET, 16)}),
        ("0706", CFA, {6: Rule(RuleKind.UNDEFINED)}),
        ("0710", CFA, {16: Rule(RuleKind.UNDEFINED)}),
        ("0806", CFA, {6: Rule(RuleKind.SAME_VALUE)}),
        ("091002", CFA, {16: Rule(RuleKind.REGISTER, 2)}),
        ("1006017f", CFA, {6: Rule(RuleKind.EXPRESSION, expression=b"\x7f")}),
        ("1606017f", CFA, {6: Rule(RuleKind.VAL_EXPRESSION, expression=b"\x7f")}),
        ("8602c6", CFA, {}),
        ("86020606", CFA, {}),
        ("0710d0", CFA, {}),
        ("2e20", CFA, {}),
        ("0a0e2086020b", CFA, {}),
    ],
)
def test_one_instruction(instructions: str, cfa: CfaRule, rules: dict[int, Rule]) -> None:
    (row,) = rows_of(bytes.fromhex(instructions))
    assert (row.start, row.cfa, dict(row.rules)) == (0x1000, cfa, RA | rules)


@pytest.mark.parametrize(
    ("advance", "distance"), [("44", 4), ("0205", 5), ("030001", 256), ("0400010000", 256)]
)
def test_the_location_moves(advance: str, distance: int) -> None:
    first, second = rows_of(bytes.fromhex(advance + "0e10"), size=0x1000)
    assert (first.start, first.cfa) == (0x1000, CFA)
    assert (second.start, second.cfa) == (0x1000 + distance, CfaRule(7, 16))


@pytest.mark.parametrize(
    ("instructions", "why"),
    [
        ("0b", "without remember_state"),
        ("3c", "0x3c is not known"),
        ("1d00", "0x1d is not known"),
        ("0f027710" + "0e10", "no register and offset"),
        ("0f00", "empty expression"),
        ("0f7f77", "ends within"),
        ("0580010f", "register 128 does not exist"),
        ("05ffffffffffffffffffff01", "more than 64 bits"),
        ("15" + "06" + "ff" * 9 + "00", "outside the address space"),
        ("01" + "00000080", "goes backwards"),
    ],
)
def test_damaged_instructions(instructions: str, why: str) -> None:
    with pytest.raises(BadInput) as caught:
        rows_of(bytes.fromhex(instructions))
    assert why in caught.value.why


def test_no_row_outside_of_functions() -> None:
    table = FdeTable(np.array([0x1000]), np.array([16]), np.array([BASE]), np.array([False]))
    frames = CallFrames(table, reader(b""))
    assert frames.row(0xFFF) is None and frames.row(0x1010) is None
    with pytest.raises(BadInput):
        frames.row(0x1000)
