"""Programs built twice from Debian's sources: the differ, which sees stripped files, against the object files."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elfdiff.errors import NothingToPatch
from fixtures import recipes
from fixtures.source import Built, Recipe
from tests.real.sources import SourcePair, judge_sources

pytestmark = [pytest.mark.apt, pytest.mark.slow]


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


XREFS = (
    "every log call has an object of its own, and its address in an array that start-up code walks; three new ones "
    "shift the array, and what unchanged functions point to counts as unknown or as another value"
)


@pytest.mark.long
def test_ospfd(source_pair: Callable[[Recipe], tuple[Built, Built]]) -> None:
    """CVE-2025-61099_61107.patch: three functions of ospf_ext.c. The library that all daemons share is the same."""
    pair = judge_sources(*source_pair(recipes.FRR), "ospfd")
    assert set(pair.truth.changed) == {
        "ospf_ext.c:ospf_ext_link_show_info",
        "ospf_ext.c:ospf_ext_pref_show_info",
        "ospf_ext.c:show_vty_unknown_tlv",
    }
    assert not pair.missed
    assert not pair.removed
    assert pair.changed.keys() >= pair.truth.changed.keys()


@pytest.mark.long
@pytest.mark.xfail(strict=True, raises=AssertionError, reason=XREFS)
def test_ospfd_needs_no_refusal(source_pair: Callable[[Recipe], tuple[Built, Built]]) -> None:
    assert not judge_sources(*source_pair(recipes.FRR), "ospfd").refusals


@pytest.mark.long
@pytest.mark.xfail(strict=True, raises=AssertionError, reason=XREFS)
def test_ospfd_has_no_more_than_changed(source_pair: Callable[[Recipe], tuple[Built, Built]]) -> None:
    assert not judge_sources(*source_pair(recipes.FRR), "ospfd").unexplained


@pytest.mark.long
def test_the_library_of_frr_is_the_same(source_pair: Callable[[Recipe], tuple[Built, Built]]) -> None:
    pair = judge_sources(*source_pair(recipes.FRR), "libfrr.so.0")
    assert not pair.truth.changed
    assert isinstance(pair.analysis.error, NothingToPatch)
