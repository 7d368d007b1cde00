"""Fast path: the frames of high volume (events, deliveries, confirms), without pika.

pika can do all that is done here; it is measured to take four times as long. Everything of low
volume is pika's: what `Writer` returns None for, and what `Reader` passes on.

Bytes in, bytes out; knows no sockets and no threads. The grammar is that of AMQP 0-9-1, chapters
2.3 and 4.2 of its specification.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
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

from domain_events import topology
from domain_events.log import Log
from domain_events.message import Message, Properties
from domain_events.text import printable

log = Log("domain_events")

# What surely fits a frame: the smallest limit that a broker may set is 4,096 bytes.
_LARGEST_PLAIN_BODY = 4000
# Addresses whose frames are remembered; a routing key may hold a user's number.
_MOST_REMEMBERED = 1000

# The broker adds headers of its own to a message (x-delivery-count, x-death), also where the
# publisher's fill a frame already, and sends it all the same.
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
        # What is alike in all events of one address: their first frame, and the beginning and
        # the end of their properties.
        self._known: dict[tuple[object, ...], tuple[bytes, bytes, bytes]] = {}

    def frames(self, message: Message) -> bytes | None:
        """The event's frames, or None if pika has to write them.

        :raises ValueError: it has a text that is too long for AMQP.
        """
        body, timestamp = message.body, message.timestamp
        message_id, correlation_id = message.message_id, message.correlation_id
        if (
            message.headers
            or timestamp is None
            or message_id is None
            or correlation_id is None
            or message.content_encoding is not None
            or message.reply_to is not None
            or not 0 < len(body) <= _LARGEST_PLAIN_BODY
        ):
            return None
        key = (
            message.exchange,
            message.routing_key,
            message.mandatory,
            message.content_type,
            message.type,
            message.app_id,
        )
        known = self._known.get(key)
        if known is None:
            known = self._learn(message)
            if known is None:
                return None
            if len(self._known) >= _MOST_REMEMBERED:
                self._known.clear()
            self._known[key] = known
        method, begin, end = known
        identity = _short(message_id)
        correlation = identity if correlation_id == message_id else _short(correlation_id)
        properties = b"".join((begin, correlation, identity, _NUMBER.pack(timestamp), end))
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

    def _learn(self, message: Message) -> tuple[bytes, bytes, bytes] | None:
        if message.content_type is None or message.type is None or message.app_id is None:
            return None
        # The ticket in front is a relic, the bits behind are mandatory and immediate.
        arguments = (
            bytes(2)
            + _short(message.exchange)
            + _short(message.routing_key)
            + bytes((message.mandatory,))
        )
        head = _FRAME.pack(FRAME_METHOD, self._channel, len(_PUBLISH) + len(arguments))
        return (
            head + _PUBLISH + arguments + _END,
            _FLAGS.pack(_PLAIN_FLAGS) + _short(message.content_type) + _PERSISTENT,
            _short(message.type) + _short(message.app_id),
        )


def _short(text: str) -> bytes:
    data = text.encode()
    if len(data) > topology.LONGEST_NAME:
        raise ValueError(f"{text[:60]!r}... has {len(data)} bytes, {topology.LONGEST_NAME} at most")
    return bytes((len(data),)) + data


#: Called with a delivery: exchange, routing key, whether it is redelivered, tag, properties, body.
Delivered: TypeAlias = Callable[[str, str, bool, int, Properties, bytes], None]
#: Called with a confirm: tag, whether all before it are meant too, whether it is an ack.
Confirmed: TypeAlias = Callable[[int, bool, bool], None]

#: The largest frame before the two ends have agreed on a maximum.
LARGEST_FRAME = 128 * 1024
#: RabbitMQ's own upper bound for the body of a message, whatever it is configured to.
LARGEST_BODY = 512 * 2**20

# How a TLS listener answers what is not TLS.
_TLS_ALERT = b"\x15\x03"

# What a frame has besides its payload; a negotiated maximum counts it.
_AROUND_PAYLOAD = _FRAME.size + len(_END)


class UnreadableStream(AMQPError):
    """What was received is not AMQP 0-9-1 within its limits; the connection cannot go on."""


class Reader:
    """Reads all deliveries and confirms on the channels that have a callback for them.

    Everything else is passed on, frame by frame and in its place between what is read here.
    Headers that pika cannot read are taken out of what is passed on: pika would take the error
    for a broken connection, and the broker would deliver the same message on the next one, and so
    on for ever. A timestamp in milliseconds is enough (in the year 55,000, which no `datetime`
    has), or arrays a thousand deep.

    Whatever the other end sends, the memory that this takes is bounded by the largest frame and
    the largest body, and the time is linear in the number of bytes.

    :param others: called with each frame that is passed on.
    :ivar largest_frame: the largest frame to accept, in bytes.
    :ivar delivered: callbacks for deliveries, by the channel's number.
    :ivar confirmed: callbacks for confirms, likewise.
    :ivar queues: what is consumed on a channel, for log lines.
    :ivar closed: reply code and text with which the broker has closed the connection, if it has.
    """

    def __init__(self, others: Callable[[bytes], None]) -> None:
        self._others = others
        # The beginning of a frame, or of a delivery, and how many bytes it takes to go on.
        self._pieces: list[bytes] = []
        self._length = 0
        self._needed = 0
        # By channel: deliveries that take more frames than three, or that others come between.
        self._growing: dict[int, _Growing] = {}
        # By channel: the routing key of the message that was got last, and passed on.
        self._got: dict[int, str] = {}
        self.largest_frame = LARGEST_FRAME
        self.delivered: dict[int, Delivered] = {}
        self.confirmed: dict[int, Confirmed] = {}
        self.queues: dict[int, str] = {}
        self.closed: tuple[int, str] | None = None

    def feed(self, data: bytes) -> int:
        """Read what came; how many bytes of it were not passed on.

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
        """Where the rest begins, how long it must be to be read, and what was not passed on."""
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
            if kind == FRAME_METHOD or (channel in self._growing and kind != FRAME_HEARTBEAT):
                behind, needed, tell, arguments = self._told(kind, data, payload, after, channel)
                if needed:
                    return at, needed - at, own
                if behind:
                    own += behind - at
                    at = behind
                    tell(*arguments)
                    continue
            frame = data[at:after]
            if kind == FRAME_HEADER:
                legible = self._legible_frame(frame, channel)
                own += len(frame) - len(legible)
                frame = legible
            elif kind == FRAME_METHOD:
                self._note(data, payload, after - 1, channel)
            at = after
            self._others(frame)
        if len(data) > at and data[at] not in _KINDS:
            raise self._head_error(data[at : at + 40], data[at], 0)
        return at, _FRAME.size, own

    def _note(self, data: bytes, at: int, end: int, channel: int) -> None:
        """Keep what is needed later of a method that is passed on."""
        method = data[at : at + 4]
        if method == _GET_OK:
            self._got[channel] = _addressed(data, at + 4, end)[1]
        elif method == _CLOSE:
            code, length = _REASON.unpack_from(data, at + 4)
            at += 4 + _REASON.size
            self.closed = code, text(data[at : at + length])

    def _head_error(self, begin: bytes, kind: int, size: int) -> UnreadableStream:
        if begin.startswith(_TLS_ALERT):
            return UnreadableStream("the other end speaks TLS, which takes an amqps:// URL")
        if kind not in _KINDS:
            return UnreadableStream(
                "the other end does not speak AMQP 0-9-1; it sent "
                f"'{printable(begin.decode('latin-1'))}'"
            )
        return UnreadableStream(
            f"the broker sent a frame of {size + _AROUND_PAYLOAD:,} bytes, the most is "
            f"{self.largest_frame:,}"
        )

    def _told(
        self, kind: int, data: bytes, at: int, after: int, channel: int
    ) -> tuple[int, int, Callable[..., None], tuple[object, ...]]:
        """Where what is read here ends, up to where more is needed first, and the callback.

        It ends at 0 when it is pika's, or when more is needed.
        """
        if kind != FRAME_METHOD:
            growing = self._growing[channel]
            if not growing.add(kind, data[at : after - 1]):
                return after, 0, _nobody, ()
            del self._growing[channel]
            return after, 0, self.delivered[channel], growing.arguments()
        self._growing.pop(channel, None)  # it will not be completed any more
        method = data[at : at + 4]
        if method == _DELIVER and channel in self.delivered:
            properties, body, behind, needed = self._content(data, after, channel)
            if needed:
                return 0, needed, _nobody, ()
            # Behind the consumer's tag.
            about = _addressed(data, at + 5 + data[at + 4], after - 1)
            where = (self.queues.get(channel, ""), about[1])
            if not behind:
                self._growing[channel] = _Growing(about, where)
                return after, 0, _nobody, ()
            arguments = (*about, ReceivedProperties(properties, where), body)
            return behind, 0, self.delivered[channel], arguments
        if method in _CONFIRMS and channel in self.confirmed:
            tag, multiple = _CONFIRM.unpack_from(data, at + 4)
            return after, 0, self.confirmed[channel], (tag, bool(multiple & 1), method == _ACK)
        return 0, 0, _nobody, ()

    def _content(self, data: bytes, at: int, channel: int) -> tuple[bytes, bytes, int, int]:
        """What stands behind a delivery's first frame: properties, body, and where they end.

        They end at 0 where these are not one frame each. The last: up to where more is needed to
        know.
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

    def _legible_frame(self, frame: bytes, channel: int) -> bytes:
        """A frame of properties, with such of them as pika can read."""
        begin = _FRAME.size + _BEFORE_FLAGS
        properties = frame[begin:-1]
        legible = _legible(properties, ("", self._got.get(channel, "")))
        if legible is properties:
            return frame
        head = _FRAME.pack(FRAME_HEADER, channel, _BEFORE_FLAGS + len(legible))
        return head + frame[_FRAME.size : begin] + legible + frame[-1:]


# Properties, body, where they end, and what is needed: each frame is looked at by itself.
_NOT_IN_ONE_PIECE = (b"", b"", 0, 0)


def _nobody() -> None:
    """The callback where there is none."""


def _check_announced(data: bytes, payload: int) -> None:
    (length,) = _NUMBER.unpack_from(data, payload + _BEFORE_FLAGS - _NUMBER.size)
    if length > LARGEST_BODY:
        raise UnreadableStream(
            f"the broker announced a body of {length:,} bytes, the most is {LARGEST_BODY:,}"
        )


class _Growing:
    """A delivery whose frames come one by one."""

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
    """A message's properties, read by pika when they are first asked for.

    Mostly they never are: everything about an event is in its body.

    :param where: the queue and the routing key, for the log.
    """

    # Said again, since a type checker takes what a Protocol declares for abstract.
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

    def __getattr__(self, name: str) -> Any:
        # Only for what is not there yet. Two threads may both read, and find the same.
        if name.startswith("_") or "_read" in self.__dict__:
            raise AttributeError(name)
        self.__dict__.update(vars(_decoded(_legible(self._encoded, self._where))), _read=True)
        return getattr(self, name)


def _legible(properties: bytes, where: tuple[str, str]) -> bytes:
    """As much of these properties as pika can read."""
    try:
        _decoded(properties)
    except Exception:  # noqa: BLE001 - whatever pika cannot read
        pass
    else:
        return properties
    legible = bytes(_FLAGS.size)  # none at all
    with contextlib.suppress(Exception):
        shorter = _without_headers(properties)
        _decoded(shorter)
        legible = shorter
    queue, routing_key = where
    log.warning(
        "A message%s has headers that cannot be read; it is taken without them: %s %s",
        f" for {printable(queue)}" if queue else "",
        printable(routing_key),
        printable(_decoded(legible).message_id),
    )
    return legible


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
    """A name or a key; pika leaves as bytes what is not UTF-8."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value or ""
