"""Code that moves between functions that are called one after the other: in between it may be left out."""

from __future__ import annotations

from collections.abc import Iterator

from elfdiff.building.moves import Move
from elfdiff.building.patchbuild import Draft
from elfdiff.findings.places import MANY
from elfdiff.patchobject import Finding, Severity

_SHOWN = 3


def moved_code(draft: Draft) -> Iterator[Finding]:
    """Something moves between two functions that a common caller calls in turn."""
    # A caller that changes itself must be idle anyway.
    patched = {function.old_start for function in draft.functions}
    unchanged = [move for move in draft.moves if int(draft.comparison.old.starts[move.caller]) not in patched]
    awaited = [move for move in unchanged if not move.hopeless]
    if awaited:
        yield Finding(
            "moved-code",
            Severity.WARN,
            f"something moves between functions that are called in turn, in {len(awaited)} case(s)",
            _places(draft, awaited),
            "a thread between the two calls does it twice, or never, when the patch comes into force or is taken back",
            "nothing to do: apply and revert wait until no thread is there; --no-when-idle does not wait, "
            "--allow moved-code leaves it out of the patch",
        )
    hopeless = [move for move in unchanged if move.hopeless]
    if hopeless:
        yield Finding(
            "moved-code",
            Severity.REFUSE,
            f"something moves between functions that are called in turn by one that never returns, in {len(hopeless)} "
            "case(s)",
            _places(draft, hopeless),
            "a thread between the two calls does it twice, or never, and where exactly those lead from one to the "
            "other is not known, so that there is no moment to wait for",
            "restart the program; or --allow moved-code if it does no harm twice or never",
        )


def _places(draft: Draft, moves: list[Move]) -> tuple[str, ...]:
    names = draft.comparison.old.names
    places = [
        f"{names[move.caller]}, from {names[move.source]} to {names[move.destination]}: {_what(move)}" for move in moves
    ]
    return (*places[:MANY], *([f"and {len(places) - MANY} more"] if len(places) > MANY else []))


def _what(move: Move) -> str:
    rest = len(move.what) - _SHOWN
    return ", ".join(move.what[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
