"""The frames there are many of, written and read without pika: events, deliveries, confirms.

pika can do all that is done here; it is measured to take four times as long. So only what there is
much of is dealt with: what `Writer` returns None for, and what `Reader` passes on, is pika's.

Bytes in, bytes out; knows no sockets and no threads. The grammar is that of AMQP 0-9-1, chapters
2.3 and 4.2 of its specification.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, TypeAlias

from pika.exceptions import BodyTooLongError
from pika.spec import (
    FRAME_BODY,
    FRAME_END,
    FRAME_HEADER,
    FRAME_HEARTBEAT,
    FRAME_METHOD,
    Basic,
    BasicProperties,
)

from domain_events import topology
from domain_events.log import Log
from domain_events.message import Message, Properties

log = Log("domain_events")

# What surely fits a frame: the smallest limit that a broker may set is 4,096 bytes.
_LARGEST_PLAIN_BODY = 4000
# Addresses whose frames are remembered; a routing key may hold a user's number.
_MOST_REMEMBERED = 1000

_KINDS = (FRAME_METHOD, FRAME_HEADER, FRAME_BODY, FRAME_HEARTBEAT)
_BASIC = Basic.INDEX
_PUBLISH, _DELIVER, _ACK, _NACK = (
    struct.pack(">I", method.INDEX)
    for method in (Basic.Publish, Basic.Deliver, Basic.Ack, Basic.Nack)
)
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


#: What is told of a delivery: exchange, routing key, whether it is redelivered, tag, properties,
#: body.
Delivered: TypeAlias = Callable[[str, str, bool, int, Properties, bytes], None]
#: What is told of a confirm: tag, whether all before it are meant too, whether it is an ack.
Confirmed: TypeAlias = Callable[[int, bool, bool], None]


class Reader:
    """Reads all deliveries and confirms on the channels where somebody listens.

    Everything else is passed on, in whole frames and in its place between what is read here.
    Headers that pika cannot read are taken out of what is passed on: pika would take the error
    for a broken connection, and the broker would deliver the same message on the next one, and so
    on for ever. A timestamp in milliseconds is enough (in the year 55,000, which no `datetime`
    has), or arrays a thousand deep.

    :param others: takes what is passed on.
    :ivar delivered: who is told of deliveries, by the channel's number.
    :ivar confirmed: who is told of confirms, likewise.
    """

    def __init__(self, others: Callable[[bytes], None]) -> None:
        self._others = others
        self._rest = b""  # the beginning of a frame, or of a delivery
        self._no_frames = False
        # By channel: deliveries that take more frames than three, or that others come between.
        self._growing: dict[int, _Growing] = {}
        self.delivered: dict[int, Delivered] = {}
        self.confirmed: dict[int, Confirmed] = {}

    def feed(self, data: bytes) -> int:
        """Read what came; how many bytes of it were not passed on."""
        if self._no_frames:
            self._others(data)
            return 0
        data = self._rest + data if self._rest else data
        at = passed = own = 0
        while len(data) - at > _FRAME.size:
            kind, channel, size = _FRAME.unpack_from(data, at)
            after = at + _FRAME.size + size + 1
            if after > len(data) and kind in _KINDS:
                break
            if kind not in _KINDS or data[after - 1] != FRAME_END:
                # Not AMQP, or of another version: what pika then says is right.
                self._no_frames = True
                at = len(data)
                break
            if kind == FRAME_METHOD or channel in self._growing:
                found = self._told(kind, data, at + _FRAME.size, after, channel)
                if found is None:
                    break  # it is not all there yet
                behind, tell, arguments = found
                if behind:
                    self._pass_on(data, passed, at)
                    own += behind - at
                    at = passed = behind
                    tell(*arguments)
                    continue
            elif kind == FRAME_HEADER:
                frame = data[at:after]
                legible = _legible_frame(frame)
                if legible is not frame:
                    data = data[:at] + legible + data[after:]
                    own += len(frame) - len(legible)
                    after = at + len(legible)
            at = after
        self._pass_on(data, passed, at)
        self._rest = data[at:]
        return own

    def _pass_on(self, data: bytes, begin: int, end: int) -> None:
        if begin < end:
            self._others(data[begin:end])

    def _told(
        self, kind: int, data: bytes, at: int, after: int, channel: int
    ) -> tuple[int, Callable[..., None], tuple[object, ...]] | None:
        """Where what is read here ends, who is told, and what.

        It ends at 0 when it is pika's. None: more data is needed to know.
        """
        if kind != FRAME_METHOD:
            growing = self._growing[channel]
            if not growing.add(kind, data[at : after - 1]):
                return after, _nobody, ()
            del self._growing[channel]
            return after, self.delivered[channel], growing.arguments()
        self._growing.pop(channel, None)  # it will not be completed any more
        method = data[at : at + 4]
        if method == _DELIVER and channel in self.delivered:
            content = _content(data, after, channel)
            if content is None:
                return None
            properties, body, behind = content
            about = _delivery(data, at + 4)
            if not behind:
                self._growing[channel] = _Growing(about)
                return after, _nobody, ()
            arguments = (*about, ReceivedProperties(properties), body)
            return behind, self.delivered[channel], arguments
        if method in _CONFIRMS and channel in self.confirmed:
            tag, multiple = _CONFIRM.unpack_from(data, at + 4)
            return after, self.confirmed[channel], (tag, bool(multiple & 1), method == _ACK)
        return 0, _nobody, ()


def _nobody() -> None:
    """Who is told nothing."""


class _Growing:
    """A delivery whose frames come one by one."""

    def __init__(self, about: tuple[str, str, bool, int]) -> None:
        self._about = about
        self._properties = b""
        self._length = 0
        self._parts: list[bytes] = []
        self._got = 0

    def add(self, kind: int, payload: bytes) -> bool:
        """One more frame; whether it was the last.

        :raises BodyTooLongError: more came than was announced.
        """
        if kind == FRAME_HEADER:
            (self._length,) = _NUMBER.unpack_from(payload, _BEFORE_FLAGS - _NUMBER.size)
            self._properties = payload[_BEFORE_FLAGS:]
        else:
            self._parts.append(payload)
            self._got += len(payload)
        if self._got > self._length:
            raise BodyTooLongError(self._got, self._length)
        return self._got == self._length

    def arguments(self) -> tuple[object, ...]:
        """What is told of it."""
        return (*self._about, ReceivedProperties(self._properties), b"".join(self._parts))


def _delivery(data: bytes, at: int) -> tuple[str, str, bool, int]:
    """The arguments of a delivery: exchange, routing key, whether it is redelivered, tag."""
    at += 1 + data[at]  # the consumer's tag
    tag, redelivered, length = _TAGGED.unpack_from(data, at)
    at += _TAGGED.size
    exchange = data[at : at + length]
    at += length + 1
    routing_key = data[at : at + data[at - 1]]
    return text(exchange), text(routing_key), bool(redelivered & 1), tag


def _content(data: bytes, at: int, channel: int) -> tuple[bytes, bytes, int] | None:
    """What stands behind a delivery's first frame: properties, body, and where they end.

    They end at 0 where these are not one frame each. None: more data is needed to know.
    """
    end = len(data)
    if end - at < _PROPERTIES.size:
        return None
    kind, of, size, _class, _weight, length = _PROPERTIES.unpack_from(data, at)
    if kind != FRAME_HEADER or of != channel:
        return b"", b"", 0
    begin = at + _FRAME.size
    at = begin + size + 1
    if end < at:
        return None
    if data[at - 1] != FRAME_END:
        return b"", b"", 0
    properties = data[begin + _BEFORE_FLAGS : at - 1]
    if not length:
        return properties, b"", at
    if end - at < _FRAME.size:
        return None
    kind, of, size = _FRAME.unpack_from(data, at)
    if kind != FRAME_BODY or of != channel or size != length:
        return b"", b"", 0
    begin = at + _FRAME.size
    at = begin + size + 1
    if end < at:
        return None
    return (properties, data[begin : at - 1], at) if data[at - 1] == FRAME_END else (b"", b"", 0)


def _legible_frame(frame: bytes) -> bytes:
    """A frame of properties, with such of them as pika can read."""
    kind, channel, _size = _FRAME.unpack_from(frame)
    begin = _FRAME.size + _BEFORE_FLAGS
    properties = frame[begin:-1]
    legible = _legible(properties)
    if legible is properties:
        return frame
    head = _FRAME.pack(kind, channel, _BEFORE_FLAGS + len(legible))
    return head + frame[_FRAME.size : begin] + legible + frame[-1:]


class ReceivedProperties:
    """A message's properties, read by pika when they are first asked for.

    Mostly they never are: everything about an event is in its body.
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

    def __init__(self, encoded: bytes) -> None:
        self._encoded = encoded if len(encoded) >= _FLAGS.size else bytes(_FLAGS.size)
        (flags,) = _FLAGS.unpack_from(self._encoded)
        if not flags & BasicProperties.FLAG_HEADERS:
            self.headers = None

    def __getattr__(self, name: str) -> Any:
        # Only for what is not there yet. Two threads may both read, and find the same.
        if name.startswith("_") or "_read" in self.__dict__:
            raise AttributeError(name)
        self.__dict__.update(vars(_decoded(_legible(self._encoded))), _read=True)
        return getattr(self, name)


def _legible(properties: bytes) -> bytes:
    """As much of these properties as pika can read."""
    try:
        _decoded(properties)
    except Exception:  # noqa: BLE001 - whatever pika has against them
        log.warning("A message has headers that cannot be read; it is taken without them.")
    else:
        return properties
    try:
        shorter = _without_headers(properties)
        _decoded(shorter)
    except Exception:  # noqa: BLE001
        return bytes(_FLAGS.size)  # none at all
    return shorter


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
