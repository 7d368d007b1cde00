"""The broker protocol: what happens to a connection, and what a consumer is doing."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from bench import Bench
from support import Names, wait_until

from conformance.peer import TIMEOUT, Peer
from domain_events import DeadLetters, DomainEvent, Publisher, Subscriber, configure
from domain_events.broker import Connections, Consumer, Exchange, Queue, Watch, connect
from domain_events.message import Message, ToSubscriber
from domain_events.middleware import ConnectionChange, ConnectionState, Middleware


class Changes(Middleware):
    """Keeps what happens to connections."""

    def __init__(self) -> None:
        self.seen: list[ConnectionChange] = []

    def connection(self, change: ConnectionChange) -> None:
        self.seen.append(change)

    def of(self, purpose: str) -> list[ConnectionState]:
        return [change.state for change in self.seen if change.purpose == purpose]


@pytest.fixture
def changes() -> Changes:
    return Changes()


@contextmanager
def connections(url: str, changes: Changes) -> Iterator[Connections]:
    made = Connections((url,), "subscriber", middleware=(changes,))
    try:
        yield made
    finally:
        made.close(TIMEOUT)


def since_when(consumer: Consumer) -> float | None:
    """Since when it consumes, as it is now."""
    return consumer.consuming_since


def is_connected(watch: Watch) -> bool:
    """Whether it is connected, as it is now."""
    return watch.health.connected


@pytest.fixture
def queue(peer: Peer, names: Names) -> Queue:
    queue = Queue(names.queue(), Exchange(names.exchange()), ("#",), dead_letters=True)
    peer.declare(queue)
    return queue


def test_connection_is_reported_from_its_first_use_to_its_end(
    broker_url: str, queue: Queue, changes: Changes
) -> None:
    """One that was only made has not connected; and each end is reported before `close` returns."""
    with connections(broker_url, changes) as made:
        publishing, consuming = made.publishing(), made.consuming()
        assert publishing is not None
        assert consuming is not None
        assert changes.seen == []
        assert [each.since for each in made.health()] == [None, None]
        assert consuming.count(ToSubscriber(queue.name), TIMEOUT) == 0
        assert changes.of("consuming") == [ConnectionState.CONNECTED]
        assert changes.of("publishing") == []
        (health,) = [each for each in made.health() if each.purpose == "consuming"]
        assert health.connected
        assert health.since is not None
        assert time.time() - 60 < health.since <= time.time()
        assert (health.reconnects, health.blocked, health.last_error) == (0, None, None)
    assert changes.of("consuming") == [ConnectionState.CONNECTED, ConnectionState.CLOSED]
    assert made.health() == ()
    assert {change.owner for change in changes.seen} == {"subscriber"}
    assert {change.address.partition("://")[0] for change in changes.seen} <= {"amqp", "memory"}
    assert "guest:guest" not in repr(changes.seen)


def test_second_connection_starts_a_health_of_its_own(
    broker_url: str, queue: Queue, changes: Changes
) -> None:
    """What happens to the one before does not change it."""
    with connections(broker_url, changes) as made:
        for _ in range(2):
            consuming = made.consuming()
            assert consuming is not None
            consuming.count(ToSubscriber(queue.name), TIMEOUT)
            (health,) = made.health()
            assert (health.connected, health.reconnects) == (True, 0)
            made.close(TIMEOUT)
    connected_and_closed = [ConnectionState.CONNECTED, ConnectionState.CLOSED]
    assert changes.of("consuming") == connected_and_closed * 2


def test_connections_respond(broker_url: str, queue: Queue, changes: Changes) -> None:
    """Also one that has not been used, and one that has done nothing for a while."""
    with connections(broker_url, changes) as made:
        publishing, consuming = made.publishing(), made.consuming()
        assert publishing is not None
        assert consuming is not None
        assert publishing.silence() == consuming.silence() == 0
        consuming.count(ToSubscriber(queue.name), TIMEOUT)
        assert consuming.silence() == 0
        wait_until(lambda: consuming.silence() == 0)


def test_middleware_that_fails_does_not_harm_the_connection(
    broker_url: str, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is logged."""

    class Broken(Changes):
        def connection(self, change: ConnectionChange) -> None:
            super().connection(change)
            raise ValueError("broken")

    broken = Broken()
    with connections(broker_url, broken) as made:
        consuming = made.consuming()
        assert consuming is not None
        assert consuming.count(ToSubscriber(queue.name), TIMEOUT) == 0
        assert consuming.count(ToSubscriber(queue.name), TIMEOUT) == 0
    assert broken.of("consuming") == [ConnectionState.CONNECTED, ConnectionState.CLOSED]
    wait_until(lambda: caplog.text.count("Broken failed in its method connection()") == 2)


@pytest.mark.parametrize("prefetch_count", [1, 10])
def test_consumer_knows_since_when_the_broker_delivers_and_what_it_holds(
    peer: Peer, queue: Queue, prefetch_count: int
) -> None:
    """From the broker's answer on, until it is stopped; settled deliveries are not held."""
    before = time.time()
    inbox = peer.consume(queue, prefetch_count)
    consumer = inbox.consumer
    wait_until(lambda: consumer.consuming_since is not None)
    since = consumer.consuming_since
    assert since is not None
    assert before <= since <= time.time()
    assert consumer.unsettled == 0
    peer.publish(ToSubscriber(queue.name), b"1", b"2", b"3")
    held = min(3, prefetch_count)
    wait_until(lambda: consumer.unsettled == held)
    for number in range(1, 4):
        inbox.wait(number)
        inbox.settle(inbox.deliveries[number - 1])
        left = min(3 - number, prefetch_count)
        wait_until(lambda: consumer.unsettled == left)  # noqa: B023
    assert consumer.consuming_since == since, "also after another consumer has followed the first"
    peer.publish(ToSubscriber(queue.name), b"4")
    inbox.wait(4)
    consumer.stop(TIMEOUT)
    assert since_when(consumer) is None
    assert consumer.unsettled == 1, "it can still be settled"


def test_consumer_whose_queue_is_deleted_does_not_consume_until_it_is_back(
    peer: Peer, queue: Queue
) -> None:
    """The broker cancels the consumer; it declares the queue again, after a pause."""
    consumer = peer.consume(queue).consumer
    wait_until(lambda: consumer.consuming_since is not None)
    seen: list[float | None] = []
    while None not in seen:  # on a busy machine the pause may pass unseen; then once more
        since = consumer.consuming_since
        peer.delete(queue.name)

        def is_back() -> bool:
            seen.append(consumer.consuming_since)
            return seen[-1] not in (None, since)  # noqa: B023

        wait_until(is_back, interval=0.001)
        assert len(seen) < 100_000, "it was never seen not to consume"
    assert peer.exists(queue.name)


def test_watch_starts_anew_in_the_child_of_a_fork(broker_url: str) -> None:
    """The parent's connection is not the child's."""
    watch = Watch("publisher", "publishing", lambda: ())
    watch.changed(ConnectionState.CONNECTED, broker_url, None)
    assert is_connected(watch)
    pid = os.fork()
    if not pid:
        fresh = not is_connected(watch) and watch.health.since is None
        watch.changed(ConnectionState.CONNECTED, broker_url, None)
        os._exit(not (fresh and is_connected(watch) and watch.health.reconnects == 0))
    assert os.waitpid(pid, 0)[1] == 0
    assert is_connected(watch)


def test_publication_makes_the_publishing_connection_known(
    broker_url: str, queue: Queue, changes: Changes
) -> None:
    """With the first message, before it is confirmed."""
    with connections(broker_url, changes) as made:
        publishing = made.publishing()
        assert publishing is not None
        peer = Peer(broker_url)
        peer.publishing = publishing
        peer.publish(ToSubscriber(queue.name), b"1")
        assert changes.of("publishing") == [ConnectionState.CONNECTED]
        peer.close()  # which closes `publishing`, too
    assert changes.of("publishing") == [ConnectionState.CONNECTED, ConnectionState.CLOSED]


def test_brokers_need_no_watcher(broker_url: str, queue: Queue) -> None:
    """As those who only look at it do not have one."""
    publishing = connect((broker_url,)).publishing("nobody's")
    peer = Peer(broker_url)
    peer.publishing = publishing
    assert peer.send(Message(ToSubscriber(queue.name), "a.b", b"")) is None
    peer.close()


def test_middleware_sees_the_connections_of_publishers_subscribers_and_dead_letters(
    bench: Bench, changes: Changes
) -> None:
    """That of the process, and each one's own; the process's first."""
    own = Changes()
    queue = bench.names.queue()
    configure(middleware=[changes])
    try:
        with Subscriber(bench.url, bench.exchange, middleware=[own]) as subscriber:
            subscriber.register(print, queue, ["#"])
        with Publisher(bench.url, bench.exchange, middleware=[own, changes]) as publisher:
            publisher.publish(DomainEvent("a.b"))
        with DeadLetters(queue, bench.url) as dead_letters:
            assert dead_letters.count() == 0
    finally:
        configure()
    connected_and_closed = [ConnectionState.CONNECTED, ConnectionState.CLOSED]
    seen = [(change.owner, change.purpose, change.state) for change in changes.seen]
    assert seen == [
        (owner, purpose, state)
        for owner, purpose in (
            ("subscriber", "consuming"),
            ("publisher", "publishing"),
            ("dead letters", "consuming"),
        )
        for state in connected_and_closed
    ]
    assert own.seen == changes.seen[:4]


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_middleware_that_refers_to_its_owner_does_not_keep_it_alive(
    bench: Bench, changes: Changes
) -> None:
    """As one for metrics does, which shows its health; the process's own sees the end, too."""

    class OfOne(Changes):
        publisher: Publisher

    own = OfOne()
    configure(middleware=[changes])
    try:
        own.publisher = Publisher(bench.url, bench.exchange, middleware=[own])
        own.publisher.publish(DomainEvent("a.b"))
        dropped = weakref.ref(own.publisher)
        del own
        gc.collect()
        assert dropped() is None
        both = [ConnectionState.CONNECTED, ConnectionState.CLOSED]
        wait_until(lambda: changes.of("publishing") == both)
    finally:
        configure()
