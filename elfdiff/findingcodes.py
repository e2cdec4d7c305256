"""The codes of all findings: stable names for scripts, and whether a maintainer may lift them.

Light on purpose: the command line's help needs it, and nothing that is heavy.
"""

from __future__ import annotations

CODES: dict[str, tuple[bool, str]] = {
    "allocation-size": (True, "a constant size given to an allocator differs"),
    "ambiguous-function": (False, "a function that pointers may lead to may be one or another of the new build"),
    "calling-convention": (True, "a function is called otherwise, and not all of its callers are in the patch"),
    "constant-identity": (True, "a constant that differs is compared by its address"),
    "class-layout": (True, "a class has other virtual functions or other bases"),
    "constructors": (True, "code that runs at the start of a program differs"),
    "coroutines": (False, "the program switches between stacks of its own"),
    "debug-info": (False, "debug information that is there could not be used"),
    "enum-values": (True, "an enumeration gives another number to a name"),
    "exceptions": (True, "exceptions may pass through changed functions whose handlers would not be found"),
    "exported-symbol": (True, "a symbol that other modules may have bound to is gone or of another kind or size"),
    "initial-value": (True, "a writable variable starts with another value"),
    "kept-function": (True, "a function that live data may point to is gone in the new build"),
    "label-table": (True, "a changed function has a table of code labels"),
    "moved-code": (True, "something moves between functions that are called in turn"),
    "neighbour-address": (False, "a variable is bound by its neighbours alone"),
    "new-import": (True, "the new code needs a symbol that the old build does not import"),
    "new-library": (False, "the new build needs a library that the old one does not"),
    "new-variable": (False, "a variable is new and lives in the patch"),
    "no-unwind": (False, "changed code has no unwind information"),
    "short-function": (False, "a changed function is shorter than the entry jump"),
    "static-guard": (False, "a static variable was initialised by the old code"),
    "struct-layout": (True, "a structure has another layout"),
    "tls-layout": (False, "thread-local storage has another layout"),
    "unpinned-address": (False, "an address of the new build cannot be found in the old one"),
    "variable-size": (False, "a variable that the new code uses has another size"),
    "variable-type": (True, "a variable that the new code may use has another type"),
}
"""Code -> (``--allow`` may lift it, what it says). Liftable is what a maintainer can know better than the files."""
MOVED_CODE = "moved-code"
NEW_IMPORT = "new-import"
ASKING = frozenset({MOVED_CODE, NEW_IMPORT})
"""Warnings that ask for something at apply, which ``--allow`` leaves out."""
LIFTABLE = tuple(sorted(code for code, (liftable, _) in CODES.items() if liftable))
