"""Answers to the unwinder's question where unwind tables are, for code that no loaded image has.

An unwinder asks the C library: ``_dl_find_object(address, result)`` (dlfcn.h; glibc 2.35 and later) or
``dl_iterate_phdr(callback, data)`` (dl_iterate_phdr(3)). A *lookup* is a function of the same type that stands in for
one of them: it answers for the ranges of a patch and passes everything else on. It makes no call of its own into the
program but the one that it stands for, takes no lock, and keeps no state.

A lookup is a block of data followed by code; the code finds its data relative to rip, so it is position independent.
Registers: what a function may overwrite by the psABI (section 3.2.1), nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from .assembly import assemble_function
from .errors import TrampolineError

_ALIGNMENT = 16
_PT_LOAD, _PT_GNU_EH_FRAME = 1, 0x6474E550
_PF_X, _PF_R = 1, 4


@dataclass(frozen=True, slots=True)
class Answer:
    """What a lookup says, all absolute addresses: ``ranges`` of code [start, end), and the search table for them.

    ``low`` and ``high`` span the whole mapping; ``link_map`` is that of the image that the code belongs to (link.h),
    ``name`` what the object is called.
    """

    ranges: tuple[tuple[int, int], ...]
    low: int
    high: int
    link_map: int
    eh_frame_hdr: int
    name: str


@dataclass(frozen=True, slots=True)
class Lookup:
    """The bytes of a lookup, data first, and where its function starts in them."""

    code: bytes
    entry: int


def find_object(answer: Answer, original: int) -> Lookup:
    """A stand-in for ``_dl_find_object``; ``original`` is the absolute address of what it passes on to.

    struct dl_find_object (dlfcn.h, x86-64): flags, map_start, map_end, link_map, eh_frame, seven reserved words.
    """
    words = [original, answer.low, answer.high, answer.link_map, answer.eh_frame_hdr]
    first_range = 8 * len(words)
    data = _padded(_words(words + [edge for span in _ranges(answer) for edge in span]))
    lines = ["lea r11, [rip + @data]"]
    for number in range(len(answer.ranges)):
        start = first_range + 16 * number
        lines += [f"cmp rdi, {_at('r11', start)}", f"jb @next{number}"]
        lines += [f"cmp rdi, {_at('r11', start + 8)}", "jb @inside", f"next{number}:"]
    lines += [f"jmp {_at('r11', 0)}", "inside:", "xor eax, eax", f"mov {_at('rsi', 0)}, rax"]
    for field in range(8, 40, 8):
        lines += [f"mov rdx, {_at('r11', field)}", f"mov {_at('rsi', field)}, rdx"]
    lines += [f"mov {_at('rsi', field)}, rax" for field in range(40, 96, 8)]
    return Lookup(data + assemble_function([*lines, "ret"], len(data)), len(data))


def iterate(answer: Answer, original: int, at: int) -> Lookup:
    """A stand-in for ``dl_iterate_phdr`` that will lie at the absolute address ``at``.

    The object is told after the first one that the original tells of, from inside its callback: the lock that the
    original holds then is what callers rely on, and ``dlpi_adds`` and ``dlpi_subs`` are those of the moment.

    Its load address is where it begins. The true bias of a patch that lies below the addresses that it keeps is
    negative, and LLVM's libunwind passes over objects whose load address is beyond the code that it looks for.
    """
    headers = [_header(_PT_LOAD, _PF_R | _PF_X, start - answer.low, end - start) for start, end in _ranges(answer)]
    headers.append(_header(_PT_GNU_EH_FRAME, _PF_R, answer.eh_frame_hdr - answer.low, 8))
    first_header = at + 40
    name = first_header + sum(map(len, headers))
    words = [original, answer.low, name, first_header, len(headers)]
    data = _padded(_words(words) + b"".join(headers) + answer.name.encode("utf-8") + b"\0")
    return Lookup(data + assemble_function([*_ITERATE, *_VISIT], len(data)), len(data))


def _at(register: str, offset: int) -> str:
    if not offset:
        return f"qword ptr [{register}]"
    return f"qword ptr [{register} + {offset if offset < 10 else hex(offset)}]"


# The frame of dl_iterate_phdr's stand-in, which its own callback is given: the caller's callback and data, whether
# that callback was told of the patch, and where the data of the stand-in is.
_CALLBACK, _ARGUMENT, _TOLD, _ANSWER = 0, 8, 16, 24
_ITERATE = [
    "lea r11, [rip + @data]",
    "push rbp",
    "mov rbp, rsp",
    "sub rsp, 0x20",
    f"mov {_at('rsp', _CALLBACK)}, rdi",
    f"mov {_at('rsp', _ARGUMENT)}, rsi",
    f"mov {_at('rsp', _TOLD)}, 0",
    f"mov {_at('rsp', _ANSWER)}, r11",
    "lea rdi, [rip + @visit]",
    "mov rsi, rsp",
    f"call {_at('r11', 0)}",
    "leave",
    "ret",
]
# int visit(struct dl_phdr_info *info, size_t size, void *frame); a struct of 64 bytes (link.h) is made at rsp:
# addr, name, phdr, phnum, adds, subs, tls_modid, tls_data.
_VISIT = [
    "visit:",
    "push rbx",
    "push r12",
    "sub rsp, 0x48",
    "mov rbx, rdx",
    "mov r12, rsi",
    "xor eax, eax",
    *(f"mov {_at('rsp', offset)}, rax" for offset in range(32, 64, 8)),
    "cmp rsi, 0x30",  # adds and subs are there since glibc 2.4
    "jb @forward",
    f"mov rax, {_at('rdi', 32)}",
    f"mov {_at('rsp', 32)}, rax",
    f"mov rax, {_at('rdi', 40)}",
    f"mov {_at('rsp', 40)}, rax",
    "forward:",
    f"mov rdx, {_at('rbx', _ARGUMENT)}",
    f"call {_at('rbx', _CALLBACK)}",
    "test eax, eax",
    "jne @done",
    f"cmp {_at('rbx', _TOLD)}, 0",
    "jne @done",
    f"mov {_at('rbx', _TOLD)}, 1",
    f"mov r11, {_at('rbx', _ANSWER)}",
    *(
        line
        for offset in range(8, 40, 8)
        for line in (f"mov rax, {_at('r11', offset)}", f"mov {_at('rsp', offset - 8)}, rax")
    ),
    "mov rdi, rsp",
    "mov rsi, r12",
    "cmp rsi, 0x40",
    "jbe @tell",
    "mov esi, 0x40",
    "tell:",
    f"mov rdx, {_at('rbx', _ARGUMENT)}",
    "xor eax, eax",
    f"call {_at('rbx', _CALLBACK)}",
    "done:",
    "add rsp, 0x48",
    "pop r12",
    "pop rbx",
    "ret",
]


def _ranges(answer: Answer) -> tuple[tuple[int, int], ...]:
    if not answer.ranges or any(not 0 <= start < end < 1 << 64 for start, end in answer.ranges):
        raise TrampolineError("a lookup answers for ranges of code, and there are none")
    return answer.ranges


def _header(kind: int, flags: int, address: int, size: int) -> bytes:
    """Elf64_Phdr (gABI, "Program Header") of memory that has no file."""
    return struct.pack("<IIQQQQQQ", kind, flags, 0, address, address, size, size, 8)


def _words(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}Q", *(value % (1 << 64) for value in values))


def _padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // _ALIGNMENT) * _ALIGNMENT, b"\0")
