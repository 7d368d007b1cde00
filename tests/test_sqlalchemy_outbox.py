"""The outbox and the inbox with SQLAlchemy: one transaction with the work, on each database."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata, produce_migrations
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.operations.ops import ModifyTableOps
from databases import Address
from hypothesis import given
from sqlalchemy import Connection, Engine, MetaData, func, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import sooner_than, wait_until
from test_sqlalchemy import (
    STEPS,
    Base,
    Program,
    Step,
    Unwanted,
    User,
    Where,
    committed,
    published,
    register,
    rolled_back,
)

import domain_events
from domain_events import (
    ConfigurationError,
    DeadLetters,
    DomainEvent,
    InvalidEvent,
    Middleware,
    Operation,
    Outcome,
    Outgoing,
    Subscriber,
)
from domain_events import outbox as engine_room
from domain_events.sqlalchemy import (
    Outbox,
    first_time,
    inbox_table,
    once,
    outbox_table,
    prune_inbox,
    publish_at_session_commits,
    publish_on_commit,
)
from domain_events.sqlalchemy.outbox import executing
from domain_events.testing import EventBroker

TABLES = MetaData()  # the application's
OUTBOX = outbox_table(TABLES)
INBOX = inbox_table(TABLES)

KINDS = ["sqlite", "postgresql", "mariadb"]


def _engine(request: pytest.FixtureRequest, kind: str, folder: Path) -> Engine:
    if kind == "sqlite":
        engine = sqlalchemy.create_engine(
            f"sqlite:///{folder}/shop.db", connect_args={"timeout": 30}
        )

        @sqlalchemy.event.listens_for(engine, "connect")
        def do_connect(connection: Any, _record: object) -> None:
            connection.isolation_level = None
            connection.execute("PRAGMA journal_mode = WAL")

        @sqlalchemy.event.listens_for(engine, "begin")
        def do_begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN")

        return engine
    address: Address = request.getfixturevalue(kind)
    return sqlalchemy.create_engine(address.sqlalchemy_url)


@contextlib.contextmanager
def _tables(engine: Engine) -> Iterator[Engine]:
    Base.metadata.create_all(engine)
    TABLES.create_all(engine)
    try:
        yield engine
    finally:
        engine_room.close_couriers()
        engine.dispose()


@pytest.fixture(params=KINDS)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """On each kind of database."""
    with _tables(_engine(request, request.param, tmp_path)) as engine:
        yield engine


@pytest.fixture
def sqlite(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """Where the kind does not matter."""
    with _tables(_engine(request, "sqlite", tmp_path)) as engine:
        yield engine


@pytest.fixture
def postgres(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """Where it has to be PostgreSQL."""
    with _tables(_engine(request, "postgresql", tmp_path)) as engine:
        yield engine


@pytest.fixture
def broker() -> Iterator[EventBroker]:
    with EventBroker(virtual_time=False) as broker:
        yield broker
        engine_room.close_couriers()


@contextlib.contextmanager
def switched_on(engine: Engine) -> Iterator[Outbox]:
    outbox = Outbox(engine)
    outbox.switch_on()
    try:
        yield outbox
    finally:
        outbox.switch_off()


@pytest.fixture
def outbox(engine: Engine) -> Iterator[Outbox]:
    with switched_on(engine) as outbox:
        yield outbox


@pytest.fixture(params=["session", "connection", "session on a connection"])
def where(request: pytest.FixtureRequest, engine: Engine) -> Iterator[Where]:
    """What has a transaction."""
    if request.param == "session":
        with Session(engine) as session:
            yield session
    else:
        with engine.connect() as connection:
            if request.param == "connection":
                yield connection
            else:
                with Session(connection) as session:
                    yield session


def rows(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(select(func.count()).select_from(OUTBOX)) or 0)


def notes(engine: Engine) -> list[tuple[str, str]]:
    with engine.connect() as connection:
        found = connection.execute(select(INBOX.c.subscriber, INBOX.c.event_id))
        return [(row[0], row[1]) for row in found]


# --- the tables ----------------------------------------------------------------------------------


def _described(engine: Engine) -> list[object]:
    inspector = sqlalchemy.inspect(engine)
    described: list[object] = []
    for table in (OUTBOX.name, INBOX.name):
        for column in inspector.get_columns(table):
            kind = column["type"].compile(engine.dialect)
            # SQLite keeps any name of a type: these two are one.
            described.append((column["name"], kind.replace("REAL", "DOUBLE")))
            if column["name"] != "id":
                described.append((column["nullable"], column["default"]))
        described.append(inspector.get_pk_constraint(table)["constrained_columns"])
        described += sorted(
            (each["name"] or "", *map(str, each["column_names"]))
            for each in inspector.get_indexes(table)
        )
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            options = "SELECT reloptions FROM pg_class WHERE relname = :name"
            described += connection.execute(text(options), {"name": OUTBOX.name}).all()
        if engine.dialect.name == "mysql":
            options = (
                "SELECT table_name, table_collation FROM information_schema.tables WHERE "
                "table_schema = database() AND table_name LIKE 'domain_events%' ORDER BY 1"
            )
            described += connection.execute(text(options)).all()
    return described


def test_tables_are_those_of_the_engine(engine: Engine) -> None:
    """So that programs with and without SQLAlchemy share them."""
    ours = _described(engine)
    TABLES.drop_all(engine)
    with engine.begin() as connection:
        for statement in engine_room.create(engine.dialect.name):
            connection.execute(text(statement))
    assert [str(each) for each in _described(engine)] == [str(each) for each in ours]
    Outbox(engine).validate()


def _differences_for_alembic(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "compare_server_default": True,
                "include_name": lambda name, kind, _: kind != "table" or name in TABLES.tables,
            },
        )
        return list(compare_metadata(context, TABLES))


def test_alembic_makes_the_tables_and_finds_no_difference_afterwards(engine: Engine) -> None:
    """By autogenerate, which also compares types and defaults."""
    assert _differences_for_alembic(engine) == []
    TABLES.drop_all(engine)
    with engine.begin() as connection:
        context = MigrationContext.configure(
            connection,
            opts={"include_name": lambda name, kind, _: kind != "table" or name in TABLES.tables},
        )
        operations = Operations(context)
        upgrade = produce_migrations(context, TABLES).upgrade_ops
        assert upgrade is not None
        for step in upgrade.ops:
            for each in step.ops if isinstance(step, ModifyTableOps) else [step]:
                operations.invoke(each)
    assert _differences_for_alembic(engine) == []
    Outbox(engine).validate()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("DROP TABLE domain_events_outbox", "there is no table domain_events_outbox"),
        ("ALTER TABLE domain_events_outbox DROP COLUMN error", "outbox.error is missing"),
        (
            "DROP INDEX domain_events_outbox_order",
            r"no index on domain_events_outbox \(object_key, id\)",
        ),
        ("ALTER TABLE domain_events_outbox ADD shop int NOT NULL", "must have a default"),
        (
            "ALTER TABLE domain_events_outbox ALTER object_key SET NOT NULL",
            "object_key is not nullable",
        ),
        ("ALTER TABLE domain_events_outbox ALTER routing_key TYPE varchar(20)", "too short"),
        (
            "ALTER TABLE domain_events_outbox ALTER body TYPE jsonb USING body::jsonb",
            "body is JSONB instead of TEXT",
        ),
    ],
)
def test_validate_names_what_is_wrong(postgres: Engine, change: str, expected: str) -> None:
    """And what to do."""
    outbox = Outbox(postgres)
    outbox.validate()
    with postgres.begin() as connection:
        connection.execute(text(change))
    with pytest.raises(ConfigurationError, match=f"{expected}.*migrate"):
        outbox.validate()


# --- writing and publishing ----------------------------------------------------------------------


def test_event_is_published_at_once_and_its_row_is_gone(
    where: Where, outbox: Outbox, engine: Engine, broker: EventBroker
) -> None:
    """Without a relay."""
    with where.begin():
        register(where, "a")
        with rolled_back(where.begin_nested):
            register(where, "gone")
        with where.begin_nested():
            register(where, "b")
        assert published(broker) == []
    with rolled_back(where.begin):
        register(where, "gone")
    assert outbox.wait(30)
    assert sorted(published(broker)) == ["a", "b"] == committed(engine)
    assert rows(engine) == 0


def test_event_is_rendered_when_it_is_written(
    where: Where, outbox: Outbox, engine: Engine, broker: EventBroker
) -> None:
    """With its headers, those of middleware, its cause and its data."""

    class Trace(Middleware):
        def __init__(self) -> None:
            self.current = "first"
            self.seen: list[Operation] = []

        def publishing(self, outgoing: Outgoing) -> None:
            self.seen.append(outgoing.operation)
            outgoing.headers.setdefault("trace", self.current)

    trace = Trace()
    domain_events.configure(middleware=[trace])
    try:
        data = {"percent": "100 %", "colon": "a:b ::text :name", "quote": "'\\"}
        given = publish_on_commit(where, "user.registered", data, 7, headers={"tenant": "x"})
        expected = dict(data)
        data.clear()
        trace.current = "second"
        where.commit()
        assert outbox.wait(30)
    finally:
        domain_events.configure()
    (event,) = broker.published
    assert event == given or event.data == expected
    assert event.data == expected
    assert event.uuid_string == given.uuid_string
    assert trace.seen == [Operation.OUTBOX, Operation.RELAY]
    assert given.headers == {"tenant": "x", "trace": "first"}
    with pytest.raises(InvalidEvent):
        publish_on_commit(where, "user.registered", {"tags": {1}})


def test_outage_delays_events_and_nothing_else(
    sqlite: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit does not wait; a relay publishes when the broker is back."""
    monkeypatch.setenv("DOMAIN_EVENTS_URL", "amqp://guest:guest@127.0.0.1:1/%2F")
    with switched_on(sqlite) as outbox:
        with Session(sqlite) as session, sooner_than(10):
            register(session, "a")
            session.commit()
        status = outbox.status()
        assert (status.waiting, status.parked) == (1, 0)
        assert outbox.wait(60)
        assert outbox.status().waiting == 1
        engine_room.close_couriers()
        with EventBroker(virtual_time=False) as broker, outbox.relay() as relay:
            assert relay.sweep() == 1
            assert published(broker) == ["a"]
        assert outbox.status().waiting == 0


def test_row_that_cannot_be_sent_is_parked_until_somebody_decides(
    engine: Engine, broker: EventBroker
) -> None:
    """It is listed with the reason, sent again, or discarded."""
    outbox = Outbox(engine)
    with engine.begin() as connection:
        for email in ("good", "bad", "worse"):
            engine_room.write(  # without a courier
                executing(connection), engine.dialect.name, DomainEvent("x", email)
            )
        connection.execute(OUTBOX.update().values(body="{").where(OUTBOX.c.body.not_like("%good%")))
    with outbox.relay() as relay:
        assert relay.sweep() == 1
        assert published(broker) == ["good"]
        bad, worse = outbox.parked()
        assert "InvalidEvent" in bad.error
        assert outbox.status().parked == 2
        assert [each.id for each in outbox.discard([worse.id])] == [worse.id]
        with engine.begin() as connection:
            body = DomainEvent("x", "bad").to_json()
            connection.execute(OUTBOX.update().values(body=body))
        assert relay.sweep() == 0
        assert outbox.retry() == 1
        assert relay.sweep() == 1
    assert published(broker) == ["good", "bad"]
    assert outbox.status() == (0, 0.0, 0)


def test_statement_that_has_failed_takes_the_events(
    postgres: Engine, broker: EventBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL rolls back at COMMIT, without an error: the courier must not get the rows."""
    with switched_on(postgres) as outbox:
        for where in (Session(postgres), postgres.connect()):
            with where:
                register(where, "a")
                with contextlib.suppress(DBAPIError):
                    where.execute(text("SELECT 1 / 0"))
                where.commit()
        assert outbox.wait(30)
    assert committed(postgres) == published(broker) == []
    assert caplog.text.count("is not published") == 2


def test_outbox_may_be_given_as_an_argument(sqlite: Engine, broker: EventBroker) -> None:
    """For some events only."""
    outbox = Outbox(sqlite)
    with Session(sqlite) as session:
        publish_on_commit(session, "x", 1, outbox=outbox)
        publish_on_commit(session, "x", 2)
        session.flush()
        assert session.scalar(select(func.count()).select_from(OUTBOX)) == 1
        session.commit()
    assert outbox.wait(30)
    assert sorted(published(broker)) == [1, 2]


def test_lease_is_an_option(sqlite: Engine, broker: EventBroker) -> None:
    outbox = Outbox(sqlite, lease=600, timeout=20)
    with Session(sqlite) as session:
        publish_on_commit(session, "x", {}, outbox=outbox)
        leased = session.scalar(select(OUTBOX.c.leased_until - OUTBOX.c.created))
        assert leased is not None
        assert 599 < leased < 601
        session.commit()
    assert outbox.wait(30)
    assert published(broker) == [{}]


def test_what_an_outbox_cannot_do_is_an_error(sqlite: Engine, tmp_path: Path) -> None:
    """At the call."""
    outbox = Outbox(sqlite)
    with Session(sqlite) as session:
        wrong: dict[str, Any]
        for wrong in ({"mandatory": True}, {"connection_settings": "amqp://localhost"}):
            with pytest.raises(ConfigurationError, match="with an outbox"):
                publish_on_commit(session, "x", {}, outbox=outbox, **wrong)
        with pytest.raises(ConfigurationError, match="must be an Outbox"):
            publish_on_commit(session, "x", {}, outbox=sqlite)  # type: ignore[arg-type]
    other = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/other.db")
    with Session(other) as session, pytest.raises(ConfigurationError, match=r"other\.db"):
        publish_on_commit(session, "x", {}, outbox=outbox)
    with pytest.raises(ConfigurationError, match="in memory"):
        Outbox(sqlalchemy.create_engine("sqlite://"))
    with pytest.raises(ConfigurationError, match="takes an Engine"):
        Outbox(create_async_engine("postgresql+psycopg://localhost/x"))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="'oracle'"):
        Outbox(_of_oracle())
    with pytest.raises(ConfigurationError, match="lease must be longer than the timeout"):
        Outbox(sqlite, timeout=30)
    other.dispose()


def _of_oracle() -> Engine:
    engine = sqlalchemy.create_engine("sqlite:///x.db")
    engine.dialect.name = "oracle"
    return engine


def test_session_of_several_engines_needs_to_know_which(sqlite: Engine, tmp_path: Path) -> None:
    """It may have the engine of the outbox for some of its classes."""
    other = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/other.db")
    with switched_on(sqlite) as outbox, EventBroker(virtual_time=False) as broker:
        with Session(binds={Base: sqlite}) as session:
            with pytest.raises(ConfigurationError, match="several engines"):
                publish_on_commit(session, "x", "a")
            session.execute(insert(User).values(email="a"))
            publish_on_commit(session, "x", "a", outbox=outbox)
            session.commit()
        assert outbox.wait(30)
        assert published(broker) == ["a"] == committed(sqlite)
        with Session(other) as session:  # for which none is switched on
            publish_on_commit(session, "x", "b")
            session.commit()
        assert published(broker) == ["a", "b"]
    other.dispose()


def test_events_are_seen_by_tests_that_never_commit(
    engine: Engine, outbox: Outbox, broker: EventBroker
) -> None:
    """Published at once, though nobody else can see the row."""
    with engine.connect() as connection, connection.begin() as transaction:
        publish_at_session_commits(connection)
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            register(session, "a")
            session.commit()
        assert published(broker) == ["a"]
        transaction.rollback()
    assert outbox.wait(30)
    assert committed(engine) == []
    assert published(broker) == ["a"]
    assert rows(engine) == 0


def test_asynchronous_session_writes_in_its_own_transaction(
    postgres: Engine, broker: EventBroker
) -> None:
    """By ``run_sync``; a synchronous engine publishes."""
    outbox = Outbox(postgres)

    async def work() -> None:
        engine = create_async_engine(postgres.url)
        async with AsyncSession(engine) as session:
            for email, end in (("a", session.commit), ("gone", session.rollback)):
                await session.execute(insert(User).values(email=email))
                await session.run_sync(publish_on_commit, "x", email, outbox=outbox)
                await end()
            await session.execute(insert(User).values(email="b"))
            await session.run_sync(publish_on_commit, "x", "b")
            await session.commit()
        await engine.dispose()

    asyncio.run(work())
    assert outbox.wait(30)
    assert sorted(published(broker)) == ["a", "b"] == committed(postgres)


def test_courier_replaces_connections_that_the_server_has_closed(
    postgres: Engine, broker: EventBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """As after its restart."""
    with switched_on(postgres) as outbox:
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(postgres.connect()).execute(text("SELECT 1"))
        with Session(postgres) as session:
            publish_on_commit(session, "x", "a", "object")  # its courier looks before it sends
            other = sqlalchemy.create_engine(postgres.url)
            with other.connect() as connection:
                connection.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE "
                        "datname = current_database() AND state = 'idle' "
                        "AND pid <> pg_backend_pid()"
                    )
                )
            other.dispose()
            session.commit()
        assert outbox.wait(30)
    assert published(broker) == ["a"]
    assert rows(postgres) == 0
    assert "cannot use" not in caplog.text


def test_child_of_a_fork_publishes_what_it_commits(
    postgres: Engine, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a courier and connections of its own; those of its parent go on."""
    monkeypatch.setenv("DOMAIN_EVENTS_URL", broker_url)
    with switched_on(postgres) as outbox:
        for email in ("a", "b"):
            with Session(postgres) as session:
                register(session, email)
                session.commit()
            if email == "a":
                assert outbox.wait(30)
                assert rows(postgres) == 0
                own = _backends(postgres)
                child = os.fork()
                if child == 0:
                    try:
                        with Session(postgres) as session:
                            register(session, "child")
                            session.commit()
                        if not outbox.wait(30) or rows(postgres):
                            os._exit(1)
                        os._exit(3 if own & _backends(postgres) else 0)
                    finally:
                        os._exit(2)
                _, status = os.waitpid(child, 0)
                assert os.waitstatus_to_exitcode(status) == 0
        assert outbox.wait(30)
    assert rows(postgres) == 0
    assert sorted(committed(postgres)) == ["a", "b", "child"]
    domain_events.close_publishers()


def _backends(engine: Engine) -> set[Any]:
    """The server's processes for the connections in the pool."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(engine.connect()) for _ in range(5)]
        return {each.scalar(text("SELECT pg_backend_pid()")) for each in connections}


@pytest.mark.parametrize("kind", ["session", "connection", "create_savepoint"])
def test_what_is_published_is_what_was_committed(engine: Engine, outbox: Outbox, kind: str) -> None:
    """After transactions, SAVEPOINTs and errors in any order; and no row is left."""

    @given(STEPS)
    def check(steps: list[Step]) -> None:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.delete(User))
        with EventBroker(virtual_time=False) as broker:
            program = Program(engine, kind)
            try:
                for step in steps:
                    program.run(step)
            finally:
                program.end()
            assert outbox.wait(60)
            assert sorted(published(broker)) == sorted(committed(engine))
            assert rows(engine) == 0

    try:
        check()
    finally:
        gc.collect()


# --- the inbox -----------------------------------------------------------------------------------


def handler_of(
    engine: Engine, work: Callable[[Any, DomainEvent], object] | None = None, **options: Any
) -> Callable[[DomainEvent], None]:
    """A handler that stores a user, and publishes that."""

    @once(sessionmaker(engine), **options)
    def handle(session: Session, event: DomainEvent) -> None:
        session.add(User(email=f"{event.data}-{session.scalar(select(func.count(User.id)))}"))
        publish_on_commit(session, "mail.sent", event.data)
        if work is not None:
            work(session, event)

    return handle


def mails(broker: EventBroker) -> list[Any]:
    return [event.data for event in broker.published if event.routing_key == "mail.sent"]


def test_work_and_events_of_a_handler_come_once(
    engine: Engine, outbox: Outbox, broker: EventBroker
) -> None:
    """However often its event comes; for each subscriber."""
    mail, stock = Subscriber(), Subscriber()
    mail.register(handler_of(engine), "mail", ["user.*"])
    stock.register(handler_of(engine), "stock", ["user.*"])
    event, other = DomainEvent("user.registered", "a"), DomainEvent("user.registered", "b")
    outcomes = [
        each.outcome
        for subscriber in (mail, mail, stock)
        for each in broker.deliver(subscriber, event, event, other)
    ]
    assert set(outcomes) == {Outcome.HANDLED}
    assert outbox.wait(30)
    assert sorted(mails(broker)) == ["a", "a", "b", "b"]
    assert len(committed(engine)) == 4
    assert sorted(notes(engine)) == sorted(
        (name, each.uuid_string) for name in ("mail", "stock") for each in (event, other)
    )


def test_handler_that_fails_has_done_nothing(
    engine: Engine, outbox: Outbox, broker: EventBroker
) -> None:
    """Neither its work, nor its events, nor the note: its replay is handled."""
    failing = [True]

    def work(_session: Session, _event: DomainEvent) -> None:
        if failing:
            raise Unwanted

    subscriber = Subscriber()
    subscriber.register(handler_of(engine, work), "mail", ["user.*"])
    event = DomainEvent("user.registered", "a")
    (delivered,) = broker.deliver(subscriber, event)
    assert delivered.outcome is Outcome.DEAD_LETTER
    assert committed(engine) == []
    assert notes(engine) == []
    assert rows(engine) == 0
    failing.clear()
    with DeadLetters("mail") as dead_letters:
        assert dead_letters.replay_all() == 1
    (delivered,) = broker.deliver(subscriber)
    assert delivered.outcome is Outcome.HANDLED
    assert delivered.event is not None
    assert delivered.event.replayed
    assert outbox.wait(30)
    assert mails(broker) == ["a"]
    assert notes(engine) == [("mail", event.uuid_string)]


@pytest.mark.parametrize("first_fails", [False, True])
def test_concurrent_duplicate_waits_for_the_first(
    engine: Engine, outbox: Outbox, broker: EventBroker, first_fails: bool
) -> None:
    """It is skipped if that is committed, and handled if it is rolled back."""
    entered, go_on = threading.Event(), threading.Event()

    def work(_session: Session, _event: DomainEvent) -> None:
        if not entered.is_set():
            entered.set()
            assert go_on.wait(60)
            if first_fails:
                raise Unwanted

    handle = handler_of(engine, work, subscriber="mail")
    event = DomainEvent("user.registered", "a")
    done: list[str] = []

    def deliver(name: str) -> None:
        with contextlib.suppress(Unwanted):
            handle(event)
        done.append(name)

    first = threading.Thread(target=deliver, args=("first",))
    first.start()
    assert entered.wait(60)
    second = threading.Thread(target=deliver, args=("second",))
    second.start()
    # InnoDB shows what was so when it was last asked, unless that is 0.1 s ago.
    wait_until(lambda: _is_waiting(engine, second), interval=0.2)
    assert done == []
    go_on.set()
    for thread in (first, second):
        thread.join(60)
    assert sorted(done) == ["first", "second"]
    assert outbox.wait(30)
    assert mails(broker) == ["a"]
    assert notes(engine) == [("mail", event.uuid_string)]
    assert len(committed(engine)) == 1


@pytest.fixture(params=["REPEATABLE READ", "SERIALIZABLE"])
def strict(request: pytest.FixtureRequest, postgres: Engine) -> Iterator[Engine]:
    """PostgreSQL at the isolation levels at which it makes nobody wait whom it can roll back."""
    engine = sqlalchemy.create_engine(postgres.url, isolation_level=request.param)
    yield engine
    engine_room.close_couriers()
    engine.dispose()


def test_concurrent_duplicate_is_skipped_at_stricter_isolation_levels(
    strict: Engine, broker: EventBroker
) -> None:
    """Where PostgreSQL does not let it go on, but rolls it back: that is not a dead letter."""
    entered, go_on = threading.Event(), threading.Event()
    calls: list[str] = []

    def work(_session: Session, _event: DomainEvent) -> None:
        calls.append("called")
        entered.set()
        assert go_on.wait(60)

    with switched_on(strict) as outbox, ThreadPoolExecutor() as threads:
        handle = handler_of(strict, work, subscriber="mail")
        event = DomainEvent("user.registered", "a")
        first = threads.submit(handle, event)
        assert entered.wait(60)
        second = threads.submit(handle, event)
        wait_until(lambda: _is_waiting(strict, threading.current_thread()))
        go_on.set()
        assert first.result(60) is second.result(60) is None
        assert calls == ["called"]
        assert outbox.wait(30)
    assert mails(broker) == ["a"]
    assert len(committed(strict)) == len(notes(strict)) == 1


def test_handlers_that_exclude_each_other_are_all_done_once(strict: Engine) -> None:
    """Of different events, on the same row."""
    with strict.begin() as connection:
        connection.execute(insert(User).values(email="0"))
    calls: list[str] = []
    together = threading.Barrier(2)

    @once(strict, subscriber="counter")
    def count(connection: Connection, event: DomainEvent) -> None:
        calls.append(str(event.uuid_string))
        number = int(connection.scalar(select(User.email)) or 0)
        if len(calls) <= 2:
            together.wait(60)
        connection.execute(sqlalchemy.update(User).values(email=str(number + 1)))

    def consume(_worker: int) -> None:
        for _ in range(10):
            count(DomainEvent("a"))

    with ThreadPoolExecutor() as threads:
        list(threads.map(consume, range(2)))
    assert committed(strict) == ["20"]
    assert len(calls) > 20
    assert len(set(calls)) == 20


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_handler_that_is_the_victim_of_a_deadlock_is_called_again(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path
) -> None:
    with _tables(_engine(request, kind, tmp_path)) as engine:
        with engine.begin() as connection:
            for email in "ab":
                connection.execute(insert(User).values(email=email))
        together = threading.Barrier(2)
        calls: list[str] = []

        @once(engine)
        def lock(connection: Connection, event: DomainEvent) -> None:
            calls.append(event.data)
            for email in event.data:
                user = select(User.id).where(User.email == email).with_for_update()
                connection.execute(user).all()
                if len(calls) < 3 and email == event.data[0]:
                    together.wait(60)

        with ThreadPoolExecutor() as threads:
            list(threads.map(lock, [DomainEvent("x", "ab"), DomainEvent("x", "ba")]))
        assert len(calls) >= 3
        assert len(notes(engine)) == 2


def test_handler_that_loses_every_race_is_an_error_in_the_end(
    postgres: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that fails otherwise is called once."""
    calls: list[str] = []
    monkeypatch.setattr("domain_events.outbox.inbox._PAUSES", [0.001] * 5)

    @once(postgres)
    def handle(connection: Connection, event: DomainEvent) -> None:
        calls.append(event.data)
        connection.execute(text(f"DO $$ BEGIN RAISE SQLSTATE '{event.data}'; END $$"))

    for state, times in (("40001", 6), ("40P01", 6), ("55P03", 1), ("23505", 1)):
        with pytest.raises(DBAPIError):
            handle(DomainEvent("a", state))
        assert calls.count(state) == times
    assert notes(postgres) == []


def test_of_two_operators_one_decides_at_stricter_isolation_levels(
    postgres: Engine, strict: Engine
) -> None:
    outbox = Outbox(strict)
    with Session(postgres) as session:
        publish_on_commit(session, "x", {}, outbox=Outbox(postgres))
        session.execute(OUTBOX.update().values(parked=1, token=None, leased_until=0))
        session.commit()
    with postgres.connect() as connection, ThreadPoolExecutor() as threads:
        assert engine_room.retry(executing(connection)) == 1
        other = threads.submit(outbox.retry)
        wait_until(lambda: _is_waiting(postgres, threading.current_thread()))
        connection.commit()
        assert other.result(60) == 0


def _is_waiting(engine: Engine, thread: threading.Thread) -> bool:
    """Whether the server shows one that waits; SQLite shows nothing."""
    question = {
        "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'",
        "mysql": "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'",
    }.get(engine.dialect.name)
    if question is None:
        return thread.is_alive()
    with engine.connect() as connection:
        return bool(connection.scalar(text(question)))


def test_handler_may_use_a_connection_or_a_scoped_session(
    engine: Engine, outbox: Outbox, broker: EventBroker
) -> None:
    """And is known by its own name where no subscriber has called it."""
    sessions = scoped_session(sessionmaker(engine))

    @once(engine)
    def by_connection(connection: Connection, event: DomainEvent) -> None:
        register(connection, "connection")

    @once(sessions)
    def by_scoped_session(session: Session, event: DomainEvent) -> None:
        assert sessions() is session
        register(sessions, "scoped")

    event = DomainEvent("user.registered", {})
    for handle in (by_connection, by_scoped_session) * 2:
        handle(event)
        assert not sessions.registry.has()
    assert outbox.wait(30)
    assert sorted(published(broker)) == ["connection", "scoped"]
    assert len({name for name, _ in notes(engine)}) == 2
    wrong: Any = Session(engine)
    with pytest.raises(ConfigurationError, match=r"as in @once\(sessionmaker"):
        once(wrong)


def test_note_can_be_taken_by_hand(where: Where, engine: Engine) -> None:
    """In a transaction of the handler's own."""
    event = DomainEvent("user.registered", {})
    with pytest.raises(ConfigurationError, match="give subscriber="):
        first_time(where, event)
    assert first_time(where, event, "mail")
    assert not first_time(where, event, "mail")
    where.rollback()
    assert first_time(where, event, "mail")
    where.commit()
    assert not first_time(where, event, "mail")
    assert first_time(where, event, "stock")


def test_old_notes_are_deleted_after_a_handler(
    engine: Engine, outbox: Outbox, broker: EventBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches, and no younger ones; an error is logged, since the event was handled."""
    inbox: Any = __import__("domain_events.sqlalchemy.inbox", fromlist=["x"])
    monkeypatch.setattr(inbox, "_PRUNE_EVERY", 0.0)
    monkeypatch.setattr(inbox, "_MOST_PRUNED", 3)
    with engine.begin() as connection:
        for number in range(5):
            connection.execute(
                INBOX.insert().values(subscriber="old", event_id=str(number), handled=1.0)
            )
    handle = handler_of(engine, subscriber="mail")
    handle(DomainEvent("user.registered", "a"))
    assert len(notes(engine)) == 3
    for each in "bc":
        handle(DomainEvent("user.registered", each))
    assert {name for name, _ in notes(engine)} == {"mail"}
    assert len(notes(engine)) == 3


def test_old_notes_can_be_pruned_by_hand(engine: Engine) -> None:
    with engine.begin() as connection:
        for number in range(3):
            assert first_time(connection, DomainEvent("x", uuid_string=str(number)), "mail")
        old = INBOX.c.event_id < "2"
        age = INBOX.c.handled - 31 * 24 * 3600
        connection.execute(INBOX.update().where(old).values(handled=age))
    assert prune_inbox(engine, keep=32 * 24 * 3600) == 0
    assert prune_inbox(engine) == 2
    assert [event_id for _, event_id in notes(engine)] == ["2"]
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    for wrong in (Session(engine), None):
        with pytest.raises(ConfigurationError, match="engine must be an Engine of SQLAlchemy"):
            prune_inbox(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="keep must be a positive number of seconds"):
        prune_inbox(engine, keep=0)
