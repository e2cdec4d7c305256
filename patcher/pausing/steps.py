"""The steps of a transaction at which the death of this process leaves something else behind than at the one before."""

from __future__ import annotations

from collections.abc import Callable

OnStep = Callable[[str], None]
"""Called with the name of each step when it was done, for tests."""


def no_step(name: str) -> None:
    """Do nothing: nobody wants to be called."""
