"""Retries whose subscriber's queue was gone when they were due: handed back, or discarded.

Any user who may publish a retry may put anything among them, so nothing there is trusted: an event
is handed back only to a queue that a subscriber has registered, in a new message with the old
body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from domain_events import message as messages
from domain_events import settings
from domain_events.checks import refusal, shown
from domain_events.errors import EventRejected, EventUnroutable, InvalidEvent, TopologyError
from domain_events.events import DomainEvent
from domain_events.log import Log
from domain_events.message import Delivery, Message, ToSubscriber, UndeliveredOf
from domain_events.names import check_name
from domain_events.settings import DEFAULT, ConnectionSettings
from domain_events.text import printable
from domain_events.walks import Walks

log = Log("domain_events")


@dataclass(frozen=True, eq=False, repr=False)
class UndeliveredEvent:
    """One event that could not be handed back to its subscriber when its retry was due."""

    #: The subscriber that wanted to retry it; None when its address cannot be read. Others may
    #: have forged it.
    subscriber: str | None
    #: The event; None when the body is not an envelope.
    event: DomainEvent | None
    #: The routing key that it was published with.
    routing_key: str
    #: The body as it was received.
    body: bytes

    _delivery: Delivery
    _owner: Undelivered

    @property
    def id(self) -> str | None:
        """The event's id, also if the body cannot be read."""
        return self.event.uuid_string if self.event is not None else self._delivery.message_id

    @property
    def delivery(self) -> Delivery:
        """The message itself: its headers, correlation id, cause."""
        return self._delivery

    def hand_back(self) -> None:
        """Return it to the subscriber's queue, with its number of retries; remove it from this one.

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
    """The retries on ``exchange`` whose queues were gone. Iterate to get each one once.

    ::

        with Undelivered() as undelivered:
            print(undelivered.hand_back_all(['print-user-event']), 'handed back')

    As with `DeadLetters`, browsing removes nothing, and a walk holds the events it has passed until
    the next one begins or `close` is called.

    :param exchange: the exchange of the publishers and subscribers.
    :param connection_settings: an AMQP URL, several, or None; see `configure`.
    :param timeout: seconds within which the broker must answer each request.
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
        self.exchange: str = check_name(exchange, "exchange")
        super().__init__(UndeliveredOf(self.exchange), connection_settings, timeout)
        self._checked: set[tuple[str, bool]] = set()

    def __iter__(self) -> Iterator[UndeliveredEvent]:
        self._checked.clear()
        for delivery in self._deliveries():
            yield self._entry(delivery)

    def hand_back_all(
        self,
        subscribers: Iterable[str],
        select: Callable[[UndeliveredEvent], bool] = lambda _entry: True,
    ) -> int:
        """Hand back the current events of these subscribers, in their order.

        Events of others are left, and those that cannot be read or that the broker refuses; the
        reasons are logged.

        :param subscribers: the names of subscribers that have registered again; nothing is
            written to any other queue.
        :param select: whether to hand back this one of theirs.
        :return: how many were handed back.
        :raises TopologyError: one of them has not registered; nothing was handed back.
        :raises ConfigurationError: not a subscriber's name, or this user may not read from or write
            to its queue.
        :raises BrokerUnavailable: no broker in time; the rest is left.
        """
        if isinstance(subscribers, str | bytes) or not isinstance(subscribers, Iterable):
            right = "a list of names of subscribers"
            hint = f"; give [{shown(subscribers)}]" if isinstance(subscribers, str) else ""
            raise refusal(subscribers, "subscribers", right, hint)
        names = {check_name(name, "subscriber", self.exchange) for name in subscribers}
        self._checked.clear()
        if self._consuming() is not None:
            for name in names:
                self._check_subscriber(name, named=True)
        number = 0
        for delivery in self._deliveries():
            entry = self._entry(delivery)
            if entry.subscriber is not None and entry.subscriber not in names:
                continue
            if not select(entry):
                continue
            try:
                self._hand_back(entry)
                number += 1
            except (InvalidEvent, EventRejected, TopologyError) as error:
                log.warning(
                    "Left among %s: %s %s: %s",
                    self._place,
                    printable(entry.routing_key),
                    printable(delivery.message_id),
                    printable(error, 500),
                    about=messages.about(delivery, entry.subscriber),
                )
        return number

    def _entry(self, delivery: Delivery) -> UndeliveredEvent:
        try:
            event = messages.to_event(delivery)
        except InvalidEvent:
            event = None
        key = delivery.original_routing_key
        return UndeliveredEvent(delivery.subscriber, event, key, delivery.body, delivery, self)

    def _hand_back(self, entry: UndeliveredEvent) -> None:
        self._check_held(entry._delivery)
        name, event = entry.subscriber, entry.event
        if name is None:
            raise InvalidEvent(
                f"Its routing key is not that of a retry: {printable(entry._delivery)}"
            )
        if event is None:
            raise InvalidEvent(
                f"A message of {len(entry.body):,} bytes for {name!r} is not an event."
            )
        try:
            self._replayed(_fresh(entry, name), event, name)
        except EventUnroutable as error:
            raise _not_registered_error(name) from error
        self._settle(entry._delivery)

    def _check_subscriber(self, name: str, *, named: bool) -> None:
        """Check that this is the queue of a registered subscriber, as this library declares it.

        :param named: whether the caller has named it. If only an address has its name, the queue
            must also have arguments that no other program's would have by chance.
        """
        check_name(name, "subscriber", self.exchange)
        if (name, named) in self._checked:
            return
        consuming = self._consuming()
        assert consuming is not None
        try:
            registered = consuming.is_registered(name, self._timeout, strict=not named)
        except TopologyError as error:
            raise _not_registered_error(name) from error
        if not registered:
            raise TopologyError(
                f"The queue {name!r} does not have the arguments of a subscriber's, so nothing is "
                "handed back to it."
                + ("" if named else f" If it is one, call hand_back_all([{name!r}]).")
            )
        self._checked.add((name, named))


def _fresh(entry: UndeliveredEvent, name: str) -> Message:
    """A new message with the fields that this library writes, and nothing else of the old one."""
    old = entry._delivery
    return Message(
        ToSubscriber(name),
        entry.routing_key,
        entry.body,
        old.message_id,
        old.correlation_id,
        old.timestamp,
        old.app_id,
        mandatory=True,  # a queue must take it, since the original is acked next
        cause=old.cause,
        retries=old.retries,
        version=old.version,
        replays=old.replays,
    )


def _not_registered_error(name: str) -> TopologyError:
    return TopologyError(
        f"There is no queue {name!r} to hand back to: its subscriber must have registered first."
    )
