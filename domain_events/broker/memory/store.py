"""The embedded broker itself: exchanges, bindings, queues, and how messages go through them.

It does what RabbitMQ does, as far as `topology` asks for it: topic, direct and fanout exchanges,
bindings between them, alternate exchanges, times to live, dead-lettering, delivery limits,
exclusive, auto-delete and expiring queues. The delays are the same 24 levels.

Threads. There is one lock. `call` carries out an operation under it, in the caller's thread;
`soon` too, but when it is this very thread that is in an operation (a callback settles, a signal
handler publishes), then after that one. Callbacks (deliveries, confirms) are called under the lock
and must be short; handlers of events never are. After a fork the child begins with nothing: what
was here is its parent's.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, TypeVar

from domain_events import topology
from domain_events.broker import refusals
from domain_events.broker.memory.clock import SECOND, Clock, RealTime, VirtualTime
from domain_events.broker.memory.queues import Entry, QueueState, Taker
from domain_events.errors import BrokerUnavailable, DomainEventsError
from domain_events.message import Message
from domain_events.topology import Binding, Declaration, Exchange, Queue, Topology

log = logging.getLogger("domain_events")

Result = TypeVar("Result")

_ROUTES_REMEMBERED = 10_000
_TYPES = ("topic", "direct", "fanout")


class Refused(Exception):
    """What was asked for cannot be; with AMQP's code, and in its words."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(f"{said} ({code})")
        self.code = code
        self.said = said


@dataclass(eq=False)
class _Exchange:
    declaration: Exchange
    #: (destination, whether that is an exchange, binding key); a dict for its order.
    bindings: dict[tuple[str, bool, str], None] = field(default_factory=dict)


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
        self._exchanges: dict[str, _Exchange] = {}
        self._queues: dict[str, QueueState] = {}
        self._routes: dict[tuple[str, str], tuple[QueueState, ...]] = {}

    # --- any thread ----------------------------------------------------------------------------

    def call(self, operation: Callable[[], Result]) -> Result:
        """Carry out the operation, and return what it returns."""
        with self._lock:
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
        with self._lock:
            self._operations.append(operation)
            if not self._busy:
                self._busy = True
                self._finish()

    def _finish(self) -> None:
        try:
            while self._operations:
                operation = self._operations.popleft()
                try:
                    operation()
                except Exception:
                    # A callback's; it must not take the broker with it.
                    log.exception("Internal error in the embedded broker.")
        finally:
            self._busy = False

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
        with self._lock:
            return self._timers[0][0] if self._timers else None

    def next_expiry(self) -> int | None:
        """When the next message that waits somewhere moves on."""
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
            self._declare_exchange(declaration)
        elif isinstance(declaration, Queue):
            self._declare_queue(declaration, owner)
        else:
            self._bind(declaration)

    def _declare_exchange(self, declaration: Exchange) -> None:
        existing = self._exchanges.get(declaration.name)
        if existing is None:
            if declaration.type not in _TYPES:
                raise Refused(503, f"the embedded broker knows the types {', '.join(_TYPES)} only")
            self._exchanges[declaration.name] = _Exchange(declaration)
            self._routes.clear()
        elif existing.declaration != declaration:
            was = existing.declaration
            raise Refused(refusals.REFUSED, f"it has the type {was.type!r}, {dict(was.arguments)}")

    def _declare_queue(self, declaration: Queue, owner: object) -> None:
        queue = self._queues.get(declaration.name)
        if queue is None:
            queue = QueueState(declaration, owner if declaration.exclusive else None)
            self._queues[declaration.name] = queue
            self._routes.clear()
        else:
            self._check_access(queue, owner)
            if not declaration.as_found and (different := queue.same_as(declaration)):
                raise Refused(refusals.REFUSED, different)
        self.used(queue)

    def _bind(self, binding: Binding) -> None:
        source = self._exchanges.get(binding.exchange)
        destinations = self._exchanges if binding.to_exchange else self._queues
        for missing in (
            binding.exchange if source is None else None,
            binding.destination if binding.destination not in destinations else None,
        ):
            if missing is not None:
                raise Refused(refusals.MISSING, f"there is no {missing!r}")
        assert source is not None
        source.bindings[binding.destination, binding.to_exchange, binding.binding_key] = None
        self._routes.clear()

    def delete(self, declarations: Topology, user: object) -> None:
        """Delete the queues and exchanges among this, with all that is in them.

        :raises DomainEventsError: a queue is another connection's.
        """
        for declaration in declarations:
            if isinstance(declaration, Queue):
                if declaration.name in self._queues:
                    self._delete_queue(self.queue(declaration.name, user))
            elif isinstance(declaration, Exchange):
                self._exchanges.pop(declaration.name, None)
                self._unbind(declaration.name, to_exchange=True)

    def _delete_queue(self, queue: QueueState) -> None:
        queue.deleted = True
        queue.ready.clear()
        queue.parked.clear()
        del self._queues[queue.name]
        self._unbind(queue.name, to_exchange=False)
        takers = list(queue.takers)
        queue.takers.clear()
        for taker in takers:
            taker.cancelled()

    def _unbind(self, destination: str, *, to_exchange: bool) -> None:
        for exchange in self._exchanges.values():
            for binding in list(exchange.bindings):
                if binding[:2] == (destination, to_exchange):
                    del exchange.bindings[binding]
        self._routes.clear()

    def queue(self, name: str, user: object) -> QueueState:
        """The queue of that name.

        :raises DomainEventsError: there is none, or it is another connection's.
        """
        try:
            queue = self._queues.get(name)
            if queue is None:
                raise Refused(refusals.MISSING, "there is no such queue")
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
        if message.exchange and message.exchange not in self._exchanges:
            return refusals.no_exchange(message, "there is no such exchange")
        if message.headers:
            # The sender may go on to change its own.
            message = replace(message, headers=copy.deepcopy(dict(message.headers)))
        if not self._route(message) and message.mandatory:
            return refusals.unroutable(message)
        self.on_publish(message)
        return None

    def _route(self, message: Message) -> bool:
        queues = self._destinations(message.exchange, message.routing_key)
        for queue in queues:
            self._put(queue, message)
        return bool(queues)

    def _destinations(self, exchange: str, routing_key: str) -> tuple[QueueState, ...]:
        if not exchange:
            queue = self._queues.get(routing_key)
            return (queue,) if queue is not None else ()
        found = self._routes.get((exchange, routing_key))
        if found is None:
            if len(self._routes) >= _ROUTES_REMEMBERED:
                self._routes.clear()
            found = self._routes[exchange, routing_key] = self._walk(exchange, routing_key)
        return found

    def _walk(self, start: str, routing_key: str) -> tuple[QueueState, ...]:
        found: dict[str, QueueState] = {}
        seen = {start}
        to_see = [start]
        while to_see:
            exchange = self._exchanges.get(to_see.pop())
            if exchange is None:
                continue  # an alternate exchange that was never declared
            matched = False
            for destination, is_exchange, binding_key in exchange.bindings:
                if not _matches(exchange.declaration.type, binding_key, routing_key):
                    continue
                matched = True
                if not is_exchange:
                    found[destination] = self._queues[destination]
                elif destination not in seen:
                    seen.add(destination)
                    to_see.append(destination)
            alternate = exchange.declaration.arguments.get("alternate-exchange")
            if not matched and isinstance(alternate, str) and alternate not in seen:
                seen.add(alternate)
                to_see.append(alternate)
        return tuple(found.values())

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
            headers=_with_death(message, queue.name, reason),
            mandatory=False,
        )
        queues = self._destinations(moved.exchange, moved.routing_key)
        for each in queues:
            if not _would_go_in_circles(moved, each.name):
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


def _matches(exchange_type: str, binding_key: str, routing_key: str) -> bool:
    if exchange_type == "fanout":
        return True
    if exchange_type == "direct":
        return binding_key == routing_key
    return topology.matches(binding_key, routing_key)


def _would_go_in_circles(message: Message, queue: str) -> bool:
    """Whether the message was in that queue, and has come all the way since by itself.

    RabbitMQ drops it then: https://www.rabbitmq.com/docs/dlx#routing
    """
    for death in _deaths(message):
        if death["reason"] == "rejected":
            return False
        if death["queue"] == queue:
            return True
    return False


def _deaths(message: Message) -> list[dict[str, Any]]:
    """What the message tells of its moves; anybody may have put anything there."""
    deaths = message.headers.get("x-death")
    if not isinstance(deaths, list):
        return []
    wanted = {"queue", "reason", "count"}
    return [each for each in deaths if isinstance(each, dict) and wanted <= each.keys()]


def _with_death(message: Message, queue: str, reason: str) -> dict[str, Any]:
    """The headers with what the broker tells of a message that it moves by itself.

    https://www.rabbitmq.com/docs/dlx#effects
    """
    headers = dict(message.headers)
    death = {
        "count": 1,
        "reason": reason,
        "queue": queue,
        "time": datetime.fromtimestamp(int(time.time()), timezone.utc),
        "exchange": message.exchange,
        "routing-keys": [message.routing_key],
    }
    others = _deaths(message)
    for index, other in enumerate(others):
        if (other["queue"], other["reason"]) == (queue, reason):
            death = {**other, "count": other["count"] + 1}
            del others[index]
            break
    headers["x-death"] = [death, *others]
    headers.setdefault("x-first-death-reason", reason)
    headers.setdefault("x-first-death-queue", queue)
    headers.setdefault("x-first-death-exchange", message.exchange)
    return headers
