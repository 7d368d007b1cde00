"""What became of a delivery. Pure."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from typing import Any

from domain_events.events import DomainEvent
from domain_events.text import printable


class Outcome(str, Enum):
    """The outcome of a delivery; each is equal to its text."""

    HANDLED = "handled"
    RETRY = "retry"
    DEAD_LETTER = "dead letter"
    #: Given up, by a subscriber that keeps no dead letters.
    DROPPED = "dropped"
    #: The handler ended the process, with ``sys.exit()`` for example: the event comes again.
    GIVEN_BACK = "given back"
    #: Its routing key is not listed here: it comes again, for a process that lists it.
    HANDED_BACK = "handed back"
    #: Its routing key is among the ``retired_keys``: acked without calling the handler.
    RETIRED = "retired"

    def __str__(self) -> str:
        return self.value


@dataclass
class Delivered:
    """One event, delivered to one subscriber, and what became of it."""

    #: The subscriber's name.
    subscriber: str
    #: The event; None for a message that is not one, which goes to the dead letters unhandled.
    event: DomainEvent[Any] | None
    #: What became of it.
    outcome: Outcome
    #: What the handler raised, or why it was not called.
    error: BaseException | None = None
    #: Seconds after which a retry or a handed-back event comes again.
    delay: float | None = None
    #: How many seconds the handler took, with the middleware around it; None if it was not called.
    seconds: float | None = None

    def __repr__(self) -> str:
        what = printable(self.event.routing_key) if self.event else "a message that is not an event"
        after = f" in {self.delay:g} s" if self.delay is not None else ""
        why = f" ({printable(repr(self.error))})" if self.error is not None else ""
        return f"<{self.subscriber}: {what} -> {self.outcome}{after}{why}>"


def ends_the_process(error: BaseException) -> bool:
    """Whether the error is meant to end the program, and is not a failure of the handler.

    Everything else is a failure of the handler, even if its class is not an `Exception`:
    asyncio.CancelledError, gevent.Timeout, pytest's outcomes.
    """
    greenlet: Any = sys.modules.get("greenlet")
    ends: tuple[type[BaseException], ...] = (SystemExit, KeyboardInterrupt)
    if greenlet is not None:
        ends += (greenlet.GreenletExit,)
    return isinstance(error, ends)
