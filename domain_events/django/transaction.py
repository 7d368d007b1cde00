"""``publish_on_commit``: an event of a transaction is published after the commit, or never.

The event is prepared by the call: what is wrong with it is raised there, its data are those of the
call whatever becomes of them, and it has its id. Django drops what a savepoint that is rolled back
has registered, and nothing else.

**Without an outbox** it is published by the thread that commits. An outage then must not look like
a failure of what has been committed, so that no error is raised: it is logged, with the event as
``record.exc_info[1].event``.

**With an outbox** it is written there in the same transaction. After the commit the process's
courier sends it, on a thread of its own; a relay sends what that leaves behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any
from uuid import UUID

from django.db import DEFAULT_DB_ALIAS, connections, transaction

from domain_events import (
    DEFAULT,
    ConfigurationError,
    DomainEvent,
    message,
    printable,
    publish_domain_event,
    settings,
)
from domain_events import outbox as engine
from domain_events.checks import flag, seconds
from domain_events.django import configuration
from domain_events.django.database import WithinTestCase, courier_of, executing
from domain_events.log import Log, about
from domain_events.names import check_name
from domain_events.outbox.couriers import TIMEOUT
from domain_events.outbox.sending import Sender
from domain_events.settings import ConnectionSettings

log = Log("domain_events")

# Seconds for an event whose transaction has used up its time.
_LEAST = 0.1

#: Aliases of databases whose outbox is used whatever the settings are; see `once`.
with_outbox: ContextVar[frozenset[str]] = ContextVar(
    "domain-events-with-outbox", default=frozenset()
)


def publish_on_commit(
    routing_key: str,
    data: Any,
    domain_object_id: str | int | UUID | None = None,
    uuid_string: str | None = None,
    timestamp: float | None = None,
    connection_settings: ConnectionSettings = DEFAULT,
    *,
    using: str | None = None,
    outbox: bool | None = None,
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

    With an outbox the event is written to it in the same transaction, and sent in the background
    until the broker has it: it is published if, and only if, the transaction is committed.

    The arguments are those of `domain_events.publish_domain_event`, besides:

    :param using: the alias of the database whose transaction it is.
    :param outbox: whether to use the outbox of that database; if left out, the ``OUTBOX`` of the
        setting ``DOMAIN_EVENTS`` says so, and within `once` it is used.
    :param timeout: seconds until the deadline, for all events of the transaction together; without
        an outbox.
    :return: the event as it will be published, with its id.
    :raises InvalidEvent: it can never be sent.
    :raises ConfigurationError: settings that cannot work.
    :raises TransactionManagementError: autocommit is off, outside of an ``atomic`` block.
    """
    connection_settings = settings.masked(connection_settings)
    settings.resolve(connection_settings)
    check_name(exchange, "exchange")
    flag(mandatory, "mandatory")
    timeout = seconds(timeout)
    alias = using or DEFAULT_DB_ALIAS
    event = DomainEvent(
        routing_key,
        data,
        domain_object_id,
        uuid_string,
        timestamp,
        headers=headers,
        correlation_id=correlation_id,
        cause=cause,
        version=version,
    )
    if outbox is None:
        outbox = alias in with_outbox.get() or configuration.has_outbox(alias)
    if outbox and connection_settings is not None:
        if mandatory or connection_settings not in (DEFAULT, ""):
            raise ConfigurationError(
                "An event of an outbox goes to the process's default broker, and cannot be "
                "mandatory; leave out connection_settings and mandatory, or give outbox=False."
            )
        return _write(alias, event, exchange)
    event = _prepared(event, exchange)
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
    _on_commit(alias, partial(_publish_committed, event, publish, _of_transaction(alias), timeout))
    return event


class Hook:
    """What is done after a commit; once, however often it is called."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action: Callable[[], object] | None = action
        self.__qualname__ = "publish_on_commit"  # for Django's log

    def __call__(self) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()


def _on_commit(alias: str, action: Callable[[], object]) -> None:
    # Robust, since the application's logging may raise.
    transaction.on_commit(Hook(action), using=alias, robust=True)


# --- without an outbox ---------------------------------------------------------------------------


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


def _publish_committed(
    event: DomainEvent[Any],
    publish: Callable[..., object],
    committed: _Transaction,
    timeout: float,
) -> None:
    left = committed.time_left(timeout)
    try:
        publish(timeout=max(_LEAST, min(timeout, left)))
    except Exception:
        log.exception(
            "%s %s was not published, and its transaction has been committed.",
            printable(event.routing_key),
            printable(event.uuid_string),
            about=about(None, event.routing_key, event.uuid_string),
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


# --- with an outbox ------------------------------------------------------------------------------


def _write(alias: str, event: DomainEvent[Any], exchange: str) -> DomainEvent[Any]:
    connection = connections[alias]
    courier = courier_of(alias)
    # A block of ours within the caller's would roll that back, too, for an event that is invalid.
    within = nullcontext() if connection.in_atomic_block else transaction.atomic(using=alias)
    with within:
        written = engine.write(
            executing(connection), connection.vendor, event, exchange=exchange, courier=courier
        )
        if written.row is not None:
            _on_commit(alias, partial(_send, alias, courier, written.row))
    return written.event


def _send(alias: str, courier: engine.Courier, row: engine.Row) -> None:
    if not connections[alias].in_atomic_block:
        courier.take([row])
        return
    # Called by a test, within the transaction of a TestCase: nobody else sees the row.
    sender = Sender(WithinTestCase(alias), lease=courier.lease, timeout=TIMEOUT)
    try:
        for error in sender.send(courier.token, [row]).failures.values():
            log.error("%r cannot be sent from the outbox: %s", row, error)
    finally:
        sender.close()
