"""How what a binary holds is shown to people: strings quoted and cut around what differs, numbers, bytes.

Names and strings of a binary are not ours: what is not printable (control characters, writing-direction marks) is
shown as an escape, so that it cannot act on a terminal.
"""

from __future__ import annotations

import struct

MAX_QUOTED = 60
"""Characters of a string that are shown."""
CONTEXT = 16
"""Characters in front of the first difference of two long strings that are shown."""
MAX_BYTES = 16

_CONTROLS_OF_TEXT = dict.fromkeys(map(ord, "\n\t\r\x1b\b\f\a\v"))
_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", '"': '\\"', "\0": "\\0"}


def printable(text: str) -> str:
    """The text with everything escaped that is not printable; quotes and backslashes stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _ESCAPES.get(c) or _escape(c) for c in text)


def _escape(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # a byte that is no UTF-8 (PEP 383)
        return f"\\x{number - 0xDC00:02x}"
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{{{number:x}}}"


def is_text(raw: bytes) -> bool:
    """Whether bytes read as text: UTF-8 that is printable but for line ends and the like."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return False
    return bool(text) and text.translate(_CONTROLS_OF_TEXT).isprintable()


def quote(raw: bytes, start: int = 0) -> str:
    """A string in double quotes from character ``start`` on, at most ``MAX_QUOTED`` characters of it."""
    text = raw.decode("utf-8", "surrogateescape")
    shown = text[start : start + MAX_QUOTED]
    plain = shown.isprintable() and "\\" not in shown and '"' not in shown
    escaped = shown if plain else "".join(_ESCAPES.get(c) or printable(c) for c in shown)
    return f'{"…" if start else ""}"{escaped}"{"…" if start + MAX_QUOTED < len(text) else ""}'


def quote_both(old: bytes, new: bytes) -> tuple[str, str]:
    """Two strings that differ, quoted from the same place, so that the first difference is seen."""
    first, second = (raw.decode("utf-8", "surrogateescape") for raw in (old, new))
    common = next((k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    common = min(len(first), len(second)) if common is None else common
    start = max(0, common - CONTEXT) if max(len(first), len(second)) > MAX_QUOTED else 0
    return quote(old, start), quote(new, start)


def hexadecimal(raw: bytes) -> str:
    """Bytes as ``{01 02 ..}``, cut after ``MAX_BYTES``."""
    return "{" + raw[:MAX_BYTES].hex(" ") + (" …" if len(raw) > MAX_BYTES else "") + "}"


def number(raw: bytes, *, floating: bool) -> str:
    """A little-endian number of 4 or 8 bytes, or as bytes where it is longer."""
    if floating and len(raw) in (4, 8):
        (value,) = struct.unpack("<f" if len(raw) == 4 else "<d", raw)
        return f"{value:.9g}" if len(raw) == 4 else repr(float(value))
    if len(raw) > 8:
        return hexadecimal(raw)
    value = int.from_bytes(raw, "little")
    return str(value) if value < 10_000 else hex(value)
