"""The patch object: what the differ makes and the injector binds to a process.

These are values only; ``patchfile`` writes them to disk as an ELF shared object and reads them back.

The patch keeps the *new build's own virtual addresses* (docs/architecture.md, D4): a byte of the new build at
address ``v`` is found in the patch at ``v``, and in a process at ``v + patch bias``. Everything relative inside
it is therefore right without being understood, and only what leads out of it is relocated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 4
"""Raised whenever a reader of the old format would misunderstand the new one."""


ENTRY_JUMP_SIZE = 5
"""Bytes that an entry jump takes (``jmp rel32``)."""


class RelocationType(IntEnum):
    """How a field is written: numbers and formulas of the psABI (x86-64 ABI 1.0, section 4.4.1)."""

    ABS64 = 1  # R_X86_64_64: S + A, 8 bytes
    PC32 = 2  # R_X86_64_PC32: S + A - P, 4 bytes, signed
    ABS32 = 10  # R_X86_64_32: S + A, 4 bytes, zero-extended
    ABS32S = 11  # R_X86_64_32S: S + A, 4 bytes, sign-extended


OLD_IMAGE = 0
"""Symbol index: S is the load bias of the old image, so the addend is an old virtual address."""
PATCH_IMAGE = 1
"""Symbol index: S is the load bias of the patch itself, so the addend is a new virtual address."""
FIRST_IMPORT = 2
"""Symbol indices from here on: ``imports[index - FIRST_IMPORT]``, resolved in the target process."""

RELOCATION_DTYPE = np.dtype([("place", "<u8"), ("type", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])
"""One rewritten reference. ``place`` is the virtual address of the field in the patch (P without bias)."""


class Severity(StrEnum):
    """What a finding does to the verdict."""

    REFUSE = "refuse"
    WARN = "warn"


@dataclass(frozen=True)
class Finding:
    """A reason to refuse or to warn: what, where, why, and what would lift it.

    ``code`` is stable (``struct-layout``, see ``findingcodes``); ``where`` are function names or addresses, with the
    source line where debug information gives it. ``lifted``: it would have refused, or asked for something at apply,
    and --allow was given.
    """

    code: str
    severity: Severity
    what: str
    where: tuple[str, ...]
    why: str
    lift: str
    lifted: bool = False

    def lines(self) -> list[str]:
        """The finding for people, one thing a line."""
        head = f"{self.code}{' (lifted by --allow)' if self.lifted else ''}: {self.what}"
        return [head, *(f"  where  {place}" for place in self.where), f"  why    {self.why}", f"  lift   {self.lift}"]


class Reason(StrEnum):
    """Why a function is in the patch."""

    CODE = "code"  # its own instructions differ
    CONSTANT = "constant"  # it reads a constant that differs
    HANDLERS = "handlers"  # same bytes, but it catches other exceptions, or in other places
    CALLEE = "callee"  # same bytes, but a reference leads elsewhere
    CLOSURE = "closure"  # a cold part, or shares a jump with a patched function
    LINES = "lines"  # differs in line numbers only, included by --lines
    NEW = "new"  # has no counterpart in the old build


@dataclass(frozen=True)
class PatchFunction:
    """One function of the patch; addresses are virtual, sizes in bytes.

    ``old_start`` is None for a new function. ``entry_jump`` says that the old entry is redirected: false for
    new functions and for parts that only patched functions reach.
    """

    name: str
    reason: Reason
    new_start: int
    new_size: int
    old_start: int | None
    old_size: int | None
    entry_jump: bool


@dataclass(frozen=True)
class Build:
    """One of the two builds: identity and span of its image in virtual addresses (page aligned)."""

    name: str  # file name without directories
    build_id: str  # lower-case hex of NT_GNU_BUILD_ID
    low: int
    high: int
    fixed_address: bool  # ET_EXEC: the load bias is 0


@dataclass(frozen=True)
class Segment:
    """Pages of the patch. ``vaddr`` is page aligned; ``data`` fills the first bytes of ``size``, zeros the rest.

    ``flags`` are PF_X=1, PF_W=2, PF_R=4 (gABI, program header); never W and X together.
    """

    vaddr: int
    size: int
    flags: int
    data: bytes


@dataclass(frozen=True)
class Import:
    """A symbol that the new code needs and the old image has no slot for."""

    name: str
    version: str  # empty where the reference is unversioned
    weak: bool = False  # 0 where nothing defines it


@dataclass(frozen=True)
class CheckedRange:
    """Bytes of the old build that must be found unchanged in the process before anything is written.

    ``digest`` is BLAKE2b-128 of the bytes in the old file, lower-case hex.
    """

    name: str
    start: int
    size: int
    digest: str


@dataclass(frozen=True)
class RemovedFunction:
    """An old function without counterpart. It stays in memory, but no thread may be in it when patched."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class OldCode:
    """Whether a thread may finish the old code of a function beside the new code of all others (``sidebyside``).

    ``parts`` are old start addresses: its own, then those of functions that share branches with it. ``why_not`` is for
    people; empty: it may.
    """

    name: str
    parts: tuple[int, ...]
    why_not: str


@dataclass(frozen=True)
class IdleCode:
    """A piece of old code that does not change and must be idle all the same (``moves``); ``name`` says whose it is."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class LineOnly:
    """A function left out because it differs in line numbers alone (D5)."""

    name: str
    old_start: int
    new_start: int


@dataclass(frozen=True)
class PatchObject:
    """Everything that ``apply`` needs to know; the file holds exactly this.

    ``id`` is the SHA-256 of the file (its digest field taken as zeros), lower-case hex.
    ``eh_frame_hdr`` is the address of the unwind search table inside the patch, or None. ``evidence`` and ``old_code``
    are for people who ask why (``explain``), and are not needed to apply: packed by ``evidence.pack``, and the old code
    of the functions, one behind the other, those without a counterpart left out. Empty where there is no explanation.
    """

    id: str
    tool_version: str
    old: Build
    new: Build
    segments: tuple[Segment, ...]
    functions: tuple[PatchFunction, ...]
    imports: tuple[Import, ...]
    relocations: NDArray[np.void]  # RELOCATION_DTYPE, sorted by place
    checked: tuple[CheckedRange, ...]
    findings: tuple[Finding, ...]
    removed: tuple[RemovedFunction, ...]
    line_only: tuple[LineOnly, ...]
    eh_frame_hdr: int | None
    needed: tuple[str, ...] = ()  # libraries (DT_NEEDED) that the new build asks for and the old one does not
    evidence: bytes = field(default=b"", repr=False)
    old_code: bytes = field(default=b"", repr=False)
    exceptions: bool = False
    """Whether exceptions may pass through its functions, so that the process must find its unwind tables."""
    old_codes: tuple[OldCode, ...] = ()
    """Of the functions that have an old code and of the removed ones."""
    idle: tuple[IdleCode, ...] = ()

    @property
    def low(self) -> int:
        """Lowest virtual address of the patch."""
        return min(segment.vaddr for segment in self.segments)

    @property
    def high(self) -> int:
        """One past the highest virtual address of the patch."""
        return max(segment.vaddr + segment.size for segment in self.segments)
