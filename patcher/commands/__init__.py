"""The verbs of the command line, one module each.

A verb's module has a docstring, which is its help text; ``prepare_parser(parser)``, which adds its arguments; and
``run(arguments)``, which does the work and returns a ``Report``. Heavy imports belong inside ``run``, because the
help must come at once. Only ``patcher.cli`` prints and exits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from elfdiff.errors import BadInput

from ..pausing.conditions import USUAL, Conditions

if TYPE_CHECKING:
    from patcher.targets.selection import Selection


@dataclass(frozen=True)
class Report:
    """What a verb has to say: ``json`` for ``--json`` (without schema and exit), ``text`` lines for people."""

    json: dict[str, Any]
    text: Sequence[str]
    exit_code: int = 0
    notes: Sequence[str] = field(default=())
    """Lines for people about how it went; on stderr."""


class Verb(Protocol):
    """What a module of this package offers."""

    @staticmethod
    def prepare_parser(parser: argparse.ArgumentParser) -> None:
        """Add the verb's arguments; ``--json`` is there already."""

    @staticmethod
    def run(arguments: argparse.Namespace) -> Report:
        """Do the work. Raises LivegraftError."""


def add_pid(parser: argparse.ArgumentParser) -> None:
    """Add ``--pid``, the process to work on."""
    parser.add_argument("--pid", type=process_id, required=True, metavar="PID", help="the process")


def add_patches(parser: argparse.ArgumentParser) -> None:
    """Add the patch objects, one or a set."""
    parser.add_argument(
        "patches",
        nargs="+",
        type=Path,
        metavar="PATCH",
        help="a patch object made by livegraft diff; several, each of another image, are a set: all of them or none",
    )


def add_selection(parser: argparse.ArgumentParser, *, changes: bool = True, required: bool = True) -> None:
    """Add ``--pid``, ``--exe``, ``--name``, ``--unit``, ``--tree`` and ``--all``: which processes to work on.

    With ``changes`` also ``--atomic``; ``required`` says that one of the first five must be given.
    """
    which = parser.add_argument_group("which processes").add_mutually_exclusive_group(required=required)
    which.add_argument("--pid", type=process_id, metavar="PID", help="this process")
    which.add_argument("--exe", type=_not_empty, metavar="PATH", help="those that run this file, also a deleted one")
    which.add_argument("--name", type=_not_empty, metavar="NAME", help="those of this name (ps -o comm)")
    which.add_argument("--unit", type=_not_empty, metavar="UNIT", help="those of this systemd unit")
    which.add_argument("--tree", type=process_id, metavar="PID", help="this process and all that descend from it")
    parser.add_argument("--all", action="store_true", help="all of them, where several match")
    if changes:
        parser.add_argument("--atomic", action="store_true", help="where one fails, put the others back as they were")


def selection_of(arguments: argparse.Namespace) -> Selection | None:
    """Return which processes are meant, None for the one of ``--pid``. Raises BadInput (wrong usage)."""
    from ..targets.selection import By, Selection

    if arguments.pid is not None:
        extra = [name for name in ("all", "atomic") if getattr(arguments, name, False)]
        if extra:
            raise BadInput(
                f"--{extra[0]} does not go with --pid",
                why="--pid means one process",
                next_step="for it and what descends from it: --tree PID",
            )
        return None
    by = next(item for item in By if getattr(arguments, item.value) is not None)
    return Selection(by, str(getattr(arguments, by.value)), arguments.all or by is By.TREE)


def _not_empty(text: str) -> str:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return text


def conditions_of(arguments: argparse.Namespace) -> Conditions:
    """Return what was asked by the options that the functions below add.

    Each stores under the name of its field, and nothing where it is not given: then, and where a verb has no such
    option, it is as usual.
    """
    given = vars(arguments)
    asked: dict[str, Any] = {item.name: given[item.name] for item in fields(Conditions) if item.name in given}
    asked |= {name: tuple(value) for name, value in asked.items() if isinstance(value, list)}
    return Conditions(**asked)


def add_conditions(parser: argparse.ArgumentParser, *, keep_live: bool = True) -> None:
    """Add the options for all that can be asked of a transaction; without ``--keep-live`` where it means nothing."""
    add_timeout(parser)
    add_deep_check(parser)
    if keep_live:
        add_keep_live(parser)
    add_when_idle(parser)


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """Add ``--timeout``, how long to wait for patched functions to become idle."""
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=argparse.SUPPRESS,
        metavar="SECONDS",
        help=f"how long to wait until no thread is in a patched function (default: {USUAL.timeout:g})",
    )


def add_deep_check(parser: argparse.ArgumentParser) -> None:
    """Add ``--deep-check``, ``--no-deep-check`` and ``--deep-limit``: the search for coroutines in memory."""
    parser.add_argument(
        "--deep-check",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="search all writable memory for stacks that no thread runs on and that would return into a patched "
        "function; done by itself where an image of the process calls makecontext or the like",
    )
    parser.add_argument(
        "--deep-limit",
        type=_mebibytes,
        default=argparse.SUPPRESS,
        metavar="MIB",
        help=f"memory that may be searched while the process stands still, in MiB (default: {USUAL.deep_limit >> 20})",
    )


def _mebibytes(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 40):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of MiB")
    return int(text) << 20


def add_keep_live(parser: argparse.ArgumentParser) -> None:
    """Add ``--keep-live``, which functions threads may finish in their old code."""
    parser.add_argument(
        "--keep-live",
        type=_names,
        action="extend",
        default=argparse.SUPPRESS,
        metavar="NAME[,NAME]",
        help="let threads that are in these functions finish them in their old code (a main loop that never returns), "
        "where the patch says that this is safe; each new call runs the new code",
    )


def add_when_idle(parser: argparse.ArgumentParser) -> None:
    """Add ``--when-idle`` and ``--no-when-idle``: what must be idle beside the functions that change."""
    parser.add_argument(
        "--when-idle",
        type=_names,
        action="extend",
        default=argparse.SUPPRESS,
        metavar="NAME[,NAME]",
        help="wait until no thread is in these functions either, although they do not change: the common caller of two "
        "between which a check moves (symbols, or addresses of the file)",
    )
    parser.add_argument(
        "--no-when-idle",
        dest="own_idle",
        action="store_false",
        default=argparse.SUPPRESS,
        help="do not wait for what the patch itself names so (finding moved-code)",
    )


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of functions")
    return names


def process_id(text: str) -> int:
    """Read a process id, for argparse. Raises ArgumentTypeError."""
    value = int(text) if text.isascii() and text.isdigit() else 0
    if not 0 < value < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a process id")
    return value


def seconds(text: str) -> float:
    """Return a number of seconds that an option was given. Raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def plural(count: int, noun: str) -> str:
    """Return ``1 function`` or ``2 functions``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
