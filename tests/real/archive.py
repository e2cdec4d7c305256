"""Published pairs: what is expected of them, read from the sources of both versions, never from our own output.

A table (``expected/NAME.txt``) names functions of the older published build by address, which never changes:

    ADDRESS KIND FUNCTION SOURCE

``changed``: the sources' object files differ there, and SOURCE says through which patch or file; ``lines``: they differ
in line numbers only; ``other``: it differs for a reason that the sources do not show, which SOURCE gives;
``removed``, ``added``: it is in one of the two only. ``establish.py`` writes the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from elfdiff.diff import Analysis, Options, analyse
from elfdiff.patchobject import Reason, Severity
from fixtures.debian import Unpacked

TABLES = Path(__file__).parent / "expected"


LIBSSL = "usr/lib/x86_64-linux-gnu/libssl.so.3"
LIBCRYPTO = "usr/lib/x86_64-linux-gnu/libcrypto.so.3"


@dataclass(frozen=True)
class Pair:
    """``refusals``: codes of the findings for which it must be refused; none: a patch must come of it.

    ``complete``: the table knows all of it. Where the archive does not serve the sources of the newer version, the
    table has what is known to have changed, and what is in the patch beyond that is not judged.
    """

    name: str
    package: str
    old: str
    new: str
    path: str
    refusals: frozenset[str] = frozenset()
    complete: bool = True


PAIRS = (
    Pair("sshd-u7-u9", "openssh-server", "1:9.2p1-2+deb12u7", "1:9.2p1-2+deb12u9", "usr/sbin/sshd"),
    Pair("sshd-u9-u10", "openssh-server", "1:9.2p1-2+deb12u9", "1:9.2p1-2+deb12u10", "usr/sbin/sshd"),
    Pair("libssl-17-20", "libssl3", "3.0.17-1~deb12u2", "3.0.20-1~deb12u2", LIBSSL),
    # dtls1_record_data_st lost a member (144 -> 96 bytes) and the object of a connection grew (7608 -> 7624): DTLS
    # records that are waiting, and connections that are open, have the old layout. Another handler is in a table.
    Pair("libssl-20-22", "libssl3", "3.0.20-1~deb12u2", "3.0.22-1~deb12u2", LIBSSL,
         frozenset({"struct-layout", "allocation-size"}), complete=False),
    # x509_store_lookup has other methods, which keep something else in the lookups that exist (by_store.c), and
    # by_store_subject_ex, to which it pointed, is gone.
    Pair("libcrypto-17-20", "libssl3", "3.0.17-1~deb12u2", "3.0.20-1~deb12u2", LIBCRYPTO,
         frozenset({"initial-value", "kept-function"})),
    # One function was update and cipher of ChaCha20-Poly1305 and is two now: contexts that exist hold its address.
    Pair("libcrypto-20-22", "libssl3", "3.0.20-1~deb12u2", "3.0.22-1~deb12u2", LIBCRYPTO,
         frozenset({"kept-function"}), complete=False),
    # RESPONSE_CODES grew: arrays of that many entries exist in the running program, indexed by the old numbers.
    Pair("apache2", "apache2-bin", "2.4.68-1~deb12u1", "2.4.71-1~deb12u1", "usr/sbin/apache2",
         frozenset({"allocation-size"}), complete=False),
    # Nodes of plans and steps of expressions have other fields (execnodes.h, execExpr.h), the interpreter of
    # expressions jumps through labels that live steps hold, the tables of settings and fmgr_builtins have more rows.
    Pair("postgres", "postgresql-15", "15.18-0+deb12u1", "15.20-0+deb12u1", "usr/lib/postgresql/15/bin/postgres",
         frozenset({"struct-layout", "allocation-size", "label-table", "initial-value", "exported-symbol"}),
         complete=False),
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Functions of the older build by address; ``reasons`` has the rest of the row."""

    changed: frozenset[int]
    lines: frozenset[int]
    other: frozenset[int]
    removed: frozenset[int]
    added: int
    reasons: dict[int, str] = field(repr=False)

    def named(self, addresses: frozenset[int]) -> list[str]:
        """For people: address, name and reason."""
        return [f"{address:#x} {self.reasons.get(address, '')}".rstrip() for address in sorted(addresses)]


@dataclass(frozen=True)
class Verdict:
    """What the differ says of a published pair. Functions by their address in the older build."""

    analysis: Analysis
    changed: dict[int, Reason]  # line numbers apart
    lines: frozenset[int]
    removed: frozenset[int]

    def codes(self, severity: Severity) -> frozenset[str]:
        """Codes of the findings that refuse, or that warn."""
        return frozenset(f.code for f in self.analysis.findings if f.severity is severity)

    def where(self, code: str) -> set[str]:
        """All places that findings of a code name."""
        return {place for f in self.analysis.findings if f.code == code for place in f.where}


@cache
def table(name: str) -> Table:
    """Read a table; ``#`` begins a comment."""
    rows = [line.split(maxsplit=2) for line in (TABLES / f"{name}.txt").read_text().splitlines() if line[:1] not in "#"]
    known = {"changed", "lines", "other", "removed", "added"}
    assert {row[1] for row in rows} <= known, f"{name}: {({row[1] for row in rows} - known)}"

    def of(kind: str) -> frozenset[int]:
        return frozenset(int(row[0], 0) for row in rows if row[1] == kind)

    reasons = {int(row[0], 0): row[2] for row in rows if row[1] != "added"}
    added = sum(row[1] == "added" for row in rows)
    return Table(of("changed"), of("lines"), of("other"), of("removed"), added, reasons)


def judge(pair: Pair, package_version: Callable[[str, str], Unpacked]) -> Verdict:
    """Compare both published files, once in a session."""
    old, new = (package_version(pair.package, version).file(pair.path) for version in (pair.old, pair.new))
    return _judge(old, new)


@cache
def _judge(old_path: Path, new_path: Path) -> Verdict:
    analysis = analyse(old_path, new_path, Options())
    assert analysis.draft is not None
    comparison = analysis.draft.comparison
    changed = {comparison.old_entry(j): reason for j, reason in comparison.changed.items()}
    return Verdict(
        analysis,
        {start: reason for start, reason in changed.items() if start is not None and reason is not Reason.LINES},
        frozenset(int(comparison.old.starts[i]) for i, _ in comparison.line_only),
        frozenset(int(comparison.old.starts[i]) for i in comparison.removed),
    )
