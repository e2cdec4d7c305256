"""A running ``fixtures/forking.c``: a master and its workers, each asked by name."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import TracebackType

from fixtures.hearing import PATIENCE

SOURCE = Path(__file__).parents[2] / "fixtures" / "forking.c"
ANSWERS = {version: str(version * 1001) for version in (1, 2, 3)}


class Forking:
    """The program, running; ``workers`` are the pids of those that the master has forked, in order."""

    def __init__(self, program: Path, workers: int) -> None:
        self.program = program
        self._process = subprocess.Popen(
            [program, str(workers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.pid = self._process.pid
        ready, *pids = self._line().split()
        assert ready == "ready"
        self.workers = [int(pid) for pid in pids]

    def __enter__(self) -> Forking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # the kernel kills its children with it (PR_SET_PDEATHSIG)
        self._process.communicate(timeout=PATIENCE)

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the program has died: {self._process.wait()}"
        return line.strip()

    def ask(self, question: str = "ask", worker: int | None = None) -> str:
        """What the master, or a worker by its number from 0, answers."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{question}\n" if worker is None else f"{worker} {question}\n")
        return self._line()

    def fork(self) -> int:
        """Have the master fork one more worker; its pid."""
        self.workers.append(int(self.ask("fork")))
        return self.workers[-1]

    def versions(self) -> list[int]:
        """Which version runs: in the master, and in each worker."""
        said = [self.ask(), *(self.ask(worker=number) for number in range(len(self.workers)))]
        return [next(version for version, answer in ANSWERS.items() if answer == item) for item in said]

    def tally(self) -> list[int]:
        """How many answers of version 1, 2, 3 and of a mixture the children of the storm got in a while."""
        return [int(word) for word in self.ask("tally").split()]
