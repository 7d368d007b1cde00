"""``once``: a handler's work and the note that it is done are one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from domain_events.checks import refusal, seconds
from domain_events.errors import ConfigurationError
from domain_events.events import DomainEvent
from domain_events.log import Log, about
from domain_events.outbox import KEPT, lost_a_race, note, prune, prune_all, repeated
from domain_events.sqlalchemy.outbox import EngineDatabase, executing
from domain_events.sqlalchemy.transactions import begin, session_or_connection
from domain_events.text import printable

log = Log("domain_events.sqlalchemy")

# Seconds between two times that a process prunes an inbox, and how many notes it deletes then.
_PRUNE_EVERY = 60.0
_MOST_PRUNED = 1000


def once(
    sessions: sessionmaker[Any] | scoped_session[Any] | Engine,
    *,
    subscriber: str | None = None,
    keep: float = KEPT,
) -> Callable[[Callable[[Any, DomainEvent[Any]], object]], Callable[[DomainEvent[Any]], None]]:
    """Decorate a handler ``(session, event)``: for each event, its work is done once.

    ::

        @subscriber.on('order.paid', name='billing')
        @once(sessionmaker(engine))
        def issue_invoice(session, event):
            session.add(Invoice(order_id=event.data['order_id']))
            publish_on_commit(session, 'invoice.issued', {...})

    The handler gets a session with a transaction, which is committed when it returns, and rolled
    back when it raises. It must not end that itself. The note that this subscriber has handled this
    event is part of it: an event that comes again is skipped if it was committed, and handled if it
    was rolled back; one that comes twice at the same time waits for that. A transaction that the
    database rolls back because of another one at the same time, in a deadlock or at REPEATABLE READ
    or SERIALIZABLE, is repeated, and the handler called again, up to five times. A dead letter that
    is replayed is handled, since it never was. What the handler publishes with `publish_on_commit`
    and an `Outbox` is part of it, too.

    :param sessions: a sessionmaker, a scoped_session (as of Flask-SQLAlchemy, ``db.session``;
        its session is removed afterwards), or an Engine: then the handler gets a Connection. The
        database has the `inbox_table`.
    :param subscriber: whose note it is; by default, the subscriber that the event was delivered to.
        Of an event that was not delivered, as in a test that calls the handler, it is the
        handler's name.
    :param keep: seconds for which notes are kept: longer than any event may be on its way. Old ones
        are deleted after a handler, a few at a time.
    """
    if not isinstance(sessions, sessionmaker | scoped_session | Engine):
        raise ConfigurationError(
            "once() takes a sessionmaker, a scoped_session or an Engine, not of type "
            f"{type(sessions).__name__}; as in @once(sessionmaker(engine))."
        )
    pruning = _Pruning(keep)

    def decorate(
        handler: Callable[[Any, DomainEvent[Any]], object],
    ) -> Callable[[DomainEvent[Any]], None]:
        @wraps(handler)
        def handle(event: DomainEvent[Any]) -> None:
            name = subscriber or event.subscriber or handler.__qualname__

            def attempt() -> None:
                session = sessions.connect() if isinstance(sessions, Engine) else sessions()
                with session, session.begin():
                    if first_time(session, event, name):
                        handler(session, event)
                        return
                log.info(
                    "%s has handled %s before.",
                    printable(name),
                    printable(event),
                    about=about(name, event.routing_key, event.uuid_string),
                )

            try:
                repeated(attempt, _lost_a_race, name, event)
                pruning.prune(sessions)
            finally:
                if isinstance(sessions, scoped_session):
                    sessions.remove()

        # Else a subscriber takes it for a handler of two arguments.
        del handle.__wrapped__
        return handle

    return decorate


def _lost_a_race(error: Exception) -> bool:
    return isinstance(error, DBAPIError) and lost_a_race(error.orig)


def first_time(
    session: Session | scoped_session[Any] | Connection,
    event: DomainEvent[Any],
    subscriber: str | None = None,
) -> bool:
    """Note, in the session's transaction, that a subscriber handles an event; `once` does this.

    :param subscriber: by default, the one that the event was delivered to.
    :return: False: it has handled the event before; skip it.
    """
    where = session_or_connection(session, "first_time")
    name = subscriber or event.subscriber
    if not name:
        raise ConfigurationError(
            "first_time(): the event was not delivered to a subscriber; give subscriber=."
        )
    begin(where)
    connection = where if isinstance(where, Connection) else where.connection()
    return note(executing(connection), connection.dialect.name, name, str(event.uuid_string))


def prune_inbox(engine: Engine, keep: float = KEPT) -> int:
    """Delete old notes of the inbox: all of them, a thousand in each transaction.

    `once` deletes some after its handlers; this is for what else has notes (`first_time`), for a
    cron job, or after ``keep`` was made shorter.

    :param keep: seconds for which notes are kept: longer than any event may be on its way. One that
        comes again after that is handled again.
    :return: how many were deleted.
    :raises ConfigurationError: ``engine`` or ``keep`` is something else.
    """
    if not isinstance(engine, Engine):
        raise refusal(engine, "engine", "an Engine of SQLAlchemy")
    return prune_all(EngineDatabase(engine), seconds(keep, "keep"))


class _Pruning:
    """Deletes the old notes of one inbox, from time to time."""

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self._due = time.monotonic() + _PRUNE_EVERY

    def prune(self, sessions: Any) -> None:
        """Never raises: the event has been handled."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _PRUNE_EVERY
        try:
            with sessions.begin() if isinstance(sessions, Engine) else sessions() as session:
                connection = session if isinstance(session, Connection) else session.connection()
                execute, dialect = executing(connection), connection.dialect.name
                if prune(execute, dialect, self._keep, _MOST_PRUNED) == _MOST_PRUNED:
                    self._due = 0.0
                if not isinstance(session, Connection):
                    session.commit()
        except Exception as error:  # noqa: BLE001
            log.warning("Old notes of the inbox cannot be deleted: %s", printable(error))
