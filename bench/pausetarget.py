"""The program that is patched while ``bench.pause`` measures: built, started, and asked what it noticed."""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from elfdiff.diff import Options, diff
from elfdiff.patches.patchfile import read_patch, write_patch
from elfdiff.patchobject import PatchObject

NATIVE = Path(__file__).parent / "native"
FUNCTIONS = 4000
_FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-std=gnu11", "-pthread", "-Wl,--build-id=sha1")

_GAPS = 65536  # as in target.c
_HEAD = struct.Struct("<2Q")
_GAP = struct.Struct("<2Q")


def compiled(name: str, sources: dict[str, str], folder: Path) -> Path:
    """The executable made of C texts; built once for each distinct text and set of flags."""
    digest = hashlib.blake2b(repr((_FLAGS, sources)).encode(), digest_size=10).hexdigest()
    output = folder / digest / name
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
            for file, text in sources.items():
                Path(scratch, file).write_text(text)
            subprocess.run(["gcc", *_FLAGS, *sources, "-o", "linked"], cwd=scratch, check=True)
            Path(scratch, "linked").replace(output)
    return output


def floor(folder: Path) -> Path:
    """The C program that the pause is measured by."""
    return compiled("floor", {"floor.c": (NATIVE / "floor.c").read_text()}, folder)


def target(folder: Path, changed: int = 0) -> Path:
    """The target; ``changed`` of its functions, spread over all of them, are those of a newer version."""
    texts = {"target.c": (NATIVE / "target.c").read_text(), "functions.c": _functions(changed)}
    return compiled("target", texts, folder)


def is_changed(number: int, changed: int) -> bool:
    """Whether a function is another one in the newer version."""
    return changed > 0 and number % (FUNCTIONS // changed) == 0


def _functions(changed: int) -> str:
    lines = []
    for number in range(FUNCTIONS):
        mixed = number * 2654435761 & 0x7FFFFFFF  # no two functions alike, as in a program
        added = 7 * number + 1 + (1000003 if is_changed(number, changed) else 0)
        body = f"return (value ^ {mixed}) * {2 * number + 3} + {added};"
        lines.append(f"__attribute__((noinline)) long function{number}(long value) {{ {body} }}")
    names = ", ".join(f"function{number}" for number in range(FUNCTIONS))
    lines.append(f"long (*const functions[])(long) = {{{names}}};")
    lines.append(f"const long function_count = {FUNCTIONS};\n")
    return "\n".join(lines)


def patch(folder: Path, changed: int) -> tuple[Path, PatchObject]:
    """The patch object that changes as many functions, made by the differ: its file, and what is read from it."""
    old, new = target(folder), target(folder, changed)
    file = new.parent / "patch"
    write_patch(diff(old, new, Options()), file)
    found = read_patch(file)
    if len(found.functions) != changed:
        raise SystemExit(f"the differ finds {len(found.functions)} functions changed, not {changed}")
    return file, found


@dataclass
class Target:
    """A running target; a context manager. ``threads`` without the probe, ``spinning`` of them compute."""

    program: Path
    threads: int
    spinning: int = 0
    _shared: Path = field(init=False)

    def __enter__(self) -> Target:
        """Start it, and wait until all its threads have started."""
        descriptor, name = tempfile.mkstemp(prefix="livegraft-bench-")
        self._shared = Path(name)
        self._process = subprocess.Popen(
            [self.program, name, str(self.threads), str(self.spinning)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        if self._line() != "ready":
            raise SystemExit("the target did not start")
        self._memory = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        os.close(descriptor)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._memory.close()
        self._shared.unlink()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self, question: str) -> list[int]:
        """The numbers that it answers."""
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        answer = self._line()
        if not answer:
            raise SystemExit(f"the target has died: {self._process.wait()}")
        return [int(word) for word in answer.split()]

    def longest_gap(self, begin: int, end: int) -> int:
        """The longest time in ns that the probe thread did not run for and that overlaps [begin, end].

        Times are ns of CLOCK_MONOTONIC; 0 where there was none.
        """
        (count, _) = _HEAD.unpack_from(self._memory, 0)
        longest = 0
        for number in reversed(range(max(0, count - _GAPS + 1), count)):
            since, until = _GAP.unpack_from(self._memory, _HEAD.size + number % _GAPS * _GAP.size)
            if until <= begin:
                break
            if since < end:
                longest = max(longest, until - since)
        return longest
