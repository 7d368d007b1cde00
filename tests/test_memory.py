"""What only the embedded broker has: addresses, its time, threads, forks, callbacks.

That it keeps the same promises as RabbitMQ is held by tests/conformance.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from support import wait_until

from domain_events import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEvent,
    EventUnroutable,
    Publisher,
    Retry,
    Subscriber,
    TopologyError,
    publish_domain_event,
)
from domain_events.broker import Consumer, Exchange, Queue, Settlement, confirm, connect, memory
from domain_events.broker.clock import SECOND, VirtualTime
from domain_events.broker.memory import Store
from domain_events.message import (
    DELIVERY_LIMIT,
    NEVER_SETTLED,
    Delivery,
    Later,
    Message,
    ToDeadLetters,
    ToExchange,
    ToSubscriber,
    UndeliveredOf,
    sent_on,
)

TIMEOUT = 5.0
QUEUE = Queue("q", Exchange("x"), ("#",), dead_letters=True, delays=True)


@pytest.fixture
def url() -> str:
    return f"memory://{secrets.token_hex(4)}"


@pytest.mark.parametrize(
    "settings",
    [
        "memory://a/b",
        "memory://user:secret@a",
        "memory://a?b=c",
        "memory://a b",
        ["memory://a", "memory://b"],
        ["memory://a", "amqp://localhost"],
    ],
)
def test_wrong_url_is_refused_at_once(settings: str | list[str]) -> None:
    """The error shows what one looks like, and no password."""
    for make in (Publisher, Subscriber):
        with pytest.raises(ConfigurationError, match="memory://") as caught:
            make(settings)
        assert "secret" not in str(caught.value)


def test_each_name_is_another_broker(url: str) -> None:
    """A slash behind the name and capitals in the scheme make no difference."""
    seen: list[str] = []
    with Subscriber(f"MEMORY://{url.removeprefix('memory://')}/") as subscriber:
        subscriber.register(lambda event: seen.append(event.routing_key), "reader", ["#"])
        publish_domain_event("here", None, connection_settings=url)
        publish_domain_event("there", None, connection_settings=f"{url}.2")
        subscriber.start_consuming(timeout=0.01)
    assert seen == ["here"]


def test_nothing_is_lost_between_many_threads(url: str) -> None:
    """Eight that publish, two subscribers of four workers, and retries, all at once."""
    seen: list[str] = []
    published: list[str] = []

    def handle(event: DomainEvent) -> None:
        if event.data % 10 == 0 and not event.retries:
            raise Retry(0.1)
        seen.append(event.uuid_string)

    def publish() -> None:
        for number in range(200):
            event = publish_domain_event("a.b", number, connection_settings=url)
            published.append(event.uuid_string)

    subscribers = [Subscriber(url, workers=4) for _ in range(2)]
    for subscriber in subscribers:
        subscriber.register(handle, "worker", ["a.*"], max_retries=1, prefetch_count=7)
    threads = [threading.Thread(target=each.start_consuming) for each in subscribers]
    threads += [threading.Thread(target=publish) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(seen) >= 1600, timeout=30)
    for subscriber in subscribers:
        subscriber.stop_consuming()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert sorted(seen) == sorted(published)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_child_of_a_fork_begins_with_nothing(url: str) -> None:
    """What is here is its parent's; what it publishes is its own, and it can subscribe."""
    seen: list[object] = []

    def consume() -> None:
        subscriber.start_consuming(timeout=0.05)

    subscriber = Subscriber(url)
    subscriber.register(lambda event: seen.append(event.data), "reader", ["#"])
    publish_domain_event("a", "parent", connection_settings=url)
    child = os.fork()
    if not child:
        status = 1
        try:
            consume()
            nothing = list(seen)
            subscriber.register(lambda event: seen.append(event.data), "another", ["#"])
            publish_domain_event("a", "child", connection_settings=url)
            consume()
            status = 0 if (nothing, seen) == ([], ["child", "child"]) else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    consume()
    assert seen == ["parent"]


def test_call_from_a_callback_is_an_error() -> None:
    """It cannot wait for itself; it does not hang, and goes on."""
    store = Store("callbacks")
    store.call(lambda: store.declare(QUEUE, None))
    with pytest.raises(BrokerUnavailable, match="in the middle of an operation"):
        store.call(lambda: store.call(lambda: None))
    store.call(lambda: store.publish(Message(ToSubscriber("q"), "a", b"")))
    assert store.call(lambda: len(store.queue(ToSubscriber("q"), None).ready)) == 1


def test_mistake_of_a_callback_does_not_stop_it(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and what waits behind it is done."""
    store = Store("mistakes")
    done: list[bool] = []

    def fail() -> None:
        store.call_soon(lambda: done.append(True))
        raise RuntimeError("mistake")

    with caplog.at_level(logging.ERROR, "domain_events"):
        store.call_soon(fail)
        assert done == [True]
        wait_until(lambda: "mistake" in caplog.text)


def test_closed_publisher_sends_nothing(url: str) -> None:
    """As with RabbitMQ, it raises."""
    publisher = Publisher(url)
    publisher.close()
    with pytest.raises(BrokerUnavailable, match="This Publisher was closed"):
        publisher.publish(DomainEvent("a", None))


def test_unknown_exchange_type_is_refused(url: str) -> None:
    """Rather than routing in another way."""
    with pytest.raises(TopologyError, match="topic, direct, fanout"):
        Publisher(url, "x", "headers").publish(DomainEvent("a", None))
    memory.forget(url.removeprefix("memory://"))


def test_publishing_in_the_middle_of_an_operation_is_an_error_at_once() -> None:
    """A finalizer that comes by there: it is surely not sent, and nothing is waited for."""
    url = f"memory://{secrets.token_hex(4)}"
    errors: list[BrokerUnavailable] = []
    seen: list[object] = []
    subscriber = Subscriber(url)
    subscriber.register(lambda event: seen.append(event.data), "middle", ["#"])
    with Publisher(url) as publisher:

        def finalize() -> None:
            try:
                publisher.publish(DomainEvent("a.b", "inner"))
            except BrokerUnavailable as error:
                errors.append(error)

        begun = time.monotonic()
        memory.store(url.removeprefix("memory://")).call_soon(finalize)
        assert time.monotonic() - begun < 5
        (error,) = errors
        assert "not sent" in str(error)
        publisher.publish(DomainEvent("a.b", "outer"))
    subscriber.start_consuming(timeout=0.5)
    assert seen == ["outer"]


def test_signal_handler_that_raises_leaves_nothing_undone() -> None:
    """What waits behind the operation that it interrupts is carried out; then it is raised."""
    store = Store("interrupted")
    done: list[bool] = []

    def interrupted() -> None:
        store.call_soon(lambda: done.append(True))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.call_soon(interrupted)
    assert done == [True]
    assert store.call(lambda: 1) == 1


# ------------------------------------------------------------------ time


class Bench:
    """A broker whose time stands still, and one queue."""

    def __init__(self, queue: Queue = QUEUE) -> None:
        self.name = secrets.token_hex(4)
        self.store = memory.store(self.name, VirtualTime())
        self.broker = connect((f"memory://{self.name}",))
        self.queue = queue
        self.connection = self.broker.consuming("bench", lambda: None)
        self.connection.declare(queue, TIMEOUT)
        self.publishing = self.broker.publishing("bench")
        self.deliveries: list[Delivery] = []

    def publish(self, message: Message) -> None:
        confirm(self.publishing, message, TIMEOUT)

    def consume(self, prefetch_count: int = 10) -> Consumer:
        return self.connection.consume(
            self.queue, prefetch_count, lambda delivery, _: self.deliveries.append(delivery)
        )

    def crash(self) -> None:
        """Lose the connection with all that it holds, and open another one."""
        self.connection.close(TIMEOUT)
        self.deliveries.clear()
        self.connection = self.broker.consuming("bench", lambda: None)

    def bodies(self) -> list[bytes]:
        return [each.body for each in self.deliveries]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    memory.forget(bench.name)


def test_delayed_events_come_in_the_order_in_which_they_are_due(bench: Bench) -> None:
    """Those due at the same time in the order of publishing; `next_delayed` is when."""
    bench.consume()
    for body, seconds in ((b"2a", 2.0), (b"1", 1.0), (b"2b", 2.0), (b"week", 7 * 86400.0)):
        bench.publish(Message(Later("x", "q", seconds), "a", body))
    assert bench.store.next_delayed() == SECOND
    bench.store.advance(0.999)
    assert bench.bodies() == []
    bench.store.advance(0.001)
    assert bench.bodies() == [b"1"]
    bench.store.advance(5)
    assert bench.bodies() == [b"1", b"2a", b"2b"]
    assert bench.store.next_delayed() == 7 * 86400 * SECOND
    bench.store.advance(7 * 86400)
    assert bench.bodies() == [b"1", b"2a", b"2b", b"week"]
    assert bench.store.next_delayed() is None
    assert bench.deliveries[-1].published_routing_key == "a"


def test_delayed_event_whose_queue_is_gone_is_undelivered(bench: Bench) -> None:
    """Of whose subscriber is known; with the exchange all that is delayed on it goes."""
    bench.publish(Message(Later("x", "gone", 1.0), "a", b"lost"))
    bench.store.advance(1)
    browser = bench.connection.browse(UndeliveredOf("x"), TIMEOUT, lambda: bench.publishing)
    undelivered = browser.next(TIMEOUT)
    assert undelivered is not None
    assert (undelivered.body, undelivered.subscriber) == (b"lost", "gone")
    bench.publish(Message(Later("x", "q", 1.0), "a", b"deleted"))
    bench.connection.delete([], "x", TIMEOUT)
    assert bench.store.next_delayed() is None
    with pytest.raises(TopologyError, match="delayed"):
        bench.publish(Message(Later("x", "q", 1.0), "a", b""))


def test_event_that_fails_more_than_a_hundred_times_is_a_dead_letter(bench: Bench) -> None:
    """With the reason. What is given back does not count; without dead letters it is kept."""
    bench.connection.delete(["q"], "x", TIMEOUT)
    bench.queue = replace(QUEUE, dead_letters=False)
    bench.connection.declare(bench.queue, TIMEOUT)
    bench.publish(Message(ToExchange("x"), "a.b", b"poison"))
    for failures in range(101):
        consumer = bench.consume()
        assert [each.failures for each in bench.deliveries] == [failures]
        consumer.settle(bench.deliveries[-1], Settlement.GIVE_BACK)
        assert [each.failures for each in bench.deliveries] == [failures] * 2
        if failures % 2:
            bench.crash()
        else:
            consumer.stop(TIMEOUT)
            consumer.settle(bench.deliveries[-1], Settlement.FAILED)
            bench.deliveries.clear()
    assert bench.connection.count(ToSubscriber("q"), TIMEOUT) == 0
    bench.connection.declare(QUEUE, TIMEOUT)
    place = ToDeadLetters("q")
    dead = bench.connection.browse(place, TIMEOUT, lambda: bench.publishing).next(TIMEOUT)
    assert dead is not None
    assert (dead.body, dead.published_routing_key) == (b"poison", "a.b")
    reason = (dead.failure.subscriber, dead.failure.error_type, dead.failure.error_message)
    assert reason == ("q", DELIVERY_LIMIT, NEVER_SETTLED)


def test_suspects_are_handled_alone_for_longer_and_longer(bench: Bench) -> None:
    """3 s, doubled with each failure, up to an hour: then one more is taken beside it."""
    for body in (b"1", b"2"):
        bench.publish(Message(ToSubscriber("q"), "a", body))
    bench.consume()
    assert bench.bodies() == [b"1", b"2"]  # the first time neither is suspect
    bench.crash()
    for failures in range(13):
        alone = min(3 * 2**failures, 3600)
        bench.consume()
        assert bench.bodies() == [b"1"]
        bench.store.advance(alone - 0.001)
        assert bench.bodies() == [b"1"]
        bench.store.advance(0.001)
        assert bench.bodies() == [b"1", b"2"]
        bench.crash()
    for body in (b"3", b"4", b"5"):
        bench.publish(Message(ToSubscriber("q"), "a", body))
    consumer = bench.consume(4)
    consumer.settle(bench.deliveries[0])
    assert bench.bodies() == [b"1", b"2"]
    consumer.settle(bench.deliveries[1])
    assert bench.bodies() == [b"1", b"2", b"3", b"4", b"5"]


def test_temporary_queue_goes_a_minute_after_its_last_consumer() -> None:
    """Not earlier, and not while it is consumed."""
    bench = Bench(Queue("q", Exchange("x"), ("#",), durable=False))
    consumer = bench.consume()
    bench.publish(Message(ToExchange("x"), "a", b"held"))
    bench.store.advance(3600)
    assert consumer.is_current(bench.deliveries[0])
    consumer.stop(TIMEOUT)
    bench.store.advance(59.9)
    bench.publish(Message(ToExchange("x"), "a", b"", mandatory=True))
    bench.store.advance(0.2)
    with pytest.raises(EventUnroutable):
        bench.publish(Message(ToExchange("x"), "a", b"", mandatory=True))
    memory.forget(bench.name)


def test_repair_calls_nobody_back_once_the_connection_is_closed(bench: Bench) -> None:
    """Neither one that waits, nor one that is asked for afterwards, which declares nothing."""
    called: list[bool] = []
    consumer = bench.consume()
    consumer.repair(1.0, called.append)
    bench.store.advance(1)
    assert called == [True]
    consumer.repair(1.0, called.append)
    bench.connection.close(TIMEOUT)
    consumer.repair(0, called.append)
    bench.store.advance(1)
    assert called == [True]


def test_message_is_a_copy_that_keeps_no_chain_of_deliveries(bench: Bench) -> None:
    """A publisher may change its own; what was sent on a thousand times is not all kept."""
    bench.consume()
    message = Message(ToExchange("x"), "a", b"first")
    bench.publish(message)
    message.body, message.retries = b"changed", 7
    (delivery,) = bench.deliveries
    assert (delivery.body, delivery.retries) == (b"first", 0)
    delivery.properties.headers["mine"] = 1
    bench.publish(sent_on(delivery, ToSubscriber("q")))
    again = bench.deliveries[-1]
    assert again.properties.headers == {"mine": 1}
    again.properties.headers["mine"] = 2
    assert delivery.properties.headers == {"mine": 1}
    assert (again.body, again.published_routing_key) == (b"first", "a")
    assert delivery not in gc.get_referents(again, vars(again))
    assert "first" not in repr(again)
