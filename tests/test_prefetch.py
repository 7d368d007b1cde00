"""The prefetch of a subscriber that leaves it to us: few events, and many for a fast handler."""

from __future__ import annotations

import itertools
import threading
import time
from functools import partial
from typing import Any

import onlooker
import pytest
from bench import Bench
from live import consuming
from support import wait_until

from domain_events import DomainEvent, Subscriber
from domain_events.broker import Prefetch
from domain_events.broker.rabbitmq import consumer
from domain_events.broker.rabbitmq.consumer import prefetch_count
from domain_events.subscription import make_options

FEW, MANY = 50, 2000


def held(bench: Bench, queue: str, published: int, seen: list[int]) -> int:
    """How many events the subscriber has and has not handled."""
    return published - len(seen) - onlooker.count(bench.url, queue)


def publish(bench: Bench, number: int) -> None:
    bench.publisher.publish_many(DomainEvent("n.n", n) for n in range(number))


@pytest.mark.parametrize(
    ("now", "rate", "unsettled", "expected"),
    [
        (FEW, 0, FEW, FEW),
        (FEW, 4999, FEW, FEW),
        (FEW, 5000, FEW, MANY),
        (MANY, 5000, MANY, MANY),
        (MANY, 2100, MANY, MANY),  # less than a second's work
        (MANY, 1900, MANY, FEW),
        (MANY, 0, FEW, MANY),  # there is just not much to do
        (MANY, 0, 0, MANY),
        (MANY, 0, FEW + 1, FEW),
    ],
)
def test_handler_gets_many_while_it_is_fast(
    now: int, rate: float, unsettled: int, expected: int
) -> None:
    """And few when what it holds is more than a second's work; no to and fro between them."""
    assert prefetch_count(Prefetch(FEW, MANY), now, rate, unsettled) == expected
    assert prefetch_count(Prefetch(7, 7), 7, rate, unsettled) == 7


@pytest.mark.parametrize(
    ("options", "workers", "expected"),
    [
        ({}, 1, (50, 2000)),
        ({}, 16, (64, 2000)),
        ({}, 600, (2400, 2400)),
        ({"prefetch_count": 10}, 16, (10, 10)),
        ({"auto_delete": True}, 1, (50, 50)),
    ],
)
def test_there_is_enough_for_all_workers(
    options: dict[str, int], workers: int, expected: tuple[int, int]
) -> None:
    """And an auto-delete queue, which would go at a change, stays at one number."""
    defaults = {
        "exchange": "x",
        "exchange_type": "topic",
        "durable": True,
        "exclusive": False,
        "auto_delete": False,
        "max_retries": 0,
        "queue_type": "quorum",
        "prefetch_count": None,
        "ordered": False,
    }
    made = make_options("name", ["#"], None, (), None, **{**defaults, **options})
    assert made.prefetch(workers) == expected


def test_slow_handler_leaves_the_rest_to_others(bench: Bench) -> None:
    """By default a process holds 50 events."""
    subscriber, queue = bench.subscriber(), bench.names.queue()
    seen: list[int] = []
    go_on = threading.Event()

    def handle(event: DomainEvent) -> None:
        go_on.wait(30)
        seen.append(event.data)

    subscriber.register(handle, queue, ["#"])
    publish(bench, 500)
    with consuming(subscriber, bench.url, queue):
        wait_until(lambda: held(bench, queue, 500, seen) == FEW)
        go_on.set()
        wait_until(lambda: len(seen) == 500)
    assert seen == list(range(500))


def test_handler_that_becomes_fast_and_slow_again_holds_many_and_few(bench: Bench) -> None:
    """Each event is handled once and in its order meanwhile."""
    number = 12_000
    subscriber, queue = bench.subscriber(), bench.names.queue()
    seen: list[int] = []
    slow = threading.Event()
    go_on = threading.Event()

    def handle(event: DomainEvent) -> None:
        seen.append(event.data)
        if slow.is_set():
            time.sleep(0.001)
        elif len(seen) == number // 2:
            go_on.wait(30)

    subscriber.register(handle, queue, ["#"])
    publish(bench, number)
    with consuming(subscriber, bench.url, queue):
        wait_until(lambda: len(seen) == number // 2)
        # The one that is being handled is seen, and held.
        wait_until(lambda: held(bench, queue, number, seen) == MANY - 1)
        slow.set()
        go_on.set()
        wait_until(lambda: 0 <= held(bench, queue, number, seen) <= FEW, timeout=30)
        slow.clear()
        wait_until(lambda: len(seen) == number, timeout=30)
    assert seen == list(range(number))


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Another prefetch every few milliseconds; which were asked for."""
    counts = itertools.cycle([3, 40, 1, 150])
    asked_for: list[int] = []
    limit = consumer.RabbitConsumer._limit

    def count(self: consumer.RabbitConsumer, *arguments: Any) -> None:
        asked_for.append(self._prefetch_count)
        limit(self, *arguments)

    monkeypatch.setattr(consumer, "prefetch_count", lambda *_: next(counts))
    monkeypatch.setattr(consumer, "_LONGEST_WITHHELD", 0.02)
    monkeypatch.setattr(consumer.RabbitConsumer, "_limit", count)
    return asked_for


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
@pytest.mark.parametrize("size", [0, 200_000])
def test_nothing_is_lost_nor_comes_twice_nor_out_of_order_at_a_change(
    bench: Bench, restless: list[int], queue_type: str, size: int
) -> None:
    """Also events of several frames, of which pika would give back what comes meanwhile."""
    number = 600 if size else 20_000
    subscriber, queue = bench.subscriber(), bench.names.queue()
    seen: list[int] = []

    def handle(event: DomainEvent) -> None:
        seen.append(event.data[0])
        if size:
            time.sleep(0.002)  # or it is over before there is a change
        if len(seen) == number:
            subscriber.stop_consuming()

    subscriber.register(handle, queue, ["#"], queue_type=queue_type)  # type: ignore[arg-type]
    bench.publisher.publish_many(DomainEvent("n.n", (n, "x" * size)) for n in range(number))
    subscriber.start_consuming(timeout=60)
    assert seen == list(range(number))
    assert len(restless) > 10
    wait_until(lambda: onlooker.count(bench.url, queue) == 0)


def test_stop_in_the_middle_of_a_change_gives_back_the_rest(
    bench: Bench, restless: list[int]
) -> None:
    """At once: no wait runs into its deadline. Each run goes on where the last one ended."""
    number, seen = 5000, set[int]()

    def handle(subscriber: Subscriber, last: int, event: DomainEvent) -> None:
        seen.add(event.data)
        time.sleep(0.0005)
        if len(seen) >= min(last, number):
            subscriber.stop_consuming()

    queue = bench.names.queue()
    with bench.subscriber() as subscriber:
        subscriber.register(print, queue, ["#"])
    publish(bench, number)
    begun = time.monotonic()
    runs = 0
    while len(seen) < number:
        runs += 1
        with bench.subscriber() as subscriber:
            subscriber.register(partial(handle, subscriber, 97 * runs), queue, ["#"])
            subscriber.start_consuming(timeout=10)
    assert runs > 40
    assert time.monotonic() - begun < runs  # 10 s would be the deadline
    assert len(restless) > 1.2 * runs  # not only the first of each run
    assert onlooker.count(bench.url, queue) == 0


def test_change_goes_on_over_lost_connections(bench: Bench, restless: list[int]) -> None:
    """What was unsettled comes again; nothing is lost."""
    number = 20_000
    subscriber, queue = bench.subscriber(), bench.names.queue()
    seen: set[int] = set()
    subscriber.register(lambda event: seen.add(event.data), queue, ["#"])
    publish(bench, number)
    with consuming(subscriber, bench.url, queue):
        link = subscriber._consuming._link  # type: ignore[union-attr]
        for part in range(1, 10):
            wait_until(lambda part=part: len(seen) >= number * part // 10, timeout=30)  # type: ignore[misc]
            link.wake(link.cut)
        wait_until(lambda: len(seen) == number, timeout=30)
        wait_until(lambda: onlooker.count(bench.url, queue) == 0)
    assert len(restless) > 10
