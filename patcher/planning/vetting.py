"""Whether a record can be believed: what it says is compared with what the target cannot forge.

A process can write its own records. One that may not write its own code (MemoryDenyWriteExecute, seccomp)
must not get that done by a forged record and an operator's revert. So a journal may only speak of function
entries in the text of its image, may only put back the bytes of the file, and may only jump into its own
patch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from elfdiff.errors import LivegraftError, TargetDamaged
from trampolines.entry_x86_64 import ENTRY_JUMP_SIZE, entry_jump_target

from ..process.modules import PF_X, Module
from ..process.proc import MEMFD_PATH, Mapping, by_living_thread, mapping_over
from ..records.record import JournalEntry, KeptCode, Record, State


def require_believable(records: Iterable[Record], loaded: Sequence[Module], maps: Sequence[Mapping], pid: int) -> None:
    """Raise TargetDamaged where a record says what cannot be so.

    Only those that were ever begun matter, and only where their image is still loaded: nothing is done by the
    others.
    """
    for record in records:
        module = module_of_record(record, loaded)
        if module is None or record.state is State.PREPARED:
            continue
        for item in (*record.contents.kept, *record.contents.idle):
            _require_code(record, item, module)
        text = own_text(record, maps)
        for mapping, entries in _by_mapping(record, module):
            with _mapped_file(pid, mapping) as descriptor:
                for entry in entries:
                    _require_plain(record, entry, text)
                    _require_pristine(record, entry, mapping, descriptor)


def require_whole_sets(records: Sequence[Record]) -> None:
    """Raise TargetDamaged where patches of a set are in force of which the process does not carry all records."""
    for record in records:
        if record.state is not State.APPLIED or not record.contents.set_id:
            continue
        count = sum(item.contents.set_id == record.contents.set_id for item in records)
        if count != record.contents.set_size:
            raise TargetDamaged(
                f"the record at {record.address:#x} cannot be believed",
                why=f"its patch is one of a set of {record.contents.set_size}, and the process carries {count} of them",
                next_step="restart the program; something in it has written over a record",
            )


def module_of_record(record: Record, loaded: Iterable[Module]) -> Module | None:
    """Return the image that a record's patch is for, or None where it is not loaded (any more)."""
    wanted = (record.contents.old.build_id, record.contents.old_bias)
    return next((module for module in loaded if (module.build_id, module.bias) == wanted), None)


def _by_mapping(record: Record, module: Module) -> Iterator[tuple[Mapping, Sequence[JournalEntry]]]:
    groups: dict[Mapping, list[JournalEntry]] = {}
    for entry in record.contents.journal:
        mapping = mapping_over(module.mappings, entry.address, ENTRY_JUMP_SIZE)
        if mapping is None or not mapping.executable:
            raise _unbelievable(record, entry, "there is no code of the image")
        groups.setdefault(mapping, []).append(entry)
    yield from groups.items()


def _require_code(record: Record, item: KeptCode, module: Module) -> None:
    mapping = mapping_over(module.mappings, item.start, item.size) if item.size else None
    if mapping is None or not mapping.executable:
        raise TargetDamaged(
            f"the record at {record.address:#x} cannot be believed",
            why=f"it says that {item.name} is at {item.start:#x}, where there is no code of the image",
            next_step="restart the program; something in it has written over the record",
        )


def _require_plain(record: Record, entry: JournalEntry, text: Sequence[range]) -> None:
    if len(entry.after) != ENTRY_JUMP_SIZE:
        raise _unbelievable(record, entry, f"{len(entry.after)} bytes are no entry jump")
    if entry.after == entry.pristine:
        return
    target = entry_jump_target(entry.address, entry.after)
    if target is None or not any(target in part for part in text):
        raise _unbelievable(record, entry, f"{entry.after.hex(' ')} does not lead into the patch")


def own_text(record: Record, maps: Sequence[Mapping]) -> tuple[range, ...]:
    """Where a record's patch has code, absolute addresses: as it says, and as it is mapped.

    Where its segments are, the record could say of any code of the process; what is mapped there must be such as a
    patch is: not from a file.
    """
    found = []
    for item in record.contents.segments:
        mapping = mapping_over(maps, *item.span)
        if item.flags & PF_X and mapping is not None and mapping.executable and mapping.path in ("", MEMFD_PATH):
            found.append(range(item.start, item.start + item.size))
    return tuple(found)


def _require_pristine(record: Record, entry: JournalEntry, mapping: Mapping, descriptor: int | None) -> None:
    if descriptor is None:
        return
    offset = mapping.offset + entry.address - mapping.start
    if os.pread(descriptor, len(entry.pristine), offset) != entry.pristine:
        raise _unbelievable(record, entry, f"the file has other bytes than {entry.pristine.hex(' ')}")


@contextmanager
def _mapped_file(pid: int, mapping: Mapping) -> Iterator[int | None]:
    """Open the very file that is mapped, deleted or not; None for users who may not (proc(5), map_files).

    The kernel wants CAP_CHECKPOINT_RESTORE (kernel commit 12886f8ab10c, v5.9) or CAP_SYS_ADMIN. Whoever has
    neither has no more rights than the target, and a forged record gains it nothing.
    """
    try:
        name = f"map_files/{mapping.start:x}-{mapping.end:x}"
        descriptor = by_living_thread(pid, lambda tid: os.open(f"/proc/{tid}/{name}", os.O_RDONLY | os.O_CLOEXEC))
    except PermissionError:
        yield None
        return
    except OSError as error:
        raise LivegraftError(
            f"the file that is mapped at {mapping.start:#x} could not be opened", why=str(error)
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _unbelievable(record: Record, entry: JournalEntry, why: str) -> TargetDamaged:
    return TargetDamaged(
        f"the record at {record.address:#x} cannot be believed",
        why=f"of the entry at {entry.address:#x} it says what cannot be: {why}",
        next_step="restart the program; something in it has written over the record",
    )
