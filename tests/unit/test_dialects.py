"""What the load client says and how it reads: the RESP2 parser, and sessions against a model server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.dialects import DIALECTS, RespError, RespSession, encode_resp, parse_resp, right

VALUES = st.recursive(
    st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.binary(max_size=40)),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=10,
)


def encode_value(value: object) -> bytes:
    if value is None:
        return b"$-1\r\n"
    if isinstance(value, int):
        return b":%d\r\n" % value
    if isinstance(value, bytes):
        return b"$%d\r\n%s\r\n" % (len(value), value)
    assert isinstance(value, list)
    return b"*%d\r\n" % len(value) + b"".join(map(encode_value, value))


@given(VALUES)
def test_what_was_encoded_is_read_back(value: object) -> None:
    data = encode_value(value)
    assert parse_resp(data, 0) == (value, len(data))


@given(VALUES)
def test_every_cut_is_incomplete(value: object) -> None:
    data = encode_value(value)
    assert [parse_resp(data[:size], 0) for size in range(len(data))] == [None] * len(data)


@given(st.lists(VALUES, min_size=1, max_size=5), st.integers(1, 7))
def test_a_stream_in_pieces_gives_the_same_values(values: list[object], size: int) -> None:
    data = b"".join(map(encode_value, values))
    session = RespSession("x", 1)
    answers: list[object] = []
    for at in range(0, len(data), size):
        answers += session.feed(data[at : at + size])
    assert answers == values


def test_an_error_answer_is_never_right() -> None:
    item = parse_resp(b"-ERR no\r\n", 0)
    assert item is not None
    assert isinstance(item[0], RespError)
    assert not right(b"OK", item[0])
    assert not right(b"ERR no", item[0])


def test_nonsense_is_an_error() -> None:
    with pytest.raises(ValueError, match="not RESP2"):
        parse_resp(b"hello\r\n", 0)


def test_a_command_is_an_array_of_bulk_strings() -> None:
    assert encode_resp("SET", b"k\0", 12) == b"*3\r\n$3\r\nSET\r\n$2\r\nk\0\r\n$2\r\n12\r\n"


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_a_session_is_decided_by_its_seed(dialect: str) -> None:
    first, second, other = (DIALECTS[dialect]("n", seed) for seed in (1, 1, 2))
    said = [[session.batch()[0] for _ in range(50)] for session in (first, second, other)]
    assert said[0] == said[1]
    assert said[0] != said[2]


def test_keys_of_two_sessions_differ() -> None:
    def keys(name: str) -> set[bytes]:
        session = DIALECTS["kv"](name, 1)
        lines = b"".join(session.batch()[0] for _ in range(300)).splitlines()
        return {line.split()[1] for line in lines if line.startswith((b"SET", b"INCR"))}

    assert keys("a")
    assert not keys("a") & keys("b")
