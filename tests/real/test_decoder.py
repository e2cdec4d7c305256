"""The numpy decoder against capstone and against objdump on every instruction of real programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from elfdiff.decoding.code import Code, load_code
from elfdiff.images.imagefile import load_image
from tests.decoderoracle import ByUs, all_by_capstone, disassembler
from tests.objdumporacle import NOTHING, listing
from tests.real.conftest import Pair

pytestmark = pytest.mark.slow

MAX_SHOWN = 10


def differences(path: Path) -> tuple[int, list[str]]:
    """Instructions compared, and those that are read otherwise."""
    code = load_code(load_image(path))
    ours, capstone = ByUs(code.raw.tobytes()), disassembler()
    compared, found = 0, []
    for function in range(len(code)):
        if not code.has_unwind[function]:
            continue
        low, raw = int(code.starts[function]) - code.base, code.raw_bytes(function)
        end = 0
        for offset, theirs in all_by_capstone(capstone, raw):
            compared, end = compared + 1, offset + theirs.length
            if ours.reading(low + offset) != theirs or not ours.valid(low + offset):
                found.append(
                    f"{code.starts[function] + offset:#x} {raw[offset:end].hex()}: {ours.reading(low + offset)}"
                )
        if end != len(raw) and code.sound[function]:
            found.append(
                f"{code.starts[function] + end:#x} {raw[end : end + 15].hex()}: capstone knows no such instruction"
            )
    return compared, found


def test_the_c_library() -> None:
    with open("/proc/self/maps") as maps:
        path = next((line.split()[-1] for line in maps if "libc.so.6" in line), None)
    if path is None:
        pytest.skip("this Python runs on no libc.so.6")
    compared, found = differences(Path(path))
    assert compared > 200_000
    assert not found[:MAX_SHOWN]


@pytest.mark.apt
def test_redis(package_pair: Callable[[str], Pair]) -> None:
    compared, found = differences(package_pair("redis-tools")[1].file("usr/bin/redis-check-rdb"))
    assert compared > 200_000
    assert not found[:MAX_SHOWN]


@dataclass(frozen=True)
class Against:
    """What two readings of a program have in common. ``odd`` are places in functions where they differ."""

    instructions: int
    references: int
    odd: list[str]
    out_of_step: int  # functions that objdump enters in the middle of an instruction: data lies before them
    beyond: int  # bytes of code that no FDE covers: data among code, hand-written code, padding


def against_objdump(path: Path) -> Against:
    """Every instruction boundary and every target, in all functions with unwind information.

    objdump reads on from the start of a section, or of an exported function; where data lies among code it comes
    out of it in the middle of an instruction. Such a function is compared from where both meet.
    """
    code, theirs = load_code(load_image(path)), listing(path)
    ours = {name: getattr(theirs, name)[_of_interest(code, theirs.start)] for name in ("start", "length", "target")}
    boundaries = np.nonzero(code.is_start)[0] + code.base
    boundaries = boundaries[_of_interest(code, boundaries)]
    common = np.intersect1d(ours["start"], boundaries)
    apart = np.setxor1d(ours["start"], boundaries)
    owners = code.function_at(apart)
    first_common = {int(f): int(a) for a, f in zip(common[::-1], code.function_at(common)[::-1], strict=True)}
    late = {f for f in np.unique(owners).tolist() if first_common.get(f, 1 << 62) > int(code.starts[f])}
    odd = [
        f"{a:#x}: a boundary of one reading only" for a, f in zip(apart.tolist(), owners.tolist(), strict=True)
        if f not in late or a >= first_common.get(f, 1 << 62)
    ]  # fmt: skip
    rows = np.isin(ours["start"], common)
    start, length, target = (ours[name][rows] for name in ("start", "length", "target"))
    decoded_lengths = code.decoded.length[start - code.base]
    meant = _targets(code, start)
    odd += [
        f"{a:#x}: {n} bytes to {t:#x}, read as {m} to {u:#x}"
        for a, n, t, m, u in zip(start.tolist(), length.tolist(), target.tolist(), decoded_lengths.tolist(),
                                 meant.tolist(), strict=True)
        if n != m or t != u
    ]  # fmt: skip
    covered = int((code.ends - code.starts)[code.has_unwind].sum())
    return Against(len(start), int((target != NOTHING).sum()), odd, len(late), len(code.raw) - covered)


def _of_interest(code: Code, addresses: NDArray[np.int64]) -> NDArray[np.bool_]:
    function = code.function_at(addresses)
    inside: NDArray[np.bool_] = (function >= 0) & code.has_unwind[np.clip(function, 0, None)]
    return inside


def _targets(code: Code, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """What each instruction's reference leads to, by ``code.references``; NOTHING where it has none."""
    relative = code.references.kind <= 5  # absolute fields are no references to objdump
    found = np.full(len(starts), NOTHING)
    rows = np.searchsorted(starts, code.references.instruction[relative])
    inside = rows < len(starts)
    inside[inside] = starts[rows[inside]] == code.references.instruction[relative][inside]
    found[rows[inside]] = code.references.target[relative][inside]
    return found


def as_objdump_reads_it(path: Path, instructions: int, out_of_step: int, beyond: float) -> None:
    """At least so many instructions; at most so many functions behind data, and such a share of code without FDE."""
    result = against_objdump(path)
    print(path.name, result.instructions, result.references, result.out_of_step, result.beyond)
    assert result.odd[:MAX_SHOWN] == []
    assert result.instructions > instructions
    assert result.references > instructions // 8
    assert result.out_of_step <= out_of_step
    assert result.beyond <= beyond * load_image(path).high


@pytest.mark.apt
def test_redis_as_objdump_reads_it(package_pair: Callable[[str], Pair]) -> None:
    as_objdump_reads_it(package_pair("redis-tools")[1].file("usr/bin/redis-check-rdb"), 200_000, 0, 0.03)


@pytest.mark.apt
@pytest.mark.long
@pytest.mark.parametrize(
    ("package", "path", "instructions", "out_of_step", "beyond"),
    [
        ("libssl3", "usr/lib/x86_64-linux-gnu/libcrypto.so.3", 500_000, 30, 0.1),
        ("libssl3", "usr/lib/x86_64-linux-gnu/libssl.so.3", 60_000, 0, 0.05),
        ("postgresql-15", "usr/lib/postgresql/15/bin/postgres", 1_000_000, 0, 0.03),
    ],
)
def test_large_programs_as_objdump_reads_them(
    package: str,
    path: str,
    instructions: int,
    out_of_step: int,
    beyond: float,
    package_pair: Callable[[str], Pair],
) -> None:
    as_objdump_reads_it(package_pair(package)[1].file(path), instructions, out_of_step, beyond)


@pytest.mark.apt
@pytest.mark.long
@pytest.mark.parametrize(
    ("package", "path", "instructions"),
    [
        ("libssl3", "usr/lib/x86_64-linux-gnu/libcrypto.so.3", 500_000),
        ("postgresql-15", "usr/lib/postgresql/15/bin/postgres", 1_000_000),
    ],
)
def test_large_programs(
    package: str, path: str, instructions: int, package_pair: Callable[[str], Pair]
) -> None:
    compared, found = differences(package_pair(package)[1].file(path))
    assert compared > instructions
    assert not found[:MAX_SHOWN]
