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


# Calls that fail with a plain EINTR when they are disturbed without a handler, from signal(7), "Interruption
# of system calls and library functions by stop signals", and the kernel source beside each. Each has done
# nothing yet when it says so, so asking again loses nothing but time: a relative timeout starts anew.
PLAIN_EINTR = frozenset(
    {
        # ep_poll, fs/eventpoll.c; no event has been taken.
        232,  # epoll_wait
        281,  # epoll_pwait
        441,  # epoll_pwait2
        # do_sigtimedwait, kernel/signal.c; no signal has been taken. Also sigwaitinfo(3).
        128,  # rt_sigtimedwait
        # sock_intr_errno, include/net/sock.h: EINTR where SO_RCVTIMEO or SO_SNDTIMEO is set, and ERESTARTSYS
        # where not; in both cases only when nothing was transferred. A restarted connect(2) waits on.
        0,  # read
        19,  # readv
        45,  # recvfrom
        47,  # recvmsg
        299,  # recvmmsg
        43,  # accept
        288,  # accept4
        1,  # write
        20,  # writev
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
"""Numbers of syscall_64.tbl."""
# Not listed, though signal(7) names them as never restarted after a handler: poll, select, pause, sigsuspend,
# msgrcv, msgsnd and nanosleep answer one of the numbers above, and close(2) must not be repeated.


def without_spurious_eintr(registers: Registers) -> Registers | None:
    """Return the registers that keep a stop from being seen as EINTR, or None where nothing need change.

    For PTRACE_EVENT_STOP without group-stop, and signal-delivery-stop: see the head of this file. In a
    group-stop the EINTR is the stop signal's (signal(7)), and the program would see it without us.
    """
    if registers.rax != _WORD - _EINTR or registers.orig_rax not in PLAIN_EINTR:
        return None
    if registers.cs != USER_CODE_64:
        return None
    fixed = registers.copy()
    fixed.rax = _WORD - _ERESTARTNOHAND
    return fixed


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
