"""Gates: instructions moved away from an entry do there what they did, and what cannot be moved is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trampolines.errors import TrampolineError
from trampolines.gate_x86_64 import gate, moved
from trampolines.readback import decode

ENTRY, ELSEWHERE = 0x555500001000, 0x555500800000


def text(code: str, address: int = ELSEWHERE, shadow_stack: bool = False) -> list[str]:
    return [item.text for item in decode(moved(bytes.fromhex(code), ENTRY, address, shadow_stack), address)]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("53ba01000000c3", ["push rbx", "mov edx, 1", "jmp 0x555500001006"]),
        ("8b05d2f10200c3", ["mov eax, [0x5555000301d8]", "jmp 0x555500001006"]),
        ("c705001000002a000000", ["mov [0x55550000200a], 0x2a", "jmp 0x55550000100a"]),
        ("31c0c3", ["xor eax, eax", "ret"]),
        ("7410eb05", ["je 0x555500001012", "jmp 0x555500001009"]),
        ("0f8410000000", ["je 0x555500001016", "jmp 0x555500001006"]),
        ("e97f000000", ["jmp 0x555500001084"]),
        ("f30f1efa4883ec08", ["endbr64", "sub rsp, 8", "jmp 0x555500001008"]),
        ("e8fbdfffff", ["push 0x1005", "mov dword ptr [rsp + 4], 0x5555", "jmp 0x5554fffff000"]),
        ("53ff1522110000", ["push rbx", "push 0x1007", "mov dword ptr [rsp + 4], 0x5555", "jmp [0x555500002129]"]),
        ("4889e741ffd0", ["mov rdi, rsp", "push 0x1006", "mov dword ptr [rsp + 4], 0x5555", "jmp r8"]),
    ],
)
def test_moved(code: str, expected: list[str]) -> None:
    assert text(code) == expected


@pytest.mark.parametrize(
    "code",
    [
        "e3029090909090",  # jrcxz
        "90909090e2fa",  # loop
        "41ffd0c39090",  # a call that would return into the entry jump
        "53ff54240890",  # a call by way of the stack, which the push moves
        "74029090909090",  # a branch into what is moved
        "0f059090909090",  # syscall: the kernel tells rcx where it was
        "9090",  # too short to see
        "0f0b9090909090",
    ],
)
def test_what_cannot_be_moved_is_refused(code: str) -> None:
    with pytest.raises(TrampolineError):
        text(code)


def test_no_call_is_moved_under_a_shadow_stack() -> None:
    with pytest.raises(TrampolineError, match="call"):
        text("e8fbdfffff", shadow_stack=True)


def test_what_is_out_of_reach_is_refused() -> None:
    with pytest.raises(TrampolineError, match="reach"):
        text("8b05d2f10200", ENTRY + (1 << 32))


@given(st.binary(min_size=20, max_size=20))
def test_any_bytes_are_moved_whole_or_refused(data: bytes) -> None:
    try:
        made = moved(data, ENTRY, ELSEWHERE, False)
    except TrampolineError:
        return
    found = decode(made, ELSEWHERE)
    assert found[-1].text.startswith(("jmp", "ret", "repz ret", "rep ret"))


def test_a_gate_asks_its_word_and_changes_neither_register_nor_flag_nor_red_zone() -> None:
    word = ELSEWHERE - 64
    before, after = bytes.fromhex("53ba01000000"), bytes.fromhex("e97f000000")
    found = [item.text for item in decode(gate(ELSEWHERE, word, (before, ENTRY), (after, ENTRY), False), ELSEWHERE)]
    saved, restored = ["lea rsp, [rsp - 0x80]", "push rcx"], ["pop rcx", "lea rsp, [rsp + 0x80]"]
    asks = [*saved, f"mov rcx, [{word:#x}]", f"jrcxz {ELSEWHERE + 29:#x}"]
    assert found == [
        *asks, *restored, "jmp 0x555500001084", *restored, "push rbx", "mov edx, 1", "jmp 0x555500001006",
    ]  # fmt: skip


def test_a_gate_asks_a_word_that_is_out_of_reach_by_its_address() -> None:
    """The gates of several images ask one word; flags and registers are as the callee would have found them."""
    entry = bytes.fromhex("53ba01000000c3")
    far = ELSEWHERE + (1 << 40)
    near, reached = (
        [item.text for item in decode(gate(ELSEWHERE, word, (entry, ENTRY), (entry, ENTRY), False), ELSEWHERE)]
        for word in (ELSEWHERE - 4096, far)
    )
    assert reached[2:4] == [f"movabs rcx, {far:#x}", "mov rcx, qword ptr [rcx]"]
    assert near[:2] == reached[:2] and len(reached) == len(near) + 1
    assert near[2] == f"mov rcx, [{ELSEWHERE - 4096:#x}]"
