"""Each operation on a target fails in each way in which it plausibly can: one clear error, and nothing is left undone.

Once, and from there on for ever. ``make soak`` goes through all operations of all commands; an ordinary run takes some
of them, others each day.
"""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.live.answering import Answering, versions
from tests.live.faults import COMMANDS, EXTENT, Command, Said, Scene, assert_at_liberty, run, sample

pytestmark = pytest.mark.root

REMOTE = {
    9: ("ENOMEM", "EEXIST", "EPERM", "EACCES", "EAGAIN", "ENODEV", "EINTR"),  # mmap
    10: ("ENOMEM", "EACCES"),  # mprotect
    11: ("ENOMEM", "EINVAL"),  # munmap
    3: ("EIO", "EINTR", "EBADF"),  # close
    319: ("EMFILE", "ENFILE", "ENOSYS", "EPERM", "EINVAL", "ENOMEM"),  # memfd_create
}
_NUMBER = re.compile(r"0x[0-9a-f]+|\b\d+\b|\b[0-9a-f]{12,}\b")
ERRORS = {
    "SEIZE": ("ESRCH", "EPERM", "EIO"),
    "INTERRUPT": ("ESRCH", "EIO"),
    "DETACH": ("ESRCH", "EIO"),
    "GETREGS": ("ESRCH", "EIO", "EFAULT"),
    "SETREGS": ("ESRCH", "EIO", "EFAULT"),
    "SYSCALL": ("ESRCH", "EIO"),
    "SETOPTIONS": ("ESRCH", "EPERM", "EINVAL"),
    "GETEVENTMSG": ("ESRCH", "EIO"),
    "GET_RSEQ_CONFIGURATION": ("ESRCH", "EIO", "EINVAL", "EPERM"),
    "SECCOMP_GET_FILTER": ("ESRCH", "EIO", "EACCES", "EINVAL", "EFAULT", "EMEDIUMTYPE"),
    "BREAKPOINT": ("EACCES", "EPERM", "ENOSPC", "EBUSY", "ESRCH"),
    "PAGES": ("ENOTTY", "ENOMEM"),
    "POKETEXT": ("ESRCH", "EIO", "EFAULT"),
    "WAIT": ("ECHILD",),
    "READ": ("EIO", "EFAULT", "ESRCH", "EPERM"),
    "READV": ("EIO", "EFAULT", "ESRCH", "EPERM", "ENOMEM"),
    "WRITE": ("EIO", "EFAULT", "ENOMEM", "ESRCH"),
    "OPEN": ("EACCES", "ENOENT", "EMFILE"),
    "FILL": ("ENOSPC", "EINTR", "EFBIG", "ENOMEM"),
    "SEAL": ("EPERM", "EBUSY"),
    "LOCK": ("EWOULDBLOCK", "ENOLCK", "EINTR"),
    **{f"CALL {number}": names for number, names in REMOTE.items()},
}
"""Operation -> errors that the manual pages name for it, or that a module of the kernel may add (ptrace(2), proc(5),
process_vm_readv(2), mmap(2), memfd_create(2), fcntl(2), flock(2), write(2), perf_event_open(2),
ioctl(2))."""


def cases(names: list[str]) -> list[tuple[int, str, bool]]:
    """(operation, error, for ever): all errors of every operation; of the many reads one each, in turn."""
    found = []
    for number, name in enumerate(names):
        known = ERRORS[name]
        chosen = (known[number % len(known)],) if name == "READ" else known
        found += [(number, error, ever_after) for error in chosen for ever_after in (False, True)]
    return found


def fail(scene: Scene, command: Command, number: int, error: str, ever_after: bool) -> str:
    """Let an operation fail, or all from it on; return how the command ended, and what failed.

    It is the first from ``number`` on that may fail with this error: not every run has the same operations.
    """
    seen = -1
    failed = False

    def observer(name: str, subject: int) -> int:
        nonlocal seen, failed
        seen += 1
        if seen < number or error not in ERRORS[name] or (failed and not ever_after):
            return 0
        if not failed:
            os.write(2, f"{name} {error}\n".encode())
        failed = True
        return int(getattr(errno, error))

    with scene.start() as program:
        scene.succeed(program, *command.prepare)
        said = run(scene.words(command.words, program.pid, timeout=5), observer)
        settle(scene, program, command, said)
    operation = said.stderr.strip().partition("\n")[0].rpartition(" ")[0]  # without the error, for counting
    return f"{operation or 'none'}: {_NUMBER.sub('N', said.summary)}"


def settle(scene: Scene, program: Answering, command: Command, said: Said) -> None:
    """What the command has said is so, and the next one finds its way."""
    assert_at_liberty(program.pid)
    if said.status == 7:
        scene.succeed(program, ("apply", "3"))  # it finishes or undoes what was left
        scene.assert_sound(program, 3)
        scene.assert_usable(program)
        return
    assert said.status == 0 or said.error["why"], said
    scene.assert_sound(program, command.after if said.status == 0 else command.before)
    scene.assert_usable(program)


@EXTENT
@pytest.mark.parametrize("name", COMMANDS)
def test_an_operation_fails(scene: Scene, name: str, whole: bool) -> None:
    command = COMMANDS[name]
    ended: Counter[str] = Counter()
    for number, error, ever_after in sample(cases(scene.operations(command)), 3, whole):
        ended[fail(scene, command, number, error, ever_after)] += 1
    print(f"{name}: {dict(ended)}")


@pytest.fixture(scope="module")
def scene(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene.write(versions(cache_folder / "answer"), tmp_path_factory.mktemp("patches"))
