"""A domain event as a message, and back: properties, headers, body. Knows no broker.

Everything that a domain event has besides its envelope travels in AMQP properties and in
headers named ``domain-events-*``; a message that is sent on (a retry, a dead letter, a replay)
keeps its body byte for byte, and its properties but for those that the broker would act upon.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any, Protocol
from uuid import UUID

from domain_events import topology
from domain_events.checks import shown
from domain_events.errors import InvalidEvent
from domain_events.events import DomainEvent, from_envelope, is_timestamp, read_envelope
from domain_events.log import Log
from domain_events.retry import Retry
from domain_events.text import printable

log = Log("domain_events")

# Our headers. Never `x-*`: the broker keeps that room for itself.
RETRIES = "domain-events-retries"
ROUTING_KEY = "domain-events-routing-key"
CAUSE = "domain-events-cause"
SUBSCRIBER = "domain-events-subscriber"
ERROR_TYPE = "domain-events-error-type"
ERROR_MESSAGE = "domain-events-error-message"
TRACEBACK = "domain-events-traceback"
FAILED_AT = "domain-events-failed-at"
HOST = "domain-events-host"
FIRST_ERROR_TYPE = "domain-events-first-error-type"
FIRST_ERROR_MESSAGE = "domain-events-first-error-message"
HAND_BACKS = "domain-events-hand-backs"

_OURS = "domain-events-"
_OF_A_DEAD_LETTER = (
    SUBSCRIBER,
    ERROR_TYPE,
    ERROR_MESSAGE,
    TRACEBACK,
    FAILED_AT,
    HOST,
    FIRST_ERROR_TYPE,
    FIRST_ERROR_MESSAGE,
)

# The broker acts upon these: CC and BCC route, and x-death makes it drop a message that it
# takes for one going in circles.
_OF_THE_BROKER = ("CC", "BCC", "x-delivery-count", "x-acquired-count", "x-death")
_OF_THE_BROKER_TOO = ("x-first-death-", "x-last-death-")

#: The largest body that any RabbitMQ takes (3.10); from 4.0 on the default is 16 MiB.
LARGEST_BODY = 128 * 2**20

# All headers must fit one frame of 128 KiB together with the other properties.
_ROOM_FOR_HEADERS = 124 * 1024
_LONGEST_MESSAGE = 2 * 1024
_LONGEST_TRACEBACK = 16 * 1024
_DEEPEST_HEADER = 32
_MOST_RETRIES = 2**31 - 1


class Properties(Protocol):
    """The AMQP properties we read; whichever broker delivers has an object with these."""

    headers: Any
    content_type: Any
    content_encoding: Any
    correlation_id: Any
    reply_to: Any
    message_id: Any
    timestamp: Any
    type: Any
    app_id: Any


@dataclass
class Message:
    """What is published: to where, the body, the properties. Always persistent."""

    exchange: str
    routing_key: str
    body: bytes
    headers: Mapping[str, Any] = field(default_factory=dict)
    content_type: str | None = "application/json"
    content_encoding: str | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    message_id: str | None = None
    timestamp: int | None = None
    type: str | None = None
    app_id: str | None = None
    mandatory: bool = False

    def __repr__(self) -> str:
        return _without_data(self, self.message_id)


@dataclass(eq=False)
class Delivery:
    """What is received. ``receipt`` belongs to the broker that made the delivery."""

    exchange: str
    routing_key: str
    redelivered: bool
    properties: Properties
    body: bytes
    receipt: Any = None
    #: How many more wait in the queue, where it was fetched and not pushed.
    message_count: int = 0
    #: Whether this library put it where it was found, so that the headers named
    #: ``domain-events-*`` are its own. None: see `is_ours`.
    ours: bool | None = None
    #: The broker's release: what its own headers are worth depends on it.
    release: tuple[int, int] = (0, 0)

    def __repr__(self) -> str:
        return _without_data(self, getattr(self.properties, "message_id", None))

    @property
    def headers(self) -> Mapping[str, Any]:
        return self.properties.headers or {}

    @property
    def is_ours(self) -> bool:
        """Whether our own headers can be believed.

        Dead letters and replays come through the default exchange, to which only those may write
        who may write to the queues themselves; so do retries through exchanges of ours, which a
        subscriber knows (`Subscription.handle`). On any other delivery the headers are the
        publisher's, whatever their names; also on one that the broker then moved to the dead
        letters by itself, which its ``x-death`` shows.
        """
        if self.ours is None:
            self.ours = not self.exchange and self.death is None
        return self.ours

    @property
    def is_verified(self) -> bool:
        """Whether the routing key is surely the one that it was published with.

        Before RabbitMQ 4.0 a publisher may send an ``x-death`` of its own, which the broker then
        goes on with when it moves the message to the dead letters.
        """
        return bool(self.exchange) or self.is_ours or self.release >= (4, 0)

    @property
    def death(self) -> Mapping[str, Any] | None:
        """What the broker noted when it last moved the message: the first entry of ``x-death``.

        It is the broker's own only on what was dead-lettered; publishers may send such a header.
        """
        deaths = self.headers.get("x-death")
        first = deaths[0] if isinstance(deaths, list) and deaths else None
        return first if isinstance(first, Mapping) else None

    @property
    def published_routing_key(self) -> str | None:
        """The routing key that the event was published with; None if only its envelope knows.

        For an event that comes from its publisher it is the one the broker routed by, having
        checked that the publisher may use it.
        """
        if self.is_ours:
            key = self.headers.get(ROUTING_KEY)
        elif self.exchange:
            key = self.routing_key
        else:
            # The broker moved it to the dead letters, and noted which key it had.
            key = None
            with contextlib.suppress(KeyError, IndexError, TypeError):
                key = (self.death or {})["routing-keys"][0]
        if not isinstance(key, str) or not key:
            return None
        # What is not UTF-8 grows when it is read; too long a key would not fit our own headers.
        return key if topology.fits(key) else _cut(key, topology.LONGEST_NAME)

    @property
    def original_routing_key(self) -> str:
        """The routing key to show and to carry on, also where the body cannot be read."""
        key = self.published_routing_key
        if key is None:
            # Another program put it into the queue, through the default exchange.
            with contextlib.suppress(InvalidEvent):
                key = read_envelope(self.body)["routing_key"]
        return key if key and topology.fits(key) else self.routing_key

    @property
    def retries(self) -> int:
        """How often the event was retried; what others may have put there counts as never."""
        return self._count(RETRIES)

    @property
    def hand_backs(self) -> int:
        """How often it was handed back, since no process that got it listed its routing key."""
        return self._count(HAND_BACKS)

    @property
    def failures(self) -> int:
        """How often it was delivered before and came back unsettled, as the queue counts it.

        Quorum queues count lost connections and rejections; up to RabbitMQ 4.2 also what was
        given back (https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling). 0 with
        classic queues, which do not count.
        """
        failures = self._count_of_the_queue("x-delivery-count")
        if self.counts_returns:
            # The other count may be the publisher's header, until the first failure.
            failures = min(failures, self.returns)
        return failures

    @property
    def returns(self) -> int:
        """How often it was delivered before, whatever the reason why it came back."""
        return self._count_of_the_queue(
            "x-acquired-count" if self.counts_returns else "x-delivery-count"
        )

    @property
    def counts_returns(self) -> bool:
        """Whether the queue counts what was given back apart from what failed."""
        return self.release >= (4, 3)

    def _count_of_the_queue(self, header: str) -> int:
        # On a first delivery the headers are the publisher's, whatever their names.
        number = self.headers.get(header) if self.redelivered else 0
        return max(0, int(number)) if isinstance(number, int) else 0

    def _count(self, header: str) -> int:
        # Without the look at whose it is, the headers of each delivery would have to be decoded.
        number = self.headers.get(header) if self.is_ours else 0
        if isinstance(number, bool) or not isinstance(number, int):
            return 0
        # pika reads a large one as a type of its own, and would not write the largest again.
        return max(0, min(int(number), _MOST_RETRIES))


class GivenUp(Exception):
    """Why an event is a dead letter on which no handler has failed; never raised to a user.

    :param error_type: what its dead letter has as ``error_type``.
    """

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(message)
        self.error_type = error_type


def _without_data(message: Message | Delivery, message_id: object) -> str:
    # Whatever shows the variables of a function shows this: no data, and no headers.
    return (
        f"<{type(message).__name__} '{printable(message.routing_key)}' {printable(message_id)}, "
        f"exchange '{printable(message.exchange)}', {len(message.body):,} bytes>"
    )


#: The event that this thread (or task) is handling, and its delivery, if any. What is published
#: meanwhile names it as its cause and carries its correlation id on.
handling: ContextVar[tuple[DomainEvent, Delivery] | None] = ContextVar(
    "domain-events-handling", default=None
)


def from_event(event: DomainEvent, exchange: str, app_id: str, mandatory: bool) -> Message:
    """The message that carries an event.

    :raises InvalidEvent: when it could not be an event for anybody.
    """
    try:
        _check_routing_key(event.routing_key)
        message_id = _short(event.uuid_string, "uuid_string")
        body = event.to_json().encode()
        if len(body) > LARGEST_BODY:
            raise InvalidEvent(
                f"The event {event.routing_key!r} has {len(body):,} bytes; no RabbitMQ takes "
                f"more than {LARGEST_BODY:,}. Store the data and publish where it is."
            )
        cause, correlation_id = _inherited(message_id)
        return Message(
            exchange,
            event.routing_key,
            body,
            headers={CAUSE: cause} if cause else {},
            correlation_id=correlation_id,
            message_id=message_id,
            timestamp=_seconds(event.timestamp),
            type=event.routing_key,
            app_id=app_id,
            mandatory=mandatory,
        )
    except InvalidEvent as error:
        error.event = event
        raise


def to_event(delivery: Delivery) -> DomainEvent:
    """The event in a delivery.

    :raises InvalidEvent: when the body is not an envelope.
    """
    event, _ = read_event(delivery)
    return event


def read_event(delivery: Delivery) -> tuple[DomainEvent, str]:
    """The event in a delivery, and the routing key that its envelope claims.

    The event's own is that of `Delivery.published_routing_key`, where it is known: a publisher who
    may only write ``user.*`` cannot make others believe that a payment was approved.

    :raises InvalidEvent: when the body is not an envelope.
    """
    envelope = read_envelope(delivery.body)
    if not envelope["uuid_string"]:
        # A new id at each delivery would make every redelivery look like another event.
        message_id = delivery.properties.message_id
        if not isinstance(message_id, str) or not message_id:
            raise InvalidEvent("Not an event: neither the envelope nor the message has an id.")
        envelope["uuid_string"] = message_id
    claimed: str = envelope["routing_key"]
    envelope["routing_key"] = delivery.published_routing_key or claimed
    return from_envelope(envelope, delivery.retries), claimed


def retry(
    delivery: Delivery, exchange: str, name: str, delay: float, error: BaseException
) -> Message:
    """The delivery again, back at subscriber ``name`` after ``delay`` seconds."""
    own = {RETRIES: delivery.retries + 1, ROUTING_KEY: delivery.original_routing_key}
    if delivery.retries == 0:
        own |= {
            FIRST_ERROR_TYPE: type_name(error)[:_LONGEST_MESSAGE],
            FIRST_ERROR_MESSAGE: _cut(_text(error), _LONGEST_MESSAGE),
        }
    return _delayed(delivery, exchange, name, delay, own)


def hand_back(delivery: Delivery, exchange: str, name: str, delay: float) -> Message:
    """The delivery again after ``delay`` seconds, for a process that lists its routing key."""
    own = {HAND_BACKS: delivery.hand_backs + 1, ROUTING_KEY: delivery.original_routing_key}
    return _delayed(delivery, exchange, name, delay, own)


def renewed(delivery: Delivery, name: str, *, handed_back: bool = False) -> Message:
    """The delivery again, at the end of its queue, where the broker then counts from 0."""
    own: dict[str, Any] = {ROUTING_KEY: delivery.original_routing_key}
    if handed_back:
        own[HAND_BACKS] = delivery.hand_backs + 1
    return _sent_on(delivery, "", name, _with_kept_headers(delivery, own))


def dead_letter(delivery: Delivery, name: str, error: BaseException) -> Message:
    """The delivery as a dead letter of subscriber ``name``, with the reason."""
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    reason = reason_of(error)
    own: dict[str, Any] = {
        RETRIES: delivery.retries,
        ROUTING_KEY: delivery.original_routing_key,
        SUBSCRIBER: name,
        ERROR_TYPE: _error_type(reason)[:_LONGEST_MESSAGE],
        FAILED_AT: datetime.now(timezone.utc).isoformat(),
        HOST: socket.gethostname(),
        ERROR_MESSAGE: _cut(_text(reason), _LONGEST_MESSAGE),
        TRACEBACK: _cut(trace, _LONGEST_TRACEBACK, keep_end=True),
    }
    address = topology.dead_letter_name(name)
    return _sent_on(delivery, "", address, _with_kept_headers(delivery, own))


def replay(delivery: Delivery, name: str) -> Message:
    """A dead letter as it was before it failed, back in the queue of subscriber ``name``."""
    own = {ROUTING_KEY: delivery.original_routing_key}
    left_out = (RETRIES, HAND_BACKS, *_OF_A_DEAD_LETTER)
    return _sent_on(delivery, "", name, _with_kept_headers(delivery, own, left_out))


def told_by_a_dead_letter(delivery: Delivery) -> dict[str, Any]:
    """What `dead_letter` wrote, as far as it is there, and as far as it can be read.

    Of one that the broker moved itself (its handler had killed the process again and again)
    only the broker's reason is known.
    """
    headers = delivery.headers
    ours = {name: headers.get(name) for name in _OF_A_DEAD_LETTER if delivery.is_ours}
    death = delivery.death
    if death is not None:
        # Moved by the broker after all that our headers tell of, but for the first failure.
        reason = death.get("reason")
        ours[SUBSCRIBER] = death.get("queue")
        ours[ERROR_TYPE] = "delivery limit" if reason == "delivery_limit" else reason
        for name in (ERROR_MESSAGE, TRACEBACK, FAILED_AT, HOST):
            ours[name] = None
        if reason == "delivery_limit":
            ours[ERROR_MESSAGE] = (
                "Delivered again and again, and never settled: each time the process or its "
                "connection ended, or the event was given back."
            )
    try:
        failed_at = datetime.fromisoformat(ours[FAILED_AT] or "")
    except (KeyError, TypeError, ValueError):
        failed_at = None
    return {
        "subscriber": _text_or_none(ours.get(SUBSCRIBER)),
        "error_type": _text_or_none(ours.get(ERROR_TYPE)),
        "error_message": _text_or_none(ours.get(ERROR_MESSAGE)),
        "traceback": _text_or_none(ours.get(TRACEBACK)),
        "failed_at": failed_at,
        "host": _text_or_none(ours.get(HOST)),
        "first_error_type": _text_or_none(ours.get(FIRST_ERROR_TYPE)),
        "first_error_message": _text_or_none(ours.get(FIRST_ERROR_MESSAGE)),
    }


def reason_of(error: BaseException) -> BaseException:
    """What the handler failed on: behind a `Retry`, the error that it was raised for."""
    if isinstance(error, Retry):
        # As a traceback shows it: the cause, else what was being handled, unless suppressed.
        behind = error.__cause__
        if behind is None and not error.__suppress_context__:
            behind = error.__context__
        if behind is not None:
            return reason_of(behind)
    return error


def type_name(error: BaseException) -> str:
    """The class of an error as it is imported: ``ValueError``, ``shop.errors.OutOfStock``.

    Also of a class in the program that was started with ``python -m``, which calls itself
    ``__main__`` there.
    """
    kind = type(error)
    module = kind.__module__
    if module == "__main__":
        spec = getattr(sys.modules.get("__main__"), "__spec__", None)
        module = getattr(spec, "name", None) or module
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


def _inherited(message_id: str) -> tuple[str | None, str]:
    """The cause and the correlation id of an event that is published now."""
    current = handling.get()
    if current is None:
        return None, message_id
    event, delivery = current
    # An id that was not made by us may be longer than AMQP lets us carry it on.
    cause = _cut(str(event.uuid_string), topology.LONGEST_NAME)
    correlation_id = delivery.properties.correlation_id
    if not isinstance(correlation_id, str) or not correlation_id:
        correlation_id = cause
    return cause, correlation_id


def _sent_on(
    delivery: Delivery, exchange: str, routing_key: str, headers: Mapping[str, Any]
) -> Message:
    old = delivery.properties
    return Message(
        exchange,
        routing_key,
        delivery.body,
        headers,
        content_type=old.content_type,
        content_encoding=old.content_encoding,
        correlation_id=old.correlation_id,
        reply_to=old.reply_to,
        message_id=old.message_id,
        timestamp=old.timestamp,
        type=old.type,
        app_id=old.app_id,
        # There must be a queue that takes it, for the original is acked next.
        mandatory=True,
    )


def _delayed(
    delivery: Delivery, exchange: str, name: str, delay: float, own: Mapping[str, Any]
) -> Message:
    delayed_by, address = topology.delay_address(exchange, name, delay)
    return _sent_on(delivery, delayed_by, address, _with_kept_headers(delivery, own))


def _with_kept_headers(
    delivery: Delivery, own: Mapping[str, Any], left_out: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Our headers, and those that the delivery had, without what the broker would act upon.

    A publisher's headers may fill a frame; then the largest of them are left out, never ours.
    """
    kept = {
        name: _sendable(value)
        for name, value in delivery.headers.items()
        if name not in own
        and name not in left_out
        and name not in _OF_THE_BROKER
        and not str(name).startswith(_OF_THE_BROKER_TOO)
        # A publisher writes the cause and nothing else that has such a name.
        and (delivery.is_ours or name == CAUSE or not str(name).startswith(_OURS))
    }
    room = _ROOM_FOR_HEADERS - _size(own) - _size(kept)
    for name in sorted(kept, key=lambda name: _size({name: kept[name]}), reverse=True):
        if room >= 0:
            break
        if not (delivery.is_ours and str(name).startswith(_OURS)):
            room += _size({name: kept.pop(name)})
    return {**kept, **own}


def _check_routing_key(key: object) -> None:
    if _short(key, "routing key") and topology.has_wildcards(str(key)):
        raise InvalidEvent(
            f"The routing key {shown(key)} has a wildcard for a word; '*' and '#' are for the "
            "binding keys of subscribers."
        )
    if isinstance(key, str):
        _warn_of_mistyped(key)


@lru_cache(maxsize=4096)
def _warn_of_mistyped(key: str) -> None:
    if why := topology.mistyped(key):
        log.warning(
            "The routing key %s %s; binding keys match it word by word, and perhaps none does.",
            shown(key),
            why,
        )


def _short(value: object, what: str) -> str:
    """The value, if it is text that AMQP carries as a short string."""
    if isinstance(value, UUID):
        return str(value)
    if not isinstance(value, str) or not value:
        # Not the value itself: arguments that are swapped would show the event's data.
        given = repr(value) if value in (None, "") else f"of type {type(value).__name__}"
        raise InvalidEvent(
            f"An event's {what} must be a text that is not empty, not {given}; the call is "
            "publish_domain_event('user.registered', {'user_id': 1})."
        )
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise InvalidEvent(f"An event's {what} is no valid Unicode: {value[:60]!r}") from error
    if size > topology.LONGEST_NAME:
        raise InvalidEvent(
            f"An event's {what} has at most {topology.LONGEST_NAME} bytes, not {size}: "
            f"{value[:60]!r}..."
        )
    return value


def _seconds(timestamp: object) -> int | None:
    """The timestamp as AMQP has it, where it can: whole seconds since 1970."""
    if not isinstance(timestamp, int | float) or not is_timestamp(timestamp):
        hint = "; give its timestamp()" if hasattr(timestamp, "timestamp") else ""
        raise InvalidEvent(
            f"An event's timestamp is Unix seconds, a float, not {printable(timestamp, 80)}{hint}."
        )
    if timestamp > _MILLISECONDS:
        _warn_of_milliseconds()
    return int(timestamp) if 0 <= timestamp < 2**63 else None


_MILLISECONDS = 1e11  # in the year 5138, or in 1973


@lru_cache(maxsize=1)
def _warn_of_milliseconds() -> None:
    log.warning(
        "An event's timestamp is far in the future; perhaps it is in milliseconds, and not in "
        "Unix seconds. This is logged once."
    )


def _sendable(value: object, depth: int = 0) -> object:
    """A received header's value, as text where pika can read it but not write it.

    What is nested deeper than anybody means is left out, for it could be too deep to be walked.
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


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _error_type(error: BaseException) -> str:
    return error.error_type if isinstance(error, GivenUp) else type_name(error)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:  # noqa: BLE001
        # A broken __str__ must not keep the event from its dead letters.
        return f"<{type_name(error)} that cannot be shown>"


def _cut(text: str, most: int, *, keep_end: bool = False) -> str:
    """At most ``most`` bytes of the text, and no half characters."""
    data = text.encode("utf-8", "replace")
    if len(data) > most:
        data = b"... " + data[4 - most :] if keep_end else data[: most - 4] + b" ..."
    return data.decode("utf-8", "ignore")


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
