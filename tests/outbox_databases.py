"""The reference for adapters of the outbox: a `Database` over plain DB-API connections."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import psycopg
import pymysql
from databases import Address

from domain_events import outbox
from domain_events.outbox import Execute


class DbApi:
    """A database, with a connection for each thread that courier or relay run on."""

    def __init__(self, name: str, dialect: str, connect: Callable[[], Any]) -> None:
        self.name = name
        self.dialect = dialect
        self.connect = connect
        self._local = threading.local()

    def __enter__(self) -> DbApi:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Execute]:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self.connect()
        try:
            yield self.executing(connection)
            connection.commit()
        except BaseException:
            self.close()  # it may be what is broken
            raise

    def close(self) -> None:
        connection, self._local.connection = getattr(self._local, "connection", None), None
        if connection is not None:
            connection.close()

    def executing(self, connection: Any) -> Execute:
        """For a connection of the application's."""

        def execute(sql: str, parameters: Mapping[str, Any] | None = None, /) -> Sequence[Any]:
            cursor = connection.cursor()
            try:
                if self.dialect != "sqlite":
                    sql = re.sub(r":(\w+)", r"%(\1)s", sql)
                cursor.execute(sql, parameters or {})
                return cursor.fetchall() if cursor.description else []
            finally:
                cursor.close()

        return execute

    # --- for tests -------------------------------------------------------------------------------

    def run(self, *statements: str) -> Sequence[Any]:
        """Execute in a transaction of its own; returns the rows of the last one."""
        connection = self.connect()
        try:
            rows: Sequence[Any] = []
            for sql in statements:
                rows = self.executing(connection)(sql, {})
            connection.commit()
            return rows
        finally:
            connection.close()

    def create(self) -> DbApi:
        """Make both tables."""
        self.run(*outbox.create(self.dialect))
        return self

    @contextlib.contextmanager
    def application(self) -> Iterator[tuple[Any, Execute]]:
        """A connection of the application's, with what executes on it."""
        connection = self.connect()
        try:
            yield connection, self.executing(connection)
        finally:
            connection.close()


def sqlite(path: str) -> DbApi:
    def connect() -> Any:
        connection = sqlite3.connect(path, timeout=30)
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        return connection

    return DbApi(path, "sqlite", connect)


def at(address: Address) -> DbApi:
    """On a server that the tests have started."""
    name = f"{address.host}:{address.port}/{address.database}"
    if address.scheme == "postgresql":
        return DbApi(name, "postgresql", lambda: psycopg.connect(address.url))
    return DbApi(
        name,
        "mariadb",
        lambda: pymysql.connect(
            host=address.host,
            port=address.port,
            user=address.user,
            password=address.password,
            database=address.database,
        ),
    )
