"""The check of the user moves from one function to another that is called in turn: none slips through between them.

Where the check moves to the earlier function, a thread between the two calls has not been checked by the first and is
not checked by the second when the patch comes into force. Where it moves to the later one, so it is on the way back.
"""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import pytest

from elfdiff.diff import Options, diff
from elfdiff.errors import BadInput, Busy
from elfdiff.patches.patchfile import read_patch, write_patch
from elfdiff.patchobject import PatchObject, Severity
from fixtures.hearing import PATIENCE, next_line
from fixtures.intact import altered_code
from patcher.cli import main
from patcher.pausing.conditions import Conditions
from patcher.records.record import State
from patcher.transactions.inspection import inspect_process
from patcher.transactions.transaction import apply, check, revert, watch_apply, watch_revert
from tests.compile import Compiler
from tests.conftest import Livegraft
from tests.live.replacing import one, put

pytestmark = pytest.mark.root

AT_ONCE = Conditions(timeout=0)
PATIENT = Conditions(timeout=PATIENCE)
SOURCE = Path(__file__).parents[2] / "fixtures" / "logins.c"
LATE, EARLY = 0, 1
"""Builds: the check is in serve(), which is called last; it is in accept_user(), which is called first."""
LOGINS = 10_000
CONNECTIONS = 6
TURNS = 12
"""Times that the patch comes into force under load, at least."""


class Connection:
    """A client: one line out, one line back."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self._answers = self._socket.makefile("r")

    def put(self, *lines: str) -> None:
        self._socket.sendall("".join(f"{line}\n" for line in lines).encode())

    def answer(self) -> str:
        line = self._answers.readline()
        assert line, "the server has closed the connection"
        return line.rstrip("\n")

    def ask(self, line: str) -> str:
        self.put(line)
        return self.answer()

    def close(self) -> None:
        self._answers.close()
        self._socket.close()


class Server:
    """The server, running."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self._connections: list[Connection] = []

    def __enter__(self) -> Server:
        ready, port = next_line(self._process).split()
        assert ready == "ready"
        self.port = int(port)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.close()
        self._process.kill()
        self._process.communicate()

    def connect(self) -> Connection:
        self._connections.append(Connection(self.port))
        return self._connections[-1]

    def park(self, user: str) -> Connection:
        """A client whose thread waits between the two calls by now; its answer comes when it is released."""
        client = self.connect()
        client.put(f"park {user}")
        self.connect().ask("parked")
        return client

    def release(self) -> None:
        self.connect().ask("release")

    def tally(self) -> tuple[int, int, int]:
        """Logins that have ended, those of them without a check and those with two."""
        finished, unchecked, twice = map(int, self.connect().ask("tally").split())
        return finished, unchecked, twice


@pytest.fixture(scope="module")
def compiled(cache_folder: Path) -> Compiler:
    return Compiler(cache_folder / "compiled")


Build = Callable[[int], Path]
Make = Callable[..., PatchObject]


@pytest.fixture(scope="module", params=["stripped", "with symbols"])
def build(request: pytest.FixtureRequest, compiled: Compiler) -> Build:
    stripped = request.param == "stripped"
    return lambda version: compiled(SOURCE.read_text(), "-pthread", f"-DEARLY={version}", stripped=stripped)


@pytest.fixture(scope="module")
def make(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``make(old, new, *codes)``: the patch, with these findings allowed."""
    folder = tmp_path_factory.mktemp("patches")

    def made(old: int, new: int, *allowed: str) -> PatchObject:
        file = folder / f"{old}-{new}{''.join(allowed)}.patch"
        write_patch(diff(build(old), build(new), Options(allow=frozenset(allowed))), file)
        return read_patch(file)

    return made


def refuses(server: Server) -> None:
    """Who comes now is judged rightly, by whatever version."""
    client = server.connect()
    assert (client.ask("login mallory"), client.ask("login alice")) == ("refused", "welcome")


def test_diff_names_the_caller_and_what_moves(build: Build, make: Make) -> None:
    names = {"login", "accept_user", "serve", "check_user"}
    for old, new in ((LATE, EARLY), (EARLY, LATE)):
        patch = make(old, new)
        (finding,) = [item for item in patch.findings if item.code == "moved-code"]
        assert finding.severity is Severity.WARN and not finding.lifted
        assert "--no-when-idle" in finding.lift and "--allow moved-code" in finding.lift
        assert len(finding.where) == 1
        if "stripped" not in str(build(LATE)):
            first, second = ("accept_user", "serve") if old == EARLY else ("serve", "accept_user")
            assert finding.where == (f"login, from {first} to {second}: check_user",)
            assert {item.name for item in patch.idle} == {f"login between {first} and {second}"}
            assert not names & {item.name for item in patch.functions} - {"accept_user", "serve"}
        assert patch.idle and sum(item.size for item in patch.idle) < 60  # the code between the calls, not all of it


def test_the_trap_springs_where_nobody_waits_for_the_caller(build: Build, make: Make) -> None:
    with Server(build(LATE)) as server:
        client = server.park("mallory")
        apply(server.pid, make(LATE, EARLY), Conditions(timeout=PATIENCE, own_idle=False))
        server.release()
        assert client.answer() == "welcome"  # nobody has checked who that is
        assert server.tally() == (1, 1, 0)
        refuses(server)


def test_the_trap_springs_on_the_way_back(build: Build, make: Make) -> None:
    with Server(build(EARLY)) as server:
        apply(server.pid, make(EARLY, LATE), PATIENT)
        client = server.park("mallory")
        revert(server.pid, conditions=Conditions(timeout=PATIENCE, own_idle=False))
        server.release()
        assert client.answer() == "welcome"
        assert server.tally() == (1, 1, 0)


def test_apply_waits_for_who_is_between_the_calls(build: Build, make: Make) -> None:
    patch = make(LATE, EARLY)
    with Server(build(LATE)) as server:
        client = server.park("mallory")
        with pytest.raises(Busy) as caught:
            apply(server.pid, patch, AT_ONCE)
        assert patch.idle[0].name in caught.value.what and "--no-when-idle" in caught.value.next_step
        with pytest.raises(Busy):
            check(server.pid, patch, AT_ONCE)
        watched = watch_apply(server.pid, patch, 0)
        assert watched is not None and [item.function for item in watched.now] == [patch.idle[0].name]
        assert watched.unchanged == (patch.idle[0].name,)
        assert altered_code(server.pid) == []

        done: list[State] = []
        patching = threading.Thread(target=lambda: done.append(apply(server.pid, patch, PATIENT).state))
        patching.start()
        server.release()
        assert client.answer() == "refused"
        patching.join(PATIENCE)
        assert done == [State.APPLIED]
        refuses(server)
        assert server.tally()[1:] == (0, 0)


def test_revert_waits_for_the_same(build: Build, make: Make) -> None:
    patch = make(EARLY, LATE)
    with Server(build(EARLY)) as server:
        outcome = apply(server.pid, patch, PATIENT)
        assert {item.name for item in outcome.contents.idle} == {patch.idle[0].name}
        client = server.park("mallory")
        with pytest.raises(Busy) as caught:
            revert(server.pid, conditions=AT_ONCE)
        assert patch.idle[0].name in caught.value.what
        watched = watch_revert(server.pid, "", 0)
        assert watched is not None and [item.function for item in watched.now] == [patch.idle[0].name]
        server.release()
        assert client.answer() == "refused"
        revert(server.pid, conditions=PATIENT)
        assert server.tally() == (1, 0, 0)
        assert altered_code(server.pid) == []


@pytest.mark.parametrize("set_aside", [False, True], ids=["waits", "--no-when-idle"])
def test_an_upgrade_waits_for_who_is_between_the_calls(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, livegraft: Livegraft, set_aside: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    installed = tmp_path / "logins"
    put(build(LATE), installed)
    with Server(installed) as server:
        client = server.park("mallory")
        put(build(EARLY), installed)
        words = ("upgrade", "--pid", server.pid, "--json", "--timeout", 0)
        file = one(livegraft(*words, status=5).json)
        assert "--no-when-idle" in file["error"]["next"] and altered_code(server.pid) == []
        if set_aside:
            assert one(livegraft(*words, "--no-when-idle").json)["result"] == "patched"
        server.release()
        assert client.answer() == ("welcome" if set_aside else "refused")
        if not set_aside:
            assert one(livegraft(*words[:-1], PATIENCE).json)["result"] == "patched"
        refuses(server)
        assert server.tally()[1] == set_aside


def test_who_waits_before_the_calls_is_in_nobodys_way(build: Build, make: Make) -> None:
    """The caller's own caller, and connections that wait for their next line."""
    with Server(build(LATE)) as server:
        clients = [server.connect() for _ in range(3)]
        assert [client.ask("login alice") for client in clients] == ["welcome"] * 3
        assert apply(server.pid, make(LATE, EARLY), PATIENT).state is State.APPLIED
        assert [client.ask("login mallory") for client in clients] == ["refused"] * 3


def test_none_slips_through_under_load(build: Build, make: Make) -> None:
    patch = make(LATE, EARLY)
    with Server(build(LATE)) as server:
        stop = threading.Event()
        welcomed: list[str] = []
        loads = [
            threading.Thread(target=knock, args=(server.connect(), stop, welcomed)) for _ in range(CONNECTIONS)
        ]
        for load in loads:
            load.start()
        turns = 0
        while turns < TURNS or server.tally()[0] < LOGINS:
            assert apply(server.pid, patch, PATIENT).pause is not None
            revert(server.pid, conditions=PATIENT)
            turns += 1
        stop.set()
        for load in loads:
            load.join(PATIENCE)
            assert not load.is_alive()
        finished, unchecked, twice = server.tally()
        print(f"{turns} times there and back, {finished} logins")
        assert (welcomed, unchecked, twice) == ([], 0, 0) and finished >= LOGINS
        assert altered_code(server.pid) == []


def knock(client: Connection, stop: threading.Event, welcomed: list[str]) -> None:
    """Log in as somebody whom nobody knows, again and again."""
    while not stop.is_set():
        client.put(*["login mallory"] * 20)
        welcomed += [answer for answer in (client.answer() for _ in range(20)) if answer != "refused"]


# -- what a person names --------------------------------------------------------------------------------------------


def caller(patch: PatchObject, build: Build) -> str:
    """How the caller is named on the command line: by its symbol, or by its address."""
    return patch.idle[0].name.split(" between ")[0] if "stripped" in str(build(LATE)) else "login"


def test_a_named_function_is_waited_for_and_noted(build: Build, make: Make) -> None:
    plain = make(LATE, EARLY, "moved-code")
    assert plain.idle == () and [item.lifted for item in plain.findings if item.code == "moved-code"] == [True]
    named = caller(make(LATE, EARLY), build)
    with Server(build(LATE)) as server:
        client = server.park("mallory")
        with pytest.raises(Busy) as caught:
            apply(server.pid, plain, Conditions(timeout=0, when_idle=(named,)))
        assert caught.value.what.startswith(f"{named} stayed live")
        server.release()
        assert client.answer() == "refused"
        apply(server.pid, plain, Conditions(timeout=PATIENCE, when_idle=(named,)))
        (patch,) = inspect_process(server.pid).patches
        assert {item.name for item in patch.record.contents.idle} == {named}

        client = server.park("alice")  # new code has checked her; the old one would again
        with pytest.raises(Busy) as caught:
            revert(server.pid, conditions=AT_ONCE)
        assert caught.value.what.startswith(f"{named} stayed live")
        revert(server.pid, conditions=Conditions(timeout=PATIENCE, own_idle=False))
        server.release()
        assert client.answer() == "welcome"
        assert server.tally() == (2, 0, 1)


def test_a_function_is_waited_for_at_a_revert_alone(build: Build, make: Make) -> None:
    named = caller(make(LATE, EARLY), build)
    with Server(build(EARLY)) as server:
        apply(server.pid, make(EARLY, LATE, "moved-code"), PATIENT)
        client = server.park("mallory")
        with pytest.raises(Busy):
            revert(server.pid, conditions=Conditions(timeout=0, when_idle=(named,)))
        server.release()
        assert client.answer() == "refused"
        revert(server.pid, conditions=Conditions(timeout=PATIENCE, when_idle=(named,)))


def test_a_patch_that_replaces_one_waits_for_what_that_one_waited_for(build: Build, make: Make) -> None:
    patch = make(LATE, EARLY)
    other = replace(make(LATE, EARLY, "moved-code"), id="ab" * 32)
    with Server(build(LATE)) as server:
        apply(server.pid, patch, PATIENT)
        client = server.park("alice")
        with pytest.raises(Busy) as caught:
            apply(server.pid, other, AT_ONCE)
        assert patch.idle[0].name in caught.value.what
        server.release()
        assert client.answer() == "welcome"
        apply(server.pid, other, PATIENT)


WRONG = {
    "nobody": "nobody: no function of",
    "0x1": "0x1: no function of",
    "0xyz": "0xyz is no address",
    "login,,serve": "is no list of functions",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_names_change_nothing(
    build: Build, make: Make, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "fix.patch"
    write_patch(make(LATE, EARLY), file)
    with Server(build(LATE)) as server:
        pid = ["--pid", str(server.pid), "--when-idle", name]
        commands = [["apply", str(file)], ["check", str(file)], ["blocking", str(file)]]
        for command in commands:
            assert run_main([*command, *pid]) == 2
            assert WRONG[name] in capsys.readouterr().err
        assert altered_code(server.pid) == [] and inspect_process(server.pid).patches == ()
        refuses(server)


def run_main(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as usage:
        return int(str(usage.code))


def test_an_address_inside_of_a_function_is_no_function(build: Build, make: Make) -> None:
    patch = make(LATE, EARLY)
    with Server(build(LATE)) as server:
        with pytest.raises(BadInput) as caught:
            check(server.pid, patch, Conditions(when_idle=(hex(patch.idle[0].start),)))
        assert "begins there" in caught.value.what and caught.value.next_step.startswith("--when-idle 0x")
        again = caught.value.next_step.removeprefix("--when-idle ")
        assert check(server.pid, patch, Conditions(timeout=PATIENCE, when_idle=(again,))).state is State.PREPARED


def test_it_is_said_by_every_verb(
    build: Build, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "fix.patch"
    patch = make(LATE, EARLY)
    write_patch(patch, file)
    with Server(build(LATE)) as server:
        pid = ["--pid", str(server.pid)]
        assert main(["apply", str(file), "--timeout", "60", *pid]) == 0
        assert f"when idle  {patch.idle[0].name}" in capsys.readouterr().out
        assert main(["status", *pid]) == 0
        assert f"when idle  {patch.idle[0].name}" in capsys.readouterr().out
        assert main(["status", "--json", *pid]) == 0
        (carried,) = json.loads(capsys.readouterr().out)["patches"]
        assert {item["name"] for item in carried["when_idle"]} == {patch.idle[0].name}
        client = server.park("alice")
        assert main(["blocking", "--revert", "--for", "0", "--json", *pid]) == 5
        said = json.loads(capsys.readouterr().out)
        assert [item["function"] for item in said["live"]] == said["when_idle"] == [patch.idle[0].name]
        assert main(["blocking", "--revert", "--for", "0", "--no-when-idle", "--json", *pid]) == 0
        assert json.loads(capsys.readouterr().out)["when_idle"] == []
        server.release()
        assert client.answer() == "welcome"
