"""The stub that makes one system call in a foreign thread and then puts the thread back by itself.

A tracer that points a thread at a ``syscall`` instruction and restores its registers afterwards kills it if
the tracer dies in between. This stub needs nothing from anybody once it runs: behind the call it loads every
general register from a context written beside it, and jumps to where the thread was.

    syscall
    mov r15, [context.r15]
    ...                              fifteen registers, all but rsp
    jmp [context.rip]

What it does not restore, it does not change:

- rsp. No instruction uses the stack, so the red zone (the 128 bytes below rsp, psABI section 3.2.2) is as it
  was, and a signal that arrives inside the stub finds a usable stack.
- The flags. ``syscall`` saves them in r11, the kernel returns them (Intel SDM volume 2, SYSCALL and SYSRET;
  it overwrites rcx and r11, which are restored), and neither mov nor jmp changes any.
- Vector, x87 and mask registers, and the segment bases: the kernel preserves them across a system call.

It is position independent and needs no relocation. The last jump is an indirect jump, not a return, so it is
neutral to shadow stacks; under indirect branch tracking (absent from mainline user space) it would need a
notrack prefix.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from .assembly import assemble
from .errors import TrampolineError
from .readback import require_same

RESTORED = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
)  # fmt: skip
"""The registers that the stub loads, in the order of the context; ``rip`` follows."""

NAME = b"livegraft\0"
"""Marks a stub, and is a C string in the memory of the target for calls that want a name."""
_LAYOUT = 1  # changes with the stub, so that no version takes another's for its own

_SYSCALL_SIZE = 2
_LOAD_SIZE = 7  # REX.W 8B /r disp32
_JUMP_SIZE = 6  # FF /4 disp32
_CODE_SIZE = _SYSCALL_SIZE + _LOAD_SIZE * len(RESTORED) + _JUMP_SIZE
_CONTEXT_OFFSET = -(-_CODE_SIZE // 8) * 8
_REGISTERS = struct.Struct(f"<{len(RESTORED) + 1}Q")  # RESTORED, rip
_OWNER = struct.Struct("<10sHI")  # NAME, _LAYOUT, thread id
_WORD = 1 << 64


@dataclass(frozen=True, slots=True)
class Stub:
    """The stub as bytes. ``context_offset`` counts from its start; ``size`` is code, padding and context.

    A thread whose rip is at ``RETURN_OFFSET`` or beyond has made the call; one whose rip is 0 has not.
    """

    code: bytes
    context_offset: int
    size: int


NAME_OFFSET = _CONTEXT_OFFSET + _REGISTERS.size
"""Where ``NAME`` lies, from the start of the stub."""
STUB_SIZE = NAME_OFFSET + _OWNER.size
"""Bytes of room that a stub needs, context included; known without assembling it."""
STUB_ALIGNMENT = 8
"""A stub starts at a multiple of this, so that no context word is torn."""
RETURN_OFFSET = _SYSCALL_SIZE
"""Where the system call returns to, from the start of the stub."""


def _slot(index: int) -> int:
    return _CONTEXT_OFFSET + 8 * index


def _source() -> list[str]:
    """The stub as the assembler reads it: operands relative to the following instruction."""
    lines = ["syscall"]
    position = _SYSCALL_SIZE
    for index, register in enumerate(RESTORED):
        position += _LOAD_SIZE
        lines.append(f"mov {register}, qword ptr [rip + {_slot(index) - position:#x}]")
    position += _JUMP_SIZE
    lines.append(f"jmp qword ptr [rip + {_slot(len(RESTORED)) - position:#x}]")
    return lines


def _meaning() -> list[str]:
    """The stub as it must read back at address 0: operands absolute."""
    loads = [f"mov {register}, [{_slot(index):#x}]" for index, register in enumerate(RESTORED)]
    return ["syscall", *loads, f"jmp [{_slot(len(RESTORED)):#x}]"]


@cache
def stub() -> Stub:
    """Return the stub, assembled and read back once a process (about 0.1 s, most of it loading the tools).

    Raises TrampolineError where the assembler's bytes are not what was meant.
    """
    code = assemble(_source())
    require_same(code, _meaning())
    if len(code) != _CODE_SIZE:
        raise TrampolineError(f"the stub has {len(code)} bytes of code, not {_CODE_SIZE}")
    return Stub(code, _CONTEXT_OFFSET, STUB_SIZE)


def fill_context(registers: Mapping[str, int], tid: int) -> bytes:
    """Return the context that brings a thread back to ``registers``, to be written at ``context_offset``.

    ``registers`` holds at least ``RESTORED`` and ``rip``, as unsigned 64-bit values. ``tid`` is kept beside
    them, so that a later patcher can tell whose stub it finds. Raises TrampolineError for a value of any other
    range.
    """
    values = [registers[name] for name in (*RESTORED, "rip")]
    if not all(0 <= value < _WORD for value in values):
        raise TrampolineError("a register value does not fit into 64 bits")
    return _REGISTERS.pack(*values) + _OWNER.pack(NAME, _LAYOUT, tid)


def stub_bytes(registers: Mapping[str, int], tid: int) -> bytes:
    """Return a whole stub, ``STUB_SIZE`` bytes: code, padding, context. Raises TrampolineError."""
    made = stub()
    return made.code.ljust(made.context_offset, b"\0") + fill_context(registers, tid)


def owner_of(found: bytes) -> int | None:
    """Return the thread id for which the stub in ``found`` (``STUB_SIZE`` bytes) was made, or None.

    None: this is no stub of this layout. Raises TrampolineError on any other length.
    """
    if len(found) != STUB_SIZE:
        raise TrampolineError(f"a stub has {STUB_SIZE} bytes, not {len(found)}")
    name, layout, tid = _OWNER.unpack_from(found, NAME_OFFSET)
    return int(tid) if (name, layout) == (NAME, _LAYOUT) else None
