"""``Publisher`` and ``publish_domain_event``: an event is confirmed, or there is an error.

Knows deadlines and windows; how messages travel is the broker's.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Any
from uuid import UUID

from domain_events import message as messages
from domain_events import settings, topology
from domain_events.broker import Publication, Publishing, connect
from domain_events.checks import seconds
from domain_events.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEventsError,
    EventNotConfirmed,
    InvalidEvent,
)
from domain_events.events import DomainEvent
from domain_events.message import Message
from domain_events.process import check_fork, on_fork
from domain_events.settings import DEFAULT, ConnectionSettings
from domain_events.topology import ExchangeType

# What `publish_many` has under way at most. Larger than the connection's own window, so that
# the connection is never out of work while the next events are made ready.
_MOST_UNDER_WAY = 4000
_MOST_BYTES_UNDER_WAY = 32 * 2**20

# How long `close` waits for the confirms of what is under way.
_CLOSE_TIMEOUT = 10.0


class Publisher:
    """Publishes domain events on a connection of its own, kept open; each one is confirmed.

    Made without any I/O; the connection comes with the first event. Safe from any thread, in
    the child of a fork, and after hours of idling. May be used as a context manager.

    :param connection_settings: an AMQP URL, several, or None; see `configure`.
    :param exchange: where to publish. It is declared, if this user may.
    :param exchange_type: its type; ``topic`` is what subscribers expect.
    :param timeout: seconds after which an event that is not confirmed is an error.
    :raises ConfigurationError: for settings that cannot work.
    """

    def __init__(
        self,
        connection_settings: ConnectionSettings = DEFAULT,
        exchange: str = "domain-events",
        exchange_type: ExchangeType = "topic",
        *,
        timeout: float = 10.0,
    ) -> None:
        connection_settings = settings.masked(connection_settings)
        self._urls = settings.resolve(connection_settings)
        self._exchange = topology.check_name(exchange, "exchange")
        self._exchange_type = topology.check_exchange_type(exchange_type)
        self._timeout = _checked_timeout(timeout)
        self._publishing = self._connect(self._urls)
        # In a test that has replaced the broker: by what, and the connection to it.
        self._replaced: tuple[tuple[str, ...] | None, Publishing | None] = (None, None)

    def publish(
        self, event: DomainEvent, *, mandatory: bool = False, timeout: float | None = None
    ) -> DomainEvent:
        """Publish the event and wait until the broker has confirmed it.

        When this returns, the event is on disk in every queue that was bound (and on a majority
        of a cluster). A connection that is lost meanwhile is made again and the same event sent
        again, until the deadline.

        :param mandatory: raise `EventUnroutable` when no queue is bound for its routing key.
        :param timeout: seconds until the deadline; the publisher's own if left out.
        :raises InvalidEvent: it can never be sent; nothing was sent.
        :raises BrokerUnavailable: no broker in time; surely not sent.
        :raises EventNotConfirmed: sent, not confirmed in time; perhaps stored.
        :raises EventRejected: the broker refused it.
        :raises ConfigurationError: wrong password, host, vhost or permissions.
        :raises TopologyError: the exchange exists with another type, or cannot be declared.
        """
        message = self._message(event, mandatory)
        publishing = self._connection()
        if publishing is not None:
            seconds = self._timeout if timeout is None else _checked_timeout(timeout)
            try:
                confirmed(publishing, message, seconds)
            except DomainEventsError as error:
                error.event = event
                error.unconfirmed = (event,)
                raise
        return event

    def publish_many(
        self,
        events: Iterable[DomainEvent],
        *,
        mandatory: bool = False,
        timeout: float | None = None,
    ) -> int:
        """Publish all the events, many under way at a time, and wait for every confirm.

        The iterable is read as far as the window allows, so it may be long. At the first error
        it is read no further, and what is under way is waited for; the error raised then has in
        ``unconfirmed`` every event that was taken and is not confirmed.

        :param timeout: seconds until the deadline of each event, from when it was taken.
        :return: how many were published.
        :raises DomainEventsError: as `publish` does, for the first event that failed.
        """
        seconds = self._timeout if timeout is None else _checked_timeout(timeout)
        publishing = self._connection()
        if publishing is None:
            return len([self._message(event, mandatory) for event in events])
        batch = _Batch(publishing, seconds)
        try:
            for event in events:
                try:
                    message = self._message(event, mandatory)
                except InvalidEvent as error:
                    batch.fail(event, error)
                    break
                if not batch.add(event, message):
                    break
        finally:
            # Also when the iterable itself raised: what was taken is not left behind.
            batch.wait()
        return batch.result()

    def close(self, timeout: float = _CLOSE_TIMEOUT) -> None:
        """Wait for what is under way in other threads, then close the connection."""
        if self._publishing is not None:
            self._publishing.close(timeout)

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _connect(self, urls: tuple[str, ...] | None) -> Publishing | None:
        if urls is None:
            return None
        declare = [topology.Exchange(self._exchange, self._exchange_type)]
        return connect(urls).publishing(declare, "publisher")

    def _connection(self) -> Publishing | None:
        urls = settings.replaced(self._urls)
        if urls == self._urls:
            return self._publishing
        replaced = self._replaced
        if urls != replaced[0]:
            replaced = self._replaced = (urls, self._connect(urls))
        return replaced[1]

    def _message(self, event: DomainEvent, mandatory: bool) -> Message:
        if not isinstance(event, DomainEvent):
            raise TypeError(
                f"publish() takes a DomainEvent, not a {type(event).__name__}; "
                "publish_domain_event() takes a routing key and data."
            )
        return messages.from_event(event, self._exchange, settings.app_id(), mandatory)


class _Batch:
    """The events of one `publish_many`, and the window through which they go.

    The caller's thread owns everything but what ``_lock`` guards, with which the I/O thread
    tells it that there is room again.
    """

    def __init__(self, publishing: Publishing, timeout: float) -> None:
        self._publishing = publishing
        self._timeout = timeout
        # Taken and not yet counted, oldest first: publication, event, deadline.
        self._under_way: deque[tuple[Publication, DomainEvent, float]] = deque()
        self._bytes = 0
        self._count = 0
        self._failures: list[tuple[DomainEvent, DomainEventsError]] = []
        # The lock itself where nobody waits: a condition's way to it is longer. Re-entrant, since
        # a signal handler may publish, fail, and with it all that waits.
        self._lock = threading.RLock()
        self._moved = threading.Condition(self._lock)
        self._open = 0
        self._wake_at = 0
        self._failed = False

    def add(self, event: DomainEvent, message: Message) -> bool:
        """Take one event, once there is room for it. False: take no more, something failed."""
        publication = Publication(message, self._done)
        self._under_way.append((publication, event, time.monotonic() + self._timeout))
        self._bytes += len(message.body)
        with self._lock:
            self._open += 1
        self._publishing.submit(publication)
        if len(self._under_way) >= _MOST_UNDER_WAY or self._bytes >= _MOST_BYTES_UNDER_WAY:
            # Down to a half before the next is taken: changing threads for each one is dear.
            self._wait_until_under_way(len(self._under_way) // 2)
        return not self._failed

    def fail(self, event: DomainEvent, error: DomainEventsError) -> None:
        """An event that could not even be taken."""
        self._wait_until_under_way(0)
        self._failures.append((event, error))

    def wait(self) -> None:
        """Wait until the fate of all is known; each has its deadline."""
        self._wait_until_under_way(0)

    def result(self) -> int:
        """How many were published, if all were; else the first error."""
        if self._failures:
            event, error = self._failures[0]
            error.event = event
            error.unconfirmed = [event for event, _ in self._failures]
            raise error
        return self._count

    def _done(self, publication: Publication) -> None:
        """On the I/O thread: one more is done."""
        with self._lock:
            self._open -= 1
            self._failed = self._failed or publication.error is not None
            if self._failed or self._open <= self._wake_at:
                self._moved.notify()

    def _wait_until_under_way(self, most: int) -> None:
        while True:
            self._count_done()
            if len(self._under_way) <= most or (most and self._failed):
                return
            oldest, _, deadline = self._under_way[0]
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                if self._publishing.withdraw(oldest):
                    oldest.error = _overdue(self._publishing, oldest, self._timeout)
                    self._done(oldest)
                continue
            with self._moved:
                self._wake_at = most
                if not oldest.done:
                    self._moved.wait(remaining)

    def _count_done(self) -> None:
        while self._under_way and self._under_way[0][0].done:
            publication, event, _ = self._under_way.popleft()
            self._bytes -= len(publication.message.body)
            if publication.error is None:
                self._count += 1
            else:
                self._failures.append((event, publication.error))


def confirmed(publishing: Publishing, message: Message, timeout: float) -> None:
    """Publish one message and wait until it is confirmed.

    :raises DomainEventsError: when it is not; see `Publisher.publish`.
    """
    known = threading.Lock()
    known.acquire()
    publication = Publication(message, lambda _publication: known.release())
    try:
        publishing.submit(publication)
        in_time = known.acquire(timeout=timeout)
    except BaseException:  # Ctrl-C, or a signal that raises: nobody waits for it any more
        publishing.withdraw(publication)
        raise
    if not in_time and publishing.withdraw(publication):
        raise _overdue(publishing, publication, timeout)
    if publication.error is not None:
        raise publication.error


def _overdue(publishing: Publishing, publication: Publication, timeout: float) -> DomainEventsError:
    why = publishing.trouble or "the broker has not answered"
    if publication.sent:
        return EventNotConfirmed(
            f"No confirm within {timeout:g} s ({why}). The broker may have the event: publish "
            "the same one again (the error's .event), so that subscribers can tell by its id."
        )
    return BrokerUnavailable(f"No broker within {timeout:g} s ({why}). The event was not sent.")


def _checked_timeout(timeout: float) -> float:
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not number or not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ConfigurationError(f"timeout is a positive number of seconds, not {timeout!r}.")
    return timeout


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
) -> DomainEvent:
    """Publish a domain event and wait until the broker has confirmed it.

    One connection per broker and exchange serves the whole process; it is made with the first
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
    event = DomainEvent(routing_key, data, domain_object_id, uuid_string, timestamp)
    connection_settings = settings.masked(connection_settings)
    publisher = _publisher(settings.resolve(connection_settings), exchange)
    return publisher.publish(event, mandatory=mandatory, timeout=timeout)


def _publisher(urls: tuple[str, ...] | None, exchange: str) -> Publisher:
    check_fork()
    if type(exchange) is not str:
        exchange = topology.check_name(exchange, "exchange")
    publisher = _publishers.get((urls, exchange))
    if publisher is None:
        with _publishers_lock:
            if not _publishers:
                atexit.unregister(close_publishers)  # of publishers that are closed already
                atexit.register(close_publishers)
            publisher = _publishers.get((urls, exchange)) or Publisher(urls, exchange)
            _publishers[urls, exchange] = publisher
    return publisher


def close_publishers(timeout: float = _CLOSE_TIMEOUT) -> None:
    """Close the connections of `publish_domain_event`, after what is under way in other threads.

    They are made again with the next event. The end of the program does so by itself; this is for
    one that goes on without publishing, or that ends its threads in an order of its own.

    :param timeout: seconds that all of this takes at most.
    :raises ConfigurationError: when ``timeout`` is not a positive number.
    """
    deadline = time.monotonic() + seconds(timeout)
    check_fork()
    with _publishers_lock:
        publishers = list(_publishers.values())
        _publishers.clear()
    for publisher in publishers:
        publisher.close(max(0.0, deadline - time.monotonic()))


def close_publisher(urls: tuple[str, ...]) -> None:
    """For `testing`: close the process's publishers for this broker, and forget them."""
    check_fork()
    with _publishers_lock:
        publishers = [_publishers.pop(key) for key in list(_publishers) if key[0] == urls]
    for publisher in publishers:
        publisher.close()


def _after_fork() -> None:
    # Another thread may have held the lock when the process forked; it is not in the child.
    global _publishers_lock
    _publishers_lock = threading.RLock()


on_fork(_after_fork)
