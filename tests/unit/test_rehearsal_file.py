"""The file of a rehearsal: what it says, and one line for each thing that is wrong in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from elfdiff.errors import BadInput
from patcher.pausing.conditions import USUAL
from patcher.rehearsal.file import Pair, Ready, Rehearsal, read_rehearsal
from tests.conftest import ROOT

BUILD = '[build]\nold = "old"\nnew = "new"\n'
START = '[start]\ncommand = ["{old}", "{port}"]\nready = { port = "{port}" }\n'
PROBE = '[[probe]]\nname = "one"\nsend = "hello"\nbefore = "1"\nafter = "2"\n'
LOAD = '[load]\ncommand = ["client"]\n'
LIBRARY = '{ old = "libx.so", new = "libx-new.so" }'


def library_pair(folder: Path) -> Pair:
    return Pair(folder / "libx.so", folder / "libx-new.so")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("old", "new", "libx.so", "libx-new.so"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def read(folder: Path, *parts: str) -> Rehearsal:
    path = folder / "rehearsal.toml"
    path.write_text("".join(parts))
    return read_rehearsal(path)


def problems(folder: Path, *parts: str) -> list[str]:
    with pytest.raises(BadInput) as caught:
        read(folder, *parts)
    lines = [caught.value.why, *caught.value.details]
    assert caught.value.what.endswith(f"{len(lines)} error{'s' if len(lines) > 1 else ''} in this rehearsal")
    assert all("; expected " in line for line in lines)
    return lines


def test_the_shortest_file_and_what_it_leaves_unsaid(folder: Path) -> None:
    asked = read(folder, BUILD, START, PROBE)
    assert (asked.program, asked.pairs) == (folder / "old", (Pair(folder / "old", folder / "new"),))
    assert asked.module is None and asked.name == "old"
    assert (asked.cycles, asked.hold, asked.timeout, asked.conditions) == (10, 0.5, 600.0, USUAL)
    assert not asked.tree and read(folder, BUILD, START, PROBE, "[patch]\nprocesses = 'tree'\n").tree
    assert asked.load is None and not asked.allow and not asked.lines
    assert asked.start.command == ("{old}", "{port}") and asked.start.timeout == 30.0
    (probe,) = asked.probes
    assert probe.before.fits("1\n") and not probe.before.fits("12") and probe.expect.search("\n")


@pytest.mark.parametrize("page", ["README.md", "docs/rehearsal.md"])
def test_the_files_that_are_shown_are_right(page: str, folder: Path) -> None:
    blocks = [part.split("```")[0] for part in (ROOT / page).read_text().split("```toml\n")[1:]]
    assert blocks
    for name in ("old/daemon", "new/daemon", "old/libx.so.1", "new/libx.so.1", "old/vsftpd", "new/vsftpd"):
        (folder / "builds" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "builds" / name).write_bytes(b"")
    for block in blocks:
        read(folder / "builds", block)


def test_a_library_is_patched_and_the_program_started(folder: Path) -> None:
    asked = read(
        folder, f'[build]\nold = "old"\nmodule = {LIBRARY}\n', START, PROBE
    )
    assert (asked.program, asked.pairs) == (folder / "old", (library_pair(folder),))
    assert asked.module == folder / "libx.so" and asked.name == "libx.so"


@pytest.mark.parametrize("new", ['new = "new"', ""], ids=["program and libraries", "libraries"])
def test_a_set_is_patched(new: str, folder: Path) -> None:
    modules = f"modules = [{', '.join([LIBRARY] * 2)}]"
    asked = read(folder, f'[build]\nold = "old"\n{new}\n{modules}\n', START, PROBE)
    program = (Pair(folder / "old", folder / "new"),) if new else ()
    assert asked.pairs == (*program, library_pair(folder), library_pair(folder))
    assert asked.module == folder / "libx.so" and asked.name == "old"


def test_a_line_may_say_the_port(folder: Path) -> None:
    ready = "ready = { line = 'at (?P<port>\\d+)' }\n"
    asked = read(folder, BUILD, '[start]\ncommand = ["{old}", "0"]\n' + ready, PROBE)
    assert asked.start.ready is not None and asked.start.ready.names_port and not Ready(port="7").names_port
    (line,) = problems(folder, BUILD, '[start]\ncommand = ["{old}", "{port}"]\n' + ready, PROBE)
    assert line.startswith("start.command: {port} in '{port}' stands for nothing; expected one of {old}, ")


def test_what_the_shell_means_by_braces_is_left_to_it(folder: Path) -> None:
    command = """["sh", "-c", "echo ${name} | awk '{ print $1 }'; x() { y; }"]"""
    asked = read(folder, BUILD, START, PROBE.replace('send = "hello"', f"command = {command}"))
    assert "${name}" in asked.probes[0].command[2]


TOPS = {
    "cycles = 0": "cycles: 0; expected a whole number from 1 to 1000000",
    "cycles = true": "cycles: True; expected a whole number from 1 to 1000000",
    "cycles = 1.5": "cycles: 1.5; expected a whole number from 1 to 1000000",
    "hold = -1": "hold: -1; expected a number of seconds from 0 to 86400",
    "hold = nan": "hold: nan; expected a number of seconds from 0 to 86400",
    "timeout = inf": "timeout: inf; expected a number of seconds from 0.001 to 86400",
    'timeout = "1m"': "timeout: '1m'; expected a number of seconds from 0.001 to 86400",
    "cycels = 3": "cycels: unknown key; expected cycles, perhaps, or another of build, cycles, ",
    "zzz = 3": "zzz: unknown key; expected one of build, cycles, ",
    "load = 3": "load: 3 is no table; expected a table [load]",
    'patch.allow = "one"': "patch.allow: 'one'; expected an array of codes of findings",
    'patch.allow = ["one"]': "patch.allow: 'one' is no liftable finding; expected some of ",
    'patch.lines = "yes"': "patch.lines: 'yes'; expected true or false",
    'patch.keep_live = [""]': "patch.keep_live: ['']; expected an array of names of functions",
    'patch.when_idle = "one"': "patch.when_idle: 'one'; expected an array of names of functions",
    'patch.deep_check = "yes"': "patch.deep_check: 'yes'; expected true or false",
    "patch.deep_limit = 1.5": "patch.deep_limit: 1.5; expected a whole number from 0 to 1048576",
    "patch.no_when_idle = 0": "patch.no_when_idle: 0; expected true or false",
    "patch.timeout = []": "patch.timeout: []; expected a number of seconds from 0 to 86400",
    "patch.processes = 2": "patch.processes: 2; expected \"one\" or \"tree\"",
    'patch.processes = "all"': "patch.processes: 'all'; expected \"one\" or \"tree\"",
    "patch.x = 1": "patch.x: unknown key; expected one of allow, deep_check, deep_limit, keep_live, lines, "
    "no_when_idle, processes, timeout, when_idle",
}


@pytest.mark.parametrize("line", TOPS)
def test_a_wrong_value_at_the_top(line: str, folder: Path) -> None:
    (problem,) = problems(folder, f"{line}\n", BUILD, START, PROBE)
    assert problem.startswith(TOPS[line])


BUILDS = {
    "": "build: missing; expected a table [build]",
    '[build]\nnew = "new"': "build.old: missing; expected the build that is started, as a path relative to ",
    '[build]\nold = "old"': "build.new: missing; expected the build that it is to become, as a path relative to ",
    '[build]\nold = "gone"\nnew = "new"': "build.old: no file ",
    '[build]\nold = 7\nnew = "new"': "build.old: 7; expected the build that is started",
    '[build]\nold = "\\u0000"\nnew = "new"': "build.old: '\\x00'; expected ",
    '[build]\nold = "old"\nmodule = 1': "build.module: 1 is no table; expected a table [build.module]",
    '[build]\nold = "old"\nmodule = { old = "libx.so" }': "build.module.new: missing; expected ",
    '[build]\nold = "old"\nmodules = []': "build.modules: missing; expected one or more tables [[build.modules]]",
    '[build]\nold = "old"\nmodules = [{ old = "libx.so" }]': "build.modules[1].new: missing; expected the build that ",
    f'[build]\nold = "old"\nmodule = {LIBRARY}\nmodules = [{LIBRARY}]': "build.modules: build.module is given, too; ",
    '[build]\nold = "old"\nnew = "new"\nnewer = ""': "build.newer: unknown key; expected new, perhaps, ",
}


@pytest.mark.parametrize("text", BUILDS)
def test_wrong_builds(text: str, folder: Path) -> None:
    (problem,) = problems(folder, f"{text}\n", START, PROBE)
    assert problem.startswith(BUILDS[text])


STARTS = {
    "": "start: missing; expected a table [start]",
    '[start]\nready = { file = "x" }': "start.command: missing; expected a program and its arguments, as an array ",
    '[start]\ncommand = "{old}"\nready = { file = "x" }': "start.command: '{old}'; expected a program and its ",
    '[start]\ncommand = []\nready = { file = "x" }': "start.command: []; expected a program and its arguments",
    '[start]\ncommand = [""]\nready = { file = "x" }': "start.command: ['']; expected a program and its arguments",
    '[start]\ncommand = ["a", 1]\nready = { file = "x" }': "start.command: ['a', 1]; expected a program and its ",
    '[start]\ncommand = ["{pid}"]\nready = { file = "x" }': "start.command: {pid} in '{pid}' stands for nothing; ",
    '[start]\ncommand = ["a"]': 'start.ready: missing; expected { port = "{port}" }, { line = ',
    '[start]\ncommand = ["a"]\nready = {}': 'start.ready: nothing given; expected one of { port = "{port}" }, ',
    '[start]\ncommand = ["a"]\nready = { file = "x", line = "y" }': "start.ready: line and file given; expected one ",
    '[start]\ncommand = ["a"]\nready = "soon"': "start.ready: 'soon' is no table; expected a table [start.ready]",
    '[start]\ncommand = ["a"]\nready = { line = "(" }': "start.ready.line: '(': missing ), unterminated subpattern ",
    '[start]\ncommand = ["a"]\nready = { port = 80 }': "start.ready.port: 80; expected {port}, or the number of a port",
    '[start]\ncommand = ["a"]\nready = { port = "70000" }': "start.ready.port: '70000'; expected {port}, or the ",
    '[start]\ncommand = ["a"]\nready = { file = "{no}" }': "start.ready.file: {no} in '{no}' stands for nothing; ",
    '[start]\ncommand = ["a"]\nready = { file = "x" }\ntimeout = 0': "start.timeout: 0; expected a number of seconds ",
    '[start]\ncommand = ["a"]\nready = { file = "x" }\nenvironment = { A = 1 }': "start.environment.A: 1; expected a ",
    '[start]\ncommand = ["a"]\nready = { file = "x" }\nenvironment = { "A=" = "1" }': "start.environment.A=: no name ",
    '[start]\ncommand = ["a"]\nready = { file = "x" }\nuser = "me"': "start.user: unknown key; expected one of ",
}


@pytest.mark.parametrize("text", STARTS)
def test_a_wrong_start(text: str, folder: Path) -> None:
    (problem,) = problems(folder, BUILD, f"{text}\n", PROBE)
    assert problem.startswith(STARTS[text])


LOADS = {
    "[load]": "load.command: missing; expected a program and its arguments",
    LOAD + 'report = "x"': "load.report: 'x'; expected an array of regular expressions",
    LOAD + 'report = ["("]': "load.report: '(': missing ), unterminated subpattern at position 0; expected a regular ",
    LOAD + 'report = ["x"]': "load.report: no named group in 'x'; expected a regular expression with groups named ",
    LOAD + 'report = ["(?P<served>x)"]': "load.report: unknown group served in '(?P<served>x)'; expected ",
    LOAD + "rate = 1": "load.rate: unknown key; expected ",
}


@pytest.mark.parametrize("text", LOADS)
def test_a_wrong_load(text: str, folder: Path) -> None:
    (problem,) = problems(folder, BUILD, START, f"{text}\n", PROBE)
    assert problem.startswith(LOADS[text])


PROBES = {
    "": "probe: missing; expected one or more tables [[probe]]",
    '[probe]\nname = "x"': "probe: {'name': 'x'} is no array of tables; expected one or more tables [[probe]]",
    PROBE.replace('name = "one"\n', ""): "probe[1].name: missing; expected a name for the report",
    PROBE.replace('send = "hello"\n', ""): "probe[1].command: missing; expected either command, ",
    PROBE + 'command = ["x"]': "probe[1].command: send is given, too; expected either command, ",
    PROBE.replace('send = "hello"', 'command = ["x"]\nexpect = "y"'): "probe[1].expect: there is no send; ",
    PROBE + 'expect = "["': "probe[1].expect: '[': unterminated character set at position 0; expected a regular ",
    PROBE.replace('before = "1"\n', ""): "probe[1].before: missing; expected the answer of the old code, as a string ",
    PROBE.replace('after = "2"', "after = 2"): "probe[1].after: 2; expected the answer of the new code, as a ",
    PROBE.replace('"2"', "{}"): "probe[1].after.regex: missing; expected a regular expression",
    PROBE.replace('"2"', '{ text = "", regex = "" }'): "probe[1].after.",
    PROBE + "timeout = 0": "probe[1].timeout: 0; expected a number of seconds from 0.001 to 86400",
    PROBE + "when = 0": "probe[1].when: unknown key; expected ",
    PROBE + PROBE: "probe[2].name: 'one' is another probe's, too; expected a name of its own",
}


@pytest.mark.parametrize("text", PROBES)
def test_a_wrong_probe(text: str, folder: Path) -> None:
    assert problems(folder, BUILD, START, f"{text}\n")[0].startswith(PROBES[text])


def test_all_that_is_wrong_is_said_at_once(folder: Path) -> None:
    lines = problems(folder, "cycles = 0\nhold = 'x'\n", BUILD.replace("old", "odl", 1), START.replace("port", "prot"))
    assert [line.split(":")[0] for line in lines] == [
        "build.old", "build.odl", "start.ready", "start.ready.prot", "start.command", "probe", "cycles", "hold",
    ]  # fmt: skip


@pytest.mark.parametrize("raw", [b"cycles = ", b"\xff", b"a = " + b"[" * 5000])
def test_no_toml(raw: bytes, folder: Path) -> None:
    (folder / "rehearsal.toml").write_bytes(raw)
    with pytest.raises(BadInput, match="this is no TOML") as caught:
        read_rehearsal(folder / "rehearsal.toml")
    assert caught.value.why and caught.value.next_step


def test_no_file(folder: Path) -> None:
    for path in (folder / "gone.toml", folder):
        with pytest.raises(BadInput, match="cannot be read"):
            read_rehearsal(path)
