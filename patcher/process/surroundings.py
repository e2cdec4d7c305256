"""What surrounds a process and decides whether it can be patched: rights, namespaces, filters, limits, the freezer.

Everything here is read from ``/proc``, ``/sys`` and the headers of a file; nobody is stopped and nothing is changed.
What the kernel does not tell, or not to us, is None or empty and never a guess.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elfdiff.errors import BadInput, LivegraftError

from .proc import ProcessStatus, by_living_thread, living_thread, read_proc_file, status, thread_ids

SYS_PTRACE, SYS_ADMIN, SYS_NICE, PERFMON, IPC_LOCK = 19, 21, 23, 38, 14  # CAP_*, linux/capability.h
CAPABILITY_NAMES = {SYS_PTRACE: "SYS_PTRACE", SYS_ADMIN: "SYS_ADMIN", SYS_NICE: "SYS_NICE", PERFMON: "PERFMON"}
YAMA = "/proc/sys/kernel/yama/ptrace_scope"
_ELF_IDENT = struct.Struct("<4sB13xH")  # e_ident and e_machine, gABI
_EM_NAMES = {3: "i386", 40: "Arm", 62: "x86-64", 183: "AArch64", 243: "RISC-V"}  # e_machine, elf.h


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who a process is. ``uids`` are the real, effective and saved one; capabilities are bit sets (capabilities(7)).

    ``user_namespace`` names it, or is empty where the kernel does not tell us. ``owner`` is the user to whom the
    kernel gives what is in ``/proc/PID``: root's, unless the process is dumpable (proc(5)).
    """

    uids: tuple[int, int, int]
    effective: int
    permitted: int
    user_namespace: str
    owner: int

    def has(self, capability: int) -> bool:
        """Whether it holds a capability in its own user namespace."""
        return bool(self.effective >> capability & 1)

    @property
    def dumpable(self) -> bool:
        """Whether its owner may trace it (PR_SET_DUMPABLE, prctl(2)); true where that cannot be told."""
        return self.owner != 0 or 0 in self.uids


def credentials(pid: int) -> Credentials:
    """Return who a process is. Raises BadInput (no such process), LivegraftError."""
    fields = status_fields(pid)
    uids = [int(word) for word in fields["Uid"].split()]
    try:
        namespace = os.readlink(f"/proc/{pid}/task/{living_thread(pid)}/ns/user")  # noqa: PTH115
    except OSError:
        namespace = ""
    try:
        owner = Path(f"/proc/{pid}/mem").stat().st_uid
    except OSError:
        owner = uids[1]
    return Credentials(
        (uids[0], uids[1], uids[2]), int(fields["CapEff"], 16), int(fields["CapPrm"], 16), namespace, owner
    )


def status_fields(pid: int) -> dict[str, str]:
    """Return the status of a process by field name (proc(5)), of a thread that has not ended.

    Raises BadInput (no such process), LivegraftError.
    """
    lines = by_living_thread(pid, lambda tid: read_proc_file(pid, f"task/{tid}/status")).split("\n")
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def yama_scope() -> int | None:
    """Return ``kernel.yama.ptrace_scope``, or None where the kernel is built without Yama."""
    try:
        return int(Path(YAMA).read_text(encoding="ascii"))
    except FileNotFoundError:
        return None


def proc_is_of_our_namespace() -> bool:
    """Whether ``/proc`` speaks of processes by the same numbers as the kernel does to us (pid_namespaces(7))."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())  # noqa: PTH115
    except OSError:
        return False


def security_label(pid: int) -> str:
    """Return what the security module says of a process (``/proc/PID/attr/current``), empty where none does."""
    try:
        with open(f"/proc/{pid}/attr/current", encoding="utf-8", errors="backslashreplace") as file:
            return file.read().strip("\0\n ")
    except OSError:
        return ""


def kind_of_program(pid: int) -> tuple[int, str] | None:
    """Return the word size in bits and the machine of a process's executable, by its ELF header.

    None where the file cannot be read, or is no ELF file.
    """
    try:
        with open(f"/proc/{pid}/task/{living_thread(pid)}/exe", "rb") as file:
            header = file.read(_ELF_IDENT.size)
    except OSError:
        return None
    if len(header) < _ELF_IDENT.size:
        return None
    magic, elf_class, machine = _ELF_IDENT.unpack(header)
    if magic != b"\x7fELF":
        return None
    return (64 if elf_class == 2 else 32), _EM_NAMES.get(machine, f"machine {machine}")


def threads_in_state(pid: int, letter: str) -> tuple[int, ...]:
    """Return the threads of a process whose state is this letter now. Raises BadInput (it has exited)."""
    return tuple(found.pid for found in _threads(pid) if found.state == letter)


def seccomp_modes(pid: int) -> dict[int, int]:
    """Return ``ProcessStatus.seccomp`` of each thread that has not ended. Raises BadInput (the process has exited).

    A main thread that has ended keeps its mode in ``/proc`` for as long as the others live.
    """
    return {found.pid: found.seccomp for found in _threads(pid) if not found.zombie}


def _threads(pid: int) -> Iterator[ProcessStatus]:
    for tid in thread_ids(pid):
        try:
            yield status(tid)
        except BadInput:
            continue  # ended meanwhile


def waiting_place(pid: int, tid: int) -> str:
    """Return a line that says in what state a thread is and where in the kernel it waits; never raises."""
    try:
        state = status(tid).state
        channel = Path(f"/proc/{pid}/task/{tid}/wchan").read_text(encoding="ascii") or "0"
    except (BadInput, OSError) as error:
        return f"thread {tid}: {error}"
    return f"thread {tid}: state {state}, waits in {channel}"


@dataclass(frozen=True, slots=True)
class Freezer:
    """A frozen control group: ``file`` is where it says so, ``thaw`` the text that thaws it."""

    file: str
    thaw: str


def frozen_by(pid: int) -> Freezer | None:
    """Return the control group that has frozen a process, or None where none has, or it cannot be seen from here.

    Version 2: ``cgroup.freeze`` of the group or one above it (cgroup-v2.rst); version 1: ``freezer.state``
    (freezer-subsystem.rst). Raises BadInput (no such process).
    """
    mounts = _cgroup_mounts()
    for line in read_proc_file(pid, "cgroup").split("\n"):
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            found = _frozen(mounts.get("cgroup2"), path, "cgroup.freeze", Freezer("cgroup.freeze", "0"))
        elif "freezer" in controllers.split(","):
            # The group itself says FROZEN where one above it is; only the highest can be thawed.
            found = _frozen(mounts.get("freezer"), path, "freezer.self_freezing", Freezer("freezer.state", "THAWED"))
        else:
            continue
        if found is not None:
            return found
    return None


@dataclass(frozen=True, slots=True)
class _Mount:
    point: str
    root: str

    def folder(self, path: str) -> Path | None:
        """Where a control group is to be seen, None if it is outside of what is mounted."""
        if self.root == "/":
            inside = path
        elif path == self.root or path.startswith(self.root + "/"):
            inside = path.removeprefix(self.root)
        else:
            return None
        return Path(self.point) / inside.lstrip("/")


def _cgroup_mounts() -> dict[str, _Mount]:
    """Mount points of the hierarchies that freeze: ``cgroup2``, and ``freezer`` of version 1 (proc(5), mountinfo)."""
    found: dict[str, _Mount] = {}
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            kind, _, options = right.split()[:3]
            root, point = left.split()[3:5]
            if kind == "cgroup2":
                found.setdefault("cgroup2", _Mount(point, root))
            elif kind == "cgroup" and "freezer" in options.split(","):
                found.setdefault("freezer", _Mount(point, root))
    return found


def _frozen(mount: _Mount | None, path: str, said_by: str, thawed_by: Freezer) -> Freezer | None:
    """The first group, from ``path`` up, of which the file ``said_by`` says 1; ``thawed_by`` names a file in it."""
    folder = None if mount is None else mount.folder(path)
    while mount is not None and folder is not None and folder != Path(mount.point):
        if _word(folder / said_by) == "1":
            return Freezer(str(folder / thawed_by.file), thawed_by.thaw)
        folder = folder.parent
    return None


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a process may still map. Sizes in bytes; a limit is None where there is none.

    ``size``, ``data`` and ``locked`` are what counts against ``size_limit`` (RLIMIT_AS), ``data_limit`` (RLIMIT_DATA)
    and ``locked_limit`` (RLIMIT_MEMLOCK, None also with CAP_IPC_LOCK); ``mappings`` counts against
    ``mappings_limit`` (``vm.max_map_count``), ``committed`` against ``commit_limit`` where the kernel overcommits
    nothing (``vm.overcommit_memory`` is 2). ``descriptors`` of ``descriptors_limit`` are open.
    """

    size: int
    size_limit: int | None
    data: int
    data_limit: int | None
    locked: int
    locked_limit: int | None
    mappings: int
    mappings_limit: int
    committed: int
    commit_limit: int | None
    descriptors: int
    descriptors_limit: int | None


def limits(pid: int) -> Limits:
    """Return what a process may still map. Raises BadInput (no such process), NotPermitted, LivegraftError."""
    soft = _soft_limits(pid)
    fields = status_fields(pid)
    memory = _meminfo()
    strict = _setting("vm/overcommit_memory") == 2
    privileged = int(fields["CapEff"], 16) >> IPC_LOCK & 1
    return Limits(
        size=_kilobytes(fields.get("VmSize", "0")),
        size_limit=soft["Max address space"],
        data=_kilobytes(fields.get("VmData", "0")),
        data_limit=soft["Max data size"],
        locked=_kilobytes(fields.get("VmLck", "0")),
        locked_limit=None if privileged else soft["Max locked memory"],
        mappings=read_proc_file(pid, f"task/{living_thread(pid)}/maps").count("\n"),
        mappings_limit=_setting("vm/max_map_count"),
        committed=memory.get("Committed_AS", 0),
        commit_limit=memory.get("CommitLimit", 0) if strict else None,
        descriptors=_open_descriptors(pid),
        descriptors_limit=soft["Max open files"],
    )


def _soft_limits(pid: int) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for line in read_proc_file(pid, "limits").split("\n")[1:]:
        name, words = line[:26].strip(), line[26:].split()
        if words:
            found[name] = None if words[0] == "unlimited" else int(words[0])
    return found


def _open_descriptors(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task/{living_thread(pid)}/fd"))  # noqa: PTH208
    except OSError as error:
        raise LivegraftError(f"the descriptors of process {pid} could not be counted", why=str(error)) from error


def _kilobytes(text: str) -> int:
    return int(text.split(maxsplit=1)[0]) * 1024


def _meminfo() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").split("\n")
    return {key: _kilobytes(value) for key, _, value in (line.partition(":") for line in lines) if value}


def _setting(name: str) -> int:
    return int(Path(f"/proc/sys/{name}").read_text(encoding="ascii"))


def memfd_noexec() -> int | None:
    """Return ``vm.memfd_noexec`` of our pid namespace, or None on kernels before 6.3."""
    try:
        return _setting("vm/memfd_noexec")
    except FileNotFoundError:
        return None
