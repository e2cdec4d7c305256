"""The daemon, built by every compiler and linker that is at hand, is patched while it runs, or refused with a reason.

An ordinary run takes a build of each linker and C library; ``make matrix`` takes all, stripped and not, and prints
what came of each.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from elfdiff.diff import Options, diff
from elfdiff.errors import Busy, Refused
from elfdiff.patches.patchfile import read_patch, write_patch
from fixtures.build import KV_SOURCES, Variant, build
from fixtures.daemon import PROBES, KvClient, probe, run_kv
from fixtures.intact import altered_code, writable_and_executable
from patcher.pausing.conditions import Conditions
from patcher.transactions.transaction import apply, revert
from tests.compile import Compiler
from tests.live.grafting import Running, patch_for, sources, there_and_back

pytestmark = pytest.mark.root

MATRIX = bool(os.environ.get("LIVEGRAFT_MATRIX"))
PATCHED = "patched"
Kv = Callable[[int, "Toolchain", bool], Path]


@dataclass(frozen=True)
class Toolchain:
    """How kv is built, and what comes of it: patched, or words of the reason why not."""

    variant: Variant
    flags: tuple[str, ...] = ()
    outcome: str = PATCHED
    always: bool = False  # in an ordinary run, too

    @property
    def linker(self) -> str:
        """The linker's program, as far as the flags name it."""
        chosen = [flag.partition("=")[2] for flag in self.flags if flag.startswith("-fuse-ld=")]
        return f"ld.{chosen[0]}" if chosen else "ld"


def gcc(*flags: str, link: str = "pie", cet: bool = False, **others: object) -> Toolchain:
    return Toolchain(Variant("gcc", link=link, cet=cet, stripped=False), flags, **others)  # type: ignore[arg-type]


def clang(*flags: str, link: str = "pie", cet: bool = False, **others: object) -> Toolchain:
    return Toolchain(Variant("clang", link=link, cet=cet, stripped=False), flags, **others)  # type: ignore[arg-type]


def musl(*flags: str, link: str = "pie", **others: object) -> Toolchain:
    return Toolchain(Variant("musl-gcc", link=link, stripped=False), flags, **others)  # type: ignore[arg-type]


GOLD, LLD, MOLD = "-fuse-ld=gold", "-fuse-ld=lld", "-fuse-ld=mold"
NO_UNWIND = ("-fno-asynchronous-unwind-tables", "-fno-unwind-tables")
TOOLCHAINS = {
    "gold": gcc(GOLD, always=True),
    "lld": gcc(LLD),
    "mold": gcc(MOLD, always=True),
    "clang lld": clang(LLD, always=True),
    "clang mold": clang(MOLD),
    "clang gold": clang(GOLD),
    "gold no-pie": gcc(GOLD, link="no-pie"),
    "mold no-pie": gcc(MOLD, link="no-pie", always=True),
    "lld no-pie": clang(LLD, link="no-pie"),
    "static lld": gcc(LLD, link="static", outcome="unpinned-address"),
    "static mold": gcc(MOLD, link="static", outcome="unpinned-address"),
    "static-pie lld": clang(LLD, link="static-pie"),
    "musl static": musl(link="static", outcome="no-unwind"),
    "lto": gcc("-flto", outcome="stayed live"),
    "clang lto": clang("-flto", LLD, outcome="stayed live"),
    "clang thin lto": clang("-flto=thin", LLD),
    "musl": musl(always=True),
    "musl no-pie": musl(link="no-pie"),
    "static-pie": gcc(link="static-pie", always=True),
    "static, compiled for pie": gcc("-fPIE", link="static"),
    "lazy": gcc("-Wl,-z,lazy"),
    "lazy no-pie": gcc("-Wl,-z,lazy", link="no-pie"),
    "now": gcc("-Wl,-z,now"),
    "no plt": gcc("-fno-plt"),
    "cet": gcc(cet=True),
    "cet now": gcc("-Wl,-z,now", cet=True),
    "cet lld": clang(LLD, cet=True),
    "cet mold": gcc(MOLD, cet=True),
    "cet gold": gcc(GOLD, cet=True),
    "separate code": gcc("-Wl,-z,separate-code"),
    "no separate code": gcc("-Wl,-z,noseparate-code", always=True),
    "no separate code, no-pie": gcc("-Wl,-z,noseparate-code", link="no-pie"),
    "no build-id": gcc("-Wl,--build-id=none", outcome="no build-id", always=True),
    "kept relocations": gcc("-Wl,--emit-relocs"),
    "packed relocations": gcc("-Wl,-z,pack-relative-relocs"),
    "compressed debug information": gcc("-g", "-gz"),
    "sysv hash": gcc("-Wl,--hash-style=sysv"),
    "pages of 2 MiB": gcc("-Wl,-z,max-page-size=2097152"),
    "pages of 2 MiB, no-pie": gcc("-Wl,-z,max-page-size=2097152", link="no-pie"),
    "sections collected": gcc("-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections"),
    "folded by lld": clang(LLD, "-ffunction-sections", "-Wl,--icf=all"),
    "folded by gold": gcc(GOLD, "-ffunction-sections", "-Wl,--icf=all"),
    "for size": gcc("-Os"),
    "clang for size": clang("-Oz"),
    "large model": gcc("-mcmodel=large", link="no-pie", outcome="label-table"),
    "medium model": gcc("-mcmodel=medium", outcome="unpinned-address"),
    "wide vectors": gcc("-march=x86-64-v3", "-O3"),
    "nops before functions": gcc("-fpatchable-function-entry=16,8", always=True),
    "functions not aligned": gcc("-falign-functions=1"),
    "retpolines": gcc("-mindirect-branch=thunk", "-mfunction-return=thunk"),
    "clang retpolines": clang("-mretpoline"),
    "exported": gcc("-rdynamic"),
    "stack protector": gcc("-fstack-protector-all", "-fstack-clash-protection"),
    "descriptors of thread-local storage": gcc("-mtls-dialect=gnu2"),
    "split stacks": gcc("-fsplit-stack"),
    "lld, one segment": gcc(LLD, "-Wl,--no-rosegment"),
    "no unwind tables": gcc(*NO_UNWIND, outcome="no-unwind"),
}


def cases() -> Iterator[object]:
    for name, toolchain in TOOLCHAINS.items():
        for stripped in (True, False) if MATRIX else (True,):
            if (MATRIX or toolchain.always) and not (stripped and "-Wl,--emit-relocs" in toolchain.flags):
                marks = [pytest.mark.xfail(strict=True, reason=TYPED_TABLE)] if typed(toolchain, stripped) else []
                yield pytest.param(toolchain, stripped, id=f"{name}{', stripped' if stripped else ''}", marks=marks)


TYPED_TABLE = (
    "a constant table that only changed code reads has one more element: by debug information it is a variable of "
    "another type (variable-type), though the patch has a copy of its own; without debug information it is patched"
)


def typed(toolchain: Toolchain, stripped: bool) -> bool:
    return "-g" in toolchain.flags and not stripped


@pytest.fixture
def kv(cache_folder: Path) -> Kv:
    """``kv(version, toolchain, stripped)``: the executable; skips where a tool is missing."""

    def executable(version: int, toolchain: Toolchain, stripped: bool) -> Path:
        for tool in (toolchain.variant.compiler, toolchain.linker):
            if shutil.which(tool) is None:
                pytest.skip(f"{tool} is not installed")
        sources, headers = sorted(KV_SOURCES.glob("*.c")), sorted(KV_SOURCES.glob("*.h"))
        flags = (f"-DKV_VERSION={version}", *toolchain.flags, *(["-s"] if stripped else []))
        folder = cache_folder / "build"
        return build("kv", f"v{version}", sources, toolchain.variant, folder, extra=flags, headers=headers)

    return executable


def interrupted(port: int) -> str:
    with KvClient(port) as client:
        return client.ask("STATS").split()[2]


def outcome(old: Path, new: Path, folder: Path) -> str:
    """Diff, apply, probe, revert, probe: ``patched``, or what was said instead."""
    file = folder / "fix.patch"
    try:
        write_patch(diff(old, new, Options()), file)
        patch = read_patch(file)
    except Refused as error:
        return f"{error.what}: {error.why} {error.details}"
    with run_kv(old) as daemon, KvClient(daemon.port) as client:
        client.ask("SET kept value")
        before = probe(daemon.port)
        said = PATCHED
        for _ in range(2):
            try:
                apply(daemon.pid, patch, Conditions(timeout=20 if said == PATCHED else 1))
            except (Refused, Busy) as error:
                said = f"{error.what}: {error.why}"
                assert probe(daemon.port) == before
            else:
                assert probe(daemon.port) != before
                assert probe(daemon.port) == expected(new)
                assert altered_code(daemon.pid) != []
                revert(daemon.pid)
            assert probe(daemon.port) == before == expected(old)
            assert altered_code(daemon.pid) == []
            assert writable_and_executable(daemon.pid) == []
            assert client.ask("GET kept") == "$value", "its state did not go on"
        assert interrupted(daemon.port) == "interrupted=0"
    return said


def expected(program: Path) -> object:
    """What the build says when it is simply started: musl's strtoll lets INCR refuse what glibc's lets pass."""
    with run_kv(program) as daemon:
        return probe(daemon.port)


@pytest.mark.parametrize(("toolchain", "stripped"), list(cases()))
def test_what_a_toolchain_makes_is_patched(toolchain: Toolchain, stripped: bool, kv: Kv, tmp_path: Path) -> None:
    old, new = (kv(version, toolchain, stripped) for version in (1, 2))
    if toolchain.variant.compiler != "musl-gcc":
        assert expected(old) == PROBES[1] and expected(new) == PROBES[2]
    said = outcome(old, new, tmp_path)
    if MATRIX:
        print(f"\n{toolchain.variant.name} {' '.join(toolchain.flags)}{' -s' if stripped else ''}: {said[:200]}")
    assert said == PATCHED if toolchain.outcome == PATCHED else toolchain.outcome in said


LITERAL = """
__attribute__((noinline)) long parsed(const char *text) { return atol(text); }
long answer(long n) { return n + parsed("WORD"); }
"""


@pytest.mark.parametrize("linker", ["bfd", "gold", "lld", "mold"])
@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_a_constant_in_front_of_the_code_is_seen(linker: str, cc: str, cache_folder: Path, tmp_path: Path) -> None:
    """At a fixed address lld and mold put constants below the code, where their addresses were taken for numbers."""
    if shutil.which(f"ld.{linker}") is None:
        pytest.skip(f"ld.{linker} is not installed")
    compiled = Compiler(cache_folder / "compiled")
    flags = f"-fuse-ld={linker}"
    old, new = (compiled(sources(LITERAL, WORD=w), flags, link="no-pie", cc=cc) for w in ("4711", "4712"))
    with Running([old]) as process:
        there_and_back(process, patch_for(old, new, tmp_path), [4711, 4712], [4712, 4713])
