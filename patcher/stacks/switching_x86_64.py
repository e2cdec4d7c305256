"""Which images of a process may switch between stacks of their own: then stacks may be parked that no thread runs on.

Seen are the calls for it that are made by name: ucontext (makecontext(3)), Boost.Context, libco. Not seen are switches
that a program has in its own code, and those made of setjmp(3) and sigaltstack(2), which many use for other ends.

Nearly every server has loaded such an image: OpenSSL's libcrypto, for its jobs (ASYNC_start_job(3)). A job is put aside
by ASYNC_pause_job(3) alone, which libcrypto itself calls nowhere; so where no other image asks for that, no job waits,
and the only stack that may be set aside is that of a thread which is in a job, on the job's stack.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..process.memory import Memory
from ..process.modules import PF_X, PT_LOAD, Module
from ..process.symbols import DynamicSymbols

_UCONTEXT = ("makecontext", "swapcontext", "setcontext")  # getcontext(3) alone is what backtraces are made of
_PAUSE_JOB = "ASYNC_pause_job"
_LIBRARIES = ("jump_fcontext", "ontop_fcontext", "make_fcontext", "co_switch")

# setcontext and swapcontext of glibc in a program that is linked statically (sysdeps/unix/sysv/linux/x86_64/
# setcontext.S): fldenv (reg), then ldmxcsr with the offset of the field in ucontext_t, 0x1c0.
_LOADS_CONTEXT = re.compile(rb"\xd9[\x20-\x27]\x0f\xae[\x90-\x97]\xc0\x01\x00\x00")
_OVERLAP = 16
_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class Switcher:
    """An image, by its file's name, and the calls that it may switch stacks with.

    Unless it ``parks``, a stack is set aside only while a thread runs on another than its own.
    """

    image: str
    calls: tuple[str, ...]
    parks: bool = True

    def __str__(self) -> str:
        """For people."""
        return f"{self.image} ({', '.join(self.calls)})"


def stack_switchers(loaded: Sequence[Module], memory: Memory) -> tuple[Switcher, ...]:
    """Return the images that may switch stacks, in the order given.

    Raises LivegraftError where one cannot be read.
    """
    known = [DynamicSymbols(module, memory) for module in loaded]
    pausing = [symbols.module for symbols in known if symbols.mentions(_PAUSE_JOB)]
    found = []
    for symbols in known:
        calls = _calls(symbols, memory)
        if calls:
            only_jobs = any(symbols.definitions(_PAUSE_JOB)) and pausing == [symbols.module]
            found.append(Switcher(symbols.module.name, calls, parks=not only_jobs))
    return tuple(found)


def _calls(symbols: DynamicSymbols, memory: Memory) -> tuple[str, ...]:
    module = symbols.module
    calls = [name for name in symbols.mentioned((*_UCONTEXT, *_LIBRARIES)) if not _provides(module, symbols, name)]
    if not symbols.needed and _has_own(module, memory):
        calls.append("setcontext, linked in")
    return tuple(calls)


def _provides(module: Module, symbols: DynamicSymbols, name: str) -> bool:
    """Whether it is the C library, or another one, that has the call for others to use."""
    return name in _UCONTEXT and not module.fixed_address and any(symbols.definitions(name))


def _has_own(module: Module, memory: Memory) -> bool:
    for header in module.headers:
        if header.type != PT_LOAD or not header.flags & PF_X:
            continue
        begin, end = module.bias + header.vaddr, module.bias + header.vaddr + header.filesz
        for start in range(begin, end, _CHUNK):
            if _LOADS_CONTEXT.search(memory.read(start, min(_CHUNK + _OVERLAP, end - start))):
                return True
    return False
