"""Explanations of the distribution's own updates: redis-server, which is patched, and libssl, which is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from elfdiff.diff import Options, diff
from elfdiff.explain import ExplainedFunction, Explanation, explain, explain_pair
from elfdiff.images.image import Kind
from elfdiff.images.imagefile import load_image
from elfdiff.patches.evidence import EvidenceKind
from elfdiff.patches.patchfile import read_patch, write_patch
from fixtures.debian import Unpacked
from patcher.explanation.as_html import page
from patcher.explanation.words import sentences
from tests.conftest import Livegraft

pytestmark = [pytest.mark.apt]

SERVER = "usr/bin/redis-check-rdb"
REDIS = "5:7.0.15-1~deb12u7", "5:7.0.15-1~deb12u10"
LIBRARY = "usr/lib/x86_64-linux-gnu/libssl.so.3"
LIBSSL = "3.0.20-1~deb12u2", "3.0.22-1~deb12u2"

Version = Callable[[str, str], Unpacked]


@pytest.fixture(scope="module")
def redis(package_version: Version) -> tuple[Path, Path]:
    old, new = (package_version("redis-tools", version).file(SERVER) for version in REDIS)
    return old, new


@pytest.fixture(scope="module")
def explained(redis: tuple[Path, Path]) -> Explanation:
    return explain_pair(*redis, Options())


def about(explanation: Explanation, name: str) -> tuple[ExplainedFunction, str]:
    (item,) = [f for f in explanation.functions if f.function.name == name]
    return item, "\n".join(sentence for e in item.evidence for sentence in sentences(e, item.counts))


def test_redis_security_fixes_are_told_by_what_they_do(explained: Explanation) -> None:
    """Debian's patches: a terminator is checked in clusterProcessPacket, closed clients are skipped in
    tlsProcessPendingData, listpacks are freed in rdbLoadObject, readSyncBulkPayload gets a guard."""
    assert explained.verdict.name == "ok"
    assert "packet with missing null terminator in extension" in about(explained, "clusterProcessPacket")[1]
    assert "names now listDelNode" in about(explained, "tlsProcessPendingData")[1]
    assert "no longer names listRewind, listNext" in about(explained, "tlsProcessPendingData")[1]
    assert "names now lpFree" in about(explained, "rdbLoadObject")[1]
    assert "isInsideYieldingLongCommand" in about(explained, "readSyncBulkPayload")[1]


def test_redis_parts_and_build_id_are_told_apart_from_fixes(explained: Explanation) -> None:
    (part,) = [f for f in explained.functions if f.function.old_start is None]
    kinds = {e.kind: e.subject for e in part.evidence}
    assert kinds == {EvidenceKind.NEW: "readSyncBulkPayload", EvidenceKind.MOVED: "readSyncBulkPayload"}
    for name in ("redisBuildId", "redisBuildIdString"):
        item, said = about(explained, name)
        assert "it reads a string, which differs" in said
        assert item.counts is not None and item.counts.changed == item.counts.reference == 1
    assert len(explained.line_only) == 25


def test_redis_explanation_is_small_and_whole_in_the_patch(
    redis: tuple[Path, Path], explained: Explanation, livegraft: Livegraft, tmp_path: Path
) -> None:
    fix = tmp_path / "fix"
    written = write_patch(diff(*redis, Options()), fix)
    assert replace(explain(read_patch(fix)), id="") == explained
    code = sum(segment.size for segment in written.segments)
    assert len(written.evidence) + len(written.old_code) < 0.1 * code
    text = livegraft("inspect", fix, "--diff", "tlsProcessPendingData").stdout
    assert "call listRewind" in text and "call listDelNode" in text


def test_every_old_instruction_stands_where_the_old_build_has_it(
    redis: tuple[Path, Path], explained: Explanation
) -> None:
    image = load_image(redis[0])
    for item in explained.functions:
        if item.old is not None:
            assert image.kind_at(item.old.start) is Kind.TEXT
            assert image.read(item.old.start, len(item.old.code)) == item.old.code


def test_libssl_is_refused_and_says_why(package_version: Version) -> None:
    """Fields of SSL moved by 16 bytes: most changed functions differ in displacements alone."""
    old, new = (package_version("libssl3", version).file(LIBRARY) for version in LIBSSL)
    explained = explain_pair(old, new, Options())
    assert explained.verdict.name == "refused"
    assert "struct-layout" in {f.code for f in explained.findings}
    moved = [f for f in explained.functions if f.counts and f.counts.changed == f.counts.operand > 0]
    assert len(moved) >= 40
    inlined = [e for f in moved for e in f.evidence if e.kind is EvidenceKind.INLINED]
    assert not inlined, "a moved field is no inlined function"
    assert len(explained.line_only) >= 60
    text = page(explained, 3, "")
    assert all(finding.what.replace(">", "&gt;") in text for finding in explained.findings)
    assert all(item.function.name in text for item in explained.functions)
