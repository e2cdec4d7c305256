"""The words of an explanation that text and page share: a sentence for each piece of evidence, and lines of figures."""

from __future__ import annotations

from collections.abc import Sequence

from elfdiff.explain import CodeCounts, ExplainedFunction, Explanation
from elfdiff.patches.evidence import Evidence, EvidenceKind, Names
from elfdiff.patches.quoting import printable

REFERENCE_NAMES = {
    Names.FUNCTION: "functions",
    Names.INSIDE: "parts of functions",
    Names.IMPORT: "imports",
    Names.VARIABLE: "variables",
    Names.NEW_VARIABLE: "new variables",
    Names.CONSTANT: "constants of the old build",
    Names.OWN_CONSTANT: "own constants",
    Names.TABLE: "switch tables",
    Names.OTHER: "others",
}


def sentences(evidence: Evidence, counts: CodeCounts | None) -> list[str]:
    """One piece of evidence in words, a sentence a line; what is not printable is escaped."""
    subject, old, new = (printable(text) for text in (evidence.subject, evidence.old, evidence.new))
    match evidence.kind:
        case EvidenceKind.CODE:
            return [_code_sentence(counts)] if counts else []
        case EvidenceKind.NAMES:
            gone, gained = f"no longer names {old}", f"names now {new}"
            return [text for text, there in ((gone, old), (gained, new)) if there]
        case EvidenceKind.CONSTANT:
            what = f"a {subject}" if subject in ("string", "number", "switch table") else subject
            values = f": {old} -> {new}" if old or new else ""
            return [f"it reads {what}, which differs{values}"]
        case EvidenceKind.VARIABLE if subject == "unknown":
            return [f"nothing shows that both builds mean the same variable: {old}, and now {new}"]
        case EvidenceKind.NEW:
            return [f"has no counterpart; used by {subject}" if subject else "has no counterpart, and nothing names it"]
        case EvidenceKind.INLINED:
            seems = f"the change of {subject} is found in it: it seems to be inlined here"
            return [f"the difference lies in code of {subject}, which is inlined here" if new else seems]
        case EvidenceKind.CLOSURE:
            by = "through a switch table" if new == "switch table" else "by a branch"
            return [f"it hangs together with {subject}, {by} from one into the other"]
    return [_PLAIN[evidence.kind].format(subject=subject, old=old or "unknown", new=new or "unknown")]


_PLAIN = {
    EvidenceKind.SOURCE: "by its source lines: {old} -> {new}",
    EvidenceKind.CALLEE: "the same bytes lead to another function: {old} -> {new}",
    EvidenceKind.VARIABLE: "the same bytes lead to another variable: {old} -> {new}",
    EvidenceKind.MOVED: "most of its code was part of {subject} before",
    EvidenceKind.LINES: "differs in line numbers only",
}


def _code_sentence(counts: CodeCounts) -> str:
    parts = [
        (counts.removed, "removed"),
        (counts.added, "added"),
        (counts.operand, "with other operands"),
        (counts.reference, "that name something else"),
    ]
    said = ", ".join(f"{number} {what}" for number, what in parts if number) or "none differs"
    return f"its instructions differ: {said}; {counts.old} before, {counts.new} now"


def place_line(item: ExplainedFunction) -> str:
    """Where a function is and was, its sizes, and whether its old entry is redirected."""
    function = item.function
    new = f"{function.new_start:#x}, {function.new_size} bytes"
    if function.old_start is None:
        return f"new at {new}"
    how = "redirected" if function.entry_jump else "moves along"
    return f"{function.old_start:#x}, {function.old_size} bytes -> {new}; {how}"


def functions_line(counts: dict[str, int]) -> str:
    """How many functions are in a patch, by reason."""
    reasons = ("code", "constant", "callee", "handlers", "closure", "lines", "new")
    parts = [f"{counts[f'functions_{reason}']} {reason}" for reason in reasons if counts[f"functions_{reason}"]]
    return f"{counts['functions']} ({', '.join(parts) or 'none'}); {counts['entry_jumps']} redirected"


def references_line(counts: dict[str, int]) -> str:
    """How many references are rewritten, by what they lead to."""
    return (
        f"{counts['references']} rewritten: {counts['references_old_image']} into the running program, "
        f"{counts['references_patch']} inside the patch, {counts['references_imports']} to imports"
    )


def reference_counts(functions: Sequence[ExplainedFunction]) -> str:
    """How many references the new code makes, by what they name."""
    totals = {names: sum(item.references.get(names, 0) for item in functions) for names in Names}
    return ", ".join(f"{totals[names]} {REFERENCE_NAMES[names]}" for names in Names if totals[names])


def adds_line(explanation: Explanation) -> str:
    """What the patch adds to a process, in whole pages."""
    sizes = explanation.sizes
    return (
        f"{sizes.executable // 1024} KiB of code, {sizes.constant // 1024} KiB of constants, "
        f"{sizes.writable // 1024} KiB of variables (whole pages)"
    )


def plural(count: int, noun: str) -> str:
    """``1 range`` or ``2 ranges``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
