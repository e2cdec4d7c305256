"""Upgrades: a process that runs old builds is patched to the builds that lie on disk now, all images in one stop.

What was installed together may belong together, as a program and its own library do, and nobody can tell. So the
images of a process are a set; and where one of them cannot be patched, the others are left alone, unless it is asked
for that what can be patched is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from elfdiff.diff import Options, diff
from elfdiff.errors import (
    BadInput,
    Busy,
    Interrupted,
    LivegraftError,
    NothingToPatch,
    NotPermitted,
    Partial,
    Refused,
    TargetDamaged,
)
from elfdiff.patchobject import PatchObject

from ..interruption import heed
from ..pausing.conditions import Conditions
from ..process.memory import Memory
from ..process.modules import Module, modules
from ..process.proc import executable_of, mappings, no_such_process
from ..process.upgradefiles import FilePair, as_paths, held_files, require_unchanged
from ..records.record import Record, State
from ..records.search import find_records
from ..targets.outdated import FileState, OutdatedFile, OutdatedProcess, outdated_process
from ..targets.selection import Key, Pin
from ..transactions import transaction
from ..transactions.transaction import Outcome
from .cache import PatchCache, name_of


class Fate(Enum):
    """What became of one file of a process; the values are stable names."""

    PATCHED = "patched"  # the process runs the build on disk now
    PATCHABLE = "patchable"  # of a dry run: it would
    ALREADY = "already"  # it carries a patch to that build
    NOTHING = "nothing-to-patch"  # the builds do not differ in anything that matters
    REFUSED = "refused"  # not safe, or there is no new build
    BUSY = "busy"  # a function stayed live
    FAILED = "failed"  # the error says why
    UNTRIED = "not-tried"  # another file of the process cannot be patched


GOOD = (Fate.PATCHED, Fate.PATCHABLE, Fate.ALREADY)
_BAD = (Fate.REFUSED, Fate.BUSY, Fate.FAILED)


@dataclass(frozen=True, slots=True)
class UpgradedFile:
    """What became of one file. ``compared`` says that its patch was made for it, and not found in the cache.

    ``mapped`` is a path by which the old file can be read for as long as the process has it mapped.
    """

    file: OutdatedFile
    fate: Fate
    mapped: str
    outcome: Outcome | None = None
    patch: PatchObject | None = None
    error: LivegraftError | None = None
    compared: bool = False


@dataclass(frozen=True, slots=True)
class Upgraded:
    """What became of the outdated files of a process, in the order of their turns; ``unit`` as in ``outdated``."""

    unit: str
    files: tuple[UpgradedFile, ...]


@dataclass(frozen=True, slots=True)
class _Image:
    """An outdated file as it is mapped; ``record`` is the patch in force to the build that lies on disk, if any.

    ``mapped`` as in ``UpgradedFile``; ``sets`` are those of which a patch of it is in force.
    """

    file: OutdatedFile
    module: Module
    mapped: str
    record: Record | None
    sets: frozenset[str]


class Patches:
    """A patch for each pair of builds: of this run, from the cache, or newly made. Refusals last for the run only."""

    def __init__(self, cache: PatchCache) -> None:
        """Keep patches in ``cache``."""
        self._cache = cache
        self._known: dict[str, PatchObject | LivegraftError] = {}

    def patch_of(self, pair: FilePair, file: OutdatedFile) -> tuple[PatchObject, bool]:
        """Return the patch for two files, and whether they had to be compared.

        Raises NothingToPatch, Refused, and LivegraftError where a file was replaced meanwhile.
        """
        builds = (file.running, file.on_disk)
        name = name_of(pair, builds)
        compared = False
        if name not in self._known:
            kept = self._cache.read(name, builds)
            compared = kept is None
            self._known[name] = self._made(name, pair, builds) if kept is None else kept
        known = self._known[name]
        if isinstance(known, LivegraftError):
            raise known
        return known, compared

    def _made(self, name: str, pair: FilePair, builds: tuple[str, str]) -> PatchObject | LivegraftError:
        try:
            patch = compare_files(pair)
        except (Refused, NothingToPatch) as error:
            return _said(error, type(error), str)  # whose traceback does not hold both builds in memory
        if (patch.old.build_id, patch.new.build_id) != builds:
            raise LivegraftError(
                f"{pair.new.path} was replaced while it was looked at",
                why=f"found were {patch.old.build_id} and {patch.new.build_id}, before {' and '.join(builds)}",
                next_step="wait until the upgrade is over, and try again",
            )
        return self._cache.write(name, patch)


def compare_files(pair: FilePair) -> PatchObject:
    """Return the patch from the file that is mapped to the one on disk; what ``diff`` raises names them so.

    What is no build of the same program is Refused. Raises LivegraftError where a file was replaced meanwhile.
    """
    with as_paths(pair) as (old, new):

        def named(text: str) -> str:
            return text.replace(str(old), f"the running {pair.old.path}").replace(str(new), pair.new.path)

        try:
            patch = diff(old, new, Options())
        except (BadInput, Refused, NothingToPatch) as error:
            require_unchanged(pair)
            kind = Refused if isinstance(error, BadInput) else type(error)
            raise _said(error, kind, named) from error
    require_unchanged(pair)
    return patch


def _said(error: LivegraftError, kind: type[LivegraftError], named: Callable[[str], str]) -> LivegraftError:
    """The same error in other words."""
    details = tuple(map(named, error.details))
    said = kind(named(error.what), why=named(error.why), next_step=named(error.next_step), details=details)
    if isinstance(said, Refused) and isinstance(error, Refused):
        said.findings = error.findings
    return said


class Upgrade:
    """The upgrade of several processes, one at a time by ``act``; ``done`` is what became of each so far."""

    def __init__(
        self, cache: PatchCache, conditions: Conditions, *, dry_run: bool, everybody: bool, partial: bool = False
    ) -> None:
        """``everybody``: processes were not named, so one that may not be looked at is counted and passed over.

        ``partial``: what can be patched of a process is, also where something else of it cannot.
        """
        self.done: dict[Key, Upgraded] = {}
        self.unreadable = 0
        self._patches = Patches(cache)
        self._conditions = conditions
        self._dry_run = dry_run
        self._everybody = everybody
        self._partial = partial

    def act(self, pin: Pin) -> Outcome:
        """Upgrade one process, for ``carry_out_each``; returns what was done to it.

        Raises NothingToPatch, the error of the file that failed, or Partial where others of the process were done.
        """
        process = self._outdated(pin)
        images = _images(pin, process)
        prepared = [self._prepared(pin, image, process) for image in images]
        # What is in force already stays as it is, but where another of its set is replaced: then all of it is.
        new = [item.result.fate is Fate.PATCHABLE for item in prepared]
        replaced = {set_id for image, one in zip(images, new, strict=True) if one for set_id in image.sets}
        prepared = [
            self._prepared(pin, image, process, anew=True) if image.record and image.sets & replaced else item
            for image, item in zip(images, prepared, strict=True)
        ]
        results = [item.result for item in prepared]
        if self._partial or not any(item.fate in _BAD for item in results):
            results = self._carried_out(pin, prepared, process)
        else:
            results = [replace(item, fate=Fate.UNTRIED) if item.fate is Fate.PATCHABLE else item for item in results]
        self.done[pin.process.key] = Upgraded(process.unit, tuple(results))
        return _verdict(results, pin)

    def _outdated(self, pin: Pin) -> OutdatedProcess:
        try:
            process = outdated_process(pin.pid)
        except (BadInput, NotPermitted) as error:  # it has ended, or is somebody else's
            if not self._everybody:
                raise
            self.unreadable += isinstance(error, NotPermitted)
            process = None
        if process is None:
            raise NothingToPatch(
                f"process {pin.pid} ({pin.process.name}) is not known to run an old build",
                why="none of its files was deleted or replaced on disk since it was mapped",
                next_step="nothing is to be done for this process",
            )
        return process

    def _prepared(self, pin: Pin, image: _Image, process: OutdatedProcess, *, anew: bool = False) -> _Prepared:
        """What is to become of one image, and its patch where one that fits the process is to be applied.

        ``anew``: also where it is in force already.
        """
        file, mapped = image.file, image.mapped
        held = transaction.as_it_was(pin.pid, process.name, image.record) if image.record else None
        patch, compared = None, False
        try:
            heed()
            if held is not None and not anew:
                return _Prepared(UpgradedFile(file, Fate.ALREADY, mapped, held), None)
            with held_files(pin.pid, image.module, file.successor) as pair:
                pin.require_alive()
                patch, compared = self._patches.patch_of(pair, file)
            if held is not None:
                return _Prepared(UpgradedFile(file, Fate.ALREADY, mapped, held), patch)
            transaction.require_fit(pin.pid, patch, self._conditions, pin=pin)
        except Interrupted:
            raise
        except NothingToPatch as error:
            nothing = NothingToPatch(error.what, why=error.why, next_step="nothing is to be done for this file")
            return _Prepared(UpgradedFile(file, Fate.NOTHING, mapped, error=nothing), None)
        except LivegraftError as error:
            if pin.exited():
                raise
            return _Prepared(_failed(file, mapped, patch, error, process, compared), None)
        return _Prepared(UpgradedFile(file, Fate.PATCHABLE, mapped, None, patch, None, compared), patch)

    def _carried_out(self, pin: Pin, prepared: Sequence[_Prepared], process: OutdatedProcess) -> list[UpgradedFile]:
        """What became of the files when all that are to be patched were patched, in one stop."""
        results = [item.result for item in prepared]
        patches = [item.patch for item in prepared if item.patch is not None]
        if not patches:
            return results
        act = transaction.check if self._dry_run else transaction.apply
        try:
            outcome = act(pin.pid, patches, self._conditions, pin=pin)
        except Interrupted:
            raise
        except LivegraftError as error:
            if pin.exited():
                raise
            return [
                _failed(item.file, item.mapped, item.patch, error, process, item.compared)
                if item.fate is Fate.PATCHABLE
                else item
                for item in results
            ]
        by_patch = {one.contents.patch: one for one in outcome.members}
        return [self._done(item.result, by_patch[item.patch.id]) if item.patch else item.result for item in prepared]

    def _done(self, file: UpgradedFile, outcome: Outcome) -> UpgradedFile:
        if outcome.already or file.fate is Fate.ALREADY:
            return replace(file, fate=Fate.ALREADY, outcome=file.outcome or outcome)
        return replace(file, fate=Fate.PATCHABLE if self._dry_run else Fate.PATCHED, outcome=outcome)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What is to become of one file; ``patch`` where it is to be applied."""

    result: UpgradedFile
    patch: PatchObject | None


def _failed(
    file: OutdatedFile,
    mapped: str,
    patch: PatchObject | None,
    error: LivegraftError,
    process: OutdatedProcess,
    compared: bool,
) -> UpgradedFile:
    return UpgradedFile(file, _fate_of(error), mapped, None, patch, _advised(error, process), compared)


def _images(pin: Pin, process: OutdatedProcess) -> list[_Image]:
    """The outdated files as they are mapped, in the order of their turns; those unloaded meanwhile are left out."""
    with Memory(pin.pid) as memory:
        pin.require_alive()
        maps = mappings(pin.pid)
        loaded = modules(maps, memory)
        records, _ = find_records(maps, memory)
    program = _program_of(pin.pid)
    found = []
    for file in process.files:
        module = next((item for item in loaded if (item.path, item.build_id) == (file.path, file.running)), None)
        if module is not None:
            first = module.mappings[0]
            name = "exe" if file.path == program else f"map_files/{first.start:x}-{first.end:x}"
            record = _in_force(records, file, module)
            found.append(_Image(file, module, f"/proc/{pin.pid}/{name}", record, _sets(records, module)))
    return sorted(found, key=lambda image: (image.file.path == program, image.module.low))


def _program_of(pid: int) -> str:
    try:
        return executable_of(pid)
    except OSError as error:
        raise no_such_process(pid) from error


def _sets(records: Sequence[Record], module: Module) -> frozenset[str]:
    return frozenset(
        item.contents.set_id
        for item in records
        if item.state is State.APPLIED
        and item.contents.set_id
        and (item.contents.old.build_id, item.contents.old_bias) == (module.build_id, module.bias)
    )


def _in_force(records: Sequence[Record], file: OutdatedFile, module: Module) -> Record | None:
    """The record of a patch to the build on disk, None where there is none or one that is still to be finished."""
    if file.state is not FileState.PATCHED or any(item.interrupted for item in records):
        return None
    wanted = (file.running, file.on_disk, module.bias)
    for item in records:
        contents = item.contents
        if item.state is State.APPLIED and wanted == (contents.old.build_id, contents.new.build_id, contents.old_bias):
            return item
    return None


def _fate_of(error: LivegraftError) -> Fate:
    return Fate.REFUSED if isinstance(error, Refused) else Fate.BUSY if isinstance(error, Busy) else Fate.FAILED


def _advised(error: LivegraftError, process: OutdatedProcess) -> LivegraftError:
    """What is refused is refused for as long as the process runs: what helps is to restart it."""
    if not isinstance(error, Refused):
        return error
    said = _said(error, type(error), str)
    said.next_step = f"restart it: {restart_of(process)}"
    return said


def restart_of(process: OutdatedProcess) -> str:
    """Return how a process is restarted: the command where systemd started it, else in words."""
    if process.unit.endswith(".service"):
        return f"systemctl restart {process.unit}"
    return f"end process {process.pid} ({process.name}), and start the program again"


def _good(results: Sequence[UpgradedFile]) -> list[UpgradedFile]:
    return [item for item in results if item.fate in GOOD]


def _verdict(results: Sequence[UpgradedFile], pin: Pin) -> Outcome:
    """What the files of a process come to. Raises as ``Upgrade.act``."""
    good = _good(results)
    bad = [item for item in results if item.fate in _BAD and item.error is not None]
    for item in bad:
        if isinstance(item.error, TargetDamaged):
            raise item.error
    if bad and bad[0].error is not None:
        if not good:
            raise bad[0].error
        raise Partial(
            f"{bad[0].file.path}: {bad[0].fate.value}; done of this process: {len(good)}",
            why=bad[0].error.what,
            next_step=bad[0].error.next_step,
        )
    outcomes = [item.outcome for item in good if item.outcome is not None]
    if outcomes:
        first = next((item for item in outcomes if not item.already), outcomes[0])
        return replace(first, further=tuple(item for item in outcomes if item is not first and not item.already))
    raise NothingToPatch(
        f"nothing is to be patched in process {pin.pid} ({pin.process.name})",
        why="what it runs and what lies on disk do not differ in anything that matters",
        next_step="nothing is to be done for this process",
    )
