"""Writes the table of a published pair from builds of its sources: ``python -m tests.real.establish --help``.

The published files are stripped; Debian's builds are reproducible, so the same sources with the same flags and
compiler (``dpkg-buildflags``, debian/rules) give the same addresses, and with them the names. This refuses to write
anything unless all functions of the older published file start and end where those of the build do.

Nothing of what the differ says goes into a table. What the sources do not show is added by hand, as ``other`` with its
reason (a constant of a library's header, a patch whose sources the archive does not serve).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from elftools.dwarf.callframe import FDE
from elftools.elf.elffile import ELFFile

from tests.objecttruth import compare_objects, linked_names


def unwind_bounds(path: Path) -> set[tuple[int, int]]:
    """Start and end of every function that has unwind information."""
    with path.open("rb") as stream:
        entries = ELFFile(stream).get_dwarf_info().EH_CFI_entries()
        rows = [entry.header for entry in entries if isinstance(entry, FDE)]
        return {(row["initial_location"], row["initial_location"] + row["address_range"]) for row in rows}


def defined_in(objects: dict[str, Path]) -> dict[str, str]:
    """Name of a function that is no local one -> the object file that defines it."""
    found = {}
    for name, path in objects.items():
        with path.open("rb") as stream:
            table = ELFFile(stream).get_section_by_name(".symtab")
            for symbol in table.iter_symbols() if table is not None else ():
                info = symbol["st_info"]
                if info["type"] == "STT_FUNC" and info["bind"] != "STB_LOCAL" and isinstance(symbol["st_shndx"], int):
                    found[symbol.name] = name
    return found


def object_files(folder: Path) -> dict[str, Path]:
    """All below a folder, by their path."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.o"))}


def main() -> int:
    """Write the rows to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("published", "old_linked", "new_linked", "old_objects", "new_objects"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    if unwind_bounds(arguments.published) != unwind_bounds(arguments.old_linked):
        sys.exit("the build is not the published one: its functions lie elsewhere")
    old, new = object_files(arguments.old_objects), object_files(arguments.new_objects)
    truth = compare_objects(old, new)
    addresses = {name: start for start, name in linked_names(arguments.old_linked).items()}
    kept = set(linked_names(arguments.new_linked).values())
    sources = defined_in(old)
    rows = [(addresses[name], "changed", name) for name in truth.changed if name in addresses and name in kept]
    rows += [(addresses[name], "lines", name) for name in truth.line_only if name in addresses]
    rows += [(addresses[name], "removed", name) for name in truth.removed if name in addresses]
    for address, kind, name in sorted(rows):
        source = sources.get(name, "").removesuffix(".o") if kind != "lines" else ""
        print(f"{address:#x} {kind} {name} {source}".rstrip())
    for name in sorted(truth.added & kept):
        print(f"- added {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
