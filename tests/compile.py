"""Compiles small C programs, old and new, for tests of the differ; each distinct build is made once.

A program is a text or several named texts; its folder is named after everything that decides the result, so
that two builds of one program have the same file name, as in an upgrade.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

Sources = str | Mapping[str, str]

BASE_FLAGS = ("-std=gnu11", "-w", "-O2", "-fcf-protection=none", "-Wl,--build-id=sha1")
"""Later flags win: ``-O0`` after these is -O0."""
LINKS = {
    "pie": ("-fPIE", "-pie"),
    "no-pie": ("-fno-pie", "-no-pie"),
    "static": ("-fno-pie", "-no-pie", "-static"),
    "static-pie": ("-fPIE", "-static-pie"),
    "library": ("-fPIC", "-shared"),
}


@dataclass(frozen=True)
class Compiler:
    """Builds into ``folder``, which may outlive the test session."""

    folder: Path

    def __call__(
        self,
        sources: Sources,
        *flags: str,
        link: str = "pie",
        cc: str = "gcc",
        stripped: bool = True,
        order: tuple[str, ...] = (),
    ) -> Path:
        """The linked file. ``order``: the object files in the order of linking, by name of their source.

        strip(1) changes no address: the build with symbols names those of the stripped one. Skips the test where
        the compiler is not installed.
        """
        files = {"main.c": sources} if isinstance(sources, str) else dict(sources)
        files = {name: files[name] for name in order or files}
        command = [*BASE_FLAGS, *LINKS[link], *flags]
        digest = hashlib.blake2b(digest_size=10)
        for part in (_version(cc), *command, *(text for item in files.items() for text in item)):
            digest.update(part.encode() + b"\0")
        program = self.folder / digest.hexdigest() / "program"
        if not program.exists():
            program.parent.mkdir(parents=True, exist_ok=True)
            self._compile(cc, files, command, program)
        return _without_symbols(program) if stripped else program

    def pair(self, old: Sources, new: Sources, *flags: str, **options: object) -> tuple[Path, Path]:
        """Both builds with the same flags."""
        return self(old, *flags, **options), self(new, *flags, **options)  # type: ignore[arg-type]

    def _compile(self, cc: str, files: Mapping[str, str], command: list[str], program: Path) -> None:
        """In a folder of its own and renamed when complete: tests may run at the same time, and be killed."""
        with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
            folder = Path(scratch)
            for name, text in files.items():
                (folder / name).write_text(text)
            done = subprocess.run(
                [cc, *files, "-o", "linked", *command],
                cwd=folder, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode != 0:  # no assertion: an expected failure must not hide it
                raise RuntimeError(done.stderr)
            (folder / "linked").replace(program)


def _without_symbols(program: Path) -> Path:
    copy = program.parent / "stripped" / program.name
    if not copy.exists():
        copy.parent.mkdir(exist_ok=True)
        draft = copy.with_name(f"{copy.name}.{os.getpid()}")
        subprocess.run(["strip", "-o", draft, program], check=True)
        draft.replace(copy)
    return copy


@cache
def _version(cc: str) -> str:
    if shutil.which(cc) is None:
        pytest.skip(f"the compiler {cc} is not installed")
    return subprocess.run([cc, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def altered(program: Path, folder: Path, changes: Mapping[int, bytes]) -> Path:
    """A copy of a file with other bytes at the given offsets."""
    raw = bytearray(program.read_bytes())
    for offset, replacement in changes.items():
        raw[offset : offset + len(replacement)] = replacement
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f"{program.name}.{os.urandom(4).hex()}"
    copy.write_bytes(raw)
    return copy
