"""Retries whose subscriber's queue was gone when they were due: handed back, or discarded.

They wait in the queue ``<exchange>.undelivered``, under the address of a retry: 24 words for the
delay, then the subscriber's name. Whoever may publish a retry may write anything there, so nothing
in it is trusted: an address is followed only to a queue that a subscriber has registered, and what
is sent there is a message of our own with the body of the old one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from domain_events import message as messages
from domain_events import settings, topology
from domain_events.checks import refusal, shown
from domain_events.errors import (
    EventRejected,
    EventUnroutable,
    InvalidEvent,
    TopologyError,
)
from domain_events.events import DomainEvent
from domain_events.log import Log
from domain_events.message import Delivery, Message
from domain_events.settings import DEFAULT, ConnectionSettings
from domain_events.text import printable
from domain_events.topology import Queue
from domain_events.walks import Walks

log = Log("domain_events")


@dataclass(frozen=True, eq=False, repr=False)
class UndeliveredEvent:
    """One event that could not be handed back to its subscriber when its retry was due."""

    #: The subscriber that wanted to retry it; None when its address cannot be read. Others may
    #: have forged it.
    subscriber: str | None
    #: The event; None when the body is no envelope.
    event: DomainEvent | None
    #: The routing key that it was published with.
    routing_key: str
    #: The body as it was received.
    body: bytes

    _delivery: Delivery
    _owner: Undelivered

    def hand_back(self) -> None:
        """Into the subscriber's queue, with its number of retries; then out of this one.

        :raises TopologyError: there is no such queue, or it is not one that a subscriber has
            registered; it is left.
        :raises InvalidEvent: the address or the body cannot be read; it is left.
        :raises DomainEventsError: as `Publisher.publish` does; it is left.
        :raises RuntimeError: it was settled already, or its walk is over.
        """
        self._owner._check_held(self._delivery)
        if self.subscriber is not None:
            self._owner._check_subscriber(self.subscriber, named=False)
        self._owner._hand_back(self)

    def discard(self) -> None:
        """Delete it, for good."""
        self._owner._settle(self._delivery)

    def __repr__(self) -> str:
        return (
            f"<UndeliveredEvent '{printable(self.routing_key)}' "
            f"for '{printable(self.subscriber)}', {len(self.body)} bytes>"
        )


class Undelivered(Walks):
    """The retries on ``exchange`` that found no queue. Iterate to see each one once.

    ::

        with Undelivered() as undelivered:
            print(undelivered.hand_back_all(['print-user-event']), 'handed back')

    As with `DeadLetters`, to look takes nothing out, and what a walk has passed is held until the
    next one begins or `close` is called.

    :param exchange: the exchange of the publishers and subscribers.
    :param connection_settings: an AMQP URL, several, or None; see `configure`.
    :param timeout: seconds within which the broker must answer each question.
    :raises ConfigurationError: for settings that cannot work.
    """

    def __init__(
        self,
        exchange: str = "domain-events",
        connection_settings: ConnectionSettings = DEFAULT,
        *,
        timeout: float = 10.0,
    ) -> None:
        connection_settings = settings.masked(connection_settings)
        self.exchange = topology.check_name(exchange, "exchange")
        super().__init__(
            topology.undelivered_name(exchange),
            f"The undelivered retries of {exchange!r}",
            connection_settings,
            timeout,
        )
        self._checked: set[tuple[str, bool]] = set()

    def __iter__(self) -> Iterator[UndeliveredEvent]:
        self._checked.clear()
        for delivery in self._deliveries():
            yield self._entry(delivery)

    def hand_back_all(self, subscribers: Iterable[str]) -> int:
        """Hand back what is there now for these subscribers, in its order.

        What is for others, what cannot be read and what the broker does not take is passed over
        and left; the log says why.

        :param subscribers: the names of subscribers that have registered again; nothing is
            written to any other queue.
        :return: how many were handed back.
        :raises TopologyError: one of them has not registered; nothing was handed back.
        :raises ConfigurationError: not a subscriber's name, or this user may not look at or write
            to its queue.
        :raises BrokerUnavailable: no broker in time; the rest is left.
        """
        if isinstance(subscribers, str | bytes) or not isinstance(subscribers, Iterable):
            right = "a list of names of subscribers"
            hint = f"; give [{shown(subscribers)}]" if isinstance(subscribers, str) else ""
            raise refusal(subscribers, "subscribers", right, hint)
        names = {topology.check_name(name, "subscriber", self.exchange) for name in subscribers}
        self._checked.clear()
        if self._connection() is not None:
            for name in names:
                self._check_subscriber(name, named=True)
        number = 0
        for delivery in self._deliveries():
            entry = self._entry(delivery)
            if entry.subscriber is not None and entry.subscriber not in names:
                continue
            try:
                self._hand_back(entry)
                number += 1
            except (InvalidEvent, EventRejected, TopologyError) as error:
                log.warning("%s: passed over, and left. %s", self._queue, printable(error, 500))
        return number

    def _entry(self, delivery: Delivery) -> UndeliveredEvent:
        delivery = self._as_retry(delivery)
        try:
            event = messages.to_event(delivery)
        except InvalidEvent:
            event = None
        key = delivery.original_routing_key
        if messages.ROUTING_KEY not in delivery.headers and event is not None:
            key = _short(event.routing_key) or key  # and not the address
        return UndeliveredEvent(
            topology.subscriber_of(delivery.routing_key),
            event,
            key,
            delivery.body,
            delivery,
            self,
        )

    def _as_retry(self, delivery: Delivery) -> Delivery:
        """Through whichever exchange it came here, it is a retry, or pretends to be one."""
        return replace(delivery, exchange=topology.due_name(self.exchange), ours=True)

    def _hand_back(self, entry: UndeliveredEvent) -> None:
        self._check_held(entry._delivery)
        name, event = entry.subscriber, entry.event
        if name is None:
            raise InvalidEvent(
                f"The address '{printable(entry._delivery.routing_key)}' is not that of a retry."
            )
        if event is None:
            raise InvalidEvent(f"A message of {len(entry.body):,} bytes for {name!r} is no event.")
        try:
            self._send(_fresh(entry, name))
        except EventUnroutable as error:
            raise _not_registered(name) from error
        self._settle(entry._delivery)

    def _check_subscriber(self, name: str, *, named: bool) -> None:
        """Make sure that this is the queue of a registered subscriber, as we declare it.

        :param named: whether the caller has named it. If it stands in an address only, the queue
            must also have arguments that no other program's would have by chance.
        """
        topology.check_name(name, "subscriber", self.exchange)
        if (name, named) in self._checked:
            return
        connection = self._connected()
        try:
            # To declare what is missing would make it.
            connection.count(name, self._timeout)
        except TopologyError as error:
            raise _not_registered(name) from error
        for queue in _as_declared(name, named=named):
            try:
                connection.declare([queue], self._timeout)
            except TopologyError:
                continue
            self._checked.add((name, named))
            return
        raise TopologyError(
            f"The queue {name!r} is not like any that a subscriber registers, so nothing is "
            "handed back to it."
            + ("" if named else f" If it is a subscriber's: hand_back_all([{name!r}]).")
        )

    def _anew(self, delivery: Delivery) -> Message:
        message = messages.renewed(self._as_retry(delivery), self._queue)
        # Through its exchange, so that the address stays.
        return replace(message, exchange=self._queue, routing_key=delivery.routing_key)


def _as_declared(name: str, *, named: bool) -> Iterator[Queue]:
    """The queues of a subscriber that may retry, whatever its options."""
    yield topology.subscriber_queue(name)
    yield replace(topology.classic_queue(name, True), as_found=False)
    if named:
        yield replace(topology.classic_queue(name, False), as_found=False)
        yield topology.temporary_queue(name, exclusive=False, auto_delete=False)
        yield topology.temporary_queue(name, exclusive=False, auto_delete=True)


def _fresh(entry: UndeliveredEvent, name: str) -> Message:
    """What the library itself writes, and nothing else that came with the message."""
    old = entry._delivery
    headers: dict[str, object] = {
        messages.RETRIES: old.retries,
        messages.ROUTING_KEY: entry.routing_key,
    }
    if cause := _short(old.headers.get(messages.CAUSE)):
        headers[messages.CAUSE] = cause
    timestamp = old.properties.timestamp
    return Message(
        "",
        name,
        entry.body,
        headers,
        correlation_id=_short(old.properties.correlation_id),
        message_id=_short(old.properties.message_id),
        timestamp=timestamp if isinstance(timestamp, int) and 0 <= timestamp < 2**63 else None,
        type=entry.routing_key,
        app_id=_short(old.properties.app_id),
        # There must be a queue that takes it, for the original is acked next.
        mandatory=True,
    )


def _short(value: object) -> str | None:
    return value if isinstance(value, str) and topology.fits(value) else None


def _not_registered(name: str) -> TopologyError:
    return TopologyError(
        f"There is no queue {name!r} to hand back to: its subscriber must have registered first."
    )
