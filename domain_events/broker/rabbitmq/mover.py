"""Moves the messages of a queue to other places, in order, each as it is.

Each message is published to its new place (mandatory and confirmed), and then acked in the old one:
when this is killed in between it is in both, so at most `MOST_UNDER_WAY` messages are there twice,
and none is lost. Properties and headers stay as they are, see `verbatim`.

Two connections, since a broker that is short of memory reads nothing from those that publish, and
acks must pass. While more than `_MOST_BYTES` are under way nothing more is read, so that the memory
is bounded, whatever the size of the messages.

Threads. The caller's thread starts, watches and stops. The I/O thread of the consuming connection
owns the channel and its tags; the one of the publishing connection appends what is confirmed.
``_changed`` guards nothing but the caller's waiting.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from pika.channel import Channel

from domain_events.broker import Publication
from domain_events.broker.rabbitmq.channel import Channels
from domain_events.broker.rabbitmq.consumer import Tags
from domain_events.broker.rabbitmq.doorbell import Doorbell
from domain_events.broker.rabbitmq.envelope import Moved
from domain_events.broker.rabbitmq.errors import closed_error, explain
from domain_events.broker.rabbitmq.link import Link
from domain_events.broker.rabbitmq.nodes import Nodes
from domain_events.broker.rabbitmq.publishing import RabbitPublishing
from domain_events.broker.rabbitmq.transport import Connection
from domain_events.broker.rabbitmq.verbatim import without_broker_headers
from domain_events.broker.rabbitmq.wire import ReceivedProperties
from domain_events.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEventsError,
    InvalidEvent,
)
from domain_events.message import ToExchange

#: The most messages that are under way. Of more, a quorum queue does not keep the order when it
#: gets them back at once, as it does when this is killed (see `browser`).
MOST_UNDER_WAY = 32
_MOST_BYTES = 16 * 2**20
_CLOSE_TIMEOUT = 10.0

#: The exchange and the routing key to publish a message with, from those that it came by.
Address: TypeAlias = Callable[[str, str], tuple[str, str]]


class Mover:
    """Moves what is in a queue, and what arrives there, until it is stopped or closed.

    It does not reconnect: it ends with the first error, and everything that was not acked by then
    is in the old place.

    :param address: where a message goes; called on an I/O thread.
    :param exclusive: be the only consumer; one that is there already makes this one fail.
    :param keep_deaths: see `without_broker_headers`.
    :ivar moved: how many were confirmed at their new places.
    :ivar error: why it has ended.
    """

    def __init__(
        self,
        urls: tuple[str, ...],
        queue: str,
        address: Address,
        *,
        exclusive: bool = False,
        keep_deaths: bool = False,
    ) -> None:
        self._queue = queue
        self._address = address
        self._exclusive = exclusive
        self._keep_deaths = keep_deaths
        self._changed = threading.Condition()
        self.moved = 0
        self._received = 0
        self._answered = 0
        self.error: DomainEventsError | None = None
        self._consuming = False
        self._cancelled = False
        self._ending = False
        self._closed = False
        self._publishing = RabbitPublishing(Nodes(urls), None, "moving")
        self._link = Link(Nodes(urls), "moving", self)
        self._confirmed: deque[int] = deque()
        self._bell = Doorbell(lambda: self._link.wake(self._ack))
        self.forget()

    def forget(self) -> None:
        """Reset all state (at first, and in the child of a fork)."""
        self._channels = Channels(self._link)
        self._channel: Channel | None = None
        self._connection: Connection | None = None
        self._consumer_tag = ""
        self._tags = Tags(1)
        self._sizes: dict[int, int] = {}
        self._bytes = 0
        self._reading = True

    # --- the caller's thread ---------------------------------------------------------------------

    def __enter__(self) -> Mover:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, timeout: float) -> None:
        """Consume.

        :raises DomainEventsError: it cannot, or not within so many seconds.
        """
        self._link.wake(self._link.connect)
        self._wait(lambda: self._consuming, timeout, "consume")

    @property
    def under_way(self) -> int:
        """How many were received and not acked."""
        return self._tags.count()

    @property
    def trouble(self) -> str:
        """Why nothing is confirmed at the moment."""
        return self._publishing.trouble or self._link.trouble

    def check(self) -> None:
        """:raises DomainEventsError: it has ended, for this reason."""
        if self.error is not None:
            raise type(self.error)(*self.error.args) from self.error.__cause__

    def stop(self, timeout: float) -> None:
        """Take no more, and wait until all that were taken are moved.

        :raises DomainEventsError: one could not be, or not within so many seconds.
        """
        self._link.wake(self._cancel)
        self._wait(lambda: self._cancelled and not self.under_way, timeout, "end")

    def finish(self, delete: Callable[[], None], timeout: float) -> None:
        """Have the queue deleted under this consumer, and wait until all it got is moved.

        So what arrives up to that moment is not lost with the queue: the broker has sent it here
        before it deletes the queue and cancels the consumer.

        :param delete: deletes the queue, which has no other consumers.
        :raises DomainEventsError: it was not deleted, one could not be moved, or not within so many
            seconds.
        """
        self._ending = True
        try:
            delete()
            self._wait(lambda: self._cancelled, timeout, "end")
        finally:
            # Also when the connection was lost meanwhile: nobody else has these any more.
            self._wait_for_answers(timeout)
        self.check()

    def close(self) -> None:
        """End; what is not acked by now stays in the old place."""
        self._closed = True
        self._link.close(_CLOSE_TIMEOUT)
        self._publishing.close(0.0)

    def _wait(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        moved = self.moved
        with self._changed:
            while self.error is None and not condition():
                if self.moved != moved:  # it goes on
                    moved, deadline = self.moved, time.monotonic() + timeout
                left = deadline - time.monotonic()
                if left <= 0:
                    why = self.trouble or "no answer"
                    raise BrokerUnavailable(
                        f"Moving the messages of {self._queue!r} did not {what} within "
                        f"{timeout:g} s. {why}."
                    )
                self._changed.wait(min(left, 1.0))
        self.check()

    def _wait_for_answers(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with self._changed:
            while self._answered < self._received and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, 1.0))
        if self._answered < self._received:
            self._fail(
                BrokerUnavailable(
                    f"{self._received - self._answered} messages of {self._queue!r} were not "
                    f"confirmed within {timeout:g} s. {self.trouble or 'No answer'}."
                )
            )

    # --- the I/O thread of the consuming connection ----------------------------------------------

    def opened(self, connection: Connection) -> None:
        """There is a connection: consume."""
        if self.error is not None or self._closed:
            return
        self._connection = connection
        self._setup = self._channels.open(
            (),
            prepare=self._prepare,
            failed=lambda error, _reason: self._fail(error),
            closed=lambda reason: self._fail(
                BrokerUnavailable(f"The channel on {self._queue!r} was closed: {explain(reason)}.")
            ),
        )

    def lost(self, error: BaseException | None) -> None:
        """The connection is gone, and everything that was not acked is back in the queue."""
        self._channels.lost()
        if not self._closed:
            self._fail(BrokerUnavailable(f"The connection was lost: {explain(error)}."))

    def refused(self, error: ConfigurationError) -> None:
        """No connection can be made."""
        self._fail(error)

    def _prepare(self, channel: Channel) -> None:
        guarded = self._link.guarded
        self._channel = channel
        channel.add_on_cancel_callback(guarded(self._on_cancelled))
        assert self._connection is not None
        self._connection.transport.on_deliver(
            channel.channel_number, guarded(self._on_delivery), self._queue
        )
        channel.basic_qos(prefetch_count=MOST_UNDER_WAY, callback=guarded(self._consume))

    def _consume(self, _frame: object) -> None:
        channel = self._channel
        if channel is not None and channel.is_open:
            self._consumer_tag = channel.basic_consume(
                self._queue,
                lambda *_: None,  # never called, since our own reader takes deliveries
                exclusive=self._exclusive,
                callback=self._link.guarded(self._consumes),
            )

    def _consumes(self, _frame: object) -> None:
        self._setup.usable()
        self._consuming = True
        self._notify()

    def _cancel(self) -> None:
        channel = self._channel
        if channel is not None and channel.is_open:
            self._setup.await_answer()
            channel.basic_cancel(self._consumer_tag, callback=self._link.guarded(self._cancel_ok))

    def _cancel_ok(self, _frame: object) -> None:
        self._setup.usable()
        self._cancelled = True
        self._notify()

    def _on_cancelled(self, _frame: object) -> None:
        if self._ending:
            self._cancelled = True
            self._notify()
        else:
            self._fail(
                BrokerUnavailable(f"The broker has cancelled the consumer of {self._queue!r}.")
            )

    def _on_delivery(
        self,
        exchange: str,
        routing_key: str,
        _redelivered: bool,
        tag: int,
        properties: ReceivedProperties,
        body: bytes,
    ) -> None:
        self._tags.delivered(tag, 0)
        if self.error is not None:
            return
        self._sizes[tag] = len(body)
        self._bytes += len(body)
        if self._bytes > _MOST_BYTES and self._reading and self._connection is not None:
            self._reading = False
            self._connection.transport.pause_reading()
        try:
            to, key = self._address(exchange, routing_key)
            encoded = without_broker_headers(properties.encoded, keep_deaths=self._keep_deaths)
        except (ValueError, DomainEventsError) as error:
            self._fail(error if isinstance(error, DomainEventsError) else InvalidEvent(str(error)))
            return

        def done(publication: Publication) -> None:
            self._done(tag, publication.error)

        self._received += 1
        message = Moved(
            ToExchange(to), key, body, mandatory=True, received=properties, encoded=encoded
        )
        self._publishing.submit(Publication(message, done, awaited=False))

    def _ack(self) -> None:
        self._bell.answer()
        done: list[int] = []
        while self._confirmed:
            tag = self._confirmed.popleft()
            if self._tags.settle(tag):
                self._bytes -= self._sizes.pop(tag)
                done.append(tag)
        channel, connection = self._channel, self._connection
        if channel is None or connection is None or not channel.is_open or not done:
            return
        for tag, _acks, multiple in self._tags.commands(done, []):
            channel.basic_ack(tag, multiple=multiple)
        if not self._reading and self._bytes < _MOST_BYTES // 2:
            self._reading = True
            connection.transport.resume_reading()
        self._notify()

    # --- any I/O thread --------------------------------------------------------------------------

    def _done(self, tag: int, error: DomainEventsError | None) -> None:
        """A publication was confirmed, or has failed."""
        self._answered += 1
        if error is not None:
            self._fail(error)
            return
        self.moved += 1
        self._confirmed.append(tag)
        try:
            self._bell.ring()
        except BrokerUnavailable as closed:
            self._fail(closed)

    def _fail(self, error: DomainEventsError) -> None:
        if self.error is None:
            self.error = closed_error() if self._closed else error
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
