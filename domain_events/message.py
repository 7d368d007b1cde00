"""Messages: their destinations and content; how domain events become messages, and back.

Everything besides the envelope (the cause, the number of retries, the reason of a dead letter) is a
field here; how fields travel is up to the broker.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any, Protocol, TypeAlias
from uuid import UUID

from domain_events.checks import shown
from domain_events.errors import InvalidEvent
from domain_events.events import (
    NO_DETAILS,
    Details,
    DomainEvent,
    HeaderValue,
    from_envelope,
    is_timestamp,
    read_envelope,
    version_of_data,
)
from domain_events.log import About, Log
from domain_events.log import about as log_about
from domain_events.names import LONGEST_NAME, fits, has_wildcards, oddity
from domain_events.retry import Retry
from domain_events.text import plain, printable, truncate

log = Log("domain_events")

#: The largest number that travels as a header.
LARGEST_NUMBER = 2**31 - 1

#: The largest body that any RabbitMQ accepts (3.10); from 4.0 on the default is 16 MiB.
LARGEST_BODY = 128 * 2**20

#: Headers with this prefix are this library's own.
OWN_PREFIX = "domain-events-"
# The broker acts upon these, or writes them: CC and BCC route, and x-death makes it drop a message
# as part of a cycle (https://www.rabbitmq.com/docs/sender-selected, https://www.rabbitmq.com/docs/dlx).
_BROKER_HEADERS = ("CC", "BCC")
_BROKER_PREFIX = "x-"
# Of names and values. A dead letter has its reason besides, and all of it must fit one frame.
_MOST_BYTES_OF_HEADERS = 32 * 1024
# For names and values, and for the type and the length of each.
_BYTES_PER_HEADER = 8

_LONGEST_MESSAGE = 2 * 1024
_LONGEST_TRACEBACK = 16 * 1024


@dataclass(frozen=True)
class ToExchange:
    """To all queues bound to the exchange for the routing key."""

    exchange: str

    def __str__(self) -> str:
        return f"the exchange {self.exchange!r}"


@dataclass(frozen=True)
class ToSubscriber:
    """Into the queue of one subscriber, at its end."""

    name: str

    def __str__(self) -> str:
        return f"the queue {self.name!r}"


@dataclass(frozen=True)
class Later:
    """Into the queue of one subscriber, so many seconds later."""

    exchange: str
    name: str
    seconds: float

    def __str__(self) -> str:
        return f"the queue {self.name!r} in {self.seconds:g} s"


@dataclass(frozen=True)
class ToDeadLetters:
    """Among the dead letters of one subscriber."""

    name: str

    def __str__(self) -> str:
        return f"the dead letters of {self.name!r}"


@dataclass(frozen=True)
class UndeliveredOf:
    """The retries on an exchange whose subscriber's queue was gone when they were due."""

    exchange: str

    def __str__(self) -> str:
        return f"the undelivered retries of {self.exchange!r}"


Destination: TypeAlias = ToExchange | ToSubscriber | Later | ToDeadLetters
#: Where messages wait.
Place: TypeAlias = ToSubscriber | ToDeadLetters | UndeliveredOf


@dataclass(frozen=True)
class Failure:
    """Why a delivery was given up. Unknown values are None."""

    subscriber: str | None = None
    error_type: str | None = None
    error_message: str | None = None
    traceback: str | None = None
    failed_at: datetime | None = None
    host: str | None = None
    #: The error of a retried event's first delivery.
    first_error_type: str | None = None
    first_error_message: str | None = None


NO_FAILURE = Failure()
#: The reason of a dead letter on which no handler had failed.
DELIVERY_LIMIT = "delivery limit"
NEVER_SETTLED = (
    "Delivered again and again, and never settled: each time the process or its connection ended, "
    "or the event was given back."
)


@dataclass
class Message:
    """A message to publish. Always persistent."""

    destination: Destination
    #: The event's own, wherever the message goes.
    routing_key: str
    body: bytes
    message_id: str | None = None
    correlation_id: str | None = None
    timestamp: int | None = None
    app_id: str | None = None
    #: It is an error if no queue takes it.
    mandatory: bool = False
    #: The id of the event during whose handling this one was published.
    cause: str | None = None
    retries: int = 0
    hand_backs: int = 0
    failure: Failure = NO_FAILURE
    #: The version of the event's data.
    version: int = 1
    #: How often it was replayed.
    replays: int = 0
    #: Those of the publisher; of a delivery to forward, those to add to its own.
    headers: Mapping[str, Any] | None = None
    #: The delivery to forward, with everything that other programs put into it.
    source: Delivery | None = None

    def __repr__(self) -> str:
        # Debuggers and error trackers show the variables of functions: no data, and no headers.
        return (
            f"<Message '{printable(self.routing_key)}' {printable(self.message_id)}, "
            f"{printable(self.destination)}, {len(self.body):,} bytes>"
        )


class Delivery(Protocol):
    """A message as received.

    Values of other programs (ids, a routing key) are text that AMQP can carry, or None; counts
    are 0 unless this library wrote them.
    """

    #: Belongs to the broker that made the delivery.
    receipt: Any

    @property
    def body(self) -> bytes:
        """The body as it was published, byte for byte."""

    @property
    def redelivered(self) -> bool:
        """Whether it was delivered before, and not settled."""

    @property
    def message_count(self) -> int:
        """How many more wait in the queue, if it was fetched and not pushed."""

    @property
    def headers(self) -> Mapping[str, Any]:
        """All headers, whoever wrote them; on the embedded broker, those of the publisher."""

    @property
    def foreign_headers(self) -> Mapping[str, Any]:
        """The headers that neither this library nor the broker wrote."""

    @property
    def properties(self) -> Any:
        """The AMQP properties: ``headers``, ``message_id`` and the others."""

    @property
    def message_id(self) -> str | None:
        """The event's id, from the message's properties."""

    @property
    def correlation_id(self) -> str | None:
        """Shared by all events that one event has caused."""

    @property
    def timestamp(self) -> int | None:
        """When it happened, in whole Unix seconds."""

    @property
    def app_id(self) -> str | None:
        """The program that published it."""

    @property
    def cause(self) -> str | None:
        """The id of the event during whose handling this one was published."""

    @property
    def published_routing_key(self) -> str | None:
        """The routing key that the event was published with; None if only its envelope has it.

        For an event that comes from its publisher it is the one the broker routed by, after
        checking that the publisher may use it.
        """

    @property
    def original_routing_key(self) -> str:
        """The routing key to log and to forward, even if the body cannot be read."""

    @property
    def is_verified(self) -> bool:
        """Whether the routing key is surely the one that it was published with."""

    @property
    def retries(self) -> int:
        """How often the event was retried."""

    @property
    def hand_backs(self) -> int:
        """How often it was handed back, since no process that got it listed its routing key."""

    @property
    def version(self) -> int:
        """The version of the event's data; 1 if its publisher has given none."""

    @property
    def replays(self) -> int:
        """How often it was replayed."""

    @property
    def failures(self) -> int:
        """How often it was delivered and failed, where the queue counts that; otherwise 0."""

    @property
    def give_back_counts(self) -> bool:
        """Whether the queue also counts a delivery as failed that is given back."""

    @property
    def failure(self) -> Failure:
        """Of a dead letter, why it was given up; of a retry, the first error."""

    @property
    def subscriber(self) -> str | None:
        """Of an undelivered retry, the subscriber; others may have forged it."""


class GivenUp(Exception):
    """Why an event is a dead letter on which no handler has failed; never raised to a user.

    :param error_type: the ``error_type`` of its dead letter.
    """

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(message)
        self.error_type = error_type


#: The event that this thread (or task) is handling, and its delivery, if any. Events published
#: meanwhile name it as their cause and inherit its correlation id.
handling: ContextVar[tuple[DomainEvent[Any], Delivery] | None] = ContextVar(
    "domain-events-handling", default=None
)


def from_event(event: DomainEvent[Any], exchange: str, app_id: str, mandatory: bool) -> Message:
    """The message that carries an event.

    :raises InvalidEvent: when it cannot be sent, or no subscriber could read it.
    """
    try:
        _check_routing_key(event.routing_key)
        message_id = _short(event.uuid_string, "uuid_string")
        body = event.to_json().encode()
        if len(body) > LARGEST_BODY:
            raise InvalidEvent(
                f"The event {event.routing_key!r} has {len(body):,} bytes; RabbitMQ accepts "
                f"at most {LARGEST_BODY:,}. Store the data and publish where it is."
            )
        cause, correlation_id = _inherited(message_id)
        message = Message(
            _to_exchange(exchange),
            event.routing_key,
            body,
            message_id,
            correlation_id,
            _seconds(event.timestamp),
            app_id,
            mandatory,
            cause,
        )
        details = event.details
        if details is not NO_DETAILS:
            _add_details(message, details, version_of_data(event))
        return message
    except InvalidEvent as error:
        error.event = event
        raise


_to_exchange = lru_cache(maxsize=64)(ToExchange)


def to_event(delivery: Delivery) -> DomainEvent[Any]:
    """The event in a delivery.

    :raises InvalidEvent: when the body is not an envelope.
    """
    event, _ = read_event(delivery)
    return event


def read_event(
    delivery: Delivery, subscriber: str | None = None, exchange: str | None = None
) -> tuple[DomainEvent[Any], str]:
    """The event in a delivery, and the routing key that its envelope claims.

    The event's own is `Delivery.published_routing_key`, if that is known: a publisher who may only
    write ``user.*`` cannot forge the event of an approved payment.

    :raises InvalidEvent: when the body is not an envelope.
    """
    envelope = read_envelope(delivery.body)
    if not envelope["uuid_string"]:
        # A new id at each delivery would make every redelivery look like another event.
        if not (message_id := delivery.message_id):
            raise InvalidEvent("Not an event: neither the envelope nor the message has an id.")
        envelope["uuid_string"] = message_id
    claimed: str = envelope["routing_key"]
    envelope["routing_key"] = delivery.published_routing_key or claimed
    # Read when they are needed; see `DomainEvent.details`.
    details = _details, delivery, subscriber, exchange
    return from_envelope(envelope, delivery.retries, details=details), claimed


def about(delivery: Delivery, subscriber: str | None) -> About:
    """The attributes of a log line about this delivery, which may not be an event."""
    routing_key = event_id = None
    with contextlib.suppress(Exception):  # a line must not fail over what it is about
        routing_key, event_id = delivery.original_routing_key, delivery.message_id
    return log_about(subscriber, routing_key, event_id)


def routing_key_in(body: bytes) -> str | None:
    """The routing key that an envelope claims, if it can be read and AMQP can carry it."""
    with contextlib.suppress(InvalidEvent):
        key = read_envelope(body)["routing_key"]
        return key if key and fits(key) else None
    return None


# --- forwarding ----------------------------------------------------------------------------------


def sent_on(delivery: Delivery, destination: Destination) -> Message:
    """The delivery as it is, for another destination."""
    return Message(
        destination,
        delivery.original_routing_key,
        delivery.body,
        delivery.message_id,
        delivery.correlation_id,
        delivery.timestamp,
        delivery.app_id,
        # A queue must take it, since the original is acked next.
        True,
        delivery.cause,
        delivery.retries,
        delivery.hand_backs,
        delivery.failure,
        delivery.version,
        delivery.replays,
        source=delivery,
    )


def retry(delivery: Delivery, later: Later, error: BaseException) -> Message:
    """The delivery again, later, after its handler has failed."""
    message = sent_on(delivery, later)
    message.retries += 1
    if message.retries == 1:
        message.failure = replace(
            message.failure,
            first_error_type=type_name(error)[:_LONGEST_MESSAGE],
            first_error_message=truncate(_text(error), _LONGEST_MESSAGE),
        )
    return message


def hand_back(delivery: Delivery, destination: Later | ToSubscriber) -> Message:
    """The delivery again, for a process that lists its routing key."""
    message = sent_on(delivery, destination)
    message.hand_backs += 1
    return message


def dead_letter(delivery: Delivery, name: str, error: BaseException) -> Message:
    """The delivery as a dead letter of subscriber ``name``, with the reason."""
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    reason = reason_of(error)
    message = sent_on(delivery, ToDeadLetters(name))
    message.failure = replace(
        message.failure,
        subscriber=name,
        error_type=_error_type(reason)[:_LONGEST_MESSAGE],
        error_message=truncate(_text(reason), _LONGEST_MESSAGE),
        traceback=truncate(trace, _LONGEST_TRACEBACK, keep_end=True),
        failed_at=datetime.now(timezone.utc),
        host=socket.gethostname(),
    )
    return message


def replay(delivery: Delivery, name: str) -> Message:
    """A dead letter as it was before it failed, back in the queue of subscriber ``name``."""
    message = sent_on(delivery, ToSubscriber(name))
    message.retries = message.hand_backs = 0
    message.replays += 1
    message.failure = NO_FAILURE
    return message


def reason_of(error: BaseException) -> BaseException:
    """The error that the handler failed on; of a `Retry`, the one that it was raised for."""
    if isinstance(error, Retry):
        # As in a traceback: the cause, else the context, unless suppressed.
        behind = error.__cause__
        if behind is None and not error.__suppress_context__:
            behind = error.__context__
        if behind is not None:
            return reason_of(behind)
    return error


def type_name(error: BaseException) -> str:
    """The class of an error as it is imported: ``ValueError``, ``shop.errors.OutOfStock``.

    Also in a program started by ``python -m``, whose classes have the module ``__main__``.
    """
    kind = type(error)
    module = kind.__module__
    if module == "__main__":
        spec = getattr(sys.modules.get("__main__"), "__spec__", None)
        module = getattr(spec, "name", None) or module
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


# --- inside --------------------------------------------------------------------------------------


def _details(delivery: Delivery, subscriber: str | None, exchange: str | None) -> Details:
    """What is known of a received event besides its envelope."""
    return Details(
        delivery.foreign_headers,
        delivery.correlation_id,
        delivery.cause,
        delivery.version,
        delivery.redelivered,
        delivery.replays > 0,
        subscriber,
        exchange,
    )


def _add_details(message: Message, details: Details, version: int) -> None:
    """Send along what the publisher has given besides the envelope.

    :raises InvalidEvent: when it cannot be sent.
    """
    if details.correlation_id is not None:
        message.correlation_id = _short(details.correlation_id, "correlation_id")
    if details.cause is not None:
        message.cause = _short(details.cause, "cause")
    is_number = isinstance(version, int) and not isinstance(version, bool)
    if not is_number or not 0 < version <= LARGEST_NUMBER:
        raise InvalidEvent(
            f"An event's version must be an int from 1 to {LARGEST_NUMBER:,}, not {shown(version)}."
        )
    message.version = int.__int__(version)
    if details.app_id is not None:
        message.app_id = details.app_id
    if details.headers:
        headers = details.headers
        if details.subscriber is not None:
            # Received, and published again: other programs may have sent headers that we do not.
            headers = {name: each for name, each in headers.items() if is_header(name, each)}
        message.headers = checked_headers(headers)


def is_foreign(name: object) -> bool:
    """Whether neither this library nor the broker writes a header of that name."""
    return not str(name).startswith((OWN_PREFIX, _BROKER_PREFIX)) and name not in _BROKER_HEADERS


def is_header(name: object, value: object) -> bool:
    """Whether a publisher may send such a header."""
    return (
        isinstance(name, str)
        and bool(name)
        and fits(name)
        and is_foreign(name)
        and isinstance(value, str | int)
        and (not isinstance(value, int) or abs(value) < 2**63)
    )


def checked_headers(headers: object) -> dict[str, HeaderValue]:
    """Headers that can be sent, as a copy.

    :raises InvalidEvent: when they cannot.
    """
    if not isinstance(headers, Mapping):
        raise InvalidEvent(
            f"An event's headers must be a dict, not of type {type(headers).__name__}."
        )
    size = 0
    checked: dict[str, HeaderValue] = {}
    for name, value in headers.items():
        if not is_header(name, value):
            raise InvalidEvent(_why_not_a_header(name, value))
        # Exact types: pika encodes an Enum member, or a SafeString, by its class.
        if isinstance(value, str):
            value = plain(value)  # noqa: PLW2901
            try:
                size += len(value.encode())
            except UnicodeEncodeError as error:
                raise InvalidEvent(f"The header {shown(name)} is not valid Unicode.") from error
        checked[plain(name)] = value if isinstance(value, str | bool) else int.__int__(value)
        size += len(name.encode()) + _BYTES_PER_HEADER
    if size > _MOST_BYTES_OF_HEADERS:
        raise InvalidEvent(
            f"An event's headers must have at most {_MOST_BYTES_OF_HEADERS:,} bytes, not {size:,}; "
            "such data belongs into the event."
        )
    return checked


def added_headers(known: Mapping[str, Any], headers: object) -> dict[str, HeaderValue]:
    """What was added to known headers, or changed in them; checked as all headers are."""
    if not isinstance(headers, Mapping):
        return checked_headers(headers)
    # A NaN of another program is the same, and not equal.
    return checked_headers(
        {
            name: each
            for name, each in headers.items()
            if name not in known or (known[name] is not each and known[name] != each)
        }
    )


def _why_not_a_header(name: object, value: object) -> str:
    if not isinstance(name, str) or not name or not fits(name):
        right = f"a str of 1 to {LONGEST_NAME} bytes"
        return f"The name of a header must be {right}, not {shown(name)}."
    if not is_foreign(name):
        return (
            f"The header {shown(name)} is not for publishers: names that begin with "
            f"{OWN_PREFIX!r} are this library's, and {_BROKER_PREFIX!r}, 'CC' and 'BCC' are the "
            "broker's. Choose another name."
        )
    # Not the value itself, which may be the application's data.
    return (
        f"The header {shown(name)} must be a str, an int of 64 bits or a bool, not of type "
        f"{type(value).__name__}; convert it, with str() for example."
    )


def _inherited(message_id: str) -> tuple[str | None, str]:
    """The cause and the correlation id of an event that is published now."""
    current = handling.get()
    if current is None:
        return None, message_id
    event, delivery = current
    # An id of another program may be too long for AMQP.
    cause = truncate(str(event.uuid_string), LONGEST_NAME)
    return cause, delivery.correlation_id or cause


def _check_routing_key(key: object) -> None:
    if _short(key, "routing key") and has_wildcards(str(key)):
        raise InvalidEvent(
            f"The routing key {shown(key)} has a wildcard as a word; '*' and '#' are for the "
            "binding keys of subscribers."
        )
    if isinstance(key, str):
        _warn_of_mistyped(key)


@lru_cache(maxsize=4096)
def _warn_of_mistyped(key: str) -> None:
    if why := oddity(key):
        log.warning(
            "The routing key %s %s; binding keys match word by word, so perhaps none matches it.",
            shown(key),
            why,
            about=log_about(None, key, None),
        )


def _short(value: object, what: str) -> str:
    """The value, if it fits an AMQP short string."""
    if isinstance(value, UUID):
        return str(value)
    if not isinstance(value, str) or not value:
        # Not the value itself: with swapped arguments, it is the event's data.
        given = repr(value) if value in (None, "") else f"of type {type(value).__name__}"
        raise InvalidEvent(
            f"An event's {what} must be a non-empty str, not {given}; the call is "
            "publish_domain_event('user.registered', {'user_id': 1})."
        )
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise InvalidEvent(f"An event's {what} is not valid Unicode: {value[:60]!r}") from error
    if size > LONGEST_NAME:
        raise InvalidEvent(
            f"An event's {what} must be at most {LONGEST_NAME} bytes, not {size}: {value[:60]!r}..."
        )
    return value


def _seconds(timestamp: object) -> int | None:
    """The timestamp for AMQP, in whole Unix seconds; None if AMQP cannot carry it."""
    if not isinstance(timestamp, int | float) or not is_timestamp(timestamp):
        hint = "; give its timestamp()" if hasattr(timestamp, "timestamp") else ""
        raise InvalidEvent(
            f"An event's timestamp must be Unix seconds, not {printable(timestamp, 80)}{hint}."
        )
    if timestamp > _MILLISECONDS:
        _warn_of_milliseconds()
    return int(timestamp) if 0 <= timestamp < 2**63 else None


_MILLISECONDS = 1e11  # in the year 5138, or in 1973


@lru_cache(maxsize=1)
def _warn_of_milliseconds() -> None:
    log.warning(
        "An event's timestamp is far in the future; it must be in seconds, perhaps it is in "
        "milliseconds. This is logged once."
    )


def _error_type(error: BaseException) -> str:
    return error.error_type if isinstance(error, GivenUp) else type_name(error)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:  # noqa: BLE001
        # A broken __str__ must not keep the event from the dead letters.
        return f"<{type_name(error)} that cannot be shown>"
