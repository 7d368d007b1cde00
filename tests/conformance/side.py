"""One of two brokers that go in lock step: does as it is told, and says what can be seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from conformance.peer import TIMEOUT, Inbox, Peer
from domain_events import TopologyError
from domain_events.broker import Browser, Consuming
from domain_events.message import Delivery, Message
from domain_events.topology import Topology

#: What is compared of a delivery.
Seen: TypeAlias = tuple[bytes, str, str, bool, int, str]


def seen(delivery: Delivery) -> Seen:
    return (
        delivery.body,
        delivery.exchange,
        delivery.routing_key,
        delivery.redelivered,
        delivery.retries,
        delivery.original_routing_key,
    )


@dataclass
class Holder:
    """A consumer with a connection of its own, so that it can crash alone."""

    inbox: Inbox
    connection: Consuming
    settled: set[int] = field(default_factory=set)
    stopped: bool = False

    def held(self) -> list[int]:
        """The numbers of the deliveries that are not settled."""
        numbers = range(len(self.inbox.deliveries))
        return [number for number in numbers if number not in self.settled]


class Side:
    """A broker, and all who consume from it."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.peer = Peer(url)
        self.holders: dict[str, Holder] = {}

    def consume(self, queue: str, prefetch: int, topology: Topology) -> None:
        connection = self.peer.another_connection()
        inbox = self.peer.consume(queue, prefetch, topology, connection)
        self.holders[queue] = Holder(inbox, connection)

    def settle(self, queue: str, number: int, *, requeue: bool = False) -> None:
        holder = self.holders[queue]
        holder.settled.add(number)
        holder.inbox.settle(holder.inbox.deliveries[number], requeue=requeue)

    def delivery(self, queue: str, number: int) -> Delivery:
        return self.holders[queue].inbox.deliveries[number]

    def stop(self, queue: str) -> None:
        self.holders[queue].inbox.consumer.stop(TIMEOUT)
        self.holders[queue].stopped = True

    def crash(self, queue: str) -> None:
        """The connection ends; what was held is not settled."""
        self.holders.pop(queue).connection.close(TIMEOUT)

    def publish(self, message: Message) -> str:
        """What became of it: empty, or the name of the error."""
        error = self.peer.send(message)
        return "" if error is None else type(error).__name__

    def browse(self, queue: str, most: int) -> tuple[Browser, list[Delivery]]:
        """The first messages of the queue, and who holds them."""
        browser = self.peer.browse(queue)
        found: list[Delivery] = []
        while len(found) < most and (delivery := browser.next(TIMEOUT)) is not None:
            found.append(delivery)
        return browser, found

    def count(self, queue: str) -> int | None:
        """How many are ready; None if there is no such queue."""
        try:
            return self.peer.count(queue)
        except TopologyError:
            return None

    def look(self, queues: Sequence[str]) -> dict[str, tuple[int | None, list[Seen]]]:
        """All that can be seen: what is ready in each queue, and what was delivered from it."""
        state = {}
        for queue in queues:
            holder = self.holders.get(queue)
            delivered = [seen(each) for each in holder.inbox.deliveries] if holder else []
            state[queue] = (self.count(queue), delivered)
        return state
