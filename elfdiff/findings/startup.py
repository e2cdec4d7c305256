"""What happens when a program starts, and therefore does not happen to one that runs."""

from __future__ import annotations

from collections.abc import Iterator

from elfdiff.building.patchbuild import Draft
from elfdiff.findings.places import AT_END, AT_START, MANY, called_by, members
from elfdiff.images.image import R_X86_64_IRELATIVE, STT_GNU_IFUNC
from elfdiff.patchobject import Finding, Reason, Severity


def constructors(draft: Draft) -> Iterator[Finding]:
    """Constructors or destructors that the new build has and the running program never ran."""
    old, new = draft.comparison.old.image, draft.comparison.new.image
    for name in (*AT_START, *AT_END):
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
    started = called_by(draft.comparison.old.image, AT_START)
    starting = called_by(draft.comparison.new.image, AT_START)
    found = [f for f in draft.functions if f.old_start in started or f.new_start in starting]
    if found:
        yield Finding(
            "constructors",
            Severity.REFUSE,
            f"{len(found)} constructor(s) changed",
            members(draft, found),
            "they ran when the program started, and what they set up would be otherwise now",
            "if the running state may stay, --allow constructors",
        )


def changed_resolvers(draft: Draft) -> Iterator[Finding]:
    """A resolver of an indirect function changed: it has chosen, and is not asked again (STT_GNU_IFUNC)."""
    old = draft.comparison.old.image
    resolvers = {slot.addend for slot in old.slots.values() if slot.type == R_X86_64_IRELATIVE}
    resolvers |= {export.value for export in old.exported if export.type == STT_GNU_IFUNC}
    found = [f for f in draft.functions if f.old_start in resolvers]
    if found:
        yield Finding(
            "constructors",
            Severity.REFUSE,
            f"{len(found)} resolver(s) of indirect functions changed",
            members(draft, found),
            "they ran when the program started, and the implementation that they chose then stays in use",
            "if the choice may stay, --allow constructors",
        )


def new_imports(draft: Draft) -> Iterator[Finding]:
    """Symbols that the new code needs and the old image does not import: they must be found in the process."""
    imports = draft.resolver.imports
    missing = set(draft.comparison.new.image.needed) - set(draft.comparison.old.image.needed)
    if missing:
        yield Finding(
            "new-library",
            Severity.WARN,
            f"the new build needs {len(missing)} more librar(ies)",
            tuple(sorted(missing)),
            "the patch is refused by a process that did not load them when it started",
            "nothing to do",
        )
    if imports:
        yield Finding(
            "new-import",
            Severity.WARN,
            f"{len(imports)} import(s) that the old build does not have",
            tuple(f"{i.name}@{i.version}" if i.version else i.name for i in imports[:MANY]),
            "they are bound when the patch is applied, and refused if no loaded library has them; a process keeps the "
            "system-call filter of the old build: one that it may kill is refused, and one that sets up a filter later "
            "must let through what they call",
            "nothing to do; if the filter of a process lets through what they call, --allow new-import",
        )


def static_guards(draft: Draft) -> Iterator[Finding]:
    """A changed function that initialises static variables at its first call (Itanium C++ ABI, section 3.3.3).

    What the old code initialised already is not initialised again: its guard is set.
    """
    code = draft.comparison.new
    guarded = {
        stub
        for stub, address in code.image.plt.items()
        if (slot := code.image.slots.get(address)) is not None and slot.symbol == "__cxa_guard_acquire"
    }
    found = []
    for function in draft.functions:
        row = code.references.of(code.function_of(function.new_start))
        if function.reason is Reason.CODE and guarded.intersection(code.references.target[row].tolist()):
            found.append(function)
    if found:
        yield Finding(
            "static-guard",
            Severity.WARN,
            f"{len(found)} changed function(s) initialise static variables at their first call",
            members(draft, found),
            "a variable that the old code initialised keeps its value, whatever the new code would give it",
            "nothing to do",
        )
