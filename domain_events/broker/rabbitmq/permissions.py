"""Finds out which permissions a user has, by requests that can never be fulfilled.

RabbitMQ checks the permission before the rest of a request
(``deps/rabbit/src/rabbit_channel.erl``). So each request here has an argument that is invalid, or
refers to something that does not exist: without the permission the broker answers ACCESS_REFUSED,
with it another error. Nothing is declared, bound, published or consumed either way. Each request
leaves a line in the broker's log.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pika
from pika.channel import Channel

from domain_events.broker.rabbitmq.errors import DEFAULT_EXCHANGE
from domain_events.broker.rabbitmq.requests import Work

Action = Literal["configure", "write", "read"]


@dataclass(frozen=True)
class Permission:
    """A permission on a queue or an exchange, which need not exist.

    An exchange can only be probed for ``read`` together with ``write`` on a queue, and the other
    way round: what binding takes (``queue`` is the one to bind).
    """

    action: Action
    kind: Literal["queue", "exchange"]
    name: str
    queue: str = ""

    def __str__(self) -> str:
        what = f"{self.action} on the {self.kind} {self.name or DEFAULT_EXCHANGE!r}"
        return f"{what} and write on the queue {self.queue!r}" if self.queue else what


def to_bind(queue: str, exchange: str) -> Permission:
    """What binding the queue to the exchange takes."""
    return Permission("read", "exchange", exchange, queue)


def probe(permission: Permission) -> Work:
    """The request that finds out whether the user has it."""
    if permission.queue:
        return _unbind(permission)
    if permission.action == "write":
        return _publish(permission)
    if permission.action == "read":
        return _consume(permission)
    return _declare_queue(permission) if permission.kind == "queue" else _declare(permission)


def _declare_queue(permission: Permission) -> Work:
    # Refused as invalid if there is no such queue, and as different if there is one.
    return lambda channel, done: channel.queue_declare(
        permission.name, durable=True, arguments={"x-message-ttl": -1}, callback=done
    )


def _declare(permission: Permission) -> Work:
    return lambda channel, done: channel.exchange_declare(
        permission.name, "topic", durable=True, arguments={"alternate-exchange": 1}, callback=done
    )


def _unbind(permission: Permission) -> Work:
    # Nothing is bound by this key; unbinding it is not an error.
    key = f"domain-events-doctor-{uuid.uuid4()}"
    return lambda channel, done: channel.queue_unbind(
        permission.queue, permission.name, key, callback=done
    )


def _publish(permission: Permission) -> Work:
    def work(channel: Channel, _done: object) -> None:
        # No queue has this name: not even a broker that let it pass would keep the message.
        key = f"domain-events-doctor-{uuid.uuid4()}"
        properties = pika.BasicProperties(expiration="invalid")
        channel.basic_publish(permission.name, key, b"", properties)

    return work


def _consume(permission: Permission) -> Work:
    def work(channel: Channel, done: Callable[[object], None]) -> None:
        arguments = {"x-priority": "invalid"}
        channel.basic_consume(
            permission.name, lambda *_delivery: None, arguments=arguments, callback=done
        )

    return work
