"""Debug information: where it is found, whose it is, and what it says, in the dialects that compilers make."""

from __future__ import annotations

import random
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

from elfdiff.diff import Options, diff
from elfdiff.dwarf.debugfile import debug_symbols, find_debug_file
from elfdiff.dwarf.debuginfo import DebugInfo
from elfdiff.errors import BadInput, LivegraftError, Refused
from elfdiff.images.image import Image
from elfdiff.images.imagefile import load_image
from tests.compile import Compiler
from tests.verdict import PRELUDE, judge, program

TEXT = (
    PRELUDE
    + """
struct shared { int a; long b; };
static inline int inlined(struct shared *p) { return p->a * 3; }
SEPARATE int first(struct shared *p)
{
    return inlined(p) + 1;
}
int main(int n, char **v) { struct shared s = {n, 2}; return first(&s); }
"""
)
LINE_OF_FIRST = TEXT[: TEXT.index("SEPARATE int first")].count("\n") + 2


def split_off(program: Path, folder: Path) -> tuple[Path, Path]:
    """The program without debug information, linked to the file that has it (objcopy(1), --add-gnu-debuglink)."""
    folder.mkdir(parents=True, exist_ok=True)
    debug, bare = folder / "program.debug", folder / "program"
    subprocess.run(["objcopy", "--only-keep-debug", program, debug], check=True)
    subprocess.run(["objcopy", "--strip-all", f"--add-gnu-debuglink={debug}", program, bare], check=True)
    return bare, debug


def by_build_id(image: Image, root: Path) -> Path:
    place = root / ".build-id" / image.build_id[:2] / f"{image.build_id[2:]}.debug"
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def without_build_id(program: Path, folder: Path) -> Path:
    copy = folder / f"{program.name}.anonymous"
    subprocess.run(["objcopy", "--remove-section=.note.gnu.build-id", program, copy], check=True)
    return copy


# -- where it is found ------------------------------------------------------------------------------------------


def test_a_build_without_debug_information_has_none(compiled: Compiler, tmp_path: Path) -> None:
    assert find_debug_file(load_image(compiled(TEXT)), (tmp_path,)) is None


def test_the_file_itself_comes_first(compiled: Compiler, tmp_path: Path) -> None:
    image = load_image(compiled(TEXT, "-g", stripped=False))
    by_build_id(image, tmp_path).write_bytes(b"not looked at")
    found = find_debug_file(image, (tmp_path,))
    assert found is not None and (found.path, found.separate, found.described) == (image.path, False, True)


def test_it_is_found_by_build_id(compiled: Compiler, tmp_path: Path) -> None:
    bare, debug = split_off(compiled(TEXT, "-g", stripped=False), tmp_path / "a")
    image = load_image(bare)
    place = by_build_id(image, tmp_path / "root")
    debug.rename(place)
    assert find_debug_file(image) is None
    found = find_debug_file(image, (tmp_path / "root",))
    assert found is not None and (found.path, found.separate) == (place, True)
    symbols = debug_symbols(found)
    assert symbols is not None and "inlined" not in symbols.names and "first" in symbols.names


@pytest.mark.parametrize("place", ["program.debug", ".debug/program.debug"])
def test_it_is_found_by_debug_link_beside_the_program(place: str, compiled: Compiler, tmp_path: Path) -> None:
    bare, debug = split_off(compiled(TEXT, "-g", stripped=False), tmp_path)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    debug.rename(tmp_path / place)
    found = find_debug_file(load_image(bare))
    assert found is not None and found.path == tmp_path.resolve() / place


def test_it_is_found_by_debug_link_in_a_folder(compiled: Compiler, tmp_path: Path) -> None:
    bare, debug = split_off(compiled(TEXT, "-g", stripped=False), tmp_path / "a")
    (tmp_path / "b").mkdir()
    debug.rename(tmp_path / "b" / debug.name)
    found = find_debug_file(load_image(bare), (tmp_path / "b",))
    assert found is not None and found.path == tmp_path / "b" / debug.name


def test_the_debug_file_of_another_build_is_refused(compiled: Compiler, tmp_path: Path) -> None:
    bare, _ = split_off(compiled(TEXT, "-g", stripped=False), tmp_path / "a")
    _, other = split_off(compiled(TEXT.replace("* 3", "* 5"), "-g", stripped=False), tmp_path / "b")
    image = load_image(bare)
    shutil.copy(other, by_build_id(image, tmp_path / "root"))
    with pytest.raises(Refused) as caught:
        find_debug_file(image, (tmp_path / "root",))
    assert image.build_id in caught.value.why


@pytest.mark.parametrize("same", [True, False])
def test_without_a_build_id_the_checksum_decides(same: bool, compiled: Compiler, tmp_path: Path) -> None:
    named = compiled(TEXT, "-g", stripped=False)
    debug = without_build_id(split_off(named, tmp_path)[1], tmp_path).rename(tmp_path / "program.debug")
    bare = tmp_path / "linked"
    subprocess.run(["objcopy", "--strip-all", f"--add-gnu-debuglink={debug}", named, bare], check=True)
    if same:
        found = find_debug_file(load_image(bare))
        assert found is not None and found.path == debug.resolve()
        return
    raw = bytearray(debug.read_bytes())
    raw[-1] ^= 1
    debug.write_bytes(raw)
    with pytest.raises(Refused) as caught:
        find_debug_file(load_image(bare))
    assert f"{zlib.crc32(raw):#010x}" in caught.value.why


# -- what it says -----------------------------------------------------------------------------------------------

DIALECTS = {
    "DWARF 5": ("gcc", "-gdwarf-5"),
    "DWARF 4": ("gcc", "-gdwarf-4"),
    "DWARF 3": ("gcc", "-gdwarf-3", "-gstrict-dwarf"),
    "DWARF 2": ("gcc", "-gdwarf-2", "-gstrict-dwarf"),
    "64-bit DWARF": ("clang", "-gdwarf-5", "-gdwarf64"),
    "compressed": ("gcc", "-gz=zlib"),
    "type units, DWARF 4": ("gcc", "-gdwarf-4", "-fdebug-types-section"),
    "type units, DWARF 5": ("gcc", "-gdwarf-5", "-fdebug-types-section"),
    "parts": ("gcc", "-freorder-functions", "-ffunction-sections"),
    "link-time": ("gcc", "-flto", "-flto-partition=none"),
    "clang DWARF 5": ("clang", "-gdwarf-5"),
    "clang DWARF 4": ("clang", "-gdwarf-4"),
    "clang type units": ("clang", "-gdwarf-5", "-fdebug-types-section"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_functions_and_lines_are_found(dialect: str, level: str, compiled: Compiler) -> None:
    cc, *flags = DIALECTS[dialect]
    image = load_image(compiled(TEXT, "-g", level, *flags, cc=cc, stripped=False))
    file = find_debug_file(image)
    assert file is not None and file.notes == ()
    info = DebugInfo(file)
    address = dict(zip(image.symbols.names, image.symbols.values.tolist(), strict=True))["first"]
    function = info.function(address)
    assert function is not None and function.name == "first"
    assert ("struct", "shared") in {key for unit in function.units for key in unit.contents.types}
    line = info.opening(address)
    assert line is not None
    name, _, number = line.rpartition(":")
    assert name.endswith("main.c") and LINE_OF_FIRST - 1 <= int(number) <= LINE_OF_FIRST
    assert (info.function(address + 1), info.line(image.high + 64)) == (None, None)


def test_every_line_is_what_another_reader_says(compiled: Compiler) -> None:
    """addr2line(1) of binutils, for every function of a program."""
    path = compiled({"main.c": TEXT, "other.c": "int unused(int x) { return x; }"}, "-g", stripped=False)
    image = load_image(path)
    file = find_debug_file(image)
    assert file is not None
    info = DebugInfo(file)
    known = [a for a in sorted(set(image.symbols.values.tolist())) if info.unit_at(a) is not None]
    assert len(known) >= 3
    command = ["addr2line", "-s", "-e", path, *map(hex, known)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    told = [line.split(" (")[0] for line in said if line]
    assert [str(info.line(a)).rpartition("/")[2] for a in known] == told


GROWS = program(
    "struct s { int a; MORE int b; };\n"
    "SEPARATE int one(struct s *p) { puts(\"1\"); return p->b++; }\n"
    "SEPARATE int makes(int x) { struct s *p = calloc(3, 64); return one(p + x); }\n",
    "makes(n)", MORE=("", "int n;"),
)  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_changed_layout_is_named(dialect: str, compiled: Compiler) -> None:
    cc, *flags = DIALECTS[dialect]
    verdict = judge(compiled, GROWS, "-g", *flags, cc=cc, stripped=False)
    found = [f.what for f in verdict.findings if f.code == "struct-layout"]
    assert len(found) == 1 and "struct s has another layout: size 8 -> 12 bytes; new n at 4; b at 4 -> 8" in found[0]


@pytest.mark.parametrize("place", ["beside the program", "by build-id in a folder"])
def test_stripped_builds_with_separate_files_are_named(place: str, compiled: Compiler, tmp_path: Path) -> None:
    builds = [split_off(compiled(GROWS.sources(k), "-g", stripped=False), tmp_path / str(k)) for k in (0, 1)]
    folders: tuple[Path, ...] = ()
    if place != "beside the program":
        folders = (tmp_path / "root",)
        for bare, debug in builds:
            debug.rename(by_build_id(load_image(bare), folders[0]))
    with pytest.raises(Refused) as caught:
        diff(builds[0][0], builds[1][0], Options(debug_dirs=folders))
    (finding,) = caught.value.findings
    assert "b at 4 -> 8" in finding.what and finding.where[0].startswith("one (main.c:")


def test_symbols_alone_name_functions_and_variables(compiled: Compiler, tmp_path: Path) -> None:
    """A debug file of a build without -g has its symbols all the same."""
    pair = program("static int v;\nSEPARATE int edited(int x) { puts(\"e\"); v += x; return v * STEP; }\n", "edited(n)",
                   STEP=("3", "5"))  # fmt: skip
    old, new = (split_off(compiled(pair.sources(k), stripped=False), tmp_path / str(k)) for k in (0, 1))
    assert [f.name for f in diff(old[0], new[0], Options()).functions] == ["edited"]
    for bare, debug in (old, new):
        debug.unlink()
        assert find_debug_file(load_image(bare)) is None
    assert [f.name.startswith("0x") for f in diff(old[0], new[0], Options()).functions] == [True]


@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_types_in_split_files_are_not_read_and_that_is_said(cc: str, compiled: Compiler) -> None:
    """The signature judges instead: a field that moved is refused all the same."""
    verdict = judge(compiled, GROWS, "-g", "-gdwarf-5", "-gsplit-dwarf", cc=cc, stripped=False)
    assert verdict.refused == {"struct-layout"}
    assert "fields moved by +4 bytes" in verdict.findings[0].what
    allowed = judge(
        compiled, GROWS, "-g", "-gdwarf-5", "-gsplit-dwarf", cc=cc, stripped=False, allow=("struct-layout",)
    )
    notes = [f for f in allowed.findings if f.code == "debug-info"]
    assert len(notes) == 1 and ".dwo" in notes[0].where[0]


def dwz(compiled: Compiler, folder: Path, number: int) -> Path:
    """A program whose types dwz(1) moved to a file that it shares with its twin."""
    if shutil.which("dwz") is None:
        pytest.skip("dwz is not installed")
    main = GROWS.sources(number)["main.c"]
    types = main[main.index("struct s {") : main.index("SEPARATE int one")]
    sources = {"main.c": main, "other.c": PRELUDE + types + "int other(struct s *p) { puts(\"o\"); return p->b; }\n"}
    linked = compiled(sources, "-g", "-gdwarf-4", stripped=False)
    folder.mkdir()
    copies = [folder / name for name in ("program", "twin")]
    for copy in copies:
        shutil.copy(linked, copy)
    command = ["dwz", "-L", "1000000", "-m", folder / "common", "-M", "common", *copies]
    subprocess.run(command, check=True, cwd=folder)
    return copies[0]


def test_types_that_dwz_shares_with_other_files_are_read(compiled: Compiler, tmp_path: Path) -> None:
    old, new = (dwz(compiled, tmp_path / str(k), k) for k in (0, 1))
    file = find_debug_file(load_image(new))
    assert file is not None and file.alternate == tmp_path.resolve() / "1" / "common"
    with pytest.raises(Refused) as caught:
        diff(old, new, Options())
    assert "b at 4 -> 8" in caught.value.findings[0].what


def test_without_the_shared_file_the_code_alone_is_judged(compiled: Compiler, tmp_path: Path) -> None:
    old, new = (dwz(compiled, tmp_path / str(k), k) for k in (0, 1))
    (tmp_path / "1" / "common").unlink()
    with pytest.raises(Refused) as caught:
        diff(old, new, Options())
    assert "fields moved by +4 bytes" in caught.value.findings[0].what
    patch = diff(old, new, Options(allow=frozenset({"struct-layout"})))
    (note,) = [f for f in patch.findings if f.code == "debug-info"]
    assert "dwz" in note.where[0]


def test_the_formats_of_units_and_lines_may_differ(compiled: Compiler) -> None:
    image = load_image(compiled(TEXT, "-g", "-gdwarf-5", "-gdwarf64", stripped=False))
    file = find_debug_file(image)
    assert file is not None
    address = dict(zip(image.symbols.names, image.symbols.values.tolist(), strict=True))["first"]
    assert DebugInfo(file).opening(address) is not None


# -- damage -----------------------------------------------------------------------------------------------------


def test_damaged_debug_information_is_bad_input(compiled: Compiler, tmp_path: Path) -> None:
    """Random bytes in all debug sections: a verdict or a clear error, nothing else."""
    old = compiled(GROWS.sources(0), "-g", stripped=False)
    new = compiled(GROWS.sources(1), "-g", stripped=False)
    raw = new.read_bytes()
    headers = subprocess.run(["readelf", "-SW", new], capture_output=True, text=True, check=True).stdout
    rows = [line.split("]", 1)[1].split() for line in headers.splitlines() if "] .debug_" in line]
    spans = [(int(row[3], 16), int(row[4], 16)) for row in rows]
    seen = set()
    for seed in range(60):
        random_ = random.Random(seed)
        damaged = bytearray(raw)
        offset, size = random_.choice(spans)
        for _ in range(random_.choice((1, 4, 64))):
            damaged[offset + random_.randrange(size)] = random_.randrange(256)
        copy = tmp_path / "program"
        copy.write_bytes(damaged)
        try:
            diff(old, copy, Options())
            seen.add("patch")
        except LivegraftError as error:
            assert isinstance(error, BadInput | Refused), f"seed {seed}: {error}"
            seen.add(type(error).__name__)
    assert seen >= {"BadInput", "Refused"}
