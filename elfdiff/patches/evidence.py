"""What a patch object carries so that it can be explained: why each function is in it, and what both codes name.

None of it is needed to apply the patch. The old code of the changed functions and this evidence lie in sections that
are not loaded; ``explain`` makes sentences and a side-by-side listing of them. The evidence is written as zlib-packed
JSON, whose size is bounded: a name has at most ``MAX_LABEL`` characters, and there is one for each reference at most.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from elfdiff.errors import BadInput

VERSION = 1
"""Of the packed form; another one is refused, since it would be misread."""
MAX_LABEL = 96
MAX_UNPACKED = 1 << 25
"""Bytes of JSON that a reader accepts, for what it makes of them in memory: ten times what 900 functions of postgres
have. A patch with more carries no evidence."""


class Names(StrEnum):
    """What a reference names."""

    FUNCTION = "function"
    INSIDE = "inside"  # the middle of another function: a part of it
    IMPORT = "import"  # by name, through a linkage stub or a slot
    VARIABLE = "variable"  # of the running program
    NEW_VARIABLE = "new-variable"  # of the patch
    CONSTANT = "constant"  # the old build's
    OWN_CONSTANT = "own-constant"  # the new build's, carried by the patch
    TABLE = "switch-table"
    OTHER = "other"


class EvidenceKind(StrEnum):
    """What a reason rests on."""

    CODE = "code"  # its own instructions differ
    SOURCE = "source"  # the source lines of the difference, where debug information names them
    NAMES = "names"  # what only the old code names, and what only the new one
    INLINED = "inlined"  # the change of a function that it contains; ``new`` says if debug information shows it
    CONSTANT = "constant"  # a constant that it reads differs
    CALLEE = "callee"  # it calls, or takes the address of, another function or import
    VARIABLE = "variable"  # it uses another variable
    CLOSURE = "closure"  # it shares code with a function of the patch
    NEW = "new"  # it has no counterpart
    MOVED = "moved"  # most of its code comes from another function's old code
    LINES = "lines"  # line numbers only


@dataclass(frozen=True)
class Evidence:
    """One fact: ``subject`` is what it is about (a place, a function), ``old`` and ``new`` what each build has there.

    What does not apply is empty.
    """

    kind: EvidenceKind
    subject: str = ""
    old: str = ""
    new: str = ""


@dataclass(frozen=True)
class Reference:
    """A field of an instruction that leads out of the function; ``field`` is its offset in the function, in bytes.

    ``form`` is a ``code.FieldKind``.
    """

    field: int
    form: int
    names: Names
    label: str


Run = tuple[int, int, int]
"""(first instruction in the old code, in the new code, how many): instructions that correspond."""


@dataclass(frozen=True)
class FunctionEvidence:
    """Of one function of the patch; references sorted by field, ``old`` and ``runs`` empty where it is new.

    ``runs`` ascend on both sides; they are the alignment that the differ used.
    """

    evidence: tuple[Evidence, ...]
    old: tuple[Reference, ...] = field(repr=False)
    new: tuple[Reference, ...] = field(repr=False)
    runs: tuple[Run, ...] = field(repr=False)


_NAMES = tuple(Names)
_FORMS = range(1, 9)


def pack(functions: tuple[FunctionEvidence, ...]) -> bytes:
    """The evidence of a patch's functions, in their order, as ``unpack`` reads it; empty where it is too much."""
    labels: dict[str, int] = {}

    def side(references: tuple[Reference, ...]) -> list[int]:
        flat = []
        for item in references:
            label = labels.setdefault(item.label, len(labels))
            flat += [item.field, item.form, _NAMES.index(item.names), label]
        return flat

    rows = [
        {
            "why": [[e.kind, e.subject, e.old, e.new] for e in f.evidence],
            "old": side(f.old),
            "new": side(f.new),
            "runs": [number for run in f.runs for number in run],
        }
        for f in functions
    ]
    body = {"version": VERSION, "labels": list(labels), "functions": rows}
    text = json.dumps(body, separators=(",", ":")).encode()
    return zlib.compress(text, 6) if len(text) <= MAX_UNPACKED else b""


def unpack(raw: bytes) -> tuple[FunctionEvidence, ...]:
    """What ``pack`` wrote. Raises BadInput for anything else."""
    try:
        reader = zlib.decompressobj()
        text = reader.decompress(raw, MAX_UNPACKED)
        body = json.loads(text) if reader.eof else {}
        if body.get("version") != VERSION:
            raise ValueError(f"version {body.get('version')}; this livegraft reads version {VERSION}")
        labels = [str(label) for label in body["labels"]]
        return tuple(_function(row, labels) for row in body["functions"])
    except (zlib.error, KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BadInput(
            "the patch object's explanation cannot be read",
            why=f"{type(error).__name__}: {error}",
            next_step="make it again with this version: livegraft diff OLD NEW -o PATCH",
        ) from error


def _function(row: dict[str, Any], labels: list[str]) -> FunctionEvidence:
    why = tuple(Evidence(EvidenceKind(kind), str(s), str(o), str(n)) for kind, s, o, n in row["why"])
    flat = _naturals(row["runs"])
    runs = tuple(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
    return FunctionEvidence(why, _side(row["old"], labels), _side(row["new"], labels), runs)


def _side(flat: list[int], labels: list[str]) -> tuple[Reference, ...]:
    _naturals(flat)
    rows = zip(flat[::4], flat[1::4], flat[2::4], flat[3::4], strict=True)
    found = tuple(Reference(at, form, _NAMES[names], labels[label]) for at, form, names, label in rows)
    if any(item.form not in _FORMS for item in found):
        raise ValueError("a reference has a form that does not exist")
    return found


def _naturals(flat: list[int]) -> list[int]:
    if not all(type(number) is int and number >= 0 for number in flat):
        raise ValueError("a reference or a run is not described by numbers")
    return flat
