"""One of two brokers that go in lock step: does what it is given to do, and shows the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from conformance.peer import TIMEOUT, Inbox, Peer
from domain_events import TopologyError
from domain_events.broker import Browser, Consuming, Queue, Settlement
from domain_events.message import Delivery, Message, Place

#: What is compared of a delivery.
Seen: TypeAlias = tuple[object, ...]


def seen(delivery: Delivery) -> Seen:
    """What is the same wherever it is seen."""
    failure = delivery.failure
    return (
        delivery.body,
        delivery.original_routing_key,
        delivery.message_id,
        delivery.retries,
        delivery.hand_backs,
        failure.subscriber,
        failure.error_type,
        failure.error_message,
        failure.first_error_type,
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
        self.url = url
        self.peer = Peer(url)
        self.holders: dict[str, Holder] = {}

    def consume(self, queue: Queue, prefetch_count: int) -> None:
        connection = self.peer.another_connection()
        inbox = self.peer.consume(queue, prefetch_count, connection)
        self.holders[queue.name] = Holder(inbox, connection)

    def settle(self, name: str, number: int, how: Settlement = Settlement.DONE) -> None:
        holder = self.holders[name]
        holder.settled.add(number)
        holder.inbox.settle(holder.inbox.deliveries[number], how=how)

    def delivery(self, name: str, number: int) -> Delivery:
        return self.holders[name].inbox.deliveries[number]

    def stop(self, name: str) -> None:
        self.holders[name].inbox.consumer.stop(TIMEOUT)
        self.holders[name].stopped = True

    def crash(self, name: str) -> None:
        """The connection ends; what was held is not settled."""
        self.holders.pop(name).connection.close(TIMEOUT)

    def declare(self, queue: Queue) -> str:
        """What became of it: empty, or the kind of the error."""
        try:
            self.peer.declare(queue)
        except TopologyError:
            return "TopologyError"
        return ""

    def publish(self, message: Message) -> str:
        """What became of it: empty, or the name of the error."""
        error = self.peer.send(message)
        return "" if error is None else type(error).__name__

    def browse(self, place: Place, most: int) -> tuple[Browser, list[Delivery]]:
        """The first messages that wait there, and who holds them."""
        browser = self.peer.browse(place)
        return browser, self.walk(browser, most)

    def walk(self, browser: Browser, most: int) -> list[Delivery]:
        """The next ones of a walk."""
        found: list[Delivery] = []
        while len(found) < most and (delivery := browser.next(TIMEOUT)) is not None:
            found.append(delivery)
        return found

    def count(self, place: Place | str) -> int | None:
        """How many are ready there; None if nobody may know, or there is no such queue."""
        try:
            return self.peer.count(place)
        except TopologyError:
            return None

    def delivered(self, name: str) -> list[Seen]:
        """All that was delivered of a subscriber's queue, with whether it came again."""
        holder = self.holders.get(name)
        deliveries = holder.inbox.deliveries if holder else []
        return [(*seen(each), each.redelivered) for each in deliveries]

    def look(
        self, names: Sequence[str], places: Sequence[Place]
    ) -> dict[object, int | list[Seen] | None]:
        """All that can be seen: what is ready in each place, and what was delivered."""
        state: dict[object, int | list[Seen] | None] = {
            place: self.count(place) for place in places
        }
        state.update({name: self.delivered(name) for name in names})
        return state
