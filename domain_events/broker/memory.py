"""The embedded broker, ``memory://``: every promise of `domain_events.broker`, in this process.

**What it is for.** To try the library without any set-up, and to test programs that use it. Its
queues live in this process and end with it: no other process sees them, and nothing is written to
a disk. ``memory://`` is one broker, ``memory://NAME`` another one for each name.

**What it promises** is what RabbitMQ promises to this library's users, and the tests in
tests/conformance hold both of them to it. An event is put into the queue of each subscriber whose
binding keys match. A queue hands out its messages in their order, to its consumers in turn, each
holding no more than its prefetch count. A delivery that is not settled comes again, in front and
marked as a redelivery. A queue that counts failures moves an event to the dead letters after more
than a hundred. A delayed event is put into the subscriber's queue when it is due, or among the
undelivered if that queue is gone.

**What it does not emulate** is how RabbitMQ does these things: arguments of queues, levels of
delay. Messages come in by this protocol only, so none carries headers of another program.

A connection here is never lost. Closing one has the same effect on a queue as a crash: deliveries
that the connection held are requeued, and have failed.

**Threads.** A `Store` has one lock, and whatever is done to it is an *operation* under that lock,
in the thread that requests it: deliveries arrive in the thread that made room for them or published
the message. `Store.call` performs an operation and returns its result; so does `Store.call_soon`,
but if this thread is already inside an operation (a callback settles, a finalizer closes, a signal
handler stops), it waits for the end of that one. Callbacks (deliveries, confirms) are called under
the lock and must be short; handlers of events are never called there. After a fork the child starts
empty: everything here belongs to its parent.
"""

from __future__ import annotations

import heapq
import itertools
import operator
import os
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from domain_events.broker import (
    TO_APPLY,
    Consumer,
    Exchange,
    OnChange,
    Publication,
    Publishing,
    Queue,
    Settlement,
    ignore_change,
)
from domain_events.broker.clock import SECOND, Clock, RealTime, VirtualTime
from domain_events.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEventsError,
    EventUnroutable,
    TopologyError,
)
from domain_events.log import Log, in_background
from domain_events.message import (
    DELIVERY_LIMIT,
    NEVER_SETTLED,
    Delivery,
    Failure,
    Later,
    Message,
    Place,
    ToDeadLetters,
    ToExchange,
    ToSubscriber,
    UndeliveredOf,
    routing_key_in,
)
from domain_events.middleware import ConnectionState
from domain_events.names import matches
from domain_events.process import check_fork, on_fork
from domain_events.retry import Backoff

log = Log("domain_events")

_Result = TypeVar("_Result")

_URL = re.compile(r"memory://(?P<name>[\w.-]*)/?", re.IGNORECASE)

#: By the type of an exchange: whether a binding key matches a routing key.
_MATCHES: dict[str, Callable[[str, str], bool]] = {
    "topic": matches,
    "direct": operator.eq,
    "fanout": lambda _binding_key, _routing_key: True,
}

# How often a delivery may fail before the broker itself moves it to the dead letters.
_MOST_FAILURES = 100
# For how long a temporary queue is kept without a consumer.
_EXPIRES = 60 * SECOND
# Seconds for which a suspect is handled alone; doubled with each failure, up to the longest.
_ALONE, _LONGEST_ALONE = 3.0, 3600.0
# Before a consumer whose queue was deleted, or cannot be declared, tries again.
_BACKOFF = Backoff(first=0.1, maximum=10.0, jitter=0.5)


_OUTAGE = "the test simulates an outage"

# The settings of queues that are not a subscriber's.
_NO_SETTINGS = Queue("", Exchange(""), classic=True)


class Memory:
    """An embedded broker; see `domain_events.broker.Broker`."""

    def __init__(self, urls: tuple[str, ...]) -> None:
        found = _URL.fullmatch(urls[0])
        if found is None or len(urls) > 1:
            raise ConfigurationError(
                "The embedded broker's URL is memory:// or memory://NAME, and only one."
            )
        self._store = store(found["name"])

    def publishing(
        self, name: str, declare: Exchange | None = None, on_change: OnChange = ignore_change
    ) -> MemoryPublishing:
        return MemoryPublishing(self._store, declare, on_change)

    def consuming(
        self, name: str, on_failure: Callable[[], None], on_change: OnChange = ignore_change
    ) -> MemoryConsuming:
        return MemoryConsuming(self._store, on_change)


class _Uses:
    """Reports the first use of a connection in this process, its end, and simulated outages.

    In the thread of whoever does that.
    """

    def __init__(self, store: Store, on_change: OnChange) -> None:
        self._store = store
        self._on_change = on_change
        self._processes: dict[int, object] = {}

    def begin(self) -> None:
        """Called with each use."""
        if os.getpid() in self._processes:
            return
        if self._store.is_away:
            self._report(ConnectionState.UNREACHABLE, _OUTAGE)
            return
        me = object()
        if self._processes.setdefault(os.getpid(), me) is me:
            self._store.uses.add(self)
            self._report(ConnectionState.CONNECTED)

    def lose(self) -> None:
        self._report(ConnectionState.LOST, _OUTAGE)

    def come_back(self) -> None:
        self._report(ConnectionState.CONNECTED)

    def end(self) -> None:
        if self._processes.pop(os.getpid(), None) is not None:
            self._store.uses.discard(self)
            self._report(ConnectionState.CLOSED)

    def _report(self, state: ConnectionState, reason: str | None = None) -> None:
        self._on_change(state, f"memory://{self._store.name}", reason)


class MemoryPublishing:
    """See `domain_events.broker.Publishing`: a submitted message is in the queues at once."""

    trouble = ""

    def __init__(
        self, store: Store, declare: Exchange | None, on_change: OnChange = ignore_change
    ) -> None:
        self._store = store
        self._uses = _Uses(store, on_change)
        self._declare = declare
        self._is_closed = False

    def silence(self) -> float:
        return 0.0  # it has no thread

    def connect(self) -> None:
        _check_open(self._is_closed)
        self._uses.begin()

    def submit(self, publication: Publication) -> None:
        if not self._is_closed:
            self._uses.begin()
        if publication.awaited and self._store.is_in_operation():
            # By a finalizer or a signal handler, which would wait for the interrupted operation.
            publication.error = _interrupted_error(" The event was not sent.")
            self._publish(publication)
        else:
            self._store.call_soon(lambda: self._publish(publication))

    def _publish(self, publication: Publication) -> None:
        if publication.done:
            return  # withdrawn
        try:
            if publication.error is None:
                _check_open(self._is_closed)
                self._store.check_presence(" The event was not sent.")
                if self._declare is not None:
                    self._store.declare_exchange(self._declare)
                publication.sent = True
                self._store.publish(publication.message)
        except DomainEventsError as error:
            publication.error = error
        publication.done = True
        publication.on_done(publication)

    def withdraw(self, publication: Publication) -> bool:
        with self._store.lock:
            was_done, publication.done = publication.done, True
            return not was_done

    def close(self, timeout: float) -> None:
        self._is_closed = True
        self._uses.end()

    def close_soon(self) -> bool:
        self.close(0)
        return False


class MemoryConsuming:
    """See `domain_events.broker.Consuming`."""

    def __init__(self, store: Store, on_change: OnChange = ignore_change) -> None:
        self._store = store
        self._uses = _Uses(store, on_change)
        self._holders: list[_Holder] = []
        self.is_closed = False

    def call(self, operation: Callable[[], _Result]) -> _Result:
        """Perform it, if this connection is open."""
        _check_open(self.is_closed)
        self._uses.begin()
        self._store.check_presence()
        return self._store.call(operation)

    def declare(self, queue: Queue, timeout: float) -> None:
        self.call(lambda: self._store.declare(queue, self))

    def delete(self, names: Sequence[str], exchange: str, timeout: float) -> None:
        places = [place for name in names for place in (ToSubscriber(name), ToDeadLetters(name))]
        self.call(lambda: self._store.delete([*places, UndeliveredOf(exchange)], exchange, self))

    def count(self, place: Place, timeout: float) -> int:
        return self.call(lambda: len(self._store.queue(place, self).ready))

    def is_registered(self, name: str, timeout: float, *, strict: bool) -> bool:
        queue = self.call(lambda: self._store.queue(ToSubscriber(name), self).settings)
        # Any program may declare a classic queue without dead letters, or a temporary one.
        is_common = queue.is_temporary or (queue.classic and not queue.dead_letters)
        return not queue.exclusive and not (strict and is_common)

    def consume(
        self, queue: Queue, prefetch_count: int, deliver: Callable[[Delivery, Consumer], None]
    ) -> MemoryConsumer:
        _check_open(self.is_closed)
        self._uses.begin()
        consumer = MemoryConsumer(self._store, self, queue, prefetch_count, deliver)
        self._holders.append(consumer)
        self._store.call_soon(consumer.open)
        return consumer

    def browse(
        self, place: Place, timeout: float, publishing: Callable[[], Publishing]
    ) -> MemoryBrowser:
        browser = MemoryBrowser(self._store, self, place)
        self.call(browser.begin)
        self._holders.append(browser)
        return browser

    def is_browsed(self, place: Place, timeout: float) -> bool:
        return self.call(lambda: self._store.is_browsed(place, self))

    def silence(self) -> float:
        return 0.0  # it has no thread

    def failure(self) -> DomainEventsError | None:
        return None  # it never gives up

    def close(self, timeout: float) -> None:
        self.is_closed = True
        self._store.call_soon(self._close)
        self._uses.end()

    def close_soon(self) -> bool:
        self.close(0)
        return False

    def _close(self) -> None:
        # All of them first, so that none takes what another one gives back.
        for holder in self._holders:
            holder.end()
        for holder in self._holders:
            holder.give_back(True if isinstance(holder, MemoryConsumer) else None)
        self._store.release(self)


class MemoryDelivery(Message):
    """A message in a queue, and, in a copy, each delivery; see `domain_events.message.Delivery`.

    It is the publisher's message at the time of publishing, without its source: that one had a
    source, too, and so on.
    """

    __eq__, __hash__ = object.__eq__, object.__hash__

    is_verified, give_back_counts = True, False
    # Besides the fields of a message, for the callbacks of `replay_event`.
    content_type, content_encoding, reply_to = "application/json", None, None
    exchange = ""
    #: Its place in the queue, the lowest in front.
    rank = (0, 0)
    redelivered = False
    failures = message_count = 0
    receipt: Any = None
    headers: dict[str, Any]

    def __init__(self, message: Message) -> None:
        super().__init__(**{**vars(message), "source": None})
        kept = message.source.headers if message.source is not None else {}
        self.headers = {**kept, **(message.headers or {})}
        self.type = self.routing_key
        # Empty if another program has put it into a queue.
        self.published_routing_key = self.routing_key or None
        self.subscriber = self.destination.name if isinstance(self.destination, Later) else None

    @property
    def foreign_headers(self) -> dict[str, Any]:
        return self.headers

    @property
    def original_routing_key(self) -> str:
        return self.published_routing_key or routing_key_in(self.body) or self.routing_key

    @property
    def properties(self) -> MemoryDelivery:
        return self

    def delivered(self, queue: _Queue) -> MemoryDelivery:
        """A delivery of it."""
        delivery = object.__new__(MemoryDelivery)
        vars(delivery).update(vars(self))
        delivery.headers = dict(self.headers)
        delivery.receipt = object()
        delivery.message_count = len(queue.ready)
        # Addressed as RabbitMQ addresses it.
        if isinstance(self.destination, ToExchange) and isinstance(queue.place, ToSubscriber):
            delivery.exchange = self.destination.exchange
        else:
            delivery.routing_key = _name(queue.place)
        return delivery


@dataclass(eq=False)
class _Holder:
    """Takes messages from a queue, and holds them until they are settled."""

    store: Store
    owner: MemoryConsuming
    queue: _Queue | None = field(default=None, init=False)
    #: By the receipt of its delivery.
    held: dict[object, MemoryDelivery] = field(default_factory=dict, init=False)

    def is_current(self, delivery: Delivery) -> bool:
        # Not if the queue was deleted, nor after a fork.
        return delivery.receipt in self.held and self.store.exists(self.queue)

    def _take(self, queue: _Queue) -> MemoryDelivery:
        _, message = heapq.heappop(queue.ready)
        delivery = message.delivered(queue)
        self.held[delivery.receipt] = message
        return delivery

    def give_back(self, failed: bool | None = None) -> None:
        """Requeue all held messages."""
        held, self.held = self.held, {}
        self.store.give_back(self.queue, held.values(), failed)

    def end(self) -> None:
        """Take no more."""


@dataclass(eq=False)
class MemoryConsumer(_Holder):
    """See `domain_events.broker.Consumer`."""

    settings: Queue
    prefetch_count: int
    deliver: Callable[[Delivery, Consumer], None]
    #: Whether all deliveries so far had failed before, and may have killed their process.
    is_careful: bool = False
    #: The receipts of suspects that were handled alone for long enough.
    bypassed: set[object] = field(default_factory=set)
    attempts: int = 0
    is_stopped: bool = False
    #: Since when it consumes, but for outages.
    since: float | None = None

    # --- any thread ----------------------------------------------------------------------------

    @property
    def consuming_since(self) -> float | None:
        return None if self.store.is_away else self.since

    @property
    def unsettled(self) -> int:
        return len(self.held)

    def settle(self, delivery: Delivery, how: Settlement = Settlement.DONE) -> None:
        self.store.call_soon(lambda: self._settle(delivery, how))

    def flush(self) -> None:
        """Nothing to do: settlements take effect at once."""

    def repair(self, seconds: float, then: Callable[[bool], None], *, delays: bool = False) -> None:
        settings = replace(self.settings, delays=self.settings.delays or delays)

        def repair() -> None:
            exists = self._declared(settings) is not None
            self.store.later(seconds, lambda: None if self.owner.is_closed else then(exists))

        self.store.call_soon(lambda: None if self.owner.is_closed else repair())

    def stop(self, timeout: float) -> None:
        self.store.call_soon(self.end)

    # --- operations ------------------------------------------------------------------------------

    def open(self) -> None:
        """Declare the queue and consume from it, or try again later."""
        if self.is_stopped:
            return
        self.queue = self._declared(self.settings)
        if self.queue is None:
            self._open_later()
            return
        self.attempts = 0
        self.since = time.time()
        self.is_careful = self.settings.counts_failures
        self.queue.consumers.append(self)
        self.store.feed(self.queue)

    def _declared(self, settings: Queue) -> _Queue | None:
        try:
            return self.store.declare(settings, self.owner)
        except DomainEventsError as error:
            log.error("%s cannot consume; trying again. %s", settings.name, error)
            return None

    def _open_later(self) -> None:
        self.attempts += 1
        self.store.later(_BACKOFF.delay(self.attempts), self.open)

    def has_room(self) -> bool:
        """Whether it takes one more."""
        if self.store.is_away:
            return False
        room = self.prefetch_count
        if self.is_careful:
            room = min(room, 1 + len(self.bypassed & self.held.keys()))
        return len(self.held) < room

    def take(self, queue: _Queue) -> None:
        """Take the next message of the queue."""
        delivery = self._take(queue)
        self.is_careful = self.is_careful and delivery.failures > 0
        if self.is_careful:
            alone = min(_ALONE * 2.0 ** (delivery.failures - 1), _LONGEST_ALONE)
            self.store.later(alone, partial(self._bypass_suspect, queue, delivery))
        try:
            self.deliver(delivery, self)
        except Exception:
            log.exception("Internal error in the callback of a delivery.")

    def _bypass_suspect(self, queue: _Queue, suspect: Delivery) -> None:
        """It has not killed the process so far: others must not wait for it."""
        self.bypassed.add(suspect.receipt)
        self.store.feed(queue)

    def _settle(self, delivery: Delivery, how: Settlement) -> None:
        message = self.held.pop(delivery.receipt, None)
        returned = [message] if message is not None and how is not Settlement.DONE else []
        self.store.give_back(self.queue, returned, how is Settlement.FAILED)

    def cancelled(self) -> None:
        """The queue was deleted, with the held messages."""
        self.since = None
        self.held.clear()
        log.warning("%s: the queue was deleted; it is declared again.", self.settings.name)
        self._open_later()

    def end(self) -> None:
        self.is_stopped = True
        self.since = None
        queue = self.queue
        if queue is not None and self.store.exists(queue) and self in queue.consumers:
            queue.consumers.remove(self)
            if queue.settings.auto_delete and not queue.consumers:
                self.store.drop(queue)
            else:
                self.store.restart_expiry(queue)


@dataclass(eq=False)
class MemoryBrowser(_Holder):
    """See `domain_events.broker.Browser`."""

    place: Place
    shared: bool = False
    ahead: int = field(default=0, init=False)

    def next(self, timeout: float) -> Delivery | None:
        return self.owner.call(self._next)

    def ack(self, delivery: Delivery, timeout: float) -> None:
        def ack() -> bool:
            return self.is_current(delivery) and bool(self.held.pop(delivery.receipt))

        if not self.owner.call(ack):
            raise BrokerUnavailable(f"The message was given back to {self.place}; begin again.")

    def ack_all(self, deliveries: Sequence[Delivery], timeout: float) -> None:
        for delivery in deliveries:
            self.ack(delivery, timeout)

    def rewind(self) -> None:
        self.owner.call(self.begin)

    def close(self, timeout: float) -> None:
        self.store.call_soon(self.end)
        self.store.call_soon(self.give_back)

    # --- operations ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin another walk."""
        self.give_back()
        self.shared = self.store.is_browsed(self.place, self.owner)
        self.store.browsers.add(self)

    def _next(self) -> MemoryDelivery | None:
        queue = self.store.queue(self.place, self.owner)
        if queue is not self.queue:
            self.held.clear()  # of a queue that was deleted
            self.queue = queue
        self.store.restart_expiry(queue)
        return self._take(queue) if queue.ready else None

    def end(self) -> None:
        self.store.browsers.discard(self)


# --- the store -----------------------------------------------------------------------------------


@dataclass(eq=False)
class _Queue:
    """A queue of messages, and its consumers."""

    place: Place
    #: How a subscriber's was declared.
    settings: Queue = _NO_SETTINGS
    #: The connection that an exclusive queue belongs to.
    owner: object = None
    #: A heap.
    ready: list[tuple[tuple[int, int], MemoryDelivery]] = field(default_factory=list)
    #: In turn: the next one is first.
    consumers: list[MemoryConsumer] = field(default_factory=list)
    #: Messages that failed too often, while there are no dead letters.
    parked: list[MemoryDelivery] = field(default_factory=list)
    #: How often it was used; see `Store.restart_expiry`.
    uses: int = 0


@dataclass(eq=False)
class _Exchange:
    """An exchange, and the binding keys of the queues that are bound to it."""

    type: str
    bindings: dict[ToSubscriber, set[str]] = field(default_factory=dict)


class Store:
    """One embedded broker: its lock, its timers, its exchanges and queues."""

    def __init__(self, name: str, clock: Clock | None = None) -> None:
        self.name = name
        self._own_clock = clock
        self.reset()

    def reset(self) -> None:
        """Start empty (at first, and in the child of a fork)."""
        self.lock = threading.RLock()
        self._clock = self._own_clock or RealTime()
        self._is_busy = False
        self._operations: deque[Callable[[], object]] = deque()
        # A heap: when, a number for the order, what to do, the exchange if it is a delayed event.
        self._timers: list[tuple[int, int, Callable[[], object], str | None]] = []
        self._numbers = itertools.count()
        self._exchanges: dict[str, _Exchange] = {}
        self._queues: dict[Place, _Queue] = {}
        self.browsers: set[MemoryBrowser] = set()
        #: Whether all that subscribers declare exists without their doing so.
        self.is_applied = False
        #: Whether an outage is simulated.
        self.is_away = False
        #: The connections in use.
        self.uses: weakref.WeakSet[_Uses] = weakref.WeakSet()

    # --- any thread ----------------------------------------------------------------------------

    def call(self, operation: Callable[[], _Result]) -> _Result:
        """Perform the operation, and return its result."""
        check_fork()
        with self.lock, in_background():
            if self._is_busy:
                raise _interrupted_error()
            try:
                self._is_busy = True
                return operation()
            finally:
                self._finish()

    def call_soon(self, operation: Callable[[], object]) -> None:
        """Perform the operation now, or after the one that this thread is in."""
        check_fork()
        with self.lock, in_background():
            self._operations.append(operation)
            if not self._is_busy:
                try:
                    self._is_busy = True
                finally:
                    self._finish()

    def is_in_operation(self) -> bool:
        """Whether this thread is in the middle of one: in a finalizer, for example."""
        check_fork()
        with self.lock:
            return self._is_busy

    def _finish(self) -> None:
        interruption: BaseException | None = None
        try:
            while self._operations:
                try:
                    self._operations.popleft()()
                except Exception:
                    # Raised by a callback; it must not break the broker.
                    log.exception("Internal error in the embedded broker.")
                except BaseException as error:  # noqa: BLE001 - raised again when all is done
                    interruption = error  # raised by a signal handler
        finally:
            self._is_busy = False
        if interruption is not None:
            raise interruption

    def advance(self, seconds: float) -> None:
        """Move virtual time forward; timers fire at their time, in their order."""
        clock = self._clock
        assert isinstance(clock, VirtualTime)
        until = clock.now() + round(seconds * SECOND)
        while (due := self._tick()) is not None and due <= until:
            clock.move_to(due)
        clock.move_to(until)

    def next_delayed(self) -> int | None:
        """When the next delayed event is due."""
        check_fork()
        with self.lock:
            return min((when for when, _, _, exchange in self._timers if exchange), default=None)

    def now(self) -> int:
        return self._clock.now()

    def stop_clock(self) -> None:
        """Drop all timers, so that no thread waits for them."""
        with self.lock:
            self._timers.clear()
        self._clock.stop()

    def _tick(self) -> int | None:
        """Run the timers that are due; returns when the next one is."""
        self.call_soon(self._run_due_timers)
        with self.lock:
            return self._timers[0][0] if self._timers else None

    # --- operations: under the lock --------------------------------------------------------------

    def later(
        self, seconds: float, operation: Callable[[], object], exchange: str | None = None
    ) -> None:
        """Perform it after so many seconds; with 0, next, even if time stands still."""
        if not seconds:
            self._operations.append(operation)
            return
        when = self.now() + round(seconds * SECOND)
        heapq.heappush(self._timers, (when, next(self._numbers), operation, exchange))
        self._clock.wake_at(when, self._tick)

    def _run_due_timers(self) -> None:
        while self._timers and self._timers[0][0] <= self.now():
            self._operations.append(heapq.heappop(self._timers)[2])

    def declare_exchange(self, exchange: Exchange) -> _Exchange:
        """Make sure that it exists.

        :raises TopologyError: it has another type, or one that is unknown here.
        """
        found = self._exchanges.get(exchange.name) or _Exchange(exchange.type)
        if found.type != exchange.type:
            raise TopologyError(
                f"The exchange {exchange.name!r} exists with different settings: it has the "
                f"type {found.type!r}. Requested: {exchange.type!r}. The ways out: use the type it "
                "has (exchange_type=...), or another exchange."
            )
        if exchange.type not in _MATCHES:
            raise TopologyError(
                f"The exchange {exchange.name!r} cannot be declared with type {exchange.type!r}: "
                f"the embedded broker supports {', '.join(_MATCHES)}."
            )
        return self._exchanges.setdefault(exchange.name, found)

    def declare(self, queue: Queue, owner: object) -> _Queue:
        """Make sure that it exists, with its exchange, its bindings, and all else that it needs.

        :raises TopologyError: it exists with other settings, or is another connection's; or it does
            not exist, and is not to be declared.
        """
        if queue.must_exist and not self.is_applied:
            return self._existing(queue, owner)
        exchange = self.declare_exchange(queue.exchange)
        place, dead_letters = ToSubscriber(queue.name), ToDeadLetters(queue.name)
        if queue.delays:
            undelivered = UndeliveredOf(queue.exchange.name)
            self._queues.setdefault(undelivered, _Queue(undelivered))
        if queue.dead_letters:
            self._queues.setdefault(dead_letters, _Queue(dead_letters))
        if place not in self._queues:
            self._queues[place] = _Queue(place, queue, owner if queue.exclusive else None)
        found = self.queue(place, owner)
        here, wanted = _kind(found.settings), _kind(queue)
        if here != wanted and not queue.classic:
            raise TopologyError(
                f"The queue {queue.name!r} exists with different settings: {here}. Requested: "
                f"{wanted}. The ways out: register under another name; or delete it, once it is "
                "empty; or use it as it is, with queue_type='classic'."
            )
        binding_keys = exchange.bindings.setdefault(place, set())
        binding_keys.update(queue.binding_keys)
        binding_keys.difference_update(queue.retired_keys)
        self.restart_expiry(found)
        if dead_letters in self._queues:
            while found.parked:
                self.put(dead_letters, found.parked.pop(0))
        return found

    def _existing(self, queue: Queue, user: object) -> _Queue:
        """The queue of a subscriber that declares nothing, if all of what it needs exists."""
        if queue.exchange.name not in self._exchanges:
            raise TopologyError(f"The exchange {queue.exchange.name!r} does not exist. {TO_APPLY}")
        places: list[Place] = [ToSubscriber(queue.name)]
        if queue.dead_letters:
            places.append(ToDeadLetters(queue.name))
        if queue.delays:
            places.append(UndeliveredOf(queue.exchange.name))
        for place in places:
            if place not in self._queues:
                raise TopologyError(f"The queue {_name(place)!r} does not exist. {TO_APPLY}")
        return self.queue(places[0], user)

    def delete(self, places: Iterable[Place], exchange: str, user: object) -> None:
        """Delete the queues and the exchange, if they exist.

        :raises TopologyError: a queue is another connection's.
        """
        for place in places:
            if place in self._queues:
                self.drop(self.queue(place, user))
        self._exchanges.pop(exchange, None)

    def drop(self, queue: _Queue) -> None:
        """Delete a queue with its messages; with the undelivered also delayed messages."""
        place = self._queues.pop(queue.place).place
        for exchange in self._exchanges.values():
            exchange.bindings = {to: keys for to, keys in exchange.bindings.items() if to != place}
        if isinstance(place, UndeliveredOf):
            self._timers = [each for each in self._timers if each[3] != place.exchange]
            heapq.heapify(self._timers)
        consumers, queue.consumers = queue.consumers, []
        for consumer in consumers:
            consumer.cancelled()

    def queue(self, place: Place, user: object) -> _Queue:
        """The queue of that place.

        :raises TopologyError: it does not exist, or is another connection's.
        """
        queue = self._queues.get(place)
        if queue is None:
            raise TopologyError(f"There is no queue {_name(place)!r}.")
        if queue.owner is not None and queue.owner is not user:
            raise TopologyError(
                f"The queue {_name(place)!r} is exclusively used by another connection. Let each "
                "process that wants one of its own register under a name of its own."
            )
        return queue

    def exists(self, queue: _Queue | None) -> bool:
        """Whether it was not deleted, and is this process's."""
        return queue is not None and self._queues.get(queue.place) is queue

    def release(self, owner: object) -> None:
        """A connection was closed: delete its exclusive queues."""
        for queue in list(self._queues.values()):
            if queue.owner is owner:
                self.drop(queue)

    def is_browsed(self, place: Place, user: object) -> bool:
        """Whether another connection browses it."""
        return any(each.place == place and each.owner is not user for each in self.browsers)

    def restart_expiry(self, queue: _Queue) -> None:
        """From now on, keep a temporary queue without consumers for a while."""
        queue.uses = uses = queue.uses + 1

        def expire() -> None:
            if queue.uses == uses and not queue.consumers and self.exists(queue):
                self.drop(queue)

        if _kind(queue.settings) == "temporary":
            self.later(_EXPIRES / SECOND, expire)

    # --- outages ---------------------------------------------------------------------------------

    def go_away(self) -> None:
        """As for connections that are lost: requeue what consumers hold, and deliver no more."""
        self.is_away = True
        for queue in list(self._queues.values()):
            for consumer in queue.consumers:
                consumer.give_back(True)
        for use in list(self.uses):
            use.lose()

    def come_back(self) -> None:
        self.is_away = False
        for queue in list(self._queues.values()):
            for consumer in queue.consumers:
                consumer.since = time.time()
            self.feed(queue)
        for use in list(self.uses):
            use.come_back()

    def check_presence(self, what: str = "") -> None:
        """Raise `BrokerUnavailable` if it is away."""
        if self.is_away:
            raise BrokerUnavailable(f"No broker: {_OUTAGE}.{what}")

    # --- messages --------------------------------------------------------------------------------

    def publish(self, message: Message) -> None:
        """Route the message to its queues.

        :raises TopologyError: its exchange does not exist, or does not delay.
        :raises EventUnroutable: it is mandatory, and no queue is bound for it.
        """
        to = message.destination
        if isinstance(to, Later):
            if UndeliveredOf(to.exchange) not in self._queues:
                raise TopologyError(
                    f"Nothing can be delayed on the exchange {to.exchange!r}: no subscriber that "
                    "retries has registered on it."
                )
            retry = partial(self._come_due, to, MemoryDelivery(message))
            self.later(to.seconds, retry, to.exchange)
            return
        places: list[Place] = [to] if not isinstance(to, ToExchange) and to in self._queues else []
        if isinstance(to, ToExchange):
            exchange = self._exchanges.get(to.exchange)
            if exchange is None:
                raise TopologyError(
                    f"The exchange {to.exchange!r} does not exist: no subscriber has registered."
                )
            routes = _MATCHES[exchange.type]
            places += [
                queue
                for queue, binding_keys in exchange.bindings.items()
                if any(routes(key, message.routing_key) for key in binding_keys)
            ]
        for place in places:
            self.put(place, MemoryDelivery(message))
        if not places and message.mandatory:
            raise EventUnroutable(
                f"No queue takes {message.routing_key!r} to {to}: none is bound for it."
            )

    def _come_due(self, later: Later, message: MemoryDelivery) -> None:
        place = ToSubscriber(later.name)
        is_there = place in self._exchanges[later.exchange].bindings
        self.put(place if is_there else UndeliveredOf(later.exchange), message)

    def put(self, place: Place, message: MemoryDelivery) -> None:
        queue = self._queues[place]
        message.rank = (1, next(self._numbers))
        message.redelivered, message.failures = False, 0
        heapq.heappush(queue.ready, (message.rank, message))
        self.feed(queue)

    def feed(self, queue: _Queue) -> None:
        """Deliver ready messages to consumers with room, in turn."""
        while queue.ready and (free := [each for each in queue.consumers if each.has_room()]):
            queue.consumers.remove(free[0])
            queue.consumers.append(free[0])
            free[0].take(queue)

    def give_back(
        self, queue: _Queue | None, messages: Iterable[MemoryDelivery], failed: bool | None
    ) -> None:
        """Requeue held messages: at the front, or, if they were only browsed, in their places.

        :param failed: whether the consumer failed, or was lost; None if it only browsed.
        """
        if queue is None or not self.exists(queue):
            return
        for message in messages:
            message.redelivered = True
            if queue.settings.counts_failures and failed is not None:
                message.failures += failed
                # As in a quorum queue: after those requeued before. In a classic queue each returns
                # to its place.
                message.rank = (0, next(self._numbers))
            if message.failures > _MOST_FAILURES:
                self._dead_letter(queue, message)
            else:
                heapq.heappush(queue.ready, (message.rank, message))
        self.feed(queue)

    def _dead_letter(self, queue: _Queue, message: MemoryDelivery) -> None:
        """Move it to the dead letters after too many failures, or park it until there are any."""
        message.failure = Failure(queue.settings.name, DELIVERY_LIMIT, NEVER_SETTLED)
        dead_letters = ToDeadLetters(queue.settings.name)
        if dead_letters in self._queues:
            self.put(dead_letters, message)
        else:
            queue.parked.append(message)


def _kind(queue: Queue) -> str:
    """The settings that cannot change while the queue exists."""
    if queue.counts_failures:
        return "durable"
    if not queue.is_temporary:
        return "durable, classic"
    flags = ", ".join(flag for flag in ("exclusive", "auto_delete") if getattr(queue, flag))
    return flags or "temporary"


def _name(place: Place) -> str:
    """The name of RabbitMQ's queue for this place."""
    if isinstance(place, ToDeadLetters):
        return f"{place.name}-dl"
    return place.name if isinstance(place, ToSubscriber) else f"{place.exchange}.undelivered"


def _check_open(is_closed: bool) -> None:
    if is_closed:
        raise BrokerUnavailable("The connection was closed by this program.")


def _interrupted_error(what: str = "") -> BrokerUnavailable:
    return BrokerUnavailable(
        "The embedded broker was called in the middle of an operation, by a callback, a finalizer "
        f"or a signal handler.{what}"
    )


# --- stores by name ------------------------------------------------------------------------------

_stores: dict[str, Store] = {}
# Re-entrant: a finalizer may make a `Publisher` while this is held.
_stores_lock = threading.RLock()


def store(name: str, clock: Clock | None = None) -> Store:
    """The embedded broker of that name, created on first use."""
    check_fork()
    with _stores_lock:
        if name not in _stores:
            _stores[name] = Store(name, clock)
            log.debug("memory://%s: its events stay in this process, and end with it.", name)
        return _stores[name]


def forget(name: str) -> None:
    """Drop the embedded broker of that name, with all its messages."""
    check_fork()
    with _stores_lock:
        forgotten = _stores.pop(name, None)
    if forgotten is not None:
        forgotten.stop_clock()


def _after_fork() -> None:
    # Another thread may have held the lock when the process forked; it is not in the child.
    global _stores_lock
    _stores_lock = threading.RLock()
    for each in list(_stores.values()):
        each.reset()


on_fork(_after_fork)
