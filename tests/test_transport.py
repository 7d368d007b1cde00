"""What stands between pika and its socket: `transport.py` and `loop.py` of the RabbitMQ room.

Each fault that a socket can have, without a broker. On one, all tests that publish and subscribe
go through it; what another thread or a signal handler injects is in `test_interference`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import impostor
import pika
import pytest
import rabbitmq_node
from impostor import Impostor
from pika import frame, spec
from pika.adapters.utils.nbio_interface import AbstractStreamProtocol

from domain_events.broker.rabbitmq.errors import close_code, explain, permanent_reason
from domain_events.broker.rabbitmq.loop import Loop
from domain_events.broker.rabbitmq.transport import (
    _MOST_READ,
    Attempt,
    Connection,
    Transport,
)
from domain_events.broker.rabbitmq.wire import UnreadableStream

BEAT = frame.Heartbeat().marshal()


def run(loop: Loop, until: Callable[[], object], timeout: float = 15) -> None:
    """Run the loop until the condition holds."""

    def look(left: float) -> None:
        if until() or left <= 0:
            loop.stop()
        else:
            loop.call_later(0.005, lambda: look(left - 0.005))

    look(timeout)
    loop.start()
    assert until()


def wait(loop: Loop, seconds: float) -> None:
    """Run the loop for so long."""
    passed: list[bool] = []
    loop.call_later(seconds, lambda: passed.append(True))
    run(loop, lambda: passed)


class Above(AbstractStreamProtocol):
    """What a transport calls, in the place of pika's connection."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ends = 0
        self.lost: list[BaseException | None] = []

    def connection_made(self, transport: Any) -> None:
        transport.write(b"!")  # as pika does; TLS shakes hands with the first bytes

    def data_received(self, data: bytes) -> None:
        self.data += data

    def eof_received(self) -> bool:
        self.ends += 1
        return False

    def connection_lost(self, error: BaseException | None) -> None:
        self.lost.append(error)


class Line:
    """A transport, and the other end of its connection."""

    def __init__(self, loop: Loop, contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None) -> None:
        self.loop = loop
        self.attempt = Attempt(loop)
        self.above = Above()
        self.attempt._connection = SimpleNamespace(is_open=False, bytes_received=0)  # type: ignore[assignment]
        self.result: list[Any] = []
        with socket.create_server(("127.0.0.1", 0)) as server:
            sock = socket.create_connection(server.getsockname())
            self.peer = server.accept()[0]
        self.peer.settimeout(20)
        sock.setblocking(False)
        self.attempt.create_streaming_connection(
            lambda: self.above,
            sock,
            self.result.append,
            contexts[0] if contexts else None,
            "localhost" if contexts else None,
        )
        greeting = threading.Thread(target=self._greet, args=(contexts,), daemon=True)
        greeting.start()
        run(loop, lambda: self.result and not greeting.is_alive())
        assert isinstance(self.result[0], tuple), self.result[0]
        self.transport: Transport = self.result[0][0]

    def _greet(self, contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None) -> None:
        if contexts is not None:
            self.peer = contexts[1].wrap_socket(self.peer, server_side=True)
        assert self.peer.recv(1) == b"!"

    def reset(self) -> None:
        """The peer breaks off."""
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.peer.close()

    def script(self, **methods: Callable[..., Any]) -> Any:
        """Put these in the place of the socket's own methods."""

        class Scripted:
            def __getattr__(scripted, name: str) -> Any:  # noqa: N805
                return methods.get(name) or getattr(sock, name)

        sock = self.transport._sock
        self.transport._sock = Scripted()  # type: ignore[assignment]
        return sock


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    rabbitmq_node._make_certificates(folder)
    return folder


@pytest.fixture
def loop() -> Iterator[Loop]:
    with closing(Loop()) as loop:
        yield loop


@pytest.fixture(params=["plain", "tls"])
def line(request: pytest.FixtureRequest, loop: Loop) -> Iterator[Line]:
    contexts = None
    if request.param == "tls":
        folder = request.getfixturevalue("certificates")
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(*certificate_files(folder))
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_mode = ssl.CERT_NONE
        contexts = client, server
    line = Line(loop, contexts)
    yield line
    line.peer.close()
    line.attempt.dispose()
    line.transport._sock.close()


def certificate_files(folder: Path) -> tuple[Path, Path]:
    return folder / "server.pem", folder / "server.key"


plain = pytest.mark.parametrize("line", ["plain"], indirect=True)


# --- reading -------------------------------------------------------------------------------------


def test_everything_is_passed_on(line: Line) -> None:
    """As much as is read at a time, exactly, or more, or one byte."""
    sent = 0
    for size in (8, _MOST_READ - 8, _MOST_READ, _MOST_READ + 8, 5 * _MOST_READ):
        data = BEAT * (size // len(BEAT))
        sender = threading.Thread(target=line.peer.sendall, args=(data,))
        sender.start()
        sent += size
        run(line.loop, lambda: len(line.above.data) == sent)  # noqa: B023
        sender.join(20)
    for byte in BEAT:
        line.peer.sendall(bytes([byte]))
    run(line.loop, lambda: len(line.above.data) == sent + len(BEAT))
    assert line.above.data == BEAT * (len(line.above.data) // len(BEAT))


def test_peer_that_closes_in_the_middle_of_a_frame(line: Line) -> None:
    """What was whole is passed on; the end is reported once, and is no error of ours."""
    line.peer.sendall(BEAT * 3 + BEAT[:5])
    line.peer.shutdown(socket.SHUT_WR)
    run(line.loop, lambda: line.above.lost)
    assert line.above.data == BEAT * 3
    assert line.above.ends == 1
    assert line.above.lost == [None]
    assert line.attempt.cause is None
    assert line.transport._sock.fileno() == -1


def test_peer_that_resets_in_the_middle_of_a_frame(line: Line) -> None:
    line.peer.sendall(BEAT + BEAT[:5])
    run(line.loop, lambda: line.above.data == BEAT)
    line.reset()
    run(line.loop, lambda: line.above.lost)
    (error,) = line.above.lost
    # TLS takes it for an end.
    assert isinstance(error, ConnectionResetError if line.above.ends == 0 else type(None))
    assert line.attempt.cause is None


def test_what_is_not_amqp_ends_the_connection_with_its_reason(line: Line) -> None:
    """Which pika would keep as a text only. No traceback holds what was read."""
    line.peer.sendall(b"HTTP/1.1 400 Bad Request")
    run(line.loop, lambda: line.above.lost)
    assert isinstance(line.attempt.cause, UnreadableStream)
    assert "HTTP/1.1" in str(line.attempt.cause)
    assert line.attempt.cause.__traceback__ is None


def test_error_of_pika_ends_the_connection(line: Line) -> None:
    """It comes out of a frame that pika cannot take."""

    def fail(_frame: bytes) -> None:
        raise ZeroDivisionError

    line.transport._reader._others = fail
    line.peer.sendall(BEAT)
    run(line.loop, lambda: line.above.lost)
    assert isinstance(line.above.lost[0], ZeroDivisionError)


# --- writing -------------------------------------------------------------------------------------


@plain
def test_writes_of_one_turn_are_sent_together(line: Line) -> None:
    """At the end of the turn, or when it is flushed; at once what is large."""
    sent: list[bytes] = []

    def send(data: bytes) -> int:
        sent.append(bytes(data))
        return len(data)

    line.script(send=send)
    line.transport.write(b"a")
    line.transport.write(b"b")
    assert line.transport.get_write_buffer_size() == 2
    assert sent == []
    run(line.loop, lambda: sent)
    line.transport.buffer(b"c")
    line.transport.write(b"d")
    line.transport.flush()
    assert sent == [b"ab", b"cd"]
    line.transport.write(bytes(_MOST_READ))
    assert sent[2:] == [bytes(_MOST_READ)]
    assert line.transport.get_write_buffer_size() == 0


def test_peer_that_does_not_read_is_waited_for(line: Line) -> None:
    """Nothing is lost or mixed up; the loop goes on, without turning in vain."""
    pieces = [bytes([n % 251]) * 30_011 for n in range(600)]
    calls = 0
    for piece in pieces:
        line.transport.write(piece)
    wait(line.loop, 0.5)
    assert 0 < line.transport.get_write_buffer_size() <= sum(map(len, pieces))

    def count(data: bytes) -> int:
        nonlocal calls
        calls += 1
        return sock.send(data)  # type: ignore[no-any-return]

    sock = line.script(send=count)
    wait(line.loop, 0.3)
    assert calls <= 5
    # What it sends meanwhile is read.
    line.peer.sendall(BEAT)
    run(line.loop, lambda: line.above.data == BEAT)
    received = bytearray()
    total = sum(map(len, pieces))

    def read() -> None:
        while len(received) < total:
            received.extend(line.peer.recv(65536))

    reader = threading.Thread(target=read)
    reader.start()
    run(line.loop, lambda: len(received) == total)
    reader.join(20)
    assert received == b"".join(pieces)
    assert line.transport.get_write_buffer_size() == 0


@plain
def test_signals_interrupt_no_transfer(line: Line) -> None:
    """EINTR, over and over."""
    total = 20_000_000
    received = 0
    caught = 0

    def read() -> None:
        nonlocal received
        while received < total:
            received += len(line.peer.recv(65536))

    def catch(*_: object) -> None:
        nonlocal caught
        caught += 1

    before = signal.signal(signal.SIGALRM, catch)
    reader = threading.Thread(target=read)
    reader.start()
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        line.transport.write(bytes(total))
        run(line.loop, lambda: received == total and caught > 10)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        reader.join(20)
    assert line.above.lost == []


@plain
def test_tls_may_have_to_read_before_it_can_write(line: Line) -> None:
    """A renegotiation, a change of keys."""
    wants_read = True

    def send(data: bytes) -> int:
        if wants_read:
            raise ssl.SSLWantReadError
        return sock.send(data)  # type: ignore[no-any-return]

    sock = line.script(send=send)
    line.transport.write(b"x")
    line.transport.flush()
    assert line.transport.get_write_buffer_size() == 1
    wants_read = False
    line.peer.sendall(BEAT)
    run(line.loop, lambda: line.transport.get_write_buffer_size() == 0)
    assert line.peer.recv(10) == b"x"
    assert line.above.data == BEAT


@plain
def test_tls_may_have_to_write_before_it_can_read(line: Line) -> None:
    """It does as soon as the socket is writable, though nothing more comes."""
    wanted = deque([True, True])
    received = deque([BEAT])

    def recv(_size: int) -> bytes:
        if wanted:
            wanted.pop()
            raise ssl.SSLWantWriteError
        if received:
            return received.pop()
        raise ssl.SSLWantReadError

    line.peer.sendall(b"!")
    sock = line.script(recv=recv)
    run(line.loop, lambda: line.above.data == BEAT)
    assert line.transport._watched == Loop.READ
    sock.recv(1)


def test_write_to_a_peer_that_has_gone(line: Line) -> None:
    """The connection is lost, once; later writes are dropped."""
    line.reset()

    def write() -> None:
        if not line.above.lost:
            line.transport.write(bytes(1000))
            line.transport.flush()
            line.loop.call_later(0.01, write)

    write()
    run(line.loop, lambda: line.above.lost)
    line.transport.write(b"more")
    line.transport.flush()
    run(line.loop, lambda: True)
    assert len(line.above.lost) == 1
    assert line.transport.get_write_buffer_size() == 0
    assert line.attempt.cause is None


# --- the end -------------------------------------------------------------------------------------


def test_dropped_connection_is_lost_with_an_error(line: Line) -> None:
    """Without waiting for the peer, and not inside the call; pika takes None for its own doing."""
    line.transport.write(b"never sent")
    line.transport.drop()
    assert line.above.lost == []
    run(line.loop, lambda: line.above.lost)
    (error,) = line.above.lost
    assert isinstance(error, ConnectionAbortedError)
    with contextlib.suppress(ConnectionResetError, ssl.SSLEOFError):
        assert line.peer.recv(100) == b""


def test_abort_comes_before_another_error(line: Line) -> None:
    """pika knows why it aborts."""
    line.transport.drop()
    line.transport.abort()
    line.transport.abort()
    run(line.loop, lambda: line.above.lost)
    assert line.above.lost == [None]


def test_connection_ends_for_the_peer_though_a_child_has_its_socket(line: Line) -> None:
    """A fork copies the descriptor; `close` alone would end nothing."""
    copy = os.dup(line.transport._sock.fileno())
    try:
        line.transport.abort()
        run(line.loop, lambda: line.above.lost)
        line.peer.settimeout(5)
        with contextlib.suppress(ssl.SSLEOFError, ConnectionResetError):
            assert line.peer.recv(100) == b""
    finally:
        os.close(copy)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_exception_of_a_signal_handler_ends_the_loop(line: Line, kind: type[BaseException]) -> None:
    """It is not swallowed; the link begins anew (`test_interference`)."""

    def raise_() -> None:
        raise kind

    line.script(recv=lambda _size: raise_())
    line.peer.sendall(BEAT)
    with pytest.raises(kind):
        run(line.loop, lambda: False)
    assert line.above.lost == []


# --- connecting ----------------------------------------------------------------------------------


class Outcome:
    """What comes of an attempt to connect."""

    def __init__(self, loop: Loop, url: str, insecure: bool = True) -> None:
        parameters = pika.URLParameters(url)
        if insecure and parameters.ssl_options is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            parameters.ssl_options = pika.SSLOptions(context)
        parameters.connection_attempts = 1
        self.loop = loop
        self.attempt = Attempt(loop)
        self.results: list[Any] = []
        self.closed: list[BaseException] = []
        self.attempt.start(parameters, self._done)

    def _done(self, result: Any) -> None:
        self.results.append(result)
        if isinstance(result, Connection):
            result.add_on_close_callback(lambda _connection, error: self.closed.append(error))

    @property
    def error(self) -> BaseException:
        """Of an attempt that failed, as a link sees it."""
        run(self.loop, lambda: self.results)
        (result,) = self.results
        assert isinstance(result, BaseException), result
        return self.attempt.cause or result

    @property
    def connection(self) -> Connection:
        run(self.loop, lambda: self.results)
        (result,) = self.results
        assert isinstance(result, Connection), self.attempt.cause or result
        return result


def silence(connection: socket.socket) -> None:
    while connection.recv(1000):
        pass


@pytest.mark.parametrize("scheme", ["amqp", "amqps"])
def test_handshake_that_hangs_ends_with_pikas_time_limit(loop: Loop, scheme: str) -> None:
    """Of AMQP, or of TLS; the socket is closed."""
    ended = threading.Event()

    def hang(connection: socket.socket) -> None:
        silence(connection)
        ended.set()

    with Impostor(hang) as server:
        outcome = Outcome(loop, server.url("?stack_timeout=0.2", scheme))
        assert "imeout" in explain(outcome.error)
        assert permanent_reason(outcome.error, was_connected=False) is None
        run(loop, ended.is_set)


def test_tls_to_a_plain_port(loop: Loop) -> None:
    with Impostor(lambda connection: connection.sendall(b"AMQP\0\0\x09\x01")) as server:
        outcome = Outcome(loop, server.url(scheme="amqps"))
        assert explain(outcome.error).startswith("TLS failed (")
        assert permanent_reason(outcome.error, was_connected=False) is None


def test_plain_to_a_tls_port(loop: Loop) -> None:
    """What a TLS server answers to AMQP's first bytes is an alert."""
    with Impostor(lambda connection: connection.sendall(b"\x15\x03\x01\0\x02\x02\x0a")) as server:
        error = Outcome(loop, server.url()).error
        assert "amqps://" in explain(error)


@pytest.mark.parametrize(
    ("stage", "code", "text", "is_permanent"),
    [
        (spec.Connection.StartOk, 403, "ACCESS_REFUSED - Login was refused", True),
        (spec.Connection.Open, 530, "NOT_ALLOWED - vhost x'y\"z not found", True),
        (
            spec.Connection.Open,
            530,
            "NOT_ALLOWED - access to vhost 'x' refused for user 'y'",
            False,
        ),
        (spec.Connection.Open, 541, "INTERNAL_ERROR - vhost 'x' is down", False),
    ],
)
def test_why_the_broker_closed_a_connection_during_the_login(
    loop: Loop, stage: type[Any], code: int, text: str, is_permanent: bool
) -> None:
    """pika, of each version, takes it for a wrong password or so, and keeps only a repr of it."""
    close = impostor.method(0, spec.Connection.Close(code, text, 10, 40))
    with Impostor(lambda sock: impostor.converse(sock, stage, close)) as server:
        error = Outcome(loop, server.url()).error
    assert close_code(error) == code
    assert explain(error) == f"closed by the broker: {text} ({code})"
    assert (permanent_reason(error, was_connected=False) is not None) == is_permanent
    assert (permanent_reason(error, was_connected=True) is not None) == (code == 403)


def test_why_the_broker_closed_an_open_connection(loop: Loop) -> None:
    close = impostor.method(0, spec.Connection.Close(320, "CONNECTION_FORCED - shutdown", 0, 0))
    with Impostor(lambda sock: impostor.converse(sock, spec.Channel.Open, close)) as server:
        outcome = Outcome(loop, server.url())
        outcome.connection.channel(on_open_callback=lambda _channel: None)
        run(loop, lambda: outcome.closed)
    for error in (outcome.closed[0], outcome.attempt.cause):
        assert close_code(error) == 320
        assert explain(error) == "closed by the broker: CONNECTION_FORCED - shutdown (320)"


def test_lost_connection_during_a_login_is_not_a_refusal(loop: Loop) -> None:
    """pika takes it for a wrong password, probably."""

    def hang_up(connection: socket.socket) -> None:
        connection.recv(8)
        connection.sendall(impostor.START)
        connection.recv(1000)
        connection.shutdown(socket.SHUT_RDWR)

    with Impostor(hang_up) as server:
        error = Outcome(loop, server.url()).error
    assert close_code(error) == 0
    assert explain(error) == "it closed the connection during the login"
    assert permanent_reason(error, was_connected=False) is None


def test_attempt_that_was_abandoned_connects_to_nothing(loop: Loop) -> None:
    """Its name was looked up too late."""
    with Impostor(silence) as server:
        outcome = Outcome(loop, server.url())
        outcome.attempt.abandon(TimeoutError("too late"))
        assert str(outcome.error) == "too late"
        assert server.accepted == 0


@pytest.mark.parametrize("scheme", ["amqp", "amqps"])
def test_attempt_that_is_disposed_of_leaves_no_socket(loop: Loop, scheme: str) -> None:
    """In the middle of a handshake; its loop does not run any more."""
    ended = threading.Event()
    began = threading.Event()

    def hang(connection: socket.socket) -> None:
        connection.recv(1)
        began.set()
        silence(connection)
        ended.set()

    with Impostor(hang) as server:
        outcome = Outcome(loop, server.url(scheme=scheme))
        run(loop, began.is_set)
        outcome.attempt.dispose()
        assert ended.wait(10)


# --- what pika does not publish ------------------------------------------------------------------


def test_release_of_the_broker_is_known(loop: Loop, broker_url: str) -> None:
    outcome = Outcome(loop, broker_url)
    assert (3, 8) <= outcome.connection.release < (9, 0)
    outcome.connection.close()
    run(loop, lambda: outcome.closed)


def test_deliveries_keep_a_connection_alive_and_silence_does_not(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-open connections. pika looks every six seconds or less often; here, in 0.6."""
    later = loop.call_later
    monkeypatch.setattr(
        loop, "call_later", lambda delay, call: later(delay / 10 if delay >= 1 else delay, call)
    )
    go_on = threading.Event()

    def deliver(connection: socket.socket) -> None:
        """Deliveries, never a heartbeat; pika sees none of them."""
        header = frame.Header(1, 0, pika.BasicProperties()).marshal()
        method = impostor.method(1, spec.Basic.Deliver("tag", 1, False, "x", "a.b"))

        def send() -> None:
            with contextlib.suppress(OSError):
                while not go_on.wait(0.05):
                    connection.sendall(method + header)

        sending = threading.Thread(target=send, daemon=True)
        opened = impostor.method(1, spec.Channel.OpenOk())

        class Sock:
            def __getattr__(self, name: str) -> Any:
                return getattr(connection, name)

            def sendall(self, data: bytes) -> None:
                connection.sendall(data)
                if data == opened:
                    sending.start()

        impostor.converse(Sock(), spec.Basic.Get, b"")  # type: ignore[arg-type]

    def be_silent(connection: socket.socket) -> None:
        impostor.converse(connection, spec.Basic.Get, b"")

    delivered: list[object] = []
    with Impostor(deliver) as lively, Impostor(be_silent) as silent:
        alive = Outcome(loop, lively.url("?heartbeat=1"))
        dead = Outcome(loop, silent.url("?heartbeat=1"))
        transport = alive.connection.transport
        assert dead.connection.is_open
        transport.on_deliver(1, lambda *arguments: delivered.append(arguments))
        alive.connection.channel(on_open_callback=lambda _channel: None)
        run(loop, lambda: dead.closed)
        assert explain(dead.closed[0]) == "the broker did not answer (missed heartbeats)"
        assert len(delivered) > 5
        assert alive.connection.is_open
        alive.connection.close()
        run(loop, lambda: alive.closed)
        go_on.set()


# --- the wake-up ---------------------------------------------------------------------------------


def test_wake_up_may_interrupt_another(loop: Loop) -> None:
    """As a signal handler or a finalizer does, on the same thread, at any point of it."""
    ran: list[str] = []
    sock = loop._wake_w

    class Interrupted:
        def send(self, data: bytes) -> int:
            loop._wake_w = sock
            loop.call_soon(lambda: ran.append("interrupting"))
            return sock.send(data)

        def close(self) -> None:
            sock.close()

    loop._wake_w = Interrupted()  # type: ignore[assignment]
    caller = threading.Thread(
        target=lambda: loop.call_soon(lambda: ran.append("interrupted")), daemon=True
    )
    caller.start()
    caller.join(5)
    assert not caller.is_alive()
    run(loop, lambda: len(ran) == 2)
    assert ran == ["interrupted", "interrupting"]


def test_call_that_comes_as_the_wake_up_is_read_is_not_forgotten(loop: Loop) -> None:
    """Its own wake-up is read with the one before it."""
    ran: list[str] = []
    sock = loop._wake_r

    class Late:
        def recv(self, size: int) -> bytes:
            loop._wake_r = sock
            loop.call_soon(lambda: ran.append("late"))
            return sock.recv(size)

    loop._wake_r = Late()  # type: ignore[assignment]
    loop.call_soon(lambda: ran.append("early"))
    run(loop, lambda: len(ran) == 2, timeout=2)
    assert ran == ["early", "late"]


def test_wake_ups_are_coalesced_and_none_is_lost(loop: Loop) -> None:
    """More than the socket holds, from several threads; and of a loop that has ended."""
    number = 100_000
    ran = 0

    def count() -> None:
        nonlocal ran
        ran += 1

    def call() -> None:
        for _ in range(number):
            loop.call_soon(count)

    call()
    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    run(loop, lambda: ran == 3 * number, timeout=30)
    for caller in callers:
        caller.join(20)
    with closing(Loop()) as ended:
        pass
    ended.call_soon(count)


def test_call_that_raises_ends_the_loop_and_leaves_the_others_to_the_next() -> None:
    calls: deque[Callable[[], None]] = deque()
    ran: list[str] = []

    def fail() -> None:
        raise ZeroDivisionError

    with closing(Loop(calls)) as loop:
        loop.call_soon(fail)
        loop.call_soon(lambda: ran.append("next"))
        with pytest.raises(ZeroDivisionError):
            loop.start()
    with closing(Loop(calls)) as following:
        following.wake()
        run(following, lambda: ran)
