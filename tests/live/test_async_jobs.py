"""OpenSSL's jobs: that they are loaded costs nothing; a stack that one sets aside is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from elfdiff.errors import Busy
from fixtures.intact import altered_code
from patcher.pausing.conditions import Conditions
from patcher.process.memory import Memory
from patcher.process.modules import modules
from patcher.process.proc import mappings
from patcher.stacks.switching_x86_64 import stack_switchers
from patcher.transactions.transaction import apply, revert
from tests.compile import Compiler
from tests.live.grafting import patch_for
from tests.live.test_deep_check import Pair, Parking

pytestmark = pytest.mark.root

SOURCE = (Path(__file__).parents[2] / "fixtures" / "jobs.c").read_text()
BRIEF = Conditions(timeout=0.15)


def made(cache_folder: Path, folder: Path, *flags: str) -> Pair:
    if not Path("/usr/include/openssl/async.h").exists():
        pytest.skip("the headers of OpenSSL are not installed")
    compiled = Compiler(cache_folder / "compiled")
    old, new = (compiled(SOURCE, f"-DFACTOR={n}", *flags, "-lcrypto", stripped=False) for n in (3, 5))
    return Pair(old, patch_for(old, new, folder))


def test_where_no_job_can_be_put_aside_no_memory_is_searched(cache_folder: Path, tmp_path: Path) -> None:
    pair = made(cache_folder, tmp_path)
    with Parking(pair.program) as program:
        with Memory(program.pid) as memory:
            found = stack_switchers(modules(mappings(program.pid), memory), memory)
        assert [(item.image.split(".")[0], item.parks) for item in found] == [("libcrypto", False)]
        outcome = apply(program.pid, pair.patch)
        assert outcome.pause is not None and outcome.pause.searched == 0
        assert program.tell("ask") == "10"
        revert(program.pid)
        assert program.tell("ask") == "6"


def test_the_stack_of_a_thread_that_is_in_a_job_is_searched(cache_folder: Path, tmp_path: Path) -> None:
    pair = made(cache_folder, tmp_path)
    with Parking(pair.program) as program:
        assert program.tell("job") == "inside"
        with pytest.raises(Busy, match="work"):
            apply(program.pid, pair.patch, BRIEF)
        assert altered_code(program.pid) == []
        assert program.tell("go on") == "13"
        apply(program.pid, pair.patch)
        assert program.tell("job") == "inside"
        with pytest.raises(Busy, match="work"):
            revert(program.pid, conditions=BRIEF)
        assert program.tell("go on") == "17"
        revert(program.pid)
        assert program.tell("ask") == "6"


def test_a_job_that_was_put_aside_keeps_its_functions_live(cache_folder: Path, tmp_path: Path) -> None:
    pair = made(cache_folder, tmp_path, "-DPAUSING")
    with Parking(pair.program) as program:
        assert program.tell("park") == "parked"
        with pytest.raises(Busy, match="work"):
            apply(program.pid, pair.patch, BRIEF)
        assert program.tell("go") == "6"
        apply(program.pid, pair.patch)
        assert program.tell("ask") == "10"
