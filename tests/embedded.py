"""What `onlooker` does, on the embedded broker: it has one way in, the broker protocol."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from domain_events import TopologyError
from domain_events.broker import Consuming, Publication, connect
from domain_events.message import Message, Properties
from domain_events.topology import Binding, Exchange, Queue, Topology

TIMEOUT = 5.0


def is_embedded(url: str) -> bool:
    """Whether this is the URL of an embedded broker."""
    return url.startswith("memory:")


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
        return connection.count(queue, TIMEOUT)


def exists(url: str, queue: str) -> bool:
    """Whether there is such a queue."""
    try:
        count(url, queue)
    except TopologyError as error:
        return "no queue" not in str(error)
    return True


def take(url: str, queue: str, most: int) -> list[tuple[Properties, bytes]]:
    """Take up to so many messages out of a queue."""
    taken: list[tuple[Properties, bytes]] = []
    with consuming(url) as connection:
        browser = connection.browse(queue, TIMEOUT)
        while len(taken) < most:
            delivery = browser.next(TIMEOUT)
            if delivery is None:
                break
            browser.ack(delivery, TIMEOUT)
            taken.append((delivery.properties, delivery.body))
        browser.close(TIMEOUT)
    return taken


def publish(url: str, exchange: str, routing_key: str, body: bytes, **properties: Any) -> None:
    """Publish as any other program might."""
    done = threading.Event()
    options = {"content_type": None, "mandatory": True, **properties}
    publication = Publication(
        Message(exchange, routing_key, body, **options), lambda _publication: done.set()
    )
    publishing = connect((url,)).publishing((), "onlooker")
    publishing.submit(publication)
    assert done.wait(TIMEOUT)
    publishing.close(TIMEOUT)
    if publication.error is not None:
        raise publication.error


def bind_queue(url: str, queue: str, exchange: str, binding_key: str, **options: Any) -> None:
    """Declare a queue and bind it."""
    with consuming(url) as connection:
        topology: Topology = [
            Exchange(exchange),
            Queue(queue, options),
            Binding(exchange, queue, binding_key),
        ]
        connection.declare(topology, TIMEOUT)


def declare_exchange(url: str, exchange: str, exchange_type: str) -> None:
    """Declare an exchange."""
    with consuming(url) as connection:
        connection.declare([Exchange(exchange, exchange_type)], TIMEOUT)


def delete(url: str, queues: list[str], exchanges: list[str]) -> None:
    """Delete them; to delete what is not there is no error."""
    with consuming(url) as connection:
        connection.delete([*map(Queue, queues), *map(Exchange, exchanges)], TIMEOUT)
