"""faststream-outbox, whose rows FastStream's RabbitMQ publisher relays."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import outbox_driver
from driver import EXCHANGE, ROUTING_KEY
from outbox_driver import INSERT, ORDERS, OUTBOX, event_of, postgresql

_QUEUE = "bench"


class FastStreamOutbox(outbox_driver.Outbox):
    def load(self) -> None:
        from faststream_outbox import OutboxBroker, make_outbox_table
        from sqlalchemy import MetaData, text
        from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

        logging.disable(logging.INFO)
        self.metadata = MetaData()
        table = make_outbox_table(self.metadata, table_name="outbox")
        self.engine = create_async_engine(postgresql(self.database, "asyncpg"))
        self.broker = OutboxBroker(self.engine, outbox_table=table)
        self.sessions = async_sessionmaker(self.engine, expire_on_commit=False)
        self.text = text
        self.loop = asyncio.new_event_loop()

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.loop.run_until_complete(coroutine)

    def create(self) -> None:
        from faststream_outbox import outbox_autovacuum_ddl

        async def create() -> None:
            async with self.engine.begin() as connection:
                await connection.run_sync(self.metadata.create_all)
                await connection.execute(self.text(outbox_autovacuum_ddl("outbox")))
                await connection.execute(self.text(ORDERS))

        self._run(create())

    def write(self, numbers: Sequence[int]) -> None:
        async def write() -> None:
            async with self.sessions() as session, session.begin():
                for number in numbers:
                    await self.broker.publish(event_of(number), queue=_QUEUE, session=session)

        self._run(write())

    def transact(self, number: int, kind: str) -> None:
        async def transact() -> None:
            async with self.sessions() as session, session.begin():
                order = {"id": number, "about": "me"}
                await session.execute(self.text(f"{INSERT} (:id, :about)"), order)
                if kind == OUTBOX:
                    await self.broker.publish(event_of(number), queue=_QUEUE, session=session)

        self._run(transact())

    def relay(self, ready: Callable[[], None]) -> None:
        from faststream import FastStream
        from faststream.rabbit import ExchangeType, RabbitBroker, RabbitExchange

        broker_rabbit = RabbitBroker(self.url, logger=None)
        exchange = RabbitExchange(EXCHANGE, type=ExchangeType.TOPIC, durable=True)
        publisher = broker_rabbit.publisher(
            exchange=exchange, routing_key=ROUTING_KEY, persist=True
        )
        options = self.options.get("subscriber", {})

        @publisher
        @self.broker.subscriber(_QUEUE, **options)
        async def relay(body: dict) -> dict:
            return body

        async def connect() -> None:
            await broker_rabbit.start()
            ready()

        self._run(FastStream(self.broker, on_startup=[connect], logger=None).run())


if __name__ == "__main__":
    outbox_driver.main(FastStreamOutbox)
