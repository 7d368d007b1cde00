"""Undelivered retries: handed back to subscribers, and to nobody else."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import onlooker
import pytest
from bench import Bench, Events
from support import wait_until

from domain_events import (
    ConfigurationError,
    DomainEvent,
    InvalidEvent,
    Retry,
    Subscriber,
    TopologyError,
    Undelivered,
)

FORGED = {
    "x-death": [{"queue": "x", "reason": "expired", "count": 1}],
    "x-first-death-reason": "expired",
    "CC": ["elsewhere"],
    "BCC": ["elsewhere"],
    "domain-events-traceback": "forged",
    "domain-events-subscriber": "forged",
    "traceparent": "00-1",
}


def address(name: str) -> str:
    return ".".join("0" * 24) + f".{name}"


def register(bench: Bench, queue: str, **options: Any) -> None:
    with bench.subscriber() as subscriber:
        subscriber.register(print, queue, ["none"], max_retries=3, **options)


def forge(bench: Bench, routing_key: str, body: bytes, **properties: Any) -> None:
    """As anybody might who may publish a retry."""
    exchange = f"{bench.exchange}.undelivered"
    onlooker.publish(bench.url, exchange, routing_key, body, **properties)


@pytest.fixture
def undelivered(bench: Bench) -> Iterator[Undelivered]:
    """What is undelivered on the exchange of this test, on which somebody may retry."""
    register(bench, bench.names.queue("first"))
    with Undelivered(bench.exchange, bench.url) as undelivered:
        yield undelivered


def test_retry_of_a_subscriber_that_was_gone_is_handed_back(
    bench: Bench, undelivered: Undelivered
) -> None:
    """With its number of retries, to be handled as if it had never been away."""
    queue = bench.names.queue()
    subscriber = bench.subscriber()

    def try_again(event: DomainEvent) -> None:
        subscriber.stop_consuming()
        raise Retry(3)  # by then the queue must be deleted

    subscriber.register(try_again, queue, ["user.*"], max_retries=3)
    sent = bench.publish("user.registered", {"n": 1}, "7")
    subscriber.start_consuming(timeout=20)
    onlooker.delete(bench.url, queues=[queue])
    wait_until(lambda: undelivered.count() == 1)
    (entry,) = undelivered
    assert (entry.subscriber, entry.event, entry.routing_key) == (queue, sent, "user.registered")
    assert entry.body == sent.to_json().encode()
    with pytest.raises(TopologyError, match=f"no queue '{queue}'.*registered first"):
        entry.hand_back()
    with pytest.raises(TopologyError, match="registered first"):
        undelivered.hand_back_all([queue])
    assert not onlooker.exists(bench.url, queue)
    assert undelivered.count() == 1

    received: Events = []
    subscriber = bench.subscriber()

    def handle(event: DomainEvent) -> None:
        received.append(event)
        subscriber.stop_consuming()

    subscriber.register(handle, queue, ["user.*"], max_retries=3)
    assert undelivered.hand_back_all([queue]) == 1
    assert undelivered.count() == 0
    subscriber.start_consuming(timeout=20)
    assert received == [sent]
    assert received[0].retries == 1


def test_only_subscribers_that_the_caller_names_are_written_to(
    bench: Bench, undelivered: Undelivered, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever addresses are forged, and however bad a message is, the others are handed back."""
    good, other = bench.names.queue("good"), bench.names.queue("other")
    for name in (good, other):
        register(bench, name)
    stranger = bench.names.queue("stranger")
    onlooker.bind_queue(bench.url, stranger, bench.exchange, "none")
    event = DomainEvent("user.registered", {})
    body = event.to_json().encode()
    forged = [
        address(stranger),
        address(other),
        address(f"{good}-dl"),
        address(f"{bench.exchange}.delay.03"),
        address(f"{bench.exchange}.undelivered"),
        address("amq.rabbitmq.trace"),
        address("nobody"),
        f"0.1.{good}",
        good,
        address(good).replace("0.", "2.", 1),
        address(""),
        "",
        address("\x1b[2J"),
    ]
    for key in forged:
        forge(bench, key, body)
    forge(bench, address(good), b"\xffno event")
    forge(bench, address(good), body, headers={"domain-events-retries": "many"})
    forge(
        bench,
        address(good),
        body,
        headers={"domain-events-routing-key": "user.updated", **FORGED},
        expiration="600000",
        reply_to="elsewhere",
        user_id="guest",
        priority=9,
        correlation_id="c",
        content_encoding="gzip",
        timestamp=2**63,
    )
    caplog.set_level(logging.WARNING)
    assert undelivered.hand_back_all([good]) == 2
    assert undelivered.count() == len(forged) + 1
    assert onlooker.count(bench.url, good) == 2
    for name in (stranger, other, f"{good}-dl"):
        assert onlooker.count(bench.url, name) == 0
    told = [each.getMessage() for each in caplog.records]
    assert sum("is not that of a retry" in each for each in told) == 7
    assert sum("is not an event" in each for each in told) == 1
    assert "\x1b" not in "".join(told)

    keys = set()
    for _ in range(2):
        properties, received = onlooker.take(bench.url, good)
        assert received == body
        headers = dict(properties.headers or {})
        headers.pop("x-delivery-count", None)  # the broker's own
        keys.add(properties.type)
        assert headers == {
            "domain-events-retries": 0,
            "domain-events-routing-key": properties.type,
        }
        assert properties.content_type == "application/json"
        for name in ("expiration", "reply_to", "user_id", "priority", "content_encoding"):
            assert getattr(properties, name) is None
        assert properties.timestamp is None
    assert keys == {"user.registered", "user.updated"}

    # One by one, an address alone never reaches what is not a registered subscriber's.
    handed_back = []
    for entry in undelivered:
        try:
            entry.hand_back()
            handed_back.append(entry.subscriber)
        except (TopologyError, ConfigurationError, InvalidEvent):
            continue
    assert handed_back == [other]
    assert onlooker.count(bench.url, stranger) == 0
    assert onlooker.count(bench.url, f"{good}-dl") == 0


def test_names_that_are_not_those_of_subscribers_are_refused(
    bench: Bench, undelivered: Undelivered
) -> None:
    """Before anything is moved."""
    good, stranger = bench.names.queue("good"), bench.names.queue("stranger")
    register(bench, good)
    onlooker.bind_queue(bench.url, stranger, bench.exchange, "none", **{"x-max-length": 5})
    body = DomainEvent("a.b", {}).to_json().encode()
    for name in (good, stranger):
        forge(bench, address(name), body)
    with pytest.raises(TopologyError, match=f"'{stranger}' does not have the arguments"):
        undelivered.hand_back_all([good, stranger])
    level = f"{bench.exchange}.delay.03"
    for name in (f"{good}-dl", level, f"{bench.exchange}.undelivered", "amq.topic", ""):
        with pytest.raises(ConfigurationError):
            undelivered.hand_back_all([name])
    with pytest.raises(ConfigurationError, match="list of names"):
        undelivered.hand_back_all(good)
    assert undelivered.count() == 2
    assert undelivered.hand_back_all([]) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"queue_type": "classic"},
        {"queue_type": "classic", "dead_letter": False},
        {"durable": False},
    ],
)
def test_every_kind_of_subscriber_gets_its_retries_back(
    bench: Bench, undelivered: Undelivered, options: dict[str, Any]
) -> None:
    """Also those whose queue is that of domain-event-broker, or a temporary one."""
    queue = bench.names.queue()
    register(bench, queue, **options)
    forge(bench, address(queue), DomainEvent("a.b", {}).to_json().encode())
    assert undelivered.hand_back_all([queue]) == 1
    assert onlooker.count(bench.url, queue) == 1


def test_looks_and_discards(bench: Bench, undelivered: Undelivered) -> None:
    """As with dead letters: what is not settled is left, in its order."""
    queue = bench.names.queue()
    for n in range(50):
        forge(bench, address(queue), DomainEvent("a.b", n).to_json().encode())
    for _ in range(3):
        assert [each.event.data for each in undelivered if each.event] == list(range(50))
    for entry in undelivered:
        assert entry.event is not None
        if entry.event.data in (10, 20):
            entry.discard()
            with pytest.raises(RuntimeError, match="already"):
                entry.hand_back()
    assert undelivered.count() == 48


def test_looks_under_a_low_delivery_limit_lose_nothing(bench: Bench) -> None:
    """As with dead letters; addresses and numbers of retries are kept."""
    name = f"{bench.exchange}.undelivered"
    bench.names.add(queue=name, exchange=name)
    with onlooker.channel(bench.url) as channel:
        arguments = {"x-queue-type": "quorum", "x-delivery-limit": 4}
        channel.queue_declare(name, durable=True, arguments=arguments)
        channel.exchange_declare(name, "fanout", durable=True)
        channel.queue_bind(name, name, "")
    for n in range(20):
        body = DomainEvent("a.b", n).to_json().encode()
        headers = {"domain-events-retries": 2, "domain-events-routing-key": "a.b"}
        forge(bench, address(f"s{n}"), body, headers=headers)
    with Undelivered(bench.exchange, bench.url) as undelivered:
        for _ in range(12):
            seen = [(each.subscriber, each.event and each.event.retries) for each in undelivered]
            assert seen == [(f"s{n}", 2) for n in range(20)]


def test_embedded_broker_and_switched_off(unique: str) -> None:
    """The same on `memory://`; with None there is nothing."""
    url = f"memory://{unique}"
    with Subscriber(url) as subscriber:
        subscriber.register(print, "reader", ["none"], max_retries=1)
        body = DomainEvent("a.b", {}).to_json().encode()
        onlooker.publish(url, "domain-events.undelivered", address("reader"), body)
        onlooker.publish(url, "domain-events.undelivered", address("other"), body)
        with Undelivered(connection_settings=url) as undelivered:
            assert [entry.subscriber for entry in undelivered] == ["reader", "other"]
            assert undelivered.hand_back_all(["reader"]) == 1
            assert undelivered.count() == 1
        assert onlooker.count(url, "reader") == 1
    with Undelivered(connection_settings=None) as undelivered:
        assert undelivered.count() == undelivered.hand_back_all(["reader"]) == 0
        assert list(undelivered) == []
