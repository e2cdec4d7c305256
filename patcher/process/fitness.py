"""Is a process fit to be patched? The obstacles, looked for in a process; each is worded in ``obstacles``."""

from __future__ import annotations

import os

from elfdiff.errors import BadInput

from . import obstacles, surroundings
from .obstacles import Obstacle
from .proc import ProcessStatus, living_thread, no_such_process, status


def require_proc() -> None:
    """Raise BadInput where ``/proc`` is that of another pid namespace.

    What is read in ``/proc/PID`` and what ptrace(2) does to that number would then concern two processes.
    """
    _raise(obstacles.foreign_proc(surroundings.proc_is_of_our_namespace()))


def require_permitted(found: ProcessStatus) -> None:
    """Raise NotPermitted where somebody traces a process already, or the kernel would not let us.

    It is asked by opening ``/proc/PID/mem``, for which it looks at the same rights and security modules as for
    PTRACE_SEIZE (mem_open, fs/proc/base.c), and nobody is stopped. Also raises BadInput (the process has exited).
    """
    _raise(traced(found))
    _raise(not_permitted(found))


def not_permitted(found: ProcessStatus) -> Obstacle | None:
    """Whether, and why, the kernel would not let us trace a process. Raises BadInput (it has exited)."""
    try:
        path = f"/proc/{found.pid}/task/{living_thread(found.pid)}/mem"
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except (FileNotFoundError, ProcessLookupError) as error:
        raise no_such_process(found.pid) from error
    except OSError as error:
        return tracing_refused(found, f"/proc/{found.pid}/mem: {error.strerror}")
    return None


def require_fit(found: ProcessStatus) -> None:
    """Refuse a process that may be traced, but not patched.

    Raises Refused (a program for another processor), Busy (frozen), BadInput (it has exited).
    """
    _raise(obstacles.not_for_this_processor(found.pid, found.name, surroundings.kind_of_program(found.pid)))
    _raise(obstacles.frozen(found.pid, found.name, surroundings.frozen_by(found.pid)))


def _raise(obstacle: Obstacle | None) -> None:
    if obstacle is not None:
        raise obstacle.as_error()


def traced(found: ProcessStatus) -> Obstacle | None:
    """Whether somebody traces a process, and who. Raises BadInput (it has exited meanwhile)."""
    # A main thread that ended while it was traced stays so until its tracer lets go of it, and be it this process.
    tracer = status(living_thread(found.pid)).tracer_pid if found.zombie else found.tracer_pid
    return obstacles.traced(found.pid, found.name, tracer, _name_of(tracer) if tracer else "")


def _name_of(pid: int) -> str:
    try:
        return status(pid).name
    except BadInput:
        return "already gone"


def tracing_refused(found: ProcessStatus, answer: str) -> Obstacle:
    """Why the kernel does not let us trace a process; ``answer`` is what it said.

    Raises BadInput (it has exited meanwhile).
    """
    return traced(found) or obstacles.may_not_be_traced(
        found.pid,
        found.name,
        surroundings.credentials(os.getpid()),
        surroundings.credentials(found.pid),
        surroundings.yama_scope(),
        surroundings.security_label(found.pid),
        answer,
    )


def no_memory(pid: int, size: int, mappings: int, number: int) -> Obstacle:
    """Why a process could not map ``size`` bytes in ``mappings`` pieces; ``number`` is the errno.

    Raises BadInput (it has exited meanwhile), NotPermitted.
    """
    name = status(pid).name
    found = obstacles.no_more_memory(pid, name, surroundings.limits(pid), size, mappings)
    return found or obstacles.unexplained_no_memory(pid, name, size, number)
