"""The numpy decoder against capstone on every instruction of real programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from elfdiff.code import load_code
from elfdiff.imagefile import load_image
from tests.decoderoracle import ByUs, all_by_capstone, disassembler
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
