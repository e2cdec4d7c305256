"""Which installed package a file belongs to, asked of the package managers that are there."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Collection

_SECONDS = 20


def owners(paths: Collection[str]) -> dict[str, str]:
    """Return ``name version`` of the package of each path that dpkg or rpm knows; others are left out."""
    if not paths:
        return {}
    if shutil.which("dpkg-query"):
        return _of_dpkg(paths)
    if shutil.which("rpm"):
        return _of_rpm(paths)
    return {}


def _of_dpkg(paths: Collection[str]) -> dict[str, str]:
    # A file may be listed where it was before the directories of / were merged into /usr.
    asked = {name: path for path in sorted(paths) for name in (_before_merge(path), path)}
    packages = {}
    for line in _output("dpkg-query", "--search", *asked):
        names, separator, path = line.partition(": ")
        if separator and path in asked and not line.startswith("diversion by"):
            packages[asked[path]] = names.split(", ")[0]
    if not packages:
        return {}
    versions = {}
    for line in _output("dpkg-query", "--show", "--showformat=${binary:Package}\\t${Version}\\n", *packages.values()):
        name, _, version = line.partition("\t")
        versions[name] = version
        versions[name.partition(":")[0]] = version
    return {path: f"{name.partition(':')[0]} {versions.get(name, '')}".strip() for path, name in packages.items()}


def _before_merge(path: str) -> str:
    return path.removeprefix("/usr") if path.startswith(("/usr/lib", "/usr/bin/", "/usr/sbin/")) else path


def _of_rpm(paths: Collection[str]) -> dict[str, str]:
    found = {}
    for path in sorted(paths):
        lines = _output("rpm", "--query", "--file", path, "--queryformat", "%{NAME} %{VERSION}-%{RELEASE}\\n")
        if lines:
            found[path] = lines[0]
    return found


def _output(*command: str) -> list[str]:
    """Return the lines that a command prints; what it does not know it says on its standard error."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=_SECONDS, check=False)
    return os.fsdecode(done.stdout).splitlines()
