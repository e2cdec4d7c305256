"""What a command asks of the moment at which its plan is carried out."""

from __future__ import annotations

from dataclasses import dataclass

DEEP_LIMIT = 256 << 20
"""Bytes of memory that are searched at most while a process stands still, unless somebody says otherwise."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """``timeout``: seconds, for all tries together, until the functions that change must have been idle once.

    ``deep_check``: whether all writable memory is searched for stacks that no thread runs on, at most ``deep_limit``
    bytes of it; None does it where the process has an image that may switch stacks.

    ``when_idle``: names or old addresses of further functions of the image that must be idle; ``own_idle``: whether
    those count, too, that the patch asks for itself, and those that patches in force have waited for.

    ``keep_live``: names or old addresses of functions whose old code threads may finish; ``keepable``, filled in from
    the patch, are the names that could be given, for the advice where one of them stays live.
    """

    timeout: float = 10.0
    deep_check: bool | None = None
    deep_limit: int = DEEP_LIMIT
    keep_live: tuple[str, ...] = ()
    keepable: frozenset[str] = frozenset()
    when_idle: tuple[str, ...] = ()
    own_idle: bool = True
