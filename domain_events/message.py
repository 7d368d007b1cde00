"""A domain event as a message, and back: properties, headers, body. Knows no broker.

Everything that a domain event has besides its envelope travels in AMQP properties and in
headers named ``domain-events-*``; a message that is sent on (a retry, a dead letter, a replay)
keeps its body byte for byte, and its properties but for those that the broker would act upon.
"""

from __future__ import annotations

import contextlib
import socket
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Protocol
from uuid import UUID

from domain_events import topology
from domain_events.errors import InvalidEvent
from domain_events.events import DomainEvent, read_envelope
from domain_events.text import printable

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

_OF_A_DEAD_LETTER = (SUBSCRIBER, ERROR_TYPE, ERROR_MESSAGE, TRACEBACK, FAILED_AT, HOST)

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

    def __repr__(self) -> str:
        return _without_data(self, getattr(self.properties, "message_id", None))

    @property
    def headers(self) -> Mapping[str, Any]:
        return self.properties.headers or {}

    @property
    def original_routing_key(self) -> str:
        """The routing key that the event was published with."""
        key = self.headers.get(ROUTING_KEY)
        if key is None:
            # Of a dead letter that the broker moved by itself.
            with contextlib.suppress(KeyError, IndexError, TypeError):
                key = self.headers["x-death"][-1]["routing-keys"][0]
        # Others may have put anything there; too long a key would not fit our own headers.
        return key if isinstance(key, str) and topology.fits(key) else self.routing_key

    @property
    def retries(self) -> int:
        """How often the event was retried; what others may have put there counts as never."""
        headers = self.properties.headers
        retries = headers.get(RETRIES) if headers else 0
        if isinstance(retries, bool) or not isinstance(retries, int):
            return 0
        # pika reads a large one as a type of its own, and would not write the largest again.
        return max(0, min(int(retries), _MOST_RETRIES))


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

    :raises InvalidEvent: when the body is no envelope.
    """
    envelope = read_envelope(delivery.body)
    if not envelope["uuid_string"]:
        # A new id at each delivery would make every redelivery look like another event.
        message_id = delivery.properties.message_id
        if not isinstance(message_id, str) or not message_id:
            raise InvalidEvent("Not an event: neither the envelope nor the message has an id.")
        envelope["uuid_string"] = message_id
    return DomainEvent(**envelope, retries=delivery.retries)


def retry(delivery: Delivery, exchange: str, name: str, delay: float) -> Message:
    """The delivery again, back at subscriber ``name`` after ``delay`` seconds."""
    delayed_by, address = topology.delay_address(exchange, name, delay)
    headers = _kept_headers(delivery)
    headers[RETRIES] = delivery.retries + 1
    if _size(headers) > _ROOM_FOR_HEADERS:
        headers = {RETRIES: delivery.retries + 1, ROUTING_KEY: delivery.original_routing_key}
    return _sent_on(delivery, delayed_by, address, headers)


def dead_letter(delivery: Delivery, name: str, error: BaseException) -> Message:
    """The delivery as a dead letter of subscriber ``name``, with the reason."""
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    reason: dict[str, Any] = {
        SUBSCRIBER: name,
        ERROR_TYPE: _type_name(error)[:_LONGEST_MESSAGE],
        FAILED_AT: datetime.now(timezone.utc).isoformat(),
        HOST: socket.gethostname(),
        ERROR_MESSAGE: _cut(_text(error), _LONGEST_MESSAGE),
        TRACEBACK: _cut(trace, _LONGEST_TRACEBACK, keep_end=True),
    }
    headers = _kept_headers(delivery)
    headers[RETRIES] = delivery.retries
    # A sender's own headers may have filled the frame: then shorten ours, then leave out theirs.
    if _size(headers) + _size(reason) > _ROOM_FOR_HEADERS:
        del reason[TRACEBACK]
    if _size(headers) + _size(reason) > _ROOM_FOR_HEADERS:
        headers = {RETRIES: delivery.retries, ROUTING_KEY: delivery.original_routing_key}
    return _sent_on(delivery, "", topology.dead_letter_name(name), headers | reason)


def replay(delivery: Delivery, name: str) -> Message:
    """A dead letter as it was before it failed, back in the queue of subscriber ``name``."""
    headers = _kept_headers(delivery)
    for header in (RETRIES, *_OF_A_DEAD_LETTER):
        headers.pop(header, None)
    if _size(headers) > _ROOM_FOR_HEADERS:
        headers = {ROUTING_KEY: delivery.original_routing_key}
    return _sent_on(delivery, "", name, headers)


def told_by_a_dead_letter(delivery: Delivery) -> dict[str, Any]:
    """What `dead_letter` wrote, as far as it is there, and as far as it can be read.

    Of one that the broker moved itself (its handler had killed the process again and again)
    only the broker's reason is known.
    """
    headers = delivery.headers
    reason = headers.get("x-first-death-reason")
    by_the_broker = "delivery limit" if reason == "delivery_limit" else reason
    try:
        failed_at = datetime.fromisoformat(headers[FAILED_AT])
    except (KeyError, TypeError, ValueError):
        failed_at = None
    return {
        "subscriber": _text_or_none(headers.get(SUBSCRIBER, headers.get("x-first-death-queue"))),
        "error_type": _text_or_none(headers.get(ERROR_TYPE, by_the_broker)),
        "error_message": _text_or_none(headers.get(ERROR_MESSAGE)),
        "traceback": _text_or_none(headers.get(TRACEBACK)),
        "failed_at": failed_at,
        "host": _text_or_none(headers.get(HOST)),
    }


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


def _kept_headers(delivery: Delivery) -> dict[str, Any]:
    headers = {
        name: _sendable(value)
        for name, value in delivery.headers.items()
        if name not in _OF_THE_BROKER and not str(name).startswith(_OF_THE_BROKER_TOO)
    }
    headers[ROUTING_KEY] = delivery.original_routing_key
    return headers


def _check_routing_key(key: object) -> None:
    if _short(key, "routing key") and topology.has_wildcards(str(key)):
        raise InvalidEvent(
            f"The routing key {key!r} has a wildcard for a word; '*' and '#' are for the binding "
            "keys of subscribers."
        )


def _short(value: object, what: str) -> str:
    """The value, if it is text that AMQP carries as a short string."""
    if isinstance(value, UUID):
        return str(value)
    if not isinstance(value, str) or not value:
        raise InvalidEvent(f"An event's {what} must be a text that is not empty, not {value!r}.")
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
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | float):
        raise InvalidEvent(f"An event's timestamp is Unix seconds, not {timestamp!r}.")
    return int(timestamp) if 0 <= timestamp < 2**63 else None


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


def _type_name(error: BaseException) -> str:
    kind = type(error)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001
        # A broken __str__ must not keep the event from its dead letters.
        return f"<{_type_name(error)} that cannot be shown>"


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
