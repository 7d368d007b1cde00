"""This library, with its default options."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import driver
from driver import ROUTING_KEY, Data, Handle, Peer


class Ours(Peer):
    def load(self) -> None:
        global DomainEvent, Publisher, Retry, Subscriber, publish_domain_event
        from domain_events import (
            DomainEvent,
            Publisher,
            Retry,
            Subscriber,
            publish_domain_event,
        )

    # -- publishing

    def open_publisher(self) -> None:
        self.publisher = Publisher(self.url)

    def publish(self, data: Data) -> None:
        publish_domain_event(ROUTING_KEY, data, "user-4711", connection_settings=self.url)

    def publish_many(self, many: Iterable[Data]) -> None:
        self.publisher.publish_many(DomainEvent(ROUTING_KEY, data, "user-4711") for data in many)

    # -- consuming

    def prepare(self) -> Data:
        begun = time.perf_counter()
        self.subscriber = Subscriber(self.url, workers=self.workers or 1)
        options: dict[str, Any] = {"queue_type": self.queue_type}
        if self.prefetch:
            options["prefetch_count"] = self.prefetch
        handlers: int = self.options.get("handlers", 0)
        bindings: int = self.options.get("bindings", 0)
        if handlers:
            # Classic and without dead letters: a thousand quorum queues would measure the broker.
            options.update(queue_type="classic", dead_letter=False)
            for number in range(handlers):
                name = f"{self.queue}-{number}"
                self.subscriber.register(self.handle, name, [f"bench.k{number}"], **options)
        else:
            keys = [f"bench.k{n}" for n in range(bindings)] if bindings else ["bench.*"]
            retries = {"max_retries": 1} if self.options.get("retrying") else {}
            self.subscriber.register(self.handle, self.queue, keys, **retries, **options)
        return {"registered_seconds": time.perf_counter() - begun}

    def handle(self, event: Any) -> None:
        delay = self.call(event.data)
        if delay:
            raise Retry(delay)

    def consume(self, handle: Handle) -> None:
        self.call = handle
        self.subscriber.start_consuming()


if __name__ == "__main__":
    driver.main(Ours)
