"""What is dead on the stacks of coroutines: below the place where each goes on lies what is left over.

A coroutine that serves one request after the other leaves return addresses below itself, and they stay for as long as
it waits further up. Where its stack is, makecontext(3) was told: the ucontext_t has it. Where it goes on, a ucontext_t
or a jmp_buf has. glibc's ucontext_t is recognised by its pointer to its own floating-point state, a jmp_buf by its
mangled pointers.

The lowest of all stack pointers that contexts hold for a stack counts, and nothing is concluded where another switch
may be in use: where anything outside of the stack points below that pointer, where a thread runs on it, where a signal
frame lies below, or where the stack does not show that the function of that context made its last call there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from elfdiff.errors import LivegraftError

from ..process.memory import Memory
from .deepmemory import DeepMemory, Survey
from .mangling_x86_64 import mangled, unmangled
from .threadstacks import Run
from .unwind import Unwinder

if TYPE_CHECKING:
    from ..threads.stopped import StoppedThread

# glibc's ucontext_t (sysdeps/unix/sysv/linux/x86/sys/ucontext.h): uc_flags, uc_link, uc_stack (ss_sp, ss_flags,
# ss_size), then uc_mcontext with 23 registers, of which rsp is number 15 and rip number 16, and fpregs, which
# getcontext and swapcontext make point to __fpregs_mem in the same structure.
_UCONTEXT = struct.Struct("<16x Q 8x Q 120x Q Q")  # ss_sp, ss_size, rsp, rip
_FPREGS = 224
_FPREGS_MEM = 424
_WORD = 8  # bytes
_MOST_CONTEXTS = 4096  # more are not looked at, and then nothing is concluded
_MOST_STACKS = 64


@dataclass(slots=True)
class _Coroutine:
    """A stack, [start, end), and what was found that leads there.

    ``contexts`` are (stack pointer, program counter); ``pointers`` are words outside of it that point into it;
    ``signal_frames`` are where it holds the address of a restorer.
    """

    start: int
    end: int
    contexts: list[tuple[int, int]] = field(default_factory=list)
    pointers: list[int] = field(default_factory=list)
    signal_frames: list[int] = field(default_factory=list)

    def __contains__(self, address: object) -> bool:
        return isinstance(address, int) and self.start <= address < self.end

    def leads_in(self, pointer: int) -> bool:
        """Whether a pointer leads into it. Its very start does not: that is how the stack as a whole is known."""
        return self.start < pointer < self.end


class ParkedStacks:
    """The stacks of coroutines in one process, all of whose threads are stopped."""

    def __init__(
        self, deep: DeepMemory, survey: Survey, memory: Memory, unwinder: Unwinder, guards: Sequence[int]
    ) -> None:
        """``guards`` are what glibc mangles pointers with."""
        self._deep = deep
        self._survey = survey
        self._memory = memory
        self._unwinder = unwinder
        self._guards = guards

    def dead(
        self, addresses: NDArray[np.uint64], threads: Sequence[StoppedThread], restorers: Sequence[int]
    ) -> tuple[Run, ...]:
        """Return the memory below parked coroutines, of those stacks that hold one of the ``addresses``.

        Raises LivegraftError where the process goes away.
        """
        stacks = self._stacks(np.sort(addresses))
        if not stacks:
            return ()
        self._collect(stacks, np.array(restorers, dtype=np.uint64))
        for thread in threads:
            values = np.frombuffer(bytes(thread.registers), dtype=np.uint64).tolist()
            for stack in stacks:
                stack.pointers += [value for value in values if stack.leads_in(value)]
        return tuple(run for stack in stacks for run in self._dead_part(stack, threads))

    # --- which stacks there are ---

    def _stacks(self, hits: NDArray[np.uint64]) -> list[_Coroutine]:
        """The stacks that makecontext was told of, with a hit in each; none that overlap."""
        found: dict[Run, _Coroutine] = {}
        for start, size, pointer, pc in self._ucontexts():
            end = start + size
            if not 0 < start < pointer < end:
                continue
            if int(np.searchsorted(hits, np.uint64(start))) < int(np.searchsorted(hits, np.uint64(end))):
                found.setdefault((start, end), _Coroutine(start, end)).contexts.append((pointer, pc))
        ordered = [found[run] for run in sorted(found)]
        apart = [
            stack
            for number, stack in enumerate(ordered)
            if (number == 0 or ordered[number - 1].end <= stack.start)
            and (number + 1 == len(ordered) or stack.end <= ordered[number + 1].start)
        ]
        return apart if len(apart) <= _MOST_STACKS else []

    def _ucontexts(self) -> Iterator[tuple[int, int, int, int]]:
        """(start and size of its stack, stack pointer, program counter) of every ucontext_t."""
        places: list[int] = []
        for chunk in self._deep.chunks(self._survey):
            every = chunk.every_address()
            own = every + np.uint64(_FPREGS_MEM - _FPREGS)
            places += (every[chunk.words == own] - np.uint64(_FPREGS)).tolist()
        for place in places[:_MOST_CONTEXTS] if len(places) <= _MOST_CONTEXTS else ():
            try:
                yield _UCONTEXT.unpack(self._memory.read(place, _UCONTEXT.size))
            except LivegraftError:
                continue  # it would begin outside of its mapping, and so is none

    # --- what leads there ---

    def _collect(self, stacks: Sequence[_Coroutine], restorers: NDArray[np.uint64]) -> None:
        owners = _Owners(stacks)
        for chunk in self._deep.chunks(self._survey):
            every = chunk.every_address()
            for at, stack in owners.of(chunk.words):
                if int(every[at]) not in stack and stack.leads_in(int(chunk.words[at])):
                    self._note(stack, int(chunk.words[at]), int(every[at]))
            signal_frames = every[np.isin(chunk.words, restorers)]
            for at, stack in owners.of(signal_frames):
                stack.signal_frames.append(int(signal_frames[at]))
            for guard in self._guards:
                at_guard = mangled(chunk.words, guard)
                values = unmangled(chunk.words[at_guard], guard)
                for at, stack in owners.of(values):
                    if stack.leads_in(int(values[at])):
                        self._note_mangled(stack, int(values[at]), int(every[at_guard[at]]), guard)

    def _note_mangled(self, stack: _Coroutine, pointer: int, place: int, guard: int) -> None:
        """A mangled pointer into a stack, which may be the stack pointer of a jmp_buf.

        jmp_buf: rbx, rbp, r12 to r15, rsp, pc (sysdeps/x86_64/jmpbuf-offsets.h), of which rbp, rsp and pc are mangled.
        """
        following = np.array([self._word(place + _WORD)], dtype=np.uint64)
        (pc,) = unmangled(following, guard).tolist()
        if self._is_code(pc):
            stack.contexts.append((pointer, pc))
        elif place not in stack:
            stack.pointers.append(pointer)

    def _note(self, stack: _Coroutine, pointer: int, place: int) -> None:
        """A word outside of a stack that points into it: the stack pointer of a context that was moved, or anything."""
        following = self._word(place + _WORD)
        if self._is_code(following):
            stack.contexts.append((pointer, following))
        else:
            stack.pointers.append(pointer)

    # --- what follows ---

    def _dead_part(self, stack: _Coroutine, threads: Iterable[StoppedThread]) -> Iterator[Run]:
        pointer, pc = min(stack.contexts)
        returns = self._word(pointer - _WORD)
        function = self._unwinder.function_at(pc - 1)
        occupied = any(thread.registers.rsp in stack for thread in threads)
        low_pointers = any(item < pointer - _WORD for item in stack.pointers)
        low_frames = any(item < pointer for item in stack.signal_frames)
        parked = function is not None and function == self._unwinder.function_at(returns - 1)
        if parked and not occupied and not low_pointers and not low_frames:
            yield stack.start, pointer - _WORD

    def _word(self, address: int) -> int:
        try:
            return int.from_bytes(self._memory.read(address, _WORD), "little")
        except LivegraftError:
            return 0  # the end of a mapping

    def _is_code(self, address: int) -> bool:
        mapping = self._survey.mapping(address)
        return mapping is not None and mapping.executable


class _Owners:
    """Which of several stacks, by rising address, addresses lie in."""

    def __init__(self, stacks: Sequence[_Coroutine]) -> None:
        self._stacks = stacks
        self._starts = np.array([stack.start for stack in stacks], dtype=np.uint64)
        self._ends = np.array([stack.end for stack in stacks], dtype=np.uint64)

    def of(self, addresses: NDArray[np.uint64]) -> Iterator[tuple[int, _Coroutine]]:
        """(index, stack) of the addresses that lie in one."""
        low, high = self._starts[0], self._ends[-1]
        near = np.flatnonzero(addresses - low < high - low)
        owners = np.searchsorted(self._starts, addresses[near], side="right") - 1
        inside = addresses[near] < self._ends[owners]
        for at, owner in zip(near[inside].tolist(), owners[inside].tolist(), strict=True):
            yield at, self._stacks[owner]
