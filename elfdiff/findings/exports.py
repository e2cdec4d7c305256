"""What other modules bind to by name: they go on using what the old build gave them."""

from __future__ import annotations

from collections.abc import Iterator

from elfdiff.building.patchbuild import Draft
from elfdiff.findings.places import MANY
from elfdiff.images.image import STT_FUNC, STT_GNU_IFUNC, STT_OBJECT, Export, Image
from elfdiff.patchobject import Finding, Severity

_FUNCTIONS = (STT_FUNC, STT_GNU_IFUNC)


def exported_symbols(draft: Draft) -> Iterator[Finding]:
    """Exported symbols that the new build drops, or that are of another kind or size there."""
    old, new = draft.comparison.old.image, draft.comparison.new.image
    known = {export.key: export for export in new.exported}
    places = [
        f"{export.key} ({why})"
        for export in sorted(old.exported, key=lambda one: one.key)
        if not _is_copy(old, export) and (why := _broken(export, known.get(export.key)))
    ]
    if places:
        yield Finding(
            "exported-symbol",
            Severity.REFUSE,
            f"{len(places)} symbol(s) that {old.name} exports are not what they were",
            tuple(places[:MANY]),
            "other modules of the process may have bound to them, and go on as the old build was",
            "restart the program, or --allow exported-symbol if no other module uses them",
        )


def _is_copy(image: Image, export: Export) -> bool:
    """A library's variable in the program that copied it: the library decides what it is."""
    return export.value in image.copies


def _broken(old: Export, new: Export | None) -> str | None:
    if new is None:
        return "gone"
    if (old.type in _FUNCTIONS, old.type == STT_GNU_IFUNC) != (new.type in _FUNCTIONS, new.type == STT_GNU_IFUNC):
        return "of another kind"
    if old.type not in _FUNCTIONS and old.type != new.type:
        return "of another kind"
    if old.type == STT_OBJECT and old.size != new.size:
        return f"{old.size} bytes, now {new.size}"
    return None


def entries_inside(draft: Draft) -> Iterator[Finding]:
    """Exported functions that begin inside a patched function: callers by that name would stay in the old code."""
    code = draft.comparison.old
    patched = {function.old_start for function in draft.functions if function.old_start is not None}
    inside = []
    for export in code.image.exported:
        function = code.function_of(export.value) if export.type in _FUNCTIONS else -1
        if function >= 0 and int(code.starts[function]) in patched and int(code.starts[function]) != export.value:
            inside.append(export.key)
    if inside:
        yield Finding(
            "exported-symbol",
            Severity.REFUSE,
            f"{len(inside)} exported function(s) begin inside a function that is patched",
            tuple(sorted(inside)[:MANY]),
            "only the function's own entry leads to the new code; a call by that name would run the old one",
            "restart the program, or --allow exported-symbol if no other module uses them",
        )
