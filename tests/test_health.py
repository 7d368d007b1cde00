"""`Subscriber.health` and `Publisher.health`: alive, ready, and why not."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import onlooker
import pytest
from bench import Bench, running
from rabbitmq_node import Node
from support import Names, wait_until

from domain_events import (
    BrokerUnavailable,
    ConfigurationError,
    ConnectionChange,
    ConnectionState,
    DomainEvent,
    EventNotConfirmed,
    Middleware,
    Publisher,
    PublisherHealth,
    Retry,
    Subscriber,
    SubscriberHealth,
)
from domain_events.broker import memory
from domain_events.health import LONGEST_SILENCE, ConnectionHealth
from domain_events.testing import EventBroker


@pytest.fixture
def memory_url(unique: str) -> Iterator[str]:
    yield f"memory://{unique}"
    memory.forget(unique)


@pytest.fixture
def embedded(memory_url: str, unique: str) -> Iterator[Bench]:
    bench = Bench(memory_url, Names(memory_url, unique))
    yield bench
    bench.publisher.close()


@pytest.fixture
def outage(killable_node: Node, unique: str) -> Iterator[Bench]:
    """A bench on a broker that the test may stop; its queues go with it."""
    bench = Bench(killable_node.url, Names(killable_node.url, unique))
    yield bench
    bench.publisher.close()


@contextmanager
def memory_alarm(node: Node) -> Iterator[None]:
    node.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        yield
    finally:
        node.ctl("set_vm_memory_high_watermark", "0.6")


class Held:
    """A handler that holds on to each event until it may go on."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()

    def __call__(self, event: DomainEvent) -> None:
        self.began.set()
        assert self.go_on.wait(60)


def is_ready(subscriber: Subscriber | Publisher) -> Callable[[], bool]:
    return lambda: subscriber.health().ready


def as_json(health: SubscriberHealth | PublisherHealth) -> Any:
    shown = json.loads(json.dumps(health.as_dict()))
    assert shown["alive"] == health.alive
    assert shown["ready"] == health.ready
    assert shown["reasons"] == list(health.reasons)
    return shown


# ------------------------------------------------------------------ the life of a subscriber


@pytest.mark.parametrize("broker", ["embedded", pytest.param("bench", marks=pytest.mark.rabbitmq)])
def test_subscriber_is_ready_while_it_consumes_and_alive_before_and_after(
    broker: str, request: pytest.FixtureRequest
) -> None:
    """Not registered, registered, consuming, stopping, stopped, consuming again."""
    bench: Bench = request.getfixturevalue(broker)
    subscriber = bench.subscriber()
    health = subscriber.health()
    assert (health.alive, health.ready) == (True, False)
    assert health.reasons == ("Nothing is registered.",)
    held = Held()
    queue, other = bench.names.queue(), bench.names.queue("other")
    subscriber.register(held, queue, ["#"])
    subscriber.register(print, other, ["nothing"])
    health = subscriber.health()
    assert (health.alive, health.ready, health.connected) == (True, False, True)
    assert "start_consuming() has not begun" in health.reasons[0]
    for _ in range(2):
        held.began.clear()
        held.go_on.clear()
        begun = time.time()
        with running(subscriber):
            wait_until(is_ready(subscriber))
            event = bench.publish("user.registered", about="1")
            assert held.began.wait(30)
            health = subscriber.health()
            assert (health.alive, health.ready, health.reasons) == (True, True, ())
            first, second = health.subscriptions
            assert (first.name, second.name) == (queue, other)
            assert first.consuming
            assert second.consuming
            assert begun <= (first.consuming_since or 0) <= time.time()
            assert (first.unsettled, second.unsettled) == (1, 0)
            assert begun - 1 < (first.last_event_at or 0) < time.time() + 1
            assert second.last_event_at is None
            oldest = health.oldest_handler
            assert oldest is not None
            assert (oldest.subscriber, oldest.routing_key) == (queue, "user.registered")
            assert oldest.event_id == event.uuid_string
            assert 0 <= oldest.seconds < 60
            assert oldest.limit is None
            assert as_json(health)["oldest_handler"]["event_id"] == event.uuid_string
            assert as_json(health)["subscriptions"][0]["consuming"] is True
            subscriber.stop_consuming()
            health = subscriber.health()
            assert (health.alive, health.ready, health.stopping) == (True, False, True)
            assert "stopping" in health.reasons[0]
            held.go_on.set()
        health = subscriber.health()
        assert (health.alive, health.ready, health.running) == (True, False, False)
        assert health.handlers == ()


def test_subscriber_without_a_broker_says_so() -> None:
    """With None there is nothing to wait for, and a restart changes nothing."""
    subscriber = Subscriber(None)
    subscriber.register(print, "q", ["#"])
    subscriber.start_consuming()
    health = subscriber.health()
    assert (health.alive, health.ready, health.switched_off) == (True, False, True)
    assert "connection_settings is None" in health.reasons[0]
    with Publisher(None) as publisher:
        publisher.publish(DomainEvent("a.b"))
        of_publisher = publisher.health()
    assert (of_publisher.alive, of_publisher.ready) == (True, True)
    assert of_publisher.switched_off


def test_handler_of_an_event_whose_id_is_only_in_the_envelope_is_named_all_the_same(
    bench: Bench,
) -> None:
    """As domain-event-broker publishes."""
    held = Held()
    queue = bench.names.queue()
    subscriber = bench.subscriber()
    subscriber.register(held, queue, ["#"])
    event = DomainEvent("a.b")
    with running(subscriber):
        onlooker.publish(bench.url, bench.exchange, "a.b", event.to_json().encode())
        assert held.began.wait(30)
        oldest = subscriber.health().oldest_handler
        held.go_on.set()
    assert oldest is not None
    assert oldest.event_id == event.uuid_string


def test_run_that_ends_with_an_error_is_not_alive_until_the_next_one(embedded: Bench) -> None:
    """Where it runs in a thread beside others, only a restart helps."""
    subscriber = embedded.subscriber()
    exits = [True]

    def handle(_event: DomainEvent) -> None:
        if exits.pop():
            raise SystemExit("for a reason")

    subscriber.register(handle, embedded.names.queue(), ["#"])
    embedded.publish("a.b")
    with pytest.raises(SystemExit):
        subscriber.start_consuming()
    health = subscriber.health()
    assert not health.alive
    assert health.reasons[0] == "start_consuming() has ended: SystemExit: for a reason"
    exits.append(False)
    subscriber.start_consuming(timeout=0.01)
    assert subscriber.health().alive


# ------------------------------------------------------------------ handlers that hang


@pytest.mark.parametrize("workers", [1, 3])
def test_handler_beyond_its_own_limit_is_not_alive_and_is_named_once(
    embedded: Bench, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    """It is not interrupted; others, without a limit or below theirs, may take as long."""

    def is_logged_once(text: str) -> bool:
        return caplog.text.count(text) == 1

    held = {name: Held() for name in ("limited", "unlimited", "patient")}
    subscriber = embedded.subscriber(workers=workers)
    queue = embedded.names.queue
    subscriber.register(held["limited"], queue("limited"), ["limited"], handler_limit=0.05)
    if workers > 1:
        subscriber.register(held["unlimited"], queue("unlimited"), ["unlimited"])
        subscriber.register(held["patient"], queue("patient"), ["patient"], handler_limit=3600)
    with running(subscriber):
        for name in ("unlimited", "patient") if workers > 1 else ():
            embedded.publish(name)
            assert held[name].began.wait(30)
        assert subscriber.health().alive
        for _ in range(2):  # a second event of the same thread is another one
            held["limited"].began.clear()
            held["limited"].go_on.clear()
            event = embedded.publish("limited")
            assert held["limited"].began.wait(30)
            wait_until(lambda: not subscriber.health().alive)
            health = subscriber.health()
            assert health.ready, "the broker is there"
            (reason,) = health.reasons
            assert reason.startswith(f"{queue('limited')} has been handling limited ")
            assert event.uuid_string in reason
            assert "handler_limit=0.05" in reason
            held["limited"].go_on.set()
            wait_until(lambda: subscriber.health().alive)
            wait_until(partial(is_logged_once, event.uuid_string))
        for each in held.values():
            each.go_on.set()
    warnings = [each for each in caplog.records if "has been handling" in each.getMessage()]
    assert len(warnings) == 2
    for record in warnings:
        assert vars(record)["domain_event_id"] in record.getMessage()
        assert vars(record)["domain_event_subscriber"] == queue("limited")


def test_health_waits_for_no_lock_that_a_handler_holds(
    embedded: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """The handler hangs in the application's logging, as it does when a disk does not answer."""
    subscriber = embedded.subscriber()
    lock = caplog.handler.lock
    assert lock is not None
    hangs, go_on = threading.Event(), threading.Event()

    def handle(_event: DomainEvent) -> None:
        with lock:
            hangs.set()
            assert go_on.wait(60)

    subscriber.register(handle, embedded.names.queue(), ["#"], handler_limit=0.01)
    with running(subscriber):
        embedded.publish("a.b")
        assert hangs.wait(30)
        answered = threading.Event()

        def ask() -> None:
            wait_until(lambda: not subscriber.health().alive)
            subscriber.health()
            answered.set()

        asking = threading.Thread(target=ask)
        asking.start()
        in_time = answered.wait(30)
        go_on.set()
        asking.join(30)
    assert in_time


@pytest.mark.parametrize("limit", [0, -1, "60", True, float("nan")])
def test_handler_limit_is_a_number_of_seconds(memory_url: str, limit: Any) -> None:
    """Refused when it is registered."""
    with (
        Subscriber(memory_url) as subscriber,
        pytest.raises(ConfigurationError, match="q: handler_limit must be"),
    ):
        subscriber.register(print, "q", ["#"], handler_limit=limit)


# ------------------------------------------------------------------ the broker


def test_liveness_does_not_depend_on_the_broker_and_readiness_does(
    outage: Bench, killable_node: Node
) -> None:
    """Subscriber and publisher, while the broker is stopped and when it is back."""
    queue = outage.names.queue()
    subscriber, publisher = outage.subscriber(), outage.publisher
    subscriber.register(print, queue, ["#"])
    assert publisher.health().ready, "it connects with its first event"
    publisher.publish(DomainEvent("a.b"))
    with running(subscriber):
        wait_until(is_ready(subscriber))
        assert publisher.health().connected
        killable_node.sync()
        killable_node.stop()
        wait_until(lambda: not subscriber.health().ready and not publisher.health().ready)
        for health in (subscriber.health(), publisher.health()):
            assert (health.alive, health.connected) == (True, False)
            assert "has no" in health.reasons[0]
            assert killable_node.url.rpartition("@")[2].partition("/")[0] in health.reasons[0]
            assert health.last_error
            assert as_json(health)["last_error_at"] > time.time() - 60
            assert "guest:guest" not in json.dumps(health.as_dict())
        assert [each.consuming for each in subscriber.health().subscriptions] == [False]
        killable_node.start()
        wait_until(lambda: subscriber.health().ready and publisher.health().ready, timeout=60)
        for health in (subscriber.health(), publisher.health()):
            assert (health.alive, health.connected, health.reasons) == (True, True, ())
            assert health.reconnects >= 1
            assert health.last_error, "it is kept"


def test_blocked_publisher_is_not_ready_and_a_subscriber_goes_on(
    outage: Bench, killable_node: Node
) -> None:
    """RabbitMQ is short of memory: it takes no events, and delivers those it has."""
    queue = outage.names.queue()
    subscriber, publisher = outage.subscriber(), outage.publisher
    subscriber.register(print, queue, ["#"])
    with running(subscriber):
        wait_until(is_ready(subscriber))
        with memory_alarm(killable_node):
            # RabbitMQ blocks a connection when it publishes the next time.
            with pytest.raises((EventNotConfirmed, BrokerUnavailable)):
                publisher.publish(DomainEvent("a.b"), timeout=1)
            wait_until(lambda: publisher.health().blocked)
            health = publisher.health()
            assert (health.alive, health.ready, health.connected) == (True, False, True)
            assert health.reasons == (f"The broker accepts no events: {health.blocked}.",)
            assert as_json(health)["blocked"] == health.blocked
            assert subscriber.health().ready
        wait_until(is_ready(publisher))
        assert publisher.health().blocked is None


def test_subscriber_that_the_broker_refuses_is_not_ready_and_is_named(
    outage: Bench, killable_node: Node
) -> None:
    """It is connected, but may not read one of its queues any more."""
    good, bad = outage.names.queue("good"), outage.names.queue("bad")
    killable_node.ctl("add_user", "reader", "secret")
    killable_node.ctl("set_permissions", "reader", ".*", ".*", ".*")
    url = outage.url.replace("guest:guest", "reader:secret")
    subscriber = Subscriber(url, outage.exchange)
    subscriber.register(print, good, ["#"])
    subscriber.register(print, bad, ["#"])
    try:
        with running(subscriber):
            wait_until(is_ready(subscriber))
            killable_node.ctl("set_permissions", "reader", ".*", ".*", f"^(?!{bad}).*")
            killable_node.ctl("close_all_connections", "test")

            def good_is_back() -> bool:
                health = subscriber.health()
                return [each.consuming for each in health.subscriptions] == [True, False]

            wait_until(good_is_back)
            health = subscriber.health()
            assert (health.alive, health.connected) == (True, True)
            assert health.reasons == (f"Not consuming: {bad}.",)
    finally:
        killable_node.ctl("delete_user", "reader")


def test_lost_connection_of_retries_is_not_ready_either(outage: Bench, killable_node: Node) -> None:
    """A subscriber publishes what it retries, on a connection of its own."""
    subscriber = outage.subscriber()
    retried = threading.Event()

    def handle(event: DomainEvent) -> None:
        if not event.retries:
            raise Retry(0.1)
        retried.set()

    subscriber.register(handle, outage.names.queue(), ["#"], max_retries=1)
    with running(subscriber):
        outage.publish("a.b")
        assert retried.wait(30)
        wait_until(is_ready(subscriber))
        connections = {each.purpose: each for each in subscriber.health().connections}
        assert set(connections) == {"publishing", "consuming"}
        assert all(each.connected for each in connections.values())
        killable_node.stop()
        wait_until(lambda: not any(each.connected for each in subscriber.health().connections))
        assert len(subscriber.health().not_ready) == 3, "two connections, one queue"
        killable_node.start()
        wait_until(is_ready(subscriber), timeout=60)


def test_connection_thread_that_does_not_respond_is_not_alive(bench: Bench) -> None:
    """It is noticed by asking repeatedly; nothing else runs for it."""
    publisher = bench.publisher
    publisher.publish(DomainEvent("a.b"))
    assert publisher.health().alive
    link = publisher._publishing()._link  # type: ignore[union-attr]
    stuck, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        stuck.set()
        go_on.wait(60)

    link.wake(hang)
    assert stuck.wait(30)
    try:
        assert publisher.health().connections[0].silence == 0
        wait_until(lambda: publisher.health().connections[0].silence > 0.05)
        assert publisher.health().alive, "it may be busy"
        link._requested_at -= LONGEST_SILENCE
        health = publisher.health()
        assert not health.alive
        assert "thread of the publishing connection has not responded for 30 s" in health.reasons[0]
    finally:
        go_on.set()
    wait_until(lambda: publisher.health().alive)


class Changes(Middleware):
    """Keeps what happens to connections."""

    def __init__(self) -> None:
        self.seen: list[ConnectionChange] = []

    def connection(self, change: ConnectionChange) -> None:
        self.seen.append(change)

    def states(self) -> list[ConnectionState]:
        return [change.state for change in self.seen]


def test_each_change_of_a_connection_is_reported_with_its_reason(
    outage: Bench, killable_node: Node
) -> None:
    """Lost, each attempt that failed, connected again, lost by an internal error, closed."""
    changes = Changes()
    with Publisher(outage.url, outage.exchange, middleware=[changes]) as publisher:
        publisher.publish(DomainEvent("a.b"))
        killable_node.stop()
        unreachable = ConnectionState.UNREACHABLE
        wait_until(lambda: changes.states().count(unreachable) >= 2)
        killable_node.start()
        wait_until(lambda: publisher.health().connected, timeout=60)
        outages, changes.seen = changes.seen, []

        def crash() -> None:
            raise ValueError("of a test")

        publisher._publishing()._link.wake(crash)  # type: ignore[union-attr]
        wait_until(lambda: len(changes.seen) == 2)
        assert publisher.health().reconnects == 2
    first, lost, *failed, last = outages
    assert first.state == last.state == ConnectionState.CONNECTED
    assert lost.state == ConnectionState.LOST
    assert "CONNECTION_FORCED" in (lost.reason or "")
    assert {change.state for change in failed} == {unreachable}
    assert "refused" in (failed[-1].reason or "")
    states = [ConnectionState.LOST, ConnectionState.CONNECTED, ConnectionState.CLOSED]
    assert changes.states() == states
    assert "internal error (ValueError('of a test'))" in (changes.seen[0].reason or "")
    assert {change.address for change in outages} == {outage.url.replace(":guest@", "@")}
    assert {(change.owner, change.purpose) for change in outages} == {("publisher", "publishing")}


# ------------------------------------------------------------------ the life of a publisher


def test_closed_publisher_is_not_ready(embedded: Bench) -> None:
    """It is alive, since a program may close one and go on."""
    publisher = embedded.publisher
    assert publisher.health().ready
    publisher.close()
    health = publisher.health()
    assert (health.alive, health.ready) == (True, False)
    assert health.reasons == ("The Publisher was closed.",)


def test_child_of_a_fork_has_a_health_of_its_own(bench: Bench) -> None:
    """The parent's connections are not its own; they are made again when used."""
    publisher = bench.publisher
    publisher.publish(DomainEvent("a.b"))
    subscriber = bench.subscriber()
    subscriber.register(print, bench.names.queue(), ["#"])
    with running(subscriber):
        wait_until(is_ready(subscriber))
        pid = os.fork()
        if not pid:
            status = 1
            with contextlib.suppress(BaseException):
                before, of_subscriber = publisher.health(), subscriber.health()
                assert not before.connected
                assert before.alive
                assert before.ready
                assert of_subscriber.alive
                assert not of_subscriber.running
                publisher.publish(DomainEvent("a.b"))
                assert publisher.health().connected
                assert publisher.health().reconnects == 0
                status = 0
            os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert publisher.health().connected
        assert subscriber.health().ready


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_health_keeps_no_owner_alive(bench: Bench) -> None:
    """A dropped publisher is collected, and its connection closed."""
    publisher = Publisher(bench.url, bench.exchange)
    publisher.publish(DomainEvent("a.b"))
    publisher.health()
    dropped = weakref.ref(publisher)
    del publisher
    gc.collect()
    assert dropped() is None


def test_every_moment_of_a_health_is_json() -> None:
    """All that can be in it."""
    connection = ConnectionHealth("publishing", "amqp://h/", False, 1.0, 2, "memory", "x", 3.0, 99)
    health = PublisherHealth(100.0, False, (connection,), "x", 3.0, False)
    assert as_json(health)["connections"][0]["silence"] == 99
    assert len(health.reasons) == 3
    assert replace(health, connections=()).ready


def test_outage_that_a_test_simulates_is_seen_in_health_and_by_middleware() -> None:
    """So that users can test what they make of both."""
    changes = Changes()
    with EventBroker(virtual_time=False) as broker:
        subscriber = Subscriber(middleware=[changes])
        subscriber.register(print, "mail", ["#"])
        with Publisher() as publisher, running(subscriber):
            publisher.publish(DomainEvent("a.b"))
            wait_until(is_ready(subscriber))
            assert publisher.health().ready
            with broker.outage():
                for health in (subscriber.health(), publisher.health()):
                    assert (health.alive, health.ready, health.connected) == (True, False, False)
                    assert health.last_error == "the test simulates an outage"
                late = Publisher()
                with pytest.raises(BrokerUnavailable):
                    late.publish(DomainEvent("a.b"))
                assert not late.health().ready
            for each in (subscriber, publisher):
                assert (each.health().ready, each.health().reconnects) == (True, 1)
            late.publish(DomainEvent("a.b"))
            assert (late.health().ready, late.health().reconnects) == (True, 0)
            late.close()
    connected, lost = ConnectionState.CONNECTED, ConnectionState.LOST
    assert changes.states() == [connected, lost, connected, ConnectionState.CLOSED]
