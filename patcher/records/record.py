"""The record: what a patched process carries, so that it can be read, undone or finished by whoever comes
next.

A record is one private writable mapping of the target, laid out as

    0   magic, 8 bytes
    8   format version, u32; bytes of the record, u32
    16  state word, u64: state in the low half, offset of the slot in force in the high half
    24  zeros up to 64
    64  two slots of equal size, each: length u64, SHA-256 of the JSON text, the JSON text

The state word is one aligned 8-byte store, so that a death of the patcher leaves the old or the new value. A
slot is written only while it is not in force. Order of states:

    prepared -> applying -> applied -> reverting -> reverted
                               `-> replaced (by another patch of the same image)

From reverted and replaced a record may go to applying again. In applying and reverting, entries may hold
either of the journal's values: the command that finds such a record (its patcher was killed) finishes or
undoes it. In prepared no entry was ever changed.

Patches that were put in force together are a set: their records have one ``set_id``, all state words are written before
the first entry and again after the last, and one transaction takes all of them out of force. So where a patcher has
died between two state words, the others tell what it had done (``search``).

Everything read here is untrusted: the target can write it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from elfdiff.errors import LivegraftError
from elfdiff.patchobject import Build

MAGIC = b"LVGRAFT\x01"
FORMAT_VERSION = 6
STATE_OFFSET = 16
FIRST_SLOT = 64
"""Offset of the slot that a new record has in force."""
_HEADER = struct.Struct("<8sIIQ")
_HEADER_SIZE = FIRST_SLOT
_SLOT_HEADER = struct.Struct("<Q32s")
_PAGE = 4096


class State(IntEnum):
    """Where a record stands; the module's text has the order."""

    PREPARED = 1
    APPLYING = 2
    APPLIED = 3
    REVERTING = 4
    REVERTED = 5
    REPLACED = 6


INTERRUPTED = frozenset({State.APPLYING, State.REVERTING})
"""States that only a killed patcher leaves behind."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One entry address and the bytes there: in the file, before this transaction, after it. Equal
    lengths."""

    address: int
    pristine: bytes
    before: bytes
    after: bytes


@dataclass(frozen=True, slots=True)
class RecordedSegment:
    """One mapping of the patch: absolute start, size in bytes, PF_* flags, BLAKE2b-128 of its first bytes."""

    start: int
    size: int
    flags: int
    digest: str

    @property
    def span(self) -> tuple[int, int]:
        """Address and size, as reading and unmapping take them."""
        return self.start, self.size


@dataclass(frozen=True, slots=True)
class RecordedFunction:
    """One patched function; addresses are absolute, ``old_*`` are None for a function that is new."""

    name: str
    old_start: int | None
    old_size: int | None
    new_start: int
    new_size: int
    entry_jump: bool


@dataclass(frozen=True, slots=True)
class RecordedLookup:
    """One slot that leads to a stand-in of the patch (``lookups``); addresses are absolute.

    ``build_id`` and ``bias`` are those of the image that the slot is in. ``before`` is what the slot held when the
    patch was applied, ``passes_to`` the function to which the stand-in passes on what it does not know: the same,
    unless the dynamic linker had not bound the slot yet.
    """

    symbol: str
    slot: int
    build_id: str
    bias: int
    before: int
    passes_to: int
    stand_in: int


@dataclass(frozen=True, slots=True)
class KeptCode:
    """A piece of old code, by the name of its function: absolute start, size in bytes."""

    name: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What a slot says. ``instance`` names one transaction; ``replaces`` are the instances that it put aside.

    ``time`` is in seconds since the epoch; ``sealed`` says that the mappings come from a memfd and not from
    anonymous memory. ``lifted`` are the codes of findings for which the patch would have been refused without --allow;
    ``kept`` is what --keep-live named. ``started`` is when the process that was patched had been started, in clock
    ticks since boot: a child forked by it carries the same record and was started later. ``removed`` is old code that
    the new build no longer has, and that must be idle when the patch comes into force; ``idle`` is code that does not
    change, and that must be idle both then and when it goes out of force. ``set_id`` is common to the
    ``set_size`` patches that came into force together, empty for one alone.
    """

    patch: str
    instance: str
    tool_version: str
    time: int
    sealed: bool
    old: Build
    old_bias: int
    new: Build
    new_bias: int
    eh_frame_hdr: int | None
    segments: tuple[RecordedSegment, ...]
    functions: tuple[RecordedFunction, ...]
    journal: tuple[JournalEntry, ...]
    replaces: tuple[str, ...]
    lifted: tuple[str, ...] = ()
    lookups: tuple[RecordedLookup, ...] = ()
    kept: tuple[KeptCode, ...] = ()
    started: int = 0
    removed: tuple[KeptCode, ...] = ()
    idle: tuple[KeptCode, ...] = ()
    set_id: str = ""
    set_size: int = 1


@dataclass(frozen=True, slots=True)
class Record:
    """A record found in a process: its address and size in bytes, its state and what the slot in force says.

    ``written`` is the state that its state word has; ``state`` differs from it where a patcher died after it
    had applied another patch and before it had put this one aside, or between two state words of a set.
    """

    address: int
    size: int
    written: State
    state: State
    slot: int
    contents: Contents

    @property
    def short_id(self) -> str:
        """The first twelve digits of the patch id, as people type it."""
        return self.contents.patch[:12]

    @property
    def interrupted(self) -> bool:
        """Whether a patcher died between its first and its last write."""
        return self.state in INTERRUPTED


@dataclass(frozen=True, slots=True)
class DamagedRecord:
    """A mapping that begins like a record and is none."""

    address: int
    why: str


def segment_digest(data: bytes) -> str:
    """Return BLAKE2b-128 of the first bytes of a mapping, lower-case hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def permissions(flags: int) -> str:
    """Return how ``/proc/PID/maps`` shows a private mapping with PF_* flags (X=1, W=2, R=4)."""
    return "".join(letter if flags & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1))) + "p"


def state_word(state: State, slot: int) -> bytes:
    """Return the 8 bytes at STATE_OFFSET that put ``slot`` (an offset into the record) in force with a
    state."""
    return struct.pack("<Q", slot << 32 | state)


def encode_slot(contents: Contents) -> bytes:
    """Return a slot: length, digest, JSON."""
    text = json.dumps(asdict(contents), default=bytes.hex, separators=(",", ":")).encode("ascii")
    return _SLOT_HEADER.pack(len(text), hashlib.sha256(text).digest()) + text


def record_size(contents: Contents) -> int:
    """Return the size in bytes, whole pages, of a new record that starts with these contents.

    Leaves room for later contents of the same patch, which differ in what they replace.
    """
    slot = -(-len(encode_slot(contents)) // _PAGE) * _PAGE + _PAGE
    return 2 * slot


def encode_record(contents: Contents) -> bytes:
    """Return the bytes of a new record, ``record_size`` long, in the state prepared."""
    size = record_size(contents)
    header = _HEADER.pack(MAGIC, FORMAT_VERSION, size, State.PREPARED | _HEADER_SIZE << 32)
    body = header.ljust(_HEADER_SIZE, b"\0") + encode_slot(contents)
    return body.ljust(size, b"\0")


def free_slot(record: Record, data: bytes) -> int | None:
    """Return the offset at which the encoded slot ``data`` may be written, or None where it does not fit."""
    first, second, capacity = _slots(record.size)
    if len(data) > capacity:
        return None
    return second if record.slot == first else first


def _slots(size: int) -> tuple[int, int, int]:
    capacity = (size - _HEADER_SIZE) // 2 // 8 * 8
    return _HEADER_SIZE, _HEADER_SIZE + capacity, capacity


def decode_record(data: bytes, address: int) -> Record:
    """Return the record whose mapping begins with ``data``.

    Raises LivegraftError where anything in it is not as this module writes it.
    """
    if len(data) < _HEADER_SIZE or not data.startswith(MAGIC):
        raise _damaged(address, "it has no header")
    _, version, size, word = _HEADER.unpack_from(data)
    if version != FORMAT_VERSION:
        raise _damaged(address, f"its format is {version}, this livegraft knows {FORMAT_VERSION}")
    if size != len(data) or size % _PAGE:
        raise _damaged(address, f"its header says {size} bytes, the mapping has {len(data)}")
    slot, state = word >> 32, word & 0xFFFFFFFF
    first, second, capacity = _slots(size)
    if slot not in (first, second) or state not in list(State):
        raise _damaged(address, f"its state word is {word:#x}")
    length, digest = _SLOT_HEADER.unpack_from(data, slot)
    if length > capacity - _SLOT_HEADER.size:
        raise _damaged(address, f"its text is {length} bytes long in a slot of {capacity}")
    start = slot + _SLOT_HEADER.size
    text = data[start : start + length]
    if hashlib.sha256(text).digest() != digest:
        raise _damaged(address, "its text does not have its digest")
    return Record(address, size, State(state), State(state), slot, _decode_contents(text, address))


def _damaged(address: int, why: str) -> LivegraftError:
    return LivegraftError(f"the record at {address:#x} is damaged", why=why)


def _decode_contents(text: bytes, address: int) -> Contents:
    try:
        value = json.loads(text)
        contents = _contents(value)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(address, f"its text is not understood: {error!r}") from error
    for entry in contents.journal:
        if not 0 < len(entry.pristine) == len(entry.before) == len(entry.after):
            raise _damaged(address, f"the journal of {entry.address:#x} has bytes of unequal lengths")
    return contents


def _contents(value: Any) -> Contents:
    """Build Contents out of parsed JSON; raises TypeError, KeyError or ValueError on anything unexpected."""
    fields = _fields(value, Contents)
    return Contents(
        patch=_hex(fields["patch"]),
        instance=_hex(fields["instance"]),
        tool_version=_text(fields["tool_version"]),
        time=_number(fields["time"]),
        sealed=_boolean(fields["sealed"]),
        old=_build(fields["old"]),
        old_bias=_signed(fields["old_bias"]),
        new=_build(fields["new"]),
        new_bias=_signed(fields["new_bias"]),
        eh_frame_hdr=_optional(fields["eh_frame_hdr"]),
        segments=tuple(_segment(item) for item in _items(fields["segments"])),
        functions=tuple(_function(item) for item in _items(fields["functions"])),
        journal=tuple(_journal_entry(item) for item in _items(fields["journal"])),
        replaces=tuple(_hex(item) for item in _items(fields["replaces"])),
        lifted=tuple(_text(item) for item in _items(fields["lifted"])),
        lookups=tuple(_lookup(item) for item in _items(fields["lookups"])),
        kept=tuple(_kept(item) for item in _items(fields["kept"])),
        started=_number(fields["started"]),
        removed=tuple(_kept(item) for item in _items(fields["removed"])),
        idle=tuple(_kept(item) for item in _items(fields["idle"])),
        set_id=_hex(fields["set_id"]),
        set_size=_number(fields["set_size"]),
    )


def _fields(value: Any, kind: type) -> dict[str, Any]:
    names = set(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    if not isinstance(value, dict) or set(value) != names:
        raise ValueError(f"{kind.__name__} has other fields")
    return value


def _items(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _hex(value: Any) -> str:
    return bytes.fromhex(_text(value)).hex()


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is not true or false")
    return value


def _signed(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -(1 << 63) <= value < 1 << 63:
        raise TypeError(f"{value!r} is not a 64-bit number")
    return value


def _number(value: Any) -> int:
    if _signed(value) < 0:
        raise ValueError(f"{value!r} is negative")
    return int(value)


def _optional(value: Any) -> int | None:
    return None if value is None else _number(value)


def _build(value: Any) -> Build:
    fields = _fields(value, Build)
    return Build(
        name=_text(fields["name"]),
        build_id=_hex(fields["build_id"]),
        low=_number(fields["low"]),
        high=_number(fields["high"]),
        fixed_address=_boolean(fields["fixed_address"]),
    )


def _segment(value: Any) -> RecordedSegment:
    fields = _fields(value, RecordedSegment)
    segment = RecordedSegment(
        start=_number(fields["start"]),
        size=_number(fields["size"]),
        flags=_number(fields["flags"]),
        digest=_hex(fields["digest"]),
    )
    if segment.start % _PAGE or segment.size % _PAGE or not segment.size:
        raise ValueError(f"the segment at {segment.start:#x} is not made of pages")
    return segment


def _function(value: Any) -> RecordedFunction:
    fields = _fields(value, RecordedFunction)
    return RecordedFunction(
        name=_text(fields["name"]),
        old_start=_optional(fields["old_start"]),
        old_size=_optional(fields["old_size"]),
        new_start=_number(fields["new_start"]),
        new_size=_number(fields["new_size"]),
        entry_jump=_boolean(fields["entry_jump"]),
    )


def _journal_entry(value: Any) -> JournalEntry:
    fields = _fields(value, JournalEntry)
    return JournalEntry(
        address=_number(fields["address"]),
        pristine=bytes.fromhex(_text(fields["pristine"])),
        before=bytes.fromhex(_text(fields["before"])),
        after=bytes.fromhex(_text(fields["after"])),
    )


def _lookup(value: Any) -> RecordedLookup:
    fields = _fields(value, RecordedLookup)
    return RecordedLookup(
        symbol=_text(fields["symbol"]),
        slot=_number(fields["slot"]),
        build_id=_hex(fields["build_id"]),
        bias=_signed(fields["bias"]),
        before=_number(fields["before"]),
        passes_to=_number(fields["passes_to"]),
        stand_in=_number(fields["stand_in"]),
    )


def _kept(value: Any) -> KeptCode:
    fields = _fields(value, KeptCode)
    return KeptCode(_text(fields["name"]), _number(fields["start"]), _number(fields["size"]))
