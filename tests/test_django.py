"""Django: what is published belongs to the transaction, and handlers have a working database."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import django_shop
import pytest
from databases import Server
from django.core.exceptions import ImproperlyConfigured
from support import Names, sooner_than, wait_until
from test_probes import Systemd

import domain_events
from domain_events import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEvent,
    InvalidEvent,
    Middleware,
    Outgoing,
    Publisher,
    Retry,
    Subscriber,
    outbox,
    publish_domain_event,
)
from domain_events.testing import Delivered, EventBroker

django_shop.setup()

from django import test  # noqa: E402
from django.conf import settings as django_settings  # noqa: E402
from django.core import checks  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.core.management.base import CommandError  # noqa: E402
from django.db import DatabaseError, connections, transaction  # noqa: E402
from django.db.transaction import TransactionManagementError  # noqa: E402
from django.test import override_settings  # noqa: E402
from django_shop.models import Invoice, Order  # noqa: E402

from domain_events.django import (  # noqa: E402
    DatabaseConnections,
    configuration,
    make_subscriber,
    on,
    once,
    publish_on_commit,
)
from domain_events.django.database import (  # noqa: E402
    OutboxDatabase,
    executing,
    has_table,
)
from domain_events.django.models import InboxNote, OutboxEvent  # noqa: E402
from domain_events.django.testing import EventBroker as DjangoEventBroker  # noqa: E402
from domain_events.outbox import Courier, close_couriers  # noqa: E402
from domain_events.outbox import write as engine_write  # noqa: E402

NOWHERE = "amqp://guest:guest@127.0.0.1:1/%2F"
TESTS = Path(__file__).parent


class Unwanted(Exception):
    """Ends a block that is to be rolled back."""


@contextlib.contextmanager
def alias_of(server: Server) -> Iterator[str]:
    """An alias for a database of ours on a server, with all tables."""
    alias, name = server.kind, f"shop_{os.getpid()}"
    for each, database in ((f"{alias}_first", server.database), (alias, name)):
        address = server.address.of(database)
        made = connections.configure_settings({"default": address.django})
        connections.settings[each] = made["default"]
    with connections[f"{alias}_first"].cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name}")
    connections[f"{alias}_first"].close()
    del connections[f"{alias}_first"], connections.settings[f"{alias}_first"]
    call_command("migrate", database=alias, run_syncdb=True, verbosity=0)
    yield alias
    connections[alias].close()
    del connections[alias], connections.settings[alias]


@pytest.fixture(scope="session")
def _postgresql(postgresql_server: Server) -> Iterator[str]:
    with alias_of(postgresql_server) as alias:
        yield alias


@pytest.fixture(scope="session")
def _mariadb(mariadb_server: Server) -> Iterator[str]:
    with alias_of(mariadb_server) as alias:
        yield alias


@pytest.fixture(scope="session", autouse=True)
def _sqlite() -> None:
    for alias in ("default", "other"):
        call_command("migrate", database=alias, run_syncdb=True, verbosity=0)


def clear(alias: str) -> None:
    for model in (Order, Invoice, OutboxEvent, InboxNote):
        model.objects.using(alias).all().delete()


@pytest.fixture
def shop() -> Iterator[None]:
    """Empty tables on the default database and the other one; left empty for Django's own tests."""
    for alias in ("default", "other"):
        clear(alias)
    yield
    close_couriers()
    for alias in ("default", "other"):
        clear(alias)


@pytest.fixture
def made_again(shop: None) -> Iterator[None]:
    """Tables that the test drops are made again."""
    yield
    for alias in ("default", "other"):
        call_command("migrate", database=alias, verbosity=0)


@pytest.fixture(params=["default", "postgresql", "mariadb"])
def alias(request: pytest.FixtureRequest, shop: None) -> str:
    """A database whose tables are empty."""
    if request.param == "default":
        return "default"
    request.getfixturevalue(f"{request.param}_server").start()
    name: str = request.getfixturevalue(f"_{request.param}")
    clear(name)
    return name


@pytest.fixture
def outbox_on() -> Iterator[None]:
    """Events are written to the outbox; the couriers end with the test."""
    with override_settings(DOMAIN_EVENTS={"OUTBOX": True}):
        yield
    close_couriers()


@pytest.fixture(params=["without an outbox", "with an outbox"])
def either(request: pytest.FixtureRequest, alias: str, event_broker: EventBroker) -> str:
    """A database of each kind, without an outbox and with it."""
    if request.param == "with an outbox":
        request.getfixturevalue("outbox_on")
    return alias


def waiting(alias: str = "default") -> list[OutboxEvent]:
    """The rows of the outbox."""
    return list(OutboxEvent.objects.using(alias).order_by("id"))


def names_of(alias: str = "default") -> list[str]:
    return list(Order.objects.using(alias).order_by("id").values_list("name", flat=True))


def published(broker: EventBroker) -> list[Any]:
    return [event.data["name"] for event in broker.published]


def place(name: str, alias: str = "default") -> DomainEvent[Any]:
    """Store an order, and publish that."""
    Order.objects.using(alias).create(name=name)
    return publish_on_commit("order.placed", {"name": name}, using=alias)


# --- after the commit ----------------------------------------------------------------------------


def test_event_is_known_before_the_commit_and_published_after_it(
    either: str, event_broker: EventBroker
) -> None:
    """With the id that was returned, once."""
    with transaction.atomic(using=either):
        event = place("a", either)
        assert event.uuid_string
        assert event_broker.published == []
    assert event_broker.published == [event]
    assert event_broker.published[0].uuid_string == event.uuid_string


def test_rolled_back_savepoint_takes_its_own_events_and_no_others(
    either: str, event_broker: EventBroker
) -> None:
    """At any depth; what was published is what was stored."""
    with transaction.atomic(using=either):
        place("a", either)
        with contextlib.suppress(Unwanted), transaction.atomic(using=either):
            place("gone", either)
            with transaction.atomic(using=either):
                place("gone too", either)
            raise Unwanted
        with transaction.atomic(using=either):
            place("b", either)
            with contextlib.suppress(Unwanted), transaction.atomic(using=either):
                place("gone as well", either)
                raise Unwanted
        place("c", either)
        assert published(event_broker) == []
    assert published(event_broker) == names_of(either) == ["a", "b", "c"]


def test_nothing_is_published_of_a_transaction_that_is_rolled_back(
    either: str, event_broker: EventBroker
) -> None:
    """Nor with the next one."""
    with contextlib.suppress(Unwanted), transaction.atomic(using=either):
        place("gone", either)
        raise Unwanted
    with transaction.atomic(using=either):
        place("a", either)
        transaction.set_rollback(True, using=either)
    with transaction.atomic(using=either):
        place("b", either)
    assert published(event_broker) == names_of(either) == ["b"]


def test_each_database_has_its_own_transaction(shop: None, event_broker: EventBroker) -> None:
    """An event goes with the transaction of the database that it names."""
    with contextlib.suppress(Unwanted), transaction.atomic():
        with transaction.atomic(using="other"):
            place("default")
            place("other", "other")
            assert published(event_broker) == []
        assert published(event_broker) == ["other"]
        raise Unwanted
    assert published(event_broker) == names_of("other") == ["other"]
    assert names_of() == []


def test_without_a_transaction_it_is_published_at_once(
    either: str, event_broker: EventBroker
) -> None:
    """As autocommit has stored it."""
    place("a", either)
    assert published(event_broker) == ["a"]


def test_without_autocommit_it_is_an_error(alias: str, event_broker: EventBroker) -> None:
    """Django would never call it back, so the caller must know."""
    connection = connections[alias]
    connection.ensure_connection()
    connection.set_autocommit(False)
    try:
        with pytest.raises(TransactionManagementError):
            publish_on_commit("order.placed", {}, using=alias)
    finally:
        connection.rollback()
        connection.set_autocommit(True)
    assert event_broker.published == []


def test_durable_block_publishes_at_its_end(either: str, event_broker: EventBroker) -> None:
    with transaction.atomic(using=either, durable=True):
        place("a", either)
        assert published(event_broker) == []
    assert published(event_broker) == ["a"]


def test_request_is_a_transaction_with_atomic_requests(
    shop: None, event_broker: EventBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event of a request that fails is not published; the response has the event's id."""
    monkeypatch.setitem(connections["default"].settings_dict, "ATOMIC_REQUESTS", True)
    client = test.Client(raise_request_exception=False)
    assert client.get("/place/bad").status_code == 500
    response = client.get("/place/a")
    assert (response.status_code, response["within"]) == (200, "True")
    (event,) = event_broker.published
    assert (event.data, event.uuid_string) == ({"name": "a"}, response.content.decode())
    assert names_of() == ["a"]


def test_data_are_those_of_the_call(shop: None, event_broker: EventBroker) -> None:
    """Not what became of them until the commit."""
    data = {"name": "Ada", "lines": [1]}
    with transaction.atomic():
        event = publish_on_commit("order.placed", data)
        data["name"] = "Grace"
        data["lines"].append(2)  # type: ignore[attr-defined]
    assert [each.data for each in event_broker.published] == [{"name": "Ada", "lines": [1]}]
    assert event == event_broker.published[0]


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        (("order.placed", {"tags": {1, 2}}), {}, InvalidEvent),
        (("", {}), {}, InvalidEvent),
        (("order.*", {}), {}, InvalidEvent),
        (("order.placed", {}), {"headers": {"x-own": 1}}, InvalidEvent),
        (("order.placed", {}), {"version": 0}, InvalidEvent),
        (("order.placed", {}), {"timeout": -1}, ConfigurationError),
        (("order.placed", {}), {"exchange": ""}, ConfigurationError),
        (("order.placed", {}), {"mandatory": "yes"}, ConfigurationError),
        (("order.placed", {}, None, None, None, "http://x"), {}, ConfigurationError),
    ],
)
def test_what_can_never_be_published_is_refused_by_the_call(
    shop: None,
    event_broker: EventBroker,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
) -> None:
    """Before the commit, which can still be undone."""

    def place_wrongly() -> None:
        with transaction.atomic():
            Order.objects.create(name="a")
            publish_on_commit(*arguments, **options)

    with pytest.raises(error):
        place_wrongly()
    assert names_of() == []
    assert event_broker.published == []


def test_event_has_what_publish_domain_event_would_give_it(
    shop: None, event_broker: EventBroker
) -> None:
    """Each argument arrives, and the event goes to its exchange."""
    seen: list[DomainEvent[Any]] = []
    subscriber = Subscriber(exchange="shop")
    subscriber.register(seen.append, "all", ["#"])
    for publish in (publish_domain_event, publish_on_commit):
        publish(
            *("a.b", {"x": 1}, 7, "some-id", 5.5, domain_events.DEFAULT),
            exchange="shop",
            headers={"h": 1},
            correlation_id="other",
            cause="another",
            version=3,
        )
    event_broker.deliver(subscriber)
    first, second = seen
    assert first == second
    assert first.details == second.details


def test_event_for_nobody_is_logged_with_mandatory(
    shop: None, event_broker: EventBroker, caplog: pytest.LogCaptureFixture
) -> None:
    publish_on_commit("order.placed", {}, mandatory=True)
    assert "EventUnroutable" in caplog.text


def test_cause_is_that_of_the_call(shop: None, event_broker: EventBroker) -> None:
    """The handler is over by the time of the commit."""
    seen: list[DomainEvent[Any]] = []
    subscriber = Subscriber()
    subscriber.register(
        lambda _: publish_on_commit("a.b", {}, headers={"h": 1}, version=3), "x", ["x"]
    )
    subscriber.register(seen.append, "y", ["a.b"])
    handled = DomainEvent("x", {}, correlation_id="all")
    with transaction.atomic():
        event_broker.deliver(subscriber, handled)
    event_broker.deliver(subscriber)
    (event,) = seen
    assert (event.cause, event.correlation_id) == (handled.uuid_string, "all")
    assert (event.headers, event.version) == ({"h": 1}, 3)


# --- without a broker ----------------------------------------------------------------------------


@pytest.fixture
def no_broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A port on which nobody listens."""
    monkeypatch.setenv("DOMAIN_EVENTS_URL", NOWHERE)
    yield
    domain_events.close_publishers()


def assert_logged(caplog: pytest.LogCaptureFixture, *events: DomainEvent[Any]) -> None:
    """A line for each, with its key and id, and the event itself with the error."""
    records = [each for each in caplog.records if "was not published" in each.getMessage()]
    assert len(records) == len(events)
    for record, event in zip(records, events, strict=True):
        assert record.levelno == logging.ERROR
        assert f"{event.routing_key} {event.uuid_string} " in record.getMessage()
        assert "secret" not in record.getMessage()
        assert record.exc_info is not None
        error = record.exc_info[1]
        assert isinstance(error, BrokerUnavailable)
        assert error.event == event


@pytest.mark.usefixtures("no_broker")
def test_outage_reaches_neither_the_caller_nor_other_hooks(
    alias: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What was committed is committed. It is logged, with the event."""
    others = []
    with transaction.atomic(using=alias):
        transaction.on_commit(lambda: others.append("before"), using=alias)
        Order.objects.using(alias).create(name="a")
        event = publish_on_commit("order.placed", {"secret": 1}, using=alias, timeout=0.2)
        transaction.on_commit(lambda: others.append("after"), using=alias)
    assert names_of(alias) == ["a"]
    assert others == ["before", "after"]
    assert_logged(caplog, event)


@pytest.mark.usefixtures("no_broker")
def test_outage_without_a_transaction_is_logged_too(
    shop: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Autocommit has stored what the event is about."""
    Order.objects.create(name="a")
    assert_logged(caplog, publish_on_commit("order.placed", {"secret": 1}, timeout=0.2))


@pytest.mark.usefixtures("no_broker")
def test_events_of_a_transaction_wait_for_the_broker_together(
    shop: None, caplog: pytest.LogCaptureFixture
) -> None:
    """One timeout for all of them: somebody waits for the response. The next one has its own."""
    with sooner_than(2.0 * 20), transaction.atomic():
        events = [publish_on_commit("order.placed", {"n": n}, timeout=2.0) for n in range(20)]
    assert_logged(caplog, *events)
    caplog.clear()
    begun = time.monotonic()
    with transaction.atomic():
        event = publish_on_commit("order.placed", {}, timeout=1.0)
    assert time.monotonic() - begun > 0.9
    assert_logged(caplog, event)


# --- tests of a Django project -------------------------------------------------------------------


class TestInTestCase(test.TestCase):
    """A test that is a transaction which is never committed."""

    databases = {"default", "other"}  # noqa: RUF012 - as Django documents it

    @classmethod
    def setUpTestData(cls) -> None:
        place("of the class")

    def setUp(self) -> None:
        broker = DjangoEventBroker()
        self.broker = broker.start()
        self.addCleanup(broker.stop)

    def test_broker_sees_what_would_be_committed(self) -> None:
        """Once the block is left; never of a savepoint that was rolled back."""
        with transaction.atomic():
            place("a")
            with contextlib.suppress(Unwanted), transaction.atomic():
                place("gone")
                raise Unwanted
            self.broker.assert_not_published()
        place("b", "other")
        with contextlib.suppress(Unwanted), transaction.atomic():
            place("rolled back")
            raise Unwanted
        self.broker.assert_published("order.placed", {"name": "a"}, times=1)
        assert published(self.broker) == ["a", "b"]

    def test_captured_callbacks_publish(self) -> None:
        """Django's way; what is published there is not published a second time."""
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            place("a")
            with transaction.atomic():
                place("b")
        assert len(callbacks) == 2
        assert published(self.broker) == ["a", "b"]
        with self.captureOnCommitCallbacks(execute=True):
            place("c")
            assert published(self.broker) == ["a", "b", "c"]
            place("d")
        assert published(self.broker) == ["a", "b", "c", "d"]

    def test_captured_callbacks_publish_on_the_plain_broker(self) -> None:
        """Of the kit without Django."""
        self.broker.stop()
        with EventBroker() as broker:
            with self.captureOnCommitCallbacks(execute=True):
                place("a")
            assert published(broker) == ["a"]
        self.broker.start()

    def test_handler_is_called_in_the_transaction(self) -> None:
        """Its connection stays open, and what it publishes is delivered in turn."""
        subscriber = make_subscriber()
        place("a")
        with transaction.atomic():
            place("b")
        self.broker.deliver(subscriber)
        assert list(Invoice.objects.values_list("order", flat=True)) == ["a", "b"]
        chain = Subscriber(middleware=[DatabaseConnections()])

        def next_one(event: DomainEvent[Any]) -> None:
            if event.data["n"] < 3:
                publish_on_commit("chain", {"n": event.data["n"] + 1})

        chain.register(next_one, "chain", ["chain"])
        publish_on_commit("chain", {"n": 1})
        assert len(self.broker.deliver(chain)) == 3

    def test_clear_forgets_what_waits(self) -> None:
        place("a")
        self.broker.clear()
        place("b")
        assert published(self.broker) == ["b"]


class TestInTransactionTestCase(test.TransactionTestCase):
    """A test whose transactions are committed."""

    databases = {"default"}  # noqa: RUF012 - as Django documents it

    def test_broker_sees_what_is_committed(self) -> None:
        with DjangoEventBroker() as broker:
            subscriber = make_subscriber()
            with transaction.atomic():
                place("a")
                assert published(broker) == []
            with contextlib.suppress(Unwanted), transaction.atomic():
                place("gone")
                raise Unwanted
            assert published(broker) == ["a"]
            broker.deliver(subscriber)
            assert Invoice.objects.count() == 1


def test_pytest_fixture_is_the_one_for_django(event_broker: EventBroker) -> None:
    assert isinstance(event_broker, DjangoEventBroker)


# --- the outbox ----------------------------------------------------------------------------------


def test_event_is_written_with_the_transaction_and_sent_after_it(
    alias: str, outbox_on: None, event_broker: EventBroker
) -> None:
    """Its row is gone when the broker has it."""
    with transaction.atomic(using=alias):
        event = place("a", alias)
        (row,) = waiting(alias)
        assert (row.event_id, row.routing_key) == (event.uuid_string, "order.placed")
        assert event_broker.published == []
    assert event_broker.published == [event]
    assert waiting(alias) == []


def test_row_is_rolled_back_with_its_transaction(
    alias: str, outbox_on: None, event_broker: EventBroker
) -> None:
    with contextlib.suppress(Unwanted), transaction.atomic(using=alias):
        place("gone", alias)
        raise Unwanted
    with transaction.atomic(using=alias):
        with contextlib.suppress(Unwanted), transaction.atomic(using=alias):
            place("gone", alias)
            raise Unwanted
        assert waiting(alias) == []
    assert event_broker.published == []


def test_invalid_event_leaves_the_transaction_usable(
    alias: str, outbox_on: None, event_broker: EventBroker
) -> None:
    """The caller may catch the error."""
    with transaction.atomic(using=alias):
        place("a", alias)
        with pytest.raises(InvalidEvent):
            publish_on_commit("order.placed", {"tags": {1}}, using=alias)
        place("b", alias)
    assert published(event_broker) == names_of(alias) == ["a", "b"]


def test_lease_is_a_setting(shop: None, outbox_on: None, event_broker: EventBroker) -> None:
    with override_settings(DOMAIN_EVENTS={"OUTBOX": True, "OUTBOX_LEASE": 600}):
        with transaction.atomic():
            place("a")
            (row,) = waiting()
            assert 599 < row.leased_until - row.created < 601
        assert published(event_broker) == ["a"]


@pytest.mark.usefixtures("no_broker")
def test_outage_leaves_the_event_in_the_outbox(
    shop: None, outbox_on: None, caplog: pytest.LogCaptureFixture
) -> None:
    """The request does not wait; a relay sends it, with its id, when there is a broker."""
    with sooner_than(10.0), transaction.atomic():
        event = place("a")
    close_couriers(30)
    assert [row.event_id for row in waiting()] == [event.uuid_string]
    assert "was not published" not in caplog.text
    with DjangoEventBroker() as broker:
        output = io.StringIO()
        call_command("relay_domain_events", database=["default"], once=True, stdout=output)
        assert output.getvalue() == "default: 1 sent\n"
        assert broker.published == [event]
    assert waiting() == []


def test_outbox_can_be_chosen_for_each_database_and_event(
    shop: None, event_broker: EventBroker
) -> None:
    """By its alias; the argument comes before the setting."""

    def is_written(using: str, outbox: bool | None = None) -> bool:
        with transaction.atomic(using=using):
            event = publish_on_commit("order.placed", {}, using=using, outbox=outbox)
            return event.uuid_string in [row.event_id for row in waiting(using)]

    try:
        assert not is_written("default")
        assert is_written("default", outbox=True)
        with override_settings(DOMAIN_EVENTS={"OUTBOX": ["other"]}):
            assert not is_written("default")
            assert is_written("other")
            assert not is_written("other", outbox=False)
    finally:
        close_couriers()
    assert len(event_broker.published) == 5


class Notes(Middleware):
    """Adds a header; notes what is announced, and what came of it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.trace = "first"

    def publishing(self, outgoing: Outgoing) -> Callable[[BaseException | None], object]:
        outgoing.headers["trace"] = self.trace
        return lambda error: self.seen.append((str(outgoing.operation), repr(error)))


@pytest.mark.usefixtures("configured")
def test_event_is_as_it_was_when_it_was_written(
    shop: None, outbox_on: None, event_broker: EventBroker
) -> None:
    """Data, cause, correlation id, and the headers of middleware: a trace goes on from there."""
    notes = Notes()
    domain_events.configure(middleware=[notes])
    seen: list[DomainEvent[Any]] = []
    subscriber = Subscriber()

    def handle(event: DomainEvent[Any]) -> None:
        data = {"n": 1}
        publish_on_commit("a.b", data, 7, headers={"h": 1}, version=3)
        data["n"] = 2

    subscriber.register(handle, "x", ["x"])
    subscriber.register(seen.append, "y", ["a.b"])
    handled = DomainEvent("x", {}, correlation_id="all")
    with transaction.atomic():
        event_broker.deliver(subscriber, handled)
        notes.trace = "later"
    event_broker.deliver(subscriber)
    (event,) = seen
    assert (event.data, event.domain_object_id, event.version) == ({"n": 1}, 7, 3)
    assert (event.cause, event.correlation_id) == (handled.uuid_string, "all")
    assert event.headers == {"h": 1, "trace": "first"}
    assert notes.seen[1:] == [("outbox", "None"), ("relay", "None")]


@pytest.mark.parametrize(
    "options", [{"mandatory": True}, {"connection_settings": "memory://another"}]
)
def test_what_an_outbox_cannot_do_is_refused(
    shop: None, outbox_on: None, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match="outbox=False"):
        publish_on_commit("order.placed", {}, **options)
    publish_on_commit("order.placed", {}, connection_settings=None)
    assert waiting() == []


class TestOutboxInTestCase(test.TestCase):
    """A test that is a transaction which is never committed: nobody else sees its rows."""

    def setUp(self) -> None:
        broker = DjangoEventBroker()
        self.broker = broker.start()
        self.addCleanup(broker.stop)
        overridden = override_settings(DOMAIN_EVENTS={"OUTBOX": True})
        overridden.enable()
        self.addCleanup(overridden.disable)

    def test_broker_sees_what_would_be_committed(self) -> None:
        with transaction.atomic():
            event = place("a")
            assert self.broker.published == []
            assert len(waiting()) == 1
        with contextlib.suppress(Unwanted), transaction.atomic():
            place("gone")
            raise Unwanted
        assert self.broker.published == [event]
        assert waiting() == []

    def test_captured_callbacks_send(self) -> None:
        with EventBroker() as plain, self.captureOnCommitCallbacks(execute=True):
            place("a")
        with self.captureOnCommitCallbacks(execute=True):
            place("b")
        assert (published(plain), published(self.broker)) == (["a"], ["b"])


class TestOutboxInTransactionTestCase(test.TransactionTestCase):
    """A test whose transactions are committed; both tables are emptied after it."""

    databases = {"default"}  # noqa: RUF012 - as Django documents it

    def test_broker_sees_what_is_committed(self) -> None:
        assert (waiting(), list(InboxNote.objects.all())) == ([], [])
        self.addCleanup(close_couriers)
        with override_settings(DOMAIN_EVENTS={"OUTBOX": True}), DjangoEventBroker() as broker:
            with transaction.atomic():
                place("a")
                assert published(broker) == []
            assert published(broker) == ["a"]
        InboxNote.objects.create(subscriber="x", event_id="of the first test", handled=0.0)

    test_both_tables_are_emptied = test_broker_sees_what_is_committed


# --- the tables ----------------------------------------------------------------------------------


def test_migration_makes_what_the_models_say_and_can_be_undone(made_again: None) -> None:
    call_command("makemigrations", "domain_events_outbox", check=True, dry_run=True, verbosity=0)
    app = "domain_events_outbox"
    call_command("migrate", app, "zero", database="other", verbosity=0)
    assert ids_of_tables("other") == ["domain_events.W005"]
    call_command("migrate", app, database="other", verbosity=0)
    assert ids_of_tables("other") == []


def warnings_about_tables(alias: str) -> dict[str, str]:
    found = checks.run_checks(tags=["database"], databases=[alias])
    return {each.id: each.msg for each in found if "In the database" in each.msg}


def ids_of_tables(alias: str) -> list[str]:
    return list(warnings_about_tables(alias))


def test_migration_makes_the_tables_of_the_engine(alias: str) -> None:
    """A program without Django may share them."""
    connection = connections[alias]
    made = [described(connection)]
    with connection.cursor() as cursor:
        for statement in (
            *(f"DROP TABLE {table}" for table in (outbox.OUTBOX, outbox.INBOX)),
            *outbox.create(connection.vendor),
        ):
            cursor.execute(statement)
    made.append(described(connection))
    assert made[0] == made[1]
    for model in (OutboxEvent, InboxNote):
        fields = {each.column: each.null for each in model._meta.concrete_fields if each.column}
        columns = {column[0]: column[6] for column in made[0][model._meta.db_table]}
        assert {**columns, "id": False} == {**fields, "id": False}  # SQLite's may be given as NULL


def described(connection: Any) -> dict[str, Any]:
    with connection.cursor() as cursor:
        return {
            table: connection.introspection.get_table_description(cursor, table)
            for table in (outbox.OUTBOX, outbox.INBOX)
        }


def test_check_of_the_database_finds_what_is_missing(alias: str) -> None:
    """A column, an index; and rows that nobody sends."""
    assert ids_of_tables(alias) == []
    connection = connections[alias]
    row = {"event_id": "e", "exchange": "x", "routing_key": "r", "body": "", "details": ""}
    OutboxEvent.objects.using(alias).create(**row, created=time.time() - 1000)
    OutboxEvent.objects.using(alias).create(**row, created=time.time(), parked=1.0)
    assert ids_of_tables(alias) == ["domain_events.W006", "domain_events.W007"]
    clear(alias)
    with connection.cursor() as cursor:
        index = f"{outbox.OUTBOX}_order"
        where = f" ON {outbox.OUTBOX}" if connection.vendor == "mysql" else ""
        cursor.execute(f"DROP INDEX {index}{where}")
        cursor.execute(f"ALTER TABLE {outbox.INBOX} RENAME COLUMN handled TO done")
        (warning,) = warnings_about_tables(alias).values()
        assert f"{outbox.INBOX} has no column handled; {outbox.OUTBOX} has no index" in warning
        cursor.execute(f"ALTER TABLE {outbox.INBOX} RENAME COLUMN done TO handled")
        cursor.execute(f"CREATE INDEX {index} ON {outbox.OUTBOX} (object_key, id)")
    assert ids_of_tables(alias) == []


class OnlyOther:
    """A router that keeps our tables in one database."""

    def allow_migrate(self, db: str, app_label: str, **_: Any) -> bool | None:
        return db == "other" if app_label == "domain_events_outbox" else None

    def db_for_write(self, model: Any, **_: Any) -> str | None:
        return "other"


def test_router_decides_where_the_tables_are_and_not_where_events_go(
    made_again: None, event_broker: EventBroker
) -> None:
    """An event goes with its transaction; a router that keeps the table away is found."""
    with override_settings(DATABASE_ROUTERS=[OnlyOther()]):
        with override_settings(DOMAIN_EVENTS={"OUTBOX": True}):
            assert "domain_events.E001" in ids_of_checks()
            with transaction.atomic():
                place("a")
                assert (len(waiting()), waiting("other")) == (1, [])
        with override_settings(DOMAIN_EVENTS={"OUTBOX": ["other"]}):
            assert "domain_events.E001" not in ids_of_checks()
    close_couriers()
    call_command("migrate", "domain_events_outbox", "zero", database="default", verbosity=0)
    with override_settings(DATABASE_ROUTERS=[OnlyOther()]):
        call_command("migrate", "domain_events_outbox", database="default", verbosity=0)
        assert not has_table("default")
        assert ids_of_tables("default") == []
        call_command("migrate", "domain_events_outbox", "zero", database="default", verbosity=0)
    assert published(event_broker) == ["a"]


# --- connections of courier and relay ------------------------------------------------------------


def test_own_connection_takes_no_part_in_the_callers_transaction(alias: str) -> None:
    database = OutboxDatabase(alias)
    with transaction.atomic(using=alias):
        names_of(alias)
        if alias != "default":  # SQLite has one writer
            Order.objects.using(alias).create(name="uncommitted")
        with database.transaction() as execute:
            assert (
                execute(
                    "SELECT count(*) FROM django_shop_order WHERE name = :x", {"x": "uncommitted"}
                )[0][0]
                == 0
            )
    database.close()


def test_own_connection_rolls_back_and_goes_on(alias: str) -> None:
    """Also after the server has closed it."""
    database = OutboxDatabase(alias)
    sql = "INSERT INTO django_shop_order (name) VALUES (:name)"

    def fail() -> None:
        with database.transaction() as execute:
            execute(sql, {"name": "gone"})
            raise Unwanted

    for turn in range(3):
        with pytest.raises(Unwanted):
            fail()
        with database.transaction() as execute:
            execute(sql, {"name": f"{turn}: 100 %"})
        if alias == "postgresql":
            cut_connections()
    database.close()
    assert names_of(alias) == ["0: 100 %", "1: 100 %", "2: 100 %"]


# --- the relay and parked events -----------------------------------------------------------------


@pytest.fixture
def written(shop: None) -> list[DomainEvent[Any]]:
    """Events that a process has written before it died, one of which can never be sent."""
    events = []
    with transaction.atomic():
        for number in range(3):
            event = DomainEvent("order.placed", {"name": str(number)}, domain_object_id=number)
            engine_write(executing(connections["default"]), "sqlite", event)
            events.append(event)
    OutboxEvent.objects.filter(event_id=events[1].uuid_string).update(body="not an event")
    return events


def relay(*arguments: str, command: str = "relay_domain_events") -> list[str]:
    output = io.StringIO()
    call_command(command, *arguments, stdout=output)
    return output.getvalue().splitlines()


def test_event_that_cannot_be_sent_is_parked_until_somebody_decides(
    written: list[DomainEvent[Any]], event_broker: EventBroker
) -> None:
    """Listed, retried and discarded by the command."""
    assert relay("--status", "--database=default")[0].startswith("default: 3 waiting, the oldest ")
    assert relay("--once")[:2] == ["default: 2 sent", "other: 0 sent"]
    assert published(event_broker) == ["0", "2"]
    assert relay("--status", "--database=other") == [
        "other: 0 waiting, the oldest for 0 s; 0 parked"
    ]
    (row,) = waiting()
    (line,) = relay(command="parked_domain_events")
    assert line.startswith(f"{row.id}: order.placed {written[1].uuid_string} (object 1), parked ")
    assert "InvalidEvent" in line
    with pytest.raises(CommandError, match="not parked"):
        relay("--retry", str(row.id), "77", command="parked_domain_events")
    assert relay("--once", "--database=default") == ["default: 0 sent"]
    OutboxEvent.objects.update(body=written[1].to_json())
    assert relay("--retry-all", command="parked_domain_events") == [
        "1 to be sent again by the next relay."
    ]
    assert relay("--once", "--database=default") == ["default: 1 sent"]
    assert published(event_broker) == ["0", "2", "1"]


def test_discarded_event_is_printed(
    written: list[DomainEvent[Any]], event_broker: EventBroker
) -> None:
    relay("--once")
    (row,) = waiting()
    assert relay("--discard", str(row.id), command="parked_domain_events") == ["not an event"]
    assert waiting() == []


@pytest.mark.parametrize("arguments", [["--once"], []])
def test_relay_command_prunes_the_inbox(programs: Shop, arguments: list[str]) -> None:
    """Notes that are older than thirty days, and no others; also for a cron job."""
    old, young = time.time() - 31 * 86400, time.time() - 29 * 86400
    note = "INSERT INTO domain_events_inbox (subscriber, event_id, handled) VALUES ('s', ?, ?)"
    for number in range(1500):  # more than a batch
        programs.execute(note, f"old {number}", old)
    programs.execute(note, "young", young)

    def left() -> list[Any]:
        return programs.execute("SELECT event_id FROM domain_events_inbox")

    if arguments:
        done = programs.manage("relay_domain_events", *arguments)
        assert done.returncode == 0, done.stderr
        assert left() == [("young",)]
    else:
        with programs.running("Relaying: default", "relay_domain_events"):
            wait_until(lambda: left() == [("young",)])


def test_relay_command_serves_metrics(programs: Shop, unused_port: int) -> None:
    """As Prometheus scrapes them; the command ends without them."""
    insert = (
        "INSERT INTO domain_events_outbox (event_id, exchange, routing_key, body, details, created,"
        " leased_until, parked) VALUES ('e', 'x', 'k', '{}', '{}', 1, 0, 1)"
    )
    programs.execute(insert)
    address = f"http://127.0.0.1:{unused_port}/metrics"
    with programs.running("Relaying: ", "relay_domain_events", f"--metrics-port={unused_port}"):
        with urllib.request.urlopen(address, timeout=30) as response:
            scrape = response.read().decode()
        assert 'domain_events_outbox_parked{outbox="default"} 1.0' in scrape
        assert 'domain_events_outbox_waiting{outbox="other"}' not in scrape  # it has no table
    taken = programs.manage("relay_domain_events", "--metrics-port=65536")
    assert taken.returncode == 1
    assert taken.stderr.startswith("CommandError: ConfigurationError: port must be an int")


def test_relay_command_names_what_is_missing(made_again: None) -> None:
    with pytest.raises(CommandError, match="There is no database 'x' in the settings"):
        relay("--database=x")
    call_command("migrate", "domain_events_outbox", "zero", database="other", verbosity=0)
    with pytest.raises(CommandError, match="no table domain_events_outbox in other; run"):
        relay("--database=other")
    assert "other: 0 sent" not in relay("--once")


def test_admin_shows_the_outbox_and_decides_about_parked_events(
    written: list[DomainEvent[Any]], event_broker: EventBroker
) -> None:
    """Nothing can be changed, added or deleted besides."""
    from django.contrib.auth.models import User

    User.objects.all().delete()
    client = test.Client()
    client.force_login(User.objects.create_superuser("ada"))
    relay("--once")
    engine_write_one()
    parked, waits = waiting()
    page = "/admin/domain_events_outbox/outboxevent/"
    shown = client.get(page).content.decode()
    assert "Delete selected" not in shown
    assert "parked since" in shown
    assert "InvalidEvent" in shown
    assert str(parked.id) in client.get(f"{page}?state=parked").content.decode()
    assert written[1].uuid_string not in client.get(f"{page}?state=waiting").content.decode()
    detail = client.get(f"{page}{waits.id}/change/").content.decode()
    assert waits.event_id in detail
    assert 'name="_save"' not in detail
    assert client.get(f"{page}add/").status_code == 403
    assert client.post(f"{page}{waits.id}/delete/", {"post": "yes"}).status_code == 403
    both = [parked.id, waits.id]
    client.post(page, {"action": "retry", "_selected_action": both})
    assert [row.parked for row in waiting()] == [0, 0]
    OutboxEvent.objects.filter(id=parked.id).update(parked=1.0)
    client.post(page, {"action": "delete_selected", "_selected_action": both})
    assert [row.id for row in waiting()] == [waits.id]


def engine_write_one() -> None:
    with transaction.atomic():
        event = DomainEvent("order.placed", {"name": "waits"})
        engine_write(executing(connections["default"]), "sqlite", event)


def test_admin_respects_permissions(written: list[DomainEvent[Any]]) -> None:
    """Who may only look cannot decide."""
    from django.contrib.auth.models import Permission, User

    User.objects.all().delete()
    user = User.objects.create_user("bob", is_staff=True)
    user.user_permissions.add(Permission.objects.get(codename="view_outboxevent"))
    client = test.Client()
    client.force_login(user)
    page = "/admin/domain_events_outbox/outboxevent/"
    assert client.get(page).status_code == 200
    OutboxEvent.objects.update(parked=1.0)
    ids = [row.id for row in waiting()]
    for action in ("retry", "delete_selected"):
        client.post(page, {"action": action, "_selected_action": ids})
    assert [row.parked for row in waiting()] == [1.0] * 3


# --- handled once --------------------------------------------------------------------------------


def test_duplicate_is_skipped(alias: str, event_broker: EventBroker) -> None:
    """By the subscriber that has handled the event; another one handles it, too."""
    subscriber = Subscriber()
    for name in ("invoices", "copies"):
        handler = once(using=alias)(lambda event: place(event.subscriber, alias))
        subscriber.register(handler, name, ["order.paid"])
    event = DomainEvent("order.paid", {})
    deliveries = event_broker.deliver(subscriber, event, event, event)
    assert [str(each.outcome) for each in deliveries] == ["handled"] * 6
    assert sorted(names_of(alias)) == ["copies", "invoices"]
    close_couriers()


@dataclass
class Paid:
    """Typed data."""

    amount: int


def test_handler_of_typed_data_is_called_with_it(alias: str, event_broker: EventBroker) -> None:
    """Its annotation is found behind the decorator."""

    @once(using=alias)
    def handle(event: DomainEvent[Paid]) -> None:
        place(f"{type(event.data).__name__} {event.data.amount}", alias)

    subscriber = Subscriber()
    subscriber.register(handle, "typed", ["order.paid"])
    event_broker.deliver(subscriber, DomainEvent("order.paid", Paid(7)), raising=True)
    assert names_of(alias) == ["Paid 7"]
    close_couriers()


def test_failed_handler_leaves_nothing_behind(alias: str, event_broker: EventBroker) -> None:
    """Its retry is handled, and so is its replayed dead letter."""
    attempts: list[int] = []

    @once(using=alias)
    def handle(event: DomainEvent[Any]) -> None:
        place(f"{len(attempts)}", alias)
        attempts.append(1)
        if len(attempts) < 3:
            raise Retry(1) if len(attempts) == 1 else Unwanted

    subscriber = Subscriber()
    subscriber.register(handle, "invoices", ["order.paid"], max_retries=3)
    deliveries = event_broker.deliver_all(subscriber, DomainEvent("order.paid", {}))
    assert [str(each.outcome) for each in deliveries] == ["retry", "dead letter"]
    assert names_of(alias) == []
    domain_events.replay_all("invoices")
    event_broker.deliver(subscriber)
    assert names_of(alias) == ["2"]
    assert [each.routing_key for each in event_broker.published].count("order.placed") == 1
    close_couriers()


@pytest.mark.parametrize("first_commits", [True, False])
def test_concurrent_duplicate_waits_for_the_first(
    alias: str, first_commits: bool, event_broker: EventBroker
) -> None:
    """And is skipped only if that was committed."""
    entered, go_on = threading.Event(), threading.Event()
    calls: list[str] = []

    @once(using=alias)
    def handle(event: DomainEvent[Any]) -> None:
        calls.append("called")
        place(f"{len(calls)}", alias)
        if len(calls) == 1:
            entered.set()
            assert go_on.wait(60)
            if not first_commits:
                raise Unwanted

    event = DomainEvent("order.paid", {})

    def run() -> None:
        with contextlib.suppress(Unwanted):
            handle(event)
        connections.close_all()

    first, second = threading.Thread(target=run), threading.Thread(target=run)
    first.start()
    assert entered.wait(60)
    second.start()
    second.join(0.5)
    assert second.is_alive()
    assert calls == ["called"]
    go_on.set()
    for thread in (first, second):
        thread.join(60)
        assert not thread.is_alive()
    assert names_of(alias) == (["1"] if first_commits else ["2"])
    assert published(event_broker) == names_of(alias)
    close_couriers()


@pytest.mark.parametrize(
    ("alias", "lose"),
    [
        ("postgresql", "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"),
        ("mariadb", "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213"),
    ],
    indirect=["alias"],
)
def test_handler_whose_transaction_lost_a_race_is_called_again(
    alias: str, event_broker: EventBroker, lose: str
) -> None:
    """A serialization failure, or a deadlock: no dead letter, and its work is done once."""
    calls: list[str] = []

    @once(using=alias)
    def handle(event: DomainEvent[Any]) -> None:
        place(event.data, alias)
        calls.append("called")
        if len(calls) == 1:
            with connections[alias].cursor() as cursor:
                cursor.execute(lose)

    handle(DomainEvent("order.paid", "a"))
    assert len(calls) == 2
    assert names_of(alias) == published(event_broker) == ["a"]
    # Within a transaction of the caller's, as of a test, that is for the caller to repeat.
    calls.clear()
    with pytest.raises(DatabaseError), transaction.atomic(using=alias):
        handle(DomainEvent("order.paid", "b"))
    assert len(calls) == 1
    close_couriers()


def test_follow_up_event_comes_once_though_the_process_dies(
    alias: str, event_broker: EventBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the commit, before anything is sent; the outbox is used without being switched on."""

    @once(using=alias)
    def handle(event: DomainEvent[Any]) -> None:
        place("follow-up", alias)

    event = DomainEvent("order.paid", {})
    with monkeypatch.context() as dead:
        dead.setattr(Courier, "take", lambda *_: None)
        handle(event)
    handle(event)
    assert event_broker.published == []
    OutboxEvent.objects.using(alias).update(leased_until=0)  # as after thirty seconds
    assert relay("--once", f"--database={alias}") == [f"{alias}: 1 sent"]
    assert published(event_broker) == ["follow-up"]


def test_once_above_on_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function would be registered without it."""
    from domain_events.django import handlers

    monkeypatch.setattr(handlers, "_registrations", {})

    def handle(event: DomainEvent[Any]) -> None: ...

    assert on("a.b", name="x")(once(handle)).__name__ == "handle"
    with pytest.raises(ConfigurationError, match=r"@once must be below @on.*\.handle: "):
        once(on("a.b", name="y")(handle))


# --- settings ------------------------------------------------------------------------------------


@pytest.fixture
def configured() -> Iterator[None]:
    """The process's defaults are reset afterwards."""
    yield
    domain_events.configure()


@pytest.mark.usefixtures("configured")
def test_settings_are_those_of_configure() -> None:
    """The broker, the name, middleware by its path, its class or an instance."""
    own = DatabaseConnections()
    path = "domain_events.django.DatabaseConnections"
    given = {"URL": "memory://shop", "APP_ID": "shop", "MIDDLEWARE": [path, own, type(own)]}
    with override_settings(DOMAIN_EVENTS=given):
        configuration.configure()
    assert domain_events.settings.resolve() == ("memory://shop",)
    assert domain_events.settings.app_id() == "shop"
    chain = domain_events.settings.middleware()
    assert list(map(type, chain)) == [DatabaseConnections] * 3
    assert chain[1] is own


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize(
    ("url", "broker"),
    [("memory://old", ("memory://old",)), (None, None), ("", ("memory://environment",))],
)
def test_domain_event_brokers_setting_is_the_broker(
    url: str | None, broker: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOMAIN_EVENTS_URL", "memory://environment")
    with override_settings(DOMAIN_EVENT_BROKER=url):
        configuration.configure()
    assert domain_events.settings.resolve() == broker


@pytest.mark.usefixtures("configured")
def test_settings_that_say_nothing_leave_what_the_program_has_configured() -> None:
    domain_events.configure("memory://own", app_id="own")
    with override_settings(DOMAIN_EVENTS={}):
        configuration.configure()
    assert domain_events.settings.resolve() == ("memory://own",)


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"DOMAIN_EVENTS": "amqp://user:hunter2@host"}, "must be a dict"),
        ({"DOMAIN_EVENTS": {"URI": "amqp://user:hunter2@host"}}, "has 'URI'; there are APP_ID"),
        ({"DOMAIN_EVENTS": {"URL": "amq://user:hunter2@host"}}, "cannot be a broker's URL"),
        ({"DOMAIN_EVENTS": {"MIDDLEWARE": ["no.such.Thing"]}}, "No module named 'no'"),
        ({"DOMAIN_EVENTS": {"MIDDLEWARE": ["django_shop.setup"]}}, "middleware must be"),
        ({"DOMAIN_EVENTS": {"URL": None}, "DOMAIN_EVENT_BROKER": None}, "given twice"),
        ({"DOMAIN_EVENTS": {"OUTBOX_TIMEOUT": 30}}, "lease must be longer than the timeout"),
        ({"DOMAIN_EVENTS": {"OUTBOX_LEASE": "1h"}}, "lease must be a positive number of seconds"),
    ],
)
def test_settings_that_cannot_work_stop_the_start(given: dict[str, Any], words: str) -> None:
    """With a web server, too, which runs no checks. The password is not shown."""
    with override_settings(**given), pytest.raises(ImproperlyConfigured, match=words) as error:
        configuration.configure()
    assert "hunter2" not in str(error.value)


@pytest.mark.usefixtures("configured")
def test_outbox_without_its_app_names_what_to_do() -> None:
    """Nothing else of the app runs then, so no check finds it; not that there is no table."""
    installed = [each for each in django_settings.INSTALLED_APPS if "domain_events" not in each]
    with (
        override_settings(INSTALLED_APPS=installed, DOMAIN_EVENTS={"OUTBOX": True}),
        pytest.raises(ImproperlyConfigured, match=r"add it, then run manage\.py migrate"),
    ):
        publish_on_commit("order.placed", {})


def ids_of_checks(**given: Any) -> list[str]:
    with override_settings(**given):
        found = checks.run_checks(
            tags=["domain_events"], include_deployment_checks=True, databases=[]
        )
        return [each.id or "" for each in found]


@pytest.mark.usefixtures("configured")
def test_checks_find_what_was_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in domain_events.settings.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert (
        checks.run_checks(tags=["domain_events"], databases=[]) == []
    )  # nor in each run of the tests
    assert ids_of_checks() == ["domain_events.W002"]
    assert ids_of_checks(DEBUG=True) == []
    assert ids_of_checks(DOMAIN_EVENTS={"URL": "amqp://host"}) == []
    assert ids_of_checks(DOMAIN_EVENTS={"URL": None}) == ["domain_events.W001"]
    assert ids_of_checks(DOMAIN_EVENT_BROKER=None) == ["domain_events.W001"]
    domain_events.configure("amqp://host")
    assert ids_of_checks() == []
    monkeypatch.setenv("AMQP_URL", "amqp://host")
    domain_events.configure()
    assert ids_of_checks() == []


def test_checks_find_a_pool_that_keeps_broken_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_URL", "amqp://host")
    pooled: dict[str, Any] = {"ENGINE": "django.db.backends.postgresql", "OPTIONS": {"pool": True}}
    monkeypatch.setitem(django_settings.DATABASES, "pooled", pooled)
    assert ids_of_checks() == ["domain_events.W003"]
    pooled["CONN_HEALTH_CHECKS"] = True
    assert ids_of_checks() == []


def test_checks_find_the_app_of_domain_event_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_URL", "amqp://host")
    both = [*django_settings.INSTALLED_APPS, "domain_event_broker.django"]
    assert ids_of_checks(INSTALLED_APPS=both) == ["domain_events.W004"]


# --- coming from domain-event-broker -------------------------------------------------------------


@pytest.fixture
def dead_letter(event_broker: EventBroker) -> Subscriber:
    """A subscriber that has failed on an event."""

    def fail(event: DomainEvent[Any]) -> None:
        raise Unwanted

    subscriber = Subscriber()
    subscriber.register(fail, "test-replay", ["test.replay"])
    event_broker.deliver(subscriber, DomainEvent("test.replay", {"message": "a"}))
    return subscriber


def replay(*arguments: str) -> list[str]:
    output = io.StringIO()
    call_command("replay_domain_event", "test-replay", *arguments, stdout=output)
    return output.getvalue().splitlines()


def test_dead_letter_is_replayed_by_the_command(
    dead_letter: Subscriber, event_broker: EventBroker
) -> None:
    """The oldest one, or all."""
    assert replay() == ["0 dead-lettered events remaining for test-replay"]
    assert not event_broker.dead_letters("test-replay")
    events = (DomainEvent("test.replay", {"n": n}) for n in range(3))
    assert len(event_broker.deliver(dead_letter, *events)) == 4
    assert replay() == ["3 dead-lettered events remaining for test-replay"]
    assert replay("--all") == ["0 dead-lettered events remaining for test-replay"]
    assert len(event_broker.deliver(dead_letter)) == 4


@pytest.mark.parametrize(
    ("answer", "left", "line"),
    [
        ("Replay", 0, "Message is returned to worker queue."),
        ("discard", 0, "Message has been discarded."),
        ("Leave", 1, "Message left in queue."),
        ("Obliterate", 1, "Message left in queue."),
        ("", 1, "Message left in queue."),
        (None, 1, "Timed out. Message left in queue."),
    ],
)
def test_dead_letter_is_decided_about(
    dead_letter: Subscriber,
    event_broker: EventBroker,
    monkeypatch: pytest.MonkeyPatch,
    answer: str | None,
    left: int,
    line: str,
) -> None:
    """Its JSON is shown, and the answer has half a minute."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{answer}\n"))
    readable = [] if answer is None else [sys.stdin]
    monkeypatch.setattr("select.select", lambda *_: (readable, [], []))
    lines = replay("--interactive")
    assert lines[:3] == ["Please specify action for:", "{", '    "data": {']
    assert line in lines[-2]
    assert len(event_broker.dead_letters("test-replay")) == left


@pytest.mark.usefixtures("event_broker")
def test_command_reports_an_error_without_a_traceback(no_broker: None) -> None:
    with pytest.raises(CommandError, match="TopologyError"):
        call_command("replay_domain_event", "no-such-queue")


# --- handlers ------------------------------------------------------------------------------------


def test_handlers_of_all_apps_are_found(shop: None, event_broker: EventBroker) -> None:
    """Or those that are named; the functions stay what they are."""
    counts = DomainEvent("order.counted", {"orders": []})
    assert len(make_subscriber().subscriptions) == 2
    only = make_subscriber("shop-counts", workers=2)
    (delivered,) = event_broker.deliver(only, counts, DomainEvent("order.placed", {"name": "a"}))
    assert (delivered.subscriber, delivered.outcome) == ("shop-counts", "handled")
    with pytest.raises(ConfigurationError, match="no handler named x; there are shop-counts"):
        make_subscriber("x")


def test_two_handlers_cannot_have_one_name() -> None:
    """But a module may be loaded again."""
    from django_shop import subscribers

    on("a.b", name="shop-counts")(subscribers.count)
    with pytest.raises(ConfigurationError, match=r"two handlers, django_shop\.subscribers\.count"):
        on("a.b", name="shop-counts")(print)


def test_app_without_handlers_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import django_shop.subscribers  # noqa: F401 - its handlers are registered when it is imported

    from domain_events.django import handlers

    monkeypatch.setattr(handlers, "_registrations", {})
    with pytest.raises(CommandError, match=r"No installed app has a subscribers\.py"):
        call_command("consume_domain_events")


# --- connections to the database -----------------------------------------------------------------


@pytest.fixture(params=[None, 600, 0])
def max_age(request: pytest.FixtureRequest, _postgresql: str) -> Iterator[int | None]:
    """CONN_MAX_AGE of the PostgreSQL, without CONN_HEALTH_CHECKS."""
    settings = connections.settings[_postgresql]
    before = settings["CONN_MAX_AGE"]
    connections["postgresql"].close()
    settings["CONN_MAX_AGE"] = request.param
    yield request.param
    connections["postgresql"].close()
    settings["CONN_MAX_AGE"] = before


def cut_connections() -> int:
    """As a restart of the server does; returns how many there were, besides this thread's."""
    with connections["postgresql"].cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
        return len(cursor.fetchall())


def other_connections() -> int:
    with connections["postgresql"].cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
        return int(cursor.fetchone()[0])


@contextlib.contextmanager
def consuming(subscriber: Subscriber) -> Iterator[None]:
    thread = threading.Thread(target=subscriber.start_consuming)
    thread.start()
    try:
        yield
    finally:
        subscriber.stop_consuming()
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("workers", [1, 3])
def test_connections_that_the_database_closed_are_noticed_between_two_handlers(
    max_age: int | None, workers: int, unique: str
) -> None:
    """In each worker's thread, whatever keeps its connection open."""
    handled: list[Delivered] = []
    together = threading.Barrier(workers)
    numbers: list[int] = []

    def handle(event: DomainEvent[Any]) -> None:
        together.wait(20)  # so that each worker has one
        numbers.append(Order.objects.using("postgresql").count())
        with transaction.atomic(using="postgresql"):
            Order.objects.using("postgresql").count()

    class Outcomes(Middleware):
        def delivered(self, delivered: Delivered) -> None:
            handled.append(delivered)

    url = f"memory://{unique}"
    subscriber = Subscriber(url, workers=workers, middleware=[DatabaseConnections(), Outcomes()])
    subscriber.register(handle, "orders", ["order.counted"])
    with consuming(subscriber):
        for turn in range(1, 4):
            for _ in range(workers):
                publish_domain_event("order.counted", {}, connection_settings=url)
            wait_until(lambda turn=turn: len(handled) == turn * workers)  # type: ignore[misc]
            # With CONN_MAX_AGE=0 each handler closes its own.
            assert cut_connections() == (0 if max_age == 0 else workers)
    assert [each.outcome for each in handled] == ["handled"] * 3 * workers
    assert len(numbers) == 3 * workers
    wait_until(lambda: other_connections() == 0)


def test_connections_of_workers_are_closed_with_their_threads(
    max_age: int | None, unique: str
) -> None:
    """A service that consumes again and again leaves none behind."""
    url = f"memory://{unique}"
    handled = threading.Semaphore(0)

    def handle(event: DomainEvent[Any]) -> None:
        Order.objects.using("postgresql").count()
        handled.release()

    subscriber = Subscriber(url, workers=3, middleware=[DatabaseConnections()])
    subscriber.register(handle, "orders", ["order.counted"])
    for _ in range(3):
        with consuming(subscriber):
            for _ in range(6):
                publish_domain_event("order.counted", {}, connection_settings=url)
            assert all(handled.acquire(timeout=20) for _ in range(6))
    wait_until(lambda: other_connections() == 0)


def test_handlers_go_on_after_a_restart_of_the_database(
    max_age: int | None, postgresql_server: Server, event_broker: EventBroker
) -> None:
    """The event after the one that came while it was away, whose handler has failed."""
    subscriber = Subscriber(middleware=[DatabaseConnections()])
    subscriber.register(
        lambda _: Order.objects.using("postgresql").count(), "orders", ["order.counted"]
    )

    def outcome() -> str:
        (delivered,) = event_broker.deliver(subscriber, DomainEvent("order.counted", {}))
        return str(delivered.outcome)

    assert outcome() == "handled"
    postgresql_server.restart()
    assert outcome() == "handled"
    postgresql_server.kill()
    assert outcome() == "dead letter"
    postgresql_server.start()
    assert outcome() == "handled"


def test_queries_are_not_collected_under_debug(shop: None, event_broker: EventBroker) -> None:
    """They would fill the memory of a process that runs for weeks."""
    subscriber = make_subscriber()
    connection = connections["default"]
    with override_settings(DEBUG=True):
        for name in "abc":
            event_broker.deliver(subscriber, DomainEvent("order.placed", {"name": name}))
            assert len(connection.queries_log) == 0
    assert Invoice.objects.count() == 3


def test_handler_in_a_transaction_keeps_its_connection(
    shop: None, event_broker: EventBroker
) -> None:
    with transaction.atomic():
        Order.objects.create(name="a")
        event_broker.deliver(make_subscriber(), DomainEvent("order.placed", {"name": "a"}))
    assert names_of() == ["a"]
    assert Invoice.objects.count() == 1


# --- the command that consumes -------------------------------------------------------------------


class Shop:
    """The project as programs, on a broker and in a folder of their own."""

    def __init__(self, url: str, folder: Path, queues: str) -> None:
        self.url = url
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), str(TESTS), str(TESTS.parent)]),
            "DOMAIN_EVENTS_URL": url,
            "DJANGO_SETTINGS_MODULE": "django_shop.settings",
            "SHOP_FOLDER": str(folder),
            "SHOP_QUEUES": queues,
        }

    def manage(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(TESTS / "django_shop/manage.py"), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def add_app(self, name: str, subscribers: str) -> Path:
        """One with handlers."""
        self.environment["SHOP_APPS"] = f"{self.environment.get('SHOP_APPS', '')} {name}"
        (self.folder / name).mkdir()
        (self.folder / name / "__init__.py").touch()
        file = self.folder / name / "subscribers.py"
        file.write_text(subscribers)
        return file

    def consuming(self, *arguments: str) -> contextlib.AbstractContextManager[Program]:
        return self.running("Consuming: ", "consume_domain_events", *arguments)

    @contextlib.contextmanager
    def running(self, first: str, *arguments: str) -> Iterator[Program]:
        """A command, until SIGTERM, after which it ends well."""
        program = Program(self, *arguments)
        try:
            program.wait_for(first)
            yield program
            program.process.send_signal(signal.SIGTERM)
            assert program.process.wait(60) == 0, program.output()
        finally:
            program.process.kill()
            program.process.wait(60)

    def execute(self, sql: str, *values: object) -> list[Any]:
        """On its database."""
        stored = sqlite3.connect(self.folder / "default.sqlite3", timeout=30)
        with contextlib.closing(stored), stored:
            return stored.execute(sql, values).fetchall()

    def wait_for_invoice(self, name: str) -> None:
        query = 'SELECT count(*) FROM django_shop_invoice WHERE "order" = ?'
        wait_until(lambda: self.execute(query, name) == [(1,)])

    def publish(self, routing_key: str, data: object) -> None:
        with Publisher(self.url) as publisher:
            publisher.publish(DomainEvent(routing_key, data))


class Program:
    """A command that runs, and what it has printed."""

    def __init__(self, shop: Shop, *arguments: str) -> None:
        self._file = shop.folder / f"output-{secrets.token_hex(4)}"
        with self._file.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(TESTS / "django_shop/manage.py"), *arguments],
                env=shop.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def output(self) -> str:
        return self._file.read_text()

    def wait_for(self, text: str, times: int = 1) -> None:
        def printed() -> bool:
            assert self.process.poll() is None or self.output().count(text) >= times, self.output()
            return self.output().count(text) >= times

        wait_until(printed, timeout=90, message=f"{text!r} is printed {times} times")


@pytest.fixture
def programs(broker_url: str, names: Names, tmp_path: Path) -> Shop:
    for label in ("invoices", "counts", "extra"):
        names.queue(label)
    shop = Shop(broker_url, tmp_path, names.prefix)
    migrated = shop.manage("migrate", "--run-syncdb", "-v0")
    assert migrated.returncode == 0, migrated.stderr
    return shop


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return bool(response.status == 200)
    except OSError:
        return False


EXTRA = """
import os, threading
from domain_events.django import on

together = threading.Barrier(WORKERS)

@on(os.environ['SHOP_QUEUES'] + '.extra', name=os.environ['SHOP_QUEUES'] + '-extra')
def handle(event):
    together.wait(30)
    os.write(1, f'TEXT {event.data}\\n'.encode())  # in one go, since several threads do it
"""


def test_command_handles_the_events_of_all_apps_until_sigterm(
    programs: Shop, unique: str, unused_port: int
) -> None:
    """With so many at a time."""
    programs.add_app("extra", EXTRA.replace("WORKERS", "2"))
    health = programs.folder / "health"
    probes = (f"--health-port={unused_port}", f"--health-file={health}")
    with programs.consuming("--workers=2", *probes) as program:
        wait_until(lambda: is_ready(f"http://127.0.0.1:{unused_port}/ready"))
        assert json.loads(health.read_text())["alive"]
        for number in (1, 2):
            programs.publish(f"{unique}.extra", number)
        program.wait_for("TEXT 1")
        program.wait_for("TEXT 2")
        name = f"order of {unique}"
        programs.publish("order.placed", {"name": name})
        programs.wait_for_invoice(name)


def test_command_notifies_systemd_and_its_watchdog(programs: Shop) -> None:
    """Once it consumes, as long as it is alive, and when it ends."""
    address = str(programs.folder / "notify")
    systemd = Systemd(address)
    programs.environment |= {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"}
    said: list[str] = []

    def next_has(text: str) -> bool:
        said.extend(systemd.next())
        return text in said

    with contextlib.closing(systemd.socket):
        with programs.consuming("--systemd"):
            wait_until(lambda: next_has("READY=1"), timeout=90)
            said.clear()
            wait_until(lambda: next_has("WATCHDOG=1"))
            assert "STOPPING=1" not in said
        wait_until(lambda: next_has("STOPPING=1"))


def test_command_starts_again_when_a_source_file_is_changed(programs: Shop, unique: str) -> None:
    """With --reload; the handler that runs may finish."""
    file = programs.add_app("extra", EXTRA.replace("WORKERS", "1"))
    with programs.consuming("--reload", f"{unique}-extra") as program:
        programs.publish(f"{unique}.extra", 1)
        program.wait_for("TEXT 1")
        time.sleep(1.1)  # the reloader compares whole seconds on some file systems
        file.write_text(EXTRA.replace("WORKERS", "1").replace("TEXT", "changed"))
        program.wait_for("Consuming: ", times=2)
        programs.publish(f"{unique}.extra", 2)
        program.wait_for("changed 2")


DIES = """
import os, signal
import django_shop
django_shop.setup()
from django.db import transaction
from django_shop.models import Order
from domain_events.django import publish_on_commit
with transaction.atomic():
    transaction.on_commit(lambda: os.kill(os.getpid(), signal.SIGKILL))
    Order.objects.create(name=NAME)
    publish_on_commit('order.placed', {'name': NAME})
"""


def test_event_of_a_process_that_dies_after_the_commit_is_relayed(
    programs: Shop, unique: str
) -> None:
    """Its transaction is committed, and it is killed before it has sent anything."""
    programs.environment["SHOP_OUTBOX"] = "1"
    name = f"order of {unique}"
    with programs.consuming(f"{unique}-invoices"):
        died = subprocess.run(
            [sys.executable, "-c", DIES.replace("NAME", repr(name))],
            env=programs.environment,
            timeout=120,
            check=False,
        )
        assert died.returncode == -signal.SIGKILL
        count = "SELECT count(*) FROM domain_events_outbox"
        assert programs.execute(count) == [(1,)]
        # As if the thirty seconds were over for which the process has leased it.
        programs.execute("UPDATE domain_events_outbox SET leased_until = 0")
        with programs.running("Relaying: default.", "relay_domain_events", "--idle=0.1"):
            programs.wait_for_invoice(name)
            wait_until(lambda: programs.execute(count) == [(0,)])


def test_command_without_a_broker_fails_without_a_traceback(programs: Shop) -> None:
    programs.environment["DOMAIN_EVENTS_URL"] = NOWHERE
    failed = programs.manage("consume_domain_events")
    assert failed.returncode == 1
    assert "CommandError: BrokerUnavailable: No broker within " in failed.stderr
    assert "Traceback" not in failed.stderr


def test_command_ends_after_its_timeout(shop: None, event_broker: EventBroker) -> None:
    call_command("consume_domain_events", "shop-counts", timeout=0.1, verbosity=0)
    publish_domain_event("order.counted", {"orders": []})
    output = io.StringIO()
    call_command("consume_domain_events", "shop-counts", timeout=1.0, stdout=output)
    assert output.getvalue() == "Consuming: shop-counts.\n"
    assert event_broker.deliver(make_subscriber("shop-counts")) == []
