"""What is asked of a transaction reaches it, whole, from every verb that has an option for it, and from a rehearsal."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from elfdiff.diff import Options, diff
from elfdiff.errors import Busy
from elfdiff.patches.patchfile import write_patch
from fixtures.build import Variant
from fixtures.daemon import Daemon, run_kv
from fixtures.intact import altered_code
from patcher.cli import main
from patcher.pausing.conditions import USUAL, Conditions
from patcher.rehearsal.file import read_rehearsal
from patcher.rehearsal.rehearsing import rehearse
from patcher.transactions import reinstating, transaction, units
from tests.live.replacing import put

pytestmark = pytest.mark.root

BUILD = Variant(stripped=False, debug=True)
OLD, NEW = 2, 3
KEPT, IDLE = "answer_version", "fatal"
"""A function of kv that changes and may be kept live; one that does not change and is not called."""
OPTIONS: dict[str, tuple[tuple[str, ...], object]] = {
    "timeout": (("--timeout", "1000"), 1000.0),
    "deep_check": (("--deep-check",), True),
    "deep_limit": (("--deep-limit", "1024"), 1 << 30),
    "keep_live": (("--keep-live", KEPT), (KEPT,)),
    "when_idle": (("--when-idle", IDLE), (IDLE,)),
    "own_idle": (("--no-when-idle",), False),
}
"""For each field what asks for it, and what it is then: never the default."""
HAS_NOT = {
    "apply": (),
    "check": (),
    "revert": ("keep_live",),
    "blocking": ("timeout", "keep_live"),
    "upgrade": (),
}
"""Fields that a verb has no option for."""


def words(verb: str) -> list[str]:
    """All options of a verb that say something of the conditions."""
    return [word for name, (said, _) in OPTIONS.items() if name not in HAS_NOT[verb] for word in said]


def asked(verb: str) -> Conditions:
    return replace(USUAL, **{name: value for name, (_, value) in OPTIONS.items() if name not in HAS_NOT[verb]})


@dataclass
class Heard:
    """Under which conditions patches were bound, ended, and carried out or looked at, since the last ``take``.

    The ``refused``-th plan from now on is not carried out, but is busy.
    """

    by: dict[str, list[Conditions]] = field(default_factory=dict)
    refused: int = 0

    def take(self) -> dict[str, list[Conditions]]:
        by, self.by = self.by, {}
        return by

    def listen(self, module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        original: Callable[..., Any] = getattr(module, name)
        signature = inspect.signature(original)

        @wraps(original)
        def listening(*arguments: Any, **options: Any) -> Any:
            given = signature.bind(*arguments, **options).arguments["conditions"]
            self.by.setdefault(name, []).append(given)
            if name == "carry_out":
                self.refused -= 1
                if self.refused == 0:
                    raise Busy("stopped here")
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, listening)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    found = Heard()
    for module in (transaction, units, reinstating):
        for name in {"carry_out", "watch", "bind_all", "endings_of"} & vars(module).keys():
            if name != "bind_all" or module is transaction:  # where it is called
                found.listen(module, name, monkeypatch)
    return found


def require(heard: Heard, expected: Conditions, *places: str) -> None:
    """All of these places were reached, and all that was heard is what was asked; of the time something is spent."""
    by = heard.take()
    assert by.keys() >= set(places), by.keys()
    for name, found in by.items():
        assert {replace(item, timeout=expected.timeout) for item in found} == {expected}, name
        assert all(expected.timeout / 2 < item.timeout <= expected.timeout for item in found), name


@dataclass(frozen=True)
class Prepared:
    program: Path
    patch: Path


@pytest.fixture(scope="module")
def patch(kv: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("patches") / "fix.patch"
    write_patch(diff(kv(OLD, BUILD), kv(NEW, BUILD), Options()), file)
    return file


@pytest.fixture
def prepared(patch: Path, kv: Callable[..., Path], tmp_path: Path) -> Prepared:
    """The old build where no other process runs it."""
    put(kv(OLD, BUILD), tmp_path / "kv")
    return Prepared(tmp_path / "kv", patch)


@pytest.fixture
def daemon(prepared: Prepared) -> Iterator[Daemon]:
    with run_kv(prepared.program) as running:
        yield running


def test_there_is_an_option_for_every_field() -> None:
    assert list(OPTIONS) == [item.name for item in fields(Conditions)]
    assert all(value != getattr(USUAL, name) for name, (_, value) in OPTIONS.items())


@pytest.mark.parametrize("verb", HAS_NOT)
def test_what_a_verb_has_no_option_for_is_wrong_usage(
    verb: str, daemon: Daemon, prepared: Prepared, capsys: pytest.CaptureFixture[str]
) -> None:
    patches = [str(prepared.patch)] if verb in ("apply", "check", "blocking") else []
    for name in HAS_NOT[verb]:
        option, *_ = OPTIONS[name][0]
        assert main([verb, *patches, "--pid", str(daemon.pid), *OPTIONS[name][0]]) == 2
        assert f"unrecognized arguments: {option}" in capsys.readouterr().err
    assert altered_code(daemon.pid) == []


def test_nothing_is_asked_where_nothing_is_said(daemon: Daemon, prepared: Prepared, heard: Heard) -> None:
    pid = ["--pid", str(daemon.pid)]
    assert main(["check", str(prepared.patch), *pid]) == 0
    require(heard, USUAL, "bind_all", "carry_out")
    assert main(["blocking", str(prepared.patch), "--for", "0", *pid]) == 0
    require(heard, USUAL, "bind_all", "watch")


@pytest.mark.parametrize("which", ["--pid", "--tree"])
def test_all_of_it_reaches_the_pause_of_one_process_and_of_several(
    daemon: Daemon, prepared: Prepared, heard: Heard, which: str
) -> None:
    pid = [which, str(daemon.pid)]
    assert main(["check", str(prepared.patch), *pid, *words("check")]) == 0
    require(heard, asked("check"), "bind_all", "carry_out")
    assert main(["apply", str(prepared.patch), *pid, *words("apply")]) == 0
    require(heard, asked("apply"), "bind_all", "carry_out")
    assert altered_code(daemon.pid) != []
    assert main(["revert", *pid, *words("revert")]) == 0
    require(heard, asked("revert"), "endings_of", "carry_out")
    assert altered_code(daemon.pid) == []


def test_all_of_it_reaches_the_looks_of_blocking(daemon: Daemon, prepared: Prepared, heard: Heard) -> None:
    pid = ["--pid", str(daemon.pid)]
    assert main(["blocking", str(prepared.patch), "--for", "0", *pid, *words("blocking")]) == 0
    require(heard, asked("blocking"), "bind_all", "watch")
    assert main(["apply", str(prepared.patch), *pid]) == 0
    heard.take()
    assert main(["blocking", "--revert", "--for", "0", *pid, *words("blocking")]) == 0
    require(heard, asked("blocking"), "endings_of", "watch")


def test_what_was_done_is_taken_back_under_the_same_conditions(prepared: Prepared, heard: Heard) -> None:
    with run_kv(prepared.program) as one, run_kv(prepared.program) as other:
        both = ["--exe", str(prepared.program), "--all", "--atomic"]
        heard.refused = 2
        assert main(["apply", str(prepared.patch), *both, *words("apply")]) == Busy.exit_code
        require(heard, asked("apply"), "bind_all", "endings_of", "carry_out")
        assert altered_code(one.pid) == altered_code(other.pid) == []
        assert main(["apply", str(prepared.patch), *both, *words("apply")]) == 0
        heard.take()
        heard.refused = 2
        assert main(["revert", *both, *words("revert")]) == Busy.exit_code
        require(heard, asked("revert"), "endings_of", "carry_out")
        assert altered_code(one.pid) and altered_code(other.pid)


def test_all_of_it_reaches_the_pause_of_an_upgrade(
    daemon: Daemon,
    prepared: Prepared,
    kv: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    heard: Heard,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    put(kv(NEW, BUILD), prepared.program)
    for more in (["--dry-run"], []):
        assert main(["upgrade", "--pid", str(daemon.pid), *more, *words("upgrade")]) == 0
        # Whether each file can be patched is looked at before, and names no functions.
        by_file = heard.by["bind_all"].pop(0)
        assert by_file == replace(asked("upgrade"), timeout=by_file.timeout, keep_live=(), when_idle=())
        require(heard, asked("upgrade"), "bind_all", "carry_out")
    assert altered_code(daemon.pid) != []


@pytest.mark.parametrize("processes", ["one", "tree"])
def test_what_the_file_says_reaches_every_pause_of_a_rehearsal(
    prepared: Prepared, kv: Callable[..., Path], tmp_path: Path, heard: Heard, processes: str
) -> None:
    file = tmp_path / "rehearsal.toml"
    file.write_text(f"""
cycles = 1
timeout = 10000
build = {{ old = "{prepared.program}", new = "{kv(NEW, BUILD)}" }}
[patch]
timeout = 1000
deep_check = true
deep_limit = 1024
keep_live = ["{KEPT}"]
when_idle = ["{IDLE}"]
no_when_idle = true
processes = "{processes}"
[start]
command = ["{{old}}", "0", "4"]
ready = {{ line = '^ready (?P<port>\\d+)' }}
[[probe]]
name = "version"
send = "VERSION\\n"
before = {{ regex = '^\\+kv 1\\.1' }}
after = {{ regex = '^\\+kv 1\\.2' }}
""")
    outcome = rehearse(read_rehearsal(file))
    assert outcome.exit_code == 0, outcome.error
    require(heard, asked("apply"), "bind_all", "endings_of", "carry_out")
