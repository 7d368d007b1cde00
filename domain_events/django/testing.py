"""The testing kit in a Django project.

A ``TestCase`` runs each test in a transaction that is never committed, so that Django calls no
``on_commit`` callback there. This `EventBroker` publishes itself what would have been committed.
"""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.db import connections

from domain_events import DomainEvent, Subscriber, testing
from domain_events.django.database import courier_of, known_databases
from domain_events.django.transaction import Hook
from domain_events.testing import Delivered


class EventBroker(testing.EventBroker):
    """`domain_events.testing.EventBroker`, which sees what waits for the commit of a ``TestCase``.

    Whenever it is looked at, and before and after deliveries, it publishes the events of
    `~domain_events.django.publish_on_commit` whose ``atomic`` blocks have been left, in their
    order. Within such a block they are not published yet, and those of a savepoint that was rolled
    back never are. Other ``on_commit`` callbacks are not called; that is for
    ``captureOnCommitCallbacks(execute=True)``, which works as well.

    With pytest it is the fixture ``event_broker``.
    """

    def start(self) -> EventBroker:
        super().start()
        # What others have left, such as setUpTestData, is the same in each test of a class.
        self._done = set(_hooks())
        return self

    def stop(self) -> None:
        self._done = set()
        super().stop()

    def __enter__(self) -> EventBroker:
        return self.start()

    @property
    def published(self) -> list[DomainEvent[Any]]:
        """The events that were published since it was switched on, or since `clear`."""
        self._publish_committed()
        return super().published

    def clear(self) -> None:
        """Forget the events published so far."""
        self._publish_committed()
        super().clear()

    def deliver(
        self, to: Subscriber, *events: DomainEvent[Any], raising: bool = False
    ) -> list[Delivered]:
        """As of `domain_events.testing.EventBroker`."""
        if not self._running().is_away:
            self.attach(to)
        self._publish_committed()
        deliveries = super().deliver(to, *events, raising=raising)
        while self._publish_committed():
            deliveries += super().deliver(to, raising=raising)
        return deliveries

    def _publish_committed(self) -> int:
        """Returns how many hooks were called."""
        before = len(self._done)
        while waiting := [each for each in _hooks() if each not in self._done]:
            self._done.update(waiting)
            for hook in waiting:
                hook()
        for alias in known_databases():
            courier_of(alias).wait()
        return len(self._done) - before


def _hooks() -> list[Hook]:
    """Those that wait for the commit of a ``TestCase``, and for nothing else."""
    if not settings.configured:
        return []
    return [
        hook
        for connection in connections.all(initialized_only=True)
        if connection.atomic_blocks and connection.atomic_blocks[-1]._from_testcase
        for _, hook, _ in connection.run_on_commit
        if isinstance(hook, Hook)
    ]
