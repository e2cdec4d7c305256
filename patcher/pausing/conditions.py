"""What a command asks of the moment at which its plan is carried out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Conditions:
    """What can be asked of a transaction, by options, by the keys of a rehearsal or by who calls ``apply``.

    It is handed on as a whole, so that nothing of it is lost on the way. The defaults stand here and nowhere else.

    ``timeout``: seconds, for all tries together, until the functions that change must have been idle once.

    ``deep_check``: whether all writable memory is searched for stacks that no thread runs on, at most ``deep_limit``
    bytes of it; None does it where the process has an image that may switch stacks.

    ``keep_live``: names or old addresses of functions whose old code threads may finish; means nothing to a revert.

    ``when_idle``: names or old addresses of further functions of the image that must be idle; ``own_idle``: whether
    those count, too, that the patch asks for itself, and those that patches in force have waited for.
    """

    timeout: float = 10.0
    deep_check: bool | None = None
    deep_limit: int = 256 << 20
    keep_live: tuple[str, ...] = ()
    when_idle: tuple[str, ...] = ()
    own_idle: bool = True


USUAL = Conditions()
"""What holds where nobody asks for anything else."""
