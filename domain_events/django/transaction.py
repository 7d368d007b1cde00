"""``publish_on_commit``: an event of a transaction is published after the commit, or never.

The event is prepared by the call: what is wrong with it is raised there, its data are those of the
call whatever becomes of them, and it has its id. Django drops what a savepoint that is rolled back
has registered, and nothing else.

After the commit an outage must not look like a failure of what has been committed, so that no error
is raised there: it is logged, with the event as ``record.exc_info[1].event``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from uuid import UUID

from django.db import DEFAULT_DB_ALIAS, transaction

from domain_events import DEFAULT, DomainEvent, message, printable, publish_domain_event, settings
from domain_events.checks import flag, seconds
from domain_events.names import check_name
from domain_events.settings import ConnectionSettings

log = logging.getLogger("domain_events")

# Seconds for an event whose transaction has used up its time.
_LEAST = 0.1


def publish_on_commit(
    routing_key: str,
    data: Any,
    domain_object_id: str | int | UUID | None = None,
    uuid_string: str | None = None,
    timestamp: float | None = None,
    connection_settings: ConnectionSettings = DEFAULT,
    *,
    using: str | None = None,
    mandatory: bool = False,
    timeout: float = 10.0,
    exchange: str = "domain-events",
    headers: Mapping[str, str | int | bool] | None = None,
    correlation_id: str | None = None,
    cause: str | None = None,
    version: int = 1,
) -> DomainEvent[Any]:
    """Publish a domain event once the current transaction has been committed.

    If that is rolled back, or the savepoint in which this was called, the event is never
    published. Without a transaction it is published at once. Either way an error of the publish is
    not raised, since the change that the event is about has happened: it is logged.

    The arguments are those of `domain_events.publish_domain_event`, besides:

    :param using: the alias of the database whose transaction it is.
    :param timeout: seconds until the deadline, for all events of the transaction together.
    :return: the event as it will be published, with its id.
    :raises InvalidEvent: it can never be sent.
    :raises ConfigurationError: settings that cannot work.
    :raises TransactionManagementError: autocommit is off, outside of an ``atomic`` block.
    """
    connection_settings = settings.masked(connection_settings)
    settings.resolve(connection_settings)
    check_name(exchange, "exchange")
    flag(mandatory, "mandatory")
    alias = using or DEFAULT_DB_ALIAS
    event = _prepared(
        DomainEvent(
            routing_key,
            data,
            domain_object_id,
            uuid_string,
            timestamp,
            headers=headers,
            correlation_id=correlation_id,
            cause=cause,
            version=version,
        ),
        exchange,
    )
    publish = partial(
        publish_domain_event,
        *(event.routing_key, event.data, event.domain_object_id),
        *(event.uuid_string, event.timestamp, connection_settings),
        mandatory=mandatory,
        exchange=exchange,
        headers=event.headers,
        correlation_id=event.correlation_id,
        cause=event.cause,
        version=event.version,
    )
    hook = Hook(event, publish, _of_transaction(alias), seconds(timeout))
    # Robust, since the application's logging may raise.
    transaction.on_commit(hook, using=alias, robust=True)
    return event


class Hook:
    """Publishes an event whose transaction has been committed; once, however often it is called."""

    def __init__(
        self,
        event: DomainEvent[Any],
        publish: Callable[..., object],
        committed: _Transaction,
        timeout: float,
    ) -> None:
        self._event = event
        self._publish = publish
        self._committed = committed
        self._timeout = timeout
        self._called = False
        self.__qualname__ = "publish_on_commit"  # for Django's log

    def __call__(self) -> None:
        if self._called:
            return
        self._called = True
        left = self._committed.time_left(self._timeout)
        try:
            self._publish(timeout=max(_LEAST, min(self._timeout, left)))
        except Exception:
            log.exception(
                "%s %s was not published, and its transaction has been committed.",
                printable(self._event.routing_key),
                printable(self._event.uuid_string),
            )


def _prepared(event: DomainEvent[Any], exchange: str) -> DomainEvent[Any]:
    """The event as it would be published now: a copy of its data, its cause, its correlation id."""
    sent = message.from_event(event, exchange, "", False)
    copy = DomainEvent.from_json(sent.body)
    return DomainEvent(
        *(copy.routing_key, copy.data, copy.domain_object_id, copy.uuid_string, copy.timestamp),
        headers=sent.headers,
        correlation_id=sent.correlation_id,
        cause=sent.cause,
        version=sent.version,
    )


class _Transaction:
    """The events of one transaction share a deadline, since somebody waits for all of them."""

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._begun: float | None = None

    def time_left(self, limit: float) -> float:
        """Seconds left of so many, from when its first event is published."""
        now = time.monotonic()
        if self._begun is None:
            self._begun = now
            # Whatever is registered from now on belongs to another transaction.
            if _current.by_alias.get(self._alias) is self:
                del _current.by_alias[self._alias]
        return self._begun + limit - now


class _Current(threading.local):
    def __init__(self) -> None:
        self.by_alias: dict[str, _Transaction] = {}


# Of this thread. One that is rolled back is used again for the next.
_current = _Current()


def _of_transaction(alias: str) -> _Transaction:
    return _current.by_alias.setdefault(alias, _Transaction(alias))
