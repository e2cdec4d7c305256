"""A patch object read back by readers that share nothing with the writer.

Every file is read back by pyelftools before it gets its name. LIEF, which takes longer to
import (0.3 s) than most programs take to compare, reads it once more in ``livegraft check`` (docs/architecture.md,
D12).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elfdiff.errors import LivegraftError
from elfdiff.patchobject import PatchObject

_Loads = list[tuple[int, int, int, bytes]]
"""(virtual address, size in memory, flags, content) of each PT_LOAD program header."""


def confirm(patch: PatchObject, path: Path) -> None:
    """Read the file with pyelftools. Raises LivegraftError where it sees other segments or symbols than were meant."""
    from elftools.common.exceptions import ELFError  # noqa: PLC0415  (60 ms)
    from elftools.construct import ConstructError  # noqa: PLC0415
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415

    with path.open("rb") as stream:
        try:
            elf = ELFFile(stream)
            seen = [
                (h["p_vaddr"], h["p_memsz"], h["p_flags"], segment.data())
                for segment in elf.iter_segments(type="PT_LOAD")
                if (h := segment.header) is not None
            ]
            table = elf.get_section_by_name(".symtab")
            symbols = table.num_symbols() if table is not None else 0
        except (ELFError, ConstructError) as error:
            raise _misread(path, "pyelftools", str(error)) from error
    _compare(patch, path, "pyelftools", seen, symbols)


def confirm_with_lief(patch: PatchObject, path: Path) -> None:
    """Read the file with LIEF. Raises LivegraftError as ``confirm`` does."""
    import lief  # noqa: PLC0415  (0.3 s, only in a check)

    lief.logging.disable()
    binary: Any = lief.parse(str(path))
    if binary is None:
        raise _misread(path, "LIEF", "it does not take it for an ELF file")
    loads = [s for s in binary.segments if s.type == lief.ELF.Segment.TYPE.LOAD]
    seen = [(s.virtual_address, s.virtual_size, int(s.flags), bytes(s.content)) for s in loads]
    _compare(patch, path, "LIEF", seen, len(binary.symtab_symbols))


def _compare(patch: PatchObject, path: Path, reader: str, seen: _Loads, symbols: int) -> None:
    meant = [(s.vaddr, s.size, s.flags, s.data.ljust(s.size, b"\0")) for s in patch.segments]
    if seen != meant:
        raise _misread(path, reader, "it sees other segments in it")
    wanted = 3 + len(patch.imports) + len(patch.functions)  # the null symbol and the two images
    if symbols != wanted:
        raise _misread(path, reader, f"it sees {symbols} symbols in it, not {wanted}")


def _misread(path: Path, reader: str, why: str) -> LivegraftError:
    return LivegraftError(
        f"{path}: the patch object is not as it was meant",
        why=f"an independent reader ({reader}) does not see what was written: {why}",
        next_step="this is a defect of livegraft; please report the two files",
    )
