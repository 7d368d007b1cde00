"""The recipes of README and docs, run from their text: what they publish is what was committed."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import django_shop
import pytest
import sqlalchemy
from prometheus_client import CollectorRegistry
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import domain_events
from domain_events import BrokerUnavailable, DomainEvent, Publisher, Subscriber
from domain_events.outbox import close_couriers
from domain_events.prometheus import Prometheus
from domain_events.sqlalchemy import Outbox, outbox_table
from domain_events.testing import EventBroker

ROOT = Path(__file__).parent.parent
Recipe = dict[str, Any]

TRANSACTIONS = "After the commit of a database transaction"


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


def run(code: str, **names: object) -> Recipe:
    recipe: Recipe = {"__name__": "recipe", **names}
    exec(compile(code, "the recipe", "exec"), recipe)
    return recipe


# --- publishing with a transaction ---------------------------------------------------------------


class Unwanted(Exception):
    """Ends a block that is to be rolled back."""


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


@pytest.fixture(params=["after the commit", "with the commit"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sqlalchemy.Engine]:
    """A database with empty tables; with an outbox and without."""
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/users.db")
    tables = sqlalchemy.MetaData()
    outbox_table(tables)
    Base.metadata.create_all(engine)
    tables.create_all(engine)
    outbox = Outbox(engine)
    if request.param == "with the commit":
        outbox.switch_on()
    yield engine
    outbox.switch_off()
    close_couriers()
    engine.dispose()


def refuse(_session: Session) -> None:
    raise Unwanted


def test_readme_publishes_after_a_commit_of_sqlalchemy(engine: sqlalchemy.Engine) -> None:
    """As it stands; and nothing when its transaction is rolled back."""
    _, block = code_blocks("README.rst", TRANSACTIONS)
    with EventBroker(virtual_time=False) as broker:
        sqlalchemy_event.listen(Session, "before_commit", refuse)
        try:
            with pytest.raises(Unwanted):
                run(block, engine=engine, User=User)
        finally:
            sqlalchemy_event.remove(Session, "before_commit", refuse)
        run(block, engine=engine, User=User)
        assert Outbox(engine).wait(30)
        close_couriers()
        (event,) = broker.published
    with Session(engine) as session:
        (user,) = session.scalars(sqlalchemy.select(User))
    assert (event.routing_key, event.data) == ("user.registered", {"user_id": user.id})
    assert event.domain_object_id == user.id


@pytest.fixture(scope="module")
def person() -> Iterator[Any]:
    """A model of Django with a table, in an SQLite that has an outbox too."""
    django_shop.setup()
    from django.core.management import call_command
    from django.db import connection, models

    call_command("migrate", verbosity=0)
    meta = type("Meta", (), {"app_label": "recipes"})
    person = type(
        "Person",
        (models.Model,),
        {"__module__": __name__, "Meta": meta, "email": models.TextField(unique=True)},
    )
    with connection.schema_editor() as editor:
        editor.create_model(person)
    yield person
    with connection.schema_editor() as editor:
        editor.delete_model(person)
    connection.close()


@pytest.mark.parametrize("outbox", [False, True])
def test_readme_publishes_after_a_commit_of_django(person: Any, outbox: bool) -> None:
    """As it stands, on both levels; and nothing when its transaction is rolled back."""
    from django.db import transaction
    from django.test import override_settings

    block, _ = code_blocks("README.rst", TRANSACTIONS)
    person.objects.all().delete()
    with (
        override_settings(DOMAIN_EVENTS={"OUTBOX": outbox}),
        EventBroker(virtual_time=False) as broker,
    ):
        with contextlib.suppress(Unwanted), transaction.atomic():
            run(block, User=person)
            raise Unwanted
        run(block, User=person)
        close_couriers(30)
        (event,) = broker.published
    (user,) = person.objects.all()
    assert (event.routing_key, event.data) == ("user.registered", {"user_id": user.id})
    assert event.domain_object_id == user.id


def test_call_publishes_what_the_hook_before_it_did(engine: sqlalchemy.Engine) -> None:
    before, after, _ = code_blocks("docs/transactions.rst", "Coming from recipes")
    published = []
    for block in (before, after):
        with engine.begin() as connection:
            connection.execute(sqlalchemy.delete(User))
        with EventBroker(virtual_time=False) as broker:
            recipe = run(block, engine=engine, User=User)
            if "publish" in recipe:
                sqlalchemy_event.remove(Session, "after_commit", recipe["publish"])
            close_couriers(30)
            published.append([(event.routing_key, event.data) for event in broker.published])
    assert published == [[("user.registered", {"email": "ada@example.org"})]] * 2


class OldRow(Base):
    """Of an outbox that somebody has written by hand."""

    __tablename__ = "old_outbox"
    id: Mapped[int] = mapped_column(primary_key=True)
    routing_key: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(sqlalchemy.JSON)
    object_id: Mapped[str]
    event_id: Mapped[str]
    timestamp: Mapped[float]


def test_rows_of_another_outbox_are_moved_with_their_ids(engine: sqlalchemy.Engine) -> None:
    *_, move = code_blocks("docs/transactions.rst", "Coming from recipes")
    events = [DomainEvent("order.placed", {"number": n}, "o1", timestamp=n + 0.5) for n in range(5)]
    with Session(engine) as session, session.begin():
        for event in events:
            session.add(
                OldRow(
                    routing_key=event.routing_key,
                    data=event.data,
                    object_id=event.domain_object_id,
                    event_id=event.uuid_string,
                    timestamp=event.timestamp,
                )
            )
            session.flush()
    outbox = Outbox(engine)
    with EventBroker(virtual_time=False) as broker:
        run(move, engine=engine, OldRow=OldRow, outbox=outbox)
        assert outbox.wait(30)
        close_couriers(30)
        assert broker.published == events
    with Session(engine) as session:
        assert session.scalars(sqlalchemy.select(OldRow)).all() == []


# --- idempotent handlers -------------------------------------------------------------------------


@pytest.fixture
def idempotent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event_broker: EventBroker
) -> Iterator[tuple[Recipe, Recipe]]:
    """The two recipes, whose subscribers are registered."""
    assert event_broker.published == []
    monkeypatch.chdir(tmp_path)
    blocks = code_blocks("docs/handling.rst", "Handlers must be idempotent")
    counting, invoicing = (
        run(block.replace("subscriber.start_consuming()\n", "").rstrip()) for block in blocks
    )
    yield counting, invoicing
    invoicing["publisher"].close()
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
    idempotent: tuple[Recipe, Recipe], event_broker: EventBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once more for each time that the handler runs, with one id."""
    _, invoicing = idempotent
    publisher: Publisher = invoicing["publisher"]
    publish = publisher.publish

    def fail(*_arguments: object, **_options: object) -> DomainEvent:
        monkeypatch.setattr(publisher, "publish", publish)
        raise BrokerUnavailable("the broker is away")

    monkeypatch.setattr(publisher, "publish", fail)
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


def test_recipes_are_all_tried() -> None:
    """A new one in these places is to be tested too."""
    # It is an ordinary subscriber.
    assert len(code_blocks("docs/migrating.rst", "Queues")) == 1
    assert len(code_blocks("README.rst", TRANSACTIONS)) == 2
    assert len(code_blocks("docs/transactions.rst", "Coming from recipes")) == 3
    assert len(code_blocks("docs/handling.rst", "Handlers must be idempotent")) == 2
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


def test_readme_has_a_test_that_passes(tmp_path: Path) -> None:
    """As a user saves and runs it, with nothing around it."""
    (block,) = code_blocks("README.rst", "Testing your code")
    (tmp_path / "test_mail.py").write_text(block)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", "/dev/null", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "1 passed" in ran.stdout, ran.stdout + ran.stderr


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
