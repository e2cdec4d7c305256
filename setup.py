"""What pyproject.toml cannot say without an experimental table: the optional part in C (patcher/threads/batch.py)."""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "patcher/threads/batch.c"
DIGEST = hashlib.sha256((Path(__file__).parent / SOURCE).read_bytes()).hexdigest()[:16]

setup(
    ext_modules=[
        Extension(
            "patcher.threads._batch",
            [SOURCE],
            define_macros=[("SOURCE", f'"{DIGEST}"')],
            depends=[SOURCE, "setup.py"],
            # Bound when it is opened, so that nothing has to be looked up in the pause.
            extra_compile_args=["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"],
            extra_link_args=["-Wl,-z,now"],
            optional=True,  # where no compiler is, everything is done in Python
        )
    ]
)
