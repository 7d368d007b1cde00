"""The recipes of README and docs, run from their text: what they publish is what was committed."""

from __future__ import annotations

import contextlib
import logging
import random
import sqlite3
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import django
import onlooker
import pyamqp
import pytest
import sqlalchemy
from databases import Server
from django.conf import settings as django_settings
from prometheus_client import CollectorRegistry
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from support import Names

import domain_events
from domain_events import BrokerUnavailable, DomainEvent, InvalidEvent, Subscriber
from domain_events.prometheus import Prometheus
from domain_events.testing import EventBroker

ROOT = Path(__file__).parent.parent
Recipe = dict[str, Any]


def code_blocks(file: str, section: str) -> list[str]:
    """The Python of a section, block by block."""
    lines = (ROOT / file).read_text().splitlines()
    begin = lines.index(section)
    blocks: list[str] = []
    block: list[str] | None = None
    indent = 0
    for number, line in enumerate(lines[begin + 2 :], begin + 2):
        if line and set(line) <= {"-"} and len(line) == len(lines[number - 1]):
            break  # the underline of the next section
        if line.strip() == ".. code-block:: python":
            block = []
            indent = len(line) - len(line.lstrip())
        elif block is not None and line and not line.startswith(" " * (indent + 1)):
            blocks.append(textwrap.dedent("\n".join(block)))
            block = None
        elif block is not None:
            block.append(line)
    assert blocks, f"{file} has no code in the section {section!r}"
    return blocks


def after_the_commit() -> tuple[str, str, str]:
    """The README's recipe: what both have, Django's, SQLAlchemy's."""
    common, for_django, for_sqlalchemy = code_blocks(
        "README.rst", "After the commit of a database transaction"
    )
    return common, for_django, for_sqlalchemy


def published(broker: EventBroker) -> list[Any]:
    """The data of all events, in their order."""
    return [event.data for event in broker.published]


def run(code: str, **names: object) -> Recipe:
    recipe: Recipe = {"__name__": "recipe", **names}
    exec(compile(code, "the recipe", "exec"), recipe)
    return recipe


class Unwanted(Exception):
    """Ends a block that is to be rolled back."""


# --- SQLAlchemy ----------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)


def sqlite_engine() -> sqlalchemy.Engine:
    """With the set-up that SQLAlchemy documents for SAVEPOINTs."""
    engine = sqlalchemy.create_engine("sqlite://")

    def do_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None

    def do_begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    sqlalchemy_event.listen(engine, "connect", do_connect)
    sqlalchemy_event.listen(engine, "begin", do_begin)
    return engine


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Iterator[sqlalchemy.Engine]:
    if request.param == "sqlite":
        engine = sqlite_engine()
    else:
        server: Server = request.getfixturevalue("postgresql_server")
        engine = sqlalchemy.create_engine(server.address.sqlalchemy_url)
    yield engine
    engine.dispose()


@pytest.fixture
def engine(database: sqlalchemy.Engine) -> sqlalchemy.Engine:
    """With an empty table."""
    Base.metadata.drop_all(database)
    Base.metadata.create_all(database)
    return database


@pytest.fixture
def alchemy(engine: sqlalchemy.Engine, event_broker: EventBroker) -> Iterator[Recipe]:
    """What the recipe defines; its listeners are gone afterwards."""
    common, _, for_sqlalchemy = after_the_commit()
    recipe = run(common + for_sqlalchemy, engine=engine, User=User)
    # The recipe's own last lines have registered somebody.
    assert published(event_broker) == [{"user_id": 1}]
    event_broker.clear()
    with Session(engine) as session, session.begin():
        session.delete(session.scalars(sqlalchemy.select(User)).one())
    yield recipe
    for name, listener in (("after_commit", "remember"), ("after_transaction_end", "settle")):
        sqlalchemy_event.remove(Session, name, recipe[listener])


@pytest.fixture
def register(alchemy: Recipe) -> Callable[[Session, str], None]:
    """Store a user, and publish that."""

    def register(session: Session, email: str) -> None:
        session.add(User(email=email))
        session.flush()
        alchemy["publish_on_commit"](session, "user.registered", email)

    return register


Register = Callable[[Session, str], None]


def test_nothing_is_published_before_the_commit(
    engine: sqlalchemy.Engine, register: Register, event_broker: EventBroker
) -> None:
    """And then all of it, in its order."""
    with Session(engine) as session:
        register(session, "a")
        register(session, "b")
        assert published(event_broker) == []
        session.commit()
        assert published(event_broker) == ["a", "b"]


def test_rolled_back_savepoint_takes_its_own_events_and_no_others(
    engine: sqlalchemy.Engine, register: Register, event_broker: EventBroker
) -> None:
    """What came before it, in its siblings and after it is published."""
    with Session(engine) as session, session.begin():
        register(session, "before")
        with session.begin_nested():
            register(session, "sibling")
        with contextlib.suppress(Unwanted), session.begin_nested():
            register(session, "gone")
            raise Unwanted
        register(session, "after")
        assert published(event_broker) == []
    assert published(event_broker) == ["before", "sibling", "after"]


def test_released_savepoint_goes_with_the_one_around_it(
    engine: sqlalchemy.Engine, register: Register, event_broker: EventBroker
) -> None:
    """Released is not committed."""
    with Session(engine) as session, session.begin():
        register(session, "outermost")
        outer = session.begin_nested()
        register(session, "outer")
        with session.begin_nested():
            register(session, "inner")
        outer.rollback()
    assert published(event_broker) == ["outermost"]


def test_released_savepoint_goes_with_the_transaction(
    engine: sqlalchemy.Engine, register: Register, event_broker: EventBroker
) -> None:
    """Rolled back, or closed without a commit; the session is then used again."""
    with Session(engine) as session:
        for end in (session.rollback, session.close):
            with session.begin_nested():
                register(session, "gone")
            register(session, "gone too")
            end()
        register(session, "stays")
        session.commit()
        session.commit()
    assert published(event_broker) == ["stays"]


def test_statement_that_fails_in_a_savepoint_takes_that_savepoint(
    engine: sqlalchemy.Engine, register: Register, event_broker: EventBroker
) -> None:
    """As where a row may exist already."""
    with Session(engine) as session, session.begin():
        register(session, "a")
        for email in ("b", "a", "c"):
            with contextlib.suppress(IntegrityError), session.begin_nested():
                register(session, email)
    assert published(event_broker) == ["a", "b", "c"]


def test_event_that_is_collected_before_a_failing_flush_is_dropped(
    engine: sqlalchemy.Engine, alchemy: Recipe, register: Register, event_broker: EventBroker
) -> None:
    """The flush is a transaction of its own within the SAVEPOINT."""
    with Session(engine) as session, session.begin():
        register(session, "a")
        with contextlib.suppress(IntegrityError), session.begin_nested():
            alchemy["publish_on_commit"](session, "user.registered", "a again")
            session.add(User(email="a"))
            session.flush()
    assert published(event_broker) == ["a"]


def test_two_sessions_do_not_mix(
    engine: sqlalchemy.Engine, alchemy: Recipe, event_broker: EventBroker
) -> None:
    """Each publishes its own, when it commits."""
    publish = alchemy["publish_on_commit"]
    with Session(engine) as one, Session(engine) as other:
        publish(one, "x", "one")
        publish(other, "x", "other")
        other.rollback()
        publish(other, "x", "other again")
        one.commit()
        assert published(event_broker) == ["one"]
        other.commit()
    assert published(event_broker) == ["one", "other again"]


def test_what_is_published_is_what_was_committed(
    engine: sqlalchemy.Engine, register: Register, event_broker: EventBroker
) -> None:
    """After transactions and SAVEPOINTs in any order; the database knows what was committed."""
    source = random.Random(11)
    number = 0
    with Session(engine) as session:
        for _ in range(400):
            nested = session.get_nested_transaction()
            step = source.choice(["register"] * 3 + ["begin", "end"])
            if step == "register":
                number += 1
                register(session, str(number))
            elif step == "begin":
                session.begin_nested()
            elif nested is not None and source.random() < 0.8:
                nested.commit() if source.random() < 0.5 else nested.rollback()
            else:
                ends: list[Callable[[], None]] = [session.rollback, session.close]
                source.choice([*ends, session.commit, session.commit])()
        session.commit()
        committed = session.scalars(sqlalchemy.select(User.email).order_by(User.id)).all()
    assert 20 < len(committed) < number - 20
    assert sorted(published(event_broker), key=int) == sorted(committed, key=int)


def test_data_are_those_of_the_call(
    engine: sqlalchemy.Engine, alchemy: Recipe, event_broker: EventBroker
) -> None:
    """Not what became of them until the commit; what is not JSON is an error at once."""
    data = {"name": "Ada"}
    with Session(engine) as session:
        alchemy["publish_on_commit"](session, "user.registered", data)
        data["name"] = "Grace"
        with pytest.raises(InvalidEvent):
            alchemy["publish_on_commit"](session, "user.registered", {"tags": {"a", "b"}})
        session.commit()
    assert published(event_broker) == [{"name": "Ada"}]


@pytest.fixture
def no_broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A port that nobody listens on."""
    monkeypatch.setenv("DOMAIN_EVENTS_URL", "amqp://guest:guest@127.0.0.1:1/%2F")
    yield
    domain_events.close_publishers()


@pytest.mark.usefixtures("no_broker")
def test_commit_succeeds_without_a_broker(
    database: sqlalchemy.Engine,
    event_broker: EventBroker,
    caplog: pytest.LogCaptureFixture,
    alchemy: Recipe,
    register: Register,
) -> None:
    """The events are in the log, whole, and the time is spent once for all of them."""
    event_broker.stop()
    try:
        alchemy["publish_committed"].__defaults__ = (1.0,)
        with Session(database) as session:
            register(session, "a")
            register(session, "b")
            session.commit()
            assert set(session.scalars(sqlalchemy.select(User.email))) == {"a", "b"}
        assert_logged(caplog, "a", "b")
    finally:
        event_broker.start()


def assert_logged(caplog: pytest.LogCaptureFixture, *data: object) -> None:
    """An event for each, that can be published again, and why it was not."""
    records = [record for record in caplog.records if record.name == "recipe"]
    events = [DomainEvent.from_json(record.getMessage().partition(": ")[2]) for record in records]
    assert [event.data for event in events] == list(data)
    for record in records:
        assert record.levelno == logging.ERROR
        assert record.exc_info is not None
        assert isinstance(record.exc_info[1], BrokerUnavailable)


# --- Django --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def person() -> Iterator[Any]:
    """A model with a table, in an SQLite in memory."""
    django_settings.configure(
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        DEFAULT_AUTO_FIELD="django.db.models.AutoField",
        USE_TZ=True,
        LOGGING_CONFIG=None,
    )
    django.setup()
    from django.db import connection, models

    meta = type("Meta", (), {"app_label": "recipes"})
    person = type(
        "Person",
        (models.Model,),
        {"__module__": __name__, "Meta": meta, "email": models.TextField(unique=True)},
    )
    with connection.schema_editor() as editor:
        editor.create_model(person)
    yield person
    connection.close()


@pytest.fixture
def djangos(person: Any, event_broker: EventBroker) -> Recipe:
    """What the recipe defines."""
    common, for_django, _ = after_the_commit()
    person.objects.all().delete()
    recipe = run(common + for_django, User=person)
    (user,) = person.objects.all()
    assert published(event_broker) == [{"user_id": user.id}]
    event_broker.clear()
    user.delete()
    return recipe


def test_django_publishes_what_was_committed(
    djangos: Recipe, person: Any, event_broker: EventBroker
) -> None:
    """In loops too; a savepoint that is rolled back takes its own events and no others."""
    from django.db import transaction

    def register(email: str) -> None:
        person.objects.create(email=email)
        djangos["publish_on_commit"]("user.registered", email)

    with transaction.atomic():
        for email in ("a", "b", "c"):
            register(email)
        with contextlib.suppress(Unwanted), transaction.atomic():
            register("gone")
            with transaction.atomic():
                register("gone too")
            raise Unwanted
        with transaction.atomic():
            register("d")
        assert published(event_broker) == []
    with contextlib.suppress(Unwanted), transaction.atomic():
        register("rolled back")
        raise Unwanted
    register("by itself")
    committed = list(person.objects.order_by("id").values_list("email", flat=True))
    assert published(event_broker) == committed == ["a", "b", "c", "d", "by itself"]


@pytest.mark.usefixtures("no_broker")
def test_django_commits_without_a_broker(
    djangos: Recipe, person: Any, event_broker: EventBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """The event is in the log, and the callbacks of others run."""
    from django.db import transaction

    others = []
    event_broker.stop()
    try:
        djangos["publish_committed"].__defaults__ = (1.0,)
        with transaction.atomic():
            person.objects.create(email="a")
            djangos["publish_on_commit"]("user.registered", "a")
            transaction.on_commit(lambda: others.append("called"))
    finally:
        event_broker.start()
    assert person.objects.count() == 1
    assert others == ["called"]
    assert_logged(caplog, "a")


# --- idempotent handlers -------------------------------------------------------------------------


@pytest.fixture
def idempotent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event_broker: EventBroker
) -> Iterator[tuple[Recipe, Recipe]]:
    """The two recipes of the introduction, whose subscribers are registered."""
    assert event_broker.published == []
    monkeypatch.chdir(tmp_path)
    blocks = code_blocks("docs/introduction.rst", "Handlers must be idempotent")
    counting, invoicing = (
        run(block.replace("subscriber.start_consuming()\n", "").rstrip()) for block in blocks
    )
    yield counting, invoicing
    for recipe in (counting, invoicing):
        recipe["database"].close()


def test_work_is_done_once(idempotent: tuple[Recipe, Recipe], event_broker: EventBroker) -> None:
    """However often the event comes, also after a failure in the middle."""
    counting, _ = idempotent
    event = DomainEvent("user.registered", {"user_id": 7})
    without_id = DomainEvent("user.registered", {})
    deliveries = event_broker.deliver(counting["subscriber"], event, event, without_id, without_id)
    outcomes = [str(each.outcome.value) for each in deliveries]
    assert outcomes == ["handled", "handled", "dead letter", "dead letter"]
    database: sqlite3.Connection = counting["database"]
    assert database.execute("SELECT user_id FROM users").fetchall() == [(7,)]
    # What failed is not written down as done.
    assert database.execute("SELECT count(*) FROM handled").fetchall() == [(1,)]


def test_event_of_a_handler_is_published_though_it_failed_once(
    idempotent: tuple[Recipe, Recipe], event_broker: EventBroker
) -> None:
    """And once more for each time that the handler runs, with one id."""
    _, invoicing = idempotent
    publish = invoicing["publish_domain_event"]

    def fail(*_arguments: object, **_options: object) -> None:
        invoicing["publish_domain_event"] = publish
        raise BrokerUnavailable("the broker is away")

    invoicing["publish_domain_event"] = fail
    event = DomainEvent("user.registered", {"user_id": 7})
    event_broker.deliver(invoicing["subscriber"], event)
    event_broker.assert_not_published("invoice.issued")
    event_broker.advance(1)
    event_broker.deliver(invoicing["subscriber"])
    event_broker.assert_published("invoice.issued", {"amount": 10}, times=1)
    event_broker.deliver(invoicing["subscriber"], event)
    invoices = [each for each in event_broker.published if each.routing_key == "invoice.issued"]
    assert len(invoices) == 2
    ((stored,),) = invoicing["database"].execute("SELECT id FROM invoices").fetchall()
    assert {each.uuid_string for each in invoices} == {stored}


# --- coming from domain-event-broker -------------------------------------------------------------


def test_old_queue_is_unbound(broker_url: str, names: Names) -> None:
    """What it holds stays; no further event reaches it."""
    _, unbind = code_blocks("docs/migrating.rst", "Queues")
    exchange, queue = names.exchange(), names.queue()
    onlooker.bind_queue(broker_url, queue, exchange, "user.*")
    onlooker.publish(broker_url, exchange, "user.registered", b"before")
    url = urlsplit(broker_url)
    for shown, used in {
        "'localhost:5672'": repr(f"{url.hostname}:{url.port}"),
        "'guest', 'guest'": f"{unquote(url.username or '')!r}, {unquote(url.password or '')!r}",
        "virtual_host='/'": f"virtual_host={unquote(url.path[1:])!r}",
        "'print-user-event'": repr(queue),
        "'domain-events'": repr(exchange),
    }.items():
        assert unbind.count(shown) == 1
        unbind = unbind.replace(shown, used)
    run(unbind)
    with pytest.raises(pyamqp.AMQPError, match="NO_ROUTE"):
        onlooker.publish(broker_url, exchange, "user.registered", b"after")
    assert onlooker.take_all(broker_url, queue) == [b"before"]


def test_recipes_are_all_tried() -> None:
    """A new one in these places is to be tested too."""
    # The first of them is an ordinary subscriber.
    assert len(code_blocks("docs/migrating.rst", "Queues")) == 2
    assert len(after_the_commit()) == 3
    assert len(code_blocks("docs/introduction.rst", "Handlers must be idempotent")) == 2
    assert domain_events.__all__


def test_middleware_recipes_do_what_they_show(caplog: pytest.LogCaptureFixture) -> None:
    """The log context, the slow handler, headers, derived events."""
    page = "docs/middleware.rst"
    seen: list[object] = []
    with EventBroker() as broker:
        try:
            (log_context,) = code_blocks(page, "A log context")
            event_id = run(log_context)["event_id"]
            (slow,) = code_blocks(page, "What it can do")
            subscriber = run(slow.replace("0.5", "0"))["subscriber"]
            subscriber.register(lambda _: seen.append(event_id.get()), "mail", ["user.*"])
            carries = code_blocks(page, "What an event carries")
            handle = run(carries[0])["handle"]
            subscriber.register(handle, "print", ["user.*"])
            broker.deliver(subscriber)
        finally:
            domain_events.configure()
        assert seen == [broker.published[0].uuid_string]
        assert "mail took 0.0 s: handled" in caplog.text
        (publishes,) = code_blocks(page, "A handler that publishes")
        ships = Subscriber()
        ships.register(run(publishes)["handle_order"], "shipping", ["order.paid"])
        paid = DomainEvent("order.paid", {"lines": [{"sku": "a"}, {"sku": "b"}]})
        broker.deliver(ships, paid, paid)
        shipped = [each.uuid_string for each in broker.published if "shipped" in each.routing_key]
        assert len(shipped) == 4
        assert len(set(shipped)) == 2


def test_readme_shows_how_to_see_what_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces, metrics and probes as the README has them, on ports that are free."""
    (block,) = code_blocks("README.rst", "Seeing what happens")
    # The registry of prometheus_client is the process's; another test may have used it.
    monkeypatch.setattr(Prometheus.__init__, "__defaults__", (CollectorRegistry(),))
    answers: list[int] = []

    class Probed(Subscriber):
        def start_consuming(self, timeout: float | None = None) -> None:
            answers.append(len(self.subscriptions))

    code = block.replace("9000", "0").replace("8080", "0").replace("= Subscriber(", "= Probed(")
    assert code != block
    with EventBroker():
        try:
            recipe = run(code, send_welcome_mail=print, Probed=Probed)
        finally:
            domain_events.configure()
    assert answers == [1]
    assert recipe["subscriber"].subscriptions[0].options.handler_limit == 60
