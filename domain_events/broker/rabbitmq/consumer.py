"""Consumes one queue, across reconnects and other failures: deliveries in, settlements out.

Threads. A thread that settles appends to ``_settled`` and rings; the I/O thread alone owns the
channel, its tags and all other state. Other threads only read which channel is the current one.

A delivery tag is valid on its channel only. So each channel has a number, its *epoch*, which is
part of each receipt. Settlements of an old epoch are ignored, since the broker has requeued their
deliveries.

**When acks are sent.** Together, since a wake-up and a frame for each would halve the speed, but
without a noticeable delay:

- when `_ACKS_TOGETHER` deliveries were settled;
- when one is settled after more than `_SLOW` seconds: the handlers are slow, and the wake-up does
  not matter;
- on `flush`, which a worker calls when it has nothing else to do: the broker may be waiting for
  this very ack before it sends more;
- after `_LONGEST_WITHHELD` seconds in any case: the next handler may take an hour, and the broker
  redelivers whatever was not acked.

**When acks are forgotten.** While more than 32 commands are under way to a quorum queue, the
broker's client of the queue keeps further ones back, and forgets them when its channel is closed:
what was handled would come again. A cancel is answered when the commands before it were performed;
so what can be settled is settled before it. Since RabbitMQ 4.0 those kept back are sent before it,
too. Until then, they are sent once the client has seen that others were performed; so it is given
something more to do, whose answer the queue sends behind that. Nacks can be forgotten likewise, and
those of a stop come after the cancel; so they are sent for many deliveries together.

**The careful start.** See `CarefulStart`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from pika.channel import Channel

from domain_events.broker import Consumer, Queue, Settlement
from domain_events.broker.rabbitmq import topology
from domain_events.broker.rabbitmq.channel import Channels, ChannelSetup
from domain_events.broker.rabbitmq.doorbell import Doorbell
from domain_events.broker.rabbitmq.envelope import Properties, RabbitDelivery
from domain_events.broker.rabbitmq.errors import close_code, explain
from domain_events.broker.rabbitmq.link import REMINDER, is_io_thread
from domain_events.broker.rabbitmq.topology import Topology
from domain_events.errors import BrokerUnavailable, DomainEventsError
from domain_events.log import Log
from domain_events.message import Delivery
from domain_events.retry import Backoff

log = Log("domain_events")

# The policy of acks; see above.
_ACKS_TOGETHER = 25
_SLOW = 0.001
_LONGEST_WITHHELD = 0.1
# More would come back in another order: of larger maps Erlang does not keep the order of the keys
# (rabbit_fifo.erl, `return`).
_NACKS_TOGETHER = 32

# Before a consumer that the broker refused tries again.
_PAUSES = Backoff(0.1, maximum=10.0, jitter=0.5)
# The same for one over which the broker closes the connection, others' too.
_LONG_PAUSES = Backoff(60.0, maximum=3600.0, jitter=0.0)

# Failures from which a delivery is suspect: up to RabbitMQ 4.2 an orderly stop counts as one, too.
_SUSPECT_FAILURES = 3
# How long a suspect is handled before one more delivery is taken beside it, by how often it has
# failed: a slow and innocent one that was held beside a culprit repeatedly is then left alone for
# long enough before it has failed too often.
_ALONE = Backoff(3.0, maximum=3600.0, jitter=0.0)

# Bodies from this size on are counted, and a warning is logged when the consumer holds so many
# bytes of them.
_LARGE = 64 * 1024
_MANY_BYTES = 256 * 2**20


class Command(NamedTuple):
    """An ack or a nack; ``multiple``: of all that are outstanding up to this tag."""

    tag: int
    acks: bool = True
    multiple: bool = False


class Tags:
    """The deliveries of one channel, by tag; replaced as a whole with the channel.

    Invariant: tags below ``_floor`` or in ``_settled_above`` are settled, and the broker is
    informed or about to be; all others up to ``_last`` are unsettled, also the floor itself.

    :ivar ticking: whether the next check for unsent settlements is scheduled.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.ticking = False
        self._floor = 1
        self._settled_above: set[int] = set()
        self._last = 0
        self._large: dict[int, int] = {}  # sizes of large bodies that are unsettled

    def delivered(self, tag: int, size: int) -> None:
        """The broker has sent this delivery."""
        self._last = tag
        if size >= _LARGE:
            self._large[tag] = size

    def settle(self, tag: int) -> bool:
        """Mark it as settled; False if it was: the broker would close the channel over it."""
        if not self.is_unsettled(tag):
            return False
        self._settled_above.add(tag)
        if self._large:
            self._large.pop(tag, None)
        return True

    def is_unsettled(self, tag: int) -> bool:
        return self._floor <= tag <= self._last and tag not in self._settled_above

    def unsettled(self) -> set[int]:
        return set(range(self._floor, self._last + 1)) - self._settled_above

    def count(self) -> int:
        """How many are unsettled; also for other threads, which may read it a moment too early."""
        return self._last + 1 - self._floor - len(self._settled_above)

    def all_settled(self) -> bool:
        return self._floor > self._last

    def commands(self, done: Sequence[int], back: Sequence[int]) -> Iterator[Command]:
        """What to send for these settled tags, in this order: those handled, those given back.

        A run of acks without a gap is sent as one, and of nacks behind it some together. Nothing
        else that is settled may be outstanding at the broker.
        """
        above = self._settled_above
        while self._floor in above:
            above.discard(self._floor)
            self._floor += 1
        # The tag of a `multiple` must itself be outstanding (otherwise 406), hence the highest.
        acked = max((tag for tag in done if tag < self._floor), default=0)
        for tag in back:
            if tag < acked or tag > self._floor:
                yield Command(tag, acks=False)
        if acked:
            yield Command(acked, multiple=True)
        for tag in done:
            if tag > self._floor:
                yield Command(tag)
        behind = sorted(tag for tag in back if acked < tag < self._floor)
        for last in (*behind[_NACKS_TOGETHER - 1 : -1 : _NACKS_TOGETHER], *behind[-1:]):
            yield Command(last, acks=False, multiple=True)

    def large(self) -> tuple[int, int]:
        """How many deliveries with large bodies are unsettled, and how many bytes these are."""
        return len(self._large), sum(self._large.values())


class CarefulStart:
    """How many deliveries to take on a channel, from its start on; replaced with the channel.

    A quorum queue counts a lost connection against all deliveries that were unsettled on it. So
    each channel is first consumed with a prefetch of 1: a redelivery may have killed the process
    that held it, and is handled alone or, if that takes long, with one more beside it at a time;
    the longer alone, the more often it has failed. When a delivery arrives that is not suspect,
    this consumer, which has no other in flight, is cancelled. Once that delivery is settled,
    another consumer takes as many as the prefetch count allows. If its handler takes long, others
    must not wait for it: then the other consumer takes the prefetch count less the unsettled
    deliveries, and for each of these one more consumer takes one when it is settled.

    Invariant: the deliveries that the consumers of the channel may hold, together with ``_owed``,
    are never more than the prefetch count.
    """

    def __init__(self, prefetch_count: int, *, careful: bool) -> None:
        self._prefetch_count = prefetch_count
        #: While all deliveries were redeliveries.
        self.one_at_a_time = careful
        self._first = 0  # the tag of the first that was not suspect, as long as it is unsettled
        # Tags that were unsettled when the others were taken; for each, one more is due.
        self._owed: set[int] | None = None

    @property
    def first_prefetch_count(self) -> int:
        return 1 if self.one_at_a_time else self._prefetch_count

    def trust(self, tag: int) -> None:
        """A delivery has arrived that is not suspect."""
        self.one_at_a_time = False
        self._first = tag

    def settled(self, settled: Collection[int], tags: Tags) -> int:
        """How many more to take, now that these are settled."""
        if self._first in settled:
            self._first = 0
            if self._owed is None:
                return self._take_all(tags)
        if not self._owed:
            return 0
        before = len(self._owed)
        self._owed.difference_update(settled)
        return before - len(self._owed)

    def waited(self, tags: Tags) -> int:
        """How many more to take, although the first one is not settled yet."""
        return self._take_all(tags) if self._first and self._owed is None else 0

    def _take_all(self, tags: Tags) -> int:
        self._owed = tags.unsettled()
        return max(0, self._prefetch_count - len(self._owed))


class Trouble:
    """Why a queue is not being consumed; a refusal that repeats is logged every few minutes.

    :ivar reason: in words for the log; empty while all is well.
    :ivar failures: how often it has failed since it last consumed.
    :ivar not_before: when it may be tried again, if the broker closes connections over it.
    """

    def __init__(self, queue: str) -> None:
        self._queue = queue
        self.reason = ""
        self.failures = 0
        self.not_before = 0.0
        self._refusal, self._logged_at = "", 0.0

    def pause(self) -> float:
        """Seconds until the next attempt."""
        self.failures += 1
        return _PAUSES.delay(self.failures)

    def long_pause(self) -> float:
        """The same, after the broker has closed a connection that others use, too."""
        self.failures += 1
        seconds = _LONG_PAUSES.delay(self.failures)
        self.not_before = time.monotonic() + seconds
        return seconds

    def refused(self, error: DomainEventsError) -> None:
        self.reason = "the broker had refused it"
        now = time.monotonic()
        if self._refusal != str(error) or now - self._logged_at >= REMINDER:
            self._refusal, self._logged_at = str(error), now
            log.error("%s cannot consume; trying again. %s", self._queue, error)

    def over(self) -> None:
        self.failures = 0
        self._refusal = ""
        if self.reason:
            reason, self.reason = self.reason, ""
            log.warning("%s consumes again; %s.", self._queue, reason)


class RabbitConsumer:
    """See `domain_events.broker.Consumer`."""

    def __init__(
        self,
        channels: Channels,
        declare: Callable[[Topology, Callable[[bool], None]], None],
        queue: Queue,
        prefetch_count: int,
        deliver: Callable[[Delivery, Consumer], None],
    ) -> None:
        self._channels = channels
        self._link = channels.link
        self._declare = declare
        self._queue = queue
        self._return_exchanges = topology.return_exchanges(queue.exchange.name)
        self._prefetch_count = prefetch_count
        self._deliver = deliver
        self._starts_carefully = queue.counts_failures and prefetch_count > 1
        # Any thread: settlements that were not sent to the broker yet, and the time of the last.
        self._settled: deque[tuple[tuple[int, int], Settlement]] = deque()
        self._settled_at = 0.0
        self._bell = Doorbell(lambda: self._link.wake(self._send_settled))
        # The I/O thread.
        self._setup: ChannelSetup | None = None
        self._consumer_tags: dict[str, bool] = {}  # whether each is being cancelled
        self._consuming_since: float | None = None  # any thread reads it
        self._stopping = False
        self._stopped = threading.Event()
        self._trouble = Trouble(queue.name)
        self._warned_of_bytes = False
        self._begin_channel(None, 0)

    def _begin_channel(self, channel: Channel | None, epoch: int) -> None:
        self._channel = channel
        self._consuming_since = None
        self._consumer_tags.clear()
        self._start = CarefulStart(self._prefetch_count, careful=self._starts_carefully)
        self._tags = Tags(epoch)  # other threads read its epoch

    # --- any thread ----------------------------------------------------------------------------

    @property
    def consuming_since(self) -> float | None:
        return self._consuming_since

    @property
    def unsettled(self) -> int:
        # Without the settlements that are about to be sent.
        return max(0, self._tags.count() - len(self._settled))

    def is_current(self, delivery: Delivery) -> bool:
        """Whether the delivery can still be settled."""
        return bool(delivery.receipt[0] == self._tags.epoch)

    def settle(self, delivery: Delivery, how: Settlement = Settlement.DONE) -> None:
        """Settle the delivery; the broker is informed soon, or at once by `flush`."""
        self._settled.append((delivery.receipt, how))
        now = time.monotonic()
        slow = now - self._settled_at > _SLOW
        self._settled_at = now
        if slow or len(self._settled) >= _ACKS_TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Send all settlements so far to the broker now."""
        if self._settled:
            self._wake(self._bell.ring)

    def repair(self, seconds: float, then: Callable[[bool], None], *, delays: bool = False) -> None:
        """Declare the queue again, with ``delays`` or without; call ``then`` after a pause."""

        def declared(succeeded: bool) -> None:
            self._link.call_later(seconds, partial(then, succeeded))

        wanted = replace(self._queue, delays=delays or self._queue.delays)
        needed = topology.needed(wanted)
        self._wake(partial(self._link.wake, lambda: self._declare(needed, declared)))

    def stop(self, timeout: float) -> None:
        """Take no more deliveries."""

        def stop() -> None:
            if self._stopping:
                return  # pika ignores a second basic_cancel, and does not call back
            self._stopping = True
            self._consuming_since = None
            if self._channel is None or not self._channel.is_open:
                self._stopped.set()
                return
            self._cancel_all(self._channel)
            if not self._consumer_tags:
                self._stopped.set()

        if self._wake(partial(self._link.wake, stop)):
            self._stopped.wait(0 if is_io_thread() else timeout)

    def _wake(self, wake: Callable[[], None]) -> bool:
        try:
            wake()
        except BrokerUnavailable:
            return False  # closed: the broker has requeued all unsettled deliveries
        return True

    # --- the I/O thread: the channel -----------------------------------------------------------

    def open(self) -> None:
        """Declare and consume; called again after each failure."""
        if self._setup or self._stopping or not self._channels.is_open:
            return
        if time.monotonic() < self._trouble.not_before:
            return
        self._setup = self._channels.open(
            topology.needed(self._queue),
            prepare=self._prepare,
            failed=self._refused,
            closed=self._closed,
        )

    def _prepare(self, channel: Channel) -> None:
        self._limit(channel, self._start.first_prefetch_count, partial(self._begin, channel))

    def _limit(self, channel: Channel, prefetch_count: int, then: Callable[[], None]) -> None:
        if channel.is_open:  # the broker may have cancelled meanwhile, or all is being closed
            guarded = self._link.guarded
            channel.basic_qos(
                prefetch_count=prefetch_count, callback=guarded(lambda _frame: then())
            )

    def _begin(self, channel: Channel) -> None:
        connection = self._link.connection
        if connection is None or not channel.is_open:
            return
        if self._stopping:
            channel.close()
            return
        guarded = self._link.guarded
        self._begin_channel(channel, self._tags.epoch + 1)
        epoch = self._tags.epoch
        channel.add_on_cancel_callback(guarded(self._cancelled))
        # Deliveries may arrive before the reply to the request below.
        connection.transport.on_deliver(
            channel.channel_number,
            guarded(partial(self._on_delivery, epoch, connection.release)),
            self._queue.name,
        )
        self._consume(channel)

    def _consume(self, channel: Channel) -> None:
        tag = channel.basic_consume(
            self._queue.name,
            lambda *_: None,  # required; never called, since our own reader takes deliveries
            callback=self._link.guarded(self._consumes),
        )
        self._consumer_tags[tag] = False

    def _consumes(self, _frame: object) -> None:
        if self._setup is not None:
            self._setup.usable()
        # Not the time of each consumer of a careful start: to the user they are one.
        if self._consuming_since is None and not self._stopping:
            self._consuming_since = time.time()
        self._trouble.over()

    def _cancel_all(self, channel: Channel) -> None:
        for tag, cancelling in self._consumer_tags.items():
            if not cancelling:
                self._consumer_tags[tag] = True
                cancelled = self._link.guarded(partial(self._cancel_ok, tag))
                channel.basic_cancel(tag, callback=cancelled)

    def _cancel_ok(self, tag: str, _frame: object) -> None:
        self._consumer_tags.pop(tag, None)
        if not self._stopping or self._consumer_tags:
            return
        connection, channel = self._link.connection, self._channel
        keeps_acks = self._queue.counts_failures and connection and connection.release < (4, 0)
        if not keeps_acks or channel is None or not channel.is_open:
            self._stopped.set()
            return
        # See "When acks are forgotten". If it is refused, the channel is closed, and that noticed.
        seen = self._link.guarded(lambda _frame: self._stopped.set())
        channel.queue_declare(self._queue.name, passive=True, callback=seen)

    def _cancelled(self, _frame: object) -> None:
        # The queue was deleted, or its node is stopping, or a delivery was held for too long
        # (https://www.rabbitmq.com/docs/consumer-cancel). If the queue exists, the broker has
        # requeued its unsettled deliveries.
        self._trouble.reason = "the broker had cancelled the consumer"
        self._consuming_since = None
        self._send_settled()
        if self._setup is not None and self._channel is not None and self._channel.is_open:
            self._setup.close(self._channel)

    def _refused(self, error: DomainEventsError, _reason: BaseException) -> None:
        if self._stopping:
            self._end_channel()  # `stop` waits for that
            return
        self._trouble.refused(error)
        # Without a connection: the broker has closed it over this one, and others use it.
        broke_connection = self._link.connection is None
        self._open_later(self._trouble.long_pause() if broke_connection else self._trouble.pause())

    def _closed(self, reason: BaseException) -> None:
        if self._stopping:
            self._end_channel()
            return
        if close_code(reason):
            self._trouble.reason = f"the broker had closed the channel: {explain(reason)}"
        self._open_later(self._trouble.pause())

    def lost(self, trouble: str, *, mistake: bool) -> None:
        """The connection is gone, and the channel with it; ``mistake``: over a bad request."""
        self._trouble.reason = trouble
        self._bell.answer()
        if not mistake:
            self._trouble.not_before = 0.0  # another broker, perhaps with other plugins
        self._end_channel()

    def forget(self) -> None:
        """After a fork, in the child: these deliveries are the parent's."""
        self._stopping = True
        self._end_channel()

    def _end_channel(self) -> None:
        # From here on, deliveries of the old channel are not current any more.
        self._begin_channel(None, self._tags.epoch + 1)
        self._setup = None
        self._settled.clear()
        if self._stopping:
            self._stopped.set()

    def _open_later(self, pause: float) -> None:
        self._end_channel()
        self._link.call_later(pause, self.open)

    # --- the I/O thread: deliveries ------------------------------------------------------------

    def _on_delivery(
        self,
        epoch: int,
        release: tuple[int, int],
        exchange: str,
        routing_key: str,
        redelivered: bool,
        tag: int,
        properties: Properties,
        body: bytes,
    ) -> None:
        tags = self._tags
        if epoch != tags.epoch:
            return  # the channel is closing; the broker has requeued it
        tags.delivered(tag, len(body))
        if len(body) >= _LARGE:
            self._warn_of_bytes()
        if not tags.ticking:
            self._tick_later(tags)
        receipt = (epoch, tag)
        delivery = RabbitDelivery(
            exchange,
            routing_key,
            redelivered,
            properties,
            body,
            receipt,
            release=release,
            is_ours=exchange in self._return_exchanges,
        )
        self._deliver(delivery, self)
        if self._start.one_at_a_time:
            self._check_suspect(delivery, tag)

    def _check_suspect(self, delivery: Delivery, tag: int) -> None:
        """Whether the delivery may have killed a process, or broken a connection."""
        least = _SUSPECT_FAILURES if delivery.give_back_counts else 1
        if delivery.redelivered and delivery.failures >= least:
            alone = _ALONE.delay(delivery.failures - least + 1)
            self._link.call_later(alone, partial(self._bypass_suspect, self._tags, tag))
            return
        channel = self._channel
        self._start.trust(tag)
        if channel is not None and channel.is_open and not self._stopping:
            self._cancel_all(channel)
            self._link.call_later(_LONGEST_WITHHELD, partial(self._bypass_first, self._tags))

    def _bypass_suspect(self, tags: Tags, tag: int) -> None:
        """A suspect has not killed the process so far: others must not wait for it."""
        careful = tags is self._tags and self._start.one_at_a_time and tags.is_unsettled(tag)
        if careful and len(self._consumer_tags) < self._prefetch_count:
            self._take(1)

    def _bypass_first(self, tags: Tags) -> None:
        """Others must not wait for the first delivery that is not suspect, either."""
        if tags is self._tags:
            self._take(self._start.waited(tags))

    def _take(self, prefetch_count: int) -> None:
        """Start one more consumer, with this prefetch count."""
        channel, setup = self._channel, self._setup
        if not prefetch_count or channel is None or setup is None or self._stopping:
            return
        if not channel.is_open:
            return

        def consume() -> None:
            if channel is self._channel and not self._stopping and channel.is_open:
                self._consume(channel)
            else:
                setup.usable()

        setup.await_answer()
        self._limit(channel, prefetch_count, consume)

    def _warn_of_bytes(self) -> None:
        number, size = self._tags.large()
        if size >= _MANY_BYTES and not self._warned_of_bytes:
            self._warned_of_bytes = True
            log.warning(
                "%s holds %d MiB of unsettled events, in %d deliveries. It may hold %d "
                "deliveries (prefetch_count); to save memory, lower that.",
                self._queue.name,
                size // 2**20,
                number,
                self._prefetch_count,
            )

    # --- the I/O thread: settlements -----------------------------------------------------------

    def _tick_later(self, tags: Tags) -> None:
        tags.ticking = True
        self._link.call_later(_LONGEST_WITHHELD, partial(self._tick, tags))

    def _tick(self, tags: Tags) -> None:
        """While any delivery is unsettled: send settlements that were not flushed."""
        if tags is not self._tags:
            return
        tags.ticking = False
        if self._settled:
            self._send_settled()
        if not tags.all_settled():
            self._tick_later(tags)

    def _send_settled(self) -> None:
        self._bell.answer()
        channel, tags = self._channel, self._tags
        done: list[int] = []
        back: list[int] = []
        failed: list[int] = []
        while self._settled:
            (epoch, tag), how = self._settled.popleft()
            if epoch != tags.epoch or channel is None or not channel.is_open:
                continue
            if not tags.settle(tag):
                continue
            if how is Settlement.DONE:
                done.append(tag)
            elif how is Settlement.GIVE_BACK:
                back.append(tag)
            else:
                failed.append(tag)
                # Since RabbitMQ 4.3 only this counts towards the delivery limit
                # (https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling).
                channel.basic_reject(tag, requeue=True)
        if channel is not None and (done or back or failed):
            for tag, acks, multiple in tags.commands(done, back):
                if acks:
                    channel.basic_ack(tag, multiple=multiple)
                else:
                    channel.basic_nack(tag, multiple=multiple, requeue=True)
            self._take(self._start.settled([*done, *back, *failed], tags))
