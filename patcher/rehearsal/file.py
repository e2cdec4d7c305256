"""What a rehearsal is asked to do, and the TOML file that says it.

docs/rehearsal.md has every key, with what it is where it is left out. Paths of builds are relative to the file, and
commands run in its folder. Nothing is guessed: a key or a placeholder that is not known is an error.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from elfdiff.errors import BadInput
from elfdiff.findingcodes import LIFTABLE

from ..pausing.conditions import USUAL, Conditions
from .keys import ABSENT, Keys, shown

_DAY = 86400.0
_MOST_MEBIBYTES = 1 << 20
_MOST_CYCLES = 1_000_000
_PLACES = ("old", "module", "port", "folder", "here")
_PLACES_OF_CLIENTS = (*_PLACES, "pid")
_FIGURES = ("requests", "failed", "longest_ms")
_PROCESSES = ("one", "tree")


@dataclass(frozen=True)
class Ready:
    """How one knows that a process is ready: exactly one of the three is given.

    ``port`` accepts connections (a number, when filled in); ``line`` is found in a line of its output; ``file`` is
    there. A group ``port`` of ``line`` says at which port it listens.
    """

    port: str = ""
    line: re.Pattern[str] | None = None
    file: str = ""

    @property
    def names_port(self) -> bool:
        """Whether the line that is waited for says the port."""
        return self.line is not None and "port" in self.line.groupindex


@dataclass(frozen=True)
class Service:
    """A program that runs until it is ended: the daemon, or the load. ``timeout``: seconds until it is ready."""

    command: tuple[str, ...]
    environment: dict[str, str]
    ready: Ready | None
    timeout: float


@dataclass(frozen=True)
class Expected:
    """An answer: exactly ``text``, final newlines apart, or where ``regex`` is given one in which it is found."""

    text: str = ""
    regex: re.Pattern[str] | None = None

    def fits(self, answer: str) -> bool:
        """Whether this is the expected answer."""
        if self.regex is not None:
            return self.regex.search(answer) is not None
        return answer.rstrip("\r\n") == self.text.rstrip("\r\n")

    def __str__(self) -> str:
        """In words, for a report."""
        return shown(self.text) if self.regex is None else f"a match of {shown(self.regex.pattern)}"


@dataclass(frozen=True)
class Probe:
    """A question and its answers from the old and the new code: by ``command``, or by what is sent to the port.

    ``expect`` says where an answer over TCP is complete; ``timeout`` in seconds.
    """

    name: str
    command: tuple[str, ...]
    send: str
    expect: re.Pattern[str]
    before: Expected
    after: Expected
    timeout: float


@dataclass(frozen=True)
class Pair:
    """Two builds, old and new, of the program or of a library: files."""

    old: Path
    new: Path


@dataclass(frozen=True)
class Rehearsal:
    """What is asked of a rehearsal. ``program`` is started; ``pairs`` are compared, and patched together.

    ``module`` is the old build of the first library that is patched, None where none is.

    ``tree``: all that descends from the process that is started is patched, too; each transaction has the whole time
    of ``conditions``. ``hold`` and ``timeout``, for all of it, are seconds. Commands run in the folder of ``file``.
    ``reports`` are searched in the last output of the load.
    """

    file: Path
    program: Path
    pairs: tuple[Pair, ...]
    module: Path | None
    start: Service
    load: Service | None
    reports: tuple[re.Pattern[str], ...]
    probes: tuple[Probe, ...]
    cycles: int
    hold: float
    timeout: float
    allow: frozenset[str]
    lines: bool
    tree: bool
    conditions: Conditions

    @property
    def name(self) -> str:
        """What is patched: the library where it is one alone, else the program."""
        return self.pairs[0].old.name if len(self.pairs) == 1 else self.program.name

    @property
    def folder(self) -> Path:
        """Where its commands run."""
        return self.file.parent


def read_rehearsal(path: Path) -> Rehearsal:
    """Read and check a file. Raises BadInput, whose details have a line for each thing that is wrong in it."""
    problems: list[str] = []
    file = path.absolute()
    found = _rehearsal(Keys(_parse(path), "", problems), file)
    if problems:
        raise BadInput(
            f"{path}: {len(problems)} error{'s' if len(problems) > 1 else ''} in this rehearsal",
            why=problems[0],
            next_step="docs/rehearsal.md has every key",
            details=tuple(problems[1:]),
        )
    return found


def _parse(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise BadInput(
            f"{path}: cannot be read: {error.strerror}", why=str(error), next_step="name the file of a rehearsal"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(
            f"{path}: this is no TOML", why=str(error), next_step="see https://toml.io for its syntax"
        ) from error


def _rehearsal(top: Keys, file: Path) -> Rehearsal:
    program, pairs, module = _builds(top, file.parent)
    patch = _patch(top)
    start = _start(top)
    load, reports = _load(top)
    result = Rehearsal(
        file=file,
        program=program,
        pairs=pairs,
        module=module,
        start=start,
        load=load,
        reports=reports,
        probes=_probes(top),
        cycles=top.count("cycles", 10, 1, _MOST_CYCLES),
        hold=top.number("hold", 0.5, 0, _DAY, "seconds"),
        timeout=top.number("timeout", 600.0, 0.001, _DAY, "seconds"),
        allow=patch.allow,
        lines=patch.lines,
        tree=patch.tree,
        conditions=patch.conditions,
    )
    top.done()
    return result


def _builds(top: Keys, folder: Path) -> tuple[Path, tuple[Pair, ...], Path | None]:
    """The program to start, the pairs of builds, and the old build of the first library among them."""
    keys = top.table("build", required=True)
    if keys is None:
        return folder, (), None
    program = keys.file("old", folder, "the build that is started")
    libraries = [_library(item, folder) for item in _library_tables(keys)]
    pairs = list(libraries)
    if keys.has("new") or not (keys.has("module") or keys.has("modules")):
        pairs.insert(0, Pair(program, keys.file("new", folder, "the build that it is to become")))
    keys.done()
    return program, tuple(pairs), libraries[0].old if libraries else None


def _library_tables(keys: Keys) -> list[Keys]:
    if not keys.has("modules"):
        module = keys.table("module")
        return [] if module is None else [module]
    if keys.has("module"):
        keys.wrong("modules", "build.module is given, too", "one of them: modules has a table for each library")
    return keys.tables("modules")


def _library(keys: Keys, folder: Path) -> Pair:
    old = keys.file("old", folder, "the build of the library that is loaded")
    new = keys.file("new", folder, "the build that the library is to become")
    keys.done()
    return Pair(old, new)


@dataclass(frozen=True)
class _Patch:
    """The table [patch]."""

    allow: frozenset[str]
    lines: bool
    tree: bool
    conditions: Conditions


def _patch(top: Keys) -> _Patch:
    keys = top.table("patch") or Keys({}, "patch", top.problems)
    allow = keys.texts("allow", "an array of codes of findings")
    for code in allow:
        if code not in LIFTABLE:
            keys.wrong("allow", f"{shown(code)} is no liftable finding", f"some of {', '.join(LIFTABLE)}")
    lines = keys.flag("lines")
    tree = keys.choice("processes", _PROCESSES) == "tree"
    conditions = _conditions(keys)
    keys.done()
    return _Patch(frozenset(allow), lines, tree, conditions)


def _conditions(keys: Keys) -> Conditions:
    """What is asked of every apply and every revert."""
    return Conditions(
        timeout=keys.number("timeout", USUAL.timeout, 0, _DAY, "seconds"),
        deep_check=keys.flag("deep_check") if keys.has("deep_check") else USUAL.deep_check,
        deep_limit=keys.count("deep_limit", USUAL.deep_limit >> 20, 0, _MOST_MEBIBYTES) << 20,
        keep_live=keys.texts("keep_live", "an array of names of functions"),
        when_idle=keys.texts("when_idle", "an array of names of functions"),
        own_idle=not keys.flag("no_when_idle"),
    )


def _start(top: Keys) -> Service:
    keys = top.table("start", required=True)
    if keys is None:
        return Service((), {}, Ready(), 0.0)
    ready = _ready(keys, _PLACES, required=True) or Ready()
    places = tuple(name for name in _PLACES if name != "port") if ready.names_port else _PLACES
    service = _service(keys, ready, places)
    keys.done()
    return service


def _load(top: Keys) -> tuple[Service | None, tuple[re.Pattern[str], ...]]:
    keys = top.table("load")
    if keys is None:
        return None, ()
    ready = _ready(keys, _PLACES_OF_CLIENTS, required=False)
    service = _service(keys, ready, _PLACES_OF_CLIENTS)
    reports = tuple(_report(keys, text) for text in keys.texts("report", "an array of regular expressions"))
    keys.done()
    return service, reports


def _service(keys: Keys, ready: Ready | None, places: tuple[str, ...]) -> Service:
    command = keys.command("command", places)
    environment = keys.environment("environment", places)
    return Service(command, environment, ready, keys.number("timeout", 30.0, 0.001, _DAY, "seconds"))


def _ready(keys: Keys, places: tuple[str, ...], *, required: bool) -> Ready | None:
    expected = '{ port = "{port}" }, { line = "regular expression" } or { file = "path" }'
    if not keys.has("ready"):
        if required:
            keys.wrong("ready", "missing", expected)
        return None
    inner = keys.table("ready")
    if inner is None:
        return None
    given = [key for key in ("port", "line", "file") if inner.has(key)]
    if len(given) != 1:
        keys.wrong("ready", f"{' and '.join(given) or 'nothing'} given", f"one of {expected}")
    port = inner.template("port", "{port}, or the number of a port as a string", places, default="")
    if port and "{" not in port and not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        inner.wrong("port", shown(port), "{port}, or the number of a port as a string")
    line = inner.regex("line") if inner.has("line") else None
    file = inner.template("file", "the path of a file that appears", places, default="")
    inner.done()
    return Ready(port, line, file)


def _report(keys: Keys, text: str) -> re.Pattern[str]:
    expected = f"a regular expression with groups named {', '.join(f'(?P<{name}>...)' for name in _FIGURES)}"
    try:
        pattern = re.compile(text, re.MULTILINE)
    except re.error as error:
        keys.wrong("report", f"{shown(text)}: {error}", expected)
        return ABSENT
    foreign = set(pattern.groupindex) - set(_FIGURES)
    if foreign or not pattern.groupindex:
        what = f"unknown group {min(foreign)}" if foreign else "no named group"
        keys.wrong("report", f"{what} in {shown(text)}", expected)
    return pattern


def _probes(top: Keys) -> tuple[Probe, ...]:
    found: list[Probe] = []
    for keys in top.tables("probe"):
        probe = _probe(keys)
        if probe.name and probe.name in [other.name for other in found]:
            keys.wrong("name", f"{shown(probe.name)} is another probe's, too", "a name of its own")
        found.append(probe)
    return tuple(found)


def _probe(keys: Keys) -> Probe:
    name = keys.text("name", "a name for the report")
    by_tcp, by_command = keys.has("send"), keys.has("command")
    if by_tcp == by_command:
        what = "send is given, too" if by_tcp else "missing"
        keys.wrong("command", what, "either command, whose output is the answer, or send, the text for {port}")
    command = keys.command("command", _PLACES_OF_CLIENTS) if by_command else ()
    send = keys.text("send", "the text to send to {port}", default="", empty=True)
    expect = keys.regex("expect") if keys.has("expect") else re.compile("\n")
    if keys.has("expect") and not by_tcp:
        keys.wrong("expect", "there is no send", "none: the answer is all that the command prints")
    before, after = _expected(keys, "before"), _expected(keys, "after")
    timeout = keys.number("timeout", 10.0, 0.001, _DAY, "seconds")
    keys.done()
    return Probe(name, command, send, expect, before, after, timeout)


def _expected(keys: Keys, key: str) -> Expected:
    state = "old" if key == "before" else "new"
    expected = f'the answer of the {state} code, as a string or as {{ regex = "regular expression" }}'
    if keys.holds_table(key):
        inner = keys.table(key)
        assert inner is not None
        regex = inner.regex("regex", lines=True)
        inner.done()
        return Expected(regex=regex)
    return Expected(keys.text(key, expected, empty=True))
