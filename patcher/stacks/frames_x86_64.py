"""What stack frames look like on x86-64: register numbers, the C library's signal frame."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ..threads.registers_x86_64 import Registers

RSP: Final = 7
RETURN_ADDRESS: Final = 16
DWARF_REGISTERS: Final = (
    "rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip",
)  # fmt: skip
"""DWARF register number -> name in ``user_regs_struct`` (psABI x86-64 1.0, figure 3.36)."""

CALL_CLOBBERED: Final = frozenset({0, 1, 2, 4, 5, 8, 9, 10, 11})
"""DWARF numbers of what a called function may overwrite without saving (psABI x86-64 1.0, figure 3.4)."""

RED_ZONE: Final = 128
"""Bytes below the stack pointer that stay as they are, whatever interrupts (psABI x86-64 1.0, 3.2.2)."""

# What a signal handler returns to (SA_RESTORER): mov $15, %rax or %eax; syscall, which is rt_sigreturn(2).
RESTORER_BEGINNINGS: Final = (b"\x48\xc7\xc0", b"\xb8")
RESTORER_END: Final = b"\x0f\x00\x00\x00\x0f\x05"
RESTORER_SIZE: Final = 9
"""Bytes of the longest; a program counter that far behind its start is past it."""

# struct rt_sigframe (arch/x86/include/asm/sigframe.h): pretcode, which is the restorer's address; then struct
# ucontext: uc_flags, uc_link, uc_stack (24 bytes), and uc_mcontext with r8 to r15, rdi, rsi, rbp, rbx, rdx, rax,
# rcx, rsp, rip, flags, cs.
_SIGFRAME = struct.Struct("<8x Q 32x 120x Q 16x H")  # uc_flags, rsp, cs
_USER_CODE = frozenset({0x33, 0x23, 0xE033, 0xE023})  # native and Xen PV, 64 bit and 32 bit
_KNOWN_UC_FLAGS = 7  # include/uapi/asm/ucontext.h

SIGFRAME_SIZE: Final = _SIGFRAME.size
"""Bytes of a signal frame that ``interrupted_stack`` looks at, from the word with the restorer's address."""

SIGFRAME_RIP: Final = 176
"""Offset in a signal frame of the interrupted program counter."""


def dwarf_registers(registers: Registers) -> dict[int, int]:
    """DWARF register number -> value."""
    return {number: getattr(registers, name) for number, name in enumerate(DWARF_REGISTERS)}


def interrupted_stack(frame: bytes) -> int | None:
    """The rsp that a signal frame of ``SIGFRAME_SIZE`` bytes holds; None where it is none.

    A word that equals a restorer's address need not begin one: every struct sigaction holds such a word.
    """
    flags, pointer, code_segment = _SIGFRAME.unpack(frame)
    is_frame = flags <= _KNOWN_UC_FLAGS and code_segment in _USER_CODE
    return int(pointer) if is_frame else None
