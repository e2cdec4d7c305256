"""Thread-local storage: the threads that run have their blocks already, laid out by the old build."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from elfdiff.building.patchbuild import Draft
from elfdiff.building.variables import OldVariable
from elfdiff.differences.threadlocal_x86_64 import unproved
from elfdiff.findings.places import MANY, functions
from elfdiff.images.image import Kind, ThreadLocal, TlsTemplate
from elfdiff.patchobject import Finding, Severity

_NUMBERED = re.compile(r"\.\d+$")
"""Compilers number static variables of functions; the number changes with the code around."""


def tls_layout(draft: Draft) -> Iterator[Finding]:
    """Thread-local storage of another size, with other initial values, or with variables in other places."""
    old, new = draft.comparison.old.image, draft.comparison.new.image
    if old.tls is None and new.tls is None:
        return
    if old.tls is None or new.tls is None or _shape(old.tls) != _shape(new.tls):
        yield _refusal("thread-local storage has another layout", (f"old: {old.tls}", f"new: {new.tls}"))
        return
    differing = _differing_values(draft, old.tls, new.tls)
    if differing:
        places = tuple(f"offset {offset:#x} of thread-local storage" for offset in differing[:MANY])
        yield _refusal("thread-local storage has other initial values", places)
    if old.thread_locals is not None and new.thread_locals is not None:
        yield from _moved_by_name(old.thread_locals, new.thread_locals)
    else:
        yield from _moved_by_use(draft)


def _shape(tls: TlsTemplate) -> tuple[int, int, int]:
    return tls.memsz, tls.filesz, tls.align


def _refusal(what: str, places: tuple[str, ...]) -> Finding:
    return Finding(
        "tls-layout", Severity.REFUSE, what, places,
        "the threads that run have blocks of the old layout",
        "restart the program",
    )  # fmt: skip


def _differing_values(draft: Draft, old: TlsTemplate, new: TlsTemplate) -> list[int]:
    """Offsets of the words of the templates that differ; a pointer is the same if it leads to the same thing."""
    first, second = draft.comparison.old.image, draft.comparison.new.image
    a, b = first.read(old.vaddr, old.filesz), second.read(new.vaddr, new.filesz)
    found = []
    for offset in range(0, old.filesz, 8):
        to, tn = first.pointer_at(old.vaddr + offset), second.pointer_at(new.vaddr + offset)
        if to is not None and tn is not None:
            same = _leads_to_the_same(draft, to, tn)
        else:
            symbols = (image.slots.get(at + offset) for image, at in ((first, old.vaddr), (second, new.vaddr)))
            same = to is tn and a[offset : offset + 8] == b[offset : offset + 8] and len(set(symbols)) == 1
        if not same:
            found.append(offset)
    return found


def _leads_to_the_same(draft: Draft, o: int, n: int) -> bool:
    comparison = draft.comparison
    i, j = comparison.old.function_of(o), comparison.new.function_of(n)
    if i >= 0 or j >= 0:
        return i >= 0 and int(comparison.matching.new_of[i]) == j and o - comparison.old.starts[i] == 0
    if comparison.new.image.kind_at(n) in (Kind.DATA, Kind.BSS):
        found = draft.resolver.variables.find(n, whole=False)
        return isinstance(found, OldVariable) and found.address == o  # the template says so, too: a guess will do
    return bool(comparison.addresses.certain(n) == o and comparison.constants.same(o, n))


def _moved_by_name(old: tuple[ThreadLocal, ...], new: tuple[ThreadLocal, ...]) -> Iterator[Finding]:
    before, after = _places(old), _places(new)
    if before != after:
        names = sorted({name for name, _, _ in before ^ after})
        yield _refusal("thread-local variables are new, gone or in other places", tuple(names[:MANY]))


def _places(variables: tuple[ThreadLocal, ...]) -> set[tuple[str, int, int]]:
    return {(_NUMBERED.sub("", one.name), one.offset, one.size) for one in variables}


def _moved_by_use(draft: Draft) -> Iterator[Finding]:
    comparison = draft.comparison
    moved = [trace.function for trace in draft.traces if trace.thread_local]
    members = [comparison.new.function_of(function.new_start) for function in draft.functions]
    matching = comparison.matching
    patched = np.zeros(len(comparison.new), np.bool_)
    patched[members] = True
    patched[list(comparison.changed)] = True
    pairs = matching.pairs(same=True)
    doubtful = unproved(
        matching.alignments, pairs[~patched[pairs[:, 1]], 0], [(int(matching.old_of[j]), j) for j in members]
    )
    found = sorted(set(moved) | doubtful.keys())
    if found:
        offsets = sorted(set().union(*doubtful.values()))
        shown = f" (offsets {', '.join(map(hex, offsets[:4]))})" if offsets else ""
        yield _refusal(
            f"{len(found)} function(s) use thread-local variables that may have moved or be new{shown}",
            functions(draft, found),
        )
