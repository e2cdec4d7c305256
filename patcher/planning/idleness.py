"""What must be idle beside the functions that change: ``--when-idle``, and what a patch asks for itself.

Quiescence of the changed functions is not enough where something moves from one of them to another that is called after
it: a thread that has left the first, old, and then enters the second, new, does it twice, or never. Then their caller
must be idle, too, when the patch comes into force and when it goes out of force.

Functions are named by the symbols of the file that is mapped, or of its separate debug file, or by their address there.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from elfdiff.building.closure import neighbours, together
from elfdiff.decoding.code import Code, load_code
from elfdiff.decoding.jumptables_x86_64 import find_jump_tables
from elfdiff.dwarf.debugfile import debug_symbols, find_debug_file
from elfdiff.errors import BadInput, NotPermitted, Refused
from elfdiff.images.imagefile import load_image

from ..process.modules import Module
from ..process.proc import by_living_thread
from ..process.upgradefiles import open_mapped
from ..records.record import KeptCode
from .binding import Binding
from .plan import Situation

_CLOSE = 4
_STT_FUNC, _STT_GNU_IFUNC = 2, 10  # gABI, "Symbol Table"; the latter is GNU's


Named = Mapping[int, Sequence[KeptCode]]
"""Per image, by its lowest address: the code that was named."""


def widen(binding: Binding, now: Situation, named: Named, own: bool) -> tuple[Binding, Situation]:
    """Return both with what must be idle for the patch to come into force; ``own`` is that of ``Conditions``.

    Raises BadInput for a function that is to be kept live as well.
    """
    kept = {item.start for item in binding.kept}
    mine = named.get(binding.module.low, ())
    for item in mine:
        if item.start in kept:
            raise BadInput(
                f"{item.name} cannot be both kept live and idle",
                why="--keep-live lets threads stay in it, --when-idle waits until none is",
                next_step="leave one of them out",
            )
    asked = _asked_for(binding) if own else ()
    idle = tuple(dict.fromkeys(item for item in (*asked, *mine) if not _changes(binding, item)))
    return replace(binding, idle=idle), replace(now, waited=(*idle, *(_waited_for(now) if own else ())))


def _asked_for(binding: Binding) -> tuple[KeptCode, ...]:
    return tuple(KeptCode(item.name, item.start + binding.old_bias, item.size) for item in binding.patch.idle)


def _changes(binding: Binding, item: KeptCode) -> bool:
    """Whether code lies in a function that must be idle anyway."""
    kept = {code.start for code in binding.kept}
    at = item.start - binding.old_bias
    return any(
        function.old_start is not None
        and function.old_start <= at
        and at + item.size <= function.old_start + (function.old_size or 0)
        and function.old_start + binding.old_bias not in kept
        for function in binding.patch.functions
    )


def _waited_for(now: Situation) -> tuple[KeptCode, ...]:
    return tuple(dict.fromkeys(item for record in now.active for item in record.contents.idle))


def waiting_for(now: Situation, module: Module, named: Named, own: bool) -> Situation:
    """Return ``now``, the situation of an image, with what must be idle for its patch to go out of force."""
    return replace(now, waited=(*named.get(module.low, ()), *(_waited_for(now) if own else ())))


def waiting_again(now: Situation, idle: Sequence[KeptCode]) -> Situation:
    """Return ``now`` with what must be idle for a patch to come into force again that has waited for ``idle``."""
    return replace(now, waited=(*idle, *_waited_for(now)))


# -- names ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Names:
    """The functions of an image, by index of ``code``; ``indirect`` are the names of indirect functions."""

    module: Module
    code: Code
    by_name: dict[str, set[int]]
    indirect: frozenset[str]
    adjoining: dict[int, set[int]]

    def knows(self, name: str) -> bool:
        """Whether a name is one of a function of this image."""
        return name in self.by_name or name in map(hex, self.code.starts.tolist())


def named_code(pid: int, names: Iterable[str], modules: Sequence[Module]) -> Named:
    """Return the code of the named functions, each of one of these images, with its cold parts.

    A name may be an address of the file (hexadecimal, 0x in front). Raises BadInput for a name that no image knows, or
    that is there twice; NotPermitted where a file may not be read.
    """
    names = list(dict.fromkeys(names))
    found: dict[int, list[KeptCode]] = {}
    images = [_names_of(pid, module) for module in modules] if names else []
    for name in names:
        owners = [image for image in images if image.knows(name)]
        if len(owners) > 1:
            raise BadInput(
                f"{name} is a function of {len(owners)} images",
                why=" and ".join(image.module.name for image in owners),
                next_step="give an address that only one of them has, or the patches in commands of their own",
            )
        image = (owners or images)[0]
        code, bias = image.code, image.module.bias
        function = _function(image, name)
        called = code.names[function] if name.startswith("0x") else name
        parts = sorted(together(image.adjoining, function))
        pieces = [KeptCode(called, int(code.starts[part]) + bias, code.size(part)) for part in parts]
        found.setdefault(image.module.low, []).extend(pieces)
    return found


def _function(known: _Names, name: str) -> int:
    code, module = known.code, known.module
    if name.startswith("0x"):
        return _at(code, name, module)
    found = known.by_name.get(name, set())
    if len(found) == 1:
        (function,) = found
        return function
    if found:
        places = sorted(int(code.starts[i]) for i in found)
        raise BadInput(
            f"{name} is the name of {len(found)} functions of {module.name}",
            why=", ".join(map(hex, places)),
            next_step=f"give an address: --when-idle {places[0]:#x}",
        )
    if name in known.indirect:
        raise BadInput(
            f"{name} is an indirect function of {module.name}",
            why="which of its implementations runs was decided when the program was started",
            next_step="name the implementation",
        )
    raise BadInput(f"{name}: no function of {module.name}", why=_why_unknown(known), next_step=_next(known, name))


def _at(code: Code, name: str, module: Module) -> int:
    try:
        address = int(name, 16)
    except ValueError:
        raise BadInput(f"{name} is no address", next_step="hexadecimal, 0x in front") from None
    function = code.function_of(address)
    if function < 0:
        raise BadInput(
            f"{name}: no function of {module.name} is there",
            why="an address is one of the file, without the load bias",
            next_step="livegraft inspect shows such addresses",
        )
    start = int(code.starts[function])
    if start != address:
        raise BadInput(
            f"{name}: no function of {module.name} begins there",
            why=f"it is in {code.names[function]}",
            next_step=f"--when-idle {start:#x}",
        )
    return function


def _why_unknown(known: _Names) -> str:
    if not known.by_name:
        return "the program is stripped, and no separate debug file of it is installed"
    return "a function that the compiler has put into its callers has no code of its own"


def _next(known: _Names, name: str) -> str:
    close = difflib.get_close_matches(name, known.by_name, _CLOSE, 0.6)
    if close:
        return f"one of these is close: {', '.join(close)}"
    return "give an address of the file: --when-idle 0x..."


def _names_of(pid: int, module: Module) -> _Names:
    with _mapped_file(pid, module) as path:
        image = load_image(path)
        if image.build_id != module.build_id:
            raise Refused(
                f"{module.path} is not the file that process {pid} has mapped",
                why=f"its build-id is {image.build_id}, that of what is mapped {module.build_id}",
                next_step="run it as root: then the mapped file itself can be read",
            )
        if not image.symbols.complete:
            file = find_debug_file(image)
            image = replace(image, symbols=(debug_symbols(file) if file else None) or image.symbols)
        code = load_code(image)
    starts = {start: i for i, start in enumerate(code.starts.tolist())}
    by_name: dict[str, set[int]] = {}
    indirect = set()
    symbols = image.symbols
    for value, kind, name in zip(symbols.values.tolist(), symbols.types.tolist(), symbols.names, strict=True):
        if kind == _STT_FUNC and value in starts:
            by_name.setdefault(name, set()).add(starts[value])
        elif kind == _STT_GNU_IFUNC:
            indirect.add(name)
    return _Names(module, code, by_name, frozenset(indirect), neighbours(code, find_jump_tables(code)))


@contextmanager
def _mapped_file(pid: int, module: Module) -> Iterator[Path]:
    """A path at which the very file can be read that is mapped, or the one of its name where that may not be."""
    try:
        descriptor = by_living_thread(pid, lambda tid: open_mapped(pid, tid, module))
    except NotPermitted:
        if module.deleted:
            raise
        yield Path(module.path)
        return
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
