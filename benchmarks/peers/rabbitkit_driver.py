"""rabbitkit: its batch publishers where its documentation recommends them, else SyncBroker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from typing import Any

import driver
from driver import EXCHANGE, ROUTING_KEY, AsyncPeer, Data, Handle, Peer, body_of


class Again(Exception):
    """Raised by the handler for a retry."""


class RabbitKit(Peer):
    def load(self) -> None:
        global rabbitkit, config, types, topology
        import rabbitkit
        from rabbitkit.core import config, topology, types

    def settings(self, **others: Any) -> Any:
        connection = config.ConnectionConfig.from_url(self.url)
        return rabbitkit.RabbitConfig(connection=connection, **others)

    def message(self, data: Data) -> Any:
        return types.MessageEnvelope(
            routing_key=ROUTING_KEY, body=body_of(data), exchange=EXCHANGE, delivery_mode=2
        )

    # -- publishing

    def open_publisher(self) -> None:
        self.broker = rabbitkit.SyncBroker(self.settings())
        self.broker.start()

    def publish(self, data: Data) -> None:
        self.broker.publish(self.message(data)).raise_for_status()

    def publish_many(self, many: Iterable[Data]) -> None:
        """ "For high-throughput confirmed publishing use AsyncBroker + AsyncBatchPublisher"."""
        bulk = getattr(self, "bulk", None)
        if bulk is None:
            self.bulk = bulk = Bulk(self)
        bulk.publish_many(many)

    def for_thread(self) -> Callable[[Data], None]:
        batch = self.batch

        def publish(data: Data) -> None:
            batch.publish(self.message(data)).raise_for_status()

        return publish

    def from_many(self, threads: int, seconds: float) -> int:
        connection = config.ConnectionConfig.from_url(self.url)
        with rabbitkit.SyncBatchPublisher(connection) as self.batch:
            return super().from_many(threads, seconds)

    # -- consuming

    def prepare(self) -> Data:
        consumer = config.ConsumerConfig(prefetch_count=self.prefetch) if self.prefetch else None
        others = {"consumer": consumer} if consumer else {}
        self.broker = rabbitkit.SyncBroker(self.settings(**others))
        kinds = topology.QueueType
        queue = topology.RabbitQueue(
            self.queue,
            routing_key="bench.*",
            queue_type=kinds.QUORUM if self.queue_type == "quorum" else kinds.CLASSIC,
        )
        exchange = topology.RabbitExchange(EXCHANGE, type=types.ExchangeType.TOPIC, durable=True)
        retry = {}
        if self.options.get("retrying"):
            retry["retry"] = config.RetryConfig(
                max_retries=1,
                delays=(int(self.delay),),
                delay_queue_type="inherit",
                unknown_policy=types.ErrorSeverity.TRANSIENT,
            )

        @self.broker.subscriber(queue, exchange, "bench.*", **retry)
        def on_event(body: bytes) -> None:
            if self.call(json.loads(body)["data"]):
                raise Again

        # It declares when it starts, and then consumes at once; for a queue to be filled before,
        # it starts and stops once.
        self.call = lambda _data: 0.0
        self.broker.start()
        self.broker.stop()
        return {}

    def consume(self, handle: Handle) -> None:
        self.call = handle
        workers = [config.WorkerConfig(worker_count=self.workers)] if self.workers else []
        self.broker.run(*workers)


class Bulk(AsyncPeer):
    """Its asynchronous half, for publishing in bulk."""

    def __init__(self, peer: RabbitKit) -> None:
        super().__init__(peer.options)
        self.peer = peer
        self.start()

    async def open(self) -> None:
        self.broker = rabbitkit.AsyncBroker(
            self.peer.settings(), batch_config=config.BatchPublishConfig()
        )
        await self.broker.start()

    async def apublish(self, data: Data) -> None:
        outcome = await self.broker.publish(self.peer.message(data))
        outcome.raise_for_status()


if __name__ == "__main__":
    asyncio.set_event_loop_policy(None)
    driver.main(RabbitKit)
