"""What `publish_domain_event` and `Publisher` promise on RabbitMQ only.

What they promise on every broker is in conformance/test_publishing.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from enum import Enum
from uuid import UUID

import onlooker
import pytest
from bench import Bench
from pika.adapters.select_connection import IOLoop
from rabbitmq_node import Node
from support import Names, sooner_than, wait_until

from domain_events import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEvent,
    DomainEventsError,
    EventNotConfirmed,
    EventRejected,
    InvalidEvent,
    Publisher,
    close_publishers,
    publish_domain_event,
)


def test_events_are_persistent(publisher: Publisher, queue: str, broker_url: str) -> None:
    """Else a restart of the broker would lose what it has confirmed."""
    publisher.publish(DomainEvent("user.registered", {}))
    properties, _ = onlooker.take(broker_url, queue)
    assert properties.delivery_mode == 2  # type: ignore[attr-defined]


def test_one_connection_serves_all_publishes_of_a_process(broker_url: str) -> None:
    """`publish_domain_event` keeps its connection; a hundred calls start one thread."""
    before = threading.active_count()
    try:
        for _ in range(100):
            publish_domain_event("nobody.listens", {}, connection_settings=broker_url)
        assert threading.active_count() == before + 1
    finally:
        close_publishers()


def test_event_may_go_to_another_exchange(broker_url: str, names: Names) -> None:
    """By `publish_domain_event`; `close_publishers` closes its connection, and it comes again."""
    queue, exchange = names.queue(), names.exchange()
    onlooker.bind_queue(broker_url, queue, exchange, "#")
    before = threading.active_count()
    try:
        for number in (1, 2):
            publish_domain_event(
                "a.b", {}, connection_settings=broker_url, exchange=exchange, mandatory=True
            )
            assert onlooker.count(broker_url, queue) == number
            assert threading.active_count() > before
            close_publishers(timeout=5)
            wait_until(lambda: threading.active_count() == before)
    finally:
        close_publishers()


def test_switched_off_publishing_returns_the_event() -> None:
    """`connection_settings=None` publishes nothing, and still checks the event."""
    event = publish_domain_event("user.registered", {"a": 1}, connection_settings=None)
    assert event.data == {"a": 1}
    with pytest.raises(InvalidEvent):
        publish_domain_event("user.registered", {"a": object()}, connection_settings=None)
    with Publisher(None) as publisher:
        assert publisher.publish_many([event, event]) == 2
        assert publisher.publish(event) is event


class Colour(Enum):
    RED = "red"


@dataclass
class Registered:
    user: UUID
    at: datetime
    paid: Decimal
    favourite: Colour


def test_data_may_be_a_dataclass_of_common_types(
    publisher: Publisher, queue: str, broker_url: str
) -> None:
    """UUID, datetime, Decimal and Enum need no conversion by the caller."""
    user = UUID(int=1)
    at = datetime(2026, 1, 2, tzinfo=timezone.utc)
    publisher.publish(
        DomainEvent("user.registered", Registered(user, at, Decimal("1.50"), Colour.RED))
    )
    _, body = onlooker.take(broker_url, queue)
    assert json.loads(body)["data"] == {
        "user": str(user),
        "at": "2026-01-02T00:00:00+00:00",
        "paid": "1.50",
        "favourite": "red",
    }


def test_threads_share_one_connection(publisher: Publisher, queue: str, broker_url: str) -> None:
    """Any number of threads publish at once, on one I/O thread."""
    publisher.publish(DomainEvent("first.one", {}))
    before = threading.active_count()
    errors: list[BaseException] = []

    def publish() -> None:
        try:
            for n in range(50):
                publisher.publish(DomainEvent("from.thread", {"n": n}))
        except Exception as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    threads = [threading.Thread(target=publish) for _ in range(16)]
    for thread in threads:
        thread.start()
    assert threading.active_count() <= before + len(threads)
    for thread in threads:
        thread.join()
    assert not errors
    assert onlooker.count(broker_url, queue) == 16 * 50 + 1


@pytest.mark.parametrize("window", [1, 3])
def test_nobody_is_forgotten_while_the_window_is_full(
    publisher: Publisher,
    queue: str,
    broker_url: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    window: int,
) -> None:
    """Who finds the window full does not wake the connection; the confirm that makes room does.

    Threads take turns after each few instructions, so that no gap between two is missed.
    """
    interval = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    sys.setswitchinterval(1e-6)
    monkeypatch.setattr("domain_events.broker.rabbitmq.publishing._MOST_IN_FLIGHT", window)

    def one_by_one() -> None:
        for _ in range(25):
            publisher.publish(DomainEvent("user.registered", {}), timeout=60)

    threads = [threading.Thread(target=one_by_one) for _ in range(8)]
    for thread in threads:
        thread.start()
    publisher.publish_many((DomainEvent("user.registered", {}) for _ in range(300)), timeout=60)
    for thread in threads:
        thread.join(90)
    assert onlooker.count(broker_url, queue) == 8 * 25 + 300


def test_too_large_body_fails_alone(node_factory: Callable[..., Node], unique: str) -> None:
    """The broker closes the channel over it and does not say over which; the others pass."""
    # By default 128 MiB on 3.10, and 16 MiB from 4.0 on.
    with node_factory(config="max_message_size = 1048576") as node:
        onlooker.bind_queue(node.url, unique, unique, "#")
        events = [DomainEvent("user.registered", {"n": n}) for n in range(60)]
        events[30] = DomainEvent("user.registered", {"picture": "x" * (2 * 2**20)})
        with Publisher(node.url, unique) as publisher:
            with pytest.raises(InvalidEvent, match="larger than") as caught:
                publisher.publish_many(events)
            assert caught.value.event is events[30]
            assert list(caught.value.unconfirmed) == [events[30]]
            received = {json.loads(b)["uuid_string"] for b in onlooker.take_all(node.url, unique)}
            assert received == {e.uuid_string for e in events if e is not events[30]}
            # Alone, and the connection goes on.
            with pytest.raises(InvalidEvent, match="larger than"):
                publisher.publish(events[30])
            publisher.publish(events[0])


def test_body_that_no_rabbitmq_takes_is_refused_at_once(publisher: Publisher) -> None:
    """More than 128 MiB is not even sent."""
    with pytest.raises(InvalidEvent, match="RabbitMQ accepts at most"):
        publisher.publish(DomainEvent("user.registered", "x" * (128 * 2**20)))


def test_rejected_event_is_an_error(
    publisher: Publisher, names: Names, broker_url: str, exchange: str
) -> None:
    """A queue at its length limit with reject-publish says no, and the publisher says so."""
    queue = names.queue("full")
    limits = {"x-max-length": 1, "x-overflow": "reject-publish"}
    onlooker.bind_queue(broker_url, queue, exchange, "#", **limits)
    publisher.publish(DomainEvent("user.registered", {}))

    def is_rejected() -> bool:
        try:
            publisher.publish(DomainEvent("user.registered", {}))
        except EventRejected as error:
            caught.append(error)
            return True
        return False

    caught: list[EventRejected] = []
    wait_until(is_rejected)
    assert caught[0].event is not None


def test_broker_that_is_down_is_unavailable_within_the_deadline(unused_port: int) -> None:
    """Surely not sent, and said in time, for one event and for many."""
    url = f"amqp://guest:secret@127.0.0.1:{unused_port}/%2F"
    with Publisher(url, timeout=0.5) as publisher:
        event = DomainEvent("user.registered", {})
        begun = time.monotonic()
        # Ten seconds are the default; nobody is ever there to answer.
        with sooner_than(10), pytest.raises(BrokerUnavailable, match="refused") as caught:
            publisher.publish(event)
        assert time.monotonic() - begun > 0.4
        assert caught.value.event is event
        assert "secret" not in str(caught.value)
        events = [DomainEvent("user.registered", {"n": n}) for n in range(250)]
        with sooner_than(10), pytest.raises(BrokerUnavailable) as caught:
            publisher.publish_many(iter(events))
        assert list(caught.value.unconfirmed) == events


def test_idle_publisher_keeps_its_connection(names: Names, broker_url: str) -> None:
    """Heartbeats go on while nobody publishes: the same connection serves the next event."""
    with Publisher(f"{broker_url}?heartbeat=1", names.exchange()) as publisher:
        publisher.publish(DomainEvent("user.registered", {}))
        link = publisher._publishing()._link  # type: ignore[union-attr]
        connection = link.connection
        # It must wait: RabbitMQ closes a connection when it has missed two heartbeats.
        time.sleep(4)
        publisher.publish(DomainEvent("user.registered", {}))
        assert link.connection is connection


def test_wrong_use_is_told_at_once(broker_url: str) -> None:
    """A timeout that is none, another type than an event, an exchange without a name."""
    with pytest.raises(ConfigurationError, match="timeout"):
        Publisher(broker_url, timeout=0)
    with pytest.raises(ConfigurationError, match="exchange"):
        Publisher(broker_url, exchange="")
    with Publisher(broker_url) as publisher:
        with pytest.raises(TypeError, match="publish_domain_event"):
            publisher.publish("user.registered")  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="timeout"):
            publisher.publish(DomainEvent("user.registered", {}), timeout=-1)


def given_up(publisher: Publisher) -> None:
    with pytest.raises(DomainEventsError):
        publisher.publish(DomainEvent("n.n", {}), timeout=0.3)


def closed_at_once(publisher: Publisher) -> None:
    """Without waiting as long as it may."""
    with sooner_than(60):
        publisher.close(timeout=60)
    with pytest.raises(BrokerUnavailable, match="This Publisher was closed; make a new one"):
        publisher.publish(DomainEvent("n.n", {}))
    with pytest.raises(BrokerUnavailable, match="This Publisher was closed; make a new one"):
        publisher.publish_many([])


def test_close_does_not_wait_for_what_was_given_up(unused_port: int) -> None:
    """A publish that ended in an error is not under way. To close twice takes no longer."""
    publisher = Publisher(f"amqp://guest:guest@127.0.0.1:{unused_port}/%2F")
    given_up(publisher)
    with pytest.raises(DomainEventsError):
        publisher.publish_many((DomainEvent("n.n", n) for n in range(3000)), timeout=0.3)
    closed_at_once(publisher)
    closed_at_once(publisher)


def test_close_does_not_wait_for_a_blocked_broker(killable_node: Node, unique: str) -> None:
    """What it does not take was given up; and it cannot be told goodbye."""
    publisher = Publisher(killable_node.url, unique)
    publisher.publish(DomainEvent("n.n", {}), timeout=30)
    killable_node.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        given_up(publisher)
        wait_until(lambda: "blocks" in publisher._publishing().trouble)  # type: ignore[union-attr]
        with pytest.raises(BrokerUnavailable):
            publisher.publish_many((DomainEvent("n.n", n) for n in range(3000)), timeout=0.3)
        closed_at_once(publisher)
    finally:
        killable_node.ctl("set_vm_memory_high_watermark", "0.6")


def test_close_does_not_wait_for_a_closed_window(
    killable_node: Node, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the window's one event was sent; all were given up, and the broker is silent."""
    monkeypatch.setattr("domain_events.broker.rabbitmq.publishing._MOST_IN_FLIGHT", 1)
    publisher = Publisher(killable_node.url, unique)
    publisher.publish(DomainEvent("n.n", {}), timeout=30)
    killable_node.pause()
    try:
        with pytest.raises(EventNotConfirmed):
            publisher.publish_many((DomainEvent("n.n", n) for n in range(50)), timeout=0.3)
        given_up(publisher)
        closed_at_once(publisher)  # the silent one is given two seconds to answer the goodbye
    finally:
        killable_node.resume()


def test_close_while_others_publish_is_bounded(broker_url: str, exchange: str, queue: str) -> None:
    """What is under way is published, what comes later is refused; each caller knows which."""
    publisher = Publisher(broker_url, exchange)
    published: list[int] = []
    refused: list[DomainEventsError] = []

    def singly() -> None:
        try:
            while True:
                publisher.publish(DomainEvent("n.n", {}))
                published.append(1)
        except DomainEventsError as error:
            refused.append(error)

    def in_a_batch() -> None:
        try:
            publisher.publish_many(DomainEvent("n.n", n) for n in range(10**7))
        except DomainEventsError as error:
            published.extend([1] * error.published)
            refused.append(error)

    threads = [threading.Thread(target=singly) for _ in range(8)]
    threads += [threading.Thread(target=in_a_batch) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(published) > 10, timeout=60)
    closers = [threading.Thread(target=publisher.close) for _ in range(3)]
    for closer in closers:
        closer.start()
    for thread in (*closers, *threads):
        thread.join(60)  # the batch alone would take many minutes
        assert not thread.is_alive()
    assert len(refused) == len(threads)
    assert not [error for error in refused if "closed" not in str(error).lower()]
    assert not [error for error in refused if error.perhaps]
    assert onlooker.count(broker_url, queue) == len(published)


def test_close_in_a_finalizer_on_the_connections_own_thread(broker_url: str) -> None:
    """It cannot wait for itself; the connection is closed soon after."""
    publisher = Publisher(broker_url)
    publisher.publish(DomainEvent("nobody.listens", {}))
    closed = threading.Event()

    def close() -> None:
        publisher.close(timeout=60)
        closed.set()

    link = publisher._publishing()._link  # type: ignore[union-attr]
    thread = link._thread
    link.wake(close)
    assert closed.wait(30)
    wait_until(lambda: not thread.is_alive())
    closed_at_once(publisher)


def test_close_in_a_signal_handler_in_the_middle_of_a_publish(
    killable_node: Node, unique: str
) -> None:
    """The interrupted publish waits for a silent broker, and close for it, as long as it may."""
    publisher = Publisher(killable_node.url, unique)
    publisher.publish(DomainEvent("n.n", {}), timeout=30)
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGUSR2, lambda *_: publisher.close(timeout=0.5))
    killable_node.pause()
    timer = threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGUSR2))
    timer.start()
    try:
        with sooner_than(60), pytest.raises(EventNotConfirmed, match="Closed before"):
            publisher.publish(DomainEvent("n.n", {}), timeout=60)
    finally:
        killable_node.resume()
        signal.signal(signal.SIGUSR2, before)
        timer.join()


@pytest.mark.parametrize("embedded", [False, True])
def test_closed_publisher_stays_closed_in_a_forked_child(
    broker_url: str, unique: str, embedded: bool
) -> None:
    """It says so there too, on every kind of broker."""
    publisher = Publisher(f"memory://{unique}" if embedded else broker_url)
    publisher.publish(DomainEvent("nobody.listens", {}))
    publisher.close()
    closed_at_once(publisher)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                publisher.publish(DomainEvent("nobody.listens", {}), timeout=5)
                said = "published"
            except BrokerUnavailable as error:
                said = str(error)
            os.write(writer, said.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        assert lines.read() == "This Publisher was closed; make a new one."
    os.waitpid(pid, 0)


def test_listener_that_hangs_up_may_be_a_proxy_before_its_broker(names: Names) -> None:
    """It accepts and closes: tried again until the deadline, and the error says what it saw."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()

        def hang_up() -> None:
            while not stop.is_set():
                server.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        port = server.getsockname()[1]
        try:
            with (
                Publisher(f"amqp://guest:guest@127.0.0.1:{port}/%2F") as publisher,
                pytest.raises(BrokerUnavailable, match=r"does not use AMQP 0-9-1"),
            ):
                publisher.publish(DomainEvent("n.n", {}), timeout=1)
        finally:
            stop.set()
            socket.create_connection(("127.0.0.1", port)).close()
            thread.join()


def test_finalizer_on_the_connections_own_thread_is_told_at_once(
    publisher: Publisher, queue: str
) -> None:
    """It would wait for itself; it gets an error instead."""
    publisher.publish(DomainEvent("n.n", {}))
    errors: list[BaseException] = []

    def publish() -> None:
        try:
            publisher.publish(DomainEvent("n.n", {}))
        except BrokerUnavailable as error:
            errors.append(error)

    publisher._publishing()._link.wake(publish)  # type: ignore[union-attr]
    wait_until(lambda: errors)
    publisher.publish(DomainEvent("n.n", {}))


def test_loop_that_cannot_be_entered_is_replaced(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when there is no descriptor for it: the publish goes through with another."""
    entered: list[object] = []
    enter = IOLoop.start

    def start(loop: IOLoop) -> None:
        entered.append(loop)
        if len(entered) <= 3:
            raise OSError(24, "Too many open files")
        enter(loop)

    monkeypatch.setattr(IOLoop, "start", start)
    with Publisher(bench.url, bench.exchange) as publisher:
        publisher.publish(DomainEvent("user.registered", {}))
    assert len({id(loop) for loop in entered}) == 4
    wait_until(lambda: "Too many open files" in caplog.text)
