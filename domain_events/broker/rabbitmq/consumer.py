"""One queue being consumed, over every trouble: deliveries in, settlements out.

Threads. Whoever settles appends to ``_settled`` and rings; the I/O thread alone owns the channel,
its tags and all other state. Other threads only read which channel is the current one.

A tag dies with its channel. So each channel has a number, its *epoch*, which each receipt names.
What is settled under an old epoch is ignored, since the broker has requeued the delivery.

**When acks are sent.** Together, since a wake-up and a frame for each would halve the speed, but
never later than anybody could notice:

- when `_ACKS_TOGETHER` deliveries were settled;
- when one is settled after more than `_SLOW` seconds: the handlers are slow, and the wake-up does
  not count;
- on `flush`, which a worker calls when it has nothing else to do: the broker may be waiting for
  this very ack before it sends more;
- after `_LONGEST_WITHHELD` seconds in any case: the next handler may take an hour, and to the
  broker what is not acked is not handled.

**The careful start.** See `CarefulStart`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial

from pika.channel import Channel

from domain_events.broker import Consumer, Settlement
from domain_events.broker.rabbitmq.channel import Channels, ChannelSetup
from domain_events.broker.rabbitmq.doorbell import Doorbell
from domain_events.broker.rabbitmq.link import is_io_thread
from domain_events.broker.rabbitmq.nodes import close_code, explain
from domain_events.errors import BrokerUnavailable, DomainEventsError
from domain_events.log import Log
from domain_events.message import Delivery, Properties
from domain_events.retry import Backoff
from domain_events.topology import Topology

log = Log("domain_events")

# The policy of acks; see above.
_ACKS_TOGETHER = 25
_SLOW = 0.001
_LONGEST_WITHHELD = 0.1

# Before a consumer that the broker refused tries again.
_PAUSES = Backoff(0.1, maximum=10.0, jitter=0.5)
# The same for one over which the broker closes the connection, others' too.
_BARS = Backoff(60.0, maximum=3600.0, jitter=0.0)

# Up to RabbitMQ 4.2 an orderly stop counts as a failure, too: so many are nobody's fault.
_ABOVE_SUSPICION = 3
# How long a suspect is handled before one more delivery is taken beside it, by how often it has
# failed: what is slow and innocent, but was held beside a culprit again and again, is left alone
# for long enough before it has failed too often.
_ALONE = Backoff(3.0, maximum=3600.0, jitter=0.0)

# Bodies from this size on are counted, and a warning is logged when the consumer holds so many
# bytes of them.
_LARGE = 64 * 1024
_MANY_BYTES = 256 * 2**20


class Tags:
    """The deliveries of one channel, by tag; replaced as a whole with the channel.

    Invariant: what is below ``_floor`` or in ``_settled_above`` is settled, and the broker knows
    or is about to; everything else up to ``_last`` is unsettled. The floor itself is not settled.

    :ivar ticking: whether a look at what was settled and not sent is scheduled.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.ticking = False
        self._floor = 1
        self._settled_above: set[int] = set()
        self._last = 0
        self._large: dict[int, int] = {}  # sizes of large bodies that are unsettled

    def delivered(self, tag: int, size: int) -> None:
        """The broker has sent this one."""
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

    def all_settled(self) -> bool:
        return self._floor > self._last

    def acks(self, done: Sequence[int]) -> list[tuple[int, bool]]:
        """How to ack these, which were marked as settled: tags, and whether up to each.

        A run of acks that leaves no gap goes as one.
        """
        above = self._settled_above
        while self._floor in above:
            above.discard(self._floor)
            self._floor += 1
        acks = [(tag, False) for tag in done if tag > self._floor]
        if together := [tag for tag in done if tag < self._floor]:
            # The tag named must itself be outstanding, hence the highest of these.
            acks.insert(0, (max(together), True))
        return acks

    def large(self) -> tuple[int, int]:
        """How many deliveries with large bodies are unsettled, and how many bytes these are."""
        return len(self._large), sum(self._large.values())


class CarefulStart:
    """How many deliveries to take on a channel, from its start on; replaced with the channel.

    A quorum queue counts a lost connection against everything that was unsettled on it. So each
    channel is first consumed with a prefetch of 1: what comes again may have killed the process
    that held it, and is handled alone or, if that takes long, with one more beside it at a time;
    the longer alone, the more often it has failed. When a delivery arrives that is above
    suspicion, this consumer, which can have nothing else on its way, is cancelled. Once that
    delivery is settled, another consumer takes as many as the prefetch count allows. If its
    handler takes long, others must not wait for it: then the other one takes all but what is
    unsettled, and for each of these one more consumer takes one when it is settled.

    Invariant: what the consumers of the channel may hold together, and ``_owed``, are never more
    than the prefetch count.
    """

    def __init__(self, prefetch_count: int, *, careful: bool) -> None:
        self._prefetch_count = prefetch_count
        #: While all that came was delivered before.
        self.one_at_a_time = careful
        self._first = 0  # the first that was not, as long as it is unsettled
        # What was unsettled when the others were taken; for each, one more is due.
        self._owed: set[int] | None = None

    @property
    def first_prefetch_count(self) -> int:
        return 1 if self.one_at_a_time else self._prefetch_count

    def trust(self, tag: int) -> None:
        """What comes has killed nobody."""
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
    """Why a queue is not consumed, until it is again; what repeats is logged once.

    :ivar reason: in words for the log; empty while all is well.
    :ivar failures: how often it has failed since it last consumed.
    :ivar barred_until: when it may be tried again, if the broker closes connections over it.
    """

    def __init__(self, queue: str) -> None:
        self._queue = queue
        self.reason = ""
        self.failures = 0
        self.barred_until = 0.0
        self._refusal = ""

    def pause(self) -> float:
        """Seconds until the next attempt."""
        self.failures += 1
        return _PAUSES.delay(self.failures)

    def bar(self) -> float:
        """The same, after the broker has closed a connection that others use, too."""
        self.failures += 1
        seconds = _BARS.delay(self.failures)
        self.barred_until = time.monotonic() + seconds
        return seconds

    def refused(self, error: DomainEventsError) -> None:
        self.reason = "the broker had refused it"
        if self._refusal != str(error):
            self._refusal = str(error)
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
        queue: str,
        topology: Topology,
        prefetch_count: int,
        deliver: Callable[[Delivery, Consumer], None],
        *,
        careful: bool,
    ) -> None:
        self._channels = channels
        self._link = channels.link
        self._declare = declare
        self._queue = queue
        self._topology = topology
        self._prefetch_count = prefetch_count
        self._deliver = deliver
        self._starts_carefully = careful and prefetch_count > 1
        # Any thread: what was settled and not sent to the broker yet, and when the last of it was.
        self._settled: deque[tuple[tuple[int, int], Settlement]] = deque()
        self._settled_at = 0.0
        self._bell = Doorbell(lambda: self._link.wake(self._send_settled))
        # The I/O thread.
        self._setup: ChannelSetup | None = None
        self._consumer_tags: dict[str, bool] = {}  # whether each is being cancelled
        self._stopping = False
        self._stopped = threading.Event()
        self._trouble = Trouble(queue)
        self._warned_of_bytes = False
        self._begin_channel(None, 0)

    def _begin_channel(self, channel: Channel | None, epoch: int) -> None:
        self._channel = channel
        self._consumer_tags.clear()
        self._start = CarefulStart(self._prefetch_count, careful=self._starts_carefully)
        self._tags = Tags(epoch)  # other threads read its epoch

    # --- any thread ----------------------------------------------------------------------------

    def is_current(self, delivery: Delivery) -> bool:
        """Whether the delivery can still be settled."""
        return bool(delivery.receipt[0] == self._tags.epoch)

    def settle(self, delivery: Delivery, how: Settlement = Settlement.DONE) -> None:
        """Settle the delivery; the broker learns of it soon, with `flush` at once."""
        self._settled.append((delivery.receipt, how))
        now = time.monotonic()
        slow = now - self._settled_at > _SLOW
        self._settled_at = now
        if slow or len(self._settled) >= _ACKS_TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Have everything settled so far sent to the broker now."""
        if self._settled:
            self._wake(self._bell.ring)

    def repair(self, seconds: float, then: Callable[[bool], None], also: Topology = ()) -> None:
        """Declare the topology again, and ``also``; call ``then`` after a pause."""

        def declared(succeeded: bool) -> None:
            self._link.call_later(seconds, partial(then, succeeded))

        topology = [*self._topology, *also]
        self._wake(partial(self._link.wake, lambda: self._declare(topology, declared)))

    def stop(self, timeout: float) -> None:
        """Take no more deliveries."""

        def stop() -> None:
            if self._stopping:
                return  # pika would never answer a second cancel
            self._stopping = True
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
            return False  # closed: the broker has requeued whatever was not settled
        return True

    # --- the I/O thread: the channel -----------------------------------------------------------

    def open(self) -> None:
        """Declare, and consume; again after any trouble."""
        if self._setup or self._stopping or not self._channels.is_open:
            return
        if time.monotonic() < self._trouble.barred_until:
            return
        self._setup = self._channels.open(
            self._topology, prepare=self._prepare, failed=self._refused, closed=self._closed
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
        # Deliveries may come before the reply to what is requested below.
        connection.transport.on_deliver(
            channel.channel_number,
            guarded(partial(self._on_delivery, epoch, connection.release)),
            self._queue,
        )
        self._consume(channel)

    def _consume(self, channel: Channel) -> None:
        tag = channel.basic_consume(
            self._queue,
            lambda *_: None,  # required; never called, since our own reader takes deliveries
            callback=self._link.guarded(self._consumes),
        )
        self._consumer_tags[tag] = False

    def _consumes(self, _frame: object) -> None:
        if self._setup is not None:
            self._setup.usable()
        self._trouble.over()

    def _cancel_all(self, channel: Channel) -> None:
        for tag, cancelling in self._consumer_tags.items():
            if not cancelling:
                self._consumer_tags[tag] = True
                cancelled = self._link.guarded(partial(self._cancel_ok, tag))
                channel.basic_cancel(tag, callback=cancelled)

    def _cancel_ok(self, tag: str, _frame: object) -> None:
        self._consumer_tags.pop(tag, None)
        if self._stopping and not self._consumer_tags:
            self._stopped.set()

    def _cancelled(self, _frame: object) -> None:
        # The queue was deleted, or its node is stopping, or a delivery was held for too long. The
        # broker has requeued what is still unsettled here, if the queue exists.
        self._trouble.reason = "the broker had cancelled the consumer"
        self._send_settled()
        if self._setup is not None and self._channel is not None and self._channel.is_open:
            self._setup.close(self._channel)

    def _refused(self, error: DomainEventsError, _reason: BaseException) -> None:
        if self._stopping:
            return
        self._trouble.refused(error)
        # Without a connection: the broker has closed it over this one, and others use it.
        barred = self._link.connection is None
        self._open_later(self._trouble.bar() if barred else self._trouble.pause())

    def _closed(self, reason: BaseException) -> None:
        if self._stopping:
            self._let_go()
            return
        if close_code(reason):
            self._trouble.reason = f"the broker had closed the channel: {explain(reason)}"
        self._open_later(self._trouble.pause())

    def lost(self, trouble: str, *, mistake: bool) -> None:
        """The connection is gone, and the channel with it; perhaps over somebody's mistake."""
        self._trouble.reason = trouble
        self._bell.answer()
        if not mistake:
            self._trouble.barred_until = 0.0  # another broker, perhaps with other plugins
        self._let_go()

    def forget(self) -> None:
        """After a fork, in the child: these deliveries are the parent's."""
        self._stopping = True
        self._let_go()

    def _let_go(self) -> None:
        # From here on, what was delivered on the old channel is not current any more.
        self._begin_channel(None, self._tags.epoch + 1)
        self._setup = None
        self._settled.clear()
        if self._stopping:
            self._stopped.set()

    def _open_later(self, pause: float) -> None:
        self._let_go()
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
        delivery = Delivery(exchange, routing_key, redelivered, properties, body, receipt)
        delivery.release = release
        self._deliver(delivery, self)
        if self._start.one_at_a_time:
            self._judge(delivery, tag)

    def _judge(self, delivery: Delivery, tag: int) -> None:
        """Whether the delivery may have killed a process, or broken a connection."""
        least = 1 if delivery.counts_returns else _ABOVE_SUSPICION
        if delivery.redelivered and delivery.failures >= least:
            alone = _ALONE.delay(delivery.failures - least + 1)
            self._link.call_later(alone, partial(self._go_around, self._tags, tag))
            return
        channel = self._channel
        self._start.trust(tag)
        if channel is not None and channel.is_open and not self._stopping:
            self._cancel_all(channel)
            self._link.call_later(_LONGEST_WITHHELD, partial(self._go_on, self._tags))

    def _go_around(self, tags: Tags, tag: int) -> None:
        """A suspect has not killed anybody for a while: others must not wait for it."""
        careful = tags is self._tags and self._start.one_at_a_time and tags.is_unsettled(tag)
        if careful and len(self._consumer_tags) < self._prefetch_count:
            self._take(1)

    def _go_on(self, tags: Tags) -> None:
        """Others must not wait for the first delivery that is above suspicion, either."""
        if tags is self._tags:
            self._take(self._start.waited(tags))

    def _take(self, prefetch_count: int) -> None:
        """Consume so many at a time, besides what is consumed already."""
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
                "%s holds %d MiB of events that are not settled, in %d deliveries. It may hold %d "
                "deliveries (prefetch_count); with a lower one, less.",
                self._queue,
                size // 2**20,
                number,
                self._prefetch_count,
            )

    # --- the I/O thread: settlements -----------------------------------------------------------

    def _tick_later(self, tags: Tags) -> None:
        tags.ticking = True
        self._link.call_later(_LONGEST_WITHHELD, partial(self._tick, tags))

    def _tick(self, tags: Tags) -> None:
        """As long as something is unsettled: send what was settled and nobody has flushed."""
        if tags is not self._tags:
            return
        tags.ticking = False
        if self._settled:
            self._send_settled()
        if not tags.all_settled():
            self._tick_later(tags)

    def _send_settled(self) -> None:
        """Send what was settled."""
        self._bell.answer()
        channel, tags = self._channel, self._tags
        done: list[int] = []
        others: list[int] = []
        while self._settled:
            (epoch, tag), how = self._settled.popleft()
            if epoch != tags.epoch or channel is None or not channel.is_open:
                continue
            if not tags.settle(tag):
                continue
            if how is Settlement.DONE:
                done.append(tag)
                continue
            others.append(tag)
            if how is Settlement.GIVE_BACK:
                channel.basic_nack(tag, requeue=True)
            else:
                # Since RabbitMQ 4.3 only this counts towards the delivery limit
                # (https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling).
                channel.basic_reject(tag, requeue=True)
        if channel is not None and (done or others):
            for tag, up_to in tags.acks(done):
                channel.basic_ack(tag, multiple=up_to)
            self._take(self._start.settled([*done, *others], tags))
