"""`domain_events.outbox` on Django's connections.

`executing` is for a connection of the caller's. `OutboxDatabase` has connections of its own, for
courier and relay, which take no part in any transaction of the application's.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from django.db import connections, transaction

from domain_events import outbox
from domain_events.django import configuration
from domain_events.outbox import Courier, Execute


def executing(connection: Any) -> Execute:
    """The engine's way to execute SQL, on this connection of Django's."""

    def execute(sql: str, parameters: Mapping[str, Any] | None = None, /) -> Sequence[Any]:
        given = parameters or {}
        names = _PARAMETER.findall(sql)
        with connection.cursor() as cursor:
            # By position, as all of Django's databases take them.
            cursor.execute(_PARAMETER.sub("%s", sql), [given[name] for name in names])
            return cursor.fetchall() if cursor.description else []

    return execute


_PARAMETER = re.compile(r":(\w+)")


class OutboxDatabase:
    """The database of an alias, for courier and relay."""

    def __init__(self, alias: str) -> None:
        self.name: str = alias
        self.dialect: str = connections[alias].vendor
        self._own = _OwnConnection()

    @contextmanager
    def transaction(self) -> Iterator[Execute]:
        connection = self._own.get(self.name)
        connection.close_if_unusable_or_obsolete()
        connection.health_check_enabled = True
        try:
            # Not `atomic`, which knows the connections of Django's own only.
            connection.set_autocommit(False, force_begin_transaction_with_broken_autocommit=True)
            yield executing(connection)
            connection.commit()
            connection.set_autocommit(True)
        except BaseException:
            with suppress(Exception):  # it may be what is broken
                connection.rollback()
                connection.set_autocommit(True)
            connection.close()
            raise
        finally:
            connection.queries_log.clear()

    def close(self) -> None:
        self._own.close()


class _OwnConnection(threading.local):
    """A thread's connection, besides the one that the application has in it."""

    def __init__(self) -> None:
        self._connection: Any = None
        self._pid = os.getpid()
        self._inherited: list[Any] = []

    def get(self, alias: str) -> Any:
        if self._pid != os.getpid():
            # The parent goes on using it; to close it here would end its session.
            self._inherited.append(self._connection)
            self._connection, self._pid = None, os.getpid()
        if self._connection is None:
            self._connection = connections.create_connection(alias)
        return self._connection

    def close(self) -> None:
        if self._connection is not None and self._pid == os.getpid():
            self._connection.close()


class WithinTestCase:
    """A database whose transactions are part of the one that a ``TestCase`` has open."""

    def __init__(self, alias: str) -> None:
        self.name: str = alias
        self.dialect: str = connections[alias].vendor

    @contextmanager
    def transaction(self) -> Iterator[Execute]:
        with transaction.atomic(using=self.name):
            yield executing(connections[self.name])

    def close(self) -> None:
        """It is the test's own."""


_databases: dict[str, OutboxDatabase] = {}


def outbox_database(alias: str) -> OutboxDatabase:
    """That of an alias; always the same."""
    return _databases.setdefault(alias, OutboxDatabase(alias))


def courier_of(alias: str) -> Courier:
    """The process's courier for the outbox of an alias."""
    lease, timeout = configuration.courier_times()
    return outbox.courier(outbox_database(alias), lease=lease, timeout=timeout)


def known_databases() -> list[str]:
    """The aliases of those whose outbox was used by this process."""
    return list(_databases)


def has_table(alias: str, table: str = outbox.OUTBOX) -> bool:
    """Whether the tables were made there."""
    return table in connections[alias].introspection.table_names()
