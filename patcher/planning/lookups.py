"""Lookups in a transaction: the unwinders of a process are made to find the tables of a patch (``unwinders``).

A patch brings a page with a stand-in for every slot through which unwind tables are looked up, and the slot is made
to lead to it: one aligned word, written before the first entry jump and put back after the last. The stand-in passes
on what it does not know to what the slot held before, which may be the stand-in of another patch. So the stand-ins of
a slot form a chain that ends at the C library's function. Mappings stay after a revert, and with them every link of
a chain: a stand-in that is no longer asked for answers for code that nobody runs.

    apply   the slot leads to the patch's own stand-in; left alone where the chain passes it already
    revert  the slot leads to what the first stand-in of the chain whose patch stays in force is; without one, to what
            it held in the beginning. Left alone where another patch's stand-in is in front
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from elfdiff.errors import Changed, TargetDamaged
from trampolines.lookup_x86_64 import Answer, find_object, iterate
from trampolines.unwindinfo_x86_64 import Frame, frames, unwind_info

from ..process.modules import PF_R, PF_X, Module
from ..process.proc import Mapping, mapping_over
from ..records.record import Record, RecordedLookup, State
from .binding import Binding, BoundSegment
from .unwinders import FIND_OBJECT, ITERATE, LookupSlot
from .vetting import own_text

ReadBytes = Callable[[Sequence[tuple[int, int]]], list[bytes]]
"""Return the bytes of every (absolute address, size): Memory.read_many."""

_PAGE = 4096
_ALIGNMENT = 16
_WORD = 8


@dataclass(frozen=True, slots=True)
class WordWrite:
    """An aligned word of the process: the 8 bytes that it holds now and those that it will hold."""

    address: int
    before: bytes
    after: bytes


def lookup_span(binding: Binding) -> int:
    """Bytes, whole pages, that the stand-ins of a binding take behind its patch."""
    return len(_segment_data(binding, 0, _values(binding))[0]) if binding.lookups else 0


def lookup_segments(
    binding: Binding, bias: int, known: Sequence[RecordedLookup] | None = None
) -> tuple[tuple[BoundSegment, ...], tuple[RecordedLookup, ...]]:
    """The pages of stand-ins behind a patch whose load bias is ``bias``, and what its record says of them.

    ``known``: pass on what the stand-ins of this record pass on. Raises Refused where it knows other slots.
    """
    if not binding.lookups:
        return (), ()
    values = _values(binding) if known is None else [(item.before, item.passes_to) for item in known]
    data, entries = _segment_data(binding, bias, values)
    recorded = tuple(
        RecordedLookup(
            symbol=slot.symbol,
            slot=slot.address,
            build_id=slot.module.build_id,
            bias=slot.module.bias,
            before=before,
            passes_to=passes_to,
            stand_in=entry,
        )
        for slot, (before, passes_to), entry in zip(binding.lookups, values, entries, strict=True)
    )
    return (BoundSegment(binding.patch.high + bias, PF_R | PF_X, data),), recorded


def _values(binding: Binding) -> list[tuple[int, int]]:
    return [(slot.value, slot.function) for slot in binding.lookups]


def _segment_data(binding: Binding, bias: int, values: Sequence[tuple[int, int]]) -> tuple[bytes, list[int]]:
    """The bytes of the stand-ins, whole pages, and the absolute address of each one's function.

    Where one of them calls the program, which may throw, there is unwind information for it behind them.
    """
    patch, start = binding.patch, binding.patch.high + bias
    assert patch.eh_frame_hdr is not None
    text = [item for item in patch.segments if item.flags & PF_X]
    answer = Answer(
        ranges=tuple((item.vaddr + bias, item.vaddr + bias + item.size) for item in text),
        low=patch.low + bias,
        high=patch.high + bias,
        link_map=binding.link_map,
        eh_frame_hdr=patch.eh_frame_hdr + bias,
        name=f"livegraft patch {patch.id[:12]}",
    )
    if not any(slot.symbol == ITERATE for slot in binding.lookups):
        code, entries, _ = _stand_ins((answer,), binding.lookups, values, start)
        return _whole_pages(code), entries
    name = f"{answer.name} (lookups)"
    own = replace(answer, ranges=((start, start + 1),), low=start, high=start + 1, eh_frame_hdr=start, name=name)
    code, _, functions = _stand_ins((answer, own), binding.lookups, values, start)
    info, header = unwind_info(functions, start + len(code))
    end = start + len(_whole_pages(code + info))
    own = replace(own, ranges=((start, end),), high=end, eh_frame_hdr=start + len(code) + header)
    code, entries, functions = _stand_ins((answer, own), binding.lookups, values, start)  # as long as before
    return _whole_pages(code + unwind_info(functions, start + len(code))[0]), entries


def _stand_ins(
    answers: Sequence[Answer], slots: Sequence[LookupSlot], values: Sequence[tuple[int, int]], start: int
) -> tuple[bytes, list[int], list[Frame]]:
    """The stand-ins of all slots from ``start`` on: bytes, the address of each one's function, and their frames.

    Of several answers there is a stand-in for each, and the later one passes on to the earlier.
    """
    data, entries = bytearray(), []
    functions: list[Frame] = []
    for slot, (_, passes_to) in zip(slots, values, strict=True):
        for answer in answers:
            at = start + len(data)
            made = find_object(answer, passes_to) if slot.symbol == FIND_OBJECT else iterate(answer, passes_to, at)
            if slot.symbol == ITERATE:
                functions += frames(made.code[made.entry :], at + made.entry)
            passes_to = at + made.entry  # noqa: PLW2901  (of the next answer)
            data += made.code.ljust(-(-len(made.code) // _ALIGNMENT) * _ALIGNMENT, b"\xcc")
        entries.append(passes_to)
    return bytes(data), entries, functions


def _whole_pages(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // _PAGE) * _PAGE, b"\xcc")


def reusable(binding: Binding, recorded: Sequence[RecordedLookup], records: Iterable[Record]) -> bool:
    """Whether the stand-ins of an earlier application serve again: same slots, and each is in its chain or can be."""
    if [(slot.symbol, slot.address) for slot in binding.lookups] != [(item.symbol, item.slot) for item in recorded]:
        return False
    chains = Chains(records)
    return all(
        item.stand_in in chains.links(slot.value) or item.passes_to == slot.function
        for slot, item in zip(binding.lookups, recorded, strict=True)
    )


class Chains:
    """The stand-ins of all records of a process that were ever in force; the others' are in no slot."""

    def __init__(self, records: Iterable[Record]) -> None:
        """``records``: all of the process, whatever their state."""
        ever = [record for record in records if record.state is not State.PREPARED]
        self.owners = {item.stand_in: (record, item) for record in ever for item in record.contents.lookups}

    def links(self, value: int) -> list[int]:
        """The stand-ins that a call through a slot of this value passes, in order."""
        found: list[int] = []
        while value in self.owners and value not in found:
            found.append(value)
            value = self.owners[value][1].passes_to
        return found

    def without(self, value: int, gone: Callable[[Record], bool]) -> int:
        """What a slot of this value must hold when the records that are ``gone`` are to be asked no more."""
        for link in self.links(value):
            record, item = self.owners[link]
            if not gone(record):
                return link
            value = item.before
        return value


def hook_writes(lookups: Sequence[RecordedLookup], records: Sequence[Record], read: ReadBytes) -> tuple[WordWrite, ...]:
    """The writes that make every slot lead to its stand-in. Raises Changed where one has changed meanwhile."""
    chains = Chains(records)
    writes = []
    for item, held in zip(lookups, _held(lookups, read), strict=True):
        if item.stand_in in (held, *chains.links(held)):
            continue
        if held != item.before:
            raise Changed(
                f"the slot of {item.symbol} at {item.slot:#x} changed while the patch was being prepared",
                why=f"it holds {held:#x} and held {item.before:#x} a moment ago",
                next_step="try again",
            )
        writes.append(_write(item.slot, held, item.stand_in))
    return tuple(writes)


def unhook_writes(
    ended: Sequence[Record], records: Sequence[Record], loaded: Sequence[Module], read: ReadBytes
) -> tuple[WordWrite, ...]:
    """The writes that take the stand-ins of ``ended`` records out of the slots, as far as they are in front.

    ``records`` are all of the process. Left alone are slots of images that are no longer loaded, and slots that hold
    what is no stand-in: the image was loaded again since, or somebody else is in front. Whoever goes on asking a
    stand-in may do so, since it stays mapped.
    """
    gone = {item.address for item in ended}
    chains = Chains(records)
    slots = {item.slot: item for record in ended for item in record.contents.lookups if _is_loaded(item, loaded)}
    lookups = [slots[address] for address in sorted(slots)]
    writes = []
    for item, held in zip(lookups, _held(lookups, read), strict=True):
        wanted = chains.without(held, lambda record: record.address in gone or not _in_force(record))
        if wanted != held:
            writes.append(_write(item.slot, held, wanted))
    return tuple(writes)


def _in_force(record: Record) -> bool:
    return record.state is State.APPLIED or record.interrupted


def _held(lookups: Iterable[RecordedLookup], read: ReadBytes) -> Iterator[int]:
    for data in read([(item.slot, _WORD) for item in lookups]):
        yield int.from_bytes(data, "little")


def _write(slot: int, before: int, after: int) -> WordWrite:
    return WordWrite(slot, before.to_bytes(_WORD, "little"), after.to_bytes(_WORD, "little"))


def _is_loaded(item: RecordedLookup, loaded: Sequence[Module]) -> bool:
    return any((module.build_id, module.bias) == (item.build_id, item.bias) for module in loaded)


def all_in_place(binding: Binding, record: Record, records: Sequence[Record]) -> bool:
    """Whether every slot of the process passes through the stand-ins of an applied record."""
    known = {item.slot: item.stand_in for item in record.contents.lookups}
    chains = Chains(records)
    return all(known.get(slot.address) in chains.links(slot.value) for slot in binding.lookups)


def kept(lookups: Sequence[RecordedLookup], binding: Binding, records: Sequence[Record]) -> tuple[RecordedLookup, ...]:
    """What the record of an earlier application says when its stand-ins are used again."""
    chains = Chains(records)
    return tuple(
        item if item.stand_in in chains.links(slot.value) else replace(item, before=slot.value)
        for slot, item in zip(binding.lookups, lookups, strict=True)
    )


def require_believable_lookups(
    records: Sequence[Record], slots: Sequence[LookupSlot], loaded: Sequence[Module], maps: Sequence[Mapping]
) -> None:
    """Raise TargetDamaged where a record speaks of a slot that is none, or of values that are no code.

    The target can write its own records; they must not have anything else of it written. Those that were never in
    force count for nothing, and their patch need not be mapped.
    """
    known = {slot.address for slot in slots}
    chains = Chains(records)
    for record in records:
        if record.state is State.PREPARED:
            continue
        text = own_text(record, maps)
        for item in record.contents.lookups:
            own = any(item.stand_in in part for part in text)
            earlier = mapping_over(maps, item.before, 1)
            code = item.before in chains.owners or (earlier is not None and earlier.executable)
            if _is_loaded(item, loaded) and not (own and code and item.slot in known):
                raise TargetDamaged(
                    f"the record at {record.address:#x} cannot be believed",
                    why=f"of the slot at {item.slot:#x} it says what cannot be",
                    next_step="restart the program; something in it has written over the record",
                )
