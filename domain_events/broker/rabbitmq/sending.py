"""A channel that publishes with confirms.

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
from domain_events.broker.rabbitmq.envelope import message_id, properties
from domain_events.broker.rabbitmq.errors import unroutable_error
from domain_events.broker.rabbitmq.topology import Topology, address
from domain_events.broker.rabbitmq.transport import Connection
from domain_events.broker.rabbitmq.wire import Writer
from domain_events.errors import DomainEventsError
from domain_events.message import Message

_numbers = itertools.count(1)


class Owner(Protocol):
    """The user of senders; see `publishing`."""

    def ready(self, sender: Sender) -> None:
        """It can send now."""

    def not_opened(self, sender: Sender, error: DomainEventsError, reason: BaseException) -> None:
        """The broker has closed the channel before it could send."""

    def answered(self, sender: Sender, publications: list[Publication], acked: bool) -> None:
        """The broker has confirmed these, or nacked them."""

    def closed_by_broker(self, sender: Sender, reason: BaseException) -> None:
        """The broker has closed the channel; publications in flight on it are unanswered."""


class Sender:
    """A channel in confirm mode, and the publications in flight on it.

    :ivar channel: pika's; set before `Owner.ready` is called.
    :param declare: the exchanges to declare first.
    """

    channel: Channel
    _writer: Writer

    def __init__(
        self, channels: Channels, connection: Connection, declare: Topology, owner: Owner
    ) -> None:
        #: Later ones have larger numbers.
        self.number = next(_numbers)
        #: Unanswered publications by delivery tag, in the order they were sent.
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
        :raises Exception: it cannot be encoded; nothing of it was sent.
        """
        frames = self._writer.frames(message)
        if frames is None:
            self.channel.basic_publish(
                *address(message.destination, message.routing_key),
                message.body,
                properties(message),
                message.mandatory,
            )
        else:
            self._transport.buffer(frames)
        # Only now, so that the tags match those that the broker counts.
        publication.sent_at = now
        self.in_flight[self._next_tag] = publication
        self._next_tag += 1
        self.bytes += publication.size

    def flush(self) -> None:
        """Write everything sent to the socket."""
        self._transport.flush()

    def call_when_routed(self, callback: Callable[[], None]) -> None:
        """Call back once the broker has routed all messages sent here.

        A channel processes requests in order; so the reply to one that changes nothing comes after
        they are routed, however long the confirms take.
        """
        self._setup.await_answer()

        def answered(_frame: object) -> None:
            self._setup.usable()
            callback()

        self.channel.basic_qos(callback=self._guarded(answered))

    def returned_error(self, message: Message) -> DomainEventsError | None:
        """The error of a confirmed mandatory message, if no queue was bound for it."""
        if self._returned:
            # basic.return comes before the confirm (https://www.rabbitmq.com/docs/confirms).
            key = (message_id(message), *address(message.destination, message.routing_key))
            if self._returned[key] > 0:
                self._returned[key] -= 1
                self._returned += Counter()  # drops counts of zero
                return unroutable_error(message)
        return None

    def close(self) -> None:
        """Close the channel; nothing on it is unanswered."""
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
            # The connection is given up: those whose owner was not informed are sent again.
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
