"""Browses a queue: a channel that takes message after message, and holds them.

**Taking.** `basic.get` takes one message for each round trip, and is a consumer of its own to a
quorum queue. So only the first message of a walk is taken like that. Then as many are consumed at a
time as a prefetch count allows, a *window*: few at first, then more, as long as bodies are small.
The consumer is cancelled before any of these can be acked, so that it never gets more. When others
take messages, too, a window may never become full, which ends it after a while.

**Requeuing.** Unacked messages are requeued in their old order. A quorum queue does not guarantee
that itself (checked on 3.10, 4.0 and 4.3 by the tests of walks in tests/test_dead_letters.py):

- What is requeued by one command of the broker's queue client comes back in any order, if it is
  more than 32 messages. A nack is a command for each consumer that the messages were delivered to,
  also in any order. So each nack is for at most 32 messages, all of one window.
- While more than 32 commands are under way, the client puts all further ones together into one. So
  a few nacks are sent at a time, the next when the messages of those are back in the queue; at
  first only one, since acks may be under way.
- Requeued messages go to the front, but after those that were requeued before and not taken since.
  So an interrupted walk first takes the rest of those, to requeue all of them together.

**Acking.** While many acks are under way, the queue's client keeps further ones back, and forgets
them when its channel is closed: the messages would be there again. So before that, two messages
more are taken, and requeued with the others. Each is a command that is answered when those before
it were performed: the first waits for the acks that were sent, the second for those kept back.

When the channel or the connection is lost, all messages are requeued at once, perhaps in another
order.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import pika
from pika.channel import Channel
from pika.spec import Basic

from domain_events.broker.rabbitmq.arrivals import Arrivals
from domain_events.broker.rabbitmq.channel import Answer, Channels
from domain_events.broker.rabbitmq.envelope import Properties, RabbitDelivery
from domain_events.broker.rabbitmq.errors import close_code, explain, read_error
from domain_events.broker.rabbitmq.wire import text
from domain_events.errors import BrokerUnavailable
from domain_events.log import Log
from domain_events.message import Delivery

log = Log("domain_events")

# How many messages one nack requeues, and how many nacks are under way at a time; see above.
_MESSAGES_PER_NACK = 32
_NACKS_UNDER_WAY = 16
# How long to take messages that were requeued before.
_TAKE_REST_TIMEOUT = 60.0
# How long to wait until they are in the queue; others may have consumed some of them.
_REQUEUE_TIMEOUT = 1.0
_POLL_INTERVAL = 0.001

# The sizes of windows: each is so many times larger than the one before, until the largest one.
_GROWTH = 4
_LARGEST_WINDOW = 512
# A window is to have so many bytes of bodies, by the largest one in the window before.
_BYTES_PER_WINDOW = 4 * 2**20
# Seconds without a delivery after which a window ends that is not full.
_LONGEST_PAUSE = 0.5

#: Has the I/O thread perform a request and waits for its answer, at most so many seconds.
_Call: TypeAlias = Callable[[Callable[[Answer], None], float], Any]


class RabbitBrowser:
    """Takes the messages of one queue.

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
        self._arrivals = Arrivals()
        # I/O thread: the request that awaits its reply, and those after it of interrupted callers.
        self._answer: Answer | None = None
        self._to_do: deque[tuple[Callable[[], None], Answer]] = deque()
        # Taken and not settled, in order: the number of the window that each tag belongs to.
        self._tags: dict[int, int] = {}
        self._acked = False  # since the last requeuing
        self._window = 0
        self._missing = 0  # how many of this window have not arrived
        self._behind = 0  # how many more there are
        self._size, self._largest_body = 0, 0  # of this window; of its bodies
        self._consumer = ""  # of this window, until it is cancelled
        self._arrived_at = 0.0
        self._pause: object = None
        self._keep = True
        self._taken: Callable[[], None]
        self._last: tuple[bool, Any] = (False, None)  # whether redelivered; properties
        self._channel: Channel = call(self._open, timeout)

    @property
    def ahead(self) -> int:
        """How many have been taken and not returned yet."""
        return len(self._arrivals) if self._is_open() else 0

    def next(self, timeout: float, most: int = 1) -> RabbitDelivery | None:
        """The next message, or None.

        :param most: take no more than so many from the queue.
        """
        if not self._is_open():
            self._arrivals.clear()
            raise self._lost_error()
        delivery = self._arrivals.take()
        if delivery is None:
            taken = partial(self._answered, None)
            self._request(partial(self._take_more, most, taken), timeout)
            delivery = self._arrivals.take()
        return delivery

    def ack(self, delivery: Delivery, timeout: float) -> None:
        """Remove the message from the queue."""
        self.ack_all([delivery], timeout)

    def ack_all(self, deliveries: Sequence[Delivery], timeout: float) -> None:
        """Remove the messages from the queue."""
        receipts = [delivery.receipt for delivery in deliveries]
        are_current = all(channel is self._channel for channel, _ in receipts)

        def ack() -> None:
            if are_current:
                for _, tag in receipts:
                    self._channel.basic_ack(tag)
                    self._tags.pop(tag, None)
            self._answered(are_current)

        self._acked = True
        if not self._request(ack, timeout):
            raise self._lost_error()

    def rewind(self) -> None:
        """Requeue all unacked messages; `next` then returns them again."""
        if not self._is_open():
            raise self._lost_error()
        if self._acked:
            self._await_acks()
        if not self._tags:
            return
        deadline = time.monotonic() + _TAKE_REST_TIMEOUT
        self._request(partial(self._take_rest, deadline), self._timeout)
        self._arrivals.clear()
        if self._may_be_requeued() and time.monotonic() > deadline:
            log.warning(
                "%s: requeuing %d messages in their order takes too long; their order changes.",
                self._queue,
                len(self._tags),
            )
        nacks = list(_nacks(self._tags))
        self._tags.clear()
        self._size, self._last = 0, (False, None)
        ready = self._request(self._count, self._timeout)
        together = nacks[:1]
        for start in range(1, len(nacks) + _NACKS_UNDER_WAY, _NACKS_UNDER_WAY):
            self._request(partial(self._nack, [tag for tag, _ in together]), self._timeout)
            ready = self._wait_for(ready + sum(number for _, number in together))
            together = nacks[start : start + _NACKS_UNDER_WAY]

    def close(self, timeout: float) -> None:
        """Requeue all unacked messages, and end."""
        # When the connection is lost, the broker requeues all.
        with contextlib.suppress(BrokerUnavailable):
            self.rewind()
            self._call(self._close, timeout)

    def _await_acks(self) -> None:
        """Wait until the queue has got the acks; see the module's docstring."""
        for _ in range(2):
            taken = partial(self._answered, None)
            self._request(partial(self._take_more, 1, taken, keep=False), self._timeout)
        self._acked = False

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
            channel.add_on_cancel_callback(self._link.guarded(self._on_cancel))
            connection.transport.on_deliver(
                channel.channel_number,
                self._link.guarded(partial(self._on_delivery, channel)),
                self._queue,
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

    def _take_more(self, most: int, taken: Callable[[], None], *, keep: bool = True) -> None:
        """Take one message, then a window of those behind it; then call ``taken``.

        :param most: of all these.
        :param keep: for the caller; otherwise, only to requeue them.
        """
        self._taken, self._keep = taken, keep

        def on_message(
            channel: Channel, method: Basic.GetOk, properties: pika.BasicProperties, body: bytes
        ) -> None:
            self._window += 1
            self._behind = method.message_count or 0
            self._take(
                text(method.exchange),
                text(method.routing_key),
                bool(method.redelivered),
                int(method.delivery_tag or 0),
                properties,
                body,
            )
            self._begin_window(min(most - 1, self._behind))

        self._channel.basic_get(self._queue, self._link.guarded(on_message))

    def _begin_window(self, most: int) -> None:
        fitting = _BYTES_PER_WINDOW // max(1, self._largest_body)
        size = min(self._size * _GROWTH, _LARGEST_WINDOW, fitting, most)
        # The first message of a walk is taken alone: it may be the only one that is needed.
        self._size, self._largest_body = max(1, size), 0
        if size < 1:
            self._taken()
            return
        self._window += 1
        self._missing = size
        guarded = self._link.guarded

        def consume(_frame: object) -> None:
            if self._is_open():
                self._consumer = self._channel.basic_consume(
                    self._queue,
                    lambda *_: None,  # required; never called, since our own reader takes them
                )
                self._await_delivery()

        self._channel.basic_qos(prefetch_count=size, callback=guarded(consume))

    def _on_delivery(
        self,
        channel: Channel,
        exchange: str,
        routing_key: str,
        redelivered: bool,
        tag: int,
        properties: Properties,
        body: bytes,
    ) -> None:
        if channel is not self._channel:
            return  # it is closing; the broker has requeued it
        self._behind -= 1
        self._take(exchange, routing_key, redelivered, tag, properties, body)
        self._missing -= 1
        if self._missing > 0:
            self._await_delivery()
        elif self._missing == 0:
            self._end_window()

    def _take(
        self,
        exchange: str,
        routing_key: str,
        redelivered: bool,
        tag: int,
        properties: Any,
        body: bytes,
    ) -> None:
        """Remember its tag, even if the caller has given up: it has to be requeued in its place."""
        self._tags[tag] = self._window
        self._last = redelivered, properties
        self._largest_body = max(self._largest_body, len(body))
        if self._answer is not None:
            self._answer.progress(tag)
        if not self._keep:
            return
        self._arrivals.add(
            RabbitDelivery(
                exchange,
                routing_key,
                redelivered,
                properties,
                body,
                (self._channel, tag),
                max(0, self._behind),
                release=self._release,
            )
        )

    def _await_delivery(self) -> None:
        """End the window if none arrives for a while."""
        now = time.monotonic()
        self._arrived_at = now
        if self._pause is None:
            self._pause = self._link.call_later(_LONGEST_PAUSE, self._on_pause)

    def _on_pause(self) -> None:
        self._pause = None
        if not self._missing or not self._is_open():
            return
        left = self._arrived_at + _LONGEST_PAUSE - time.monotonic()
        if left > 0:
            self._pause = self._link.call_later(left, self._on_pause)
        else:
            self._end_window()

    def _end_window(self) -> None:
        """Cancel its consumer. What still arrives until the reply belongs to it, too."""
        consumer, self._consumer = self._consumer, ""
        if consumer:
            self._channel.basic_cancel(consumer, callback=self._link.guarded(self._window_ended))

    def _window_ended(self, _frame: object) -> None:
        self._missing = 0
        self._taken()

    def _on_cancel(self, _frame: object) -> None:
        """The broker has cancelled the consumer: the queue was deleted, or its node stops."""
        if self._consumer:
            self._consumer = ""
            self._window_ended(None)

    def _take_rest(self, deadline: float) -> None:
        """Take those that were requeued before; see the module's docstring."""
        if self._may_be_requeued() and time.monotonic() < deadline:
            taken = partial(self._take_rest, deadline)
            self._take_more(_LARGEST_WINDOW, taken, keep=False)
        else:
            self._answered(None)

    def _may_be_requeued(self) -> bool:
        """Whether the next message may be one that was requeued to a quorum queue before."""
        redelivered, properties = self._last
        if not redelivered:
            return False
        headers = properties.headers or {}
        return "x-delivery-count" in headers or "x-acquired-count" in headers

    def _on_empty(self, _frame: object) -> None:
        self._last = (False, None)
        self._taken()

    def _count(self) -> None:
        self._channel.queue_declare(
            self._queue,
            passive=True,
            callback=self._link.guarded(lambda frame: self._answered(frame.method.message_count)),
        )

    def _nack(self, tags: Sequence[int]) -> None:
        for tag in tags:
            self._channel.basic_nack(tag, multiple=True, requeue=True)
        self._answered(None)

    def _on_close(self, reason: BaseException) -> None:
        self._consumer, self._missing = "", 0
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


def _nacks(windows: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """The nacks that requeue these tags: the last tag of each, and how many messages it is for."""
    tags = list(windows)
    number = 0
    for tag, behind in zip(tags, [*tags[1:], None], strict=True):
        number += 1
        if behind is None or windows[behind] != windows[tag] or number == _MESSAGES_PER_NACK:
            yield tag, number
            number = 0
