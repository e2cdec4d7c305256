"""The deep check: does a stack that no thread runs on return into a forbidden function?

Coroutines that are switched away (makecontext(3), hand-made switches, setjmp(3) with stacks of its own) have their
frames anywhere in writable memory. Nothing tells where, so all of it is searched for words that lead into a forbidden
range and not to the start of a function: return addresses, the program counters of signal frames, and those that glibc
hides in a jmp_buf. Whatever made the switch, it was called, or has saved where it is, so that there is such a word.
What lies on the stack of a thread that was unwound to its beginning is that thread's affair (``threadstacks``), and
what lies below a coroutine that waits further up is left over (``parkedstacks_x86_64``).

A word that is found need not be a frame: it may have been left over by a call that has returned. So it counts as
live, and is not certain.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from elfdiff.errors import LivegraftError, Refused
from trampolines.entry_x86_64 import ENTRY_JUMP_SIZE

from ..closing import Closing
from ..process.memory import Memory
from ..process.proc import Mapping, start_stack
from .callsites_x86_64 import LONGEST_CALL, ends_with_call
from .deepmemory import LEAD, Chunk, DeepMemory, Survey
from .forbidden import ForbiddenRange, ForbiddenRanges
from .frames_x86_64 import SIGFRAME_RIP
from .mangling_x86_64 import POINTER_GUARD, mangled, unmangled
from .parkedstacks_x86_64 import ParkedStacks
from .threadstacks import OwnMemory, own_memory
from .unwind import Unwinder

if TYPE_CHECKING:
    from ..threads.stopped import StoppedThread

_BYTES_PER_SECOND = 3e9  # for what is said about a process that has too much
_NO_NUMBER = 1 << 32  # programs have many numbers below, and few above that happen to be addresses of code
_MOST_FOUND = 256  # then the answer is known
_ENTRY_JUMP = b"\xe9"


@dataclass(frozen=True, slots=True)
class Found:
    """A word in memory that may lead back into the forbidden range ``name``.

    ``address`` is where it is, ``word`` what is there, ``pc`` where it leads. ``where`` names the mapping, ``kind``
    what it looks like.
    """

    name: str
    address: int
    word: int
    pc: int
    where: str
    kind: str

    def words(self) -> str:
        """For people."""
        return f"{self.kind} lies at {self.address:#x} in {self.where}, not on the stack of a thread"


@dataclass(frozen=True, slots=True)
class _Hits:
    """Words of interest: where they are, what they are, where they lead, and what kind they are of; of one length."""

    addresses: NDArray[np.uint64]
    words: NDArray[np.uint64]
    pcs: NDArray[np.uint64]
    kinds: NDArray[np.uint8]

    def only(self, which: NDArray[np.bool_]) -> _Hits:
        return _Hits(self.addresses[which], self.words[which], self.pcs[which], self.kinds[which])


def _hits(chunk: Chunk, at: NDArray[np.intp], pcs: NDArray[np.uint64], kind: int) -> _Hits:
    return _Hits(chunk.addresses(at), chunk.words[at], pcs, np.full(len(at), kind, dtype=np.uint8))


def _together(hits: Sequence[_Hits]) -> _Hits:
    if not hits:
        nothing = np.zeros(0, dtype=np.uint64)
        return _Hits(nothing, nothing, nothing, np.zeros(0, dtype=np.uint8))
    return _Hits(
        np.concatenate([item.addresses for item in hits]),
        np.concatenate([item.words for item in hits]),
        np.concatenate([item.pcs for item in hits]),
        np.concatenate([item.kinds for item in hits]),
    )


_PLAIN, _MANGLED, _SIGNAL = range(3)


class DeepCheck(Closing):
    """Searches the memory of one process; a context manager."""

    def __init__(
        self,
        memory: Memory,
        forbidden: Sequence[ForbiddenRange],
        limit: int,
        entries: Collection[int] = (),
        *,
        strays_only: bool = False,
    ) -> None:
        """``limit``: bytes that are searched at most; ``entries``: where functions start that no unwind table tells.

        ``strays_only``: called for only where a thread runs on another stack than its own.
        Raises BadInput, NotPermitted, LivegraftError.
        """
        self.strays_only = strays_only
        self._memory = memory
        self._limit = limit
        self._ranges = ForbiddenRanges(forbidden)
        # A pointer to a function is no return address, wherever it is kept.
        self._inside = ForbiddenRanges([replace(item, harmless_at_start=True) for item in forbidden])
        self._starts = sorted(item.start for item in forbidden)
        self._leads_back = dict.fromkeys(entries, False)
        self._found: tuple[Found, ...] = ()
        self._start_stack = start_stack(memory.pid)
        self._deep = DeepMemory(memory.pid)

    def close(self) -> None:
        """Close what it has opened. May be called twice."""
        self._deep.close()

    def require_limit(self) -> None:
        """Raise Refused where the process has more memory than may be searched. Stops nobody."""
        self._survey()

    def _survey(self) -> Survey:
        survey = self._deep.survey()
        if survey.size > self._limit:
            raise self._too_much(survey.size)
        return survey

    def _too_much(self, size: int) -> Refused:
        mebibytes = -(-size // (1 << 20))
        return Refused(
            f"process {self._memory.pid} has too much memory to be searched for coroutines while it stands still",
            why=f"{mebibytes} MiB of its writable memory are in use, and a stack that no thread runs on may be "
            f"anywhere in it; the limit is {self._limit >> 20} MiB. It would stand still for about "
            f"{1000 * size / _BYTES_PER_SECOND:.0f} ms",
            next_step=f"--deep-limit {mebibytes + mebibytes // 10 + 1} if that is acceptable, or --no-deep-check if no "
            "coroutine can be waiting in a patched function",
        )

    def check(
        self, threads: Sequence[StoppedThread], restorers: Sequence[int], unwinder: Unwinder
    ) -> tuple[tuple[Found, ...], int]:
        """What may lead back into a forbidden range from memory that is no running thread's stack, and bytes searched.

        All ``threads`` of the process are stopped; ``restorers`` are what signal handlers return to.
        Raises Refused where the memory has grown beyond the limit, LivegraftError where it cannot be read.
        """
        survey = self._survey()
        guards = self._guards(threads)
        hits = self._search(survey, restorers, guards)
        self._found = ()
        seen = _together(hits)
        seen = seen.only((seen.kinds == _SIGNAL) | self._lead_back(seen.pcs, unwinder))
        if len(seen.pcs):
            own = OwnMemory(self._own_memory(seen.addresses, threads, survey, unwinder))
            seen = seen.only(~own.holds(seen.addresses))
        if len(seen.pcs):
            parked = ParkedStacks(self._deep, survey, self._memory, unwinder, guards)
            dead = OwnMemory(parked.dead(seen.addresses, threads, restorers))
            self._found = tuple(self._named(seen.only(~dead.holds(seen.addresses)), survey))
        return self._found, survey.size

    def persists(self) -> bool:
        """Whether a word that the last check has found is still where it was. Stops nobody."""
        return any(self._word(item.address) == item.word for item in self._found)

    def _word(self, address: int) -> int | None:
        try:
            return int.from_bytes(self._memory.read(address, 8), "little")
        except LivegraftError:
            return None  # it is gone; what that means is for the next check to say

    def _guards(self, threads: Sequence[StoppedThread]) -> tuple[int, ...]:
        """What glibc hides program counters with: one for the whole process, kept by every thread."""
        places = [thread.registers.fs_base + POINTER_GUARD for thread in threads if thread.registers.fs_base]
        return tuple(sorted({self._word(place) or 0 for place in places} - {0}))

    # --- the search ---

    def _search(self, survey: Survey, restorers: Sequence[int], guards: Sequence[int]) -> list[_Hits]:
        hits: list[_Hits] = []
        frames = np.array(restorers, dtype=np.uint64)
        for chunk in self._deep.chunks(survey):
            at = self._ranges.return_addresses(chunk.words)
            if len(at):
                hits += self._sorted_out(chunk, at, frames)
            for guard in guards:
                hits += self._mangled(chunk, guard)
        return hits

    def _sorted_out(self, chunk: Chunk, at: NDArray[np.intp], frames: NDArray[np.uint64]) -> Iterator[_Hits]:
        """Tell program counters of signal frames, which may be any, from return addresses."""
        in_frame = np.isin(chunk.lead[at + (LEAD - SIGFRAME_RIP // 8)], frames)
        yield _hits(chunk, at[in_frame], chunk.words[at[in_frame]], _SIGNAL)
        rest = at[~in_frame]
        rest = rest[self._inside.return_addresses(chunk.words[rest])]
        yield _hits(chunk, rest, chunk.words[rest], _PLAIN)

    def _mangled(self, chunk: Chunk, guard: int) -> Iterator[_Hits]:
        at = mangled(chunk.words, guard)
        if len(at):
            pcs = unmangled(chunk.words[at], guard)
            inside = self._inside.return_addresses(pcs)
            yield _hits(chunk, at[inside], pcs[inside], _MANGLED)

    # --- the verdict ---

    def _own_memory(
        self, addresses: NDArray[np.uint64], threads: Sequence[StoppedThread], survey: Survey, unwinder: Unwinder
    ) -> Iterator[tuple[int, int]]:
        """The stacks of the threads that have one of the addresses near them."""
        addresses = np.sort(addresses)
        for thread in threads:
            registers = thread.registers
            near = [survey.mapping(address) for address in (registers.rsp, registers.fs_base)]
            is_main = thread.tid == self._memory.pid
            near += [mapping for mapping in survey.maps if is_main and mapping.path == "[stack]"]
            if any(mapping is not None and _any_in(addresses, mapping) for mapping in near):
                stack = unwinder.unwind(registers, self._memory.read)
                begin = self._start_stack if is_main else None
                yield from own_memory(thread, stack, survey.maps, self._memory, start_stack=begin)

    def _named(self, hits: _Hits, survey: Survey) -> Iterator[Found]:
        rows = (hits.addresses.tolist(), hits.words.tolist(), hits.pcs.tolist(), hits.kinds.tolist())
        for address, word, pc, kind in islice(zip(*rows, strict=True), _MOST_FOUND):
            name = self._name(pc, kind)
            if name:
                yield Found(name, address, word, pc, _described(survey.mapping(address)), _KINDS[kind])

    def _name(self, pc: int, kind: int) -> str:
        if kind != _SIGNAL:
            return self._ranges.of_return_address(pc).name
        found = self._ranges.of_instruction(pc, next_instruction=True)
        return found.name if found is not None else ""

    def _lead_back(self, pcs: NDArray[np.uint64], unwinder: Unwinder) -> NDArray[np.bool_]:
        """Whether each of these addresses may be where a function goes on.

        The start of a function is none, although a call may end there: one that never returns, which compilers put at
        the end of the function before. Pointers to functions are everywhere. A number that is an address by chance is
        told by the call that should be before it; of large ones there are hardly any, so those need no call: a switch
        that is no call may have left one.
        """
        unique, which = np.unique(pcs, return_inverse=True)
        unknown = [pc for pc in unique.tolist() if pc not in self._leads_back]
        held = self._memory.read_many([(pc - LONGEST_CALL, LONGEST_CALL) for pc in unknown])
        for pc, code in zip(unknown, held, strict=True):
            plausible = pc >= _NO_NUMBER or ends_with_call(code) or self._behind_an_entry_jump(pc)
            self._leads_back[pc] = plausible and unwinder.function_at(pc) != pc
        return np.array([self._leads_back[pc] for pc in unique.tolist()], dtype=np.bool_)[which]

    def _behind_an_entry_jump(self, pc: int) -> bool:
        """Whether the call may have been overwritten by an entry jump."""
        first = bisect_left(self._starts, pc - ENTRY_JUMP_SIZE - LONGEST_CALL)
        near = self._starts[first : bisect_left(self._starts, pc)]
        return _ENTRY_JUMP in self._memory.read_many([(start, 1) for start in near])


_KINDS = {
    _PLAIN: "an address in it",
    _MANGLED: "a jump buffer of setjmp",
    _SIGNAL: "the program counter of a signal frame",
}


def _any_in(addresses: NDArray[np.uint64], mapping: Mapping) -> bool:
    first, last = np.searchsorted(addresses, np.array([mapping.start, mapping.end], dtype=np.uint64))
    return int(first) < int(last)


def _described(mapping: Mapping | None) -> str:
    if mapping is None:
        return "unmapped memory"
    return mapping.path or f"anonymous memory {mapping.start:#x}-{mapping.end:#x}"
