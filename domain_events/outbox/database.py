"""The port: what the outbox and the inbox need of a database. Adapters implement it.

**SQL.** The rooms here write plain SQL with ``:name`` parameters and without ``%``, for the
dialects of `DIALECTS`, and without an ORM: an adapter passes it to the connection that its users
have. MySQL and MariaDB are one dialect, of MySQL 8 and MariaDB 10.6, which have ``SKIP LOCKED``.

**Connections.** Events are written, and notes are taken, on the caller's connection, within the
caller's transaction; that must be a transaction, and not autocommit. Courier and relay have
connections of their own, from a `Database`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from domain_events.errors import ConfigurationError

DIALECTS = ("postgresql", "mysql", "mariadb", "sqlite")

#: The longest text in a column: of an id, a name, a routing key.
LONGEST_TEXT = 255


class Execute(Protocol):
    """Executes one statement on a connection."""

    def __call__(self, sql: str, parameters: Mapping[str, Any] = ..., /) -> Sequence[Sequence[Any]]:
        """Execute SQL with ``:name`` parameters.

        :return: its rows; none for a statement that returns none.
        """


class Database(Protocol):
    """Where an outbox is. Safe from any thread, and after a fork."""

    @property
    def name(self) -> str:
        """The same for the same database, without a password: for the log, and as a key."""

    @property
    def dialect(self) -> str:
        """One of `DIALECTS`."""

    def transaction(self) -> AbstractContextManager[Execute]:
        """A transaction on a connection of this thread's own, never the caller's.

        It is committed at the end, and rolled back on an exception. No statement has been executed
        in it: the first one may set its isolation level. A connection that the server has closed
        meanwhile is replaced by a new one.
        """

    def close(self) -> None:
        """Close this thread's connection: it pauses for long, or ends. It may use it again."""


def check_dialect(dialect: str) -> str:
    """One of `DIALECTS`, with ``mariadb`` as ``mysql``.

    :raises ConfigurationError: it is something else.
    """
    if dialect not in DIALECTS:
        raise ConfigurationError(
            f"The outbox and the inbox do not support the database {dialect!r}; use one of "
            f"{', '.join(DIALECTS)}."
        )
    return "mysql" if dialect == "mariadb" else dialect


def lost_a_race(error: BaseException | None) -> bool:
    """Whether the server has rolled back a transaction because of another one at the same time.

    By a serialization failure, or a deadlock: nothing of it was done, and it may be repeated.

    :param error: of the driver.
    """
    # psycopg's name, psycopg2's, and MySQL's number of a deadlock.
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return state in ("40001", "40P01") or (error is not None and error.args[:1] == (1213,))


def clock(dialect: str) -> str:
    """SQL for the time of the database's clock, in Unix seconds.

    Not that of the hosts, which may differ; and Unix seconds have no time zone.
    """
    return _CLOCKS[dialect]


_CLOCKS = {
    # Not now(), which stands still within a transaction.
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) AS double precision)",
    # UNIX_TIMESTAMP(NOW(6)) is an hour off while daylight saving time ends.
    "mysql": "(UNIX_TIMESTAMP() + MICROSECOND(NOW(6)) / 1000000e0)",
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
}


def begin(execute: Execute, dialect: str) -> None:
    """The first statement of a transaction: its later ones see what was committed before them."""
    if dialect != "sqlite":
        execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED", {})


def begin_fetch(execute: Execute, dialect: str) -> None:
    """As `begin`, for a transaction that looks for rows and locks them."""
    begin(execute, dialect)
    if dialect == "postgresql":
        execute(f"SELECT {_FETCH_SETTINGS}", {})


# For the transaction only.
_FETCH_SETTINGS = ", ".join(
    f"set_config('{name}', '{value}', true)"
    for name, value in (
        # A process that is paused within the transaction does not hold its locks for ever.
        ("idle_in_transaction_session_timeout", "30s"),
        # There is an index for each statement, in its order. The planner cannot know: statistics
        # are of a time when the table was empty, or full.
        ("enable_seqscan", "off"),
        ("enable_bitmapscan", "off"),
        ("enable_sort", "off"),
    )
)
