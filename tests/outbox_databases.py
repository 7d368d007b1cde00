"""The reference for adapters of the outbox: a `Database` over plain DB-API connections."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from domain_events import outbox
from domain_events.outbox import Execute


class DbApi:
    """A database, with a connection for each thread that courier or relay run on."""

    def __init__(self, name: str, dialect: str, connect: Callable[[], Any]) -> None:
        self.name = name
        self.dialect = dialect
        self.connect = connect
        self._local = threading.local()

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

    def reset(self) -> None:
        """Make both tables anew."""
        drop = [f"DROP TABLE IF EXISTS {table}" for table in (outbox.OUTBOX, outbox.INBOX)]
        self.run(*drop, *outbox.create(self.dialect))


def sqlite(path: str) -> DbApi:
    import sqlite3

    def connect() -> Any:
        connection = sqlite3.connect(path, timeout=20)
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        return connection

    return DbApi(path, "sqlite", connect)


def postgresql(conninfo: str) -> DbApi:
    import psycopg

    return DbApi(conninfo, "postgresql", lambda: psycopg.connect(conninfo))


def mariadb(**arguments: Any) -> DbApi:
    import pymysql  # type: ignore[import-untyped]

    name = f"{arguments.get('unix_socket')}/{arguments.get('database')}"
    return DbApi(name, "mariadb", lambda: pymysql.connect(**arguments))
