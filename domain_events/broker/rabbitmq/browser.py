"""A look at a queue: a channel that gets message after message, and holds what it got.

What is not acked goes back to the queue when the channel closes.
"""

from __future__ import annotations

import time

import pika
from pika.channel import Channel
from pika.spec import Basic

from domain_events.broker.rabbitmq.link import Link
from domain_events.broker.rabbitmq.nodes import close_code, explain
from domain_events.broker.rabbitmq.request import Answer, Call, fail, succeed
from domain_events.broker.rabbitmq.wire import text
from domain_events.broker.refusals import unreadable
from domain_events.errors import BrokerUnavailable
from domain_events.message import Delivery

# How long to wait for what was given back to be in the queue; others may have taken some of it.
_LONGEST_RETURN = 2.0
_LOOK_AGAIN = 0.01


class RabbitBrowser:
    """See `domain_events.broker.Browser`."""

    def __init__(self, link: Link, call: Call, queue: str, timeout: float) -> None:
        self._link = link
        self._call = call
        self._queue = queue
        self._waiting: Answer | None = None
        self._held = 0  # got and not acked
        self._given_back = 0  # as many as the queue must have again before the next is got
        self._channel: Channel = call(self._open, timeout)

    def next(self, timeout: float) -> Delivery | None:
        """The next message, or None."""
        self._wait_until_back(timeout)
        delivery: Delivery | None = self._call(self._get, timeout)
        self._held += delivery is not None
        return delivery

    def ack(self, delivery: Delivery, timeout: float) -> None:
        """Take the message out of the queue."""

        def ack(_connection: pika.SelectConnection, answer: Answer) -> None:
            if self._is_open():
                self._channel.basic_ack(delivery.receipt)
                succeed(answer, None)
            else:
                fail(answer, self._lost())

        self._call(ack, timeout)
        self._held -= 1

    def rewind(self) -> None:
        """Give back all that was not acked; `next` then sees it again."""

        def give_back() -> None:
            if self._is_open():
                # Not only by closing: a quorum queue learns of a closed channel some time later.
                self._channel.basic_nack(0, multiple=True, requeue=True)

        self._link.wake(give_back)
        self._given_back, self._held = self._held, 0

    def close(self, timeout: float) -> None:
        """Give back all that was not acked, and end."""
        self.rewind()
        self._call(self._close, timeout)

    def _wait_until_back(self, timeout: float) -> None:
        """A quorum queue takes many back some 32 at a time; until then it counts too few."""
        deadline = time.monotonic() + min(timeout, _LONGEST_RETURN)
        while self._given_back:
            if self._call(self._count, timeout) >= self._given_back or time.monotonic() > deadline:
                self._given_back = 0
            else:
                time.sleep(_LOOK_AGAIN)

    def _lost(self) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"The connection was lost while browsing {self._queue!r}. Everything that was not "
            "settled is back in the queue; begin again."
        )

    def _is_open(self) -> bool:
        # After a fork the channel is the parent's, and looks as open as ever.
        connection = self._link.connection
        return self._channel.connection is connection and bool(self._channel.is_open)

    def _open(self, connection: pika.SelectConnection, answer: Answer) -> None:
        guarded = self._link.guarded

        def on_open(channel: Channel) -> None:
            channel.add_on_close_callback(guarded(on_close))
            channel.add_callback(guarded(on_empty), [Basic.GetEmpty], one_shot=False)
            succeed(answer, channel)

        def on_empty(_frame: object) -> None:
            if self._waiting is not None:
                succeed(self._waiting, None)

        def on_close(_channel: Channel, reason: BaseException) -> None:
            code = close_code(reason)
            if self._waiting is not None and code:
                fail(self._waiting, unreadable(self._queue, code, explain(reason)))

        connection.channel(on_open_callback=guarded(on_open))

    def _count(self, _connection: pika.SelectConnection, answer: Answer) -> None:
        if not self._is_open():
            fail(answer, self._lost())
            return
        self._waiting = answer
        self._channel.queue_declare(
            self._queue,
            passive=True,
            callback=self._link.guarded(lambda frame: succeed(answer, frame.method.message_count)),
        )

    def _get(self, _connection: pika.SelectConnection, answer: Answer) -> None:
        if not self._is_open():
            fail(answer, self._lost())
            return

        def on_message(
            _channel: Channel, method: Basic.GetOk, properties: pika.BasicProperties, body: bytes
        ) -> None:
            delivery = Delivery(
                text(method.exchange),
                text(method.routing_key),
                method.redelivered,
                properties,
                body,
                method.delivery_tag,
                method.message_count or 0,
            )
            succeed(answer, delivery)

        self._waiting = answer
        self._channel.basic_get(self._queue, self._link.guarded(on_message))

    def _close(self, _connection: pika.SelectConnection, answer: Answer) -> None:
        if not self._is_open():
            succeed(answer, None)
            return
        self._waiting = None
        self._channel.add_on_close_callback(lambda _channel, _reason: succeed(answer, None))
        self._channel.close()
