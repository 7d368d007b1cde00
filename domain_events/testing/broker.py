"""``EventBroker``: an embedded broker that a test switches on, inspects, and moves through time.

Threads. Published events are recorded under the embedded broker's lock, by the publishing thread;
everything else belongs to the test's own thread.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from domain_events.broker import (
    Consuming,
    Exchange,
    OnChange,
    Publication,
    Publishing,
    ignore_change,
    memory,
    overridden,
)
from domain_events.broker.clock import SECOND, VirtualTime
from domain_events.dead_letters import DeadLetter, DeadLetters
from domain_events.events import Details, DomainEvent, from_envelope, read_envelope
from domain_events.forwarding import Forwarder
from domain_events.message import ToExchange
from domain_events.outcomes import Delivered, Outcome
from domain_events.publisher import Publisher
from domain_events.retry import Retry
from domain_events.subscriber import Subscriber
from domain_events.testing.matching import ANYTHING, Expectation
from domain_events.worker import Worker

# Two handlers that publish events for each other would never end.
_MOST_DELIVERIES = 10_000
# Of calls to the embedded broker, which take no time.
_TIMEOUT = 10.0

_numbers = itertools.count(1)


class EventBroker:
    """Replaces every broker while it is switched on.

    :param virtual_time: time stands still except for `advance`. Otherwise it passes, for tests that
        run subscribers in threads of their own and wait for their retries.
    """

    def __init__(self, *, virtual_time: bool = True) -> None:
        self._name = f"testing-{os.getpid()}-{next(_numbers)}"
        self._virtual_time = virtual_time
        self._on = ExitStack()
        self._store: memory.Store | None = None
        self._published: list[DomainEvent] = []

    # --- on and off ------------------------------------------------------------------------------

    def start(self) -> EventBroker:
        """Switch it on; `stop` must follow."""
        if self._store is not None:
            raise RuntimeError("This EventBroker is switched on already.")
        self._published = []
        self._store = memory.store(self._name, VirtualTime() if self._virtual_time else None)
        # Those of Subscriber(declare=False) exist here, too.
        self._store.is_applied = True
        self._on.callback(memory.forget, self._name)
        self._on.enter_context(overridden(_Recorder(memory.Memory((self.url,)), self._record)))
        return self

    def stop(self) -> None:
        """Switch it off: every broker is restored, and the queues of this one are deleted."""
        self._on.close()
        self._store = None

    def __enter__(self) -> EventBroker:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Its address; there is no need to use it."""
        return f"memory://{self._name}"

    # --- what was published ----------------------------------------------------------------------

    @property
    def published(self) -> list[DomainEvent]:
        """The events that were published since it was switched on, or since `clear`."""
        return list(self._published)

    def clear(self) -> None:
        """Forget the events published so far."""
        self._published.clear()

    def assert_published(
        self,
        binding_key: str,
        data: object = ANYTHING,
        *,
        domain_object_id: object = ANYTHING,
        headers: Mapping[str, object] | None = None,
        times: int | None = None,
    ) -> DomainEvent[Any]:
        """Assert that such an event was published.

        :param binding_key: its routing key; ``*`` stands for a word, ``#`` for any number.
        :param data: its data, of any kind that can be published, compared as JSON. Of a dictionary,
            give the entries that matter; an object is compared with all its fields.
        :param domain_object_id: what it is about.
        :param headers: those of its headers that matter.
        :param times: exactly how many there are; at least one, if left out.
        :return: the first one of them.
        :raises AssertionError: with what was published instead.
        """
        if times is not None and times < 1:
            raise ValueError("For times=0 there is assert_not_published().")
        expected = Expectation(binding_key, data, domain_object_id, headers)
        found = self._found(expected)
        if not found or (times is not None and len(found) != times):
            number = f", {times} times" if times is not None else ""
            instead = self._what_was_published(expected)
            raise AssertionError(f"Expected {expected}{number}; {instead}")
        return found[0]

    def assert_not_published(
        self,
        binding_key: str = "#",
        data: object = ANYTHING,
        *,
        domain_object_id: object = ANYTHING,
        headers: Mapping[str, object] | None = None,
    ) -> None:
        """Assert that no such event was published; without arguments, none at all."""
        expected = Expectation(binding_key, data, domain_object_id, headers)
        if self._found(expected):
            instead = self._what_was_published(expected)
            raise AssertionError(f"Not expected: {expected}; {instead}")

    # --- outages ---------------------------------------------------------------------------------

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Inside this, the broker is away.

        Publishing raises `domain_events.BrokerUnavailable` at once, whatever its ``timeout``, and
        so does all else that needs the broker. Subscribers get nothing, and what they had not
        settled comes again afterwards, as after a lost connection. Queues and events are kept.
        """
        store = self._running()
        store.call(store.go_away)
        try:
            yield
        finally:
            store.call(store.come_back)

    # --- deliveries ------------------------------------------------------------------------------

    def attach(self, *subscribers: Subscriber) -> None:
        """Declare the queues of these subscribers on this broker.

        `~domain_events.Subscriber.register` does it by itself; this is for subscribers that
        registered before this broker was switched on, as at the import of a module.
        """
        for subscriber in subscribers:
            consuming = subscriber.connections.consuming()
            assert consuming is not None
            for each in subscriber.subscriptions:
                consuming.declare(each.options.queue, _TIMEOUT)

    def deliver(
        self, to: Subscriber, *events: DomainEvent[Any], raising: bool = False
    ) -> list[Delivered]:
        """Call a subscriber's handlers, in this thread, with all the events that wait for them.

        What handlers publish meanwhile for the same subscriber is delivered too. A retry is not,
        until it is due: see `advance` and `deliver_all`.

        :param events: events to publish before.
        :param raising: raise the error of the first event that was not handled: what its handler
            raised, or why it was not called, such as data that does not fit its payload. That event
            has been settled by then, as it always is, and those after it wait for the next call. A
            `domain_events.Retry` that leads to a retry is not raised.
        :return: the outcome of each event, in the order in which they were handled.
        :raises AssertionError: it never ends; two handlers may publish for each other.
        """
        if self._running().is_away:
            self._publish(to, events)
            return []
        self.attach(to)
        self._publish(to, events)
        consuming = to.connections.consuming()
        assert consuming is not None
        worker = _InThisThread(consuming, to.forwarder, raising)
        with to.running(worker) as subscriptions:
            worker.work(subscriptions)
        return worker.deliveries

    def deliver_all(
        self, to: Subscriber, *events: DomainEvent[Any], raising: bool = False
    ) -> list[Delivered]:
        """As `deliver`, and move the time forward over every retry, until nothing is left."""
        deliveries = self.deliver(to, *events, raising=raising)
        # The next one due may be a retry of another subscriber.
        while (seconds := self._until_next()) is not None:
            self.advance(seconds)
            deliveries += self.deliver(to, raising=raising)
        return deliveries

    def advance(self, seconds: float) -> None:
        """Move the time forward; retries come due, in their order."""
        if not self._virtual_time:
            raise RuntimeError("The time of this EventBroker passes by itself.")
        self._running().advance(seconds)

    def dead_letters(self, name: str) -> list[DeadLetter]:
        """The dead letters of a subscriber, for inspection.

        `domain_events.DeadLetters` replays and discards them.
        """
        with DeadLetters(name) as dead_letters:
            return list(dead_letters)

    # --- inside ----------------------------------------------------------------------------------

    def _record(self, publication: Publication) -> None:
        """Under the embedded broker's lock: a message was published."""
        message = publication.message
        if isinstance(message.destination, ToExchange) and publication.error is None:
            details = Details(
                message.headers or {}, message.correlation_id, message.cause, message.version
            )
            envelope = read_envelope(message.body)
            self._published.append(from_envelope(envelope, details=details))

    def _publish(self, to: Subscriber, events: Iterable[DomainEvent[Any]]) -> None:
        with Publisher(exchange=to.exchange, exchange_type=to.exchange_type) as publisher:
            publisher.publish_many(events)

    def _found(self, expected: Expectation) -> list[DomainEvent[Any]]:
        return [each for each in self.published if not expected.difference(each)]

    def _what_was_published(self, expected: Expectation) -> str:
        events = self.published
        if not events:
            return "nothing was published."
        were = "1 event was" if len(events) == 1 else f"{len(events)} events were"
        return f"{were} published:\n{expected.listing(events)}"

    def _until_next(self) -> float | None:
        store = self._running()
        due = store.next_delayed()
        return None if due is None else (due - store.now()) / SECOND

    def _running(self) -> memory.Store:
        if self._store is None:
            raise RuntimeError("This EventBroker is switched off.")
        return self._store


class _InThisThread(Worker):
    """Handles what waits, and what comes of it, whatever the number of the subscriber's workers."""

    def __init__(self, consuming: Consuming, forwarder: Forwarder, raising: bool) -> None:
        super().__init__(consuming, forwarder, 1, None)
        self._raising = raising
        self.deliveries: list[Delivered] = []

    def receive(self) -> None:
        while not self.stopping and (work := self.next_waiting()) is not None:
            delivered = self.handle(work)
            if delivered is not None:
                self.deliveries.append(delivered)
                if self._raising and delivered.error is not None and not _is_retried(delivered):
                    raise delivered.error
            if len(self.deliveries) >= _MOST_DELIVERIES:
                raise AssertionError(
                    f"{_MOST_DELIVERIES:,} deliveries and no end; the last one is {delivered}."
                )


def _is_retried(delivered: Delivered) -> bool:
    return delivered.outcome is Outcome.RETRY and isinstance(delivered.error, Retry)


class _Recorder:
    """A broker that records what is published on it."""

    def __init__(self, broker: memory.Memory, record: Callable[[Publication], None]) -> None:
        self._record = record
        self._broker = broker
        self.consuming = broker.consuming

    def publishing(
        self, name: str, declare: Exchange | None = None, on_change: OnChange = ignore_change
    ) -> Publishing:
        publishing = self._broker.publishing(name, declare, on_change)
        return _RecordingPublishing(publishing, self._record)


class _RecordingPublishing:
    """A connection that records what is confirmed on it."""

    def __init__(self, publishing: Publishing, record: Callable[[Publication], None]) -> None:
        self._publishing = publishing
        self._record = record
        self.trouble = ""
        self.silence = publishing.silence
        self.connect = publishing.connect
        self.withdraw = publishing.withdraw
        self.close = publishing.close
        self.close_soon = publishing.close_soon

    def submit(self, publication: Publication) -> None:
        done = publication.on_done

        def recorded(publication: Publication) -> None:
            try:
                self._record(publication)
            finally:
                done(publication)

        publication.on_done = recorded
        self._publishing.submit(publication)
