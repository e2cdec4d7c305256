"""What all tests share: the cache of built and fetched programs, running servers, the command line.

Nothing here makes a test pass silently: what is missing on the machine is a skip with its reason.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fixtures.build import DEFAULT, Variant, build_kv
from patcher.interruption import ENDING
from patcher.threads import batch

ROOT = Path(__file__).parent.parent
COMMAND_SECONDS = 300


def pytest_configure() -> None:
    """A shell that starts the tests in the background ignores SIGINT, which they and all they start would inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what needs root where we are not root, and says so; leaves out the long tests unless they are wanted.

    Those with daemons of the distribution come first: at the end a worker would be left alone with one of them.
    """
    items.sort(key=lambda item: not item.path.is_relative_to(ROOT / "tests" / "real"))
    for marker, wanted in (("long", "LIVEGRAFT_REAL"), ("matrix", "LIVEGRAFT_MATRIX"), ("soak", "LIVEGRAFT_SOAK")):
        if not os.environ.get(wanted):
            left_out = [item for item in items if item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.timeout(0))
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs root (or CAP_SYS_PTRACE)")
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A command that a test runs in this very process takes its signals; the next test has Python's own again."""
    before = [(number, signal.getsignal(number)) for number in ENDING]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def cache_folder() -> Path:
    """Where built and fetched programs are kept between runs; named by content, so never stale."""
    folder = Path(os.environ.get("LIVEGRAFT_TEST_CACHE", ROOT / ".cache"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def kv(cache_folder: Path) -> Callable[..., Path]:
    """``kv(version, variant=DEFAULT)``: the executable; skips where its compiler is not installed."""

    def executable(version: int, variant: Variant = DEFAULT) -> Path:
        if shutil.which(variant.compiler) is None:
            pytest.skip(f"{variant.compiler} is not installed")
        return build_kv(version, variant, cache_folder / "build")

    return executable


@pytest.fixture(params=["C", "Python"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs twice: with the C library (``patcher.threads.batch``), and without."""
    if request.param == "Python":
        monkeypatch.setenv("LIVEGRAFT_PURE", "1")
    elif batch.active() is None:
        pytest.skip(f"the pause is made in {batch.description()}")
    return str(request.param)


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line gave. ``text`` is both streams, for the message of a failed assert."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output."""
        value = json.loads(self.stdout)
        assert isinstance(value, dict)
        return value

    @property
    def text(self) -> str:
        """Both streams."""
        return self.stdout + self.stderr


Livegraft = Callable[..., Outcome]


@pytest.fixture(scope="session")
def livegraft() -> Livegraft:
    """``livegraft("apply", patch, "--pid", pid, status=0)``: runs the command and asserts its exit status.

    ``status=None`` asserts nothing. The command is a process of its own, as for a user.
    """

    def run(*arguments: object, status: int | None = 0, seconds: float = COMMAND_SECONDS) -> Outcome:
        command = [sys.executable, "-c", "import sys; from patcher.cli import main; sys.exit(main())"]
        done = subprocess.run(
            [*command, *map(str, arguments)],
            capture_output=True, text=True, check=False, timeout=seconds, cwd=ROOT,
        )  # fmt: skip
        outcome = Outcome(done.returncode, done.stdout, done.stderr)
        if status is not None:
            assert outcome.status == status, f"livegraft {' '.join(map(str, arguments))}\n{outcome.text}"
        return outcome

    return run
