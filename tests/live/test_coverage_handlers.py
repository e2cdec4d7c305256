"""Signal handlers that change while they run: on the stack of the thread, and on one of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from elfdiff.errors import Busy
from fixtures.intact import altered_code
from patcher.transactions.transaction import apply, revert
from tests.compile import Compiler
from tests.shapes.driver import BRIEF, Running, make
from tests.shapes.model import CLANG, GCC, Build, Shape

pytestmark = pytest.mark.root

HELD, OTHER = 9, 4
TEXT = r"""
#include <signal.h>
SEPARATE void hold(void) { char line[16]; printf("held\n"); fflush(stdout); fgets(line, sizeof line, stdin); }
static void handler(int number) { printf(PICK("old ", "new ")); hold(); printf(PICK("old end", "new end")); }
SEPARATE void install(int flags) {
    static char stack[65536];
    stack_t where = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction action = {.sa_handler = handler, .sa_flags = flags};
    sigaltstack(&where, NULL);
    sigaction(SIGUSR1, &action, NULL);
}
void answer(int n) { COUNT; install(FLAGS); if (n == 9) raise(SIGUSR1); else printf("%d", n); }
"""


@pytest.fixture(scope="session")
def compiled(cache_folder: Path) -> Compiler:
    return Compiler(cache_folder / "shapes")


@pytest.mark.parametrize("build", [GCC, CLANG], ids=lambda build: build.name)
@pytest.mark.parametrize("flags", ["0", "SA_ONSTACK"])
def test_a_handler_that_runs_is_not_patched_and_one_that_is_installed_is(
    flags: str, build: Build, compiled: Compiler, tmp_path: Path
) -> None:
    made = make(Shape("handlers", TEXT.replace("FLAGS", flags)), build, compiled, tmp_path)
    assert made.patch is not None, made.error
    with Running(made.old) as process:
        assert process.ask(HELD) == "old held"
        with pytest.raises(Busy):
            apply(process.pid, made.patch, BRIEF)
        assert not altered_code(process.pid)
        assert process.say("") == "old end"
        apply(process.pid, made.patch)
        assert process.ask(HELD) == "new held", "it was installed before the patch"
        with pytest.raises(Busy):
            revert(process.pid, conditions=BRIEF)
        assert process.say("") == "new end"
        revert(process.pid)
        assert process.ask(HELD) == "old held"
        assert process.say("") == "old end"
        assert process.ask(OTHER) == str(OTHER)
        assert not altered_code(process.pid)
