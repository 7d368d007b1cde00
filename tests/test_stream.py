"""What stands between pika and its socket: `stream.py` and `loop.py` of the RabbitMQ room.

On a broker, all tests that publish and subscribe go through it.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import closing

import pytest

from domain_events.broker.rabbitmq.loop import Loop
from domain_events.broker.rabbitmq.stream import _MOST_READ, _Socket


@pytest.fixture
def pair() -> Iterator[tuple[_Socket, socket.socket]]:
    """A connection over TCP: our end, the other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        with _Socket.of(sock) as ours, server.accept()[0] as theirs:
            assert sock.fileno() == -1
            theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield ours, theirs


def read(ours: _Socket) -> bytes:
    """What one turn of pika's loop reads: until there is no more."""
    ours.setblocking(True)
    data = first = ours.recv(1)
    ours.setblocking(False)
    while first:
        try:
            first = ours.recv(1)
        except BlockingIOError:
            break
        data += first
    return data


def test_all_that_is_there_is_read(pair: tuple[_Socket, socket.socket]) -> None:
    """Also when it is as much as is read at once, exactly, or more."""
    ours, theirs = pair
    for size in (1, _MOST_READ - 1, _MOST_READ, _MOST_READ + 1, 3 * _MOST_READ):
        sent = bytes(size)
        received = b""
        theirs.sendall(sent)
        while len(received) < size:
            received += read(ours)
        assert received == sent


def test_end_behind_a_short_piece_is_seen(pair: tuple[_Socket, socket.socket]) -> None:
    """In the next turn: epoll says so until it is."""
    ours, theirs = pair
    theirs.sendall(b"the last words")
    theirs.shutdown(socket.SHUT_WR)
    assert read(ours) == b"the last words"
    assert ours.recv(1) == b""
    assert ours.recv(1) == b""


def test_reset_behind_a_short_piece_is_seen(pair: tuple[_Socket, socket.socket]) -> None:
    """As an error, not as silence."""
    ours, theirs = pair
    theirs.sendall(b"the last words")
    assert read(ours) == b"the last words"
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    ours.setblocking(True)
    with pytest.raises(ConnectionResetError):
        ours.recv(1)


def test_end_of_a_turn_comes_before_the_next_wait() -> None:
    """Whether it was asked for in a turn or not; also behind one that raises."""
    with closing(Loop()) as loop:
        done: list[str] = []

        def fail() -> None:
            raise ZeroDivisionError

        def turn() -> None:
            loop.at_end_of_turn(fail)
            loop.at_end_of_turn(lambda: done.append("behind the failure"))
            done.append("in the turn")
            loop.soon(lambda: loop.at_end_of_turn(loop.stop))

        loop.at_end_of_turn(lambda: done.append("not in a turn"))
        loop.soon(turn)
        with pytest.raises(ZeroDivisionError):
            loop.start()
        loop.start()
        assert sorted(done) == ["behind the failure", "in the turn", "not in a turn"]
        assert done.index("in the turn") < done.index("behind the failure")
