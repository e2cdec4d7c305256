"""Programs built twice from Debian's sources: the differ, which sees stripped files, against the object files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures import recipes
from fixtures.source import Built, Recipe, before_and_after
from tests.real.conftest import available
from tests.real.sources import SourcePair, judge_sources

pytestmark = [pytest.mark.apt, pytest.mark.slow]


@pytest.fixture(scope="session")
def source_pair(cache_folder: Path) -> Callable[[Recipe], tuple[Built, Built]]:
    """Both builds of a recipe; skips with the reason where they cannot be made."""
    return lambda recipe: available(before_and_after, recipe, cache_folder / "sources")


def check(pair: SourcePair) -> None:
    """What must hold of every pair: nothing is missed, and what is said beyond the truth is named."""
    assert not pair.missed
    assert not pair.unexplained
    assert pair.line_only <= pair.truth.line_only
    assert pair.added == pair.truth.added
    assert pair.removed == pair.truth.removed


def test_vsftpd(source_pair: Callable[[Recipe], tuple[Built, Built]]) -> None:
    """0070-realpath_wrapper.patch: one call in ls.c goes to a new function of sysutil.c."""
    pair = judge_sources(*source_pair(recipes.VSFTPD), "vsftpd")
    assert set(pair.truth.changed) == {"vsf_filename_passes_filter"}
    assert pair.truth.added == {"vsf_sysutil_realpath"}
    check(pair)
    assert not pair.timid
    assert pair.analysis.error is None
    assert pair.warnings.keys() == {"new-import"}
    assert {one.name for one in pair.analysis.patch().imports} == {"strndup", "strcpy", "strrchr"}


@pytest.mark.long
def test_memcached(source_pair: Callable[[Recipe], tuple[Built, Built]]) -> None:
    """0008-CVE-2026-47783-CVE-2026-47784.patch: how sasl_defs.c compares passwords."""
    pair = judge_sources(*source_pair(recipes.MEMCACHED), "memcached")
    assert set(pair.truth.changed) == {"sasl_defs.c:sasl_server_userdb_checkpass"}
    check(pair)
    assert not pair.timid
    assert pair.analysis.error is None
    assert pair.analysis.patch().findings == ()


@pytest.mark.long
def test_tor(source_pair: Callable[[Recipe], tuple[Built, Built]]) -> None:
    """TROVE-2026-022 in compress.c; two functions behind it differ in the numbers of their lines."""
    pair = judge_sources(*source_pair(recipes.TOR), "tor")
    assert set(pair.truth.changed) == {"compress.c:tor_compress_impl.constprop.0"}
    assert pair.truth.line_only == {"tor_compress_process", "tor_compress_state_size"}
    check(pair)
    assert pair.line_only == pair.truth.line_only
    assert pair.analysis.error is None
    assert pair.analysis.patch().findings == ()
