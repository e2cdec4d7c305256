"""PostgreSQL, patched in all of its processes while clients go on: published modules, and the program built twice."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures import recipes
from fixtures.debian import Unpacked
from fixtures.intact import altered_code
from fixtures.postgres import PROGRAMS, PostgresServer, postgres_build, run_postgres
from fixtures.source import Built, Recipe
from tests.conftest import Livegraft
from tests.real.examples import client, copied, passed

pytestmark = [pytest.mark.apt, pytest.mark.root]

OLD, NEW = "15.18-0+deb12u1", "15.20-0+deb12u1"
MODULES = "usr/lib/postgresql/15/lib"
CLOSED = "create type span as range (subtype = int4, multirange_type_name = closed.spans)"
DENIED = "ERROR: permission denied for schema closed"
ZONE = "select regexp_replace(timeofday(), '^.* ', '')"
Version = Callable[[str, str], Unpacked]
Pair = Callable[[Recipe], tuple[Built, Built]]


def unpacked(package: Unpacked, folder: Path) -> None:
    """A copy that can be changed: postgres finds its other files by their place relative to the program."""
    shutil.copytree(package.root, folder, symlinks=True)


@pytest.mark.long
def test_a_published_module(package_version: Version, livegraft: Livegraft) -> None:
    """Of 15.18 -> 15.20; all processes have it, since the postmaster loads it."""
    with copied("postgres") as example:
        for label, version in (("old", OLD), ("new", NEW)):
            unpacked(package_version("postgresql-15", version), example / label)
        said = passed(example / "module.toml", livegraft)
    assert said["pause_us"]["apply"]["processes"]["fewest"] > 8  # the postmaster, five of its own, six sessions


@pytest.fixture
def server(package_version: Version, cache_folder: Path) -> Iterator[PostgresServer]:
    """The older published version."""
    build = postgres_build(package_version("postgresql-15", OLD), cache_folder / "packages")
    with run_postgres(build) as server:
        yield server


def test_a_module_that_needs_more_than_the_program_has_is_refused(
    package_version: Version, server: PostgresServer, livegraft: Livegraft, tmp_path: Path
) -> None:
    """New plpgsql calls functions that 15.20's postgres exports and 15.18's does not have: no patch of it alone."""
    files = (package_version("postgresql-15", version).file(f"{MODULES}/plpgsql.so") for version in (OLD, NEW))
    livegraft("diff", *files, "-o", tmp_path / "patch")
    session = client("postgres").Session(server.folder, "postgres")
    session.require("do $$ begin end $$", "DO")
    backend = int(session.ask("select pg_backend_pid()"))
    said = livegraft("apply", tmp_path / "patch", "--pid", backend, status=4)
    assert "DatumGetHeapTupleHeader, which the process has not loaded" in said.stderr
    session.require("do $$ begin perform 1; end $$", "DO")
    assert not altered_code(backend)
    session.close()


@pytest.fixture
def example(package_version: Version, source_pair: Pair) -> Iterator[Path]:
    """The example with the program built twice, the older one among the files of the package of the same version."""
    before, shipped = source_pair(recipes.POSTGRES)
    with copied("postgres") as example:
        unpacked(package_version("postgresql-15", OLD), example / "old")
        shutil.copy(before.stripped("postgres"), example / "old" / PROGRAMS / "postgres")
        (example / "new").mkdir()
        shutil.copy(shipped.stripped("postgres"), example / "new" / "postgres")
        yield example


@pytest.mark.long
def test_two_security_fixes(example: Path, livegraft: Livegraft) -> None:
    said = passed(example / "rehearsal.toml", livegraft)
    assert said["patch"]["summary"]["functions"] >= 2
    assert said["pause_us"]["apply"]["processes"]["fewest"] > 8


@pytest.mark.long
def test_sessions_that_are_open_get_the_fixes_and_keep_what_they_have(
    example: Path, package_version: Version, livegraft: Livegraft, cache_folder: Path, tmp_path: Path
) -> None:
    """They are in the midst of transactions, with a cursor and a table of their own."""
    package = Unpacked("postgresql-15", OLD, example / "old", package_version("postgresql-15", OLD).archive)
    old = package.file(f"{PROGRAMS}/postgres")
    livegraft("diff", old, example / "new" / "postgres", "-o", tmp_path / "patch")
    with run_postgres(postgres_build(package, cache_folder / "packages")) as server, server.benchmark(4):
        sessions = open_sessions(server)
        for verb, fixed in ((None, False), ("apply", True), ("revert", False), ("apply", True), ("revert", False)):
            if verb is not None:
                words = [tmp_path / "patch"] if verb == "apply" else []
                said = livegraft(verb, *words, "--tree", server.pid, "--atomic", "--json").json
                done = [item["pid"] for item in said["processes"] if item["result"] == "done"]
                assert {server.pid, *server.backends} <= set(done)
            new = client("postgres").Session(server.folder, "guest")
            new.require("begin", "BEGIN")
            for session in (*sessions, new):
                require_version(session, fixed)
            new.close()
        for session in sessions:
            session.require("select count(*), sum(n) from mine", "10\t55")
            session.require("fetch 2 from row", "1\n2")
            session.require("commit", "COMMIT")
            session.close()
        assert not altered_code(server.pid)


def open_sessions(server: PostgresServer) -> list[Any]:
    """Two of a user who may create nothing in the schema "closed", each in a transaction."""
    owner = client("postgres").Session(server.folder, "postgres")
    owner.require("create role guest login", "CREATE ROLE")
    owner.require("create schema guest authorization guest", "CREATE SCHEMA")
    owner.require("create schema closed", "CREATE SCHEMA")
    owner.require("grant usage on schema closed to guest", "GRANT")
    owner.close()
    sessions = [client("postgres").Session(server.folder, "guest") for _ in range(2)]
    for session in sessions:
        session.require("begin", "BEGIN")
        session.require("create temporary table mine (n int) on commit drop", "CREATE TABLE")
        session.require("insert into mine select generate_series(1, 10)", "INSERT 0 10")
        session.require("declare row cursor for select generate_series(1, 5)", "DECLARE CURSOR")
    return sessions


def require_version(session: Any, fixed: bool) -> None:
    """Whether a session, which is in a transaction, has the fixes; what that does is taken back."""
    session.require("savepoint here", "SAVEPOINT")
    session.require("set local timezone = '<A%%B>0'", "SET")
    session.require(ZONE, "A%%B" if fixed else "A%B")
    session.require(CLOSED, DENIED if fixed else "CREATE TYPE")
    session.require("rollback to savepoint here", "ROLLBACK")
