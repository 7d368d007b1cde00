"""``Publisher`` and ``publish_domain_event``: an event is confirmed, or there is an error.

Deadlines and windows are kept here; the broker carries the messages.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from uuid import UUID

from domain_events import message as messages
from domain_events import settings
from domain_events.broker import (
    Connections,
    Exchange,
    Owner,
    Publication,
    Publishing,
    confirm,
    switched_off,
    why_unconfirmed,
)
from domain_events.checks import flag, seconds
from domain_events.errors import (
    BrokerUnavailable,
    DomainEventsError,
    EventNotConfirmed,
    EventRejected,
    InvalidEvent,
)
from domain_events.events import Details, DomainEvent, HeaderValue
from domain_events.health import PublisherHealth
from domain_events.message import Message
from domain_events.middleware import (
    Done,
    Middleware,
    Operation,
    Outgoing,
    announce,
    chained,
    check_middleware,
    ignore,
)
from domain_events.names import ExchangeType, check_exchange_type, check_name
from domain_events.process import check_fork, on_fork
from domain_events.settings import DEFAULT, ConnectionSettings

# The most that `publish_many` has under way. Larger than the connection's own window, so that the
# connection is never out of work while the next events are prepared.
_MOST_UNDER_WAY = 4000
_MOST_BYTES_UNDER_WAY = 32 * 2**20

# How long `close` waits for outstanding confirms.
_CLOSE_TIMEOUT = 10.0

# After these, at least one queue may have the event.
_PERHAPS_STORED = (EventNotConfirmed, EventRejected)
# Stands for the error of an event that was not waited for.
_GIVEN_UP = EventNotConfirmed("It was not waited for.")


class Publisher(Owner):
    """Publishes domain events on a connection of its own, kept open; each one is confirmed.

    The constructor does no I/O; the first event opens the connection. Safe from any thread, in
    the child of a fork, and after hours of idling. May be used as a context manager.

    When the broker refuses an event (a queue may be at its length limit), it is sent again three
    times within two seconds, since in a cluster the reason may be a leader election; `publish`
    waits for that, and raises `EventRejected` if it did not help. Other threads are not held up.

    :param connection_settings: an AMQP URL, several, or None; see `configure`.
    :param exchange: where to publish. It is declared, if this user may.
    :param exchange_type: its type; ``topic`` is what subscribers expect.
    :param timeout: seconds after which an unconfirmed event is an error.
    :param middleware: within that of `configure`; the first is outermost.
    :param operation: as which its events are announced to the middleware.
    :raises ConfigurationError: for settings that cannot work.
    """

    def __init__(
        self,
        connection_settings: ConnectionSettings = DEFAULT,
        exchange: str = "domain-events",
        exchange_type: ExchangeType = "topic",
        *,
        timeout: float = 10.0,
        middleware: Iterable[Middleware] = (),
        operation: Operation = Operation.PUBLISH,
    ) -> None:
        connection_settings = settings.masked(connection_settings)
        urls = settings.resolve(connection_settings)
        self._exchange = check_name(exchange, "exchange")
        exchange_type = check_exchange_type(exchange_type)
        self._timeout = seconds(timeout)
        self._operation = operation
        self._closed = False
        declare = Exchange(self._exchange, exchange_type)
        self.connections = Connections(
            urls, "publisher", declare=declare, middleware=check_middleware(middleware)
        )

    def publish(
        self, event: DomainEvent, *, mandatory: bool = False, timeout: float | None = None
    ) -> DomainEvent:
        """Publish the event and wait until the broker has confirmed it.

        When this returns, the event is on disk in every queue that was bound (and on a majority
        of a cluster). If the connection is lost meanwhile, it reconnects and sends the same event
        again, until the deadline.

        :param mandatory: raise `EventUnroutable` when no queue is bound for its routing key.
        :param timeout: seconds until the deadline; the publisher's own if left out.
        :raises InvalidEvent: it can never be sent; nothing was sent.
        :raises BrokerUnavailable: no broker in time; definitely not sent.
        :raises EventNotConfirmed: sent, not confirmed in time; possibly stored.
        :raises EventRejected: the broker refused it.
        :raises ConfigurationError: wrong password, host, vhost or permissions.
        :raises TopologyError: the exchange exists with another type, or cannot be declared.
        """
        within = self._timeout if timeout is None else seconds(timeout)
        flag(mandatory, "mandatory")
        done: Done = ignore
        try:
            publishing = self._publishing()
            message, done = self._message(event, mandatory, publishing)
            if publishing is not None:
                confirm(publishing, message, within)
        except BaseException as error:
            if isinstance(error, DomainEventsError):
                error.event, error.taken = event, 1
                error.unconfirmed = (event,)
                error.perhaps = (event,) if isinstance(error, _PERHAPS_STORED) else ()
            done(error)
            raise
        done(None)
        return event

    def publish_many(
        self,
        events: Iterable[DomainEvent],
        *,
        mandatory: bool = False,
        timeout: float | None = None,
    ) -> int:
        """Publish all the events, many under way at a time, and wait for every confirm.

        The iterable is read as far as the window allows, so it may be long. After the first error
        it is read no further, and events under way are waited for. The attributes of an error
        show what became of the events (see `DomainEventsError`): how many were ``taken`` from the
        iterable and how many of these ``published``; which are ``unconfirmed``, and which of those
        are ``perhaps`` stored. An exception raised by the iterable has them, too, and so has
        KeyboardInterrupt, which waits for no confirm.

        :param timeout: seconds without any confirm after which it gives up; in all it may take as
            long as it likes, as long as confirms arrive.
        :return: how many were published.
        :raises TypeError: it is not an iterable, or something in it is not a `DomainEvent`.
        :raises DomainEventsError: as `publish` does, for the first event that failed.
        """
        within = self._timeout if timeout is None else seconds(timeout)
        flag(mandatory, "mandatory")
        if isinstance(events, DomainEvent | str | bytes | Mapping) or not isinstance(
            events, Iterable
        ):
            raise TypeError(
                f"publish_many() takes an iterable of DomainEvents, not a {type(events).__name__}; "
                "publish() takes one event."
            )
        publishing = self._publishing()
        batch = _Batch(publishing, within)
        try:
            try:
                for event in events:
                    batch.current = event
                    try:
                        message, done = self._message(event, mandatory, publishing, batch=True)
                    except Exception as error:  # noqa: BLE001 - also a middleware's
                        batch.refuse(event, error)
                        break
                    if not batch.add(event, message, done):
                        break
            except Exception:
                if batch.current is None:
                    batch.wait()  # the iterable raised it
                raise
            batch.wait()
        except BaseException as error:
            # Otherwise Ctrl-C, or a signal handler that raises: does not wait.
            batch.give_up()
            batch.describe(error)
            raise
        return batch.result()

    def health(self) -> PublisherHealth:
        """Whether it is alive and ready, and why not, as data for probes and metrics.

        From any thread, at any time; it waits for nothing, and takes no lock.
        """
        last_error, last_error_at = self.connections.last_error()
        return PublisherHealth(
            at=time.time(),
            switched_off=self.connections.are_switched_off,
            connections=self.connections.health(),
            last_error=last_error,
            last_error_at=last_error_at,
            closed=self._closed,
        )

    def close(self, timeout: float = _CLOSE_TIMEOUT) -> None:
        """Wait for events under way in other threads, then close the connection, for good.

        Later publishes fail. When nothing is under way, it returns at once.

        :param timeout: seconds after which unconfirmed events are errors.
        :raises ConfigurationError: when ``timeout`` is not such a number; nothing is closed.
        """
        timeout = seconds(timeout, zero=True)
        self._closed = True
        self.connections.close(timeout)

    def _publishing(self) -> Publishing | None:
        publishing = None if self._closed else self.connections.publishing()
        if self._closed:  # perhaps by another thread, while this one opened it
            self.connections.close_soon()
            raise BrokerUnavailable("This Publisher was closed; make a new one.")
        return publishing

    def _message(
        self,
        event: DomainEvent[Any],
        mandatory: bool,
        publishing: Publishing | None,
        *,
        batch: bool = False,
    ) -> tuple[Message, Done]:
        """The event's message, announced to the middleware, and what to call with its outcome."""
        if not isinstance(event, DomainEvent):
            raise TypeError(
                f"publish() takes a DomainEvent, not a {type(event).__name__}; "
                "publish_domain_event() takes a routing key and data."
            )
        chain = self.connections.middleware()
        message = messages.from_event(event, self._exchange, settings.app_id(), mandatory)
        if not chain or publishing is None:
            return message, ignore
        return message, _announce(chain, self._operation, event, message, self._exchange, batch)


def _announce(
    chain: tuple[Middleware, ...],
    operation: Operation,
    event: DomainEvent[Any],
    message: Message,
    exchange: str,
    batch: bool = False,
) -> Done:
    """Announce an event to the middleware, which may add headers to its message."""
    known = message.headers or {}
    outgoing = Outgoing(operation, event, dict(known), exchange, batch=batch)
    done = announce(chain, outgoing)
    try:
        message.headers = messages.checked_headers(outgoing.headers)
        if operation is Operation.RELAY:  # a trace context, say, is that of the writing
            message.headers = {**message.headers, **known}
    except BaseException as error:
        done(error)
        raise
    return done


@contextlib.contextmanager
def prepared(
    event: DomainEvent[Any], exchange: str, middleware: Iterable[Middleware] = ()
) -> Iterator[DomainEvent[Any]]:
    """An event to be stored, and published later as it would be published now.

    It has its correlation id, its cause, its headers and those that middleware adds, and the name
    of this program. It is stored within this block, whose error the middleware is given.

    :raises InvalidEvent: it can never be sent.
    """
    exchange = check_name(exchange, "exchange")
    if not isinstance(event, DomainEvent):
        raise TypeError(f"An outbox takes a DomainEvent, not a {type(event).__name__}.")
    chain = chained(settings.middleware(), check_middleware(middleware))
    message = messages.from_event(event, exchange, settings.app_id(), False)
    done: Done = ignore
    if chain and not switched_off(settings.resolve()):
        done = _announce(chain, Operation.OUTBOX, event, message, exchange)
    details = Details(
        dict(message.headers or {}),
        message.correlation_id,
        message.cause,
        message.version,
        app_id=message.app_id,
    )
    try:
        yield event.with_details(details)
    except BaseException as error:
        done(error)
        raise
    done(None)


class _Batch:
    """The events of one `publish_many`, and its window.

    The caller's thread owns everything except what ``_lock`` guards; with that, the I/O thread
    wakes it when there is room again.

    :param publishing: None publishes nothing.
    """

    def __init__(self, publishing: Publishing | None, timeout: float) -> None:
        self._publishing = publishing
        self._timeout = timeout
        # Taken and not yet counted, oldest first: publication, event, when it was taken.
        self._under_way: deque[tuple[Publication, DomainEvent, float, Done]] = deque()
        self._bytes = 0
        #: The last one taken, until it is under way; None while the iterable is read.
        self.current: DomainEvent | None = None
        self._count = 0
        self._unconfirmed: list[DomainEvent] = []
        self._perhaps: list[DomainEvent] = []
        self._error: Exception | None = None  # of the first event that failed
        # Used itself where no thread waits, since a condition is slower. Re-entrant, since a signal
        # handler may publish, and fail, and with it all that are under way.
        self._lock = threading.RLock()
        self._moved = threading.Condition(self._lock)
        self._open = 0
        self._wake_at = 0
        self._failed = False
        self._answered_at = 0.0

    def add(self, event: DomainEvent, message: Message, done: Done) -> bool:
        """Take one event, once there is room for it. False: take no more, something failed."""
        publishing = self._publishing
        if publishing is None:
            self._count += 1
            self.current = None
            return True
        publication = Publication(message, self._done)
        self._under_way.append((publication, event, time.monotonic(), done))
        self.current = None
        self._bytes += publication.size
        with self._lock:
            self._open += 1
        publishing.submit(publication)
        if len(self._under_way) >= _MOST_UNDER_WAY or self._bytes >= _MOST_BYTES_UNDER_WAY:
            # Drain to half before taking more: a thread switch per event is expensive.
            self._wait_until_under_way(len(self._under_way) // 2)
        return not self._failed

    def refuse(self, event: DomainEvent, error: Exception) -> None:
        """Fail over an event that cannot be sent, or something that is not an event."""
        self.wait()
        if isinstance(error, InvalidEvent | TypeError):
            error.args = (f"Item {self._taken} (counted from 0): {error}",)
        self._fail(event, error, perhaps=False)
        self.current = None

    def wait(self) -> None:
        """Wait until all are done, or no confirm has arrived in time."""
        self._wait_until_under_way(0)

    def give_up(self) -> None:
        """Stop waiting for any of them."""
        for publication, *_ in self._under_way:
            if self._withdraw(publication):
                publication.error = _GIVEN_UP
        self._count_done()
        if self.current is not None:
            self._fail(self.current, _GIVEN_UP, perhaps=False)
            self.current = None

    def result(self) -> int:
        """How many were published; raises the first error, if there is one."""
        if self._error is None:
            return self._count
        error, self._error = self._error, None
        self.describe(error)
        try:
            raise error
        finally:
            del error  # this frame is in its traceback

    def describe(self, error: BaseException) -> None:
        """Set the attributes of the error, and add a note, about what became of the events."""
        note = (
            f"publish_many: {self._taken:,} events taken, {self._count:,} of them published, "
            f"{len(self._unconfirmed):,} unconfirmed, {len(self._perhaps):,} of these perhaps "
            "stored; see the attributes taken, published, unconfirmed and perhaps."
        )
        if self._error is not None:
            _chain(error, self._error)
            note += f" Before this: {type(self._error).__name__}: {self._error}"
        described: Any = error
        with contextlib.suppress(Exception):  # an exception may not allow attributes
            described.taken, described.published = self._taken, self._count
            described.unconfirmed, described.perhaps = self._unconfirmed, self._perhaps
            described.add_note(note)  # from Python 3.11 on

    @property
    def _taken(self) -> int:
        return self._count + len(self._unconfirmed) + len(self._under_way)

    def _done(self, publication: Publication) -> None:
        """On the I/O thread: one more is done."""
        with self._lock:
            self._open -= 1
            self._answered_at = time.monotonic()
            self._failed = self._failed or publication.error is not None
            if self._failed or self._open <= self._wake_at:
                self._moved.notify()

    def _wait_until_under_way(self, most: int) -> None:
        while True:
            self._count_done()
            if len(self._under_way) <= most or (most and self._failed):
                return
            oldest, _, taken_at, _ = self._under_way[0]
            with self._moved:
                silent_since = max(taken_at, self._answered_at)
                remaining = silent_since + self._timeout - time.monotonic()
                if remaining > 0:
                    self._wake_at = most
                    if not oldest.done:
                        self._moved.wait(remaining)
                    continue
            self._time_out(silent_since)

    def _time_out(self, since: float) -> None:
        """No confirm arrived in time: give up all that are under way."""
        assert self._publishing is not None
        why = why_unconfirmed(self._publishing, self._under_way[0][0])
        withdrawn = [each for each, *_ in self._under_way if self._withdraw(each)]
        sent = sum(each.sent for each in withdrawn)
        unsent = len(withdrawn) - sent
        others = sum(each.error is None for each, *_ in self._under_way) - len(withdrawn)
        text = (
            f"No confirm for {time.monotonic() - since:.1f} s, with a timeout of "
            f"{self._timeout:g} s ({why}). Of {self._taken:,} events taken, "
            f"{self._count + others:,} are confirmed, {sent:,} were sent and may be stored (the "
            f"error's .perhaps), {unsent:,} were not sent. Publish the same ones again (its "
            ".unconfirmed), so that subscribers can recognize them by their ids."
        )
        error = EventNotConfirmed(text) if sent else BrokerUnavailable(text)
        for each in withdrawn:
            each.error = error
        self._count_done()

    def _withdraw(self, publication: Publication) -> bool:
        assert self._publishing is not None
        if not self._publishing.withdraw(publication):
            return False
        with self._lock:
            self._open -= 1
            self._failed = True
        return True

    def _count_done(self) -> None:
        while self._under_way and self._under_way[0][0].done:
            publication, event, _, done = self._under_way.popleft()
            self._bytes -= publication.size
            error = publication.error
            if error is None:
                self._count += 1
            else:
                self._fail(event, error, isinstance(error, _PERHAPS_STORED) and publication.sent)
            done(error)

    def _fail(self, event: DomainEvent, error: Exception, perhaps: bool) -> None:
        if self._error is None and error is not _GIVEN_UP:
            self._error = error
            if isinstance(error, DomainEventsError):
                error.event = event
        self._unconfirmed.append(event)
        if perhaps:
            self._perhaps.append(event)


def _chain(error: BaseException, earlier: BaseException) -> None:
    """Show ``earlier`` in the traceback of ``error``, before everything else."""
    seen = {id(earlier)}
    while error.__context__ is not None and id(error) not in seen:
        seen.add(id(error))
        error = error.__context__
    if id(error) not in seen:
        error.__context__ = earlier


# --- the process's own publishers, for `publish_domain_event` ------------------------------------

# By URLs and exchange.
_publishers: dict[tuple[tuple[str, ...] | None, str], Publisher] = {}
_publishers_lock = threading.RLock()


def publish_domain_event(
    routing_key: str,
    data: Any,
    domain_object_id: str | int | UUID | None = None,
    uuid_string: str | None = None,
    timestamp: float | None = None,
    connection_settings: ConnectionSettings = DEFAULT,
    *,
    mandatory: bool = False,
    timeout: float = 10.0,
    exchange: str = "domain-events",
    headers: Mapping[str, HeaderValue] | None = None,
    correlation_id: str | None = None,
    cause: str | None = None,
    version: int = 1,
) -> DomainEvent:
    """Publish a domain event and wait until the broker has confirmed it.

    One connection per broker and exchange serves the whole process; it is opened with the first
    event and closed when the program ends, or by `close_publishers`. See `DomainEvent` for what
    the arguments mean and `Publisher.publish` for what is promised.

    :param connection_settings: another broker than the process's default; None publishes
        nothing and returns the event all the same.
    :param mandatory: raise `EventUnroutable` when no queue is bound for the routing key.
    :param timeout: seconds until the deadline.
    :param exchange: where to publish; a topic exchange.
    :return: the event that was published, with its id and its timestamp.
    :raises DomainEventsError: as `Publisher.publish` does.
    """
    event = DomainEvent(
        routing_key,
        data,
        domain_object_id,
        uuid_string,
        timestamp,
        headers=headers,
        correlation_id=correlation_id,
        cause=cause,
        version=version,
    )
    connection_settings = settings.masked(connection_settings)
    publisher = _publisher(settings.resolve(connection_settings), exchange)
    return publisher.publish(event, mandatory=mandatory, timeout=timeout)


def _publisher(urls: tuple[str, ...] | None, exchange: str) -> Publisher:
    check_fork()
    if type(exchange) is not str:
        exchange = check_name(exchange, "exchange")
    publisher = _publishers.get((urls, exchange))
    if publisher is None:
        with _publishers_lock:
            if not _publishers:
                atexit.unregister(close_publishers)  # for publishers that are closed already
                atexit.register(close_publishers)
            publisher = _publishers.get((urls, exchange)) or Publisher(urls, exchange)
            _publishers[urls, exchange] = publisher
    return publisher


def close_publishers(timeout: float = _CLOSE_TIMEOUT) -> None:
    """Close the connections of `publish_domain_event`, after events under way in other threads.

    The next event opens them again. They are closed at the end of the program anyway; this is for
    one that goes on without publishing, or that ends its threads in an order of its own.

    :param timeout: the most seconds that all of this takes.
    :raises ConfigurationError: when ``timeout`` is not a positive number.
    """
    deadline = time.monotonic() + seconds(timeout)
    check_fork()
    with _publishers_lock:
        publishers = list(_publishers.values())
        _publishers.clear()
    for publisher in publishers:
        publisher.close(max(0.0, deadline - time.monotonic()))


def _after_fork() -> None:
    # Another thread may have held the lock when the process forked; it is not in the child.
    global _publishers_lock
    _publishers_lock = threading.RLock()


on_fork(_after_fork)
