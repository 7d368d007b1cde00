"""What `Subscriber` promises on RabbitMQ only, and what it takes for a mistake.

What it promises on every broker is in conformance/test_subscribing.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import onlooker
import pytest
from bench import Bench, Events
from support import Names, sooner_than

from domain_events import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEvent,
    Publisher,
    Subscriber,
)
from domain_events.broker.rabbitmq.channel import Answer
from domain_events.broker.rabbitmq.consuming import RabbitConsuming
from domain_events.broker.rabbitmq.nodes import Nodes


def test_long_handler_keeps_the_connection(broker_url: str, names: Names) -> None:
    """Heartbeats go on while a handler runs, and its event comes once."""
    seen: Events = []
    exchange, queue = names.exchange(), names.queue()
    subscriber = Subscriber(f"{broker_url}?heartbeat=1", exchange)

    def slow(event: DomainEvent) -> None:
        seen.append(event)
        # It must take so long: RabbitMQ closes a connection when it has missed two heartbeats.
        over = time.monotonic() + 4
        while time.monotonic() < over:  # busy, as a handler is
            sum(range(1000))
        subscriber.stop_consuming()

    subscriber.register(slow, queue, ["#"])
    with Publisher(broker_url, exchange) as publisher:
        publisher.publish(DomainEvent("user.registered", {}))
    subscriber.start_consuming(timeout=20)
    assert len(seen) == 1
    assert onlooker.count(broker_url, queue) == 0


def test_switched_off_subscriber_does_nothing() -> None:
    """`connection_settings=None`: register and start_consuming are no-ops."""
    with Subscriber(None) as subscriber:
        subscriber.register(print, "nothing", ["#"])
        subscriber.start_consuming(timeout=60)
        subscriber.stop_consuming()


def test_wrong_options_are_told_at_once(bench: Bench) -> None:
    """Each mistake has a message that says what to do."""
    subscriber = bench.subscriber()
    mistakes: list[tuple[str, dict[str, object]]] = [
        ("binding_keys", {"binding_keys": []}),
        ("a list of binding keys", {"binding_keys": "user.*"}),
        ("each of binding_keys must be a str", {"binding_keys": [7]}),
        ("Unicode", {"binding_keys": ["\ud800"]}),
        ("name", {"name": ""}),
        ("wildcard", {"name": "a.*"}),
        ("max_retries", {"max_retries": -1}),
        ("prefetch_count", {"prefetch_count": 0}),
        ("queue_type", {"queue_type": "stream"}),
        ("exception classes", {"retry_on": [ValueError()], "max_retries": 1}),
        ("without max_retries", {"retry_on": ValueError}),
        ("cannot be called", {"handler": "print"}),
    ]
    for words, wrong in mistakes:
        arguments = {"handler": print, "name": "n", "binding_keys": ["#"], **wrong}
        with pytest.raises(ConfigurationError, match=words):
            subscriber.register(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Nothing is registered"):
        subscriber.start_consuming()
    with pytest.raises(ConfigurationError, match="workers"):
        Subscriber(bench.url, workers=0)


def test_broker_that_is_down_is_unavailable_within_the_deadline(unused_port: int) -> None:
    """`register` declares at once, and so says at once."""
    url = f"amqp://guest:guest@127.0.0.1:{unused_port}/%2F"
    with (
        Subscriber(url, timeout=0.5) as subscriber,
        sooner_than(10),  # the default; nobody is ever there to answer
        pytest.raises(BrokerUnavailable, match="refused"),
    ):
        subscriber.register(print, "nothing", ["#"])


def test_deadline_counts_from_the_last_answer(broker_url: str) -> None:
    """Many declarations may take longer than the timeout; one that is not answered may not."""
    consuming = RabbitConsuming(Nodes((broker_url,)), "test", lambda: None)

    def goes_on(last: int) -> Callable[[Answer], None]:
        def step(answer: Answer, number: int) -> None:
            answer.progress(number)
            if number < last:
                consuming._link.call_later(0.4, lambda: step(answer, number + 1))
            elif last == 8:
                answer.set_result("all")

        return lambda answer: step(answer, 1)

    try:
        assert consuming._requests.call(goes_on(8), timeout=2) == "all"
        begun = time.monotonic()
        with pytest.raises(BrokerUnavailable, match="No broker within 2 s"):
            consuming._requests.call(goes_on(2), timeout=2)
        assert time.monotonic() - begun >= 2.4
    finally:
        consuming.close(10)
