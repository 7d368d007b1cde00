"""The rows of the outbox, and every SQL statement on them.

**Leases.** Whoever sends a row has leased it: ``token`` says who, ``leased_until`` until when. Each
later statement of that owner names its token, so that one whose leases were taken over changes
nothing.

**Order.** A row is fetched only if each older row of the same object, as far as there is one, is
fetched with it. That is checked after the rows have been locked, and counts every older row that
exists, whoever has leased it, and parked ones, too: a row goes when it has been sent, and with
SKIP LOCKED alone a second relay would get row 11 of an object whose rows 1 to 10 are locked.
`insert` sees to it that an older row cannot appear later.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from domain_events.checks import shown
from domain_events.errors import InvalidEvent
from domain_events.events import Details, DomainEvent, from_envelope, read_envelope
from domain_events.log import Log, about
from domain_events.outbox.database import LONGEST_TEXT, Execute, clock
from domain_events.outbox.schema import OUTBOX
from domain_events.text import printable

log = Log("domain_events.outbox")

# Seconds that a transaction waits for another one that has written an event of the same object.
_ORDER_TIMEOUT = 5.0
_LONGEST_ERROR = 2000
# Of the bodies in one page; a larger body is a page of its own.
_MOST_BYTES = 32 * 2**20
# Ids that the search for older rows may pass for what it knows to be sent.
_RECENT = 10_000


class Row(NamedTuple):
    """An event in the outbox."""

    id: int
    event_id: str
    exchange: str
    routing_key: str
    #: Events that share it are sent in their order; None: it has no place in any.
    object_key: str | None
    #: The envelope, as of the writing.
    body: str
    #: All else that is sent with it, as JSON.
    details: str
    #: When it was leased, on this process's monotonic clock.
    leased_at: float = 0.0

    def event(self) -> DomainEvent[Any]:
        """The event, as it was when it was written.

        :raises InvalidEvent: the row was changed, and cannot be read.
        """
        try:
            details = Details(**json.loads(self.details))
        except (TypeError, ValueError) as error:
            raise InvalidEvent(f"Row {self.id}: its details cannot be read: {error}") from error
        return from_envelope(read_envelope(self.body), details=details)

    def __repr__(self) -> str:
        return f"<Row {self.id}: {printable(self.routing_key)!r} {printable(self.event_id)}>"


_COLUMNS = "id, event_id, exchange, routing_key, object_key, body, details"


def key_of(text: str, dialect: str) -> str:
    """A text from outside as a key: itself, or its hash where a database would change it.

    MySQL takes ``Mail`` and ``mail`` for one key, unless its columns have another collation.
    """
    simple = _SIMPLE.fullmatch(text) if dialect == "mysql" else text.isprintable()
    if simple and len(text) <= LONGEST_TEXT and text == text.strip():
        return text
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


_SIMPLE = re.compile("[0-9a-z.:_-]*")


def insert(
    execute: Execute,
    dialect: str,
    event: DomainEvent[Any],
    exchange: str,
    token: str | None,
    lease: float,
) -> Row:
    """Insert an event in the caller's transaction, leased to ``token``.

    Transactions with events of the same object follow each other, so that the ids of its events are
    in the order of the commits. SQLite has one writer anyway. On PostgreSQL this takes an advisory
    lock for the object, until the transaction ends; it is polled for, so that two transactions
    cannot wait for each other for ever. On MySQL and MariaDB the ids are in the order of the
    inserts, which is the same for transactions that lock the object's own row first.
    """
    details = event.details
    object_key = (
        None if event.domain_object_id is None else key_of(str(event.domain_object_id), dialect)
    )
    row = Row(
        0,
        key_of(str(event.uuid_string), dialect),
        exchange,
        printable(event.routing_key, LONGEST_TEXT),
        object_key,
        event.to_json(),
        json.dumps(
            {
                "headers": dict(details.headers),
                "correlation_id": details.correlation_id,
                "cause": details.cause,
                "version": details.version,
                "app_id": details.app_id,
            }
        ),
        time.monotonic(),
    )
    now = clock(dialect)
    parameters = {
        **row._asdict(),
        "token": token,
        "lease": 0 if token is None else lease,
    }
    del parameters["id"], parameters["leased_at"]
    until = "0" if token is None else f"{now} + :lease"
    if token is None:
        del parameters["lease"]
    into = (
        f"INSERT INTO {OUTBOX} (event_id, exchange, routing_key, object_key, body, details, "
        "created, token, leased_until, parked) "
    )
    values = (
        f":event_id, :exchange, :routing_key, :object_key, :body, :details, {now}, :token, "
        f"{until}, 0"
    )
    if dialect == "postgresql":
        found = _insert_in_order(execute, into, values, parameters, object_key)
    else:
        execute(f"{into} VALUES ({values})", parameters)
        last = "last_insert_rowid()" if dialect == "sqlite" else "LAST_INSERT_ID()"
        found = execute(f"SELECT {last}", {})
    return row._replace(id=int(found[0][0]))


def _insert_in_order(
    execute: Execute, into: str, values: str, parameters: dict[str, Any], object_key: str | None
) -> Any:
    """On PostgreSQL: insert with the lock of the object, in one statement."""
    if object_key is not None:
        digest = hashlib.blake2b(f"{OUTBOX}:{object_key}".encode(), digest_size=8).digest()
        lock = {**parameters, "lock": int.from_bytes(digest, "big", signed=True)}
        locked = "pg_try_advisory_xact_lock(CAST(:lock AS bigint))"
        deadline = time.monotonic() + _ORDER_TIMEOUT
        pause = 0.001
        while True:
            # The lock is taken before the id: where the condition is false, nothing is inserted.
            found = execute(f"{into} SELECT {values} WHERE {locked} RETURNING id", lock)
            if found:
                return found
            if time.monotonic() > deadline:
                break
            time.sleep(pause)
            pause = min(0.02, pause * 2)
        log.warning(
            "The event %s '%s' is written after %g s without waiting any longer for another "
            "transaction with an event of the object %s: these two may leave in either order. Keep "
            "transactions that write events short, or let them lock the object's row first.",
            parameters["event_id"],
            parameters["routing_key"],
            _ORDER_TIMEOUT,
            shown(object_key),
            about=about(None, parameters["routing_key"], parameters["event_id"]),
        )
    return execute(f"{into} VALUES ({values}) RETURNING id", parameters)


class Page(NamedTuple):
    """What a fetch has leased, and how far it has looked."""

    rows: list[Row]
    #: The largest id that it has looked at; None if there was nothing to look at.
    last: int | None
    #: Whether there may be more.
    full: bool


def fetch(
    execute: Execute,
    dialect: str,
    token: str,
    lease: float,
    most: int,
    *,
    after: int = 0,
    only: str | None = None,
    without: Collection[str] = (),
    sent: Mapping[str, int] = MappingProxyType({}),
) -> Page:
    """Lease the oldest rows that may be sent: not parked, leased to nobody, next in their order.

    :param after: look only at larger ids. An id may be committed after larger ones, so whoever
        passes it has to look at all of them again.
    :param only: at this exchange only.
    :param without: not at these exchanges.
    :param sent: as `in_order` takes it.
    """
    leased_at = time.monotonic()
    parameters: dict[str, Any] = {f"x{n}": name for n, name in enumerate(without)}
    parameters["after"] = after
    exchanges = f" AND exchange NOT IN ({', '.join(f':x{n}' for n in range(len(without)))})"
    if not without:
        exchanges = ""
    if only is not None:
        exchanges, parameters = " AND exchange = :only", {"after": after, "only": only}
    now = clock(dialect)
    if dialect == "sqlite":
        # Before anything is read: a transaction that reads first cannot write after another one.
        execute(f"UPDATE {OUTBOX} SET token = NULL WHERE id < 0", {})
    size = "length" if dialect == "sqlite" else "octet_length"
    locking = "" if dialect == "sqlite" else " FOR UPDATE SKIP LOCKED"
    found = execute(
        f"SELECT id, object_key, {size}(body) FROM {OUTBOX} WHERE parked = 0 AND id > :after "
        f"AND leased_until < {now}{exchanges} AND (object_key IS NULL OR object_key NOT IN "
        f"(SELECT object_key FROM {OUTBOX} WHERE parked > 0 AND object_key IS NOT NULL)) "
        f"ORDER BY id LIMIT {int(most)}{locking}",
        parameters,
    )
    sizes = itertools.accumulate(int(size) for _, _, size in found)
    within = max(1, sum(size <= _MOST_BYTES for size in sizes))
    looked_at = [(int(number), key) for number, key, _ in found[:within]]
    if not looked_at:
        return Page([], None, False)
    ids = [number for number, _ in in_order(execute, looked_at, sent)]
    page = Page(
        _lease(execute, dialect, token, lease, ids) if ids else [],
        looked_at[-1][0],
        len(found) >= most or within < len(found),
    )
    return page._replace(rows=[row._replace(leased_at=leased_at) for row in page.rows])


def _lease(
    execute: Execute, dialect: str, token: str, lease: float, ids: Collection[int]
) -> list[Row]:
    among = _among(ids)
    update = (
        f"UPDATE {OUTBOX} SET token = :token, leased_until = {clock(dialect)} + :lease "
        f"WHERE {among}"
    )
    parameters = {"token": token, "lease": lease}
    if dialect == "postgresql":
        found = execute(f"{update} RETURNING {_COLUMNS}", parameters)
    else:
        execute(update, parameters)
        found = execute(f"SELECT {_COLUMNS} FROM {OUTBOX} WHERE {among}", {})
    return sorted(Row(*columns) for columns in found)


def in_order(
    execute: Execute,
    rows: Iterable[tuple[int, str | None]],
    sent: Mapping[str, int] = MappingProxyType({}),
) -> list[tuple[int, str | None]]:
    """Those of the rows (id, object key) of whose objects no older row exists besides them.

    :param sent: of objects, the id up to which their rows are known to be sent. Without it, the
        search passes every row of the object that PostgreSQL still keeps, though it is deleted.
    """
    rows = list(rows)
    keyed = [(number, key) for number, key in rows if key is not None]
    if not keyed:
        return rows
    lowest = keyed[0][0]
    recent = [
        (number, key)
        for number, key in keyed
        if key in sent and lowest - _RECENT < sent[key] < number
    ]
    first: dict[str, int] = {}
    if recent:
        first.update(_oldest_besides(execute, keyed, recent, min(sent[key] for _, key in recent)))
    if len(recent) < len(keyed):
        known = set(recent)
        others = [each for each in keyed if each not in known]
        first.update(_oldest_besides(execute, keyed, others, 0))
    return [
        (number, key) for number, key in rows if key is None or number < first.get(key, number + 1)
    ]


def _oldest_besides(
    execute: Execute, rows: list[tuple[int, str]], of: list[tuple[int, str]], after: int
) -> dict[str, int]:
    """Of the objects of some rows, the oldest row besides the rows, if there is one."""
    # The addition keeps PostgreSQL from looking for the minimum in the order of the primary key.
    found = execute(
        f"SELECT k.object_key, (SELECT MIN(o.id + 0) FROM {OUTBOX} o "
        f"WHERE o.object_key = k.object_key AND o.id > {int(after)} AND o.id < {rows[-1][0]} "
        f"AND o.id NOT IN ({_listed(number for number, _ in rows)})) FROM "
        f"(SELECT DISTINCT object_key FROM {OUTBOX} "
        f"WHERE {_among(number for number, _ in of)}) k",
        {},
    )
    return {key: int(number) for key, number in found if number is not None}


def renew(
    execute: Execute, dialect: str, token: str, ids: Collection[int], lease: float
) -> set[int]:
    """Renew leases; returns the ids of those that are still the token's."""
    if not ids:
        return set()
    among = _among(ids)
    execute(
        f"UPDATE {OUTBOX} SET leased_until = {clock(dialect)} + :lease "
        f"WHERE token = :token AND {among}",
        {"token": token, "lease": lease},
    )
    return held(execute, token, ids)


def held(execute: Execute, token: str, ids: Collection[int]) -> set[int]:
    """Those of the rows that exist, and are leased to the token."""
    if not ids:
        return set()
    found = execute(
        f"SELECT id FROM {OUTBOX} WHERE token = :token AND {_among(ids)}", {"token": token}
    )
    return {int(number) for (number,) in found}


def delete(execute: Execute, token: str, ids: Collection[int]) -> None:
    """Delete rows that were confirmed."""
    if ids:
        execute(f"DELETE FROM {OUTBOX} WHERE token = :token AND {_among(ids)}", {"token": token})


def release(execute: Execute, token: str, ids: Collection[int]) -> None:
    """End leases: anybody may send these."""
    if ids:
        execute(
            f"UPDATE {OUTBOX} SET token = NULL, leased_until = 0 "
            f"WHERE token = :token AND {_among(ids)}",
            {"token": token},
        )


def park(execute: Execute, dialect: str, token: str, number: int, error: str) -> None:
    """Set a row aside, with the reason, until `domain_events.outbox.retry` or ``discard``."""
    execute(
        f"UPDATE {OUTBOX} SET parked = {clock(dialect)}, error = :error, token = NULL, "
        f"leased_until = 0 WHERE token = :token AND {_among([number])}",
        {"token": token, "error": printable(error, _LONGEST_ERROR)},
    )


def _among(ids: Iterable[int]) -> str:
    return f"id IN ({_listed(ids)})"


def _listed(ids: Iterable[int]) -> str:
    # In the text of the statement: drivers limit the number of parameters.
    return ", ".join(str(int(number)) for number in ids)
