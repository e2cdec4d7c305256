"""DWARF expressions as call frame information uses them (DWARF 5, sections 2.5 and 6.4.2).

A stack machine over 64-bit words. Operations that need a compilation unit, an object or a frame base are
undefined in call frame information (DWARF 5, 6.4.2) and raise, like every other thing that is not understood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from elfdiff.unwinding.cursor import Cursor, ReadBytes, read_exactly

MAX_STEPS = 1000
"""Most operations one evaluation may execute; real expressions have under twenty."""
_MAX_DEPTH = 64
_MASK = (1 << 64) - 1

_ADDR, _DEREF, _DEREF_SIZE = 0x03, 0x06, 0x94
_SKIP, _BRA, _NOP = 0x2F, 0x28, 0x96
_CONST_FIRST, _CONSTU, _CONSTS = 0x08, 0x10, 0x11
_DUP, _OVER, _PICK, _PLUS_UCONST = 0x12, 0x14, 0x15, 0x23
_LIT0, _BREG0, _BREG31, _BREGX = 0x30, 0x70, 0x8F, 0x92


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shift(value: int, count: int) -> int:
    return value << count if count < 64 else 0


# Operations on the two topmost entries: (second, top) -> result, words taken as unsigned (DWARF 5, 2.5.1.4).
_BINARY: dict[int, Callable[[int, int], int]] = {
    0x1A: lambda a, b: a & b,
    0x1C: lambda a, b: a - b,
    0x1D: lambda a, b: a % b,
    0x1E: lambda a, b: a * b,
    0x21: lambda a, b: a | b,
    0x22: lambda a, b: a + b,
    0x24: _shift,
    0x25: lambda a, b: a >> b if b < 64 else 0,
    0x26: lambda a, b: _signed(a) >> min(b, 63),
    0x27: lambda a, b: a ^ b,
    0x29: lambda a, b: int(a == b),
    0x2A: lambda a, b: int(_signed(a) >= _signed(b)),
    0x2B: lambda a, b: int(_signed(a) > _signed(b)),
    0x2C: lambda a, b: int(_signed(a) <= _signed(b)),
    0x2D: lambda a, b: int(_signed(a) < _signed(b)),
    0x2E: lambda a, b: int(a != b),
}
_DIV, _MOD = 0x1B, 0x1D
_UNARY: dict[int, Callable[[int], int]] = {
    0x19: lambda a: abs(_signed(a)),
    0x1F: lambda a: -a,
    0x20: lambda a: ~a,
}


class _Machine:
    def __init__(self, expression: bytes, registers: Mapping[int, int], read: ReadBytes, stack: list[int]) -> None:
        self.code = Cursor(expression, 0, "a DWARF expression")
        self.registers = registers
        self.read = read
        self.stack = stack

    def run(self) -> int:
        for _ in range(MAX_STEPS):
            if self.code.at_end():
                return self.pop()
            self.step(self.code.unsigned(1))
            if len(self.stack) > _MAX_DEPTH:
                self.code.fail(f"its stack is deeper than {_MAX_DEPTH}")
        self.code.fail(f"it does not end within {MAX_STEPS} operations")

    def step(self, operation: int) -> None:
        if _BREG0 <= operation <= _BREG31:
            self.push(self.register(operation - _BREG0) + self.code.sleb128())
        elif operation in _BINARY or operation == _DIV:
            self.binary(operation)
        elif operation in _UNARY:
            self.push(_UNARY[operation](self.pop()))
        elif operation in (_SKIP, _BRA):
            self.jump(conditional=operation == _BRA)
        elif operation in (_DEREF, _DEREF_SIZE):
            self.dereference(8 if operation == _DEREF else self.code.unsigned(1))
        elif operation != _NOP and not self.constant(operation) and not self.shuffle(operation):
            self.code.fail(f"operation {operation:#x} is unknown or has no meaning in call frame information")

    def constant(self, operation: int) -> bool:
        if _LIT0 <= operation < _BREG0 - 32:
            self.push(operation - _LIT0)
        elif operation == _ADDR:
            self.push(self.code.unsigned(8))
        elif _CONST_FIRST <= operation < _CONSTU:
            size = 1 << (operation - _CONST_FIRST) // 2
            self.push(self.code.signed(size) if operation & 1 else self.code.unsigned(size))
        elif operation == _CONSTU:
            self.push(self.code.uleb128())
        elif operation == _CONSTS:
            self.push(self.code.sleb128())
        elif operation == _BREGX:
            self.push(self.register(self.code.uleb128()) + self.code.sleb128())
        elif operation == _PLUS_UCONST:
            self.push(self.pop() + self.code.uleb128())
        else:
            return False
        return True

    def shuffle(self, operation: int) -> bool:
        """Stack operations (DWARF 5, 2.5.1.3)."""
        if operation in (_DUP, _OVER, _PICK):
            depth = self.code.unsigned(1) if operation == _PICK else int(operation == _OVER)
            self.require(depth + 1)
            self.push(self.stack[-1 - depth])
        elif operation == 0x13:  # drop
            self.pop()
        elif operation == 0x16:  # swap
            self.require(2)
            self.stack[-2:] = [self.stack[-1], self.stack[-2]]
        elif operation == 0x17:  # rot: the top goes below the two others
            self.require(3)
            self.stack[-3:] = [self.stack[-1], self.stack[-3], self.stack[-2]]
        else:
            return False
        return True

    def binary(self, operation: int) -> None:
        top, second = self.pop(), self.pop()
        if operation in (_DIV, _MOD) and top == 0:
            self.code.fail("division by zero")
        if operation == _DIV:  # signed, towards zero
            quotient = abs(_signed(second)) // abs(_signed(top))
            self.push(quotient if (_signed(second) < 0) == (_signed(top) < 0) else -quotient)
        else:
            self.push(_BINARY[operation](second, top))

    def jump(self, *, conditional: bool) -> None:
        distance = self.code.signed(2)
        target = self.code.position + distance
        if not 0 <= target <= len(self.code.data):
            self.code.fail("a jump leaves the expression")
        if not conditional or self.pop():
            self.code.position = target

    def dereference(self, size: int) -> None:
        if size not in (1, 2, 4, 8):
            self.code.fail(f"a word of {size} bytes")
        self.push(int.from_bytes(read_exactly(self.read, self.pop(), size, "memory"), "little"))

    def register(self, number: int) -> int:
        value = self.registers.get(number)
        if value is None:
            self.code.fail(f"the value of register {number} is not known")
        return value

    def push(self, value: int) -> None:
        self.stack.append(value & _MASK)

    def pop(self) -> int:
        self.require(1)
        return self.stack.pop()

    def require(self, depth: int) -> None:
        if len(self.stack) < depth:
            self.code.fail("its stack is empty")


def evaluate(expression: bytes, registers: Mapping[int, int], read: ReadBytes, initial: tuple[int, ...] = ()) -> int:
    """Value of an expression, an unsigned 64-bit word.

    ``registers`` maps DWARF register numbers to values (those missing are not known); ``read`` reads the
    memory that it dereferences; ``initial`` is on the stack at the start (the CFA for register rules, nothing
    for a CFA; DWARF 5, 6.4.2). Raises ``BadInput`` for an operation that is unknown or has no meaning there,
    an unknown register, unreadable memory, an empty stack and an expression that does not end.
    """
    return _Machine(expression, registers, read, list(initial)).run()
