"""What `publish_domain_event` and `Publisher` promise, whatever broker is behind them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import onlooker
import pytest
from bench import Events
from support import Names, wait_until

import domain_events
from domain_events import (
    BrokerUnavailable,
    DomainEvent,
    EventUnroutable,
    InvalidEvent,
    Publisher,
    TopologyError,
    close_publishers,
    publish_domain_event,
)


@pytest.fixture
def _default_publishers_closed() -> Iterator[None]:
    """The process's own publishers live until exit; tests close them."""
    yield
    close_publishers()
    domain_events.configure()


def test_published_event_is_in_the_queue_when_publish_returns(
    publisher: Publisher, queue: str, broker_url: str
) -> None:
    """A confirm means: stored in every queue that is bound."""
    event = publisher.publish(DomainEvent("user.registered", {"user_id": 7}, "7"))
    properties, body = onlooker.take(broker_url, queue)
    assert json.loads(body) == {
        "routing_key": "user.registered",
        "data": {"user_id": 7},
        "domain_object_id": "7",
        "uuid_string": event.uuid_string,
        "timestamp": event.timestamp,
    }
    assert properties.message_id == event.uuid_string
    assert properties.correlation_id == event.uuid_string
    assert properties.type == "user.registered"
    assert properties.timestamp == int(event.timestamp)
    assert properties.content_type == "application/json"
    assert properties.app_id
    assert not properties.headers


@pytest.mark.usefixtures("_default_publishers_closed")
def test_function_publishes_to_the_configured_broker(broker_url: str, names: Names) -> None:
    """The first snippet of the README, with the broker set once for the process."""
    queue = names.queue()
    onlooker.bind_queue(broker_url, queue, "domain-events", names.prefix)
    domain_events.configure(broker_url, app_id="test-program")
    event = publish_domain_event(names.prefix, {"user_id": 1}, "an-id", "a-uuid", 12.5)
    properties, body = onlooker.take(broker_url, queue)
    assert DomainEvent.from_json(body) == event
    assert (event.domain_object_id, event.uuid_string, event.timestamp) == ("an-id", "a-uuid", 12.5)
    assert properties.app_id == "test-program"


@pytest.mark.parametrize(
    "event",
    [
        DomainEvent("", {}),
        DomainEvent("x" * 256, {}),
        DomainEvent("user.*", {}),
        DomainEvent("user.#", {}),
        DomainEvent("user.registered", {"when": float("nan")}),
        DomainEvent("user.registered", {"what": object()}),
        DomainEvent("user.registered", {}, uuid_string="x" * 256),
    ],
    ids=["empty", "long", "star", "hash", "nan", "object", "long id"],
)
def test_invalid_event_is_refused_before_anything_is_sent(
    publisher: Publisher, queue: str, broker_url: str, event: DomainEvent
) -> None:
    """`InvalidEvent` carries the event, and the broker has seen nothing."""
    with pytest.raises(InvalidEvent) as caught:
        publisher.publish(event)
    assert caught.value.event is event
    assert onlooker.count(broker_url, queue) == 0


def test_event_nobody_listens_to_is_fine_unless_mandatory(publisher: Publisher) -> None:
    """Publishers need not know subscribers, but may insist that there is one."""
    event = DomainEvent("nobody.listens", {})
    publisher.publish(event)
    with pytest.raises(EventUnroutable, match=r"nobody\.listens") as caught:
        publisher.publish(event, mandatory=True)
    assert caught.value.event is event


def test_mandatory_event_with_a_listener_is_published(
    publisher: Publisher, queue: str, broker_url: str
) -> None:
    """A return is told from a confirm, also when both come in one window."""
    onlooker.bind_queue(broker_url, queue, publisher._exchange, "#")
    publisher.publish(DomainEvent("user.registered", {}), mandatory=True)
    assert onlooker.count(broker_url, queue) == 1


def test_many_events_are_published_in_order(
    publisher: Publisher, queue: str, broker_url: str
) -> None:
    """`publish_many` reads a long iterable through its window and confirms all."""
    number = 5000
    assert publisher.publish_many(DomainEvent("n.n", {"n": n}) for n in range(number)) == number
    bodies = onlooker.take_all(broker_url, queue)
    assert [json.loads(body)["data"]["n"] for body in bodies] == list(range(number))


def test_failed_event_of_many_is_named_and_the_iterable_read_no_further(
    publisher: Publisher, queue: str, broker_url: str
) -> None:
    """The error says which events were taken and not published; the others were."""
    taken: list[int] = []

    def events() -> Iterator[DomainEvent]:
        for n in range(10_000):
            taken.append(n)
            yield DomainEvent("n.n", {"n": n} if n != 300 else {"n": object()})

    with pytest.raises(InvalidEvent) as caught:
        publisher.publish_many(events())
    assert taken[-1] == 300
    assert caught.value.event is not None
    assert [event.uuid_string for event in caught.value.unconfirmed] == [
        caught.value.event.uuid_string
    ]
    assert onlooker.count(broker_url, queue) == 300


def test_error_of_the_iterable_itself_leaves_nothing_behind(
    publisher: Publisher, queue: str, broker_url: str
) -> None:
    """What was taken before is confirmed, and the error is the caller's own."""

    def events() -> Iterator[DomainEvent]:
        for n in range(10):
            yield DomainEvent("n.n", {"n": n})
        raise LookupError("the outbox is gone")

    with pytest.raises(LookupError):
        publisher.publish_many(events())
    assert onlooker.count(broker_url, queue) == 10


def test_unroutable_event_of_many_fails_alone(
    publisher: Publisher, names: Names, broker_url: str
) -> None:
    """The ones before it are published, and those behind it that were taken too."""
    queue = names.queue("some")
    onlooker.bind_queue(broker_url, queue, publisher._exchange, "user.*")
    taken: Events = []

    def events() -> Iterator[DomainEvent]:
        for n in range(50):
            taken.append(DomainEvent("user.registered" if n != 5 else "nobody", n))
            yield taken[-1]

    with pytest.raises(EventUnroutable) as caught:
        publisher.publish_many(events(), mandatory=True)
    assert list(caught.value.unconfirmed) == [taken[5]]
    assert onlooker.count(broker_url, queue) == len(taken) - 1


def test_exchange_deleted_under_the_publisher_is_declared_again(
    publisher: Publisher, broker_url: str, exchange: str
) -> None:
    """Not looped on, and no event fails for it."""
    publisher.publish(DomainEvent("user.registered", {}))
    onlooker.delete(broker_url, exchanges=[exchange])
    assert publisher.publish_many(DomainEvent("user.registered", {}) for _ in range(300)) == 300
    with pytest.raises(Exception, match="topic"):
        onlooker.declare_exchange(broker_url, exchange, "fanout")


def test_exchange_of_another_type_is_a_topology_error(broker_url: str, names: Names) -> None:
    """It names the exchange, what exists, what was asked for, and the ways out."""
    exchange = names.exchange("fan")
    onlooker.declare_exchange(broker_url, exchange, "fanout")
    with Publisher(broker_url, exchange) as publisher:
        with pytest.raises(TopologyError) as caught:
            publisher.publish(DomainEvent("user.registered", {}))
        for words in (exchange, "fanout", "topic", "ways out"):
            assert words in str(caught.value)
        # It is an answer, not a state: mended outside, it works.
        onlooker.delete(broker_url, exchanges=[exchange])
        publisher.publish(DomainEvent("user.registered", {}))
    with Publisher(broker_url, exchange, "topic") as publisher:
        publisher.publish(DomainEvent("user.registered", {}))


def test_closed_publisher_says_so(broker_url: str, exchange: str) -> None:
    """After `close` nothing can be published, and nothing waits for it."""
    publisher = Publisher(broker_url, exchange)
    publisher.publish(DomainEvent("user.registered", {}))
    publisher.close()
    publisher.close()
    with pytest.raises(BrokerUnavailable, match="closed"):
        publisher.publish(DomainEvent("user.registered", {}))
    with pytest.raises(BrokerUnavailable, match="closed"):
        publisher.publish_many([DomainEvent("user.registered", {})])


def test_close_waits_for_what_other_threads_publish(
    broker_url: str, exchange: str, queue: str
) -> None:
    """Nothing that was under way is cut off."""
    publisher = Publisher(broker_url, exchange)
    publisher.publish(DomainEvent("user.registered", {}))
    published: list[int] = []
    begun = threading.Event()

    def events() -> Iterator[DomainEvent]:
        for n in range(3000):
            yield DomainEvent("user.registered", {"n": n})
        begun.set()

    thread = threading.Thread(target=lambda: published.append(publisher.publish_many(events())))
    thread.start()
    assert begun.wait(30)
    publisher.close()
    thread.join()
    assert published == [3000]
    assert onlooker.count(broker_url, queue) == 3001


def test_events_of_a_slow_iterable_are_published_as_they_come(
    publisher: Publisher, queue: str, broker_url: str
) -> None:
    """Each is sent when it is taken, and its deadline counts from then."""
    arrived: list[int] = []

    def events() -> Iterator[DomainEvent]:
        for n in range(4):
            yield DomainEvent("n.n", n)
            wait_until(lambda: onlooker.count(broker_url, queue) == n + 1)  # noqa: B023
            arrived.append(n)

    assert publisher.publish_many(events(), timeout=5) == 4
    assert arrived == [0, 1, 2, 3]
