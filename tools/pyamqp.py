"""A second AMQP client: py-amqp, typed, with a deadline for every wait.

Tests and benchmarks use it to look at the broker, because reading pika's messages with pika proves
less, and because pika's own blocking adapter is deprecated in 1.5 and gone in 2.0. Methods and
their defaults are named as in the AMQP 0-9-1 reference; py-amqp's default is auto-delete for queues
and exchanges.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

import amqp

#: The broker closed a channel or the connection; with ``reply_code`` and ``reply_text``.
AMQPError = amqp.AMQPError
#: The queue or exchange does not exist: 404.
NotFound = amqp.NotFound
#: The queue is exclusive to another connection: 405.
ResourceLocked = amqp.ResourceLocked
#: It exists with different arguments, or the broker refuses the arguments: 406.
PreconditionFailed = amqp.PreconditionFailed
#: The errors of a refused, closed or lost connection.
ERRORS = (amqp.AMQPError, OSError)

_CONTENT_HEADER = 2  # a frame type
_PROPERTIES = 12  # their offset in it, after class, weight and body size
_NO_PROPERTIES = b"\0\0"


@dataclass
class Properties:
    """The properties of a message; None stands for an unset one."""

    content_type: Any = None
    content_encoding: Any = None
    headers: Any = None
    delivery_mode: Any = None
    priority: Any = None
    correlation_id: Any = None
    reply_to: Any = None
    expiration: Any = None
    message_id: Any = None
    timestamp: Any = None
    type: Any = None
    user_id: Any = None
    app_id: Any = None
    cluster_id: Any = None


class Encoded(Protocol):
    """Properties that encode themselves, as pika's do."""

    def encode(self) -> list[bytes]: ...


class Received(NamedTuple):
    """A message taken from a queue."""

    encoded: bytes
    body: bytes
    delivery_tag: int

    @property
    def properties(self) -> Properties:
        """Decoded only here: py-amqp raises an error for those of a hostile message."""
        decoded, _ = amqp.serialization.decode_properties_basic(self.encoded, 0)
        if "application_headers" in decoded:
            decoded["headers"] = decoded.pop("application_headers")
        return Properties(**decoded)


class Declared(NamedTuple):
    """A queue, with the number of its ready messages and of its consumers."""

    queue: str
    messages: int
    consumers: int


class Connection:
    """A connection; close it, or use it in a ``with`` statement.

    :param tls: py-amqp's options for TLS, if the port of ``url`` is a TLS port.
    :param connect_timeout: seconds for the TCP connection, and for each step of the handshake.
    :param timeout: seconds for each reply of the broker; then TimeoutError, an OSError.
    """

    def __init__(
        self,
        url: str,
        *,
        tls: dict[str, Any] | None = None,
        connect_timeout: float = 10.0,
        timeout: float = 30.0,
    ) -> None:
        parts = urlsplit(url)
        self._connection = amqp.Connection(
            f"{parts.hostname}:{parts.port or 5672}",
            unquote(parts.username or "guest"),
            unquote(parts.password or "guest"),
            login_method="PLAIN",
            virtual_host=unquote(parts.path[1:]) or "/",
            ssl=tls or False,
            connect_timeout=connect_timeout,
            frame_handler=_frame_handler,
        )
        try:
            self._connection.connect()
            # Not py-amqp's read_timeout: that is SO_RCVTIMEO, at which TCPTransport._read
            # (amqp/transport.py) goes on waiting in the middle of a frame.
            self._connection.sock.settimeout(timeout)
        except BaseException:
            self._connection.collect()
            raise

    @property
    def server_properties(self) -> dict[str, Any]:
        """The broker's own properties: its version, its capabilities."""
        return dict(self._connection.server_properties)

    def channel(self) -> Channel:
        return Channel(self, self._connection.channel())

    def drain(self, timeout: float) -> bool:
        """Process the next frame; returns False if none arrives within these seconds."""
        try:
            self._connection.drain_events(timeout=timeout)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Close it, even if it is already closed or lost."""
        with contextlib.suppress(*ERRORS):
            self._connection.close()
        self._connection.collect()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Channel:
    """A channel. If the broker closed it with an error, py-amqp reopens it."""

    def __init__(self, connection: Connection, channel: Any) -> None:
        self.connection = connection
        self._channel = channel
        self._confirms = False

    def close(self) -> None:
        self._channel.close()

    # --- exchanges and queues ---------------------------------------------------------------------

    def exchange_declare(
        self,
        exchange: str,
        exchange_type: str,
        *,
        durable: bool = False,
        auto_delete: bool = False,
        internal: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        # py-amqp's own method has no `internal`: AMQP 0-9-1 reserves the bit, RabbitMQ uses it.
        passive, nowait = False, False
        flags = (passive, durable, auto_delete, internal, nowait)
        self._channel.send_method(
            amqp.spec.Exchange.Declare,
            "BssbbbbbF",
            (0, exchange, exchange_type, *flags, dict(arguments or {})),
            wait=amqp.spec.Exchange.DeclareOk,
        )

    def exchange_delete(self, exchange: str) -> None:
        """Delete it, if it exists."""
        self._channel.exchange_delete(exchange)

    def exchange_bind(self, destination: str, source: str, routing_key: str) -> None:
        self._channel.exchange_bind(destination, source, routing_key)

    def queue_declare(
        self,
        queue: str,
        *,
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> Declared:
        declared = self._channel.queue_declare(
            queue,
            passive=passive,
            durable=durable,
            exclusive=exclusive,
            auto_delete=auto_delete,
            arguments=dict(arguments or {}),
        )
        return Declared(*declared)

    def queue_delete(self, queue: str) -> None:
        """Delete it, if it exists."""
        self._channel.queue_delete(queue)

    def queue_bind(self, queue: str, exchange: str, routing_key: str) -> None:
        self._channel.queue_bind(queue, exchange, routing_key)

    # --- messages ---------------------------------------------------------------------------------

    def confirm_delivery(self) -> None:
        """Make `basic_publish` wait for the broker's confirm from now on."""
        self._confirms = True

    def basic_publish(
        self,
        exchange: str,
        routing_key: str | bytes,
        body: bytes,
        properties: Properties | Encoded | None = None,
        *,
        mandatory: bool = False,
    ) -> None:
        """Publish a message.

        With confirms, a nack raises ``amqp.MessageNacked``, and an unroutable mandatory message
        raises an AMQPError.
        """
        if isinstance(properties, Properties):
            given = {name: value for name, value in asdict(properties).items() if value is not None}
            if "headers" in given:
                given["application_headers"] = given.pop("headers")
            message = amqp.Message(body, **given)
        else:
            message = amqp.Message(body)
            if properties is not None:
                encoded = b"".join(properties.encode())
                # Bytes that py-amqp would refuse to write must reach the broker unchanged.
                message._serialize_properties = lambda: encoded
        publish = (
            self._channel.basic_publish_confirm if self._confirms else self._channel.basic_publish
        )
        publish(message, exchange, routing_key, mandatory=mandatory)

    def basic_get(self, queue: str, *, auto_ack: bool = False) -> Received | None:
        message = self._channel.basic_get(queue, no_ack=auto_ack)
        return None if message is None else _received(message)

    def basic_ack(self, delivery_tag: int) -> None:
        self._channel.basic_ack(delivery_tag)

    def basic_reject(self, delivery_tag: int, *, requeue: bool) -> None:
        self._channel.basic_reject(delivery_tag, requeue)

    def basic_consume(
        self,
        queue: str,
        callback: Callable[[Any], object],
        *,
        exclusive: bool = False,
        auto_ack: bool = False,
    ) -> None:
        """Consume until the channel is closed; `Connection.drain` calls the callback."""
        self._channel.basic_consume(queue, callback=callback, exclusive=exclusive, no_ack=auto_ack)

    def consume(self, queue: str, inactivity_timeout: float) -> Iterator[Received | None]:
        """Consume until the channel is closed: yields messages as they arrive, else None.

        The broker takes them as acked when it has sent them.
        """
        arrived = deque[Any]()
        self.basic_consume(queue, arrived.append, auto_ack=True)
        while True:
            while arrived:
                yield _received(arrived.popleft())
            if not self.connection.drain(inactivity_timeout):
                yield None


def _received(message: Any) -> Received:
    # For an empty message, py-amqp's body is an empty str.
    return Received(message.encoded, message.body or b"", message.delivery_tag)


def _frame_handler(connection: Any, callback: Callable[..., object]) -> Callable[..., object]:
    """py-amqp's, except that it sees no properties: see `Received.properties`."""
    encoded: dict[int, bytes] = {}

    def on_method(channel: int, method: Any, arguments: bytes, message: Any) -> None:
        if message is not None:
            message.encoded = encoded.pop(channel)
        callback(channel, method, arguments, message)

    handle = amqp.method_framing.frame_handler(connection, on_method)

    def on_frame(frame: tuple[int, int, bytes]) -> object:
        kind, channel, payload = frame
        if kind == _CONTENT_HEADER:
            encoded[channel] = payload[_PROPERTIES:]
            frame = kind, channel, payload[:_PROPERTIES] + _NO_PROPERTIES
        return handle(frame)

    return on_frame
