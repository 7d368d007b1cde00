"""Between pika and its socket: all that a connection sends and receives passes here.

What pika sends in one turn of the loop goes out together, where it has a `send()` for each frame.
What comes is read in large pieces, where it asks for 4 KiB at a time; what there is much of is
read and written by `wire`, and pika never sees it. Each system call may hand the interpreter over
to another thread, which costs more than the call.

pika's interfaces for transports and protocols are the way in: `Stream` is the one's transport and
the other's protocol. All on the I/O thread.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any, cast

import pika
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.connection_workflow import AbstractAMQPConnectionWorkflow
from pika.adapters.utils.nbio_interface import (
    AbstractIOReference,
    AbstractStreamProtocol,
    AbstractStreamTransport,
)
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter
from pika.connection import Parameters

from domain_events.broker.rabbitmq.loop import Loop
from domain_events.broker.rabbitmq.wire import Confirmed, Delivered, Reader, UnreadableStream

# What is longer goes as it is: to join it would copy it.
_MOST_JOINED = 64 * 1024
_MOST_READ = 64 * 1024


class Connection(pika.SelectConnection):
    """pika's, on a `Stream`."""

    stream: Stream
    # pika's, by which it sees whether the other end is alive; the published types lack them.
    bytes_sent: int
    bytes_received: int
    params: Parameters
    server_properties: dict[str, Any] | None

    @property
    def release(self) -> tuple[int, int]:
        """The broker's release, such as (4, 3); (0, 0) if it does not say."""
        version = (self.server_properties or {}).get("version")
        found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
        return (int(found[1]), int(found[2])) if found else (0, 0)

    @classmethod
    def create_connection(
        cls,
        connection_configs: Sequence[Parameters],
        on_done: Callable[[Any], object],
        custom_ioloop: IOLoop | None = None,
        workflow: AbstractAMQPConnectionWorkflow | None = None,
    ) -> AbstractAMQPConnectionWorkflow:
        services = _Services(cast(Loop, custom_ioloop))

        def make(parameters: Parameters) -> Connection:
            services.connection = cls(
                parameters, custom_ioloop=services, internal_connection_workflow=False
            )
            return services.connection

        # What pika has for those who write this method anew; the published types lack it, too.
        start: Callable[..., AbstractAMQPConnectionWorkflow] = cls._start_connection_workflow  # type: ignore[attr-defined, unused-ignore]
        return start(connection_configs, make, services, workflow, on_done)

    def _on_stream_terminated(self, error: Exception | None) -> None:
        # pika would make a lost connection of it, or a wrong password, by how far it had come.
        super()._on_stream_terminated(self.stream.unreadable or error)  # type: ignore[misc, unused-ignore]


class Stream(AbstractStreamTransport, AbstractStreamProtocol):
    """The bytes of one connection.

    :param above: pika's connection as its transports see it.
    """

    _transport: AbstractStreamTransport

    def __init__(self, loop: Loop, connection: Connection, above: AbstractStreamProtocol) -> None:
        self._loop = loop
        self._connection = connection
        self._above = above
        self._joined: list[bytes] = []
        self._size = 0
        self._reader = Reader(above.data_received)
        #: Why nothing more can be read, if so.
        self.unreadable: UnreadableStream | None = None

    def hear_deliveries(self, channel: int, delivered: Delivered, queue: str = "") -> None:
        """Call this with the deliveries on this channel, from this queue; pika then gets none."""
        self._reader.delivered[channel] = delivered
        self._reader.queues[channel] = queue

    def hear_confirms(self, channel: int, confirmed: Confirmed) -> None:
        """Tell of the confirms on this channel; pika then gets none."""
        self._reader.confirmed[channel] = confirmed

    def put(self, data: bytes) -> None:
        """Send this behind what pika has sent, at the latest with `put_out`."""
        self._connection.bytes_sent += len(data)
        self._joined.append(data)
        self._size += len(data)
        if self._size >= _MOST_JOINED:
            self.put_out()

    def put_out(self) -> None:
        """Send what is joined."""
        if self._size:
            joined, self._joined = self._joined, []
            self._size = 0
            data = joined[0] if len(joined) == 1 else b"".join(joined)
            self._loop.writes_at_once = True
            try:
                self._transport.write(data)  # which passes it over when it is closed
            finally:
                self._loop.writes_at_once = False

    # --- for pika's connection -----------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self._size == 0:
            self._loop.at_end_of_turn(self.put_out)
        self._joined.append(data)
        self._size += len(data)
        if self._size >= _MOST_JOINED:
            self.put_out()

    def get_write_buffer_size(self) -> int:
        return self._size + self._transport.get_write_buffer_size()

    def get_protocol(self) -> AbstractStreamProtocol:
        return self._above

    def abort(self) -> None:
        self._transport.abort()

    # --- for the transport ---------------------------------------------------------------------

    def connection_made(self, transport: AbstractStreamTransport) -> None:
        self._transport = transport
        self._loop.streams.add(self)
        self._above.connection_made(self)

    def connection_lost(self, error: BaseException | None) -> None:
        self._above.connection_lost(error)

    def eof_received(self) -> bool | None:
        return self._above.eof_received()

    def data_received(self, data: bytes) -> None:
        if self._connection.is_open:
            self._reader.largest_frame = self._connection.params.frame_max
        try:
            own = self._reader.feed(data)
        except UnreadableStream as error:
            # A fresh one, without the frames and the data in them.
            self.unreadable = UnreadableStream(*error.args)
            raise  # pika then breaks the connection off
        # By its count pika sees whether the broker is alive; what was passed on, it has counted.
        self._connection.bytes_received += own


class _Services(SelectorIOServicesAdapter):
    """pika's services for connections, which puts a `Stream` into each.

    :ivar connection: the one that was made last.
    """

    connection: Connection

    def __init__(self, loop: Loop) -> None:
        super().__init__(cast(Any, loop))
        self._its_loop = loop

    def create_streaming_connection(
        self,
        protocol_factory: Callable[[], AbstractStreamProtocol],
        sock: socket.socket,
        on_done: Callable[[Any], None],
        ssl_context: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
    ) -> AbstractIOReference:
        def make() -> Stream:
            above = protocol_factory()
            self.connection.stream = Stream(self._its_loop, self.connection, above)
            return self.connection.stream

        def done(result: Any) -> None:
            if not isinstance(result, BaseException):
                # A transport and a protocol; what pika made is to be seen as the latter.
                stream = self.connection.stream
                result = stream, stream.get_protocol()
            on_done(result)

        return super().create_streaming_connection(
            make, _Socket.of(sock), done, ssl_context, server_hostname
        )


class _Socket(socket.socket):
    """A socket that gives more than it is asked for, and knows when it is empty.

    TLS makes a socket of its own out of it.
    """

    _empty = False

    @classmethod
    def of(cls, sock: socket.socket) -> _Socket:
        """The same socket; ``sock`` is closed to its holder."""
        same = cls(sock.family, sock.type, sock.proto, fileno=sock.detach())
        same.setblocking(False)
        return same

    def recv(self, _size: int, flags: int = 0) -> bytes:
        if self._empty:
            self._empty = False
            raise BlockingIOError(errno.EAGAIN, "read to its end just now")
        data = super().recv(_MOST_READ, flags)
        # At the end of the stream, there is more to say.
        self._empty = 0 < len(data) < _MOST_READ
        return data
