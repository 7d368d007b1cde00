"""aio-pika: connect_robust, confirms awaited together in bulk, ``message.process()``."""

from __future__ import annotations

import json
from typing import Any

import driver
from driver import EXCHANGE, ROUTING_KEY, AsyncPeer, Data, Handle, body_of


class AioPika(AsyncPeer):
    def load(self) -> None:
        global aio_pika
        import aio_pika

    # -- publishing

    async def open(self) -> None:
        self.connection = await aio_pika.connect_robust(self.url)
        channel = await self.connection.channel(publisher_confirms=True)
        self.exchange = await channel.get_exchange(EXCHANGE)

    async def apublish(self, data: Data) -> None:
        message = aio_pika.Message(
            body_of(data),
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        await self.exchange.publish(message, ROUTING_KEY)

    # -- consuming

    async def aconsume(self, handle: Handle) -> None:
        async def on_message(message: Any) -> None:
            async with message.process():
                handle(json.loads(message.body)["data"])

        self.connection = await aio_pika.connect_robust(self.url)
        channel = await self.connection.channel()
        if self.prefetch:
            await channel.set_qos(prefetch_count=self.prefetch)
        queue = await channel.get_queue(self.queue)
        await queue.consume(on_message)


if __name__ == "__main__":
    driver.main(AioPika)
