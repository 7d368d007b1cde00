"""The testing kit: what users' own tests are written with. No RabbitMQ here, and no waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any
from unittest.mock import ANY
from uuid import uuid4

import pydantic
import pytest
from bench import running
from kinds_of_data import AS_JSON, FIELDS, KINDS, Plan, make
from support import sooner_than, wait_until

import domain_events
from domain_events import (
    Backoff,
    BrokerUnavailable,
    DeadLetters,
    DomainEvent,
    InvalidEvent,
    Publisher,
    Reject,
    Retry,
    Subscriber,
    publish_domain_event,
    settings,
)
from domain_events.broker import Publication, connect, memory
from domain_events.message import Message, ToSubscriber
from domain_events.publisher import publish_domain_event as imported_elsewhere
from domain_events.testing import EventBroker, Outcome

NOWHERE = "amqp://guest:guest@localhost:1/%2F"

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def a_program_that_is_configured() -> Iterator[None]:
    """By default the code under test would look for a broker where there is none."""
    domain_events.configure(NOWHERE)
    yield
    domain_events.configure()


def ignore(event: DomainEvent) -> None:
    pass


# ------------------------------------------------------------------ what was published


@pytest.mark.parametrize(
    "publish",
    [
        lambda: domain_events.publish_domain_event("user.registered", {"name": "Ada"}),
        lambda: imported_elsewhere("user.registered", {"name": "Ada"}),
        lambda: publish_domain_event("user.registered", {"name": "Ada"}, connection_settings=None),
        lambda: publish_domain_event(
            "user.registered", {"name": "Ada"}, connection_settings=NOWHERE
        ),
        lambda: Publisher(NOWHERE).publish(DomainEvent("user.registered", {"name": "Ada"})),
        lambda: Publisher().publish_many([DomainEvent("user.registered", {"name": "Ada"})]),
    ],
)
def test_every_way_of_publishing_is_caught(event_broker: EventBroker, publish: object) -> None:
    """Wherever it was imported from, and whatever broker it asks for."""
    assert callable(publish)
    publish()
    event = event_broker.assert_published("user.*", {"name": "Ada"}, times=1)
    assert event_broker.published == [event]


def test_publisher_made_before_is_caught_and_goes_back_to_its_broker() -> None:
    """A publisher that a module keeps works with the broker of the day."""
    publisher = Publisher("memory://before")
    for _ in range(2):
        with EventBroker() as broker:
            publisher.publish(DomainEvent("a.b", None))
            broker.assert_published("a.b", times=1)
    subscriber = Subscriber("memory://before")
    seen: list[DomainEvent] = []
    subscriber.register(seen.append, "seen", ["#"])
    event = publisher.publish(DomainEvent("a.c", None))
    subscriber.start_consuming(timeout=0.01)
    assert seen == [event]
    publisher.close()


def test_published_by_threads_is_caught(event_broker: EventBroker) -> None:
    """It is the process that is switched over, not the thread."""
    threads = [
        threading.Thread(target=publish_domain_event, args=("a.b", number)) for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    event_broker.assert_published("a.b", times=8)
    assert sorted(event.data for event in event_broker.published) == list(range(8))


def test_nothing_is_left_for_the_next_test() -> None:
    """Neither events nor queues, dead letters, publishers or settings."""
    publishers = dict(domain_events.publisher._publishers)
    for _ in range(2):
        with EventBroker() as broker:
            assert broker.published == []
            subscriber = Subscriber()
            subscriber.register(ignore, "mailer", ["#"])
            publish_domain_event("a.b", None)
            assert len(broker.deliver(subscriber)) == 1
            publish_domain_event("a.b", None)  # waits, when this ends
    assert settings.resolve() == (NOWHERE,)
    assert domain_events.publisher._publishers == publishers
    with pytest.raises(domain_events.BrokerUnavailable):
        publish_domain_event("a.b", None, timeout=0.1)
    domain_events.close_publishers()


def test_brokers_may_be_nested(event_broker: EventBroker) -> None:
    """The inner one has its events for itself."""
    publish_domain_event("outer", None)
    with EventBroker() as inner:
        publish_domain_event("inner", None)
        inner.assert_not_published("outer")
    publish_domain_event("outer", None)
    event_broker.assert_published("outer", times=2)
    event_broker.assert_not_published("inner")


def test_failed_assertion_shows_what_was_published_instead(event_broker: EventBroker) -> None:
    """Each event with what is different, so that the test need not be run again to see."""
    publish_domain_event("user.registered", {"name": "Ada", "tags": ["a", {"b": 1}]}, 7)
    publish_domain_event("user.registered", {"nom": "Ada"}, 8)
    publish_domain_event("invoice.issued", 12)
    with pytest.raises(AssertionError) as caught:
        event_broker.assert_published("user.*", {"name": "Grace"})
    assert str(caught.value) == (
        "Expected an event 'user.*' with {'name': 'Grace'}; 3 events were published:\n"
        "  user.registered {'name': 'Ada', 'tags': ['a', {'b': 1}]}   <- data['name'] is 'Ada'\n"
        "  user.registered {'nom': 'Ada'}   <- data['name'] is missing\n"
        "  invoice.issued 12   <- another routing key"
    )
    with pytest.raises(AssertionError, match=r"about 9; .*\n.*domain_object_id is 7"):
        event_broker.assert_published("user.*", domain_object_id=9)
    with pytest.raises(AssertionError, match=r"data\['tags'\]\[1\]\['b'\] is 1"):
        event_broker.assert_published("user.*", {"tags": ["a", {"b": 2}]})
    with pytest.raises(AssertionError, match=r"data\['tags'\] has 2 entries"):
        event_broker.assert_published("user.*", {"tags": ["a"]})
    with pytest.raises(AssertionError, match=r"'user.\*' with {}, 1 times; 3 events"):
        event_broker.assert_published("user.*", {}, times=1)
    with pytest.raises(AssertionError, match=r"Not expected: an event 'invoice.#'; 3 events"):
        event_broker.assert_not_published("invoice.#")
    event_broker.assert_published("user.registered", {"tags": ["a", {}]}, domain_object_id=7)
    event_broker.assert_not_published("user.*", {"name": "Grace"})
    event_broker.clear()
    event_broker.assert_not_published()
    with pytest.raises(AssertionError, match=r"Expected an event 'a'; nothing was published\."):
        event_broker.assert_published("a")


def test_event_that_cannot_be_sent_is_not_published(event_broker: EventBroker) -> None:
    """What RabbitMQ would not take, the kit does not either."""
    for routing_key, data in (("", None), ("a.*", None), ("a", object())):
        with pytest.raises(domain_events.InvalidEvent):
            publish_domain_event(routing_key, data)
    with pytest.raises(domain_events.EventUnroutable):
        publish_domain_event("a", None, mandatory=True)
    event_broker.assert_not_published()


# ------------------------------------------------------------------ deliveries


def test_events_reach_their_handlers_in_this_thread(event_broker: EventBroker) -> None:
    """What waits is handled when the test says so, and not before."""
    threads: list[threading.Thread] = []
    subscriber = Subscriber(workers=4)
    subscriber.register(lambda _event: threads.append(threading.current_thread()), "a", ["user.*"])
    subscriber.register(ignore, "b", ["#"])
    publish_domain_event("user.registered", 1)
    publish_domain_event("invoice.issued", 2)
    assert threads == []
    deliveries = event_broker.deliver(subscriber)
    assert threads == [threading.current_thread()]
    reached = [(each.subscriber, each.event.data) for each in deliveries if each.event]
    assert sorted(reached) == [("a", 1), ("b", 1), ("b", 2)]
    assert {each.outcome for each in deliveries} == {"handled"}
    assert event_broker.deliver(subscriber) == []


def test_given_event_is_delivered(event_broker: EventBroker) -> None:
    """Without code that publishes it; twice, to see that the handler is idempotent."""
    users: dict[str, object] = {}
    subscriber = Subscriber(exchange="another")
    subscriber.register(
        lambda event: users.setdefault(event.uuid_string, event.data), "users", ["user.*"]
    )
    event = DomainEvent("user.registered", {"name": "Ada"})
    deliveries = event_broker.deliver(subscriber, event, event)
    assert [each.outcome for each in deliveries] == [Outcome.HANDLED] * 2
    assert users == {event.uuid_string: {"name": "Ada"}}
    assert event_broker.deliver(subscriber, DomainEvent("invoice.issued", None)) == []


def test_retry_comes_when_time_has_moved(event_broker: EventBroker) -> None:
    """Not before, and without anybody waiting for it."""
    retries: list[int] = []

    def handle(event: DomainEvent) -> None:
        retries.append(event.retries)
        if event.retries < 2:
            raise Retry(3600)

    subscriber = Subscriber()
    subscriber.register(handle, "slow", ["#"], max_retries=2)
    begun = time.monotonic()
    (first,) = event_broker.deliver(subscriber, DomainEvent("a.b", None))
    assert (first.outcome, first.delay) == (Outcome.RETRY, 3600)
    assert isinstance(first.error, Retry)
    event_broker.advance(3599.9)
    assert event_broker.deliver(subscriber) == []
    event_broker.advance(0.1)
    (second,) = event_broker.deliver(subscriber)
    assert second.event is not None
    assert (second.event.retries, second.outcome) == (1, Outcome.RETRY)
    (third,) = event_broker.deliver_all(subscriber)
    assert third.outcome is Outcome.HANDLED
    assert retries == [0, 1, 2]
    assert time.monotonic() - begun < 5
    event_broker.assert_published("a.b", times=1)  # a retry is not published again


def test_delay_told_is_the_one_to_advance(event_broker: EventBroker) -> None:
    """Delays are rounded up to tenths of a second, and jittered; what is told is what it takes."""
    subscriber = Subscriber()

    def fail(_event: DomainEvent) -> None:
        raise ConnectionError

    backoff = Backoff(first=0.123, factor=3.3, maximum=1000, jitter=0.5)
    subscriber.register(
        fail, "flaky", ["#"], max_retries=9, retry_on=ConnectionError, backoff=backoff
    )
    deliveries = event_broker.deliver(subscriber, DomainEvent("a", None))
    for _ in range(9):
        (delivered,) = deliveries
        assert delivered.delay is not None
        event_broker.advance(delivered.delay)
        deliveries = event_broker.deliver(subscriber)
    assert [each.outcome for each in deliveries] == ["dead letter"]


def test_dead_letters_can_be_seen_and_replayed(event_broker: EventBroker) -> None:
    """With the reason, as an operator would see them."""
    broken = True

    def handle(event: DomainEvent) -> None:
        if event.routing_key == "no":
            raise Reject("never")
        if broken:
            raise ValueError(f"cannot read {event.data}")

    subscriber = Subscriber()
    subscriber.register(handle, "reader", ["#"])
    deliveries = event_broker.deliver(subscriber, DomainEvent("a", 1), DomainEvent("no", 2))
    assert [each.outcome for each in deliveries] == [Outcome.DEAD_LETTER] * 2
    assert repr(deliveries[0]) == "<reader: a -> dead letter (ValueError('cannot read 1'))>"
    letters = event_broker.dead_letters("reader")
    assert [(each.error_type, each.error_message) for each in letters] == [
        ("ValueError", "cannot read 1"),
        ("domain_events.retry.Reject", "never"),
    ]
    broken = False
    with DeadLetters("reader") as dead_letters:
        assert dead_letters.replay_all() == 2
    deliveries = event_broker.deliver(subscriber)
    assert [each.outcome for each in deliveries] == [Outcome.HANDLED, Outcome.DEAD_LETTER]


def test_what_is_dropped_is_said(event_broker: EventBroker) -> None:
    """A subscriber without dead letters loses what it fails on; the outcome says so."""
    subscriber = Subscriber()

    def fail(_event: DomainEvent) -> None:
        raise ValueError

    subscriber.register(fail, "careless", ["#"], dead_letter=False)
    (delivered,) = event_broker.deliver(subscriber, DomainEvent("a", None))
    assert delivered.outcome is Outcome.DROPPED
    assert isinstance(delivered.error, ValueError)


def test_exit_of_a_handler_is_the_tests(event_broker: EventBroker) -> None:
    """SystemExit ends a subscriber; a test has it raised, and the event comes again."""
    calls: list[bool] = []

    def leave(_event: DomainEvent) -> None:
        calls.append(True)
        if len(calls) == 1:
            raise SystemExit(3)

    subscriber = Subscriber()
    subscriber.register(leave, "leaver", ["#"])
    with pytest.raises(SystemExit):
        event_broker.deliver(subscriber, DomainEvent("a", None))
    (again,) = event_broker.deliver(subscriber)
    assert again.outcome is Outcome.HANDLED


def test_message_that_is_no_event_is_a_dead_letter(event_broker: EventBroker) -> None:
    """Its delivery has no event to show."""
    subscriber = Subscriber()
    subscriber.register(ignore, "reader", ["#"])
    publishing = connect((event_broker.url,)).publishing("another program")
    publication = Publication(Message(ToSubscriber("reader"), "a.b", b"no event"), lambda _: None)
    publishing.submit(publication)
    publishing.close(5)
    assert publication.done
    assert publication.error is None
    (delivered,) = event_broker.deliver(subscriber)
    assert (delivered.event, delivered.outcome) == (None, Outcome.DEAD_LETTER)
    assert "not an event" in repr(delivered)


def test_subscriber_registered_before_can_be_delivered_to() -> None:
    """A module that registers its handlers when it is imported: on no broker, or on another."""
    for connection_settings in (None, "memory://at-import"):
        seen: list[DomainEvent] = []
        subscriber = Subscriber(connection_settings)

        @subscriber.on("user.*", name="module-level")
        def handle(event: DomainEvent, seen: list[DomainEvent] = seen) -> None:
            seen.append(event)

        for _ in range(2):
            with EventBroker() as broker:
                broker.attach(subscriber)
                event = publish_domain_event("user.registered", None)
                assert [each.event for each in broker.deliver(subscriber)] == [event]
        assert len(seen) == 2
        subscriber.start_consuming(timeout=0.01)  # on its own broker again: nothing is there
        assert len(seen) == 2
        subscriber.close()


def test_temporary_subscribers_are_delivered_to(event_broker: EventBroker) -> None:
    """Exclusive, auto-delete and not durable; `deliver_all` ends, whatever else is timed."""
    for option in ("exclusive", "auto_delete", "not durable"):
        subscriber = Subscriber()
        subscriber.register(
            ignore,
            "temporary",
            ["#"],
            exclusive=option == "exclusive",
            auto_delete=option == "auto_delete",
            durable=option != "not durable",
        )
        publish_domain_event("a", None)
        assert len(event_broker.deliver_all(subscriber)) == 1
        event_broker.advance(61)


def test_events_of_handlers_are_delivered_too(event_broker: EventBroker) -> None:
    """A chain of handlers in one service, with cause and all; and one that has no end."""
    subscriber = Subscriber()
    subscriber.register(lambda event: publish_domain_event("b", event.data), "first", ["a"])
    subscriber.register(ignore, "second", ["b"])
    deliveries = event_broker.deliver(subscriber, DomainEvent("a", 1))
    assert [each.subscriber for each in deliveries] == ["first", "second"]

    endless = Subscriber()
    endless.register(lambda _event: publish_domain_event("c", None), "endless", ["c"])
    with pytest.raises(AssertionError, match="no end"):
        event_broker.deliver(endless, DomainEvent("c", None))


def test_real_time_for_subscribers_in_threads() -> None:
    """Where a test wants the whole machinery, time passes by itself."""
    seen: list[int] = []
    with EventBroker(virtual_time=False) as broker:
        subscriber = Subscriber()

        def handle(event: DomainEvent) -> None:
            seen.append(event.retries)
            if event.retries:
                subscriber.stop_consuming()
            else:
                raise Retry(0.1)

        subscriber.register(handle, "threaded", ["#"], max_retries=1)
        thread = threading.Thread(target=subscriber.start_consuming)
        thread.start()
        publish_domain_event("a", None)
        thread.join(10)
        assert not thread.is_alive()
        with pytest.raises(RuntimeError, match="passes by itself"):
            broker.advance(1)
    assert seen == [0, 1]


def test_misuse_is_said(event_broker: EventBroker) -> None:
    """In words that say what to do."""
    with pytest.raises(RuntimeError, match="on already"):
        event_broker.start()
    with pytest.raises(ValueError, match="assert_not_published"):
        event_broker.assert_published("a", times=0)
    with pytest.raises(RuntimeError, match="switched off"):
        EventBroker().advance(1)


def test_snippets_work_on_the_embedded_broker() -> None:
    """The mission's lines in one script, with nothing but another address."""
    seen: list[object] = []
    domain_events.configure("memory://snippets")
    subscriber = Subscriber()

    def handle_user_event(event: DomainEvent) -> None:
        seen.append(event.data)
        subscriber.stop_consuming()

    subscriber.register(handle_user_event, "print-user-event", ["user.*"])
    publish_domain_event("user.registered", {"user_id": 42})
    subscriber.start_consuming()
    assert seen == [{"user_id": 42}]


@pytest.mark.parametrize("exchange_type", ["topic", "direct", "fanout"])
def test_events_are_delivered_whatever_type_the_exchange_has(
    event_broker: EventBroker, exchange_type: Any
) -> None:
    """The publisher that the kit uses has the subscriber's."""
    subscriber = Subscriber(exchange="others", exchange_type=exchange_type)
    seen: list[DomainEvent] = []
    subscriber.register(seen.append, "reader", ["user.registered"])
    event = DomainEvent("user.registered", {"id": 1})
    (delivered,) = event_broker.deliver(subscriber, event)
    assert (delivered.outcome, seen) == (Outcome.HANDLED, [event])


def test_event_that_is_not_listed_is_handed_back(event_broker: EventBroker) -> None:
    """As in a rolling deployment: the outcome says so, and when it comes again."""
    new, old = Subscriber(), Subscriber()
    seen: list[DomainEvent] = []
    new.register(seen.append, "reader", ["user.*"])
    old.register(ignore, "reader", ["user.registered"])
    event = DomainEvent("user.deleted", {"id": 1})
    (delivered,) = event_broker.deliver(old, event)
    assert (delivered.outcome, delivered.delay) == (Outcome.HANDED_BACK, 0.5)
    event_broker.advance(0.5)
    (delivered,) = event_broker.deliver(new)
    assert (delivered.outcome, seen) == (Outcome.HANDLED, [event])


def test_event_that_nobody_lists_ends_as_a_dead_letter(event_broker: EventBroker) -> None:
    """After a quarter of an hour, which takes no time here."""
    new, old = Subscriber(), Subscriber()
    new.register(ignore, "reader", ["user.*"])
    old.register(ignore, "reader", ["user.registered"])
    deliveries = event_broker.deliver_all(old, DomainEvent("user.deleted", {}))
    assert deliveries[-1].outcome is Outcome.DEAD_LETTER
    assert 850 < sum(each.delay or 0.0 for each in deliveries) < 950
    (letter,) = event_broker.dead_letters("reader")
    assert letter.error_type == "unlisted routing key"


# --- one run of a subscriber at a time, on one broker --------------------------------------------


def test_handler_may_stop_what_is_delivered(event_broker: EventBroker) -> None:
    """What was not begun waits for the next time, and the next run is not stopped by it."""
    seen: list[int] = []
    subscriber = Subscriber()

    def stop(event: DomainEvent) -> None:
        seen.append(event.data)
        subscriber.stop_consuming()

    subscriber.register(stop, "stopper", ["#"])
    event_broker.deliver(subscriber, *(DomainEvent("a", number) for number in range(3)))
    assert seen == [0]
    event_broker.deliver(subscriber)
    assert seen == [0, 1]


def test_handler_may_close_its_subscriber(event_broker: EventBroker) -> None:
    """It is ended in order: nothing comes twice."""
    seen: list[int] = []
    subscriber = Subscriber()

    def close(event: DomainEvent) -> None:
        seen.append(event.data)
        subscriber.close()

    subscriber.register(close, "closer", ["#"])
    event_broker.deliver(subscriber, DomainEvent("a", 0), DomainEvent("a", 1))
    event_broker.deliver(subscriber)
    assert seen == [0, 1]


def test_what_is_delivered_to_is_not_delivered_to_within(event_broker: EventBroker) -> None:
    """Nor what consumes in a thread: it is one run at a time."""
    errors: list[Exception] = []
    subscriber = Subscriber()

    def deliver(_event: DomainEvent) -> None:
        try:
            event_broker.deliver(subscriber)
        except domain_events.ConfigurationError as error:
            errors.append(error)

    subscriber.register(deliver, "nested", ["#"])
    (delivered,) = event_broker.deliver(subscriber, DomainEvent("a", None))
    assert delivered.outcome is Outcome.HANDLED
    assert "consuming already" in str(errors[0])
    assert event_broker.deliver(subscriber) == []


def test_subscriber_that_consumes_keeps_its_broker_until_it_ends() -> None:
    """A test that ends while a handler runs puts nothing into the real broker."""
    started, ended = threading.Event(), threading.Event()
    url = f"memory://{uuid4()}"

    def handle(_event: DomainEvent) -> None:
        started.set()
        assert ended.wait(30)
        raise ValueError("of the test")

    def ignore_all(_event: DomainEvent) -> None: ...

    with Subscriber(url) as real:
        real.register(ignore_all, "consumes", ["#"])
        broker = EventBroker(virtual_time=False).start()
        subscriber = Subscriber(url)
        subscriber.register(handle, "consumes", ["#"])
        thread = threading.Thread(target=subscriber.start_consuming)
        thread.start()
        publish_domain_event("a", None)
        assert started.wait(30)
        broker.stop()
        subscriber.stop_consuming()
        ended.set()
        thread.join(30)
        assert not thread.is_alive()
        with domain_events.DeadLetters("consumes", url) as letters:
            assert letters.count() == 0


def test_dead_letters_are_those_of_the_broker_of_the_day() -> None:
    """Also where the object outlives several brokers."""
    letters = domain_events.DeadLetters("outlives")

    def fail(_event: DomainEvent) -> None:
        raise ValueError

    for _ in range(3):
        with EventBroker() as broker:
            subscriber = Subscriber()
            subscriber.register(fail, "outlives", ["#"])
            broker.deliver(subscriber, DomainEvent("a", None))
            assert len(list(letters)) == 1
            assert letters.count() == 1
    letters.close()


def test_subscribers_of_two_tests_are_not_two_of_one_process(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each was registered on a broker of its own."""
    kept = []
    for handler in (ignore, print):
        with EventBroker():
            subscriber = Subscriber()
            subscriber.register(handler, "same-name", ["#"])
            kept.append(subscriber)
    assert "two Subscribers" not in caplog.text


# ------------------------------------------------------------------ typed data


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_was_published_is_compared_as_json(event_broker: EventBroker, kind: Any) -> None:
    """Objects of any kind, whichever kind was published, and plain data as well."""
    publish_domain_event("user.registered", make(kind, FIELDS))
    for expected in KINDS.values():
        event_broker.assert_published("user.*", make(expected, FIELDS), times=1)
    event_broker.assert_published("user.*", AS_JSON)
    event_broker.assert_published("user.*", {"balance": Decimal("1.10"), "plan": Plan.PAID})
    event_broker.assert_published("user.*", {"visits": {7: date(2026, 11, 26)}})
    event_broker.assert_published("user.*", {"name": ANY, "token": ANY})
    event_broker.assert_not_published("user.*", make(kind, {**FIELDS, "user_id": 43}))


@dataclass
class Address:
    city: str
    since: date


@dataclass
class Moved:
    user_id: int
    to: Address


def test_difference_from_an_object_is_shown(event_broker: EventBroker) -> None:
    """The field, and what it is; an object is compared with all its fields."""
    moved = Moved(1, Address("Berlin", date(2026, 1, 1)))
    published: list[Any] = [
        {"user_id": 1, "to": {"city": "Bonn", "since": "2026-01-01"}},
        {"user_id": 1, "to": {"city": "Berlin", "since": "2026-01-02"}},
        {"user_id": 1, "to": {"city": "Berlin", "since": "2026-01-01", "street": "x"}},
        {"user_id": 1, "to": {"city": "Berlin"}},
        {"user_id": "1", "to": {}},
        [],
    ]
    for data in published:
        publish_domain_event("user.moved", data)
    with pytest.raises(AssertionError) as caught:
        event_broker.assert_published("user.*", moved)
    error = str(caught.value)
    for part in (
        "Expected an event 'user.*' with Moved(user_id=1, to=Address(city='Berlin'",
        "<- data['to']['city'] is 'Bonn'",
        "<- data['to']['since'] is '2026-01-02'",
        "<- data['to']['street'] is not expected",
        "<- data['to']['since'] is missing",
        "<- data['user_id'] is '1'",
        "<- data is []",
    ):
        assert part in error
    # Inside a dictionary, the entries of the dictionary that matter.
    publish_domain_event("user.moved", {"moved": moved, "by": "Ada"})
    event_broker.assert_published("user.moved", {"moved": moved}, times=1)
    event_broker.assert_published("user.moved", {"moved": {"to": {"city": "Berlin"}}}, times=1)


class Unserializable(pydantic.BaseModel):
    user_id: int

    @pydantic.field_serializer("user_id")
    def _fail(self, value: int) -> int:
        raise ValueError("no such user")


@pytest.mark.parametrize("expected", [Unserializable(user_id=1), {1, 2}, b"x", object()])
def test_what_could_not_be_published_is_a_difference(
    event_broker: EventBroker, expected: object
) -> None:
    """And no other error."""
    publish_domain_event("user.moved", {"x": 1})
    for data in (expected, {"x": expected}, {"x": [expected]}):
        with pytest.raises(AssertionError):
            event_broker.assert_published("user.moved", data)


def test_headers_are_checked(event_broker: EventBroker) -> None:
    """Those that matter; and the events keep what they were published with."""
    publish_domain_event("user.moved", {}, headers={"tenant": "x", "n": 1}, version=3)
    publish_domain_event("user.moved", {}, correlation_id="c")
    event = event_broker.assert_published("user.*", headers={"tenant": "x"}, times=1)
    assert (event.headers, event.version) == ({"tenant": "x", "n": 1}, 3)
    event_broker.assert_published("user.*", {}, headers={"n": 1, "tenant": ANY})
    event_broker.assert_published("user.*", headers={}, times=2)
    event_broker.assert_not_published("user.*", headers={"tenant": "y"})
    with pytest.raises(AssertionError, match=r"Not expected: .* and the headers {'n': 1}"):
        event_broker.assert_not_published(headers={"n": 1})
    with pytest.raises(AssertionError) as caught:
        event_broker.assert_published("user.*", headers={"tenant": "y"})
    assert "<- headers['tenant'] is 'x'" in str(caught.value)
    assert "<- headers['tenant'] is missing" in str(caught.value)
    assert event_broker.published[1].correlation_id == "c"


def test_payloads_and_versions_work_in_the_kit(event_broker: EventBroker) -> None:
    """As on RabbitMQ: a test of an upcast needs no more than an event."""
    got = []
    subscriber = Subscriber()

    @subscriber.on("user.moved", name="moves", upcast={1: lambda data: {**data, "user_id": 1}})
    def handle(event: DomainEvent[Moved]) -> None:
        got.append(event.data)

    to = {"city": "Berlin", "since": "2026-01-01"}
    event_broker.deliver(subscriber, DomainEvent("user.moved", {"to": to}), raising=True)
    event_broker.deliver(subscriber, DomainEvent("user.moved", {"to": to}, version=2))
    assert got == [Moved(1, Address("Berlin", date(2026, 1, 1)))]
    (letter,) = event_broker.dead_letters("moves")
    assert letter.error_type == "payload"


# ------------------------------------------------------------------ outages


def test_outage_fails_what_needs_the_broker_at_once(event_broker: EventBroker) -> None:
    """Nothing is sent and nothing waits; afterwards all works again, and nothing was lost."""
    subscriber = Subscriber()
    got: list[DomainEvent] = []
    subscriber.register(got.append, "s", ["#"], max_retries=1)
    kept = publish_domain_event("a.b", {"kept": True})
    publisher = Publisher()
    publisher.publish(kept)
    with event_broker.outage(), sooner_than(60):
        with pytest.raises(BrokerUnavailable, match="simulates an outage") as caught:
            publish_domain_event("a.b", {}, timeout=60)
        assert caught.value.event is not None
        with pytest.raises(BrokerUnavailable):
            publisher.publish(kept, timeout=60)
        with pytest.raises(BrokerUnavailable) as many:
            publisher.publish_many([DomainEvent("a.b", n) for n in range(9)], timeout=60)
        assert (many.value.published, len(many.value.perhaps)) == (0, 0)
        with pytest.raises(BrokerUnavailable):
            Subscriber(timeout=60).register(got.append, "t", ["#"])
        with pytest.raises(BrokerUnavailable):
            event_broker.dead_letters("s")
        with pytest.raises(BrokerUnavailable):
            event_broker.deliver(subscriber, DomainEvent("a.b", {}))
        assert event_broker.deliver(subscriber) == []
        assert event_broker.deliver_all(subscriber) == []
        assert got == []
    event_broker.assert_published("a.b", times=2)
    after = publish_domain_event("a.b", {"after": True})
    assert event_broker.deliver(subscriber) != []
    assert got == [kept, kept, after]


def test_outage_ends_with_an_error_too(event_broker: EventBroker) -> None:
    """It lasts as long as its block."""
    with pytest.raises(ZeroDivisionError), event_broker.outage():
        _ = 1 / 0
    publish_domain_event("a.b", {})


def test_retry_that_comes_due_in_an_outage_is_delivered_afterwards(
    event_broker: EventBroker,
) -> None:
    """The broker keeps it."""
    subscriber, got = Subscriber(), []

    @subscriber.on("#", name="s", max_retries=1)
    def handle(event: DomainEvent) -> None:
        got.append(event.retries)
        if not event.retries:
            raise Retry(delay=60)

    event_broker.deliver(subscriber, DomainEvent("a.b", {}))
    with event_broker.outage():
        event_broker.advance(600)
        assert event_broker.deliver(subscriber) == []
    event_broker.deliver(subscriber)
    assert got == [0, 1]


def test_handler_in_an_outage_gets_its_event_again() -> None:
    """As after a lost connection: what it had not settled is redelivered; the program goes on."""
    got: list[bool] = []
    begun, go_on = threading.Event(), threading.Event()
    with EventBroker(virtual_time=False) as broker:
        subscriber = Subscriber()

        @subscriber.on("#", name="s")
        def handle(event: DomainEvent) -> None:
            got.append(event.redelivered)
            begun.set()
            assert go_on.wait(60)

        with running(subscriber):
            publish_domain_event("a.b", {})
            assert begun.wait(60)
            with broker.outage():
                go_on.set()
                wait_until(lambda: got == [False])
            wait_until(lambda: got == [False, True])
            publish_domain_event("a.b", {})
            wait_until(lambda: got == [False, True, False])


def test_subscriber_that_consumes_in_an_outage_gets_its_events_afterwards() -> None:
    """None meanwhile; and it need not be started again."""
    with EventBroker(virtual_time=False) as broker, ExitStack() as consuming:
        subscriber = Subscriber()
        got: list[DomainEvent] = []
        subscriber.register(got.append, "s", ["#"])
        publish_domain_event("a.b", {})
        with broker.outage():
            subscriber.start_consuming(timeout=0.3)  # would take no time to be handled
            assert got == []
            consuming.enter_context(running(subscriber))
            wait_until(lambda: memory_consumers(broker) == 1)
        wait_until(lambda: len(got) == 1)


def memory_consumers(broker: EventBroker) -> int:
    """How many consume."""
    store = memory.store(broker.url.removeprefix("memory://"))
    return len(store.queue(ToSubscriber("s"), None).consumers)


# ------------------------------------------------------------------ raising


def test_error_of_a_handler_is_raised(event_broker: EventBroker) -> None:
    """Itself, with its traceback; the event is settled, and those after it wait."""
    subscriber, got = Subscriber(), []

    @subscriber.on("#", name="s", max_retries=3, retry_on=OSError)
    def handle(event: DomainEvent) -> None:
        got.append(event.data)
        if event.data == "broken":
            raise ZeroDivisionError("the handler's own")
        if event.data == "down" and not event.retries:
            raise ConnectionError("of retry_on")
        if event.data == "rejected":
            raise Reject("no such user")

    events = [DomainEvent("a.b", data) for data in ("fine", "broken", "down", "rejected")]
    with pytest.raises(ZeroDivisionError, match="the handler's own") as caught:
        event_broker.deliver(subscriber, *events, raising=True)
    assert caught.traceback[-1].name == "handle"
    assert got == ["fine", "broken"]
    assert [each.error_type for each in event_broker.dead_letters("s")] == ["ZeroDivisionError"]
    with pytest.raises(ConnectionError):
        event_broker.deliver(subscriber, raising=True)
    with pytest.raises(Reject):
        event_broker.deliver(subscriber, raising=True)
    assert event_broker.deliver(subscriber, raising=True) == []
    event_broker.advance(600)
    (retried,) = event_broker.deliver(subscriber, raising=True)
    assert (retried.outcome, got[-1]) == ("handled", "down")
    assert len(event_broker.dead_letters("s")) == 2


def test_retry_that_leads_to_one_is_not_raised(event_broker: EventBroker) -> None:
    """The one that gives up is."""
    subscriber = Subscriber()

    @subscriber.on("#", name="s", max_retries=2)
    def handle(event: DomainEvent) -> None:
        raise Retry

    (delivery,) = event_broker.deliver(subscriber, DomainEvent("a.b", {}), raising=True)
    assert delivery.outcome == "retry"
    with pytest.raises(Retry):
        event_broker.deliver_all(subscriber, raising=True)
    assert len(event_broker.dead_letters("s")) == 1


def test_data_that_does_not_fit_is_raised(event_broker: EventBroker) -> None:
    """As an `InvalidEvent`, since no handler was called."""
    subscriber = Subscriber()
    subscriber.register(ignore, "s", ["#"], payload=Moved)
    with pytest.raises(InvalidEvent, match=r"event\.data\.user_id"):
        event_broker.deliver(subscriber, DomainEvent("a.b", {}), raising=True)
    assert len(event_broker.dead_letters("s")) == 1


# ------------------------------------------------------------------ autouse

PUBLISHING_TESTS = """
import unittest
import pytest
from domain_events import BrokerUnavailable, publish_domain_event

NOWHERE = "amqp://guest:guest@localhost:1/%2F"

def publish():
    publish_domain_event("a.b", {}, connection_settings=NOWHERE, timeout=0.1)

def test_function():
    publish()

def test_with_the_fixture(event_broker):
    publish()
    event_broker.assert_published("a.b", times=1)

def test_with_a_real_broker(event_broker):
    event_broker.stop()
    with pytest.raises(BrokerUnavailable, match="localhost"):
        publish()

class TestOfUnittest(unittest.TestCase):
    def test_method(self):
        publish()
"""


@pytest.mark.parametrize(
    ("file", "option", "passed"),
    [
        ("tox.ini", "[pytest]\ndomain_events_autouse = true", 4),
        ("pyproject.toml", "[tool.pytest.ini_options]\ndomain_events_autouse = true", 4),
        ("tox.ini", "[pytest]\ndomain_events_autouse = false", 2),
        ("tox.ini", "[pytest]", 2),
    ],
)
def test_every_test_may_have_the_fixture(
    pytester: pytest.Pytester, file: str, option: str, passed: int
) -> None:
    """By an option of pytest's, off by default."""
    (pytester.path / file).write_text(option)
    pytester.makepyfile(PUBLISHING_TESTS)
    result = pytester.runpytest_subprocess("--strict-config")
    result.assert_outcomes(passed=passed, failed=4 - passed)


def test_subscriber_that_declares_nothing_gets_its_events_here() -> None:
    """Its queues exist on this broker, as if an operator had applied them."""
    seen: list[DomainEvent] = []
    with EventBroker() as broker, Subscriber(declare=False) as subscriber:
        subscriber.register(seen.append, "declares-nothing", ["a"], max_retries=1)
        event = DomainEvent("a", {})
        broker.deliver(subscriber, event)
        assert seen == [event]
