"""C++ exceptions that pass through the patch."""

from __future__ import annotations

from collections.abc import Iterator

from elfdiff.building.patchbuild import Draft
from elfdiff.findings.places import members
from elfdiff.patchobject import Finding, Severity


def exceptions(draft: Draft) -> Iterator[Finding]:
    """Code through which C++ exceptions may pass, in a build without the table by which a patch's are found."""
    if draft.exceptions and draft.comparison.new.image.eh_frame_hdr is None:
        yield Finding(
            "exceptions",
            Severity.REFUSE,
            "C++ exceptions may pass through the changed functions",
            members(draft, draft.functions),
            "the new build has no .eh_frame_hdr, by which the running program could find their handlers",
            "link with --eh-frame-hdr; if no exception passes through these functions, --allow exceptions",
        )
