"""Dead letters: what a subscriber failed on, to be browsed, replayed, discarded, or left.

Browsing takes nothing out. A replay is one movement: the event is confirmed in the subscriber's
queue before it is acked among the dead letters. What is left stays; each walk sees a dead letter
once, so that a walk ends even while new ones arrive. How walks work: `domain_events.walks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from domain_events import message as messages
from domain_events import settings, topology
from domain_events.checks import refusal, shown
from domain_events.errors import EventUnroutable, InvalidEvent, TopologyError
from domain_events.events import DomainEvent
from domain_events.log import Log
from domain_events.message import Delivery, Message
from domain_events.settings import DEFAULT, ConnectionSettings
from domain_events.text import printable
from domain_events.walks import Walks

log = Log("domain_events")

RETRY = "retry"
LEAVE = "leave"
DISCARD = "discard"


@dataclass(frozen=True, eq=False)
class DeadLetter:
    """One dead letter. What is not known of it is None, as with those of other programs."""

    #: The event; None when the body is no envelope.
    event: DomainEvent | None
    #: The body as it was received.
    body: bytes
    #: The routing key that it was published with.
    routing_key: str
    #: The subscriber that failed on it.
    subscriber: str | None
    #: The exception: its class, its message, its traceback.
    error_type: str | None
    error_message: str | None
    traceback: str | None
    #: When it failed, where (the host's name), and after how many retries.
    failed_at: datetime | None
    host: str | None
    retries: int
    #: What its first delivery failed on, if it was retried afterwards.
    first_error_type: str | None
    first_error_message: str | None

    _delivery: Delivery
    _owner: DeadLetters

    def replay(self) -> None:
        """Back into the subscriber's queue, with ``retries == 0``; then out of the dead letters.

        :raises TopologyError: the subscriber's queue does not exist; the dead letter is left.
        :raises DomainEventsError: as `Publisher.publish` does; the dead letter is left.
        :raises RuntimeError: it was settled already, or its walk is over.
        """
        self._owner._replay(self._delivery)

    def discard(self) -> None:
        """Delete it, for good."""
        self._owner._settle(self._delivery)

    def __repr__(self) -> str:
        event = self.event or f"{len(self.body)} bytes that are no event"
        error = f"{printable(self.error_type)}: {printable(self.error_message)}"
        return f"<DeadLetter {event}: {error}>"


class DeadLetters(Walks):
    """The dead letters of the subscriber ``name``. Iterate to see each one once.

    ::

        with DeadLetters('print-user-event') as dead_letters:
            for letter in dead_letters:
                if letter.error_type == 'TimeoutError':
                    letter.replay()

    What is neither replayed nor discarded is left, in its order. The dead letters that a walk has
    passed are held until the next one begins or `close` is called; until then they can be settled,
    and others do not see them. Their bodies are not: they live as long as each `DeadLetter`.

    Up to RabbitMQ 4.2 a look counts as a delivery. Before a queue's delivery limit could delete
    them, the next walk publishes all of them to their queue anew, which takes the permission to
    publish there.

    :param name: the subscriber's name.
    :param connection_settings: an AMQP URL, several, or None; see `configure`.
    :param timeout: seconds within which the broker must answer each question.
    :raises ConfigurationError: for settings that cannot work.
    """

    def __init__(
        self,
        name: str,
        connection_settings: ConnectionSettings = DEFAULT,
        *,
        timeout: float = 10.0,
    ) -> None:
        connection_settings = settings.masked(connection_settings)
        self.name = topology.check_name(name, "subscriber")
        queue = topology.dead_letter_name(self.name)
        super().__init__(queue, f"The dead letters of {self.name!r}", connection_settings, timeout)

    def __iter__(self) -> Iterator[DeadLetter]:
        for delivery in self._deliveries():
            yield self._letter(delivery)

    def replay_all(self) -> int:
        """Replay all that are there now, in their order; says how many that were."""
        return self._all(DeadLetter.replay)

    def discard_all(self) -> int:
        """Delete all that are there now, for good; says how many that were."""
        return self._all(DeadLetter.discard)

    def _all(self, action: Callable[[DeadLetter], None]) -> int:
        number = 0
        for letter in self:
            action(letter)
            number += 1
        return number

    def _replay(self, delivery: Delivery) -> None:
        if not delivery.is_verified:
            log.warning(
                "%s: the broker itself has moved the dead letter %s there. Before RabbitMQ 4.0 its "
                "routing key, %s, may have been forged by its publisher.",
                self.name,
                printable(delivery.properties.message_id),
                printable(delivery.original_routing_key),
            )
        self._check_held(delivery)
        try:
            self._send(messages.replay(delivery, self.name))
        except EventUnroutable as error:
            raise TopologyError(
                f"There is no queue {self.name!r} to replay into: its subscriber must have "
                "registered first. The dead letter is left."
            ) from error
        self._settle(delivery)

    def _anew(self, delivery: Delivery) -> Message:
        message = messages.replay(delivery, self._queue)
        headers = {**message.headers, **_told(delivery), messages.RETRIES: delivery.retries}
        return replace(message, headers=headers)

    def _letter(self, delivery: Delivery) -> DeadLetter:
        try:
            event = messages.to_event(delivery)
        except InvalidEvent:
            event = None
        told = messages.told_by_a_dead_letter(delivery)
        return DeadLetter(
            event=event,
            body=delivery.body,
            routing_key=delivery.original_routing_key,
            retries=delivery.retries,
            _delivery=delivery,
            _owner=self,
            **told,
        )


def _told(delivery: Delivery) -> dict[str, Any]:
    """The headers from which the same is told again when it is in its queue anew."""
    if not delivery.exchange and "x-death" not in delivery.headers:
        # They are there already.
        ours = [(str(name), value) for name, value in delivery.headers.items()]
        return {
            name: value
            for name, value in ours
            if name.startswith("domain-events-") and isinstance(value, str)
        }
    # The broker moved it: what is known of that stands in headers that do not survive.
    told = messages.told_by_a_dead_letter(delivery)
    failed_at = told["failed_at"]
    headers = {
        messages.SUBSCRIBER: told["subscriber"],
        messages.ERROR_TYPE: told["error_type"],
        messages.ERROR_MESSAGE: told["error_message"],
        messages.TRACEBACK: told["traceback"],
        messages.FAILED_AT: failed_at and failed_at.isoformat(),
        messages.HOST: told["host"],
    }
    return {name: value for name, value in headers.items() if value is not None}


def retry_event(body: bytes, **kwargs: Any) -> str:
    """The default answer to each dead letter: replay it."""
    return RETRY


def replay_event(
    queue_name: str,
    message_callback: Callable[..., str] = retry_event,
    connection_settings: ConnectionSettings = DEFAULT,
) -> int:
    """Decide about the oldest dead letter of a subscriber.

    :param queue_name: the subscriber's name.
    :param message_callback: called with ``frame`` (a `Delivery`), ``header`` (its AMQP
        properties) and ``body`` as keyword arguments; returns RETRY, LEAVE or DISCARD.
    :return: how many dead letters there are behind that one.
    :raises ValueError: another answer than these; the dead letter is left.
    """
    connection_settings = settings.masked(connection_settings)
    _check_callback(message_callback)
    with DeadLetters(queue_name, connection_settings) as dead_letters:
        for delivery in dead_letters._deliveries():
            _decide(dead_letters, delivery, message_callback)
            return delivery.message_count
    return 0


def replay_all(
    queue_name: str,
    message_callback: Callable[..., str] = retry_event,
    connection_settings: ConnectionSettings = DEFAULT,
) -> int:
    """Decide about each dead letter that a subscriber has now; arguments as `replay_event`.

    :return: how many have come since it began.
    """
    connection_settings = settings.masked(connection_settings)
    _check_callback(message_callback)
    with DeadLetters(queue_name, connection_settings) as dead_letters:
        for delivery in dead_letters._deliveries():
            _decide(dead_letters, delivery, message_callback)
        return dead_letters._count_ready()


def _check_callback(message_callback: object) -> None:
    if not callable(message_callback):
        right = "a function that returns RETRY, LEAVE or DISCARD"
        raise refusal(message_callback, "message_callback", right)


def _decide(
    dead_letters: DeadLetters, delivery: Delivery, message_callback: Callable[..., str]
) -> None:
    answer = message_callback(frame=delivery, header=delivery.properties, body=delivery.body)
    if answer == RETRY:
        dead_letters._replay(delivery)
    elif answer == DISCARD:
        dead_letters._settle(delivery)
    elif answer != LEAVE:
        raise ValueError(f"Answer RETRY, LEAVE or DISCARD to a dead letter, not {shown(answer)}.")
