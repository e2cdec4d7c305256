"""What debug information adds to the evidence: the source lines of a difference, and whose inlined code it lies in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from elfdiff.decoding.code import Code
from elfdiff.dwarf.debuginfo import DebugInfo, reading, text_of
from elfdiff.patches.evidence import MAX_LABEL, Evidence, EvidenceKind, Run

if TYPE_CHECKING:
    from elftools.dwarf.die import DIE

MANY_RANGES = 6
MANY_INLINED = 4
LINE_GAP = 2
"""Lines that lie no farther apart are told as one range."""

Debug = tuple[DebugInfo | None, DebugInfo | None]


def source_evidence(
    debug: Debug, codes: tuple[Code, Code], pair: tuple[int, int], runs: tuple[Run, ...]
) -> Iterator[Evidence]:
    """Where the difference of a changed function pair lies. Raises BadInput for damaged debug information."""
    places = _changed(codes, pair, runs)
    lines = [_lines(info, at) if info is not None else "" for info, at in zip(debug, places, strict=True)]
    if any(lines):
        yield Evidence(EvidenceKind.SOURCE, "", *lines)
    info, code, function = debug[1], codes[1], pair[1]
    if info is not None:
        for name in _inlined(info, int(code.starts[function]), places[1]):
            yield Evidence(EvidenceKind.INLINED, name[:MAX_LABEL], new="debug information")


def _changed(codes: tuple[Code, Code], pair: tuple[int, int], runs: tuple[Run, ...]) -> tuple[list[int], list[int]]:
    """Addresses of the instructions of either function that have no equal counterpart, references left aside."""
    old, new = codes
    at_old, at_new = (code.instructions(function).tolist() for code, function in zip(codes, pair, strict=True))
    same_old: set[int] = set()
    same_new: set[int] = set()
    for first, second, length in runs:
        for a, b in zip(at_old[first : first + length], at_new[second : second + length], strict=True):
            if _masked(old, a) == _masked(new, b) or old.decoded.ref_kind[a] > 1:
                same_old.add(a)
                same_new.add(b)
    return [a + old.base for a in at_old if a not in same_old], [b + new.base for b in at_new if b not in same_new]


def _masked(code: Code, at: int) -> bytes:
    return code.masked[at : at + int(code.decoded.length[at])].tobytes()


def _lines(info: DebugInfo, addresses: list[int]) -> str:
    """``file:line`` ranges that the instructions come from; the compiler's own (line 0) are left out."""
    by_file: dict[str, set[int]] = {}
    for address in addresses:
        file, _, line = (info.line(address) or "").rpartition(":")
        if file and line.isdigit() and int(line):
            by_file.setdefault(file, set()).add(int(line))
    said = [f"{file}:{span}" for file, lines in sorted(by_file.items()) for span in _spans(sorted(lines))]
    return ", ".join(said[:MANY_RANGES]) + (f" and {len(said) - MANY_RANGES} more" if len(said) > MANY_RANGES else "")


def _spans(lines: list[int]) -> Iterator[str]:
    start = end = lines[0]
    for line in [*lines[1:], None]:
        if line is not None and line - end <= LINE_GAP:
            end = line
            continue
        yield str(start) if start == end else f"{start}-{end}"
        if line is not None:
            start = end = line


def _inlined(info: DebugInfo, start: int, addresses: list[int]) -> list[str]:
    """Functions whose inlined code (DWARF 5, section 3.3.8.2) the instructions belong to, most of them first."""
    function = info.function(start)
    if function is None or not addresses:
        return []
    innermost: dict[int, str] = {}
    with reading(info.path):
        for die in _inlined_entries(function.die):  # outer ones come first
            name = text_of(info.origin(die), "DW_AT_name")
            spans = info.ranges(die)
            for address in addresses:
                if name and any(low <= address < high for low, high in spans):
                    innermost[address] = name
    return [name for name, _ in Counter(innermost.values()).most_common(MANY_INLINED)]


def _inlined_entries(die: DIE) -> Iterator[DIE]:
    for child in die.iter_children():
        if child.tag == "DW_TAG_inlined_subroutine":
            yield child
        if child.has_children and child.tag in ("DW_TAG_inlined_subroutine", "DW_TAG_lexical_block"):
            yield from _inlined_entries(child)
