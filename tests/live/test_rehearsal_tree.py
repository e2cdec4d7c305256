"""A rehearsal of a daemon with several processes: all of its tree is patched and reverted, in all or in none."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.intact import altered_code
from fixtures.tracees import wait_until
from patcher.commands.rehearsalreport import json as as_json
from patcher.commands.rehearsalreport import junit, text
from patcher.rehearsal.file import read_rehearsal
from patcher.rehearsal.rehearsing import Outcome, rehearse
from patcher.targets.selection import By, Selection, list_processes, select_processes
from tests.conftest import ROOT
from tests.live.answering import CHANGED, versions
from tests.live.forking import SOURCE

pytestmark = pytest.mark.root

WORKERS = 3
Write = Callable[..., Path]

START = """
# A shell that stays the parent of the program; what the master says is asked for, and read, through two pipes.
mkfifo "$3/in" "$3/out"
echo $2 >"$3/count"
"$1" "$2" <>"$3/in" 1<>"$3/out" &
head -n 1 "$3/out"
wait
"""
ASK = """
# One more worker is forked, then the master and all workers are asked; each answer is printed once.
ask() { echo "$1" >"$2/in"; head -n 1 "$2/out"; }
count=$(cat "$1/count")
ask fork "$1" >/dev/null
echo $((count + 1)) >"$1/count"
for number in $(seq 0 $count); do ask "$number ask" "$1"; done >"$1/answers"
ask ask "$1" >>"$1/answers"
sort -u "$1/answers"
"""


@pytest.fixture
def write(cache_folder: Path, tmp_path: Path) -> Write:
    """``write(processes="tree", probe="ask.sh {folder}", more="")``: the file of a rehearsal of forking.c."""
    programs = versions(cache_folder / "forking", source=SOURCE, changed=CHANGED).programs
    for name, version in (("old", 1), ("new", 2)):
        shutil.copy(programs[version], tmp_path / name)
    (tmp_path / "start.sh").write_text(START)
    (tmp_path / "ask.sh").write_text(ASK)

    def write(processes: str = "tree", probe: str = "sh ask.sh {folder}", more: str = "") -> Path:
        path = tmp_path / "rehearsal.toml"
        path.write_text(f"""
cycles = 3
hold = 0
[build]
old = "old"
new = "new"
[patch]
processes = "{processes}"
{more}
[start]
command = ["sh", "start.sh", "{{old}}", "{WORKERS}", "{{folder}}"]
ready = {{ line = "^ready" }}
[[probe]]
name = "version"
command = ["sh", "-c", "{probe}"]
before = "1001"
after = "2002"
""")
        return path

    return write


def processes(outcome: Outcome, name: str) -> list[int]:
    return [len(step.processes) for step in outcome.steps if step.name == name]


def test_all_processes_are_patched_and_reverted_those_forked_meanwhile_too(write: Write) -> None:
    """Each question comes after a fork: of the old code, and of the new one, which the child has from its parent."""
    outcome = rehearse(read_rehearsal(write()))
    assert outcome.exit_code == 0 and outcome.cycles == 3, text(outcome)
    # The master and its workers, of which each round of questions brings one more.
    assert processes(outcome, "apply") == [WORKERS + 1 + number for number in (1, 3, 5)]
    assert processes(outcome, "revert") == [WORKERS + 1 + number for number in (2, 4, 6)]
    for name in ("apply", "revert"):
        for step in outcome.steps:
            if step.name == name:
                assert len(step.pauses_us) == len(step.processes) and all(pause > 0 for pause in step.pauses_us)
                assert len({item.pid for item in step.processes}) == len(step.processes)
    said = "\n".join(text(outcome))
    assert "3 times in 5 to 9 processes; pause " in said and "3 times in 6 to 10 processes; pause " in said
    body = as_json(outcome)
    assert body["pause_us"]["apply"]["processes"] == {"fewest": 5, "most": 9}
    assert body["pause_us"]["apply"]["count"] == 3
    (first, *_) = [step for step in body["steps"] if step["name"] == "apply"]
    assert first["pause_us"] == max(item["pause_us"] for item in first["processes"])
    assert b"<system-out>old, pid " in junit(outcome)


def test_one_process_is_all_that_is_patched_where_nothing_else_is_asked_for(write: Write) -> None:
    """The shell that was started is no process of the daemon."""
    outcome = rehearse(read_rehearsal(write(processes="one")))
    assert outcome.exit_code == 4
    assert any("a script must exec the daemon" in line for line in text(outcome))


def test_the_questions_notice_workers_that_were_left_out(write: Write, tmp_path: Path) -> None:
    start = START.replace('"$1" "$2" <>"$3/in" 1<>"$3/out" &\nhead -n 1 "$3/out"\nwait', 'exec "$1" "$2" <>"$3/in"')
    start = start.replace('exec "$1"', 'touch "$3/up"; exec 1<>"$3/out"; exec "$1"')
    (tmp_path / "start.sh").write_text(start)
    first = "test -e {folder}/begun || head -n 1 {folder}/out >{folder}/begun"
    path = write(processes="one", probe=f"{first}; sh ask.sh {{folder}}")
    path.write_text(path.read_text().replace('line = "^ready"', 'file = "{folder}/up"'))
    outcome = rehearse(read_rehearsal(path))
    assert outcome.error is not None and outcome.exit_code == 1, text(outcome)
    assert "got '1001\\n2002\\n'" in outcome.error.why, text(outcome)
    assert processes(outcome, "apply") == [1]


HOLD = "echo '1 hold' >{folder}/in; head -n 1 {folder}/out >/dev/null; echo 1001"


def test_one_that_stays_busy_fails_the_step_in_all(write: Write) -> None:
    outcome = rehearse(read_rehearsal(write(probe=HOLD, more="timeout = 0.2")))
    assert outcome.exit_code == 5, text(outcome)
    said = "\n".join(text(outcome))
    assert "of the daemon's processes: sh, pid " in said
    assert said.count(": rolled-back") == 2 and said.count(": failed") == 1 and said.count(": not-tried") == 1
    assert processes(outcome, "apply") == [0]


def test_a_program_that_is_nowhere_in_the_tree(write: Write, tmp_path: Path) -> None:
    (tmp_path / "start.sh").write_text("echo ready; sleep 1000 & wait")
    outcome = rehearse(read_rehearsal(write(probe="echo 1001")))
    assert outcome.exit_code == 4, text(outcome)
    assert any("sleep, pid " in line and "not-concerned" in line for line in text(outcome))


def test_a_signal_between_two_processes_ends_it(write: Write) -> None:
    """The master is patched, a worker is busy: the signal is heeded in the wait for it."""
    path = write(probe=HOLD, more="timeout = 60")
    command = [sys.executable, "-m", "patcher.cli", "rehearse", str(path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        tree = Selection(By.TREE, str(process.pid), several=True)

        def patched() -> bool:
            return any(one.name == "old" and altered_code(one.pid) for one in select_processes(tree))

        wait_until(patched, "a process of the daemon is patched")
        running = {item.key for item in select_processes(tree) if item.pid != process.pid}
        assert len(running) > WORKERS
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert json.loads(out)["error"]["what"] == "interrupted"
    assert not running & {item.key for item in list_processes(By.PID)}

