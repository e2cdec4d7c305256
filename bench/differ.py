"""How long ``livegraft diff`` takes and how much memory, beside ``objdump -d`` of the same two files.

    python -m bench.differ [--rounds N] [NAME ...]

Whole processes, as a person would run them. In every round each command runs once after the other, so that a
machine that becomes slower in between slows all of them; the ratio is taken round by round. The pairs are what the
distribution's archive serves. Wall time on a busy machine measures the machine: processor time stands beside it.
"""

from __future__ import annotations

import argparse
import compileall
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import correlation, linear_regression, median

from fixtures.debian import old_and_new

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {
    "redis": ("redis-tools", "usr/bin/redis-check-rdb"),
    "openssh": ("openssh-server", "usr/sbin/sshd"),
    "apache2": ("apache2-bin", "usr/sbin/apache2"),
    "libssl": ("libssl3", "usr/lib/x86_64-linux-gnu/libssl.so.3"),
    "libcrypto": ("libssl3", "usr/lib/x86_64-linux-gnu/libcrypto.so.3"),
    "postgres": ("postgresql-15", "usr/lib/postgresql/15/bin/postgres"),
}
DONE = (0, 3, 4)
"""Exit statuses of a comparison that came to its end: a patch, nothing to patch, refused."""


@dataclass(frozen=True)
class Run:
    """One command's processes together: seconds of wall and processor time, bytes of the largest one."""

    wall: float
    cpu: float
    memory: int


@dataclass(frozen=True)
class Measured:
    """One program's figures, a run of each command per round; ``text`` bytes and ``functions`` of both builds."""

    name: str
    text: int
    functions: int
    objdump: tuple[Run, ...]
    uncached: tuple[Run, ...]
    cold: tuple[Run, ...]
    warm: tuple[Run, ...]


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print; ``words`` are the arguments, of the command line if None."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PROGRAMS)} (default: all)")
    arguments = parser.parse_args(words)
    # As an installed program is: where PYTHONDONTWRITEBYTECODE is set, every process would compile all sources again.
    for room in ("elfdiff", "trampolines", "patcher"):
        compileall.compile_dir(ROOT / room, quiet=1)
    found = []
    for name in arguments.names or PROGRAMS:
        found.append(measure(name, max(1, arguments.rounds)))
        say("\n".join(_rows(found[-1])) + "\n")
    if len(found) > 1:
        say("".join(_slopes(found)))


def measure(name: str, rounds: int) -> Measured:
    """Run all commands in turn, ``rounds`` times after one round that is not counted."""
    package, place = PROGRAMS[name]
    builds = old_and_new(package, ROOT / ".cache" / "packages")
    old, new = (build.file(place) for build in builds)
    say(f"{name}: {builds[0].version} -> {builds[1].version}\n")
    kinds: dict[str, list[Run]] = {kind: [] for kind in ("objdump", "uncached", "cold", "warm")}
    with tempfile.TemporaryDirectory() as scratch:
        kept, out = Path(scratch) / "cache", Path(scratch) / "patch"
        compare = [sys.executable, "-m", "patcher.cli", "diff", str(old), str(new), "-o", str(out)]
        for number in range(rounds + 1):
            shutil.rmtree(kept, ignore_errors=True)
            runs = {
                "objdump": run(["objdump", "-d", str(old)], ["objdump", "-d", str(new)]),
                "uncached": run([*compare, "--no-cache"], ends=DONE),
                "cold": run([*compare, "--cache-dir", str(kept)], ends=DONE),
                "warm": run([*compare, "--cache-dir", str(kept)], ends=DONE),
            }
            if number:
                for kind, one in runs.items():
                    kinds[kind].append(one)
    text, functions = size(old, new)
    return Measured(name, text, functions, **{kind: tuple(found) for kind, found in kinds.items()})


def size(*paths: Path) -> tuple[int, int]:
    """Bytes of code and functions of all files together.

    Found out by another process: wait4(2) counts what a process had in memory before it became the command, so
    this one must stay small.
    """
    script = (
        "import sys; from pathlib import Path; from elfdiff.decoding.code import load_code; "
        "from elfdiff.images.imagefile import load_image; "
        "codes = [load_code(load_image(Path(p))) for p in sys.argv[1:]]; "
        "print(sum(len(code.raw) for code in codes), sum(map(len, codes)))"
    )
    command = [sys.executable, "-c", script, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    text, functions = map(int, done.stdout.split())
    return text, functions


def run(*commands: Sequence[str], ends: Sequence[int] = (0,)) -> Run:
    """Run the commands one after the other; the kernel's own accounting of each (wait4(2))."""
    wall = cpu = 0.0
    memory = 0
    for command in commands:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        wall += time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in ends:
            raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
        cpu += usage.ru_utime + usage.ru_stime
        memory = max(memory, usage.ru_maxrss * 1024)
    return Run(wall, cpu, memory)


def _rows(measured: Measured) -> list[str]:
    rows = [
        f"  {measured.text / 1e6:.2f} MB of code in {measured.functions} functions (both builds)",
        f"  {'':10}{'wall min':>9}{'median':>8}{'cpu min':>9}{'median':>8}{'ratio':>7}{'memory':>9}",
    ]
    for kind in ("objdump", "uncached", "cold", "warm"):
        runs: tuple[Run, ...] = getattr(measured, kind)
        walls, cpus = [one.wall for one in runs], [one.cpu for one in runs]
        ratio = median(one.cpu / other.cpu for one, other in zip(runs, measured.objdump, strict=True))
        rows.append(
            f"  {kind:10}{min(walls):8.2f}s{median(walls):7.2f}s{min(cpus):8.2f}s{median(cpus):7.2f}s"
            f"{ratio:7.2f}{max(one.memory for one in runs) / 1e6:6.0f} MB"
        )
    return rows


def _slopes(found: list[Measured]) -> list[str]:
    """Processor time against bytes of code: a line through all programs by least squares."""
    sizes = [one.text / 1e6 for one in found]
    lines = []
    for kind in ("objdump", "uncached", "warm"):
        seconds = [median(item.cpu for item in getattr(one, kind)) for one in found]
        slope, start = linear_regression(sizes, seconds)
        fit = correlation(sizes, seconds) ** 2
        lines.append(f"{kind:10} {start:.2f} s + {slope:.3f} s per MB of code, r2 = {fit:.3f}\n")
    return lines


def say(text: str) -> None:
    """Print at once: a run takes minutes."""
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
