"""Reasons to refuse or to warn: one function a hazard (D6).

To add a hazard, write a function that yields findings from a draft and add it to ``RULES``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from elfdiff.code import LEA, FieldKind
from elfdiff.image import Image
from elfdiff.patchbuild import Draft
from elfdiff.patchobject import Finding, PatchFunction, Severity

ENTRY_JUMP_SIZE = 5
"""Bytes of a ``jmp rel32``."""
MIN_LAYOUT_FUNCTIONS = 2
"""So many functions with the same shift are a changed layout; so many shifted fields in one function as well."""
STACK_SWITCHERS = frozenset(("makecontext", "swapcontext", "setcontext"))
MANY = 12
"""Places that one finding names."""

Rule = Callable[[Draft], Iterator[Finding]]


def find(draft: Draft, allowed: frozenset[str]) -> tuple[Finding, ...]:
    """All findings on a draft; the codes in ``allowed`` warn where they would refuse."""
    found = [finding for rule in RULES for finding in rule(draft)]
    return tuple(
        replace(f, severity=Severity.WARN, lift="lifted by --allow") if f.code in allowed else f for f in found
    )


def unbound_references(draft: Draft) -> Iterator[Finding]:
    """A reference of the new code for which no evidence says what it names in the running program."""
    names = draft.comparison.new.names
    by_target: dict[int, set[str]] = defaultdict(set)
    why: dict[int, str] = {}
    for item in draft.resolver.unbound:
        by_target[item.target].add(names[item.function] if item.function >= 0 else "data")
        why[item.target] = item.why
    if by_target:
        places = [
            f"{_where(draft.comparison.new.image, t)} ({why[t]}) in {', '.join(sorted(by_target[t])[:3])}"
            for t in sorted(by_target)
        ]
        yield Finding(
            "unpinned-address",
            Severity.REFUSE,
            f"{len(by_target)} address(es) of the new build cannot be found in the old one",
            tuple(places[:MANY]),
            "the new code would read or write something else than the running program does",
            "builds with symbols (not stripped) say what the addresses are",
        )


def guessed_addresses(draft: Draft) -> Iterator[Finding]:
    """Variables bound by their neighbours alone."""
    guessed = draft.resolver.by_interval
    if guessed:
        yield Finding(
            "neighbour-address",
            Severity.WARN,
            f"{len(guessed)} variable(s) are bound by their neighbours, which all moved alike",
            tuple(f"{n:#x} -> {o:#x}" for n, o in sorted(guessed.items())[:MANY]),
            "no unchanged function names them; the old build names the predicted addresses",
            "builds with symbols (not stripped) would make it certain",
        )


def struct_layout(draft: Draft) -> Iterator[Finding]:
    """Fields that moved by the same distance, or alone in a function that differs in nothing else."""
    names = draft.comparison.new.names
    functions: dict[int, set[int]] = defaultdict(set)
    fields: dict[int, Counter[tuple[int, int]]] = defaultdict(Counter)
    certain: set[int] = set()
    for trace in draft.traces:
        for old, new in trace.fields:
            functions[new - old].add(trace.function)
            fields[new - old][old, new] += 1
            if trace.only:
                certain.add(new - old)
    for delta, where in sorted(functions.items()):
        refuse = delta in certain or max(len(where), len(fields[delta])) >= MIN_LAYOUT_FUNCTIONS
        shown = ", ".join(f"{a:#x}->{b:#x}" for (a, b), _ in fields[delta].most_common(4))
        yield Finding(
            "struct-layout",
            Severity.REFUSE if refuse else Severity.WARN,
            f"fields moved by {delta:+d} bytes in {len(where)} function(s): {shown}",
            tuple(names[j] for j in sorted(where)[:MANY]),
            "a structure seems to have changed its layout; objects that exist already have the old one",
            "restart the program, or show by the sources that no structure changed and --allow struct-layout",
        )


def allocation_sizes(draft: Draft) -> Iterator[Finding]:
    """A constant size given to an allocator changed: a structure may have grown at its end."""
    found = [(trace.function, sizes) for trace in draft.traces for sizes in trace.sizes]
    if found:
        yield Finding(
            "allocation-size",
            Severity.REFUSE,
            f"{len(found)} constant size(s) given to an allocator differ: "
            + ", ".join(f"{a} -> {b}" for _, (a, b) in found[:4]),
            tuple(sorted({draft.comparison.new.names[j] for j, _ in found}))[:MANY],
            "objects that exist already have the old size, and the new code may reach beyond it",
            "restart the program, or --allow allocation-size if no existing object is concerned",
        )


def exceptions(draft: Draft) -> Iterator[Finding]:
    """Code through which C++ exceptions may pass: the running program does not know the patch's unwind tables."""
    code = draft.comparison.new
    catching = [f.name for f in draft.functions if code.has_lsda[code.function_of(f.new_start)]]
    throwing = any(name.startswith(("libstdc++", "libc++")) for name in code.image.needed)
    if catching or throwing:
        yield Finding(
            "exceptions",
            Severity.REFUSE,
            "C++ exceptions may pass through the changed functions",
            tuple(catching[:MANY]) or tuple(f.name for f in draft.functions[:MANY]),
            "the patch's unwind tables are not registered with the running program, so such an exception ends it",
            "if no exception passes through these functions, --allow exceptions",
        )


def label_tables(draft: Draft) -> Iterator[Finding]:
    """Tables of labels (computed goto) of a changed function: old labels may be stored in live data."""
    tables = draft.resolver.label_tables
    if tables:
        yield Finding(
            "label-table",
            Severity.REFUSE,
            f"{len(tables)} table(s) of code labels belong to changed functions",
            tuple(_where(draft.comparison.new.image, t) for t in sorted(tables)[:MANY]),
            "if the program stores label addresses (direct threaded code), stored ones lead into the old code",
            "if labels are only jumped to and never stored, --allow label-table",
        )


def initial_values(draft: Draft) -> Iterator[Finding]:
    """Writable variables whose initial value differs: the running one has its own value by now."""
    differing = draft.comparison.differing_data
    if differing:
        yield Finding(
            "initial-value",
            Severity.REFUSE,
            f"{len(differing)} writable variable(s) start with another value in the new build",
            tuple(_where(draft.comparison.new.image, n) for _, n in differing[:MANY]),
            "code that did not change uses them, and the running program keeps the value that it has",
            "if the running values may stay, --allow initial-value",
        )


def tls_layout(draft: Draft) -> Iterator[Finding]:
    """Thread-local storage of another size or with other initial values."""
    old, new = draft.comparison.old.image, draft.comparison.new.image
    if old.tls is None and new.tls is None:
        return
    shifts = [(trace.function, shift) for trace in draft.traces for shift in trace.thread_local]
    if shifts:
        yield Finding(
            "tls-layout",
            Severity.REFUSE,
            f"thread-local variables moved in {len({j for j, _ in shifts})} function(s)",
            tuple(sorted({draft.comparison.new.names[j] for j, _ in shifts}))[:MANY],
            "the threads that run have blocks of the old layout",
            "restart the program",
        )
    same_shape = (
        old.tls is not None
        and new.tls is not None
        and (old.tls.memsz, old.tls.filesz, old.tls.align) == (new.tls.memsz, new.tls.filesz, new.tls.align)
        and old.read(old.tls.vaddr, old.tls.filesz) == new.read(new.tls.vaddr, new.tls.filesz)
    )
    if not same_shape:
        yield Finding(
            "tls-layout",
            Severity.REFUSE,
            "thread-local storage has another layout or other initial values",
            (f"old: {old.tls}", f"new: {new.tls}"),
            "the threads that run have blocks of the old layout",
            "restart the program",
        )


def short_entries(draft: Draft) -> Iterator[Finding]:
    """An old function with no room for the entry jump."""
    old = draft.comparison.old
    places = []
    for function in draft.functions:
        short = function.entry_jump and (function.old_size or 0) < ENTRY_JUMP_SIZE
        if short and not _padded(draft, function):
            places.append(f"{function.name} ({function.old_size} bytes at {function.old_start or 0:#x})")
    if places:
        yield Finding(
            "short-function",
            Severity.REFUSE,
            f"{len(places)} function(s) of {old.image.name} are shorter than the entry jump",
            tuple(places[:MANY]),
            "the jump would overwrite the function behind",
            "restart the program",
        )


def _padded(draft: Draft, function: PatchFunction) -> bool:
    """The bytes behind a short function up to the jump's end are padding that nothing names."""
    old = draft.comparison.old
    assert function.old_start is not None and function.old_size is not None
    end, need = function.old_start + function.old_size, function.old_start + ENTRY_JUMP_SIZE
    named = old.referenced
    first, last = np.searchsorted(named, [end, need])
    at = end - old.base
    offset = 0
    while end + offset < need:
        opcode = int(old.decoded.opcode[at + offset])
        if opcode not in (0x90, 0xCC, 0x11F) or old.function_of(end + offset) >= 0:
            return False
        offset += int(old.decoded.length[at + offset])
    return int(first) == int(last)


def code_without_unwind(draft: Draft) -> Iterator[Finding]:
    """Changed code whose bounds or instructions are not certain."""
    code = draft.comparison.new
    places = []
    for function in draft.functions:
        j = code.function_of(function.new_start)
        i = draft.comparison.old.function_of(function.old_start) if function.old_start is not None else -1
        uncertain = not (code.has_unwind[j] and code.sound[j])
        uncertain |= i >= 0 and not (draft.comparison.old.has_unwind[i] and draft.comparison.old.sound[i])
        if uncertain:
            places.append(function.name)
    if places:
        yield Finding(
            "no-unwind",
            Severity.REFUSE,
            f"{len(places)} changed stretch(es) of code have no unwind information or hold data",
            tuple(places[:MANY]),
            "neither their bounds nor whether a thread is in them can be told",
            "restart the program",
        )


def constructors(draft: Draft) -> Iterator[Finding]:
    """Constructors or destructors that the new build has and the running program never ran."""
    old, new = draft.comparison.old.image, draft.comparison.new.image
    for name in (".preinit_array", ".init_array", ".fini_array"):
        sizes = [s.end - s.start if s else 0 for s in (old.section(name), new.section(name))]
        if sizes[0] != sizes[1]:
            yield Finding(
                "constructors",
                Severity.REFUSE,
                f"{name} has {sizes[1] // 8} entries where the old build has {sizes[0] // 8}",
                (name,),
                "a constructor of the new build would have run at the start of the program",
                "restart the program",
            )


def changed_constructors(draft: Draft) -> Iterator[Finding]:
    """A constructor whose code changed: it ran when the program started, and does not run again."""
    old = draft.comparison.old.image
    sections = [s for name in (".preinit_array", ".init_array") if (s := old.section(name))]
    started = {old.pointer_at(place) for s in sections for place in range(s.start, s.end, 8)}
    found = [f.name for f in draft.functions if f.old_start in started]
    if found:
        yield Finding(
            "constructors",
            Severity.REFUSE,
            f"{len(found)} constructor(s) changed",
            tuple(found[:MANY]),
            "they ran when the program started, and what they set up would be otherwise now",
            "if the running state may stay, --allow constructors",
        )


def ambiguous_functions(draft: Draft) -> Iterator[Finding]:
    """A function that live data may point to, and that unchanged code takes for another one than its bytes say."""
    old = draft.comparison.old
    references = old.references
    taken = (references.opcode == LEA) | (references.kind >= FieldKind.ABSOLUTE_DISPLACEMENT)
    pointers = np.union1d(references.target[taken], old.image.relative_targets)
    doubtful = [i for i in sorted(draft.comparison.matching.contradicted) if int(old.starts[i]) in pointers]
    if doubtful:
        yield Finding(
            "ambiguous-function",
            Severity.REFUSE,
            f"{len(doubtful)} function(s) of the old build may be one or another function of the new one",
            tuple(old.names[i] for i in doubtful[:MANY]),
            "their bytes say one thing, what refers to them another; pointers to them may be stored in live data",
            "restart the program",
        )


def coroutines(draft: Draft) -> Iterator[Finding]:
    """A program that switches stacks: one that no thread runs on may hold a frame of a changed function."""
    switching = {slot.symbol for slot in draft.comparison.old.image.slots.values()} & STACK_SWITCHERS
    if switching:
        yield Finding(
            "coroutines",
            Severity.REFUSE,
            "the program switches between stacks of its own",
            tuple(sorted(switching)),
            "a stack that no thread runs on just now may return into a changed function, and is not looked at",
            "if no changed function switches stacks, nor calls what does, --allow coroutines",
        )


def new_imports(draft: Draft) -> Iterator[Finding]:
    """Symbols that the new code needs and the old image does not import: they must be found in the process."""
    imports = draft.resolver.imports
    missing = set(draft.comparison.new.image.needed) - set(draft.comparison.old.image.needed)
    if missing:
        yield Finding(
            "new-library",
            Severity.REFUSE,
            f"the new build needs {len(missing)} more librar(ies)",
            tuple(sorted(missing)),
            "the running program has not loaded them",
            "restart the program",
        )
    if imports:
        yield Finding(
            "new-import",
            Severity.WARN,
            f"{len(imports)} import(s) that the old build does not have",
            tuple(f"{i.name}@{i.version}" if i.version else i.name for i in imports[:MANY]),
            "they are bound when the patch is applied, and refused if no loaded library has them",
            "nothing to do",
        )


def new_variables(draft: Draft) -> Iterator[Finding]:
    """Variables that only the patch has: they start with their initial value."""
    own = draft.resolver.new_variables
    if own:
        yield Finding(
            "new-variable",
            Severity.WARN,
            f"{len(own)} variable(s) are new and live in the patch",
            tuple(_where(draft.comparison.new.image, n) for n in sorted(own)[:MANY]),
            "they start with their initial value when the patch is applied",
            "nothing to do",
        )


def _where(image: Image, address: int) -> str:
    """An address with its symbol, where there is one."""
    symbols = image.symbols
    index = int(np.searchsorted(symbols.values, address, "right")) - 1
    while index >= 0 and symbols.values[index] == address and not symbols.sizes[index]:
        index -= 1
    if index >= 0 and symbols.values[index] <= address < symbols.values[index] + symbols.sizes[index]:
        offset = address - int(symbols.values[index])
        return f"{symbols.names[index]}{f'+{offset:#x}' if offset else ''}"
    section = image.section_at(address)
    return f"{address:#x} in {section.name}" if section else f"{address:#x}"


RULES: tuple[Rule, ...] = (
    unbound_references,
    guessed_addresses,
    struct_layout,
    allocation_sizes,
    exceptions,
    label_tables,
    initial_values,
    tls_layout,
    short_entries,
    code_without_unwind,
    constructors,
    changed_constructors,
    ambiguous_functions,
    coroutines,
    new_imports,
    new_variables,
)
