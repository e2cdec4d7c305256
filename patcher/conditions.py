"""What a command asks of the moment at which its plan is carried out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Conditions:
    """``timeout``: seconds, for all tries together, until the functions that change must have been idle once."""

    timeout: float = 10.0
