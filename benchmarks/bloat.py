"""The outbox beside a transaction that is open for long: ``python -m benchmarks --bloat``.

PostgreSQL keeps every row that is deleted while an older transaction has a snapshot, and a table
that is used as a queue is full of them soon. Here 20,000 events pass through the outbox while one
in REPEATABLE READ is open, and before and after that. Measured each time: how large the table is
with its indexes, how long a relay's fetch takes that finds nothing, the whole one and that of what
is new, how long an event takes from its commit to its confirm, and how fast a relay sends.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg
import sqlalchemy
from databases import PostgreSQL
from databases import install as install_databases
from rabbitmq_node import Node, install

from benchmarks import brokerside
from benchmarks.peers.driver import ROUTING_KEY, data_of
from benchmarks.running import say
from benchmarks.summary import short
from benchmarks.tables import Table
from domain_events import DomainEvent, Middleware, Outgoing, configure, outbox
from domain_events.outbox import OUTBOX
from domain_events.outbox.database import begin_fetch
from domain_events.outbox.rows import fetch
from domain_events.sqlalchemy import Outbox, outbox_table, publish_on_commit
from domain_events.sqlalchemy.outbox import executing

_FETCHES = 15
#: Events of which the time to the confirm is measured, and those that a relay sends at once.
_CONFIRMED = 500
_RELAYED = 5_000
#: The events are about so many objects, in turn.
_OBJECTS = 1000
#: Of one transaction, where many are written.
_AT_ONCE = 10
#: Seconds to wait for PostgreSQL's autovacuum, which looks once a minute.
_AUTOVACUUM = 180.0


@dataclass(frozen=True)
class State:
    """What was measured at one time; times are in seconds."""

    title: str
    size: int
    whole: float
    new: float
    confirmed: float
    rate: float


class _Confirms(Middleware):
    """When each event was confirmed."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}

    def publishing(self, outgoing: Outgoing) -> Callable[[BaseException | None], None]:
        assert outgoing.event is not None
        number = str(outgoing.event.uuid_string)

        def done(error: BaseException | None) -> None:
            if error is None:
                self.at[number] = time.perf_counter()

        return done


class _Outbox:
    """The measured outbox, with a courier and a relay of this process."""

    def __init__(self, server: PostgreSQL, node: Node) -> None:
        self.url = server.address.url
        self._confirms = _Confirms()
        configure(node.url, middleware=[self._confirms])
        self._engine = sqlalchemy.create_engine(server.address.sqlalchemy_url)
        self._outbox = Outbox(self._engine)
        self._numbers = 0
        metadata = sqlalchemy.MetaData()
        outbox_table(metadata)
        metadata.create_all(self._engine)

    def look(self, after: int) -> float:
        """Seconds of a fetch that finds nothing."""
        taken = []
        for _ in range(_FETCHES):
            with self._engine.begin() as connection:
                execute = executing(connection)
                begun = time.perf_counter()
                begin_fetch(execute, "postgresql")
                page = fetch(execute, "postgresql", str(uuid.uuid4()), 60.0, 1000, after=after)
                taken.append(time.perf_counter() - begun)
                assert not page.rows
        return statistics.median(taken)

    def confirm(self) -> float:
        """Seconds from the end of a commit to the confirm, through the courier."""
        taken = []
        for _ in range(_CONFIRMED):
            with self._engine.begin() as connection:
                event = publish_on_commit(
                    connection, ROUTING_KEY, *self._next(), outbox=self._outbox
                )
            committed = time.perf_counter()
            assert self._outbox.wait(60)
            taken.append(self._confirms.at[str(event.uuid_string)] - committed)
        return statistics.median(taken)

    def pass_through(self, count: int) -> float:
        """Write so many events and relay them; returns how many a second were relayed."""
        for _ in range(count // _AT_ONCE):
            with self._engine.begin() as connection:
                for _ in range(_AT_ONCE):
                    event = DomainEvent(ROUTING_KEY, *self._next())
                    outbox.write(executing(connection), "postgresql", event)
        with self._outbox.relay() as relay:
            begun = time.perf_counter()
            assert relay.sweep() == count
            return count / (time.perf_counter() - begun)

    def _next(self) -> tuple[Any, str]:
        """Data and object of the next event."""
        self._numbers += 1
        return data_of(self._numbers), f"user-{self._numbers % _OBJECTS}"

    def state(self, title: str) -> State:
        say(f"measuring: {title}")
        with psycopg.connect(self.url, autocommit=True) as connection:
            size = _one(connection, f"SELECT pg_total_relation_size('{OUTBOX}')")
            last = _one(connection, "SELECT last_value FROM domain_events_outbox_id_seq")
        return State(
            title,
            size,
            self.look(0),
            self.look(last),
            self.confirm(),
            self.pass_through(_RELAYED),
        )

    def close(self) -> None:
        outbox.close_couriers()
        self._engine.dispose()


def _one(connection: Any, sql: str) -> int:
    return int(connection.execute(sql).fetchone()[0])


def measure(release: str, events: int = 20_000) -> list[State]:
    """The states before, with and after an old transaction.

    :raises NodeError: a server cannot be started.
    """
    install([release])
    install_databases(["postgresql"])
    say(f"starting PostgreSQL and RabbitMQ ({release})")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(PostgreSQL())
        node = stack.enter_context(Node(release))
        brokerside.declare(node.url, "bench-bloat", "quorum")
        box = _Outbox(server, node)
        stack.callback(box.close)
        box.pass_through(1_000)  # connections, caches
        states = [box.state("at first")]
        more = f"{events:,} more events"
        _pass(box, events)
        _wait_for_autovacuum(box.url)
        states.append(box.state(f"{more}, and an autovacuum"))
        old = stack.enter_context(psycopg.connect(box.url))
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1 FROM pg_class LIMIT 1")
        _pass(box, events)
        states.append(box.state(f"{more}, beside a transaction that is still open"))
        old.rollback()
        _wait_for_autovacuum(box.url)
        states.append(box.state("it has ended, and an autovacuum"))
        _pass(box, events)
        _wait_for_autovacuum(box.url)
        states.append(box.state(f"{more}, and an autovacuum"))
        return states


def _pass(box: _Outbox, events: int) -> None:
    say(f"{events:,} events pass")
    for _ in range(events // 1_000):
        box.pass_through(1_000)


def _wait_for_autovacuum(url: str) -> None:
    """Until one has ended from now on."""
    say("waiting for an autovacuum")
    sql = (
        f"SELECT count(*) FROM pg_stat_user_tables WHERE relname = '{OUTBOX}' "
        "AND last_autovacuum > to_timestamp({})"
    )
    with psycopg.connect(url, autocommit=True) as connection:
        begun = time.time()
        deadline = time.monotonic() + _AUTOVACUUM
        while not _one(connection, sql.format(begun)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no autovacuum within {_AUTOVACUUM:g} s")
            time.sleep(0.5)


def table(states: list[State]) -> Table:
    head = (
        "",
        "table and indexes, MiB",
        "whole fetch, ms",
        "fetch of what is new, ms",
        "commit to confirm p50, ms",
        "relay, events/s",
    )
    rows = tuple(
        (
            each.title,
            short(each.size / 2**20),
            *(short(seconds * 1e3) for seconds in (each.whole, each.new, each.confirmed)),
            short(each.rate),
        )
        for each in states
    )
    return Table("The outbox beside a long transaction", head, rows)
