"""A short run of the fuzzer with fixed seeds, what longer runs have found, and damaged patch objects.

``make fuzz`` makes the long run; ``tests/fuzz.py`` says how to replay a round.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from elfdiff.patches.patchfile import DIGEST_SIZE, read_patch
from fixtures.daemon import probe, run_kv
from fixtures.intact import altered_code, mappings
from tests.compile import Compiler
from tests.forkserver import BUG, Outcome, Task, livegraft, run, run_all
from tests.fuzz import LIFTED, Round, Subject, fuzz, rounds, smaller, subjects
from tests.mutation import Edit, Mutation, mutation, parts_of

ROUNDS = 60
PATCH_ROUNDS = 100
APPLY_ROUNDS = 10


@pytest.fixture(scope="module")
def pairs(cache_folder: Path) -> list[Subject]:
    return subjects(Compiler(cache_folder / "compiled"), None)


def test_undamaged_the_pairs_give_patches(pairs: list[Subject]) -> None:
    """So that damage is met wherever it is."""
    tasks = [(p.name, comparison(p.old, p.new)) for p in dict.fromkeys(pairs)]
    assert {name: outcome.status for name, outcome in run_all(tasks)} == {name: 0 for name, _ in tasks}


def comparison(old: Path, new: Path) -> Task:
    return lambda work: livegraft("diff", old, new, "-o", work / "patch", *LIFTED)


def test_damaged_builds_end_in_a_verdict_or_a_clear_error(
    pairs: list[Subject], capsys: pytest.CaptureFixture[str]
) -> None:
    result = fuzz(pairs, 1, ROUNDS)
    with capsys.disabled():
        print("", *result.lines(), sep="\n")
    assert result.faults == []
    assert result.statuses.total() == 2 * ROUNDS
    assert result.statuses[0] and result.statuses[2], "damage is met, and passed over where it does not matter"


FOUND: dict[str, tuple[str, bool, Mutation]] = {
    "a note that is endless": ("program", True, Mutation("", (Edit("shdr .note.gnu.build-id", 32, b"\xff" * 7),))),
    "string tables that lead to each other": (
        "debug", True,
        Mutation("", (Edit("shdr .strtab", 4, b"\2"), Edit("shdr .strtab", 40, b"\1\0\0\0"))),
    ),
    "names that are no UTF-8": ("library", True, Mutation("", (Edit(".dynstr", 1, b"\xe4" * 60),))),
    "a relocation outside": ("debug", False, Mutation("", (Edit(".relr.dyn", 4, b"\x2f\x39"),))),
    "a call that the end of the code cuts": ("fixed", True, Mutation("", (Edit(".fini", 8, b"\xe8"),))),
    "a cut to nothing": ("library", False, Mutation("", (), 0)),
    "a segment without end": ("program", True, Mutation("", (Edit("phdr 2", 40, b"\0\0\0\x7f"),))),
}  # fmt: skip
"""Pair, whether its new build is damaged, and how."""


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once(name: str, pairs: list[Subject]) -> None:
    subject, of_new, damage = FOUND[name]
    one = Round(0, next(p for p in pairs if p.name == subject), of_new, damage)
    outcome = run(one.task())
    assert outcome.fault == ""


# -- the fuzzer itself --------------------------------------------------------------------------------------------


def test_a_seed_is_one_damage(pairs: list[Subject]) -> None:
    raw = pairs[0].old.read_bytes()
    assert [mutation(raw, seed) for seed in range(200)] == [mutation(raw, seed) for seed in range(200)]
    damaged = {mutation(raw, seed).apply(raw) for seed in range(200)}
    assert len(damaged) > 150
    assert [str(one) for one in rounds(pairs, 7, 3)] == [str(one) for one in rounds(pairs, 7, 3)]


def test_the_parts_of_a_file_are_those_of_readelf(pairs: list[Subject]) -> None:
    from elftools.elf.elffile import ELFFile

    for pair in dict.fromkeys(pairs):
        parts = parts_of(pair.old.read_bytes())
        with pair.old.open("rb") as stream:
            elf = ELFFile(stream)
            for section in elf.iter_sections():
                if section["sh_type"] not in ("SHT_NULL", "SHT_NOBITS") and section["sh_size"]:
                    assert parts[section.name] == (section["sh_offset"], section["sh_size"])
            assert sum(name.startswith("phdr") for name in parts) == elf.num_segments()


def raises(work: Path) -> int:
    raise LookupError("deliberate")


def aborts(work: Path) -> int:
    faulthandler.disable()
    os.abort()


def allocates(work: Path) -> int:
    return len(b"\1" * (400 << 20)) * 0


def leaves(work: Path) -> int:
    (work / "patch").touch()
    return 0


def says_nothing(work: Path) -> int:
    return 2


@pytest.mark.parametrize(("task", "fault"), [(raises, "LookupError"), (aborts, "SIGABRT"), (allocates, "MB resident"),
                                             (says_nothing, "without saying why")])  # fmt: skip
def test_what_goes_wrong_is_seen(task: Task, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.forkserver.MEMORY", 400 << 20)
    assert fault in run(task).fault


def test_endless_loops_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def loops(work: Path) -> int:
        while True:
            pass

    monkeypatch.setattr("tests.forkserver.SECONDS", 1)
    assert "SIGXCPU" in run(loops).fault


def test_what_is_left_is_seen() -> None:
    assert run(leaves).left == ("patch",)


def test_a_fault_is_made_smaller(pairs: list[Subject]) -> None:
    """To the one edit that it needs, and to a byte of it."""

    class Broken(Round):
        def task(self) -> Task:
            raw = self.mutation.apply(self.file.read_bytes())
            return (lambda work: BUG) if raw[:4] != b"\x7fELF" else (lambda work: 0)

    edits = (Edit(".text", 3, b"xy"), Edit("ehdr", 0, b"\0" * 8), Edit(".data", 0, b"z"))
    broken = Broken(1, pairs[0], True, Mutation("", edits, 9000))
    least = smaller(broken, run(broken.task()).fault)
    assert least.mutation.edits == (Edit("ehdr", 0, b"\0"),)
    assert least.mutation.cut is None


# -- patch objects ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patch(kv: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("patch") / "kv.patch"
    assert run(lambda _: livegraft("diff", kv(1), kv(2), "-o", path)).status == 0
    return path


def with_digest(raw: bytes) -> bytes:
    """The file with a checksum that is right, if it still has one."""
    fresh = bytearray(raw)
    try:
        at, size = parts_of(raw)[".livegraft.digest"]
    except (KeyError, IndexError, OverflowError, struct.error):  # damaged too much to have one
        return raw
    if size != DIGEST_SIZE or at + size > len(raw):
        return raw
    fresh[at : at + size] = bytes(size)
    fresh[at : at + size] = hashlib.sha256(bytes(fresh)).digest()
    return bytes(fresh)


def damaged_patch(raw: bytes, seed: int) -> bytes:
    """Half of them with a right checksum, half of these in the description."""
    random = Random(seed)
    damaged = mutation(raw, seed).apply(raw)
    if random.random() < 0.5:
        return damaged
    if random.random() < 0.5:
        damaged = redescribed(raw, random)
    return with_digest(damaged)


ODD = (None, True, -1, 0, 1 << 63, 1 << 70, 1.5, "x", "", "0" * 40, [], [[]], {}, [None], "\udc80", "é", 4096, 4095)


def redescribed(raw: bytes, random: Random) -> bytes:
    """A value of the JSON description becomes another one, as long as it fits."""
    at, size = parts_of(raw)[".livegraft"]
    meta = json.loads(raw[at : at + size])
    here = meta
    while True:
        key = random.choice(list(here) if isinstance(here, dict) else range(len(here)))
        if not isinstance(here[key], dict | list) or not here[key] or random.random() < 0.3:
            break
        here = here[key]
    if random.random() < 0.2 and isinstance(here, dict):
        del here[key]
    else:
        here[key] = random.choice(ODD)
    changed = json.dumps(meta, separators=(",", ":")).encode()
    return raw[:at] + changed.ljust(size) + raw[at + size :] if len(changed) <= size else raw


def inspection(raw: bytes, seed: int) -> Task:
    def inspect(work: Path) -> int:
        path = work / "patch"
        path.write_bytes(damaged_patch(raw, seed))
        status = livegraft("inspect", path, "-v")
        path.unlink()
        return status

    return inspect


def test_damaged_patches_are_inspected_or_clear_errors(patch: Path) -> None:
    raw = patch.read_bytes()
    faults: list[tuple[int, Outcome]] = []
    statuses = set()
    for seed, outcome in run_all((seed, inspection(raw, seed)) for seed in range(PATCH_ROUNDS)):
        statuses.add(outcome.status)
        if outcome.fault or outcome.left:
            faults.append((seed, outcome))
    assert faults == []
    assert statuses == {0, 2}


def test_a_description_without_end_is_bad_input(patch: Path, tmp_path: Path) -> None:
    """Brackets that are never closed, deeper than a parser recurses."""
    raw = patch.read_bytes()
    at, size = parts_of(raw)[".livegraft"]
    deep = tmp_path / "deep"
    deep.write_bytes(with_digest(raw[:at] + b"[" * size + raw[at + size :]))
    outcome = run(lambda _: livegraft("inspect", deep))
    assert (outcome.fault, outcome.status) == ("", 2)


@pytest.mark.root
def test_a_damaged_patch_leaves_the_target_as_it_was(patch: Path, kv: Callable[..., Path]) -> None:
    """Cut or flipped, so that its checksum is wrong: refused before the process is looked at."""
    raw = patch.read_bytes()

    def application(seed: int, verb: str, pid: int) -> Task:
        def apply(work: Path) -> int:
            path = work / "patch"
            path.write_bytes(mutation(raw, seed).apply(raw))
            return livegraft(verb, path, "--pid", pid)

        return apply

    seeds = [seed for seed in range(APPLY_ROUNDS) if mutation(raw, seed).apply(raw) != raw]
    with run_kv(kv(1)) as daemon:
        before, answers = mappings(daemon.pid), probe(daemon.port)
        tasks = [((seed, verb), application(seed, verb, daemon.pid)) for seed in seeds for verb in ("check", "apply")]
        for key, outcome in run_all(tasks):
            assert (outcome.fault, outcome.status) == ("", 2), key
        assert altered_code(daemon.pid) == []
        assert [m for m in mappings(daemon.pid) if "x" in m.rights] == [m for m in before if "x" in m.rights]
        assert probe(daemon.port) == answers
        read_patch(patch)
        assert run(lambda _: livegraft("apply", patch, "--pid", daemon.pid)).status == 0, "undamaged it is applied"
        assert probe(daemon.port) != answers
