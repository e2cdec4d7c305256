"""The gate: code at which the entries of many functions are switched over together, by one word.

While several pages of entry jumps are being written, the entries lead to gates and not yet to new code. A gate asks a
word of memory and goes on as the entry did before (0) or as it will (any other value), so that whoever dies between
two pages leaves a program that runs one version of everything. A gate is

    lea rsp, [rsp - 128]
    push rcx
    mov rcx, [word]
    jrcxz before
    pop rcx
    lea rsp, [rsp + 128]
    <the instructions that will be at the entry>
    before: pop rcx
    lea rsp, [rsp + 128]
    <the instructions that were at the entry>

Where the word is out of reach, since one word switches the gates of several images, its address is loaded first
(``movabs rcx, word; mov rcx, [rcx]``).

It changes no register and no flag, which callers compiled with -fipa-ra may rely on at an entry. Neither does it change
the red zone, the 128 bytes below rsp (psABI section 3.2.2): it is free when a function is called, but not when a loop
of the old function leads back to its entry.

What stood at the entry has to run elsewhere: ``moved`` copies the instructions of the first five bytes so that they do
there what they did, and go on behind them. Operands relative to rip get another distance, short branches become near
ones. A call must return into the old function, where unwinders know the frame, so it becomes a push of the return
address and a jump; under a shadow stack (Intel SDM volume 1, chapter 17) that return would fault, and such code is not
moved. Nothing may lead to the second of the moved instructions or a later one: the same holds for any entry jump.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .entry_x86_64 import ENTRY_JUMP_SIZE
from .errors import TrampolineError
from .readback import Instruction, decode_leading, require_same

LONGEST_WINDOW = ENTRY_JUMP_SIZE - 1 + 15
"""Bytes from an entry that ``moved`` may need to see: an instruction has at most 15 (Intel SDM volume 2, 2.3.11)."""
GATE_ALIGNMENT = 16

_SAVE = b"\x48\x8d\x64\x24\x80\x51"  # lea rsp, [rsp - 128]; push rcx
_RESTORE = b"\x59\x48\x8d\xa4\x24\x80\x00\x00\x00"  # pop rcx; lea rsp, [rsp + 128]
_LOAD_RCX = b"\x48\x8b\x0d"  # mov rcx, [rip + disp32]
_ADDRESS_RCX = b"\x48\xb9"  # movabs rcx, imm64
_FOLLOW_RCX = b"\x48\x8b\x09"  # mov rcx, [rcx]
_JRCXZ = 0xE3
_REACH = 1 << 31
# What is not the same elsewhere, or leaves for good in a way that is not handled.
_NEVER = re.compile(r"(loop|xbegin|xabort|sys|int|iret|ud|hlt|retf|jcxz|jecxz|jrcxz|lcall|ljmp|bnd|notrack|call.*rsp)")
_MEMORY_OPERAND = re.compile(r"\[0x[0-9a-f]+\]")


def gate(address: int, word: int, before: tuple[bytes, int], after: tuple[bytes, int], shadow_stack: bool) -> bytes:
    """Return the gate that lies at ``address`` and asks the eight bytes at ``word`` (absolute addresses).

    ``before`` and ``after`` are each code and the address where it stood: at least its leading instructions up to the
    fifth byte, ``LONGEST_WINDOW`` bytes being always enough. Raises TrampolineError where it cannot be moved.
    """
    load, loading = _load_word(word, address + len(_SAVE))
    head = _SAVE + load
    start = address + len(head) + 2
    will = _RESTORE + moved(*after, start + len(_RESTORE), shadow_stack)
    was = _RESTORE + moved(*before, start + len(will) + len(_RESTORE), shadow_stack)
    if len(will) > 127:
        raise TrampolineError(f"the gate at {address:#x} is too long for its branch")
    code = head + bytes((_JRCXZ, len(will))) + will + was
    intended = ["lea rsp, [rsp - 0x80]", "push rcx", *loading, f"jrcxz {start + len(will):#x}"]
    intended += ["pop rcx", "lea rsp, [rsp + 0x80]"]
    require_same(head + bytes((_JRCXZ, len(will))) + _RESTORE, intended, address)
    return code


def _load_word(word: int, address: int) -> tuple[bytes, list[str]]:
    following = address + len(_LOAD_RCX) + 4
    if -_REACH <= word - following < _REACH:
        return _LOAD_RCX + _relative(word, following), [f"mov rcx, [{word:#x}]"]
    code = _ADDRESS_RCX + word.to_bytes(8, "little") + _FOLLOW_RCX
    return code, [f"movabs rcx, {word:#x}", "mov rcx, qword ptr [rcx]"]


def moved(code: bytes, entry: int, address: int, shadow_stack: bool) -> bytes:
    """Return code that does at ``address`` what ``code`` does at ``entry`` in its first five bytes, and goes on there.

    ``shadow_stack``: the process has one, and a call cannot be moved. Every byte is read back. Raises TrampolineError
    where an instruction cannot be moved, or what it refers to is out of reach.
    """
    made = b""
    intended: list[str] = []
    window = tuple(_window(code, entry))
    end = window[-1].address + window[-1].size
    for item in window:
        raw = code[item.address - entry : item.address - entry + item.size]
        if entry < (_branch_target(item) or entry) < end:
            raise TrampolineError(f"the instruction at {item.address:#x} ({item.text}) leads to one that is moved")
        if item.text.startswith("call"):
            if shadow_stack or item is not window[-1] or end < entry + ENTRY_JUMP_SIZE:
                raise TrampolineError(f"the call at {item.address:#x} ({item.text}) cannot be moved")
            part, texts = _moved_call(raw, item, address + len(made))
        else:
            part, texts = _moved_one(raw, item, address + len(made)), [item.text]
        made += part
        intended += texts
    if not _leaves(window[-1]):
        made += b"\xe9" + _relative(end, address + len(made) + 5)
        intended.append(f"jmp {end:#x}")
    require_same(made, intended, address)
    return made


def _window(code: bytes, entry: int) -> Iterator[Instruction]:
    """The instructions up to the fifth byte, or to one behind which nothing follows."""
    for item in decode_leading(code, entry):
        if _NEVER.match(item.text):
            raise TrampolineError(f"the instruction at {item.address:#x} ({item.text}) cannot be moved")
        yield item
        if item.address + item.size >= entry + ENTRY_JUMP_SIZE or _leaves(item):
            return
    raise TrampolineError(f"the code at {entry:#x} ends, or cannot be decoded, within {ENTRY_JUMP_SIZE} bytes")


def _leaves(item: Instruction) -> bool:
    return item.text.startswith(("ret", "repz ret", "rep ret", "jmp", "call"))


def _branch_target(item: Instruction) -> int | None:
    name, _, operand = item.text.partition(" ")
    return int(operand, 16) if name.startswith(("j", "call")) and operand.startswith("0x") else None


def _moved_one(raw: bytes, item: Instruction, address: int) -> bytes:
    target = _branch_target(item)
    if target is not None:
        near = _near(raw)
        if near is None:
            raise TrampolineError(f"the branch at {item.address:#x} ({item.text}) has a form that is not known")
        return near + _relative(target, address + len(near) + 4)
    if _MEMORY_OPERAND.search(item.text) is None:
        return raw
    return _at_another_distance(raw, item, address)


def _near(raw: bytes) -> bytes | None:
    """The opcode of a branch with a 32-bit distance that does the same; Intel SDM volume 2, Jcc and JMP."""
    if raw[0] in (0xEB, 0xE9):
        return b"\xe9"
    if raw[0] & 0xF0 == 0x70:
        return bytes((0x0F, 0x80 | raw[0] & 0x0F))
    if raw[0] == 0x0F and raw[1] & 0xF0 == 0x80:
        return raw[:2]
    return None


def _at_another_distance(raw: bytes, item: Instruction, address: int) -> bytes:
    """A copy whose rip-relative operand names the same address; where it is in the bytes, reading back confirms."""
    for at in range(2, len(raw) - 3):
        if raw[at - 1] & 0xC7 != 0x05:  # ModRM: mod 00, r/m 101
            continue
        target = item.address + item.size + int.from_bytes(raw[at : at + 4], "little", signed=True)
        if f"[{target:#x}]" in item.text:
            return raw[:at] + _relative(target, address + item.size) + raw[at + 4 :]
    raise TrampolineError(f"the operand of the instruction at {item.address:#x} ({item.text}) is not found in it")


def _moved_call(raw: bytes, item: Instruction, address: int) -> tuple[bytes, list[str]]:
    following = item.address + item.size
    low, high = following & 0xFFFFFFFF, following >> 32
    # push imm32 sign-extends, and the upper half is written after it.
    pushed = low - (1 << 32) if low >> 31 else low
    push = b"\x68" + low.to_bytes(4, "little") + b"\xc7\x44\x24\x04" + high.to_bytes(4, "little")
    texts = [f"push {_signed(pushed)}", f"mov dword ptr [rsp + 4], {_signed(high)}"]
    target = _branch_target(item)
    position = address + len(push)
    if raw[0] == 0xE8 and target is not None:
        return push + b"\xe9" + _relative(target, position + 5), [*texts, f"jmp {target:#x}"]
    opcode = 1 if raw[0] & 0xF0 == 0x40 else 0  # behind a REX prefix
    if raw[opcode] != 0xFF or raw[opcode + 1] >> 3 & 7 != 2 or "rsp" in item.text or "esp" in item.text:
        raise TrampolineError(f"the call at {item.address:#x} ({item.text}) has a form that is not known")
    jump = raw[: opcode + 1] + bytes((raw[opcode + 1] & 0xC7 | 4 << 3,)) + raw[opcode + 2 :]  # FF /2 is call, /4 jmp
    if _MEMORY_OPERAND.search(item.text):
        jump = _at_another_distance(jump, item, position)
    return push + jump, [*texts, "jmp" + item.text.removeprefix("call")]


def _signed(value: int) -> str:
    """A number as the decoder writes it: small ones in decimal."""
    return str(value) if -10 < value < 10 else f"{value:#x}"


def _relative(target: int, following: int) -> bytes:
    distance = target - following
    if not -_REACH <= distance < _REACH:
        raise TrampolineError(f"{target:#x} is out of reach from {following:#x}")
    return distance.to_bytes(4, "little", signed=True)
