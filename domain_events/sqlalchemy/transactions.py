"""What waits for the commit of a transaction, of a Session or of a Connection.

Of a Session, it waits with the `SessionTransaction` in which it was collected, and moves to the one
around it when that is released. Of a Connection, and of a Session that is bound to one, it waits in
a list, together with where in it each SAVEPOINT began. SQLAlchemy calls no listener after the
commit of a Connection, nor with the name of a SAVEPOINT that begins; so methods of the Dialect are
extended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

from sqlalchemy import Connection, Dialect, PoolProxiedConnection, RootTransaction
from sqlalchemy.event import listens_for
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, SessionTransaction, scoped_session

from domain_events.events import DomainEvent
from domain_events.log import Log, about
from domain_events.text import printable

log = Log("domain_events.sqlalchemy")

# INERROR, of psycopg and psycopg2.
_IN_ERROR = 3


@dataclass(frozen=True)
class Pending:
    """An event that waits for a commit."""

    event: DomainEvent[Any]
    #: Called after the commit with all that share it, in their order; it raises nothing.
    settle: Callable[[list[Any]], None]

    def where_never_committed(self) -> Pending:
        """What to settle instead in a test whose transaction is not committed."""
        return self


def session_or_connection(given: Any, function: str) -> Session | Connection:
    """What was given, or the Session of a scoped_session.

    :raises TypeError: it is something else.
    """
    if isinstance(given, scoped_session):
        given = given()
    if isinstance(given, Session | Connection):
        return given
    kind = type(given)
    hint = "."
    if any(each.__module__.startswith("sqlalchemy.ext.asyncio") for each in kind.__mro__):
        hint = (
            f"; call it as in: await session.run_sync({function}, ...). Without an outbox, the "
            "commit then blocks the event loop while it publishes, which takes long when there is "
            "no broker."
        )
    raise TypeError(
        f"{function}() takes a Session, a scoped_session or a Connection, not of type "
        f"{kind.__name__}{hint}"
    )


def begin(where: Session | Connection) -> None:
    """Begin a transaction, if there is none.

    :raises InvalidRequestError: the session has ``autobegin=False``.
    """
    if where.in_transaction():
        return
    if isinstance(where, Session) and not where.autobegin:
        raise InvalidRequestError(
            "publish_on_commit(): the session is not in a transaction, and begins none by itself "
            "(autobegin=False); call session.begin() first."
        )
    where.begin()


def collect(where: Session | Connection, pending: Pending) -> None:
    """Settle it after the commit of the current transaction, and never if that is rolled back."""
    begin(where)
    if isinstance(where, Connection):
        _collect_on_connection(where, [pending])
        return
    if isinstance(where.bind, Connection):
        # It may have joined a transaction that others commit, or roll back.
        connection = where.connection()
        if connection.get_transaction() not in _never_committed:
            _collect_on_connection(connection, [pending])
            return
    transaction = _innermost(where)
    assert transaction is not None
    _of_session(transaction).pendings.append(pending)


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

    They are published directly then, also where an outbox is switched on.

    :raises InvalidRequestError: the connection is not in a transaction.
    """
    transaction = connection.get_transaction()
    if transaction is None:
        raise InvalidRequestError(
            "publish_at_session_commits(): the connection is not in a transaction; call it after "
            "connection.begin()."
        )
    _never_committed.add(transaction)


def _settle(pendings: Iterable[Pending]) -> None:
    groups: dict[Callable[[list[Any]], None], list[Pending]] = {}
    for pending in pendings:
        groups.setdefault(pending.settle, []).append(pending)
    for settle, group in groups.items():
        settle(group)


# --- Sessions ------------------------------------------------------------------------------------


@dataclass
class _OfSession:
    """What a `SessionTransaction` has collected."""

    pendings: list[Pending] = field(default_factory=list)
    #: Those that it uses; of the outermost one. They lead to it, which must not keep it alive.
    connections: WeakSet[Connection] = field(default_factory=WeakSet)
    committed: bool = False
    #: An earlier error has rolled it back, though the commit succeeds.
    aborted: bool = False


# An entry ends with its transaction, also if nobody closes the session.
_of_sessions: WeakKeyDictionary[SessionTransaction, _OfSession] = WeakKeyDictionary()


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
    if collected.pendings:
        collected.aborted = any(map(_is_aborted, collected.connections))


@listens_for(Session, "after_commit", insert=True)
def _note_commit(session: Session) -> None:
    """Of a transaction, or of a SAVEPOINT."""
    transaction = _innermost(session)
    if transaction is not None and transaction in _of_sessions:
        _of_sessions[transaction].committed = True


@listens_for(Session, "after_transaction_end", insert=True)
def _settle_session(session: Session, transaction: SessionTransaction) -> None:
    """By now, the connection has been returned to the pool."""
    collected = _of_sessions.pop(transaction, None)
    if collected is None or not collected.committed or not collected.pendings:
        return  # rolled back, or closed
    around = _innermost(session)
    if around is not None:
        _of_session(around).pendings += collected.pendings
        return
    pendings = collected.pendings
    for connection in collected.connections:
        outer = connection.get_transaction()
        if outer in _never_committed:
            pendings = [pending.where_never_committed() for pending in pendings]
        elif outer is not None:  # of one in its `binds`, that it has joined
            _collect_on_connection(connection, pendings)
            return
    if collected.aborted:
        _log_aborted(pendings)
    else:
        _settle(pendings)


# --- Connections ---------------------------------------------------------------------------------


@dataclass
class _OfConnection:
    """What the transaction of a Connection has collected."""

    pendings: list[Pending] = field(default_factory=list)
    #: The names of its SAVEPOINTs, and how much there was when they began. Those that began before
    #: the first was collected are not in the list.
    savepoints: list[tuple[str, int]] = field(default_factory=list)

    def index(self, savepoint: str) -> int:
        """Where in the list of SAVEPOINTs it is; 0 if it is older than all that was collected."""
        names = [name for name, _ in self.savepoints]
        return names.index(savepoint) if savepoint in names else 0

    def roll_back(self, savepoint: str) -> None:
        index = self.index(savepoint)
        known = self.savepoints[index:]
        del self.pendings[known[0][1] if known and known[0][0] == savepoint else 0 :]
        del self.savepoints[index:]


# An entry ends with its transaction, however that ends.
_of_connections: WeakKeyDictionary[RootTransaction, _OfConnection] = WeakKeyDictionary()
_roots: WeakKeyDictionary[PoolProxiedConnection, ReferenceType[RootTransaction]] = (
    WeakKeyDictionary()
)
_never_committed: WeakSet[RootTransaction] = WeakSet()
_extended: WeakSet[Dialect] = WeakSet()
_extending = threading.Lock()


def _collect_on_connection(connection: Connection, pendings: list[Pending]) -> None:
    transaction = connection.get_transaction()
    assert transaction is not None
    with _extending:
        if connection.dialect not in _extended:
            _extend(connection.dialect)
    collected = _of_connections.setdefault(transaction, _OfConnection())
    collected.pendings += pendings
    _roots[connection.connection] = ref(transaction)


def _current(connection: Connection) -> _OfConnection | None:
    transaction = connection.get_transaction()
    return None if transaction is None else _of_connections.get(transaction)


def _taken(transaction: RootTransaction | None) -> list[Pending]:
    """What a transaction that is about to be committed has collected."""
    if transaction is None or transaction.connection.get_transaction() is not transaction:
        return []
    collected = _of_connections.pop(transaction, None)
    if collected is None:
        return []
    if _is_aborted(transaction.connection):
        _log_aborted(collected.pendings)
        return []
    return collected.pendings


def _extend(dialect: Dialect) -> None:
    """Follow its SAVEPOINTs, and settle after its commits."""
    begin_savepoint = dialect.do_savepoint
    roll_back_to_savepoint = dialect.do_rollback_to_savepoint
    release_savepoint = dialect.do_release_savepoint
    commit = dialect.do_commit
    commit_twophase = dialect.do_commit_twophase

    @wraps(begin_savepoint)
    def do_savepoint(connection: Connection, name: str) -> None:
        begin_savepoint(connection, name)
        if collected := _current(connection):
            collected.savepoints.append((name, len(collected.pendings)))

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
        pendings = _taken(root() if root is not None else None)
        commit(proxied)
        _settle(pendings)

    @wraps(commit_twophase)
    def do_commit_twophase(
        connection: Connection, xid: Any, is_prepared: bool = True, recover: bool = False
    ) -> None:
        pendings = _taken(connection.get_transaction())
        commit_twophase(connection, xid, is_prepared, recover)
        _settle(pendings)

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


def _log_aborted(pendings: Iterable[Pending]) -> None:
    for pending in pendings:
        log.error(
            "The event %s is not published: a statement of its transaction has failed before, so "
            "that PostgreSQL has rolled back at the commit, without an error. Run a statement that "
            "may fail in a SAVEPOINT (begin_nested), or roll back after the error.",
            printable(pending.event),
            about=about(None, pending.event.routing_key, pending.event.uuid_string),
        )
