"""A patch object on disk: an ELF shared object that readelf, objdump and gdb can read.

    PT_LOAD segments        the pages of the patch, at the new build's addresses
    .text.N .rodata.N ...   a section header for each of them
    .symtab .strtab         the functions; old_image and the imports as undefined symbols
    .rela.livegraft         every field that leads out, in the psABI's own relocation types
    .note.gnu.build-id      of the *new* build, so that its debug information is found
    .livegraft              everything else, as JSON
    .livegraft.evidence     why each function is in the patch, and what its references are called (not loaded)
    .livegraft.old          the old code of the functions (not loaded)
    .livegraft.digest       SHA-256 of the whole file, this field taken as zeros

Written by us, since LIEF 1.0 cannot make a file from nothing nor keep the addresses that it is asked for
(docs/architecture.md, D12); pyelftools reads every file back before it gets its name, as a second opinion.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from elfdiff.errors import BadInput
from elfdiff.images.elffile import open_regular
from elfdiff.images.image import PAGE, RELA_DTYPE, SYMBOL_DTYPE
from elfdiff.patches.patchcheck import SegmentHead, array, decoded, decoded_all, natural, require_sound, text
from elfdiff.patches.secondopinion import confirm
from elfdiff.patchobject import (
    FIRST_IMPORT,
    FORMAT_VERSION,
    RELOCATION_DTYPE,
    Build,
    CheckedRange,
    Finding,
    IdleCode,
    Import,
    LineOnly,
    OldCode,
    PatchFunction,
    PatchObject,
    RemovedFunction,
    Segment,
)

DIGEST_SIZE = 32
MAX_FILE = 1 << 30
_MAX_NAME = 64
MAGIC = "livegraft"
EVIDENCE_SECTION, OLD_CODE_SECTION = ".livegraft.evidence", ".livegraft.old"
OLD_IMAGE_SYMBOL, PATCH_IMAGE_SYMBOL = "livegraft_old_image", "livegraft_patch_image"

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_SHT = {"PROGBITS": 1, "SYMTAB": 2, "STRTAB": 3, "RELA": 4, "NOTE": 7}


@dataclass
class _Section:
    name: str
    type: str
    data: bytes
    address: int = 0
    size: int | None = None  # in memory, where it differs from len(data)
    flags: int = 0
    link: int = 0
    info: int = 0
    align: int = 1
    entry_size: int = 0
    offset: int = 0


# -- writing ----------------------------------------------------------------------------------------------------


def require_output(path: Path, inputs: Sequence[Path], what: str = "patch object") -> None:
    """Refuse what could not be written after the work, and what it must not replace. Raises BadInput."""
    hint = f"name a new file, or an old {what}, in a folder that exists and that you may write to"
    try:
        if not path.parent.is_dir():
            raise BadInput(f"{path}: cannot write the {what}", why=f"{path.parent} is no folder", next_step=hint)
        if path.exists() and not path.is_file():
            raise BadInput(f"{path}: cannot write the {what}", why="this is no regular file", next_step=hint)
        for one in inputs:
            if path.exists() and one.exists() and path.samefile(one):
                raise BadInput(f"{path}: the {what} would replace {one}", why="both are one file", next_step=hint)
    except OSError as error:
        raise BadInput(f"{path}: cannot write the {what}", why=str(error), next_step=hint) from error


def write_patch(patch: PatchObject, path: Path) -> PatchObject:
    """Write the file whole or not at all; returns the patch with its id. Raises LivegraftError."""
    raw = _serialise(patch)
    require_output(path, ())  # a device would be replaced, too
    hint = "name a folder that exists and that you may write to"
    write_whole(path, raw, "patch object", hint, lambda temporary: confirm(patch, temporary))
    return replace(patch, id=hashlib.sha256(_without_digest(raw)).hexdigest())


def write_whole(path: Path, raw: bytes, what: str, hint: str, check: Callable[[Path], None] | None = None) -> None:
    """Write a file whole or not at all; ``check`` sees it before it has its name. BadInput has the ``hint``."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".livegraft-", delete=False) as stream:
            temporary = Path(stream.name)
        try:
            temporary.write_bytes(raw)
            if check is not None:
                check(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise BadInput(f"{path}: cannot write the {what}: {error.strerror}", why=str(error), next_step=hint) from error


def _serialise(patch: PatchObject) -> bytes:
    symbols, strings = _symbols(patch)
    loads = [_load_section(k, segment) for k, segment in enumerate(patch.segments)]
    symtab_index = len(loads) + 1
    tables = [
        _Section(".symtab", "SYMTAB", symbols, link=symtab_index + 1, info=1, align=8, entry_size=24),
        _Section(".strtab", "STRTAB", strings),
        _Section(".rela.livegraft", "RELA", _relocations(patch), link=symtab_index, align=8, entry_size=24),
        _Section(".note.gnu.build-id", "NOTE", _build_id_note(patch.new.build_id), align=4),
        _Section(".livegraft", "PROGBITS", _metadata(patch)),
        *(_Section(name, "PROGBITS", data) for name, data in _explanation(patch).items() if data),
        _Section(".livegraft.digest", "PROGBITS", bytes(DIGEST_SIZE)),
    ]
    sections = loads + tables
    names = b"\0" + b"".join(s.name.encode() + b"\0" for s in sections) + b".shstrtab\0"
    sections.append(_Section(".shstrtab", "STRTAB", names))
    body = _place(sections, len(loads))
    header_offset = (len(body) + 7) & -8
    body += bytes(header_offset - len(body)) + _section_headers(sections)
    body[: _EHDR.size] = _EHDR.pack(
        b"\x7fELF\x02\x01\x01" + bytes(9), 3, 62, 1, 0, _EHDR.size, header_offset, 0,
        _EHDR.size, _PHDR.size, len(loads), _SHDR.size, len(sections) + 1, len(sections),
    )  # fmt: skip
    digest = hashlib.sha256(bytes(body)).digest()
    at = next(s.offset for s in sections if s.name == ".livegraft.digest")
    body[at : at + DIGEST_SIZE] = digest
    return bytes(body)


def _load_section(number: int, segment: Segment) -> _Section:
    kind, flags = ".rodata", 2  # SHF_ALLOC
    if segment.flags & 1:
        kind, flags = ".text", 2 | 4
    elif segment.flags & 2:
        kind, flags = ".data", 2 | 1
    return _Section(
        f"{kind}.{number}", "PROGBITS", segment.data.ljust(segment.size, b"\0"), segment.vaddr, flags=flags, align=PAGE
    )


def _place(sections: list[_Section], loads: int) -> bytearray:
    """File headers, program headers and contents; sets the sections' offsets. Offset = address modulo a page."""
    body = bytearray(_EHDR.size + _PHDR.size * loads)
    for number, section in enumerate(sections):
        align = PAGE if number < loads else max(section.align, 1)
        body += bytes(-len(body) % align)
        section.offset = len(body)
        body += section.data
    for number, section in enumerate(sections[:loads]):
        flags = 4 | (1 if section.flags & 4 else 0) | (2 if section.flags & 1 else 0)
        _PHDR.pack_into(
            body, _EHDR.size + number * _PHDR.size,
            1, flags, section.offset, section.address, section.address, len(section.data), len(section.data), PAGE,
        )  # fmt: skip
    return body


def _section_headers(sections: list[_Section]) -> bytes:
    rows = [bytes(_SHDR.size)]
    at = 1
    for s in sections:
        rows.append(
            _SHDR.pack(
                at, _SHT[s.type], s.flags, s.address, s.offset, len(s.data), s.link, s.info, s.align, s.entry_size
            )
        )
        at += len(s.name) + 1
    return b"".join(rows)


def _symbols(patch: PatchObject) -> tuple[bytes, bytes]:
    """The symbol table: null, the two images, the imports (all undefined), then the functions."""
    undefined = [OLD_IMAGE_SYMBOL, PATCH_IMAGE_SYMBOL]
    undefined += [f"{i.name}@{i.version}" if i.version else i.name for i in patch.imports]
    strings = bytearray(b"\0")
    table = np.zeros(1 + len(undefined) + len(patch.functions), SYMBOL_DTYPE)
    rows: list[tuple[str, int, int, int, int]] = [(name, 0x10, 0, 0, 0) for name in undefined]  # STB_GLOBAL
    for function in patch.functions:
        section = next(k for k, s in enumerate(patch.segments) if s.vaddr <= function.new_start < s.vaddr + s.size)
        rows.append((function.name, 0x12, section + 1, function.new_start, function.new_size))  # STT_FUNC
    for index, (name, info, section, value, size) in enumerate(rows, 1):
        table[index] = (len(strings), info, 0, section, value, size)
        strings += name.encode("utf-8", "surrogateescape") + b"\0"
    return table.tobytes(), bytes(strings)


def _relocations(patch: PatchObject) -> bytes:
    table = np.zeros(len(patch.relocations), RELA_DTYPE)
    table["offset"] = patch.relocations["place"]
    table["addend"] = patch.relocations["addend"]
    symbol = patch.relocations["symbol"].astype(np.uint64) + np.uint64(1)  # symbol 0 of the file is the null one
    table["info"] = (symbol << np.uint64(32)) | patch.relocations["type"].astype(np.uint64)
    return table.tobytes()


def _explanation(patch: PatchObject) -> dict[str, bytes]:
    """Sections that nobody needs to apply the patch; a reader that does not know them passes them over."""
    return {EVIDENCE_SECTION: patch.evidence, OLD_CODE_SECTION: patch.old_code}


def _build_id_note(build_id: str) -> bytes:
    raw = bytes.fromhex(build_id)
    return struct.pack("<III", 4, len(raw), 3) + b"GNU\0" + raw + bytes(-len(raw) % 4)


def _metadata(patch: PatchObject) -> bytes:
    return json.dumps(
        {
            "magic": MAGIC,
            "format": FORMAT_VERSION,
            "tool": patch.tool_version,
            "old": asdict(patch.old),
            "new": asdict(patch.new),
            "segments": [{"vaddr": s.vaddr, "size": s.size, "flags": s.flags} for s in patch.segments],
            "functions": [vars(f) for f in patch.functions],
            "imports": [vars(i) for i in patch.imports],
            "checked": [vars(c) for c in patch.checked],
            "findings": [asdict(f) for f in patch.findings],
            "removed": [vars(f) for f in patch.removed],
            "line_only": [vars(f) for f in patch.line_only],
            "eh_frame_hdr": patch.eh_frame_hdr,
            "needed": patch.needed,
            "exceptions": patch.exceptions,
            "old_codes": [vars(c) for c in patch.old_codes],
            "idle": [vars(c) for c in patch.idle],
        },
        separators=(",", ":"),
    ).encode()


# -- reading ----------------------------------------------------------------------------------------------------


def read_patch(path: Path) -> PatchObject:
    """Read and verify a patch object. Raises BadInput for anything that is not one, whole and of this format."""
    raw = _read(path)
    sections = _sections(path, raw)
    if ".livegraft" not in sections or ".livegraft.digest" not in sections:
        raise _not_a_patch(path, "it is an ELF file without livegraft's sections")
    identity = hashlib.sha256(_without_digest(raw))
    at, size = sections[".livegraft.digest"]
    if size != DIGEST_SIZE or raw[at : at + size] != identity.digest():
        raise BadInput(
            f"{path}: the patch object is damaged",
            why="its checksum is not that of its content",
            next_step="copy it again, or make it again: livegraft diff OLD NEW -o PATCH",
        )
    at, size = sections[".livegraft"]
    try:
        meta = json.loads(raw[at : at + size])
        _require_format(path, meta)
        patch = _decode(raw, meta, sections, identity.hexdigest())
        require_sound(patch)
    except (KeyError, ValueError, RecursionError) as error:  # a right digest is no signature
        raise _not_a_patch(path, f"its description is not of this format: {error!r:.300}") from error
    return patch


def _read(path: Path) -> bytes:
    hint = "name a patch object made by: livegraft diff OLD NEW -o PATCH"
    with open_regular(path, hint) as (descriptor, size):
        if size > MAX_FILE:
            raise _not_a_patch(path, f"it has {size} bytes; none larger than {MAX_FILE} is believed")
        with open(descriptor, "rb", closefd=False) as stream:
            return stream.read(MAX_FILE)


def _not_a_patch(path: Path, why: str) -> BadInput:
    return BadInput(
        f"{path}: not a livegraft patch object",
        why=why,
        next_step="name a file made by: livegraft diff OLD NEW -o PATCH",
    )


def _sections(path: Path, raw: bytes) -> dict[str, tuple[int, int]]:
    """Section name -> (file offset, size), checked against the file's length."""
    if not raw:
        raise _not_a_patch(path, "the file is empty")
    if len(raw) < _EHDR.size or raw[:4] != b"\x7fELF":
        raise _not_a_patch(path, "it is no ELF file")
    header = _EHDR.unpack_from(raw)
    table, count, names_index = header[6], header[12], header[13]
    if header[11] != _SHDR.size or table + count * _SHDR.size > len(raw) or names_index >= count:
        raise _not_a_patch(path, "the file is cut short: its section headers lie behind its end")
    rows = [_SHDR.unpack_from(raw, table + k * _SHDR.size) for k in range(count)]
    if any(row[4] + row[5] > len(raw) for row in rows):
        raise _not_a_patch(path, "the file is cut short: a section lies behind its end")
    names = raw[rows[names_index][4] :][: rows[names_index][5]]
    found: dict[str, tuple[int, int]] = {}
    for row in rows[1:]:
        end = names.find(b"\0", row[0], row[0] + _MAX_NAME)
        name = names[row[0] : max(end, row[0])].decode("latin-1")
        if not name or name in found:
            raise _not_a_patch(path, f"a section has no name, or another's: {name!r}")
        found[name] = row[4], row[5]
    return found


def _without_digest(raw: bytes) -> bytes:
    at, size = _sections(Path("patch"), raw)[".livegraft.digest"]
    return raw[:at] + bytes(size) + raw[at + size :]


def _require_format(path: Path, meta: object) -> None:
    if not isinstance(meta, dict):
        raise ValueError(f"{meta!r:.80}")
    if meta.get("magic") != MAGIC or meta.get("format") != FORMAT_VERSION:
        raise BadInput(
            f"{path}: the patch object was made by another version of livegraft",
            why=f"format {meta.get('format')!r:.80} by version {meta.get('tool')!r:.80}; "
            f"this one reads format {FORMAT_VERSION}",
            next_step="make it again with this version: livegraft diff OLD NEW -o PATCH",
        )


def _decode(raw: bytes, meta: dict[str, Any], sections: dict[str, tuple[int, int]], identity: str) -> PatchObject:
    contents = [
        raw[a : a + n] for name, (a, n) in sections.items() if name.startswith((".text.", ".rodata.", ".data."))
    ]
    at, size = sections[".rela.livegraft"]
    table = np.frombuffer(raw[at : at + size], RELA_DTYPE)
    relocations = np.zeros(len(table), RELOCATION_DTYPE)
    relocations["place"], relocations["addend"] = table["offset"], table["addend"]
    relocations["type"] = table["info"] & np.uint64(0xFFFFFFFF)
    relocations["symbol"] = (table["info"] >> np.uint64(32)) - np.uint64(1)
    return PatchObject(
        id=identity,
        tool_version=text("tool", meta["tool"]),
        old=decoded(Build, meta["old"]),
        new=decoded(Build, meta["new"]),
        segments=tuple(
            _segment(description, data)
            for description, data in zip(array("segments", meta["segments"]), contents, strict=True)
        ),
        functions=decoded_all(PatchFunction, meta["functions"]),
        imports=decoded_all(Import, meta["imports"]),
        relocations=relocations,
        checked=decoded_all(CheckedRange, meta["checked"]),
        findings=decoded_all(Finding, meta["findings"]),
        removed=decoded_all(RemovedFunction, meta["removed"]),
        line_only=decoded_all(LineOnly, meta["line_only"]),
        eh_frame_hdr=None if meta["eh_frame_hdr"] is None else natural("eh_frame_hdr", meta["eh_frame_hdr"]),
        needed=tuple(text("needed", name) for name in array("needed", meta["needed"])),
        evidence=_optional(raw, sections, EVIDENCE_SECTION),
        old_code=_optional(raw, sections, OLD_CODE_SECTION),
        exceptions=bool(meta["exceptions"]),
        old_codes=decoded_all(OldCode, meta["old_codes"]),
        idle=decoded_all(IdleCode, meta["idle"]),
    )


def _segment(description: object, data: bytes) -> Segment:
    """Its content is the section of the same place in the file, trailing zeros left out."""
    head = decoded(SegmentHead, description)
    if head.size != len(data):
        raise ValueError(f"the segment at {head.vaddr:#x} has {len(data)} bytes, not {head.size}")
    return Segment(head.vaddr, head.size, head.flags, data.rstrip(b"\0"))


def _optional(raw: bytes, sections: dict[str, tuple[int, int]], name: str) -> bytes:
    at, size = sections.get(name, (0, 0))
    return raw[at : at + size]


def symbol_name(patch: PatchObject, symbol: int) -> str:
    """What a relocation's symbol is called."""
    if symbol >= FIRST_IMPORT:
        wanted = patch.imports[symbol - FIRST_IMPORT]
        return f"{wanted.name}@{wanted.version}" if wanted.version else wanted.name
    return (OLD_IMAGE_SYMBOL, PATCH_IMAGE_SYMBOL)[symbol]
