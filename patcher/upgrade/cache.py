"""Patches that ``upgrade`` has made, kept on disk: one for each pair of builds, so that each pair is compared once.

An entry is found by everything that it was made from: the content of both files, the debug files that describe them,
and the sources of the differ, since a later one may know a hazard that an earlier one did not. It is a patch object
like any other, and is read as one. What is damaged is thrown away and made again. Livegraft runs as root, so a folder
or an entry that somebody else could have written is not read. Entries may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from pathlib import Path
from types import TracebackType

from elfdiff.cache import STALE, own_folder, sources
from elfdiff.dwarf.debugfile import SYSTEM_DIRECTORY
from elfdiff.errors import BadInput, LivegraftError
from elfdiff.patches.patchfile import MAX_FILE, read_patch, write_patch
from elfdiff.patchobject import FORMAT_VERSION, PatchObject

from ..process.upgradefiles import FilePair

LIMIT = 1 << 30
"""Bytes that all entries together may have; the oldest go first."""

_log = logging.getLogger(__name__)


def default_folder() -> Path:
    """Return where patches are kept: below XDG_CACHE_HOME (XDG Base Directory), or /var/cache for root without it."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if named.startswith("/"):  # others are to be ignored, says the specification
        return Path(named, "livegraft")
    return Path("/var/cache/livegraft") if os.geteuid() == 0 else Path.home() / ".cache" / "livegraft"


class PatchCache:
    """A folder of patch objects. Use it as a context manager: it holds the folder open."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        """Open or make the folder; ``limit`` in bytes. Raises NotPermitted where it is not this user's alone."""
        self.folder = folder
        self.discarded: list[str] = []
        """Names of entries that could not be believed, and were made again."""
        self._limit = limit
        self._descriptor = own_folder(folder, "or name another one by XDG_CACHE_HOME")

    def __enter__(self) -> PatchCache:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let go of the folder."""
        os.close(self._descriptor)

    def read(self, name: str, builds: tuple[str, str]) -> PatchObject | None:
        """Return the patch kept under a name for these build-ids, None where there is none that can be believed."""
        try:
            found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None
        mine = found.st_uid == os.geteuid() and not found.st_mode & 0o022
        if stat.S_ISREG(found.st_mode) and mine and found.st_size <= MAX_FILE:
            try:
                patch = read_patch(self._path(name))
            except BadInput as error:
                _log.debug("cache entry %s cannot be read: %s", name, error)
            else:
                if (patch.old.build_id, patch.new.build_id) == builds:
                    return patch
        self.discarded.append(name)
        self._delete(name)
        return None

    def write(self, name: str, patch: PatchObject) -> PatchObject:
        """Keep a patch; returns it with its id, which it gets when it is written. Raises LivegraftError."""
        try:
            written = write_patch(patch, self._path(name))
        except BadInput as error:
            raise LivegraftError(
                f"the patch could not be written to {self.folder}",
                why=error.why,
                next_step="make room there, or name another folder by XDG_CACHE_HOME",
            ) from error
        self._bound(name)
        return written

    def _path(self, name: str) -> Path:
        # By the descriptor: the folder's own path may lead elsewhere by now.
        return Path(f"/proc/self/fd/{self._descriptor}", name)

    def _bound(self, newest: str) -> None:
        """Delete the oldest entries beyond the limit, and what processes that died left unfinished."""
        entries = []
        for name in os.listdir(self._descriptor):  # noqa: PTH208
            try:
                found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
            except FileNotFoundError:
                continue  # another process deleted it
            if name.startswith("."):
                if time.time() - found.st_mtime > STALE:
                    self._delete(name)
            else:
                entries.append((found.st_mtime, found.st_size, name))
        total = sum(size for _, size, _ in entries)
        for _, size, name in sorted(entries):
            if total > self._limit and name != newest:
                self._delete(name)
                total -= size

    def _delete(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._descriptor)
        except FileNotFoundError:
            pass  # as wanted
        except OSError as error:
            _log.debug("cache entry %s cannot be deleted: %s", name, error)


def name_of(pair: FilePair, builds: tuple[str, str]) -> str:
    """Return the name of the entry for two files, whose build-ids make it readable."""
    key = hashlib.sha256(f"{sources()} {FORMAT_VERSION} {Path(pair.old.path).name}".encode("utf-8", "surrogateescape"))
    for file, build in zip((pair.old, pair.new), builds, strict=True):
        key.update(f"\n{file.digest} {_debug_stamp(build)}".encode())
    return "-".join([*(build[:16] or "none" for build in builds), key.hexdigest()[:32]])


def _debug_stamp(build: str) -> str:
    """What tells a debug file from another: with types to compare, more is refused, or less."""
    try:
        found = (SYSTEM_DIRECTORY / ".build-id" / build[:2] / f"{build[2:]}.debug").stat()
    except OSError:
        return "none"
    return f"{found.st_size} {found.st_mtime_ns}"
