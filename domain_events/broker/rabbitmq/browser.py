"""Browses a queue: a channel that gets message after message, and holds them.

Unacked messages are requeued in their old order. A quorum queue does not guarantee that itself
(checked on 3.10, 4.0 and 4.3 by the tests of walks in tests/test_dead_letters.py):

- Of more than 32 messages requeued at a time, some return later than others, in any order. So they
  are requeued in small pieces, each when the one before is back in the queue.
- Requeued messages go to the front, but after those that were requeued before and not got since. So
  an interrupted walk first gets the rest of those, to requeue all of them together.

When the channel or the connection is lost, all messages are requeued at once, perhaps in another
order.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import pika
from pika.channel import Channel
from pika.spec import Basic

from domain_events.broker.rabbitmq.channel import Answer, Channels
from domain_events.broker.rabbitmq.envelope import RabbitDelivery
from domain_events.broker.rabbitmq.errors import close_code, explain, read_error
from domain_events.broker.rabbitmq.wire import text
from domain_events.errors import BrokerUnavailable
from domain_events.log import Log
from domain_events.message import Delivery

log = Log("domain_events")

# How many are requeued at a time: half of what a quorum queue keeps in order.
_PIECE = 16
# How long to get messages that were requeued before.
_GET_REST_TIMEOUT = 30.0
# How long to wait until a piece is in the queue; others may have consumed some of it.
_REQUEUE_TIMEOUT = 1.0
_POLL_INTERVAL = 0.001

#: Has the I/O thread perform a request and waits for its answer, at most so many seconds.
_Call: TypeAlias = Callable[[Callable[[Answer], None], float], Any]


class RabbitBrowser:
    """Gets the messages of one queue.

    Threads. The caller's makes one request after the other, each with a time limit; the I/O thread
    performs them one at a time, since a reply does not name its request. When one is not answered
    in time, the connection is dropped.
    """

    def __init__(self, channels: Channels, call: _Call, queue: str, timeout: float) -> None:
        self._channels = channels
        self._link = channels.link
        self._call = call
        self._queue = queue
        self._timeout = timeout
        # I/O thread: the request that awaits its reply, and those after it of interrupted callers.
        self._answer: Answer | None = None
        self._to_do: deque[tuple[Callable[[], None], Answer]] = deque()
        # Got and not settled, in order.
        self._tags: dict[int, None] = {}
        # Whether the next message may be one that was requeued to a quorum queue before.
        self._may_be_requeued = False
        self._channel: Channel = call(self._open, timeout)

    def next(self, timeout: float) -> RabbitDelivery | None:
        """The next message, or None."""
        delivery: RabbitDelivery | None = self._request(self._get, timeout)
        return delivery

    def ack(self, delivery: Delivery, timeout: float) -> None:
        """Remove the message from the queue."""
        channel, tag = delivery.receipt

        def ack() -> None:
            if channel is self._channel:
                channel.basic_ack(tag)
            self._answered(channel is self._channel)

        if not self._request(ack, timeout):
            raise self._lost_error()
        self._tags.pop(tag, None)

    def rewind(self) -> None:
        """Requeue all unacked messages; `next` then returns them again."""
        if not self._is_open():
            raise self._lost_error()
        if not self._tags:
            return
        deadline = time.monotonic() + _GET_REST_TIMEOUT
        self._request(partial(self._get_rest, deadline), self._timeout)
        if self._may_be_requeued and time.monotonic() > deadline:
            log.warning(
                "%s: requeuing %d messages in their order takes too long; their order changes.",
                self._queue,
                len(self._tags),
            )
        tags = list(self._tags)
        self._tags.clear()
        self._may_be_requeued = False
        ready = self._request(self._count, self._timeout)
        for start in range(0, len(tags), _PIECE):
            piece = tags[start : start + _PIECE]
            self._request(partial(self._nack_up_to, piece[-1]), self._timeout)
            ready = self._wait_for(ready + len(piece))

    def close(self, timeout: float) -> None:
        """Requeue all unacked messages, and end."""
        # When the connection is lost, the broker requeues all.
        with contextlib.suppress(BrokerUnavailable):
            self.rewind()
            self._call(self._close, timeout)

    # --- the caller's thread ---------------------------------------------------------------------

    def _wait_for(self, number: int) -> int:
        """Wait until so many are in the queue; returns how many are."""
        deadline = time.monotonic() + _REQUEUE_TIMEOUT
        while True:
            ready: int = self._request(self._count, self._timeout)
            if ready >= number or time.monotonic() > deadline:
                return ready
            time.sleep(_POLL_INTERVAL)

    def _request(self, work: Callable[[], None], timeout: float) -> Any:
        """Do it on the I/O thread, and wait for the answer."""

        def request(answer: Answer) -> None:
            if self._is_open():
                self._to_do.append((work, answer))
                self._proceed()
            else:
                answer.fail(self._lost_error())

        def drop() -> None:
            if self._is_open():
                self._link.drop()

        try:
            return self._call(request, timeout)
        except BrokerUnavailable:
            with contextlib.suppress(BrokerUnavailable):
                self._link.wake(drop)
            raise

    def _lost_error(self) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"The connection was lost while browsing {self._queue!r}. All messages that were not "
            "settled are back in the queue; begin again."
        )

    def _is_open(self) -> bool:
        # After a fork the channel is the parent's, and seems to be open.
        connection = self._link.connection
        return self._channel.connection is connection and bool(self._channel.is_open)

    # --- the I/O thread --------------------------------------------------------------------------

    def _open(self, answer: Answer) -> None:
        connection = self._link.connection
        assert connection is not None  # requests are performed on an open one
        self._release = connection.release

        def prepare(channel: Channel) -> None:
            channel.add_callback(
                self._link.guarded(self._on_empty), [Basic.GetEmpty], one_shot=False
            )
            setup.usable()
            answer.succeed(channel)

        setup = self._channels.open(
            (),
            prepare=prepare,
            failed=lambda error, _reason: answer.fail(error),
            closed=self._on_close,
        )

    def _proceed(self) -> None:
        while self._to_do and self._answer is None:
            work, self._answer = self._to_do.popleft()
            work()

    def _answered(self, result: object) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.succeed(result)
        self._proceed()

    def _get(self) -> None:
        def on_message(
            channel: Channel, method: Basic.GetOk, properties: pika.BasicProperties, body: bytes
        ) -> None:
            self._answered(
                RabbitDelivery(
                    text(method.exchange),
                    text(method.routing_key),
                    method.redelivered,
                    properties,
                    body,
                    (channel, self._record(method, properties)),
                    method.message_count or 0,
                    release=self._release,
                )
            )

        self._channel.basic_get(self._queue, self._link.guarded(on_message))

    def _get_rest(self, deadline: float, step: int = 0) -> None:
        """Get those that were requeued before; see the module's docstring."""

        def on_message(
            _channel: Channel, method: Basic.GetOk, properties: pika.BasicProperties, _body: bytes
        ) -> None:
            self._record(method, properties)
            self._get_rest(deadline, step + 1)

        if self._answer is not None:
            self._answer.progress(step)
        if self._may_be_requeued and time.monotonic() < deadline:
            self._channel.basic_get(self._queue, self._link.guarded(on_message))
        else:
            self._answered(None)

    def _record(self, method: Basic.GetOk, properties: pika.BasicProperties) -> int:
        """Remember its tag, even if the caller has given up: it has to be requeued in its place."""
        tag = int(method.delivery_tag or 0)
        self._tags[tag] = None
        headers = properties.headers or {}
        in_quorum_queue = "x-delivery-count" in headers or "x-acquired-count" in headers
        self._may_be_requeued = bool(method.redelivered) and in_quorum_queue
        return tag

    def _on_empty(self, _frame: object) -> None:
        self._may_be_requeued = False
        self._answered(None)

    def _count(self) -> None:
        self._channel.queue_declare(
            self._queue,
            passive=True,
            callback=self._link.guarded(lambda frame: self._answered(frame.method.message_count)),
        )

    def _nack_up_to(self, tag: int) -> None:
        self._channel.basic_nack(tag, multiple=True, requeue=True)
        self._answered(None)

    def _on_close(self, reason: BaseException) -> None:
        code = close_code(reason)
        answers = [self._answer, *(answer for _, answer in self._to_do)]
        self._answer = None
        self._to_do.clear()
        for answer in answers:
            if answer is not None and code:
                answer.fail(read_error(self._queue, code, explain(reason)))

    def _close(self, answer: Answer) -> None:
        if not self._is_open():
            answer.succeed(None)
            return
        self._channel.add_on_close_callback(lambda _channel, _reason: answer.succeed(None))
        self._channel.close()
