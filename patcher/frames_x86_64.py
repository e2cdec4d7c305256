"""What stack frames look like on x86-64: register numbers, the C library's signal frame."""

from __future__ import annotations

from typing import Final, Protocol

RSP: Final = 7
RETURN_ADDRESS: Final = 16
DWARF_REGISTERS: Final = (
    "rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip",
)  # fmt: skip
"""DWARF register number -> name in ``user_regs_struct`` (psABI x86-64 1.0, figure 3.36)."""

CALL_CLOBBERED: Final = frozenset({0, 1, 2, 4, 5, 8, 9, 10, 11})
"""DWARF numbers of what a called function may overwrite without saving (psABI x86-64 1.0, figure 3.4)."""

USER_CODE_64: Final = 0x33
"""cs in 64-bit mode (__USER_CS, arch/x86/include/asm/segment.h)."""

# What a signal handler returns to (SA_RESTORER): mov $15, %rax or %eax; syscall, which is rt_sigreturn(2).
RESTORER_BEGINNINGS: Final = (b"\x48\xc7\xc0", b"\xb8")
RESTORER_END: Final = b"\x0f\x00\x00\x00\x0f\x05"
RESTORER_SIZE: Final = 9
"""Bytes of the longest; a program counter that far behind its start is past it."""

# struct rt_sigframe (arch/x86/include/asm/sigframe.h): pretcode, which is the restorer's address; then struct
# ucontext, whose uc_mcontext is at 40 and holds r8 first; rsp is its 16th word.
SIGFRAME_RSP: Final = 8 + 40 + 15 * 8
"""Offset of the interrupted rsp from the word that holds the restorer's address, in bytes."""


class GeneralRegisters(Protocol):
    """What is read of ``user_regs_struct``; every field of ``DWARF_REGISTERS`` and ``cs``."""

    @property
    def rip(self) -> int:
        """The program counter."""

    @property
    def rsp(self) -> int:
        """The stack pointer."""

    @property
    def cs(self) -> int:
        """The code segment selector."""


def dwarf_registers(registers: GeneralRegisters) -> dict[int, int]:
    """DWARF register number -> value."""
    return {number: getattr(registers, name) for number, name in enumerate(DWARF_REGISTERS)}
