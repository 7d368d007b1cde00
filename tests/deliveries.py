"""Deliveries made without a broker, and what pika makes of a message that is sent.

Properties are pika's own here, and what is to fit a frame is encoded by pika to see it.
"""

from __future__ import annotations

from typing import Any

import pika
import pika.frame

from domain_events.broker.rabbitmq.envelope import RabbitDelivery, properties
from domain_events.broker.rabbitmq.topology import return_exchanges
from domain_events.message import Message

#: What RabbitMQ and pika agree upon unless told otherwise, with all of a frame in it.
FRAME = 128 * 1024

BODY = b'{"routing_key": "user.registered", "data": {}, "uuid_string": "id-1"}'


def delivery(
    body: bytes = BODY,
    headers: dict[Any, Any] | None = None,
    *,
    routing_key: str = "user.registered",
    exchange: str = "domain-events",
    redelivered: bool = False,
    release: tuple[int, int] = (0, 0),
    **others: Any,
) -> RabbitDelivery:
    """A delivery, as a subscriber on the exchange ``domain-events`` gets it."""
    received = pika.BasicProperties(headers=headers, **others)
    is_ours = exchange in return_exchanges("domain-events")
    return RabbitDelivery(
        exchange, routing_key, redelivered, received, body, release=release, is_ours=is_ours
    )


def header_frame(sent: Message) -> bytes:
    """The frame that carries the message's properties and headers, as pika sends it."""
    frame: bytes = pika.frame.Header(1, len(sent.body), properties(sent)).marshal()
    return frame


def properties_of(sent: Message) -> dict[str, Any]:
    """The properties that are set, as the receiver has them."""
    decoded = pika.BasicProperties()
    decoded.decode(b"".join(properties(sent).encode()))
    return {name: value for name, value in vars(decoded).items() if value is not None}


def headers_of(sent: Message) -> dict[Any, Any]:
    """The headers, as the receiver has them."""
    headers: dict[Any, Any] = properties_of(sent).get("headers", {})
    return headers


def failure(text: str = "no such user") -> ValueError:
    """An exception that was raised."""
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


def exception(text: str, name: str, causes: int) -> Exception:
    """One that was raised, with causes."""
    kind: type[Exception] = type(name or "E", (Exception,), {})
    error: Exception | None = None
    for _ in range(causes + 1):
        try:
            raise kind(text) from error
        except kind as raised:
            error = raised
    assert error is not None
    return error
