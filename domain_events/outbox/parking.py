"""Parked rows: events that the broker refuses, or that cannot be sent, until somebody decides.

A parked row holds up later events of its own object, and nothing else.

To decide about rows, a transaction first marks them, by a token, with one statement: of two
operators who decide at the same time, the second one waits for the first, and finds its rows parked
no longer. And a transaction that begins with a write can always be finished on SQLite.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from domain_events.events import DomainEvent
from domain_events.outbox.database import Execute
from domain_events.outbox.rows import Row
from domain_events.outbox.schema import OUTBOX

_COLUMNS = "id, event_id, exchange, routing_key, object_key, body, details, created, parked, error"


@dataclass(frozen=True)
class Parked:
    """A row that was set aside."""

    #: The event as it was written.
    row: Row
    #: When it was written, in Unix seconds of the database's clock.
    created: float
    #: When it was parked, likewise.
    parked: float
    #: Why.
    error: str

    @property
    def id(self) -> int:
        """Of the row: for `retry` and `discard`."""
        return self.row.id

    @property
    def event(self) -> DomainEvent[Any]:
        """The event.

        :raises InvalidEvent: the row was changed, and cannot be read.
        """
        return self.row.event()


def parked(execute: Execute, limit: int = 100, after: int = 0) -> list[Parked]:
    """The oldest parked rows.

    :param after: of a larger id; that of the last one gives the next.
    """
    found = execute(
        f"SELECT {_COLUMNS} FROM {OUTBOX} WHERE parked > 0 AND id > :after ORDER BY id "
        f"LIMIT {int(limit)}",
        {"after": after},
    )
    return list(map(_parked, found))


def retry(execute: Execute, ids: Iterable[int] | None = None) -> int:
    """Let parked rows be sent again, after what was wrong has been put right.

    :param execute: in a transaction. On SQLite, nothing was executed in it before.
    :param ids: which; all if left out.
    :return: how many; others are not parked, or no longer.
    :raises Exception: of the database. After a deadlock nothing is decided; repeat it.
    """
    mark = _mark(execute, ids)
    number = int(execute(f"SELECT COUNT(*) FROM {OUTBOX} {_MARKED}", mark)[0][0])
    if number:
        execute(f"UPDATE {OUTBOX} SET parked = 0, error = NULL, token = NULL {_MARKED}", mark)
    return number


def discard(execute: Execute, ids: Iterable[int]) -> list[Parked]:
    """Delete parked rows: their events are never sent, and later ones of their objects are.

    :param execute: as for `retry`.
    :return: the rows that were deleted, for a copy.
    """
    mark = _mark(execute, ids)
    rows = execute(f"SELECT {_COLUMNS} FROM {OUTBOX} {_MARKED} ORDER BY id", mark)
    if rows:
        execute(f"DELETE FROM {OUTBOX} {_MARKED}", mark)
    return list(map(_parked, rows))


_MARKED = "WHERE parked > 0 AND token = :mark"


def _mark(execute: Execute, ids: Iterable[int] | None) -> dict[str, str]:
    """Mark those of the rows that are parked, and keep all others from deciding about them."""
    mark = {"mark": str(uuid.uuid4())}
    numbers = None if ids is None else ", ".join(str(int(number)) for number in ids)
    if numbers != "":
        among = "" if numbers is None else f" AND id IN ({numbers})"
        execute(f"UPDATE {OUTBOX} SET token = :mark WHERE parked > 0{among}", mark)
    return mark


def _parked(columns: Any) -> Parked:
    *row, created, since, error = columns
    return Parked(Row(*row), float(created), float(since), error or "")
