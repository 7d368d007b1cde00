"""Retries: the exact count, the exact delay, back to one subscriber only."""

from __future__ import annotations

import logging
import time
from itertools import pairwise

import onlooker
import pytest
from bench import Bench, Events, running
from support import wait_until

from conformance.peer import TIMEOUT, Peer
from domain_events import Backoff, DeadLetter, DeadLetters, DomainEvent, Reject, Retry


def letter_of(bench: Bench, queue: str) -> DeadLetter:
    """The only dead letter."""
    with DeadLetters(queue, bench.url) as dead_letters:
        (letter,) = dead_letters
    return letter


@pytest.mark.parametrize("max_retries", [0, 1, 3])
def test_retries_are_counted_exactly(bench: Bench, max_retries: int) -> None:
    """`max_retries` more deliveries than one, numbered, and then a dead letter."""
    subscriber = bench.subscriber()
    queue = bench.names.queue()
    counts: list[int] = []

    def handle(event: DomainEvent) -> None:
        counts.append(event.retries)
        if event.retries == max_retries:
            subscriber.stop_consuming()
        raise Retry(0.1)

    subscriber.register(handle, queue, ["#"], max_retries=max_retries)
    bench.publish("user.registered")
    subscriber.start_consuming(timeout=20)
    assert counts == list(range(max_retries + 1))
    assert onlooker.count(bench.url, queue) == 0
    assert onlooker.count(bench.url, f"{queue}-dl") == 1


def test_retry_comes_back_when_it_is_due(bench: Bench) -> None:
    """Never before the delay is over, and within a tenth of a second of it.

    Time is what this is about. The machine may be busy at one retry, but not at each of thirty.
    """
    subscriber = bench.subscriber()
    asked: list[float] = []
    waited: list[float] = []

    def handle(event: DomainEvent) -> None:
        if event.retries:
            waited.append(time.monotonic() - asked[-1])
            if waited[-1] < 1.1:
                subscriber.stop_consuming()
                return
        asked.append(time.monotonic())
        raise Retry(1.0)

    subscriber.register(handle, bench.names.queue(), ["#"], max_retries=30)
    bench.publish("user.registered")
    subscriber.start_consuming(timeout=50)
    assert 1.0 <= min(waited) < 1.1


def test_short_delays_are_not_held_up_by_long_ones(bench: Bench) -> None:
    """Each delay is its own, whatever was asked for before."""
    subscriber = bench.subscriber()
    order: list[float] = []

    def handle(event: DomainEvent) -> None:
        if event.retries == 0:
            raise Retry(event.data)
        order.append(event.data)
        if len(order) == 3:
            subscriber.stop_consuming()

    subscriber.register(handle, bench.names.queue(), ["#"], max_retries=1)
    bench.publish("user.registered", 3600)
    # So far apart that a busy machine does not mix them up.
    for delay in (2.0, 1.0, 0.1):
        bench.publish("user.registered", delay)
    subscriber.start_consuming(timeout=20)
    assert order == [0.1, 1.0, 2.0]


def test_retry_returns_to_its_own_subscriber_only(bench: Bench) -> None:
    """Others that listen to the same event get it once."""
    seen: dict[str, list[int]] = {"first": [], "second": []}
    subscriber = bench.subscriber()

    def first(event: DomainEvent) -> None:
        seen["first"].append(event.retries)
        if event.retries < 2:
            raise Retry(0.1)
        subscriber.stop_consuming()

    def second(event: DomainEvent) -> None:
        seen["second"].append(event.retries)

    subscriber.register(first, bench.names.queue("a"), ["#"], max_retries=5)
    subscriber.register(second, bench.names.queue("b"), ["#"], max_retries=5)
    bench.publish("user.registered")
    subscriber.start_consuming(timeout=20)
    assert seen == {"first": [0, 1, 2], "second": [0]}


def test_retried_event_is_the_same_event(bench: Bench) -> None:
    """Body and ids stay; only the count goes up."""
    subscriber = bench.subscriber()
    queue = bench.names.queue()
    seen: Events = []

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        if event.retries == 0:
            raise Retry(0.1)
        subscriber.stop_consuming()
        raise Reject("looked at")

    body = b'{"routing_key": "a.b", "data": 1.50, "uuid_string": "one", "timestamp": 1, "more": 2}'
    subscriber.register(handle, queue, ["#"], max_retries=1)
    onlooker.publish(
        bench.url,
        bench.exchange,
        "a.b",
        body,
        correlation_id="c",
        app_id="another",
    )
    subscriber.start_consuming(timeout=20)
    assert seen[0] == seen[1]
    properties, kept = onlooker.take(bench.url, f"{queue}-dl")
    assert kept == body
    assert (properties.correlation_id, properties.app_id) == ("c", "another")


class Busy(Exception):
    """The mail server is busy."""


def test_listed_exceptions_are_retried_with_backoff(bench: Bench) -> None:
    """`retry_on`: the handler need not know of retries."""
    subscriber = bench.subscriber()
    queue = bench.names.queue()
    came: list[float] = []

    def handle(event: DomainEvent) -> None:
        came.append(time.monotonic())
        if event.retries == 2:
            subscriber.stop_consuming()
        raise Busy

    subscriber.register(
        handle,
        queue,
        ["#"],
        max_retries=2,
        retry_on=Busy,
        backoff=Backoff(first=0.2, factor=3, jitter=0),
    )
    bench.publish("user.registered")
    subscriber.start_consuming(timeout=20)
    first, second = (after - before for before, after in pairwise(came))
    assert first >= 0.2
    assert second >= 0.6
    assert str(letter_of(bench, queue).error_type).endswith("Busy")


def test_other_exceptions_are_not_retried(bench: Bench) -> None:
    """What is not listed is a dead letter at once."""
    subscriber = bench.subscriber()
    queue = bench.names.queue()

    def handle(_event: DomainEvent) -> None:
        subscriber.stop_consuming()
        raise ValueError("not busy: wrong")

    subscriber.register(handle, queue, ["#"], max_retries=2, retry_on=[Busy, OSError])
    bench.publish("user.registered")
    subscriber.start_consuming(timeout=20)
    assert onlooker.count(bench.url, f"{queue}-dl") == 1


def test_rejected_event_is_not_retried(bench: Bench) -> None:
    """`Reject` goes straight to the dead letters, with its reason."""
    subscriber = bench.subscriber()
    queue = bench.names.queue()

    def handle(_event: DomainEvent) -> None:
        subscriber.stop_consuming()
        raise Reject("no such user")

    subscriber.register(handle, queue, ["#"], max_retries=9)
    bench.publish("user.registered")
    subscriber.start_consuming(timeout=20)
    assert letter_of(bench, queue).error_message == "no such user"


def test_handler_that_asks_for_an_impossible_delay_fails(bench: Bench) -> None:
    """The event is a dead letter that says so; nothing is lost, nothing loops."""
    subscriber = bench.subscriber()
    queue = bench.names.queue()

    def handle(_event: DomainEvent) -> None:
        subscriber.stop_consuming()
        raise Retry(-1)

    subscriber.register(handle, queue, ["#"], max_retries=9)
    bench.publish("user.registered")
    subscriber.start_consuming(timeout=20)
    assert "19 days" in str(letter_of(bench, queue).error_message)


def test_thousand_retries_at_once_all_come_back(bench: Bench) -> None:
    """Retries do not wait for each other's confirms."""
    number = 1000
    subscriber = bench.subscriber()
    done: set[int] = set()

    def handle(event: DomainEvent) -> None:
        if event.retries == 0:
            raise Retry(0.5)
        done.add(event.data)
        if len(done) == number:
            subscriber.stop_consuming()

    queue = bench.names.queue()
    subscriber.register(handle, queue, ["#"], max_retries=1)
    bench.publisher.publish_many(DomainEvent("n.n", n) for n in range(number))
    subscriber.start_consuming(timeout=40)
    assert len(done) == number
    assert onlooker.count(bench.url, queue) == 0


def test_retry_whose_subscriber_is_gone_is_kept_and_blocks_nobody(bench: Bench) -> None:
    """It is due, nobody is there: it goes to `<exchange>.undelivered`."""
    gone, there = bench.names.queue("gone"), bench.names.queue("there")
    first = bench.subscriber()

    def ask_and_leave(_event: DomainEvent) -> None:
        first.stop_consuming()
        raise Retry(2)  # by then the queue must be deleted

    first.register(ask_and_leave, gone, ["gone.#"], max_retries=1)
    event = bench.publish("gone.away")
    first.start_consuming(timeout=20)
    onlooker.delete(bench.url, queues=[gone])
    undelivered = f"{bench.exchange}.undelivered"
    wait_until(lambda: onlooker.count(bench.url, undelivered) == 1)

    second = bench.subscriber()
    counts: list[int] = []

    def handle(event: DomainEvent) -> None:
        counts.append(event.retries)
        if event.retries:
            second.stop_consuming()
        raise Retry(0.1)

    second.register(handle, there, ["there.#"], max_retries=1)
    bench.publish("there.is")
    second.start_consuming(timeout=20)
    assert counts == [0, 1]
    _, body = onlooker.take(bench.url, undelivered)
    assert DomainEvent.from_json(body) == event


@pytest.mark.parametrize("broken", ["delays", "dead letters"])
def test_deleted_retry_queues_are_made_again(
    bench: Bench,
    peer: Peer,
    broken: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An operator deleted them under a running subscriber: the event is held, not lost."""
    monkeypatch.setattr("domain_events.forwarding._PAUSES", Backoff(0.2, jitter=0))
    subscriber = bench.subscriber()
    queue = bench.names.queue()
    dead = f"{queue}-dl"
    deliveries: list[int] = []

    def handle(event: DomainEvent) -> None:
        deliveries.append(event.retries)
        if broken == "dead letters":
            if len(deliveries) == 1:
                onlooker.delete(bench.url, queues=[dead])
            raise Reject("to the dead letters")
        if len(deliveries) == 1:
            peer.consuming.delete([], bench.exchange, TIMEOUT)
        if event.retries == 0:
            raise Retry(0.1)

    subscriber.register(handle, queue, ["#"], max_retries=1)
    bench.publish("user.registered")
    with caplog.at_level(logging.ERROR, "domain_events"), running(subscriber):
        if broken == "dead letters":
            # It is declared again before anything can be in it.
            wait_until(lambda: "could not be forwarded" in caplog.text)
            wait_until(lambda: onlooker.exists(bench.url, dead))
            wait_until(lambda: onlooker.count(bench.url, dead) == 1)
        else:
            wait_until(lambda: len(deliveries) == 2)
    assert "could not be forwarded" in caplog.text
    assert deliveries == ([0] if broken == "dead letters" else [0, 1])
    assert onlooker.count(bench.url, queue) == 0


def test_delays_are_declared_with_the_first_that_may_retry(bench: Bench) -> None:
    """A subscriber that never retries leaves none of their queues on the broker."""
    undelivered = f"{bench.exchange}.undelivered"
    with bench.subscriber() as subscriber:
        subscriber.register(print, bench.names.queue("a"), ["#"])
        assert not onlooker.exists(bench.url, undelivered)
        subscriber.register(print, bench.names.queue("b"), ["#"], max_retries=1)
        assert onlooker.exists(bench.url, undelivered)


def test_long_delays_are_kept(bench: Bench) -> None:
    """Nineteen days: the retry is taken, and is neither due nor a dead letter."""
    queue = bench.names.queue()
    subscriber = bench.subscriber()

    def handle(event: DomainEvent) -> None:
        if event.data == "last":
            subscriber.stop_consuming()
        else:
            raise Retry(19 * 24 * 3600)

    subscriber.register(handle, queue, ["#"], max_retries=1)
    bench.publish("a.b", "long")
    bench.publish("a.b", "last")
    subscriber.start_consuming(timeout=20)
    for name in (queue, f"{queue}-dl", f"{bench.exchange}.undelivered"):
        assert onlooker.count(bench.url, name) == 0
