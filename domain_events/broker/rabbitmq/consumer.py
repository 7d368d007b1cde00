"""One queue being consumed, again and again: deliveries in, settlements out.

Threads. Whoever settles appends to ``_settled`` and wakes the I/O thread, which alone owns the
channel, its tags and all other state.

A tag dies with its channel: each channel that is opened here has a number (its *epoch*), a
receipt names it, and what is settled under an old one is passed over, since the broker has put
the delivery back in the queue.

A prefetch cannot be changed while the queue is consumed. To take another, consuming ends and
begins again on the same channel, where what is unsettled stays as it is. What was on its way just
then would come again later, out of order (rabbit_fifo_client returns it; seen on 3.10). So acks are
withheld until all that the old prefetch allows is here, and nothing can be on its way.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from pika.channel import Channel

from domain_events.broker import Consumer, Prefetch
from domain_events.broker.rabbitmq.link import Link, is_io_thread
from domain_events.broker.rabbitmq.nodes import close_code, explain
from domain_events.broker.rabbitmq.opening import Opening
from domain_events.broker.rabbitmq.stream import Connection
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

# Settled in a second, at least: fast. Far beyond what one can ask of a database.
_FAST = 5000
# When so many were settled since the last look, there is no need to wait for the next.
_SOON_FAST = 500

# Bytes that many deliveries may take.
_MOST_HELD = 64 * 2**20

# Acks of a fast handler are told to the broker together, at the latest when there are so many.
_ACKS_TOGETHER = 25
# Nor for longer than so many seconds: the next handler may take an hour, and to the broker what is
# not acked is not handled.
_LONGEST_WITHHELD = 0.1


class RabbitConsumer:
    """See `domain_events.broker.Consumer`."""

    def __init__(
        self,
        link: Link,
        repair: Callable[[Topology], None],
        queue: str,
        topology: Topology,
        prefetch: Prefetch,
        deliver: Callable[[Delivery, Consumer], None],
    ) -> None:
        self._link = link
        self._repair = repair
        self._queue = queue
        self._topology = topology
        self._prefetch = prefetch
        self._prefetch_count = prefetch.few
        self._deliver = deliver
        # Any thread: what was settled and the broker not yet told.
        self._settled: deque[tuple[tuple[int, int], bool]] = deque()
        self._woken = False
        # Any thread reads it, the I/O thread writes it.
        self._epoch = 0
        # The I/O thread.
        self._channel: Channel | None = None
        self._opening: Opening | None = None
        self._stopping = False
        self._stopped = threading.Event()
        self._tag = ""
        self._trouble = ""
        self._refusal = ""  # the last one, which is logged once
        self._barred_until = 0.0
        self._failures = 0
        self._forget_tags()

    def _forget_tags(self) -> None:
        self._lowest = 1  # every tag below it is settled
        self._above: set[int] = set()  # settled tags above it
        self._highest = 0  # the last tag that was delivered
        self._looking = False  # whether `_look` is going to be called
        self._looked_at = 0.0
        self._told = 0  # of how many deliveries since then
        self._unsettled = 0  # of those this prefetch counts for, as far as the broker was told
        self._since = 1  # the first of them
        self._size = 0  # of the bodies since the last look
        self._in_vain = 0  # the last tag when acks had been withheld and nothing came
        self._wanted = self._prefetch_count
        self._filling = False  # whether acks are withheld until the wanted prefetch can be taken
        self._changing = False  # whether consuming ends, to begin again with it

    # --- any thread ----------------------------------------------------------------------------

    def is_current(self, delivery: Delivery) -> bool:
        """Whether the delivery can still be settled."""
        return bool(delivery.receipt[0] == self._epoch)

    def settle(self, delivery: Delivery, *, requeue: bool = False) -> None:
        """Ack the delivery, or give it back."""
        self._settled.append((delivery.receipt, requeue))
        if len(self._settled) >= _ACKS_TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Have everything settled so far told to the broker now."""
        if self._settled and not self._woken:
            try:
                self._woken = True
                self._wake(self._tell)
            except BaseException:
                self._woken = False  # a signal handler that raises
                raise

    def requeue_later(self, delivery: Delivery, seconds: float) -> None:
        """Declare the topology again, then give the delivery back after a pause."""

        def give_back() -> None:
            self.settle(delivery, requeue=True)
            self._tell()

        def repair() -> None:
            self._repair(self._topology)
            self._link.call_later(seconds, give_back)

        self._wake(repair)

    def stop(self, timeout: float) -> None:
        """Take no more deliveries."""

        def stop() -> None:
            if self._stopping:
                return  # pika would never answer a second cancel
            self._stopping = True
            self._filling = False
            if self._channel is None or not self._channel.is_open:
                self._stopped.set()
            elif not self._changing:  # else it ends just now
                self._channel.basic_cancel(self._tag, callback=lambda _frame: self._stopped.set())

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
        self._prefetch_count = self._prefetch.few
        self._opening = Opening(
            self._link,
            connection,
            self._topology,
            prepare=partial(self._limit, connection),
            failed=self._turned_away,
            closed=self._closed,
        )

    def _limit(self, connection: Connection, channel: Channel) -> None:
        if not channel.is_open:
            return  # the broker has cancelled meanwhile, or all is being closed
        guarded = self._link.guarded
        channel.basic_qos(
            prefetch_count=self._prefetch_count,
            callback=guarded(lambda _frame: self._consume(connection, channel)),
        )

    def _consume(self, connection: Connection, channel: Channel) -> None:
        if not channel.is_open:
            return
        if self._stopping and self._changing:
            self._consumes(None)  # all is said and done
            self._stopped.set()
            return
        if self._stopping:
            channel.close()
            return
        guarded = self._link.guarded
        if not self._changing:
            self._forget_tags()
            self._epoch += 1
            self._channel = channel
            channel.add_on_cancel_callback(guarded(self._cancelled))
            # Deliveries may come before the reply to what is asked for below.
            connection.stream.hear_deliveries(
                channel.channel_number, guarded(partial(self._on_delivery, self._epoch))
            )
        self._changing = False
        self._since, self._unsettled = self._highest + 1, 0
        self._tag = channel.basic_consume(
            self._queue,
            lambda *_: None,  # pika hears of no delivery
            callback=guarded(self._consumes),
        )

    def _change_if_full(self) -> None:
        """Go on with the wanted prefetch, if nothing can be on its way."""
        if not self._filling or self._unsettled < self._prefetch_count:
            return
        connection, channel, opening = self._link.connection, self._channel, self._opening
        self._filling = False
        if connection is None or channel is None or opening is None or not channel.is_open:
            return
        self._prefetch_count = self._wanted
        self._changing = True
        opening.busy()
        channel.basic_cancel(
            self._tag,
            callback=self._link.guarded(lambda _frame: self._limit(connection, channel)),
        )

    def _consumes(self, _frame: object) -> None:
        if self._opening is not None:
            self._opening.usable()
        self._failures = 0
        self._refusal = ""
        if self._trouble:
            log.warning("%s consumes again; %s.", self._queue, self._trouble)
            self._trouble = ""

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
        self._filling = False
        self._tell()
        if self._opening is not None and self._channel is not None and self._channel.is_open:
            self._opening.close(self._channel)

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
        self._filling = self._changing = False
        if self._stopping:
            self._stopped.set()

    def _open_later(self, pause: float | None = None) -> None:
        self._let_go()
        if pause is None:
            longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self._failures, 10))
            pause = longest * random.uniform(0.5, 1)
        self._failures += 1
        self._link.call_later(pause, self.open)

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
        self._highest = tag
        self._unsettled += 1
        self._size += len(body)
        if not self._looking:
            self._look_later()
        self._deliver(
            Delivery(exchange, routing_key, redelivered, properties, body, (epoch, tag)), self
        )
        self._change_if_full()

    def _look_later(self) -> None:
        self._looking = True
        self._looked_at = time.monotonic()
        self._told = self._size = 0
        self._link.call_later(_LONGEST_WITHHELD, partial(self._look, self._epoch))

    def _look(self, epoch: int) -> None:
        """As long as something is unsettled: tell what was settled and nobody has flushed."""
        if epoch != self._epoch:
            return
        self._looking = False
        if self._filling:
            self._in_vain = self._highest
            self._filling = False
        if self._settled:
            self._tell()
        self._adapt()
        if self._lowest <= self._highest:
            self._look_later()

    def _adapt(self) -> None:
        if self._filling or self._changing or self._stopping or self._in_vain == self._highest:
            return
        if self._lowest < self._since:
            return  # what was held at the last change is still; together it would be too much
        seconds = max(time.monotonic() - self._looked_at, 0.001)
        self._wanted = prefetch_count(
            self._prefetch,
            self._prefetch_count,
            self._told / seconds,
            self._unsettled,
            self._size // max(1, self._told),
        )
        self._filling = self._wanted != self._prefetch_count
        self._change_if_full()

    def _tell(self) -> None:
        """Tell the broker what was settled: a run of acks that leaves no gap as one."""
        self._woken = False
        if self._filling:
            return
        channel = self._channel
        acks = []
        while self._settled:
            (epoch, tag), requeue = self._settled.popleft()
            if epoch != self._epoch or channel is None or not channel.is_open:
                continue
            self._told += 1
            if tag >= self._since:
                self._unsettled -= 1
            if requeue:
                channel.basic_nack(tag, requeue=True)
                self._above.add(tag)
            else:
                acks.append(tag)
        self._above.update(acks)
        while self._lowest in self._above:
            self._above.discard(self._lowest)
            self._lowest += 1
        if not acks or channel is None:
            return
        together = [tag for tag in acks if tag < self._lowest]
        if together:
            # The tag named must itself be outstanding, hence the highest of these acks.
            channel.basic_ack(max(together), multiple=True)
        for tag in acks:
            if tag > self._lowest:
                channel.basic_ack(tag)
        if self._prefetch_count < self._prefetch.many and self._told >= _SOON_FAST:
            self._adapt()


def prefetch_count(prefetch: Prefetch, now: int, rate: float, held: int, size: int) -> int:
    """The prefetch to go on with.

    :param now: the present one.
    :param rate: deliveries settled in a second.
    :param held: deliveries not settled.
    :param size: bytes of a delivery, about.
    """
    if rate >= _FAST and prefetch.many * size <= _MOST_HELD:
        return prefetch.many
    # More than can be handled in a second is too much.
    return prefetch.few if held > max(prefetch.few, rate) else now
