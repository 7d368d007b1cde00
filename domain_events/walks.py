"""Walks over events that wait for an operator: the common part of `DeadLetters` and `Undelivered`.

A walk gets each current message once, and holds it: it can be settled until the next walk begins,
and others do not see it. Then all unsettled messages are requeued, in their order. Only receipts
are kept here, and no bodies. For its speed a walk takes messages ahead, a few hundred at most.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from domain_events import message as messages
from domain_events import settings
from domain_events.broker import Browser, Connections, Consuming, Owner, Publishing, confirm
from domain_events.checks import seconds
from domain_events.errors import DomainEventsError
from domain_events.events import DomainEvent
from domain_events.log import Log
from domain_events.message import Delivery, Message, Place
from domain_events.middleware import Operation, Outgoing, announce
from domain_events.settings import ConnectionSettings

log = Log("domain_events")

_CLOSE_TIMEOUT = 10.0
#: So many are settled together.
MOST_AT_ONCE = 50


class Found(Protocol):
    """What a walk yields."""

    @property
    def delivery(self) -> Delivery:
        """The message itself."""


class Walks(Owner):
    """Walks over one place, one at a time, with the connections for it.

    :param place: what to walk over.
    """

    def __init__(
        self, place: Place, connection_settings: ConnectionSettings, timeout: float
    ) -> None:
        connection_settings = settings.masked(connection_settings)
        self._place = place
        self._timeout = seconds(timeout)
        self.connections = Connections(settings.resolve(connection_settings), "dead letters")
        self._browser: Browser | None = None
        self._closed = False
        # The number of the current walk; the receipts of its messages that are not settled.
        self._walk = 0
        self._held: set[object] = set()

    def count(self) -> int:
        """How many there are, except those held by the walk of another connection.

        If another connection is browsing them, a warning is logged.

        :raises TopologyError: there is no such queue.
        """
        consuming = self._consuming()
        if consuming is None:
            return 0
        # During a walk of this one, the warning was logged when it began.
        if not self._walk and consuming.is_browsed(self._place, self._timeout):
            self._warn_of_another_walk()
        ahead = self._browser.ahead if self._browser is not None else 0
        return consuming.count(self._place, self._timeout) + len(self._held) + ahead

    def discard_many(self, letters: Iterable[Found]) -> int:
        """Delete these of the current walk, for good. Returns how many were deleted."""
        number = 0
        some: list[Delivery] = []
        for letter in letters:
            some.append(letter.delivery)
            if len(some) >= MOST_AT_ONCE:
                self._settle_all(some)
                number += len(some)
                some.clear()
        self._settle_all(some)
        return number + len(some)

    def release(self) -> None:
        """End the current walk: requeue the messages that it holds, in their order."""
        self._walk += 1
        self._held.clear()
        browser, self._browser = self._browser, None
        if browser is not None:
            with contextlib.suppress(DomainEventsError):  # if it was lost, all are requeued
                browser.rewind()
                self._browser = browser

    def close(self) -> None:
        """Requeue unsettled messages, and close the connections."""
        self._closed = True
        self._held.clear()
        browser, self._browser = self._browser, None
        try:
            if browser is not None:
                browser.close(self._timeout)
        finally:
            self.connections.close(_CLOSE_TIMEOUT)

    def _deliveries(self) -> Iterator[Delivery]:
        """The current messages, each one once."""
        consuming = self._consuming()
        if consuming is None:
            return
        self.release()
        walk = self._walk
        self._begin(consuming)
        delivery = self._next(walk)
        # Messages that arrive during the walk are left for the next one.
        behind = delivery.message_count if delivery is not None else 0
        while delivery is not None:
            self._held.add(delivery.receipt)
            yield delivery
            delivery = self._next(walk) if behind else None
            behind -= 1

    def _unreached(self) -> Iterator[Delivery]:
        """The messages that the current walk has not taken, to look at."""
        consuming = self._consuming()
        if consuming is None:
            return
        publishing = partial(_to_publish, self.connections)
        browser = consuming.browse(self._place, self._timeout, publishing)
        try:
            delivery = browser.next(self._timeout)
            behind = delivery.message_count if delivery is not None else 0
            while delivery is not None:
                yield delivery
                delivery = browser.next(self._timeout) if behind else None
                behind -= 1
        finally:
            browser.close(self._timeout)

    def _begin(self, consuming: Consuming) -> None:
        """Begin another one."""
        if self._browser is None:
            # Not `self._publishing`: a browser that refers to this keeps it from being dropped.
            publishing = partial(_to_publish, self.connections)
            self._browser = consuming.browse(self._place, self._timeout, publishing)
        if self._browser.shared:
            self._warn_of_another_walk()

    def _warn_of_another_walk(self) -> None:
        log.warning(
            "Another process or thread is browsing %s. The messages it holds are not visible or "
            "counted here until its walk ends.",
            self._place,
        )

    def _next(self, walk: int) -> Delivery | None:
        if self._browser is None or walk != self._walk:
            raise RuntimeError("This walk is over: another one began, or it was closed.")
        try:
            return self._browser.next(self._timeout)
        except DomainEventsError:
            # Its connection is gone, and all it held is back in the queue.
            self._browser = None
            self._held.clear()
            raise

    def _replayed(self, message: Message, event: DomainEvent[Any] | None, name: str) -> None:
        """Publish it into the queue of subscriber ``name``, and wait for the confirm."""
        chain = settings.middleware()
        if not chain:
            confirm(self._publishing(), message, self._timeout)
            return
        source = message.source
        known = source.foreign_headers if source is not None else message.headers or {}
        outgoing = Outgoing(Operation.REPLAY, event, dict(known), subscriber=name)
        done = announce(chain, outgoing)
        try:
            message.headers = messages.added_headers(known, outgoing.headers)
            confirm(self._publishing(), message, self._timeout)
        except BaseException as error:
            done(error)
            raise
        done(None)

    def _settle(self, delivery: Delivery) -> None:
        """Remove it from the queue."""
        self._settle_all([delivery])

    def _settle_all(self, deliveries: Sequence[Delivery]) -> None:
        """Remove them from the queue."""
        for delivery in deliveries:
            self._check_held(delivery)
        if not deliveries:
            return
        assert self._browser is not None
        self._browser.ack_all(deliveries, self._timeout)
        self._held.difference_update(delivery.receipt for delivery in deliveries)

    def _check_held(self, delivery: Delivery) -> None:
        if delivery.receipt not in self._held:
            raise RuntimeError("This was settled already, or its walk is over; begin another one.")

    def _consuming(self) -> Consuming | None:
        """The connection to browse on; None when everything is switched off."""
        if self._closed:
            raise RuntimeError(
                f"This {type(self).__name__} was closed; make another one to browse {self._place}."
            )
        return self.connections.consuming()

    def _publishing(self) -> Publishing:
        return _to_publish(self.connections)


def _to_publish(connections: Connections) -> Publishing:
    publishing = connections.publishing()
    assert publishing is not None
    return publishing
