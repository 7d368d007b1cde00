"""A program of a user that kills itself at one point of an event's way.

    python transactions.py DATABASE URL EXCHANGE QUEUE WHAT POINT

WHAT is ``publish`` or ``publish with an outbox``, ``handle`` or ``handle once``.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from sqlalchemy import Connection, Engine, create_engine, text

from domain_events import DomainEvent, Middleware, Operation, Outgoing, Subscriber, configure
from domain_events.sqlalchemy import Outbox, once, publish_on_commit

_, DATABASE, URL, EXCHANGE, QUEUE, WHAT, POINT = sys.argv


def reach(point: str) -> None:
    if point == POINT:
        os.kill(os.getpid(), signal.SIGKILL)


class Points(Middleware):
    """Before an event is sent, and when it was confirmed."""

    def publishing(self, outgoing: Outgoing) -> Callable[[object], None] | None:
        if outgoing.operation is Operation.OUTBOX:  # it is written
            return None
        reach("before the publish")
        return lambda _: reach("after the confirm")


def store(connection: Connection, name: str) -> None:
    connection.execute(text("INSERT INTO work (name) VALUES (:name)"), {"name": name})


def publish(engine: Engine) -> None:
    outbox = Outbox(engine)
    if "outbox" in WHAT:
        outbox.switch_on()
    with engine.begin() as connection:
        store(connection, "work")
        publish_on_commit(connection, "work.done", {}, exchange=EXCHANGE)
        reach("before the commit")
    outbox.wait(60)


def handle(engine: Engine) -> None:
    Outbox(engine).switch_on()
    if "once" in WHAT:

        @once(engine)
        def work(connection: Connection, event: DomainEvent) -> None:
            store(connection, event.uuid_string)
            publish_on_commit(connection, "work.done", {}, exchange=EXCHANGE)
            reach("in the handler")

        def handler(event: DomainEvent) -> None:
            work(event)
            reach("before the ack")
            print("handled", flush=True)

    else:

        def handler(event: DomainEvent) -> None:
            with engine.begin() as connection:
                store(connection, event.uuid_string)
                reach("in the handler")
            reach("before the ack")
            print("handled", flush=True)

    subscriber = Subscriber(URL, exchange=EXCHANGE)
    subscriber.register(handler, QUEUE, ["work.ordered"])
    print("ready", flush=True)
    subscriber.start_consuming()


def main() -> None:
    configure(URL, middleware=[Points()])
    engine = create_engine(DATABASE, connect_args={"timeout": 30})
    if WHAT.startswith("publish"):
        publish(engine)
    else:
        handle(engine)


main()
