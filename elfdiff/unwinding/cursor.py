"""Reading unwind data field by field from any source of bytes; running off the end is ``BadInput``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from elfdiff.errors import BadInput, LivegraftError

ReadBytes = Callable[[int, int], bytes]
"""(virtual address, size) -> exactly that many bytes; ``LivegraftError`` or ``OSError`` when outside."""

_ADDRESS_END = 1 << 63  # addresses are held as int64; user space ends far below


def damaged(where: str, address: int, why: str) -> NoReturn:
    """Raise ``BadInput`` about the unwind data at a virtual address."""
    raise BadInput(
        f"the unwind table is damaged or of an unknown kind: {where} at {address:#x}",
        why=why,
        next_step="compare with `readelf --debug-dump=frames`; such a file cannot be used",
    )


def read_exactly(read: ReadBytes, address: int, size: int, where: str) -> bytes:
    """Read ``size`` bytes; ``BadInput`` where they are not there."""
    if address < 0 or size < 0 or address + size > _ADDRESS_END:
        damaged(where, address, f"{size} bytes there are outside any address space")
    try:
        data = bytes(read(address, size))
    except (LivegraftError, OSError) as error:
        raise BadInput(
            f"the unwind table is damaged: {where} at {address:#x}",
            why=f"{size} bytes there cannot be read: {error}",
            next_step="compare with `readelf --debug-dump=frames`; such a file cannot be used",
        ) from error
    if len(data) != size:
        damaged(where, address, f"{len(data)} of {size} bytes are there")
    return data


class Cursor:
    """Reads fields one after the other from a block of bytes; ``BadInput`` past its end."""

    def __init__(self, data: bytes, address: int, where: str) -> None:
        """``address`` is the virtual address of ``data``; ``where`` names it in errors."""
        self.data = data
        self.address = address
        self.where = where
        self.position = 0

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        if size < 0 or self.position + size > len(self.data):
            self.fail(f"it ends within a field of {size} bytes")
        taken = self.data[self.position : self.position + size]
        self.position += size
        return taken

    def unsigned(self, size: int) -> int:
        """An unsigned little-endian integer of ``size`` bytes."""
        return int.from_bytes(self.take(size), "little")

    def signed(self, size: int) -> int:
        """A signed little-endian integer of ``size`` bytes."""
        return int.from_bytes(self.take(size), "little", signed=True)

    def uleb128(self) -> int:
        """An unsigned LEB128 number (DWARF 5, 7.6) of at most 64 bits."""
        return self._leb128()[0]

    def sleb128(self) -> int:
        """A signed LEB128 number (DWARF 5, 7.6) of at most 64 bits."""
        value, bits, last = self._leb128()
        return value - (1 << bits) if last & 0x40 else value

    def string(self) -> bytes:
        """A zero-terminated string without its zero."""
        end = self.data.find(b"\0", self.position)
        if end < 0:
            self.fail("it ends within a string")
        text = self.data[self.position : end]
        self.position = end + 1
        return text

    def at_end(self) -> bool:
        """Whether everything was taken."""
        return self.position >= len(self.data)

    def fail(self, why: str) -> NoReturn:
        """Raise ``BadInput`` about this place."""
        damaged(self.where, self.address + self.position, why)

    def _leb128(self) -> tuple[int, int, int]:
        value = bits = 0
        while bits < 70:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << bits
            bits += 7
            if not byte & 0x80:
                return value, bits, byte
        self.fail("a LEB128 number has more than 64 bits")
