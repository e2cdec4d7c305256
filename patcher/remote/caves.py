"""Room for a stub in a process before anything can be mapped there: the padding behind program text.

The last page of an executable segment is mapped whole, though the segment ends somewhere inside of it. What
lies behind the end is not part of the program. Where those bytes are zero in memory, they are free.

Slots of fixed places are cut out of that room, so that a stub left by a patcher that was killed is recognised
and stepped over: a thread may still be inside of it, or come back to it from a signal handler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from elfdiff.errors import LivegraftError
from trampolines.stub_x86_64 import STUB_ALIGNMENT, STUB_SIZE, owner_of

from ..process.memory import Memory
from ..process.modules import PF_X, PT_LOAD, Module, ProgramHeader
from ..process.obstacles import no_padding

_PAGE = 4096
_STRIDE = -(-STUB_SIZE // STUB_ALIGNMENT) * STUB_ALIGNMENT


@dataclass(frozen=True, slots=True)
class Cave:
    """Padding behind program text, ``start`` to ``end`` (exclusive) in the process; ``path`` of the image."""

    start: int
    end: int
    path: str

    def slots(self) -> range:
        """Return the addresses at which a stub may be put."""
        return range(self.start, self.end - STUB_SIZE + 1, _STRIDE)


@dataclass(frozen=True, slots=True)
class OldStub:
    """A stub that some patcher has left at ``address``, made for thread ``tid``."""

    address: int
    tid: int


def find_caves(loaded: Sequence[Module]) -> tuple[Cave, ...]:
    """Return the padding behind the text of every image of a process, the largest first."""
    found = [cave for module in loaded for cave in _caves_of(module)]
    return tuple(sorted(found, key=lambda cave: cave.start - cave.end))


def _caves_of(module: Module) -> Iterator[Cave]:
    for header in module.headers:
        end = module.bias + header.vaddr + header.filesz
        page_end = -(-end // _PAGE) * _PAGE
        if _is_text(header) and _is_padding(module, end, page_end):
            yield Cave(-(-end // STUB_ALIGNMENT) * STUB_ALIGNMENT, page_end, module.path)


def _is_text(header: ProgramHeader) -> bool:
    # Where the segment is longer in memory than in the file, what follows the end belongs to it.
    return bool(header.flags & PF_X) and header.type == PT_LOAD and 0 < header.filesz == header.memsz


def _is_padding(module: Module, end: int, page_end: int) -> bool:
    # Private, or the file itself would be written; readable, since the stub loads its context.
    return end < page_end and any(
        end - 1 in item and page_end <= item.end and item.private and item.readable and item.executable
        for item in module.mappings
    )


def free_slot(caves: Sequence[Cave], memory: Memory) -> int | None:
    """Return the address of a slot whose bytes are all zero, or None. Raises LivegraftError."""
    return next((address for address, found in _slots(caves, memory) if not any(found)), None)


def old_stubs(caves: Sequence[Cave], memory: Memory) -> tuple[OldStub, ...]:
    """Return the stubs that killed patchers have left. Raises LivegraftError."""
    owners = ((address, owner_of(found)) for address, found in _slots(caves, memory))
    return tuple(OldStub(address, tid) for address, tid in owners if tid is not None)


def _slots(caves: Sequence[Cave], memory: Memory) -> Iterator[tuple[int, bytes]]:
    for cave in caves:
        for address in cave.slots():
            yield address, memory.read(address, STUB_SIZE)


def no_room(pid: int, caves: Sequence[Cave]) -> LivegraftError:
    """Return the error that says that no slot is left."""
    room = ", ".join(f"{cave.path} {cave.end - cave.start}" for cave in caves) or "none"
    return no_padding(pid, STUB_SIZE, room).as_error()
