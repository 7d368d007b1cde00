"""AMQPStorm: confirm_deliveries on a channel of each thread, one connection for all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import driver
from driver import EXCHANGE, ROUTING_KEY, Data, Handle, Peer, body_of


class AmqpStorm(Peer):
    def load(self) -> None:
        global amqpstorm
        import amqpstorm

    # -- publishing

    def open_publisher(self) -> None:
        self.connection = amqpstorm.UriConnection(self.url)
        self.publish = self.for_thread()  # type: ignore[method-assign]

    def for_thread(self) -> Callable[[Data], None]:
        channel = self.connection.channel()
        channel.confirm_deliveries()
        properties = {"content_type": "application/json", "delivery_mode": 2}

        def publish(data: Data) -> None:
            message = amqpstorm.Message.create(channel, body_of(data), properties)
            if not message.publish(ROUTING_KEY, EXCHANGE):
                raise RuntimeError("not confirmed")

        return publish

    # -- consuming

    def consume(self, handle: Handle) -> None:
        def on_message(message: Any) -> None:
            handle(json.loads(message.body)["data"])
            message.ack()

        # As in its example "robust consumer".
        attempts = 0
        while True:
            try:
                channel = amqpstorm.UriConnection(self.url).channel()
                if self.prefetch:
                    channel.basic.qos(self.prefetch)
                channel.basic.consume(on_message, self.queue)
                attempts = 0
                channel.start_consuming()
            except amqpstorm.AMQPError:
                attempts += 1
                time.sleep(min(attempts * 2, 30))


if __name__ == "__main__":
    driver.main(AmqpStorm)
