"""Gates as they lie in a process: code by which several pages of entry jumps come into force at one write.

While a transaction writes its entry jumps page by page, each entry leads to a gate (``trampolines.gate_x86_64``), and
all gates ask one word whether to go on as before or as after. So there is no moment at which a death of the patcher
leaves some functions new and others old. When the pause ends, no entry leads to a gate any more; where a patcher has
died they do, and whoever comes next sees through them (``seen_through``) and rewrites them.

The gates of a process lie in a mapping of their own near the image of the entries, which is kept for the next
transaction. Where one changes several images, all of their gates ask the word of the first mapping:

    0   magic, 8 bytes
    8   the word, u64: 0 before, 1 after
    16  address of the word that these gates ask, u64
    24  entries, u32; bytes in use, u32
    32  SHA-256 of what follows
    64  a row for each entry: its address, u64; that of its gate, u64; five bytes before, five after
    ..  the gates

Everything read here is untrusted, as a record is: the target can map such a thing.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from elfdiff.errors import LivegraftError
from trampolines.entry_x86_64 import ENTRY_JUMP_SIZE, entry_jump
from trampolines.errors import TrampolineError

from ..process.memory import Memory
from ..process.proc import MEMFD_PATH, Mapping
from ..stacks.forbidden import ForbiddenRange

MAGIC = b"LVGATES\x02"
HEADER_SIZE = 64
WORD_OFFSET = 8
BEFORE, AFTER = bytes(8), (1).to_bytes(8, "little")
"""The word: what the gates go on with."""
_HEADER = struct.Struct("<8sQQII32s")
_ROW = struct.Struct(f"<QQ{ENTRY_JUMP_SIZE}s{ENTRY_JUMP_SIZE}s6x")
ROW_SIZE = _ROW.size
_MAX_SIZE = 16 << 20


@dataclass(frozen=True, slots=True)
class GatedEntry:
    """One entry, five bytes each: ``jump`` leads to its gate, which does what ``before`` or ``after`` does there."""

    address: int
    jump: bytes
    before: bytes
    after: bytes


@dataclass(frozen=True, slots=True)
class Gates:
    """One mapping of gates, [start, start + size), which ask the word at ``asks``. ``passed``: it says after.

    ``entries`` is empty where its contents are none or only half written; then no entry leads there.
    """

    start: int
    size: int
    passed: bool
    entries: tuple[GatedEntry, ...]
    asks: int = 0

    @property
    def word(self) -> int:
        """The address of its own word."""
        return self.start + WORD_OFFSET


def encode_gates(rows: Sequence[tuple[int, int, bytes, bytes]], code: bytes, asks: int) -> bytes:
    """Return the contents of a mapping with its word at before: ``rows`` of address, gate, before and after.

    The gates ask the word at ``asks``.
    """
    body = b"".join(_ROW.pack(*row) for row in rows) + code
    digest = hashlib.sha256(body).digest()
    header = _HEADER.pack(MAGIC, 0, asks, len(rows), HEADER_SIZE + len(body), digest)
    return header.ljust(HEADER_SIZE, b"\0") + body


def find_gates(maps: Sequence[Mapping], memory: Memory) -> tuple[Gates, ...]:
    """Return all gates of a process by rising address. Raises LivegraftError where it is gone meanwhile."""
    found = []
    for mapping in maps:
        if mapping.perms == "r-xp" and mapping.path in ("", MEMFD_PATH) and mapping.size <= _MAX_SIZE:
            data = memory.read(mapping.start, HEADER_SIZE)
            if data.startswith(MAGIC):
                found.append(_decode(mapping, memory.read(mapping.start, mapping.size)))
    # A word that is in none of them is not ours, and what goes on by it cannot be told: no entry counts as led there.
    words = {gates.word: gates.passed for gates in found}
    return tuple(
        replace(gates, passed=words[gates.asks]) if gates.asks in words else replace(gates, entries=())
        for gates in found
    )


def _decode(mapping: Mapping, data: bytes) -> Gates:
    _, word, asks, count, used, digest = _HEADER.unpack_from(data)
    rows_end = HEADER_SIZE + count * ROW_SIZE
    entries: tuple[GatedEntry, ...] = ()
    if rows_end <= used <= len(data) and hashlib.sha256(data[HEADER_SIZE:used]).digest() == digest:
        rows = _ROW.iter_unpack(data[HEADER_SIZE:rows_end])
        entries = tuple(
            GatedEntry(address, jump, before, after)
            for address, gate, before, after in rows
            if (jump := _jump_or_none(address, gate)) is not None
        )
    return Gates(mapping.start, mapping.size, word != 0, entries, asks)


def _jump_or_none(address: int, gate: int) -> bytes | None:
    try:
        return entry_jump(address, gate)
    except TrampolineError:
        return None  # a row that we have not written: no entry can lead there


def seen_through(found: Iterable[Gates], address: int, held: bytes) -> bytes:
    """Return what the bytes ``held`` at an entry do: where they lead to a gate, what that goes on with."""
    for gates in found:
        for entry in gates.entries:
            if entry.address == address and entry.jump == held:
                return entry.after if gates.passed else entry.before
    return held


def jumps_to(found: Iterable[Gates]) -> dict[int, set[bytes]]:
    """Return by entry address the jumps to its gates."""
    jumps: dict[int, set[bytes]] = {}
    for gates in found:
        for entry in gates.entries:
            jumps.setdefault(entry.address, set()).add(entry.jump)
    return jumps


def is_idle(gates: Gates, found: Iterable[Gates], memory: Memory) -> bool:
    """Whether no entry leads to these gates, or to others of those ``found`` that ask their word.

    Raises LivegraftError where the process is gone.
    """
    entries = [
        entry for item in found if item.start == gates.start or item.asks == gates.word for entry in item.entries
    ]
    try:
        held = memory.read_many([(entry.address, len(entry.jump)) for entry in entries])
    except LivegraftError:
        return False  # an entry whose image was unloaded since; these gates are left alone
    return all(entry.jump != data for entry, data in zip(entries, held, strict=True))


def gate_ranges(found: Iterable[Gates]) -> list[ForbiddenRange]:
    """Return where nobody may be while entries change: who is in a gate has not yet gone on."""
    return [ForbiddenRange("a gate", gates.start, gates.start + gates.size) for gates in found]
