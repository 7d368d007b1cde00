"""A channel that publishes with confirms, and the errors of what the broker does not take.

Everything here belongs to the I/O thread.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Protocol

import pika
from pika.channel import Channel
from pika.spec import Basic

from domain_events.broker import Publication
from domain_events.broker.rabbitmq.channel import Channels
from domain_events.broker.rabbitmq.nodes import explain
from domain_events.broker.rabbitmq.transport import Connection
from domain_events.broker.rabbitmq.wire import Writer
from domain_events.broker.refusals import (
    FORBIDDEN,
    MISSING,
    REFUSED,
    no_exchange,
    unroutable,
    unwritable,
)
from domain_events.errors import (
    DomainEventsError,
    EventNotConfirmed,
    EventRejected,
    InvalidEvent,
)
from domain_events.message import Message
from domain_events.text import printable
from domain_events.topology import Topology

_numbers = itertools.count(1)


class Owner(Protocol):
    """Who publishes through senders."""

    def ready(self, sender: Sender) -> None:
        """It can send now."""

    def not_opened(self, sender: Sender, error: DomainEventsError, reason: BaseException) -> None:
        """The broker has closed the channel before it could send."""

    def answered(self, sender: Sender, publications: list[Publication], acked: bool) -> None:
        """The broker has confirmed these, or nacked them."""

    def closed_by_broker(self, sender: Sender, reason: BaseException) -> None:
        """The broker has closed the channel; what was in flight on it is unanswered."""


class Sender:
    """A channel in confirm mode, and what is in flight on it.

    :ivar channel: pika's; set when the owner is called with `Owner.ready`.
    :param declare: the exchanges to declare first.
    """

    channel: Channel
    _writer: Writer

    def __init__(
        self, channels: Channels, connection: Connection, declare: Topology, owner: Owner
    ) -> None:
        #: Later ones have larger numbers.
        self.number = next(_numbers)
        #: What the broker has not answered yet, by delivery tag, in the order it was sent.
        self.in_flight: dict[int, Publication] = {}
        #: The size of the bodies in flight.
        self.bytes = 0
        self._guarded = channels.link.guarded
        self._transport = connection.transport
        self._owner = owner
        self._next_tag = 1
        self._returned: Counter[tuple[object, object, object]] = Counter()
        self._setup = channels.open(
            declare,
            prepare=self._select,
            failed=partial(owner.not_opened, self),
            closed=partial(owner.closed_by_broker, self),
        )

    def _select(self, channel: Channel) -> None:
        def ready(_frame: object) -> None:
            self._setup.usable()
            self.channel = channel
            self._owner.ready(self)

        self._writer = Writer(channel.channel_number)
        channel.add_on_return_callback(self._guarded(self._on_return))
        self._transport.on_confirm(channel.channel_number, self._guarded(self._on_confirm))
        # pika requires a callback for confirms; `on_confirm` intercepts them before it.
        channel.confirm_delivery(lambda _frame: None, callback=self._guarded(ready))

    def send(self, publication: Publication, message: Message, now: float) -> None:
        """Send the message, at the latest with `flush`.

        :param now: the time, which is the same for many.
        :raises Exception: it cannot be put into frames; nothing of it was sent.
        """
        frames = self._writer.frames(message)
        if frames is None:
            self.channel.basic_publish(
                message.exchange,
                message.routing_key,
                message.body,
                properties(message),
                message.mandatory,
            )
        else:
            self._transport.buffer(frames)
        # Only now, so that the tags stay those that the broker counts.
        publication.sent_at = now
        self.in_flight[self._next_tag] = publication
        self._next_tag += 1
        self.bytes += publication.size

    def flush(self) -> None:
        """Pass what was sent to the socket."""
        self._transport.flush()

    def call_when_routed(self, callback: Callable[[], None]) -> None:
        """Call back once the broker has routed all that was sent here.

        A channel processes what it is sent in order; so the reply to a request that changes
        nothing comes after it, however long the confirms take.
        """
        self._setup.await_answer()

        def answered(_frame: object) -> None:
            self._setup.usable()
            callback()

        self.channel.basic_qos(callback=self._guarded(answered))

    def returned_error(self, message: Message) -> DomainEventsError | None:
        """The error of a confirmed mandatory message, if no queue was bound for it."""
        if self._returned:
            # Returns come before the confirm of what they return.
            key = (message.message_id, message.exchange, message.routing_key)
            if self._returned[key] > 0:
                self._returned[key] -= 1
                self._returned += Counter()  # drops what is back at zero
                return unroutable(message)
        return None

    def close(self) -> None:
        """Close the channel; the broker has answered all that was sent on it."""
        if self.channel.is_open:
            self.channel.close()

    def _on_confirm(self, tag: int, multiple: bool, acked: bool) -> None:
        in_flight = self.in_flight
        if multiple:
            tags = list(itertools.takewhile(tag.__ge__, in_flight))
        else:
            tags = [tag] if tag in in_flight else []
        answered = {}
        for each in tags:
            publication = answered[each] = in_flight.pop(each)
            self.bytes -= publication.size
        try:
            self._owner.answered(self, list(answered.values()), acked)
        except BaseException:
            # The connection is given up: what nobody was informed of is to be sent again.
            self.in_flight = {**answered, **in_flight}
            raise

    def _on_return(
        self,
        _channel: Channel,
        method: Basic.Return,
        properties: pika.BasicProperties,
        _body: bytes,
    ) -> None:
        self._returned[properties.message_id, method.exchange, method.routing_key] += 1


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
    """The error of a message that cannot be encoded."""
    invalid = InvalidEvent(f"{_named(message)} cannot be sent over AMQP: {printable(error)}")
    invalid.__cause__ = error
    return invalid


def nacked(message: Message) -> DomainEventsError:
    """The error of a message that the broker has refused."""
    return EventRejected(
        f"The broker refused {_named(message)}; a queue that it goes to may be at its length "
        "limit, or unavailable."
    )


def blame(message: Message, code: int, reason: BaseException | None) -> DomainEventsError:
    """The error of a message over which the broker has closed the channel or the connection."""
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
