"""The keys of a TOML file, taken one by one: each is checked, and all that is wrong is said at once.

A problem is one line: the key with its table, what is wrong, what is expected. Where there is one, a stand-in is
returned, so that the reader goes on and finds the others; what it builds is not used then.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

_PLACEHOLDER = re.compile(r"(?<!\$)\{([a-z_]+)\}")  # not ${name}, which is the shell's
_ENVIRONMENT_NAME = re.compile(r"[^=\0]+")
ABSENT = re.compile("")
"""Stands for a regular expression that was not given, or that is wrong."""


def filled(text: str, values: Mapping[str, str]) -> str:
    """``text`` with its placeholders replaced; one without a value stays as it is."""
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)


def shown(value: object) -> str:
    """Return a value as a problem names it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


class Keys:
    """One table of the file. ``path`` is its name as it stands in front of its keys, ``problems`` grows."""

    def __init__(self, table: Mapping[str, object], path: str, problems: list[str]) -> None:
        """``table`` as tomllib gives it."""
        self._table = table
        self._path = path
        self._known: list[str] = []
        self.problems = problems

    def name(self, key: str) -> str:
        """Return the key with its table, as the file would have it in one line."""
        return f"{self._path}.{key}" if self._path else key

    def has(self, key: str) -> bool:
        """Whether the key is given; it is a known one from now on."""
        if key not in self._known:
            self._known.append(key)
        return key in self._table

    def holds_table(self, key: str) -> bool:
        """Whether the key is given, as a table."""
        return self.has(key) and isinstance(self._table[key], dict)

    def wrong(self, key: str, what: str, expected: str) -> None:
        """Note a problem."""
        self.problems.append(f"{self.name(key)}: {what}; expected {expected}")

    def done(self) -> None:
        """Note every key that nobody has asked for. To be called last."""
        for key in self._table:
            if key not in self._known:
                near = difflib.get_close_matches(key, self._known, 1)
                hint = f"{near[0]}, perhaps, or another of " if near else "one of "
                self.wrong(key, "unknown key", hint + ", ".join(sorted(self._known)))

    def table(self, key: str, *, required: bool = False) -> Keys | None:
        """A table in this one; None where it is not given, or is none."""
        if not self.has(key):
            if required:
                self.wrong(key, "missing", f"a table [{self.name(key)}]")
            return None
        value = self._table[key]
        if isinstance(value, dict):
            return Keys(value, self.name(key), self.problems)
        self.wrong(key, f"{shown(value)} is no table", f"a table [{self.name(key)}]")
        return None

    def tables(self, key: str) -> list[Keys]:
        """An array of tables, at least one."""
        expected = f"one or more tables [[{self.name(key)}]]"
        value = self._table[key] if self.has(key) else []
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            self.wrong(key, "missing" if value == [] else f"{shown(value)} is no array of tables", expected)
            return []
        name = self.name(key)
        return [Keys(item, f"{name}[{number}]", self.problems) for number, item in enumerate(value, 1)]

    def text(self, key: str, expected: str, *, default: str | None = None, empty: bool = False) -> str:
        """A string; ``empty`` lets it be so. Required where there is no default."""
        if not self.has(key):
            if default is None:
                self.wrong(key, "missing", expected)
            return default or ""
        value = self._table[key]
        if not isinstance(value, str) or "\0" in value or not (value or empty):
            self.wrong(key, shown(value), expected)
            return ""
        return value

    def texts(self, key: str, expected: str) -> tuple[str, ...]:
        """An array of strings, none of them empty; () where it is not given."""
        value = self._table[key] if self.has(key) else []
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            self.wrong(key, shown(value), expected)
            return ()
        return tuple(value)

    def number(self, key: str, default: float, low: float, high: float, unit: str) -> float:
        """A number from ``low`` to ``high``."""
        value = self._table[key] if self.has(key) else default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.wrong(key, shown(value), f"a number of {unit} from {low:g} to {high:g}")
            return default
        return value

    def count(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``."""
        value = self._table[key] if self.has(key) else default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.wrong(key, shown(value), f"a whole number from {low} to {high}")
            return default
        return value

    def flag(self, key: str) -> bool:
        """True or false; false where it is not given."""
        value = self._table[key] if self.has(key) else False
        if not isinstance(value, bool):
            self.wrong(key, shown(value), "true or false")
        return value is True

    def choice(self, key: str, words: Sequence[str]) -> str:
        """One of some words, the first where it is not given."""
        value = self._table[key] if self.has(key) else words[0]
        if not isinstance(value, str) or value not in words:
            self.wrong(key, shown(value), " or ".join(f'"{word}"' for word in words))
            return words[0]
        return value

    def regex(self, key: str, *, lines: bool = False) -> re.Pattern[str]:
        """A regular expression of Python's re; ``lines``: its ^ and $ stand for those of every line."""
        text = self.text(key, "a regular expression")
        try:
            return re.compile(text, re.MULTILINE if lines else 0)
        except re.error as error:
            self.wrong(key, f"{shown(text)}: {error}", "a regular expression")
            return ABSENT

    def file(self, key: str, folder: Path, what: str) -> Path:
        """A regular file; what it is called is relative to ``folder``."""
        expected = f"{what}, as a path relative to {folder}"
        text = self.text(key, expected)
        path = folder / text
        if text and not path.is_file():
            self.wrong(key, f"no file {path}", expected)
        return path

    def template(
        self, key: str, expected: str, names: Collection[str], *, default: str | None = None, empty: bool = False
    ) -> str:
        """A string with placeholders of ``names``."""
        text = self.text(key, expected, default=default, empty=empty)
        self._check_placeholders(key, text, names)
        return text

    def command(self, key: str, names: Collection[str]) -> tuple[str, ...]:
        """A command: a program and its arguments, with placeholders of ``names``."""
        expected = 'a program and its arguments, as an array of strings like ["program", "argument"]'
        value = self._table[key] if self.has(key) else None
        if value is None:
            self.wrong(key, "missing", expected)
            return ()
        words = value if isinstance(value, list) else []
        if not words or not words[0] or not all(isinstance(word, str) and "\0" not in word for word in words):
            self.wrong(key, shown(value), expected)
            return ()
        for word in words:
            self._check_placeholders(key, word, names)
        return tuple(words)

    def environment(self, key: str, names: Collection[str]) -> dict[str, str]:
        """Variables of the environment: a table of strings, with placeholders of ``names``."""
        table = self.table(key)
        if table is None:
            return {}
        found = {}
        for variable in table._table:
            if not _ENVIRONMENT_NAME.fullmatch(variable):
                table.wrong(variable, "no name of a variable", "a name without = in it")
            found[variable] = table.template(variable, "a string, the variable's value", names, empty=True)
        return found

    def _check_placeholders(self, key: str, text: str, names: Collection[str]) -> None:
        for found in dict.fromkeys(_PLACEHOLDER.findall(text)):
            if found not in names:
                expected = ", ".join(f"{{{name}}}" for name in names)
                self.wrong(key, f"{{{found}}} in {shown(text)} stands for nothing", f"one of {expected}")
