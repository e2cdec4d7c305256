"""objdump's reading of a whole program, streamed: where each instruction starts, how long it is, what it leads to."""

from __future__ import annotations

import re
import subprocess
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NOTHING = -1 << 62
_LINE = re.compile(r"^ *([0-9a-f]+):\t((?:[0-9a-f]{2} )+) *\t?(.*)$")
_RIP = re.compile(r"\(%[re]ip\).* # ([0-9a-f]+)")
_BRANCH = re.compile(r"^(?:[a-z0-9.,]+ +)*?(?:call|j[a-z]+|loop[a-z]*|xbegin)[a-z]* *(?:,p[nt])? +([0-9a-f]+)(?: |$)")


@dataclass(frozen=True)
class Listing:
    """Arrays of shape (n,), by rising address. ``target`` is an address or NOTHING; ``bad``: no instruction."""

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    target: NDArray[np.int64]
    bad: NDArray[np.bool_]


def listing(path: Path) -> Listing:
    """``objdump -d`` of all sections that hold code."""
    start, length, target, bad = array("q"), array("q"), array("q"), array("b")
    command = ["objdump", "-d", "-w", "--insn-width=15", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            match = _LINE.match(line)
            if match is not None:
                text = match[3]
                start.append(int(match[1], 16))
                length.append(len(match[2]) // 3)
                target.append(_target(text))
                bad.append("(bad)" in text)
    assert process.returncode == 0
    columns = (np.frombuffer(a, dtype) for a, dtype in zip((start, length, target, bad), "qqq?", strict=True))
    return Listing(*columns)


def _target(text: str) -> int:
    found = _RIP.search(text) if "ip)" in text else _BRANCH.match(text)
    if found is None:
        return NOTHING
    value = int(found[1], 16)
    return value - (1 << 64) if value >= 1 << 63 else value
