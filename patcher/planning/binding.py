"""Binding: a patch object made to fit one process.

``bind`` checks that the patch is for what the process runs and finds what the new code needs; ``relocate``
makes the exact bytes of the patch for one load bias. Neither writes anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elfdiff.errors import BadInput, NotConcerned, Refused
from elfdiff.patchobject import (
    FIRST_IMPORT,
    OLD_IMAGE,
    PATCH_IMAGE,
    CheckedRange,
    PatchFunction,
    PatchObject,
    RelocationType,
    Segment,
    Severity,
)
from trampolines.entry_x86_64 import ENTRY_JUMP_SIZE

from ..process.memory import Memory
from ..process.modules import PF_W, PF_X, Module, find_module
from ..process.scope import require_libraries, resolve, search_scope
from ..records.record import KeptCode, Record, State
from .unwinders import LookupSlot, link_map_of, lookup_slots, require_unwinder

_PAGE = 4096
_WIDTHS = {
    RelocationType.ABS64: 8,
    RelocationType.PC32: 4,
    RelocationType.ABS32: 4,
    RelocationType.ABS32S: 4,
}
_ADDEND_LIMIT = 1 << 48  # beyond any address, so that 64-bit sums cannot wrap
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Binding:
    """A patch and the image that it fits: ``imports`` are absolute addresses, in the order of the patch's."""

    patch: PatchObject
    module: Module
    imports: tuple[int, ...]
    lookups: tuple[LookupSlot, ...] = ()
    """The slots through which the process looks up unwind tables, where the patch has such tables."""
    link_map: int = 0
    """The address of the image's struct link_map (link.h), or 0."""
    kept: tuple[KeptCode, ...] = ()
    """Old code that threads may finish (``keeping``)."""
    set_id: str = ""
    set_size: int = 1
    """The set that it comes into force with, as its record will say."""
    idle: tuple[KeptCode, ...] = ()
    """Code that does not change and must be idle (``idleness``)."""

    @property
    def old_bias(self) -> int:
        """Load bias of the old image."""
        return self.module.bias


@dataclass(frozen=True, slots=True)
class BoundSegment:
    """Pages of the patch at their absolute address, relocated; ``data`` is exactly as long as the mapping."""

    start: int
    flags: int
    data: bytes

    @property
    def end(self) -> int:
        """One past its last byte."""
        return self.start + len(self.data)


def bind(patch: PatchObject, loaded: Sequence[Module], memory: Memory, records: Sequence[Record]) -> Binding:
    """Check that ``patch`` fits the process and resolve its imports.

    ``records`` are those of the process: the entry jumps that they know are looked through. Raises Refused
    where the patch carries a reason to refuse, another build is mapped, the mapped code has been changed by
    somebody else, or an import cannot be resolved; BadInput where the patch contradicts itself.
    """
    _require_no_refusal(patch)
    _require_sound(patch)
    module = _old_module(patch, loaded)
    _require_span(patch, module)
    check_ranges(patch.checked, module, memory, pristine_bytes(records, module))
    imports: tuple[int, ...] = ()
    if patch.imports or patch.needed:
        scope = search_scope(loaded, module, memory)
        require_libraries(patch.needed, scope, patch.new.name)
        imports = tuple(resolve(item.name, item.version, scope, memory, weak=item.weak) for item in patch.imports)
    if patch.eh_frame_hdr is None:
        return Binding(patch, module, imports)
    lookups = lookup_slots(loaded, memory)
    if patch.exceptions:
        require_unwinder(lookups, loaded, memory)
    return Binding(patch, module, imports, lookups, link_map_of(module, loaded, memory))


def _require_no_refusal(patch: PatchObject) -> None:
    refusals = [item for item in patch.findings if item.severity is Severity.REFUSE]
    if refusals:
        first = refusals[0]
        details = tuple(line for item in refusals for line in item.lines())
        error = Refused(first.what, why=first.why, next_step=first.lift, details=details)
        error.findings = tuple(refusals)
        raise error


def _require_sound(patch: PatchObject) -> None:
    """Refuse a patch whose parts contradict each other, whoever wrote it."""
    position = 0
    for segment in sorted(patch.segments, key=lambda item: item.vaddr):
        end = segment.vaddr + segment.size
        if segment.vaddr % _PAGE or segment.size <= 0 or len(segment.data) > segment.size:
            raise _unsound(f"the segment at {segment.vaddr:#x} is not made of pages, or too long")
        if segment.vaddr < position:
            raise _unsound(f"the segment at {segment.vaddr:#x} overlaps the one before")
        if segment.flags & PF_W and segment.flags & PF_X:
            raise _unsound(f"the segment at {segment.vaddr:#x} is writable and executable")
        position = end
    for function in patch.functions:
        if not _in_code(patch.segments, function.new_start, function.new_size):
            raise _unsound(f"the function {function.name} is not in an executable segment")
        if function.entry_jump:
            _require_checked(function, patch.checked)


def _require_checked(function: PatchFunction, checked: Sequence[CheckedRange]) -> None:
    """An entry is only overwritten where the patch says which bytes belong there."""
    start, size = function.old_start, function.old_size
    if start is None or size is None:
        raise _unsound(f"the function {function.name} has an entry jump and no old address")
    end = start + max(size, ENTRY_JUMP_SIZE)  # what is padding behind a short function is overwritten, too
    if not any(item.start <= start and end <= item.start + item.size for item in checked):
        raise _unsound(f"the old bytes of the function {function.name} are not among those to be checked")


def _in_code(segments: Sequence[Segment], start: int, size: int) -> bool:
    return any(
        segment.flags & PF_X and segment.vaddr <= start and start + size <= segment.vaddr + segment.size
        for segment in segments
    )


def _unsound(why: str) -> BadInput:
    return BadInput(
        "the patch object contradicts itself",
        why=why,
        next_step="make it again: livegraft diff OLD NEW -o PATCH",
    )


def _old_module(patch: PatchObject, loaded: Sequence[Module]) -> Module:
    if _has(loaded, patch.new.build_id) and not _has(loaded, patch.old.build_id):
        raise NotConcerned(
            f"the process already runs the new build of {patch.new.name}",
            why=f"build {patch.new.build_id} is mapped from its own file, not from a patch",
            next_step="nothing is to be done for this process",
        )
    return find_module(loaded, patch.old.build_id, patch.old.name)


def _has(loaded: Sequence[Module], build_id: str) -> bool:
    return any(module.build_id == build_id for module in loaded)


def _require_span(patch: PatchObject, module: Module) -> None:
    span = (module.low - module.bias, module.high - module.bias)
    if span != (patch.old.low, patch.old.high) or module.fixed_address != patch.old.fixed_address:
        raise Refused(
            f"{module.path} is not mapped as the patch expects",
            why=f"mapped are the virtual addresses {span[0]:#x}-{span[1]:#x}, the patch knows "
            f"{patch.old.low:#x}-{patch.old.high:#x}",
            next_step="make a patch from the very file that is mapped (/proc/PID/exe or /proc/PID/map_files)",
        )


def pristine_bytes(records: Sequence[Record], module: Module) -> dict[int, bytes]:
    """Return what the file has at each address of ``module`` that an entry jump of the records may cover.

    Only of records whose jumps may be in place: what is found at the others' entries is somebody else's doing.
    """
    return {
        entry.address: entry.pristine
        for record in records
        if record.state is State.APPLIED or record.interrupted
        for entry in record.contents.journal
        if entry.address in module
    }


def check_ranges(checked: Sequence[CheckedRange], module: Module, memory: Memory, pristine: dict[int, bytes]) -> None:
    """Compare the digest of every range with the bytes that are mapped, entry jumps of records looked
    through.

    Raises Refused naming the ranges that differ.
    """
    spans = [(item.start + module.bias, item.size) for item in checked]
    outside = [item for item in checked if not _inside(item, module)]
    if outside:
        raise _unsound(f"the checked range {outside[0].name} lies outside of the old image")
    covers = np.array(sorted(pristine), dtype=np.int64)
    differing = []
    for item, (start, size), data in zip(checked, spans, memory.read_many(spans), strict=True):
        first, last = np.searchsorted(covers, (start - 15, start + size))
        seen = overlay(start, data, {int(at): pristine[int(at)] for at in covers[first:last]})
        if hashlib.blake2b(seen, digest_size=16).hexdigest() != item.digest:
            differing.append(f"{item.name} at {start:#x}, {size} bytes")
    if differing:
        shown = ", ".join(differing[:_SHOWN]) + (", ..." if len(differing) > _SHOWN else "")
        raise Refused(
            f"the code that is mapped is not the code of build {module.build_id}",
            why=f"{len(differing)} of {len(checked)} checked ranges differ: {shown}; a debugger, "
            "an instrumentation or another patcher may have written there",
            next_step="remove what changed them, or restart the program",
            details=tuple(differing),
        )


def _inside(item: CheckedRange, module: Module) -> bool:
    start = item.start + module.bias
    return module.low <= start and item.size >= 0 and start + item.size <= module.high


def overlay(start: int, data: bytes, pieces: dict[int, bytes]) -> bytes:
    """Return ``data``, which begins at address ``start``, with ``pieces`` (address to bytes) laid over it."""
    if not pieces:
        return data
    out = bytearray(data)
    for address, piece in pieces.items():
        low = max(address, start)
        high = min(address + len(piece), start + len(data))
        if low < high:
            out[low - start : high - start] = piece[low - address : high - address]
    return bytes(out)


def relocate(binding: Binding, patch_bias: int) -> tuple[BoundSegment, ...]:
    """Return every segment of the patch at its place, each reference rewritten: S + A, or S + A - P.

    Raises Refused where a field is too small for its value, BadInput where a relocation is not inside a
    segment, overlaps another or is of a kind that is not known.
    """
    patch = binding.patch
    images = [bytearray(segment.data.ljust(_pages(segment.size), b"\0")) for segment in patch.segments]
    relocations = patch.relocations
    if len(relocations):
        _require_known(relocations, len(binding.imports))
        values = _values(relocations, binding, patch_bias)
        for segment, image in zip(patch.segments, images, strict=True):
            _apply(relocations, values, segment.vaddr, image)
        _require_all_inside(relocations, patch.segments)
    return tuple(
        BoundSegment(segment.vaddr + patch_bias, segment.flags, bytes(image))
        for segment, image in zip(patch.segments, images, strict=True)
    )


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _widths(types: NDArray[np.uint32]) -> NDArray[np.int64]:
    table = np.zeros(max(_WIDTHS) + 1, dtype=np.int64)
    for kind, width in _WIDTHS.items():
        table[kind] = width
    return table[types]


def _require_known(relocations: NDArray[np.void], imports: int) -> None:
    types = relocations["type"]
    unknown = types[~np.isin(types, list(_WIDTHS))]
    if len(unknown):
        raise _unsound(f"relocation type {int(unknown[0])} is not known")
    if int(relocations["symbol"].max()) >= FIRST_IMPORT + imports:
        raise _unsound("a relocation names an import that is not listed")
    addends = relocations["addend"]
    if (np.abs(addends) >= _ADDEND_LIMIT).any() or (relocations["place"] >= _ADDEND_LIMIT).any():
        raise _unsound("a relocation has an address beyond 48 bits")
    places = relocations["place"].astype(np.int64)
    if (places[:-1] + _widths(types[:-1]) > places[1:]).any():
        raise _unsound("relocations overlap or are not sorted")


def _values(relocations: NDArray[np.void], binding: Binding, patch_bias: int) -> NDArray[np.int64]:
    bases = np.zeros(FIRST_IMPORT + len(binding.imports), dtype=np.int64)
    bases[OLD_IMAGE] = binding.old_bias
    bases[PATCH_IMAGE] = patch_bias
    bases[FIRST_IMPORT:] = binding.imports
    values: NDArray[np.int64] = bases[relocations["symbol"]] + relocations["addend"]
    types = relocations["type"]
    relative = types == RelocationType.PC32
    values[relative] -= relocations["place"][relative].astype(np.int64) + patch_bias
    _require_fits(relocations, values, relative | (types == RelocationType.ABS32S), -(1 << 31), 1 << 31)
    _require_fits(relocations, values, types == RelocationType.ABS32, 0, 1 << 32)
    return values


def _require_fits(
    relocations: NDArray[np.void], values: NDArray[np.int64], which: NDArray[np.bool_], low: int, high: int
) -> None:
    bad = which & ((values < low) | (values >= high))
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        raise Refused(
            f"{int(bad.sum())} references of the patch do not reach what they name",
            why=f"the field at {int(relocations['place'][index]):#x} would have to hold {int(values[index]):#x}",
            next_step="restart the program instead",
        )


def _apply(relocations: NDArray[np.void], values: NDArray[np.int64], vaddr: int, image: bytearray) -> None:
    places = relocations["place"].astype(np.int64)
    widths = _widths(relocations["type"])
    mine = (places >= vaddr) & (places + widths <= vaddr + len(image))
    target = np.frombuffer(image, dtype=np.uint8)
    for width in (4, 8):
        chosen = mine & (widths == width)
        offsets = (places[chosen] - vaddr)[:, None] + np.arange(width)
        target[offsets] = values[chosen].astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width]


def _require_all_inside(relocations: NDArray[np.void], segments: Sequence[Segment]) -> None:
    places = relocations["place"].astype(np.int64)
    ends = places + _widths(relocations["type"])
    inside = np.zeros(len(places), dtype=np.bool_)
    for segment in segments:
        inside |= (places >= segment.vaddr) & (ends <= segment.vaddr + _pages(segment.size))
    if not inside.all():
        raise _unsound(f"the relocation at {int(places[~inside][0]):#x} is not inside a segment")
