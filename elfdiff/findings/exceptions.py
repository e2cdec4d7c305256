"""C++ exceptions that pass through the patch."""

from __future__ import annotations

from collections.abc import Iterator

from elfdiff.findings.places import members
from elfdiff.patchbuild import Draft
from elfdiff.patchobject import Finding, Severity


def exceptions(draft: Draft) -> Iterator[Finding]:
    """Code through which C++ exceptions may pass: the running program does not know the patch's unwind tables."""
    code = draft.comparison.new
    catching = [f for f in draft.functions if code.has_lsda[code.function_of(f.new_start)]]
    throwing = any(name.startswith(("libstdc++", "libc++")) for name in code.image.needed)
    if catching or throwing:
        yield Finding(
            "exceptions",
            Severity.REFUSE,
            "C++ exceptions may pass through the changed functions",
            members(draft, catching or draft.functions),
            "the patch's unwind tables are not registered with the running program, so such an exception ends it",
            "if no exception passes through these functions, --allow exceptions",
        )
