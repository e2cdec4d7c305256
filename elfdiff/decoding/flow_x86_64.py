"""Where control goes inside of one function: which instruction can follow which, as far as that is certain.

Calls come back. What cannot be followed (computed jumps without a switch table, exception handlers, setjmp(3)) makes
the flow of the whole function unknown.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from elfdiff.decoding.code import TRANSFERS, Code, FieldKind
from elfdiff.decoding.jumptables_x86_64 import JumpTable, kept_labels

Flow = dict[int, tuple[int, ...]]
"""Per instruction, by address: the addresses of those that may follow it in the function."""

RETURN_TWICE = frozenset({"setjmp", "_setjmp", "sigsetjmp", "__sigsetjmp", "vfork", "getcontext"})
_UD2 = 0x10B
_ENDS = frozenset({0xC2, 0xC3, 0xCA, 0xCB, 0xCF, _UD2})  # ret, iret, ud2 (Intel SDM, volume 2, table A-2)
_JUMPS = frozenset({0xE9, 0xEB})
_GROUP5, _TO_REGISTER_OR_MEMORY = 0xFF, (4, 5)


def flow(code: Code, parts: Iterable[int], tables: dict[int, JumpTable]) -> Flow | None:
    """The flow of a function with its cold parts; None where it is not certain."""
    parts = sorted(parts)
    if not all(code.has_unwind[k] and code.sound[k] and not code.has_lsda[k] for k in parts):
        return None
    if any(_returns_twice(code, k) or kept_labels(code, k, tables) is not None for k in parts):
        return None
    offsets = np.concatenate([code.instructions(k) for k in parts])
    inside = frozenset((offsets + code.base).tolist())
    branches = _branches(code, parts)
    cases = {k: [at for t in tables.values() if t.function == k for at in t.targets.tolist()] for k in parts}
    found: Flow = {}
    for part in parts:
        for offset in code.instructions(part).tolist():
            following = _following(code, offset, branches, cases[part])
            if following is None:
                return None
            found[offset + code.base] = tuple(at for at in following if at in inside)
    return found


def _following(code: Code, offset: int, branches: dict[int, int], cases: list[int]) -> list[int] | None:
    opcode = int(code.decoded.opcode[offset])
    at = offset + code.base
    if opcode in _ENDS:
        return []
    if opcode in _JUMPS:
        return [branches[at]] if at in branches else []
    if opcode == _GROUP5 and int(code.decoded.modrm[offset]) >> 3 & 7 in _TO_REGISTER_OR_MEMORY:
        if int(code.decoded.modrm[offset]) & 0xC7 == 0x05:  # through a slot: it leaves the function
            return []
        return cases or None
    following = [at + int(code.decoded.length[offset])]
    return [*following, branches[at]] if at in branches else following


def _branches(code: Code, parts: list[int]) -> dict[int, int]:
    references = code.references
    found: dict[int, int] = {}
    for part in parts:
        rows = references.of(part)
        jumps = np.isin(references.kind[rows], TRANSFERS) & (references.kind[rows] != FieldKind.CALL)
        at, target = references.instruction[rows][jumps], references.target[rows][jumps]
        found.update(zip(at.tolist(), target.tolist(), strict=True))
    return found


def _returns_twice(code: Code, function: int) -> bool:
    references = code.references
    rows = references.of(function)
    targets = references.target[rows][np.isin(references.kind[rows], TRANSFERS)]
    return any(callee_name(code, target) in RETURN_TWICE for target in np.unique(targets).tolist())


def callee_name(code: Code, address: int) -> str:
    """The symbol that a call to an address calls, empty where it has none."""
    image = code.image
    slot = image.slots.get(image.plt.get(address, 0))
    if slot is not None:
        return slot.symbol
    function = code.function_of(address)
    return code.names[function] if function >= 0 else ""


def leaves(code: Code, parts: Iterable[int]) -> bool:
    """Whether a function with its cold parts has an instruction by which it returns, or that may jump out of it."""
    own = frozenset(parts)
    for part in own:
        offsets = code.instructions(part)
        opcodes = code.decoded.opcode[offsets]
        computed = (opcodes == _GROUP5) & np.isin(code.decoded.modrm[offsets] >> 3 & 7, _TO_REGISTER_OR_MEMORY)
        if bool((np.isin(opcodes, list(_ENDS - {_UD2})) | computed).any()):
            return True
        if any(code.function_of(target) not in own for target in _branches(code, [part]).values()):
            return True
    return False


def reachable(flow: Flow, starts: Iterable[int], *, never: frozenset[int] = frozenset()) -> set[int]:
    """What can be executed from the starts on, these included, without what is ``never`` to be executed."""
    found = {at for at in starts if at not in never}
    todo = list(found)
    while todo:
        for following in flow[todo.pop()]:
            if following not in found and following not in never:
                found.add(following)
                todo.append(following)
    return found


def backwards(flow: Flow) -> Flow:
    """The same from each instruction to those that it may follow."""
    found: dict[int, list[int]] = {at: [] for at in flow}
    for at, following in flow.items():
        for one in following:
            found[one].append(at)
    return {at: tuple(before) for at, before in found.items()}


def forwards(flow: Flow, entry: int) -> Flow:
    """The flow without the edges that close a loop: to an instruction on the way that led there from the entry."""
    done: set[int] = set()
    found: dict[int, list[int]] = {at: [] for at in flow}
    for root in (entry, *flow):
        if root not in done:
            _walk(flow, root, done, found)
    return {at: tuple(following) for at, following in found.items()}


def _walk(flow: Flow, root: int, done: set[int], found: dict[int, list[int]]) -> None:
    way: dict[int, None] = {root: None}
    todo = [(root, iter(flow[root]))]
    done.add(root)
    while todo:
        at, rest = todo[-1]
        following = next(rest, None)
        if following is None:
            todo.pop()
            del way[at]
        elif following not in way:
            found[at].append(following)
            if following not in done:
                done.add(following)
                way[following] = None
                todo.append((following, iter(flow[following])))
