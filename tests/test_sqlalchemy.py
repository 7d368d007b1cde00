"""``domain_events.sqlalchemy``: what is published is what was committed: the database knows it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onlooker
import pytest
import sqlalchemy
from databases import Server
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from support import Names, sooner_than
from test_recipes import sqlite_engine

import domain_events
from domain_events import ConfigurationError, DomainEvent, InvalidEvent, Middleware, Outgoing
from domain_events.sqlalchemy import publish_at_session_commits, publish_on_commit
from domain_events.testing import EventBroker


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(sqlalchemy.String(100), unique=True)


class Unwanted(Exception):
    """Ends a block that is to be rolled back."""


Where = Session | Connection


@pytest.fixture(scope="module", params=["sqlite", "postgresql", "mariadb"])
def database(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "sqlite":
        engine = sqlite_engine()
    else:
        server: Server = request.getfixturevalue(f"{request.param}_server")
        engine = sqlalchemy.create_engine(server.address.sqlalchemy_url)
    yield engine
    engine.dispose()


@pytest.fixture
def engine(database: Engine) -> Engine:
    """With empty tables."""
    Base.metadata.drop_all(database)
    Base.metadata.create_all(database)
    return database


@pytest.fixture
def postgres(engine: Engine) -> Engine:
    if engine.dialect.name != "postgresql":
        pytest.skip("what only PostgreSQL does")
    return engine


def published(broker: EventBroker) -> list[Any]:
    """The data of all events, in their order."""
    return [event.data for event in broker.published]


def committed(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(select(User.email).order_by(User.id)))


def register(where: Where | scoped_session[Any], email: str) -> None:
    """Store a user, and publish that."""
    where.execute(insert(User).values(email=email))
    publish_on_commit(where, "user.registered", email)


@contextlib.contextmanager
def rolled_back(begin: Callable[[], Any]) -> Iterator[None]:
    """A transaction, or a SAVEPOINT, in which something fails."""
    with contextlib.suppress(Unwanted), begin():
        yield
        raise Unwanted


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


# --- transactions and SAVEPOINTs -----------------------------------------------------------------


def test_nothing_is_published_before_the_commit(where: Where, event_broker: EventBroker) -> None:
    """And then all of it, in its order; the transaction begins by itself."""
    register(where, "a")
    register(where, "b")
    assert published(event_broker) == []
    where.commit()
    assert published(event_broker) == ["a", "b"]
    where.commit()
    assert published(event_broker) == ["a", "b"]


def test_event_is_known_before_the_commit(where: Where, event_broker: EventBroker) -> None:
    """With its id, by which it is published, and all that it was given."""
    given = publish_on_commit(
        where,
        "user.registered",
        {"user_id": 7},
        7,
        headers={"tenant": "x"},
        correlation_id="request-1",
        cause="cause-1",
        version=2,
    )
    assert event_broker.published == []
    where.commit()
    (event,) = event_broker.published
    assert event == given
    assert (given.domain_object_id, given.headers) == (7, {"tenant": "x"})
    assert (given.correlation_id, given.cause, given.version) == ("request-1", "cause-1", 2)


def test_all_arguments_arrive(where: Where, broker_url: str, names: Names) -> None:
    """On a real broker, and another exchange; the commit has waited for the confirm."""
    exchange, queue = names.exchange(), names.queue()
    onlooker.bind_queue(broker_url, queue, exchange, "user.*")
    given = publish_on_commit(
        where,
        "user.registered",
        {"user_id": 7},
        7,
        "the-id",
        1700000000.5,
        broker_url,
        exchange=exchange,
        headers={"tenant": "x"},
    )
    where.rollback()
    publish_on_commit(
        where,
        given.routing_key,
        given.data,
        7,
        "the-id",
        1700000000.5,
        broker_url,
        exchange=exchange,
        headers={"tenant": "x"},
    )
    where.commit()
    (body,) = onlooker.take_all(broker_url, queue)
    assert DomainEvent.from_json(body) == given


@pytest.mark.parametrize("end", ["rollback", "close"])
def test_events_go_with_the_transaction(
    where: Where, engine: Engine, event_broker: EventBroker, end: str
) -> None:
    """Rolled back, or closed without a commit; what is used again publishes nothing of it."""
    with where.begin_nested():
        register(where, "gone")
    register(where, "gone too")
    getattr(where, end)()
    if isinstance(where, Connection) and end == "close":
        with engine.connect() as again:  # the pool's same connection
            again.execute(insert(User).values(email="other"))
            again.commit()
        assert published(event_broker) == []
        return
    register(where, "stays")
    where.commit()
    assert published(event_broker) == ["stays"] == committed(engine)


def test_savepoint_takes_its_own_events_and_no_others(
    where: Where, engine: Engine, event_broker: EventBroker
) -> None:
    """What came before it, in its siblings and after it is published, in this order."""
    register(where, "before")
    with where.begin_nested():
        register(where, "sibling")
    with rolled_back(where.begin_nested):
        register(where, "gone")
        with where.begin_nested():
            register(where, "gone, though released")
    register(where, "after")
    with where.begin_nested(), rolled_back(where.begin_nested):
        register(where, "gone")
    with where.begin_nested():
        with rolled_back(where.begin_nested):
            register(where, "gone")
        register(where, "last")
    assert published(event_broker) == []
    where.commit()
    assert published(event_broker) == ["before", "sibling", "after", "last"] == committed(engine)


def test_savepoint_that_is_older_than_the_first_event_takes_it(
    where: Where, engine: Engine, event_broker: EventBroker
) -> None:
    """Nothing was followed when it began."""
    outer = where.begin_nested()
    inner = where.begin_nested()
    register(where, "gone")
    inner.commit()
    register(where, "gone too")
    outer.rollback()
    register(where, "stays")
    with rolled_back(where.begin_nested):
        register(where, "gone")
    where.commit()
    assert published(event_broker) == ["stays"] == committed(engine)


def test_savepoint_ends_those_within(engine: Engine, event_broker: EventBroker) -> None:
    """When it is rolled back, or released, before they have ended."""
    with Session(engine) as session:
        register(session, "first")
        outer = session.begin_nested()
        register(session, "gone")
        session.begin_nested()
        register(session, "gone too")
        outer.rollback()
        outer = session.begin_nested()
        register(session, "outer")
        session.begin_nested()
        register(session, "inner")
        outer.commit()
        register(session, "last")
        session.commit()
    assert published(event_broker) == ["first", "outer", "inner", "last"] == committed(engine)


def test_statement_that_fails_in_a_savepoint_takes_that_savepoint(
    where: Where, engine: Engine, event_broker: EventBroker
) -> None:
    """As where a row may exist already; what was published before it fails goes, too."""
    for email in ("b", "a", "b", "c"):
        with contextlib.suppress(IntegrityError), where.begin_nested():
            publish_on_commit(where, "user.registered", email)
            where.execute(insert(User).values(email=email))
    where.commit()
    assert published(event_broker) == ["b", "a", "c"] == committed(engine)


def test_event_before_a_failing_flush_is_dropped(engine: Engine, event_broker: EventBroker) -> None:
    """The flush is a transaction of its own within the SAVEPOINT."""
    with Session(engine) as session, session.begin():
        register(session, "a")
        with contextlib.suppress(IntegrityError), session.begin_nested():
            publish_on_commit(session, "user.registered", "a again")
            session.add(User(email="a"))
            session.flush()
        session.add(User(email="b"))
        publish_on_commit(session, "user.registered", "b")  # and flushed in the commit
    assert published(event_broker) == ["a", "b"] == committed(engine)


def test_statement_that_has_failed_takes_the_transaction(
    postgres: Engine,
    where: Where,
    event_broker: EventBroker,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PostgreSQL answers to COMMIT by ROLLBACK then, and there is no error."""
    register(where, "a")
    with contextlib.suppress(DBAPIError):
        where.execute(text("SELECT 1 / 0"))
    where.commit()
    assert committed(postgres) == published(event_broker) == []
    assert "is not published: a statement of its transaction has failed before" in caplog.text
    register(where, "b")
    where.commit()
    assert committed(postgres) == published(event_broker) == ["b"]


def test_commit_that_fails_publishes_nothing(
    where: Where, postgres: Engine, event_broker: EventBroker
) -> None:
    """As by a constraint that is checked last. (SQLite stays in the transaction then.)"""
    where.execute(
        text(
            "CREATE TEMPORARY TABLE invoices (number int UNIQUE DEFERRABLE INITIALLY DEFERRED) "
            "ON COMMIT DROP"
        )
    )
    register(where, "a")
    where.execute(text("INSERT INTO invoices VALUES (1), (1)"))
    with pytest.raises(IntegrityError):
        where.commit()
    where.close()
    with Session(postgres) as session:
        assert committed(postgres) == published(event_broker) == []
        register(session, "b")
        session.commit()
    assert committed(postgres) == published(event_broker) == ["b"]


def test_two_do_not_mix(engine: Engine, event_broker: EventBroker) -> None:
    """Each publishes its own, when it commits."""
    with Session(engine) as one, Session(engine) as other, engine.connect() as third:
        publish_on_commit(one, "x", "one")
        publish_on_commit(other, "x", "other")
        if engine.dialect.name != "sqlite":  # in memory, they have one connection
            publish_on_commit(third, "x", "third")
        other.rollback()
        publish_on_commit(other, "x", "other again")
        one.commit()
        assert published(event_broker) == ["one"]
        other.commit()
        assert published(event_broker) == ["one", "other again"]


def test_blocks_commit_what_they_have_begun(engine: Engine, event_broker: EventBroker) -> None:
    """``Session.begin()``, ``sessionmaker.begin()``, ``engine.begin()``, ``autobegin=False``."""
    with Session(engine) as session:
        with session.begin():
            register(session, "a")
        with rolled_back(session.begin):
            register(session, "gone")
    with sessionmaker(engine).begin() as session:
        register(session, "b")
    with engine.begin() as connection:
        register(connection, "c")
    with contextlib.suppress(Unwanted), engine.begin() as connection:
        register(connection, "gone")
        raise Unwanted
    with Session(engine, autobegin=False) as session:
        with pytest.raises(InvalidRequestError, match="autobegin=False"):
            publish_on_commit(session, "x", "nowhere")
        with session.begin():
            register(session, "d")
    assert published(event_broker) == ["a", "b", "c", "d"] == committed(engine)


def test_scoped_session_is_that_of_the_thread(engine: Engine, event_broker: EventBroker) -> None:
    """As of Flask-SQLAlchemy."""
    sessions = scoped_session(sessionmaker(engine))
    register(sessions, "a")
    sessions.commit()
    register(sessions, "gone")
    sessions.remove()
    sessions.commit()
    assert published(event_broker) == ["a"] == committed(engine)


def test_what_is_forgotten_publishes_nothing(engine: Engine, event_broker: EventBroker) -> None:
    """A session, or a connection; nor does the next one that uses their connection."""
    register(Session(engine), "gone")
    gc.collect()
    register(engine.connect(), "gone")
    gc.collect()
    with engine.begin() as connection:
        register(connection, "a")
    assert published(event_broker) == ["a"] == committed(engine)


def test_two_phases(postgres: Engine, event_broker: EventBroker) -> None:
    """Prepared is not committed."""
    with Session(postgres, twophase=True) as session:
        register(session, "a")
        session.prepare()
        assert published(event_broker) == []
        session.commit()
        register(session, "gone")
        session.prepare()
        session.rollback()
        register(session, "b")
        session.commit()
        assert published(event_broker) == ["a", "b"]
    with postgres.connect() as connection:
        for prepared in (True, False):
            transaction = connection.begin_twophase()
            register(connection, f"prepared: {prepared}")
            if prepared:
                transaction.prepare()
                assert published(event_broker) == ["a", "b"]
            transaction.commit()
        transaction = connection.begin_twophase()
        register(connection, "gone")
        transaction.prepare()
        transaction.rollback()
    assert published(event_broker) == committed(postgres)
    assert len(committed(postgres)) == 4


def test_session_of_two_databases_publishes_after_both(
    engine: Engine, event_broker: EventBroker
) -> None:
    """And nothing when the second one fails."""
    other = sqlite_engine()
    base = sqlalchemy.orm.declarative_base()

    class Other(base):  # type: ignore[valid-type,misc]
        __tablename__ = "others"
        id = sqlalchemy.Column(sqlalchemy.Integer, primary_key=True)

    base.metadata.create_all(other)
    seen: list[object] = []
    sqlalchemy.event.listen(other, "commit", lambda _: seen.append(published(event_broker)))
    sqlalchemy.event.listen(engine, "commit", count := lambda _: seen.append("one"))
    try:
        with Session(binds={Base: engine, base: other}) as session:
            session.execute(insert(User).values(email="a"))
            session.execute(insert(Other).values(id=1))
            publish_on_commit(session, "user.registered", "a")
            session.commit()
        assert [] in seen
        assert "one" in seen
    finally:
        sqlalchemy.event.remove(engine, "commit", count)
        other.dispose()
    assert published(event_broker) == ["a"]


# --- a transaction around the session ------------------------------------------------------------

MODES: list[Any] = ["conditional_savepoint", "rollback_only", "create_savepoint"]


@pytest.mark.parametrize("by_binds", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_transaction_around_the_session_decides(
    engine: Engine, event_broker: EventBroker, mode: Any, by_binds: bool
) -> None:
    """The session's commit is not the one that makes it last."""
    for end, expected in (("rollback", []), ("commit", ["a", "c"])):
        with engine.connect() as connection, connection.begin() as transaction:
            bound: dict[str, Any] = (
                {"binds": {Base: connection}} if by_binds else {"bind": connection}
            )
            with Session(join_transaction_mode=mode, **bound) as session:
                register(session, "a")
                session.commit()
            nested = connection.begin_nested()
            with Session(join_transaction_mode=mode, **bound) as session:
                register(session, "b")
                session.commit()
            nested.rollback()
            with Session(join_transaction_mode=mode, **bound) as session:
                register(session, "c")
                session.commit()
            assert published(event_broker) == []
            getattr(transaction, end)()
        assert published(event_broker) == expected == committed(engine)


def test_session_that_controls_its_connection_commits(
    engine: Engine, event_broker: EventBroker
) -> None:
    """``control_fully``, or on a connection without a transaction."""
    with engine.connect() as connection:
        connection.begin()
        with Session(connection, join_transaction_mode="control_fully") as session:
            register(session, "a")
            session.commit()
            assert published(event_broker) == ["a"]
        with Session(connection) as session:
            register(session, "b")
            session.commit()
    assert published(event_broker) == ["a", "b"] == committed(engine)


def test_session_that_is_closed_leaves_its_rows_to_the_transaction_around(
    engine: Engine, event_broker: EventBroker
) -> None:
    """In the mode in which they stay, its events stay."""
    with engine.begin() as connection:
        with Session(connection, join_transaction_mode="rollback_only") as session:
            register(session, "stays")
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            register(session, "goes")
    assert published(event_broker) == committed(engine) == ["stays"]


@pytest.mark.parametrize("mode", MODES)
def test_events_are_seen_by_tests_that_never_commit(
    engine: Engine, event_broker: EventBroker, mode: Any
) -> None:
    """Which have to say so."""
    with engine.connect() as connection:
        with pytest.raises(InvalidRequestError, match="not in a transaction"):
            publish_at_session_commits(connection)
        with connection.begin() as transaction:
            publish_at_session_commits(connection)
            with Session(connection, join_transaction_mode=mode) as session:
                register(session, "a")
                with rolled_back(session.begin_nested):
                    register(session, "gone")
                assert published(event_broker) == []
                session.commit()
                assert published(event_broker) == ["a"]
            transaction.rollback()
        assert committed(engine) == []
        with connection.begin() as transaction:
            with Session(connection, join_transaction_mode=mode) as session:
                register(session, "b")
                session.commit()
            transaction.rollback()
    assert published(event_broker) == ["a"]


# --- any of it, made up --------------------------------------------------------------------------


@dataclass
class Step:
    """One of a program's."""

    action: str
    #: Which of the open SAVEPOINTs, from the innermost.
    depth: int = 0


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(
            ["write"] * 4
            + ["begin"] * 3
            + ["release", "undo"] * 2
            + ["fail", "duplicate", "commit", "commit", "rollback", "close"]
        ),
        st.sampled_from([0, 0, 0, 1, 2]),
    ),
    max_size=40,
)
KINDS = ["session", "connection", "bound", *MODES, "control_fully"]


_numbers = itertools.count(1)


class Program:
    """Runs steps; whatever an error leaves behind, the next step meets."""

    def __init__(self, engine: Engine, kind: str) -> None:
        self.engine = engine
        self.kind = kind
        self.nested: list[Any] = []
        self.connection = engine.connect() if kind != "session" else None
        self.outer: Any = None
        self.open()

    def open(self) -> None:
        if self.kind == "session":
            self.where: Where = Session(self.engine)
            return
        assert self.connection is not None
        if self.kind in {*MODES, "control_fully"} and not self.connection.in_transaction():
            self.outer = self.connection.begin()
            register(self.connection, self.next())
        if self.kind == "connection":
            self.where = self.connection
        else:
            mode: Any = self.kind if self.kind != "bound" else "conditional_savepoint"
            self.where = Session(self.connection, join_transaction_mode=mode)

    def next(self) -> str:
        # Never the same: a Session that cannot be closed keeps its locks until it is collected.
        return f"{next(_numbers):08}"

    def run(self, step: Step) -> None:
        with contextlib.suppress(SQLAlchemyError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transactions that have ended already
            self.do(step)

    def do(self, step: Step) -> None:
        if step.action == "write":
            register(self.where, self.next())
        elif step.action == "begin":
            self.nested.append(self.where.begin_nested())
        elif step.action in {"release", "undo"} and len(self.nested) > step.depth:
            savepoint = self.nested[-1 - step.depth]
            del self.nested[-1 - step.depth :]
            savepoint.commit() if step.action == "release" else savepoint.rollback()
        elif step.action == "fail":
            self.where.execute(text("SELECT nothing FROM nowhere"))
        elif step.action == "duplicate":
            publish_first = self.where.begin_nested()
            with publish_first:
                email = self.next()
                register(self.where, email)
                register(self.where, email)
        elif step.action in {"commit", "rollback"}:
            self.nested.clear()
            getattr(self.where, step.action)()
        elif step.action == "close":
            self.close()
            if self.outer is not None and self.outer.is_active:
                # Every other one of those around is committed.
                self.outer.commit() if step.depth else self.outer.rollback()
            if self.kind == "connection":
                self.connection = self.engine.connect()
            self.open()

    def close(self) -> None:
        self.nested.clear()
        try:
            self.where.close()
        except SQLAlchemyError:  # a Session fails here, after a SAVEPOINT that was not released
            self.where.invalidate()

    def end(self) -> None:
        self.nested.clear()
        for end in (self.where.commit, self.close):
            with contextlib.suppress(SQLAlchemyError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                end()
        if self.outer is not None and self.outer.is_active:
            with contextlib.suppress(SQLAlchemyError):
                self.outer.commit()
        if self.connection is not None:
            self.connection.close()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_published_is_what_was_committed(database: Engine, kind: str) -> None:
    """After transactions, SAVEPOINTs and errors in any order."""
    gc.collect()
    Base.metadata.drop_all(database)
    Base.metadata.create_all(database)

    @given(STEPS)
    def check(steps: list[Step]) -> None:
        with database.begin() as connection:
            connection.execute(sqlalchemy.delete(User))
        with EventBroker() as broker:
            program = Program(database, kind)
            try:
                for step in steps:
                    program.run(step)
            finally:
                program.end()
            assert published(broker) == sorted(committed(database))

    try:
        check()
    finally:
        gc.collect()


# --- data and arguments --------------------------------------------------------------------------


def test_data_are_those_of_the_call(where: Where, event_broker: EventBroker) -> None:
    """Not what became of them until the commit; what is not JSON is an error at once."""
    data = {"name": "Ada"}
    headers: dict[str, Any] = {"tenant": "x"}
    publish_on_commit(where, "user.registered", data, headers=headers)
    data["name"] = "Grace"
    headers["tenant"] = "y"
    for wrong in ({"tags": {"a", "b"}}, {"at": object()}):
        with pytest.raises(InvalidEvent, match="not JSON"):
            publish_on_commit(where, "user.registered", wrong)
    for key in ("", "user.*"):
        with pytest.raises(InvalidEvent):
            publish_on_commit(where, key, {})
    with pytest.raises(InvalidEvent):
        publish_on_commit(where, "x", {}, headers={"x-mine": 1})
    where.commit()
    (event,) = event_broker.published
    assert event.data == {"name": "Ada"}


def test_wrong_arguments_are_errors_of_the_call(where: Where) -> None:
    """And not log lines of the commit."""
    wrong: list[dict[str, Any]] = [
        {"connection_settings": "http://localhost"},
        {"timeout": 0},
        {"mandatory": 1},
        {"exchange": ""},
    ]
    for each in wrong:
        with pytest.raises(ConfigurationError):
            publish_on_commit(where, "x", {}, **each)


def test_publishing_may_be_switched_off(where: Where, caplog: pytest.LogCaptureFixture) -> None:
    """The event is returned all the same."""
    assert publish_on_commit(where, "x", {"a": 1}, connection_settings=None).data == {"a": 1}
    where.commit()
    assert "not published" not in caplog.text


def test_asynchronous_session_is_an_error_that_says_what_to_give() -> None:
    """And so is anything else."""
    session: Any = AsyncSession()
    with pytest.raises(
        TypeError, match=r"await session.run_sync.publish_on_commit.*blocks the event loop"
    ):
        publish_on_commit(session, "x", {})
    other: Any = sessionmaker()
    with pytest.raises(TypeError, match="a Connection, not of type sessionmaker"):
        publish_on_commit(other, "x", {})


def test_cause_is_the_event_being_handled_at_the_call(
    where: Where, event_broker: EventBroker
) -> None:
    """Though the commit may come later."""
    subscriber = domain_events.Subscriber()

    def handle(event: DomainEvent) -> None:
        publish_on_commit(where, "invoice.issued", {})

    subscriber.register(handle, "billing", ["order.paid"])
    paid = DomainEvent("order.paid", {}, correlation_id="request-1")
    event_broker.deliver(subscriber, paid)
    seen: list[DomainEvent] = []

    class Seen(Middleware):
        def publishing(self, outgoing: Outgoing) -> None:
            assert outgoing.event is not None
            seen.append(outgoing.event)

    domain_events.configure(middleware=[Seen()])
    try:
        where.commit()
    finally:
        domain_events.configure()
    (event,) = seen
    assert (event.cause, event.correlation_id) == (paid.uuid_string, "request-1")


# --- an outage, and other errors after the commit ------------------------------------------------

NOBODY = "amqp://guest:guest@127.0.0.1:1/%2F"


@pytest.fixture(autouse=True)
def _close_publishers() -> Iterator[None]:
    yield
    domain_events.close_publishers()


def test_outage_does_not_reach_the_caller(
    where: Where, engine: Engine, broker_url: str, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    """The time is spent once; another broker's events are published; the log has key and id."""
    exchange, queue = names.exchange(), names.queue()
    onlooker.bind_queue(broker_url, queue, exchange, "user.*")
    where.execute(insert(User).values(email="a"))
    lost = [
        publish_on_commit(where, f"user.lost{n}", n, connection_settings=NOBODY, timeout=1.0)
        for n in range(100)
    ]
    publish_on_commit(where, "user.kept", {}, None, "kept", 1.0, broker_url, exchange=exchange)
    with sooner_than(20):
        where.commit()
    assert committed(engine) == ["a"]
    (body,) = onlooker.take_all(broker_url, queue)
    assert DomainEvent.from_json(body).uuid_string == "kept"
    records = [each for each in caplog.records if each.name == "domain_events.sqlalchemy"]
    assert len(records) == len(lost)
    for event, record in zip(lost, records, strict=True):
        assert record.levelno == logging.ERROR
        assert event.routing_key in record.getMessage()
        assert event.uuid_string in record.getMessage()


def test_connection_is_back_in_the_pool_before_a_session_publishes(
    postgres: Engine, event_broker: EventBroker
) -> None:
    """So that an outage of the broker does not take all connections."""
    seen: list[int] = []
    pool: Any = postgres.pool

    class Seen(Middleware):
        def publishing(self, outgoing: Outgoing) -> None:
            seen.append(pool.checkedout())

    domain_events.configure(middleware=[Seen()])
    try:
        with Session(postgres) as session:
            register(session, "a")
            session.commit()
    finally:
        domain_events.configure()
    assert seen == [0]


class Failing(Middleware):
    """Fails for some events."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def publishing(self, outgoing: Outgoing) -> None:
        assert outgoing.event is not None
        if outgoing.event.data == "bad":
            raise self.error("a middleware")


def test_error_of_one_event_does_not_keep_the_others(
    where: Where, engine: Engine, event_broker: EventBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it is; the caller of the commit does not see it."""
    domain_events.configure(middleware=[Failing(ZeroDivisionError)])
    try:
        for email in ("a", "bad", "b"):
            register(where, email)
        where.commit()
    finally:
        domain_events.configure()
    assert published(event_broker) == ["a", "b"]
    assert committed(engine) == ["a", "bad", "b"]
    (record,) = (each for each in caplog.records if each.name == "domain_events.sqlalchemy")
    assert "ZeroDivisionError: a middleware" in record.getMessage()
    assert record.exc_info is not None


def test_interrupt_while_publishing_logs_what_is_left(
    where: Where, engine: Engine, event_broker: EventBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """It reaches the caller; the work is committed, and the session can be used again."""
    domain_events.configure(middleware=[Failing(KeyboardInterrupt)])
    try:
        for email in ("a", "bad", "b"):
            register(where, email)
        with pytest.raises(KeyboardInterrupt):
            where.commit()
    finally:
        domain_events.configure()
    assert published(event_broker) == ["a"]
    assert len([each for each in caplog.records if "not published" in each.getMessage()]) == 2
    if engine.dialect.name == "postgresql":  # SQLAlchemy closes the connection: in memory, the data
        assert committed(engine) == ["a", "bad", "b"]


def test_sessions_of_threads_are_their_own(postgres: Engine, event_broker: EventBroker) -> None:
    """Many at a time, on one engine whose first events these are."""
    fresh = sqlalchemy.create_engine(postgres.url, pool_size=8)
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait(30)
        for turn in range(10):
            with fresh.connect() as connection:
                register(connection, f"{number}-{turn}-a")
                with rolled_back(connection.begin_nested):
                    register(connection, f"{number}-{turn}-gone")
                register(connection, f"{number}-{turn}-b")
                connection.commit() if turn % 2 else connection.rollback()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    fresh.dispose()
    assert sorted(published(event_broker)) == sorted(committed(postgres))
    assert len(published(event_broker)) == 80
    for number in range(8):
        own = [each for each in published(event_broker) if each.startswith(f"{number}-")]
        assert own == sorted(own)
