"""A message as pika sends it, and in words for its sender, what became of it instead."""

from __future__ import annotations

import pika

from domain_events.broker.rabbitmq.nodes import explain
from domain_events.broker.refusals import FORBIDDEN, MISSING, REFUSED, no_exchange, unwritable
from domain_events.errors import (
    DomainEventsError,
    EventNotConfirmed,
    EventRejected,
    InvalidEvent,
)
from domain_events.message import Message
from domain_events.text import printable


def properties(message: Message) -> pika.BasicProperties:
    return pika.BasicProperties(
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        headers=dict(message.headers) if message.headers else None,
        delivery_mode=pika.DeliveryMode.Persistent,
        correlation_id=message.correlation_id,
        reply_to=message.reply_to,
        message_id=message.message_id,
        timestamp=message.timestamp,
        type=message.type,
        app_id=message.app_id,
    )


def unsendable(message: Message, error: Exception) -> DomainEventsError:
    """It cannot be put into AMQP's frames."""
    invalid = InvalidEvent(f"{_named(message)} cannot be sent over AMQP: {printable(error)}")
    invalid.__cause__ = error
    return invalid


def nacked(message: Message) -> DomainEventsError:
    """The broker has refused it."""
    return EventRejected(
        f"The broker refused {_named(message)}; a queue that it goes to may be at its length "
        "limit, or unavailable."
    )


def blame(message: Message, code: int, reason: BaseException | None) -> DomainEventsError:
    """The broker has closed the channel, or the connection, over it."""
    said = explain(reason)
    what = f"{_named(message)} ({len(message.body):,} bytes)"
    error: DomainEventsError
    if code == FORBIDDEN:
        error = unwritable(message, said)
    elif code == MISSING:
        error = no_exchange(message, said)
    elif code == REFUSED:
        error = InvalidEvent(f"The broker does not take {what}: {said}.")
    else:
        error = EventNotConfirmed(f"The broker broke off over {what}, twice: {said}.")
    error.__cause__ = reason
    return error


def _named(message: Message) -> str:
    return repr(message.type or message.routing_key)
