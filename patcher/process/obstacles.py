"""What can stand in the way of a patch, one function an obstacle: the same words for a refusal and for ``doctor``.

Each takes values that were read (``surroundings``) and returns the obstacle, or None where it is not there. A refusal
raises it; ``doctor`` shows it before anybody tries. The order of the reasons in ``may_not_be_traced`` is that in
which the kernel asks (__ptrace_may_access, kernel/ptrace.c).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from elfdiff.errors import BadInput, Busy, LivegraftError, NotPermitted, Refused

from .surroundings import SYS_PTRACE, YAMA, Credentials, Freezer, Limits

_SHOWN = 5
_OUT_OF_CONTAINER = (
    "run as root outside of the container, or give the container CAP_SYS_PTRACE (docker run --cap-add SYS_PTRACE)"
)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What stands in the way, why with the values seen, and the command that lifts it; ``kind`` is how it is raised."""

    kind: type[LivegraftError]
    what: str
    why: str
    next_step: str
    details: tuple[str, ...] = ()

    def as_error(self) -> LivegraftError:
        """Return it as the error that a command raises."""
        return self.kind(self.what, why=self.why, next_step=self.next_step, details=self.details)


def foreign_proc(ours: bool) -> Obstacle | None:
    """``/proc`` is that of another pid namespace, so that its numbers mean other processes to ptrace(2)."""
    if ours:
        return None
    return Obstacle(
        BadInput,
        "/proc does not show the processes of this pid namespace",
        "/proc/self is not this process, so process ids in /proc and those that the kernel takes from us differ",
        "mount it anew: mount -t proc proc /proc (unshare does so with --mount-proc), or run livegraft outside",
    )


def not_a_target(pid: int, name: str, why: str) -> Obstacle | None:
    """It is no process that can be patched at all; ``why`` says so, or is empty."""
    if not why:
        return None
    return Obstacle(BadInput, f"process {pid} ({name}) cannot be patched", why, "give the pid of another process")


def traced(pid: int, name: str, tracer: int, tracer_name: str) -> Obstacle | None:
    """Somebody else traces it (ptrace(2)): a debugger, strace, another patcher. ``tracer`` 0: nobody."""
    if not tracer:
        return None
    return Obstacle(
        NotPermitted,
        f"process {pid} ({name}) is traced already",
        f"process {tracer} ({tracer_name}) traces it, and the kernel allows one tracer only",
        f"detach {tracer_name} from process {pid}, or end it, and try again",
    )


def not_for_this_processor(pid: int, name: str, kind: tuple[int, str] | None) -> Obstacle | None:
    """Its program is of another word size or machine; ``kind`` as ``surroundings.kind_of_program``."""
    if kind is None or kind == (64, "x86-64"):
        return None
    bits, machine = kind
    return Obstacle(
        Refused,
        f"process {pid} ({name}) is a {bits}-bit program for {machine}",
        "livegraft patches 64-bit programs for x86-64",
        "restart the program instead",
    )


def frozen(pid: int, name: str, freezer: Freezer | None) -> Obstacle | None:
    """Its control group is frozen: its threads would neither stop nor make system calls."""
    if freezer is None:
        return None
    return Obstacle(
        Busy,
        f"process {pid} ({name}) is frozen",
        f"its control group is, by {freezer.file}",
        f"echo {freezer.thaw} > {freezer.file}",
    )


def does_not_stop(pid: int, count: int, within: float, details: tuple[str, ...]) -> Obstacle | None:
    """Threads did not stop, or waited uninterruptibly, for ``within`` seconds; ``details`` has a line for each."""
    if not count:
        return None
    return Obstacle(
        Busy,
        f"{count} of the threads of process {pid} did not stop within {within:g} s",
        "a thread that waits uninterruptibly (disk, NFS, vfork) or gets no CPU cannot be stopped",
        "try again, or see what the thread waits for",
        details,
    )


def shares_memory(pid: int, name: str, others: tuple[int, ...]) -> Obstacle | None:
    """Other processes share the memory of the process."""
    if not others:
        return None
    return Obstacle(
        Busy,
        f"process {pid} ({name}) shares its memory with process {others[0]}",
        "one is a child of the other that has not executed a program of its own yet (vfork(2), CLONE_VM); "
        "what is written for one is written for both, and the other would not be stopped",
        "try again when the child has executed its program or ended",
    )


def may_not_be_traced(
    pid: int, name: str, own: Credentials, other: Credentials, yama: int | None, label: str, answer: str
) -> Obstacle:
    """The kernel does not let us trace it; ``answer`` is what it said, ``label`` what a security module says of it."""
    what = f"process {pid} ({name}) may not be traced"
    if yama is not None and yama >= 3:
        return Obstacle(NotPermitted, what, f"{YAMA} is {yama}: nobody may trace", "only a reboot lifts this setting")
    if own.has(SYS_PTRACE):
        return _by_policy(what, own, other, label, answer)
    why = f"it belongs to user {other.uids[1]}, this is user {own.uids[1]} without CAP_SYS_PTRACE"
    next_step = "run as root: sudo livegraft ..." if own.uids[1] else _OUT_OF_CONTAINER
    if any(uid != own.uids[1] for uid in other.uids):
        pass
    elif yama is not None and yama >= 1:
        why = f"{YAMA} is {yama}; this is user {own.uids[1]} without CAP_SYS_PTRACE"
        next_step += ", or sysctl kernel.yama.ptrace_scope=0" if yama == 1 else ""
    elif not other.dumpable:
        why += ", and it is not dumpable (it changed its user, or asked for that; prctl(2))"
    elif other.permitted & ~own.permitted:
        why += ", and it holds capabilities that we lack"
    else:
        why += f"; {answer}{_confined(label)}"
    return Obstacle(NotPermitted, what, why, next_step)


def _by_policy(what: str, own: Credentials, other: Credentials, label: str, answer: str) -> Obstacle:
    if own.user_namespace and other.user_namespace != own.user_namespace:
        return Obstacle(
            NotPermitted,
            what,
            f"it is in another user namespace than we ({own.user_namespace}), where our rights count for nothing; "
            f"{answer}",
            "run as root in the namespace of the process or one above it, such as that of the host",
        )
    return Obstacle(
        NotPermitted,
        what,
        f"{answer}{_confined(label)}",
        "see whether a security module forbids it (dmesg | grep -i -e avc -e apparmor), or a filter of the container",
    )


def _confined(label: str) -> str:
    return f", and a security module confines it as {label}" if label and label != "unconfined" else ""


def filter_stays(name: str, tid: int, answer: str) -> Obstacle:
    """A thread is under seccomp(2), and the kernel does not let us suspend that; ``answer`` is what it said."""
    return Obstacle(
        NotPermitted,
        f"the system-call filter of thread {tid} ({name}) cannot be suspended",
        f"{answer}; it needs CAP_SYS_ADMIN in the first user namespace, a kernel with CONFIG_CHECKPOINT_RESTORE, and a "
        "tracer that is under no filter itself",
        "run as root outside of any sandbox or container",
    )


def filter_may_kill(pid: int, name: str, how: str, imports: tuple[str, ...]) -> Obstacle:
    """New code calls ``imports``, which the old build does not import, and seccomp(2) may kill for it.

    ``how`` says what may become of which thread: "the filter of thread 7 may answer by SECCOMP_RET_TRAP".
    """
    shown = ", ".join(imports[:_SHOWN]) + (f" and {len(imports) - _SHOWN} more" if len(imports) > _SHOWN else "")
    return Obstacle(
        Refused,
        f"the system-call filter of process {pid} ({name}) may kill it for what the new code calls",
        f"the patch imports {shown}, which the old build does not, and {how}; a process keeps the filter of the build "
        "that has set it up",
        "if it lets through what these functions do: livegraft diff OLD NEW -o PATCH --allow new-import; "
        "else restart the program",
        imports if len(imports) > _SHOWN else (),
    )


def filter_unreadable(pid: int, name: str, tid: int, answer: str) -> Obstacle:
    """New code imports what the old build does not, and the kernel does not show us the filter of a thread."""
    return Obstacle(
        NotPermitted,
        f"the system-call filter of process {pid} ({name}) cannot be read, and may kill it for what the new code calls",
        f"PTRACE_SECCOMP_GET_FILTER of thread {tid}: {answer}; it needs CAP_SYS_ADMIN in the first user namespace, a "
        "kernel with CONFIG_CHECKPOINT_RESTORE, and a tracer that is under no filter itself",
        "run as root outside of any sandbox or container; or, if the filter lets through what the new imports call: "
        "livegraft diff OLD NEW -o PATCH --allow new-import",
    )


def no_room(low: int, size: int, window: tuple[int, int]) -> Obstacle:
    """No free range as large as needed lies near enough to an image."""
    return Obstacle(
        Refused,
        f"there is no room for {size} bytes within 2 GiB of the image at {low:#x}",
        f"the free ranges between {window[0]:#x} and {window[1]:#x} are too small or reserved for the heap and the "
        "stack",
        "restart the program instead",
    )


def no_padding(pid: int, size: int, found: str) -> Obstacle:
    """No image has room behind its text for the stub that makes system calls; ``found`` says what there is."""
    return Obstacle(
        LivegraftError,
        f"process {pid} has no room for a remote system call",
        f"it needs {size} zero bytes behind program text; padding found (bytes): {found}",
        "restart the process",
    )


def no_more_memory(pid: int, name: str, found: Limits, size: int, mappings: int) -> Obstacle | None:
    """One of its limits keeps it from mapping ``size`` bytes more in ``mappings`` pieces (getrlimit(2), mmap(2))."""
    what = f"process {pid} ({name}) may not map {size} bytes more"
    for option, resource, used, limit in (
        ("as", "RLIMIT_AS", found.size, found.size_limit),
        ("data", "RLIMIT_DATA", found.data, found.data_limit),
    ):
        if limit is not None and used + size > limit:
            why = f"its {resource} is {limit} bytes, of which {used} are used"
            return Obstacle(Refused, what, why, f"prlimit --pid {pid} --{option}={_room_for(used + size)}")
    if found.locked and found.locked_limit is not None and found.locked + size > found.locked_limit:
        return Obstacle(
            Refused,
            what,
            f"it locks its memory, {found.locked} bytes of the {found.locked_limit} of its RLIMIT_MEMLOCK",
            f"prlimit --pid {pid} --memlock={_room_for(found.locked + size)}",
        )
    if found.mappings + mappings > found.mappings_limit:
        return Obstacle(
            Refused,
            what,
            f"it has {found.mappings} mappings, and vm.max_map_count is {found.mappings_limit}",
            f"sysctl vm.max_map_count={found.mappings_limit + 1024}",
        )
    if found.commit_limit is not None and found.committed + size > found.commit_limit:
        return Obstacle(
            Refused,
            what,
            f"vm.overcommit_memory is 2, and {found.committed} of {found.commit_limit} bytes are committed",
            "sysctl vm.overcommit_memory=0, or end what needs the memory",
        )
    return None


def _room_for(size: int) -> int:
    """A limit that leaves room for this and the next patch."""
    return (size + (64 << 20)) >> 20 << 20


def unexplained_no_memory(pid: int, name: str, size: int, number: int) -> Obstacle:
    """It could not map memory, and no limit that can be seen explains it; ``number`` is the errno."""
    return Obstacle(
        Refused,
        f"process {pid} ({name}) may not map {size} bytes more",
        f"the kernel answered {errno.errorcode.get(number, number)}, though none of its limits is reached",
        "see whether the machine is out of memory, and try again",
    )
