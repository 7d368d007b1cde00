"""Dead letters: events that a subscriber failed on, to be browsed, replayed, discarded, or left.

Browsing removes nothing. A replayed event is confirmed in the subscriber's queue before it is acked
among the dead letters. Each walk visits a dead letter once, so that it ends even while new ones
arrive. How walks work: `domain_events.walks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from domain_events import message as messages
from domain_events import settings
from domain_events.broker import confirm_each
from domain_events.checks import refusal, shown
from domain_events.errors import EventUnroutable, InvalidEvent, TopologyError
from domain_events.events import DomainEvent
from domain_events.log import Log
from domain_events.message import Delivery, Message, ToDeadLetters
from domain_events.names import check_name
from domain_events.settings import DEFAULT, ConnectionSettings
from domain_events.text import printable
from domain_events.walks import MOST_AT_ONCE, Walks

log = Log("domain_events")

RETRY = "retry"
LEAVE = "leave"
DISCARD = "discard"


@dataclass(frozen=True, eq=False)
class DeadLetter:
    """One dead letter. Unknown values are None, as with those of other programs."""

    #: The event; None when the body is not an envelope.
    event: DomainEvent[Any] | None
    #: The body as it was received.
    body: bytes
    #: The routing key that it was published with.
    routing_key: str
    #: The subscriber that failed on it.
    subscriber: str | None
    #: The class of the exception, with its import path.
    error_type: str | None
    #: Its message.
    error_message: str | None
    #: The end of its traceback.
    traceback: str | None
    #: When it failed.
    failed_at: datetime | None
    #: Where: the name of the host.
    host: str | None
    #: After how many retries.
    retries: int
    #: The class of its first delivery's exception, if it was retried afterwards.
    first_error_type: str | None
    #: That one's message.
    first_error_message: str | None
    #: How often it was replayed before, and failed again.
    replays: int

    _delivery: Delivery
    _owner: DeadLetters

    @property
    def id(self) -> str | None:
        """The event's id, also if the body cannot be read."""
        return self.event.uuid_string if self.event is not None else self._delivery.message_id

    @property
    def delivery(self) -> Delivery:
        """The message itself: its headers, correlation id, cause."""
        return self._delivery

    def replay(self) -> None:
        """Return it to the subscriber's queue, with ``retries == 0``; remove it from this one.

        :raises TopologyError: the subscriber's queue does not exist; the dead letter is left.
        :raises DomainEventsError: as `Publisher.publish` does; the dead letter is left.
        :raises RuntimeError: it was settled already, or its walk is over.
        """
        self._owner._replay(self._delivery)

    def discard(self) -> None:
        """Delete it, for good."""
        self._owner._settle(self._delivery)

    def __repr__(self) -> str:
        event = self.event or f"{len(self.body)} bytes that are not an event"
        error = f"{printable(self.error_type)}: {printable(self.error_message)}"
        return f"<DeadLetter {event}: {error}>"


class DeadLetters(Walks):
    """The dead letters of the subscriber ``name``. Iterate to get each one once.

    ::

        with DeadLetters('print-user-event') as dead_letters:
            for letter in dead_letters:
                if letter.error_type == 'TimeoutError':
                    letter.replay()

    Those neither replayed nor discarded are left, in their order. The dead letters that a walk has
    passed, and a few hundred ahead of it, are held until the next one begins or `release` or
    `close` is called; until then they can be settled, and others do not see them. Their bodies are
    only kept by each `DeadLetter`.

    Up to RabbitMQ 4.2 browsing counts as a delivery. Before a queue's delivery limit could delete
    them, the next walk republishes all of them to their queue, which requires the permission to
    publish there.

    :param name: the subscriber's name.
    :param connection_settings: an AMQP URL, several, or None; see `configure`.
    :param timeout: seconds within which the broker must answer each request.
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
        self.name: str = check_name(name, "subscriber")
        super().__init__(ToDeadLetters(self.name), connection_settings, timeout)

    def __iter__(self) -> Iterator[DeadLetter]:
        for delivery in self._deliveries():
            yield self._letter(delivery)

    def unreached(self) -> Iterator[DeadLetter]:
        """Those that the current walk has not taken yet, such as have arrived since it began.

        They can be seen, not settled, and are given back as soon as this iteration is over.
        """
        for delivery in self._unreached():
            yield self._letter(delivery)

    def replay_all(self) -> int:
        """Replay all that are there now, in their order. Returns how many were replayed."""
        return self.replay_many(self)

    def discard_all(self) -> int:
        """Delete all that are there now, for good. Returns how many were deleted."""
        return self.discard_many(self)

    def replay_many(
        self,
        letters: Iterable[DeadLetter],
        replayed: Callable[[DeadLetter], None] = lambda _letter: None,
    ) -> int:
        """Replay these of the current walk, in their order, many under way at a time.

        When the process is killed, up to a hundred may be in both queues.

        :param letters: such as a filter over this walk.
        :param replayed: called for each one, once it was confirmed.
        :return: how many were replayed.
        :raises DomainEventsError: as `DeadLetter.replay`; what was not confirmed is left.
        """
        number = 0
        if settings.middleware():  # it is to see the outcome of each one
            for letter in letters:
                letter.replay()
                replayed(letter)
                number += 1
            return number
        done: list[DeadLetter] = []

        def settle() -> None:
            nonlocal number
            settled, done[:] = done[:], []
            self._settle_all([letter._delivery for letter in settled])
            number += len(settled)
            for letter in settled:
                replayed(letter)

        def confirmed(letter: DeadLetter) -> None:
            done.append(letter)
            if len(done) >= MOST_AT_ONCE:
                settle()

        def messages_of() -> Iterator[tuple[Message, DeadLetter]]:
            for letter in letters:
                self._check(letter._delivery)
                yield messages.replay(letter._delivery, self.name), letter

        try:
            if self._consuming() is not None:
                confirm_each(self._publishing(), messages_of(), self._timeout, confirmed)
        except EventUnroutable as error:
            raise self._missing_error() from error
        finally:
            settle()
        return number

    def _replay(self, delivery: Delivery) -> None:
        self._check(delivery)
        try:
            self._replayed(messages.replay(delivery, self.name), _event(delivery), self.name)
        except EventUnroutable as error:
            raise self._missing_error() from error
        self._settle(delivery)

    def _missing_error(self) -> TopologyError:
        return TopologyError(
            f"There is no queue {self.name!r} to replay into: its subscriber must have "
            "registered first. The dead letter is left."
        )

    def _check(self, delivery: Delivery) -> None:
        """Before it is replayed."""
        if not delivery.is_verified:
            log.warning(
                "%s: the broker itself moved %s to the dead letters. Before RabbitMQ 4.0 its "
                "publisher may have forged its routing key, %s.",
                self.name,
                printable(delivery.message_id),
                printable(delivery.original_routing_key),
                about=messages.about(delivery, self.name),
            )
        self._check_held(delivery)

    def _letter(self, delivery: Delivery) -> DeadLetter:
        return DeadLetter(
            event=_event(delivery),
            body=delivery.body,
            routing_key=delivery.original_routing_key,
            retries=delivery.retries,
            replays=delivery.replays,
            _delivery=delivery,
            _owner=self,
            **vars(delivery.failure),
        )


def _event(delivery: Delivery) -> DomainEvent[Any] | None:
    try:
        return messages.to_event(delivery)
    except InvalidEvent:
        return None


def retry_event(body: bytes, **kwargs: Any) -> str:
    """The default ``message_callback``: replay each dead letter."""
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
    :raises ValueError: the callback returned anything else; the dead letter is left.
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
        left = sum(
            _decide(dead_letters, delivery, message_callback) == LEAVE
            for delivery in dead_letters._deliveries()
        )
        return dead_letters.count() - left


def _check_callback(message_callback: object) -> None:
    if not callable(message_callback):
        right = "a function that returns RETRY, LEAVE or DISCARD"
        raise refusal(message_callback, "message_callback", right)


def _decide(
    dead_letters: DeadLetters, delivery: Delivery, message_callback: Callable[..., str]
) -> str:
    answer = message_callback(frame=delivery, header=delivery.properties, body=delivery.body)
    if answer == RETRY:
        dead_letters._replay(delivery)
    elif answer == DISCARD:
        dead_letters._settle(delivery)
    elif answer != LEAVE:
        raise ValueError(f"The callback must return RETRY, LEAVE or DISCARD, not {shown(answer)}.")
    return answer
