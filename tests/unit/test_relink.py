"""The same object files linked another way are the same program: nothing to patch, whatever moved."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from elfdiff.diff import Options, diff
from elfdiff.errors import LivegraftError, NothingToPatch, Refused
from fixtures.build import KV_SOURCES
from tests.randomprogram import random_program

LINKS = 5
BASE = ("-O2", "-w", "-std=gnu11", "-fcf-protection=none", "-ffunction-sections", "-fdata-sections", "-DKV_VERSION=1")
KINDS = {"pie": ("-fPIE", "-pie"), "no-pie": ("-fno-pie", "-no-pie"), "library": ("-fPIC", "-shared")}
ORDERS = ("", "", "-Wl,--sort-section=name", "-Wl,--sort-section=alignment")
LAYOUTS = ("", "", "-Wl,-z,noseparate-code", "-Wl,-z,max-page-size=0x10000", "-Wl,-z,norelro", "-Wl,--hash-style=sysv",
           "-Wl,-z,common-page-size=0x4000")  # fmt: skip


@dataclass(frozen=True)
class Objects:
    """Object files and what links them."""

    files: tuple[Path, ...]
    command: tuple[str, ...]

    def link(self, random: Random, way: Way, folder: Path) -> Path:
        """One program of them: random order, random layout, random company."""
        files = random.sample(self.files, len(self.files))
        if way.padded:
            files.insert(random.randrange(len(files) + 1), padding(random, folder))
        output = folder / f"{random.getrandbits(64):x}" / "program"
        output.parent.mkdir()
        options = [o for o in (random.choice(way.orders), random.choice(way.layouts)) if o]
        command = [*self.command, *options, *map(str, files), "-o", str(output), "-s", "-Wl,--build-id=sha1"]
        subprocess.run(command, check=True, capture_output=True)
        return output


def padding(random: Random, folder: Path) -> Path:
    """An object file with data of no use to anybody, in every kind of section, of any size and alignment."""
    text = "".join(
        f"{kind}char pad{n}[{random.randrange(1, 5000)}] "
        f"__attribute__((used, aligned({1 << random.randrange(8)}))) {value};\n"
        for n, (kind, value) in enumerate([("static ", ""), ("static ", "= {1}"), ("static const ", "= {2}")])
    )
    path = folder / f"{random.getrandbits(64):x}.o"
    subprocess.run(["gcc", "-x", "c", "-c", "-fPIC", "-o", path, "-"], input=text.encode(), check=True)
    return path


@cache
def compile_all(sources: tuple[tuple[str, str], ...], cc: str, kind: str, folder: Path) -> Objects:
    folder.mkdir(parents=True)
    for name, text in sources:
        (folder / name).write_text(text)
    units = [name for name, _ in sources if name.endswith(".c")]
    subprocess.run([cc, *BASE, KINDS[kind][0], "-c", *units], cwd=folder, check=True)
    return Objects(tuple(folder / f"{name[:-2]}.o" for name in units), (cc, *KINDS[kind], "-pthread"))


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Objects]:
    root = tmp_path_factory.mktemp("objects")

    def make(program: str, cc: str, kind: str) -> Objects:
        if shutil.which(cc) is None:
            pytest.skip(f"{cc} is not installed")
        return compile_all(SOURCES[program](), cc, kind, root / program / cc / kind)

    return make


def kv() -> tuple[tuple[str, str], ...]:
    return tuple((path.name, path.read_text()) for path in sorted(KV_SOURCES.iterdir()) if path.suffix in (".c", ".h"))


def many_units() -> tuple[tuple[str, str], ...]:
    """A random program whose translation units have statics of the same names."""
    texts = [random_program(Random(seed), 10).text() for seed in range(5)]
    units = [text.replace("int main(", f"int main{n}(") for n, text in enumerate(texts)]
    for n in range(len(units)):
        units[n] = "".join(f"#define f{k} u{n}f{k}\n#define v{k} u{n}v{k}\n" for k in range(60)) + units[n]
    heads = "".join(f"int main{n}(int, char **);" for n in range(len(units)))
    calls = " + ".join(f"main{n}(n, v)" for n in range(len(units)))
    main = f"{heads}\nint main(int n, char **v) {{ return {calls}; }}\n"
    return (*((f"unit{n}.c", text) for n, text in enumerate(units)), ("main.c", main))


SOURCES = {"kv": kv, "units": many_units}


def verdict(old: Path, new: Path) -> str:
    try:
        patch = diff(old, new, Options())
    except NothingToPatch:
        return "nothing"
    except Refused as error:
        return "refused: " + "; ".join(error.details)
    except LivegraftError as error:
        return f"{type(error).__name__}: {error.what} {error.why}"
    return "patch of " + ", ".join(f"{f.name} ({f.reason})" for f in patch.functions)


@dataclass(frozen=True)
class Way:
    """What changes from link to link beside the order of the files."""

    orders: tuple[str, ...] = ("",)
    layouts: tuple[str, ...] = ("",)
    padded: bool = False


WAYS = {"order": Way(), "sorted": Way(orders=ORDERS), "layout": Way(layouts=LAYOUTS), "padded": Way(padded=True)}
PATCHED = {
    ("kv", "no-pie", "order"): "the end of an array is another variable's beginning in one build only",
    ("kv", "no-pie", "layout"): "the end of an array is another variable's beginning in one build only",
    ("kv", "no-pie", "sorted"): "constants that nobody names are taken for the end of what lies before them",
    ("kv", "pie", "sorted"): "constants that nobody names are taken for the end of what lies before them",
    ("kv", "pie", "padded"): "constants that nobody names are taken for the end of what lies before them",
    ("kv", "no-pie", "padded"): "constants that nobody names are taken for the end of what lies before them",
    ("kv", "library", "padded"): "constants that nobody names are taken for the end of what lies before them",
    ("units", "pie", "sorted"): "constants that nobody names are taken for the end of what lies before them",
    ("units", "pie", "padded"): "constants that nobody names are taken for the end of what lies before them",
    ("units", "no-pie", "padded"): "constants that nobody names are taken for the end of what lies before them",
}
"""Where functions that did not change get into a patch; safe, but more than need be."""
NOTHING = {("kv", kind, way) for kind in ("pie", "library") for way in ("order", "layout")}
"""Where every pair must be recognised; elsewhere a refusal will do, and is counted."""
CASES = [(program, kind, way) for program in SOURCES for kind in KINDS for way in WAYS]


@pytest.mark.parametrize(
    ("program", "kind", "way"),
    [
        pytest.param(*case, marks=pytest.mark.xfail(strict=True, raises=AssertionError, reason=PATCHED[case]))
        if case in PATCHED else case
        for case in CASES
    ],
)  # fmt: skip
def test_what_is_linked_another_way_has_nothing_to_patch(
    program: str, kind: str, way: str, objects: Callable[[str, str, str], Objects], tmp_path: Path
) -> None:
    made, random = objects(program, "gcc", kind), Random(f"{program} {kind} {way}")
    links = [made.link(random, WAYS[way], tmp_path) for _ in range(LINKS)]
    found = [verdict(old, new) for old, new in pairwise(links)]
    print(*found, sep="\n")
    assert not [text for text in found if not text.startswith(("nothing", "refused"))]
    if (program, kind, way) in NOTHING:
        assert set(found) == {"nothing"}
