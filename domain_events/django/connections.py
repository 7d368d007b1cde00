"""``DatabaseConnections``: Django's database connections around each handler.

In a web request Django itself closes connections that are too old or broken, before and after it.
In a subscriber nobody does: after a restart of the database each later event would become a dead
letter. Nor does anybody close the connections of a worker's thread that ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from django.db import connections, reset_queries

from domain_events import DomainEvent, Middleware


class DatabaseConnections(Middleware):
    """Does for a handler what Django does for a web request.

    Before each handler and after it, connections of its thread that are broken, or older than
    their ``CONN_MAX_AGE``, are closed; a new one is made when it is needed. One that stays open is
    checked when the handler first uses it, whatever its ``CONN_HEALTH_CHECKS`` are, so that a
    handler never gets a connection that the database has closed since the last one. The queries
    that Django collects under ``DEBUG`` are dropped. When a worker's thread ends, its connections
    are closed.

    A connection within a transaction is left alone: that of a ``TestCase``, in which a handler is
    called.

    ``manage.py consume_domain_events`` has it. Another program needs
    ``Subscriber(middleware=[DatabaseConnections()])``.
    """

    @contextmanager
    def handling(self, event: DomainEvent[Any]) -> Iterator[None]:
        _refresh()
        try:
            yield
        finally:
            _refresh()


def _refresh() -> None:
    reset_queries()
    for connection in connections.all(initialized_only=True):
        if not connection.in_atomic_block:
            connection.close_if_unusable_or_obsolete()
            connection.health_check_enabled = True
            _this_thread.closes(connection)


class _AtItsEnd:
    """Closes the connections of a thread when that ends, and its `_ThisThread` is deleted."""

    def __init__(self) -> None:
        self.connections: dict[str, Any] = {}

    def __del__(self) -> None:
        for connection in self.connections.values():
            if not connection.in_atomic_block and not connection.allow_thread_sharing:
                with suppress(Exception):  # it may be broken
                    connection.close()


class _ThisThread(threading.local):
    def __init__(self) -> None:
        self._end = _AtItsEnd()

    def closes(self, connection: Any) -> None:
        """Close it when this thread ends."""
        self._end.connections[connection.alias] = connection


_this_thread = _ThisThread()
