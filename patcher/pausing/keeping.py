"""Old code that threads may finish while a patch is in force: what ``--keep-live`` names, and who is in it.

A function that never returns would keep its patch out for ever. Where the patch says that its old code can stand beside
the new code of all others (``elfdiff.building.sidebyside``), a thread may stay in it: its entry is redirected like any
other, so each new call runs the new code, and only the bytes of the entry jump must be free.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from elfdiff.errors import BadInput, Refused
from elfdiff.patchobject import OldCode, PatchObject

from ..planning.plan import disjoint
from ..process.memory import Memory
from ..records.record import KeptCode, Record, State
from ..stacks.forbidden import ForbiddenRange
from ..stacks.quiescence import StackCheck
from ..threads.stopping import seize
from .liveness import thread_name
from .pause import patch_tables

_CLOSE = 4


def keepable(patch: PatchObject) -> frozenset[str]:
    """Return the names of the functions whose old code threads may finish."""
    return frozenset(item.name for item in patch.old_codes if not item.why_not)


def names_by_patch(patches: Sequence[PatchObject], names: Iterable[str]) -> dict[str, list[str]]:
    """Return which of the names are meant of which patch, by its id; one that none knows is asked of the first.

    Raises BadInput where functions of two patches have it.
    """
    found: dict[str, list[str]] = {patch.id: [] for patch in patches}
    for name in names:
        owners = [patch for patch in patches if _matching(patch, name)]
        if len(owners) > 1:
            raise BadInput(
                f"{name} is the name of functions of {len(owners)} patches",
                why=" and ".join(f"{patch.id[:12]} of {patch.old.name}" for patch in owners),
                next_step="give an address (0x...) that only one of them has; livegraft inspect shows them",
            )
        found[(owners or patches)[0].id].append(name)
    return found


def _matching(patch: PatchObject, name: str) -> list[OldCode]:
    return [item for item in patch.old_codes if name in (item.name, hex(item.parts[0]))]


def kept_code(patch: PatchObject, names: Iterable[str], bias: int) -> tuple[KeptCode, ...]:
    """Return the old code of the named functions, and of what each hangs together with, at load bias ``bias``.

    A name may be an old address (hexadecimal, 0x in front). Raises BadInput for a name that the patch does not know or
    has twice, Refused where the old code cannot stand beside the new one.
    """
    sizes = {f.old_start: f.old_size or 0 for f in patch.functions} | {f.start: f.size for f in patch.removed}
    found: dict[int, KeptCode] = {}
    for name in names:
        item = _named(patch, name)
        if item.why_not:
            raise Refused(
                f"{item.name} cannot finish its old code while the rest runs the new one",
                why=item.why_not,
                next_step="wait until no thread is in it, or restart the program",
            )
        for start in item.parts:
            found[start] = KeptCode(item.name, start + bias, sizes[start])
    return tuple(found[start] for start in sorted(found) if found[start].size)


def _named(patch: PatchObject, name: str) -> OldCode:
    matching = _matching(patch, name)
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise BadInput(
            f"{name} is the name of {len(matching)} functions of the patch",
            why=", ".join(hex(item.parts[0]) for item in matching),
            next_step=f"give an address: --keep-live {matching[0].parts[0]:#x}",
        )
    close = difflib.get_close_matches(name, [item.name for item in patch.old_codes], _CLOSE, 0.5)
    raise BadInput(
        f"{name}: no function of the running program that the patch changes or removes",
        why="only such a one can be kept live",
        next_step=f"one of these is close: {', '.join(close)}" if close else "livegraft inspect lists them",
    )


@dataclass(frozen=True, slots=True)
class Finishing:
    """A thread that is in kept old code; ``certain`` as in ``LiveFrame``, ``patch`` the id of the patch."""

    tid: int
    thread: str
    function: str
    patch: str
    certain: bool


def finishing(pid: int, records: Sequence[Record], memory: Memory) -> tuple[Finishing, ...]:
    """Return who is in old code that an applied patch has kept. Stops the process for that, but only where some is.

    Raises as ``seize`` and ``SeizedProcess.stop``.
    """
    kept = {item: record for record in records if record.state is State.APPLIED for item in record.contents.kept}
    if not kept:
        return ()
    ranges = [ForbiddenRange(f"{item.start:#x}", item.start, item.start + item.size) for item in kept]
    with StackCheck(memory, disjoint(ranges), patch_tables(records)) as check, seize(pid) as process:
        process.stop()
        live = check.check(process.threads).live
    by_start = {f"{item.start:#x}": (item, record) for item, record in kept.items()}
    found = {}
    for frame in live:
        item, record = by_start.get(frame.name, (None, None))
        name = item.name if item else frame.name
        patch = record.contents.patch if record else ""
        found[frame.tid, name] = Finishing(frame.tid, thread_name(pid, frame.tid), name, patch, frame.certain)
    return tuple(found.values())
