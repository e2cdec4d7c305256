"""What our unwinder says at every instruction, compared with what calls and returns say (``fixtures/stepping.py``)."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fixtures.libdw import Libdw
from fixtures.stacks import Function
from fixtures.stepping import Stepper
from patcher.process.proc import Mapping, mappings
from patcher.stacks.unwind import Stack, StackEnd, Unwinder
from patcher.stacks.unwindtables import UnwindTable, unwind_tables

VISITS = 2  # of one instruction: in a loop nothing new is to be seen
DESTINED = 60  # instructions from where the tables begin to describe a jump's destination until the jump is done
DESTINED_THROW = 500  # the same where the unwinder of C++ puts one register after the other in its place


@dataclass
class _Found:
    """What we say of the stack at one step, and the words in which a difference is told.

    A walk that ends at a return address of 0 is not ``complete`` here: nothing is concluded from where it ended.
    """

    step: int
    pcs: list[int]
    complete: bool
    words: str
    jumped: bool = False

    def agrees(self, truth: list[int]) -> bool:
        return self.pcs == (truth if self.complete else truth[: len(self.pcs)])

    def comes_true(self, truth: list[int], throws: bool) -> bool:
        """Whether the program is in one of the callers that we named, and its stack is what we said.

        With ``throws`` it may be at another place of that caller: in a landing pad.
        """
        for skipped in range(1, len(self.pcs)):
            rest = self.pcs[skipped:]
            expected = truth if self.complete else truth[: len(rest)]
            if len(rest) == len(expected) and rest[throws:] == expected[throws:]:
                return True
        return False


class Comparison:
    """One program, stepped. ``frames`` counts those compared.

    ``incomplete`` holds (function of the program, reason), ``incomplete_here`` those on the stack that it began on;
    ``garbled`` those incomplete ones of which even the beginning is wrong. ``tables`` are for code that is no mapped
    image; ``other`` is asked as well; ``throws``: exceptions are thrown, and what they leave is not returned to.
    """

    def __init__(
        self,
        stepper: Stepper,
        functions: Sequence[Function] = (),
        *,
        tables: Sequence[UnwindTable] = (),
        other: Libdw | None = None,
        throws: bool = False,
    ) -> None:
        self._throws = throws
        self._patience = DESTINED_THROW if throws else DESTINED
        self.stepper = stepper
        self.functions = functions
        self._more_tables = tables
        self._other = other
        self.frames = 0
        self.complete = 0
        self.signal_frames = 0
        self.jumps = 0
        self.garbled: list[str] = []
        self.incomplete: list[tuple[str, str]] = []
        self.incomplete_here: list[tuple[str, str]] = []
        self._visits: Counter[int] = Counter()
        self._destined: list[_Found] = []
        self._steps = 0
        self._last_jump = -self._patience
        self._code: list[Mapping] = []
        self._unwinder = Unwinder((), stepper.memory.read)
        self._renew()

    def unwind(self) -> Stack:
        return self._unwinder.unwind(self.stepper.registers, self.stepper.memory.read)

    def function_at(self, address: int) -> str:
        index = bisect_right(self.functions, address, key=lambda function: function.start) - 1
        inside = index >= 0 and address < self.functions[index].end
        return self.functions[index].name if inside else ""

    def run(self, end: int, limit: int = 1 << 62) -> None:
        """Step until the instruction at ``end``, the end of the program, or ``limit`` steps; compare."""
        limit += self._steps
        while not self.stepper.ended and self.stepper.registers.rip != end and self._steps < limit:
            self._compare()
            self.stepper.step()
            self._steps += 1
            if not self.stepper.ended:
                self._arrived()
                if self.stepper.entered_kernel:
                    self._renew()
        assert self._destined == [] or self._steps == limit

    def _compare(self) -> None:
        pc = self.stepper.registers.rip
        self._visits[pc] += 1
        if self._visits[pc] > VISITS:
            return
        stack, truth = self.unwind(), self.stepper.pcs
        pcs = [frame.pc for frame in stack.frames]
        self.frames += len(pcs)
        self.complete += stack.complete
        self.signal_frames += any(frame.is_signal_frame for frame in stack.frames)
        if self._other is not None:
            self._ask_other(stack)
        if not stack.complete:
            place = self.function_at(pc)
            if place and self.stepper.on_first_stack:
                self.incomplete_here.append((place, stack.why))
            self.incomplete.append((place, stack.why))
        found = _Found(self._steps, pcs, stack.end is StackEnd.OUTERMOST, self._words(pcs, truth, stack.why))
        if not found.agrees(truth):
            found.jumped = self._steps - self._last_jump < self._patience
            self._destined.append(found)

    def _ask_other(self, stack: Stack) -> None:
        assert self._other is not None
        opinion = self._other.unwind(self.stepper.pid, self.stepper.registers, self.stepper.memory.read)
        ours = [frame.pc for frame in stack.frames]
        theirs = [pc for pc, _ in opinion.frames]
        if stack.complete:
            assert (ours, "") == (theirs, opinion.failure), self._words(ours, theirs, opinion.failure)

    def _arrived(self) -> None:
        """What differed must come true by a jump.

        The tables of longjmp(3), setcontext(3) and of what throws describe the destination's stack before they are
        there.
        """
        if self.stepper.jumped:
            self._last_jump = self._steps
        pending = []
        for found in self._destined:
            found.jumped |= self.stepper.jumped
            if found.jumped and found.comes_true(self.stepper.pcs, self._throws):
                self.jumps += 1
                continue
            if self._steps - found.step < self._patience:
                pending.append(found)
                continue
            assert not found.complete, found.words
            self.garbled.append(found.words)
        self._destined = pending

    def _renew(self) -> None:
        maps = mappings(self.stepper.pid)
        code = [mapping for mapping in maps if mapping.executable]
        if code != self._code:
            tables = [*unwind_tables(maps, self.stepper.memory), *self._more_tables]
            self._unwinder = Unwinder(tables, self.stepper.memory.read)
            self._unwinder.prepare()
            self._code = code

    def _words(self, pcs: list[int], truth: list[int], why: str) -> str:
        def lines(addresses: list[int]) -> str:
            return " ".join(f"{address:#x} {self.function_at(address)}" for address in addresses)

        return f"step {self._steps}\nours  {lines(pcs)} ({why})\ntruth {lines(truth)}"

    @property
    def compared(self) -> int:
        """Stacks that were compared."""
        return self.complete + len(self.incomplete)

    @property
    def visited(self) -> frozenset[int]:
        """Addresses of the instructions that were executed."""
        return frozenset(self._visits)

    def report(self, name: str) -> None:
        print(f"{name}: {self._steps} steps, {len(self._visits)} instructions, {self.frames} frames compared, "
              f"{self.complete} stacks complete, {len(self.incomplete)} not, {self.signal_frames} with signal frames, "
              f"{self.jumps} jumps foreseen, {len(self.garbled)} garbled")  # fmt: skip
