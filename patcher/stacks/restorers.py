"""Finds what signal handlers return to, so that signal frames can be recognised on a stack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from elfdiff.errors import LivegraftError

from ..process.memory import Memory
from ..process.proc import Mapping
from .frames_x86_64 import RESTORER_BEGINNINGS, RESTORER_END

_CHUNK = 4 << 20
_OVERLAP = 16  # more than the longest restorer


@dataclass(frozen=True, slots=True)
class Restorers:
    """Addresses of all restorers, ascending. ``unsure`` says where one may have been missed, or is empty."""

    addresses: tuple[int, ...]
    unsure: str


def find_restorers(
    maps: Sequence[Mapping], memory: Memory, known: dict[Mapping, tuple[int, ...]]
) -> Restorers:
    """Search all executable mappings. ``known`` keeps what was found in those made from files.

    Mappings that cannot be read are reported in ``unsure``: such as one that is gone meanwhile.
    """
    found: list[int] = []
    unsure = ""
    for mapping in maps:
        if not mapping.executable or mapping.path == "[vsyscall]":  # emulated, and not readable
            continue
        if mapping not in known:
            try:
                addresses = tuple(_search(mapping, memory))
            except LivegraftError as error:
                unsure = f"code at {mapping.start:#x} could not be searched: {error.why}"
                continue
            if not mapping.inode or mapping.writable:  # its code may change
                found += addresses
                continue
            known[mapping] = addresses
        found += known[mapping]
    return Restorers(tuple(sorted(found)), unsure)


def _search(mapping: Mapping, memory: Memory) -> Iterator[int]:
    for start in range(mapping.start, mapping.end, _CHUNK):
        low = max(start - _OVERLAP, mapping.start)
        data = memory.read(low, min(start + _CHUNK, mapping.end) - low)
        position = data.find(RESTORER_END)
        while position >= 0:
            for beginning in RESTORER_BEGINNINGS:
                if data.endswith(beginning, 0, position):
                    address = low + position - len(beginning)
                    if address + len(beginning) + len(RESTORER_END) > start:  # not found in the last chunk
                        yield address
            position = data.find(RESTORER_END, position + 1)
