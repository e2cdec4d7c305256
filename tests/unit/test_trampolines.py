from __future__ import annotations

import capstone
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trampolines.entry_x86_64 import ENTRY_JUMP_SIZE, entry_jump, entry_jump_target
from trampolines.errors import TrampolineError
from trampolines.readback import decode, require_same
from trampolines.stub_x86_64 import (
    NAME,
    NAME_OFFSET,
    RESTORED,
    RETURN_OFFSET,
    STUB_ALIGNMENT,
    STUB_SIZE,
    fill_context,
    owner_of,
    stub,
    stub_bytes,
)

USER = (1 << 47) - 1
REACH = 1 << 31
VALUES = {name: 0x1111111111111111 + index for index, name in enumerate((*RESTORED, "rip"))}


@given(st.integers(REACH, USER - REACH), st.integers(-REACH, REACH - 1))
def test_an_entry_jump_reads_back_as_a_jump_to_its_target(entry: int, distance: int) -> None:
    target = entry + ENTRY_JUMP_SIZE + distance
    code = entry_jump(entry, target)
    assert len(code) == ENTRY_JUMP_SIZE
    (found,) = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm(code, entry)
    assert (found.mnemonic, found.size, int(found.op_str, 0)) == ("jmp", ENTRY_JUMP_SIZE, target)
    assert entry_jump_target(entry, code) == target


@given(
    st.integers(4 * REACH, USER - 4 * REACH),
    st.integers(REACH, 2 * REACH) | st.integers(-2 * REACH, -REACH - 1),
)
def test_a_target_out_of_reach_is_refused(entry: int, distance: int) -> None:
    with pytest.raises(TrampolineError, match="out of reach"):
        entry_jump(entry, entry + ENTRY_JUMP_SIZE + distance)


@pytest.mark.parametrize(("entry", "target"), [(-1, 5), (0, 1 << 64), (1 << 64, 0)])
def test_addresses_outside_of_the_address_space_are_refused(entry: int, target: int) -> None:
    with pytest.raises(TrampolineError):
        entry_jump(entry, target)


def test_what_is_no_entry_jump_leads_nowhere() -> None:
    assert entry_jump_target(0x1000, b"\xf3\x0f\x1e\xfa\x55") is None
    with pytest.raises(TrampolineError):
        entry_jump_target(0x1000, b"\xe9\0\0\0")


def test_the_stub_does_what_its_description_says_and_nothing_else() -> None:
    """Decoded by capstone with operands, apart from the text comparison that ``stub`` makes itself."""
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    made = stub()
    code = list(decoder.disasm(made.code, 0))
    assert sum(one.size for one in code) == len(made.code)
    assert code[0].mnemonic == "syscall"
    assert code[0].size == RETURN_OFFSET
    places = {}
    for one in code[1:-1]:
        register, memory = one.operands
        assert one.mnemonic == "mov"
        assert memory.size == 8
        assert memory.mem.base == capstone.x86.X86_REG_RIP
        assert (memory.mem.index, memory.mem.segment) == (0, 0)
        places[one.reg_name(register.reg)] = one.address + one.size + memory.mem.disp
    last = code[-1]
    assert last.mnemonic == "jmp"
    places["rip"] = last.address + last.size + last.operands[0].mem.disp
    context = fill_context(VALUES, 99)
    found = {
        name: int.from_bytes(context[place - made.context_offset :][:8], "little")
        for name, place in places.items()
    }
    assert found == VALUES
    general = {"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{number}" for number in range(8, 16))}
    assert places.keys() == general | {"rip"}


def test_the_stub_leaves_stack_and_flags_alone() -> None:
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    for one in list(decoder.disasm(stub().code, 0))[1:]:  # syscall: the kernel gives rsp and flags back
        _, written = one.regs_access()
        assert not {"rsp", "esp", "rflags"} & {one.reg_name(register) for register in written}


def test_the_parts_of_a_stub_do_not_overlap() -> None:
    made = stub()
    whole = stub_bytes(VALUES, 99)
    assert len(whole) == STUB_SIZE == made.size
    assert len(made.code) <= made.context_offset
    assert made.context_offset % STUB_ALIGNMENT == 0
    assert whole.startswith(made.code)
    assert whole[made.context_offset :] == fill_context(VALUES, 99)
    assert whole[NAME_OFFSET:].startswith(NAME)


def test_the_owner_of_a_stub_is_found_and_of_nothing_else() -> None:
    assert owner_of(stub_bytes(VALUES, 4_194_303)) == 4_194_303
    assert owner_of(bytes(STUB_SIZE)) is None
    changed = bytearray(stub_bytes(VALUES, 5))
    changed[NAME_OFFSET + len(NAME)] ^= 1  # another layout
    assert owner_of(bytes(changed)) is None
    with pytest.raises(TrampolineError):
        owner_of(b"")


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_a_register_value_out_of_range_is_refused(value: int) -> None:
    with pytest.raises(TrampolineError):
        fill_context({**VALUES, "rbx": value}, 1)


def test_every_byte_is_read_back() -> None:
    """Whatever byte of the code is damaged, the comparison notices."""
    intended = [one.text for one in decode(stub().code)]
    require_same(stub().code, intended)
    for position in range(len(stub().code)):
        damaged = bytearray(stub().code)
        damaged[position] ^= 0x08
        with pytest.raises(TrampolineError):
            require_same(bytes(damaged), intended)


def test_missing_and_surplus_instructions_are_noticed() -> None:
    intended = [one.text for one in decode(stub().code)]
    with pytest.raises(TrampolineError, match="were intended"):
        require_same(stub().code + b"\x90", intended)
    with pytest.raises(TrampolineError, match="were intended"):
        require_same(stub().code, [*intended, "nop"])
    with pytest.raises(TrampolineError, match="no instruction"):
        decode(b"\x90\x06")


def test_relative_operands_are_shown_absolute() -> None:
    (forward,) = decode(bytes.fromhex("488b0510000000"), 0x1000)  # mov rax, [rip + 0x10]
    (backward,) = decode(bytes.fromhex("488b05f0ffffff"), 0x1000)
    (here,) = decode(bytes.fromhex("488b0500000000"), 0x1000)
    assert [one.text for one in (forward, backward, here)] == [
        "mov rax, [0x1017]",
        "mov rax, [0xff7]",
        "mov rax, [0x1007]",
    ]


def test_code_that_the_assembler_gets_wrong_is_noticed() -> None:
    """There is no such instruction, and the assembler makes another of it without a word."""
    import keystone

    assembler = keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_64)
    code, count = assembler.asm("pop rip", as_bytes=True)
    assert count == 1
    with pytest.raises(TrampolineError, match="pop rax"):
        require_same(code, ["pop rip"])
