"""Types as debug information describes them, in a form that can be compared between two builds.

What counts is how an object lies in memory: offsets, sizes and what kind of value is where. Names of base types,
qualifiers and the signs of integers do not count. Pointers count by the name of what they point to, since the object
behind one is compared under its own name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elfdiff.dwarf.debuginfo import AGGREGATES, DebugInfo, text_of, value_of

if TYPE_CHECKING:
    from elftools.dwarf.die import DIE

MAX_DEPTH = 64
"""Types nested deeper are taken for a damaged file."""
_TRANSPARENT = frozenset(
    (
        "DW_TAG_const_type",
        "DW_TAG_volatile_type",
        "DW_TAG_restrict_type",
        "DW_TAG_atomic_type",
        "DW_TAG_immutable_type",
        "DW_TAG_shared_type",
    )
)
_POINTERS = {
    "DW_TAG_pointer_type": "*",
    "DW_TAG_reference_type": "&",
    "DW_TAG_rvalue_reference_type": "&&",
}
_ENCODINGS = {2: "bool", 3: "complex", 4: "float", 9: "imaginary", 0xF: "decimal float"}
"""DW_ATE_boolean and so on (DWARF 5, section 7.8); all others are integers."""
_PLUS_UCONST, _CONSTU = 0x23, 0x10


@dataclass(frozen=True)
class Member:
    """A field, base class or virtual function.

    ``offset`` is in bits from the start of the object, of a virtual function it is the slot; ``size`` in bits where it
    is a bit-field; ``overlays``: directly in a union.
    """

    name: str
    offset: int
    size: int | None
    type: str
    overlays: bool = False

    @property
    def place(self) -> str:
        """The offset for people, in bytes, with bits where there are any."""
        byte, bit = divmod(self.offset, 8)
        return f"{byte}.{bit}" if bit else str(byte)


@dataclass(frozen=True)
class Layout:
    """A structure, union or class; ``size`` in bytes. Of an enumeration ``values`` are (name, number)."""

    kind: str
    name: str
    size: int | None
    members: tuple[Member, ...]
    values: tuple[tuple[str, int], ...]


class TypeReader:
    """Describes the types of one build; each entry is described once."""

    def __init__(self, info: DebugInfo) -> None:
        """``info`` is the build's."""
        self.info = info
        self._texts: dict[tuple[int, int], str] = {}
        self._layouts: dict[tuple[int, int], Layout] = {}

    def layout(self, die: DIE, name: str) -> Layout:
        """The layout of a structure, union, class or enumeration that has a body."""
        key = id(die.dwarfinfo), die.offset
        if key not in self._layouts:
            kind = AGGREGATES[str(die.tag)]
            members = () if kind == "enum" else tuple(self._members(die, 0, 0, ""))
            values = tuple(_enumerators(die)) if kind == "enum" else ()
            self._layouts[key] = Layout(kind, name, value_of(die, "DW_AT_byte_size"), members, values)
        return self._layouts[key]

    def text(self, die: DIE | None, depth: int = 0) -> str:
        """What kind of value lies in an object of this type."""
        if die is None:
            return "void"
        key = id(die.dwarfinfo), die.offset
        if key not in self._texts:
            self._texts[key] = self._text(die, depth)
        return self._texts[key]

    def type_of(self, die: DIE, depth: int = 0) -> str:
        """The text of an entry's DW_AT_type."""
        return self.text(self.info.follow(die, "DW_AT_type"), depth + 1)

    def prototype(self, die: DIE) -> str | None:
        """Return and parameter types of a function; None where they are not described."""
        origin = self.info.origin(die)
        children = [c for c in origin.iter_children() if c.tag == "DW_TAG_formal_parameter"]
        varied = any(c.tag == "DW_TAG_unspecified_parameters" for c in origin.iter_children())
        if not children and "DW_AT_prototyped" not in origin.attributes and not varied:
            return None
        texts = [self.type_of(child) for child in children] + ["..."] * varied
        return f"{self.type_of(origin)} ({', '.join(texts)})"

    def aggregate(self, die: DIE) -> str | None:
        """The name of the structure or union that an entry's type is, points to or is an array of."""
        found = self.info.follow(die, "DW_AT_type")
        name = ""
        for _ in range(MAX_DEPTH):
            if found is None or found.tag in AGGREGATES:
                break
            name = text_of(found, "DW_AT_name") if found.tag == "DW_TAG_typedef" else name
            found = self.info.follow(found, "DW_AT_type")
        return (text_of(found, "DW_AT_name") or name) if found is not None and found.tag in AGGREGATES else None

    # -- texts -----------------------------------------------------------------------------------------------

    def _text(self, die: DIE, depth: int) -> str:
        self._deeper(depth)
        tag = str(die.tag)
        if tag in _TRANSPARENT:
            return self.type_of(die, depth)
        if tag == "DW_TAG_typedef":
            return self._typedef(die, depth)
        if tag == "DW_TAG_base_type":
            encoding = _ENCODINGS.get(value_of(die, "DW_AT_encoding") or 0, "int")
            return f"{encoding}{8 * (value_of(die, 'DW_AT_byte_size') or 0)}"
        if tag == "DW_TAG_enumeration_type":
            return f"int{8 * (value_of(die, 'DW_AT_byte_size') or 0)}"
        if tag in _POINTERS:
            return self._pointee(die, depth) + _POINTERS[tag]
        if tag in AGGREGATES:
            return self._aggregate(die, "", depth)
        if tag == "DW_TAG_array_type":
            return self.type_of(die, depth) + "".join(self._bounds(die))
        if tag == "DW_TAG_subroutine_type":
            texts = [self.type_of(c, depth) for c in die.iter_children() if c.tag == "DW_TAG_formal_parameter"]
            return f"{self.type_of(die, depth)} ({', '.join(texts)})"
        if tag == "DW_TAG_ptr_to_member_type":
            return f"{self.type_of(die, depth)} member pointer"
        return f"{tag} {text_of(die, 'DW_AT_name')} {value_of(die, 'DW_AT_byte_size')}"

    def _typedef(self, die: DIE, depth: int) -> str:
        target = self.info.follow(die, "DW_AT_type")
        if target is not None and target.tag in AGGREGATES and target.tag != "DW_TAG_enumeration_type":
            return self._aggregate(target, text_of(die, "DW_AT_name"), depth)
        return self.text(target, depth + 1)

    def _aggregate(self, die: DIE, name: str, depth: int) -> str:
        definition = self.info.follow(die, "DW_AT_signature") or die
        kind, size = AGGREGATES[str(die.tag)], value_of(definition, "DW_AT_byte_size")
        name = text_of(definition, "DW_AT_name") or name
        if name:
            return f"{kind} {name}" if size is None else f"{kind} {name} of {size} bytes"
        inner = ", ".join(f"{m.name}@{m.place} {m.type} {m.size}" for m in self._members(definition, depth + 1, 0, ""))
        return f"{kind} of {size} bytes {{{inner}}}"

    def _pointee(self, die: DIE, depth: int) -> str:
        """What is pointed to, a structure by its name alone."""
        name = ""
        target = self.info.follow(die, "DW_AT_type")
        for _ in range(MAX_DEPTH):
            if target is None or (target.tag not in _TRANSPARENT and target.tag != "DW_TAG_typedef"):
                break
            name = text_of(target, "DW_AT_name") if target.tag == "DW_TAG_typedef" else name
            target = self.info.follow(target, "DW_AT_type")
        if target is not None and target.tag in AGGREGATES and target.tag != "DW_TAG_enumeration_type":
            definition = self.info.follow(target, "DW_AT_signature") or target
            named = text_of(definition, "DW_AT_name") or name
            if named:
                return f"{AGGREGATES[str(target.tag)]} {named} "
        return f"{self.text(target, depth + 1)} "

    def _bounds(self, die: DIE) -> list[str]:
        found = []
        for child in die.iter_children():
            if child.tag in ("DW_TAG_subrange_type", "DW_TAG_enumeration_type"):
                count, upper = value_of(child, "DW_AT_count"), value_of(child, "DW_AT_upper_bound")
                if count is None and upper is not None:
                    count = upper + 1
                found.append("[]" if count is None else f"[{count}]")
        return found

    # -- members ---------------------------------------------------------------------------------------------

    def _members(self, die: DIE, depth: int, base: int, prefix: str) -> Iterator[Member]:
        """The members of an aggregate at bit ``base``; those of nested unnamed aggregates as its own."""
        overlays = die.tag == "DW_TAG_union_type"
        for child in die.iter_children():
            if child.tag in ("DW_TAG_member", "DW_TAG_inheritance") and not _is_static(child):
                offset, size = _position(child)
                name = prefix + (text_of(child, "DW_AT_name") or "(unnamed)")
                if child.tag == "DW_TAG_inheritance":
                    name = f"{prefix}(base class)"
                inner = self._unnamed(child)
                if inner is None:
                    yield Member(name, base + offset, size, self.type_of(child, depth), overlays)
                    continue
                kind = f"unnamed {AGGREGATES[str(inner.tag)]} of {value_of(inner, 'DW_AT_byte_size')} bytes"
                yield Member(name, base + offset, size, kind, overlays)
                yield from self._members(inner, self._deeper(depth), base + offset, f"{name}.")
            elif child.tag == "DW_TAG_subprogram" and "DW_AT_vtable_elem_location" in child.attributes:
                name = text_of(child, "DW_AT_linkage_name") or text_of(child, "DW_AT_name")
                slot = _operand(child.attributes["DW_AT_vtable_elem_location"].value)
                yield Member(f"(virtual) {name}", slot, None, "virtual function")

    def _unnamed(self, die: DIE) -> DIE | None:
        """The aggregate without a name that is a member's type."""
        target = self.info.follow(die, "DW_AT_type")
        if target is None or target.tag not in AGGREGATES or target.tag == "DW_TAG_enumeration_type":
            return None
        target = self.info.follow(target, "DW_AT_signature") or target
        return None if "DW_AT_name" in target.attributes else target

    @staticmethod
    def _deeper(depth: int) -> int:
        if depth > MAX_DEPTH:
            raise ValueError("types are nested without end")
        return depth + 1


def _is_static(die: DIE) -> bool:
    return "DW_AT_external" in die.attributes or "DW_AT_declaration" in die.attributes


def _position(die: DIE) -> tuple[int, int | None]:
    """Offset and, of a bit-field, size of a member in bits (DWARF 5, section 5.7.6; DWARF 3, section 5.6.6)."""
    bits = value_of(die, "DW_AT_bit_size")
    position = value_of(die, "DW_AT_data_bit_offset")
    if position is not None:
        return position, bits
    attribute = die.attributes.get("DW_AT_data_member_location")
    start = 0 if attribute is None else 8 * _operand(attribute.value)
    old = value_of(die, "DW_AT_bit_offset")
    if bits is not None and old is not None:
        start += 8 * (value_of(die, "DW_AT_byte_size") or 0) - old - bits
    return start, bits


def _operand(value: int | list[int]) -> int:
    """A constant, given as such or as an expression of one operation with an unsigned operand.

    Anything else (a virtual base class is found through the virtual table) is reduced to its bytes, so that a change
    is still seen.
    """
    if isinstance(value, int):
        return value
    raw = bytes(value)
    if raw[:1] and raw[0] in (_PLUS_UCONST, _CONSTU):
        number = 0
        for index, byte in enumerate(raw[1:]):
            number |= (byte & 0x7F) << (7 * index)
        return number
    return int.from_bytes(raw, "little")


def _enumerators(die: DIE) -> list[tuple[str, int]]:
    return [
        (text_of(child, "DW_AT_name"), value_of(child, "DW_AT_const_value") or 0)
        for child in die.iter_children()
        if child.tag == "DW_TAG_enumerator"
    ]
