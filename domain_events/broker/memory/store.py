"""The embedded broker itself: its lock, its timers, and how messages go through its queues.

It does what RabbitMQ does, as far as `topology` asks for it: topic, direct and fanout exchanges,
bindings between them, alternate exchanges, times to live, dead-lettering, delivery limits,
exclusive, auto-delete and expiring queues. The delays are the same 24 levels.

Threads. There is one lock. `call` carries out an operation under it, in the caller's thread;
`soon` too, but when it is this very thread that is in an operation (a callback settles, a signal
handler settles), then after that one. Callbacks (deliveries, confirms) are called under the lock
and must be short; handlers of events never are. After a fork the child begins with nothing: what
was here is its parent's.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from domain_events.broker import refusals
from domain_events.broker.memory.clock import SECOND, Clock, RealTime, VirtualTime
from domain_events.broker.memory.deaths import with_death, would_go_in_circles
from domain_events.broker.memory.queues import Entry, QueueState, Taker
from domain_events.broker.memory.routing import Routing
from domain_events.broker.refusals import Refused
from domain_events.errors import BrokerUnavailable, DomainEventsError
from domain_events.log import Log, elsewhere
from domain_events.message import Message
from domain_events.process import check_fork
from domain_events.topology import Declaration, Exchange, Queue, Topology, Unbinding

log = Log("domain_events")

Result = TypeVar("Result")


class Store:
    """One embedded broker."""

    def __init__(self, name: str, clock: Clock | None = None) -> None:
        self.name = name
        self._own_clock = clock
        #: Called, under the lock, with each message that is published; for `testing`.
        self.on_publish: Callable[[Message], None] = lambda _message: None
        self.begin_anew()

    def begin_anew(self) -> None:
        """Be as new (at first, and in the child of a fork)."""
        self._lock = threading.RLock()
        self._clock = self._own_clock or RealTime()
        #: Another one means: all that was consumed or browsed before is no more.
        self.generation = object()
        self._busy = False
        self._operations: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._routing = Routing()
        self._queues: dict[str, QueueState] = {}

    # --- any thread ----------------------------------------------------------------------------

    def call(self, operation: Callable[[], Result]) -> Result:
        """Carry out the operation, and return what it returns."""
        check_fork()
        with self._lock, elsewhere():
            if self._busy:
                raise BrokerUnavailable(
                    "The embedded broker was asked in the middle of an operation, by a callback "
                    "or a signal handler."
                )
            self._busy = True
            try:
                return operation()
            finally:
                self._finish()

    def soon(self, operation: Callable[[], object]) -> None:
        """Carry out the operation now, or when the one that this thread is in has ended."""
        check_fork()
        with self._lock, elsewhere():
            self._operations.append(operation)
            if not self._busy:
                self._busy = True
                self._finish()

    def is_in_operation(self) -> bool:
        """Whether this very thread is in the middle of one: this is a finalizer, for example."""
        check_fork()
        with self._lock:
            return self._busy

    def _finish(self) -> None:
        interruption: BaseException | None = None
        while self._operations:
            operation = self._operations.popleft()
            try:
                operation()
            except Exception:
                # A callback's; it must not take the broker with it.
                log.exception("Internal error in the embedded broker.")
            except BaseException as error:  # noqa: BLE001 - raised again when all is done
                interruption = error  # a signal handler's
        self._busy = False
        if interruption is not None:
            raise interruption

    def advance(self, seconds: float) -> None:
        """Move virtual time forward; what comes due does so at its time, in its order."""
        clock = self._clock
        assert isinstance(clock, VirtualTime)
        until = clock.now() + round(seconds * SECOND)
        while (due := self.due_next()) is not None and due <= until:
            clock.move_to(due)
            self._tick()
        clock.move_to(until)

    def due_next(self) -> int | None:
        """When something happens next by itself."""
        check_fork()
        with self._lock:
            return self._timers[0][0] if self._timers else None

    def next_expiry(self) -> int | None:
        """When the next message that waits somewhere moves on."""
        check_fork()
        with self._lock:
            heads = (queue.ready[0].expires for queue in self._queues.values() if queue.ready)
            return min((expires for expires in heads if expires is not None), default=None)

    def stop_clock(self) -> None:
        """What would happen by itself one day no longer does; no thread waits for it."""
        with self._lock:
            self._timers.clear()
        self._clock.stop()

    def now(self) -> int:
        """The time."""
        return self._clock.now()

    def _tick(self) -> int | None:
        """Do what is due."""
        self.soon(self._do_what_is_due)
        return self.due_next()

    # --- operations: under the lock --------------------------------------------------------------

    def later(self, delay: int, operation: Callable[[], None]) -> None:
        """Carry it out in ``delay`` nanoseconds."""
        when = self.now() + delay
        heapq.heappush(self._timers, (when, next(self._numbers), operation))
        self._clock.wake_at(when, self._tick)

    def _do_what_is_due(self) -> None:
        now = self.now()
        while self._timers and self._timers[0][0] <= now:
            _, _, operation = heapq.heappop(self._timers)
            self._operations.append(operation)

    def declare(self, declarations: Topology, owner: object) -> None:
        """Make sure that all of this exists.

        :raises DomainEventsError: something stands against it.
        """
        for declaration in declarations:
            try:
                self._declare(declaration, owner)
            except Refused as refused:
                error = refusals.undeclarable(declaration, refused.code, refused.said)
                raise error from refused
        self._unpark()

    def _declare(self, declaration: Declaration, owner: object) -> None:
        if isinstance(declaration, Exchange):
            self._routing.declare(declaration)
        elif isinstance(declaration, Queue):
            self._declare_queue(declaration, owner)
        elif isinstance(declaration, Unbinding):
            self._routing.unbind(declaration)
        else:
            if not declaration.to_exchange and declaration.destination not in self._queues:
                raise Refused(refusals.MISSING, f"there is no {declaration.destination!r}")
            self._routing.bind(declaration)

    def _declare_queue(self, declaration: Queue, owner: object) -> None:
        queue = self._queues.get(declaration.name)
        if queue is None:
            queue = QueueState(declaration, owner if declaration.exclusive else None)
            self._queues[declaration.name] = queue
        else:
            self._check_access(queue, owner)
            if not declaration.as_found and (different := queue.same_as(declaration)):
                raise Refused(refusals.REFUSED, different)
        self.used(queue)

    def delete(self, declarations: Topology, user: object) -> None:
        """Delete the queues and exchanges among this, with all that is in them.

        :raises DomainEventsError: a queue is another connection's.
        """
        for declaration in declarations:
            if isinstance(declaration, Queue):
                if declaration.name in self._queues:
                    self._delete_queue(self.queue(declaration.name, user))
            elif isinstance(declaration, Exchange):
                self._routing.delete(declaration.name)

    def _delete_queue(self, queue: QueueState) -> None:
        queue.deleted = True
        queue.ready.clear()
        queue.parked.clear()
        del self._queues[queue.name]
        self._routing.unbind_queue(queue.name)
        takers = list(queue.takers)
        queue.takers.clear()
        for taker in takers:
            taker.cancelled()

    def queue(self, name: str, user: object) -> QueueState:
        """The queue of that name.

        :raises DomainEventsError: there is none, or it is another connection's.
        """
        try:
            queue = self._queues.get(name)
            if queue is None:
                raise Refused(refusals.MISSING, "no queue of that name")
            self._check_access(queue, user)
        except Refused as refused:
            raise refusals.unreadable(name, refused.code, refused.said) from refused
        return queue

    def _check_access(self, queue: QueueState, user: object) -> None:
        if queue.owner is not None and queue.owner is not user:
            raise Refused(refusals.LOCKED, "it is exclusive to another connection")

    def release(self, owner: object) -> None:
        """A connection is closed: the queues that belong to it go."""
        for queue in list(self._queues.values()):
            if queue.owner is owner:
                self._delete_queue(queue)

    # --- messages --------------------------------------------------------------------------------

    def publish(self, message: Message) -> DomainEventsError | None:
        """Put the message into every queue that it is routed to; what stands against it, if so."""
        if message.exchange and message.exchange not in self._routing:
            return refusals.no_exchange(message, "there is no such exchange")
        if message.headers:
            # The sender may go on to change its own.
            message = replace(message, headers=copy.deepcopy(dict(message.headers)))
        if not self._route(message) and message.mandatory:
            return refusals.unroutable(message)
        self.on_publish(message)
        return None

    def _route(self, message: Message) -> bool:
        queues = self._destinations(message)
        for queue in queues:
            self._put(queue, message)
        return bool(queues)

    def _destinations(self, message: Message) -> list[QueueState]:
        names = self._routing.queues(message.exchange, message.routing_key)
        return [self._queues[name] for name in names if name in self._queues]

    def _put(self, queue: QueueState, message: Message) -> None:
        entry = Entry(message, next(self._numbers))
        lifetime = queue.lifetime
        if lifetime is not None:
            entry.expires = self.now() + lifetime
            self.later(lifetime, lambda: self._expire(queue))
        queue.ready.append(entry)
        self.feed(queue)

    def feed(self, queue: QueueState) -> None:
        """Hand what is ready to whoever has room."""
        while queue.ready and (taker := queue.next_taker()) is not None:
            taker.take(queue.get())

    def give_back(self, queue: QueueState, entries: Iterable[Entry], *, failed: bool) -> None:
        """Return entries that somebody held; ``failed`` when whoever held them was lost."""
        if queue.deleted:
            return
        kept = []
        limit = queue.argument("x-delivery-limit")
        for entry in entries:
            entry.failures += failed
            entry.returns += 1
            if limit is not None and entry.failures > limit:
                self._dead_letter(queue, entry, "delivery_limit")
            else:
                kept.append(entry)
        queue.put_back(kept)
        self._expire(queue)
        self.feed(queue)

    def _expire(self, queue: QueueState) -> None:
        now = self.now()
        while queue.ready and (expires := queue.ready[0].expires) is not None and expires <= now:
            self._dead_letter(queue, queue.get(), "expired")

    def _dead_letter(self, queue: QueueState, entry: Entry, reason: str) -> None:
        exchange = queue.argument("x-dead-letter-exchange")
        if exchange is None:
            return
        message = entry.message
        moved = replace(
            message,
            exchange=exchange,
            routing_key=queue.argument("x-dead-letter-routing-key") or message.routing_key,
            headers=with_death(message, queue.name, reason),
            mandatory=False,
        )
        queues = self._destinations(moved)
        for each in queues:
            if not would_go_in_circles(moved, each.name):
                self._put(each, moved)
        if not queues and queue.keeps_what_it_cannot_move:
            queue.parked.append((entry, reason))

    def _unpark(self) -> None:
        """There may be a place now for what could not be moved."""
        for queue in list(self._queues.values()):
            if queue.parked:
                parked, queue.parked = queue.parked, []
                for entry, reason in parked:
                    self._dead_letter(queue, entry, reason)

    # --- consumers -------------------------------------------------------------------------------

    def attach(self, queue: QueueState, taker: Taker) -> None:
        """Begin to consume."""
        queue.unused_until = None
        queue.takers.append(taker)
        self.feed(queue)

    def detach(self, queue: QueueState, taker: Taker) -> None:
        """Consume no more."""
        if queue.deleted or taker not in queue.takers:
            return
        queue.takers.remove(taker)
        if queue.takers:
            return
        if queue.declaration.auto_delete:
            self._delete_queue(queue)
        else:
            self.used(queue)

    def used(self, queue: QueueState) -> None:
        """Somebody was here: a queue that expires begins to wait again."""
        patience = queue.patience
        if patience is None or queue.takers:
            return
        until = queue.unused_until = self.now() + patience

        def expire() -> None:
            if queue.unused_until == until and not queue.deleted:
                self._delete_queue(queue)

        self.later(patience, expire)
