"""``publish_on_commit``: events that belong to a transaction of SQLAlchemy 2.

::

    with Session(engine) as session, session.begin():
        user = User(email='ada@example.org')
        session.add(user)
        session.flush()  # for the id
        publish_on_commit(session, 'user.registered', {'user_id': user.id})

**What it promises.** An event is published once its transaction has committed, and only then: a
SAVEPOINT that is rolled back takes its own events with it, and no others. After the commit, no
error reaches the caller, for whom the work is done: an event that could not be published is logged.
It is lost when the program dies between the commit and the publish.

**How.** Events of a Session wait with the `SessionTransaction` in which they were published, and
move to the one around it when that is released. Events of a Connection, and those of a Session that
is bound to one, wait in a list, together with where in it each SAVEPOINT began. SQLAlchemy calls no
listener after the commit of a Connection, nor with the name of a SAVEPOINT that begins; so methods
of the Dialect are extended.

**What it knows nothing of:** brokers; it calls `publish_domain_event`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple
from uuid import UUID
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

from domain_events import message as messages
from domain_events import settings
from domain_events.checks import flag, seconds
from domain_events.errors import BrokerUnavailable, DomainEventsError, EventNotConfirmed
from domain_events.events import DomainEvent, HeaderValue
from domain_events.log import Log
from domain_events.names import check_name
from domain_events.publisher import publish_domain_event
from domain_events.settings import DEFAULT, ConnectionSettings
from domain_events.text import printable

try:
    from sqlalchemy import Connection, Dialect, PoolProxiedConnection, RootTransaction
    from sqlalchemy.event import listens_for
    from sqlalchemy.exc import InvalidRequestError
    from sqlalchemy.orm import Session, SessionTransaction, scoped_session
except ImportError as error:
    raise ImportError(
        "domain_events.sqlalchemy needs SQLAlchemy 2: pip install "
        "'domain-events-rabbitmq[sqlalchemy]'."
    ) from error

__all__ = ["publish_at_session_commits", "publish_on_commit"]

log = Log("domain_events.sqlalchemy")

# Seconds for an event whose deadline is over because of those before it.
_LEAST = 1.0
# INERROR, of psycopg and psycopg2.
_IN_ERROR = 3


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
) -> DomainEvent[Any]:
    """Publish a domain event once the current transaction has committed.

    Otherwise, as when a SAVEPOINT around this call is rolled back, or the session is closed without
    a commit, the event is dropped. Events are published in their order. The data are copied: later
    changes are not published. Cause and correlation id are those of now.

    The commit waits until the event is confirmed, at most for ``timeout`` seconds for all events of
    the transaction. An event that could not be published is logged, with its routing key and id, as
    an error of the logger ``domain_events.sqlalchemy``; no error reaches the caller of the commit.

    :param session: a Session, a scoped_session, or a Connection. Of an AsyncSession, its
        ``sync_session``; it will block the event loop while it publishes.
    :param timeout: seconds until the deadline, from the commit.
    :return: the event that will be published, with its id and its timestamp.
    :raises InvalidEvent: it can never be sent.
    :raises ConfigurationError: a broker's URL, or an option, is wrong.
    :raises TypeError: ``session`` is something else.

    All other arguments are those of `domain_events.publish_domain_event`.
    """
    transaction = _session_or_connection(session)
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
    publication = _Publication(
        _prepared(event, check_name(exchange, "exchange")),
        settings.resolve(connection_settings),
        exchange,
        flag(mandatory, "mandatory"),
        seconds(timeout),
    )
    if isinstance(transaction, Connection):
        _collect_on_connection(transaction, [publication])
    else:
        _collect_in_session(transaction, publication)
    return publication.event


def publish_at_session_commits(connection: Connection) -> None:
    """For tests: publish at the commits of Sessions on this connection, until it is rolled back.

    The events of a Session that joins a transaction wait for the commit of that transaction. Where
    a test begins one around each Session and rolls it back at the end, they would never be
    published::

        with engine.connect() as connection, connection.begin() as transaction:
            publish_at_session_commits(connection)
            with Session(connection, join_transaction_mode='create_savepoint') as session:
                yield session
            transaction.rollback()

    :raises InvalidRequestError: the connection is not in a transaction.
    """
    transaction = connection.get_transaction()
    if transaction is None:
        raise InvalidRequestError(
            "publish_at_session_commits(): the connection is not in a transaction; call it after "
            "connection.begin()."
        )
    _never_committed.add(transaction)


class _Publication(NamedTuple):
    """An event to publish, and how."""

    event: DomainEvent[Any]
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


def _prepared(event: DomainEvent[Any], exchange: str) -> DomainEvent[Any]:
    """The event as it is now, also if its data change or another event is handled later.

    :raises InvalidEvent: when it cannot be sent.
    """
    message = messages.from_event(event, exchange, settings.app_id(), mandatory=False)
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


def _session_or_connection(given: Any) -> Session | Connection:
    if isinstance(given, scoped_session):
        given = given()
    if isinstance(given, Session | Connection):
        return given
    kind = type(given)
    hint = "."
    if any(each.__module__.startswith("sqlalchemy.ext.asyncio") for each in kind.__mro__):
        hint = (
            "; give its sync_session, or sync_connection. Publishing then blocks the event loop "
            "during the commit, which takes long when there is no broker."
        )
    raise TypeError(
        "publish_on_commit() takes a Session, a scoped_session or a Connection, not of type "
        f"{kind.__name__}{hint}"
    )


# --- after the commit ----------------------------------------------------------------------------


def _publish(publications: Iterable[_Publication]) -> None:
    """Publish them, whatever happens; what is not published is logged."""
    waiting = deque(publications)
    began = time.monotonic()
    away: set[tuple[str, ...] | None] = set()
    try:
        while waiting:
            event, urls, _, _, timeout = waiting[0]
            remaining = began + timeout - time.monotonic()
            try:
                if remaining <= 0 and urls in away:
                    raise BrokerUnavailable("There was no broker for those before it.")
                waiting[0].publish(max(remaining, min(timeout, _LEAST)))
            except DomainEventsError as error:
                _log_unpublished(event, error)
                if isinstance(error, BrokerUnavailable | EventNotConfirmed):
                    away.add(urls)
            except Exception as error:  # noqa: BLE001 - of a middleware; the commit has happened
                _log_unpublished(event, error)
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
    )


# --- Sessions ------------------------------------------------------------------------------------


@dataclass
class _OfSession:
    """What a `SessionTransaction` has collected."""

    publications: list[_Publication] = field(default_factory=list)
    #: Those that it uses; of the outermost one. They lead to it, which must not keep it alive.
    connections: WeakSet[Connection] = field(default_factory=WeakSet)
    committed: bool = False
    #: An earlier error has rolled it back, though the commit succeeds.
    aborted: bool = False


# An entry ends with its transaction, also if nobody closes the session.
_of_sessions: WeakKeyDictionary[SessionTransaction, _OfSession] = WeakKeyDictionary()


def _collect_in_session(session: Session, publication: _Publication) -> None:
    transaction = _innermost(session)
    if transaction is None:
        if not session.autobegin:
            raise InvalidRequestError(
                "publish_on_commit(): the session is not in a transaction, and begins none by "
                "itself (autobegin=False); call session.begin() first."
            )
        session.begin()
        transaction = _innermost(session)
        assert transaction is not None
    if isinstance(session.bind, Connection):
        # It may have joined a transaction that others commit, or roll back.
        connection = session.connection()
        if connection.get_transaction() not in _never_committed:
            _collect_on_connection(connection, [publication])
            return
    _of_session(transaction).publications.append(publication)


def _of_session(transaction: SessionTransaction) -> _OfSession:
    return _of_sessions.setdefault(transaction, _OfSession())


def _innermost(session: Session) -> SessionTransaction | None:
    return session.get_nested_transaction() or session.get_transaction()


@listens_for(Session, "after_begin")
def _note_connection(
    _session: Session, transaction: SessionTransaction, connection: Connection
) -> None:
    if transaction.parent is None:
        _of_session(transaction).connections.add(connection)


@listens_for(Session, "before_commit")
def _check_aborted(session: Session) -> None:
    transaction = _innermost(session)
    if transaction is None or transaction.nested or transaction not in _of_sessions:
        return
    collected = _of_sessions[transaction]
    if collected.publications:
        collected.aborted = any(map(_is_aborted, collected.connections))


@listens_for(Session, "after_commit", insert=True)
def _note_commit(session: Session) -> None:
    """Of a transaction, or of a SAVEPOINT."""
    transaction = _innermost(session)
    if transaction is not None and transaction in _of_sessions:
        _of_sessions[transaction].committed = True


@listens_for(Session, "after_transaction_end", insert=True)
def _settle(session: Session, transaction: SessionTransaction) -> None:
    """By now, the connection has been returned to the pool."""
    collected = _of_sessions.pop(transaction, None)
    if collected is None or not collected.committed or not collected.publications:
        return  # rolled back, or closed
    around = _innermost(session)
    if around is not None:
        _of_session(around).publications += collected.publications
        return
    for connection in collected.connections:
        outer = connection.get_transaction()  # of one in its `binds`, that it has joined
        if outer is not None and outer not in _never_committed:
            _collect_on_connection(connection, collected.publications)
            return
    if collected.aborted:
        _log_aborted(collected.publications)
    else:
        _publish(collected.publications)


# --- Connections ---------------------------------------------------------------------------------


@dataclass
class _OfConnection:
    """What the transaction of a Connection has collected."""

    publications: list[_Publication] = field(default_factory=list)
    #: The names of its SAVEPOINTs, and how many publications there were when they began. Those that
    #: began before the first publication are not in the list.
    savepoints: list[tuple[str, int]] = field(default_factory=list)

    def index(self, savepoint: str) -> int:
        """Where in the list of SAVEPOINTs it is; 0 if it is older than the first publication."""
        names = [name for name, _ in self.savepoints]
        return names.index(savepoint) if savepoint in names else 0

    def roll_back(self, savepoint: str) -> None:
        index = self.index(savepoint)
        known = self.savepoints[index:]
        del self.publications[known[0][1] if known and known[0][0] == savepoint else 0 :]
        del self.savepoints[index:]


# An entry ends with its transaction, however that ends.
_of_connections: WeakKeyDictionary[RootTransaction, _OfConnection] = WeakKeyDictionary()
_roots: WeakKeyDictionary[PoolProxiedConnection, ReferenceType[RootTransaction]] = (
    WeakKeyDictionary()
)
_never_committed: WeakSet[RootTransaction] = WeakSet()
_extended: WeakSet[Dialect] = WeakSet()
_extending = threading.Lock()


def _collect_on_connection(connection: Connection, publications: list[_Publication]) -> None:
    transaction = connection.get_transaction()
    if transaction is None:
        transaction = connection.begin()
    with _extending:
        if connection.dialect not in _extended:
            _extend(connection.dialect)
    collected = _of_connections.setdefault(transaction, _OfConnection())
    collected.publications += publications
    _roots[connection.connection] = ref(transaction)


def _current(connection: Connection) -> _OfConnection | None:
    transaction = connection.get_transaction()
    return None if transaction is None else _of_connections.get(transaction)


def _taken(transaction: RootTransaction | None) -> list[_Publication]:
    """What a transaction that is about to be committed has collected."""
    if transaction is None or transaction.connection.get_transaction() is not transaction:
        return []
    collected = _of_connections.pop(transaction, None)
    if collected is None:
        return []
    if _is_aborted(transaction.connection):
        _log_aborted(collected.publications)
        return []
    return collected.publications


def _extend(dialect: Dialect) -> None:
    """Follow its SAVEPOINTs, and publish after its commits."""
    begin_savepoint = dialect.do_savepoint
    roll_back_to_savepoint = dialect.do_rollback_to_savepoint
    release_savepoint = dialect.do_release_savepoint
    commit = dialect.do_commit
    commit_twophase = dialect.do_commit_twophase

    @wraps(begin_savepoint)
    def do_savepoint(connection: Connection, name: str) -> None:
        begin_savepoint(connection, name)
        if collected := _current(connection):
            collected.savepoints.append((name, len(collected.publications)))

    @wraps(roll_back_to_savepoint)
    def do_rollback_to_savepoint(connection: Connection, name: str) -> None:
        if collected := _current(connection):
            collected.roll_back(name)
        roll_back_to_savepoint(connection, name)

    @wraps(release_savepoint)
    def do_release_savepoint(connection: Connection, name: str) -> None:
        release_savepoint(connection, name)
        if collected := _current(connection):
            del collected.savepoints[collected.index(name) :]

    @wraps(commit)
    def do_commit(proxied: PoolProxiedConnection) -> None:
        root = _roots.get(proxied) if isinstance(proxied, PoolProxiedConnection) else None
        transaction = root() if root is not None else None
        publications = _taken(transaction)
        commit(proxied)
        _publish(publications)

    @wraps(commit_twophase)
    def do_commit_twophase(
        connection: Connection, xid: Any, is_prepared: bool = True, recover: bool = False
    ) -> None:
        publications = _taken(connection.get_transaction())
        commit_twophase(connection, xid, is_prepared, recover)
        _publish(publications)

    for method in (
        do_savepoint,
        do_rollback_to_savepoint,
        do_release_savepoint,
        do_commit,
        do_commit_twophase,
    ):
        setattr(dialect, method.__name__, method)
    _extended.add(dialect)


# --- both ----------------------------------------------------------------------------------------


def _is_aborted(connection: Connection) -> bool:
    """Whether PostgreSQL will roll back at COMMIT, without an error, since a statement failed."""
    if connection.dialect.name != "postgresql" or connection.closed or connection.invalidated:
        return False
    info = getattr(connection.connection.driver_connection, "info", None)
    return getattr(info, "transaction_status", None) == _IN_ERROR


def _log_aborted(publications: Iterable[_Publication]) -> None:
    for each in publications:
        log.error(
            "The event %s is not published: a statement of its transaction has failed before, so "
            "that PostgreSQL has rolled back at the commit, without an error. Run a statement that "
            "may fail in a SAVEPOINT (begin_nested), or roll back after the error.",
            printable(each.event),
        )
