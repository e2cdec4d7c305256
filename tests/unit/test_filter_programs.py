"""What a system-call filter may do: against an interpreter of its own, and on filters that libseccomp makes."""

from __future__ import annotations

import operator
import random
import struct
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import seccomp
from fixtures.seccomp import (
    ALLOW,
    EPERM,
    ERRNO,
    I386,
    KILL_PROCESS,
    KILL_THREAD,
    LOG,
    TRACE,
    TRAP,
    USER_NOTIF,
    X32,
    X86_64,
)
from patcher.process.filterprogram_x86_64 import killing_action

Instruction = tuple[int, int, int, int]

LOAD, IMMEDIATE, RETURN, RETURN_A = 0x20, 0x00, 0x06, 0x16  # linux/bpf_common.h
JUMP, EQUAL, GREATER, NOT_LESS, BITS = 0x05, 0x15, 0x25, 0x35, 0x45
NR, ARCH = 0, 4  # offsets in struct seccomp_data
SURVIVED = (ALLOW, LOG, ERRNO, TRACE, USER_NOTIF)
PROGRAMS = 4000
MANGLED = "something that livegraft does not understand"


def packed(*code: Instruction) -> bytes:
    return b"".join(struct.pack("<HBBI", *one) for one in code)


# -- by hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (KILL_PROCESS, "SECCOMP_RET_KILL_PROCESS"),
        (KILL_THREAD, "SECCOMP_RET_KILL_THREAD"),
        (KILL_THREAD | 7, "SECCOMP_RET_KILL_THREAD"),  # the data of an action says nothing
        (TRAP, "SECCOMP_RET_TRAP"),
        (0x12340000, "the unknown action 0x12340000"),  # the kernel kills for what it does not know
        (ERRNO | EPERM, ""),
        (USER_NOTIF, ""),
        (TRACE | 1, ""),
        (LOG, ""),
        (ALLOW, ""),
    ],
)
def test_each_action(action: int, expected: str) -> None:
    assert killing_action(packed((RETURN, 0, 0, action))) == expected
    some = packed((LOAD, 0, 0, NR), (EQUAL, 0, 1, 59), (RETURN, 0, 0, action), (RETURN, 0, 0, ALLOW))
    assert killing_action(some) == expected


def test_what_is_computed_may_kill() -> None:
    assert killing_action(packed((IMMEDIATE, 0, 0, ALLOW), (RETURN_A, 0, 0, 0))) == "what it computes"


@pytest.mark.parametrize(
    "program",
    [
        b"",
        packed((RETURN, 0, 0, ALLOW))[:-1],  # half an instruction
        packed((IMMEDIATE, 0, 0, 1)),  # runs off its end
        packed((JUMP, 0, 0, 1), (RETURN, 0, 0, ALLOW)),
        packed((EQUAL, 1, 0, 0), (RETURN, 0, 0, ALLOW)),
        packed((0xFFFF, 0, 0, 0), (RETURN, 0, 0, ALLOW)),
        packed((0x94, 0, 0, 3), (RETURN, 0, 0, ALLOW)),  # BPF_MOD, which the kernel does not take
        packed((LOAD, 0, 0, 64), (RETURN, 0, 0, ALLOW)),  # behind the data
        packed((LOAD, 0, 0, 2), (RETURN, 0, 0, ALLOW)),
        packed((0x28, 0, 0, 0), (RETURN, 0, 0, ALLOW)),  # half a word
        packed((0x60, 0, 0, 16), (RETURN, 0, 0, ALLOW)),  # a word of memory that is not there
        packed((0x02, 0, 0, 16), (RETURN, 0, 0, ALLOW)),
        packed((0x3C, 0, 0, 0), (RETURN, 0, 0, ALLOW)),  # a division by what may be 0 ends with 0: KILL_THREAD
    ],
    ids=lambda program: program.hex() or "empty",
)
def test_what_is_not_understood_may_kill(program: bytes) -> None:
    assert killing_action(program) == MANGLED


OTHER_ARCHITECTURES = {
    "not equal": [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, X86_64), (RETURN, 0, 0, KILL_PROCESS), (RETURN, 0, 0, ALLOW)],
    "of 32 bits": [(LOAD, 0, 0, ARCH), (EQUAL, 0, 1, I386), (RETURN, 0, 0, KILL_PROCESS), (RETURN, 0, 0, ALLOW)],
    "little-endian": [(LOAD, 0, 0, ARCH), (BITS, 1, 0, 0x40000000), (RETURN, 0, 0, 0), (RETURN, 0, 0, ALLOW)],
    "x32": [(LOAD, 0, 0, NR), (NOT_LESS, 0, 1, 0x40000000), (RETURN, 0, 0, KILL_PROCESS), (RETURN, 0, 0, ALLOW)],
    "x32 by its bit": [(LOAD, 0, 0, NR), (BITS, 0, 1, 0x40000000), (RETURN, 0, 0, TRAP), (RETURN, 0, 0, ALLOW)],
    "x32 and more": [(LOAD, 0, 0, NR), (GREATER, 0, 1, 0x3FFFFFFF), (RETURN, 0, 0, TRAP), (RETURN, 0, 0, ALLOW)],
    "no call": [(LOAD, 0, 0, NR), (EQUAL, 0, 1, 0xFFFFFFFF), (RETURN, 0, 0, KILL_THREAD), (RETURN, 0, 0, ALLOW)],
    "kept": [
        (LOAD, 0, 0, ARCH), (0x02, 0, 0, 3), (LOAD, 0, 0, NR), (0x61, 0, 0, 3), (0x87, 0, 0, 0),
        (EQUAL, 1, 0, X86_64), (RETURN, 0, 0, KILL_PROCESS), (RETURN, 0, 0, ALLOW),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_ARCHITECTURES)
def test_a_way_that_only_other_architectures_take_is_not_taken(case: str) -> None:
    code = OTHER_ARCHITECTURES[case]
    assert killing_action(packed(*code)) == ""
    # and the same program, with its answers exchanged, may kill
    other = [(op, t, f, ALLOW if op == RETURN and k != ALLOW else 0 if op == RETURN else k) for op, t, f, k in code]
    assert killing_action(packed(*other)) == "SECCOMP_RET_KILL_THREAD"


FOR_ONE_VALUE = {
    "above": [(LOAD, 0, 0, NR), (GREATER, 0, 2, 5), (EQUAL, 0, 1, 6)],
    "a bit below": [(LOAD, 0, 0, NR), (NOT_LESS, 2, 0, 60), (BITS, 0, 1, 4)],
    "made larger": [(LOAD, 0, 0, 16), (0x44, 0, 0, 4), (EQUAL, 0, 1, 5)],
    "not the index": [(LOAD, 0, 0, 16), (0x07, 0, 0, 0), (IMMEDIATE, 0, 0, 0), (0x1D, 1, 0, 0)],
    "a large number": [(LOAD, 0, 0, NR), (EQUAL, 0, 1, 0x3FFFFFFF)],
}


@pytest.mark.parametrize("case", FOR_ONE_VALUE)
def test_a_way_that_few_values_take_is_taken(case: str) -> None:
    code = [*FOR_ONE_VALUE[case], (RETURN, 0, 0, TRAP), (RETURN, 0, 0, ALLOW)]
    assert killing_action(packed(*code)) == "SECCOMP_RET_TRAP"


def test_the_longest_program_is_followed() -> None:
    code = [(LOAD, 0, 0, NR), *((EQUAL, 1, 0, number) for number in range(4093)), (RETURN, 0, 0, KILL_PROCESS)]
    assert killing_action(packed(*code, (RETURN, 0, 0, ALLOW))) == "SECCOMP_RET_KILL_PROCESS"


# -- against an interpreter -------------------------------------------------------------------------------------

WORD = 0xFFFFFFFF
NUMBERS = (0, 1, 2, 3, 31, 32, 59, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000000, X86_64 - 1, X86_64, I386, WORD)
ALU = {
    0x00: operator.add, 0x10: operator.sub, 0x20: operator.mul, 0x30: operator.floordiv, 0x40: operator.or_,
    0x50: operator.and_, 0x60: lambda a, b: a << (b & 31), 0x70: lambda a, b: a >> (b & 31), 0xA0: operator.xor,
}  # fmt: skip
COMPARE = {0x10: operator.eq, 0x20: operator.gt, 0x30: operator.ge, 0x40: lambda a, b: bool(a & b)}
KINDS = ("load", "load", "set", "memory", "alu", "jump", "jump", "jump", "jump", "skip", "copy")


def instruction(dice: random.Random, behind: int) -> Instruction:
    """One that the kernel takes where ``behind`` more follow, and that does not return."""
    number = dice.choice(NUMBERS)
    match dice.choice(KINDS):
        case "load":
            return LOAD, 0, 0, dice.choice((NR, NR, ARCH, 8, 16))
        case "set":
            return dice.choice((0x00, 0x01, 0x80, 0x81)), 0, 0, number
        case "memory":
            return dice.choice((0x60, 0x61, 0x02, 0x03)), 0, 0, dice.randrange(2)
        case "alu":
            operation = dice.choice((*ALU, 0x80))
            if operation in (0x60, 0x70):
                number &= 31
            return 0x04 | operation | (0 if operation == 0x80 else dice.choice((0, 8))), 0, 0, number or 1
        case "jump":
            operation = 0x05 | dice.choice(tuple(COMPARE)) | dice.choice((0, 0, 8))
            return operation, dice.randrange(behind), dice.randrange(behind), number
        case "skip":
            return JUMP, 0, 0, dice.randrange(behind)
    return dice.choice((0x07, 0x87)), 0, 0, 0


def program(dice: random.Random) -> list[Instruction]:
    """A program of which one answer kills: most ways do not lead there."""
    length, returns = dice.randint(3, 12), dice.randint(1, 3)
    code = [instruction(dice, length + returns - at - 1) for at in range(length)]
    answers = [(RETURN, 0, 0, dice.choice(SURVIVED)) for _ in range(returns)]
    code += answers
    code[dice.randrange(length // 2, length + returns)] = RETURN, 0, 0, dice.choice((KILL_PROCESS, 0, TRAP, 0x12340000))
    return code


def calls(dice: random.Random, code: Sequence[Instruction]) -> Iterator[list[int]]:
    """Calls of 64 bits whose numbers and arguments are about those that the program knows."""
    known = sorted({(k + by) & WORD for _, _, _, k in code for by in (-1, 0, 1)} | {*NUMBERS})
    for number in {value & 0x3FFFFFFF for value in known}:
        yield [number, X86_64, *dice.choices(known, k=14)]


def answer(code: Sequence[Instruction], data: Sequence[int]) -> int:
    """What a program answers to a call, by the words of its struct seccomp_data (linux/filter.h, bpf(4) of BSD)."""
    a = x = at = 0
    memory = [0] * 16
    while True:
        operation, if_true, if_false, k = code[at]
        at += 1
        operand = x if operation & 8 else k
        match operation & 7:
            case 0 | 1:
                mode = operation & 0xE0
                value = k if mode == 0 else data[k // 4] if mode == 0x20 else memory[k] if mode == 0x60 else 64
                a, x = (value, x) if operation & 7 == 0 else (a, value)
            case 2:
                memory[k] = a
            case 3:
                memory[k] = x
            case 4 if operation & 0xF0 == 0x80:
                a = -a & WORD
            case 4 if operation & 0xF0 == 0x30 and operand == 0:
                return 0
            case 4:
                a = ALU[operation & 0xF0](a, operand) & WORD
            case 5 if operation == JUMP:
                at += k
            case 5:
                at += if_true if COMPARE[operation & 0xF0](a, operand) else if_false
            case 6:
                return a if operation == RETURN_A else k
            case 7:
                a, x = (a, a) if operation == 0x07 else (x, x)


def test_whatever_kills_a_call_is_found() -> None:
    died = found = 0
    for seed in range(PROGRAMS):
        dice = random.Random(seed)
        code = program(dice)
        kills = any(answer(code, call) & 0xFFFF0000 not in SURVIVED for call in calls(dice, code))
        said = killing_action(packed(*code))
        assert said or not kills, f"seed {seed}: {code}"
        died += kills
        found += bool(said)
    print(f"{died} of {PROGRAMS} programs kill, {found} are said to")
    assert 0 < died <= found < PROGRAMS


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_judged(program: bytes) -> None:
    assert isinstance(killing_action(program), str)


# -- as libseccomp makes them -----------------------------------------------------------------------------------

MOUNT, PTRACE, KEXEC, SOCKET, GETPPID, READ, WRITE = 165, 101, 246, 41, 110, 0, 1  # syscall_64.tbl
DENIED = ERRNO | EPERM
HARMLESS: dict[str, tuple[int, list[seccomp.Rule], dict[str, object]]] = {
    "SystemCallArchitectures=native": (ALLOW, [], {}),
    "MemoryDenyWriteExecute=yes": (ALLOW, [(DENIED, 10, (2, 7, 4)), (DENIED, 9, (2, 7, 6))], {"bad_arch": ALLOW}),
    "RestrictAddressFamilies=": (ALLOW, [(DENIED, SOCKET, (0, 1, 3))], {"bad_arch": ALLOW}),
    "SystemCallFilter=~... with an error": (ALLOW, [(DENIED, call) for call in (MOUNT, PTRACE, KEXEC)], {}),
    "an error for all but a few": (DENIED, [(ALLOW, call) for call in range(0, 300, 3)], {}),
    "by a tree": (DENIED, [(ALLOW, call) for call in range(0, 300, 3)], {"tree": True}),
    "of all architectures": (ALLOW, [(DENIED, MOUNT), (DENIED, SOCKET, (0, 4, 3))], {"archs": (X86_64, I386, X32)}),
    "of 32 bits alone": (KILL_PROCESS, [(ALLOW, READ)], {"archs": (I386,), "bad_arch": ALLOW}),
    "x32 alone": (KILL_PROCESS, [(ALLOW, READ)], {"archs": (X32,), "bad_arch": ALLOW}),
    "reported": (ALLOW, [(LOG, MOUNT), (USER_NOTIF, PTRACE), (TRACE, KEXEC)], {}),
}
KILLING: dict[str, tuple[int, list[seccomp.Rule], dict[str, object]]] = {
    "SystemCallFilter=": (KILL_PROCESS, [(ALLOW, READ), (ALLOW, WRITE)], {}),
    "by a tree": (KILL_PROCESS, [(ALLOW, call) for call in range(0, 300, 3)], {"tree": True}),
    "one call": (ALLOW, [(KILL_PROCESS, GETPPID)], {}),
    "one call of one argument": (DENIED, [(ALLOW, READ), (KILL_THREAD, SOCKET, (0, 4, 16))], {}),
    "a signal": (ALLOW, [(TRAP, GETPPID)], {"archs": (X86_64, I386, X32)}),
    "the last of many": (ALLOW, [*((DENIED, n) for n in range(200)), (KILL_PROCESS, 300)], {"tree": True}),
    "64 bits alone": (ALLOW, [], {"archs": (I386,), "bad_arch": KILL_PROCESS}),
}


def as_made(case: tuple[int, list[seccomp.Rule], dict[str, object]]) -> bytes:
    lib = seccomp.library()
    if lib is None:
        pytest.skip("libseccomp is not installed")
    default, rules, options = case
    return seccomp.made(lib, default, rules, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", HARMLESS)
def test_a_filter_of_a_hardened_service_kills_nobody(case: str) -> None:
    assert killing_action(as_made(HARMLESS[case])) == ""


@pytest.mark.parametrize("case", KILLING)
def test_a_filter_that_kills_is_seen_to(case: str) -> None:
    assert killing_action(as_made(KILLING[case])).startswith("SECCOMP_RET_")
