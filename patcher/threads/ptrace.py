"""The ptrace requests (ptrace(2)) that the patcher needs, each a function that raises.

python-ptrace gives the C library and the numbers; its process classes are not used, because they attach with
SIGSTOP and know neither PTRACE_SEIZE nor PTRACE_INTERRUPT. Every function here must be called by the OS
thread that seized the tracee, as the kernel demands.

The calls stand in the pause, so they go straight through ctypes: about 2 us each, of which the system call is
most.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from ptrace.binding import func as binding
from ptrace.ctypes_libc import libc

from elfdiff.errors import LivegraftError

from .. import seam
from .registers_x86_64 import Registers


class Request(IntEnum):
    """Request numbers of include/uapi/linux/ptrace.h."""

    POKETEXT = binding.PTRACE_POKETEXT
    GETREGS = binding.PTRACE_GETREGS
    SETREGS = binding.PTRACE_SETREGS
    DETACH = binding.PTRACE_DETACH
    SYSCALL = binding.PTRACE_SYSCALL
    SETOPTIONS = binding.PTRACE_SETOPTIONS
    GETEVENTMSG = binding.PTRACE_GETEVENTMSG
    SEIZE = 0x4206
    INTERRUPT = 0x4207
    SECCOMP_GET_FILTER = 0x420C
    GET_RSEQ_CONFIGURATION = 0x420F


class Option(IntFlag):
    """PTRACE_O_* of include/uapi/linux/ptrace.h."""

    NONE = 0
    TRACESYSGOOD = binding.PTRACE_O_TRACESYSGOOD
    TRACECLONE = binding.PTRACE_O_TRACECLONE
    TRACEEXEC = binding.PTRACE_O_TRACEEXEC
    SUSPEND_SECCOMP = 1 << 21


class PtraceFailed(LivegraftError):
    """The kernel refused a ptrace request; ``request``, ``tid`` and ``errno`` say which and why."""

    def __init__(self, request: Request, tid: int, number: int) -> None:
        """Say what failed in the words of the kernel; ``number`` is the errno."""
        name = errno.errorcode.get(number, str(number))
        super().__init__(
            f"PTRACE_{request.name} of thread {tid} failed",
            why=f"the kernel answered {name} ({os.strerror(number)})",
        )
        self.request = request
        self.tid = tid
        self.errno = number

    @property
    def gone(self) -> bool:
        """Whether the tracee has exited or was killed in its stop (ESRCH), or is exiting (EIO)."""
        return self.errno in (errno.ESRCH, errno.EIO)


# A function object of our own: python-ptrace sets other argument types on the one that it caches.
_ptrace = libc["ptrace"]
_ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_ptrace.restype = ctypes.c_long


def _request(request: Request, tid: int, address: int = 0, data: int = 0) -> None:
    failure = seam.announce(request.name, tid)
    if failure:
        raise PtraceFailed(request, tid, failure)
    if _ptrace(request, tid, address, data) == -1:
        raise PtraceFailed(request, tid, ctypes.get_errno())


def seize(tid: int, options: Option = Option.NONE) -> None:
    """Become the tracer of a thread without stopping it (PTRACE_SEIZE). Raises PtraceFailed."""
    _request(Request.SEIZE, tid, 0, options)


def interrupt(tid: int) -> None:
    """Ask a seized thread to stop; waitpid(2) tells when it has. Raises PtraceFailed."""
    _request(Request.INTERRUPT, tid)


def detach(tid: int, signal: int = 0) -> None:
    """Let a stopped thread go for ever, delivering ``signal`` if not 0. Raises PtraceFailed."""
    _request(Request.DETACH, tid, 0, signal)


def resume_to_syscall(tid: int) -> None:
    """Resume a stopped thread until it enters or leaves a system call. Raises PtraceFailed."""
    _request(Request.SYSCALL, tid)


def set_options(tid: int, options: Option) -> None:
    """Set the options of a stopped thread.

    Raises PtraceFailed (EPERM: SUSPEND_SECCOMP needs CAP_SYS_ADMIN).
    """
    _request(Request.SETOPTIONS, tid, 0, options)


def read_registers_into(tid: int, registers: Registers) -> None:
    """Read the general registers of a stopped thread into a buffer made before. Raises PtraceFailed."""
    _request(Request.GETREGS, tid, 0, ctypes.addressof(registers))


def read_registers(tid: int) -> Registers:
    """Return the general registers of a stopped thread. Raises PtraceFailed."""
    registers = Registers()
    read_registers_into(tid, registers)
    return registers


def write_registers(tid: int, registers: Registers) -> None:
    """Set all general registers of a stopped thread. Raises PtraceFailed."""
    _request(Request.SETREGS, tid, 0, ctypes.addressof(registers))


def event_message(tid: int) -> int:
    """Return what goes with the present PTRACE_EVENT stop: after a clone, the new thread id.

    Raises PtraceFailed.
    """
    value = ctypes.c_ulong()
    _request(Request.GETEVENTMSG, tid, 0, ctypes.addressof(value))
    return value.value


def poke_word(tid: int, address: int, word: int) -> None:
    """Write an unsigned 8-byte word at ``address``, whatever the protection there. Raises PtraceFailed."""
    _request(Request.POKETEXT, tid, address, word)


@dataclass(frozen=True, slots=True)
class RseqConfiguration:
    """Where a thread has registered its restartable sequences (rseq(2)); ``address`` 0: it has not."""

    address: int
    size: int


class _RseqConfiguration(ctypes.Structure):
    # struct ptrace_rseq_configuration, include/uapi/linux/ptrace.h
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


def rseq_configuration(tid: int) -> RseqConfiguration:
    """Return the restartable-sequence registration of a stopped thread.

    A kernel before 5.13 or built without rseq answers EIO: there the registration cannot be known, and the
    caller must find another way. Raises PtraceFailed.
    """
    raw = _RseqConfiguration()
    size = ctypes.sizeof(raw)
    failure = seam.announce(Request.GET_RSEQ_CONFIGURATION.name, tid)
    if failure:
        raise PtraceFailed(Request.GET_RSEQ_CONFIGURATION, tid, failure)
    if _ptrace(Request.GET_RSEQ_CONFIGURATION, tid, size, ctypes.addressof(raw)) == -1:
        raise PtraceFailed(Request.GET_RSEQ_CONFIGURATION, tid, ctypes.get_errno())
    return RseqConfiguration(raw.address, raw.size)


_MOST_INSTRUCTIONS, _INSTRUCTION_SIZE = 4096, 8  # BPF_MAXINSNS, struct sock_filter, linux/filter.h
FilterBuffer = ctypes.c_char * (_MOST_INSTRUCTIONS * _INSTRUCTION_SIZE)
"""Room for the longest filter."""


def seccomp_filter(tid: int, index: int, buffer: ctypes.Array[ctypes.c_char]) -> bytes:
    """Return a system-call filter of a stopped thread: its instructions (struct sock_filter) as they were given.

    ``buffer`` is a ``FilterBuffer`` made before. Raises PtraceFailed (ENOENT: there are not as many; EINVAL: the
    thread has none, or the kernel is built without CONFIG_CHECKPOINT_RESTORE; EACCES: it needs CAP_SYS_ADMIN, and a
    tracer that is under no filter).
    """
    failure = seam.announce(Request.SECCOMP_GET_FILTER.name, tid)
    if failure:
        raise PtraceFailed(Request.SECCOMP_GET_FILTER, tid, failure)
    count = _ptrace(Request.SECCOMP_GET_FILTER, tid, index, ctypes.addressof(buffer))
    if count == -1:
        raise PtraceFailed(Request.SECCOMP_GET_FILTER, tid, ctypes.get_errno())
    return ctypes.string_at(buffer, count * _INSTRUCTION_SIZE)
