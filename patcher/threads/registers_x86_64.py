"""The general registers of x86-64, and how an interrupted system call is put right again.

A thread that is stopped inside a blocking system call shows a negative result in rax while orig_rax still
holds the call's number. Those numbers are the kernel's own (include/linux/errno.h) and never meant for
programs: on the way back to user space the kernel turns them into a restart or, where a signal handler runs
first, into EINTR (arch_do_signal_or_restart, arch/x86/kernel/signal.c).

    -512 ERESTARTSYS            restart, unless a handler without SA_RESTART runs
    -513 ERESTARTNOINTR         always restart
    -514 ERESTARTNOHAND         restart, unless any handler runs
    -516 ERESTART_RESTARTBLOCK  go on by restart_syscall(2), which knows the time that is left

Some calls answer plain EINTR (-4) instead, and a stop by the tracer alone then shows in the program. For
those ``without_spurious_eintr`` writes -514 in its place: the kernel then decides as it does for ppoll(2),
and the program sees EINTR exactly if a handler runs. That is legal only at a stop inside the kernel's signal
loop, where the decision is still to come: PTRACE_EVENT_STOP and signal-delivery-stop.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctypes import Structure as user_regs_struct
else:
    from ptrace.binding.linux_struct import user_regs_struct

_EINTR = 4
_ERESTARTSYS = 512
_ERESTARTNOINTR = 513
_ERESTARTNOHAND = 514
_ERESTART_RESTARTBLOCK = 516
_RESTART_SYSCALL = 219  # arch/x86/entry/syscalls/syscall_64.tbl
_SYSCALL_SIZE = 2  # syscall is 0f 05, int 80h is cd 80
_WORD = 1 << 64
NO_SYSCALL = _WORD - 1
"""orig_rax of a thread that is in no system call: the kernel restarts nothing."""

USER_CODE_64 = 0x33
"""cs in 64-bit mode (__USER_CS, arch/x86/include/asm/segment.h)."""


class Registers(user_regs_struct):
    """``struct user_regs_struct`` of <sys/user.h>: 27 unsigned 64-bit registers, as from PTRACE_GETREGS."""

    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    eflags: int
    rsp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int

    def copy(self) -> Registers:
        """Return a copy that shares no memory with this one."""
        return Registers.from_buffer_copy(self)

    @property
    def result(self) -> int:
        """rax as the signed result of a system call."""
        return ctypes.c_int64(self.rax).value

    @property
    def in_syscall(self) -> bool:
        """Whether the thread stopped on its way out of a system call, or still inside of one."""
        return ctypes.c_int64(self.orig_rax).value >= 0


REGISTER_COUNT = ctypes.sizeof(Registers) // 8
RAX, RSP, RIP, FS_BASE = (getattr(Registers, name).offset // 8 for name in ("rax", "rsp", "rip", "fs_base"))
"""Places of registers among the words of ``Registers``."""
PLAIN_EINTR_RESULT = _WORD - _EINTR
"""rax of a thread whose system call answers EINTR."""
RESTART_RESULT = _WORD - _ERESTART_RESTARTBLOCK
"""rax of a thread whose system call goes on by restart_syscall(2): a relative wait that knows what is left of it."""

# Calls that fail with a plain EINTR when they are disturbed without a handler, from signal(7), "Interruption
# of system calls and library functions by stop signals", the kernel source beside each, and a trial of each with
# a stop by the tracer alone (fixtures/tracees/torture.c). Each has done nothing yet when it says so, so asking
# again loses nothing but time: a relative timeout starts anew, since nothing tells how much of it is over.
_NOTHING_DONE = frozenset(
    {
        # ep_poll, fs/eventpoll.c; no event has been taken.
        232,  # epoll_wait
        281,  # epoll_pwait
        441,  # epoll_pwait2
        # poll_select_finish, fs/select.c: ERESTARTNOHAND, but EINTR where the time that is left cannot be written
        # back, since the timeout is in read-only memory (or the personality has STICKY_TIMEOUTS).
        23,  # select
        270,  # pselect6
        271,  # ppoll
        # do_sigtimedwait, kernel/signal.c; no signal has been taken. Also sigwaitinfo(3).
        128,  # rt_sigtimedwait
        # sock_intr_errno, include/net/sock.h: EINTR where SO_RCVTIMEO or SO_SNDTIMEO is set, and ERESTARTSYS
        # where not; in both cases only when nothing was transferred. A restarted connect(2) waits on, and says
        # EALREADY instead of EINPROGRESS when its time is over (__inet_stream_connect, net/ipv4/af_inet.c).
        0,  # read
        19,  # readv
        327,  # preadv2
        45,  # recvfrom
        47,  # recvmsg
        299,  # recvmmsg
        43,  # accept
        288,  # accept4
        44,  # sendto
        46,  # sendmsg
        307,  # sendmmsg
        42,  # connect
        # do_semtimedop, ipc/sem.c; the operations were not performed.
        65,  # semop
        220,  # semtimedop
        # fs/aio.c: only when no event was taken. (io_pgetevents answers ERESTARTNOHAND.)
        208,  # io_getevents
        # io_cqring_wait, io_uring/io_uring.c: only when nothing was submitted, else the count is returned.
        426,  # io_uring_enter
    }
)
# The same for what is written to a socket. Other files may have done a part of what they were told when they say
# EINTR (memory_reclaim, mm/memcontrol.c), so the program must hear it. Values: the registers with descriptors.
_NOTHING_DONE_BY_SOCKETS = {
    1: ("rdi",),  # write
    20: ("rdi",),  # writev
    328: ("rdi",),  # pwritev2
    40: ("rdi",),  # sendfile: what it goes to; the position in the other file has not moved
    275: ("rdi", "rdx"),  # splice: the other end is a pipe, which never says EINTR
}
PLAIN_EINTR = _NOTHING_DONE | _NOTHING_DONE_BY_SOCKETS.keys()
"""Numbers of syscall_64.tbl of calls that a stop may end with EINTR."""
# Not listed, though signal(7) names them as never restarted after a handler: poll, pause, sigsuspend, msgrcv, msgsnd
# and nanosleep answer one of the numbers above, and close(2) must not be repeated.

_IOCTL = 16
WHEN_NOTHING_WAS_DONE = _NOTHING_DONE
"""Those of them that have always done nothing yet when they say EINTR."""
WHEN_ONLY_THE_DESCRIPTOR_TELLS = frozenset({*_NOTHING_DONE_BY_SOCKETS, _IOCTL})
"""Calls of which ``without_spurious_eintr`` has to ask what they were called for."""
# tty_ioctl and set_termios, drivers/tty: these wait until all is sent, and do what they were asked for only then.
# TCSBRK does so, as tcdrain(3), with an argument other than 0. asm-generic/ioctls.h.
_TCSBRK = 0x5409
_TERMINAL_WAITS = frozenset({0x5403, 0x5407, 0x402C542C})  # TCSETSW, TCSETAW, TCSETSW2

IsSocket = Callable[[int], bool]
"""Whether a descriptor (a number) of the thread in question is a socket."""


def without_spurious_eintr(registers: Registers, is_socket: IsSocket) -> Registers | None:
    """Return the registers that keep a stop from being seen as EINTR, or None where nothing need change.

    For PTRACE_EVENT_STOP without group-stop, and signal-delivery-stop: see the head of this file. In a
    group-stop the EINTR is the stop signal's (signal(7)), and the program would see it without us.
    """
    if registers.rax != _WORD - _EINTR or registers.cs != USER_CODE_64:
        return None
    if not _has_done_nothing(registers, is_socket):
        return None
    fixed = registers.copy()
    fixed.rax = _WORD - _ERESTARTNOHAND
    return fixed


def made_anew(registers: Registers) -> Registers | None:
    """Return the registers with which a call is made anew that would go on by restart_syscall(2), or None.

    For a thread under a filter (seccomp(2)), which is asked for that number, too, and which kills where its author has
    not thought of it, as sshd's does. What is waited for begins anew with its whole timeout.
    """
    if registers.rax != RESTART_RESULT or registers.cs != USER_CODE_64 or not registers.in_syscall:
        return None
    fixed = registers.copy()
    fixed.rax = _WORD - _ERESTARTNOHAND
    return fixed


def _has_done_nothing(registers: Registers, is_socket: IsSocket) -> bool:
    number = registers.orig_rax
    if number == _IOCTL:
        command = registers.rsi & 0xFFFFFFFF  # the kernel takes an unsigned int
        return command in _TERMINAL_WAITS or (command == _TCSBRK and registers.rdx != 0)
    descriptors = (getattr(registers, name) & 0xFFFFFFFF for name in _NOTHING_DONE_BY_SOCKETS.get(number, ()))
    return number in _NOTHING_DONE or any(is_socket(descriptor) for descriptor in descriptors)


def restart(registers: Registers) -> Registers:
    """Return the registers with which the thread must go on in user space after a stop in a system call.

    What the kernel would do on the way out where no handler runs, done by hand, because the thread is to come
    back by a jump: the call is made again, from its own instruction. ``orig_rax`` becomes -1 so that the
    kernel does not do it a second time.
    """
    resumed = registers.copy()
    if resumed.in_syscall:
        if -resumed.result in (_ERESTARTSYS, _ERESTARTNOINTR, _ERESTARTNOHAND):
            resumed.rax = resumed.orig_rax
            resumed.rip -= _SYSCALL_SIZE
        elif -resumed.result == _ERESTART_RESTARTBLOCK:
            resumed.rax = _RESTART_SYSCALL
            resumed.rip -= _SYSCALL_SIZE
    resumed.orig_rax = NO_SYSCALL
    return resumed
