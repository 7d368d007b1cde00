"""One queue being consumed, again and again: deliveries in, settlements out.

Threads. Whoever settles appends to ``_settled`` and wakes the I/O thread, which alone owns the
channel, its tags and all other state.

A tag dies with its channel: each channel that is opened here has a number (its *epoch*), a
receipt names it, and what is settled under an old one is passed over, since the broker has put
the delivery back in the queue.

**The careful start.** A quorum queue counts a lost connection against everything that was
unsettled on it. So on each channel it is first consumed with a prefetch of 1: what has come back
may have killed the process that held it, and is handled alone or, if that takes long, with one
more beside it at a time; the longer alone, the more often it has failed. When a delivery arrives
that is above suspicion, this consumer, which can have nothing else on its way, is cancelled. Once
that delivery is settled, another one takes as many as the prefetch count allows. If its handler
takes long, others must not wait for it: then the other one takes all but what is unsettled, and
for each of these a further one when it is settled. So there are never more unsettled than the
prefetch count says.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from pika.channel import Channel

from domain_events.broker import Consumer, Settlement
from domain_events.broker.rabbitmq.link import Link, is_io_thread
from domain_events.broker.rabbitmq.nodes import close_code, explain
from domain_events.broker.rabbitmq.opening import Opening
from domain_events.broker.rabbitmq.transport import Connection
from domain_events.errors import BrokerUnavailable, DomainEventsError
from domain_events.log import Log
from domain_events.message import Delivery, Properties
from domain_events.topology import Topology

log = Log("domain_events")

# Seconds before a consumer that the broker turned away asks again.
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 10.0
# The same for one over which the broker closes the connection, others' too.
_FIRST_BAR = 60.0
_LONGEST_BAR = 3600.0

# Acks of a fast handler are sent together, at the latest when there are so many.
_ACKS_TOGETHER = 25
# Nor are they withheld for longer than so many seconds: the next handler may take an hour, and to
# the broker what is not acked is not handled.
_LONGEST_WITHHELD = 0.1

# Up to RabbitMQ 4.2 an orderly stop counts as a failure, too: so many are nobody's fault.
_ABOVE_SUSPICION = 3
# Seconds after which one more delivery is taken beside a suspect that is still being handled, and
# the longest. Doubled with each failure: what is slow and innocent, but held beside a culprit again
# and again, is left alone for long enough before it has failed too often.
_LONG_ENOUGH = 3.0
_LONGEST_ALONE = 3600.0

# Bodies from this size on are counted, and a warning logged when so many bytes of them are held.
_LARGE = 64 * 1024
_MANY_BYTES = 256 * 2**20


class RabbitConsumer:
    """See `domain_events.broker.Consumer`."""

    def __init__(
        self,
        link: Link,
        declare: Callable[[Topology, Callable[[bool], None]], None],
        queue: str,
        topology: Topology,
        prefetch_count: int,
        deliver: Callable[[Delivery, Consumer], None],
        *,
        careful: bool,
    ) -> None:
        self._link = link
        self._declare = declare
        self._queue = queue
        self._topology = topology
        self._prefetch_count = prefetch_count
        self._deliver = deliver
        self._starts_carefully = careful and prefetch_count > 1
        # Any thread: what was settled and not sent to the broker yet.
        self._settled: deque[tuple[tuple[int, int], Settlement]] = deque()
        self._woken = False
        # Any thread reads it, the I/O thread writes it.
        self._epoch = 0
        # The I/O thread.
        self._channel: Channel | None = None
        self._release = (0, 0)
        self._opening: Opening | None = None
        self._stopping = False
        self._stopped = threading.Event()
        self._trouble = ""
        self._refusal = ""  # the last one, which is logged once
        self._barred_until = 0.0
        self._failures = 0
        self._warned_of_bytes = False
        self._forget_channel()

    def _forget_channel(self) -> None:
        self._careful = self._starts_carefully  # while all that comes was delivered before
        self._first = 0  # the first that was not, as long as it is unsettled
        self._taking = False  # whether more are consumed, or going to be
        self._owed: set[int] = set()  # unsettled deliveries, for each of which one more is taken
        self._consumer_tags: set[str] = set()
        self._cancelling: set[str] = set()  # of those, the ones that are being cancelled
        self._ack_floor = 1  # every delivery below it is settled
        self._settled_above: set[int] = set()  # settled deliveries above it
        self._last = 0  # the last delivery
        self._ticking = False  # whether `_tick` is going to be called
        self._large: dict[int, int] = {}  # unsettled deliveries with large bodies: their sizes

    # --- any thread ----------------------------------------------------------------------------

    def is_current(self, delivery: Delivery) -> bool:
        """Whether the delivery can still be settled."""
        return bool(delivery.receipt[0] == self._epoch)

    def settle(self, delivery: Delivery, how: Settlement = Settlement.DONE) -> None:
        """Settle the delivery; the broker learns of it soon, with `flush` at once."""
        self._settled.append((delivery.receipt, how))
        if len(self._settled) >= _ACKS_TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Have everything settled so far sent to the broker now."""
        if self._settled and not self._woken:
            try:
                self._woken = True
                self._wake(self._send_settled)
            except BaseException:
                self._woken = False  # a signal handler that raises
                raise

    def repair(self, seconds: float, then: Callable[[bool], None], also: Topology = ()) -> None:
        """Declare the topology again, and ``also``; call ``then`` after a pause."""

        def declared(succeeded: bool) -> None:
            self._call_later(seconds, partial(then, succeeded))

        self._wake(lambda: self._declare([*self._topology, *also], declared))

    def stop(self, timeout: float) -> None:
        """Take no more deliveries."""

        def stop() -> None:
            if self._stopping:
                return  # pika would never answer a second cancel
            self._stopping = True
            channel = self._channel
            if channel is None or not channel.is_open:
                self._stopped.set()
                return
            for tag in self._consumer_tags - self._cancelling:
                self._cancel(channel, tag)
            if not self._consumer_tags:
                self._stopped.set()

        if self._wake(stop):
            self._stopped.wait(0 if is_io_thread() else timeout)

    def _wake(self, callback: Callable[[], None]) -> bool:
        try:
            self._link.wake(callback)
        except BrokerUnavailable:
            # Closed: whatever was not settled has gone back to the queue.
            self._woken = False
            return False
        return True

    # --- the I/O thread --------------------------------------------------------------------------

    def open(self) -> None:
        """Declare, and consume; again after any trouble."""
        connection = self._link.connection
        if connection is None or not connection.is_open:
            return
        if self._opening or self._stopping or time.monotonic() < self._barred_until:
            return
        self._opening = Opening(
            self._link,
            connection,
            self._topology,
            prepare=partial(self._prepare, connection),
            failed=self._turned_away,
            closed=self._closed,
        )

    def _prepare(self, connection: Connection, channel: Channel) -> None:
        prefetch_count = 1 if self._starts_carefully else self._prefetch_count
        self._limit(channel, prefetch_count, partial(self._begin, connection, channel))

    def _limit(self, channel: Channel, prefetch_count: int, then: Callable[[], None]) -> None:
        if channel.is_open:  # the broker may have cancelled meanwhile, or all is being closed
            guarded = self._link.guarded
            channel.basic_qos(
                prefetch_count=prefetch_count, callback=guarded(lambda _frame: then())
            )

    def _begin(self, connection: Connection, channel: Channel) -> None:
        if not channel.is_open:
            return
        if self._stopping:
            channel.close()
            return
        guarded = self._link.guarded
        self._forget_channel()
        self._epoch += 1
        self._channel = channel
        self._release = connection.release
        channel.add_on_cancel_callback(guarded(self._cancelled))
        # Deliveries may come before the reply to what is asked for below.
        connection.transport.on_deliver(
            channel.channel_number,
            guarded(partial(self._on_delivery, self._epoch)),
            self._queue,
        )
        self._consume(channel)

    def _consume(self, channel: Channel) -> None:
        self._consumer_tags.add(
            channel.basic_consume(
                self._queue,
                lambda *_: None,  # required; our own reader intercepts deliveries
                callback=self._link.guarded(self._consumes),
            )
        )

    def _cancel(self, channel: Channel, tag: str) -> None:
        self._cancelling.add(tag)
        channel.basic_cancel(tag, callback=self._link.guarded(partial(self._cancel_ok, tag)))

    def _is_suspect(self, delivery: Delivery) -> bool:
        """Whether the delivery may have killed a process, or broken a connection."""
        if not delivery.redelivered:
            return False
        return delivery.failures >= self._least_failures(delivery)

    def _least_failures(self, delivery: Delivery) -> int:
        return 1 if delivery.counts_returns else _ABOVE_SUSPICION

    def _patience(self, delivery: Delivery) -> float:
        """Seconds for which a suspect is handled with nothing beside it."""
        doubled = min(delivery.failures - self._least_failures(delivery), 20)
        return float(min(_LONG_ENOUGH * 2**doubled, _LONGEST_ALONE))

    def _is_unsettled(self, tag: int) -> bool:
        return self._ack_floor <= tag <= self._last and tag not in self._settled_above

    def _go_around(self, epoch: int, tag: int) -> None:
        """A suspect has not killed anybody for a while: others must not wait for it."""
        careful = epoch == self._epoch and self._careful and self._is_unsettled(tag)
        if careful and len(self._consumer_tags) < self._prefetch_count:
            self._take(1)

    def _begin_to_trust(self, tag: int) -> None:
        """What comes has killed nobody."""
        self._careful = False
        channel = self._channel
        if channel is None or self._stopping or not channel.is_open:
            return
        self._first = tag
        for consumer_tag in self._consumer_tags - self._cancelling:
            self._cancel(channel, consumer_tag)
        self._link.call_later(_LONGEST_WITHHELD, partial(self._do_not_wait, self._epoch))

    def _do_not_wait(self, epoch: int) -> None:
        if epoch == self._epoch and self._first and not self._taking:
            self._take_all()

    def _take_all(self) -> None:
        """Consume as many as the prefetch count leaves, and the rest as it is settled."""
        self._taking = True
        self._owed = set(filter(self._is_unsettled, range(self._ack_floor, self._last + 1)))
        left = self._prefetch_count - len(self._owed)
        if left > 0:
            self._take(left)

    def _take(self, prefetch_count: int) -> None:
        """Consume so many at a time, besides what is consumed already."""
        channel, opening = self._channel, self._opening
        if channel is None or opening is None or self._stopping or not channel.is_open:
            return

        def consume() -> None:
            if channel is self._channel and not self._stopping and channel.is_open:
                self._consume(channel)
            else:
                opening.usable()

        opening.busy()
        self._limit(channel, prefetch_count, consume)

    def _consumes(self, _frame: object) -> None:
        if self._opening is not None:
            self._opening.usable()
        self._failures = 0
        self._refusal = ""
        if self._trouble:
            trouble, self._trouble = self._trouble, ""
            log.warning("%s consumes again; %s.", self._queue, trouble)

    def _turned_away(self, error: DomainEventsError, _reason: BaseException) -> None:
        if self._stopping:
            return
        self._trouble = "the broker had turned it away"
        refusal, self._refusal = self._refusal, str(error)
        if self._link.connection is None:
            # The connection was closed over this one, and others use it.
            pause = min(_LONGEST_BAR, _FIRST_BAR * 2.0 ** min(self._failures, 10))
            self._barred_until = time.monotonic() + pause
            self._open_later(pause)
        else:
            self._open_later()
        if self._refusal != refusal:
            log.error("%s cannot consume; trying again. %s", self._queue, error)

    def _cancelled(self, _frame: object) -> None:
        # The queue was deleted, or its node is going, or a delivery was held for too long. What
        # is still unsettled here has gone back to the queue, if there is one.
        self._trouble = "the broker had cancelled the consumer"
        self._send_settled()
        if self._opening is not None and self._channel is not None and self._channel.is_open:
            self._opening.close(self._channel)

    def _cancel_ok(self, tag: str, _frame: object) -> None:
        self._consumer_tags.discard(tag)
        self._cancelling.discard(tag)
        if self._stopping and not self._consumer_tags:
            self._stopped.set()

    def _closed(self, reason: BaseException) -> None:
        if self._stopping:
            self._let_go()
            return
        if close_code(reason):
            self._trouble = f"the broker had closed the channel: {explain(reason)}"
        self._open_later()

    def lost(self, trouble: str, *, mistake: bool) -> None:
        """The connection is gone, and the channel with it; perhaps over somebody's mistake."""
        self._trouble = trouble
        self._woken = False
        if not mistake:
            self._barred_until = 0.0  # another broker, perhaps with other plugins
        self._let_go()

    def forget(self) -> None:
        """After a fork, in the child: these deliveries are the parent's."""
        self._stopping = True
        self._let_go()

    def _let_go(self) -> None:
        # From here on, what was delivered on the old channel is no longer current.
        self._epoch += 1
        self._channel = None
        self._opening = None
        self._settled.clear()
        self._forget_channel()
        if self._stopping:
            self._stopped.set()

    def _open_later(self, pause: float | None = None) -> None:
        self._let_go()
        if pause is None:
            longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self._failures, 10))
            pause = longest * random.uniform(0.5, 1)
        self._failures += 1
        self._call_later(pause, self.open)

    def _call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        self._link.call_later(seconds, callback)

    def _on_delivery(
        self,
        epoch: int,
        exchange: str,
        routing_key: str,
        redelivered: bool,
        tag: int,
        properties: Properties,
        body: bytes,
    ) -> None:
        if epoch != self._epoch:
            return  # the channel is closing; the broker has it in the queue again
        self._last = tag
        if len(body) >= _LARGE:
            self._large[tag] = len(body)
            self._warn_of_bytes()
        if not self._ticking:
            self._tick_later()
        receipt = (epoch, tag)
        delivery = Delivery(exchange, routing_key, redelivered, properties, body, receipt)
        delivery.release = self._release
        self._deliver(delivery, self)
        if self._careful and self._is_suspect(delivery):
            self._call_later(self._patience(delivery), partial(self._go_around, epoch, tag))
        elif self._careful:
            self._begin_to_trust(tag)

    def _warn_of_bytes(self) -> None:
        if self._warned_of_bytes or sum(self._large.values()) < _MANY_BYTES:
            return
        self._warned_of_bytes = True
        log.warning(
            "%s holds %d MiB of events that are not settled, in %d deliveries. It may hold %d "
            "deliveries (prefetch_count); with a lower one, less.",
            self._queue,
            sum(self._large.values()) // 2**20,
            len(self._large),
            self._prefetch_count,
        )

    def _tick_later(self) -> None:
        self._ticking = True
        self._link.call_later(_LONGEST_WITHHELD, partial(self._tick, self._epoch))

    def _tick(self, epoch: int) -> None:
        """As long as something is unsettled: send what was settled and nobody has flushed."""
        if epoch != self._epoch:
            return
        self._ticking = False
        if self._settled:
            self._send_settled()
        if self._ack_floor <= self._last:
            self._tick_later()

    def _send_settled(self) -> None:
        """Send what was settled: a run of acks that leaves no gap as one."""
        self._woken = False
        channel = self._channel
        acks: dict[int, None] = {}
        first_settled, freed = False, 0
        while self._settled:
            (epoch, tag), how = self._settled.popleft()
            if epoch != self._epoch or channel is None or not channel.is_open:
                continue
            if not self._is_unsettled(tag) or tag in acks:
                continue  # twice: the broker would close the channel over it
            self._large.pop(tag, None)
            if tag in self._owed:
                self._owed.discard(tag)
                freed += 1
            if tag == self._first:
                self._first = 0
                first_settled = not self._taking
            if how is Settlement.DONE:
                acks[tag] = None
                continue
            self._settled_above.add(tag)
            if how is Settlement.GIVE_BACK:
                channel.basic_nack(tag, requeue=True)
            else:
                # Since RabbitMQ 4.3 only this counts towards the delivery limit.
                channel.basic_reject(tag, requeue=True)
        if channel is not None:
            self._ack(channel, list(acks))
            if first_settled:
                self._take_all()
            elif freed:
                self._take(freed)

    def _ack(self, channel: Channel, tags: Sequence[int]) -> None:
        self._settled_above.update(tags)
        while self._ack_floor in self._settled_above:
            self._settled_above.discard(self._ack_floor)
            self._ack_floor += 1
        together = [tag for tag in tags if tag < self._ack_floor]
        if together:
            # The tag named must itself be outstanding, hence the highest of these acks.
            channel.basic_ack(max(together), multiple=True)
        for tag in tags:
            if tag > self._ack_floor:
                channel.basic_ack(tag)
