"""Fast path: encodes and decodes the high-volume frames (events, deliveries, confirms) itself.

pika can do all of this, in about four times the time. It handles everything else: messages for
which `Writer` returns None, and frames that `Reader` passes on.

Bytes in, bytes out; uses no sockets and no threads. The grammar is that of AMQP 0-9-1, chapters
2.3 and 4.2 of its specification.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from pika.exceptions import AMQPError
from pika.spec import (
    FRAME_BODY,
    FRAME_END,
    FRAME_HEADER,
    FRAME_HEARTBEAT,
    FRAME_METHOD,
    Basic,
    BasicProperties,
    Connection,
)

from domain_events.broker.rabbitmq.envelope import Properties, own_and_given_headers
from domain_events.broker.rabbitmq.topology import address
from domain_events.log import Log, about
from domain_events.message import Message, ToExchange
from domain_events.names import LONGEST_NAME
from domain_events.text import printable

log = Log("domain_events")

# Surely fits a frame: the smallest limit that a broker may set is 4,096 bytes (frame-min-size).
_LARGEST_PLAIN_BODY = 4000
# With the other properties, of at most 255 bytes each.
_LARGEST_PLAIN_TABLE = 2000
# The most addresses whose frames are cached; a routing key may contain an id.
_MOST_REMEMBERED = 1000

# The broker adds headers of its own to a message (x-delivery-count, x-death), even if the
# publisher's fill a frame already (tests/test_large_input.py).
_ADDED = {FRAME_HEADER: 64 * 1024}
_KINDS = (FRAME_METHOD, FRAME_HEADER, FRAME_BODY, FRAME_HEARTBEAT)
_BASIC = Basic.INDEX
_PUBLISH, _DELIVER, _GET_OK, _ACK, _NACK = (
    struct.pack(">I", method.INDEX)
    for method in (Basic.Publish, Basic.Deliver, Basic.GetOk, Basic.Ack, Basic.Nack)
)
_CLOSE = struct.pack(">I", Connection.Close.INDEX)
_CONFIRMS = (_ACK, _NACK)
_END = bytes([FRAME_END])

_FRAME = struct.Struct(">BHI")  # kind, channel, size; then so many bytes, then _END
# A frame's head, class, weight, size of the body, flags: how a message's properties begin.
_PROPERTIES = struct.Struct(">BHIHHQ")
_BODY = struct.Struct(">BBHI")  # _END and the next frame's head
_NUMBER = struct.Struct(">Q")
_LENGTH = struct.Struct(">I")
_TAGGED = struct.Struct(">QBB")  # tag, redelivered, length of the exchange's name
_CONFIRM = struct.Struct(">QB")  # tag, multiple
_FLAGS = struct.Struct(">H")
_REASON = struct.Struct(">HB")  # reply code, length of the reply text

_PLAIN_FLAGS = (
    BasicProperties.FLAG_CONTENT_TYPE
    | BasicProperties.FLAG_DELIVERY_MODE
    | BasicProperties.FLAG_CORRELATION_ID
    | BasicProperties.FLAG_MESSAGE_ID
    | BasicProperties.FLAG_TIMESTAMP
    | BasicProperties.FLAG_TYPE
    | BasicProperties.FLAG_APP_ID
)
_PERSISTENT = b"\x02"
# In a frame of properties the flags come behind class, weight and size of the body.
_BEFORE_FLAGS = 12


class Writer:
    """Writes the events that are published on one channel.

    :param channel: its number.
    """

    def __init__(self, channel: int) -> None:
        self._channel = channel
        # The constant parts of all events of one address: their first frame, and the beginning
        # and the end of their properties.
        self._known: dict[tuple[object, ...], tuple[bytes, bytes, bytes]] = {}

    def frames(self, message: Message) -> bytes | None:
        """The event's frames, or None if pika has to write them.

        :raises ValueError: a str in it is too long for AMQP.
        """
        body, timestamp = message.body, message.timestamp
        message_id, correlation_id = message.message_id, message.correlation_id
        destination = message.destination
        if (
            type(destination) is not ToExchange
            or message.source is not None
            or message.version != 1
            or message.retries
            or timestamp is None
            or message_id is None
            or correlation_id is None
            or not 0 < len(body) <= _LARGEST_PLAIN_BODY
        ):
            return None
        table = b""
        if message.headers or message.cause is not None:
            headers = own_and_given_headers(message)
            table = _table(headers)
            if not table:
                return None
        has_table = bool(table)
        key = (
            destination.exchange,
            message.routing_key,
            message.mandatory,
            message.app_id,
            has_table,
        )
        known = self._known.get(key)
        if known is None:
            known = self._constant_parts(message, has_table)
            if known is None:
                return None
            if len(self._known) >= _MOST_REMEMBERED:
                self._known.clear()
            self._known[key] = known
        method, begin, end = known
        identity = _short(message_id)
        correlation = identity if correlation_id == message_id else _short(correlation_id)
        properties = b"".join(
            (begin, table, _PERSISTENT, correlation, identity, _NUMBER.pack(timestamp), end)
        )
        size = len(body)
        return b"".join(
            (
                method,
                _PROPERTIES.pack(
                    FRAME_HEADER,
                    self._channel,
                    _BEFORE_FLAGS + len(properties),
                    _BASIC,
                    0,
                    size,
                ),
                properties,
                _BODY.pack(FRAME_END, FRAME_BODY, self._channel, size),
                body,
                _END,
            )
        )

    def _constant_parts(
        self, message: Message, has_table: bool
    ) -> tuple[bytes, bytes, bytes] | None:
        exchange, routing_key = address(message.destination, message.routing_key)
        if message.app_id is None:
            return None
        # First a reserved short, last the bits mandatory and immediate.
        arguments = bytes(2) + _short(exchange) + _short(routing_key) + bytes((message.mandatory,))
        head = _FRAME.pack(FRAME_METHOD, self._channel, len(_PUBLISH) + len(arguments))
        return (
            head + _PUBLISH + arguments + _END,
            _FLAGS.pack(_PLAIN_FLAGS | BasicProperties.FLAG_HEADERS * has_table)
            + _short("application/json"),
            _short(routing_key) + _short(message.app_id),
        )


def _table(headers: Mapping[str, Any]) -> bytes:
    """The table of headers that are all text, and fit; empty if pika has to write it."""
    entries = []
    for name, value in headers.items():
        if type(value) is not str:
            return b""
        data = value.encode()
        entries.append(b"".join((_short(name), b"S", _LENGTH.pack(len(data)), data)))
    table = b"".join(entries)
    return _LENGTH.pack(len(table)) + table if len(table) <= _LARGEST_PLAIN_TABLE else b""


def _short(text: str) -> bytes:
    data = text.encode()
    if len(data) > LONGEST_NAME:
        raise ValueError(f"{text[:60]!r}... has {len(data)} bytes, {LONGEST_NAME} at most")
    return bytes((len(data),)) + data


#: Called with a delivery: exchange, routing key, whether it is redelivered, tag, properties, body.
Delivered: TypeAlias = Callable[[str, str, bool, int, Properties, bytes], None]
#: Called with a confirm: tag, whether it is ``multiple``, whether it is an ack.
Confirmed: TypeAlias = Callable[[int, bool, bool], None]

#: The largest frame before the two ends have agreed on a maximum.
LARGEST_FRAME = 128 * 1024
#: RabbitMQ's own upper bound for the body of a message, whatever it is configured to.
LARGEST_BODY = 512 * 2**20

# How a TLS listener answers a client without TLS.
_TLS_ALERT = b"\x15\x03"

# The bytes of a frame besides its payload; frame_max includes them.
_AROUND_PAYLOAD = _FRAME.size + len(_END)


class UnreadableStream(AMQPError):
    """The received bytes are not AMQP 0-9-1 within its limits; the connection cannot go on."""


class Reader:
    """Reads all deliveries and confirms on the channels that have a callback for them.

    Everything else is passed on, frame by frame and in order. Headers that pika cannot decode are
    removed before: pika would drop the connection over them, and the broker would deliver the same
    message on the next one, and so on for ever. A timestamp in milliseconds is enough (before pika
    1.5; in the year 55,000, which no `datetime` has), or arrays a thousand deep
    (tests/test_hostile_input.py).

    Whatever the other end sends, the memory that this takes is bounded by the largest frame and
    the largest body, and the time is linear in the number of bytes.

    :param others: called with each frame that is passed on.
    :ivar largest_frame: the largest frame to accept, in bytes.
    :ivar delivered: callbacks for deliveries, by the channel's number.
    :ivar confirmed: callbacks for confirms, likewise.
    :ivar queues: the queue consumed on a channel, for log lines.
    :ivar closed: reply code and text with which the broker has closed the connection, if it has.
    """

    def __init__(self, others: Callable[[bytes], None]) -> None:
        self._others = others
        # The beginning of a frame, or of a delivery, and how many bytes are needed to go on.
        self._pieces: list[bytes] = []
        self._length = 0
        self._needed = 0
        # By channel: deliveries of more than three frames, or interleaved with other frames.
        self._partial: dict[int, _PartialDelivery] = {}
        # By channel: the routing key of the last basic.get-ok.
        self._got: dict[int, str] = {}
        self.largest_frame = LARGEST_FRAME
        self.delivered: dict[int, Delivered] = {}
        self.confirmed: dict[int, Confirmed] = {}
        self.queues: dict[int, str] = {}
        self.closed: tuple[int, str] | None = None

    def feed(self, data: bytes) -> int:
        """Read received bytes; returns how many of them were not passed on.

        :raises UnreadableStream: it is not AMQP, or over a limit.
        """
        if self._pieces:
            self._pieces.append(data)
            self._length += len(data)
            if self._length < self._needed:
                return 0
            data = b"".join(self._pieces)
        try:
            at, needed, own = self._read(data)
        except (struct.error, IndexError) as error:
            raise UnreadableStream("the broker sent a frame that cannot be read") from error
        rest = data[at:]
        self._pieces = [rest] if rest else []
        self._length, self._needed = len(rest), needed
        return own

    def _read(self, data: bytes) -> tuple[int, int, int]:
        """Where the rest begins, its length once it can be read, and bytes not passed on."""
        at = own = 0
        most = self.largest_frame - _AROUND_PAYLOAD
        while len(data) - at >= _FRAME.size:
            kind, channel, size = _FRAME.unpack_from(data, at)
            if kind not in _KINDS or size > most + _ADDED.get(kind, 0):
                raise self._head_error(data[at : at + 40], kind, size)
            payload = at + _FRAME.size
            after = payload + size + 1
            if after > len(data):
                return at, after - at, own
            if data[after - 1] != FRAME_END:
                raise UnreadableStream("the broker sent a frame without its end")
            if kind == FRAME_HEADER:
                _check_announced(data, payload)
            if kind == FRAME_METHOD or (channel in self._partial and kind != FRAME_HEARTBEAT):
                behind, needed, call, arguments = self._parse(kind, data, payload, after, channel)
                if needed:
                    return at, needed - at, own
                if behind:
                    own += behind - at
                    at = behind
                    call(*arguments)
                    continue
            frame = data[at:after]
            if kind == FRAME_HEADER:
                readable = self._readable_frame(frame, channel)
                own += len(frame) - len(readable)
                frame = readable
            elif kind == FRAME_METHOD:
                self._note(data, payload, after - 1, channel)
            at = after
            self._others(frame)
        if len(data) > at and data[at] not in _KINDS:
            raise self._head_error(data[at : at + 40], data[at], 0)
        return at, _FRAME.size, own

    def _note(self, data: bytes, at: int, end: int, channel: int) -> None:
        """Keep the fields of a method that are needed after it is passed on."""
        method = data[at : at + 4]
        if method == _GET_OK:
            self._got[channel] = _addressed(data, at + 4, end)[1]
        elif method == _CLOSE:
            code, length = _REASON.unpack_from(data, at + 4)
            at += 4 + _REASON.size
            self.closed = code, text(data[at : at + length])

    def _head_error(self, begin: bytes, kind: int, size: int) -> UnreadableStream:
        if begin.startswith(_TLS_ALERT):
            return UnreadableStream("the other end uses TLS, which requires an amqps:// URL")
        if kind not in _KINDS:
            return UnreadableStream(
                "the other end does not use AMQP 0-9-1; it sent "
                f"'{printable(begin.decode('latin-1'))}'"
            )
        return UnreadableStream(
            f"the broker sent a frame of {size + _AROUND_PAYLOAD:,} bytes, the most is "
            f"{self.largest_frame:,}"
        )

    def _parse(
        self, kind: int, data: bytes, at: int, after: int, channel: int
    ) -> tuple[int, int, Callable[..., None], tuple[object, ...]]:
        """The end of a frame or delivery read here, the end of the data it needs, its callback.

        The first is 0 if the frame is for pika, or if more data is needed.
        """
        if kind != FRAME_METHOD:
            partial = self._partial[channel]
            if not partial.add(kind, data[at : after - 1]):
                return after, 0, _ignore, ()
            del self._partial[channel]
            return after, 0, self.delivered[channel], partial.arguments()
        self._partial.pop(channel, None)  # it will not be completed any more
        method = data[at : at + 4]
        if method == _DELIVER and channel in self.delivered:
            properties, body, behind, needed = self._content(data, after, channel)
            if needed:
                return 0, needed, _ignore, ()
            # After the consumer's tag.
            about = _addressed(data, at + 5 + data[at + 4], after - 1)
            where = (self.queues.get(channel, ""), about[1])
            if not behind:
                self._partial[channel] = _PartialDelivery(about, where)
                return after, 0, _ignore, ()
            arguments = (*about, ReceivedProperties(properties, where), body)
            return behind, 0, self.delivered[channel], arguments
        if method in _CONFIRMS and channel in self.confirmed:
            tag, multiple = _CONFIRM.unpack_from(data, at + 4)
            return after, 0, self.confirmed[channel], (tag, bool(multiple & 1), method == _ACK)
        return 0, 0, _ignore, ()

    def _content(self, data: bytes, at: int, channel: int) -> tuple[bytes, bytes, int, int]:
        """A delivery after its first frame: properties, body, their end, the end of data needed.

        Their end is 0 if these are not one frame each, or if more data is needed.
        """
        end = len(data)
        if end - at < _PROPERTIES.size:
            return b"", b"", 0, at + _PROPERTIES.size
        kind, of, size, _class, _weight, length = _PROPERTIES.unpack_from(data, at)
        most = self.largest_frame - _AROUND_PAYLOAD
        largest = most + _ADDED[FRAME_HEADER]
        if kind != FRAME_HEADER or of != channel or not _BEFORE_FLAGS <= size <= largest:
            return _NOT_IN_ONE_PIECE
        begin = at + _FRAME.size
        at = begin + size + 1
        if end < at:
            return b"", b"", 0, at
        if data[at - 1] != FRAME_END:
            return _NOT_IN_ONE_PIECE
        properties = data[begin + _BEFORE_FLAGS : at - 1]
        if not length:
            return properties, b"", at, 0
        if end - at < _FRAME.size:
            return b"", b"", 0, at + _FRAME.size
        kind, of, size = _FRAME.unpack_from(data, at)
        if kind != FRAME_BODY or of != channel or size != length or size > most:
            return _NOT_IN_ONE_PIECE
        begin = at + _FRAME.size
        at = begin + size + 1
        if end < at:
            return b"", b"", 0, at
        if data[at - 1] != FRAME_END:
            return _NOT_IN_ONE_PIECE
        return properties, data[begin : at - 1], at, 0

    def _readable_frame(self, frame: bytes, channel: int) -> bytes:
        """A header frame, with the properties that pika can decode."""
        begin = _FRAME.size + _BEFORE_FLAGS
        properties = frame[begin:-1]
        readable = _readable(properties, ("", self._got.get(channel, "")))
        if readable is properties:
            return frame
        head = _FRAME.pack(FRAME_HEADER, channel, _BEFORE_FLAGS + len(readable))
        return head + frame[_FRAME.size : begin] + readable + frame[-1:]


# Properties, body, their end, and the end of data needed: each frame is read by itself.
_NOT_IN_ONE_PIECE = (b"", b"", 0, 0)


def _ignore() -> None:
    """The callback where there is none."""


def _check_announced(data: bytes, payload: int) -> None:
    (length,) = _NUMBER.unpack_from(data, payload + _BEFORE_FLAGS - _NUMBER.size)
    if length > LARGEST_BODY:
        raise UnreadableStream(
            f"the broker announced a body of {length:,} bytes, the most is {LARGEST_BODY:,}"
        )


class _PartialDelivery:
    """A delivery whose frames are read one by one."""

    def __init__(self, about: tuple[str, str, bool, int], where: tuple[str, str]) -> None:
        self._about = about
        self._where = where
        self._properties = b""
        self._length = 0
        self._body = bytearray()

    def add(self, kind: int, payload: bytes) -> bool:
        """One more frame; whether it was the last.

        :raises UnreadableStream: more came than was announced.
        """
        if kind == FRAME_HEADER:
            (self._length,) = _NUMBER.unpack_from(payload, _BEFORE_FLAGS - _NUMBER.size)
            self._properties = payload[_BEFORE_FLAGS:]
        else:
            self._body += payload
        if len(self._body) > self._length:
            raise UnreadableStream("the broker sent a longer body than it had announced")
        return len(self._body) == self._length

    def arguments(self) -> tuple[object, ...]:
        """The arguments of the callback."""
        return (
            *self._about,
            ReceivedProperties(self._properties, self._where),
            bytes(self._body),
        )


def _addressed(data: bytes, at: int, end: int) -> tuple[str, str, bool, int]:
    """Of a message that is delivered or got: exchange, routing key, whether redelivered, tag."""
    tag, redelivered, length = _TAGGED.unpack_from(data, at)
    at += _TAGGED.size
    exchange = data[at : at + length]
    at += length + 1
    behind = at + data[at - 1]
    if behind > end:
        raise IndexError("it ends before its routing key does")
    return text(exchange), text(data[at:behind]), bool(redelivered & 1), tag


class ReceivedProperties:
    """A message's properties, decoded by pika on first access.

    Mostly there is none: everything about an event is in its body.

    :param where: the queue and the routing key, for the log.
    """

    # Redeclared, since a type checker considers the members of a Protocol abstract.
    headers: Any
    content_type: Any
    content_encoding: Any
    correlation_id: Any
    reply_to: Any
    message_id: Any
    timestamp: Any
    type: Any
    app_id: Any

    def __init__(self, encoded: bytes, where: tuple[str, str] = ("", "")) -> None:
        self._where = where
        self._encoded = encoded if len(encoded) >= _FLAGS.size else bytes(_FLAGS.size)
        (flags,) = _FLAGS.unpack_from(self._encoded)
        if not flags & BasicProperties.FLAG_HEADERS:
            self.headers = None

    @property
    def encoded(self) -> bytes:
        """As they were received, byte for byte."""
        return self._encoded

    def __getattr__(self, name: str) -> Any:
        # Only called for missing attributes. Two threads may both decode, with the same result.
        if name.startswith("_") or "_read" in self.__dict__:
            raise AttributeError(name)
        self.__dict__.update(vars(_decoded(_readable(self._encoded, self._where))), _read=True)
        return getattr(self, name)


def _readable(properties: bytes, where: tuple[str, str]) -> bytes:
    """These properties, as far as pika can decode them."""
    try:
        _decoded(properties)
    except Exception:  # noqa: BLE001 - whatever pika cannot read
        pass
    else:
        return properties
    readable = bytes(_FLAGS.size)  # none at all
    with contextlib.suppress(Exception):
        shorter = _without_headers(properties)
        _decoded(shorter)
        readable = shorter
    queue, routing_key = where
    log.warning(
        "A message%s has headers that cannot be decoded; it is read without them: %s %s",
        f" for {printable(queue)}" if queue else "",
        printable(routing_key),
        printable(_decoded(readable).message_id),
        about=about(queue or None, routing_key, _decoded(readable).message_id),
    )
    return readable


def _decoded(properties: bytes) -> BasicProperties:
    read = BasicProperties()
    read.decode(properties)
    return read


def _without_headers(properties: bytes) -> bytes:
    """The same, with an empty table for the headers."""
    (flags,) = _FLAGS.unpack_from(properties)
    if not flags & BasicProperties.FLAG_HEADERS:
        raise ValueError("it is something else that cannot be read")
    at = _FLAGS.size
    for flag in (BasicProperties.FLAG_CONTENT_TYPE, BasicProperties.FLAG_CONTENT_ENCODING):
        if flags & flag:
            at += 1 + properties[at]  # a short string, behind its length
    (size,) = struct.unpack_from(">L", properties, at)
    return properties[:at] + bytes(4) + properties[at + 4 + size :]


def text(value: str | bytes | None) -> str:
    """A name or a key as str; pika leaves invalid UTF-8 as bytes."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value or ""
