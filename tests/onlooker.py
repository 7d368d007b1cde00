"""A look at the broker that goes neither through the library nor through pika: see `pyamqp`.

The embedded broker can only be reached through the library: there, see `embedded`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import embedded
import pyamqp
from pyamqp import Channel

from domain_events.broker.rabbitmq.envelope import Properties


@contextmanager
def channel(url: str) -> Iterator[Channel]:
    """A channel on a connection of its own."""
    with pyamqp.Connection(url) as connection:
        yield connection.channel()


def count(url: str, queue: str) -> int:
    """How many messages are ready in a queue."""
    if embedded.is_embedded(url):
        return embedded.count(url, queue)
    with channel(url) as onlooker:
        return onlooker.queue_declare(queue, passive=True).messages


def consumers(url: str, queue: str) -> int:
    """How many consumers a queue has (on RabbitMQ only)."""
    with channel(url) as onlooker:
        return onlooker.queue_declare(queue, passive=True).consumers


def exists(url: str, queue: str) -> bool:
    """Whether the queue exists."""
    if embedded.is_embedded(url):
        return embedded.exists(url, queue)
    with channel(url) as onlooker:
        try:
            onlooker.queue_declare(queue, passive=True)
        except pyamqp.NotFound:
            return False
        except pyamqp.ResourceLocked:
            pass  # it exists, and is exclusive to another connection
        return True


def take(url: str, queue: str) -> tuple[Properties, bytes]:
    """Take the next message out of a queue."""
    if embedded.is_embedded(url):
        taken = embedded.take(url, queue, 1)
        assert taken, f"{queue} is empty"
        return taken[0]
    with channel(url) as onlooker:
        received = onlooker.basic_get(queue, auto_ack=True)
        assert received is not None, f"{queue} is empty"
        return received.properties, received.body


def take_all(url: str, queue: str) -> list[bytes]:
    """Take all messages out of a queue; their bodies."""
    if embedded.is_embedded(url):
        return [body for _, body in embedded.take(url, queue, sys.maxsize)]
    bodies: list[bytes] = []
    with channel(url) as onlooker:
        while (received := onlooker.basic_get(queue, auto_ack=True)) is not None:
            bodies.append(received.body)
    return bodies


def publish(
    url: str,
    exchange: str,
    routing_key: str,
    body: bytes,
    **properties: Any,
) -> None:
    """Publish as any other program might."""
    if embedded.is_embedded(url):
        embedded.publish(url, exchange, routing_key, body, **properties)
        return
    with channel(url) as onlooker:
        onlooker.confirm_delivery()
        onlooker.basic_publish(
            exchange, routing_key, body, pyamqp.Properties(**properties), mandatory=True
        )


def bind_queue(url: str, queue: str, exchange: str, binding_key: str, **options: Any) -> None:
    """Declare a queue and bind it, as any other program might."""
    if embedded.is_embedded(url):
        embedded.bind_queue(url, queue, exchange, binding_key, **options)
        return
    with channel(url) as onlooker:
        onlooker.exchange_declare(exchange, "topic", durable=True)
        onlooker.queue_declare(queue, durable=True, arguments=options)
        onlooker.queue_bind(queue, exchange, binding_key)


def declare_exchange(url: str, exchange: str, exchange_type: str) -> None:
    """Declare an exchange; an error if it exists with another type."""
    if embedded.is_embedded(url):
        embedded.declare_exchange(url, exchange, exchange_type)
        return
    with channel(url) as onlooker:
        onlooker.exchange_declare(exchange, exchange_type, durable=True)


def delete(url: str, *, queues: Iterable[str] = (), exchanges: Iterable[str] = ()) -> None:
    """Delete them, as far as they exist."""
    if embedded.is_embedded(url):
        embedded.delete(url, list(queues), list(exchanges))
        return
    with channel(url) as onlooker:
        for queue in queues:
            onlooker.queue_delete(queue)
        for exchange in exchanges:
            onlooker.exchange_delete(exchange)
