"""``once``: a handler's work is done once for each event, however often the event comes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, overload

from django.db import DEFAULT_DB_ALIAS, DatabaseError, connections, transaction

from domain_events import ConfigurationError, DomainEvent, outbox, printable
from domain_events.django import handlers
from domain_events.django.database import executing
from domain_events.django.transaction import with_outbox
from domain_events.log import Log, about

log = Log("domain_events")

Handler = TypeVar("Handler", bound=Callable[[DomainEvent[Any]], object])


@overload
def once(handler: Handler, /) -> Handler: ...


@overload
def once(*, using: str | None = None) -> Callable[[Handler], Handler]: ...


def once(
    handler: Handler | None = None, /, *, using: str | None = None
) -> Handler | Callable[[Handler], Handler]:
    """Make a handler do its work once for each event.

    It is called in a transaction, in which the inbox notes that this subscriber has handled this
    event. If the event comes again, it is skipped; if it comes at the same time, it waits for the
    first one, and is skipped if that was committed. A transaction that the database rolls back
    because of another one at the same time, in a deadlock or at REPEATABLE READ or SERIALIZABLE, is
    repeated, and the handler called again, up to five times. After an exception neither work nor
    note is left, so that a retry and a replayed dead letter are handled.

    What the handler publishes by `publish_on_commit` is written to the outbox, whatever the
    settings are: with the note committed, the event would not come again to publish it.

    ::

        @on('order.placed', name='shop-invoices')
        @once
        def issue_invoice(event):
            invoice = Invoice.objects.create(order=event.data['order'])
            publish_on_commit('invoice.issued', {'invoice': invoice.pk})

    Work outside of this database is not part of it, as ever: a mail may be sent twice. Notes are
    kept for 30 days, which is longer than any retry may take.

    :param using: the alias of the database that the handler works on.
    :raises ConfigurationError: it is above ``@on``, which then has the function without it.
    """
    if handler is None:
        return functools.partial(_once, using=using or DEFAULT_DB_ALIAS)
    return _once(handler, using=using or DEFAULT_DB_ALIAS)


def _once(handler: Handler, using: str) -> Handler:
    if handlers.is_registered(handler):
        raise ConfigurationError(
            f"@once must be below @on, next to the function {handler.__qualname__}: @on has "
            "registered the function without it."
        )

    @functools.wraps(handler)
    def handle(event: DomainEvent[Any]) -> object:
        # Without a subscriber, as in a test, it was called directly.
        subscriber = event.subscriber or f"{handler.__module__}.{handler.__qualname__}"
        connection = connections[using]

        def attempt() -> object:
            with transaction.atomic(using=using):
                if outbox.note(
                    executing(connection), connection.vendor, subscriber, event.uuid_string
                ):
                    return handler(event)
            log.info(
                "%s has handled %s %s before; it is skipped.",
                subscriber,
                printable(event.routing_key),
                printable(event.uuid_string),
                about=about(subscriber, event.routing_key, event.uuid_string),
            )
            return None

        token = with_outbox.set(with_outbox.get() | {using})
        try:
            if connection.in_atomic_block:  # of a test: what is rolled back is more than this
                return attempt()
            return outbox.repeated(attempt, _lost_a_race, subscriber, event)
        finally:
            with_outbox.reset(token)

    return handle  # type: ignore[return-value]


def _lost_a_race(error: Exception) -> bool:
    return isinstance(error, DatabaseError) and outbox.lost_a_race(error.__cause__)
