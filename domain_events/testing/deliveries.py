"""What became of each event that was delivered to a handler, noted while it happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from domain_events import topology
from domain_events.broker import Consumer
from domain_events.events import DomainEvent
from domain_events.message import Delivery, Message
from domain_events.subscription import Moves, Subscription


class Outcome(str, Enum):
    """What a delivery came to; each is equal to its text."""

    HANDLED = "handled"
    RETRY = "retry"
    DEAD_LETTER = "dead letter"
    #: Given up, by a subscriber that keeps no dead letters.
    DROPPED = "dropped"
    #: The handler raised what is no `Exception`, such as `SystemExit`: it comes again.
    GIVEN_BACK = "given back"

    def __str__(self) -> str:
        return self.value


@dataclass
class Delivered:
    """One event, delivered to one subscriber's handler."""

    #: The subscriber's name.
    subscriber: str
    #: The event; None for a message that is none, which goes to the dead letters unhandled.
    event: DomainEvent | None
    outcome: Outcome
    #: What the handler raised.
    error: BaseException | None = None
    #: Seconds after which a retry comes back.
    delay: float | None = None

    def __repr__(self) -> str:
        what = self.event.routing_key if self.event else "a message that is no event"
        after = f" in {self.delay:g} s" if self.delay is not None else ""
        why = f" ({self.error!r})" if self.error is not None else ""
        return f"<{self.subscriber}: {what} -> {self.outcome}{after}{why}>"


class Watched(Subscription):
    """A subscription that notes what becomes of each delivery."""

    def __init__(self, original: Subscription, note: Callable[[Delivered], None]) -> None:
        self._original = original.handler
        self._note = note
        super().__init__(self._call, original.options, _WatchedMoves(original.moves, self))
        self._current: Delivered | None = None

    def handle(self, delivery: Delivery, consumer: Consumer) -> None:
        """Have the delivery handled and settled, and note what became of it."""
        try:
            super().handle(delivery, consumer)
        finally:
            current, self._current = self._current, None
            if current is not None:
                self._note(current)

    def _call(self, event: DomainEvent) -> None:
        current = self._current = Delivered(self.options.name, event, Outcome.HANDLED)
        try:
            self._original(event)
        except Exception as error:
            # Unless it is moved in a moment, it is given up.
            current.outcome, current.error = Outcome.DROPPED, error
            raise
        except BaseException as error:
            current.outcome, current.error = Outcome.GIVEN_BACK, error
            raise

    def moved(self, message: Message) -> None:
        """The delivery is on its way to another queue."""
        current = self._current
        if current is None:
            current = self._current = Delivered(self.options.name, None, Outcome.DROPPED)
        if message.exchange:
            current.outcome = Outcome.RETRY
            current.delay = topology.delay_of(message.routing_key)
        else:
            current.outcome = Outcome.DEAD_LETTER


class _WatchedMoves(Moves):
    def __init__(self, original: Moves, watched: Watched) -> None:
        super().__init__(original.publishing)
        self._watched = watched

    def move(self, message: Message, delivery: Delivery, consumer: Consumer) -> None:
        self._watched.moved(message)
        super().move(message, delivery, consumer)
