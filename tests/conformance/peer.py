"""Someone who talks to a broker by its protocol (`domain_events.broker`), and nothing above it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TypedDict

from support import wait_until

from domain_events import DomainEventsError, TopologyError
from domain_events.broker import (
    Browser,
    Consumer,
    Consuming,
    Exchange,
    Publication,
    Publishing,
    Queue,
    Settlement,
    connect,
)
from domain_events.message import Delivery, Destination, Message, Place, ToSubscriber

TIMEOUT = 10.0

#: The routing key of events whose routing key does not matter.
KEY = "a.b"


class Kind(TypedDict, total=False):
    """What makes one queue another one than the next: options of `Queue`."""

    dead_letters: bool
    delays: bool
    durable: bool
    exclusive: bool
    auto_delete: bool
    classic: bool


class Inbox:
    """A consumer, and all that it was ever delivered."""

    def __init__(self, consuming: Consuming, queue: Queue, prefetch_count: int) -> None:
        self.deliveries: list[Delivery] = []
        self.consumer: Consumer = consuming.consume(queue, prefetch_count, self._deliver)

    def _deliver(self, delivery: Delivery, _consumer: Consumer) -> None:
        self.deliveries.append(delivery)

    def wait(self, number: int) -> list[Delivery]:
        """All deliveries, as soon as there are so many."""
        wait_until(lambda: len(self.deliveries) >= number, message=f"{number} deliveries")
        return list(self.deliveries)

    def bodies(self) -> list[bytes]:
        return bodies(self.deliveries)

    def settle(self, *deliveries: Delivery, how: Settlement = Settlement.DONE) -> None:
        """Settle them, and send that to the broker now."""
        for delivery in deliveries:
            self.consumer.settle(delivery, how)
        self.consumer.flush()

    def give_back(self, *deliveries: Delivery) -> None:
        self.settle(*deliveries, how=Settlement.GIVE_BACK)

    def fail(self, *deliveries: Delivery) -> None:
        self.settle(*deliveries, how=Settlement.FAILED)


class Peer:
    """One connection to publish on, any number to consume on."""

    def __init__(self, url: str, declare: Exchange | None = None) -> None:
        self.broker = connect((url,))
        self.publishing: Publishing = self.broker.publishing("peer", declare)
        self._connections: list[Consuming] = []
        self.consuming = self.another_connection()

    def another_connection(self) -> Consuming:
        """A connection to consume on, closed with this peer."""
        self._connections.append(self.broker.consuming("peer", lambda: None))
        return self._connections[-1]

    def declare(self, *queues: Queue) -> None:
        for queue in queues:
            self.consuming.declare(queue, TIMEOUT)

    def delete(self, *names: str, exchange: str | None = None) -> None:
        """Delete subscribers with their dead letters, and the exchange if one is named."""
        # The protocol wants one, and does not mind one that does not exist.
        self.consuming.delete(names, exchange or "domain-events-tests-nothing", TIMEOUT)

    def count(self, place: Place | str) -> int:
        """How many are ready there, or in the queue of the subscriber of that name."""
        return self.consuming.count(_place(place), TIMEOUT)

    def exists(self, place: Place | str) -> bool:
        """Whether the queue exists, and is not exclusive to another connection."""
        try:
            self.count(place)
        except TopologyError:
            return False
        return True

    def wait_for_count(self, place: Place | str, number: int) -> None:
        """A broker may take a moment to count what it has confirmed or taken back."""
        wait_until(lambda: self.count(place) == number, message=f"{number} ready in {place}")

    def submit(self, *messages: Message) -> list[Publication]:
        """Publish without waiting for the confirms."""
        publications = [Publication(message, lambda _: None) for message in messages]
        for publication in publications:
            self.publishing.submit(publication)
        return publications

    def send(self, message: Message) -> DomainEventsError | None:
        """Publish, and wait for the confirm: the error, if it was not confirmed."""
        done = threading.Event()
        publication = Publication(message, lambda _: done.set())
        self.publishing.submit(publication)
        assert done.wait(TIMEOUT), "neither confirmed nor refused"
        assert publication.done
        return publication.error

    def publish(
        self, to: Destination, *bodies: bytes, key: str = KEY, mandatory: bool = False
    ) -> None:
        """Publish, and have each confirmed."""
        for body in bodies:
            error = self.send(Message(to, key, body, mandatory=mandatory))
            if error is not None:
                raise error

    def is_unroutable(self, to: Destination, *, key: str = KEY, body: bytes = b"") -> bool:
        """Whether a message that must reach a queue is refused."""
        return self.send(Message(to, key, body, mandatory=True)) is not None

    def consume(
        self, queue: Queue, prefetch_count: int = 100, connection: Consuming | None = None
    ) -> Inbox:
        return Inbox(connection or self.consuming, queue, prefetch_count)

    def browse(self, place: Place | str, connection: Consuming | None = None) -> Browser:
        return (connection or self.consuming).browse(
            _place(place), TIMEOUT, lambda: self.publishing
        )

    def look(self, place: Place | str) -> list[Delivery]:
        """All that is there, and stays there."""
        browser = self.browse(place)
        seen = walk(browser)
        browser.close(TIMEOUT)
        return seen

    def take_all(self, place: Place | str) -> list[bytes]:
        """Take everything out of a queue; the bodies."""
        browser = self.browse(place)
        taken = walk(browser)
        for delivery in taken:
            browser.ack(delivery, TIMEOUT)
        browser.close(TIMEOUT)
        return bodies(taken)

    def close(self) -> None:
        for connection in self._connections:
            connection.close(TIMEOUT)
        self.publishing.close(TIMEOUT)


def _place(place: Place | str) -> Place:
    return ToSubscriber(place) if isinstance(place, str) else place


def walk(browser: Browser) -> list[Delivery]:
    """All that the browser sees until the end of the queue."""
    seen: list[Delivery] = []
    while (delivery := browser.next(TIMEOUT)) is not None:
        seen.append(delivery)
    return seen


def bodies(deliveries: Sequence[Delivery]) -> list[bytes]:
    """Their bodies."""
    return [delivery.body for delivery in deliveries]
