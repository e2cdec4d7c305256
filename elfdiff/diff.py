"""The whole way from two files to a patch object, or to the reason why there is none."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from elfdiff.building.closure import joined
from elfdiff.building.moves import idle_code
from elfdiff.building.patchbuild import Draft, build, build_of, draft
from elfdiff.building.reasons import collect, old_code
from elfdiff.building.sidebyside import old_codes
from elfdiff.cache import Cache
from elfdiff.decoding.code import Code, load_code
from elfdiff.differences.comparison import Comparison, changed_functions, compare
from elfdiff.dwarf.debugfile import debug_symbols, find_debug_file
from elfdiff.dwarf.debuginfo import DebugInfo
from elfdiff.errors import BadInput, NothingToPatch, Refused
from elfdiff.findingcodes import MOVED_CODE
from elfdiff.findings import find
from elfdiff.images.image import Image
from elfdiff.images.imagefile import load_image
from elfdiff.patches.evidence import pack
from elfdiff.patchobject import Build, Finding, PatchObject, Reason, Severity

MIN_MATCHED = 0.4
"""Share of the larger build's code that must be matched; below it these are two different programs.

The larger one's, since programs of one package share a library of their own (ls and cat).
"""


@dataclass(frozen=True)
class Options:
    """``lines``: include functions that differ in line numbers only; ``allow``: finding codes that only warn.

    ``debug_dirs`` are searched for separate debug files, before the system's own. ``cache``: the folder where
    analyses are kept, None for none.
    """

    lines: bool = False
    allow: frozenset[str] = frozenset()
    debug_dirs: tuple[Path, ...] = ()
    cache: Path | None = None


@dataclass(frozen=True)
class Analysis:
    """What a pair of builds comes to. ``error`` says why there is no patch to be had; None: there is one.

    ``draft`` is what a patch would hold, findings or not; None where the builds cannot be compared or are the same.
    ``joined`` as ``closure.joined`` gives it.
    """

    old: Build
    new: Build
    error: NothingToPatch | Refused | None
    draft: Draft | None
    joined: dict[int, int]
    findings: tuple[Finding, ...]

    def patch(self) -> PatchObject:
        """The draft as a patch object, whatever the findings are; only without ``error`` may it be applied."""
        assert self.draft is not None
        with _no_collector():
            patch = build(self.draft, self.findings)
            evidence = pack(collect(self.draft, self.joined))
            patch = replace(patch, evidence=evidence, old_code=old_code(self.draft) if evidence else b"")
            asked = not any(f.code == MOVED_CODE and f.lifted for f in self.findings)
            idle = idle_code(self.draft.comparison.old, self.draft.moves) if asked else ()
            return replace(patch, old_codes=old_codes(self.draft, self.findings), idle=idle)


def diff(old_path: Path, new_path: Path, options: Options) -> PatchObject:
    """Make a patch object from two builds; its id is set when it is written.

    Raises BadInput (no ELF files, two different programs, damaged debug information), NotPermitted (the cache),
    NothingToPatch, or Refused with the findings.
    """
    result = analyse(old_path, new_path, options)
    if result.error is not None:
        raise result.error
    return result.patch()


def analyse(old_path: Path, new_path: Path, options: Options) -> Analysis:
    """Compare two builds, whatever comes of it. Raises BadInput as ``diff`` does."""
    with _no_collector():
        return _analyse(old_path, new_path, options)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Without the garbage collector: nearly all that a comparison makes is kept, and searched again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _analyse(old_path: Path, new_path: Path, options: Options) -> Analysis:
    (old_image, old_debug), (new_image, new_debug) = (_load(path, options) for path in (old_path, new_path))
    builds = build_of(old_image), build_of(new_image)
    incomparable = _incomparable(old_image, new_image)
    if incomparable is not None:
        return Analysis(*builds, incomparable, None, {}, ())
    try:
        old, new = _codes(old_image, new_image, options)
    except Refused as no_code:
        return Analysis(*builds, no_code, None, {}, ())
    comparison = compare(old, new)
    _same_program(comparison, old, new)
    members = joined(comparison, changed_functions(comparison, lines=options.lines))
    result = draft(comparison, np.array(sorted(members), np.int64), comparison.changed)
    result.debug = old_debug, new_debug
    nothing = not members and not comparison.differing_data
    findings = () if nothing else find(result, options.allow)
    refusals = tuple(f for f in findings if f.severity is Severity.REFUSE)
    error: NothingToPatch | Refused | None = None
    if nothing:
        error = NothingToPatch(
            "no difference that matters",
            why=f"{len(old)} functions are the same; {len(comparison.line_only)} differ in line numbers only",
            next_step="--lines would include those" if comparison.line_only else "",
        )
    elif refusals:
        error = _refused(f"{old_path.name} -> {new_path.name}", refusals)
    elif not members:
        error = NothingToPatch("no function differs", why="what differs was lifted by --allow")
    return Analysis(*builds, error, result, members, findings)


def _incomparable(old: Image, new: Image) -> NothingToPatch | Refused | None:
    if old.build_id == new.build_id:
        return NothingToPatch(
            f"{old.path} and {new.path} are the same build",
            why=f"both have build-id {old.build_id}",
            next_step="name the new build second",
        )
    if old.fixed_address != new.fixed_address:
        return Refused(
            "one build is position-independent, the other is linked at a fixed address",
            why=f"{new.path} is {'ET_EXEC' if new.fixed_address else 'ET_DYN'}",
            next_step="build both the same way",
        )
    return None


def _load(path: Path, options: Options) -> tuple[Image, DebugInfo | None]:
    """A build, named by its separate debug file where it has no symbols itself."""
    image = load_image(path)
    file = find_debug_file(image, options.debug_dirs)
    if file is None:
        return image, None
    if file.separate and not image.symbols.complete:
        image = replace(image, symbols=debug_symbols(file) or image.symbols)
    return image, DebugInfo(file) if file.described else None


def _codes(old: Image, new: Image, options: Options) -> tuple[Code, Code]:
    if options.cache is None:
        with ThreadPoolExecutor(2) as both:  # most of it is numpy, which lets go of the interpreter
            first, second = both.map(load_code, (old, new))
        return first, second
    with Cache(options.cache) as cache:
        return cache.code(old), cache.code(new)


def _refused(what: str, refusals: tuple[Finding, ...]) -> Refused:
    error = Refused(
        f"{what}: not safe to patch ({len(refusals)} finding(s))",
        why=", ".join(dict.fromkeys(f.code for f in refusals)),
        next_step=refusals[0].lift,
        details=tuple(line for finding in refusals for line in finding.lines()),
    )
    error.findings = refusals
    return error


def _same_program(comparison: Comparison, old: Code, new: Code) -> None:
    sizes = old.ends - old.starts
    matched = int(sizes[comparison.matching.new_of >= 0].sum())
    larger = max(int(sizes.sum()), int((new.ends - new.starts).sum()))
    if matched < MIN_MATCHED * larger:
        share = 100 * matched // max(1, larger)
        raise BadInput(
            f"{old.image.path} and {new.image.path} are two different programs",
            why=f"only {share} % of the code of the larger one is found in the other",
            next_step="name two builds of the same program",
        )


def summary(patch: PatchObject) -> dict[str, int]:
    """Counts for people and machines: functions by reason, references by what they lead to."""
    counts: dict[str, int] = {f"functions_{reason}": 0 for reason in Reason}
    for function in patch.functions:
        counts[f"functions_{function.reason}"] += 1
    symbols, numbers = np.unique(patch.relocations["symbol"], return_counts=True)
    by_symbol = dict(zip(symbols.tolist(), numbers.tolist(), strict=True))
    counts["functions"] = len(patch.functions)
    counts["entry_jumps"] = sum(f.entry_jump for f in patch.functions)
    counts["line_only"] = len(patch.line_only)
    counts["references"] = len(patch.relocations)
    counts["references_old_image"] = by_symbol.get(0, 0)
    counts["references_patch"] = by_symbol.get(1, 0)
    counts["references_imports"] = sum(n for s, n in by_symbol.items() if s > 1)
    counts["bytes"] = sum(s.size for s in patch.segments)
    return counts
