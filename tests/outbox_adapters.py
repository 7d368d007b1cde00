"""The outbox and the inbox as applications use them, through each adapter: for the matrix of kills.

An `Adapter` is made before the processes are forked, and connects to nothing until then.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy
from databases import Address
from sqlalchemy import Connection, Engine

from domain_events import DomainEvent, Subscriber, outbox
from domain_events.outbox import Execute, Relay

#: Before and after each statement, with its SQL, and each commit.
Step = Callable[[str, str], None]


@dataclass(frozen=True)
class Transaction:
    """What is done in one; it is rolled back by an exception, and so is a savepoint."""

    execute: Execute
    #: Takes the arguments of `publish_on_commit`.
    publish: Callable[..., DomainEvent[Any]]
    savepoint: Callable[[], AbstractContextManager[object]]


#: Handles an event in the transaction that its note in the inbox belongs to.
Handle = Callable[[Transaction, DomainEvent[Any]], None]


class Adapter(Protocol):
    """The database, through an adapter of this library."""

    #: Those of the database.
    errors: type[Exception]
    dialect: str

    def create(self) -> None:
        """Make the tables of the outbox and of the inbox."""

    def watch(self, step: Step) -> None:
        """Call it around each statement and commit of this process."""

    def transaction(self) -> AbstractContextManager[Transaction]:
        """A transaction, as a request has it."""

    def renew(self) -> None:
        """After an error: the next transaction gets a connection that works."""

    def relay(self, patience: float, **options: Any) -> None:
        """Be a relay, with these options of `domain_events.outbox.Relay`.

        :param patience: seconds to wait for the database, at first.
        """

    def subscriber(
        self, handle: Handle, name: str, exchange: str, *, once: bool, **options: Any
    ) -> Subscriber:
        """A subscriber that handles each ``thing.changed`` once, with options of ``register``.

        :param once: False: the note is taken in a transaction before the handler's.
        """


def outside(adapter: Adapter, handle: Handle, name: str) -> Callable[[DomainEvent[Any]], None]:
    """The inbox as it must not be: the note is committed before the work."""

    def handle_outside(event: DomainEvent[Any]) -> None:
        with adapter.transaction() as before:
            if not outbox.note(before.execute, adapter.dialect, name, str(event.uuid_string)):
                return
        with adapter.transaction() as after:
            handle(after, event)

    return handle_outside


# --------------------------------------------------------------------------- SQLAlchemy


class SQLAlchemy:
    """An Engine, and its Connections."""

    errors: type[Exception] = sqlalchemy.exc.DBAPIError

    def __init__(self, database: Address | Path, lease: float, timeout: float) -> None:
        from domain_events.sqlalchemy import Outbox

        self.engine = make_engine(database)
        self.dialect = self.engine.dialect.name
        self._outbox = Outbox(self.engine, lease=lease, timeout=timeout)

    def create(self) -> None:
        from domain_events.sqlalchemy import inbox_table, outbox_table

        metadata = sqlalchemy.MetaData()
        outbox_table(metadata)
        inbox_table(metadata)
        metadata.create_all(self.engine)

    def watch(self, step: Step) -> None:
        def before(_conn: Any, _cursor: Any, sql: str, *_others: Any) -> None:
            step("before", sql)

        def after(_conn: Any, _cursor: Any, sql: str, *_others: Any) -> None:
            step("after", sql)

        sqlalchemy.event.listen(self.engine, "before_cursor_execute", before)
        sqlalchemy.event.listen(self.engine, "after_cursor_execute", after)
        commit = self.engine.dialect.do_commit

        def do_commit(connection: Any) -> None:
            step("before", "COMMIT")
            commit(connection)
            step("after", "COMMIT")

        self.engine.dialect.do_commit = do_commit  # type: ignore[method-assign, assignment]

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        with self.engine.begin() as connection:
            yield self._transaction(connection)

    def _transaction(self, connection: Connection) -> Transaction:
        from domain_events.sqlalchemy import publish_on_commit
        from domain_events.sqlalchemy.outbox import executing

        return Transaction(
            executing(connection),
            functools.partial(publish_on_commit, connection, outbox=self._outbox),
            connection.begin_nested,
        )

    def renew(self) -> None:
        self.engine.dispose()

    def relay(self, patience: float, **options: Any) -> None:
        self._outbox.relay(**options).run()

    def subscriber(
        self, handle: Handle, name: str, exchange: str, *, once: bool, **options: Any
    ) -> Subscriber:
        from domain_events import sqlalchemy as adapter

        def handle_within(connection: Connection, event: DomainEvent[Any]) -> None:
            handle(self._transaction(connection), event)

        handler = adapter.once(self.engine)(handle_within) if once else outside(self, handle, name)
        subscriber = Subscriber(exchange=exchange)
        subscriber.register(handler, name, ["thing.changed"], retry_on=self.errors, **options)
        return subscriber


def make_engine(database: Address | Path) -> Engine:
    if isinstance(database, Address):
        return sqlalchemy.create_engine(database.sqlalchemy_url)
    engine = sqlalchemy.create_engine(f"sqlite:///{database}", connect_args={"timeout": 60})

    def on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")

    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sqlalchemy.event.listen(engine, "connect", on_connect)
    sqlalchemy.event.listen(engine, "begin", on_begin)
    return engine


# --------------------------------------------------------------------------- Django


class Django:
    """The default database of a project, whose outbox is switched on."""

    def __init__(self, database: Address | Path, lease: float, timeout: float) -> None:
        import django
        import pymysql
        from django.conf import settings
        from django.db import Error, connections

        if isinstance(database, Path):
            where: dict[str, Any] = {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": str(database),
                "OPTIONS": {
                    "timeout": 60,
                    "transaction_mode": "IMMEDIATE",
                    "init_command": "PRAGMA journal_mode = WAL",
                },
            }
        else:
            pymysql.install_as_MySQLdb()
            where = {**database.django}
        settings.configure(
            DATABASES={"default": {**where, "CONN_MAX_AGE": None, "CONN_HEALTH_CHECKS": True}},
            INSTALLED_APPS=["domain_events.django"],
            DOMAIN_EVENTS={"OUTBOX": True, "OUTBOX_LEASE": lease, "OUTBOX_TIMEOUT": timeout},
            LOGGING_CONFIG=None,
            USE_TZ=True,
        )
        django.setup()
        self.errors: type[Exception] = Error
        self.dialect: str = connections["default"].vendor

    def create(self) -> None:
        from django.core.management import call_command

        call_command("migrate", verbosity=0)

    def watch(self, step: Step) -> None:
        from django.db.backends.base.base import BaseDatabaseWrapper
        from django.db.backends.signals import connection_created

        def execute_wrapper(execute: Any, sql: str, *others: Any) -> Any:
            step("before", sql)
            result = execute(sql, *others)
            step("after", sql)
            return result

        def created(connection: Any, **_: Any) -> None:
            if execute_wrapper not in connection.execute_wrappers:
                connection.execute_wrappers.append(execute_wrapper)

        connection_created.connect(created, weak=False)
        commit = BaseDatabaseWrapper._commit

        def commit_wrapper(connection: Any) -> None:
            step("before", "COMMIT")
            commit(connection)
            step("after", "COMMIT")

        BaseDatabaseWrapper._commit = commit_wrapper

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        from django.db import close_old_connections, transaction

        close_old_connections()  # as before each request
        with transaction.atomic():
            yield self._transaction()

    def _transaction(self) -> Transaction:
        from django.db import connection, transaction

        from domain_events.django import publish_on_commit
        from domain_events.django.database import executing

        return Transaction(executing(connection), publish_on_commit, transaction.atomic)

    def renew(self) -> None:
        """Nothing to do: see `transaction`."""

    def relay(self, patience: float, **options: Any) -> None:
        from django.core.management import call_command

        from domain_events.django.management.commands import relay_domain_events as command

        names = ("batch", "idle")
        others = {name: option for name, option in options.items() if name not in names}
        vars(command)["Relay"] = functools.partial(Relay, **others)
        deadline = time.monotonic() + patience
        while True:
            try:
                call_command("relay_domain_events", **{name: options[name] for name in names})
                break
            except self.errors:  # it looks for the table first, and would be started again
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def subscriber(
        self, handle: Handle, name: str, exchange: str, *, once: bool, **options: Any
    ) -> Subscriber:
        from domain_events import django as adapter

        def handle_within(event: DomainEvent[Any]) -> None:
            handle(self._transaction(), event)

        handler = adapter.once(handle_within) if once else outside(self, handle, name)
        adapter.on("thing.changed", name=name, retry_on=self.errors, **options)(handler)
        return adapter.make_subscriber(exchange=exchange)


ADAPTERS: dict[str, Callable[[Address | Path, float, float], Adapter]] = {
    "sqlalchemy": SQLAlchemy,
    "django": Django,
}
TITLES = {"sqlalchemy": "SQLAlchemy", "django": "Django"}
