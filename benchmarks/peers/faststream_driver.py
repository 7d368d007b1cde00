"""FastStream: ``broker.publish(persist=True)``, and a subscriber that acks after its handler."""

from __future__ import annotations

from typing import Any

import driver
from driver import EXCHANGE, ROUTING_KEY, AsyncPeer, Data, Handle, envelope


class FastStream(AsyncPeer):
    def load(self) -> None:
        global rabbit, AckPolicy
        from faststream import AckPolicy, rabbit

    def exchange(self) -> Any:
        return rabbit.RabbitExchange(EXCHANGE, type=rabbit.ExchangeType.TOPIC, durable=True)

    # -- publishing

    async def open(self) -> None:
        self.broker = rabbit.RabbitBroker(self.url, logger=None)
        await self.broker.start()
        self.to = self.exchange()

    async def apublish(self, data: Data) -> None:
        await self.broker.publish(
            envelope(data), exchange=self.to, routing_key=ROUTING_KEY, persist=True
        )

    # -- consuming

    async def aconsume(self, handle: Handle) -> None:
        default = rabbit.Channel(prefetch_count=self.prefetch) if self.prefetch else None
        self.broker = rabbit.RabbitBroker(self.url, logger=None, default_channel=default)
        queue = rabbit.RabbitQueue(self.queue, declare=False, durable=True)

        @self.broker.subscriber(queue, ack_policy=AckPolicy.NACK_ON_ERROR)
        async def on_event(event: dict[str, Any]) -> None:
            handle(event["data"])

        await self.broker.start()


if __name__ == "__main__":
    driver.main(FastStream)
