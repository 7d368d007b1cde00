"""The outbox: what is committed is published, in the order of the commits; the rest never is."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onlooker
import outbox_databases
import outbox_kills as kills
import pytest
from outbox_databases import DbApi
from rabbitmq_node import Node
from support import Names, sooner_than, wait_until

from domain_events import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEvent,
    EventNotConfirmed,
    InvalidEvent,
    Middleware,
    Operation,
    Outgoing,
    Subscriber,
    TopologyError,
    configure,
    outbox,
)
from domain_events.outbox import ORDER_INDEX, OUTBOX, Courier, Execute, Relay, Written
from domain_events.retry import LONGEST_DELAY
from domain_events.testing import EventBroker

DIALECTS = ["sqlite", "postgresql", "mariadb"]


def _database(request: pytest.FixtureRequest, kind: str, folder: Path) -> DbApi:
    if kind == "sqlite":
        return outbox_databases.sqlite(str(folder / "outbox.sqlite")).create()
    return outbox_databases.at(request.getfixturevalue(kind)).create()


@pytest.fixture(params=DIALECTS)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DbApi]:
    """On each kind of database, with empty tables."""
    with _database(request, request.param, tmp_path) as database:
        yield database
        outbox.close_couriers()


@pytest.fixture
def sqlite(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DbApi]:
    """Where the kind of database does not matter."""
    with _database(request, "sqlite", tmp_path) as database:
        yield database
        outbox.close_couriers()


@pytest.fixture
def postgres(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DbApi]:
    """Where it has to be PostgreSQL."""
    with _database(request, "postgresql", tmp_path) as database:
        yield database
        outbox.close_couriers()


@pytest.fixture
def broker() -> Iterator[EventBroker]:
    with EventBroker(virtual_time=False) as broker:
        yield broker


@pytest.fixture
def relay(database: DbApi) -> Iterator[Relay]:
    with Relay(database) as relay:
        yield relay


def write(database: DbApi, *events: DomainEvent, **options: Any) -> list[Written]:
    """Write events in a transaction, and commit it."""
    with database.application() as (connection, execute):
        written = [outbox.write(execute, database.dialect, event, **options) for event in events]
        connection.commit()
    return written


def about(key: object, number: int) -> DomainEvent:
    return DomainEvent("thing.changed", {"number": number}, key)  # type: ignore[arg-type]


def abouts(key: object, numbers: range) -> list[DomainEvent]:
    return [about(key, number) for number in numbers]


def take(courier: Courier, written: list[Written]) -> None:
    courier.take(each.row for each in written)


def rows(database: DbApi) -> int:
    return int(database.run(f"SELECT COUNT(*) FROM {OUTBOX}")[0][0])


def numbers(events: list[DomainEvent], key: object) -> list[int]:
    """The numbers of one object's events, without duplicates, in the order of the first copies."""
    found = dict.fromkeys(event.data["number"] for event in events if event.domain_object_id == key)
    return list(found)


def end_leases(database: DbApi) -> None:
    """As time would."""
    database.run(f"UPDATE {OUTBOX} SET leased_until = 1 WHERE leased_until > 1")


class Seen(Middleware):
    """Notes what goes out, and what became of it."""

    def __init__(self) -> None:
        self.outgoing: list[Outgoing] = []
        self.results: list[tuple[Operation, BaseException | None]] = []

    def publishing(self, outgoing: Outgoing) -> Callable[[BaseException | None], None]:
        self.outgoing.append(outgoing)
        return lambda error: self.results.append((outgoing.operation, error))

    @property
    def operations(self) -> list[Operation]:
        return [outgoing.operation for outgoing in self.outgoing]


class Stops(Middleware):
    """Holds the first event up, as a process that is paused while it sends."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def publishing(self, outgoing: Outgoing) -> None:
        if not self.reached.is_set():
            self.reached.set()
            assert self.go_on.wait(60)


# --- writing -------------------------------------------------------------------------------------


def test_what_is_committed_is_published_and_nothing_else(
    database: DbApi, relay: Relay, broker: EventBroker
) -> None:
    with database.application() as (connection, execute):
        outbox.write(execute, database.dialect, about("a", 1))
        connection.rollback()
        outbox.write(execute, database.dialect, about("a", 2))
        execute("SAVEPOINT s", {})
        outbox.write(execute, database.dialect, about("a", 3))
        execute("ROLLBACK TO SAVEPOINT s", {})
        written = outbox.write(execute, database.dialect, about("a", 4))
        assert relay.sweep() == 0
        connection.commit()
    assert relay.sweep() == 2
    assert numbers(broker.published, "a") == [2, 4]
    assert broker.published[1] == written.event
    assert rows(database) == 0
    assert relay.sweep() == 0


def test_event_is_sent_as_it_was_when_it_was_written(database: DbApi, broker: EventBroker) -> None:
    """Its data, headers, cause, correlation and program, by another program, much later."""

    class Adds(Seen):
        def publishing(self, outgoing: Outgoing) -> Any:
            done = super().publishing(outgoing)
            outgoing.headers["at"] = str(outgoing.operation)
            outgoing.headers.setdefault("by", str(outgoing.operation))
            return done

    received: list[DomainEvent] = []
    app_ids: list[str | None] = []
    seen = Adds()
    data = {"name": "Grüße \0 \U0001f600", "number": 1}

    def handle(event: DomainEvent) -> None:
        if event.routing_key == "order.placed":
            follow_up = DomainEvent("order.paid", data, "o1", version=3, headers={"tenant": "x"})
            written.extend(write(database, follow_up))
            data["name"] = "changed"
        else:
            received.append(event)

    written: list[Written] = []
    configure(app_id="shop", middleware=[seen])
    try:
        subscriber = Subscriber()
        subscriber.register(handle, "shop", ["order.*"])
        placed = DomainEvent("order.placed", {}, correlation_id="c")
        broker.deliver(subscriber, placed)
        configure(app_id="the relay", middleware=[seen])
        with Relay(database) as relay:
            assert relay.sweep() == 1
        broker.deliver(subscriber)
    finally:
        configure()
    (event,) = received
    assert event == written[0].event or event.data["name"] == "Grüße \0 \U0001f600"
    assert event.data == {"name": "Grüße \0 \U0001f600", "number": 1}
    assert (event.cause, event.correlation_id, event.version) == (placed.uuid_string, "c", 3)
    assert event.headers == {"tenant": "x", "at": "outbox", "by": "outbox"}
    assert seen.operations[-2:] == [Operation.OUTBOX, Operation.RELAY]
    assert seen.results[-2:] == [(Operation.OUTBOX, None), (Operation.RELAY, None)]
    assert written[0].event.headers == {"tenant": "x", "at": "outbox", "by": "outbox"}
    assert not app_ids


def test_program_that_wrote_an_event_is_its_app_id(
    sqlite: DbApi, broker_url: str, queue: str, exchange: str
) -> None:
    configure(broker_url, app_id="shop")
    try:
        write(sqlite, DomainEvent("a"), exchange=exchange)
        configure(broker_url, app_id="relay")
        with Relay(sqlite) as relay:
            assert relay.sweep() == 1
    finally:
        configure()
    properties, _ = onlooker.take(broker_url, queue)
    assert properties.app_id == "shop"


@pytest.mark.parametrize(
    "event",
    [DomainEvent("a", float("nan")), DomainEvent("", {}), DomainEvent("a", headers={"x-a": 1})],
    ids=["data", "routing key", "headers"],
)
def test_event_that_can_never_be_sent_is_an_error_where_it_is_written(
    database: DbApi, event: DomainEvent
) -> None:
    with database.application() as (connection, execute):
        with pytest.raises(InvalidEvent):
            outbox.write(execute, database.dialect, event)
        outbox.write(execute, database.dialect, DomainEvent("good"))
        connection.commit()
    assert rows(database) == 1


def test_middleware_is_given_the_error_of_an_insert_that_fails(
    sqlite: DbApi, broker: EventBroker
) -> None:
    seen = Seen()
    sqlite.run(f"DROP TABLE {OUTBOX}")
    with pytest.raises(Exception, match="no such table"):
        write(sqlite, DomainEvent("a"), middleware=[seen])
    ((operation, error),) = seen.results
    assert operation is Operation.OUTBOX
    assert "no such table" in str(error)


def test_nothing_is_written_while_publishing_is_switched_off(sqlite: DbApi) -> None:
    """And what was written before stays, whatever relays think of it."""
    write(sqlite, DomainEvent("before"))
    configure(None)
    try:
        assert write(sqlite, DomainEvent("a"))[0].row is None
        with Relay(sqlite) as relay, pytest.raises(ConfigurationError, match="switched off"):
            relay.sweep()
    finally:
        configure()
    assert rows(sqlite) == 1


@pytest.mark.parametrize("key", ["a" * 300, "nul \0", "\ud800", " a ", "Straße", 17, ""])
def test_any_id_is_the_key_of_an_order(database: DbApi, relay: Relay, key: Any) -> None:
    with EventBroker(virtual_time=False) as broker:
        write(database, *abouts(key, range(3)))
        relay.sweep()
        assert numbers(broker.published, key) == [0, 1, 2]


# --- order ---------------------------------------------------------------------------------------


def test_transactions_with_the_same_object_commit_in_the_order_of_their_events(
    postgres: DbApi, broker: EventBroker
) -> None:
    """The second one waits, so that a relay that comes between the commits misses nothing."""
    done: list[str] = []
    with Relay(postgres) as relay, postgres.application() as (connection, execute):
        outbox.write(execute, "postgresql", about("a", 1))

        def second() -> None:
            write(postgres, about("a", 2))
            done.append("second")

        thread = threading.Thread(target=second)
        thread.start()
        write(postgres, about("b", 1))  # waits for nobody
        # Time to go wrong: nothing that could be waited for must happen before the commit.
        time.sleep(0.3)
        assert relay.sweep() == 1
        assert not done
        connection.commit()
        thread.join(30)
        assert done
        relay.sweep()
    assert numbers(broker.published, "a") == [1, 2]


def test_transaction_waits_a_few_seconds_and_never_for_ever(
    postgres: DbApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two transactions that would wait for each other both go on."""
    from domain_events.outbox import rows as table

    monkeypatch.setattr(table, "_ORDER_TIMEOUT", 0.2)
    with postgres.application() as (one, first), postgres.application() as (other, second):
        outbox.write(first, "postgresql", about("a", 1))
        outbox.write(second, "postgresql", about("b", 1))
        outbox.write(first, "postgresql", about("b", 2))
        outbox.write(second, "postgresql", about("a", 2))
        one.commit()
        other.commit()
    assert rows(postgres) == 4
    assert caplog.text.count("without waiting any longer") == 2


@pytest.fixture(params=["postgresql", "mariadb"])
def locking(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DbApi]:
    """A database whose relays share the work."""
    with _database(request, request.param, tmp_path) as database:
        yield database


def test_event_that_is_committed_after_one_with_a_larger_id_is_not_passed(
    locking: DbApi, broker: EventBroker
) -> None:
    """By a relay that runs all the time, and has looked beyond it."""
    with Relay(locking, idle=0.05) as relay, locking.application() as (connection, execute):
        outbox.write(execute, locking.dialect, about("a", 1))
        relay.start()
        for number in range(3):
            write(locking, about("b", number))
            wait_until(lambda: len(broker.published) == number + 1)  # noqa: B023
        connection.commit()
        wait_until(lambda: numbers(broker.published, "a") == [1])
    assert rows(locking) == 0


def test_rows_that_another_relay_is_locking_are_not_overtaken(
    locking: DbApi, broker: EventBroker
) -> None:
    """With SKIP LOCKED alone the second relay would get row 11."""
    from domain_events.outbox import rows as table
    from domain_events.outbox.database import begin_fetch, check_dialect

    dialect = check_dialect(locking.dialect)
    write(locking, *abouts("a", range(20)), about("b", 1), DomainEvent("no.object"))
    with Relay(locking) as relay:
        with locking.application() as (connection, execute):
            begin_fetch(execute, dialect)
            page = table.fetch(execute, dialect, "t", 60.0, 10)  # and pauses, uncommitted
            assert len(page.rows) == 10
            assert relay.sweep() == 2
            assert numbers(broker.published, "a") == []
            connection.commit()
        assert relay.sweep() == 0
        end_leases(locking)
        assert relay.sweep() == 20
    assert numbers(broker.published, "a") == list(range(20))


def test_relay_takes_over_from_one_that_is_paused_and_keeps_the_order(
    database: DbApi, broker: EventBroker
) -> None:
    """The paused one, when it goes on, deletes nothing, and sends copies of what it had begun."""
    write(database, *abouts("a", range(10)))
    stops = Stops()
    with (
        Relay(database, batch=5, lease=1.5, timeout=1, middleware=[stops]) as paused,
        Relay(database) as other,
    ):
        paused.start()
        assert stops.reached.wait(30)
        write(database, *abouts("a", range(10, 12)), about("b", 0))
        other.sweep()
        assert [event.domain_object_id for event in broker.published] == ["b"]
        wait_until(lambda: other.sweep() == 12, message="the leases have run out")
        assert numbers(broker.published, "a") == list(range(12))
        write(database, about("a", 12))
        stops.go_on.set()
        wait_until(lambda: rows(database) == 0)
    copies = [event.data["number"] for event in broker.published if event.domain_object_id == "a"]
    assert numbers(broker.published, "a") == list(range(13))
    assert sorted(copies) == sorted([*range(13), 0])  # one was under way


class Refuses(Middleware):
    """No broker, now and then."""

    calls = 0

    def publishing(self, outgoing: Outgoing) -> None:
        self.calls += 1
        if self.calls % 17 == 0:
            raise BrokerUnavailable("for a moment")


def change_things(database: DbApi, courier: Courier, first: int, things: int, times: int) -> None:
    """Transactions, of which some are rolled back, and some are followed by the process's death."""
    with database.application() as (connection, execute):
        for step in range(times):
            thing = {"id": (step * 7 + first) % things}
            execute("UPDATE things SET version = version + 1 WHERE id = :id", thing)
            ((version,),) = execute("SELECT version FROM things WHERE id = :id", thing)
            event = about(thing["id"], version)
            written = outbox.write(execute, database.dialect, event, courier=courier)
            if step % 5 == 4:
                connection.rollback()
                continue
            connection.commit()
            if step % 3:
                take(courier, [written])


def test_each_object_has_its_order_with_many_relays_and_couriers(
    database: DbApi, broker: EventBroker
) -> None:
    things, times, threads = 4, 40, 4
    database.run(
        "CREATE TABLE things (id integer PRIMARY KEY, version integer NOT NULL)",
        *(f"INSERT INTO things VALUES ({number}, 0)" for number in range(things)),
    )
    couriers = [Courier(database, middleware=[Refuses()]) for _ in range(2)]
    relays = [Relay(database, batch=7, idle=0.02, middleware=[Refuses()]) for _ in range(2)]
    for each in relays:
        each.start()
    with ThreadPoolExecutor(threads) as pool:
        running = [
            pool.submit(change_things, database, couriers[number % 2], number, things, times)
            for number in range(threads)
        ]
        for future in running:
            future.result(120)

    def all_sent() -> bool:
        end_leases_of_the_dead(database, [courier.token for courier in couriers])
        return rows(database) == 0

    wait_until(all_sent, 60)
    for courier in couriers:
        courier.close()
    for each in relays:
        each.close()
    for thing, last in database.run("SELECT id, version FROM things"):
        assert numbers(broker.published, thing) == list(range(1, last + 1))


def end_leases_of_the_dead(database: DbApi, tokens: list[str]) -> None:
    """Of rows that a courier was never given; 30 s would be long for a test."""
    among = ", ".join(f"'{token}'" for token in tokens)
    database.run(
        f"UPDATE {OUTBOX} SET leased_until = 1 WHERE leased_until > 1 AND token IN ({among})"
    )


# --- what cannot be sent -------------------------------------------------------------------------


def test_row_that_cannot_be_sent_is_parked_and_holds_up_its_own_object_only(
    database: DbApi, relay: Relay, broker: EventBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """Until somebody lets it be sent again."""
    written = write(database, about("b", 0), *abouts("a", range(3)), DomainEvent("no.object"))
    bad = written[1].row
    assert bad is not None
    database.run(f"UPDATE {OUTBOX} SET body = '[]' WHERE id = {bad.id}")
    assert relay.sweep() == 2
    write(database, *abouts("a", range(3, 5)), about("b", 1))
    assert relay.sweep() == 1
    assert numbers(broker.published, "a") == []
    assert numbers(broker.published, "b") == [0, 1]
    assert f"row {bad.id} of the outbox in {database.name} is parked" in caplog.text
    assert (relay.status().waiting, relay.status().parked) == (4, 1)

    with database.transaction() as execute:
        (parked,) = outbox.parked(execute)
    assert (parked.id, parked.row.event_id) == (bad.id, written[1].event.uuid_string)
    assert "the JSON must be an object" in parked.error
    assert abs(parked.parked - time.time()) < 60
    with database.transaction() as execute:
        assert outbox.retry(execute) == 1  # nothing was mended
    assert relay.sweep() == 0
    database.run(f"UPDATE {OUTBOX} SET body = '{bad.body}' WHERE id = {bad.id}")
    with database.transaction() as execute:
        assert outbox.retry(execute, [bad.id, bad.id + 1]) == 1
    assert relay.sweep() == 5
    assert numbers(broker.published, "a") == list(range(5))
    assert rows(database) == 0


def test_discarded_row_is_returned_and_lets_its_object_go_on(
    database: DbApi, relay: Relay, broker: EventBroker
) -> None:
    written = write(database, *abouts("a", range(3)))
    row = written[0].row
    assert row is not None
    database.run(f"UPDATE {OUTBOX} SET details = 'no' WHERE id = {row.id}")
    relay.sweep()
    with database.transaction() as execute:
        assert outbox.discard(execute, []) == []
        assert outbox.discard(execute, [row.id + 1]) == []  # it is not parked
        (gone,) = outbox.discard(execute, [row.id])
    assert json.loads(gone.row.body)["data"] == {"number": 0}
    relay.sweep()
    assert numbers(broker.published, "a") == [1, 2]


@pytest.mark.parametrize(
    ("first", "second"), [("retry", "retry"), ("retry", "discard"), ("discard", "retry")]
)
def test_of_two_operators_at_the_same_time_one_decides(
    database: DbApi, relay: Relay, broker: EventBroker, first: str, second: str
) -> None:
    """The other one is given none of the rows, whatever it would have done with them."""
    write(database, about("a", 1))
    ((number,),) = database.run(f"SELECT id FROM {OUTBOX}")
    database.run(f"UPDATE {OUTBOX} SET parked = 1, error = 'e'")
    decide: dict[str, Callable[[Execute], int]] = {
        "retry": lambda execute: outbox.retry(execute, [number]),
        "discard": lambda execute: len(outbox.discard(execute, [number])),
    }

    def operator() -> int:
        with database, database.transaction() as execute:
            return decide[second](execute)

    with ThreadPoolExecutor() as threads:
        with database.application() as (connection, execute):
            assert decide[first](execute) == 1
            other = threads.submit(operator)
            # Time to go wrong: the other one must wait, so there is nothing to wait for here.
            time.sleep(0.3)
            connection.commit()
        assert other.result(60) == 0
    assert relay.sweep() == (1 if first == "retry" else 0)
    assert rows(database) == 0


def test_each_parked_row_is_decided_about_once_beside_a_relay(
    database: DbApi, broker: EventBroker
) -> None:
    """By one of two operators; it is then sent, or discarded, and never both."""
    refused: set[str] = set()
    number = 40

    class FailsOnce(Middleware):
        def publishing(self, outgoing: Outgoing) -> None:
            assert outgoing.event is not None
            event_id = outgoing.event.uuid_string
            if event_id not in refused:
                refused.add(event_id)
                raise LookupError

    written = write(database, *(about(each, each) for each in range(number)))
    retried: list[int] = []
    discarded: list[str] = []

    def operator(decide: Callable[[Execute], Callable[[], None]]) -> None:
        with database:
            deadline = time.monotonic() + 60
            while rows(database) and time.monotonic() < deadline:
                try:
                    with database.transaction() as execute:
                        committed = decide(execute)
                except Exception as error:
                    if not outbox.lost_a_race(error):  # MariaDB's deadlocks: nothing was decided
                        raise
                else:
                    committed()

    def retry(execute: Execute) -> Callable[[], None]:
        number = outbox.retry(execute)
        return lambda: retried.append(number)

    def discard(execute: Execute) -> Callable[[], None]:
        ids = [each.row.id for each in written if each.row]
        gone = [each.row.event_id for each in outbox.discard(execute, random.sample(ids, 5))]
        return lambda: discarded.extend(gone)

    with (
        Relay(database, middleware=[FailsOnce()], batch=5, idle=0.01) as relay,
        ThreadPoolExecutor() as threads,
    ):
        relay.start()
        for future in [threads.submit(operator, each) for each in (retry, discard)]:
            future.result(90)
    assert rows(database) == 0
    published = [event.uuid_string for event in broker.published]
    assert sum(retried) == len(published)
    assert sorted([*published, *discarded]) == sorted(each.event.uuid_string for each in written)


def test_event_that_the_broker_refuses_is_parked(
    sqlite: DbApi, broker_url: str, names: Names
) -> None:
    """A queue is full: no later event of the object gets in before it, however many are read."""
    exchange, other, queue = names.exchange(), names.exchange("other"), names.queue()
    full = {"x-max-length": 2, "x-overflow": "reject-publish"}
    onlooker.bind_queue(broker_url, queue, exchange, "#", **full)
    write(sqlite, *abouts("a", range(5)), exchange=exchange)
    write(sqlite, about("b", 0), exchange=other)
    with Relay(sqlite, broker_url) as relay:
        assert relay.sweep() == 3  # it is full with two
        with sqlite.transaction() as execute:
            (parked,) = outbox.parked(execute)
            assert parked.error.startswith("domain_events.errors.EventRejected: ")
        assert len(onlooker.take_all(broker_url, queue)) == 2
        assert relay.sweep() == 0  # and still waits for somebody
        with sqlite.transaction() as execute:
            outbox.retry(execute)
        assert relay.sweep() == 2
    left = [json.loads(body)["data"]["number"] for body in onlooker.take_all(broker_url, queue)]
    assert left == [2, 3]


def test_event_that_is_larger_than_the_broker_takes_is_parked_alone(
    sqlite: DbApi, node_factory: Callable[..., Node], unique: str
) -> None:
    """The broker closes the channel, and does not say over which event; all the others are sent."""
    node = node_factory(config="max_message_size = 100000")
    node.start()
    onlooker.bind_queue(node.url, unique, unique, "#")

    def large(key: str) -> list[DomainEvent]:
        others = [about(f"{key} {number}", number) for number in range(20)]
        return [about(key, 0), DomainEvent("x", "x" * 200_000, key), about(key, 1), *others]

    courier = Courier(sqlite, node.url)
    with Relay(sqlite, node.url) as relay:
        take(courier, write(sqlite, *large("a"), exchange=unique, courier=courier))
        assert courier.wait(60)
        write(sqlite, *large("b"), exchange=unique)
        relay.sweep()
        with sqlite.transaction() as execute:
            parked = outbox.parked(execute)
            assert [each.row.object_key for each in parked] == ["a", "b"]
            for each in parked:
                assert re.search("InvalidEvent: .*larger than", each.error)
                assert len(each.error) < 1000
        assert rows(sqlite) == 4  # each with the one that waits for it
        assert onlooker.count(node.url, unique) == 42
        with sqlite.transaction() as execute:
            outbox.discard(execute, [each.id for each in parked])
        assert relay.sweep() == 2
    courier.close()


def test_middleware_that_fails_parks_the_event_that_it_fails_on(
    sqlite: DbApi, broker: EventBroker
) -> None:
    class Fails(Middleware):
        def publishing(self, outgoing: Outgoing) -> None:
            if outgoing.event is not None and outgoing.event.data["number"] == 1:
                raise LookupError("one")

    write(sqlite, *(about(key, number) for number in range(3) for key in "abc"))
    configure(middleware=[Fails()])
    try:
        with Relay(sqlite) as relay:
            assert relay.sweep() == 3
            assert relay.status().parked == 3
    finally:
        configure()


# --- outages -------------------------------------------------------------------------------------


def test_outage_parks_and_deletes_nothing_and_ends_by_itself(
    database: DbApi, killable_node: Node, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    """However old the rows are, and however long it takes."""
    exchange, queue = f"{unique}-x", f"{unique}-q"
    onlooker.bind_queue(killable_node.url, queue, exchange, "#")
    killable_node.stop()
    write(database, *abouts("a", range(200)), exchange=exchange)
    database.run(f"UPDATE {OUTBOX} SET created = created - 9000000")
    with Relay(database, killable_node.url, timeout=0.5, idle=0.1) as relay:
        with pytest.raises(BrokerUnavailable):
            relay.sweep()
        relay.start()
        wait_until(lambda: len(relay.status().failures) == 1)
        # Time to go wrong, in several attempts: what is promised is that nothing happens.
        time.sleep(2)
        status = relay.status()
        assert (status.waiting, status.parked) == (200, 0)
        assert 9_000_000 <= status.oldest < 9_000_100
        killable_node.start()
        wait_until(lambda: rows(database) == 0, 60)
        wait_until(lambda: not relay.status().failures)
        assert relay.status().sent == 200
    bodies = onlooker.take_all(killable_node.url, queue)
    received = dict.fromkeys(json.loads(body)["data"]["number"] for body in bodies)
    assert list(received) == list(range(200))
    onlooker.delete(killable_node.url, queues=[queue], exchanges=[exchange])
    assert "publishes to the exchange" in caplog.text


def test_exchange_that_cannot_be_used_does_not_hold_up_another(
    sqlite: DbApi, broker_url: str, names: Names
) -> None:
    wrong, exchange = names.exchange("wrong"), names.exchange()
    onlooker.declare_exchange(broker_url, wrong, "fanout")
    write(sqlite, DomainEvent("a"), exchange=wrong)
    write(sqlite, DomainEvent("b"), exchange=exchange)
    with Relay(sqlite, broker_url, idle=0.05) as relay:
        with pytest.raises(TopologyError):
            relay.sweep()
        assert rows(sqlite) == 1
        relay.start()
        wait_until(lambda: wrong in relay.status().failures)
        write(sqlite, DomainEvent("b"), exchange=exchange)
        wait_until(lambda: rows(sqlite) == 1)
        assert relay.status().parked == 0
        onlooker.delete(broker_url, exchanges=[wrong])
        wait_until(lambda: rows(sqlite) == 0, 60)


def test_relay_survives_a_restart_of_the_database(
    request: pytest.FixtureRequest,
    postgres: DbApi,
    broker: EventBroker,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = request.getfixturevalue("postgresql_server")
    with Relay(postgres, idle=0.05) as relay:
        relay.start()
        write(postgres, about("a", 0))
        wait_until(lambda: rows(postgres) == 0)
        server.kill()
        wait_until(lambda: "cannot be used" in caplog.text)
        server.start()
        write(postgres, about("a", 1))
        wait_until(lambda: rows(postgres) == 0, 60)
    assert numbers(broker.published, "a") == [0, 1]


# --- the courier ---------------------------------------------------------------------------------


def test_event_leaves_right_after_the_commit(database: DbApi, broker: EventBroker) -> None:
    """Without a relay, and the transaction's thread waits for nothing."""
    courier = outbox.courier(database)
    for number in range(20):
        take(courier, write(database, about("a", number), about(None, number), courier=courier))
    assert courier.wait(30)
    assert rows(database) == 0
    assert numbers(broker.published, "a") == list(range(20))
    assert numbers(broker.published, None) == list(range(20))
    assert outbox.courier(database) is courier


def test_row_of_a_courier_is_not_sent_by_a_relay_meanwhile(
    database: DbApi, relay: Relay, broker: EventBroker
) -> None:
    """But when the process has died, after its lease; the next event of its object waits."""
    courier = Courier(database)
    written = write(database, about("a", 1), courier=courier)
    write(database, about("a", 2), about("b", 1))
    assert relay.sweep() == 1
    assert numbers(broker.published, "a") == []
    end_leases(database)
    assert relay.sweep() == 2
    take(courier, written)  # too late: its lease is gone
    assert courier.wait(30)
    assert numbers(broker.published, "a") == [1, 2]
    courier.close()


def test_courier_that_has_slept_does_not_send_what_was_taken_over(
    database: DbApi, relay: Relay, broker: EventBroker
) -> None:
    courier = Courier(database)
    (written,) = write(database, DomainEvent("a"), courier=courier)
    assert written.row is not None
    end_leases(database)
    assert relay.sweep() == 1
    courier.take([written.row._replace(leased_at=written.row.leased_at - 60)])
    assert courier.wait(30)
    assert len(broker.published) == 1
    courier.close()


def test_courier_sends_nothing_of_a_transaction_that_was_rolled_back(
    database: DbApi, relay: Relay, broker: EventBroker
) -> None:
    """Even if it was told to: MySQL rolls back by itself after a deadlock."""
    courier = Courier(database)
    events = [about("a", 1), DomainEvent("b")]
    with database.application() as (connection, execute):
        lost = [outbox.write(execute, database.dialect, event, courier=courier) for event in events]
        connection.rollback()
    take(courier, lost)
    assert courier.wait(30)
    assert relay.sweep() == 0
    assert broker.published == []
    courier.close()


def test_courier_waits_for_an_older_event_of_another_process(
    database: DbApi, relay: Relay, broker: EventBroker
) -> None:
    one, other = Courier(database), Courier(database)
    first = write(database, about("a", 1), courier=one)
    take(other, write(database, about("a", 2), courier=other))
    take(other, write(database, about("b", 1), courier=other))
    wait_until(lambda: numbers(broker.published, "b") == [1])
    assert numbers(broker.published, "a") == []
    take(one, first)
    assert one.wait(30)
    assert other.wait(30)
    # Within a second it went itself; on a busy machine it has left it to a relay.
    relay.sweep()
    assert numbers(broker.published, "a") == [1, 2]
    # If the older one is not sent in time, it is left to a relay, whose lease is then free.
    write(database, about("a", 3), courier=one)
    take(other, write(database, about("a", 4), courier=other))
    assert other.wait(30)
    found = database.run(f"SELECT token, leased_until FROM {OUTBOX} ORDER BY id")
    assert [token for token, _ in found] == [one.token, None]
    assert found[1][1] == 0
    one.close()
    other.close()


def test_courier_leaves_its_rows_to_a_relay_at_once_when_there_is_no_broker(
    database: DbApi, unused_port: int, broker_url: str, exchange: str
) -> None:
    """And the transaction's thread does not wait for one."""
    courier = Courier(database, f"amqp://127.0.0.1:{unused_port}", timeout=0.5)
    with sooner_than(60):
        take(courier, write(database, *abouts("a", range(3)), courier=courier, exchange=exchange))
    assert courier.wait(30)
    assert [row for (row,) in database.run(f"SELECT token FROM {OUTBOX}")] == [None] * 3
    # For a while it does not even try.
    with sooner_than(60):
        take(courier, write(database, about("a", 3), courier=courier, exchange=exchange))
        assert courier.wait(30)
    with Relay(database, broker_url) as relay:
        assert relay.sweep() == 4
    courier.close()


def test_courier_gives_up_as_soon_as_it_knows_that_the_broker_is_away(
    sqlite: DbApi, unused_port: int
) -> None:
    """Not only after its timeout, and not once for each exchange."""
    courier = Courier(sqlite, f"amqp://127.0.0.1:{unused_port}", lease=600, timeout=120)
    with sooner_than(120):
        for number in range(3):
            written = write(sqlite, about("a", number), courier=courier, exchange=f"x{number}")
            take(courier, written)
        assert courier.wait(60)
    assert [row for (row,) in sqlite.run(f"SELECT token FROM {OUTBOX}")] == [None] * 3
    courier.close()


def test_courier_leaves_its_rows_to_a_relay_while_the_broker_accepts_nothing(
    sqlite: DbApi, killable_node: Node, exchange: str
) -> None:
    courier = Courier(sqlite, killable_node.url, lease=600, timeout=120)
    take(courier, write(sqlite, about("a", 0), courier=courier, exchange=exchange))
    assert courier.wait(60)
    assert rows(sqlite) == 0
    killable_node.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        # A broker informs a connection that it is blocked when that publishes.
        (publisher,) = courier._sender._publishers.values()
        with pytest.raises(EventNotConfirmed):
            publisher.publish(DomainEvent("a"), timeout=1)
        wait_until(lambda: publisher.health().blocked)
        with sooner_than(120):
            take(courier, write(sqlite, about("a", 1), courier=courier, exchange=exchange))
            assert courier.wait(60)
        assert [row for (row,) in sqlite.run(f"SELECT token FROM {OUTBOX}")] == [None]
    finally:
        killable_node.ctl("set_vm_memory_high_watermark", "0.6")
        courier.close()


def test_courier_that_is_closed_in_an_outage_leaves_nothing_open_and_loses_nothing(
    sqlite: DbApi, broker_url: str, exchange: str, queue: str
) -> None:
    """A host that accepts connections, and never answers on them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        courier = Courier(
            sqlite, f"amqp://127.0.0.1:{server.getsockname()[1]}", lease=600, timeout=120
        )
        before = set(threading.enumerate())
        written = write(sqlite, *abouts("a", range(3)), courier=courier, exchange=exchange)
        take(courier, written)
        wait_until(lambda: any("publishing" in each.name for each in threading.enumerate()))
        with sooner_than(60):
            courier.close(1.0)
        wait_until(lambda: not set(threading.enumerate()) - before)
        take(courier, written)  # too late: nothing is opened again
        assert not set(threading.enumerate()) - before
    with Relay(sqlite, broker_url) as relay:
        assert relay.sweep() == 3
    assert onlooker.count(broker_url, queue) == 3


def test_lease_of_a_courier_is_an_option(sqlite: DbApi) -> None:
    courier = outbox.courier(sqlite, lease=600, timeout=20)
    assert outbox.courier(sqlite, lease=600, timeout=20) is courier
    assert outbox.courier(sqlite) is not courier
    write(sqlite, about("a", 1), courier=courier)
    ((leased,),) = sqlite.run(f"SELECT leased_until - created FROM {OUTBOX}")
    assert 599 < leased < 601


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lease": 10}, "lease must be longer than the timeout, which is 10 s, and at most 3600 s"),
        ({"timeout": 30}, "lease must be longer than the timeout, which is 30 s"),
        ({"lease": 3601}, "at most 3600 s, not 3601"),
        ({"lease": "30"}, "lease must be a positive number of seconds, not '30'"),
        ({"timeout": 0}, "timeout must be a positive number of seconds, not 0"),
    ],
)
def test_options_of_a_courier_that_cannot_work_are_errors(
    sqlite: DbApi, options: dict[str, Any], words: str
) -> None:
    for make in (Courier, outbox.courier):
        with pytest.raises(ConfigurationError, match=re.escape(words)):
            make(sqlite, **options)


def test_courier_takes_no_more_than_it_may_keep(
    sqlite: DbApi,
    broker: EventBroker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from domain_events.outbox import couriers

    monkeypatch.setattr(couriers, "_MOST_ROWS", 10)
    stops = Stops()
    courier = Courier(sqlite, middleware=[stops])
    take(courier, write(sqlite, DomainEvent("a"), courier=courier))
    assert stops.reached.wait(30)
    take(courier, write(sqlite, *[DomainEvent("a")] * 30, courier=courier))
    stops.go_on.set()
    assert courier.wait(30)
    assert rows(sqlite) == 20
    assert "faster than they are sent" in caplog.text
    courier.close()


def test_courier_whose_database_is_away_leaves_all_to_a_relay(
    sqlite: DbApi, broker: EventBroker, caplog: pytest.LogCaptureFixture
) -> None:
    courier = Courier(sqlite)
    written = write(sqlite, about("a", 1), courier=courier)
    sqlite.run(f"ALTER TABLE {OUTBOX} RENAME TO elsewhere")
    take(courier, written)
    assert courier.wait(30)
    assert "cannot use" in caplog.text
    sqlite.run(f"ALTER TABLE elsewhere RENAME TO {OUTBOX}")
    take(courier, write(sqlite, DomainEvent("b"), courier=courier))
    assert courier.wait(30)
    assert [event.routing_key for event in broker.published] == ["b"]
    courier.close()


ENDS = """
import sys
from outbox_databases import sqlite
from domain_events import DomainEvent, configure, outbox

_, path, url, exchange = sys.argv
configure(url)
database = sqlite(path)
courier = outbox.courier(database)
with database.application() as (connection, execute):
    for number in range(50):
        event = DomainEvent("a", {"number": number}, "a")
        written = outbox.write(execute, "sqlite", event, exchange=exchange, courier=courier)
        connection.commit()
        courier.take([written.row])
"""


def test_program_that_ends_sends_what_it_has_committed(
    sqlite: DbApi, broker_url: str, exchange: str, queue: str
) -> None:
    """Its courier has some seconds for that."""
    command = [sys.executable, "-c", ENDS, sqlite.name, broker_url, exchange]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(command, timeout=60, check=True, env=environment)
    assert rows(sqlite) == 0
    assert onlooker.count(broker_url, queue) == 50


def test_child_of_a_fork_leaves_the_rows_of_its_parent_to_it(
    sqlite: DbApi, broker: EventBroker
) -> None:
    """And has a courier of its own."""
    stops = Stops()
    courier = outbox.courier(sqlite)
    kept = Courier(sqlite, middleware=[stops])
    take(kept, write(sqlite, about("a", 1), courier=kept))
    assert stops.reached.wait(30)
    with kept._changed:  # as another thread may hold it
        pid = os.fork()
        if pid == 0:
            child = outbox.courier(sqlite)
            kept.take([])
            os._exit(0 if child.token != courier.token else 1)
    _, status = os.waitpid(pid, 0)
    assert status == 0
    stops.go_on.set()
    assert kept.wait(30)
    kept.close()
    assert numbers(broker.published, "a") == [1]


# --- leases --------------------------------------------------------------------------------------


def test_owner_whose_lease_was_taken_over_changes_nothing(database: DbApi) -> None:
    """Neither deletes, nor parks, nor releases, nor renews what is another's by now."""
    from domain_events.outbox import rows as table
    from domain_events.outbox.database import check_dialect

    dialect = check_dialect(database.dialect)

    def fetch(token: str) -> list[int]:
        with database.transaction() as execute:
            found = table.fetch(execute, dialect, token, 60.0, 10).rows
            return [row.id for row in found]

    write(database, *abouts("a", range(3)))
    ids = fetch("one")
    assert len(ids) == 3
    assert fetch("other") == []
    end_leases(database)
    assert fetch("other") == ids
    before = database.run(f"SELECT * FROM {OUTBOX} ORDER BY id")
    with database.transaction() as execute:
        table.delete(execute, "one", ids)
        table.release(execute, "one", ids)
        table.park(execute, dialect, "one", ids[0], "no")
        assert table.renew(execute, dialect, "one", ids, 600.0) == set()
    assert database.run(f"SELECT * FROM {OUTBOX} ORDER BY id") == before
    with database.transaction() as execute:
        assert table.renew(execute, dialect, "other", ids, 600.0) == set(ids)
        table.release(execute, "other", ids[:1])
        table.delete(execute, "other", ids[1:])
    assert fetch("one") == ids[:1]


def test_what_was_sent_of_one_object_does_not_hide_rows_of_another(database: DbApi) -> None:
    """Nor those of the same, if ids have begun anew."""
    from domain_events.outbox import rows as table
    from domain_events.outbox.database import check_dialect

    dialect = check_dialect(database.dialect)
    for key in ("a", "b", "a", "b", "c", "a", "b", "c"):  # ids 1 to 8
        write(database, about(key, 0))
    database.run(
        f"DELETE FROM {OUTBOX} WHERE id IN (1, 2, 4)",
        f"UPDATE {OUTBOX} SET leased_until = 9e9 WHERE id = 3",
    )

    def fetched(sent: dict[str, int]) -> list[int]:
        with database.transaction() as execute:
            page = table.fetch(execute, dialect, "t", -1.0, 10, sent=sent)
        return [row.id for row in page.rows]

    for sent in ({}, {"a": 1}, {"a": 1, "b": 4}, {"a": 1, "b": 4, "c": 99}, {"a": 99, "b": 99}):
        assert fetched(sent) == [5, 7, 8]


def test_lease_must_outlast_the_timeout(sqlite: DbApi) -> None:
    """Otherwise another relay would send what is still waited for."""
    with pytest.raises(ConfigurationError, match="lease must be longer than the timeout"):
        Relay(sqlite, lease=10, timeout=10)


def test_confirmed_rows_are_deleted_though_the_connection_breaks_meanwhile(
    postgres: DbApi, broker: EventBroker
) -> None:
    """On a new one; otherwise they would be sent again."""

    class Breaks(Middleware):
        def publishing(self, outgoing: Outgoing) -> None:
            postgres.run(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )

    write(postgres, about("a", 1))
    with Relay(postgres, middleware=[Breaks()]) as relay:
        assert relay.sweep() == 1
    assert rows(postgres) == 0


def test_page_is_bounded_in_bytes(database: DbApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that finds large events has few of them in memory; one is always sent."""
    from domain_events.outbox import rows as table

    monkeypatch.setattr(table, "_MOST_BYTES", 30_000)
    write(database, *(DomainEvent("a", {"number": n, "text": "x" * 20_000}) for n in range(4)))
    write(database, DomainEvent("a", {"text": "x" * 100_000}), about("a", 1))
    pages: list[int] = []

    class Counts(Middleware):
        def publishing(self, outgoing: Outgoing) -> None:
            pages.append(rows(database))

    with EventBroker(virtual_time=False) as broker:
        with Relay(database, middleware=[Counts()]) as relay:
            assert relay.sweep() == 6
        assert len(broker.published) == 6
    assert pages == [6, 5, 4, 3, 2, 1]


# --- killed at each step -------------------------------------------------------------------------


class Killed:
    """What came of a process that was killed at each of its steps."""

    def __init__(self, database: DbApi, address: str, url: str, names: Names, broken: str) -> None:
        self._database = database
        exchange, queue = names.exchange(), names.queue()
        onlooker.bind_queue(url, queue, exchange, "#")
        database.run(
            "CREATE TABLE committed "
            "(event_id varchar(50), about varchar(50), number integer NOT NULL)"
        )
        command = [sys.executable, kills.__file__, database.dialect, address, url, exchange]
        done = subprocess.run(
            [*command, *([broken] if broken else [])],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert done.returncode == 0, done.stderr
        self.steps = int(done.stdout)
        end_leases(database)
        with Relay(database, url) as relay:
            relay.sweep()
        bodies = [json.loads(body) for body in onlooker.take_all(url, queue)]
        self.received = [(body["uuid_string"], body["domain_object_id"]) for body in bodies]

    def verdict(self) -> None:
        committed = self._database.run("SELECT event_id, about FROM committed ORDER BY number")
        received = list(dict.fromkeys(self.received))
        assert rows(self._database) == 0
        assert not {event_id for event_id, _ in received} - {each for each, _ in committed}
        assert not {each for each, _ in committed} - {event_id for event_id, _ in received}
        for key in {about for _, about in committed if about is not None}:
            in_order = [each for each, about in committed if about == key]
            assert [each for each, about in received if about == key] == in_order


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_process_killed_between_any_two_steps_loses_and_makes_up_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, rabbitmq_url: str, names: Names
) -> None:
    """What was committed is sent, in the order of each object, perhaps twice with the same id."""
    database = _database(request, kind, tmp_path)
    address = database.name if kind == "sqlite" else request.getfixturevalue(kind).url
    killed = Killed(database, address, rabbitmq_url, names, "")
    assert killed.steps > 100
    assert len(set(killed.received)) < len(killed.received), "the kills came at other times"
    killed.verdict()
    database.close()


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["delete before the confirm", "publish before the commit"])
def test_kills_show_what_is_broken_on_purpose(
    sqlite: DbApi, rabbitmq_url: str, names: Names, broken: str
) -> None:
    killed = Killed(sqlite, sqlite.name, rabbitmq_url, names, broken)
    with pytest.raises(AssertionError):
        killed.verdict()


# --- the inbox -----------------------------------------------------------------------------------


def note(database: DbApi, subscriber: str, event_id: str) -> bool:
    with database.transaction() as execute:
        return outbox.note(execute, database.dialect, subscriber, event_id)


def test_event_is_noted_once_for_each_subscriber(database: DbApi) -> None:
    assert note(database, "mail", "e1")
    assert not note(database, "mail", "e1")
    assert note(database, "Mail", "e1")
    assert note(database, "mail", "E1")
    assert note(database, "mail ", "e1")
    assert note(database, "mail", "e1" * 200)
    assert not note(database, "mail", "e1" * 200)


@pytest.mark.parametrize("committed", [True, False])
def test_duplicate_at_the_same_time_waits_and_is_skipped_if_the_first_was_committed(
    database: DbApi, committed: bool
) -> None:
    results: list[bool] = []

    def noting() -> None:
        with database:
            results.append(note(database, "mail", "e1"))

    with database.application() as (connection, execute):
        assert outbox.note(execute, database.dialect, "mail", "e1")
        thread = threading.Thread(target=noting)
        thread.start()
        # Time to go wrong: the other one must wait, so there is nothing to wait for here.
        time.sleep(0.3)
        assert not results
        (connection.commit if committed else connection.rollback)()
    thread.join(30)
    assert results == [not committed]


def test_old_notes_are_pruned_in_batches(database: DbApi) -> None:
    for number in range(5):
        note(database, "mail", str(number))
    database.run("UPDATE domain_events_inbox SET handled = handled - 3000000 WHERE event_id < '3'")

    def prune(**options: Any) -> int:
        with database.transaction() as execute:
            return outbox.prune(execute, database.dialect, **options)

    assert [prune(most=2), prune(most=2), prune(most=2)] == [2, 1, 0]
    assert note(database, "mail", "2")
    assert not note(database, "mail", "3")


def test_all_old_notes_are_pruned_in_small_transactions(
    database: DbApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no handler waits for long; and as far as it may go on."""
    from domain_events.outbox import inbox

    monkeypatch.setattr(inbox, "_BATCH", 2)
    transactions: list[int] = []

    class Counts(DbApi):
        @contextlib.contextmanager
        def transaction(self) -> Iterator[Execute]:
            transactions.append(notes())
            with super().transaction() as execute:
                yield execute

    def notes() -> int:
        return int(database.run("SELECT COUNT(*) FROM domain_events_inbox")[0][0])

    for number in range(6):
        note(database, "mail", str(number))
    database.run("UPDATE domain_events_inbox SET handled = 1 WHERE event_id < '5'")
    counted = Counts(database.name, database.dialect, database.connect)
    stopping = threading.Event()
    stopping.set()
    assert outbox.prune_all(counted, stopping=stopping) == 0
    assert outbox.prune_all(counted) == 5
    assert transactions == [6, 4, 2]
    assert not note(database, "mail", "5")


def test_notes_are_kept_for_longer_than_any_retry_may_wait() -> None:
    """Else a retry that was handled by a process that died before its ack is handled again."""
    assert outbox.KEPT > LONGEST_DELAY


# --- the database --------------------------------------------------------------------------------


def test_every_statement_uses_an_index(database: DbApi, broker: EventBroker) -> None:
    """However many rows wait, and however many are parked."""
    write(database, *(about(number % 500, number) for number in range(3000)))
    database.run(
        f"UPDATE {OUTBOX} SET parked = 1, error = 'e' WHERE mod(id, 100) = 0",
        *({"postgresql": [f"ANALYZE {OUTBOX}"], "mariadb": [f"ANALYZE TABLE {OUTBOX}"]}).get(
            database.dialect, ["ANALYZE"]
        ),
    )
    plans: dict[str, str] = {}
    how = "EXPLAIN QUERY PLAN" if database.dialect == "sqlite" else "EXPLAIN"
    whole_table = {"sqlite": r"SCAN [^k]", "postgresql": "Seq Scan on", "mariadb": " ALL "}

    class Explained(DbApi):
        def executing(self, connection: Any) -> Execute:
            inner = super().executing(connection)

            def execute(sql: str, parameters: Any = None, /) -> Any:
                if sql.startswith(("SELECT", "UPDATE", "DELETE")):
                    plan = inner(f"{how} {sql.partition(' RETURNING')[0]}", parameters)
                    text = "\n".join(" ".join(map(str, row)) for row in plan)
                    plans.setdefault(sql.partition(" IN (")[0], text)
                return inner(sql, parameters)

            return execute

    with Relay(Explained(database.name, database.dialect, database.connect), batch=100) as relay:
        relay.sweep()
    assert len(plans) >= 4
    for sql, plan in plans.items():
        lines = [line for line in plan.splitlines() if "<derived" not in line]
        found = re.search(whole_table[database.dialect], "\n".join(lines))
        assert not found, f"{sql}\n{plan}"
        assert "MIN(" not in sql or ORDER_INDEX in plan, f"{sql}\n{plan}"


@pytest.mark.slow
def test_deleted_rows_that_postgresql_has_to_keep_cost_the_relay_nothing(
    postgres: DbApi, broker: EventBroker
) -> None:
    """Those of a transaction that is open for long; they are passed now and then only."""
    things, deleted = 50, 20_000
    touched: list[int] = []

    class Measured(DbApi):
        def executing(self, connection: Any) -> Execute:
            inner = super().executing(connection)

            def execute(sql: str, parameters: Any = None, /) -> Any:
                if sql.startswith("SELECT"):
                    explain = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON)"
                    ((plans,),) = inner(f"{explain} {sql}", parameters)
                    plan = plans[0]["Plan"]
                    touched.append(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
                return inner(sql, parameters)

            return execute

    def changed(number: int) -> list[DomainEvent]:
        return [about(n % things, n) for n in range(number)]

    write(postgres, *changed(things))
    measured = Measured(postgres.name, "postgresql", postgres.connect)
    with postgres.application() as (_, execute), Relay(measured, idle=30) as relay:
        assert relay.sweep() == things
        execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", {})
        execute("SELECT 1 FROM pg_class LIMIT 1", {})
        write(postgres, *changed(deleted))
        assert relay.sweep() == deleted
        write(postgres, *changed(things))
        touched.clear()
        relay.start()  # it has looked at everything a moment ago
        wait_until(lambda: len(broker.published) == deleted + 2 * things)
        assert 0 < sum(touched) < 2000
