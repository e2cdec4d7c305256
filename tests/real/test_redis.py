"""redis-server of Debian 12, old build in production, patched to the security update and back, many times.

The server is under redis-benchmark and under a client that verifies every answer, and has a replica.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from elfdiff.diff import summary
from elfdiff.patches.patchfile import read_patch
from fixtures.debian import Unpacked
from fixtures.dialects import RespError
from fixtures.intact import altered_code, mappings, writable_and_executable
from fixtures.load import Load, Report
from fixtures.redis import RedisBuild, RedisServer, RespClient, redis_build, run_benchmark, run_redis
from fixtures.tracees import wait_until
from patcher.pausing.conditions import Conditions
from patcher.records.record import State
from patcher.transactions import transaction
from patcher.transactions.inspection import inspect_process
from tests.conftest import Livegraft
from tests.real.rows import HEAD, Row

pytestmark = [pytest.mark.apt, pytest.mark.root, pytest.mark.slow]

COMMANDS = 5  # each fifth round by the command line, the others by the library: to start a process takes longest
KEYS = 500
PROGRAM = "usr/bin/redis-check-rdb"
OLD_VERSION, NEW_VERSION = "5:7.0.15-1~deb12u7", "5:7.0.15-1~deb12u10"

FIXED = {
    "_sdsnewlen",
    "zipmapValidateIntegrity",
    "rdbLoadObject",
    "clusterProcessPacket",
    "readSyncBulkPayload",
    "tlsProcessPendingData",
}
"""What Debian's patches touch and redis exports. Two parts of them, rdbLoadObject.cold and
readSyncBulkPayload.part.0, have no name in the stripped build; the patch holds them as functions."""
PARTS = 2


@pytest.fixture(scope="module")
def builds(
    package_version: Callable[[str, str], Unpacked], cache_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RedisBuild, RedisBuild]:
    old, new = (package_version("redis-tools", version) for version in (OLD_VERSION, NEW_VERSION))
    folder = tmp_path_factory.mktemp("redis")
    packages = cache_folder / "packages"
    return redis_build(old, folder / "old", packages), redis_build(new, folder / "new", packages)


@pytest.fixture(scope="module")
def patch(
    builds: tuple[RedisBuild, RedisBuild], livegraft: Livegraft, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    old, new = (build.package.file(PROGRAM) for build in builds)
    patch = tmp_path_factory.mktemp("patch") / "redis.patch"
    livegraft("diff", old, new, "-o", patch)
    return patch


@dataclass(frozen=True)
class Site:
    """Everything that runs during the rounds."""

    master: RedisServer
    replica: RedisServer
    ask: RespClient
    ask_replica: RespClient
    load: Load
    benchmark: subprocess.Popen[bytes]


@pytest.fixture
def site(builds: tuple[RedisBuild, RedisBuild], tmp_path: Path) -> Iterator[Site]:
    old, _ = builds
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(run_redis(old, tmp_path / "master"))
        of = ("--replicaof", f"127.0.0.1 {master.port}")
        replica = stack.enter_context(run_redis(old, tmp_path / "replica", *of))
        ask = stack.enter_context(RespClient(master.port))
        ask_replica = stack.enter_context(RespClient(replica.port))
        wait_for_replica(ask)
        load = stack.enter_context(Load(master.port, "resp", connections=8))
        benchmark = stack.enter_context(run_benchmark(old, master.port))
        yield Site(master, replica, ask, ask_replica, load, benchmark)


def wait_for_replica(ask: RespClient) -> None:
    """Until the replica has acknowledged all writes of this connection (WAIT blocks, at most a minute)."""
    ask.ask("SET", "sync", "wanted")
    assert ask.ask("WAIT", 1, 60000) == 1, "the replica did not catch up within a minute"


def fill(ask: RespClient) -> dict[str, bytes]:
    values = {f"kept:{number}": b"value %d\0" % number * (number % 50 + 1) for number in range(KEYS)}
    for key, value in values.items():
        assert ask.ask("SET", key, value) == b"OK"
    return values


def check_service(site: Site, kept: dict[str, bytes], number: int) -> None:
    """Keys, snapshot, reload from the snapshot, replication, clients: all as without a patch."""
    assert site.ask.ask("MGET", *kept) == list(kept.values())
    assert site.ask.ask("SAVE") == b"OK"
    assert site.ask.ask("DEBUG", "RELOAD") == b"OK"
    assert site.ask.ask("MGET", *kept) == list(kept.values())
    assert site.ask.ask("SET", f"round:{number}", number) == b"OK"
    wait_for_replica(site.ask)
    assert site.ask_replica.ask("GET", f"round:{number}") == str(number).encode()
    assert site.ask_replica.info("replication")["master_link_status"] == "up"
    assert site.benchmark.poll() is None
    assert site.master.process.poll() is None


def exported(build: RedisBuild) -> dict[str, int]:
    """Virtual addresses of the functions that redis exports."""
    command = ["readelf", "--dyn-syms", "-W", str(build.package.file(PROGRAM))]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines()]
    return {row[7]: int(row[1], 16) for row in rows if len(row) == 8 and row[3] == "FUNC" and row[6] != "UND"}


def image_base(server: RedisServer, build: RedisBuild) -> int:
    program = str(build.package.file(PROGRAM).resolve())
    return min(one.start for one in mappings(server.pid) if one.path == program)


def redirected(livegraft: Livegraft, server: RedisServer, build: RedisBuild) -> set[str]:
    """Exported functions whose entry in memory is a jump (opcode e9) and differs from the file."""
    base = image_base(server, build)
    content = build.package.file(PROGRAM).read_bytes()
    names = set()
    with open(f"/proc/{server.pid}/mem", "rb", buffering=0) as memory:
        for name, address in exported(build).items():
            memory.seek(base + address)
            entry = memory.read(5)
            # In redis the text segment's offset in the file equals its virtual address.
            if entry != content[address : address + 5] and entry[0] == 0xE9:
                names.add(name)
    return names


def pause_of(outcome: transaction.Outcome) -> int:
    """Microseconds, as the command line says them."""
    assert outcome.pause is not None
    return outcome.pause.pause_ns // 1000


def states(pid: int) -> list[State]:
    return [one.record.state for one in inspect_process(pid).patches]


def applied(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [patch for patch in status["patches"] if patch["state"] == "applied"]


@pytest.mark.usefixtures("builds")
def test_the_patch_holds_what_the_security_update_fixes(
    patch: Path, builds: tuple[RedisBuild, RedisBuild], livegraft: Livegraft
) -> None:
    functions = livegraft("inspect", patch, "--json").json["functions"]
    old_names = {address: name for name, address in exported(builds[0]).items()}
    entries = {old_names.get(one["old_start"]) for one in functions if one["entry_jump"]}
    assert entries >= FIXED
    assert len(functions) >= len(FIXED) + PARTS
    assert len(functions) < 60, "a security update of six functions"


@pytest.mark.parametrize("rounds", [5, pytest.param(20, marks=pytest.mark.long)])
def test_rounds_under_load_with_a_replica(
    rounds: int,
    patch: Path,
    builds: tuple[RedisBuild, RedisBuild],
    livegraft: Livegraft,
    site: Site,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = fill(site.ask)
    pauses: list[int] = []
    longest: list[int] = []
    pid = site.master.pid
    fix = read_patch(patch)
    assert altered_code(pid) == []
    for number in range(rounds):
        site.load.more(500)
        before = site.load.mark()
        if number % COMMANDS:
            pauses.append(pause_of(transaction.apply(pid, fix, Conditions(timeout=60))))
        else:
            pauses.append(livegraft("apply", patch, "--pid", pid, "--json", "--timeout", 60).json["pause_us"])
        after = site.load.mark()
        longest.append(after.longest_us)
        assert (before.failed, after.failed, after.reconnects) == (0, 0, 0), after
        entries = redirected(livegraft, site.master, builds[0])
        assert entries >= FIXED
        assert states(pid) == [State.APPLIED]
        check_service(site, kept, number)
        if number % COMMANDS:
            transaction.revert(pid, conditions=Conditions(timeout=60))
        else:
            assert len(applied(livegraft("status", "--pid", pid, "--json").json)) == 1
            livegraft("revert", "--pid", pid, "--json")
        assert states(pid) == [State.REVERTED]
        assert altered_code(pid) == []
        assert writable_and_executable(pid) == []
        check_service(site, kept, number)
    report = site.load.stop()
    with capsys.disabled():
        show(pauses, longest, report)
    assert (report.failed, report.reconnects, report.failures) == (0, 0, ())
    assert report.connections == 8


def test_a_patched_replica_resynchronises_through_the_new_code(
    patch: Path, builds: tuple[RedisBuild, RedisBuild], livegraft: Livegraft, site: Site
) -> None:
    """readSyncBulkPayload and rdbLoadObject of the new build load what the old master sends."""
    kept = fill(site.ask)
    pid = site.replica.pid
    livegraft("apply", patch, "--pid", pid, "--timeout", 60)
    assert redirected(livegraft, site.replica, builds[0]) >= FIXED
    full_syncs = int(site.ask.info("stats")["sync_full"])
    # A detour to being a master, and another replication id: what it has is worth nothing, all is sent again.
    assert site.ask_replica.ask("REPLICAOF", "NO", "ONE") == b"OK"
    assert site.ask_replica.ask("FLUSHALL") == b"OK"
    assert site.ask_replica.ask("DEBUG", "CHANGE-REPL-ID") == b"OK"
    assert site.ask.ask("DEBUG", "CHANGE-REPL-ID") == b"OK"
    assert site.ask_replica.ask("REPLICAOF", "127.0.0.1", site.master.port) == b"OK"
    wait_for_replica(site.ask)
    assert int(site.ask.info("stats")["sync_full"]) > full_syncs
    assert site.ask_replica.ask("MGET", *kept) == list(kept.values())
    livegraft("revert", "--pid", pid)
    assert altered_code(pid) == []
    wait_for_replica(site.ask)
    assert site.load.stop().failed == 0


SLOW_SECONDS = 3.0  # what a child that writes keys is given to do; the double where that was not enough
ATTEMPTS = 7
JOBS = {"BGSAVE": "rdb_bgsave", "BGREWRITEAOF": "aof_rewrite"}
"""What forks a child that writes all keys; the names by which INFO says how it goes."""


@pytest.mark.parametrize("job", JOBS)
def test_a_child_that_writes_all_keys_is_patched_with_its_parent(
    job: str,
    patch: Path,
    builds: tuple[RedisBuild, RedisBuild],
    livegraft: Livegraft,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Master and replica under load, with a log of all writes; master, child and replica there and back."""
    old, _ = builds
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(run_redis(old, tmp_path / "master", "--appendonly", "yes"))
        replica = stack.enter_context(run_redis(old, tmp_path / "replica", "--replicaof", f"127.0.0.1 {master.port}"))
        ask, ask_replica = (stack.enter_context(RespClient(one.port)) for one in (master, replica))
        kept = fill(ask)
        load = stack.enter_context(Load(master.port, "resp", connections=8, rate=300))
        calm = load.more(1000).longest_us
        tally = _Tally(load)
        there, back = ["apply", patch], ["revert"]
        for verb, undo in ((there, back), (back, there)):
            whole = ("--tree", master.pid)
            with_child(job, ask, partial(tally.note, livegraft, *verb, *whole), partial(livegraft, *undo, *whole))
            tally.note(livegraft, *verb, "--pid", replica.pid)
            load.more(500)
        report = load.stop()
        wait_for_replica(ask)
        for one in (ask, ask_replica):  # what expires in between would make a difference
            wait_until(partial(nothing_expires, one), "all has expired that was to")
        digest = ask.ask("DEBUG", "DIGEST")
        assert digest == ask_replica.ask("DEBUG", "DIGEST")
        assert ask.ask("MGET", *kept) == ask_replica.ask("MGET", *kept) == list(kept.values())
        assert altered_code(master.pid) == altered_code(replica.pid) == []
        # What the log holds, the part that the child has written included, makes the same keys again.
        shutil.copytree(master.folder, tmp_path / "again")
        again = stack.enter_context(run_redis(old, tmp_path / "again", "--appendonly", "yes"))
        assert stack.enter_context(RespClient(again.port)).ask("DEBUG", "DIGEST") == digest
    assert (report.failed, report.reconnects, report.failures) == (0, 0, ())
    versions = f"{OLD_VERSION} -> {NEW_VERSION}, {job} going on"
    row = Row(
        "redis", versions, [summary(read_patch(patch))], tally.processes, tally.pauses, report.served, 0, calm,
        max(tally.longest),
    )  # fmt: skip
    with capsys.disabled():
        print(f"\n{HEAD}\n{row}")


def nothing_expires(ask: RespClient) -> bool:
    return "expires=0" in ask.info("keyspace")["db0"]


class _Tally:
    """What each command on a tree said, and the longest request meanwhile."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self.pauses: list[int] = []
        self.processes: list[int] = []
        self.longest: list[int] = []

    def note(self, livegraft: Livegraft, *arguments: object) -> int:
        """Run a command; how many processes stood still for it."""
        self._load.mark()
        body = livegraft(*arguments, "--json", "--timeout", 60).json
        self.longest.append(self._load.more(100).longest_us)
        each = [item["pause_us"] for item in body.get("processes", [body]) if item.get("result", "done") == "done"]
        assert None not in each, "it was done already"
        self.pauses += each
        self.processes.append(len(each))
        return len(each)


def with_child(job: str, ask: RespClient, act: Callable[[], int], undo: Callable[[], object]) -> None:
    """Do something to master and child while the child is at work; what it writes is then without an error.

    How long it works can only be told beforehand. Where it had ended too early, all is undone and done again.
    """
    seconds = SLOW_SECONDS
    for _ in range(ATTEMPTS):
        keys = ask.ask("DBSIZE")
        assert isinstance(keys, int)
        assert ask.ask("CONFIG", "SET", "rdb-key-save-delay", int(seconds / keys * 1e6)) == b"OK"
        ask.ask(job)
        wait_until(lambda: progress(job, ask), f"{job} has begun")
        done = act()
        in_time = progress(job, ask)
        wait_for_job(job, ask, 4 * seconds + 60)
        if done == 2 and in_time:
            return
        undo()
        seconds *= 2
    pytest.fail(f"the child for {job} never worked for as long as the command")


def progress(job: str, ask: RespClient) -> bool:
    return ask.info("persistence")[f"{JOBS[job]}_in_progress"] == "1"


def wait_for_job(job: str, ask: RespClient, seconds: float) -> None:
    end = time.monotonic() + seconds
    while progress(job, ask):
        assert time.monotonic() < end, f"no end to {job}"
        time.sleep(0.05)  # it is asked for again: nothing tells when it has ended
    status = {"BGSAVE": "rdb_last_bgsave_status", "BGREWRITEAOF": "aof_last_bgrewrite_status"}[job]
    assert ask.info("persistence")[status] == "ok"


def zipmap_with_a_long_length() -> bytes:
    """What RESTORE takes: a hash of a kind that no server writes any more, with one field, k, of four bytes, val1.

    The length of the value is given in five bytes, which is for lengths from 254 (zipmap.c describes it).
    """
    content = b"\x01" + b"\x01k" + b"\xfe" + (4).to_bytes(4, "little") + b"\x00val1" + b"\xff"
    return b"\x09" + bytes([len(content)]) + content + (9).to_bytes(2, "little") + bytes(8)


def test_the_bug_of_restore_is_there_before_and_after_and_not_in_between(
    patch: Path, builds: tuple[RedisBuild, RedisBuild], livegraft: Livegraft, tmp_path: Path
) -> None:
    """CVE-2026-25243: what RESTORE is given is not validated. Here it takes a value from the wrong bytes; it stays
    within what it was given, so nothing is harmed.
    """
    payload = zipmap_with_a_long_length()
    with run_redis(builds[0], tmp_path) as server, RespClient(server.port) as ask:
        assert ask.ask("DEBUG", "SET-SKIP-CHECKSUM-VALIDATION", 1) == b"OK"

        def restored() -> object:
            ask.ask("DEL", "hash")
            answer = ask.ask("RESTORE", "hash", 0, payload)
            return answer if isinstance(answer, RespError) else ask.ask("HGETALL", "hash")

        assert restored() == [b"k", bytes(4)], "not val1"
        livegraft("apply", patch, "--pid", server.pid)
        assert restored() == RespError("ERR Bad data format")
        assert ask.ask("EXISTS", "hash") == 0
        livegraft("revert", "--pid", server.pid)
        assert restored() == [b"k", bytes(4)]
        assert altered_code(server.pid) == []


def show(pauses: list[int], longest: list[int], report: Report) -> None:
    """For the reader of the log; nothing is asserted about time."""
    middle = sorted(pauses)[len(pauses) // 2]
    print(f"\nredis: {len(pauses)} rounds, {report.served} requests verified, {report.failed} failed")
    print(f"pause by the tool: median {middle} us, longest {max(pauses)} us")
    middle = sorted(longest)[len(longest) // 2]
    print(f"longest request around an apply: median {middle} us, longest {max(longest)} us")
