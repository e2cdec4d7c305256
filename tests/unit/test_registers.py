from __future__ import annotations

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ptrace.binding.linux_struct import user_regs_struct

from patcher.threads.registers_x86_64 import NO_SYSCALL, Registers, restart, without_spurious_eintr

READ, EPOLL_WAIT, CLOSE, POLL, OPENAT = 0, 232, 3, 7, 257
WRITE, IOCTL, SENDFILE, SPLICE = 1, 16, 40, 275
TCSBRK, TCSETSW, TCFLSH = 0x5409, 0x5403, 0x540B
AFTER_SYSCALL = 0x401002


def stopped(number: int, result: int, cs: int = 0x33, **arguments: int) -> Registers:
    registers = Registers(rip=AFTER_SYSCALL, orig_rax=number & NO_SYSCALL, cs=cs, rbx=7, **arguments)
    registers.rax = result & NO_SYSCALL
    return registers


def no_socket(descriptor: int) -> bool:
    del descriptor
    return False


def test_the_structure_is_the_kernels() -> None:
    assert ctypes.sizeof(Registers) == 27 * 8  # <sys/user.h>
    assert Registers.rip.offset == 16 * 8
    assert Registers.orig_rax.offset == 15 * 8
    assert issubclass(Registers, user_regs_struct)


def test_a_copy_shares_nothing() -> None:
    first = stopped(READ, 5)
    second = first.copy()
    second.rbx = 8
    assert first.rbx == 7


@pytest.mark.parametrize("result", [-512, -513, -514])
def test_an_interrupted_call_is_made_again_from_its_own_instruction(result: int) -> None:
    resumed = restart(stopped(READ, result))
    assert (resumed.rax, resumed.rip, resumed.orig_rax) == (READ, AFTER_SYSCALL - 2, NO_SYSCALL)


def test_a_call_with_a_restart_block_goes_on_by_restart_syscall() -> None:
    resumed = restart(stopped(POLL, -516))
    assert (resumed.rax, resumed.rip, resumed.orig_rax) == (219, AFTER_SYSCALL - 2, NO_SYSCALL)


@pytest.mark.parametrize("result", [0, 5, -4, -11, -511, -515, -517])
def test_a_finished_call_is_left_alone(result: int) -> None:
    resumed = restart(stopped(READ, result))
    assert (resumed.result, resumed.rip) == (result, AFTER_SYSCALL)
    assert resumed.orig_rax == NO_SYSCALL


@pytest.mark.parametrize("value", [-512, -514, -516])
def test_outside_of_a_call_such_a_value_is_just_a_value(value: int) -> None:
    resumed = restart(stopped(-1, value))
    assert (resumed.result, resumed.rip) == (value, AFTER_SYSCALL)


def test_eintr_of_a_call_that_is_never_restarted_becomes_the_kernels_decision() -> None:
    fixed = without_spurious_eintr(stopped(EPOLL_WAIT, -4), no_socket)
    assert fixed is not None
    # orig_rax and rip stay: the kernel restarts the call, or says EINTR where a handler runs.
    assert (fixed.result, fixed.orig_rax, fixed.rip) == (-514, EPOLL_WAIT, AFTER_SYSCALL)
    assert restart(fixed).rip == AFTER_SYSCALL - 2


@pytest.mark.parametrize(
    "registers",
    [
        stopped(CLOSE, -4),  # the descriptor is closed: again would close another's
        stopped(OPENAT, -4),
        stopped(EPOLL_WAIT, -9),
        stopped(EPOLL_WAIT, 4),
        stopped(EPOLL_WAIT, -512),  # the kernel restarts it by itself
        stopped(-1, -4),
        stopped(WRITE, -4, rdi=5),  # it may have done a part: a control file of the kernel, say
        stopped(SENDFILE, -4, rdi=5, rsi=6),
        stopped(IOCTL, -4, rsi=TCFLSH),
        stopped(IOCTL, -4, rsi=TCSBRK, rdx=0),  # a break that has begun
        stopped(EPOLL_WAIT, -4, cs=0x23),  # another numbering in 32-bit mode
    ],
)
def test_nothing_else_is_touched(registers: Registers) -> None:
    assert without_spurious_eintr(registers, no_socket) is None


@pytest.mark.parametrize(
    "registers",
    [
        stopped(WRITE, -4, rdi=0xFFFFFFFF00000005),  # the kernel looks at 32 bits
        stopped(SENDFILE, -4, rdi=5, rsi=6),
        stopped(SPLICE, -4, rdi=6, rdx=5),
    ],
)
def test_what_is_written_to_a_socket_is_written_again(registers: Registers) -> None:
    fixed = without_spurious_eintr(registers, {5}.__contains__)
    assert fixed is not None
    assert fixed.result == -514
    assert without_spurious_eintr(registers, {7}.__contains__) is None


@pytest.mark.parametrize("registers", [stopped(IOCTL, -4, rsi=TCSBRK, rdx=1), stopped(IOCTL, -4, rsi=TCSETSW)])
def test_waiting_for_a_terminal_goes_on(registers: Registers) -> None:
    fixed = without_spurious_eintr(registers, no_socket)
    assert fixed is not None
    assert fixed.result == -514


@given(st.integers(-1, 500), st.integers(-600, 600))
def test_restart_changes_nothing_but_rax_rip_and_orig_rax(number: int, result: int) -> None:
    before = stopped(number, result)
    after = restart(before)
    for name, _ in Registers._fields_ or user_regs_struct._fields_:
        if name not in {"rax", "rip", "orig_rax"}:
            assert getattr(after, name) == getattr(before, name)
    assert after.rip in {before.rip, before.rip - 2}
    assert restart(after).rip == after.rip  # never twice
