"""Analyses of builds seen before, kept on disk: the decoded code of an image, which takes longest to make of a file.

An entry is found by everything that it was made from: the build-id, the bytes and the layout of the image, and the
sources of this package. It carries the SHA-256 of its own content. What is damaged is thrown away and made again;
what somebody else could have written is not read at all, since livegraft runs as root. Entries are written under
another name and renamed, so that several processes may use one cache; any of them may be deleted at any time.

    8 bytes   magic
    8 bytes   length of the description, little-endian
    n bytes   description: JSON, {"digest": hex, "arrays": [[name, numpy dtype, elements], ...]}
    rest      the arrays one after the other, each at a multiple of 64 bytes from the end of the description
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import stat
import time
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from elfdiff.decoding.code import Code, References, code_bytes, load_code
from elfdiff.decoding.decode_x86_64 import Decoded
from elfdiff.errors import NotPermitted
from elfdiff.images.image import Image

LIMIT = 1 << 30
"""Bytes that all entries together may have; the least recently used go first."""
MAGIC = b"lgcache1"
ALIGNMENT = 64
STALE = 3600
"""Seconds after which the unfinished file of a process that died is deleted."""

_log = logging.getLogger(__name__)
_OWN = ("starts", "ends", "has_unwind", "has_lsda", "sound", "is_start", "masked")
_Arrays = dict[str, NDArray[np.generic]]


class Cache:
    """A folder of analyses. Use it as a context manager: it holds the folder open."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        """Open or make the folder; ``limit`` in bytes. Raises NotPermitted where it is not this user's alone."""
        self._limit = limit
        self._folder = own_folder(folder, "name another folder (--cache-dir, LIVEGRAFT_CACHE), or use --no-cache")

    def __enter__(self) -> Cache:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let go of the folder."""
        os.close(self._folder)

    def code(self, image: Image) -> Code:
        """The code of an image, from the cache or newly made. Raises as ``load_code`` does."""
        name = _name(image)
        found = self._read(name, image)
        if found is not None:
            return found
        code = load_code(image)
        self._write(name, code)
        return code

    def _read(self, name: str, image: Image) -> Code | None:
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.debug("cache entry %s cannot be opened: %s", name, error)
            return None
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            mine = status.st_uid == os.geteuid() and not status.st_mode & 0o022
            if not stat.S_ISREG(status.st_mode) or not mine or status.st_size > self._limit:
                _log.debug("cache entry %s is not this user's alone, or too large", name)
                return None
            raw = stream.read()
            os.utime(descriptor)
        try:
            return _restore(image, _unpack(raw))
        except (ValueError, KeyError, TypeError) as error:
            _log.debug("cache entry %s is damaged and discarded: %s", name, error)
            self._delete(name)
            return None

    def _write(self, name: str, code: Code) -> None:
        parts = _pack(_arrays(code))
        if sum(map(len, parts)) > self._limit:
            return
        draft = f".{name}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(draft, flags, 0o600, dir_fd=self._folder), "wb") as stream:
                stream.writelines(parts)
            os.rename(draft, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._bound()
        except OSError as error:  # a full disk must not cost the comparison
            _log.warning("the analysis of %s could not be kept: %s", code.image.path, error)
            self._delete(draft)

    def _bound(self) -> None:
        """Delete the least recently used entries beyond the limit, and what processes that died left unfinished."""
        entries: list[tuple[float, int, str]] = []
        for name in os.listdir(self._folder):  # noqa: PTH208  (of a descriptor: the path may be another folder by now)
            try:
                status = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
            except FileNotFoundError:
                continue  # another process deleted it
            if name.startswith(".") and time.time() - status.st_mtime > STALE:
                self._delete(name)
            elif not name.startswith("."):
                entries.append((status.st_mtime, status.st_size, name))
        total = sum(size for _, size, _ in entries)
        for _, size, name in sorted(entries):
            if total <= self._limit:
                break
            self._delete(name)
            total -= size

    def _delete(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._folder)
        except FileNotFoundError:
            pass  # as wanted
        except OSError as error:
            _log.debug("cache entry %s cannot be deleted: %s", name, error)


def own_folder(folder: Path, instead: str) -> int:
    """Return a descriptor of a folder that only this user can write to, made where there is none; the caller closes it.

    ``instead`` is what can be done where that is another's folder. Raises NotPermitted.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(folder, str(error), instead) from error
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(descriptor)
        why = f"user {status.st_uid} owns it, its mode is {stat.S_IMODE(status.st_mode):#o}"
        raise _refused(folder, why, instead)
    return descriptor


def _refused(folder: Path, why: str, instead: str) -> NotPermitted:
    return NotPermitted(
        f"{folder}: not a folder of this user alone, so nothing in it can be believed",
        why=why,
        next_step=f"chmod go-w {folder}, {instead}",
    )


def _name(image: Image) -> str:
    """The name of an image's entry: by its content and by what makes the analysis."""
    layout = (image.build_id, image.fixed_address, image.base, image.segments, image.sections)
    unwind = (image.eh_frame_hdr, image.eh_frame)
    key = hashlib.sha256(f"{sources()}{np.__version__}{layout}{unwind}".encode())
    key.update(np.ascontiguousarray(image.memory).data)
    return f"{image.build_id[:16]}-{key.hexdigest()[:40]}"


@cache
def sources() -> str:
    """A digest of this package's sources: a change to any of them may change what an analysis says."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(bytes(path.relative_to(package)) + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _arrays(code: Code) -> _Arrays:
    found: _Arrays = {name: getattr(code, name) for name in _OWN}
    for part, owner in (("decoded", code.decoded), ("references", code.references)):
        found.update({f"{part}.{item.name}": getattr(owner, item.name) for item in fields(owner)})
    return found


def _restore(image: Image, arrays: _Arrays) -> Code:
    """The code again. Raises KeyError or ValueError where the arrays do not fit the image or each other."""
    base, raw = code_bytes(image)
    parts = {
        prefix: {name: arrays.pop(f"{prefix}.{name}") for name in (item.name for item in fields(kind))}
        for prefix, kind in (("decoded", Decoded), ("references", References))
    }
    own = {name: arrays.pop(name) for name in _OWN}
    per_byte = [*parts["decoded"].values(), own["is_start"], own["masked"]]
    per_function = [own[name] for name in _OWN[:5]] + [parts["references"].pop(name) for name in ("first", "last")]
    for group, length in (
        (per_byte, len(raw)),
        (per_function, len(own["starts"])),
        ([*parts["references"].values()], len(parts["references"]["target"])),
    ):
        if any(len(array) != length for array in group):
            raise ValueError("arrays of different lengths")
    if arrays:
        raise ValueError(f"an array too many: {sorted(arrays)[0]}")
    parts["references"].update(first=per_function[-2], last=per_function[-1])
    decoded, references = Decoded(**parts["decoded"]), References(**parts["references"])  # type: ignore[arg-type]
    return Code(image=image, base=base, raw=raw, decoded=decoded, references=references, **own)  # type: ignore[arg-type]


def _pack(arrays: _Arrays) -> list[bytes]:
    """The file of an entry, in parts."""
    body: list[bytes] = []
    for array in arrays.values():
        content = np.ascontiguousarray(array).tobytes()
        body += [content, bytes(-len(content) % ALIGNMENT)]
    table = [[name, array.dtype.str, len(array)] for name, array in arrays.items()]
    head = json.dumps({"digest": _digest(table, body), "arrays": table}, separators=(",", ":")).encode()
    return [MAGIC, len(head).to_bytes(8, "little"), head, *body]


def _unpack(raw: bytes) -> _Arrays:
    """The arrays of an entry, read-only. Raises ValueError, KeyError or TypeError where it is damaged."""
    length = int.from_bytes(raw[8:16], "little")
    if raw[:8] != MAGIC or 16 + length > len(raw):
        raise ValueError("no entry of this format")
    head = json.loads(raw[16 : 16 + length])
    if head["digest"] != _digest(head["arrays"], [memoryview(raw)[16 + length :]]):
        raise ValueError("its content is not what was written")
    found: _Arrays = {}
    at = 16 + length
    for name, kind, count in head["arrays"]:
        array = np.frombuffer(raw, np.dtype(str(kind)), int(count), at)
        found[name] = array
        at += array.nbytes + -array.nbytes % ALIGNMENT
    return found


def _digest(table: list[list[object]], body: list[bytes] | list[memoryview]) -> str:
    digest = hashlib.sha256(json.dumps(table).encode())
    for part in body:
        digest.update(part)
    return digest.hexdigest()
