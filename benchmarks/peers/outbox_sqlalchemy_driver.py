"""This library's outbox, with SQLAlchemy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import outbox_driver
from driver import EXCHANGE, ROUTING_KEY, Data
from outbox_driver import AFTER, INSERT, ORDERS, OUTBOX, WITHOUT, about, event_of, postgresql

from domain_events import DomainEvent, Subscriber, configure, outbox


class Ours(outbox_driver.Outbox):
    kinds = (WITHOUT, AFTER, OUTBOX)

    def load(self) -> None:
        import sqlalchemy
        from sqlalchemy.orm import Session

        from domain_events.sqlalchemy import Outbox, publish_on_commit

        configure(self.url)
        self.engine = sqlalchemy.create_engine(postgresql(self.database, "psycopg"))
        self.outbox = Outbox(self.engine)
        self.session = Session
        self.text = sqlalchemy.text
        self.publish = publish_on_commit

    def create(self) -> None:
        from sqlalchemy import MetaData

        from domain_events.sqlalchemy import outbox_table

        metadata = MetaData()
        outbox_table(metadata)
        metadata.create_all(self.engine)
        with self.engine.begin() as connection:
            connection.execute(self.text(ORDERS))

    def write(self, numbers: Sequence[int]) -> None:
        """Leased to nobody, as what a process that has died left behind half a minute ago."""
        from domain_events.sqlalchemy.outbox import executing

        with self.engine.begin() as connection:
            for number in numbers:
                outbox.write(executing(connection), "postgresql", domain_event(number))

    def transact(self, number: int, kind: str) -> None:
        with self.session(self.engine) as session, session.begin():
            session.execute(self.text(f"{INSERT} (:id, :about)"), {"id": number, "about": "me"})
            if kind != WITHOUT:
                self._publish(session, number, kind)

    def _publish(self, session: Any, number: int, kind: str) -> None:
        data: Data = event_of(number)["data"]
        box = self.outbox if kind == OUTBOX else None
        self.publish(session, ROUTING_KEY, data, about(number), exchange=EXCHANGE, outbox=box)

    def settle(self) -> None:
        assert self.outbox.wait(60)

    def relay(self, ready: Callable[[], None]) -> None:
        relay = self.outbox.relay()
        ready()
        relay.run()

    def handle(self, handle: Callable[[int], None]) -> None:
        subscriber = Subscriber()
        subscriber.register(
            lambda event: handle(event.data["n"]), self.options["queue"], [ROUTING_KEY]
        )
        outbox_driver.say(ready=True)
        subscriber.start_consuming()


def domain_event(number: int) -> DomainEvent[Any]:
    return DomainEvent(ROUTING_KEY, event_of(number)["data"], about(number))


if __name__ == "__main__":
    outbox_driver.main(Ours)
