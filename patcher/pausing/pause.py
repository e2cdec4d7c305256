"""The pause: all threads stopped, stacks checked, the plan carried out, all threads let go.

Nothing is computed here that could have been computed before. What was read while the plan was made is
compared once more, since the program ran on in between.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace

from elfdiff.errors import Busy, Changed, LivegraftError, TargetDamaged

from ..interruption import heed
from ..planning.plan import PageWrite, Plan, StateWrite
from ..process.memory import Comparison, Memory
from ..process.modules import PF_X, Module, module_of
from ..process.proc import has_exited, no_such_process
from ..records.record import STATE_OFFSET, Record
from ..stacks.deepcheck import DeepCheck
from ..stacks.forbidden import ForbiddenRange
from ..stacks.quiescence import LiveFrame, Quiescence, StackCheck
from ..stacks.switching_x86_64 import stack_switchers
from ..stacks.unwindtables import UnwindTable
from ..targets.target import Snapshot
from ..threads import ptrace
from ..threads.stopping import SeizedProcess, seize
from .conditions import Conditions
from .quickpause import QuickPause
from .returns import Waiting, Waits
from .steps import OnStep, no_step

_MAX_STACK_LINES = 16
_MAX_FRAMES_SHOWN = 8
_MOST_LOOKS = 4  # at words that have not changed, before all threads are stopped again: what they mean may have


@dataclass(frozen=True, slots=True)
class Pause:
    """How it went: beginning (in ns of CLOCK_MONOTONIC) and length of the pause that did it, from the first
    PTRACE_INTERRUPT to the last PTRACE_DETACH.

    ``tries`` counts the stops, the last one included; ``realtime`` says whether it ran under SCHED_FIFO, ``waits``
    how the time between the stops was spent. ``searched`` are the bytes of memory that the deep check has looked at.
    """

    pause_ns: int
    tries: int
    threads: int
    unwound: int
    realtime: bool
    waits: Waits
    searched: int = 0
    began_ns: int = 0


def carry_out(
    plan: Plan, seen: Snapshot, memory: Memory, conditions: Conditions, on_step: OnStep, *, write: bool = True
) -> Pause:
    """Stop the process until none of the plan's functions is live, and carry out the plan then.

    Without ``write`` everything is done but the writing.
    Raises Busy where a function stayed live, or a thread did not stop; Changed where the process is no longer as the
    plan knows it; LivegraftError where it has executed another program, or a write failed and all was put back;
    TargetDamaged where that failed too.
    """
    tries = 0
    expected = _expected(plan)
    unchanged = Comparison(memory, expected)
    deep = deep_check(plan, seen, memory, conditions)
    deadline = time.monotonic() + conditions.timeout
    with ExitStack() as stack:
        stack.enter_context(deep or nullcontext())
        check = stack.enter_context(stack_check(plan, seen, memory, deep))
        waiting = stack.enter_context(Waiting(deadline))
        quick = None
        if not write or on_step is no_step:
            quick = stack.enter_context(QuickPause(memory, check, expected, _writes(plan) if write else ()))
        while True:
            tries += 1
            live: tuple[LiveFrame, ...] = ()
            stopped = time.monotonic()
            try:
                done = _one_stop(plan, check, unchanged, memory, on_step if write else None, quick)
            except _NotQuiescent as error:
                live = error.live
                busy = _busy(live, seen, plan, conditions, tries, waiting.waits)
            except Busy as error:
                busy = error
            else:
                if not write:
                    memory.require_same_program()  # else what was found is about another program
                return replace(done, tries=tries, waits=waiting.waits)
            waiting.done()
            heed()
            stopped = time.monotonic() - stopped
            # Before the wait, so that a moment which it finds is not lost to it; ``check`` notices what changes after.
            check.refresh()
            if not waiting.wait(live, stopped):
                raise busy
            for _ in range(_MOST_LOOKS):
                if not check.parked():
                    break
                if not waiting.wait(live, 0.0):
                    raise busy


def stack_check(plan: Plan, seen: Snapshot, memory: Memory, deep: DeepCheck | None = None) -> StackCheck:
    """Return the check that a pause for ``plan`` makes. Raises as ``StackCheck``."""
    return StackCheck(memory, plan.forbidden, patch_tables(seen.records), deep=deep)


def deep_check(plan: Plan, seen: Snapshot, memory: Memory, conditions: Conditions) -> DeepCheck | None:
    """Return the search for parked stacks that a pause for ``plan`` makes, None where none is to be made.

    Raises Refused where the process has more memory than may be searched, LivegraftError, NotPermitted.
    """
    if conditions.deep_check is False:
        return None
    switchers = () if conditions.deep_check else stack_switchers(seen.modules, memory)
    if not conditions.deep_check and not switchers:
        return None
    strays_only = bool(switchers) and not any(item.parks for item in switchers)
    stand_ins = {item.stand_in for record in seen.records for item in record.contents.lookups}
    check = DeepCheck(memory, plan.parkable, conditions.deep_limit, stand_ins, strays_only=strays_only)
    try:
        if not strays_only:
            check.require_limit()
    except BaseException:
        check.close()
        raise
    return check


class _NotQuiescent(Exception):
    """A function is live; never leaves this module."""

    def __init__(self, live: tuple[LiveFrame, ...]) -> None:
        super().__init__("not quiescent")
        self.live = live


def _one_stop(
    plan: Plan,
    check: StackCheck,
    unchanged: Comparison,
    memory: Memory,
    on_step: OnStep | None,
    quick: QuickPause | None,
) -> Pause:
    with seize(memory.pid) as process:
        seized = len(process.tids)
        try:
            if process.stop(quick=quick):
                return _pause(process, seized)
        except LivegraftError as error:
            if quick is None or not quick.wrote or has_exited(memory.pid):
                raise
            raise _in_part(memory.pid, f"a write failed, and then it could not be held ({error})") from error
        threads = process.threads
        result = Quiescence((), len(threads), 0, 0)
        if quick is None or not quick.wrote:  # else all of it held
            result = check.check(threads)
            if result.live:
                raise _NotQuiescent(result.live)
            if not unchanged.holds():
                _require_unchanged(plan, memory)
        if on_step is not None:
            _write(plan, process, memory, on_step)
        process.resume_and_detach()
        return _pause(process, len(threads), result)


def _pause(process: SeizedProcess, threads: int, found: Quiescence | None = None) -> Pause:
    unwound, searched = (found.unwound, found.searched) if found else (0, 0)
    return Pause(process.pause_ns, 1, threads, unwound, process.realtime, Waits(), searched, process.began_ns)


def _writes(plan: Plan) -> list[tuple[int, bytes]]:
    """All writes as (address, bytes), in the order of ``_write``."""
    first, last = ([(item.record + STATE_OFFSET, item.after) for item in states] for states in (plan.first, plan.last))
    return [*first, *((page.address, page.after) for page in plan.writes), *last]


def _expected(plan: Plan) -> list[tuple[int, bytes]]:
    """What the plan will overwrite, as it was when the plan was made."""
    words = {write.record: write.before for write in reversed((*plan.first, *plan.last))}
    pages = {write.address: write.before for write in reversed(plan.writes)}  # of several writes the first
    expected = list(pages.items())
    return expected + [(record + STATE_OFFSET, word) for record, word in words.items()]


def _require_unchanged(plan: Plan, memory: Memory) -> None:
    """Compare what the plan will overwrite with what it was when the plan was made."""
    expected = _expected(plan)
    held = memory.read_many([(address, len(data)) for address, data in expected])
    for (address, data), now in zip(expected, held, strict=True):
        if now != data:
            raise Changed(
                f"process {memory.pid} changed while the patch was being prepared",
                why=f"the bytes at {address:#x} are others than a moment ago",
                next_step="try again",
            )


def _write(plan: Plan, process: SeizedProcess, memory: Memory, on_step: OnStep) -> None:
    tid = process.threads[0].tid
    memory.poke = lambda address, word: ptrace.poke_word(tid, address, word)
    pages: list[PageWrite] = []
    states: list[StateWrite] = []
    try:
        _write_states(plan.first, memory, states)
        on_step("begun")
        for page in plan.writes:
            pages.append(page)
            memory.write(page.address, page.after)
            on_step("page")
        _write_states(plan.last, memory, states, on_step)
    except BaseException as error:
        _roll_back(pages, states, memory, error)
        raise
    finally:
        memory.poke = None


def _write_states(
    writes: Sequence[StateWrite], memory: Memory, done: list[StateWrite], on_step: OnStep | None = None
) -> None:
    for write in writes:
        done.append(write)
        memory.write(write.record + STATE_OFFSET, write.after)
        if on_step is not None:
            on_step("state")


def _put_back(memory: Memory, address: int, before: bytes) -> None:
    # A write that failed has mostly written nothing, and then it need not be possible now.
    if memory.read(address, len(before)) != before:
        memory.write(address, before)


def _roll_back(pages: Sequence[PageWrite], states: Sequence[StateWrite], memory: Memory, error: BaseException) -> None:
    try:
        for page in reversed(pages):
            _put_back(memory, page.address, page.before)
        for state in reversed(states):
            _put_back(memory, state.record + STATE_OFFSET, state.before)
    except LivegraftError as failure:
        if has_exited(memory.pid):
            raise no_such_process(memory.pid) from error
        why = f"a write failed ({error}), and so did putting back what was there ({failure.what}: {failure.why})"
        raise _in_part(memory.pid, why) from error


def _in_part(pid: int, why: str) -> TargetDamaged:
    return TargetDamaged(
        f"process {pid} is patched in part",
        why=why,
        next_step=f"livegraft revert --pid {pid}, or restart the program",
    )


def patch_tables(records: Iterable[Record]) -> tuple[UnwindTable, ...]:
    """Return the unwind tables of the code that patches have brought into the process."""
    return tuple(
        UnwindTable(
            f"patch {record.short_id}", segment.start, segment.start + segment.size, record.contents.eh_frame_hdr
        )
        for record in records
        for segment in record.contents.segments
        if segment.flags & PF_X
    )


def _busy(
    live: Sequence[LiveFrame],
    seen: Snapshot,
    plan: Plan,
    conditions: Conditions,
    tries: int,
    waits: Waits,
) -> Busy:
    first = live[0]
    how = f"; {waits.words()}" if waits.words() else ""
    names = ", ".join(dict.fromkeys(frame.name for frame in live))
    details = []
    for frame in live[:_MAX_FRAMES_SHOWN]:
        sure = "is in" if frame.certain else "may be in"
        details.append(f"{_who(frame)} {sure} {frame.name}: {frame.why}")
        details += [
            f"    #{depth} {pc:#x} {describe(pc, depth, seen.modules, plan.forbidden)}"
            for depth, pc in enumerate(frame.stack[:_MAX_STACK_LINES])
        ]
    if len(live) > _MAX_FRAMES_SHOWN:
        details.append(f"and {len(live) - _MAX_FRAMES_SHOWN} more")
    return Busy(
        f"{names} stayed live in process {seen.pid} ({seen.name})",
        why=f"{_who(first)} {'is' if first.certain else 'may be'} in {first.name}; looked {tries} times "
        f"in {conditions.timeout:g} s{how}",
        next_step=f"see for how long and how often: livegraft blocking PATCH --pid {seen.pid} (of a revert: --revert); "
        f"try again when the program does something else, or with a longer --timeout{_or_keep(live, plan)}"
        f"{_or_not(live, plan)}",
        details=tuple(details),
    )


def _or_keep(live: Sequence[LiveFrame], plan: Plan) -> str:
    names = dict.fromkeys(frame.name for frame in live)
    if not plan.keepable.issuperset(names):
        return ""
    return f"; or let the threads that are in it finish the old code: --keep-live {','.join(names)}"


def _or_not(live: Sequence[LiveFrame], plan: Plan) -> str:
    names = dict.fromkeys(frame.name for frame in live if frame.name in plan.unchanged)
    if not names:
        return ""
    said = ", ".join(names)
    return (
        f"; {said} does not change, and is waited for because of what is called from there: see docs/findings.md, "
        "moved-code; --no-when-idle does not wait for it"
    )


def _who(frame: LiveFrame) -> str:
    return f"thread {frame.tid}" if frame.tid else "a stack that no thread runs on"


def describe(pc: int, depth: int, loaded: Sequence[Module], forbidden: Sequence[ForbiddenRange]) -> str:
    """Return the name of the code at ``pc`` as well as it is known: a patched function, or module+offset.

    Frames but the innermost (``depth`` 0) hold return addresses, which may lie behind the end of their
    function.
    """
    inside = pc - (depth > 0)
    for item in forbidden:
        if item.start <= inside < item.end:
            return f"{item.name}+{pc - item.start:#x}"
    module = module_of(loaded, pc)
    return f"{module.name}+{pc - module.bias:#x}" if module else "?"
