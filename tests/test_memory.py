"""What is the embedded broker's own: addresses, threads, forks, callbacks. The rest it shares.

That it does as RabbitMQ does is held by tests/conformance.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time

import pytest
from support import wait_until

from domain_events import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEvent,
    Publisher,
    Retry,
    Subscriber,
    TopologyError,
    publish_domain_event,
)
from domain_events.broker import memory
from domain_events.broker.memory.store import Store
from domain_events.message import Message
from domain_events.topology import Queue


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
def test_address_that_is_none_is_refused_at_once(settings: str | list[str]) -> None:
    """In a line that says what one looks like."""
    for make in (Publisher, Subscriber):
        with pytest.raises(ConfigurationError, match="memory://") as caught:
            make(settings)
        assert "secret" not in str(caught.value)


def test_names_are_brokers_apart(url: str) -> None:
    """Each name is another broker; a slash behind it and capitals in the scheme do not matter."""
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


def test_asked_from_a_callback_it_says_so() -> None:
    """It cannot wait for itself; it does not hang, and goes on."""
    store = Store("callbacks")
    store.call(lambda: store.declare([Queue("q")], None))
    with pytest.raises(BrokerUnavailable, match="in the middle of an operation"):
        store.call(lambda: store.call(lambda: None))
    assert store.call(lambda: store.publish(Message("", "q", b""))) is None


def test_mistake_of_a_callback_does_not_stop_it(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and what waits behind it is done."""
    store = Store("mistakes")
    done: list[bool] = []

    def fail() -> None:
        store.soon(lambda: done.append(True))
        raise RuntimeError("mistake")

    with caplog.at_level(logging.ERROR, "domain_events"):
        store.soon(fail)
        assert done == [True]
        wait_until(lambda: "mistake" in caplog.text)


def test_closed_connections_say_so(url: str) -> None:
    """As with RabbitMQ, after `close` nothing is sent."""
    publisher = Publisher(url)
    publisher.close()
    with pytest.raises(BrokerUnavailable, match="This Publisher was closed"):
        publisher.publish(DomainEvent("a", None))


def test_exchange_type_that_it_does_not_know_is_said(url: str) -> None:
    """Rather than routing it in another way."""
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
        memory.store(url.removeprefix("memory://")).soon(finalize)
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
        store.soon(lambda: done.append(True))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.soon(interrupted)
    assert done == [True]
    assert store.call(lambda: 1) == 1
