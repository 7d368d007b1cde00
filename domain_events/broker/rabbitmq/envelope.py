"""A message as AMQP carries it: properties, headers, and the room there is for them.

Everything besides the envelope travels in AMQP properties and in headers named
``domain-events-*``. A forwarded message (a retry, a dead letter, a replay) keeps its body byte for
byte, and the properties and headers of others except those that the broker acts upon.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol

import pika

from domain_events.broker.rabbitmq import topology
from domain_events.message import (
    DELIVERY_LIMIT,
    LARGEST_NUMBER,
    NEVER_SETTLED,
    NO_FAILURE,
    OWN_PREFIX,
    Failure,
    Message,
    Place,
    ToDeadLetters,
    ToExchange,
    UndeliveredOf,
    is_foreign,
    routing_key_in,
    sent_on,
)
from domain_events.names import LONGEST_NAME, fits
from domain_events.text import printable, truncate

# Our headers. Never `x-*`, which is reserved for the broker.
RETRIES = "domain-events-retries"
VERSION = "domain-events-version"
REPLAYS = "domain-events-replays"
ROUTING_KEY = "domain-events-routing-key"
CAUSE = "domain-events-cause"
HAND_BACKS = "domain-events-hand-backs"
SUBSCRIBER = "domain-events-subscriber"
ERROR_TYPE = "domain-events-error-type"
ERROR_MESSAGE = "domain-events-error-message"
TRACEBACK = "domain-events-traceback"
FAILED_AT = "domain-events-failed-at"
HOST = "domain-events-host"
FIRST_ERROR_TYPE = "domain-events-first-error-type"
FIRST_ERROR_MESSAGE = "domain-events-first-error-message"
# What `_own_headers` writes; others with such names are of later releases.
_KNOWN = {RETRIES, ROUTING_KEY, CAUSE, HAND_BACKS, SUBSCRIBER, ERROR_TYPE, ERROR_MESSAGE}
_KNOWN |= {VERSION, REPLAYS}
_KNOWN |= {TRACEBACK, FAILED_AT, HOST, FIRST_ERROR_TYPE, FIRST_ERROR_MESSAGE}

# The broker acts upon these: CC and BCC route, and x-death makes it drop a message as part of a
# cycle (https://www.rabbitmq.com/docs/dlx).
BROKER_HEADERS = ("CC", "BCC", "x-delivery-count", "x-acquired-count", "x-death")
BROKER_HEADER_PREFIXES = ("x-first-death-", "x-last-death-")

# All headers must fit one frame of 128 KiB together with the other properties.
_ROOM_FOR_HEADERS = 124 * 1024
_DEEPEST_HEADER = 32


class Properties(Protocol):
    """The AMQP properties we read: pika's own, or `wire.ReceivedProperties`."""

    headers: Any
    content_type: Any
    content_encoding: Any
    correlation_id: Any
    reply_to: Any
    message_id: Any
    timestamp: Any
    type: Any
    app_id: Any


@dataclass(eq=False)
class RabbitDelivery:
    """A received message; see `domain_events.message.Delivery`. Reads headers only when needed.

    :ivar exchange: through which it came here, and with which ``routing_key``.
    :ivar receipt: the channel it came on, and its tag.
    :ivar is_ours: whether this library put it where it was found, so that the headers named
        ``domain-events-*`` are its own.
    :ivar is_dead_letter: whether it was found among dead letters.
    :ivar release: the broker's, which determines the meaning of its headers.
    """

    exchange: str
    routing_key: str
    redelivered: bool
    properties: Properties
    body: bytes
    receipt: Any = None
    message_count: int = 0
    release: tuple[int, int] = (0, 0)
    is_ours: bool = False
    is_dead_letter: bool = False
    subscriber: str | None = None

    def __repr__(self) -> str:
        # Debuggers and error trackers show the variables of functions: no data, and no headers.
        return (
            f"<Delivery '{printable(self.routing_key)}' {printable(self.message_id)}, exchange "
            f"'{printable(self.exchange)}', {len(self.body):,} bytes>"
        )

    @property
    def headers(self) -> Mapping[str, Any]:
        """All headers, whoever wrote them."""
        return self.properties.headers or {}

    @property
    def foreign_headers(self) -> Mapping[str, Any]:
        return {
            # pika has a type of its own for large numbers.
            name: int(each) if isinstance(each, int) and not isinstance(each, bool) else each
            for name, each in self.headers.items()
            if is_foreign(name)
        }

    @property
    def message_id(self) -> str | None:
        return _short(self.properties.message_id)

    @property
    def correlation_id(self) -> str | None:
        return _short(self.properties.correlation_id)

    @property
    def app_id(self) -> str | None:
        return _short(self.properties.app_id)

    @property
    def cause(self) -> str | None:
        # This one and the version are those of our headers that a publisher writes.
        return _short(self.headers.get(CAUSE))

    @property
    def version(self) -> int:
        number = self.headers.get(VERSION)
        if isinstance(number, bool) or not isinstance(number, int):
            return 1
        return int(number) if 0 < number <= LARGEST_NUMBER else 1

    @property
    def timestamp(self) -> int | None:
        timestamp = self.properties.timestamp
        return timestamp if isinstance(timestamp, int) and 0 <= timestamp < 2**63 else None

    @property
    def is_verified(self) -> bool:
        """Whether the routing key is surely the one that it was published with.

        Before RabbitMQ 4.0 a publisher may send an ``x-death`` of its own, which the broker then
        extends when it moves the message to the dead letters (rabbitmq-server #10709).
        """
        return bool(self.exchange) or self.is_ours or self.release >= (4, 0)

    @property
    def death(self) -> Mapping[str, Any] | None:
        """The broker's record of its last move of the message: the first entry of ``x-death``.

        It is the broker's only if it was dead-lettered; publishers may send such a header.
        """
        deaths = self.headers.get("x-death")
        first = deaths[0] if isinstance(deaths, list) and deaths else None
        return first if isinstance(first, Mapping) else None

    @property
    def published_routing_key(self) -> str | None:
        if self.is_ours:
            key = self.headers.get(ROUTING_KEY)
        elif self.exchange:
            key = self.routing_key
        else:
            # The broker moved it to the dead letters, and recorded its key.
            key = None
            with contextlib.suppress(KeyError, IndexError, TypeError):
                key = (self.death or {})["routing-keys"][0]
        if not isinstance(key, str) or not key:
            return None
        # Invalid UTF-8 grows when it is decoded; too long a key would not fit our own headers.
        return key if fits(key) else truncate(key, LONGEST_NAME)

    @property
    def original_routing_key(self) -> str:
        # Without any, another program put it into the queue, through the default exchange.
        return self.published_routing_key or routing_key_in(self.body) or self.routing_key

    @property
    def retries(self) -> int:
        return self._count(RETRIES)

    @property
    def hand_backs(self) -> int:
        return self._count(HAND_BACKS)

    @property
    def replays(self) -> int:
        return self._count(REPLAYS)

    @property
    def failures(self) -> int:
        """How often it was delivered before and came back unsettled, as the queue counts it.

        Quorum queues count lost connections and rejections; up to RabbitMQ 4.2 also requeues with
        basic.nack (https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling). 0 with
        classic queues, which do not count.
        """
        failures = self._count_of_the_queue("x-delivery-count")
        if not self.give_back_counts:
            # The other count may be the publisher's header, until the first failure.
            failures = min(failures, self._count_of_the_queue("x-acquired-count"))
        return failures

    @property
    def give_back_counts(self) -> bool:
        return self.release < (4, 3)

    @property
    def failure(self) -> Failure:
        headers = self.headers
        if self.is_ours:
            return Failure(
                _text(headers.get(SUBSCRIBER)),
                _text(headers.get(ERROR_TYPE)),
                _text(headers.get(ERROR_MESSAGE)),
                _text(headers.get(TRACEBACK)),
                _time(headers.get(FAILED_AT)),
                _text(headers.get(HOST)),
                _text(headers.get(FIRST_ERROR_TYPE)),
                _text(headers.get(FIRST_ERROR_MESSAGE)),
            )
        # In a subscriber's queue, an x-death is the publisher's.
        death = self.death if self.is_dead_letter else None
        if death is None:
            return NO_FAILURE
        # The broker moved it itself: only its own reason is known.
        queue, reason = _text(death.get("queue")), _text(death.get("reason"))
        if reason == "delivery_limit":
            return Failure(queue, DELIVERY_LIMIT, NEVER_SETTLED)
        return Failure(queue, reason)

    def _count(self, header: str) -> int:
        # Only if it is ours, or the headers of each delivery would have to be decoded.
        number = self.headers.get(header) if self.is_ours else 0
        if isinstance(number, bool) or not isinstance(number, int):
            return 0
        # pika decodes large ones as a type of its own, and cannot encode the largest again.
        return max(0, min(int(number), LARGEST_NUMBER))

    def _count_of_the_queue(self, header: str) -> int:
        # On a first delivery the headers are the publisher's, whatever their names.
        number = self.headers.get(header) if self.redelivered else 0
        return max(0, int(number)) if isinstance(number, int) else 0


def browsed(delivery: RabbitDelivery, place: Place) -> RabbitDelivery:
    """A delivery that was got from the place, with the fields that depend on the place.

    Dead letters come through the default exchange, to which only those may write who may write to
    the queues themselves. On any other delivery the headers are the publisher's, whatever their
    names; also on one that the broker then moved to the dead letters by itself, which its
    ``x-death`` shows.
    """
    if isinstance(place, UndeliveredOf):
        # Whatever exchange it came through, it is a retry, or pretends to be one.
        return replace(
            delivery,
            exchange=topology.due_name(place.exchange),
            is_ours=True,
            subscriber=topology.subscriber_of(delivery.routing_key),
        )
    delivery.is_ours = not delivery.exchange and delivery.death is None
    delivery.is_dead_letter = isinstance(place, ToDeadLetters)
    return delivery


def republished(delivery: RabbitDelivery, place: Place) -> Message:
    """The message that republishes a delivery, as got from the place, to the end of its queue."""
    if not isinstance(place, UndeliveredOf):
        return sent_on(delivery, place)
    # Through the queue's own exchange, so that the address stays.
    message = sent_on(delivery, ToExchange(topology.queue_of(place)))
    message.routing_key = delivery.routing_key
    return message


@dataclass(repr=False)
class Moved(Message):
    """A message that an operator moves from queue to queue, with its properties as they were.

    :ivar received: those it was received with.
    :ivar encoded: those to send, encoded.
    """

    received: Properties | None = None
    encoded: bytes = b""


class _Encoded(pika.BasicProperties):
    """Properties that are encoded already."""

    def __init__(self, encoded: bytes) -> None:
        super().__init__()
        self._encoded = encoded

    def encode(self) -> list[bytes]:
        return [self._encoded]


def message_id(message: Message) -> object:
    """The id with which a message travels; a forwarded one keeps its own, even if it is bytes."""
    if isinstance(message, Moved):
        return message.received and message.received.message_id
    return message.message_id if message.source is None else message.source.properties.message_id


def properties(message: Message) -> pika.BasicProperties:
    """The AMQP properties with which a message travels."""
    if isinstance(message, Moved):
        return _Encoded(message.encoded)
    headers = own_and_given_headers(message)
    source = message.source
    if source is None:
        return pika.BasicProperties(
            content_type="application/json",
            headers=headers or None,
            delivery_mode=pika.DeliveryMode.Persistent,
            correlation_id=message.correlation_id,
            message_id=message.message_id,
            timestamp=message.timestamp,
            type=message.routing_key,
            app_id=message.app_id,
        )
    old = source.properties
    return pika.BasicProperties(
        content_type=old.content_type,
        content_encoding=old.content_encoding,
        headers=_with_kept_headers(source, headers),
        delivery_mode=pika.DeliveryMode.Persistent,
        correlation_id=old.correlation_id,
        reply_to=old.reply_to,
        message_id=old.message_id,
        timestamp=old.timestamp,
        type=old.type,
        app_id=old.app_id,
    )


def own_and_given_headers(message: Message) -> dict[str, Any]:
    """Our headers of a message, and those that its publisher, or a middleware, has given."""
    own = _own_headers(message)
    return {**message.headers, **own} if message.headers else own


def _own_headers(message: Message) -> dict[str, Any]:
    source, failure = message.source, message.failure
    direct = not isinstance(message.destination, ToExchange)
    own: dict[str, Any] = {}
    if message.cause is not None:
        own[CAUSE] = message.cause
    if source is not None:
        own[ROUTING_KEY] = source.original_routing_key
    elif direct:
        own |= {ROUTING_KEY: message.routing_key, RETRIES: message.retries}
    if message.retries or isinstance(message.destination, ToDeadLetters):
        own[RETRIES] = message.retries
    if message.hand_backs:
        own[HAND_BACKS] = message.hand_backs
    if message.replays:
        own[REPLAYS] = message.replays
    if message.version != 1:
        own[VERSION] = message.version
    if failure is not NO_FAILURE:
        reasons = {
            SUBSCRIBER: failure.subscriber,
            ERROR_TYPE: failure.error_type,
            FAILED_AT: failure.failed_at and failure.failed_at.isoformat(),
            HOST: failure.host,
            ERROR_MESSAGE: failure.error_message,
            TRACEBACK: failure.traceback,
            FIRST_ERROR_TYPE: failure.first_error_type,
            FIRST_ERROR_MESSAGE: failure.first_error_message,
        }
        own |= {name: value for name, value in reasons.items() if value is not None}
    return own


def _with_kept_headers(source: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """Our headers, and those that the delivery had, except those the broker would act upon.

    A publisher's headers may fill a frame; then the largest of them are left out, never ours.
    """
    kept = {
        name: _sendable(value)
        for name, value in source.headers.items()
        if name not in own
        and name not in BROKER_HEADERS
        and not str(name).startswith(BROKER_HEADER_PREFIXES)
        and (not str(name).startswith(OWN_PREFIX) or (source.is_ours and name not in _KNOWN))
    }
    room = _ROOM_FOR_HEADERS - _size(own) - _size(kept)
    for name in sorted(kept, key=lambda name: _size({name: kept[name]}), reverse=True):
        if room >= 0:
            break
        if not str(name).startswith(OWN_PREFIX):
            room += _size({name: kept.pop(name)})
    return {**kept, **own}


def _short(value: object) -> str | None:
    """Text that AMQP carries as a short string."""
    return value if isinstance(value, str) and value and fits(value) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _time(value: object) -> datetime | None:
    with contextlib.suppress(TypeError, ValueError):
        return datetime.fromisoformat(value)  # type: ignore[arg-type]
    return None


def _sendable(value: object, depth: int = 0) -> object:
    """A received header's value, as text where pika can read it but not write it.

    Truncated at a depth of 32, since it could be nested too deeply to be walked.
    """
    if isinstance(value, Mapping | list) and depth == _DEEPEST_HEADER:
        return "..."
    if isinstance(value, Mapping):
        return {name: _sendable(entry, depth + 1) for name, entry in value.items()}
    if isinstance(value, list):
        return [_sendable(entry, depth + 1) for entry in value]
    if isinstance(value, int) and abs(value) >= 2**63:
        return str(value)
    return str(value) if isinstance(value, float) else value


def _size(value: object) -> int:
    """About how many bytes a header takes in a frame; never too few."""
    if isinstance(value, Mapping):
        return 5 + sum(2 + 4 * len(str(name)) + _size(entry) for name, entry in value.items())
    if isinstance(value, list | tuple):
        return 5 + sum(_size(entry) for entry in value)
    if isinstance(value, str):
        return 5 + len(value.encode("utf-8", "replace"))
    if isinstance(value, bytes | bytearray):
        return 5 + len(value)
    return 10
