"""The fixtures themselves: kv behaves as its versions say, and the load client notices what goes wrong."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from elfdiff.errors import LivegraftError
from fixtures.build import COMPILERS, Variant
from fixtures.daemon import PROBES, KvClient, probe, run_kv
from fixtures.load import Load

Kv = Callable[..., Path]


@pytest.mark.parametrize("version", sorted(PROBES))
@pytest.mark.parametrize("compiler", COMPILERS)
def test_each_version_shows_its_own_answers(kv: Kv, version: int, compiler: str) -> None:
    with run_kv(kv(version, Variant(compiler))) as daemon:
        assert probe(daemon.port) == PROBES[version]


def test_versions_differ_in_what_a_client_sees() -> None:
    assert len(set(PROBES.values())) == len(PROBES)
    assert PROBES[1].append != PROBES[2].append
    assert PROBES[2].increment != PROBES[3].increment


@pytest.mark.parametrize("version", sorted(PROBES))
def test_the_load_is_valid_for_every_version(kv: Kv, version: int) -> None:
    with run_kv(kv(version)) as daemon, Load(daemon.port) as load:
        load.more(20000)
        report = load.stop()
    assert (report.failed, report.reconnects, report.failures) == (0, 0, ())
    assert report.served > 20000
    assert report.connections == 16


def test_pipelined_requests_are_answered_in_order(kv: Kv) -> None:
    with run_kv(kv(1)) as daemon, KvClient(daemon.port) as client:
        client.send(*(f"ECHO {number}" for number in range(5000)))
        assert [client.receive() for _ in range(5000)] == [f"${number}" for number in range(5000)]


def test_a_reader_that_lags_loses_nothing(kv: Kv) -> None:
    """More answers than both socket buffers hold, so that the server has to wait for room."""
    count, value = 20000, "v" * 1000
    with run_kv(kv(1)) as daemon, KvClient(daemon.port) as client:
        assert client.ask(f"SET key {value}") == "+OK"
        sender = threading.Thread(target=client.send, args=["GET key"] * count)
        sender.start()
        answers = {client.receive() for _ in range(count)}
        sender.join()
    assert answers == {"$" + value}


@pytest.mark.parametrize(
    "request_line", ["", "NO", "GET", "SET key", "PING x", "GET " + "k" * 65, "HOLD x", "SET k " + "v" * 1025]
)
def test_malformed_requests_are_refused_and_the_connection_lives(kv: Kv, request_line: str) -> None:
    with run_kv(kv(1)) as daemon, KvClient(daemon.port) as client:
        assert client.ask(request_line).startswith("-ERR")
        assert client.ask("PING") == "+PONG"


def test_sigterm_ends_it_with_status_zero(kv: Kv) -> None:
    with run_kv(kv(1)) as daemon:
        os.kill(daemon.pid, signal.SIGTERM)
        assert daemon.process.wait(10) == 0


class _LyingServer:
    """Answers one request of one connection, wrongly or not at all."""

    def __init__(self, answer: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        self._listener.close()  # first: who comes again, however fast, finds nobody
        with connection:
            connection.recv(65536)
            connection.sendall(self._answer)

    def join(self) -> None:
        self._thread.join(10)


def test_the_load_notices_a_wrong_answer_and_a_lost_connection() -> None:
    server = _LyingServer(b"+WRONG\n")
    with Load(server.port, connections=1) as load:
        server.join()
        report = load.stop()
    assert report.served == 0
    assert report.failed >= 2, report
    assert "WRONG" in report.failures[0]
    assert report.reconnects == 1


def test_the_load_measures_the_longest_request(kv: Kv) -> None:
    """A stopped server: the request in flight ages until it goes on."""
    with run_kv(kv(1)) as daemon, Load(daemon.port, connections=2) as load:
        os.kill(daemon.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, daemon.pid, os.WSTOPPED)
        load.mark()
        stopped = load.mark()
        os.kill(daemon.pid, signal.SIGCONT)
        load.more(100)
        report = load.stop()
    assert stopped.longest_us > 0
    assert report.longest_us >= stopped.longest_us
    assert report.failed == 0


def test_a_dead_load_client_is_an_error(kv: Kv) -> None:
    with run_kv(kv(1)) as daemon, Load(daemon.port) as load:
        load.stop()
        with pytest.raises(LivegraftError):
            load.mark()
