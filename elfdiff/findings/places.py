"""How a place is named in a finding."""

from __future__ import annotations

import numpy as np

from elfdiff.image import Image

MANY = 12
"""Places that one finding names."""


def where(image: Image, address: int) -> str:
    """An address with its symbol, where there is one."""
    symbols = image.symbols
    index = int(np.searchsorted(symbols.values, address, "right")) - 1
    while index >= 0 and symbols.values[index] == address and not symbols.sizes[index]:
        index -= 1
    if index >= 0 and symbols.values[index] <= address < symbols.values[index] + symbols.sizes[index]:
        offset = address - int(symbols.values[index])
        return f"{symbols.names[index]}{f'+{offset:#x}' if offset else ''}"
    section = image.section_at(address)
    return f"{address:#x} in {section.name}" if section else f"{address:#x}"
