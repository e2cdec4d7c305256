"""A running ``fixtures/vigilant.c``: it answers in one of three versions, and notices what a tracer must not let it.

And what must hold of it whenever a patcher has died: ``unharmed``, ``code_is_accounted_for``, ``version_of``.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType

from fixtures.intact import altered_ranges, writable_and_executable
from fixtures.tracees import Tally, Torture
from patcher.process import proc
from patcher.process.memory import Memory
from patcher.records.gates import find_gates, seen_through
from patcher.records.record import State
from patcher.transactions.inspection import CarriedPatch, inspect_process
from tests.live.answering import Answering, Versions, versions
from trampolines.stub_x86_64 import STUB_SIZE, owner_of

SOURCE = Path(__file__).parents[2] / "fixtures" / "vigilant.c"


def vigilant_versions(folder: Path, *flags: str) -> Versions:
    """Three builds of the program and the patches from the first to the others."""
    return versions(folder, *flags, source=SOURCE)


class Vigilant(Answering):
    """The program, running; its report is in a file in ``folder``.

    ``part``, 0 to 7: with an eighth of the threads, others for each.
    """

    def __init__(
        self, program: Path, folder: Path, part: int | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        path = folder / f"report-{time.monotonic_ns()}"
        super().__init__(
            program, arguments=(path, *(() if part is None else (str(part),))), environment=environment
        )
        with path.open("r+b") as file:
            self._report = mmap.mmap(file.fileno(), 0)
        self.torture = Torture(self._process, self._report)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._report.close()

    @property
    def complaints(self) -> list[Tally]:
        return self.torture.complaints

    def patches(self) -> dict[str, CarriedPatch]:
        return {item.record.contents.patch: item for item in inspect_process(self.pid).patches}


def at_liberty(pid: int) -> None:
    """Assert that no thread of the process is traced or stopped."""
    for tid in proc.thread_ids(pid):
        found = proc.status(tid)
        assert found.tracer_pid == 0, f"thread {tid} is traced by {found.tracer_pid}"
        assert found.state not in "tT", f"thread {tid} is in state {found.state}"


def code_is_accounted_for(program: Answering) -> None:
    """Assert that every altered byte of code is part of a whole jump at an entry of a record, or of a whole stub."""
    allowed: set[int] = set()
    with Memory(program.pid) as memory:
        entries = [
            entry for item in inspect_process(program.pid).patches for entry in item.record.contents.journal
        ]
        held = memory.read_many([(entry.address, len(entry.after)) for entry in entries]) if entries else []
        gates = find_gates(proc.mappings(program.pid), memory)
        for entry, data in zip(entries, held, strict=True):
            if seen_through(gates, entry.address, data) in (entry.before, entry.after, entry.pristine):
                allowed.update(range(entry.address, entry.address + len(data)))
        for mapping, first, last in altered_ranges(program.pid):
            for address in range(first, last + 1):
                if address in allowed:
                    continue
                start = _stub_at(memory, address, mapping.end)
                assert start is not None, f"{mapping.path}: the byte at {address:#x} is nobody's"
                allowed.update(range(start, start + STUB_SIZE))
    assert not writable_and_executable(program.pid)


def _stub_at(memory: Memory, address: int, end: int) -> int | None:
    """Where the stub starts that covers ``address``; its code is at the same place in every stub."""
    for start in range(address // 8 * 8, address - STUB_SIZE, -8):
        if start + STUB_SIZE <= end and owner_of(memory.read(start, STUB_SIZE)) is not None:
            return start
    return None


def version_of(program: Vigilant, built: Versions) -> int | None:
    """Which version ``status`` says is in force; None where it says that a command was interrupted.

    Asserts that it tells the truth: the entries are such as the states say, and at most one patch is in force.
    """
    found = program.patches()
    states = {version: found[patch.id].record.state for version, patch in built.to.items() if patch.id in found}
    assert len(found) == len(states)
    if {State.APPLYING, State.REVERTING} & set(states.values()):
        return None
    assert all(item.as_it_should_be for item in found.values()), found
    applied = [version for version, state in states.items() if state is State.APPLIED]
    assert len(applied) <= 1, states
    return applied[0] if applied else 1


def unharmed(program: Vigilant, interrupted: Collection[int] = (), deaths: int = 1) -> None:
    """Assert that it lives and answers, and that no thread is held, was disturbed, or has lost a register.

    ``interrupted`` are threads that a patcher had interrupted when it died, before it could put them right: a call
    that the kernel ends with EINTR at any stop (signal(7)) may have done so, once for each of ``deaths``. Nobody else
    can prevent that.
    """
    at_liberty(program.pid)
    program.torture.wait_for_progress(2)
    harmed = [
        tally
        for tally in program.complaints
        if tally.wrong or tally.early or tally.interrupted > deaths * (tally.tid in interrupted)
    ]
    assert not harmed, harmed
    assert int(program.ask("calls")) > 0
