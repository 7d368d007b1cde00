"""``EventBroker``: an embedded broker that a test switches on, looks into, and moves through time.

Threads. What is published is noted under the embedded broker's lock, by whatever thread publishes;
everything else belongs to the test's own thread.
"""

from __future__ import annotations

import itertools
import os
from contextlib import ExitStack
from types import TracebackType

from domain_events import publisher, settings, subscriber
from domain_events.broker import memory
from domain_events.broker.memory.clock import SECOND, VirtualTime
from domain_events.broker.memory.store import Store
from domain_events.dead_letters import DeadLetter, DeadLetters
from domain_events.events import DomainEvent
from domain_events.message import ROUTING_KEY, Delivery, Message, to_event
from domain_events.publisher import Publisher
from domain_events.subscriber import Subscriber
from domain_events.subscription import Delivered
from domain_events.testing.matching import ANYTHING, difference, expectation, listing

# Two handlers that publish for each other would go round for ever.
_MOST_DELIVERIES = 10_000

_numbers = itertools.count(1)


class EventBroker:
    """Takes the place of every broker while it is switched on.

    :param virtual_time: time stands still but for `advance`. Otherwise it passes, which a test
        needs that runs subscribers in threads of their own and waits for their retries.
    """

    def __init__(self, *, virtual_time: bool = True) -> None:
        self._name = f"testing-{os.getpid()}-{next(_numbers)}"
        self._virtual_time = virtual_time
        self._on = ExitStack()
        self._store: Store | None = None
        self._published: list[DomainEvent] = []

    # --- on and off ------------------------------------------------------------------------------

    def start(self) -> EventBroker:
        """Switch it on; `stop` must follow."""
        if self._store is not None:
            raise RuntimeError("This EventBroker is switched on already.")
        urls = (self.url,)
        self._published = []
        self._store = memory.store(self._name, VirtualTime() if self._virtual_time else None)
        self._store.on_publish = self._on_publish
        self._on.callback(memory.forget, self._name)
        self._on.callback(publisher.close_publisher, urls)
        self._on.enter_context(settings.replacement(urls))
        return self

    def stop(self) -> None:
        """Switch it off: every broker is again what it was, and this one's queues are gone."""
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
        """Forget what was published so far."""
        self._published.clear()

    def assert_published(
        self,
        binding_key: str,
        data: object = ANYTHING,
        *,
        domain_object_id: object = ANYTHING,
        times: int | None = None,
    ) -> DomainEvent:
        """Assert that such an event was published.

        :param binding_key: its routing key; ``*`` stands for a word, ``#`` for any number.
        :param data: its data; of a dictionary, those entries that matter.
        :param domain_object_id: what it is about.
        :param times: exactly how many there are; at least one, if left out.
        :return: the first one of them.
        :raises AssertionError: tells what was published instead.
        """
        if times is not None and times < 1:
            raise ValueError("For times=0 there is assert_not_published().")
        found = self._found(binding_key, data, domain_object_id)
        if not found or (times is not None and len(found) != times):
            expected = expectation(binding_key, data, domain_object_id)
            number = f", {times} times" if times is not None else ""
            instead = self._what_instead(binding_key, data, domain_object_id)
            raise AssertionError(f"Expected {expected}{number}; {instead}")
        return found[0]

    def assert_not_published(
        self,
        binding_key: str = "#",
        data: object = ANYTHING,
        *,
        domain_object_id: object = ANYTHING,
    ) -> None:
        """Assert that no such event was published; without arguments, none at all."""
        if self._found(binding_key, data, domain_object_id):
            expected = expectation(binding_key, data, domain_object_id)
            instead = self._what_instead(binding_key, data, domain_object_id)
            raise AssertionError(f"Not expected: {expected}; {instead}")

    # --- deliveries ------------------------------------------------------------------------------

    def attach(self, *subscribers: Subscriber) -> None:
        """Have the queues of these subscribers here.

        `~domain_events.Subscriber.register` does it by itself; this is for subscribers that
        registered before this broker was switched on, as at the import of a module.
        """
        for each in subscribers:
            subscriber.declare(each)

    def deliver(self, to: Subscriber, *events: DomainEvent) -> list[Delivered]:
        """Call a subscriber's handlers, in this thread, with all the events that wait for them.

        What handlers publish meanwhile for the same subscriber is delivered too. A retry is not,
        until it is due: see `advance` and `deliver_all`.

        :param events: events to publish before.
        :return: what became of each event, in the order in which they were handled.
        :raises AssertionError: it never ends; two handlers may publish for each other.
        """
        self.attach(to)
        with Publisher(exchange=to.exchange, exchange_type=to.exchange_type) as of_events:
            of_events.publish_many(events)
        deliveries: list[Delivered] = []

        def note(delivered: Delivered) -> None:
            deliveries.append(delivered)
            if len(deliveries) >= _MOST_DELIVERIES:
                to.stop_consuming()

        subscriber.work_off(to, note)
        if len(deliveries) >= _MOST_DELIVERIES:
            raise AssertionError(
                f"{_MOST_DELIVERIES:,} deliveries and no end; the last one is {deliveries[-1]}."
            )
        return deliveries

    def deliver_all(self, to: Subscriber, *events: DomainEvent) -> list[Delivered]:
        """As `deliver`, and move the time forward over every retry, until nothing is left."""
        deliveries = self.deliver(to, *events)
        # It may be somebody else's retry that is due next, or one between two delay levels.
        while (seconds := self._until_next()) is not None:
            self.advance(seconds)
            deliveries += self.deliver(to)
        return deliveries

    def advance(self, seconds: float) -> None:
        """Move the time forward; retries come due, in their order."""
        if not self._virtual_time:
            raise RuntimeError("The time of this EventBroker passes by itself.")
        self._running().advance(seconds)

    def dead_letters(self, name: str) -> list[DeadLetter]:
        """The dead letters of a subscriber, to look at.

        `domain_events.DeadLetters` replays and discards them.
        """
        with DeadLetters(name) as dead_letters:
            return list(dead_letters)

    # --- inside ----------------------------------------------------------------------------------

    def _on_publish(self, message: Message) -> None:
        """Under the embedded broker's lock: a message was published."""
        # What is sent on, such as a retry, names the key that it was published with.
        if message.exchange and ROUTING_KEY not in message.headers:
            delivery = Delivery(message.exchange, message.routing_key, False, message, message.body)
            self._published.append(to_event(delivery))

    def _found(self, binding_key: str, data: object, about: object) -> list[DomainEvent]:
        return [each for each in self.published if not difference(each, binding_key, data, about)]

    def _what_instead(self, binding_key: str, data: object, about: object) -> str:
        events = self.published
        if not events:
            return "nothing was published."
        were = "1 event was" if len(events) == 1 else f"{len(events)} events were"
        return f"{were} published:\n{listing(events, binding_key, data, about)}"

    def _until_next(self) -> float | None:
        store = self._running()
        due = store.next_expiry()
        return None if due is None else (due - store.now()) / SECOND

    def _running(self) -> Store:
        if self._store is None:
            raise RuntimeError("This EventBroker is switched off.")
        return self._store
