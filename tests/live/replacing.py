"""Files that are replaced under the processes that run them, and what ``upgrade`` says of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

TIMEOUT = ("--timeout", 60)


def put(source: Path, place: Path) -> None:
    """Put a file in the place of another as a package manager does: under another name first."""
    shutil.copy(source, place.with_name("arriving"))
    place.with_name("arriving").rename(place)


def one(value: dict[str, Any]) -> dict[str, Any]:
    """The only file of the only process."""
    (process,) = value["processes"]
    (file,) = process["files"]
    assert isinstance(file, dict)
    return file
