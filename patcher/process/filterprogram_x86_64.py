"""What a system-call filter may do to a thread: its program (seccomp(2)), followed on all ways that it can take.

A filter is a program of classic BPF over struct seccomp_data (linux/seccomp.h) that only jumps forward. It is followed
once from start to end. Of each value that it holds the range is known in which it lies: of what it loads from the call
nothing, but that the call is one of 64-bit code. So a way that only calls of other architectures can take, as those of
32 bits and of x32, is not taken: libseccomp kills for them, whatever else a filter does.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable

Range = tuple[int, int]
"""The lowest and the highest value that it may have, of 32 bits, unsigned."""
State = tuple[Range, ...]
"""The accumulator, the index register, and the 16 words of memory."""

_INSTRUCTION = struct.Struct("<HBBI")  # struct sock_filter, linux/filter.h: code, jt, jf, k
_A, _X, _MEMORY, _WORDS = 0, 1, 2, 16
_ANY = (0, 0xFFFFFFFF)
_SIZE = 64  # of struct seccomp_data
_CALL = {
    # A call of 64 bits has a number below __X32_SYSCALL_BIT, and -1 is none that a function of a library makes.
    0: (0, 0x3FFFFFFF),
    4: (0xC000003E, 0xC000003E),  # AUDIT_ARCH_X86_64, linux/audit.h
}
"""What is known of fields of struct seccomp_data, by offset."""

_LIVES = frozenset(
    {
        0x00050000,  # SECCOMP_RET_ERRNO: the call fails
        0x7FC00000,  # SECCOMP_RET_USER_NOTIF: the supervisor answers for it; without one it fails with ENOSYS
        0x7FF00000,  # SECCOMP_RET_TRACE: without a tracer that wants to know it fails with ENOSYS
        0x7FFC0000,  # SECCOMP_RET_LOG: it is made
        0x7FFF0000,  # SECCOMP_RET_ALLOW: it is made
    }
)
# SIGSYS, which TRAP sends, kills who does not handle it; and who does has not expected this call.
_KILLS = {0x80000000: "SECCOMP_RET_KILL_PROCESS", 0: "SECCOMP_RET_KILL_THREAD", 0x00030000: "SECCOMP_RET_TRAP"}
_ACTION = 0xFFFF0000  # SECCOMP_RET_ACTION_FULL

# linux/bpf_common.h: the class is in the lowest three bits, the operation above, and bit 3 takes the index register.
_CLASS, _OPERATION, _BY_INDEX = 0x07, 0xF0, 0x08
_ALU, _JMP = 0x04, 0x05
_RETURN_K, _RETURN_A, _JUMP, _SUBTRACT, _DIVIDE, _AND = 0x06, 0x16, 0x05, 0x10, 0x30, 0x50
_ARITHMETIC: dict[int, Callable[[int, int], int]] = {
    0x00: operator.add,
    _SUBTRACT: operator.sub,
    0x20: operator.mul,
    _DIVIDE: operator.floordiv,
    0x40: operator.or_,
    _AND: operator.and_,
    0x60: operator.lshift,
    0x70: operator.rshift,
    0xA0: operator.xor,
}
_SHIFTS = (0x60, 0x70)


class _NotUnderstood(Exception):
    """It is no program that the kernel takes, or not followed here; never leaves this module."""


def killing_action(program: bytes) -> str:
    """Return how a filter may answer a 64-bit call so that the caller dies of it; empty where it never does.

    ``program`` is an array of struct sock_filter. The text fits behind "may answer by". What is not understood
    may kill.
    """
    try:
        code = list(_INSTRUCTION.iter_unpack(program))
        return _followed(code)
    except (_NotUnderstood, struct.error):
        return "something that livegraft does not understand"


def _followed(code: list[tuple[int, int, int, int]]) -> str:
    ways: list[State | None] = [None] * len(code)

    def lead(to: int, state: State | None) -> None:
        if state is None:
            return
        if to >= len(code):
            raise _NotUnderstood
        known = ways[to]
        ways[to] = state if known is None else _either(known, state)

    lead(0, (_ANY,) * (_MEMORY + _WORDS))
    for at, (operation, if_true, if_false, k) in enumerate(code):
        state = ways[at]
        if state is None:
            continue
        if operation == _RETURN_K:
            action = k & _ACTION
            if action not in _LIVES:
                return _KILLS.get(action, f"the unknown action {action:#x}")
        elif operation == _RETURN_A:
            return "what it computes"
        elif operation == _JUMP:
            lead(at + 1 + k, state)
        elif operation & _CLASS == _JMP:
            holds, fails = _decided(operation, k, state)
            lead(at + 1 + if_true, holds)
            lead(at + 1 + if_false, fails)
        else:
            where, value = _written(operation, k, state)
            lead(at + 1, _with(state, where, value))
    return ""


def _either(one: State, other: State) -> State:
    if one == other:
        return one
    return tuple((min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(one, other, strict=True))


def _with(state: State, where: int, value: Range) -> State:
    return (*state[:where], value, *state[where + 1 :])


def _with_a(state: State, value: Range | None) -> State | None:
    return None if value is None else _with(state, _A, value)


def _written(operation: int, k: int, state: State) -> tuple[int, Range]:
    """What an instruction writes, and where. There are those that the kernel allows (seccomp_check_filter)."""
    match operation:
        case 0x20:  # BPF_LD | BPF_W | BPF_ABS
            if k % 4 or k >= _SIZE:
                raise _NotUnderstood
            return _A, _CALL.get(k, _ANY)
        case 0x00 | 0x01:  # BPF_IMM
            return operation, (k, k)
        case 0x80 | 0x81:  # BPF_LEN
            return operation & 1, (_SIZE, _SIZE)
        case 0x60 | 0x61:  # BPF_MEM
            return operation & 1, state[_word(k)]
        case 0x02 | 0x03:  # BPF_ST, BPF_STX
            return _word(k), state[operation & 1]
        case 0x07:  # BPF_MISC | BPF_TAX
            return _X, state[_A]
        case 0x87:  # BPF_MISC | BPF_TXA
            return _A, state[_X]
        case 0x84:  # BPF_ALU | BPF_NEG
            return _A, _computed(_SUBTRACT, (0, 0), state[_A])
    if operation & _CLASS == _ALU and operation <= 0xFF:
        return _A, _computed(operation & _OPERATION, state[_A], _operand(operation, k, state))
    raise _NotUnderstood


def _word(k: int) -> int:
    if k >= _WORDS:
        raise _NotUnderstood
    return _MEMORY + k


def _operand(operation: int, k: int, state: State) -> Range:
    return state[_X] if operation & _BY_INDEX else (k, k)


def _computed(operation: int, one: Range, other: Range) -> Range:
    if operation not in _ARITHMETIC or (operation == _DIVIDE and other[0] == 0):
        raise _NotUnderstood  # a division by zero returns 0, which is SECCOMP_RET_KILL_THREAD
    if one[0] == one[1] and other[0] == other[1] and not (operation in _SHIFTS and other[0] > 31):
        value = _ARITHMETIC[operation](one[0], other[0]) & _ANY[1]
        return value, value
    return (0, min(one[1], other[1])) if operation == _AND else _ANY


def _decided(operation: int, k: int, state: State) -> tuple[State | None, State | None]:
    """What is known where a condition holds, and where it does not; None where that cannot be."""
    low, high = state[_A]
    least, most = _operand(operation, k, state)
    match operation & ~_BY_INDEX:
        case 0x15:  # BPF_JEQ
            holds = _cut(low, high, least, most)
            fails = _without(low, high, least) if least == most else (low, high)
        case 0x25:  # BPF_JGT
            holds = _cut(low, high, least + 1, _ANY[1])
            fails = _cut(low, high, 0, most)
        case 0x35:  # BPF_JGE
            holds = _cut(low, high, least, _ANY[1])
            fails = _cut(low, high, 0, most - 1)
        case 0x45:  # BPF_JSET
            some = most if least == most else _ANY[1]
            holds = (low, high) if some & _bits_of(low, high) else None
            fails = None if low == high and least == most and low & least else (low, high)
        case _:
            raise _NotUnderstood
    return _with_a(state, holds), _with_a(state, fails)


def _cut(low: int, high: int, least: int, most: int) -> Range | None:
    low, high = max(low, least), min(high, most)
    return (low, high) if low <= high else None


def _without(low: int, high: int, value: int) -> Range | None:
    return _cut(low + (low == value), high - (high == value), *_ANY)


def _bits_of(low: int, high: int) -> int:
    """Bits that may be set in a number of a range."""
    return low if low == high else (1 << high.bit_length()) - 1
