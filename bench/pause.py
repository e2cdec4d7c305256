"""How long a pause is: what the tool says, what the target saw, a C program's and gdb's beside it.

    python -m bench.pause [--rounds N] [--gdb-rounds N] [--in-process] [ROW ...]

A row is THREADS, THREADS/SPINNING or THREADS/SPINNING/FUNCTIONS. In every round the tool applies and reverts, the C
program (native/floor.c) makes the same pause twice, and, in some rounds, gdb attaches and detaches, one after the
other on one target, so that a machine that becomes slower slows all of them. The tool runs as whole processes, as a
person would run it, or within this one (``--in-process``). What the target saw is the longest time for which a thread
of it did not run; it runs at nice -20 and was created first. The tables are ready for a page in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench import pausetarget, steady
from bench.pausetarget import Target
from elfdiff.patchobject import PatchObject
from patcher.planning.plan import Ending, Plan, plan_revert, situation
from patcher.planning.vetting import module_of_record
from patcher.process.memory import Memory
from patcher.records.record import STATE_OFFSET
from patcher.targets.target import take_snapshot
from patcher.threads import batch
from patcher.transactions.gating import with_gates
from patcher.transactions.transaction import apply, revert

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "bench"
DEFAULT_FUNCTIONS = 10
_ATTEMPTS = 20  # of the C program, which does not know what to do with a thread that comes or goes


@dataclass(frozen=True)
class Row:
    """What is measured: threads beside the probe, how many of them compute, and functions of the patch."""

    threads: int
    spinning: int = 0
    functions: int = DEFAULT_FUNCTIONS

    @classmethod
    def parse(cls, text: str) -> Row:
        """``THREADS[/SPINNING[/FUNCTIONS]]``."""
        return cls(*map(int, text.split("/")))


ROWS = (
    Row(1), Row(8), Row(64), Row(256), Row(64, 16),
    Row(8, 0, 1), Row(8, 0, 100), Row(8, 0, 1000),
)  # fmt: skip


@dataclass
class Figures:
    """Lengths in ns of one kind of pause: by its own clock, and by the target's."""

    own: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)

    def add(self, target: Target, begin: int, length: int) -> None:
        """Note a pause that began at ``begin`` (ns of CLOCK_MONOTONIC)."""
        self.own.append(length)
        self.seen.append(target.longest_gap(begin, begin + length))


@dataclass(frozen=True)
class Measured:
    """A row's figures; ``writes`` is how many the plan makes, ``retried`` the stops that found a live function."""

    row: Row
    writes: int
    retried: int
    apply: Figures
    revert: Figures
    floor: Figures
    gdb: Figures


Command = Callable[[], tuple[int, int, int]]
"""Does it; returns the beginning and the length of the pause in ns, and the number of stops."""


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print; ``words`` are the arguments, of the command line if None."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--gdb-rounds", type=int, default=5)
    parser.add_argument("--in-process", action="store_true", help="the tool runs within this process")
    parser.add_argument("--no-steady", action="store_true", help="leave out the cost of a patch that is in force")
    parser.add_argument("rows", nargs="*", metavar="ROW", type=Row.parse, help="THREADS[/SPINNING[/FUNCTIONS]]")
    arguments = parser.parse_args(words)
    where = "in this process" if arguments.in_process else "in a process of its own each time"
    say(f"The tool runs {where}; its pause is made in {batch.description()}. Load now: {os.getloadavg()[0]:.1f}\n\n")
    say(_HEAD)
    for row in arguments.rows or ROWS:
        say(_line(measure(row, max(1, arguments.rounds), arguments.gdb_rounds, arguments.in_process)))
    if not arguments.no_steady:
        say("\n" + steady.report(FOLDER))


def measure(row: Row, rounds: int, gdb_rounds: int, in_process: bool) -> Measured:
    """One target; all kinds of pause in turn, after one round that is not counted."""
    file, patch = pausetarget.patch(FOLDER, row.functions)
    figures = {name: Figures() for name in ("apply", "revert", "floor", "gdb")}
    retried = 0
    with Target(pausetarget.target(FOLDER), row.threads, row.spinning) as target:
        apply(target.pid, patch)
        plan = _plan(target.pid)
        revert(target.pid)
        commands = _in_process(target.pid, patch) if in_process else _whole(target.pid, file)
        with _floor(target.pid, plan) as floor:
            for number in range(rounds + 1):
                for name, command in commands.items():
                    begin, length, tries = command()
                    stopped_by_floor = floor()
                    if number:
                        figures[name].add(target, begin, length)
                        figures["floor"].add(target, *stopped_by_floor)
                        retried += tries - 1
                if len(figures["gdb"].own) < number * gdb_rounds // rounds:
                    figures["gdb"].add(target, *gdb(target.pid))
    return Measured(row, len(_writes(plan)), retried, **figures)


def _in_process(pid: int, patch: PatchObject) -> dict[str, Command]:
    def run(verb: Callable[[], object]) -> tuple[int, int, int]:
        pause = verb().pause  # type: ignore[attr-defined]
        return pause.began_ns, pause.pause_ns, pause.tries

    return {"apply": lambda: run(lambda: apply(pid, patch)), "revert": lambda: run(lambda: revert(pid))}


def _whole(pid: int, file: Path) -> dict[str, Command]:
    def run(*words: str) -> tuple[int, int, int]:
        command = [sys.executable, "-m", "patcher.cli", *words, "--pid", str(pid), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        said = json.loads(done.stdout)
        return said["pause_began_ns"], said["pause_us"] * 1000, said["tries"]

    return {"apply": lambda: run("apply", str(file)), "revert": lambda: run("revert")}


def _plan(pid: int) -> Plan:
    """What a revert does now: its ranges and its writes, gates included, are what the C program is given."""
    with Memory(pid) as memory:
        seen = take_snapshot(pid, memory)
        (record,) = seen.records
        module = module_of_record(record, seen.modules)
        assert module is not None
        plan = plan_revert([Ending(record, situation(seen.records, module))], memory.read_many, seen.modules)
        return with_gates(plan, record.contents.journal, [module], seen, memory).plan


def _writes(plan: Plan) -> list[tuple[int, int]]:
    """(address, bytes) of every write."""
    states = [(item.record + STATE_OFFSET, len(item.after)) for item in (*plan.first, *plan.last)]
    return [(page.address, len(page.after)) for page in plan.writes] + states


@contextmanager
def _floor(pid: int, plan: Plan) -> Iterator[Callable[[], tuple[int, int]]]:
    """The C program, waiting; what is yielded makes a pause: its beginning and its length in ns."""
    ranges = [f"{item.start} {item.end}" for item in plan.forbidden]
    writes = [f"{address} {size}" for address, size in _writes(plan)]
    words = [str(len(ranges)), *ranges, str(len(writes)), *writes]
    process = subprocess.Popen(
        [pausetarget.floor(FOLDER), str(pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n".join(words) + "\n")

    def pause() -> tuple[int, int]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("go\n")
        answer = process.stdout.readline().split()
        if not answer:
            raise SystemExit("the C program has failed")
        return int(answer[0]), int(answer[1]) - int(answer[0])

    try:
        yield pause
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def gdb(pid: int) -> tuple[int, int]:
    """Attach and detach; the beginning and the length of all of it, of which the pause is the most."""
    begin = time.monotonic_ns()
    command = ["gdb", "-nx", "-batch", "-p", str(pid), "-ex", "detach"]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, check=True)
    return begin, time.monotonic_ns() - begin


_HEAD = """\
Microseconds, median / largest. *says*: by its own clock; *seen*: by the target's.

| threads | spinning | functions | writes | apply says | apply seen | revert says | revert seen | C says | C seen \
| gdb seen | apply : C | revert : C | gdb : apply |
|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
"""


def _line(found: Measured) -> str:
    row = found.row
    cells = [str(row.threads), str(row.spinning), str(row.functions), str(found.writes)]
    for kind in (found.apply, found.revert, found.floor):
        cells += [_both(kind.own), _both(kind.seen)]
    cells.append(_both(found.gdb.seen))
    floor = median(found.floor.own)
    cells += [f"{median(kind.own) / floor:.2f}" for kind in (found.apply, found.revert)]
    cells.append(f"{median(found.gdb.seen) / median(found.apply.seen):.0f}" if found.gdb.seen else "-")
    note = f" ({found.retried} tries more)" if found.retried else ""
    return f"| {' | '.join(cells)} |{note}\n"


def _both(lengths: Sequence[int]) -> str:
    return f"{median(lengths) / 1000:.0f} / {max(lengths) / 1000:.0f}" if lengths else "-"


def say(text: str) -> None:
    """Print at once: a run takes minutes."""
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
