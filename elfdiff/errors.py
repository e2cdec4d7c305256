"""The error tree: every error knows its exit code, its cause and the next step.

    LivegraftError            1  failed          target untouched or rolled back
    ├── Changed               1  failed          another attempt may do
    ├── Interrupted           1  failed          a signal asked us to end
    ├── BadInput              2  bad-input       no such file, process or patch; wrong usage
    │   └── NoSuchPatch       2  bad-input       the process does not carry it
    ├── NothingToPatch        3  nothing-to-patch
    ├── Refused               4  refused         not safe, or not this build
    │   └── NotConcerned      4  refused         the process has nothing that the patch would change
    ├── Busy                  5  busy            a patched function stayed live
    ├── NotPermitted          6  not-permitted
    ├── TargetDamaged         7  target-damaged
    └── Partial               8  partial         some processes done, others not

The tree lives here because ``patcher`` imports ``elfdiff`` and never the other way round; the command
line is the only place that prints an error and the only one that turns it into an exit status.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from elfdiff.patchobject import Finding

EXIT_NAMES: dict[int, str] = {
    0: "ok",
    1: "failed",
    2: "bad-input",
    3: "nothing-to-patch",
    4: "refused",
    5: "busy",
    6: "not-permitted",
    7: "target-damaged",
    8: "partial",
}
"""Exit status -> its stable name, as ``--json`` prints it."""


class LivegraftError(Exception):
    """Something failed; the target is untouched or was rolled back.

    ``what`` says in one sentence what went wrong and where, ``why`` the cause with the values seen,
    ``next_step`` what to type or change. Each is plain text without a final newline; ``details`` are
    further lines (a stack, a list of functions).
    """

    exit_code: ClassVar[int] = 1

    def __init__(  # noqa: D107  (see the class)
        self, what: str, *, why: str = "", next_step: str = "", details: tuple[str, ...] = ()
    ) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.next_step = next_step
        self.details = details

    @property
    def code(self) -> str:
        """The stable name of the exit status."""
        return EXIT_NAMES[self.exit_code]


class Changed(LivegraftError):
    """The target changed between the plan and the pause. Nothing was written; a new plan may fit."""


class Interrupted(LivegraftError):
    """A signal asked this process to end, and it has, with nothing written or all of it undone."""


class BadInput(LivegraftError):
    """The command was given something that it cannot work with."""

    exit_code = 2


class NoSuchPatch(BadInput):
    """The process carries no patch, or not the one that is meant; among several processes it is passed over."""


class NothingToPatch(LivegraftError):
    """The two builds do not differ in anything that matters."""

    exit_code = 3


class Refused(LivegraftError):
    """Not safe, or not the build that the patch is for. Nothing was written.

    ``findings`` are the differ's reasons, where it is the differ that refuses.
    """

    exit_code = 4
    findings: tuple[Finding, ...] = ()


class NotConcerned(Refused):
    """The process has not loaded the program of the patch, or runs its new build; among several it is passed over."""


class Busy(LivegraftError):
    """A patched function stayed live until the timeout. Nothing was written."""

    exit_code = 5


class NotPermitted(LivegraftError):
    """The kernel does not let this user trace that process."""

    exit_code = 6


class TargetDamaged(LivegraftError):
    """The target may be damaged: a write could be neither finished nor undone."""

    exit_code = 7


class Partial(LivegraftError):
    """Some processes were done, others not."""

    exit_code = 8
