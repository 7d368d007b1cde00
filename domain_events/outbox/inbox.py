"""The inbox: notes which subscriber has handled which event, in the handler's own transaction.

The note is inserted before the handler's work, and committed with it. A second delivery of the
event, at the same time, waits for the first one's transaction at the table's primary key: it is
skipped if that was committed, and handled if it was rolled back. The subscriber is part of the key,
since several of one service may handle the same event.

At the isolation levels REPEATABLE READ and SERIALIZABLE, PostgreSQL does not let the second one go
on, but rolls it back. So does any database with one of two transactions in a deadlock. That is not
an error of the handler's, and none of its work has been done: `repeated` does it again.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from domain_events.events import DomainEvent
from domain_events.log import Log, about
from domain_events.outbox.database import Database, Execute, check_dialect, clock
from domain_events.outbox.rows import key_of
from domain_events.outbox.schema import INBOX
from domain_events.text import printable

#: Seconds for which notes are kept: longer than a retry may wait, which is 19 days.
KEPT = 30 * 24 * 3600.0

# Seconds before a transaction is repeated.
_PAUSES = (0.01, 0.03, 0.1, 0.3, 1.0)

# The most notes that are deleted in one transaction, and the seconds between two of these.
_BATCH = 1000
_BETWEEN_BATCHES = 0.1

log = Log("domain_events.outbox")

Result = TypeVar("Result")


def note(execute: Execute, dialect: str, subscriber: str, event_id: str) -> bool:
    """Note that a subscriber handles an event, in the transaction that its handler's work is in.

    :return: False: it has handled the event before, and is to skip it.
    """
    dialect = check_dialect(dialect)
    parameters = {
        "subscriber": key_of(subscriber, dialect),
        "event_id": key_of(event_id, dialect),
    }
    values = (
        f"{INBOX} (subscriber, event_id, handled) VALUES (:subscriber, :event_id, {clock(dialect)})"
    )
    if dialect == "postgresql":
        found = execute(f"INSERT INTO {values} ON CONFLICT DO NOTHING RETURNING 1", parameters)
        return bool(found)
    if dialect == "sqlite":
        execute(f"INSERT INTO {values} ON CONFLICT DO NOTHING", parameters)
        return _changed(execute, dialect) > 0
    execute(f"INSERT IGNORE INTO {values}", parameters)
    return _changed(execute, dialect) > 0


def repeated(
    attempt: Callable[[], Result],
    lost_a_race: Callable[[Exception], bool],
    subscriber: str,
    event: DomainEvent[Any],
) -> Result:
    """Handle an event in a transaction, and again if that is rolled back because of another one.

    :param attempt: has a transaction of its own.
    :param lost_a_race: whether an error says so.
    :raises Exception: of an attempt; after a few, that one, too.
    """
    for pause in _PAUSES:
        try:
            return attempt()
        except Exception as error:
            if not lost_a_race(error):
                raise
            log.info(
                "The transaction in which %s handles %s %s was rolled back because of another one "
                "at the same time; it is repeated: %s",
                printable(subscriber),
                printable(event.routing_key),
                printable(event.uuid_string),
                printable(error),
                about=about(subscriber, event.routing_key, event.uuid_string),
            )
        time.sleep(pause * random.uniform(0.5, 1.5))
    return attempt()


def prune(execute: Execute, dialect: str, older_than: float = KEPT, most: int = _BATCH) -> int:
    """Delete old notes, a small batch of them; call it again while it has deleted ``most``.

    :param older_than: seconds. An event that comes once more after that is handled again.
    :return: how many were deleted.
    """
    dialect = check_dialect(dialect)
    old = f"handled < {clock(dialect)} - :age ORDER BY handled LIMIT {int(most)}"
    parameters = {"age": float(older_than)}
    if dialect == "mysql":
        execute(f"DELETE FROM {INBOX} WHERE {old}", parameters)
        return _changed(execute, dialect)
    if dialect == "sqlite":
        execute(
            f"DELETE FROM {INBOX} WHERE rowid IN (SELECT rowid FROM {INBOX} WHERE {old})",
            parameters,
        )
        return _changed(execute, dialect)
    found = execute(
        f"DELETE FROM {INBOX} WHERE ctid = ANY (ARRAY(SELECT ctid FROM {INBOX} WHERE {old} "
        "FOR UPDATE SKIP LOCKED)) RETURNING 1",
        parameters,
    )
    return len(found)


def prune_all(
    database: Database, older_than: float = KEPT, stopping: threading.Event | None = None
) -> int:
    """Delete all old notes: a small batch in each transaction, and a short pause after it.

    :param older_than: seconds, as for `prune`.
    :param stopping: once it is set, the rest is left for another time.
    :return: how many were deleted.
    """
    stopping = stopping or threading.Event()
    total = 0
    try:
        while not stopping.is_set():
            with database.transaction() as execute:
                pruned = prune(execute, database.dialect, older_than, _BATCH)
            total += pruned
            if pruned < _BATCH:
                break
            stopping.wait(_BETWEEN_BATCHES)
    finally:
        database.close()
    return total


def _changed(execute: Execute, dialect: str) -> int:
    """How many rows the last statement has changed."""
    number = "changes()" if dialect == "sqlite" else "ROW_COUNT()"
    return int(execute(f"SELECT {number}", {})[0][0])
