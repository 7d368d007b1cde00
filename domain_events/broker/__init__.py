"""The protocol that every broker implements, and how to connect to one.

A broker opens two kinds of connections. Publishing and consuming do not share one, since RabbitMQ
stops reading from connections that publish while it is short of memory
(https://www.rabbitmq.com/docs/connection-blocked), and acks must still get through.

Everything here may be called from any thread, and nothing blocks without a deadline. Callbacks
run on one of the broker's threads: they must be short and must not block.

After a fork the child starts with fresh connections; operations under way belong to the parent.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeAlias, TypeVar

from domain_events import settings
from domain_events.address import shown
from domain_events.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEventsError,
    EventNotConfirmed,
)
from domain_events.health import ConnectionHealth
from domain_events.message import Delivery, Message, Place
from domain_events.middleware import (
    ConnectionChange,
    ConnectionState,
    Middleware,
    chained,
    report_connection,
)
from domain_events.process import check_fork, on_fork

Result = TypeVar("Result")

#: What to do about something that a subscriber uses, but does not declare.
TO_APPLY = (
    "This subscriber declares nothing (declare=False): an operator does, with: "
    "domain-events topology apply package.module:subscriber"
)


@dataclass(frozen=True)
class Exchange:
    """Where events are published. Durable; one that exists with the same type is used as it is."""

    name: str
    type: str = "topic"


@dataclass(frozen=True)
class Queue:
    """A subscriber's own queue, for the events that its binding keys match."""

    name: str
    exchange: Exchange
    binding_keys: tuple[str, ...] = ()
    #: Keys to unbind.
    retired_keys: tuple[str, ...] = ()
    #: Keep the events that its handler gives up on.
    dead_letters: bool = False
    #: Events can return to it after a delay.
    delays: bool = False
    #: Kept without consumers; otherwise deleted a minute after the last one is gone.
    durable: bool = True
    #: For one connection, and deleted with it.
    exclusive: bool = False
    #: Deleted with its last consumer.
    auto_delete: bool = False
    #: As domain-event-broker declares it; an existing one is used whatever its arguments.
    classic: bool = False
    #: An operator declares it, with all else that it needs: it is used as it is, never declared.
    must_exist: bool = False

    @property
    def is_temporary(self) -> bool:
        """Whether the queue is deleted some time after its consumers are gone."""
        return self.exclusive or self.auto_delete or not self.durable

    @property
    def counts_failures(self) -> bool:
        """Whether the queue counts how often a delivery failed."""
        return not self.classic and not self.is_temporary


class Publication:
    """One message being published, and the callback for its outcome.

    ``on_done`` is called once, when ``done`` is true and ``error`` is final: None when the broker
    has confirmed the message, otherwise an error of this publication's own, whose class shows
    whether the message may have been stored. After `Publishing.withdraw` it is not called.

    :param awaited: whether a thread waits for it. None of the broker's own threads may: a finalizer
        that publishes there gets an error.
    """

    __slots__ = (
        "awaited",
        "channel_errors",
        "done",
        "error",
        "message",
        "nacks",
        "on_done",
        "sent",
        "sent_at",
        "size",
    )

    def __init__(
        self, message: Message, on_done: Callable[[Publication], None], *, awaited: bool = True
    ) -> None:
        self.message = message
        self.awaited = awaited
        self.size = len(message.body)
        self.on_done = on_done
        self.done = False
        self.error: DomainEventsError | None = None
        self.sent = False  # whether it was ever handed to a connection
        self.sent_at = 0.0
        self.nacks = 0  # how often the broker nacked it
        self.channel_errors = 0  # how often the broker closed the channel over this one

    def detach(self) -> None:
        """Drop the body and the callback, since no caller waits any more.

        It may stay in flight for as long as the broker does not answer.
        """
        self.message = replace(self.message, body=b"", source=None)
        self.on_done = _ignore


def _ignore(_publication: Publication) -> None:
    """The callback of a publication for which no caller waits."""


#: Called with what has happened to a connection, the broker's address (without the password), and
#: the reason if there is one; see `ConnectionState`. It must be short, and must not raise.
OnChange: TypeAlias = Callable[[ConnectionState, str, str | None], None]


def ignore_change(_state: ConnectionState, _address: str, _reason: str | None) -> None:
    """For a connection that nobody watches."""


class Publishing(Protocol):
    """A connection that publishes with confirms."""

    @property
    def trouble(self) -> str:
        """Why nothing is confirmed at the moment, for errors; empty if there is no known reason."""

    def silence(self) -> float:
        """For how many seconds its thread has not responded; 0 if it does, or has none.

        Never waits: each call requests a response, which the next one looks for.
        """

    def connect(self) -> None:
        """Begin to connect, if there is no connection, without waiting for it.

        :raises BrokerUnavailable: it is closed, or no thread can be started.
        """

    def submit(self, publication: Publication) -> None:
        """Send this after all others, as soon as there is a connection with room in its window.

        Unconfirmed publications are sent again after a reconnect. Once this connection is closed,
        they are done at once, with an error.
        """

    def withdraw(self, publication: Publication) -> bool:
        """Give up on it; ``publication.sent`` is then final. False: it was done already."""

    def close(self, timeout: float) -> None:
        """Accept no more, wait for those under way, then close, in about ``timeout`` seconds."""

    def close_soon(self) -> bool:
        """Close without waiting; may be called by a finalizer. False: nothing was open."""


class Settlement(Enum):
    """How to settle a delivery."""

    #: Remove it from the queue.
    DONE = "done"
    #: Requeue it; it has not failed.
    GIVE_BACK = "give back"
    #: Requeue it as a failed delivery, which counts towards the queue's limit.
    FAILED = "failed"


class Consumer(Protocol):
    """Consumes a subscriber's queue, across reconnects and other failures."""

    @property
    def consuming_since(self) -> float | None:
        """Since when, in Unix seconds, the broker has accepted it; None while it has not."""

    @property
    def unsettled(self) -> int:
        """How many deliveries it holds."""

    def is_current(self, delivery: Delivery) -> bool:
        """Whether the delivery can still be settled; otherwise it was requeued."""

    def settle(self, delivery: Delivery, how: Settlement = Settlement.DONE) -> None:
        """Settle the delivery; the broker is informed soon, or at once by `flush`.

        One that is not current is ignored: its tag was valid on its channel only.
        """

    def flush(self) -> None:
        """Send all settlements so far to the broker now."""

    def repair(self, seconds: float, then: Callable[[bool], None], *, delays: bool = False) -> None:
        """Declare the queue again, with ``delays`` or without; call ``then`` after a pause.

        ``then`` is called on the broker's thread with whether all of it exists now, but not once
        this consumer's connection is closed.
        """

    def stop(self, timeout: float) -> None:
        """Take no more deliveries; those taken can still be settled."""


class Browser(Protocol):
    """Walks over the messages of one place; those that are not acked stay there.

    :ivar shared: whether another connection was browsing, too, when the walk began; the messages
        it holds are not visible here.
    """

    shared: bool

    @property
    def ahead(self) -> int:
        """How many more messages it holds, which `next` will return."""

    def next(self, timeout: float) -> Delivery | None:
        """The next message of this walk, or None when there is none."""

    def ack(self, delivery: Delivery, timeout: float) -> None:
        """Remove the message.

        :raises BrokerUnavailable: the connection was lost; the message was requeued.
        """

    def ack_all(self, deliveries: Sequence[Delivery], timeout: float) -> None:
        """Remove these messages, as `ack`."""

    def rewind(self) -> None:
        """Begin another walk: requeue all unacked messages, in their order."""

    def close(self, timeout: float) -> None:
        """Requeue all unacked messages, and end."""


class Consuming(Protocol):
    """A connection that declares, consumes and browses.

    Methods that block raise `BrokerUnavailable` if there is no broker within ``timeout`` seconds,
    `ConfigurationError` when the settings cannot work, `TopologyError` when existing queues and
    exchanges conflict with it.
    """

    def declare(self, queue: Queue, timeout: float) -> None:
        """Declare the queue and everything else that its subscriber needs.

        Of one that ``must_exist``, only check that the queues and exchanges exist, as far as this
        user may.
        """

    def delete(self, names: Sequence[str], exchange: str, timeout: float) -> None:
        """Delete subscribers, with their dead letters, and an exchange, with its delayed events."""

    def count(self, place: Place, timeout: float) -> int:
        """How many messages are ready there."""

    def is_registered(self, name: str, timeout: float, *, strict: bool) -> bool:
        """Whether the queue of that name is like those of subscribers with retries.

        :param strict: accept only a queue that no other program would declare by chance.
        :raises TopologyError: there is no such queue.
        """

    def consume(
        self, queue: Queue, prefetch_count: int, deliver: Callable[[Delivery, Consumer], None]
    ) -> Consumer:
        """Start to consume, and resume after each failure.

        A queue that counts failures is consumed with care: a redelivery may have killed the process
        that held it, which counts against all deliveries held beside it. So one is taken at a time,
        until one arrives that was never delivered before.

        :param prefetch_count: the most deliveries that may be unsettled at a time.
        """

    def browse(self, place: Place, timeout: float, publishing: Callable[[], Publishing]) -> Browser:
        """Walk over the messages there.

        :param publishing: the connection for a broker that limits how often a message is browsed,
            and must republish it there before that.
        """

    def is_browsed(self, place: Place, timeout: float) -> bool:
        """Whether another connection browses it; False if this user may not check."""

    def silence(self) -> float:
        """As `Publishing.silence`."""

    def failure(self) -> DomainEventsError | None:
        """Why this connection has given up for good, if it has."""

    def close(self, timeout: float) -> None:
        """Send all settlements to the broker, then close, in about ``timeout`` seconds."""

    def close_soon(self) -> bool:
        """Close without waiting; may be called by a finalizer. False: nothing was open."""


class Broker(Protocol):
    """Takes domain events and delivers them to subscribers."""

    def publishing(
        self, name: str, declare: Exchange | None = None, on_change: OnChange = ignore_change
    ) -> Publishing:
        """A connection to publish on. ``declare``: an exchange to declare, if this user may."""

    def consuming(
        self, name: str, on_failure: Callable[[], None], on_change: OnChange = ignore_change
    ) -> Consuming:
        """A connection to consume on. ``on_failure`` is called when it has given up for good."""


def connect(urls: tuple[str, ...]) -> Broker:
    """The broker behind the URLs; no connection is made yet.

    :raises ConfigurationError: no broker has such URLs.
    """
    schemes = {url.partition("://")[0].lower() if "://" in url else "" for url in urls}
    # Here and not above, so that pika is loaded only where it is needed.
    if schemes <= {"amqp", "amqps"}:
        from domain_events.broker.rabbitmq import RabbitMQ  # noqa: PLC0415

        return RabbitMQ(urls)
    if schemes == {"memory"}:
        from domain_events.broker.memory import Memory  # noqa: PLC0415

        return Memory(urls)
    raise ConfigurationError(
        f"No broker is known for {', '.join(map(shown, urls))}: a broker's URL starts with "
        "amqp://, amqps://, memory://" + (", and several URLs with the same." if urls[1:] else ".")
    )


# --- connections and who owns them ---------------------------------------------------------------

# Brokers that replace all others in tests; the last one is in force.
_overrides: list[Broker] = []
# Held while an owner goes over to another broker.
_switching = threading.RLock()


@contextmanager
def overridden(broker: Broker) -> Iterator[None]:
    """The one hook for tests: inside this, every owner of connections gets them from ``broker``.

    So do those that were created before, with the settings of another broker or with None.
    """
    _overrides.append(broker)
    try:
        yield
    finally:
        _overrides.remove(broker)


def switched_off(urls: tuple[str, ...] | None) -> bool:
    """Whether owners with these settings have no broker."""
    return urls is None and not _overrides


class Watch:
    """What has happened to one connection: kept for `Connections.health`, passed to middleware.

    Threads. The connection's own thread calls `changed`, and replaces the state as a whole; any
    thread reads it. Nothing here takes a lock, nor refers to the owner. In the child of a fork it
    starts anew, since the connection does.
    """

    def __init__(
        self, owner: str, purpose: str, middleware: Callable[[], tuple[Middleware, ...] | None]
    ) -> None:
        self._owner = owner
        self._number = next(_numbers)
        self._middleware = middleware
        self._unused = ConnectionHealth(purpose)
        # The process, and how often it has connected.
        self._state = os.getpid(), self._unused, 0

    @property
    def health(self) -> ConnectionHealth:
        """The current state; see `Connections.health` for its ``silence``."""
        return self._current()[0]

    def _current(self) -> tuple[ConnectionHealth, int]:
        pid, health, times = self._state
        return (health, times) if pid == os.getpid() else (self._unused, 0)

    def changed(self, state: ConnectionState, address: str, reason: str | None = None) -> None:
        """The connection's thread: this has happened."""
        (before, times), now = self._current(), time.time()
        connected = state in _CONNECTED
        times += state is ConnectionState.CONNECTED
        after = replace(
            before,
            address=address,
            connected=connected,
            since=before.since if before.since and connected == before.connected else now,
            reconnects=max(0, times - 1),
            blocked=reason if state is ConnectionState.BLOCKED else None,
        )
        if state in _FAILED:
            after = replace(after, last_error=reason, last_error_at=now)
        self._state = os.getpid(), after, times
        chain = self._middleware()
        if chain is None:  # the owner is gone
            chain = settings.middleware()
        change = ConnectionChange(state, self._owner, before.purpose, address, reason, self._number)
        report_connection(chain, change)


_numbers = itertools.count(1)

_CONNECTED = (ConnectionState.CONNECTED, ConnectionState.BLOCKED, ConnectionState.UNBLOCKED)
_FAILED = (ConnectionState.LOST, ConnectionState.UNREACHABLE)


class Connections:
    """The connections of one owner, each made when first used.

    Threads. Any may call; if two do at the same time, both get the same connection, and a second
    one is dropped unopened. There is no lock that a fork could leave held.

    :param urls: None for no broker.
    :param name: the owner's, for the broker's list of connections.
    :param declare: the exchange to publish to.
    :param on_failure: called when the consuming connection has given up for good.
    :param middleware: the owner's own.
    """

    def __init__(
        self,
        urls: tuple[str, ...] | None,
        name: str,
        *,
        declare: Exchange | None = None,
        on_failure: Callable[[], None] = lambda: None,
        middleware: tuple[Middleware, ...] = (),
    ) -> None:
        self._urls = urls
        self._name = name
        self._declare = declare
        self._on_failure = on_failure
        self._middleware = middleware
        self._own_broker = self._broker = None if urls is None else connect(urls)
        self._made: dict[str, Any] = {}
        # Of those in `_made`, and of those before them that have not been replaced yet.
        self._watches: dict[str, Watch] = {}
        self._pinned = False

    @property
    def address(self) -> object:
        """Identifies the broker in use; equal for two owners with the same broker."""
        return self._urls if self._broker is self._own_broker else self._broker

    @property
    def urls(self) -> tuple[str, ...] | None:
        """The broker's URLs, in or out of a test; None if everything is switched off."""
        return self._urls

    @property
    def shown(self) -> str:
        """The broker's address, or several, without the password."""
        if _overrides or self._urls is None:
            return "the broker of a test" if _overrides else "nowhere"
        return ", ".join(map(shown, self._urls))

    @property
    def are_switched_off(self) -> bool:
        """Whether there is no broker."""
        return not _overrides and self._own_broker is None

    @property
    def are_open(self) -> bool:
        """Whether any was made, and not closed since."""
        return bool(self._made)

    def publishing(self) -> Publishing | None:
        """The connection to publish on; None when everything is switched off."""
        broker = self._in_force()
        if broker is None:
            return None
        made: Publishing | None = self._made.get("publishing")
        return made or self._make(
            "publishing", lambda watch: broker.publishing(self._name, self._declare, watch.changed)
        )

    def consuming(self) -> Consuming | None:
        """The connection to consume on; None when everything is switched off."""
        broker = self._in_force()
        if broker is None:
            return None
        made: Consuming | None = self._made.get("consuming")
        return made or self._make(
            "consuming", lambda watch: broker.consuming(self._name, self._on_failure, watch.changed)
        )

    def _make(self, kind: str, make: Callable[[Watch], Any]) -> Any:
        while True:
            made = self._made
            # The I/O thread must not keep the middleware alive, which may refer to the owner.
            watch = Watch(self._name, kind, weakly(self.middleware))
            new = make(watch)
            connection = made.setdefault(kind, new)
            if made is self._made:
                if connection is new:
                    self._watches[kind] = watch
                return connection
            connection.close_soon()  # another thread has closed them meanwhile

    def health(self) -> tuple[ConnectionHealth, ...]:
        """The state of those that are open. Takes no lock, and never waits."""
        check_fork()
        open_ones = list(self._made.items())
        watches = self._watches.copy()
        return tuple(
            replace(watches[kind].health, silence=connection.silence())
            for kind, connection in open_ones
            if kind in watches
        )

    def last_error(self) -> tuple[str | None, float | None]:
        """The last error of any of them, also of those that were closed since, and its time."""
        states = [watch.health for watch in self._watches.copy().values()]
        last = max(states, key=lambda state: state.last_error_at or 0.0, default=None)
        return (last.last_error, last.last_error_at) if last else (None, None)

    def middleware(self) -> tuple[Middleware, ...]:
        """That of the process, and the owner's own within it."""
        return chained(settings.middleware(), self._middleware)

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Inside this, the broker stays the same: a run must not change it halfway."""
        self._pinned = True
        try:
            yield
        finally:
            self._pinned = False

    def _in_force(self) -> Broker | None:
        check_fork()
        broker = _overrides[-1] if _overrides else self._own_broker
        if broker is not self._broker and not self._pinned:
            with _switching:  # of two threads, the second must not close what the first has made
                if broker is not self._broker:
                    self.close_soon()
                    self._broker = broker
        if self._broker is None:
            settings.warn_switched_off()
        return self._broker

    def close(self, timeout: float) -> None:
        """Close them; the next use opens others.

        The consuming one first: its acks need not wait.
        """
        made, self._made = self._made, {}
        deadline = time.monotonic() + timeout
        try:
            for kind in sorted(made):
                made[kind].close(max(0.0, deadline - time.monotonic()))
        except BaseException:  # Ctrl-C: not in order, but closed
            _close_soon(made)
            raise

    def close_soon(self) -> bool:
        """Close them without waiting; False: none was open."""
        made, self._made = self._made, {}
        return _close_soon(made)


def _close_soon(made: dict[str, Any]) -> bool:
    were_open = [each.close_soon() for each in list(made.values())]
    return any(were_open)


def weakly(method: Callable[[], Result]) -> Callable[[], Result | None]:
    """The method, without keeping its object alive; None when that is gone."""
    weak = weakref.WeakMethod(method)

    def call() -> Result | None:
        alive = weak()
        return None if alive is None else alive()

    return call


class Owner:
    """Owns `Connections`; closes them after a with statement, or when garbage-collected."""

    connections: Connections

    def close(self) -> None:
        """Close the connections."""
        raise NotImplementedError

    def __enter__(self: _Owner) -> _Owner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Otherwise the connections and their threads would stay for ever. Not at interpreter
        # shutdown: a program may keep a connection that long.
        connections = getattr(self, "connections", None)
        if is_finalizing() or connections is None or not connections.close_soon():
            return
        warnings.warn(
            f"unclosed {self!r}: it was dropped with an open connection. Call its close(), or "
            "use it in a with statement.",
            ResourceWarning,
            stacklevel=2,
            source=self,
        )


_Owner = TypeVar("_Owner", bound=Owner)


# The most that `confirm_each` has under way at a time.
_MOST_UNDER_WAY = 100
_MOST_BYTES_UNDER_WAY = 4 * 2**20

_Item = TypeVar("_Item")


def confirm(publishing: Publishing, message: Message, timeout: float) -> None:
    """Publish one message and wait until it is confirmed.

    :raises DomainEventsError: when it is not; see `Publisher.publish`.
    """
    known = threading.Lock()
    known.acquire()
    publication = Publication(message, lambda _publication: known.release())
    try:
        publishing.submit(publication)
        in_time = known.acquire(timeout=timeout)
    except BaseException:  # Ctrl-C, or a signal handler that raises: no caller waits any more
        publishing.withdraw(publication)
        raise
    if not in_time and publishing.withdraw(publication):
        raise _timeout(publishing, publication, timeout)
    error = publication.error
    if error is not None:
        try:
            raise error
        finally:
            del error, publication  # this frame is in its traceback


def confirm_each(
    publishing: Publishing,
    messages: Iterable[tuple[Message, _Item]],
    timeout: float,
    confirmed: Callable[[_Item], None],
) -> None:
    """Publish messages, many under way at a time, and wait until all are confirmed.

    After an error or an interruption, those that are under way are waited for, too.

    :param messages: each one with something that stands for it.
    :param timeout: seconds within which each one must be confirmed.
    :param confirmed: called with what stands for a message that was confirmed, in their order.
    :raises DomainEventsError: when one is not; see `Publisher.publish`.
    """
    under_way: deque[tuple[Publication, threading.Event, _Item]] = deque()
    size = 0

    def await_first(timeout: float) -> None:
        nonlocal size
        publication, known, item = under_way.popleft()
        size -= len(publication.message.body)
        if not known.wait(timeout) and publishing.withdraw(publication):
            raise _timeout(publishing, publication, timeout)
        if publication.error is not None:
            raise publication.error
        confirmed(item)

    try:
        for message, item in messages:
            known = threading.Event()
            publication = Publication(message, partial(_set, known))
            publishing.submit(publication)
            under_way.append((publication, known, item))
            size += len(message.body)
            while len(under_way) >= _MOST_UNDER_WAY or size > _MOST_BYTES_UNDER_WAY:
                await_first(timeout)
        while under_way:
            await_first(timeout)
    finally:
        deadline = time.monotonic() + timeout
        while under_way:
            with suppress(DomainEventsError):
                await_first(max(0.0, deadline - time.monotonic()))


def _set(known: threading.Event, _publication: Publication) -> None:
    known.set()


def _timeout(publishing: Publishing, publication: Publication, timeout: float) -> DomainEventsError:
    why = why_unconfirmed(publishing, publication)
    if publication.sent:
        return EventNotConfirmed(
            f"No confirm within {timeout:g} s ({why}). The broker may have the event: publish "
            "the same one again (the error's .event), so that subscribers recognize it by its id."
        )
    return BrokerUnavailable(f"No broker within {timeout:g} s ({why}). The event was not sent.")


def why_unconfirmed(publishing: Publishing, publication: Publication) -> str:
    """Why the broker has not confirmed it yet."""
    if publishing.trouble:
        return publishing.trouble
    if publication.nacks:
        return "the broker has nacked it so far; a queue may be at its length limit"
    return "the broker has not answered"


def _after_fork() -> None:
    # Another thread may have held the lock when the process forked; it is not in the child.
    global _switching
    _switching = threading.RLock()


on_fork(_after_fork)
