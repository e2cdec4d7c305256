"""After an upgrade of several files of one process: libraries, the executable, and where that ends halfway."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from fixtures.intact import altered_code
from fixtures.tracees import state_of, wait_until
from patcher.interruption import deferred
from patcher.pausing.conditions import Conditions
from patcher.records.record import State
from patcher.targets.selection import By, Selection
from patcher.transactions.group import carry_out_each
from patcher.transactions.inspection import inspect_process
from patcher.transactions.transaction import Outcome, apply
from patcher.upgrade import upgrading
from patcher.upgrade.cache import PatchCache
from patcher.upgrade.upgrading import Fate, Upgrade
from tests.compile import Compiler
from tests.conftest import Livegraft
from tests.live.grafting import MAIN, PRELUDE, SONAME, Running, library_pair
from tests.live.replacing import TIMEOUT, one, put

pytestmark = pytest.mark.root

ADVICE = re.compile(r"--keep-live ([^\s;]+)")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the patches of this test are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "livegraft"


TEXT = """
SEPARATE long first(long n) { return n * 10 + 3; }
long answer(long n) { return first(n) + 1000; }
"""


class Installed:
    """A program with its library, both installed and running; ``new`` are the builds that replace them."""

    def __init__(self, compiled: Compiler, folder: Path) -> None:
        pair = library_pair(compiled, TEXT, TEXT.replace("+ 3", "+ 7"))
        later = MAIN.replace("return x * 3", "return x * 5")
        self.new_program = compiled({"main.c": PRELUDE + later}, str(pair.old))
        self.old_library, self.new_library = pair.old, pair.new
        self.latest_library = library_pair(compiled, TEXT, TEXT.replace("+ 3", "+ 9")).new
        self.library, self.program = folder / SONAME, folder / "asked"
        folder.mkdir()
        put(pair.old, self.library)
        put(pair.program, self.program)

    def running(self) -> Running:
        return Running([self.program], {"LD_LIBRARY_PATH": str(self.library.parent)})


@pytest.fixture
def installed(cache_folder: Path, tmp_path: Path) -> Installed:
    return Installed(Compiler(cache_folder / "compiled"), tmp_path / "linked")


@pytest.fixture
def compiled_busy(cache_folder: Path, installed: Installed) -> Path:
    """A new build of the program in which ``main`` differs, which never returns."""
    later = MAIN.replace('puts("ready")', 'puts("ready to go")')
    return Compiler(cache_folder / "compiled")({"main.c": PRELUDE + later}, str(installed.old_library))


def test_a_library_is_upgraded(installed: Installed, livegraft: Livegraft) -> None:
    with installed.running() as process:
        assert process.ask(1) == [1013]
        put(installed.new_library, installed.library)
        file = one(livegraft("upgrade", "--pid", process.pid, "--json", *TIMEOUT).json)
        assert (file["path"], file["result"]) == (str(installed.library), "patched")
        assert process.ask(1) == [1017]
        livegraft("revert", "--pid", process.pid)
        assert process.ask(1) == [1013]


def fates(value: dict[str, Any]) -> list[str]:
    """Of the one process: what became of the library, and of the program."""
    (result,) = value["processes"]
    return [file["result"] for file in result["files"]]


def test_library_and_executable_in_one_stop(installed: Installed, livegraft: Livegraft) -> None:
    words = ("upgrade", "--pid")
    with installed.running() as process:
        put(installed.new_library, installed.library)
        put(installed.new_program, installed.program)
        assert fates(livegraft(*words, process.pid, "--dry-run", "--json", *TIMEOUT).json) == ["patchable"] * 2
        assert altered_code(process.pid) == []
        done = livegraft(*words, process.pid, *TIMEOUT)
        assert "2 files, patched in one stop or not at all" in done.stdout
        assert process.ask(1) == [1017]
        patches = inspect_process(process.pid).patches
        assert len({item.record.contents.set_id for item in patches}) == 1 and len(patches) == 2
        assert fates(livegraft(*words, process.pid, "--json").json) == ["already"] * 2
        livegraft("revert", "--pid", process.pid)
        assert process.ask(1) == [1013] and altered_code(process.pid) == []


def test_one_of_a_set_is_upgraded_again(installed: Installed, livegraft: Livegraft) -> None:
    """What is in force of the others stays in force, and all of it is one set again."""
    with installed.running() as process:
        put(installed.new_library, installed.library)
        put(installed.new_program, installed.program)
        livegraft("upgrade", "--pid", process.pid, *TIMEOUT)
        put(installed.latest_library, installed.library)
        assert fates(livegraft("upgrade", "--pid", process.pid, "--json", *TIMEOUT).json) == ["patched", "already"]
        assert process.ask(1) == [1019]
        found = [item.record for item in inspect_process(process.pid).patches]
        applied = [record for record in found if record.state is State.APPLIED]
        assert len(applied) == 2 and len({record.contents.set_id for record in applied}) == 1
        livegraft("revert", "--pid", process.pid)
        assert process.ask(1) == [1013] and altered_code(process.pid) == []


def test_one_that_is_refused_keeps_the_others_out_unless_it_is_asked_for(
    installed: Installed, livegraft: Livegraft
) -> None:
    words = ("upgrade", "--json", *TIMEOUT, "--pid")
    with installed.running() as process:
        put(installed.new_library, installed.library)
        put(Path("/bin/true"), installed.program)
        value = livegraft(*words, process.pid, status=4).json
        assert fates(value) == ["not-tried", "refused"]
        assert process.ask(1) == [1013] and altered_code(process.pid) == []
        value = livegraft(*words, process.pid, "--partial", status=8).json
        assert fates(value) == ["patched", "refused"]
        (result,) = value["processes"]
        assert result["exit"] == {"code": 8, "name": "partial"} and "restart it" in result["error"]["next"]
        assert process.ask(1) == [1017]


def test_the_executable_is_not_tried_where_a_library_is_refused(installed: Installed, livegraft: Livegraft) -> None:
    with installed.running() as process:
        put(Path("/bin/true"), installed.library)
        put(installed.new_program, installed.program)
        value = livegraft("upgrade", "--pid", process.pid, "--json", *TIMEOUT, status=4).json
        assert fates(value) == ["refused", "not-tried"]
        assert altered_code(process.pid) == []


def test_a_signal_that_comes_when_all_is_done_comes_too_late(
    installed: Installed, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*words: Any, **options: Any) -> Outcome:
        outcome = apply(*words, **options)
        signal.raise_signal(signal.SIGTERM)
        return outcome

    monkeypatch.setattr(upgrading.transaction, "apply", interrupted)
    with installed.running() as process, PatchCache(kept) as cache, deferred() as deferral:
        put(installed.new_library, installed.library)
        put(installed.new_program, installed.program)
        upgrade = Upgrade(cache, Conditions(60.0), dry_run=False, everybody=False)
        group = carry_out_each(Selection(By.PID, str(process.pid)), upgrade.act, again=False)
        assert deferral.take() == ("SIGTERM",)  # it is still there for whoever comes next
        (result,) = group.results
        assert group.exit_code == 0
        assert [file.fate for file in upgrade.done[result.process.key].files] == [Fate.PATCHED] * 2
        assert process.ask(1) == [1017]


LEADERLESS = (
    "#include <pthread.h>\n"
    + MAIN.replace("int main(int argc, char **argv) {", "static void *run(void *more) { int argc = more != NULL;")
    .replace("return company3(argc);", "return (void *)(long)company3(argc);")
    + "int main(void) { pthread_t other; pthread_create(&other, NULL, run, NULL); pthread_exit(NULL); }\n"
)


def test_a_process_whose_main_thread_has_ended(cache_folder: Path, tmp_path: Path, livegraft: Livegraft) -> None:
    compiled = Compiler(cache_folder / "compiled")
    pair = library_pair(compiled, TEXT, TEXT.replace("+ 3", "+ 7"), main=LEADERLESS)
    library = tmp_path / SONAME
    put(pair.old, library)
    with Running([pair.program], {"LD_LIBRARY_PATH": str(tmp_path)}) as process:
        wait_until(lambda: state_of(process.pid) == "Z", "the main thread to end")
        put(pair.new, library)
        file = one(livegraft("upgrade", "--pid", process.pid, "--json", *TIMEOUT).json)
        assert (file["path"], file["result"]) == (str(library), "patched") and process.ask(1) == [1017]


def test_a_function_that_stays_live_is_busy(installed: Installed, compiled_busy: Path, livegraft: Livegraft) -> None:
    with installed.running() as process:
        put(compiled_busy, installed.program)
        for words in (["--dry-run"], []):
            value = livegraft("upgrade", "--pid", process.pid, "--timeout", 0, "--json", *words, status=5).json
            assert one(value)["result"] == "busy" and "restart" not in one(value)["error"]["next"]
        assert altered_code(process.pid) == []


def test_a_function_that_never_returns_may_finish_its_old_code(
    installed: Installed, compiled_busy: Path, livegraft: Livegraft
) -> None:
    """As the advice says, and looked for in all images of the process."""
    with installed.running() as process:
        put(installed.new_library, installed.library)
        put(compiled_busy, installed.program)
        words = ("upgrade", "--json", "--pid", process.pid)
        busy = livegraft(*words, "--timeout", 0, status=5).json
        (name,) = {word for file in busy["processes"][0]["files"] for word in ADVICE.findall(file["error"]["next"])}
        assert fates(livegraft(*words, *TIMEOUT, "--keep-live", "nobody", status=2).json) == ["failed", "failed"]
        assert altered_code(process.pid) == []
        assert fates(livegraft(*words, *TIMEOUT, "--keep-live", name).json) == ["patched", "patched"]
        assert process.ask(1) == [1017]
        livegraft("revert", "--pid", process.pid)
        assert process.ask(1) == [1013] and altered_code(process.pid) == []
