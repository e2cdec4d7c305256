"""Random damage to ELF files, from one number each, in words that fit a file of another compiler as well.

An edit says which part of the file (a header, a section by name) it writes to and where in it; so what a fuzz run
found can be kept as a test (gABI: Elf64_Ehdr, Elf64_Phdr, Elf64_Shdr).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

PAGE = 4096
EHDR, PHDR, SHDR = 64, 56, 64
MAX_EDITS = 4

INTERESTING = (
    0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, PAGE - 1, PAGE, 1 << 20, 0x7FFFFFFF, 0x80000000, 0x80000001,
    0xFFFFFFFF, 0x100000000, 1 << 47, 1 << 48, (1 << 62) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1,
)  # fmt: skip
"""Where counts, sizes and addresses wrap, change their sign or become too large to allocate."""

EHDR_FIELDS = {"type": (16, 2), "entry": (24, 8), "phoff": (32, 8), "shoff": (40, 8), "ehsize": (52, 2),
               "phentsize": (54, 2), "phnum": (56, 2), "shentsize": (58, 2), "shnum": (60, 2),
               "shstrndx": (62, 2)}  # fmt: skip
PHDR_FIELDS = {"type": (0, 4), "flags": (4, 4), "offset": (8, 8), "vaddr": (16, 8), "filesz": (32, 8),
               "memsz": (40, 8), "align": (48, 8)}  # fmt: skip
SHDR_FIELDS = {"name": (0, 4), "type": (4, 4), "flags": (8, 8), "addr": (16, 8), "offset": (24, 8), "size": (32, 8),
               "link": (40, 4), "info": (44, 4), "align": (48, 8), "entsize": (56, 8)}  # fmt: skip
ROWS = {".dynsym": 24, ".symtab": 24, ".rela.dyn": 24, ".rela.plt": 24, ".relr.dyn": 8, ".dynamic": 16,
        ".gnu.version": 2, ".gnu.version_r": 16, ".eh_frame_hdr": 8, ".gnu.hash": 4, ".init_array": 8}  # fmt: skip
"""Bytes of a row of a table, so that damage hits whole fields."""


@dataclass(frozen=True)
class Edit:
    """``data`` at ``offset`` of a part: "file", "ehdr", "phdr N", "shdr NAME", or the name of a section."""

    part: str
    offset: int
    data: bytes


@dataclass(frozen=True)
class Mutation:
    """What is done to a file: edits, then a cut (None: none). ``how`` is for people."""

    how: str
    edits: tuple[Edit, ...] = ()
    cut: int | None = None

    def apply(self, raw: bytes) -> bytes:
        """The damaged file. An edit of a part that the file has not does nothing."""
        parts, damaged = parts_of(raw), bytearray(raw)
        for edit in self.edits:
            if edit.part in parts:
                start, size = parts[edit.part]
                at = start + edit.offset % max(1, size)
                damaged[at : at + len(edit.data)] = edit.data[: max(0, len(damaged) - at)]
        return bytes(damaged[: self.cut])


def parts_of(raw: bytes) -> dict[str, tuple[int, int]]:
    """Part -> (file offset, size) of an undamaged file."""
    header = struct.unpack_from("<16sHHIQQQIHHHHHH", raw)
    parts = {"file": (0, len(raw)), "ehdr": (0, EHDR)}
    parts |= {f"phdr {k}": (header[5] + k * PHDR, PHDR) for k in range(header[10])}
    rows = [struct.unpack_from("<IIQQQQ", raw, header[6] + k * SHDR) for k in range(header[12])]
    names = raw[rows[header[13]][4] :]
    for k, (name, kind, _, _, offset, size) in enumerate(rows):
        text = names[name:].split(b"\0", 1)[0].decode("latin-1") or "null"
        parts[f"shdr {text}"] = header[6] + k * SHDR, SHDR
        if kind not in (0, 8) and size:  # SHT_NULL, SHT_NOBITS
            parts[text] = offset, size
    return parts


def mutation(raw: bytes, seed: int) -> Mutation:
    """The damage that belongs to a number."""
    random = Random(seed)
    parts = parts_of(raw)
    kinds = random.choices(list(KINDS), [w for _, w in KINDS.values()], k=random.choice((1, 1, 1, 2, 3, MAX_EDITS)))
    found = [KINDS[kind][0](raw, parts, random) for kind in kinds]
    cuts = [m.cut for m in found if m.cut is not None]
    edits = tuple(e for m in found for e in m.edits)
    return Mutation("; ".join(m.how for m in found), edits, min(cuts) if cuts else None)


def cut_at_page(raw: bytes, parts: dict[str, tuple[int, int]], random: Random) -> Mutation:
    at = random.randrange(0, len(raw), PAGE)
    return Mutation(f"cut at {at:#x}", cut=at)


def cut_anywhere(raw: bytes, parts: dict[str, tuple[int, int]], random: Random) -> Mutation:
    at = random.randrange(0, len(raw))
    return Mutation(f"cut at {at:#x}", cut=at)


def blank_page(raw: bytes, parts: dict[str, tuple[int, int]], random: Random) -> Mutation:
    """As a disk loses a block: zeros, or what another block holds."""
    at = random.randrange(0, len(raw), PAGE)
    source = random.choice((None, random.randrange(0, len(raw), PAGE)))
    data = bytes(PAGE) if source is None else raw[source : source + PAGE]
    return Mutation(f"block {at:#x} overwritten", (Edit("file", at, data),))


def _some_part(parts: dict[str, tuple[int, int]], random: Random) -> str:
    """Headers as often as all sections together."""
    headers = [name for name in parts if name.startswith(("ehdr", "phdr", "shdr"))]
    sections = [name for name in parts if name not in headers and name != "file"]
    return random.choice(random.choice((headers, sections, sections)))


def flip_bytes(raw: bytes, parts: dict[str, tuple[int, int]], random: Random) -> Mutation:
    part = _some_part(parts, random)
    start, size = parts[part]
    edits = []
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        at = random.randrange(size)
        edits.append(Edit(part, at, bytes([raw[start + at] ^ random.randrange(1, 256)])))
    return Mutation(f"{len(edits)} byte(s) of {part} flipped", tuple(edits))


def replace_bytes(raw: bytes, parts: dict[str, tuple[int, int]], random: Random) -> Mutation:
    """Runs of one value: 0x80 makes LEB128 numbers endless, 0xff lengths."""
    part = _some_part(parts, random)
    size = parts[part][1]
    at = random.randrange(size)
    value = random.choice((b"\0", b"\x80", b"\xff", b"\x01", random.randbytes(1)))
    count = min(size - at, random.choice((4, 8, 24, 100, 1000)))
    return Mutation(f"{count} x {value.hex()} in {part}", (Edit(part, at, value * count),))


def interesting_row(raw: bytes, parts: dict[str, tuple[int, int]], random: Random) -> Mutation:
    """A field of a row of a table becomes an extreme number."""
    tables = [name for name in ROWS if name in parts]
    part = random.choice(tables)
    size, width = parts[part][1], random.choice([w for w in (2, 4, 8) if w <= ROWS[part]])
    at = random.randrange(max(1, size // width)) * width
    value = _number(raw, random, width)
    return Mutation(f"{part}+{at:#x} = {value.hex()}", (Edit(part, at, value),))


def _number(raw: bytes, random: Random, width: int) -> bytes:
    value = random.choice((*INTERESTING, len(raw), len(raw) - 1, random.randrange(len(raw)), random.getrandbits(64)))
    return (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")


def _field(
    kind: str, fields: dict[str, tuple[int, int]]
) -> Callable[[bytes, dict[str, tuple[int, int]], Random], Mutation]:
    def change(raw: bytes, parts: dict[str, tuple[int, int]], random: Random) -> Mutation:
        part = random.choice([name for name in parts if name.startswith(kind)])
        name = random.choice(list(fields))
        at, width = fields[name]
        others = [p for p in parts if p.startswith(kind)]
        value = _number(raw, random, width)
        if random.random() < 0.4:  # what another header has there: overlaps, cycles, two of a kind
            start = parts[random.choice(others)][0]
            value = raw[start + at : start + at + width]
        return Mutation(f"{part}.{name} = {value.hex()}", (Edit(part, at, value),))

    return change


def copy_header(raw: bytes, parts: dict[str, tuple[int, int]], random: Random) -> Mutation:
    """Two headers become one, or change places."""
    kind = random.choice(("shdr", "phdr"))
    one, other = (random.choice([name for name in parts if name.startswith(kind)]) for _ in range(2))
    edits = [Edit(one, 0, _content(raw, parts, other))]
    if random.random() < 0.5:
        edits.append(Edit(other, 0, _content(raw, parts, one)))
    return Mutation(f"{other} over {one}", tuple(edits))


def copy_section(raw: bytes, parts: dict[str, tuple[int, int]], random: Random) -> Mutation:
    sections = [name for name in parts if not name.startswith(("ehdr", "phdr", "shdr", "file"))]
    one, other = random.choice(sections), random.choice(sections)
    data = _content(raw, parts, other)[: parts[one][1]]
    return Mutation(f"content of {other} in {one}", (Edit(one, 0, data),))


def _content(raw: bytes, parts: dict[str, tuple[int, int]], name: str) -> bytes:
    start, size = parts[name]
    return raw[start : start + size]


def extended_numbering(raw: bytes, parts: dict[str, tuple[int, int]], random: Random) -> Mutation:
    """Counts that are said to stand in section header 0 (gABI, e_shnum, e_phnum, e_shstrndx)."""
    edits = [
        Edit("ehdr", *random.choice(((60, b"\0\0"), (56, b"\xff\xff"), (62, b"\xff\xff")))),
        Edit("shdr null", random.choice((32, 40, 44)), _number(raw, random, 4)),
    ]
    return Mutation("extended numbering", tuple(edits))


def unwind_length(raw: bytes, parts: dict[str, tuple[int, int]], random: Random) -> Mutation:
    """The length or the CIE pointer of an entry of .eh_frame."""
    if ".eh_frame" not in parts:
        return flip_bytes(raw, parts, random)
    start, size = parts[".eh_frame"]
    entries, at = [], 0
    while at + 8 <= size:
        entries.append(at)
        at += 4 + int.from_bytes(raw[start + at : start + at + 4], "little")
    at = random.choice(entries) + random.choice((0, 4))
    own = (at).to_bytes(4, "little")
    value = random.choice((_number(raw, random, 4), own, b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x04\0\0\0"))
    return Mutation(f".eh_frame entry at {at:#x} = {value.hex()}", (Edit(".eh_frame", at, value),))


KINDS = {
    "page cut": (cut_at_page, 2),
    "cut": (cut_anywhere, 1),
    "block": (blank_page, 3),
    "flip": (flip_bytes, 20),
    "replace": (replace_bytes, 10),
    "row": (interesting_row, 20),
    "ehdr": (_field("ehdr", EHDR_FIELDS), 5),
    "phdr": (_field("phdr", PHDR_FIELDS), 10),
    "shdr": (_field("shdr", SHDR_FIELDS), 16),
    "headers": (copy_header, 4),
    "content": (copy_section, 3),
    "numbering": (extended_numbering, 2),
    "unwind": (unwind_length, 4),
}
