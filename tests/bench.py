"""A workbench for tests: an exchange of one's own, a publisher and subscribers on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from support import Names

from domain_events import DomainEvent, Publisher, Subscriber

Events = list[DomainEvent]


class Bench:
    """An exchange of its own, a publisher and subscribers on it."""

    def __init__(self, url: str, names: Names) -> None:
        self.url = url
        self.names = names
        self.exchange = names.exchange()
        self.publisher = Publisher(url, self.exchange)

    def subscriber(self, **options: float) -> Subscriber:
        return Subscriber(self.url, self.exchange, **options)  # type: ignore[arg-type]

    def publish(
        self, routing_key: str, data: object = None, about: str | None = None
    ) -> DomainEvent:
        return self.publisher.publish(DomainEvent(routing_key, data, about))


def stops_after(number: int, subscriber: Subscriber, seen: Events) -> Callable[[DomainEvent], None]:
    """A handler that collects events, and stops the subscriber after so many."""

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        if len(seen) >= number:
            subscriber.stop_consuming()

    return handle


@contextmanager
def running(*subscribers: Subscriber) -> Iterator[None]:
    """Have the subscribers consume, each in a thread, until the block ends."""
    threads = [threading.Thread(target=subscriber.start_consuming) for subscriber in subscribers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for subscriber in subscribers:
            subscriber.stop_consuming()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
