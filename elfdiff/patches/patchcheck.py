"""What must hold in every patch object that is read, since a right checksum is no signature.

A patch object is written into a running program; what it says of itself is compared with itself before anything
else is done with it. Raises ``ValueError`` with the reason; ``patchfile`` makes an error of our tree of it.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from elfdiff.images.elffile import USER_SPACE
from elfdiff.images.image import PAGE
from elfdiff.patchobject import FIRST_IMPORT, Build, PatchObject, RelocationType, Segment

Value = TypeVar("Value")

_WIDTHS = {RelocationType.ABS64: 8, RelocationType.PC32: 4, RelocationType.ABS32: 4, RelocationType.ABS32S: 4}
_DIGEST_SIZE = 16
_EXECUTE, _WRITE = 1, 2
_NUMBER_END = 1 << 63


@dataclass(frozen=True)
class SegmentHead:
    """What the description says of a segment; its bytes are a section of the file."""

    vaddr: int
    size: int
    flags: int


def decoded(kind: type[Value], description: object) -> Value:
    """A dataclass of ``patchobject`` from its JSON object: every field is there, of its type, and no other."""
    return _decoded(kind, _field_types(kind), description)


def _decoded(kind: type[Value], expected: dict[str, Any], description: object) -> Value:
    if not isinstance(description, dict):
        raise ValueError(f"{kind.__name__}: {description!r:.80}")
    if description.keys() != expected.keys():
        odd = sorted(description.keys() ^ expected.keys())
        raise ValueError(f"{kind.__name__}: field {odd[0]!r:.80}")
    return kind(**{name: _checked(f"{kind.__name__}.{name}", expected[name], description[name]) for name in expected})


def decoded_all(kind: type[Value], descriptions: object) -> tuple[Value, ...]:
    """One for each element of a JSON array."""
    types_of_fields = _field_types(kind)
    return tuple(_decoded(kind, types_of_fields, one) for one in array(kind.__name__, descriptions))


def array(name: str, value: object) -> list[Any]:
    """A JSON array."""
    if not isinstance(value, list):
        raise ValueError(f"{name}: {value!r:.80} where an array should be")
    return value


def text(name: str, value: object) -> str:
    """A JSON string."""
    checked: str = _checked(name, str, value)
    return checked


def natural(name: str, value: object) -> int:
    """A JSON number that is an address or a size."""
    checked: int = _checked(name, int, value)
    return checked


def _field_types(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _checked(name: str, wanted: Any, value: object) -> Any:
    """The value, if it is of the wanted type: int (not negative, 63 bits), bool, str, enum, tuple of one, or None."""
    if isinstance(wanted, types.UnionType):
        (other,) = (one for one in typing.get_args(wanted) if one is not type(None))
        return None if value is None else _checked(name, other, value)
    if typing.get_origin(wanted) is tuple:
        return tuple(_checked(name, typing.get_args(wanted)[0], one) for one in array(name, value))
    if isinstance(wanted, type) and issubclass(wanted, StrEnum) and isinstance(value, str):
        return wanted(value)
    if type(value) is not wanted or (isinstance(value, int) and not 0 <= value < _NUMBER_END):
        raise ValueError(f"{name}: {value!r:.80}")
    return value


def require_sound(patch: PatchObject) -> None:
    """Addresses lie where they must, ranges do not overlap, every number that leads somewhere leads there."""
    for build in (patch.old, patch.new):
        _require_build(build)
    _require_segments(patch.segments)
    code = [s for s in patch.segments if s.flags & _EXECUTE]
    for function in patch.functions:
        _require(_inside(function.new_start, function.new_size, code), f"{function.name} lies outside the patch's code")
    for name, start, size in _old_ranges(patch):
        _require(patch.old.low <= start and start + size <= patch.old.high, f"{name} lies outside the old build")
    for checked in patch.checked:
        _require(len(bytes.fromhex(checked.digest)) == _DIGEST_SIZE, f"the digest of {checked.name}")
    own = {f.old_start for f in patch.functions} | {f.start for f in patch.removed}
    for item in patch.old_codes:
        _require(bool(item.parts) and own.issuperset(item.parts), f"the parts of {item.name} are not the patch's")
    header = patch.eh_frame_hdr
    _require(header is None or _inside(header, 4, patch.segments), "its unwind table lies outside the patch")
    _require_relocations(patch)


def _old_ranges(patch: PatchObject) -> Iterator[tuple[str, int, int]]:
    """(name, start, size) of everything that the patch says of the old build."""
    for function in patch.functions:
        if function.old_start is not None and function.old_size is not None:
            yield function.name, function.old_start, function.old_size
        else:
            whole = function.old_start is None and function.old_size is None and not function.entry_jump
            _require(whole, f"{function.name} has half an origin")
    yield from ((one.name, one.start, one.size) for one in patch.removed)
    for one in patch.idle:
        _require(one.size > 0, f"{one.name} has no code")
        yield one.name, one.start, one.size
    yield from ((one.name, one.start, one.size) for one in patch.checked)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _require_build(build: Build) -> None:
    _require(len(bytes.fromhex(build.build_id)) > 0, f"the build-id {build.build_id!r:.80}")
    whole = build.low % PAGE == build.high % PAGE == 0
    _require(whole and build.low < build.high <= USER_SPACE, f"a build from {build.low:#x} to {build.high:#x}")


def _require_segments(segments: tuple[Segment, ...]) -> None:
    _require(bool(segments), "it has no segments")
    for segment in segments:
        what = f"the segment at {segment.vaddr:#x} (+{segment.size:#x}, flags {segment.flags:#x})"
        _require(segment.vaddr % PAGE == segment.size % PAGE == 0 and segment.size > 0, what)
        _require(segment.vaddr + segment.size <= USER_SPACE and segment.flags < 8, what)
        _require(segment.flags & (_EXECUTE | _WRITE) != (_EXECUTE | _WRITE), what)
    for one, other in pairwise(segments):
        _require(one.vaddr + one.size <= other.vaddr, f"the segments at {one.vaddr:#x} and {other.vaddr:#x} overlap")


def _inside(start: int, size: int, segments: Iterable[Segment]) -> bool:
    return size > 0 and any(s.vaddr <= start and start + size <= s.vaddr + s.size for s in segments)


def _require_relocations(patch: PatchObject) -> None:
    table = patch.relocations
    _require(bool(np.isin(table["type"], list(_WIDTHS)).all()), "a relocation of an unknown type")
    _require(bool((table["symbol"] < FIRST_IMPORT + len(patch.imports)).all()), "a relocation to an unknown symbol")
    widths = np.where(table["type"] == RelocationType.ABS64, 8, 4).astype(np.uint64)
    _require(bool((table["place"] < USER_SPACE).all()), "a relocation outside the patch")
    ends = table["place"] + widths
    _require(bool((ends[:-1] <= table["place"][1:]).all()), "relocations that overlap or are out of order")
    starts = np.array([s.vaddr for s in patch.segments], np.uint64)
    limits = np.array([s.vaddr + s.size for s in patch.segments], np.uint64)
    which = np.searchsorted(starts, table["place"], "right") - 1
    outside = (which < 0) | (ends > limits[np.clip(which, 0, None)])
    _require(not bool(outside.any()), "a relocation outside the patch")
