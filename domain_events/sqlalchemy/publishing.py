"""``publish_on_commit``: after the commit, or, through an outbox, with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.orm import Session, scoped_session

from domain_events import settings
from domain_events.checks import flag, refusal, seconds
from domain_events.errors import ConfigurationError
from domain_events.events import DomainEvent, HeaderValue
from domain_events.names import check_name
from domain_events.settings import DEFAULT, ConnectionSettings
from domain_events.sqlalchemy.after_commit import Publication, prepared, publish
from domain_events.sqlalchemy.outbox import Outbox, outbox_of
from domain_events.sqlalchemy.transactions import collect, session_or_connection


def publish_on_commit(
    session: Session | scoped_session[Any] | Connection,
    routing_key: str,
    data: Any,
    domain_object_id: str | int | UUID | None = None,
    uuid_string: str | None = None,
    timestamp: float | None = None,
    connection_settings: ConnectionSettings = DEFAULT,
    *,
    mandatory: bool = False,
    timeout: float = 10.0,
    exchange: str = "domain-events",
    headers: Mapping[str, HeaderValue] | None = None,
    correlation_id: str | None = None,
    cause: str | None = None,
    version: int = 1,
    outbox: Outbox | None = None,
) -> DomainEvent[Any]:
    """Publish a domain event once the current transaction has committed.

    Otherwise, as when a SAVEPOINT around this call is rolled back, or the session is closed without
    a commit, the event is dropped. The data are copied: later changes are not published. Cause and
    correlation id are those of now.

    With an `Outbox`, the event is written to it in this transaction, so that it is published even
    if the program dies after the commit, or while there is no broker. The commit waits for nothing.

    Without one, the commit waits until the event is confirmed, at most for ``timeout`` seconds for
    all events of the transaction, which are published in their order. An event that could not be
    published is logged, with its routing key and id, as an error of the logger
    ``domain_events.sqlalchemy``; no error reaches the caller of the commit, for whom the work is
    done.

    With an AsyncSession: ``await session.run_sync(publish_on_commit, 'user.registered', {...})``.
    Without an outbox, its commit blocks the event loop while it publishes.

    :param session: a Session, a scoped_session, or a Connection.
    :param connection_settings: another broker; not with an outbox.
    :param mandatory: not with an outbox.
    :param timeout: seconds until the deadline, from the commit; of no effect with an outbox.
    :param outbox: to write the event to; if left out, the one that is switched on for the
        session's engine, if any (`Outbox.switch_on`).
    :return: the event that will be published, with its id and its timestamp.
    :raises InvalidEvent: it can never be sent.
    :raises ConfigurationError: a broker's URL, or an option, is wrong.
    :raises TypeError: ``session`` is something else.

    All other arguments are those of `domain_events.publish_domain_event`.
    """
    where = session_or_connection(session, "publish_on_commit")
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
    connection_settings = settings.masked(connection_settings)
    exchange = check_name(exchange, "exchange")
    flag(mandatory, "mandatory")
    seconds(timeout)
    outbox = _check_outbox(outbox) or outbox_of(where)
    if outbox is not None:
        if mandatory or connection_settings is not DEFAULT:
            raise ConfigurationError(
                "publish_on_commit(): with an outbox, neither mandatory=True nor "
                "connection_settings can be given: nobody waits for the event to be sent, and it "
                "is sent to the process's default broker (domain_events.configure)."
            )
        return outbox.write(where, event, exchange)
    urls = settings.resolve(connection_settings)
    event = prepared(event, exchange)
    publication = Publication(event, publish, urls, exchange, mandatory, timeout)
    collect(where, publication)
    return publication.event


def _check_outbox(outbox: Any) -> Outbox | None:
    if outbox is None or isinstance(outbox, Outbox):
        return outbox
    raise refusal(outbox, "outbox", "an Outbox")
