"""Unwind information for code that we make, read back by the differ's reader of unwind information."""

from __future__ import annotations

import pytest

from elfdiff.unwinding.cfi import CallFrames, CfaRule
from elfdiff.unwinding.ehframe import read_fde_table
from trampolines.assembly import assemble
from trampolines.errors import TrampolineError
from trampolines.lookup_x86_64 import Answer, iterate
from trampolines.readback import decode
from trampolines.unwindinfo_x86_64 import frames, unwind_info

AT = 0x7F1234560000
RBP, RSP = 6, 7


def test_each_function_has_its_rows_and_nothing_else_has() -> None:
    made = iterate(Answer(((AT - 4096, AT),), AT - 8192, AT, 0, AT - 8192, "patch"), AT + 0x5555, AT)
    functions = frames(made.code[made.entry :], AT + made.entry)
    assert functions[0].start == AT + made.entry
    assert functions[0].start + functions[0].size == functions[1].start
    assert functions[1].start + functions[1].size == AT + len(made.code)
    at = AT + len(made.code)
    info, header = unwind_info(functions, at)
    memory = made.code + info

    def read(address: int, size: int) -> bytes:
        return memory[address - AT : address - AT + size]

    table = read_fde_table(at + header, read)
    assert table.starts.tolist() == [item.start for item in functions]
    assert table.sizes.tolist() == [item.size for item in functions]
    rows = CallFrames(table, read)
    assert rows.row(AT + made.entry - 1) is None
    assert rows.row(at) is None
    for item in functions:
        code = memory[item.start - AT :][: item.size]
        for one in decode(code, item.start):
            row = rows.row(one.address)
            assert row is not None
            if one.text == "ret" or one.address == item.start:
                assert row.cfa == CfaRule(RSP, 8)
            elif one.text == "leave":
                assert row.cfa == CfaRule(RBP, 16)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (["mov rsp, rax", "ret"], "not known"),
        (["lea rsp, [rsp + 8]", "ret"], "not known"),
        (["push rax", "ret"], "not known"),
        (["leave", "ret"], "not known"),
        (["enter 16, 0", "leave", "ret"], "not known"),
        (["and rsp, -16", "ret"], "not known"),
        (["pop rbx", "push rbx", "ret"], "a frame of 0 bytes"),
        (["push rbx", "ret"], "another stack pointer"),
        (["sub rsp, 8", "ret"], "another stack pointer"),
        (["sub rsp, 0x100", "add rsp, 0x100", "ret"], "a frame of"),
        (["nop"], "does not return"),
        (["ret", "nop"], "does not return"),
        ([*["mov rax, 0x1122334455667788"] * 30, "push rbx", "pop rbx", "ret"], "without a change"),
    ],
)
def test_what_is_not_understood_is_refused(lines: list[str], why: str) -> None:
    with pytest.raises(TrampolineError, match=why):
        frames(assemble(lines), AT)
