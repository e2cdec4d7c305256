"""A refusal can be read and lifted, and what was lifted is shown by every command that has to do with the patch."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures.hearing import next_line
from tests.compile import Compiler
from tests.conftest import Livegraft
from tests.verdict import PRELUDE

pytestmark = pytest.mark.root

TEXT = (
    PRELUDE
    + """
enum state { VALUES };
static enum state state;
SEPARATE int answer(int x) { if (state == IDLE) puts("still idle"); return x * STEP + (state == BUSY); }
int main(void)
{
    char line[64];
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    while (fgets(line, sizeof line, stdin)) { state = IDLE; printf("%d\\n", answer(atoi(line))); }
    return 0;
}
"""
)


@pytest.fixture
def builds(cache_folder: Path) -> tuple[Path, Path]:
    compiled = Compiler(cache_folder / "compiled")
    old = TEXT.replace("VALUES", "IDLE, BUSY").replace("STEP", "3")
    new = TEXT.replace("VALUES", "IDLE, WAIT, BUSY").replace("STEP", "5")
    return compiled(old, "-g", stripped=False), compiled(new, "-g", stripped=False)


@pytest.fixture
def running(builds: tuple[Path, Path]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([builds[0]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        try:
            assert said(process) == "ready"
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    return next_line(process).strip()


def asked(process: subprocess.Popen[str], number: int) -> list[str]:
    assert process.stdin is not None
    process.stdin.write(f"{number}\n")
    return [said(process), said(process)]


def test_a_refusal_says_what_where_why_and_what_would_lift_it(
    builds: tuple[Path, Path], livegraft: Livegraft, tmp_path: Path
) -> None:
    done = livegraft("diff", *builds, "-o", tmp_path / "fix", status=4)
    assert (done.stdout, (tmp_path / "fix").exists()) == ("", False)
    lines = [line.strip() for line in done.stderr.splitlines()]
    at = next(k for k, line in enumerate(lines) if line.startswith("enum-values: enum state"))
    assert "BUSY: 1 -> 2" in lines[at]
    assert [line.split()[0] for line in lines[at + 1 : at + 4]] == ["where", "why", "lift"]
    assert "answer (main.c:" in lines[at + 1] and "--allow enum-values" in lines[at + 3]

    value = livegraft("diff", *builds, "-o", tmp_path / "fix", "--json", status=4).json
    assert (value["schema"], value["exit"]["name"]) == (1, "refused")
    (finding,) = value["error"]["findings"]
    assert finding["code"] == "enum-values" and finding["severity"] == "refuse" and not finding["lifted"]
    assert finding.keys() == {"code", "severity", "what", "where", "why", "lift", "lifted"}


def test_what_cannot_be_lifted_is_bad_input(builds: tuple[Path, Path], livegraft: Livegraft, tmp_path: Path) -> None:
    livegraft("diff", *builds, "-o", tmp_path / "fix", "--allow", "tls-layout", status=2)


def test_a_folder_of_debug_files_must_be_there(builds: tuple[Path, Path], livegraft: Livegraft, tmp_path: Path) -> None:
    livegraft("diff", *builds, "-o", tmp_path / "fix", "--debug-dir", tmp_path / "none", status=2)


def test_what_was_lifted_is_shown_by_every_command(
    builds: tuple[Path, Path], running: subprocess.Popen[str], livegraft: Livegraft, tmp_path: Path
) -> None:
    patch, pid = tmp_path / "fix", ("--pid", running.pid)
    made = livegraft("diff", *builds, "-o", patch, "--allow", "enum-values", "--json")
    for done in (made, livegraft("check", patch, *pid, "--json")):
        (finding,) = done.json["findings"]
        assert finding["code"] == "enum-values" and finding["lifted"] and finding["severity"] == "warn"
    assert "enum-values (lifted by --allow)" in livegraft("inspect", patch).stdout
    assert asked(running, 4) == ["still idle", "12"]

    assert "enum-values, by --allow" in livegraft("apply", patch, *pid).stdout
    assert asked(running, 4) == ["still idle", "20"]
    (carried,) = livegraft("status", *pid, "--json").json["patches"]
    assert carried["lifted"] == ["enum-values"]
    livegraft("revert", *pid)
    assert asked(running, 4) == ["still idle", "12"]
