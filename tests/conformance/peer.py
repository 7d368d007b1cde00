"""Someone who talks to a broker by its protocol (`domain_events.broker`), and nothing above it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from support import wait_until

from domain_events import DomainEventsError, TopologyError
from domain_events.broker import (
    Browser,
    Consumer,
    Consuming,
    Publication,
    Publishing,
    Settlement,
    connect,
)
from domain_events.message import Delivery, Message
from domain_events.topology import Topology

TIMEOUT = 10.0


class Inbox:
    """A consumer, and all that it was ever delivered."""

    def __init__(
        self,
        consuming: Consuming,
        queue: str,
        topology: Topology,
        prefetch: int,
        *,
        careful: bool = False,
    ) -> None:
        self.deliveries: list[Delivery] = []
        self.consumer: Consumer = consuming.consume(
            queue, topology, prefetch, self._deliver, careful=careful
        )

    def _deliver(self, delivery: Delivery, _consumer: Consumer) -> None:
        self.deliveries.append(delivery)

    def wait(self, number: int) -> list[Delivery]:
        """Everything delivered, as soon as it is so many."""
        wait_until(lambda: len(self.deliveries) >= number, message=f"{number} deliveries")
        return list(self.deliveries)

    def bodies(self) -> list[bytes]:
        return [delivery.body for delivery in self.deliveries]

    def settle(self, *deliveries: Delivery, requeue: bool = False) -> None:
        """Settle them, and tell the broker now."""
        how = Settlement.GIVE_BACK if requeue else Settlement.DONE
        for delivery in deliveries:
            self.consumer.settle(delivery, how)
        self.consumer.flush()


class Peer:
    """One connection to publish on, any number to consume on."""

    def __init__(self, url: str, declare: Topology = ()) -> None:
        self.broker = connect((url,))
        self.publishing: Publishing = self.broker.publishing(declare, "peer")
        self._connections: list[Consuming] = []
        self.consuming = self.another_connection()

    def another_connection(self) -> Consuming:
        """A connection to consume on, closed with this peer."""
        self._connections.append(self.broker.consuming("peer", lambda: None))
        return self._connections[-1]

    def declare(self, *topology: Any) -> None:
        self.consuming.declare(topology, TIMEOUT)

    def delete(self, *topology: Any) -> None:
        self.consuming.delete(topology, TIMEOUT)

    def count(self, queue: str) -> int:
        return self.consuming.count(queue, TIMEOUT)

    def exists(self, queue: str) -> bool:
        try:
            self.count(queue)
        except TopologyError as error:
            return "no queue" not in str(error)
        return True

    def wait_for_count(self, queue: str, number: int) -> None:
        """A broker may take a moment to count what it has confirmed or taken back."""
        wait_until(lambda: self.count(queue) == number, message=f"{number} ready in {queue}")

    def submit(self, *messages: Message) -> list[Publication]:
        """Publish without waiting for the confirms."""
        publications = [Publication(message, lambda _: None) for message in messages]
        for publication in publications:
            self.publishing.submit(publication)
        return publications

    def send(self, message: Message) -> DomainEventsError | None:
        """Publish, wait for the confirm, and say what became of it."""
        done = threading.Event()
        publication = Publication(message, lambda _: done.set())
        self.publishing.submit(publication)
        assert done.wait(TIMEOUT), "neither confirmed nor refused"
        assert publication.done
        return publication.error

    def publish(
        self, exchange: str, routing_key: str, *bodies: bytes, mandatory: bool = False
    ) -> None:
        """Publish and have confirmed."""
        for body in bodies:
            error = self.send(Message(exchange, routing_key, body, mandatory=mandatory))
            if error is not None:
                raise error

    def consume(
        self,
        queue: str,
        prefetch: int = 100,
        topology: Topology = (),
        connection: Consuming | None = None,
        *,
        careful: bool = False,
    ) -> Inbox:
        return Inbox(connection or self.consuming, queue, topology, prefetch, careful=careful)

    def browse(self, queue: str) -> Browser:
        return self.consuming.browse(queue, TIMEOUT)

    def take_all(self, queue: str) -> list[bytes]:
        """Take everything out of a queue; the bodies."""
        browser = self.browse(queue)
        taken = walk(browser)
        for delivery in taken:
            browser.ack(delivery, TIMEOUT)
        browser.close(TIMEOUT)
        return [delivery.body for delivery in taken]

    def close(self) -> None:
        for connection in self._connections:
            connection.close(TIMEOUT)
        self.publishing.close(TIMEOUT)


def walk(browser: Browser) -> list[Delivery]:
    """All that the browser sees until the end of the queue."""
    seen: list[Delivery] = []
    while (delivery := browser.next(TIMEOUT)) is not None:
        seen.append(delivery)
    return seen


def bodies(deliveries: Sequence[Delivery]) -> list[bytes]:
    """Their bodies."""
    return [delivery.body for delivery in deliveries]
