"""livegraft rehearse: kv is started, loaded, patched, probed and reverted; each thing that can fail, fails once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fixtures.tracees import wait_until
from patcher import seam
from patcher.commands.rehearsalreport import junit, text
from patcher.rehearsal.file import read_rehearsal
from patcher.rehearsal.rehearsing import Outcome, rehearse
from tests.compile import Compiler
from tests.conftest import ROOT, Livegraft
from tests.live.grafting import library_pair

pytestmark = pytest.mark.root

Kv = Callable[..., Path]
Write = Callable[..., Path]

START = """
[start]
command = ["{old}", "0", "4"]
ready = { line = '^ready (?P<port>\\d+)' }
"""
LOAD = f"""
[load]
command = ["{sys.executable}", "-m", "fixtures.load", "{{port}}", "--rate", "300"]
environment = {{ PYTHONPATH = "{ROOT}" }}
report = ['"served": (?P<requests>\\d+), "failed": (?P<failed>\\d+)', '"longest_us": (?P<longest_ms>\\d+)']
"""
VERSION = """
[[probe]]
name = "version"
send = "VERSION\\n"
before = "+kv 1.0"
after = { regex = '^\\+kv 1\\.1 ' }
"""
APPEND = """
[[probe]]
name = "append"
send = "SET probe ab\\nAPPEND probe cd\\nGET probe\\nDEL probe\\n"
expect = '(.*\\n){4}'
before = { regex = '^\\$abc$' }
after = { regex = '^\\$abcd$' }
"""


@pytest.fixture
def write(kv: Kv, tmp_path: Path) -> Write:
    """``write(*parts, old=1, new=2, top="cycles = 1")``: the file of a rehearsal of two versions of kv."""

    def write(*parts: str, old: int = 1, new: int = 2, top: str = "cycles = 1\nhold = 0.05") -> Path:
        for name, version in (("old", old), ("new", new)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "kv").unlink(missing_ok=True)
            (tmp_path / name / "kv").symlink_to(kv(version))
        path = tmp_path / "rehearsal.toml"
        path.write_text(f'{top}\n[build]\nold = "old/kv"\nnew = "new/kv"\n' + "".join(parts))
        return path

    return write


def fails(path: Path, step: str, code: int = 1) -> str:
    """The rehearsal fails, in this step; all that is said of it."""
    outcome = rehearse(read_rehearsal(path))
    assert outcome.exit_code == code, text(outcome)
    failed = [one for one in outcome.steps if one.error is not None]
    assert failed[0].name == step, text(outcome)
    require_counts(outcome)
    return "\n".join(text(outcome))


def require_counts(outcome: Outcome) -> None:
    """Its JUnit XML has a case for each step, each of them once, and as many failures as there are."""
    root = ElementTree.fromstring(junit(outcome))
    (suite,) = root.findall("testsuite")
    cases = suite.findall("testcase")
    failures = sum(step.error is not None for step in outcome.steps)
    assert root.tag == "testsuites"
    for element in (root, suite):
        assert element.attrib["tests"] == str(len(cases)) == str(len(outcome.steps))
        assert element.attrib["failures"] == str(failures) == str(len(suite.findall("testcase/failure")))
    assert len({(case.attrib["classname"], case.attrib["name"]) for case in cases}) == len(cases)
    for case, step in zip(cases, outcome.steps, strict=True):
        failure = case.find("failure")
        assert (failure is None) == (step.error is None)
        if failure is not None and step.error is not None:
            assert failure.attrib["type"] == step.error.code
            assert step.error.what in failure.attrib["message"] and step.error.next_step in (failure.text or "")


def test_kv_is_rehearsed(write: Write) -> None:
    outcome = rehearse(read_rehearsal(write(START, LOAD, VERSION, APPEND, top="cycles = 3\nhold = 0.2")))
    assert outcome.exit_code == 0 and outcome.verdict == "passed", text(outcome)
    assert outcome.cycles == 3
    around = ["diff", "start", "load"], ["load at the end", "daemon at the end"]
    probes = {state: [f"probe {name} ({state})" for name in ("version", "append")] for state in ("before", "after")}
    cycle = ["apply", *probes["after"], "hold (after)", "revert", *probes["before"], "hold (before)"]
    assert [step.name for step in outcome.steps] == [*around[0], *probes["before"], *cycle * 3, *around[1]]
    assert [step.cycle for step in outcome.steps] == [0] * 5 + [1] * 8 + [2] * 8 + [3] * 8 + [0] * 2
    for name in ("apply", "revert"):
        pauses = outcome.pauses(name)
        assert pauses is not None and pauses.count == 3 and 0 < pauses.median_us <= pauses.largest_us
    figures = outcome.figures
    assert figures.requests and figures.failed == 0 and figures.longest_ms
    require_counts(outcome)
    said = "\n".join(text(outcome))
    assert "passed, 3 of 3 cycles" in said and f"{figures.requests} requests, 0 failed, the longest" in said


def test_the_command_says_it_in_every_way(write: Write, livegraft: Livegraft, tmp_path: Path) -> None:
    path, report = write(START, VERSION), tmp_path / "report.xml"
    assert livegraft("rehearse", path).stdout.startswith("kv: passed, 1 of 1 cycle\n")
    body = livegraft("rehearse", path, "--json", "--junit", report).json
    assert body["schema"] == 1 and body["exit"] == {"code": 0, "name": "ok"} and body["verdict"] == "passed"
    assert body["cycles"] == {"asked": 1, "made": 1} and body["load"] is None and "error" not in body
    assert body["pause_us"]["apply"]["count"] == 1 and body["patch"]["summary"]["functions"] > 0
    assert all(step["error"] is None for step in body["steps"])
    suite = ElementTree.parse(report).getroot()[0]
    assert suite.attrib["tests"] == str(len(body["steps"])) and suite.attrib["failures"] == "0"


def test_a_wrong_answer_is_shown_with_the_right_one(write: Write, livegraft: Livegraft) -> None:
    path = write(START, LOAD, VERSION.replace("1\\.1", "2\\.0"), APPEND)
    said = fails(path, "probe version (after)")
    assert "expected a match of '^\\\\+kv 2\\\\.0 ', got '+kv 1.1 with the APPEND fix\\n'" in said
    assert "0 of 1 cycle" in said and "probe append (after)" not in said, "the others are asked, too"
    error = livegraft("rehearse", path, "--json", status=1).json["error"]
    assert error["what"] == "probe version: not the answer that is expected after the patch"
    assert "got '+kv 1.0\\n'" in fails(write(START, VERSION.replace("kv 1.0", "kv 9")), "probe version (before)")


def test_a_daemon_that_dies(write: Write) -> None:
    until_dead = "until grep -q Z /proc/{pid}/status && [ $(ls /proc/{pid}/task | wc -l) = 1 ]; do :; done"
    command = f'command = ["sh", "-c", "echo +kv 1.0; kill -SEGV {{pid}}; {until_dead}"]'
    said = fails(write(START, LOAD, VERSION.replace('send = "VERSION\\n"', command)), "probe version (before)")
    assert "the daemon ended early" in said and "why: it was ended by SIGSEGV" in said


def test_a_daemon_that_dies_while_it_is_patched(write: Write) -> None:
    """We are its parent and its tracer, and it dies once."""
    killed: list[int] = []

    def observer(name: str, subject: int) -> int:
        if name == "INTERRUPT" and not killed:
            killed.append(subject)
            os.kill(subject, signal.SIGSEGV)
        return 0

    with seam.observe(observer):
        said = fails(write(START, LOAD, VERSION), "apply")
    assert killed and "the daemon ended early" in said and "why: it was ended by SIGSEGV" in said


LOADS = {
    "ends at once": ("echo broken; exit 3", "load", ("ended early", "exit status 3", "the load said: broken")),
    "ends with 0": ("exit 0", "load", ("the load ended early", "until it gets SIGTERM")),
    "fails at the end": ("trap 'exit 5' TERM; echo up; sleep 1000 & wait", "load at the end", ("exit status 5",)),
    "says nothing": ("trap 'exit 0' TERM; echo up; sleep 1000 & wait", "load at the end", ("does not say how it ",)),
    "says failures": (
        "trap 'echo 7 asked, 2 failed; exit 0' TERM; echo up; sleep 1000 & wait", "load at the end",
        ("2 requests of the load failed", "the load said: 7 asked, 2 failed"),
    ),
    "served nothing": (
        "trap 'echo 0 asked, 0 failed; exit 0' TERM; echo up; sleep 1000 & wait", "load at the end",
        ("the load served no request",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOADS)
def test_a_load_that_fails(kind: str, write: Write, tmp_path: Path) -> None:
    script, step, said = LOADS[kind]
    (tmp_path / "load.sh").write_text(script)
    load = """
[load]
command = ["sh", "load.sh"]
ready = { line = "^up$" }
report = ['(?P<requests>\\d+) asked, (?P<failed>\\d+) failed']
"""
    told = fails(write(START, load, VERSION, top="cycles = 1\nhold = 0"), step)
    assert all(part in told for part in said), told


def test_a_load_that_ends_in_between(write: Write) -> None:
    """It is noticed while a state is held."""
    load = """
[load]
command = ["sh", "-c", "echo up; read line < {folder}/fifo; exit 4"]
ready = { line = "^up$" }
"""
    start = START.replace('"{old}", "0", "4"', '"sh", "-c", "mkfifo {folder}/fifo; exec {old} 0 4"')
    ends = VERSION.replace('send = "VERSION\\n"', 'command = ["sh", "-c", "echo x > {folder}/fifo"]')
    ends = ends.replace('"+kv 1.0"', '""')
    assert "the load ended early" in fails(write(start, load, ends), "probe version (before)")


STARTS = {
    "no such line": ("{ line = 'started' }", "no line of its output has a match of 'started'"),
    "no such file": ("{ file = '{folder}/pid' }", "there is no "),
    "no such port": ("{ port = '{port}' }", "nobody accepts connections at port "),
}


@pytest.mark.parametrize("kind", STARTS)
def test_a_daemon_that_never_becomes_ready(kind: str, write: Write) -> None:
    ready, why = STARTS[kind]
    start = f'\n[start]\ncommand = ["{{old}}", "0", "4"]\nready = {ready}\ntimeout = 0.3\n'
    said = fails(write(start, VERSION), "start")
    assert "the daemon was not ready within 0.3 seconds" in said and why in said and "the daemon said: ready " in said


@pytest.mark.parametrize("ready", ["{ port = '{port}' }", "{ file = '{folder}/up' }"])
def test_other_signs_of_being_ready(ready: str, write: Write) -> None:
    script = "touch {folder}/up; exec {old} {port} 4"
    start = f'\n[start]\ncommand = ["sh", "-c", "{script}"]\nready = {ready}\n'
    probe = VERSION if "port" in ready else VERSION.replace("VERSION\\n", "").replace("send", "timeout = 0.2\nsend")
    outcome = rehearse(read_rehearsal(write(start, probe)))
    first = next(step for step in outcome.steps if step.name == "start")
    assert first.error is None, text(outcome)


def test_a_daemon_that_does_not_start(write: Write) -> None:
    said = fails(write(START.replace('"0", "4"', '"no port"'), VERSION), "start")
    assert "the daemon ended early" in said and "'no port' is not a number" in said
    assert "cannot be started" in fails(write(START.replace('"{old}"', '"gone"'), VERSION), "start", code=2)


def test_a_script_that_does_not_become_the_daemon(write: Write) -> None:
    start = START.replace('"{old}", "0", "4"', '"sh", "-c", "{old} 0 4; true"')
    outcome = rehearse(read_rehearsal(write(start, VERSION)))
    assert outcome.exit_code in (2, 4)
    assert any("a script must exec the daemon" in line for line in text(outcome))


def test_a_refused_pair(write: Write, livegraft: Livegraft, tmp_path: Path) -> None:
    path, report = write(START, LOAD, VERSION, old=3, new=4), tmp_path / "report.xml"
    assert "struct-layout" in fails(path, "diff", code=4)
    body = livegraft("rehearse", path, "--json", "--junit", report, status=4).json
    assert body["verdict"] == "refused" and body["patch"] is None
    assert body["error"]["findings"][0]["code"] == "struct-layout"
    (failure,) = ElementTree.parse(report).getroot().iter("failure")
    assert failure.attrib["type"] == "refused" and "struct-layout" in (failure.text or "")


def test_nothing_to_patch(write: Write, livegraft: Livegraft) -> None:
    path = write(START, VERSION, new=1)
    assert "are the same build" in fails(path, "diff", code=3)
    assert livegraft("rehearse", path, status=3).stdout.startswith("kv: nothing-to-patch, 0 of 1 cycle\n")


def test_a_finding_is_lifted(write: Write) -> None:
    """The patch is made. It is not safe, so it is not asked what comes of it: the daemon does not start."""
    lifts = '[patch]\nallow = ["struct-layout"]\n'
    outcome = rehearse(read_rehearsal(write(START.replace('"0"', '"x"'), VERSION, lifts, old=3, new=4)))
    (patch,) = outcome.patches
    assert [item.lifted for item in patch.findings] == [True]
    assert [step.name for step in outcome.steps] == ["diff", "start"]


def test_it_takes_too_long(write: Write) -> None:
    said = rehearse(read_rehearsal(write(START, VERSION, top="cycles = 1000000\ntimeout = 1")))
    assert said.exit_code == 1 and said.error is not None
    assert said.error.what == "the rehearsal was not done within 1 seconds"
    require_counts(said)


PROBES = {
    "silent": ('send = ""\ntimeout = 0.2', "no whole answer within 0.2 seconds"),
    "hangs": ('command = ["sleep", "1000"]\ntimeout = 0.2', "sleep ran on"),
    "fails": ('command = ["sh", "-c", "echo no >&2; exit 9"]', "it ended with exit status 9"),
}


@pytest.mark.parametrize("kind", PROBES)
def test_a_probe_without_an_answer(kind: str, write: Write) -> None:
    instead, said = PROBES[kind]
    assert said in fails(write(START, VERSION.replace('send = "VERSION\\n"', instead)), "probe version (before)")


def test_names_that_xml_has_no_place_for(write: Write) -> None:
    name = 'name = "<&\\"]]>\\u0001\\u001b\\ud7ff\\U0001F600"'
    outcome = rehearse(read_rehearsal(write(START, VERSION.replace('name = "version"', name))))
    require_counts(outcome)
    cases = ElementTree.fromstring(junit(outcome)).iter("testcase")
    assert 'probe <&"]]>\\x01\\x1b\ud7ff\U0001f600 (after)' in [case.attrib["name"] for case in cases]


def test_a_wrong_file_is_reported_too(tmp_path: Path, livegraft: Livegraft) -> None:
    path, report = tmp_path / "rehearsal.toml", tmp_path / "report.xml"
    path.write_text("cycles = 0\n")
    error = livegraft("rehearse", path, "--json", "--junit", report, status=2).json["error"]
    assert error["why"].startswith("build: missing") and any(line.startswith("cycles: 0") for line in error["details"])
    (failure,) = ElementTree.parse(report).getroot().iter("failure")
    assert "cycles: 0; expected a whole number" in (failure.text or "")
    livegraft("rehearse", path, "--junit", path, status=2)
    livegraft("rehearse", path, "--junit", tmp_path / "gone" / "report.xml", status=2)
    assert path.read_text() == "cycles = 0\n"


SERVER = """
#include <arpa/inet.h>
#include <sys/socket.h>
SEPARATE int say(int client, long n) { return dprintf(client, "FORM\\n", answer(n)); }
int main(void) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof at;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (void *)&at, size) || listen(listener, 9) || getsockname(listener, (void *)&at, &size)) return 1;
    printf("ready %d\\n", ntohs(at.sin_port));
    fflush(stdout);
    for (;;) {
        int client = accept(listener, NULL, NULL);
        if (client < 0) return 2;
        say(client, 4);
        close(client);
    }
}
"""
FORMS = ("%ld", "it is %ld")
LIBRARIES = {
    "a library": ("module = {pair}", "43"),
    "a set": ("new = '{program}'\nmodules = [{pair}]", "it is 43"),
    "a set of which one is the same": ("new = '{program}'\nmodules = [{same}]", "it is 42"),
}


@pytest.mark.parametrize("case", LIBRARIES)
def test_libraries_are_rehearsed(case: str, cache_folder: Path, tmp_path: Path) -> None:
    build, after = LIBRARIES[case]
    texts = (f"SEPARATE long answer(long n) {{ return n * 10 + {number}; }}" for number in (2, 3))
    compiled, (before, behind) = Compiler(cache_folder / "compiled"), texts
    pair, other = (library_pair(compiled, before, behind, main=SERVER.replace("FORM", form)) for form in FORMS)
    words = {
        "pair": f"{{ old = '{pair.old}', new = '{pair.new}' }}",
        "same": f"{{ old = '{pair.old}', new = '{pair.old}' }}",
        "program": other.program,
    }
    path = tmp_path / "rehearsal.toml"
    path.write_text(f"""
cycles = 2
hold = 0
[build]
old = "{pair.program}"
{build.format(**words)}
[start]
command = ["{{old}}"]
environment = {{ LD_LIBRARY_PATH = "{pair.old.parent}" }}
ready = {{ line = 'ready (?P<port>\\d+)' }}
[[probe]]
name = "answer"
send = ""
before = "42"
after = "{after}"
""")
    outcome = rehearse(read_rehearsal(path))
    assert outcome.exit_code == 0, text(outcome)
    said = "\n".join(text(outcome))
    assert ("(libanswer.so)" in said) == (case == "a set") and len(outcome.patches) == 1 + (case == "a set")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_leaves_no_process(number: signal.Signals, write: Write, tmp_path: Path) -> None:
    """Not the daemon, nor the load, nor what a probe and the daemon's script have started on their own."""
    escaping = '"sh", "-c", "setsid sleep 1000 & exec {old} 0 4"'
    start = START.replace('"{old}", "0", "4"', escaping)
    # The first answer comes at once; the second is waited for while the patch is in force.
    script = "echo >>asked; test $(wc -l <asked) -lt 2 || setsid sleep 1000; echo +kv 1.0"
    probe = VERSION.replace('send = "VERSION\\n"', f'command = ["sh", "-c", "{script}"]')
    path = write(start, LOAD, probe, top="cycles = 1000\nhold = 0")
    mark = f"REHEARSED={uuid.uuid4()}"
    command = [sys.executable, "-m", "patcher.cli", "rehearse", str(path), "--json"]
    environment = {**os.environ, "REHEARSED": mark.split("=")[1]}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment) as process:
        asked = tmp_path / "asked"
        wait_until(lambda: asked.exists() and asked.read_text() == "\n\n", "the probe asks for the second time")
        running = sorted(marked(mark))
        assert {"kv", "sleep", "sh"} <= set(running) and len(running) >= 5, "the command, kv, its sleep, load, probe"
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert json.loads(out)["error"]["what"] == "interrupted"
    assert marked(mark) == []


def marked(mark: str) -> list[str]:
    """What runs with this variable in its environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "comm").read_text().strip())
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                pass  # gone, or nobody's business; ours can be read
    return found
