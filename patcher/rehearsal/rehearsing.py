"""A rehearsal: an old build is started, put under load, patched, probed and reverted, again and again.

What it is asked is a ``Rehearsal`` (``file.py``), what came of it an ``Outcome``. Whatever happens in between,
nothing that it has started is left.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from elfdiff.diff import Options, diff
from elfdiff.errors import EXIT_NAMES, Interrupted, LivegraftError, NothingToPatch
from elfdiff.patches.patchfile import write_patch
from elfdiff.patchobject import PatchObject

from ..interruption import deferred, heed
from ..pausing.conditions import Conditions
from .children import PATIENCE, Child, tail
from .file import Probe, Ready, Rehearsal, Service
from .keys import filled
from .patching import Patched, apply_patches, revert_patches
from .probes import require_expected, run_command, talk
from .readiness import ended_early, free_port, wait_until_ready

_DYING_SECONDS = 0.5
"""A daemon that crashes is seen by its clients before it has ended: so long is waited before they are blamed."""
_SLICE = 0.05  # seconds between looks at noted signals
_NUMBER = re.compile(r"[0-9][0-9,]{,30}(\.[0-9]+)?")


@dataclass(frozen=True)
class Step:
    """One thing that was done or asked. ``cycle`` counts from 1; 0 is before and after all of them.

    ``error`` says why it failed, None that it did not; ``processes``: where a patch was applied or reverted.
    """

    name: str
    cycle: int
    seconds: float
    error: LivegraftError | None = None
    processes: tuple[Patched, ...] = ()

    @property
    def pauses_us(self) -> list[float]:
        """How long each process stood still that did."""
        return [item.pause_us for item in self.processes if item.pause_us is not None]


@dataclass(frozen=True)
class Figures:
    """What the load says of itself at its end; None where it does not."""

    requests: int | None = None
    failed: int | None = None
    longest_ms: float | None = None


@dataclass(frozen=True)
class Pauses:
    """Pauses of one kind, in microseconds, of each process. ``count``: of steps; ``processes``: of each step."""

    count: int
    median_us: float
    largest_us: float
    processes: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a rehearsal. ``cycles`` counts the whole ones; ``patches`` are those that could be made."""

    asked: Rehearsal
    patches: tuple[PatchObject, ...]
    steps: tuple[Step, ...]
    cycles: int
    figures: Figures
    seconds: float

    @property
    def error(self) -> LivegraftError | None:
        """Why it failed: the first of the reasons."""
        return next((step.error for step in self.steps if step.error is not None), None)

    @property
    def exit_code(self) -> int:
        """The exit status of the command."""
        return 0 if self.error is None else self.error.exit_code

    @property
    def verdict(self) -> str:
        """The name of the exit status, but for the two that a rehearsal has words of its own for."""
        return {0: "passed", 1: "failed"}.get(self.exit_code, EXIT_NAMES[self.exit_code])

    def pauses(self, name: str) -> Pauses | None:
        """The pauses of all steps ``apply`` or ``revert``; None where there was none."""
        steps = [step for step in self.steps if step.name == name and step.pauses_us]
        times = [pause for step in steps for pause in step.pauses_us]
        counts = tuple(len(step.processes) for step in steps)
        return Pauses(len(steps), median(times), max(times), counts) if times else None


def rehearse(asked: Rehearsal) -> Outcome:
    """Do what is asked. What fails is in the outcome.

    Raises Interrupted where a signal asked to end, and LivegraftError where something that was started cannot be
    ended; nothing else.
    """
    began = time.monotonic()
    with deferred(), TemporaryDirectory(prefix="livegraft-rehearsal-") as scratch, ExitStack() as started:
        folder = Path(scratch)
        folder.chmod(0o755)  # daemons change to other users
        run = _Run(asked, folder, started)
        try:
            run.play()
        except Interrupted as error:
            raise Interrupted(
                "interrupted",
                why="a signal asked to end; all that the rehearsal had started was ended",
                next_step="run the command again",
            ) from error
        return Outcome(asked, tuple(run.patches), tuple(run.steps), run.cycles, run.figures, time.monotonic() - began)


class _Run:
    """A rehearsal that goes on: what was done so far, and what runs."""

    def __init__(self, asked: Rehearsal, scratch: Path, started: ExitStack) -> None:
        self._asked = asked
        self._scratch = scratch
        self._started = started
        self._deadline = time.monotonic() + asked.timeout
        self._daemon: Child | None = None
        self._load: Child | None = None
        self._port = 0
        self.patches: list[PatchObject] = []
        self.steps: list[Step] = []
        self.cycles = 0
        self.figures = Figures()

    def play(self) -> None:
        """All of it; ends early where a step fails."""
        if not (self._step("diff", 0, self._diff) and self._step("start", 0, self._start)):
            return
        if (
            (self._asked.load is None or self._step("load", 0, self._start_load))
            and self._probe_all("before", 0)
            and all(self._cycle(number) for number in range(1, self._asked.cycles + 1))
        ):
            if self._asked.load is not None:
                self._step("load at the end", 0, self._end_load)
            self._step("daemon at the end", 0, self._end_daemon)
        elif self._load is not None:
            self._load.terminate()
            self.figures = _figures(self._asked.reports, tail(self._load.output))

    def _cycle(self, number: int) -> bool:
        whole = (
            self._step("apply", number, self._apply)
            and self._probe_all("after", number)
            and self._step("revert", number, self._revert)
            and self._probe_all("before", number)
        )
        self.cycles += whole
        return whole

    def _step(self, name: str, cycle: int, action: Callable[[], tuple[Patched, ...] | None]) -> bool:
        """Do one thing and note what came of it; whether it went well, and daemon and load live."""
        began = time.monotonic()
        processes: tuple[Patched, ...] | None = None
        error: LivegraftError | None = None
        try:
            heed()
            self._require_time()
            processes = action()
        except Interrupted:
            raise
        except LivegraftError as failure:
            error = failure if time.monotonic() < self._deadline else self._too_late(failure.what)
        error = self._death(error is not None) or error
        self.steps.append(Step(name, cycle, time.monotonic() - began, error, processes or ()))
        return error is None

    def _require_time(self) -> None:
        if time.monotonic() >= self._deadline:
            raise self._too_late("")

    def _too_late(self, what: str) -> LivegraftError:
        return LivegraftError(
            f"the rehearsal was not done within {self._asked.timeout:g} seconds",
            why=f"{self.cycles} of {self._asked.cycles} cycles were" + (f"; {what}" if what else ""),
            next_step="ask for fewer cycles, or for more time: timeout",
        )

    def _until(self, seconds: float) -> float:
        return min(self._deadline, time.monotonic() + seconds)

    def _death(self, suspicious: bool) -> LivegraftError | None:
        """Why the daemon or the load no longer runs; None where both do, or are not meant to."""
        running = [child for child in (self._daemon, self._load) if child is not None]
        if self._daemon is not None and (suspicious or any(child.status is not None for child in running)):
            self._daemon.wait(time.monotonic() + _DYING_SECONDS)
        return next((ended_early(child) for child in running if child.status is not None), None)

    # What is done

    def _diff(self) -> None:
        """A pair that differs in nothing is no part of the set, unless none does."""
        options = Options(lines=self._asked.lines, allow=self._asked.allow)
        nothing: list[NothingToPatch] = []
        for number, pair in enumerate(self._asked.pairs):
            try:
                patch = diff(pair.old, pair.new, options)
            except NothingToPatch as error:
                nothing.append(error)
            else:
                self.patches.append(write_patch(patch, self._scratch / f"patch{number}"))
        if not self.patches:
            raise nothing[0]

    def _start(self) -> None:
        service = self._asked.start
        self._port = 0 if service.ready is None or service.ready.names_port else free_port()
        self._daemon = self._run_service("daemon", service)

    def _start_load(self) -> None:
        assert self._asked.load is not None
        self._load = self._run_service("load", self._asked.load)

    def _run_service(self, name: str, service: Service) -> Child:
        """Start what runs all the time, and wait until it is ready."""
        command = [filled(word, self._places()) for word in service.command]
        environment = {name: filled(value, self._places()) for name, value in service.environment.items()}
        output = self._scratch / f"{name}.output"
        child = Child(f"the {name}", command, self._asked.folder, environment, output)
        self._started.callback(child.end)
        if service.ready is not None:
            ready = self._filled(service.ready)
            port = wait_until_ready(child, ready, service.timeout, self._until(service.timeout))
            self._port = self._port if port is None else port
        return child

    def _places(self) -> Mapping[str, str]:
        """What the placeholders of commands stand for."""
        asked = self._asked
        module = str(asked.module or "")
        pid = str(self._daemon.pid) if self._daemon else ""
        return {
            "old": str(asked.program), "module": module, "port": str(self._port), "folder": str(self._scratch),
            "here": str(asked.folder), "pid": pid,
        }  # fmt: skip

    def _filled(self, ready: Ready) -> Ready:
        file = str(self._asked.folder / filled(ready.file, self._places())) if ready.file else ""
        return replace(ready, port=filled(ready.port, self._places()), file=file)

    def _apply(self) -> tuple[Patched, ...]:
        assert self._daemon is not None
        return apply_patches(self._daemon.pid, self.patches, self._asked, self._conditions)

    def _revert(self) -> tuple[Patched, ...]:
        assert self._daemon is not None
        return revert_patches(self._daemon.pid, self.patches, self._asked, self._conditions)

    def _conditions(self) -> Conditions:
        """What is asked of a transaction that begins now."""
        asked = self._asked.conditions
        return replace(asked, timeout=max(0.0, self._until(asked.timeout) - time.monotonic()))

    def _hold(self) -> None:
        """Let the load run on what is in force now, and notice when somebody dies of it."""
        assert self._daemon is not None
        until = self._until(self._asked.hold)
        while time.monotonic() < until and not self._death(False):
            self._daemon.wait(min(until, time.monotonic() + _SLICE))

    # What is asked

    def _probe_all(self, state: str, cycle: int) -> bool:
        """All probes of a state, also where one fails; then what is in force is left to the load for a while."""
        right = True
        for probe in self._asked.probes:
            right &= self._step(f"probe {probe.name} ({state})", cycle, self._asking(probe, state))
        if right and cycle and self._load is not None and self._asked.hold:
            right = self._step(f"hold ({state})", cycle, self._hold)
        return right

    def _asking(self, probe: Probe, state: str) -> Callable[[], None]:
        def ask() -> None:
            until = self._until(probe.timeout)
            if probe.command:
                command = [filled(word, self._places()) for word in probe.command]
                answer = run_command(probe, command, self._asked.folder, self._scratch, until)
            else:
                answer = talk(probe, self._port, until)
            require_expected(probe, state, answer)

        return ask

    # The end

    def _end_load(self) -> None:
        """SIGTERM asks the load to say how it went; it ends with 0 then, or by that signal."""
        load, self._load = self._load, None
        assert load is not None
        in_time = load.terminate()
        if not in_time:
            raise LivegraftError(
                f"the load did not end within {PATIENCE:g} seconds after SIGTERM", why="it ran on",
                next_step="let it end on SIGTERM", details=load.said(),
            )  # fmt: skip
        text = tail(load.output)
        self.figures = _figures(self._asked.reports, text)
        if load.status not in (0, -signal.SIGTERM):
            raise LivegraftError(
                "the load failed", why=load.how_it_ended, next_step="see what it says", details=load.said()
            )
        self._judge_figures(load, text)

    def _judge_figures(self, load: Child, text: str) -> None:
        for pattern in self._asked.reports:
            if not pattern.search(text):
                raise LivegraftError(
                    "the load does not say how it went", why=f"its last output has no match of {pattern.pattern!r}",
                    next_step="correct load.report, or let the load print its figures when SIGTERM comes",
                    details=load.said(),
                )  # fmt: skip
        if self.figures.failed:
            raise LivegraftError(
                f"{self.figures.failed} requests of the load failed", why="that is what it says",
                next_step="see what it says", details=load.said(),
            )  # fmt: skip
        if self.figures.requests == 0:
            raise LivegraftError(
                "the load served no request", why="that is what it says", next_step="see what it says",
                details=load.said(),
            )  # fmt: skip

    def _end_daemon(self) -> None:
        """A daemon that crashes on its way out has been harmed, too."""
        daemon, self._daemon = self._daemon, None
        assert daemon is not None
        daemon.terminate()
        if daemon.status is not None and daemon.status < 0 and daemon.status != -signal.SIGTERM:
            raise LivegraftError(
                "the daemon crashed at the end", why=f"SIGTERM was sent; {daemon.how_it_ended}",
                next_step="see whether it does so without a patch", details=daemon.said(),
            )  # fmt: skip


def _figures(reports: tuple[re.Pattern[str], ...], text: str) -> Figures:
    """The last of each figure that a load has printed."""
    found: dict[str, float] = {}
    for pattern in reports:
        for match in pattern.finditer(text):
            for name, value in match.groupdict().items():
                if value and _NUMBER.fullmatch(value):
                    found[name] = float(value.replace(",", ""))
    requests, failed = (round(found[name]) if name in found else None for name in ("requests", "failed"))
    return Figures(requests, failed, found.get("longest_ms"))
