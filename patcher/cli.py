"""The command line: the only place that prints, and that turns an error into an exit status.

Text for people goes to stdout, errors and talk to stderr. With ``--json`` stdout carries exactly one object, whatever
happens, with ``schema``, ``command`` and ``exit``, and on an error ``error`` with what, why and next.

A signal that asks a command to end (SIGHUP, SIGINT, SIGQUIT, SIGTERM) ends one that changes nothing at once. One that
works on a process heeds it where it can still undo everything: then it exits with 1 and says ``interrupted``. Later it
finishes, exits with 0 and says that the signal came too late.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType
from typing import Any, NoReturn, cast

from elfdiff.errors import EXIT_NAMES, BadInput, Interrupted, LivegraftError

from . import interruption
from .commands import Report, Verb
from .commands.shared import error_json, error_lines

SCHEMA = 1
"""Raised when a reader of the JSON output would misunderstand it."""

VERBS = {
    "diff": "Make a patch object from two builds of one program.",
    "inspect": "Explain a patch object, or what two builds come to.",
    "check": "Do everything that apply would do but the writing.",
    "apply": "Put a patch in force in a running process.",
    "revert": "Take a patch out of force again.",
    "blocking": "Show what is in the way of a patch.",
    "status": "Show which patches a process carries.",
    "doctor": "Say whether livegraft can work here, and on a process.",
    "rehearse": "Rehearse a patch under load, as a job of a CI.",
    "outdated": "List the processes that run files which were replaced on disk.",
    "upgrade": "Bring processes up to the files that replaced theirs on disk.",
}
"""Verb -> first line of its module's docstring; here too, so that the help needs none of the modules."""

_ENDED_AT_ONCE = frozenset({"", "diff", "doctor", "inspect", "outdated", "status"})
"""Verbs that stop no process and write to none: a signal may end them anywhere."""

_ending = threading.Event()

_EPILOG = """\
exit status:
  0 ok   1 failed, target as before   2 bad input   3 nothing to patch   4 refused   5 busy, try again
  6 not permitted   7 target may be damaged   8 some processes done, others not
"""


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print, so that ``--json`` covers wrong usage, too."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(message, next_step=f"{self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    _ending.clear()
    for number in interruption.ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1), or a job of a script in the background
            signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files and symbols may be no UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(words)
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Let every signal that asks to end unwind like Ctrl-C; no longer when this process ends in any case."""
    del frame
    if not _ending.is_set():
        raise KeyboardInterrupt(signal.Signals(number).name)


def _run(words: list[str]) -> int:
    verb = _verb_in(words)
    as_json = "--json" in words
    try:
        if verb in _ENDED_AT_ONCE:
            return _run_verb(words, verb, as_json, None)
        with interruption.deferred() as deferral:
            return _run_verb(words, verb, as_json, deferral)
    except KeyboardInterrupt as error:
        return _fail(_interrupted(str(error)), verb, as_json)


def _run_verb(words: list[str], verb: str, as_json: bool, deferral: interruption.Deferral | None) -> int:
    try:
        report = _perform(words, verb)
    except LivegraftError as error:
        return _fail(error, verb, as_json)
    except Exception as error:
        if os.environ.get("LIVEGRAFT_DEBUG"):
            raise
        return _fail(_bug(error), verb, as_json)
    finally:
        late = deferral.take() if deferral else ()
        if deferral:
            _ending.set()  # what is said now is true: no signal may change the exit status
    if late:
        notes = (*report.notes, f"{' and '.join(late)} came too late to undo anything: the command was finished")
        report = replace(report, notes=notes, json={**report.json, "came_too_late": list(late)})
    _show(report, verb, as_json)
    return report.exit_code


def _verb_in(words: Sequence[str]) -> str:
    return next((word for word in words if word in VERBS), "")


def _perform(words: Sequence[str], verb: str) -> Report:
    parser, module = _parser(verb)
    # Without a verb only the wrong usage is to be said, not that its --json is unknown.
    arguments = parser.parse_args(words if verb else [word for word in words if word != "--json"])
    if module is None or arguments.verb != verb:
        raise BadInput("no command was given", next_step="livegraft --help")
    return module.run(arguments)


def _parser(verb: str) -> tuple[argparse.ArgumentParser, Verb | None]:
    """Return the parser, with the arguments of the one verb that is asked for, and the verb's module."""
    parser = _Parser(
        prog="livegraft",
        description="Bring a running program up to date in place: no restart, no lost connection.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", title="commands")
    module = None
    for name, line in VERBS.items():
        below = verbs.add_parser(
            name, help=line, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if name == verb:
            imported = importlib.import_module(f"{__package__}.commands.{name}")
            module = cast(Verb, imported)
            below.description = imported.__doc__
            module.prepare_parser(below)
            below.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser, module


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **more)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        sys.stdout.write(f"livegraft {version('livegraft')}\n")
        parser.exit(0)


def _interrupted(name: str) -> Interrupted:
    return Interrupted(
        "interrupted", why=f"{name or 'SIGINT'} came; no process was touched", next_step="run the command again"
    )


def _bug(error: Exception) -> LivegraftError:
    return LivegraftError(
        f"this is a bug in livegraft: {type(error).__name__}: {error}",
        next_step="run it again with LIVEGRAFT_DEBUG=1 and report what it prints",
    )


def _show(report: Report, verb: str, as_json: bool) -> None:
    for line in report.notes:
        sys.stderr.write(f"{line}\n")
    if as_json:
        _show_json(report.json, verb, report.exit_code)
        return
    for line in report.text:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _show_json(body: dict[str, Any], verb: str, code: int) -> None:
    head = {"schema": SCHEMA, "command": verb, "exit": {"code": code, "name": EXIT_NAMES[code]}}
    sys.stdout.write(json.dumps({**head, **body}, indent=2) + "\n")
    sys.stdout.flush()


def _fail(error: LivegraftError, verb: str, as_json: bool) -> int:
    if as_json:
        _show_json({"error": error_json(error)}, verb, error.exit_code)
        return error.exit_code
    first, *others = error_lines(error)
    sys.stderr.write(f"livegraft: {first}\n")
    for line in others:
        sys.stderr.write(f"{line}\n")
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
