"""What ``/proc/PID`` says about a process: mappings, threads, state, tracer.

Formats are those of proc(5). Everything here is a snapshot; nothing here needs the process to be stopped.
"""

from __future__ import annotations

import bisect
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from elfdiff.errors import BadInput, LivegraftError, NotPermitted

_PF_EXITING, _PF_KTHREAD = 0x00000004, 0x00200000  # include/linux/sched.h; field 9 of /proc/PID/stat
_STAT_FLAGS = 9
_STAT_THREADS = 20
_STAT_START_TIME = 22
_STAT_START_STACK = 28
_STAT_START_BRK = 47

_MAPS_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ([-rwxsp]{4}) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) (\d+) *(.*)")
_OCTAL_ESCAPE = re.compile(r"\\([0-7]{3})")
MEMFD_PATH = "/memfd:livegraft"
"""How ``/proc/PID/maps`` and ``/proc/PID/fd`` show the memory files that ``RemoteCaller`` makes (memfd_create(2))."""
_DELETED = " (deleted)"
_ENDED = "ZX"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of ``/proc/PID/maps``; addresses and offset in bytes, ``end`` is exclusive.

    ``path`` is empty for anonymous memory, ``[name]`` for the kernel's own, and has lost its ``(deleted)``
    suffix, which ``deleted`` tells instead.
    """

    start: int
    end: int
    perms: str
    offset: int
    device: str
    inode: int
    path: str
    deleted: bool = False

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    @property
    def executable(self) -> bool:
        """Whether instructions may be fetched from it."""
        return self.perms[2] == "x"

    @property
    def readable(self) -> bool:
        """Whether the process itself may read it."""
        return self.perms[0] == "r"

    @property
    def writable(self) -> bool:
        """Whether the process itself may write it."""
        return self.perms[1] == "w"

    @property
    def private(self) -> bool:
        """Whether a write stays in this process (copy on write)."""
        return self.perms[3] == "p"

    def __contains__(self, address: object) -> bool:
        """Whether ``address`` lies inside."""
        return isinstance(address, int) and self.start <= address < self.end


SECCOMP_STRICT, SECCOMP_FILTER = 1, 2  # linux/seccomp.h, SECCOMP_MODE_*


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """The part of ``/proc/PID/status`` and ``/proc/PID/stat`` that decides whether a process can be patched.

    ``state`` is the letter (R, S, D, T, t, Z, X, I); ``uid`` is the effective one; ``seccomp`` is the mode of
    seccomp(2) of this one thread, 0 for none; ``parent`` is the pid of the parent, whoever traces; ``tracer_pid`` is 0
    where nobody does; ``ns_pid`` is the pid in every nested pid namespace, outermost first; ``start_time`` is in clock
    ticks since boot and, with ``pid``, names the process for ever.
    """

    pid: int
    name: str
    state: str
    tgid: int
    parent: int
    tracer_pid: int
    uid: int
    kernel_thread: bool
    seccomp: int
    no_new_privs: bool
    ns_pid: tuple[int, ...]
    start_time: int

    @property
    def zombie(self) -> bool:
        """Whether it has exited and only waits to be reaped."""
        return self.state in _ENDED


def read_proc_file(pid: int, name: str) -> str:
    """Return the text of ``/proc/PID/NAME``.

    Raises BadInput where there is no such process, NotPermitted where the kernel hides the file.
    """
    try:
        with open(f"/proc/{pid}/{name}", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError) as error:
        raise _unreadable(pid, name, error) from error


def open_proc_file(pid: int, name: str) -> int:
    """Return a descriptor of ``/proc/PID/NAME``, a file or a folder, for reading; it is the caller's to close.

    Raises as ``read_proc_file``.
    """
    try:
        return os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError) as error:
        raise _unreadable(pid, name, error) from error


def _unreadable(pid: int, name: str, error: OSError) -> LivegraftError:
    if not isinstance(error, PermissionError):
        return no_such_process(pid)
    return NotPermitted(
        f"/proc/{pid}/{name} may not be read",
        why=f"the kernel answered {error.strerror}; this is user {os.geteuid()}",
        next_step="run as the owner of the process with ptrace rights, or as root",
    )


def no_such_process(pid: int) -> BadInput:
    """Return the error that says that ``pid`` does not exist (any more)."""
    return BadInput(
        f"there is no process {pid}",
        why=f"/proc/{pid} does not exist, or the process exited while it was looked at",
        next_step="give the pid of a running process; ps -e lists them",
    )


def executed_another_program(pid: int) -> LivegraftError:
    """Return the error that says that a process is no longer the program that was looked at."""
    return LivegraftError(
        f"process {pid} has executed another program",
        why="an execve(2) came after it was looked at",
        next_step="look at the process again; the patch is for the program that it was",
    )


def parse_mapping(line: str) -> Mapping:
    """Return the mapping that one line of ``/proc/PID/maps`` describes (proc(5), without its newline).

    Raises LivegraftError on a line of any other form.
    """
    match = _MAPS_LINE.fullmatch(line)
    if match is None:
        raise LivegraftError("a line of /proc/PID/maps is not understood", why=repr(line))
    start, end, perms, offset, device, inode, path = match.groups()
    deleted = path.endswith(_DELETED)
    path = path.removesuffix(_DELETED) if deleted else path
    path = _OCTAL_ESCAPE.sub(lambda escape: chr(int(escape[1], 8)), path)
    return Mapping(int(start, 16), int(end, 16), perms, int(offset, 16), device, int(inode), path, deleted)


def mappings(pid: int) -> tuple[Mapping, ...]:
    """Return the memory mappings of a process, by rising address.

    Raises BadInput (no such process), NotPermitted.
    """
    return tuple(parse_mapping(line) for line in _maps_lines(pid) if line)


def _maps_lines(pid: int) -> list[str]:
    def lines(tid: int) -> list[str]:
        text = read_proc_file(pid, f"task/{tid}/maps")
        if not text:
            raise no_such_process(pid)  # it ended between opening and reading
        return text.split("\n")

    return by_living_thread(pid, lines)


def code_lines(pid: int) -> tuple[str, ...]:
    """Return the lines of ``/proc/PID/maps`` of executable mappings, by rising address.

    For asking whether they are still the same: parsing all lines takes ten times as long as reading them.
    Raises BadInput (no such process), NotPermitted.
    """
    return tuple(line for line in _maps_lines(pid) if line[line.find(" ") + 3 : line.find(" ") + 4] == "x")


def mapping_over(maps: Sequence[Mapping], start: int, size: int) -> Mapping | None:
    """Return the mapping that holds all of [start, start + size), or None. ``maps`` rise by address.

    The kernel merges neighbouring mappings that are alike, so a range may lie inside of a larger one.
    """
    index = bisect.bisect_right(maps, start, key=lambda mapping: mapping.start) - 1
    if index < 0 or start + size > maps[index].end:
        return None
    return maps[index]


def thread_ids(pid: int) -> tuple[int, ...]:
    """Return the ids of all threads of a process, ascending; a zombie leader is among them.

    Raises BadInput (no such process).
    """
    try:
        return tuple(sorted(int(name) for name in os.listdir(f"/proc/{pid}/task")))  # noqa: PTH208
    except (FileNotFoundError, ProcessLookupError) as error:
        raise no_such_process(pid) from error


def thread_count(pid: int) -> int:
    """Return the number of threads of a process, those that are exiting included. Raises BadInput."""
    return _stat_field(read_proc_file(pid, "stat"), _STAT_THREADS)


def addressees(pid: int) -> tuple[int, ...]:
    """Return the threads of a process that the kernel asks whether a signal for the whole process is ignored.

    That is a thread that has children for SIGCHLD (do_notify_parent, kernel/signal.c), and the main thread, which comes
    last here, for what kill(2) sends. Where the kernel lacks CONFIG_PROC_CHILDREN it cannot be known who has children.
    Raises BadInput (no such process).
    """
    return (*(tid for tid in thread_ids(pid) if tid != pid and has_children(pid, tid)), pid)


def has_children(pid: int, tid: int) -> bool:
    """Whether a thread of a process has children of its own; false where it cannot be known."""
    try:
        with open(f"/proc/{pid}/task/{tid}/children", "rb", buffering=0) as file:
            return bool(file.read(1))
    except OSError:
        return False  # no such file, or the thread has ended


def is_socket(tid: int, descriptor: int) -> bool:
    """Return whether a descriptor of a thread is a socket; False where it is not open (any more).

    Raises LivegraftError where the kernel does not say. Threads need not share their descriptors (clone(2)).
    """
    try:
        return os.readlink(f"/proc/{tid}/fd/{descriptor}").startswith("socket:")  # noqa: PTH115
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError as error:
        raise LivegraftError(f"descriptor {descriptor} of thread {tid} is hidden", why=str(error)) from error


def living_thread(pid: int) -> int:
    """Return the thread whose entry in ``/proc/PID/task`` shows the memory, mappings and files of a process.

    The main thread, or the first other where that one has ended: what has ended shows nothing of the kind (proc(5)).
    Raises BadInput (no such process, or all its threads have ended).
    """
    for tid in (pid, *(other for other in thread_ids(pid) if other != pid)):
        try:
            state = read_proc_file(pid, f"task/{tid}/stat").rpartition(")")[2].split()[0]
        except BadInput:
            continue  # ended and reaped between the two looks
        if state not in _ENDED:
            return tid
    raise no_such_process(pid)


def by_living_thread(pid: int, look: Callable[[int], _T]) -> _T:
    """Return ``look(tid)`` for the thread that ``living_thread`` names; again with another where it ended meanwhile.

    Raises what ``look`` does, and BadInput (no such process).
    """
    while True:
        tid = living_thread(pid)
        try:
            return look(tid)
        except (OSError, LivegraftError):
            if living_thread(pid) == tid:
                raise


def executable_of(pid: int) -> str:
    """Return the path of the executable of a process, as its mappings have it; also where the file was deleted since.

    Raises BadInput (no such process), NotPermitted; OSError where it may not be seen, or is none (a kernel thread).
    """
    return by_living_thread(
        pid, lambda tid: os.readlink(f"/proc/{pid}/task/{tid}/exe").removesuffix(_DELETED)  # noqa: PTH115
    )


def _stat_field(text: str, number: int) -> int:
    # The name of the program stands in parentheses and may hold anything, parentheses and blanks included.
    return int(text.rpartition(")")[2].split()[number - 3])


def status(pid: int) -> ProcessStatus:
    """Return what the kernel says about a process or thread.

    Raises BadInput (no such process).
    """
    lines = read_proc_file(pid, "status").split("\n")
    fields = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    stat = read_proc_file(pid, "stat")
    return ProcessStatus(
        pid=pid,
        name=fields["Name"],
        state=fields["State"][0],
        tgid=int(fields["Tgid"]),
        parent=int(fields["PPid"]),
        tracer_pid=int(fields["TracerPid"]),
        uid=int(fields["Uid"].split()[1]),
        kernel_thread=bool(_stat_field(stat, _STAT_FLAGS) & _PF_KTHREAD),
        # Both lines are missing on kernels built without seccomp.
        seccomp=int(fields.get("Seccomp", "0")),
        no_new_privs=fields.get("NoNewPrivs", "0") == "1",
        ns_pid=tuple(int(word) for word in fields.get("NSpid", str(pid)).split()),
        start_time=_stat_field(stat, _STAT_START_TIME),
    )


def is_leaving(tid: int) -> bool:
    """Whether a thread will execute no more instruction of its program: it has exited, or is about to."""
    try:
        stat = read_proc_file(tid, "stat")
    except BadInput:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX" or bool(_stat_field(stat, _STAT_FLAGS) & _PF_EXITING)


def has_exited(pid: int) -> bool:
    """Whether no thread of a process will execute an instruction any more."""
    try:
        return all(map(is_leaving, thread_ids(pid)))
    except BadInput:
        return True


def code_size(pid: int) -> tuple[str, ...]:
    """Return the lines of ``/proc/PID/status`` with the size of all executable mappings: cheaper than to look at each.

    Raises BadInput (no such process).
    """
    # In the pause: the main thread is asked first, without asking whether it lives.
    return _code_size(read_proc_file(pid, "status")) or by_living_thread(
        pid, lambda tid: _code_size(read_proc_file(pid, f"task/{tid}/status"))
    )


def _code_size(text: str) -> tuple[str, ...]:
    return tuple(line for line in text.split("\n") if line.startswith(("VmExe:", "VmLib:")))


def start_brk(pid: int) -> int:
    """Return the address above which the heap grows by brk(2), or 0 where the kernel hides it.

    Raises BadInput (no such process).
    """
    return by_living_thread(pid, lambda tid: _stat_field(read_proc_file(pid, f"task/{tid}/stat"), _STAT_START_BRK))


def start_stack(pid: int) -> int:
    """Return the stack pointer that the kernel gave to the main thread, or 0 where it hides it.

    Raises BadInput (no such process).
    """
    return by_living_thread(pid, lambda tid: _stat_field(read_proc_file(pid, f"task/{tid}/stat"), _STAT_START_STACK))


def stack_limit(pid: int) -> int | None:
    """Return the soft RLIMIT_STACK of a process in bytes, None for unlimited (``/proc/PID/limits``).

    Raises BadInput (no such process).
    """
    for line in read_proc_file(pid, "limits").split("\n"):
        if line.startswith("Max stack size"):
            soft = line.removeprefix("Max stack size").split()[0]
            return None if soft == "unlimited" else int(soft)
    raise LivegraftError(f"/proc/{pid}/limits says nothing about the stack")


def mmap_min_addr() -> int:
    """Return the lowest address that a process may map, in bytes (``/proc/sys/vm/mmap_min_addr``)."""
    with open("/proc/sys/vm/mmap_min_addr", encoding="ascii") as file:
        return int(file.read())
