"""What the differ finds between the versions of kv, stripped, judged by the symbols of the same builds.

``-s`` leaves the code where it is, so the build with symbols names the addresses of the one without.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from elfdiff.diff import Options, diff
from elfdiff.errors import NothingToPatch, Refused
from elfdiff.patchobject import PatchObject
from fixtures.build import Variant, matrix

Kv = Callable[..., Path]

CHANGED = (
    {"answer", "look_up", "answer_weight", "joined_size"},
    {"command_run", "table_append"},
)
"""Changed from version 1 to 2: as written (-O0), and with all inlined that can be. Not answer_version: it is
reached by a table of pointers only, which the patch has a copy of, so that its old entry may stay as it is."""


def names(program: Path) -> dict[int, str]:
    """Address -> name of the functions of a build with symbols."""
    listing = subprocess.run(["nm", program], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines()]
    return {int(row[0], 16): row[2] for row in rows if len(row) == 3 and row[1] in "tT"}


def redirected(patch: PatchObject, program: Path) -> set[str]:
    """Names of the old functions whose entries the patch redirects."""
    known = names(program)
    return {known[one.old_start] for one in patch.functions if one.entry_jump and one.old_start is not None}


@pytest.mark.parametrize("variant", matrix(), ids=lambda variant: variant.name)
def test_every_changed_function_is_redirected(variant: Variant, kv: Kv) -> None:
    patch = diff(kv(1, variant), kv(2, variant), Options())
    found = redirected(patch, kv(1, replace(variant, stripped=False)))
    assert found >= CHANGED[variant.level != "-O0"]
    assert not {"main", "worker_main", "table_set", "table_delete", "answer_stats"} & found
    assert "__libc_start_main_impl" not in found, "it is on the stack for as long as the program runs"


@pytest.mark.parametrize("variant", matrix(), ids=lambda variant: variant.name)
def test_what_is_new_has_no_old_address(variant: Variant, kv: Kv) -> None:
    patch = diff(kv(1, variant), kv(2, variant), Options())
    known = names(kv(2, replace(variant, stripped=False)))
    added = {known[one.new_start].split(".")[0] for one in patch.functions if one.old_start is None}
    assert {"answer_exists"} <= added <= {"answer_exists", "answer_version"}


@pytest.mark.parametrize("variant", matrix(), ids=lambda variant: variant.name)
def test_a_changed_layout_is_refused_without_debug_information(variant: Variant, kv: Kv) -> None:
    with pytest.raises(Refused) as refusal:
        diff(kv(3, variant), kv(4, variant), Options())
    assert "struct-layout" in refusal.value.why


def test_a_rebuild_with_other_flags_of_the_linker_has_nothing_to_patch(kv: Kv, tmp_path: Path) -> None:
    """Another build-id, the same program."""
    old = kv(1)
    new = tmp_path / "kv"
    update = f".note.gnu.build-id={other_id(old, tmp_path)}"
    subprocess.run(["objcopy", "--update-section", update, old, new], check=True)
    with pytest.raises(NothingToPatch):
        diff(old, new, Options())


def other_id(program: Path, folder: Path) -> Path:
    """The build-id note of the program, its last byte flipped."""
    note = folder / "note"
    subprocess.run(["objcopy", "-O", "binary", "--only-section=.note.gnu.build-id", program, note], check=True)
    data = note.read_bytes()
    note.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return note
