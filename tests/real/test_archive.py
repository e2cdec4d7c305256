"""Updates as Debian published them: the verdict, and the set of changed functions, against the packages' sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from elfdiff.errors import Refused
from elfdiff.patchobject import Severity
from fixtures.debian import Unpacked
from tests.real.archive import PAIRS, Pair, judge, table

pytestmark = [pytest.mark.apt, pytest.mark.slow]

Fetch = Callable[[str, str], Unpacked]


def each_pair(failing: dict[str, str], only: Iterable[Pair] = PAIRS) -> pytest.MarkDecorator:
    """All pairs; those that do not hold yet are strict expected failures: name -> reason."""
    values = [
        pytest.param(
            pair,
            id=pair.name,
            marks=[pytest.mark.xfail(strict=True, reason=failing[pair.name], raises=AssertionError)]
            if pair.name in failing
            else [],
        )
        for pair in only
    ]
    return pytest.mark.parametrize("pair", values)


UNMATCHED = "only a table of functions names them, and they were rewritten: not paired with what they were"
BLAMED = "functions that hand out ASN.1 items and parameter tables, which lead to changed functions, count as changed"


@each_pair({})
def test_the_verdict(pair: Pair, package_version: Fetch) -> None:
    verdict = judge(pair, package_version)
    assert verdict.codes(Severity.REFUSE) >= pair.refusals
    error = verdict.analysis.error
    assert isinstance(error, Refused) if pair.refusals else error is None


@each_pair({})
def test_nothing_else_refuses(pair: Pair, package_version: Fetch) -> None:
    assert judge(pair, package_version).codes(Severity.REFUSE) - pair.refusals == set()


@each_pair({})
def test_what_the_sources_changed_is_in_the_patch(pair: Pair, package_version: Fetch) -> None:
    """A function that has no counterpart is replaced as well, by a new one that its callers call."""
    verdict, expected = judge(pair, package_version), table(pair.name)
    assert expected.changed
    assert expected.named(expected.changed - verdict.changed.keys() - verdict.removed) == []


@each_pair({"libcrypto-17-20": UNMATCHED, "libcrypto-20-22": UNMATCHED})
def test_every_changed_function_is_recognised_in_the_new_build(pair: Pair, package_version: Fetch) -> None:
    verdict, expected = judge(pair, package_version), table(pair.name)
    assert expected.named(expected.changed & verdict.removed) == []


@each_pair({"libcrypto-17-20": BLAMED}, [pair for pair in PAIRS if pair.complete])
def test_nothing_else_is_in_the_patch(pair: Pair, package_version: Fetch) -> None:
    """Functions that differ in line numbers only may be: to leave them out needs evidence that not all give."""
    verdict, expected = judge(pair, package_version), table(pair.name)
    explained = expected.changed | expected.lines | expected.other
    assert expected.named(frozenset(verdict.changed.keys() - explained)) == []


@each_pair({}, [pair for pair in PAIRS if pair.complete])
def test_what_is_left_out_differs_in_line_numbers_only(pair: Pair, package_version: Fetch) -> None:
    verdict, expected = judge(pair, package_version), table(pair.name)
    assert expected.lines
    assert expected.named(verdict.lines - expected.lines) == []
    assert verdict.lines, "the rule for line numbers found none of them"


def test_the_changed_objects_of_openssl_are_named(package_version: Fetch) -> None:
    """By size and by who allocates them. The debug information of builds of the sources says: ssl_st has 7608 bytes in
    3.0.20, dtls1_record_data_st 144 there and 96 in 3.0.22, without a member of 48. SSL_new of the published 3.0.22
    asks for 7624 (0x1dc8): the patch that made it grow is one that the archive does not serve."""
    verdict = judge(next(pair for pair in PAIRS if pair.name == "libssl-20-22"), package_version)
    said = {f.code: [g.what for g in verdict.analysis.findings if g.code == f.code] for f in verdict.analysis.findings}
    assert any("7608 -> 7624" in what and "144 -> 96" in what for what in said["allocation-size"])
    assert "SSL_new" in verdict.where("allocation-size")
    assert any("+16 bytes" in what for what in said["struct-layout"])
    assert any("-48 bytes" in what for what in said["struct-layout"])
    assert "SSL_has_pending" in verdict.where("struct-layout")
