"""A pair that was built from sources: what the differ says of the stripped files, and what the object files say."""

from __future__ import annotations

from dataclasses import dataclass

from elfdiff.code import load_code
from elfdiff.comparison import Comparison, compare
from elfdiff.diff import Options, diff
from elfdiff.errors import LivegraftError
from elfdiff.imagefile import load_image
from elfdiff.patchobject import PatchObject, Reason
from fixtures.source import Built
from tests.objecttruth import Difference, compare_objects, linked_names


@dataclass(frozen=True)
class SourcePair:
    """Names are those of ``tests.objecttruth``; functions that other programs of the package have are left out."""

    truth: Difference
    changed: dict[str, Reason]  # by the differ, line numbers apart
    line_only: frozenset[str]
    added: frozenset[str]
    removed: frozenset[str]
    patch: PatchObject | None
    error: LivegraftError | None

    @property
    def missed(self) -> set[str]:
        """Functions that changed, and of which the differ says that they did not."""
        return set(self.truth.changed) - self.changed.keys() - self.added

    @property
    def unexplained(self) -> dict[str, Reason]:
        """Functions of which the differ says that they changed, and whose object code is the same."""
        known = self.truth.changed.keys() | self.truth.line_only
        return {name: reason for name, reason in self.changed.items() if name not in known}

    @property
    def timid(self) -> set[str]:
        """Functions that differ in line numbers only, and are patched all the same: safe, and more than needed."""
        return self.truth.line_only & self.changed.keys()


def judge_sources(old: Built, new: Built, program: str) -> SourcePair:
    """Compare both stripped files of a program, then the object files that it was linked from."""
    first, second = old.stripped(program), new.stripped(program)
    patch = error = None
    try:
        patch = diff(first, second, Options())
    except LivegraftError as raised:
        error = raised
    comparison = compare(load_code(load_image(first)), load_code(load_image(second)))
    return SourcePair(
        _of_program(compare_objects(old.objects, new.objects), old, new, program),
        *_named(comparison, linked_names(old.linked(program)), linked_names(new.linked(program))),
        patch,
        error,
    )


def _of_program(truth: Difference, old: Built, new: Built, program: str) -> Difference:
    first = frozenset(linked_names(old.linked(program)).values())
    second = frozenset(linked_names(new.linked(program)).values())
    return Difference(
        {name: what for name, what in truth.changed.items() if name in second},
        truth.line_only & second,
        truth.added & second,
        truth.removed & first,
        truth.initial,
    )


def _named(
    comparison: Comparison, old_names: dict[int, str], new_names: dict[int, str]
) -> tuple[dict[str, Reason], frozenset[str], frozenset[str], frozenset[str]]:
    def old(function: int) -> str:
        start = int(comparison.old.starts[function])
        return old_names.get(start, hex(start))

    def new(function: int) -> str:
        start = int(comparison.new.starts[function])
        return new_names.get(start, hex(start))

    changed = {new(j): reason for j, reason in comparison.changed.items() if reason is not Reason.LINES}
    return (
        changed,
        frozenset(new(j) for _, j in comparison.line_only),
        frozenset(new(j) for j in comparison.added),
        frozenset(old(i) for i in comparison.removed),
    )
