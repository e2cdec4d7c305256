"""Unwind rows: for an address of the code, where its caller's registers are (DWARF 5, section 6.4).

The call frame instructions of one FDE are executed when its code is first met, and kept. What gcc, clang,
glibc's assembler, PLT stubs and the vDSO emit is known; any other instruction raises ``BadInput``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import numpy as np

from elfdiff.unwinding.cursor import Cursor, ReadBytes, damaged, read_exactly
from elfdiff.unwinding.ehframe import PE_ABSPTR, PE_PCREL, Cie, FdeTable, fixed_format, read_cie

MAX_FDE = 1 << 18
"""Largest FDE that is interpreted, in bytes; the largest of a C++ compiler has a tenth of it."""
_MAX_REGISTER = 128  # psABI x86-64 1.0, figure 3.36, ends at 125


class RuleKind(Enum):
    """How a value of the caller is found (DWARF 5, 6.4.1)."""

    UNDEFINED = "undefined"
    SAME_VALUE = "same value"
    OFFSET = "offset"  # at CFA + value
    VAL_OFFSET = "val_offset"  # is CFA + value
    REGISTER = "register"  # in register `value`
    EXPRESSION = "expression"  # at the address that the expression gives, the CFA pushed first
    VAL_EXPRESSION = "val_expression"  # is what the expression gives, the CFA pushed first


@dataclass(frozen=True, slots=True)
class Rule:
    """The rule of one register; ``value`` is in bytes, or a register number."""

    kind: RuleKind
    value: int = 0
    expression: bytes = b""


@dataclass(frozen=True, slots=True)
class CfaRule:
    """The canonical frame address: ``register`` + ``offset``, or an expression where that is not empty."""

    register: int = 0
    offset: int = 0
    expression: bytes = b""


@dataclass(frozen=True, slots=True)
class UnwindRow:
    """The rules for the addresses from ``start`` up to the next row's.

    A register without a rule was not touched. ``is_signal_frame`` (augmentation S): the caller was
    interrupted, not left by a call, so that its address is not a return address.
    """

    start: int
    cfa: CfaRule
    rules: Mapping[int, Rule]
    return_address_register: int
    is_signal_frame: bool


@dataclass(frozen=True, slots=True)
class UnwindRows:
    """All rows of one FDE for the addresses ``start`` to ``end``; ``rows`` ascending, never empty."""

    start: int
    end: int
    rows: tuple[UnwindRow, ...]

    def at(self, address: int) -> UnwindRow:
        """The row that holds for an address between ``start`` and ``end``."""
        return self.rows[bisect_right(self.rows, address, key=lambda row: row.start) - 1]


class CallFrames:
    """The call frame information of one image, interpreted as it is asked for; virtual addresses."""

    def __init__(self, table: FdeTable, read: ReadBytes) -> None:
        """``read`` must reach ``.eh_frame``; it is called when an FDE is first met."""
        self.table = table
        self._read = read
        self._cies: dict[int, Cie] = {}
        self._rows: dict[int, UnwindRows] = {}

    def row(self, address: int) -> UnwindRow | None:
        """The unwind row of a code address; None where no FDE covers it.

        Raises ``BadInput`` where the FDE is damaged or has an instruction that is not known.
        """
        index = self.table.find(address)
        return None if index < 0 else self.rows(index).at(address)

    def rows(self, index: int) -> UnwindRows:
        """The unwind rows of FDE number ``index`` of the table. Raises ``BadInput`` as ``row`` does."""
        rows = self._rows.get(index)
        if rows is None:
            rows = self._rows[index] = self._interpret(index)
        return rows

    def _interpret(self, index: int) -> UnwindRows:
        address, start = int(self.table.addresses[index]), int(self.table.starts[index])
        length = int.from_bytes(read_exactly(self._read, address, 4, "an FDE"), "little")
        if not 8 <= length <= MAX_FDE:
            damaged("an FDE", address, f"length {length:#x} is not believed")
        fde = Cursor(read_exactly(self._read, address + 4, length, "an FDE"), address + 4, "an FDE")
        cie = self._cie(address + 4 - fde.unsigned(4))
        fde.take(2 * np.dtype(fixed_format(cie.fde_encoding, cie.address)).itemsize)
        if cie.has_augmentation:
            fde.take(fde.uleb128())
        rows = _Interpreter(cie, start).run(fde)
        return UnwindRows(start, start + int(self.table.sizes[index]), rows)

    def _cie(self, address: int) -> Cie:
        cie = self._cies.get(address)
        if cie is None:
            cie = self._cies[address] = read_cie(address, self._read)
        return cie


class _Interpreter:
    """Executes call frame instructions (DWARF 5, 6.4.2 and 6.4.3)."""

    def __init__(self, cie: Cie, start: int) -> None:
        self.cie = cie
        self.location = start
        self.cfa: CfaRule | None = None
        self.rules: dict[int, Rule] = {}
        self.initial: dict[int, Rule] = {}
        self.remembered: list[tuple[CfaRule | None, dict[int, Rule]]] = []
        self.rows: list[UnwindRow] = []

    def run(self, fde: Cursor) -> tuple[UnwindRow, ...]:
        start = self.location
        initial = Cursor(self.cie.instructions, self.cie.address, "the instructions of a CIE")
        self.execute(initial)
        if self.rows or self.location != start:
            initial.fail("they move the location")
        self.initial = dict(self.rules)
        self.execute(fde)
        self.close_row(fde)
        return tuple(self.rows)

    def execute(self, code: Cursor) -> None:
        while not code.at_end():
            operation = code.unsigned(1)
            high, low = operation & 0xC0, operation & 0x3F
            if high == 0x40:  # advance_loc
                self.advance(code, low)
            elif high == 0x80:  # offset
                self.set_rule(code, low, Rule(RuleKind.OFFSET, code.uleb128() * self.cie.data_alignment))
            elif high == 0xC0:  # restore
                self.restore(low)
            elif not (self.movement(code, low) or self.cfa_rule(code, low) or self.register_rule(code, low)):
                code.fail(f"call frame instruction {operation:#x} is not known")

    def movement(self, code: Cursor, operation: int) -> bool:
        """Locations, the state stack, and what says nothing about registers."""
        if operation == 0x00:  # nop
            pass
        elif operation == 0x01:  # set_loc
            self.move_to(code, self.encoded_address(code))
        elif 0x02 <= operation <= 0x04:  # advance_loc1, 2, 4
            self.advance(code, code.unsigned(1 << (operation - 2)))
        elif operation == 0x0A:  # remember_state
            self.remembered.append((self.cfa, dict(self.rules)))
        elif operation == 0x0B:  # restore_state
            if not self.remembered:
                code.fail("restore_state without remember_state")
            self.cfa, self.rules = self.remembered.pop()
        elif operation == 0x2E:  # GNU_args_size: bytes of pushed arguments, only for landing pads
            code.uleb128()
        else:
            return False
        return True

    def cfa_rule(self, code: Cursor, operation: int) -> bool:
        """The instructions of DWARF 5, 6.4.2.2."""
        if operation == 0x0C:  # def_cfa
            self.cfa = CfaRule(self.register(code), code.uleb128())
        elif operation == 0x12:  # def_cfa_sf
            self.cfa = CfaRule(self.register(code), code.sleb128() * self.cie.data_alignment)
        elif operation == 0x0D:  # def_cfa_register
            self.cfa = CfaRule(self.register(code), self.plain_cfa(code).offset)
        elif operation == 0x0E:  # def_cfa_offset
            self.cfa = CfaRule(self.plain_cfa(code).register, code.uleb128())
        elif operation == 0x13:  # def_cfa_offset_sf
            self.cfa = CfaRule(self.plain_cfa(code).register, code.sleb128() * self.cie.data_alignment)
        elif operation == 0x0F:  # def_cfa_expression
            self.cfa = CfaRule(expression=self.expression(code))
        else:
            return False
        return True

    def register_rule(self, code: Cursor, operation: int) -> bool:
        """The instructions of DWARF 5, 6.4.2.3 whose register does not stand in the opcode."""
        factor = self.cie.data_alignment
        if operation == 0x06:  # restore_extended
            self.restore(self.register(code))
            return True
        if operation not in _REGISTER_RULES:
            return False
        register = self.register(code)
        kind, form = _REGISTER_RULES[operation]
        if form == "expression":
            rule = Rule(kind, expression=self.expression(code))
        elif form == "register":
            rule = Rule(kind, self.register(code))
        elif form == "unsigned":
            rule = Rule(kind, code.uleb128() * factor)
        elif form == "signed":
            rule = Rule(kind, code.sleb128() * factor)
        elif form == "negative":
            rule = Rule(kind, -code.uleb128() * factor)
        else:
            rule = Rule(kind)
        self.set_rule(code, register, rule)
        return True

    def advance(self, code: Cursor, delta: int) -> None:
        self.move_to(code, self.location + delta * self.cie.code_alignment)

    def move_to(self, code: Cursor, location: int) -> None:
        if location < self.location:
            code.fail("the location goes backwards")
        if location > self.location:
            self.close_row(code)
        self.location = location

    def close_row(self, code: Cursor) -> None:
        if self.cfa is None:
            code.fail("a row has no rule for the CFA")
        rules = MappingProxyType(dict(self.rules))
        row = UnwindRow(self.location, self.cfa, rules, self.cie.return_address_register, self.cie.is_signal_frame)
        self.rows.append(row)

    def encoded_address(self, code: Cursor) -> int:
        encoding = self.cie.fde_encoding
        place = code.address + code.position
        format_ = np.dtype(fixed_format(encoding, place))
        value = code.signed(format_.itemsize) if format_.kind == "i" else code.unsigned(format_.itemsize)
        if encoding & 0xF0 not in (PE_ABSPTR, PE_PCREL):
            code.fail(f"pointer encoding {encoding:#x} is not supported")
        return value + place if encoding & 0xF0 == PE_PCREL else value

    def plain_cfa(self, code: Cursor) -> CfaRule:
        if self.cfa is None or self.cfa.expression:
            code.fail("half of a CFA is set where there is no register and offset")
        return self.cfa

    def register(self, code: Cursor) -> int:
        number = code.uleb128()
        if number >= _MAX_REGISTER:
            code.fail(f"register {number} does not exist")
        return number

    def expression(self, code: Cursor) -> bytes:
        expression = code.take(code.uleb128())
        if not expression:
            code.fail("an empty expression")
        return expression

    def set_rule(self, code: Cursor, register: int, rule: Rule) -> None:
        if abs(rule.value) >> 63:
            code.fail("an offset outside the address space")
        self.rules[register] = rule

    def restore(self, register: int) -> None:
        initial = self.initial.get(register)
        if initial is None:
            self.rules.pop(register, None)
        else:
            self.rules[register] = initial


# Opcode -> (rule, form of its operand). 0x2F is GNU_offset_extended negative, of old gcc.
_REGISTER_RULES: dict[int, tuple[RuleKind, str]] = {
    0x05: (RuleKind.OFFSET, "unsigned"),
    0x07: (RuleKind.UNDEFINED, "none"),
    0x08: (RuleKind.SAME_VALUE, "none"),
    0x09: (RuleKind.REGISTER, "register"),
    0x10: (RuleKind.EXPRESSION, "expression"),
    0x11: (RuleKind.OFFSET, "signed"),
    0x14: (RuleKind.VAL_OFFSET, "unsigned"),
    0x15: (RuleKind.VAL_OFFSET, "signed"),
    0x16: (RuleKind.VAL_EXPRESSION, "expression"),
    0x2F: (RuleKind.OFFSET, "negative"),
}
