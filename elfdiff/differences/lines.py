"""Functions that differ in line numbers alone (D5).

``assert`` and logging macros pass ``__LINE__``, mostly beside ``__FILE__``: a ``mov $imm32, reg`` into an argument
register in the same stretch between calls as the load of a string that names a source file. An edit above shifts
all of them. A function counts as line-only when its instructions are the same but for such immediates.

Even beside a file name another argument may have changed (a log level), so the shift must fit: the next line of the
same file, above or below, must have moved alike.

An immediate without a file name beside it (a macro that passes ``__LINE__`` alone) is believed only on more
evidence, since a changed enumeration shifts arguments as well: it must be large, it must have moved exactly as the
file-named lines around it in the same translation unit did, and the same argument of the same callee must have
moved so with at least two different values. What is not believed is a change, and a change is only patched
needlessly; the other error would leave a fix out. Where a function takes a line number behind a file name at many
calls all over the program, what it takes there is one, however it moved (``lineparameters.py``).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elfdiff.correspondence.matching import Matching
from elfdiff.correspondence.pairing import Alignments
from elfdiff.decoding.arguments_x86_64 import MAX_LINE, WINDOW, SourceFiles, argument, immediate
from elfdiff.decoding.code import Code
from elfdiff.decoding.decode_x86_64 import RefKind
from elfdiff.differences.lineparameters import LineParameters
from elfdiff.images.image import Kind

MIN_BARE_LINE = 64
"""Smallest line that is believed without a file name beside it; enumerations live below."""
UNCONDITIONAL = (0xE9, 0xEB)
"""``jmp`` to another place."""
NEIGHBOURHOOD = 40
"""Functions on either side in which the translation unit's file name must be found."""


@dataclass(frozen=True)
class _Line:
    """An argument that may be a line number: old and new value, the file beside it, who is called with it."""

    old: int
    new: int
    file: bytes | None
    callee: int
    register: int

    @property
    def shift(self) -> int:
        return self.new - self.old


def line_only(old: Code, new: Code, matching: Matching) -> list[tuple[int, int]]:
    """Those of the function pairs of different bytes that differ in line numbers alone."""
    files = SourceFiles(old), SourceFiles(new)
    candidates = {(i, j): _candidate(*files, i, j) for i, j in matching.pairs(same=False).tolist()}
    found = {pair: lines for pair, lines in candidates.items() if lines}
    shifts = _Shifts(found)
    shifts.add_unmoved(old, matching.pairs(same=True)[:, 0])
    for pair, lines in candidates.items():
        if not lines:
            shifts.add_surviving(*files, matching.alignments, *pair)
    parameters = LineParameters(files[0])
    return [
        pair
        for pair, lines in found.items()
        if all(shifts.believed(pair[0], line) or _is_parameter(parameters, pair[0], line, lines) for line in lines)
    ]


def _is_parameter(parameters: LineParameters, function: int, line: _Line, lines: tuple[_Line, ...]) -> bool:
    """Whether a number is given to a line parameter; where calls share their end, if others moved alike."""
    if line.callee >= 0:
        return parameters.register_of(line.callee) == line.register
    moved_alike = any(line.shift == other.shift for other in lines if other.callee >= 0)
    return moved_alike and line.register in parameters.called_by(function)


class _Shifts:
    """How the lines of each source file moved, learned from arguments that stand beside a file name."""

    def __init__(self, found: dict[tuple[int, int], tuple[_Line, ...]]) -> None:
        self.by_file: dict[bytes, list[tuple[int, int]]] = {}
        self.parameter: dict[tuple[int, int], set[int]] = {}
        files: dict[int, bytes] = {}
        for (i, _), lines in found.items():
            for line in lines:
                if line.file is not None:
                    self.by_file.setdefault(line.file, []).append((line.old, line.shift))
                    files[i] = line.file
                self.parameter.setdefault((line.callee, line.register), set()).add(line.old)
        for moved in self.by_file.values():
            moved.sort()
        self.functions = sorted(files)
        self.files = files

    def add_unmoved(self, code: Code, functions: NDArray[np.int64]) -> None:
        """Lines that stayed where they were: the same arguments in functions that did not change."""
        names = _addresses_of(code, set(self.by_file))
        references = code.references
        rows = np.nonzero(np.isin(references.target, list(names)))[0]
        unchanged = np.zeros(len(code), np.bool_)
        unchanged[functions] = True
        for row in rows[unchanged[references.function[rows]]].tolist():
            at = code.instructions(int(references.function[row]))
            index = int(np.searchsorted(at, references.instruction[row] - code.base))
            for k in _stretch(code, at, index):
                register = argument(code, int(at[k]), np.zeros(0, np.int64))
                if register is not None and (_callee(code, at, k), register) in self.parameter:
                    value = immediate(code, int(at[k]))
                    bisect.insort(self.by_file[names[int(references.target[row])]], (value, 0))

    def add_surviving(self, first: SourceFiles, second: SourceFiles, alignments: Alignments, i: int, j: int) -> None:
        """Lines of functions that changed otherwise, too: their surviving instructions tell how the file moved."""
        files_old, files_new = first.loads(i), second.loads(j)
        if not files_old or not files_new:
            return
        old, new = first.code, second.code
        at_old, at_new = old.instructions(i), new.instructions(j)
        survivors = alignments.survivors(np.array([[i, j]], np.int64))
        opcodes = old.decoded.opcode[survivors.old]
        move = (opcodes >= 0xB8) & (opcodes <= 0xBF) & (opcodes == new.decoded.opcode[survivors.new])
        for a, b in zip(survivors.old[move].tolist(), survivors.new[move].tolist(), strict=True):
            if argument(old, a, np.zeros(0, np.int64)) is None:
                continue
            file = _near_file(old, at_old, int(np.searchsorted(at_old, a)), files_old)
            if file is not None and file == _near_file(new, at_new, int(np.searchsorted(at_new, b)), files_new):
                line = immediate(old, a)
                bisect.insort(self.by_file.setdefault(file, []), (line, immediate(new, b) - line))

    def believed(self, function: int, line: _Line) -> bool:
        if line.file is not None:
            moved = self.by_file[line.file]
            below = bisect.bisect_left(moved, (line.old, -MAX_LINE))
            above = bisect.bisect_right(moved, (line.old, MAX_LINE))
            around = {moved[k][1] for k in (below - 1, above) if 0 <= k < len(moved)}
            return line.shift in around
        several = line.callee >= 0 and len(self.parameter[line.callee, line.register]) >= 2
        return several and line.old >= MIN_BARE_LINE and self._moved_alike(function, line)

    def _moved_alike(self, function: int, line: _Line) -> bool:
        """The file-named lines next to it, in the file of the functions around it, moved by the same number."""
        at = bisect.bisect_left(self.functions, function)
        around = [k for k in self.functions[max(0, at - 1) : at + 2] if abs(k - function) <= NEIGHBOURHOOD]
        for file in {self.files[k] for k in around}:
            moved = self.by_file[file]
            k = bisect.bisect_left(moved, (line.old, -MAX_LINE))
            if line.shift in {shift for _, shift in moved[max(0, k - 1) : k + 1]}:
                return True
        return False


def _candidate(old_files: SourceFiles, new_files: SourceFiles, i: int, j: int) -> tuple[_Line, ...]:
    """The arguments in which two functions of the same instructions differ; empty when they differ otherwise."""
    old, new = old_files.code, new_files.code
    at_old, at_new = old.instructions(i), new.instructions(j)
    if len(at_old) != len(at_new) or old.size(i) != new.size(j):
        return ()
    if (at_old - at_old[0] != at_new - at_new[0]).any():
        return ()
    first = np.frombuffer(old.masked_bytes(i), np.uint8)
    second = np.frombuffer(new.masked_bytes(j), np.uint8)
    differing = np.nonzero(first != second)[0] + int(at_old[0])
    files_old, files_new = old_files.loads(i), new_files.loads(j)
    lines = []
    for index in np.unique(np.searchsorted(at_old, differing, "right") - 1).tolist():
        a, b = int(at_old[index]), int(at_new[index])
        inside = differing[(differing >= a) & (differing < a + int(old.decoded.length[a]))] - a
        file = _near_file(old, at_old, index, files_old)
        register = argument(old, a, inside)
        values = immediate(old, a), immediate(new, b)
        if register is None or file != _near_file(new, at_new, index, files_new):
            return ()
        if not all(0 < value <= MAX_LINE for value in values):
            return ()
        lines.append(_Line(*values, file, _callee(old, at_old, index), register))
    return tuple(lines)


def _near_file(code: Code, at: NDArray[np.int64], index: int, files: dict[int, bytes]) -> bytes | None:
    """The file name loaded in the same stretch between calls as instruction ``index``."""
    return next((files[int(at[k])] for k in _stretch(code, at, index) if int(at[k]) in files), None)


def _stretch(code: Code, at: NDArray[np.int64], index: int) -> Iterator[int]:
    """Indices of the instructions around ``index``, nearest first and before first, up to a call on either side."""
    for step in (-1, 1):
        k = index + step
        while 0 <= k < len(at) and abs(k - index) <= WINDOW:
            if int(code.decoded.ref_kind[int(at[k])]) == RefKind.CALL:
                break
            yield k
            k += step


def _addresses_of(code: Code, texts: set[bytes]) -> dict[int, bytes]:
    """Addresses that code names and at which one of the strings stands."""
    targets = np.unique(code.references.target)
    constants = targets[code.image.kinds(targets) == Kind.CONSTANT].tolist()
    found = ((address, code.image.string_at(address, 512)) for address in constants)
    return {address: text for address, text in found if text in texts}


def _callee(code: Code, at: NDArray[np.int64], index: int) -> int:
    """Address of the function called next, or -1 where a conditional branch or nothing follows.

    Jumps inside the function are followed: calls that end alike share their end.
    """
    index += 1
    for _ in range(WINDOW):
        if not 0 <= index < len(at):
            return -1
        offset = int(at[index])
        kind = int(code.decoded.ref_kind[offset])
        if kind == RefKind.CALL:
            return _target(code, offset)
        index += 1
        if int(code.decoded.opcode[offset]) in UNCONDITIONAL:
            target = _target(code, offset) - code.base
            index = int(np.searchsorted(at, target))
            if index == len(at) or int(at[index]) != target:
                return -1
        elif kind in (RefKind.BRANCH, RefKind.SHORT):
            return -1
    return -1


def _target(code: Code, offset: int) -> int:
    """Where the branch at an offset into the code leads."""
    row = int(np.searchsorted(code.references.instruction, offset + code.base))
    return int(code.references.target[row])
