"""Applying and reverting in a rehearsal: in the daemon's one process, or in all of its tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from elfdiff.errors import LivegraftError, Partial, TargetDamaged
from elfdiff.patchobject import PatchObject

from ..pausing.conditions import Conditions
from ..targets.selection import By, Pin, Selection
from ..transactions import transaction
from ..transactions.group import Act, End, Group, carry_out_each
from .file import Rehearsal

Asked = Callable[[], Conditions]
"""What is asked of a transaction that begins now: its time is what the rehearsal has left for it."""


@dataclass(frozen=True)
class Patched:
    """One process in which a patch was applied or reverted.

    ``pause_us``: how long it stood still; None where that was done already, in the process that forked it.
    """

    pid: int
    process: str
    pause_us: float | None


def apply_patches(
    pid: int, patches: Sequence[PatchObject], rehearsal: Rehearsal, asked: Asked
) -> tuple[Patched, ...]:
    """Put the patches in force in the daemon, process ``pid``, as a set.

    Raises LivegraftError; they are in force nowhere then.
    """

    def act(pid: int, pin: Pin | None = None) -> transaction.Outcome:
        return transaction.apply(pid, patches, asked(), pin=pin)

    if rehearsal.tree:
        return _in_all(pid, asked, lambda pin: act(pin.pid, pin))
    try:
        return (_patched(act(pid)),)
    except LivegraftError as error:
        _note_program(error, pid, rehearsal.program)
        raise


def revert_patches(
    pid: int, patches: Sequence[PatchObject], rehearsal: Rehearsal, asked: Asked
) -> tuple[Patched, ...]:
    """Take the patches out of force. Raises LivegraftError; they are in force as before then."""
    one = patches[0].id  # which takes all of its set with it
    if rehearsal.tree:
        return _in_all(pid, asked, lambda pin: transaction.revert(pin.pid, one, asked(), pin=pin))
    return (_patched(transaction.revert(pid, one, asked())),)


def _patched(outcome: transaction.Outcome) -> Patched:
    pause = outcome.pause
    return Patched(outcome.pid, outcome.process, None if pause is None else pause.pause_ns / 1000)


def _note_program(error: LivegraftError, pid: int, program: Path) -> None:
    """A script that does not become the daemon is the likeliest reason."""
    runs = Path(f"/proc/{pid}/exe")
    with suppress(OSError):  # it has ended, or may not be looked at: that is what the error says
        if not runs.samefile(program):
            error.add_note(f"start.command runs {runs.readlink()}, pid {pid}: a script must exec the daemon")


def _in_all(pid: int, asked: Asked, act: Act) -> tuple[Patched, ...]:
    """Do it to the process and all that descend from it, parents first, to all or to none of them."""
    group = carry_out_each(Selection(By.TREE, str(pid), several=True), act, undo=asked())
    _require_done(group)
    return tuple(_patched(item.outcome) for item in group.having(End.DONE) if item.outcome is not None)


def _require_done(group: Group) -> None:
    if group.interrupted is not None:
        raise group.interrupted
    if group.exit_code == 0:
        return
    error = _reason(group)
    where = tuple(f"{item.process.name}, pid {item.process.pid}: {item.end.value}" for item in group.results)
    if group.exit_code == Partial.exit_code:
        raise Partial(error.what, why=error.why, next_step=error.next_step, details=(*error.details, *where))
    error.add_note(f"of the daemon's processes: {'; '.join(where)}")
    raise error


def _reason(group: Group) -> LivegraftError:
    """What may be damaged comes first, then what failed, and only then who had nothing to be patched."""
    found = [item for item in group.results if item.error is not None]
    found.sort(key=lambda item: (not isinstance(item.error, TargetDamaged), item.end is End.PASSED))
    if not group.settled and not group.having(End.FAILED):
        return LivegraftError(
            "there was no end to new processes that had to be changed",
            why=f"after {group.scans} lists of the daemon's tree there were still some",
            next_step="let fewer of them start, or let them run the new build: docs/rehearsal.md",
        )
    if found and found[0].error is not None:
        return found[0].error
    return LivegraftError(
        "the daemon's processes have ended", why="all of them, before it was their turn", next_step="see why they do"
    )
