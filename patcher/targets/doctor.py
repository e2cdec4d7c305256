"""May livegraft patch here, and this process? Looked at without stopping anybody, in the order in which apply asks.

What apply would refuse is said in the same words (``obstacles``). A target is only read; what the kernel allows is
tried on a process of our own (``doctorprobes``).
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass

from elfdiff.errors import LivegraftError, Refused
from trampolines.stub_x86_64 import STUB_SIZE

from ..planning.placement import Surroundings, candidates, stack_reserve
from ..process import fitness, obstacles, surroundings
from ..process.memory import Memory
from ..process.modules import Module, modules
from ..process.obstacles import Obstacle
from ..process.proc import (
    Mapping,
    ProcessStatus,
    executable_of,
    living_thread,
    mappings,
    mmap_min_addr,
    stack_limit,
    start_brk,
    status,
)
from ..remote.caves import find_caves, free_slot, no_room, old_stubs
from ..threads.tracees import why_not_a_target
from . import doctorchecks
from .doctorchecks import Check, Verdict, degraded, judged, ok
from .doctorprobes import Probes, probe

_TYPICAL_SIZE = 1 << 20
"""Bytes that a patch may need, since which one is meant is not known: most are far smaller."""
_TYPICAL_MAPPINGS = 5
_LOOKS, _BETWEEN_LOOKS = 5, 0.1  # seconds; a thread that waits for a disk is through with it sooner
_NAMESPACES = ("mnt", "pid", "net", "ipc", "user")


@dataclass(frozen=True, slots=True)
class Examination:
    """All checks, those of the machine first. ``process`` is empty where no process was asked about."""

    pid: int | None
    process: str
    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        """What apply would have for its exit status, as far as that can be told: that of the first check that fails."""
        return next((check.exit_code for check in self.checks if check.verdict is Verdict.FAILS), 0)


def examine(pid: int | None) -> Examination:
    """Look at the machine and, where a ``pid`` is given, at that process. Stops nobody and changes nothing.

    Raises BadInput (no such process), LivegraftError (it went away meanwhile).
    """
    foreign = obstacles.foreign_proc(surroundings.proc_is_of_our_namespace())
    head = (doctorchecks.processor(platform.machine()), judged("proc", "/proc is of our pid namespace", foreign))
    if foreign is not None:
        return Examination(pid, "", head)  # nothing that is read there can be believed
    tried = probe()
    checks = head + _machine(tried)
    if pid is None:
        return Examination(None, "", checks)
    found = status(pid)
    return Examination(pid, found.name, (*checks, *_target(found, tried)))


def _machine(tried: Probes) -> tuple[Check, ...]:
    own = surroundings.credentials(os.getpid())
    label = surroundings.security_label(os.getpid())
    return (
        ok("kernel", f"{platform.system()} {platform.release()}"),
        doctorchecks.capabilities(own),
        doctorchecks.yama(surroundings.yama_scope(), own),
        ok("security module", f"confines us as {label}" if label else "none confines us"),
        doctorchecks.tracing(tried.trace),
        doctorchecks.text_writes(tried.write, tried.poke),
        doctorchecks.vectored_reads(tried.read_many),
        doctorchecks.sequences(tried.sequences),
        doctorchecks.suspension(tried.suspend),
        doctorchecks.realtime(tried.realtime),
        doctorchecks.memory_files(surroundings.memfd_noexec()),
        doctorchecks.mapping_queries(tried.query),
    )


def _target(found: ProcessStatus, tried: Probes) -> Iterator[Check]:
    """Check one process, in the order in which apply asks; ends where what follows could not be read."""
    pid, name = found.pid, found.name
    unfit = obstacles.not_a_target(pid, name, why_not_a_target(pid, found))
    yield judged("process", f"{name}, user {found.uid}", unfit)
    if unfit is not None:
        return
    traced = fitness.traced(found)
    yield judged("tracer", "none", traced)
    refused = None if traced else fitness.not_permitted(found)
    if traced is None:
        yield judged("permission", "we may trace it", refused)
    if traced is not None or refused is not None:
        return
    kind = surroundings.kind_of_program(pid)
    said = "not known" if kind is None else f"{kind[0]}-bit, {kind[1]}"
    yield judged("program", said, obstacles.not_for_this_processor(pid, name, kind))
    yield judged("freezer", "not frozen", obstacles.frozen(pid, name, surroundings.frozen_by(pid)))
    yield _namespaces(pid)
    yield _confinement(pid)
    with Memory(pid) as memory:
        yield from _places(pid, mappings(pid), memory)
    yield _filters(found, tried)
    yield from _limits(found)
    yield judged("threads", "can be stopped", _waiting_for_good(pid))


def _namespaces(pid: int) -> Check:
    others = [name for name in _NAMESPACES if _namespace(pid, name) != _namespace(os.getpid(), name)]
    return ok("namespaces", f"others than ours: {', '.join(others)}" if others else "ours")


def _namespace(pid: int, name: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/task/{living_thread(pid)}/ns/{name}")  # noqa: PTH115
    except OSError as error:
        return str(error)


def _confinement(pid: int) -> Check:
    label = surroundings.security_label(pid)
    if not label or label == "unconfined":
        return ok("confinement", "no security module confines it")
    why = "whether it may map code is known only when it does; where it may not, apply fails and leaves it as it was"
    return degraded("confinement", f"a security module confines it as {label}", why)


def _places(pid: int, maps: tuple[Mapping, ...], memory: Memory) -> Iterator[Check]:
    """Room near the images, and for the stub."""
    loaded = modules(maps, memory)
    around = Surroundings(maps, start_brk(pid), mmap_min_addr(), stack_reserve(stack_limit(pid)))
    main = _main_image(pid, loaded)
    crowded = [(module, said) for module in loaded if (said := _no_room_near(module, around)) is not None]
    fatal = next((said for module, said in crowded if module is main), None)
    if fatal is not None:
        yield Check("room", Verdict.FAILS, fatal.what, fatal.why, fatal.next_step, fatal.exit_code)
    elif crowded:
        names = ", ".join(module.name for module, _ in crowded)
        yield degraded("room", f"none near {names}", "patches of these would be refused (4)", "restart the program")
    else:
        yield ok("room", f"within 2 GiB of each of {len(loaded)} images")
    caves = find_caves(loaded)
    if free_slot(caves, memory) is not None:
        yield ok("padding", f"{STUB_SIZE} zero bytes behind program text are there")
    elif old_stubs(caves, memory):
        why = "a thread may still return to each of the stubs that killed patchers left there"
        yield degraded("padding", "only where killed patchers left stubs", why)
    else:
        error = no_room(pid, caves)
        yield Check("padding", Verdict.FAILS, error.what, error.why, error.next_step, error.exit_code)


def _main_image(pid: int, loaded: tuple[Module, ...]) -> Module | None:
    try:
        path = executable_of(pid)
    except OSError:
        return None
    return next((module for module in loaded if module.path == path), None)


def _no_room_near(module: Module, around: Surroundings) -> LivegraftError | None:
    try:
        candidates(around, module.low, module.high, _TYPICAL_SIZE, module.fixed_address)
    except Refused as error:
        return error
    return None


def _filters(found: ProcessStatus, tried: Probes) -> Check:
    """Threads under seccomp, and whether apply could make system calls by one."""
    modes = surroundings.seccomp_modes(found.pid)
    threads, filtered = len(modes), [tid for tid, mode in modes.items() if mode]
    if not filtered:
        return ok("filters", "no thread is under seccomp")
    said = f"{len(filtered)} of {threads} threads are under seccomp"
    if not tried.suspend:
        # Only between two operations of ours: see the head of borrowed.py.
        why = "a kill -9 of livegraft in the microseconds in which such a thread enters a call lets the filter judge it"
        return ok("filters", said) if len(filtered) < threads else degraded("filters", said, why)
    if len(filtered) < threads:
        why = "only the others can map the patch, and where none of them may, apply is refused (6)"
        return degraded("filters", f"{said}, which stay", why)
    answer = f"the kernel answered {os.strerror(tried.suspend)}"
    return judged("filters", said, obstacles.filter_stays(found.name, filtered[0], answer))


def _limits(found: ProcessStatus) -> Iterator[Check]:
    now = surroundings.limits(found.pid)
    said = f"{_TYPICAL_SIZE} bytes more can be mapped"
    yield judged(
        "limits", said, obstacles.no_more_memory(found.pid, found.name, now, _TYPICAL_SIZE, _TYPICAL_MAPPINGS)
    )
    if now.descriptors_limit is not None and now.descriptors >= now.descriptors_limit:
        said = f"{now.descriptors} are open, RLIMIT_NOFILE is {now.descriptors_limit}"
        why = "the patch is mapped as anonymous memory, which is not sealed"
        yield degraded("descriptors", said, why, f"prlimit --pid {found.pid} --nofile={now.descriptors + 64}")
    else:
        yield ok("descriptors", "one more can be opened")


def _waiting_for_good(pid: int) -> Obstacle | None:
    """Threads that wait uninterruptibly each time that we look."""
    still = set(surroundings.threads_in_state(pid, "D"))
    for _ in range(_LOOKS - 1):
        if not still:
            return None
        time.sleep(_BETWEEN_LOOKS)
        still &= set(surroundings.threads_in_state(pid, "D"))
    details = tuple(surroundings.waiting_place(pid, tid) for tid in sorted(still))
    return obstacles.does_not_stop(pid, len(still), (_LOOKS - 1) * _BETWEEN_LOOKS, details)
