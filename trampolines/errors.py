"""The one error of this room."""

from __future__ import annotations


class TrampolineError(ValueError):
    """Machine code cannot be made as asked, or was made wrong: nothing may be written."""
