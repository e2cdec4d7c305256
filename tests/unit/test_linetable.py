"""Line tables: every row is what another reader of the same program says."""

from __future__ import annotations

import pytest

from elfdiff.dwarf.linetable import LineHeader, rows
from tests.compile import Compiler
from tests.verdict import PRELUDE

TEXT = PRELUDE + "\n".join(
    f"int f{k}(int x) {{\n#line {k * 700 + 1}\n  for (int i = 0; i < x; i++) printf(\"%d\", i * {k});\n  return x; }}"
    for k in range(1, 9)
) + "\nint main(int n, char **v) { return f1(n) + f8(n); }\n"  # fmt: skip


@pytest.mark.parametrize(("cc", "dwarf"), [("gcc", 2), ("gcc", 3), ("gcc", 4), ("gcc", 5), ("clang", 4), ("clang", 5)])
def test_rows_are_those_of_another_reader(cc: str, dwarf: int, compiled: Compiler) -> None:
    from elftools.elf.elffile import ELFFile

    path = compiled({"main.c": TEXT, "b.c": TEXT.replace("int main", "int other").replace("int f", "int g")
                     .replace("f1(", "g1(").replace("f8(", "g8(")},
                    f"-gdwarf-{dwarf}", cc=cc, stripped=False)  # fmt: skip
    with open(path, "rb") as stream:
        dwarf_info = ELFFile(stream).get_dwarf_info(relocate_dwarf_sections=False)
        for unit in dwarf_info.iter_CUs():
            program = dwarf_info.line_program_for_CU(unit)
            states = [entry.state for entry in program.get_entries() if entry.state is not None]
            expected = [(s.address, s.file, -1 if s.end_sequence else s.line) for s in states]
            program.stream.seek(program.program_start_offset)
            code = program.stream.read(program.program_end_offset - program.program_start_offset)
            header = program.header
            parameters = LineHeader(
                header["minimum_instruction_length"], header["line_base"], header["line_range"],
                header["opcode_base"], tuple(header["standard_opcode_lengths"]),
            )  # fmt: skip
            assert list(rows(code, parameters)) == expected and len(expected) > 30


@pytest.mark.parametrize(
    "code", [b"\x02", b"\x02" + b"\xff" * 11, b"\x00\x09\x02", b"\x09\x01"], ids=["cut", "endless", "short", "fixed"]
)
def test_what_is_cut_ends_or_is_an_error(code: bytes) -> None:
    header = LineHeader(1, -5, 14, 13, (0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1))
    try:
        assert list(rows(code, header)) == []
    except (IndexError, ValueError):
        return


def test_impossible_parameters_are_an_error() -> None:
    with pytest.raises(ValueError, match="impossible"):
        list(rows(b"\x20", LineHeader(1, -5, 0, 13, (0,) * 12)))
