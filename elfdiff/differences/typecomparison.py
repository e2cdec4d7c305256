"""Which types differ between the units whose code changed, and for which functions that is known.

All types of a unit are compared, not only those that a function names: compilers keep in a unit what its code uses, and
a cast uses a type without naming it anywhere near.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from elfdiff.differences.comparison import Comparison
from elfdiff.dwarf.debuginfo import UNNAMED, Contents, DebugInfo, Function, TypeKey, Unit, reading
from elfdiff.dwarf.dwarftypes import Layout, Member, TypeReader

if TYPE_CHECKING:
    from elftools.dwarf.die import DIE


@dataclass(frozen=True)
class TypeChange:
    """A type whose objects lie otherwise in memory.

    ``differences`` are for people, one a member. ``users`` are the changed functions (new) that name the type, or
    where none does, those with code of ``unit``, the source file in whose code it was found.
    """

    kind: str
    name: str
    differences: tuple[str, ...]
    users: tuple[int, ...]
    unit: str


@dataclass(frozen=True)
class TypeVerdict:
    """What debug information says of a pair of builds.

    ``described``: changed functions (new) all of whose types are known in both builds. ``prototypes``: changed
    functions whose parameters or result are others, with both texts.
    """

    layouts: tuple[TypeChange, ...]
    enumerations: tuple[TypeChange, ...]
    variables: tuple[TypeChange, ...]
    described: frozenset[int]
    prototypes: dict[int, tuple[str, str]]
    notes: tuple[str, ...]


_TYPED = ("DW_TAG_formal_parameter", "DW_TAG_variable", "DW_TAG_subprogram")


def compare_types(
    comparison: Comparison, debug: tuple[DebugInfo | None, DebugInfo | None], members: tuple[int, ...]
) -> TypeVerdict:
    """Compare the types of the units of changed functions. ``members``: new functions of the patch.

    Functions of equal bytes are left out: they reach what they reach at the same places. Raises BadInput for damaged
    debug information.
    """
    old, new = debug
    if old is None or new is None or old.file.notes or new.file.notes:  # half of the types would prove nothing
        return TypeVerdict((), (), (), frozenset(), {}, _notes(debug))
    return replace(_Comparer(comparison, old, new, members).verdict(), notes=_notes(debug))


def _notes(debug: tuple[DebugInfo | None, DebugInfo | None]) -> tuple[str, ...]:
    return tuple(note for info in debug if info is not None for note in info.notes)


class _Comparer:
    def __init__(self, comparison: Comparison, old: DebugInfo, new: DebugInfo, members: tuple[int, ...]) -> None:
        self.comparison = comparison
        self.old, self.new = old, new
        self.old_types, self.new_types = TypeReader(old), TypeReader(new)
        self.functions = [j for j in members if not self._same(j)]
        self.pairs: dict[int, tuple[Function, tuple[Function, ...]]] = {}
        self.named: dict[int, set[str]] = {}
        for j in self.functions:
            function = new.function(int(comparison.new.starts[j]))
            entry = comparison.old_entry(j)
            counterpart = old.function(entry) if entry is not None else None
            if function is not None and (entry is None or counterpart is not None):
                self.pairs[j] = function, (counterpart,) if counterpart else ()

    def _same(self, function: int) -> bool:
        i = int(self.comparison.matching.old_of[function])
        return i >= 0 and bool(self.comparison.matching.same[i])

    def verdict(self) -> TypeVerdict:
        layouts: dict[TypeKey, TypeChange] = {}
        enumerations: dict[TypeKey, TypeChange] = {}
        variables: dict[str, TypeChange] = {}
        with reading(self.new.path):
            for contents, others, unit in self._scopes():
                for key, change in self._differing(contents, others, unit):
                    (enumerations if key[0] == "enum" else layouts).setdefault(key, change)
                for name, change in self._variables(contents, others, unit):
                    variables.setdefault(name, change)
            described = frozenset(j for j, pair in self.pairs.items() if self._described(*pair))
            prototypes = dict(self._prototypes())
        return TypeVerdict(
            tuple(layouts.values()),
            tuple(enumerations.values()),
            tuple(variables.values()),
            described,
            prototypes,
            (),
        )

    def _scopes(self) -> Iterator[tuple[Contents, list[Contents], str]]:
        """Each new unit's definitions, and a changed function's own, beside those that they are compared with."""
        if self.pairs:
            yield self.new.type_units, [self.old.type_units], "some type unit"
        counterparts: dict[int, dict[int, Unit]] = {}
        units: dict[int, Unit] = {}
        for function, others in self.pairs.values():
            for unit in function.units:
                units[id(unit)] = unit
                beside = counterparts.setdefault(id(unit), {})
                beside.update({id(u): u for other in others for u in other.units})
            yield function.local, [other.local for other in others], function.units[0].name
        everywhere = {key: unit for beside in counterparts.values() for key, unit in beside.items()}
        for key, unit in units.items():
            # A unit all of whose changed functions are new is compared with the old one of its name.
            first = list(counterparts[key].values()) or list(self.old.units_named(unit.name))
            rest = [other for other in everywhere.values() if other not in first]
            yield unit.contents, [*(u.contents for u in (*first, *rest)), self.old.type_units], unit.name

    def _differing(self, contents: Contents, others: list[Contents], unit: str) -> Iterator[tuple[TypeKey, TypeChange]]:
        for key, dies in contents.types.items():
            defined = next((other.types[key] for other in others if key in other.types), None)
            defined = defined or self._elsewhere(key)
            if defined is None:
                continue
            known = [self.old_types.layout(die, key[1]) for die in defined]
            layouts = [self.new_types.layout(die, key[1]) for die in dies]
            if key[1].endswith(UNNAMED):
                known, layouts = [_merged(known)], [_merged(layouts)]
            for layout in layouts:
                differences = [list(_differences(old, layout)) for old in known]
                if all(differences):
                    users = self._users(key[1], unit)
                    fewest = sorted(differences, key=_length)[0]
                    yield key, TypeChange(key[0], key[1], tuple(fewest), users, unit)

    def _elsewhere(self, key: TypeKey) -> list[DIE] | None:
        """The type in a unit of the old build whose code did not change; None where the type is new.

        Such a unit may hold objects of it, in variables say, that new code of another unit reaches now.
        """
        if "()::" in key[1] or not self.old.mentions(key[1].rpartition("::")[2]):
            return None
        return next((unit.contents.types[key] for unit in self.old.units if key in unit.contents.types), None)

    def _variables(self, contents: Contents, others: list[Contents], unit: str) -> Iterator[tuple[str, TypeChange]]:
        for name, die in contents.variables.items():
            before = next((other.variables[name] for other in others[:1] if name in other.variables), None)
            if before is not None:
                texts = (
                    self.old_types.type_of(self.old.origin(before)),
                    self.new_types.type_of(self.new.origin(die)),
                )
                if texts[0] != texts[1]:
                    yield name, TypeChange("variable", name, (f"{texts[0]} -> {texts[1]}",), self._inside(unit), unit)

    def _users(self, name: str, unit: str) -> tuple[int, ...]:
        short = name.rpartition("::")[2]
        return tuple(j for j in self.pairs if short in self._named(j)) or self._inside(unit)

    def _inside(self, unit: str) -> tuple[int, ...]:
        return tuple(j for j, (f, _) in self.pairs.items() if any(u.name == unit for u in f.units))

    def _named(self, function: int) -> set[str]:
        """The structures that its parameters and variables, inlined code included, are, hold or point to."""
        if function not in self.named:
            found: set[str] = set()
            todo, seen = [self.pairs[function][0].die], set()
            while todo:
                die = todo.pop()
                origin = self.new.origin(die)
                for entry in (die, origin) if origin is not die else (die,):
                    key = id(entry.dwarfinfo), entry.offset
                    if key not in seen:
                        seen.add(key)
                        name = self.new_types.aggregate(entry) if entry.tag in _TYPED else None
                        found.update([name] if name else [])
                        todo += [child for child in entry.iter_children() if child.tag != "DW_TAG_call_site"]
            self.named[function] = found
        return self.named[function]

    def _described(self, function: Function, others: tuple[Function, ...]) -> bool:
        """All types that the function can use are known in both builds.

        Compilers leave types of C++ to the unit that has their virtual table or constructor; .dwo files are not read;
        line tables alone say nothing of types.
        """
        both = (function, *others)
        if not all(any(unit.contents.typed for unit in each.units) for each in both):
            return False
        units = [unit for each in both for unit in each.units]
        return not any(unit.split or (unit.plus_plus and unit.contents.declared) for unit in units)

    def _prototypes(self) -> Iterator[tuple[int, tuple[str, str]]]:
        for j, (function, others) in self.pairs.items():
            for other in others:
                before, after = self.old_types.prototype(other.die), self.new_types.prototype(function.die)
                if before is not None and after is not None and before != after:
                    yield j, (before, after)


def _differences(old: Layout, new: Layout) -> Iterator[str]:
    """What of an existing object the new code would misread; nothing where it reads all of it right."""
    if old.kind == "enum":
        before = dict(old.values)
        for name, value in new.values:
            if name in before and before[name] != value:
                yield f"{name}: {before[name]} -> {value}"
        return
    if old.size != new.size:
        yield f"size {old.size} -> {new.size} bytes"
    before_members, after_members = _by_name(old), _by_name(new)
    gone = {(m.offset, m.size, m.type) for key, m in before_members.items() if key not in after_members}
    for key, member in after_members.items():
        was = before_members.get(key)
        if was is None:
            # In a union new members lie over old ones; what has place and type of one that is gone is renamed.
            if not member.overlays and (member.offset, member.size, member.type) not in gone:
                yield f"new {member.name} at {member.place}"
        elif (was.offset, was.size) != (member.offset, member.size):
            bits = f" ({was.size} -> {member.size} bits)" if was.size != member.size else ""
            yield f"{member.name} at {was.place} -> {member.place}{bits}"
        elif was.type != member.type:
            yield f"{member.name} at {member.place}: {was.type} -> {member.type}"


def _merged(layouts: list[Layout]) -> Layout:
    """Unnamed enumerations of a scope as one: their constants have names of their own."""
    values = tuple(value for layout in layouts for value in layout.values)
    return replace(layouts[0], values=values)


def _length(differences: list[str]) -> int:
    return len(differences)


def _by_name(layout: Layout) -> dict[tuple[str, int], Member]:
    """Members by name; unnamed ones and several of one name by their order."""
    found: dict[tuple[str, int], Member] = {}
    for member in layout.members:
        number = 0
        while (member.name, number) in found:
            number += 1
        found[member.name, number] = member
    return found
