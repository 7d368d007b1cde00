"""``Outbox``: the outbox of ``domain_events.outbox``, in a database of an Engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Connection, Dialect, Engine, MetaData, text
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from domain_events import outbox as engine_room
from domain_events import settings
from domain_events.errors import ConfigurationError
from domain_events.events import DomainEvent
from domain_events.middleware import Middleware
from domain_events.outbox import Courier, Execute, Parked, Relay, Row, Waiting
from domain_events.outbox.couriers import LEASE, TIMEOUT, check_times
from domain_events.outbox.database import begin as begin_reading_committed
from domain_events.outbox.database import check_dialect
from domain_events.process import on_fork
from domain_events.settings import DEFAULT, ConnectionSettings
from domain_events.sqlalchemy.after_commit import Publication, publish
from domain_events.sqlalchemy.tables import differences, outbox_table
from domain_events.sqlalchemy.transactions import Pending, begin, collect, session_or_connection


class Outbox:
    """Events are rows of the transaction that they are about, until they have been published.

    ::

        outbox = Outbox(engine)
        outbox.switch_on()

        with Session(engine) as session, session.begin():
            ...
            publish_on_commit(session, 'user.registered', {'user_id': user.id})

    After the commit a thread of this process publishes the event, within milliseconds, and deletes
    the row. A relay publishes what was left behind, because the process died, or the broker was
    away: run one at least, anywhere (`relay`). Events go to the process's default broker, see
    `domain_events.configure`.

    :param engine: of the database that has the table, see `outbox_table`; PostgreSQL, MySQL 8,
        MariaDB 10.6, or SQLite in a file. Courier and relay have connections of its pool.
    :param lease: seconds after which a relay takes over what this process has written, if it has
        died: more than ``timeout``, and at most an hour. Transactions that take longer leave their
        events to a relay.
    :param timeout: seconds without any confirm after which this process leaves its events to a
        relay. It does so at once while the broker is known to be away.
    :raises ConfigurationError: it is another database, SQLite in memory, or an option is wrong.
    """

    def __init__(self, engine: Engine, *, lease: float = LEASE, timeout: float = TIMEOUT) -> None:
        if not isinstance(engine, Engine) or engine.dialect.is_async:
            raise ConfigurationError(
                f"Outbox() takes an Engine, not of type {type(engine).__name__}. For an "
                "AsyncEngine, make one of the same database beside it (create_engine) for the "
                "threads that publish, and give publish_on_commit() the outbox=."
            )
        check_dialect(engine.dialect.name)
        if isinstance(engine.pool, StaticPool | SingletonThreadPool):
            raise ConfigurationError(
                "Outbox(): this SQLite is in memory, where only one connection sees the table, and "
                "the threads that publish have their own. Use a file, such as sqlite:///shop.db."
            )
        self._engine = engine
        self._lease, self._timeout = check_times(lease, timeout)
        self._database = EngineDatabase(engine)
        _engines.add(engine)

    def __repr__(self) -> str:
        return f"<Outbox in {self._database.name}>"

    # --- writing ---------------------------------------------------------------------------------

    def switch_on(self) -> None:
        """From now on, `publish_on_commit` writes to it for all sessions of its engine."""
        _switched_on[self._engine.dialect] = self

    def switch_off(self) -> None:
        """From now on, `publish_on_commit` publishes after the commit again; a relay has the rest.

        Where the ``outbox`` is given as an argument, it is used all the same.
        """
        if _switched_on.get(self._engine.dialect) is self:
            del _switched_on[self._engine.dialect]

    def write(
        self,
        session: Session | scoped_session[Any] | Connection,
        event: DomainEvent[Any],
        exchange: str = "domain-events",
    ) -> DomainEvent[Any]:
        """Write an event in the session's transaction; `publish_on_commit` does this.

        :return: the event, with all that it will be published with.
        :raises InvalidEvent: it can never be sent; nothing was written.
        :raises ConfigurationError: the session's database is another one.
        """
        where = session_or_connection(session, "Outbox.write")
        begin(where)
        connection = self._connection(where)
        written = engine_room.write(
            executing(connection),
            connection.dialect.name,
            event,
            exchange=exchange,
            courier=self._courier(),
        )
        if written.row is not None:
            collect(where, _Written(written.event, self._take, written.row))
        return written.event

    def wait(self, timeout: float = 5.0) -> bool:
        """Wait until this process has published what it has written and committed.

        For tests, and for the end of a short program; the end of any program does it anyway.

        :return: False when time ran out.
        """
        return self._courier().wait(timeout)

    def _courier(self) -> Courier:
        """The process's: after a fork, it is another one."""
        return engine_room.courier(self._database, lease=self._lease, timeout=self._timeout)

    def _take(self, written: list[_Written]) -> None:
        self._courier().take(each.row for each in written)

    def _connection(self, where: Session | Connection) -> Connection:
        """The one that the session's transaction is on."""
        if isinstance(where, Connection):
            connection = where
        elif where.bind is None:  # it has several
            connection = where.connection(bind_arguments={"bind": self._engine})
        else:
            connection = where.connection()
        if connection.dialect is not self._engine.dialect:
            found = database_name(connection.engine)
            if found != self._database.name:
                raise ConfigurationError(
                    f"The outbox is in {self._database.name}, and the session's transaction in "
                    f"{found}: an event cannot be committed with it. Use an Outbox of its engine."
                )
        return connection

    # --- publishing what was left behind ---------------------------------------------------------

    def relay(
        self,
        connection_settings: ConnectionSettings = DEFAULT,
        *,
        batch: int = 1000,
        lease: float = 60.0,
        idle: float = 1.0,
        timeout: float = 10.0,
        middleware: Iterable[Middleware] = (),
    ) -> Relay:
        """A relay of this outbox: ``run()`` it, ``start()`` it as a thread, or ``sweep()`` once.

        See `domain_events.outbox.Relay`. Any number of them may run beside each other.
        """
        return Relay(
            self._database,
            connection_settings,
            batch=batch,
            lease=lease,
            idle=idle,
            timeout=timeout,
            middleware=middleware,
        )

    # --- watching, and deciding ------------------------------------------------------------------

    def status(self) -> Waiting:
        """How many events wait, for how long the oldest has waited, how many are parked."""
        with self._database.transaction() as execute:
            return engine_room.status(execute, self._database.dialect)

    def parked(self, limit: int = 100, after: int = 0) -> list[Parked]:
        """The oldest events that cannot be sent, each with the reason.

        :param after: of a larger id; that of the last one gives the next.
        """
        with self._database.transaction() as execute:
            return engine_room.parked(execute, limit, after)

    def retry(self, ids: Iterable[int] | None = None) -> int:
        """Let parked events be sent again; all if no ids are given.

        :return: how many.
        """
        with self._deciding() as execute:
            return engine_room.retry(execute, ids)

    def discard(self, ids: Iterable[int]) -> list[Parked]:
        """Delete parked events, which are then never sent.

        :return: what was deleted, for a copy.
        """
        with self._deciding() as execute:
            return engine_room.discard(execute, ids)

    @contextlib.contextmanager
    def _deciding(self) -> Iterator[Execute]:
        with self._database.transaction() as execute:
            # Whatever the engine's isolation level is: at another one, the second one fails.
            begin_reading_committed(execute, check_dialect(self._database.dialect))
            yield execute

    def validate(self) -> None:
        """Check that the database has the table as it should be; for a test, or a health check.

        :raises ConfigurationError: it has not; all the differences.
        """
        with self._engine.connect() as connection:
            validate(connection, self._database.name, [outbox_table(MetaData())])


def outbox_of(where: Session | Connection) -> Outbox | None:
    """The outbox that is switched on for its engine."""
    if not _switched_on:
        return None
    if isinstance(where, Connection):
        return _switched_on.get(where.dialect)
    if where.bind is not None:
        return _switched_on.get(where.bind.dialect)
    try:
        return _switched_on.get(where.get_bind().dialect)
    except UnboundExecutionError as error:
        raise ConfigurationError(
            "publish_on_commit(): the session has several engines; give the outbox= of the one "
            "that its event is to be committed with."
        ) from error


@dataclass(frozen=True)
class _Written(Pending):
    """An event that is a row by now."""

    row: Row

    def where_never_committed(self) -> Pending:
        # No other connection sees the row.
        urls = settings.resolve()
        return Publication(self.event, publish, urls, self.row.exchange, False, 10.0)


_switched_on: WeakKeyDictionary[Dialect, Outbox] = WeakKeyDictionary()
_engines: WeakSet[Engine] = WeakSet()


def executing(connection: Connection) -> Execute:
    """Executes on a connection of the application's."""

    def execute(sql: str, parameters: Mapping[str, Any] | None = None, /) -> Sequence[Any]:
        result = connection.execute(text(sql), parameters or {})
        return result.all() if result.returns_rows else []

    return execute


def database_name(engine: Engine) -> str:
    """The same for two engines of one database; without user and password."""
    url = engine.url
    host = f"{url.host or ''}:{url.port}" if url.port else url.host or ""
    return f"{url.get_backend_name()}://{host}/{url.database or ''}"


class EngineDatabase:
    """The port of the outbox, for courier and relay: connections of the engine's pool."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name = database_name(engine)
        self.dialect = engine.dialect.name

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Execute]:
        with self._engine.connect() as connection:
            _check_alive(connection)
            with connection.begin():
                yield executing(connection)

    def close(self) -> None:
        """Nothing to close: it is back in the pool."""


# The most connections of a pool that a server may have closed.
_MOST_CLOSED = 100


def _check_alive(connection: Connection) -> None:
    """Replace a connection that the server has closed; the pool may have others."""
    dialect = connection.dialect
    for _ in range(_MOST_CLOSED):
        driver = connection.connection.dbapi_connection
        assert driver is not None
        try:
            if dialect.do_ping(driver):
                return
        except dialect.loaded_dbapi.Error as error:
            if not dialect.is_disconnect(error, driver, None):
                raise
        connection.invalidate()


def validate(connection: Connection, name: str, tables: Iterable[Any]) -> None:
    """Check tables.

    :raises ConfigurationError: with the differences.
    """
    found = [each for table in tables for each in differences(connection, table)]
    if found:
        raise ConfigurationError(
            f"The tables of the outbox and the inbox in {name} are not as they should be: "
            f"{'; '.join(found)}. Add outbox_table(metadata) and inbox_table(metadata) to the "
            "application's MetaData, and migrate (alembic revision --autogenerate)."
        )


def _after_fork() -> None:
    # The connections in the pool are the parent's; the child's courier would use them.
    for engine in list(_engines):
        engine.dispose(close=False)


on_fork(_after_fork)
