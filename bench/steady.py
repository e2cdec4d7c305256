"""What a patch costs while it is in force: time per call, and memory of the target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import pausetarget
from bench.pausetarget import Target
from patcher.transactions.transaction import apply, revert

CALLS = 20_000_000
ROUNDS = 7
FUNCTIONS = 10


@dataclass(frozen=True)
class Memory:
    """Of a process: resident and proportional bytes (proc(5), smaps_rollup), and its mappings."""

    rss: int
    pss: int
    mappings: int

    @classmethod
    def of(cls, pid: int) -> Memory:
        """What it has now. Raises OSError."""
        folder = Path(f"/proc/{pid}")
        fields = dict(line.split(":") for line in (folder / "smaps_rollup").read_text().splitlines()[1:])
        kib = {name: int(value.split()[0]) for name, value in fields.items()}
        return cls(kib["Rss"] << 10, kib["Pss"] << 10, (folder / "maps").read_text().count("\n"))


def report(folder: Path) -> str:
    """Measure, and return two tables in Markdown."""
    _, patch = pausetarget.patch(folder, FUNCTIONS)
    changed = next(n for n in range(1, pausetarget.FUNCTIONS) if pausetarget.is_changed(n, FUNCTIONS))
    kinds = {"changed by the patch": changed, "untouched": changed + 1}
    times: dict[tuple[str, bool], list[float]] = {(name, on): [] for name in kinds for on in (False, True)}
    with Target(pausetarget.target(folder), 1) as target:
        before = Memory.of(target.pid)
        for _ in range(ROUNDS):
            for patched in (False, True):
                if patched:
                    apply(target.pid, patch)
                for name, number in kinds.items():
                    times[name, patched].append(_per_call(target, number))
            after = Memory.of(target.pid)
            revert(target.pid)
        left = Memory.of(target.pid)
    lines = ["Nanoseconds per call, median / least of its rounds.", "", "| function | before | patched | more |"]
    lines.append("|--|--:|--:|--:|")
    for name in kinds:
        off, on = times[name, False], times[name, True]
        more = median(now - then for then, now in zip(off, on, strict=True))
        lines.append(f"| {name} | {_both(off)} | {_both(on)} | {more:+.2f} |")
    lines += ["", f"Memory of the target with a patch of {FUNCTIONS} functions, KiB.", ""]
    lines += ["| | Rss | Pss | mappings |", "|--|--:|--:|--:|"]
    for name, memory in (("before", before), ("patched", after), ("reverted", left)):
        lines.append(f"| {name} | {memory.rss >> 10} | {memory.pss >> 10} | {memory.mappings} |")
    return "\n".join(lines) + "\n"


def _per_call(target: Target, number: int) -> float:
    calls, _ = target.ask(f"time {number} {CALLS}")
    return calls / CALLS


def _both(values: list[float]) -> str:
    return f"{median(values):.2f} / {min(values):.2f}"
