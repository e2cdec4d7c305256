"""One command on several processes: each in a transaction of its own, parents before their children.

A child that an unpatched parent forks meanwhile is unpatched, one that a patched parent forks carries the patch. So the
processes are listed again until a list brings none that had to be changed: a process that lives while all of a list is
read is in it, and whoever could have forked an unpatched one is done by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from elfdiff.errors import (
    BadInput,
    Interrupted,
    LivegraftError,
    NoSuchPatch,
    NotConcerned,
    NothingToPatch,
    Partial,
    TargetDamaged,
)

from ..interruption import acknowledge
from ..pausing.conditions import Conditions
from ..records.record import State
from ..targets.selection import Key, Listed, Pin, Selection, pinned, select_again, select_processes
from .reinstating import Done, take_back
from .transaction import Outcome

MOST_SCANS = 16
"""Lists after which it is said that there is no end to it: something goes on making unpatched processes."""

Act = Callable[[Pin], Outcome]


class End(Enum):
    """What became of one process; the values are stable names."""

    DONE = "done"  # as its outcome says
    FAILED = "failed"  # as it was before, and the error says why
    PASSED = "not-concerned"  # the patch is not for what it runs, or there is nothing to revert or to upgrade
    EXITED = "exited"  # before it was its turn
    UNTRIED = "not-tried"  # the command ended before it was its turn
    TAKEN_BACK = "rolled-back"  # done, and then as before again
    STUCK = "not-rolled-back"  # done, and the error says why it could not be taken back


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one process. ``late`` says that it was not there when the command began."""

    process: Listed
    end: End
    outcome: Outcome | None = None
    error: LivegraftError | None = None
    late: bool = False

    @property
    def changed(self) -> bool:
        """Whether this command has changed the process, and it is so now."""
        return self.end in (End.DONE, End.STUCK) and self.outcome is not None and not self.outcome.already


@dataclass(frozen=True, slots=True)
class Group:
    """What became of all processes, in the order of their turns.

    ``scans`` counts the lists; ``settled`` says that the last one brought nothing that had to be changed. ``took_back``
    is None where nothing was to be taken back, else whether there was an end to it.
    """

    results: tuple[Result, ...]
    scans: int
    settled: bool = True
    interrupted: LivegraftError | None = None
    took_back: bool | None = None

    def having(self, *ends: End) -> tuple[Result, ...]:
        """The results that ended in one of these ways."""
        return tuple(item for item in self.results if item.end in ends)

    @property
    def exit_code(self) -> int:
        """The exit status: 0 where nothing failed, that of all failures where nothing was done, else 8.

        7 where any of them may be damaged. Processes that are not concerned count only where there is no other.
        """
        if any(isinstance(item.error, TargetDamaged) for item in self.results):
            return TargetDamaged.exit_code
        bad = bool(self.having(End.FAILED) or not self.settled or self.interrupted)
        if self.took_back is None:
            done = bool(self.having(End.DONE))
        else:
            done = self.took_back is False or any(item.changed for item in self.results)
        if done:
            return Partial.exit_code if bad else 0
        codes = self._codes(End.FAILED) if bad else self._codes(End.PASSED) or {BadInput.exit_code}
        return codes.pop() if len(codes) == 1 else LivegraftError.exit_code

    def _codes(self, end: End) -> set[int]:
        return {item.error.exit_code for item in self.having(end) if item.error}


def carry_out_each(
    selection: Selection, act: Act, *, again: bool = True, undo: Conditions | None = None, most_scans: int = MOST_SCANS
) -> Group:
    """Do ``act`` to every process that is meant; with ``again`` until no new one has to be changed.

    With ``undo`` the first failure ends it, and all that was done is taken back under these conditions. Raises BadInput
    where no process is meant, or more than one without leave; whatever happens to a process is in its result.
    """
    work = _Work(selection, act, undo is not None)
    group = work.all(most_scans if again else 1, again)
    if undo is None or not (group.interrupted or group.having(End.FAILED) or not group.settled):
        return group
    return _taken_back(group, selection, undo, most_scans)


class _Work:
    """The results so far; which processes had their turn."""

    def __init__(self, selection: Selection, act: Act, stop_at_failure: bool) -> None:
        self._selection = selection
        self._act = act
        self._stop_at_failure = stop_at_failure
        self._results: dict[Key, Result] = {}
        self._interrupted: LivegraftError | None = None

    def all(self, most_scans: int, again: bool) -> Group:
        listed = select_processes(self._selection)
        for scan in range(1, most_scans + 1):
            fresh = [item for item in listed if item.key not in self._results]
            ended = self._pass(fresh, late=scan > 1)
            group = Group(tuple(self._results.values()), scan, interrupted=self._interrupted)
            if ended or not again or not self._had_to_change(fresh):
                return group
            listed = select_again(self._selection, self._results.keys())
        return replace(group, settled=False)

    def _pass(self, fresh: Sequence[Listed], late: bool) -> bool:
        """Give each its turn; whether the command is to end with that."""
        for index, process in enumerate(fresh):
            result = self._turn(process)
            self._results[process.key] = replace(result, late=late)
            if self._interrupted or (self._stop_at_failure and result.end is End.FAILED):
                for other in fresh[index + 1 :]:
                    self._results[other.key] = Result(other, End.UNTRIED, late=late)
                return True
        return False

    def _had_to_change(self, fresh: Sequence[Listed]) -> bool:
        return any(self._results[item.key].changed or self._results[item.key].end is End.FAILED for item in fresh)

    def _turn(self, process: Listed) -> Result:
        try:
            with pinned(process) as pin:
                return self._turn_of(pin)
        except BadInput:
            return Result(process, End.EXITED)
        except LivegraftError as error:
            return Result(process, End.FAILED, error=error)

    def _turn_of(self, pin: Pin) -> Result:
        process = pin.process
        try:
            return Result(process, End.DONE, self._act(pin))
        except (NotConcerned, NoSuchPatch, NothingToPatch) as error:
            return Result(process, End.PASSED, error=error)
        except Interrupted as error:
            acknowledge()
            self._interrupted = error
            return Result(process, End.UNTRIED)
        except LivegraftError as error:
            if pin.ending():
                return Result(process, End.EXITED)
            return Result(process, End.FAILED, error=error)


def _taken_back(group: Group, selection: Selection, conditions: Conditions, most_scans: int) -> Group:
    """Take back all that was done, also what children have inherited of it, until a list brings no more of it."""
    results = {item.process.key: item for item in group.results}
    mine = {key: outcome for key, item in results.items() if (outcome := _to_take_back(item)) is not None}
    done = {one.contents.instance: _how(one) for outcome in mine.values() for one in outcome.members}
    alone = {key for key, item in results.items() if key not in mine and not item.late}
    had_its_turn = set(alone)
    for _ in range(most_scans):
        found = False
        for process in select_again(selection, results.keys() | had_its_turn):
            if process.key in had_its_turn:
                continue
            had_its_turn.add(process.key)
            if process.key not in results and process.parent in {pid for pid, _ in alone}:
                alone.add(process.key)  # what it carries it has from a parent that had it before
                continue
            result = _one_taken_back(process, results.get(process.key), done, conditions)
            if result is not None:
                results[process.key] = result
                found = True
        if not found:
            break
    for key in mine.keys() - had_its_turn:
        results[key] = replace(results[key], end=End.EXITED)
    return replace(group, results=tuple(results.values()), took_back=not found)


def _to_take_back(result: Result) -> Outcome | None:
    """What was done to a process, None where it is to be left alone.

    That is where nothing was done, or something was finished or undone that another command had begun.
    """
    outcome = result.outcome
    if outcome is None or not result.changed:
        return None
    if outcome.state is State.REVERTED:
        return outcome if outcome.before else None
    again = any(one.before and one.before.contents.patch == one.contents.patch for one in outcome.members)
    return None if again else outcome


def _how(outcome: Outcome) -> Done:
    if outcome.state is State.REVERTED:
        return Done(applied=False)
    return Done(applied=True, before=outcome.before.contents.instance if outcome.before else "")


def _one_taken_back(
    process: Listed, result: Result | None, done: dict[str, Done], conditions: Conditions
) -> Result | None:
    """What became of taking it back; None where there was nothing to be taken back."""
    before = result or Result(process, End.DONE, late=True)
    try:
        with pinned(process) as pin:
            try:
                outcome = take_back(pin, done, conditions)
            except LivegraftError as error:
                return None if pin.ending() else replace(before, end=End.STUCK, error=error)
    except BadInput:
        return None  # it has exited
    except LivegraftError as error:
        return replace(before, end=End.STUCK, error=error)
    return None if outcome is None else replace(before, end=End.TAKEN_BACK, outcome=outcome)
