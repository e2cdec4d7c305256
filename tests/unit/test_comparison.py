"""The comparison made in the pause: true only where every byte is as expected. This process stands for the target."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest

from patcher import seam
from patcher.process.memory import Comparison, Memory

TEXT = b"what was read while the plan was made"


@pytest.fixture
def memory() -> Iterator[Memory]:
    with Memory(os.getpid()) as opened:
        yield opened


def test_only_the_same_bytes_compare_equal(memory: Memory) -> None:
    held = ctypes.create_string_buffer(TEXT)
    start = ctypes.addressof(held)
    comparison = Comparison(memory, [(start, TEXT[:5]), (start + 20, TEXT[20:])])
    assert comparison.holds()
    held[22] = b"x"
    assert not comparison.holds()
    held[22] = TEXT[22:23]
    assert comparison.holds()
    held[10] = b"x"  # nobody asked
    assert comparison.holds()


def test_nothing_to_compare_is_equal(memory: Memory) -> None:
    assert Comparison(memory, []).holds()


def test_what_one_call_cannot_tell_is_not_said_to_be_equal(memory: Memory) -> None:
    held = ctypes.create_string_buffer(TEXT)
    start = ctypes.addressof(held)
    assert not Comparison(memory, [(start, TEXT), (16, b"\0")]).holds()  # not mapped
    assert not Comparison(memory, [(start, TEXT[:1])] * 2000).holds()  # above UIO_MAXIOV


def test_who_observes_the_seam_sees_the_reads_of_memory_instead(memory: Memory) -> None:
    held = ctypes.create_string_buffer(TEXT)
    comparison = Comparison(memory, [(ctypes.addressof(held), TEXT)])
    with seam.observe(lambda name, subject: 0):
        assert not comparison.holds()
