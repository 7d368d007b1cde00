"""Dead letters: what a subscriber failed on, to be browsed, replayed, discarded, or left.

Browsing takes nothing out. A replay is one movement: the event is confirmed in the subscriber's
queue before it is acked among the dead letters. What is left stays; each walk sees a dead letter
once, so that a walk ends even while new ones arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any

from domain_events import message as messages
from domain_events import settings, topology
from domain_events.broker import Browser, Consuming, Publishing, close_dropped, connect
from domain_events.errors import (
    DomainEventsError,
    EventUnroutable,
    InvalidEvent,
    TopologyError,
)
from domain_events.events import DomainEvent
from domain_events.message import Delivery
from domain_events.publisher import confirmed
from domain_events.settings import DEFAULT, ConnectionSettings

RETRY = "retry"
LEAVE = "leave"
DISCARD = "discard"

_CLOSE_TIMEOUT = 10.0


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
        self._owner._discard(self._delivery)

    def __repr__(self) -> str:
        event = self.event or f"{len(self.body)} bytes that are no event"
        return f"<DeadLetter {event}: {self.error_type}: {self.error_message}>"


class DeadLetters:
    """The dead letters of the subscriber ``name``. Iterate to see each one once.

    ::

        with DeadLetters('print-user-event') as dead_letters:
            for letter in dead_letters:
                if letter.error_type == 'TimeoutError':
                    letter.replay()

    What is neither replayed nor discarded is left. The dead letters that a walk has passed are
    held until the next one begins or `close` is called; until then they can be settled, and
    others do not see them.

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
        self.name = topology.check_name(name, "subscriber")
        self._queue = topology.dead_letter_name(name)
        self._timeout = timeout
        urls = settings.resolve(connection_settings)
        self._broker = None if urls is None else connect(urls)
        self._consuming: Consuming | None = None
        self._publishing: Publishing | None = None
        self._browser: Browser | None = None
        # What the current walk has passed and is not settled.
        self._held: set[Delivery] = set()

    def count(self) -> int:
        """How many there are, but for those that somebody else's walk holds.

        :raises TopologyError: this subscriber keeps no dead letters.
        """
        return self._count_ready() + len(self._held)

    def __iter__(self) -> Iterator[DeadLetter]:
        for delivery in self._deliveries():
            yield self._letter(delivery)

    def _deliveries(self) -> Iterator[Delivery]:
        """The dead letters as messages: those that are there now, each one once."""
        if self._broker is None:
            return
        if self._browser is None:
            self._browser = self._connection().browse(self._queue, self._timeout)
        else:
            self._held.clear()
            self._browser.rewind()
        delivery = self._next()
        # Those that come while the walk goes on are left for the next one.
        behind = delivery.message_count if delivery is not None else 0
        while delivery is not None:
            self._held.add(delivery)
            yield delivery
            delivery = self._next() if behind else None
            behind -= 1

    def replay_all(self) -> int:
        """Replay all that are there now; says how many that were."""
        return self._all(DeadLetter.replay)

    def discard_all(self) -> int:
        """Delete all that are there now, for good; says how many that were."""
        return self._all(DeadLetter.discard)

    def close(self) -> None:
        """Let go of what is left, and close the connections."""
        browser, self._browser = self._browser, None
        consuming, self._consuming = self._consuming, None
        publishing, self._publishing = self._publishing, None
        self._held.clear()
        try:
            if browser is not None:
                browser.close(self._timeout)
        finally:
            if consuming is not None:
                consuming.close(_CLOSE_TIMEOUT)
            if publishing is not None:
                publishing.close(_CLOSE_TIMEOUT)

    def __enter__(self) -> DeadLetters:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self, close_dropped: Callable[..., None] = close_dropped) -> None:
        # Without it, the connections and their threads would stay for ever.
        connections = (getattr(self, name, None) for name in ("_consuming", "_publishing"))
        close_dropped(self, *connections)

    def _all(self, action: Callable[[DeadLetter], None]) -> int:
        number = 0
        for letter in self:
            action(letter)
            number += 1
        return number

    def _next(self) -> Delivery | None:
        if self._browser is None:
            raise RuntimeError("This walk is over: another one began, or it was closed.")
        try:
            return self._browser.next(self._timeout)
        except DomainEventsError:
            # Its connection is gone, and all it held is back in the queue.
            self._browser = None
            self._held.clear()
            raise

    def _replay(self, delivery: Delivery) -> None:
        self._check_held(delivery)
        if self._publishing is None:
            assert self._broker is not None
            self._publishing = self._broker.publishing((), "dead letters")
        try:
            confirmed(self._publishing, messages.replay(delivery, self.name), self._timeout)
        except EventUnroutable as error:
            raise TopologyError(
                f"There is no queue {self.name!r} to replay into: its subscriber must have "
                "registered first. The dead letter is left."
            ) from error
        self._discard(delivery)

    def _discard(self, delivery: Delivery) -> None:
        self._check_held(delivery)
        assert self._browser is not None
        self._browser.ack(delivery, self._timeout)
        self._held.discard(delivery)

    def _check_held(self, delivery: Delivery) -> None:
        if delivery not in self._held:
            raise RuntimeError(
                "This dead letter was settled already, or its walk is over; begin another one."
            )

    def _count_ready(self) -> int:
        if self._broker is None:
            return 0
        return self._connection().count(self._queue, self._timeout)

    def _connection(self) -> Consuming:
        if self._consuming is None:
            assert self._broker is not None
            self._consuming = self._broker.consuming("dead letters", lambda: None)
        return self._consuming

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
    with DeadLetters(queue_name, connection_settings) as dead_letters:
        for delivery in dead_letters._deliveries():
            _decide(dead_letters, delivery, message_callback)
        return dead_letters._count_ready()


def _decide(
    dead_letters: DeadLetters, delivery: Delivery, message_callback: Callable[..., str]
) -> None:
    answer = message_callback(frame=delivery, header=delivery.properties, body=delivery.body)
    if answer == RETRY:
        dead_letters._replay(delivery)
    elif answer == DISCARD:
        dead_letters._discard(delivery)
    elif answer != LEAVE:
        raise ValueError(f"Answer RETRY, LEAVE or DISCARD to a dead letter, not {answer!r}.")
