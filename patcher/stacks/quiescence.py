"""Is any of these functions live? Asked of stopped threads; whatever is not known counts as live.

First every word of every stack, from rsp to the end of its mapping, and every register is compared with the
forbidden ranges (by ``stacksift``, where it can, and then only the threads that it leaves are looked at here). That
is cheap and misses no return address, but finds words that are merely left over. So
threads with a hit are unwound: if the walk is complete, only its frames count, and if not, every hit does. A
thread on an alternate signal stack is scanned on both: the signal frame says where the interrupted stack is.

Stacks that no thread runs on (coroutines that are switched away) are seen by the deep check alone (``deepcheck``),
which is made where the process may have such stacks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from elfdiff.errors import LivegraftError, NotPermitted
from elfdiff.unwinding.cursor import ReadBytes

from ..process.memory import Memory
from ..process.proc import Mapping, by_living_thread, code_lines, code_size, mappings, open_proc_file, start_stack
from ..threads import batch
from .deepcheck import DeepCheck
from .forbidden import ForbiddenRange, ForbiddenRanges
from .foresight import words_on_stacks
from .frames_x86_64 import RESTORER_SIZE, SIGFRAME_SIZE, interrupted_stack
from .restorers import find_restorers
from .stackmemory import StackMemory, StackWords
from .stacksift import StackSift
from .unwind import Stack, StackEnd, Unwinder
from .unwindtables import UnwindTable, unwind_tables

if TYPE_CHECKING:
    from ..threads.stopped import StoppedThread

MAX_STACK = 8 << 20
"""Bytes of one stack that are scanned; a thread with more is unwound instead."""
MAX_STACKS = 128 << 20
"""Bytes of all stacks together that are scanned."""
MAX_FORESEEN = 2000
"""Functions whose call frame information is interpreted before the pause; each takes about 0.1 ms."""
ANY_FUNCTION = "any of them"
"""Name in a ``LiveFrame`` where it is not known which function is live."""
_MAX_SWITCHES = 8  # a thread's stack, and one more for each nested switch to another
_MAX_SIGNAL_FRAMES = 64  # on one stack


@dataclass(frozen=True, slots=True)
class LiveFrame:
    """Why a function counts as live. ``tid`` is 0 for a stack that no thread runs on.

    ``pc`` is where it goes on; ``depth`` counts frames from the innermost, 0, or is None for a word that
    could not be cleared. ``certain``: unwinding found the frame. ``stack`` are the program counters of the
    thread, innermost first, as far as it could be unwound; ``why`` says what is known and what not. ``cfa`` is
    rsp as the caller will have it, which tells one activation from another; None where it was not found.
    """

    tid: int
    name: str
    pc: int
    depth: int | None
    certain: bool
    stack: tuple[int, ...]
    why: str
    cfa: int | None = None


@dataclass(frozen=True, slots=True)
class Quiescence:
    """The answer. ``bytes_scanned`` are those of stacks, ``unwound`` the threads that had to be.

    ``searched`` are the bytes that the deep check has looked at.
    """

    live: tuple[LiveFrame, ...]
    threads_checked: int
    bytes_scanned: int
    unwound: int
    searched: int = 0

    @property
    def quiescent(self) -> bool:
        """Whether none of the functions is live."""
        return not self.live


@dataclass(frozen=True, slots=True)
class _Area:
    """A run of stack memory, [start, end), and where it was read to."""

    start: int
    end: int
    words: StackWords
    number: int

    def __contains__(self, address: object) -> bool:
        return isinstance(address, int) and self.start <= address < self.end

    def read(self, address: int, size: int) -> bytes | None:
        return self.words.read(self.number, address, size) if address in self else None


@dataclass(slots=True)
class _Examined:
    """What the scan found out about one thread; ``doubts`` say why it proves nothing."""

    thread: StoppedThread
    areas: list[_Area] = field(default_factory=list)
    hits: list[tuple[int | None, int]] = field(default_factory=list)  # (address, or None: a register; word)
    doubts: list[str] = field(default_factory=list)

    @property
    def rip(self) -> int:
        return self.thread.registers.rip

    def reader(self, memory: Memory) -> ReadBytes:
        """Reads from what was scanned, and from the process where that is not enough."""

        def read(address: int, size: int) -> bytes:
            for area in self.areas:
                data = area.read(address, size)
                if data is not None:
                    return data
            return memory.read(address, size)

        return read


@dataclass(frozen=True, slots=True)
class Question:
    """What C has to find out in place of ``StackCheck.check``: that all of it holds.

    No thread is odd to the sift of these ``stacks``; ``code_size`` stands in ``/proc/PID/status``, or ``statm``, a
    descriptor, says that as much is ``mapped`` as then; and, where it says ``own_stacks``, each thread runs on its own.
    """

    stacks: batch.Stacks
    code_size: bytes
    statm: int
    mapped: tuple[int, int]
    own_stacks: bool


class StackCheck:
    """Looks for frames of forbidden functions; a context manager.

    Build it before the pause, when everything that the pause needs is mapped, and ``check`` in the pause;
    ``refresh`` before a further pause.
    """

    def __init__(
        self,
        memory: Memory,
        forbidden: Iterable[ForbiddenRange],
        tables: Iterable[UnwindTable] = (),
        *,
        max_stack: int = MAX_STACK,
        deep: DeepCheck | None = None,
    ) -> None:
        """``tables`` are for code that is no mapped ELF image: that of patches. ``deep`` is made as well, where given.

        Raises ``ValueError`` for ranges that are empty or overlap, ``BadInput`` for no such process.
        """
        self._memory = memory
        self._ranges = ForbiddenRanges(forbidden)
        self._more_tables = tuple(tables)
        self._max_stack = max_stack
        self._deep = deep
        self._start_stack = start_stack(memory.pid)
        self._sift = StackSift(memory.pid, self._ranges, max_stack, MAX_STACKS, self._start_stack)
        self._known_restorers: dict[Mapping, tuple[int, ...]] = {}
        self._code: tuple[Mapping, ...] = ()
        self._code_lines: tuple[str, ...] = ()
        self._unwinder = Unwinder((), memory.read)
        self._statm = by_living_thread(memory.pid, lambda tid: open_proc_file(memory.pid, f"task/{tid}/statm"))
        self._mapped = 0, 0
        try:
            self.refresh()
            self._stacks = StackMemory(memory.pid)
        except BaseException:
            os.close(self._statm)
            raise
        self._sift.stacks.maps = self._stacks.fileno()

    def __enter__(self) -> StackCheck:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what it has opened."""
        self._stacks.close()
        os.close(self._statm)

    def refresh(self) -> None:
        """Look at the code that is mapped now.

        Raises ``LivegraftError`` where the process goes away or has executed another program.
        """
        before = self._unwinder
        self._look_at_code()
        if self._unwinder is not before:
            self._unwinder.foresee(words_on_stacks(self._memory), MAX_FORESEEN)

    def _look_at_code(self) -> None:
        self._memory.require_same_program()
        # Its size first: what is mapped after that is noticed by the next check.
        library = batch.active()
        self._mapped = library.mapped(self._statm) if library else (0, 0)
        self._code_size = code_size(self._memory.pid)
        maps = mappings(self._memory.pid)
        self._restorers = find_restorers(maps, self._memory, self._known_restorers)
        self._sift.set_restorers(self._restorers.addresses)
        self._renew_unwinder()

    def _renew_unwinder(self) -> None:
        # The lines first: what is mapped between the two looks is noticed by the next.
        lines = code_lines(self._memory.pid)
        if lines == self._code_lines:
            return
        maps = mappings(self._memory.pid)
        code = tuple(mapping for mapping in maps if mapping.executable)
        kept = set(code) & set(self._code)

        def is_unchanged(table: UnwindTable) -> bool:
            over = [mapping for mapping in code if mapping.start < table.high and table.low < mapping.end]
            return bool(over) and all(mapping in kept and mapping.inode for mapping in over)

        tables = [*unwind_tables(maps, self._memory), *self._more_tables]
        self._unwinder = self._unwinder.renewed(tables, is_unchanged)
        self._unwinder.prepare()
        self._code, self._code_lines = code, lines

    def question(self) -> Question | None:
        """Return what ``check`` would ask where nothing is unusual; None where more is to be asked, or C cannot."""
        if self._restorers.unsure or (self._deep is not None and not self._deep.strays_only):
            return None
        size = "\n".join(self._code_size).encode()
        return Question(self._sift.stacks, size, self._statm, self._mapped, self._deep is not None)

    def check(self, threads: Sequence[StoppedThread]) -> Quiescence:
        """Whether a forbidden function is live. ``threads`` are all threads of the process, all stopped.

        Raises ``LivegraftError`` where the process goes away, has executed another program (then its stacks are where
        nothing was known of), or its memory may not be read; what cannot be decided about a thread is no error but
        counts as live.
        """
        if code_size(self._memory.pid) != self._code_size:
            self._look_at_code()
        self._stacks.forget()
        unclear, scanned = self._unclear(threads)
        examined = [_Examined(thread) for thread in unclear]
        if examined:
            scanned += self._scan(examined)
        suspects = [item for item in examined if self._is_suspect(item)]
        if suspects:
            self._memory.require_same_program()
            # Code may have been replaced by as much other code; only now is it worth looking.
            self._renew_unwinder()
        live = [frame for item in suspects for frame in self._judge(item)]
        if live or self._deep is None or not self._may_be_parked(threads, self._deep):
            return Quiescence(tuple(live), len(threads), scanned, len(suspects))
        found, searched = self._deep.check(threads, self._restorers.addresses, self._unwinder)
        parked = tuple(LiveFrame(0, item.name, item.pc, None, False, (), item.words()) for item in found)
        return Quiescence(parked, len(threads), scanned, len(suspects), searched)

    def _may_be_parked(self, threads: Sequence[StoppedThread], deep: DeepCheck) -> bool:
        return not deep.strays_only or not all(self._is_on_own_stack(thread) for thread in threads)

    def _is_on_own_stack(self, thread: StoppedThread) -> bool:
        registers = thread.registers
        # The kernel made the main thread's stack; in that of another the C library keeps its control block, at the top.
        top = self._start_stack if thread.tid == self._memory.pid else registers.fs_base
        end = self._stacks.end(registers.rsp & ~7, registers.fs_base, registers.rsp + self._max_stack)
        return end is not None and registers.rsp <= top < end

    def parked(self) -> bool:
        """Whether what the deep check has found is still there, by a look that stops nobody."""
        return self._deep is not None and self._deep.persists()

    def _unclear(self, threads: Sequence[StoppedThread]) -> tuple[Sequence[StoppedThread], int]:
        """The threads that have to be looked at one by one, and the bytes of stacks that were read to tell."""
        if self._restorers.unsure:
            return threads, 0
        return self._sift.sift(threads)

    def _is_suspect(self, item: _Examined) -> bool:
        executing = self._ranges.of_instruction(item.rip, next_instruction=True)
        return bool(item.hits or item.doubts) or executing is not None

    # --- the scan ---

    def _scan(self, examined: list[_Examined]) -> int:
        """Fill in what is found about each thread; returns the bytes that were looked at."""
        self._scan_registers(examined)
        scanned = 0
        stacks = [(item, item.thread.registers.rsp) for item in examined]
        for switches in range(_MAX_SWITCHES):
            found: list[tuple[_Examined, int]] = []
            for items, words in self._read_stacks(stacks, MAX_STACKS - scanned):
                scanned += words.words.nbytes
                for index in self._ranges.return_addresses(words.words).tolist():
                    number, address = words.locate(index)
                    items[number].hits.append((address, int(words.words[index])))
                found += self._interrupted_stacks(items, words, innermost=switches == 0)
            stacks = found
            if not stacks:
                break
        for item, _ in stacks:
            item.doubts.append(f"it runs on more than {_MAX_SWITCHES} stacks")
        return scanned

    def _scan_registers(self, examined: list[_Examined]) -> None:
        # A return address may be in a register alone: vfork(3) of the C library keeps its own there.
        registers = [bytes(item.thread.registers) for item in examined]
        words = np.frombuffer(b"".join(registers), dtype="<u8")
        for index in self._ranges.return_addresses(words).tolist():
            item = examined[index * 8 // len(registers[0])]
            item.hits.append((None, int(words[index])))

    def _read_stacks(self, stacks: list[tuple[_Examined, int]], room: int) -> list[tuple[list[_Examined], StackWords]]:
        """Read every stack from its stack pointer up; all in one go unless one cannot be read."""
        items: list[_Examined] = []
        runs: list[tuple[int, int]] = []
        for item, pointer in stacks:
            start = pointer & ~7
            if pointer != start:
                item.doubts.append(f"its stack pointer {pointer:#x} is not aligned")
            end = self._stacks.end(start, item.thread.registers.fs_base, start + self._max_stack)
            if end is None:
                item.doubts.append(f"its stack pointer {pointer:#x} is in no mapping")
            elif end - start > min(self._max_stack, room):
                item.doubts.append(f"its stack at {pointer:#x} is larger than what is scanned")
            else:
                room -= end - start
                items.append(item)
                runs.append((start, end - start))
        return self._read_runs(items, runs)

    def _read_runs(
        self, items: list[_Examined], runs: list[tuple[int, int]]
    ) -> list[tuple[list[_Examined], StackWords]]:
        try:
            words = self._stacks.read(runs)
        except NotPermitted:
            raise
        except LivegraftError as error:
            if len(items) == 1:
                items[0].doubts.append(f"{error}: {error.why}")
                return []
            pairs = zip(items, runs, strict=True)
            return [read for item, run in pairs for read in self._read_runs([item], [run])]
        for number, (item, (start, size)) in enumerate(zip(items, runs, strict=True)):
            item.areas.append(_Area(start, start + size, words, number))
        return [(items, words)]

    def _interrupted_stacks(
        self, items: list[_Examined], words: StackWords, *, innermost: bool
    ) -> Iterator[tuple[_Examined, int]]:
        """Stacks that signal frames lead to and that have not been read yet."""
        frames: dict[int, list[int]] = {}  # number of the stack -> where its signal frames are
        for restorer in self._restorers.addresses:
            for index in np.flatnonzero(words.words == np.uint64(restorer)).tolist():
                number, address = words.locate(index)
                frames.setdefault(number, []).append(address)
        for number, item in enumerate(items) if innermost else ():
            if self._in_restorer(item.rip):
                # The handler has returned and so taken the restorer's address off the stack.
                frames.setdefault(number, []).append(item.thread.registers.rsp - 8)
            if self._restorers.unsure:
                item.doubts.append(self._restorers.unsure)
        for number, addresses in frames.items():
            yield from self._switches(items[number], addresses)

    def _switches(self, item: _Examined, frames: list[int]) -> Iterator[tuple[_Examined, int]]:
        if len(frames) > _MAX_SIGNAL_FRAMES:
            item.doubts.append(f"more than {_MAX_SIGNAL_FRAMES} signal frames on one stack")
            return
        for address in frames:
            try:
                frame = item.reader(self._memory)(address, SIGFRAME_SIZE)
            except LivegraftError as error:
                item.doubts.append(f"a signal frame is cut off: {error.why}")
                continue
            pointer = interrupted_stack(frame)
            if pointer is not None and not any(pointer in area for area in item.areas):
                yield item, pointer

    def _in_restorer(self, pc: int) -> bool:
        return any(start <= pc < start + RESTORER_SIZE for start in self._restorers.addresses)

    # --- the verdict ---

    def _judge(self, item: _Examined) -> Iterator[LiveFrame]:
        """What is live in one thread, by unwinding it."""
        registers = item.thread.registers
        stack = self._unwinder.unwind(registers, item.reader(self._memory))
        pcs = tuple(frame.pc for frame in stack.frames)
        named = set()
        for depth, pc, executing, after_call in _instructions(stack, item.rip):
            found = self._ranges.of_instruction(executing, next_instruction=not after_call)
            if found is not None:
                named.add(found.name)
                why = "waits for a call to return" if after_call else "is executing"
                cfa = stack.frames[depth].cfa if stack.frames else None
                yield LiveFrame(item.thread.tid, found.name, pc, depth, True, pcs, why, cfa)
        for address, word in _uncleared(item, stack):
            name = self._ranges.of_return_address(word).name
            if name not in named:
                named.add(name)
                place = "a register" if address is None else f"the stack at {address:#x}"
                why = f"{place} holds an address in it, and the stack cannot be unwound: {stack.why}"
                yield LiveFrame(item.thread.tid, name, word, None, False, pcs, why)
        if item.doubts and stack.end is not StackEnd.OUTERMOST:
            why = "; ".join([*item.doubts, f"the stack cannot be unwound: {stack.why}"])
            yield LiveFrame(item.thread.tid, ANY_FUNCTION, item.rip, None, False, pcs, why)


def _instructions(stack: Stack, rip: int) -> Iterator[tuple[int, int, int, bool]]:
    """(depth, pc, executing address, after a call) of each frame, of the innermost in any case."""
    if not stack.frames:
        yield 0, rip, rip, False
    for depth, frame in enumerate(stack.frames):
        yield depth, frame.pc, frame.executing, frame.after_call


def _uncleared(item: _Examined, stack: Stack) -> list[tuple[int | None, int]]:
    """The hits that unwinding says nothing about.

    A walk that ended at a return address of 0 may have ended too early, since wrong unwind information finds
    zeros easily; so it clears only what lies below its last frame.
    """
    if stack.end is StackEnd.OUTERMOST:
        return []
    if stack.end is StackEnd.UNKNOWN:
        return item.hits
    return [hit for hit in item.hits if hit[0] is not None and not _below_a_frame(hit[0], item, stack)]


def _below_a_frame(address: int, item: _Examined, stack: Stack) -> bool:
    areas = [area for area in item.areas if address in area]
    return any(frame.cfa - 8 >= address and frame.cfa - 8 in area for area in areas for frame in stack.frames)
