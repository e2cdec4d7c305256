"""The rehearsals of examples/, as a maintainer would run them; only the builds are ours, and the cycles are fewer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fixtures import recipes
from fixtures.debian import Unpacked, library_path
from fixtures.source import Built, Recipe
from tests.conftest import ROOT, Livegraft
from tests.real.rows import HEAD, Row
from tests.real.test_redis import NEW_VERSION, OLD_VERSION, PROGRAM

pytestmark = [pytest.mark.apt, pytest.mark.root]

CYCLES = 3
PATIENCE = 120  # seconds
Pair = Callable[[Recipe], tuple[Built, Built]]
PLAIN = "/usr/lib/x86_64-linux-gnu/sasl2/libplain.so"


def rehearsed(name: str, pair: Sequence[Path], livegraft: Livegraft, folder: Path) -> dict[str, Any]:
    """The example passes; what it says. ``pair``: both builds, or the folders in which they are."""
    example, report = folder / name, folder / "report.xml"
    shutil.copytree(ROOT / "examples" / name, example)
    for label, build in zip(("old", "new"), pair, strict=True):
        if build.is_dir():
            (example / label).symlink_to(build)
        else:
            (example / label).mkdir()
            shutil.copy(build, example / label / build.name)
    file = example / "rehearsal.toml"
    assert "\ncycles = 10\nhold = 0.5 " in file.read_text()
    text = file.read_text().replace("cycles = 10\nhold = 0.5 ", f"cycles = {CYCLES}\nhold = 0.2 ")
    for table in ("[start]", "[load]", "[[probe]]"):  # tests may run on a machine that is busy with others
        text = text.replace(f"{table}\n", f"{table}\ntimeout = {PATIENCE}\n")
    file.write_text(text)
    said = livegraft("rehearse", file, "--json", "--junit", report).json
    assert said["verdict"] == "passed" and said["cycles"] == {"asked": CYCLES, "made": CYCLES}
    assert said["load"]["requests"] > 0 and said["load"]["failed"] == 0
    suite = ElementTree.parse(report).getroot()[0]
    assert suite.attrib["failures"] == "0" and suite.attrib["tests"] == str(len(said["steps"]))
    return said


def stripped(pair: tuple[Built, Built], name: str) -> list[Path]:
    return [build.stripped(name) for build in pair]


def row(daemon: str, pair: str, said: dict[str, Any]) -> str:
    """The row of docs/daemons.md. The load says only how long the longest of all requests took."""
    applied = [step["processes"] for step in said["steps"] if step["name"] in ("apply", "revert")]
    pauses = [item["pause_us"] for each in applied for item in each if item["pause_us"] is not None]
    load = said["load"]
    longest = round(load["longest_ms"] * 1000)
    counts = [len(each) for each in applied]
    summary = said["patch"]["summary"]
    return str(Row(daemon, pair, [summary], counts, pauses, load["requests"], load["failed"], None, longest))


def test_vsftpd(source_pair: Pair, livegraft: Livegraft, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    said = rehearsed("vsftpd", stripped(source_pair(recipes.VSFTPD), "vsftpd"), livegraft, tmp_path)
    assert said["pause_us"]["apply"]["processes"]["fewest"] > 2, "sessions are patched, too"


def test_vsftpd_does_not_pass_with_the_builds_exchanged(
    source_pair: Pair, livegraft: Livegraft, tmp_path: Path
) -> None:
    """The probes can tell."""
    with pytest.raises(AssertionError, match="a file that deny_file names: not the answer that is expected before"):
        old, new = stripped(source_pair(recipes.VSFTPD), "vsftpd")
        rehearsed("vsftpd", (new, old), livegraft, tmp_path)


@pytest.mark.skipif(not Path(PLAIN).exists(), reason="libsasl2-modules is not installed: no logins by password")
def test_memcached(source_pair: Pair, livegraft: Livegraft, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fix of CVE-2026-47784 reads the whole file of passwords, which a user with two lines in it can see."""
    said = rehearsed("memcached", stripped(source_pair(recipes.MEMCACHED), "memcached"), livegraft, tmp_path)
    with capsys.disabled():
        print(f"\n{HEAD}\n{row('memcached', '1.6.18-1+deb12u1: without CVE-2026-47783 and -47784 -> with', said)}")


def test_redis(
    package_version: Callable[[str, str], Unpacked],
    livegraft: Livegraft,
    cache_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the archive has it; master, replica, and what they fork are patched."""
    packages = [package_version("redis-tools", version) for version in (OLD_VERSION, NEW_VERSION)]
    pair = [package.file(PROGRAM) for package in packages]
    monkeypatch.setenv("LD_LIBRARY_PATH", library_path(pair[0], packages[0], cache_folder / "packages"))
    said = rehearsed("redis", pair, livegraft, tmp_path)
    assert said["pause_us"]["apply"]["processes"] == {"fewest": 2, "most": 2}


@pytest.mark.long
def test_apache(
    package_version: Callable[[str, str], Unpacked],
    livegraft: Livegraft,
    cache_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One module, in the parent and all workers."""
    tmp_path.chmod(0o755)
    packages = [package_version("apache2-bin", version) for version in ("2.4.68-1~deb12u1", "2.4.71-1~deb12u1")]
    libraries = library_path(packages[0].file("usr/sbin/apache2"), packages[0], cache_folder / "packages")
    monkeypatch.setenv("LD_LIBRARY_PATH", libraries)
    said = rehearsed("apache2", [package.root for package in packages], livegraft, tmp_path)
    assert said["pause_us"]["apply"]["processes"]["fewest"] > 2
