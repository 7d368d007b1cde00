"""domain-event-broker: a connection for every event, no confirms; one event at a time."""

from __future__ import annotations

from typing import Any

import driver
from driver import ROUTING_KEY, Data, Handle, Peer


class DomainEventBroker(Peer):
    def load(self) -> None:
        global domain_event_broker
        import domain_event_broker

    # -- publishing

    def publish(self, data: Data) -> None:
        domain_event_broker.publish_domain_event(
            ROUTING_KEY, data, "user-4711", connection_settings=self.url
        )

    # -- consuming

    def prepare(self) -> Data:
        self.subscriber = domain_event_broker.Subscriber(self.url)
        retries = {"max_retries": 1} if self.options.get("retrying") else {}
        self.subscriber.register(self.handle, self.queue, ["bench.*"], **retries)
        return {"taken": 1}  # it consumes from here on, one at a time

    def handle(self, event: Any) -> None:
        delay = self.call(event.data)
        if delay:
            raise domain_event_broker.Retry(delay)

    def consume(self, handle: Handle) -> None:
        self.call = handle
        self.subscriber.start_consuming()


if __name__ == "__main__":
    driver.main(DomainEventBroker)
