"""What is declared on the broker, how often, and that whatever was deleted comes back."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import onlooker
import pika.connection
import pytest
from bench import Bench, Events, running
from pika.channel import Channel
from support import DELAY_LEVELS, wait_until

from domain_events import DomainEvent, DomainEventsError, Retry, Subscriber, TopologyError
from domain_events.broker.rabbitmq import channel as channel_module
from domain_events.broker.rabbitmq.administration import Administration
from domain_events.broker.rabbitmq.channel import Channels
from domain_events.broker.rabbitmq.topology import delays, undelivered_name
from domain_events.broker.rabbitmq.transport import Connection
from domain_events.retry import Backoff

pytestmark = pytest.mark.timeout(120)

DECLARATIONS = {"Exchange.Declare", "Queue.Declare", "Queue.Bind", "Exchange.Bind"}

# With the exchange itself; what each subscriber has besides: its queue, the one of its dead
# letters, a binding, and the way back of its retries.
SHARED = len(delays("x")) + 1
OWN = 4


class Wire:
    """The methods that the library's connections send."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: Counter[str] = Counter()
        self.on_send: Callable[[Any], None] = lambda _method: None
        send = pika.connection.Connection._send_method  # type: ignore[attr-defined, unused-ignore]

        def counted(connection: Any, channel: int, method: Any, *content: Any) -> None:
            self.sent[method.NAME] += 1
            self.on_send(method)
            send(connection, channel, method, *content)

        monkeypatch.setattr(Connection, "_send_method", counted, raising=False)

    def declarations(self) -> int:
        """How many declarations were sent since the last look."""
        number = sum(self.sent[name] for name in DECLARATIONS)
        self.sent.clear()
        return number


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(monkeypatch)


_numbers = itertools.count()


def register(bench: Bench, subscriber: Subscriber, number: int) -> list[str]:
    names = [bench.names.queue(f"q{next(_numbers)}") for _ in range(number)]
    for name in names:
        subscriber.register(lambda _event: None, name, ["a.*"], max_retries=3)
    return names


def test_what_subscribers_share_is_declared_once_on_each_connection(
    bench: Bench, wire: Wire
) -> None:
    """At register, at start on the same connection, and after a lost one."""
    number = 20
    subscriber = bench.subscriber()
    names = register(bench, subscriber, number)
    assert wire.declarations() == SHARED + number * OWN
    with subscriber, running(subscriber):
        wait_until(lambda: wire.sent["Basic.Consume"] == number)
        assert wire.declarations() == number * OWN
        link = subscriber.connections.consuming()._link  # type: ignore[union-attr]
        link.wake(link.drop)
        wait_until(lambda: wire.sent["Basic.Consume"] == number)
        assert wire.declarations() == SHARED + number * OWN
        wait_until(lambda: all(onlooker.consumers(bench.url, name) == 1 for name in names))


def test_subscribers_that_register_at_the_same_time_share_one_declaration(
    bench: Bench, wire: Wire
) -> None:
    """One of their channels declares what they share, the others wait for it."""
    subscriber = bench.subscriber()
    threads = [
        threading.Thread(target=register, args=(bench, subscriber, 1), daemon=True)
        for _ in range(8)
    ]
    with subscriber:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(subscriber.subscriptions) == 8
    assert wire.declarations() == SHARED + 8 * OWN


def test_exchange_that_was_deleted_is_declared_again(bench: Bench) -> None:
    """The broker refuses to bind to it, on a connection that has declared it before."""
    subscriber = bench.subscriber()
    seen: Events = []
    with subscriber:
        register(bench, subscriber, 1)
        onlooker.delete(bench.url, exchanges=[bench.exchange])
        subscriber.register(seen.append, bench.names.queue(), ["a.*"], max_retries=3)
        with running(subscriber):
            event = bench.publish("a.b")
            wait_until(lambda: event in seen)


def test_all_that_was_deleted_comes_back_with_the_queue(bench: Bench) -> None:
    """When a subscriber's queue is deleted, nobody knows what else was: all is declared again."""
    subscriber = bench.subscriber()
    exchange, seen = bench.exchange, Events()

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        if len(seen) == 1:
            raise Retry(0.1)

    with subscriber:
        queue = bench.names.queue()
        subscriber.register(handle, queue, ["a.*"], max_retries=3)
        with running(subscriber):
            wait_until(lambda: onlooker.consumers(bench.url, queue) == 1)
            level = f"{exchange}.delay.00"
            onlooker.delete(bench.url, queues=[level], exchanges=[level])
            onlooker.delete(bench.url, queues=[queue])
            wait_until(lambda: onlooker.exists(bench.url, level))
            wait_until(lambda: onlooker.exists(bench.url, queue))
            wait_until(lambda: onlooker.consumers(bench.url, queue) == 1)
            event = bench.publish("a.b")
            wait_until(lambda: seen == [event, event])


def test_delay_level_that_was_deleted_comes_back_when_a_retry_needs_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was declared on this connection is declared again to repair it."""
    monkeypatch.setattr("domain_events.forwarding._PAUSES", Backoff(0.2))
    subscriber = bench.subscriber()
    exchange, seen = bench.exchange, Events()

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        if len(seen) < 4:
            raise Retry(0.1)

    with subscriber:
        subscriber.register(handle, bench.names.queue(), ["a.*"], max_retries=3)
        level = f"{exchange}.delay.00"
        onlooker.delete(bench.url, queues=[level], exchanges=[level])
        with running(subscriber):
            event = bench.publish("a.b")
            wait_until(lambda: len(seen) >= 4)
            assert set(seen) == {event}
            assert onlooker.exists(bench.url, level)


def test_answer_that_was_under_way_is_not_remembered(bench: Bench, wire: Wire) -> None:
    """Something was found missing meanwhile: it may be what was declared just before."""
    subscriber = bench.subscriber()
    level = f"{bench.exchange}.delay.05"
    known_when_sent: list[bool] = []

    def forget(method: Any) -> None:
        if method.NAME == "Exchange.Declare" and method.exchange == level:
            known_when_sent.append(is_known())
            channels().forget()

    def channels() -> Channels:
        found: Channels = subscriber.connections.consuming()._channels  # type: ignore[union-attr]
        return found

    def is_known() -> bool:
        return any(f"'{level}'" in known for known in channels().known)

    with subscriber:
        wire.on_send = forget
        register(bench, subscriber, 1)
        assert known_when_sent == [False]
        assert not is_known()
        wire.on_send = lambda _method: None
        wire.declarations()
        register(bench, subscriber, 1)
        assert wire.sent["Exchange.Declare"] > 5
        assert is_known()


def test_error_names_the_declaration_it_is_about(bench: Bench, wire: Wire) -> None:
    """Also among those that are sent together; and it is not remembered as declared."""
    level, undelivered = f"{bench.exchange}.delay.05", undelivered_name(bench.exchange)
    onlooker.bind_queue(bench.url, level, bench.exchange, "nothing")
    with bench.subscriber() as subscriber:
        for _ in range(2):
            with pytest.raises(TopologyError, match=rf"The queue '{level}' exists with different"):
                register(bench, subscriber, 1)
        onlooker.delete(bench.url, queues=[level, undelivered])
        wire.declarations()
        (queue,) = register(bench, subscriber, 1)
        assert wire.declarations() == SHARED + OWN
        for name in (level, undelivered, queue):
            assert onlooker.exists(bench.url, name)


def test_only_channel_is_enough_to_declare_again(bench: Bench) -> None:
    """Its number is free again when the broker has closed it, here over a missing exchange."""
    one = f"{bench.url}?channel_max=1"
    with Subscriber(one, bench.exchange) as subscriber:
        register(bench, subscriber, 1)
        onlooker.delete(bench.url, exchanges=[bench.exchange, f"{bench.exchange}.due"])
        subscriber.register(print, bench.names.queue(), ["a.*"], max_retries=3)


def test_close_while_it_declares_is_no_internal_error(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer that comes meanwhile is not followed by the next declaration."""
    for number in range(12):
        exchange = bench.names.exchange(f"closed{number}")
        subscriber = Subscriber(bench.url, exchange)
        queue = bench.names.queue()

        def declare(subscriber: Subscriber = subscriber, queue: str = queue) -> None:
            with suppress(DomainEventsError):
                subscriber.register(print, queue, ["a.*"], max_retries=3)

        thread = threading.Thread(target=declare)
        thread.start()
        thread.join(0.01 * number)
        subscriber.close()
        thread.join(30)
        subscriber.close()
    assert "Internal error" not in caplog.text


def test_subscriber_that_declares_nothing_sends_no_binding_and_only_passive_declarations(
    bench: Bench, wire: Wire
) -> None:
    """At register, at start, after a reconnect, and when it repairs its queue."""
    queue = bench.names.queue()
    with bench.subscriber() as operator:
        operator.register(print, queue, ["a.*"], max_retries=3)
    methods: list[Any] = []
    wire.sent.clear()
    wire.on_send = methods.append
    subscriber = Subscriber(bench.url, bench.exchange, declare=False)
    subscriber.register(lambda _event: None, queue, ["a.*"], max_retries=3)
    # Not the deliveries' own: what the exchange, the levels, the queue and its dead letters take.
    assert wire.declarations() == len([*delays("x")]) - 2 * DELAY_LEVELS - 1 + 3
    repaired: list[bool] = []
    with subscriber, running(subscriber):
        wait_until(lambda: wire.sent["Basic.Consume"] == 1)
        consuming = subscriber.connections.consuming()
        link = consuming._link  # type: ignore[union-attr]
        link.wake(link.drop)
        wait_until(lambda: wire.sent["Basic.Consume"] == 2)
        consuming._consumers[0].repair(0, repaired.append, delays=True)  # type: ignore[union-attr]
        wait_until(lambda: repaired == [True])
    declared = [method for method in methods if method.NAME in DECLARATIONS]
    assert all(method.passive for method in declared)
    assert len(declared) > 150


def test_release_that_demands_configure_for_looking_is_not_asked_twice(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ 4.2.6 and 4.3.0: what cannot be looked for is taken to exist."""
    queue = bench.names.queue()
    with bench.subscriber() as operator:
        operator.register(print, queue, ["a.*"], max_retries=3)
    monkeypatch.setattr(channel_module, "NOT_FOUND", 0)
    monkeypatch.setattr(channel_module, "ACCESS_REFUSED", 404)
    with Subscriber(bench.url, bench.exchange, declare=False) as subscriber:
        subscriber.register(print, bench.names.queue("missing"), ["a.*"], max_retries=3)


def test_reply_that_arrives_while_the_connection_is_closed_is_no_internal_error(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a request that a signal interrupts: its caller closes the connection at once."""
    queue = bench.names.queue()
    onlooker.bind_queue(bench.url, queue, bench.exchange, "a")

    def look_and_close(channel: Channel, done: Callable[[object], None]) -> None:
        channel.queue_declare(queue, passive=True, callback=done)
        channel.connection.close()

    with Administration(bench.url) as administration:
        frame = administration._do(look_and_close)
        assert frame.method.queue == queue
        assert administration.queue(queue) is not None
    assert "Internal error" not in caplog.text
