"""A pair that was built from sources: what the differ says of the stripped files, and what the object files say."""

from __future__ import annotations

from dataclasses import dataclass, replace

from elfdiff.diff import Analysis, Options, analyse
from elfdiff.patchobject import Reason
from fixtures.source import Built
from tests.objecttruth import Difference, compare_objects, linked_names


@dataclass(frozen=True)
class SourcePair:
    """Names are those of ``tests.objecttruth``; functions that other programs of the package have are left out."""

    truth: Difference
    analysis: Analysis
    changed: dict[str, Reason]  # by the differ, line numbers apart
    line_only: frozenset[str]
    added: frozenset[str]
    removed: frozenset[str]

    @property
    def missed(self) -> frozenset[str]:
        """Functions that changed, and of which the differ says that they did not."""
        return frozenset(self.truth.changed.keys() - self.changed.keys() - self.added)

    @property
    def unexplained(self) -> dict[str, Reason]:
        """Functions of which the differ says that they changed, and whose object code is the same."""
        known = self.truth.changed.keys() | self.truth.line_only
        return {name: reason for name, reason in self.changed.items() if name not in known}

    @property
    def timid(self) -> frozenset[str]:
        """Functions that differ in line numbers only, and are patched all the same: safe, and more than needed."""
        return self.truth.line_only & self.changed.keys()

    @property
    def refusals(self) -> dict[str, tuple[str, ...]]:
        """Findings for which it was refused: code -> where, all of the code together."""
        return _by_code(self.analysis, "refuse")

    @property
    def warnings(self) -> dict[str, tuple[str, ...]]:
        """Findings that warn: code -> where."""
        return _by_code(self.analysis, "warn")


def judge_sources(old: Built, new: Built, program: str) -> SourcePair:
    """Compare both stripped files of a program, then the object files that it was linked from."""
    analysis = analyse(old.stripped(program), new.stripped(program), Options())
    names = linked_names(old.linked(program)), linked_names(new.linked(program))
    first, second = frozenset(names[0].values()), frozenset(names[1].values())
    truth = compare_objects(old.objects, new.objects)
    truth = replace(
        truth,
        changed={name: what for name, what in truth.changed.items() if name in second},
        line_only=truth.line_only & second,
        added=truth.added & second,
        removed=truth.removed & first,
    )
    return _named(truth, analysis, *names)


def _named(
    truth: Difference, analysis: Analysis, old_names: dict[int, str], new_names: dict[int, str]
) -> SourcePair:
    if analysis.draft is None:
        return SourcePair(truth, analysis, {}, frozenset(), frozenset(), frozenset())
    comparison = analysis.draft.comparison
    starts = comparison.old.starts.tolist(), comparison.new.starts.tolist()
    old = [old_names.get(start, hex(start)) for start in starts[0]]
    new = [new_names.get(start, hex(start)) for start in starts[1]]
    return SourcePair(
        truth,
        analysis,
        {new[j]: reason for j, reason in comparison.changed.items() if reason is not Reason.LINES},
        frozenset(new[j] for _, j in comparison.line_only),
        frozenset(new[j] for j in comparison.added),
        frozenset(old[i] for i in comparison.removed),
    )


def _by_code(analysis: Analysis, severity: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for finding in analysis.findings:
        if finding.severity == severity:
            found[finding.code] = found.get(finding.code, ()) + finding.where
    return found
