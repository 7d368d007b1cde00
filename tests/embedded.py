"""What `onlooker` does, on the embedded broker: it can only be reached through the library.

Queues have the names that they have on RabbitMQ, and what an event carries besides its envelope is
in headers of the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from domain_events import TopologyError
from domain_events.broker import Consuming, Exchange, Queue, confirm, connect, memory
from domain_events.message import (
    Later,
    Message,
    Place,
    ToDeadLetters,
    ToExchange,
    ToSubscriber,
    UndeliveredOf,
)

TIMEOUT = 5.0

# What there is of a message's properties; it has no others.
_PROPERTIES = {"message_id", "correlation_id", "timestamp", "app_id"}
# Words of the address of a retry, before the subscriber's name.
_LEVELS = 24


def is_embedded(url: str) -> bool:
    """Whether this is the URL of an embedded broker."""
    return url.startswith("memory:")


def place(queue: str) -> Place:
    """The place that is this queue on RabbitMQ."""
    if queue.endswith("-dl"):
        return ToDeadLetters(queue.removesuffix("-dl"))
    exchange, _, end = queue.rpartition(".")
    if end == "undelivered":
        return UndeliveredOf(exchange)
    exchange, delay, _ = queue.rpartition(".delay.")
    return UndeliveredOf(exchange) if delay else ToSubscriber(queue)


@contextmanager
def consuming(url: str) -> Iterator[Consuming]:
    """A connection of its own."""
    connection = connect((url,)).consuming("onlooker", lambda: None)
    try:
        yield connection
    finally:
        connection.close(TIMEOUT)


def count(url: str, queue: str) -> int:
    """How many messages are ready in a queue."""
    with consuming(url) as connection:
        return connection.count(place(queue), TIMEOUT)


def exists(url: str, queue: str) -> bool:
    """Whether the queue exists."""
    try:
        count(url, queue)
    except TopologyError as error:
        return "no queue" not in str(error)
    return True


def take(url: str, queue: str, most: int) -> list[tuple[Any, bytes]]:
    """Take up to so many messages out of a queue: the properties and the body of each."""
    taken: list[tuple[Any, bytes]] = []
    broker = connect((url,))
    with consuming(url) as connection:
        browser = connection.browse(place(queue), TIMEOUT, lambda: broker.publishing("onlooker"))
        while len(taken) < most:
            delivery = browser.next(TIMEOUT)
            if delivery is None:
                break
            browser.ack(delivery, TIMEOUT)
            properties = delivery.properties
            properties.headers = _headers(delivery)
            taken.append((properties, delivery.body))
        browser.close(TIMEOUT)
    return taken


def _headers(delivery: Any) -> dict[str, object]:
    headers: dict[str, object] = {
        "cause": delivery.cause,
        "retries": delivery.retries,
        "hand-backs": delivery.hand_backs,
        "routing-key": None if delivery.exchange else delivery.published_routing_key,
        **{name.replace("_", "-"): value for name, value in vars(delivery.failure).items()},
    }
    return {
        f"domain-events-{name}": value.isoformat() if isinstance(value, datetime) else value
        for name, value in headers.items()
        if value
    }


def publish(url: str, exchange: str, routing_key: str, body: bytes, **properties: Any) -> None:
    """Publish as any other program might; straight into the queue if the exchange is ``""``.

    Headers and other properties that the embedded broker has no use for are dropped.
    """
    known = {name: value for name, value in properties.items() if name in _PROPERTIES}
    if exchange.endswith(".undelivered"):
        retry = Later(exchange.removesuffix(".undelivered"), routing_key.split(".", _LEVELS)[-1], 0)
        undelivered = memory.MemoryDelivery(Message(retry, "", body, **known))
        store = memory.store(url.removeprefix("memory://"))
        store.call(lambda: store.put(place(exchange), undelivered))
        return
    to = ToExchange(exchange) if exchange else place(routing_key)
    assert not isinstance(to, UndeliveredOf)
    # What is put straight into a queue has no routing key of an event.
    message = Message(to, routing_key if exchange else "", body, mandatory=True, **known)
    confirm(connect((url,)).publishing("onlooker"), message, TIMEOUT)


def bind_queue(url: str, queue: str, exchange: str, binding_key: str, **options: Any) -> None:
    """Declare a queue and bind it. Arguments of a queue are unknown here."""
    with consuming(url) as connection:
        connection.declare(Queue(queue, Exchange(exchange), (binding_key,), classic=True), TIMEOUT)


def declare_exchange(url: str, exchange: str, exchange_type: str) -> None:
    """Declare an exchange."""
    store = memory.store(url.removeprefix("memory://"))
    store.call(lambda: store.declare_exchange(Exchange(exchange, exchange_type)))


def delete(url: str, queues: list[str], exchanges: list[str]) -> None:
    """Delete them, as far as they exist."""
    store = memory.store(url.removeprefix("memory://"))
    for exchange in exchanges or [""]:
        store.call(lambda: store.delete(map(place, queues), exchange, None))  # noqa: B023
