"""dramatiq: an actor, ``confirm_delivery=True``. Messages, queues and exchange are its own.

It has no exchange with bindings (one message goes to one actor) and no quorum queues.
"""

from __future__ import annotations

import threading
from typing import Any

import driver
from driver import Data, Handle, Peer, data_of, envelope

# A placeholder for an event's number; nothing else in a message looks like it.
_NUMBER = 987654321987


class Dramatiq(Peer):
    def load(self) -> None:
        global dramatiq, rabbitmq
        import dramatiq
        from dramatiq.brokers import rabbitmq

        self.broker = rabbitmq.RabbitmqBroker(url=self.url, confirm_delivery=True)
        dramatiq.set_broker(self.broker)

        @dramatiq.actor(queue_name=self.queue, max_retries=1)
        def on_event(event: dict[str, Any]) -> None:
            delay = self.call(event["data"])
            if delay:
                raise dramatiq.Retry(delay=int(delay * 1000))

        self.actor = on_event

    # -- publishing

    def publish(self, data: Data) -> None:
        self.actor.send(envelope(data))

    # -- consuming

    def prepare(self) -> Data:
        self.broker.declare_queue(self.queue, ensure=True)
        # The template with which the runner fills the queue, with an id and a number filled in.
        message = self.actor.message(envelope(data_of(_NUMBER)))
        body = message.copy(message_id="__ID__").encode().decode()
        return {
            "body": body.replace(str(_NUMBER), "__N__"),
            "exchange": "",
            "routing_key": self.queue,
        }

    def consume(self, handle: Handle) -> None:
        self.call = handle
        workers = {"worker_threads": self.workers} if self.workers else {}
        dramatiq.Worker(self.broker, **workers).start()
        threading.Event().wait()


if __name__ == "__main__":
    driver.main(Dramatiq)
