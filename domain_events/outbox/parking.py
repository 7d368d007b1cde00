"""Parked rows: events that the broker refuses, or that cannot be sent, until somebody decides.

A parked row holds up later events of its own object, and nothing else.
"""

from __future__ import annotations

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

    row: Row
    #: When it was written, and when it was parked, in Unix seconds of the database's clock.
    created: float
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

    :param ids: which; all if left out.
    :return: how many.
    """
    rows = _matching(execute, ids)
    if rows:
        execute(
            f"UPDATE {OUTBOX} SET parked = 0, error = NULL WHERE parked > 0 AND id IN "
            f"({_listed(rows)})",
            {},
        )
    return len(rows)


def discard(execute: Execute, ids: Iterable[int]) -> list[Parked]:
    """Delete parked rows: their events are never sent, and later ones of their objects are.

    :return: the rows that were deleted, for a copy.
    """
    rows = _matching(execute, ids)
    if rows:
        execute(f"DELETE FROM {OUTBOX} WHERE parked > 0 AND id IN ({_listed(rows)})", {})
    return rows


def _matching(execute: Execute, ids: Iterable[int] | None) -> list[Parked]:
    condition = ""
    if ids is not None:
        numbers = ", ".join(str(int(number)) for number in ids)
        if not numbers:
            return []
        condition = f" AND id IN ({numbers})"
    found = execute(f"SELECT {_COLUMNS} FROM {OUTBOX} WHERE parked > 0{condition} ORDER BY id", {})
    return list(map(_parked, found))


def _listed(rows: list[Parked]) -> str:
    return ", ".join(str(each.id) for each in rows)


def _parked(columns: Any) -> Parked:
    *row, created, since, error = columns
    return Parked(Row(*row), float(created), float(since), error or "")
