"""Writing an event to the outbox, with the transaction of the caller."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from domain_events import settings
from domain_events.broker import switched_off
from domain_events.events import DomainEvent
from domain_events.middleware import Middleware
from domain_events.outbox import rows
from domain_events.outbox.couriers import Courier
from domain_events.outbox.database import Execute, check_dialect
from domain_events.outbox.rows import Row
from domain_events.publisher import prepared


class Written(NamedTuple):
    """An event that was written, in a transaction that may still be rolled back."""

    #: With its id, and with all that it carries.
    event: DomainEvent[Any]
    #: For `Courier.take` after the commit; None if publishing is switched off.
    row: Row | None


def write(
    execute: Execute,
    dialect: str,
    event: DomainEvent[Any],
    *,
    exchange: str = "domain-events",
    middleware: Iterable[Middleware] = (),
    courier: Courier | None = None,
) -> Written:
    """Write an event, as it is now, in the transaction of the caller.

    It is rendered here: its id, its correlation id and its cause, its headers and those of the
    middleware, and its data, whatever becomes of them until it is sent.

    :param execute: on the caller's connection, within a transaction.
    :param courier: that will be given the row after the commit; None leaves it to a relay.
    :raises InvalidEvent: it can never be sent; nothing was written.
    """
    dialect = check_dialect(dialect)
    with prepared(event, exchange, middleware) as ready:
        if switched_off(settings.resolve()):
            settings.warn_switched_off()
            return Written(ready, None)
        token, lease = (None, 0.0) if courier is None else (courier.token, courier.lease)
        return Written(ready, rows.insert(execute, dialect, ready, exchange, token, lease))
