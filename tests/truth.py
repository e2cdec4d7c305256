"""What a build with symbols says of itself: the truth by which the differ, which reads no symbols, is judged.

Read by pyelftools and capstone, with nothing of elfdiff but the types of the patch.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import capstone
import numpy as np
from capstone import x86_const
from elftools.elf.elffile import ELFFile

from elfdiff.patchobject import FIRST_IMPORT, PATCH_IMAGE, PatchObject, RelocationType

Names = frozenset[str]
"""What may stand at an address: several symbols can."""


@dataclass(frozen=True)
class Symbol:
    name: str
    start: int
    size: int
    kind: str  # STT_FUNC, STT_OBJECT


@dataclass(frozen=True)
class Instruction:
    """``target`` is what it names relative to itself, ``field`` the address of the field that does, if any."""

    address: int
    size: int
    text: str  # without the target
    target: int | None
    field: int | None


class Truth:
    """One linked file with its symbol table."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as stream:
            elf = ELFFile(stream)
            self.sections = [
                (s["sh_addr"], s["sh_addr"] + s["sh_size"], s.name, b"" if s["sh_type"] == "SHT_NOBITS" else s.data())
                for s in elf.iter_sections()
                if s["sh_flags"] & 2 and not (s["sh_flags"] & 0x400 and s["sh_type"] == "SHT_NOBITS")
            ]
            table = elf.get_section_by_name(".symtab")
            assert table is not None, f"{path} is stripped"
            self.symbols = [
                Symbol(s.name, s["st_value"], s["st_size"], s["st_info"]["type"])
                for s in table.iter_symbols()
                if s["st_info"]["type"] in ("STT_FUNC", "STT_OBJECT") and s["st_shndx"] != "SHN_UNDEF"
            ]
            dynamic = elf.get_section_by_name(".dynsym")
            self.slots: dict[int, str] = {}
            self.pointers: dict[int, int] = {}
            for name in (".rela.dyn", ".rela.plt"):
                relocations = elf.get_section_by_name(name)
                for entry in relocations.iter_relocations() if relocations else ():
                    if entry["r_info_type"] == 8:
                        self.pointers[entry["r_offset"]] = entry["r_addend"]
                    elif dynamic is not None:
                        self.slots[entry["r_offset"]] = dynamic.get_symbol(entry["r_info_sym"]).name
        self.symbols.sort(key=lambda s: s.start)
        self.functions = {s.name: s for s in self.symbols if s.kind == "STT_FUNC" and s.size}
        self.objects = {s.name: s for s in self.symbols if s.kind == "STT_OBJECT" and s.size}
        self._starts = [s.start for s in self.symbols]
        self._disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
        self._disassembler.detail = True

    def section(self, address: int) -> str:
        """Name of the section at an address, or an empty string."""
        return next((name for low, high, name, _ in self.sections if low <= address < high), "")

    def read(self, address: int, size: int) -> bytes:
        low, data = next((low, data) for low, high, _, data in self.sections if low <= address < high)
        return data[address - low : address - low + size]

    @cached_property
    def _at(self) -> dict[int, list[Symbol]]:
        found: dict[int, list[Symbol]] = {}
        for symbol in self.symbols:
            if symbol.size:
                found.setdefault(symbol.start, []).append(symbol)
        return found

    def symbols_at(self, address: int) -> list[Symbol]:
        """The symbols whose extent holds an address."""
        index = bisect_right(self._starts, address)
        for start in sorted(set(self._starts[max(0, index - 8) : index]), reverse=True):
            inside = [s for s in self._at.get(start, []) if start <= address < start + s.size]
            if inside:
                return inside
        return []

    def names(self, address: int) -> Names:
        """What stands there: ``symbol+offset``, an import, the text of a nameless constant, else the section."""
        found = self.symbols_at(address)
        if found:
            return frozenset(f"{s.name}+{address - s.start}" for s in found)
        section = self.section(address)
        if section.startswith(".plt"):
            return frozenset({f"{self._stub(address)}@plt"})
        if address in self.slots:
            return frozenset({f"{self.slots[address]}@got"})
        if section.startswith(".rodata"):
            return frozenset({self._nameless(address)})
        if section.startswith(".got") and address in self.pointers:
            return frozenset(f"&{name}" for name in self.names(self.pointers[address]))
        return frozenset({f"{section or hex(address)}?"})

    def _nameless(self, address: int) -> str:
        """A literal: text; a switch table, whose length nothing tells; or a number."""
        raw = self.read(address, 512)
        text = raw.split(b"\0")[0]
        case = self.symbols_at(address + int.from_bytes(raw[:4], "little", signed=True))
        if case and case[0].kind == "STT_FUNC":
            return "switch"
        offsets = [int.from_bytes(raw[k : k + 4], "little", signed=True) for k in (0, 4)]
        if all(8 <= abs(k) < 0x10000 and self.section(address + k).startswith(".rodata") for k in offsets):
            return f"offsets to {[self.read(address + k, 64).split(bytes(1))[0] for k in offsets]}"
        printable = text.isascii() and text.decode("ascii").replace("\n", "").isprintable()
        return repr(text) if printable else raw[:8].hex()

    def _stub(self, address: int) -> str:
        for instruction in self._disassembler.disasm(self.read(address, 16), address):
            if instruction.mnemonic.endswith("jmp"):
                return self.slots.get(instruction.address + instruction.size + instruction.disp, "?")
        return "?"

    def instructions(self, name: str) -> list[Instruction]:
        symbol = self.functions[name]
        raw = self.read(symbol.start, symbol.size)
        return [read_instruction(i) for i in self._disassembler.disasm(raw, symbol.start)]


def read_instruction(i: capstone.CsInsn) -> Instruction:
    """An instruction of capstone as compared here."""
    target = field = None
    text = f"{i.mnemonic} {i.op_str}"
    jumps = {x86_const.X86_GRP_JUMP, x86_const.X86_GRP_CALL, x86_const.X86_GRP_BRANCH_RELATIVE} & set(i.groups)
    for operand in i.operands:
        if operand.type == x86_const.X86_OP_MEM and operand.mem.base == x86_const.X86_REG_RIP:
            target, field = i.address + i.size + i.disp, i.address + i.disp_offset
            text = re.sub(r"\[rip[^]]*\]", "[rip]", text)
        elif operand.type == x86_const.X86_OP_IMM and jumps:
            target, field, text = operand.imm, i.address + i.imm_offset, i.mnemonic
    return Instruction(i.address, i.size, text, target, field)


def differing_functions(old: Truth, new: Truth) -> set[str]:
    """Functions of both builds whose instructions, or what these name, differ (contents of data apart)."""
    return {name for name in old.functions.keys() & new.functions.keys() if not _same(old, new, name)}


def _same(old: Truth, new: Truth, name: str) -> bool:
    first, second = old.instructions(name), new.instructions(name)
    if [i.text for i in first] != [i.text for i in second]:
        return False
    a, b = old.functions[name].start, new.functions[name].start
    for i, j in zip(first, second, strict=True):
        if (i.target is None) != (j.target is None) or i.address - a != j.address - b:
            return False
        if i.target is not None and j.target is not None and not old.names(i.target) & new.names(j.target):
            return False
    return True


def misbound(patch: PatchObject, old: Truth, new: Truth) -> list[str]:
    """References of a position-independent patch that do not lead to what the new build names there."""
    relocations = {int(r["place"]): r for r in patch.relocations}
    found: list[str] = []
    known = {s.start: s.name for s in new.symbols if s.kind == "STT_FUNC" and s.size}
    for function in patch.functions:
        for instruction in new.instructions(known[function.new_start]) if function.new_start in known else ():
            if instruction.target is not None and instruction.field is not None:
                row = relocations.pop(instruction.field, None)
                found += _wrong(patch, old, new, instruction, row)
    for row in relocations.values():
        found += _wrong_slot(patch, old, new, row)
    return found


def _wrong(patch: PatchObject, old: Truth, new: Truth, instruction: Instruction, row: np.void | None) -> list[str]:
    target = instruction.target
    assert target is not None and instruction.field is not None
    where = f"{instruction.address:#x} {instruction.text}"
    if row is None:
        inside = any(s.vaddr <= target < s.vaddr + s.size for s in patch.segments)
        return [*_wrong_own(old, new, target, where), *([] if inside else [f"{where}: outside the patch"])]
    assert row["type"] == RelocationType.PC32
    bound = int(row["addend"]) + instruction.address + instruction.size - instruction.field
    return _wrong_target(patch, old, new, target, int(row["symbol"]), bound, where)


def _wrong_slot(patch: PatchObject, old: Truth, new: Truth, row: np.void) -> list[str]:
    place = int(row["place"])
    if place in new.slots:
        wanted = patch.imports[int(row["symbol"]) - FIRST_IMPORT].name
        return [] if wanted == new.slots[place] else [f"slot {place:#x}: {wanted} for {new.slots[place]}"]
    if place not in new.pointers:
        return [f"{place:#x}: a relocation where the new build has none"]
    bound, where = int(row["addend"]), f"slot {place:#x}"
    return _wrong_target(patch, old, new, new.pointers[place], int(row["symbol"]), bound, where)


def _wrong_target(
    patch: PatchObject, old: Truth, new: Truth, target: int, symbol: int, bound: int, where: str
) -> list[str]:
    if symbol == PATCH_IMAGE:
        return _wrong_own(old, new, target, where) if bound == target else [f"{where}: {bound:#x} for {target:#x}"]
    if symbol >= FIRST_IMPORT:
        wanted = patch.imports[symbol - FIRST_IMPORT].name
        return [] if any(wanted in name for name in new.names(target)) else [f"{where}: import {wanted}"]
    if old.names(bound) & new.names(target) or _ends(old, bound) & _ends(new, target):
        return []
    return [f"{where}: bound to {sorted(old.names(bound))}, meant {sorted(new.names(target))}"]


def _ends(truth: Truth, address: int) -> Names:
    """The objects that end at an address: what stands behind them may be anything, or nothing."""
    return frozenset(s.name for s in truth.symbols_at(address - 1) if s.start + s.size == address)


def _wrong_own(old: Truth, new: Truth, target: int, where: str) -> list[str]:
    """What the patch keeps for itself must not be the state of the running program."""
    if not new.section(target).startswith((".data", ".bss")) or new.section(target).startswith(".data.rel.ro"):
        return []
    shared = [s.name for s in new.symbols_at(target) if s.name in old.objects]
    if not new.symbols_at(target):
        shared = sorted(_ends(new, target) & old.objects.keys())
    return [f"{where}: its own copy of {shared}"] if shared else []


def changed_functions(old: Truth, new: Truth) -> set[str]:
    """Functions of both builds that behave differently: by their code, or by a constant that they name."""
    differing = differing_objects(old, new)
    found = differing_functions(old, new)
    for name in new.functions.keys() & old.functions.keys():
        targets = (i.target for i in new.instructions(name) if i.target is not None)
        if any(s.name in differing for target in targets for s in new.symbols_at(target)):
            found.add(name)
    return found


def differing_objects(old: Truth, new: Truth) -> set[str]:
    """Named constants of both builds whose content differs, or that lead to one that does."""
    names = [n for n in old.objects.keys() & new.objects.keys() if _is_constant(new, n) and _is_constant(old, n)]
    found = {name for name in names if _content(old, name) != _content(new, name)}
    while True:
        more = {n for n in names if n not in found and _leads_to(new, n) & found}
        if not more:
            return found
        found |= more


def _is_constant(truth: Truth, name: str) -> bool:
    return truth.section(truth.objects[name].start).startswith((".rodata", ".data.rel.ro"))


def _content(truth: Truth, name: str) -> list[object]:
    """The bytes of an object, pointers as names."""
    symbol = truth.objects[name]
    raw = truth.read(symbol.start, symbol.size)
    if name.startswith("reltable."):  # clang: 32-bit offsets from the table to what it lists
        offsets = (int.from_bytes(raw[k : k + 4], "little", signed=True) for k in range(0, symbol.size, 4))
        return [sorted(truth.names(symbol.start + offset)) for offset in offsets]
    return [
        sorted(truth.names(truth.pointers[symbol.start + k])) if symbol.start + k in truth.pointers else raw[k : k + 8]
        for k in range(0, symbol.size, 8)
    ]


def _leads_to(truth: Truth, name: str) -> set[str]:
    symbol = truth.objects[name]
    targets = (t for place, t in truth.pointers.items() if symbol.start <= place < symbol.start + symbol.size)
    return {s.name for target in targets for s in truth.symbols_at(target)}
