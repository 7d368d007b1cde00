"""Declaring, consuming and browsing on the embedded broker.

Everything happens in the thread that asks for it, under the store's lock, and is done when the
call returns; deliveries come in the thread that made room for them, or brought the message.

A connection here is never lost. Closing it does to a queue what a lost one does: what it held and
had not settled is there again, as a redelivery. That is how a test makes a crash.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from domain_events.broker import Consumer, Settlement, refusals
from domain_events.broker.memory.clock import SECOND
from domain_events.broker.memory.queues import Entry, QueueState
from domain_events.broker.memory.store import Store
from domain_events.errors import BrokerUnavailable, DomainEventsError
from domain_events.log import Log
from domain_events.message import Delivery
from domain_events.topology import Topology

log = Log("domain_events")

# Before a consumer whose queue was deleted asks for it again.
_PAUSE = SECOND // 10
_LONGEST_PAUSE = 10 * SECOND
# After which one more is taken beside a suspect that is still being handled: doubled with each
# failure, up to the longest.
_LONG_ENOUGH = 3 * SECOND
_LONGEST_ALONE = 3600 * SECOND
# Whose meaning the headers have that this broker adds.
_RELEASE = (4, 3)


class MemoryConsuming:
    """See `domain_events.broker.Consuming`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._closed = False
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self._consumers: list[MemoryConsumer] = []
        self._browsers: list[MemoryBrowser] = []

    def declare(self, topology: Topology, timeout: float) -> None:
        """Make sure that all of this exists."""
        self.check_open()
        self._store.call(lambda: self._store.declare(topology, self))

    def delete(self, topology: Topology, timeout: float) -> None:
        """Delete the queues and exchanges among this."""
        self.check_open()
        self._store.call(lambda: self._store.delete(topology, self))

    def count(self, queue: str, timeout: float) -> int:
        """How many messages are ready in the queue."""
        self.check_open()
        return self._store.call(lambda: len(self._store.queue(queue, self).ready))

    def consume(
        self,
        queue: str,
        topology: Topology,
        prefetch_count: int,
        deliver: Callable[[Delivery, Consumer], None],
        *,
        careful: bool = False,
    ) -> MemoryConsumer:
        """Start to consume."""
        self.check_open()
        consumer = MemoryConsumer(
            self._store, self, queue, topology, prefetch_count, deliver, careful=careful
        )
        self._consumers.append(consumer)
        self._store.soon(consumer.open)
        return consumer

    def browse(self, queue: str, timeout: float) -> MemoryBrowser:
        """Look at the messages of a queue."""
        self.check_open()
        browser = MemoryBrowser(self._store, self, queue)
        self._browsers.append(browser)
        return browser

    def failure(self) -> DomainEventsError | None:
        """Never: it does not give up."""
        return None

    def close(self, timeout: float) -> None:
        """Put back what was not settled, and end."""
        if self._pid != os.getpid():
            self._begin_anew()  # what there was is the parent's
        self._closed = True
        self._store.soon(self._close)

    def close_soon(self) -> bool:
        """Close; there is nothing that could have been left open."""
        self.close(0)
        return False

    def _close(self) -> None:
        # All of them first, so that none takes what another gives back.
        for consumer in self._consumers:
            consumer.detach()
        for consumer in self._consumers:
            consumer.held.give_back(failed=True)
        for browser in self._browsers:
            browser.held.give_back(failed=True)
        self._store.release(self)

    def check_open(self) -> None:
        """Else a `BrokerUnavailable` is raised."""
        if self._pid != os.getpid():
            self._begin_anew()
        if self._closed:
            raise refusals.closed()


class _Held:
    """What somebody has of a queue and has not settled, by number."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.generation = store.generation
        self.queue: QueueState | None = None
        self._entries: dict[int, Entry] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, number: object) -> bool:
        # After a fork, these are the parent's.
        return number in self._entries and self.generation is self._store.generation

    def add(self, entry: Entry) -> int:
        number = self._next
        self._next += 1
        self._entries[number] = entry
        return number

    def remove(self, number: int) -> Entry | None:
        return self._entries.pop(number, None) if number in self else None

    def clear(self) -> None:
        self._entries.clear()

    def give_back(self, *, failed: bool) -> None:
        """All of it."""
        entries = list(self._entries.values())
        self._entries.clear()
        if self.queue is not None and self.generation is self._store.generation:
            self._store.give_back(self.queue, entries, failed=failed)


class MemoryConsumer:
    """See `domain_events.broker.Consumer`; as a `Taker`, everything is under the store's lock."""

    def __init__(
        self,
        store: Store,
        owner: MemoryConsuming,
        queue: str,
        topology: Topology,
        prefetch_count: int,
        deliver: Callable[[Delivery, Consumer], None],
        *,
        careful: bool,
    ) -> None:
        self._store = store
        self._owner = owner
        self._queue = queue
        self._topology = topology
        self._prefetch_count = prefetch_count
        self._starts_carefully = self._careful = careful
        # The numbers of suspects that take long.
        self._lasting: list[int] = []
        self._deliver = deliver
        self.held = _Held(store)
        self._pause = _PAUSE
        self._stopped = False

    # --- any thread ----------------------------------------------------------------------------

    def is_current(self, delivery: Delivery) -> bool:
        """Whether the delivery can still be settled."""
        return delivery.receipt in self.held

    def settle(self, delivery: Delivery, how: Settlement = Settlement.DONE) -> None:
        """Settle the delivery."""
        self._store.soon(lambda: self._settle(delivery, how))

    def flush(self) -> None:
        """Nothing to do: what is settled takes effect at once."""

    def repair(self, seconds: float, then: Callable[[bool], None], also: Topology = ()) -> None:
        """Declare the topology again, and ``also``; call ``then`` after a pause."""

        def begin() -> None:
            try:
                self._store.declare([*self._topology, *also], self._owner)
            except DomainEventsError as error:
                log.error("%s", error)
                call = partial(then, False)
            else:
                call = partial(then, True)
            if seconds:
                self._store.later(round(seconds * SECOND), call)
            else:
                call()  # now, also where time stands still

        self._store.soon(begin)

    def stop(self, timeout: float) -> None:
        """Take no more deliveries."""
        self._store.soon(self.detach)

    # --- under the store's lock ------------------------------------------------------------------

    def open(self) -> None:
        """Declare, and consume; again after any trouble."""
        if self._stopped or self.held.generation is not self._store.generation:
            return
        try:
            self._store.declare(self._topology, self._owner)
            queue = self._store.queue(self._queue, self._owner)
        except DomainEventsError as error:
            log.error("%s cannot consume. %s", self._queue, error)
            self._open_later()
            return
        self._pause = _PAUSE
        self._careful = self._starts_carefully
        self.held.queue = queue
        self._store.attach(queue, self)

    def has_room(self) -> bool:
        self._lasting = [number for number in self._lasting if number in self.held]
        room = 1 + len(self._lasting) if self._careful else self._prefetch_count
        return len(self.held) < min(room, self._prefetch_count)

    def take(self, entry: Entry) -> None:
        self._careful = self._careful and entry.failures > 0
        number = self.held.add(entry)
        if self._careful:
            alone = min(_LONG_ENOUGH * 2 ** min(entry.failures - 1, 20), _LONGEST_ALONE)
            self._store.later(alone, partial(self._go_around, number))
        try:
            self._deliver(_delivery(entry, number), self)
        except Exception:
            log.exception("Internal error over a delivery.")

    def _go_around(self, number: int) -> None:
        if number in self.held and self.held.queue is not None:
            self._lasting.append(number)
            self._store.feed(self.held.queue)

    def cancelled(self) -> None:
        self.held.clear()
        self.held.queue = None
        if not self._stopped:
            log.warning("%s: the queue was deleted; it is declared again.", self._queue)
            self._open_later()

    def _open_later(self) -> None:
        self._store.later(self._pause, self.open)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def detach(self) -> None:
        """Take no more."""
        self._stopped = True
        if self.held.queue is not None:
            self._store.detach(self.held.queue, self)

    def _settle(self, delivery: Delivery, how: Settlement) -> None:
        entry = self.held.remove(delivery.receipt)
        queue = self.held.queue
        if entry is None or queue is None:
            return
        if how is Settlement.DONE:
            self._store.feed(queue)
        else:
            self._store.give_back(queue, [entry], failed=how is Settlement.FAILED)


class MemoryBrowser:
    """See `domain_events.broker.Browser`."""

    def __init__(self, store: Store, owner: MemoryConsuming, queue: str) -> None:
        self._store = store
        self._owner = owner
        self._queue = queue
        self.held = _Held(store)
        # Whether the next message may be one that was given back to a quorum queue before.
        self._more_came_back = False

    def next(self, timeout: float) -> Delivery | None:
        """The next message, or None."""
        self._owner.check_open()
        return self._store.call(self._get)

    def ack(self, delivery: Delivery, timeout: float) -> None:
        """Take the message out of the queue."""
        self._owner.check_open()
        held, number = delivery.receipt
        if self._store.call(lambda: held.remove(number)) is None:
            raise BrokerUnavailable(
                f"The message was given back to {self._queue!r} meanwhile; begin again."
            )

    def rewind(self) -> None:
        """Give back all that was not acked; `next` then sees it again."""
        self._store.soon(self._give_back)

    def close(self, timeout: float) -> None:
        """Give back all that was not acked, and end."""
        self.rewind()

    def _give_back(self) -> None:
        # As on RabbitMQ: those that came back before would else stand in front of these.
        with contextlib.suppress(DomainEventsError):
            while self._more_came_back and len(self.held) and self._get() is not None:
                pass
        self._more_came_back = False
        self.held.give_back(failed=False)

    def _get(self) -> Delivery | None:
        queue = self._store.queue(self._queue, self._owner)
        if queue is not self.held.queue or self.held.generation is not self._store.generation:
            self.held = _Held(self._store)
            self.held.queue = queue
        self._store.used(queue)
        if not queue.ready:
            return None
        entry = queue.get()
        self._more_came_back = entry.redelivered and queue.argument("x-queue-type") == "quorum"
        delivery = _delivery(entry, 0)
        delivery.receipt = (self.held, self.held.add(entry))
        delivery.message_count = len(queue.ready)
        return delivery


def _delivery(entry: Entry, number: int) -> Delivery:
    message = entry.message
    headers = message.headers
    if headers:
        # Other receivers have the same message, and this one may get it again.
        headers = copy.deepcopy(dict(headers))
    if entry.redelivered:
        # As RabbitMQ since 4.3: failures, and how often it came back in all.
        headers = {
            **headers,
            "x-delivery-count": entry.failures,
            "x-acquired-count": entry.returns,
        }
    if headers is not message.headers:
        message = replace(message, headers=headers)
    return Delivery(
        message.exchange,
        message.routing_key,
        entry.redelivered,
        message,
        message.body,
        number,
        release=_RELEASE,
    )
