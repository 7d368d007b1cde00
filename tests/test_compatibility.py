"""Services that come from domain-event-broker 3.x, and those that stay with it for a while.

In this order: both libraries on one exchange; a queue that domain-event-broker has declared;
domain-event-broker's own tests, with another import and with names of their own. The last use
the default exchange, as their calls do; it stays behind on the broker, with its delay levels.
"""

from __future__ import annotations

import inspect
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pyamqp
import pytest
from support import Names, wait_until

import domain_events
from domain_events import (
    DISCARD,
    LEAVE,
    DeadLetters,
    DomainEvent,
    Publisher,
    Retry,
    Subscriber,
    configure,
    publish_domain_event,
    replay_all,
    replay_event,
)

pytestmark = [
    # domain-event-broker uses a function of datetime that Python 3.12 deprecates,
    pytest.mark.filterwarnings("ignore:datetime.datetime.utc:DeprecationWarning"),
    # and pika's BlockingConnection, which pika 1.5 deprecates: in this one module of its own.
    pytest.mark.filterwarnings(
        r"ignore:BlockingConnection is deprecated:DeprecationWarning:domain_event_broker\.transport"
    ),
]

FIVE_KEYS = ["routing_key", "data", "domain_object_id", "uuid_string", "timestamp"]


@pytest.fixture(autouse=True)
def default_broker(broker_url: str) -> Iterator[None]:
    """The calls of domain-event-broker's users name no broker."""
    configure(broker_url)
    yield
    configure()
    domain_events.close_publishers()


@pytest.fixture
def old() -> Any:
    """domain-event-broker, version 3.0.2."""
    return pytest.importorskip("domain_event_broker")


# ------------------------------------------------------------------ helpers


class Probe:
    """A look at the broker's queues; a missing queue is None."""

    def __init__(self, url: str) -> None:
        self._connection = pyamqp.Connection(url)

    def size(self, queue: str) -> int | None:
        channel = self._connection.channel()
        try:
            return channel.queue_declare(queue, passive=True).messages
        except pyamqp.NotFound:
            return None
        finally:
            channel.close()

    def take(self, queue: str) -> bytes | None:
        channel = self._connection.channel()
        received = channel.basic_get(queue, auto_ack=True)
        channel.close()
        return None if received is None else received.body

    def publish(self, exchange: str, routing_key: str, body: bytes) -> None:
        channel = self._connection.channel()
        channel.confirm_delivery()
        channel.basic_publish(exchange, routing_key, body, mandatory=True)
        channel.close()

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def probe(broker_url: str) -> Iterator[Probe]:
    probe = Probe(broker_url)
    yield probe
    probe.close()


def event_in(probe: Probe, queue: str) -> DomainEvent:
    body = probe.take(queue)
    assert body is not None, f"{queue} is empty"
    return DomainEvent.from_json(body)


def consume(subscriber: Subscriber, until: Callable[[], object]) -> None:
    """``start_consuming``, until the condition holds."""

    def watch() -> None:
        try:
            wait_until(until)
        finally:
            subscriber.stop_consuming()

    watcher = threading.Thread(target=watch)
    watcher.start()
    subscriber.start_consuming(timeout=45.0)
    watcher.join()


def consume_old(subscriber: Any, until: Callable[[], object]) -> None:
    """The same for a subscriber of domain-event-broker."""

    def step() -> object:
        subscriber.connection.process_data_events(time_limit=0.01)
        return until()

    wait_until(step, interval=0)


def close_old(subscriber: Any) -> None:
    """Let its handler's thread end, tell the broker what that has asked for, disconnect."""
    subscriber.workers.shutdown(wait=True)
    subscriber.connection.process_data_events(time_limit=0)
    subscriber.disconnect()


@pytest.fixture
def old_queue(names: Names) -> str:
    """The name of a queue that domain-event-broker is going to declare, and all it brings."""
    name = names.queue("old")
    for suffix in ("-dlx", "-retry", "-delay-100"):
        names.add(exchange=f"{name}{suffix}", queue=f"{name}{suffix}")
    return name


def nop(event: object) -> None:
    pass


# ------------------------------------------------------------------ one exchange


def test_every_public_name_of_domain_event_broker_is_here(old: Any) -> None:
    """Changing the import is enough."""
    names = [
        name
        for name, value in vars(old).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]
    assert {"publish_domain_event", "Subscriber", "replay_event", "RETRY"} <= set(names)
    for name in names:
        assert hasattr(domain_events, name), name
    for name in ("RETRY", "LEAVE", "DISCARD"):
        assert getattr(domain_events, name) == getattr(old, name)


@pytest.mark.parametrize(
    "path",
    [
        "publish_domain_event",
        "DomainEvent.__init__",
        "DomainEvent.from_json",
        "Retry.__init__",
        "Publisher.__init__",
        "Subscriber.register",
        "Subscriber.start_consuming",
        "Subscriber.stop_consuming",
        "replay_event",
        "replay_all",
    ],
)
def test_every_call_of_domain_event_broker_can_be_made(old: Any, path: str) -> None:
    """The same parameters in the same order; each may be left out where it might be there."""

    def parameters(module: Any) -> list[tuple[str, bool]]:
        found = module
        for name in path.split("."):
            found = getattr(found, name)
        # Theirs lose their signature in a decorator, but for the closure's.
        for cell in getattr(found, "__closure__", None) or ():
            if inspect.isfunction(cell.cell_contents):
                found = cell.cell_contents
        return [
            (parameter.name, parameter.default is not parameter.empty)
            for parameter in inspect.signature(found).parameters.values()
            if parameter.kind is not parameter.KEYWORD_ONLY
        ]

    assert parameters(old)
    assert parameters(domain_events) == parameters(old)


def test_a_subscribers_arguments_are_those_of_its_transport(old: Any) -> None:
    """Settings, exchange, exchange type, by position too."""
    theirs = list(inspect.signature(old.transport.Transport).parameters)
    assert list(inspect.signature(Subscriber).parameters)[: len(theirs)] == theirs


def test_the_body_is_the_same_byte_for_byte(old: Any) -> None:
    """Exactly five keys, in the same order."""
    event = DomainEvent("user.registered", {"id": 1, "name": "Zoë"}, "17")
    theirs = old.DomainEvent(**event.event_data)
    assert json.dumps(theirs.event_data) == event.to_json()
    assert list(json.loads(event.to_json())) == FIVE_KEYS
    assert DomainEvent.from_json(json.dumps(theirs.event_data)) == event
    assert old.DomainEvent.from_json(event.to_json()) == theirs


def test_their_subscriber_gets_our_events(
    old: Any, broker_url: str, names: Names, old_queue: str
) -> None:
    """Published by us on the exchange that they listen to."""
    exchange = names.exchange()
    received: list[Any] = []
    subscriber = old.Subscriber(broker_url, exchange)
    subscriber.register(received.append, old_queue, ["user.*"])
    sent = DomainEvent("user.registered", {"user_id": 1}, "17")
    with Publisher(broker_url, exchange) as ours:
        ours.publish(sent)
    consume_old(subscriber, lambda: received)
    close_old(subscriber)
    assert [event.event_data for event in received] == [sent.event_data]


def test_our_subscriber_gets_their_events(
    old: Any, broker_url: str, names: Names, old_queue: str
) -> None:
    """Published by them on the exchange that we listen to; the exchange is the same one."""
    exchange, received = names.exchange(), list[DomainEvent]()
    theirs = old.Publisher(broker_url, exchange)
    sent = old.DomainEvent("user.registered", {"user_id": 1}, "17")
    subscriber = Subscriber(broker_url, exchange)
    subscriber.register(received.append, names.queue(), ["user.*"])
    theirs.publish(json.dumps(sent.event_data), sent.routing_key)
    theirs.disconnect()
    consume(subscriber, lambda: received)
    assert [event.event_data for event in received] == [sent.event_data]


def test_both_work_on_the_default_exchange(
    old: Any, broker_url: str, names: Names, old_queue: str, unique: str
) -> None:
    """One publish by each; a subscriber of each hears both."""
    to_ours, to_theirs = list[Any](), list[Any]()
    subscriber, theirs = Subscriber(), old.Subscriber(broker_url)
    subscriber.register(to_ours.append, names.queue(), [f"{unique}.*"])
    theirs.register(to_theirs.append, old_queue, [f"{unique}.*"])
    sent = [
        publish_domain_event(f"{unique}.ours", {"n": 1}),
        old.publish_domain_event(f"{unique}.theirs", {"n": 2}, connection_settings=broker_url),
    ]
    consume_old(theirs, lambda: len(to_theirs) == 2)
    close_old(theirs)
    consume(subscriber, lambda: len(to_ours) == 2)
    expected = [event.event_data for event in sent]
    assert [event.event_data for event in to_ours] == expected
    assert [event.event_data for event in to_theirs] == expected


# ------------------------------------------------------------------ their queue


@pytest.mark.parametrize("our_dead_letter", [None, True, False])
@pytest.mark.parametrize("their_dead_letter", [True, False])
def test_a_queue_of_theirs_is_taken_over(
    old: Any,
    broker_url: str,
    names: Names,
    old_queue: str,
    probe: Probe,
    their_dead_letter: bool,
    our_dead_letter: bool | None,
) -> None:
    """Whatever dead_letter was and is: no TopologyError, and what waits in it is handled."""
    exchange = names.exchange()
    theirs = old.Subscriber(broker_url, exchange)
    theirs.register(nop, old_queue, ["user.*"], their_dead_letter)
    theirs.disconnect()
    waiting = old.DomainEvent("user.registered", {"n": 1})
    probe.publish(exchange, "user.registered", json.dumps(waiting.event_data).encode())

    received: list[tuple[Any, int]] = []

    def handler(event: DomainEvent) -> None:
        received.append((event.data, event.retries))
        if event.data == {"n": 1} and not event.retries:
            raise Retry(0.1)
        if event.data == {"n": 2}:
            raise ValueError("no")

    subscriber = Subscriber(broker_url, exchange)
    subscriber.register(
        handler, old_queue, ["user.*"], our_dead_letter, max_retries=1, queue_type="classic"
    )
    with Publisher(broker_url, exchange) as ours:
        ours.publish(DomainEvent("user.registered", {"n": 2}))
    consume(subscriber, lambda: len(received) == 3)
    assert received == [({"n": 1}, 0), ({"n": 2}, 0), ({"n": 1}, 1)]
    assert probe.size(old_queue) == 0
    kept = None if our_dead_letter is False and not their_dead_letter else 0
    assert probe.size(f"{old_queue}-dl") == (1 if our_dead_letter is not False else kept)

    # And back: their arguments are still the queue's.
    theirs = old.Subscriber(broker_url, exchange)
    theirs.register(nop, old_queue, ["user.*"], their_dead_letter)
    theirs.disconnect()


def test_without_queue_type_the_error_says_the_way_out(
    old: Any, broker_url: str, names: Names, old_queue: str
) -> None:
    """A service that meets its old queue is told of queue_type='classic'."""
    theirs = old.Subscriber(broker_url, names.exchange())
    theirs.register(nop, old_queue, ["user.*"])
    theirs.disconnect()
    with (
        Subscriber(broker_url, names.exchange()) as subscriber,
        pytest.raises(domain_events.TopologyError, match="queue_type='classic'"),
    ):
        subscriber.register(nop, old_queue, ["user.*"])


def test_both_share_the_events_of_one_queue(
    old: Any, broker_url: str, names: Names, old_queue: str, probe: Probe
) -> None:
    """During a rolling deployment: each event is handled once, by either."""
    exchange = names.exchange()
    # Each waits in its first event until the other one has one too.
    both = threading.Barrier(2, timeout=30)
    to_ours, to_theirs = list[int](), list[int]()

    def handler(seen: list[int]) -> Callable[[Any], None]:
        def handle(event: Any) -> None:
            if not seen:
                both.wait()
            seen.append(event.data["n"])

        return handle

    theirs = old.Subscriber(broker_url, exchange)
    theirs.register(handler(to_theirs), old_queue, ["user.*"], True)
    subscriber = Subscriber(broker_url, exchange)
    subscriber.register(
        handler(to_ours), old_queue, ["user.*"], True, queue_type="classic", prefetch_count=1
    )
    with Publisher(broker_url, exchange) as ours:
        ours.publish_many(DomainEvent("user.registered", {"n": n}) for n in range(20))
    thread = threading.Thread(target=subscriber.start_consuming)
    thread.start()
    try:
        consume_old(theirs, lambda: len(to_ours) + len(to_theirs) >= 20)
    finally:
        subscriber.stop_consuming()
        thread.join()
        close_old(theirs)
    assert to_ours
    assert to_theirs
    assert sorted(to_ours + to_theirs) == list(range(20))
    wait_until(lambda: probe.size(old_queue) == 0)
    assert probe.size(f"{old_queue}-dl") == 0


def test_a_retry_that_they_began_comes_to_us(
    old: Any, broker_url: str, names: Names, old_queue: str, probe: Probe
) -> None:
    """What waits in their delay queues while the service is changed over is not lost."""
    exchange = names.exchange()
    tried = []

    def try_again(event: Any) -> None:
        tried.append(event)
        raise old.Retry(0.1)

    theirs = old.Subscriber(broker_url, exchange)
    theirs.register(try_again, old_queue, ["user.*"], max_retries=1)
    sent = DomainEvent("user.registered", {})
    probe.publish(exchange, sent.routing_key, sent.to_json().encode())
    consume_old(theirs, lambda: tried)
    theirs.workers.shutdown(wait=True)
    theirs.connection.process_data_events(time_limit=0)
    theirs.channel.close()
    theirs.disconnect()

    received: list[DomainEvent] = []
    subscriber = Subscriber(broker_url, exchange)
    subscriber.register(received.append, old_queue, ["user.*"], queue_type="classic")
    consume(subscriber, lambda: received)
    assert received == [sent]


def test_our_operators_can_replay_their_dead_letters(
    old: Any, broker_url: str, names: Names, old_queue: str, probe: Probe
) -> None:
    """Those have no reason that could be read, and go back to the queue all the same."""
    exchange = names.exchange()
    failed = []

    def fail(event: Any) -> None:
        failed.append(event)
        raise ValueError("no")

    theirs = old.Subscriber(broker_url, exchange)
    theirs.register(fail, old_queue, ["user.*"], True)
    sent = DomainEvent("user.registered", {})
    probe.publish(exchange, sent.routing_key, sent.to_json().encode())
    consume_old(theirs, lambda: failed)
    close_old(theirs)
    wait_until(lambda: probe.size(f"{old_queue}-dl") == 1)
    with DeadLetters(old_queue, broker_url) as dead_letters:
        (letter,) = dead_letters
        assert (letter.event, letter.routing_key) == (sent, "user.registered")
        assert dead_letters.replay_all() == 1
    assert probe.size(f"{old_queue}-dl") == 0
    assert event_in(probe, old_queue) == sent


# ------------------------------------------------------------------ their tests: events, transport


class ConsumerError(Exception):
    pass


def raise_error(event: DomainEvent) -> None:
    raise ConsumerError("Unexpected error")


def test_fire_event(names: Names, unique: str, probe: Probe) -> None:
    """The event that is returned is the one that was published, and can be loaded."""
    name = names.queue()
    with Subscriber() as subscriber:
        subscriber.register(nop, name, [f"{unique}.test"])
    event = publish_domain_event(f"{unique}.test", {})
    body = probe.take(name)
    assert body is not None
    event_data = json.loads(body)
    assert event_data["routing_key"] == f"{unique}.test"
    assert event_data["data"] == {}
    assert event_data["uuid_string"] == event.uuid_string
    assert DomainEvent.from_json(body) == event


def test_publish(names: Names, unique: str, probe: Probe) -> None:
    """What is published between register and start_consuming is handled."""
    messages: list[str] = []

    def handle_event(event: DomainEvent) -> None:
        messages.append(event.data["message"])

    name = names.queue()
    subscriber = Subscriber()
    subscriber.register(handle_event, name, [f"{unique}.publish"])
    data = {"message": str(uuid.uuid4())[:4]}
    publish_domain_event(f"{unique}.publish", data)
    consume(subscriber, lambda: messages)
    assert messages == [data["message"]]
    assert probe.size(name) == 0


def test_positional_arguments(names: Names, unique: str, broker_url: str) -> None:
    """Every argument in its old place."""
    exchange, received = names.exchange(), list[DomainEvent]()
    subscriber = Subscriber(broker_url, exchange, "topic")
    subscriber.register(
        received.append, names.queue(), (f"{unique}.*",), True, True, False, False, 2
    )
    Publisher(broker_url, exchange, "topic").close()
    stamp = str(uuid.uuid4())
    event = publish_domain_event(f"{unique}.x", {"a": 1}, "17", stamp, 12.5, None)
    assert event == DomainEvent(f"{unique}.x", {"a": 1}, "17", stamp, 12.5, 3)
    subscriber.start_consuming(0.05)
    assert received == []


def test_dummy_mode(names: Names, unique: str, probe: Probe) -> None:
    """Without a broker all calls do nothing, and return."""
    name = names.queue()
    received: list[DomainEvent] = []
    subscriber = Subscriber(connection_settings=None)
    subscriber.register(received.append, name, [f"{unique}.publish-dummy"])
    event = publish_domain_event(f"{unique}.publish-dummy", {}, connection_settings=None)
    assert event.routing_key == f"{unique}.publish-dummy"
    subscriber.start_consuming(timeout=10.0)
    subscriber.stop_consuming()
    assert replay_event(name, connection_settings=None) == 0
    assert replay_all(name, connection_settings=None) == 0
    assert received == []
    assert probe.size(name) is None


# ------------------------------------------------------------------ their tests: replay


@pytest.fixture
def dead_letter_message(names: Names, unique: str, probe: Probe) -> tuple[str, dict[str, str]]:
    """The name of a subscriber with one dead letter, and the data in that."""
    name = names.queue("replay")
    subscriber = Subscriber()
    subscriber.register(raise_error, name, [f"{unique}.replay"], dead_letter=True)
    data = {"message": str(uuid.uuid4())[:4]}
    publish_domain_event(f"{unique}.replay", data)
    consume(subscriber, lambda: probe.size(f"{name}-dl"))
    assert probe.size(name) == 0
    return name, data


def test_replay(dead_letter_message: tuple[str, dict[str, str]], probe: Probe) -> None:
    """Back into the subscriber's queue, and out of the dead letters."""
    name, data = dead_letter_message
    assert replay_event(name) == 0
    assert probe.size(f"{name}-dl") == 0
    assert event_in(probe, name).data == data


def discard(**kwargs: Any) -> str:
    return DISCARD


def test_discard(dead_letter_message: tuple[str, dict[str, str]], probe: Probe) -> None:
    """Out of the dead letters, and nowhere else."""
    name, _data = dead_letter_message
    assert replay_event(name, message_callback=discard) == 0
    assert probe.size(f"{name}-dl") == 0
    assert probe.size(name) == 0


def leave(**kwargs: Any) -> str:
    return LEAVE


def test_leave(dead_letter_message: tuple[str, dict[str, str]], probe: Probe) -> None:
    """It stays among the dead letters."""
    name, data = dead_letter_message
    assert replay_event(name, message_callback=leave) == 0
    wait_until(lambda: probe.size(f"{name}-dl") == 1)
    assert probe.size(name) == 0
    assert event_in(probe, f"{name}-dl").data == data


def test_an_invalid_action(dead_letter_message: tuple[str, dict[str, str]], probe: Probe) -> None:
    """Is an error, and the dead letter is left."""
    name, _data = dead_letter_message
    with pytest.raises(ValueError, match="RETRY, LEAVE or DISCARD"):
        replay_event(name, lambda **_kwargs: "burn")
    wait_until(lambda: probe.size(f"{name}-dl") == 1)
    assert probe.size(name) == 0


def test_the_callback_is_told(dead_letter_message: tuple[str, dict[str, str]]) -> None:
    """Frame, header and body, by name."""
    name, data = dead_letter_message
    told: dict[str, Any] = {}

    def callback(frame: Any, header: Any, body: bytes) -> str:
        told.update(key=frame.routing_key, id=header.message_id, event=DomainEvent.from_json(body))
        return DISCARD

    assert replay_event(name, callback) == 0
    assert told["event"].data == data
    assert told["id"] == told["event"].uuid_string
    assert told["key"]


def test_replay_all(names: Names, unique: str, probe: Probe) -> None:
    """All that are there, oldest first; replay_event says how many are behind one."""
    name = names.queue()
    subscriber = Subscriber()
    subscriber.register(raise_error, name, [f"{unique}.replay"], True)
    sent = [publish_domain_event(f"{unique}.replay", {"n": n}) for n in range(4)]
    consume(subscriber, lambda: probe.size(f"{name}-dl") == 4)
    assert replay_event(name) == 3
    assert event_in(probe, name) == sent[0]
    assert replay_all(name) == 0
    assert probe.size(f"{name}-dl") == 0
    assert [event_in(probe, name) for _ in range(3)] == sent[1:]


def test_empty_queue(names: Names, unique: str) -> None:
    """Nothing to replay is no error."""
    name = names.queue()
    with Subscriber() as subscriber:
        subscriber.register(nop, name, [f"{unique}.empty"], dead_letter=True)
    assert replay_event(name) == 0
    assert replay_all(name) == 0


# ------------------------------------------------------------------ their tests: subscriber


def test_retry(names: Names, unique: str, probe: Probe) -> None:
    """max_retries=3 is four deliveries, whatever the broker; then it is a dead letter."""
    received: list[int] = []

    def raise_retry(event: DomainEvent) -> None:
        received.append(event.retries)
        raise Retry(0.1)

    name = names.queue()
    subscriber = Subscriber()
    subscriber.register(raise_retry, name, [f"{unique}.retry"], max_retries=3)
    publish_domain_event(f"{unique}.retry", {"message": str(uuid.uuid4())[:4]})
    consume(subscriber, lambda: probe.size(f"{name}-dl"))
    assert received == [0, 1, 2, 3]
    assert probe.size(name) == 0


def test_retry_delays(names: Names, unique: str, probe: Probe) -> None:
    """An event with a shorter delay is back before one with a longer delay."""
    received: list[float] = []

    def raise_retry(event: DomainEvent) -> None:
        received.append(event.data["delay"])
        raise Retry(event.data["delay"])

    name = names.queue()
    subscriber = Subscriber()
    subscriber.register(raise_retry, name, [f"{unique}.retry-delay"], max_retries=1)
    publish_domain_event(f"{unique}.retry-delay", {"delay": 1.5})
    publish_domain_event(f"{unique}.retry-delay", {"delay": 0.1})
    consume(subscriber, lambda: len(received) >= 4)
    assert received == [1.5, 0.1, 0.1, 1.5]
    assert probe.size(name) == 0


def test_auto_delete(names: Names, unique: str, probe: Probe) -> None:
    """The queue goes with its consumer."""
    received: list[DomainEvent] = []
    name = names.queue()
    subscriber = Subscriber()
    subscriber.register(received.append, name, [f"{unique}.auto_delete"], auto_delete=True)
    publish_domain_event(f"{unique}.auto_delete", {})
    assert probe.size(name) == 1
    consume(subscriber, lambda: received)
    wait_until(lambda: probe.size(name) is None)
    assert len(received) == 1


def test_multiple_listeners(names: Names, unique: str) -> None:
    """Two handlers of one subscriber: each gets what it asked for."""
    one, two = list[str](), list[str]()
    subscriber = Subscriber()
    subscriber.register(
        lambda event: one.append(event.routing_key), names.queue("1"), [f"{unique}.1"]
    )
    subscriber.register(
        lambda event: two.append(event.routing_key), names.queue("2"), [f"{unique}.2"]
    )
    publish_domain_event(f"{unique}.1", {})
    publish_domain_event(f"{unique}.2", {})
    consume(subscriber, lambda: one and two)
    assert (one, two) == ([f"{unique}.1"], [f"{unique}.2"])


def test_consumer_timeout(names: Names) -> None:
    """start_consuming ends after its timeout, also when there is nothing to do."""
    subscriber = Subscriber()
    subscriber.register(nop, names.queue(), ["#"])
    begun = time.monotonic()
    subscriber.start_consuming(timeout=0.2)
    assert time.monotonic() - begun >= 0.2


def test_dead_letter(names: Names, unique: str, probe: Probe) -> None:
    """What a handler fails on is kept."""
    name = names.queue()
    subscriber = Subscriber()
    subscriber.register(raise_error, name, [f"{unique}.dl"], dead_letter=True)
    data = {"message": str(uuid.uuid4())[:4]}
    publish_domain_event(f"{unique}.dl", data)
    consume(subscriber, lambda: probe.size(f"{name}-dl"))
    assert event_in(probe, f"{name}-dl").data == data


def test_no_dead_letter(names: Names, unique: str, probe: Probe) -> None:
    """With dead_letter=False it is dropped, as before."""
    failed: list[DomainEvent] = []

    def fail(event: DomainEvent) -> None:
        failed.append(event)
        raise_error(event)

    name = names.queue()
    subscriber = Subscriber()
    subscriber.register(fail, name, [f"{unique}.dl"], dead_letter=False)
    publish_domain_event(f"{unique}.dl", {})
    consume(subscriber, lambda: failed)
    assert len(failed) == 1
    assert probe.size(name) == 0
    assert probe.size(f"{name}-dl") is None


def test_invalid_json(names: Names, unique: str, probe: Probe) -> None:
    """A message that is no event stops nobody; it is kept as it is, the next one is handled."""
    received: list[DomainEvent] = []
    name = names.queue()
    subscriber = Subscriber()
    subscriber.register(received.append, name, [f"{unique}.#"])
    probe.publish("domain-events", unique, b"iamnotvalidjson[]")
    sent = publish_domain_event(unique, {})
    consume(subscriber, lambda: received)
    assert received == [sent]
    assert probe.size(name) == 0
    assert probe.take(f"{name}-dl") == b"iamnotvalidjson[]"


def test_long_running_consumer(names: Names, unique: str, broker_url: str, probe: Probe) -> None:
    """A handler that takes longer than the connection's heartbeat finishes, and its ack counts."""
    finished: list[bool] = []

    def slow_nop(event: DomainEvent) -> None:
        # Slow on purpose: the broker cuts a connection that was silent for two heartbeats.
        time.sleep(3.0)
        finished.append(True)

    name = names.queue()
    subscriber = Subscriber(
        connection_settings=broker_url + ("&" if "?" in broker_url else "?") + "heartbeat=1"
    )
    subscriber.register(slow_nop, name, [f"{unique}.long_job"])
    publish_domain_event(f"{unique}.long_job", {})
    consume(subscriber, lambda: finished)
    assert probe.size(name) == 0
    assert finished == [True]
