"""The rows of docs/daemons.md, printed by the tests that measure them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

HEAD = (
    "| daemon | from -> to | functions | references | processes | pause of each (us) | requests, failed "
    "| longest request: calm, with an apply or revert (ms) |"
)


@dataclass(frozen=True)
class Row:
    """One row. Pauses and requests in microseconds.

    ``patches`` are summaries of them (``elfdiff.diff.summary``). ``calm_us``: the longest request while nothing was
    done, None where it is not known apart.
    """

    daemon: str
    pair: str
    patches: Sequence[Mapping[str, int]]
    processes: Sequence[int]
    pauses_us: Sequence[float]
    served: int
    failed: int
    calm_us: int | None
    longest_us: int

    def __str__(self) -> str:
        """As Markdown."""
        functions, jumps, references = (
            sum(patch[name] for patch in self.patches) for name in ("functions", "entry_jumps", "references")
        )
        calm = "" if self.calm_us is None else f"{self.calm_us / 1000:.1f}"
        fewest, most = min(self.processes), max(self.processes)
        cells = (
            self.daemon,
            self.pair,
            f"{functions}, {jumps} redirected",
            str(references),
            str(fewest) if fewest == most else f"{fewest} to {most}",
            f"{median(self.pauses_us):.0f} median, {max(self.pauses_us):.0f} largest of {len(self.pauses_us)}",
            f"{self.served}, {self.failed}",
            f"{calm}, {self.longest_us / 1000:.1f}".removeprefix(", "),
        )
        return f"| {' | '.join(cells)} |"
