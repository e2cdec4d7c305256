"""``inspect``: text, JSON and page are views of one explanation; every mistake gets one message and exit status 2."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elfdiff.diff import Options, diff
from elfdiff.errors import BadInput
from elfdiff.explain import Explanation, explain
from elfdiff.patches.evidence import Evidence, EvidenceKind, Names, Reference, pack, unpack
from elfdiff.patches.patchfile import read_patch, write_patch
from patcher.cli import main
from patcher.explanation.as_html import page
from patcher.explanation.as_text import Style, listings, overview
from tests.compile import Compiler
from tests.unit.test_explain import LINES, REASONS, REFUSED, build
from tests.verdict import program

SCRIPT, ESCAPE, TEXT = "<script>alert(1)</script>", "red\x1b[31m", "<img src=x onerror=alert(2)>"
HOSTILE = program(
    "SEPARATE int evil(int x) { puts(\"<img src=x onerror=alert(2)>\"); return x + STEP; }\n"
    "SEPARATE int wicked(int x) { puts(\"\\033[2J\"); return x - STEP; }\n", "evil(n) + wicked(n)", STEP=("1", "2"),
)  # fmt: skip
"""Names and strings that would run in a browser, or clear a terminal, if nobody escaped them."""


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.out)
        assert value["exit"]["code"] == self.status
        return value


Inspect = Callable[..., Outcome]


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Inspect:
    def run(*words: object) -> Outcome:
        capsys.readouterr()
        status = main(["inspect", *map(str, words)])
        streams = capsys.readouterr()
        return Outcome(status, streams.out, streams.err)

    return run


@pytest.fixture(scope="session")
def builds(compiled: Compiler) -> tuple[Path, Path]:
    return build(compiled, REASONS)


@pytest.fixture(scope="session")
def fix(builds: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explained") / "fix"
    write_patch(diff(*builds, Options()), path)
    return path


@pytest.fixture(scope="session")
def explained(fix: Path) -> Explanation:
    return explain(read_patch(fix))


@pytest.fixture(scope="session")
def hostile(compiled: Compiler, tmp_path_factory: pytest.TempPathFactory) -> Explanation:
    folder = tmp_path_factory.mktemp("hostile")
    names = [f"--redefine-sym=evil={SCRIPT}", f"--redefine-sym=wicked={ESCAPE}"]
    paths = [folder / name for name in ("old", "new")]
    for made, path in zip(build(compiled, HOSTILE), paths, strict=True):
        subprocess.run(["objcopy", *names, made, path], check=True)
    found = explain(diff(*paths, Options()))
    assert {SCRIPT, ESCAPE} <= {item.function.name for item in found.functions}
    return found


# -- a patch object -----------------------------------------------------------------------------------------------


def test_the_text_names_every_function_with_its_reason(fix: Path, explained: Explanation, inspect: Inspect) -> None:
    outcome = inspect(fix)
    assert outcome.status == 0
    for item in explained.functions:
        assert re.search(rf"^    {re.escape(item.function.name)}  {item.function.reason}  ", outcome.out, re.MULTILINE)
    assert 'it reads a string, which differs: "hello, world" -> "hello, moon"' in outcome.out
    assert "KiB of constants" in outcome.out
    assert "R_X86_64" not in outcome.out and "PC32" in inspect(fix, "-v").out


def test_the_json_is_complete(fix: Path, explained: Explanation, inspect: Inspect) -> None:
    found = inspect(fix, "--json").json
    assert found["schema"] == 1
    assert found["id"] == explained.id
    assert found["verdict"]["name"] == "ok"
    functions = {f["name"]: f for f in found["functions"]}
    assert functions.keys() == {f.function.name for f in explained.functions}
    greets = functions["greets"]
    assert greets["evidence"] == [
        {"kind": "constant", "subject": "string", "old": '"hello, world"', "new": '"hello, moon"'}
    ]
    assert greets["instructions"]["reference"] == 1 and greets["instructions"]["removed"] == 0
    assert greets["references"] == {"own-constant": 1, "import": 1}
    assert found["sizes"]["new_code"] == sum(f["new_size"] for f in found["functions"])
    assert found["sizes"]["executable"] == sum(s["size"] for s in found["segments"] if s["flags"] & 1)
    assert len(found["references"]) == found["summary"]["references"]
    assert "diff" not in found
    shown = inspect(fix, "--json", "--diff", "greets").json["diff"]
    assert [one["name"] for one in shown] == ["greets"]
    assert [line["change"] for line in shown[0]["lines"]].count("reference") == 1


def test_the_listing_shows_the_functions_that_are_asked_for(
    fix: Path, inspect: Inspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    outcome = inspect(fix, "--diff", "greets", "scales")
    lines = outcome.out.splitlines()
    assert 'lea rdi, "hello, world"' in outcome.out and "[2.5]" in outcome.out
    assert "too big" not in outcome.out
    assert max(map(len, lines)) <= 150
    changed = next(line for line in lines if "hello, world" in line)
    assert re.search(r'"hello, world" +~ +\w+  lea rdi, "hello, moon"', changed)
    assert "\x1b" not in outcome.out


def test_a_narrow_listing_has_old_and_new_below_each_other(
    fix: Path, inspect: Inspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = inspect(fix, "--diff", "greets").out.splitlines()
    at = next(k for k, line in enumerate(lines) if "hello, world" in line)
    assert lines[at].startswith("- ") and lines[at + 1].startswith("+ ") and "hello, moon" in lines[at + 1]
    assert max(map(len, lines[3:])) <= 60


def test_what_is_the_same_is_folded_but_for_its_context(explained: Explanation) -> None:
    style = Style(160, colour=False)
    (item,) = [f for f in explained.functions if f.function.name == "main"]
    whole = list(listings([item], None, style))
    folded = list(listings([item], 1, style))
    hidden = sum(int(found[1]) for line in folded if (found := re.search(r"\.\.\. (\d+) instructions the same", line)))
    assert hidden > 5
    assert len(whole) == len(folded) + hidden - sum("the same" in line for line in folded)


def test_colours_are_for_terminals(fix: Path, explained: Explanation) -> None:
    assert any("\x1b[32m" in line for line in listings(explained.functions, 3, Style(160, colour=True)))
    plain = [*overview(explained, Style(80, colour=False)), *listings(explained.functions, 3, Style(80, colour=False))]
    assert not any("\x1b" in line for line in plain)
    own, other = pty.openpty()
    command = [sys.executable, "-m", "patcher.cli", "inspect", str(fix), "--diff", "greets"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(command, stdout=other, env=environment) as process:
        os.close(other)
        shown = b""
        while chunk := _read(own):
            shown += chunk
    os.close(own)
    assert process.returncode == 0
    assert b"\x1b[33m" in shown and b"hello, moon" in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # EIO: the other side is closed (pty(7))
        return b""


# -- two builds ---------------------------------------------------------------------------------------------------


def test_a_refused_pair_is_explained(compiled: Compiler, inspect: Inspect, tmp_path: Path) -> None:
    pair = [shutil.copy(path, tmp_path / name) for path, name in zip(build(compiled, REFUSED), "ab", strict=True)]
    outcome = inspect(*pair)
    assert outcome.status == 0
    assert "verdict    refused" in outcome.out and "struct-layout" in outcome.out
    assert outcome.out.index("struct-layout") < outcome.out.index("    one  code")
    found = inspect(*pair, "--json").json
    assert found["id"] is None
    assert found["verdict"]["code"] == 4
    assert "struct-layout" in {f["code"] for f in found["findings"] if f["severity"] == "refuse"}
    assert {f["name"] for f in found["functions"]} >= {"one", "two"}
    assert "- " in inspect(*pair, "--diff", "one").out or "|" in inspect(*pair, "--diff", "one").out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    lifted = inspect(*pair, "--allow", "struct-layout", "--json").json
    assert all(f["severity"] == "warn" for f in lifted["findings"] if f["code"] == "struct-layout")


def test_a_pair_says_the_same_as_its_patch(builds: tuple[Path, Path], fix: Path, inspect: Inspect) -> None:
    pair, patch = inspect(*builds, "--json").json, inspect(fix, "--json").json
    assert {**pair, "id": patch["id"]} == patch


def test_what_is_left_out_is_named(compiled: Compiler, inspect: Inspect) -> None:
    pair = build(compiled, LINES)
    assert "below, further" in inspect(*pair).out
    assert {item["name"] for item in inspect(*pair, "--json").json["line_only"]} == {"below", "further"}
    functions = inspect(*pair, "--lines", "--json").json["functions"]
    assert {f["name"]: f["reason"] for f in functions}["below"] == "lines"


# -- the page -----------------------------------------------------------------------------------------------------

VOID = {"meta", "br", "img", "link", "input", "hr"}


@dataclass
class Page(HTMLParser):
    """What a browser would see: open elements, texts, what is referred to."""

    open: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    handlers: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    headings: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "srcset", "action", "data", "poster", "background"):
                self.links.append(value or "")
            if name.startswith("on") or name == "style":
                self.handlers.append(f"{tag} {name}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.texts.append(data)


def parsed(text: str) -> Page:
    found = Page()
    found.feed(text)
    found.close()
    assert found.open == [] and "<script>" not in "".join(found.scripts)
    return found


def test_the_page_has_every_function_finding_and_fact(fix: Path, explained: Explanation, inspect: Inspect) -> None:
    path = fix.parent / "page.html"
    outcome = inspect(fix, "--html", path)
    assert outcome.status == 0 and str(path) in outcome.err
    found = parsed(path.read_text())
    said = " ".join(found.texts)
    for item in explained.functions:
        assert found.texts.count(item.function.name) >= 2, "in the table and above its code"
    assert '"hello, world" -> "hello, moon"' in said and "call puts@plt" in said
    assert explained.id in said and explained.new.build_id in said
    assert path.stat().st_mode & 0o777 == 0o644
    assert inspect(fix, "--html", path, "--json").json["html"] == str(path)


def test_the_page_of_a_refused_pair_has_every_finding(compiled: Compiler, inspect: Inspect, tmp_path: Path) -> None:
    pair = build(compiled, REFUSED)
    assert inspect(*pair, "--html", tmp_path / "page").status == 0
    said = " ".join(parsed((tmp_path / "page").read_text()).texts)
    for finding in inspect(*pair, "--json").json["findings"]:
        assert all(part in said for part in (finding["code"], finding["what"], *finding["where"]))


def test_the_page_stands_alone_and_is_well_formed(explained: Explanation, hostile: Explanation) -> None:
    for one in (explained, hostile):
        text = page(one, 3, "livegraft inspect fix")
        found = parsed(text)
        assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
        assert not {"img", "link", "iframe", "object", "embed", "base", "form"} & set(found.tags)
        assert "url(" not in text and "@import" not in text and "http" not in text.replace("http-equiv", "")
        assert not found.handlers
        assert len(found.ids) == len(set(found.ids))
        assert found.headings[0] == 1
        assert all(b - a <= 1 for a, b in pairwise(found.headings))
        assert {"th", "caption", "main", "header"} <= set(found.tags)


def test_names_and_strings_of_a_binary_do_nothing(hostile: Explanation) -> None:
    found = parsed(page(hostile, 3, f"livegraft inspect {SCRIPT}"))
    assert found.texts.count(SCRIPT) >= 2, "shown as it is called"
    assert any(TEXT in text for text in found.texts)
    assert found.tags.count("script") == len(found.scripts) == 1
    assert not any("alert" in script for script in found.scripts)
    lines = [*overview(hostile, Style(120, colour=False)), *listings(hostile.functions, 3, Style(120, colour=False))]
    assert all(line.isprintable() for line in lines)
    assert any("red\\x1b[31m" in line for line in lines)


def test_labels_of_a_patch_object_do_nothing(fix: Path) -> None:
    """A right checksum is no signature: whoever makes a patch object chooses what it says."""
    patch = read_patch(fix)
    evidence = [
        replace(f, evidence=(Evidence(EvidenceKind.NEW, ESCAPE + SCRIPT),), new=tuple(_renamed(r) for r in f.new))
        for f in unpack(patch.evidence)
    ]
    found = explain(replace(patch, evidence=pack(tuple(evidence)), tool_version=ESCAPE))
    style = Style(120, colour=False)
    assert all(line.isprintable() for line in (*overview(found, style), *listings(found.functions, 3, style)))
    shown = parsed(page(found, 3, ""))
    assert shown.tags.count("script") == 1 and any(SCRIPT in text for text in shown.texts)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_evidence_is_shown_or_bad_input(fix: Path, data: st.DataObject) -> None:
    patch = read_patch(fix)
    evidence = list(unpack(patch.evidence))
    number = data.draw(st.integers(0, len(evidence) - 1))
    size = patch.functions[number].new_size
    fields = st.builds(Reference, st.integers(0, size), st.integers(1, 8), st.sampled_from(Names), st.text(max_size=8))
    runs = st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
    evidence[number] = replace(
        evidence[number],
        new=tuple(data.draw(st.lists(fields, max_size=6))),
        runs=tuple(data.draw(st.lists(runs, max_size=3))),
    )
    try:
        found = explain(replace(patch, evidence=pack(tuple(evidence))))
    except BadInput:
        return
    style = Style(120, colour=False)
    assert all(line.isprintable() for line in (*overview(found, style), *listings(found.functions, 3, style)))
    parsed(page(found, 3, ""))


def _renamed(reference: Reference) -> Reference:
    return replace(reference, label=ESCAPE + SCRIPT)


def test_the_script_and_the_style_are_the_only_ones_that_the_page_lets_run(hostile: Explanation) -> None:
    text = page(hostile, 3, "")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert "unsafe" not in policy[1] and policy[1].startswith("default-src 'none'")
    assert len(re.findall(r"'sha256-[\w+/]{43}='", policy[1])) == 2


# -- mistakes -----------------------------------------------------------------------------------------------------


def fails(outcome: Outcome, *words: str) -> None:
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    assert outcome.err.count("livegraft: ") == 1 and "Traceback" not in outcome.err
    assert all(word in outcome.err for word in words), outcome.err


def test_a_function_that_is_not_in_the_patch(fix: Path, inspect: Inspect) -> None:
    fails(inspect(fix, "--diff", "greet"), "greet: no such function", "greets")
    fails(inspect(fix, "--diff", "zzzzzzzz"), "livegraft inspect lists them")


def test_what_is_no_patch_and_no_build(builds: tuple[Path, Path], inspect: Inspect, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("hello")
    fails(inspect(text), "not a livegraft patch object")
    fails(inspect(builds[0]), "not a livegraft patch object")
    fails(inspect(tmp_path / "missing"), "missing")
    fails(inspect(builds[0], text), "text")
    fails(inspect(builds[0], tmp_path / "missing"), "missing")


def test_a_page_that_cannot_be_written(fix: Path, builds: tuple[Path, Path], inspect: Inspect, tmp_path: Path) -> None:
    fails(inspect(fix, "--html", tmp_path / "no" / "page"), "cannot write the page")
    fails(inspect(fix, "--html", tmp_path), "cannot write the page")
    before = fix.read_bytes()
    fails(inspect(fix, "--html", fix), "would replace")
    fails(inspect(*builds, "--html", builds[1]), "would replace")
    assert fix.read_bytes() == before
    assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_fit(fix: Path, inspect: Inspect) -> None:
    fails(inspect(fix, "--lines"), "need two builds")
    fails(inspect(fix, "--allow", "struct-layout"), "need two builds")
    fails(inspect(fix, "--context", "-1"), "not a number of lines")
    fails(inspect(), "PATCH")


def test_a_patch_without_the_old_code(fix: Path, inspect: Inspect, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    write_patch(replace(read_patch(fix), evidence=b"", old_code=b""), bare)
    fails(inspect(bare, "--diff"), "does not hold the old code")
    outcome = inspect(bare)
    assert outcome.status == 0 and "greets  constant" in outcome.out and "carries no evidence" in outcome.out
    parsed(page(explain(read_patch(bare)), 3, ""))
    assert inspect(bare, "--json").json["explained"] is False
