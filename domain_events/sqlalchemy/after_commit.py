"""Publishing after the commit, without an outbox: nothing of it reaches the caller."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from domain_events import settings
from domain_events.errors import BrokerUnavailable, DomainEventsError, EventNotConfirmed
from domain_events.events import DomainEvent
from domain_events.log import Log, about
from domain_events.message import from_event
from domain_events.publisher import publish_domain_event
from domain_events.sqlalchemy.transactions import Pending
from domain_events.text import printable

log = Log("domain_events.sqlalchemy")

# Seconds for an event whose deadline is over because of those before it.
_LEAST = 1.0


@dataclass(frozen=True)
class Publication(Pending):
    """An event to publish, and how."""

    urls: tuple[str, ...] | None
    exchange: str
    mandatory: bool
    timeout: float

    def publish(self, timeout: float) -> None:
        event = self.event
        publish_domain_event(
            event.routing_key,
            event.data,
            event.domain_object_id,
            event.uuid_string,
            event.timestamp,
            self.urls,
            mandatory=self.mandatory,
            timeout=timeout,
            exchange=self.exchange,
            headers=event.headers,
            correlation_id=event.correlation_id,
            cause=event.cause,
            version=event.version,
        )


def prepared(event: DomainEvent[Any], exchange: str) -> DomainEvent[Any]:
    """The event as it is now, also if its data change or another event is handled later.

    :raises InvalidEvent: when it cannot be sent.
    """
    message = from_event(event, exchange, settings.app_id(), mandatory=False)
    copy = DomainEvent.from_json(message.body)
    return DomainEvent(
        copy.routing_key,
        copy.data,
        copy.domain_object_id,
        copy.uuid_string,
        copy.timestamp,
        headers=message.headers,
        correlation_id=message.correlation_id,
        cause=message.cause,
        version=message.version,
    )


def publish(publications: list[Publication]) -> None:
    """Publish them, whatever happens; what is not published is logged."""
    waiting = deque(publications)
    began = time.monotonic()
    away: set[tuple[str, ...] | None] = set()
    try:
        while waiting:
            each = waiting[0]
            remaining = began + each.timeout - time.monotonic()
            try:
                if remaining <= 0 and each.urls in away:
                    raise BrokerUnavailable("There was no broker for those before it.")
                each.publish(max(remaining, min(each.timeout, _LEAST)))
            except DomainEventsError as error:
                _log_unpublished(each.event, error)
                if isinstance(error, BrokerUnavailable | EventNotConfirmed):
                    away.add(each.urls)
            except Exception as error:  # noqa: BLE001 - of a middleware; the commit has happened
                _log_unpublished(each.event, error)
            waiting.popleft()
    except BaseException as error:
        # Such as KeyboardInterrupt.
        for each in waiting:
            _log_unpublished(each.event, error)
        raise


def _log_unpublished(event: DomainEvent[Any], error: BaseException) -> None:
    known = isinstance(error, DomainEventsError)
    log.error(
        "The transaction has committed, but its event %s was not published: %s",
        printable(event),
        printable(error) if known else f"{type(error).__name__}: {printable(error)}",
        exc_info=None if known else error,
        about=about(None, event.routing_key, event.uuid_string),
    )
