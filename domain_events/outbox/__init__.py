"""Events that belong to a transaction: the outbox, and the inbox.

An event is written to the outbox within the transaction that it is about (`write`), and published
when that has been committed: at once, by the `Courier` of the process that has written it, or, if
that has died or the broker was away, by a `Relay`. Then its row is deleted. What cannot be sent is
`parked`. The inbox notes which subscriber has handled which event (`note`).

This is the engine, in plain SQL. It knows no framework; ``domain_events.django`` and
``domain_events.sqlalchemy`` are what applications use. Read in this order: ``schema``,
``database``, ``rows``, ``writing``, ``sending``, ``couriers``, ``relay``, ``parking``, ``inbox``.
"""

from domain_events.outbox.couriers import Courier, close_couriers, courier
from domain_events.outbox.database import DIALECTS, Database, Execute, lost_a_race
from domain_events.outbox.inbox import KEPT, note, prune, prune_all, repeated
from domain_events.outbox.parking import Parked, discard, parked, retry
from domain_events.outbox.relay import Relay, Status, Waiting, status
from domain_events.outbox.rows import Row
from domain_events.outbox.schema import (
    FETCH_INDEX,
    HANDLED_INDEX,
    INBOX,
    ORDER_INDEX,
    OUTBOX,
    create,
    tuning,
)
from domain_events.outbox.writing import Written, write

__all__ = [
    "DIALECTS",
    "FETCH_INDEX",
    "HANDLED_INDEX",
    "INBOX",
    "KEPT",
    "ORDER_INDEX",
    "OUTBOX",
    "Courier",
    "Database",
    "Execute",
    "Parked",
    "Relay",
    "Row",
    "Status",
    "Waiting",
    "Written",
    "close_couriers",
    "courier",
    "create",
    "discard",
    "lost_a_race",
    "note",
    "parked",
    "prune",
    "prune_all",
    "repeated",
    "retry",
    "status",
    "tuning",
    "write",
]
