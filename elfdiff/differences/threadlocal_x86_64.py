"""Which thread-local variables code uses, as offsets in the template (x86-64 psABI, "Thread-Local Storage").

Such a variable is named by a number: in the slot that the dynamic linker fills (initial-exec, general-dynamic,
descriptors), or in the code itself, in a field of four bytes that the linker wrote: below the thread pointer
(local-exec, ``%fs:-8`` or an address made of ``%fs:0``), or above the start of the module's block (local-dynamic). A
number in the code looks like any other, so what is found is what may be an offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from elfdiff.correspondence.pairing import Alignments
from elfdiff.decoding.code import Code
from elfdiff.images.linkage_x86_64 import R_X86_64_DTPMOD64, slot_name

R_X86_64_TPOFF64, R_X86_64_TLSDESC = 18, 36
_THREAD_LOCAL = (R_X86_64_DTPMOD64, R_X86_64_TPOFF64, R_X86_64_TLSDESC)
_FS = 0x64
_PREFIXES = (0x66, 0xF2, 0xF3, 0xF0)
_MOVE, _GROUP, _ADD = 0xC7, 0x81, 0x05  # mov $imm32, add $imm32: with REX.W they can make an address
_FAR = 2  # ModRM.mod: a displacement of four bytes


@dataclass(frozen=True)
class Use:
    """An instruction (offset into the code) that may name a thread-local variable, and the variable's offset."""

    instruction: int
    offset: int


class ThreadLocalUses:
    """The uses in one build."""

    def __init__(self, code: Code) -> None:
        """Find out which functions are concerned at all: few are."""
        self.code = code
        tls = code.image.tls
        align = max(1, tls.align) if tls else 1
        self._size = -(-tls.memsz // align) * align if tls else 0
        self._names = {
            address: name
            for address in code.image.slots
            if (name := slot_name(code.image, address)) is not None and name.type in _THREAD_LOCAL and not name.symbol
        }
        self._through = self._through_fs() if self._size else frozenset()
        by_slot = np.isin(code.references.target, np.array(sorted(self._names), np.int64))
        self._by_slot = frozenset(code.references.function[by_slot].tolist()) if self._size else frozenset()

    def of(self, function: int) -> list[Use]:
        """What one function may use, by instruction."""
        found, whole = self._uses_of_slots(function) if function in self._by_slot else ([], False)
        if function in self._through:
            found += self._below_thread_pointer(self.code.instructions(function))
        if whole:
            found += self._above_block(self.code.instructions(function))
        return sorted(found, key=lambda use: use.instruction)

    @cached_property
    def only(self) -> int | None:
        """The offset of the one variable that the whole program may use, or None where there are more."""
        offsets = {use.offset for function in self._through | self._by_slot for use in self.of(function)}
        return next(iter(offsets)) if len(offsets) == 1 else None

    def _uses_of_slots(self, function: int) -> tuple[list[Use], bool]:
        """Uses by nameless slots, and whether one of them may stand for the whole block (local-dynamic)."""
        references = self.code.references
        found, whole = [], False
        for row in range(int(references.first[function]), int(references.last[function])):
            name = self._names.get(int(references.target[row]))
            if name is None:
                continue
            offset = name.behind if name.type == R_X86_64_DTPMOD64 else name.addend
            whole |= name.type != R_X86_64_TPOFF64 and offset == 0
            found.append(Use(int(references.instruction[row]) - self.code.base, offset))
        return found, whole

    def _through_fs(self) -> frozenset[int]:
        """Functions that use ``%fs`` for something else than the canary of -fstack-protector, which is above 0."""
        code = self.code
        prefixed = np.nonzero(code.is_start[:-2] & (code.raw[:-2] == _FS))[0]
        behind = np.nonzero(code.is_start[:-2] & np.isin(code.raw[:-2], _PREFIXES) & (code.raw[1:-1] == _FS))[0]
        at = np.concatenate([prefixed, behind])
        field = code.decoded.disp_field[at].astype(np.int64)
        values = code.image.int32_at(at + code.base + field)
        concerned = at[(field == 0) | (values <= 0)]
        return frozenset(code.function_at(concerned + code.base).tolist())

    def _below_thread_pointer(self, at: NDArray[np.int64]) -> list[Use]:
        decoded, found = self.code.decoded, []
        for i in at.tolist():
            field = int(decoded.disp_field[i])
            values = [*self._immediate(i), *([self._int32(i + field)] if field else [])]
            found += [Use(i, value + self._size) for value in values if -self._size <= value < 0]
        return found

    def _above_block(self, at: NDArray[np.int64]) -> list[Use]:
        decoded, found = self.code.decoded, []
        for i in at.tolist():
            far = decoded.disp_field[i] and int(decoded.modrm[i]) >> 6 == _FAR
            values = [*self._immediate(i), *([self._int32(i + int(decoded.disp_field[i]))] if far else [])]
            found += [Use(i, value) for value in values if 0 <= value < self._size]
        return found

    def _immediate(self, at: int) -> list[int]:
        """The immediate of four bytes of an instruction that can make an address of it."""
        decoded = self.code.decoded
        opcode, operation = int(decoded.opcode[at]), int(decoded.modrm[at]) >> 3 & 7
        makes = opcode in (_MOVE, _ADD) or (opcode == _GROUP and operation == 0)
        return [self._int32(at + int(decoded.imm_field[at]))] if makes and decoded.imm_size[at] == 4 else []

    def _int32(self, at: int) -> int:
        return int.from_bytes(self.code.raw[at : at + 4].tobytes(), "little", signed=True)


def unproved(
    alignments: Alignments, unchanged: NDArray[np.int64], changed: list[tuple[int, int]]
) -> dict[int, set[int]]:
    """New function -> offsets that it may use and that nothing shows to be the same variable as in the old build.

    ``unchanged``: old functions of which the new build has the same; ``changed``: (old or -1, new). An offset is the
    same variable where an unchanged function uses it, or where a changed one goes on using it as before.
    """
    old, new = ThreadLocalUses(alignments.old), ThreadLocalUses(alignments.new)
    wanted = {j: uses for _, j in changed if (uses := new.of(j))}
    if not wanted:
        return {}
    if old.only is not None and old.only == new.only:
        return {}  # what is alone cannot have changed places
    proved = {use.offset for i in unchanged.tolist() for use in old.of(i)}
    for i, j in changed:
        if i >= 0 and j in wanted:
            proved |= _kept(alignments, i, j, old.of(i), wanted[j])
    found = {j: {use.offset for use in uses} - proved for j, uses in wanted.items()}
    return {j: offsets for j, offsets in found.items() if offsets}


def _kept(alignments: Alignments, i: int, j: int, before: list[Use], after: list[Use]) -> set[int]:
    """Offsets that a changed function uses as it did.

    Where it uses one only, before and after; or where all its instructions correspond one to one. Else two variables
    that changed places may hide in a branch that was turned round.
    """
    offsets = {use.offset for use in after}
    if len(offsets) == 1 and offsets == {use.offset for use in before}:
        return offsets
    count = len(alignments.new.instructions(j))
    survivors = alignments.survivors(np.array([[i, j]], np.int64))
    if not len(survivors.new) == count == len(alignments.old.instructions(i)):
        return set()
    partner = dict(zip(survivors.new.tolist(), survivors.old.tolist(), strict=True))
    known = {(use.instruction, use.offset) for use in before}
    return {use.offset for use in after if (partner[use.instruction], use.offset) in known}
