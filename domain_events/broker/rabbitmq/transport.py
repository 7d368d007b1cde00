"""Between pika and the socket: all bytes of a connection pass through here.

All frames written in one iteration of the loop are sent together, whereas pika's transport calls
``send()`` for each; reads are 64 KiB at a time, not 4 KiB. The frames of high volume are encoded
and decoded in `wire`, without pika. Each system call may release the GIL to another thread, which
costs more than the call itself.

`Attempt` is what pika calls I/O services, `Transport` a stream transport: both are interfaces
that pika publishes (``pika.adapters.utils.nbio_interface``). Besides these and pika's documented
classes, this package depends on

- ``BaseConnection._start_connection_workflow``, protected, which pika documents as "helper
  function for custom implementations of `create_connection()`". Without it there is no connection
  at all, so that every test with a broker fails.
- ``Connection.bytes_received``, which pika's heartbeat checker compares to see whether the broker
  is alive. pika does not count frames that bypass it: `test_transport.py`,
  ``test_deliveries_keep_a_connection_alive_and_silence_does_not``.
- ``Connection.server_properties``, for the release of RabbitMQ: `test_transport.py`,
  ``test_release_of_the_broker_is_known``.

Everything runs on the I/O thread.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, cast

import pika
from pika.adapters.utils.nbio_interface import (
    AbstractIOReference,
    AbstractStreamProtocol,
    AbstractStreamTransport,
)
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter
from pika.connection import Parameters
from pika.exceptions import ConnectionClosedByBroker

from domain_events.broker.rabbitmq.errors import LOGIN_REFUSED, close_code
from domain_events.broker.rabbitmq.loop import Loop
from domain_events.broker.rabbitmq.wire import Confirmed, Delivered, Reader, UnreadableStream

# So much is sent without waiting for the end of the iteration; the most that is read at a time.
_MOST_BUFFERED = 64 * 1024
_MOST_READ = 64 * 1024

# The peer has closed the connection; the TLS error adds nothing to that.
_PEER_CLOSED = (ssl.SSLEOFError, ssl.SSLZeroReturnError)

_Linked: TypeAlias = tuple[AbstractStreamTransport, AbstractStreamProtocol]


class Connection(pika.SelectConnection):
    """pika's connection, on a `Transport`."""

    transport: Transport
    bytes_received: int
    params: Parameters
    server_properties: dict[str, Any] | None

    @property
    def release(self) -> tuple[int, int]:
        """The broker's release, such as (4, 3); (0, 0) if it is unknown."""
        version = (self.server_properties or {}).get("version")
        found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
        return (int(found[1]), int(found[2])) if found else (0, 0)


class Attempt(SelectorIOServicesAdapter):
    """One attempt to connect to a node, at each of its addresses, and its connection.

    :ivar cause: why there is no connection (any more), where pika keeps only a text of it, or
        reports another error: the server does not use AMQP, TLS failed, or the broker has closed
        the connection during the login.
    """

    def __init__(self, loop: Loop) -> None:
        super().__init__(cast(Any, loop))
        self.loop = loop
        self.cause: BaseException | None = None
        self._abandoned = False
        self._connection: Connection
        self._sock: socket.socket | None = None

    def start(self, parameters: Parameters, on_done: Callable[[Any], None]) -> None:
        """Connect, then call `on_done` with a `Connection` or an exception."""

        def make(parameters: Parameters) -> Connection:
            self._connection = Connection(
                parameters, custom_ioloop=cast(Any, self), internal_connection_workflow=False
            )
            return self._connection

        begin: Callable[..., object] = Connection._start_connection_workflow  # type: ignore[attr-defined, unused-ignore]
        begin([parameters], make, self, None, on_done)

    def abandon(self, error: BaseException) -> None:
        """Try no further address. The current attempt ends in pika's own time."""
        self.cause, self._abandoned = error, True

    def dispose(self) -> None:
        """Close the socket, now that the loop does not run any more."""
        if self._sock is not None:
            _close(self._sock)

    # --- for pika ------------------------------------------------------------------------------

    def connect_socket(
        self,
        sock: socket.socket,
        resolved_addr: tuple[str, int],
        on_done: Callable[[BaseException | None], None],
    ) -> Any:
        # A host's addresses are all the same broker's: no second login after a refused one.
        if self._abandoned or close_code(self.cause) == LOGIN_REFUSED:
            return self.call_later(0, partial(on_done, self.cause))
        self.cause, self._sock = None, sock
        return super().connect_socket(sock, resolved_addr, on_done)

    def create_streaming_connection(
        self,
        protocol_factory: Callable[[], AbstractStreamProtocol],
        sock: socket.socket,
        on_done: Callable[[_Linked | BaseException], None],
        ssl_context: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
    ) -> AbstractIOReference:
        def link_up() -> None:
            try:
                linked = make(sock)
            except Exception as error:  # noqa: BLE001 - pika reports it
                self.dispose()
                on_done(error)
            else:
                on_done(linked)

        def make(sock: socket.socket) -> _Linked:
            if ssl_context is not None:
                # The handshake is part of the first reads and writes.
                self._sock = sock = ssl_context.wrap_socket(
                    sock, do_handshake_on_connect=False, server_hostname=server_hostname
                )
            protocol = protocol_factory()
            self._connection.transport = Transport(self, self._connection, protocol, sock)
            protocol.connection_made(self._connection.transport)
            return self._connection.transport, protocol

        # Not at once: pika expects the callback after this has returned.
        return cast(AbstractIOReference, self.call_later(0, link_up))


class Transport(AbstractStreamTransport):
    """The bytes of one connection, with or without TLS.

    :param protocol: pika's connection, as an interface for transports.
    """

    def __init__(
        self,
        attempt: Attempt,
        connection: Connection,
        protocol: AbstractStreamProtocol,
        sock: socket.socket,
    ) -> None:
        self._attempt = attempt
        self._loop = attempt.loop
        self._connection = connection
        self._protocol = protocol
        self._reader = Reader(protocol.data_received)
        self._sock = sock
        self._pending = sock.pending if isinstance(sock, ssl.SSLSocket) else int
        self._out = bytearray()
        self._ended = False
        self._error: BaseException | None = None
        self._idle = Loop.READ  # to be watched for while there is nothing to write
        self._watched = Loop.READ
        self._loop.add_handler(sock.fileno(), self._on_ready, self._watched)

    def on_deliver(self, channel: int, delivered: Delivered, queue: str = "") -> None:
        """Call ``delivered`` with deliveries on this channel (of this queue), instead of pika."""
        self._reader.delivered[channel] = delivered
        self._reader.queues[channel] = queue

    def on_confirm(self, channel: int, confirmed: Confirmed) -> None:
        """Call ``confirmed`` with confirms on this channel, instead of pika."""
        self._reader.confirmed[channel] = confirmed

    def buffer(self, data: bytes) -> None:
        """Send this after everything written before it, at the latest with `flush`."""
        if not self._ended:
            self._out += data
            if len(self._out) >= _MOST_BUFFERED and not self._watched & Loop.WRITE:
                self.flush()

    def flush(self) -> None:
        """Send what is buffered, as far as the socket takes it; the rest follows by itself."""
        try:
            while self._out:
                # OpenSSL requires the same bytes again after a failed write; more may follow them.
                del self._out[: self._sock.send(self._out)]
        except (BlockingIOError, ssl.SSLWantWriteError):
            self._watch(self._idle | Loop.WRITE)
        except ssl.SSLWantReadError:
            pass  # `_on_ready` tries again
        except OSError as error:
            self._end(error)

    def pause_reading(self) -> None:
        """Leave what arrives to the operating system, until `resume_reading`.

        For less than the heartbeat's interval: a silent broker is taken for a dead one.
        """
        self._idle = 0
        self._watch(self._watched & ~Loop.READ)

    def resume_reading(self) -> None:
        """Read again, also bytes that TLS has buffered."""
        if not self._idle:
            self._idle = Loop.READ
            self._watch(self._watched | Loop.READ)
            self._loop.call_later(0, self._read)

    def drop(self) -> None:
        """Break the connection at once."""
        self._end(ConnectionAbortedError("dropped by this side"))

    # --- for pika ------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if not self._out:
            self._loop.call_later(0, self.flush)  # at the end of this iteration
        self.buffer(data)

    def get_write_buffer_size(self) -> int:
        return len(self._out)

    def get_protocol(self) -> AbstractStreamProtocol:
        return self._protocol

    def abort(self) -> None:
        self._end(None)
        self._error = None  # pika has its own reason, and accepts no other

    # --- the socket ----------------------------------------------------------------------------

    def _on_ready(self, _fd: int, events: int) -> None:
        # Both, whatever it is ready for: TLS may have to read before it can write, and vice versa.
        self._watch(self._idle)
        if self._idle or events & ~(Loop.READ | Loop.WRITE):  # an end is never left unread
            self._read()
        self.flush()

    def _read(self) -> None:
        try:
            while not self._ended:
                data = self._sock.recv(_MOST_READ)
                if data:
                    self._received(data)
                elif not self._protocol.eof_received():
                    self._end(None)
                # The rest is for the next iteration, except bytes that TLS has buffered.
                if not self._pending() or not self._idle:
                    return
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except ssl.SSLWantWriteError:
            self._watch(Loop.READ | Loop.WRITE)
        except UnreadableStream as error:
            self._end(UnreadableStream(*error.args))  # without its traceback, which has the data
        except Exception as error:  # noqa: BLE001 - of the socket, or pika's
            self._end(error)

    def _received(self, data: bytes) -> None:
        if self._connection.is_open:
            self._reader.largest_frame = self._connection.params.frame_max
        own = self._reader.feed(data)
        # Only now: pika counts as well, the bytes that it gets.
        self._connection.bytes_received += own

    def _watch(self, events: int) -> None:
        if events != self._watched and not self._ended:
            self._watched = events
            self._loop.update_handler(self._sock.fileno(), events)

    def _end(self, error: BaseException | None) -> None:
        if not self._ended:
            self._ended = True
            self._error = error
            self._out.clear()
            self._loop.remove_handler(self._sock.fileno())
            self._loop.call_later(0, self._lose)  # pika may be in the middle of a call of its own

    def _lose(self) -> None:
        _close(self._sock)
        closed, error = self._reader.closed, self._error
        if closed is not None:
            self._attempt.cause = ConnectionClosedByBroker(*closed)
        elif isinstance(error, UnreadableStream | ssl.SSLError) and not isinstance(
            error, _PEER_CLOSED
        ):
            self._attempt.cause = error
        self._protocol.connection_lost(error)


def _close(sock: socket.socket) -> None:
    # Not only `close`: after a fork, the child has a copy of the descriptor.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
